"""Files of trained detectors: what is written is whole or absent, what is read can run no code."""

from __future__ import annotations

import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastkd.files import replacing
from fastkd.yolov3.darknet import load_weights, save_weights
from fastkd.yolov3.model import AnchorSizes, YOLOv3, YOLOv3Tiny

Detector = YOLOv3 | YOLOv3Tiny
MODELS: dict[str, type[YOLOv3] | type[YOLOv3Tiny]] = {"yolov3": YOLOv3, "yolov3-tiny": YOLOv3Tiny}
_FORMAT = "fastkd detector 1"


class Trained(NamedTuple):
    """A detector from a file, in eval mode on the CPU."""

    model: Detector
    class_names: tuple[str, ...]  # one per class; empty where the file does not say (.weights)
    size: int | None  # side in pixels of the square input that it was trained on; None where the file does not say


def build_detector(
    name: str, num_classes: int = 80, width: float = 1.0, anchors: AnchorSizes | None = None
) -> Detector:
    """A detector with initial weights, by name.

    Raises:
        ValueError: unknown name (lists the known ones), or as the model itself.
    """
    if name not in MODELS:
        raise ValueError(f"model: expected one of {', '.join(MODELS)}; got {name!r}")
    return MODELS[name](num_classes, width, anchors)


def save_detector(
    model: Detector, path: str | os.PathLike[str], class_names: Sequence[str] = (), size: int | None = None
) -> None:
    """Write a detector alone, without optimiser, adapters or teacher, for ``load_detector``.

    Args:
        model: what to save.
        path: ``.pt``: a dictionary that ``torch.load(path, weights_only=True)`` reads; ``.weights``: Darknet's format,
            which keeps neither anchors nor names. Replaced if it exists.
        class_names: one per class.
        size: side in pixels of the network's input.

    Raises:
        ValueError: another suffix, or a number of names that is not the number of classes.
    """
    path = Path(path)
    if class_names and len(class_names) != model.num_classes:
        raise ValueError(f"class_names: expected {model.num_classes}, one per class, got {len(class_names)}")
    if _suffix(path) == ".weights":
        save_weights(model, path)
        return
    content = {
        "format": _FORMAT,
        "model": next(name for name, kind in MODELS.items() if type(model) is kind),
        "num_classes": model.num_classes,
        "width": model.width,
        "anchors": model.anchors.cpu(),
        "class_names": list(class_names),
        "size": size,
        "state_dict": {name: value.cpu().contiguous() for name, value in model.state_dict().items()},
    }
    with replacing(path) as part:
        torch.save(content, part)


def load_detector(
    path: str | os.PathLike[str],
    *,
    model: str = "yolov3",
    num_classes: int = 80,
    width: float = 1.0,
    anchors: AnchorSizes | None = None,
) -> Trained:
    """Read a detector that ``save_detector`` or Darknet wrote.

    Args:
        path: a ``.pt`` or ``.weights`` file.
        model, num_classes, width, anchors: what a ``.weights`` file does not say; not looked at for ``.pt``. Without
            anchors a ``.weights`` file gets the model's own, as published.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a detector's file, another suffix, or weights that do not fit the model.
    """
    path = Path(path)
    suffix = _suffix(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; train a detector first (fastkd train) or give another path")
    if suffix == ".weights":
        if anchors is None and model == "yolov3-tiny" and num_classes == 80:
            anchors = YOLOv3Tiny.published_anchors  # those that the official file was trained with
        detector = build_detector(model, num_classes, width, anchors)
        load_weights(detector, path)
        return Trained(detector.eval(), (), None)
    content = _read(path)
    detector = build_detector(content["model"], content["num_classes"], content["width"], content["anchors"])
    try:
        detector.load_state_dict(content["state_dict"])
    except RuntimeError as error:
        raise ValueError(f"{path}: its weights do not fit the {content['model']} that it names: {error}") from error
    return Trained(detector.eval(), tuple(content["class_names"]), content["size"])


def _read(path: Path) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "global" not in str(error).lower():  # what the file wants to call, not a damaged pickle
            raise ValueError(f"{path}: not readable as a detector's file; is it whole?") from error
        raise ValueError(
            f"{path}: refused, as it carries code and not only weights (read with weights_only=True); load it where "
            "you trust it, and write its model anew with fastkd.yolov3.checkpoint.save_detector"
        ) from error
    except Exception as error:  # torch.load raises whatever a damaged file makes its parts raise
        raise ValueError(f"{path}: not readable as a detector's file ({type(error).__name__}); is it whole?") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        found = f" with {', '.join(map(str, list(content)[:5]))}" if isinstance(content, dict) else ""
        raise ValueError(
            f"{path}: not a detector's file; expected what fastkd train exports, model.pt, got a "
            f"{type(content).__name__}{found}"
        )
    return content


def _suffix(path: Path) -> str:
    if path.suffix not in (".pt", ".weights"):
        raise ValueError(f"{path}: expected a file name that ends in .pt or .weights, got {path.suffix!r}")
    return path.suffix
