"""Files of trained detectors: what is written is whole or absent, what is read can run no code."""

from __future__ import annotations

import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastkd.files import replacing, save
from fastkd.yolov3.class_names import COCO_NAMES, read_names
from fastkd.yolov3.darknet import described_by_size, load_weights, save_weights
from fastkd.yolov3.darknet_cfg import PUBLISHED, read_cfg, write_cfg
from fastkd.yolov3.model import AnchorSizes, Detector, build_detector, name_of

_FORMAT = "fastkd detector 1"
_KEYS = ("format", "model", "num_classes", "width", "anchors", "class_names", "size", "state_dict")


class Trained(NamedTuple):
    """A detector from a file, in eval mode on the CPU."""

    model: Detector
    class_names: tuple[str, ...]  # one per class; empty where nothing says them (.weights)
    size: int | None  # side in pixels of the square input that it was trained on; None where the file does not say
    notes: tuple[str, ...] = ()  # what was taken for granted; each a sentence that names the file


def save_detector(
    model: Detector, path: str | os.PathLike[str], class_names: Sequence[str] = (), size: int | None = None
) -> None:
    """Write a detector alone, without optimiser, adapters or teacher, for ``load_detector``.

    Args:
        model: what to save.
        path: ``.pt``: a dictionary that ``torch.load(path, weights_only=True)`` reads; ``.weights``: Darknet's format,
            with a ``.cfg`` of the same name beside it that has layers, classes, anchors and size, and a ``.names``
            that has the class names. Replaced if there.
        class_names: one per class. Without any, a ``.names`` file that is there stays, and is read with the weights.
        size: side in pixels of the network's input.

    Raises:
        ValueError: another suffix, or a number of names that is not the number of classes.
    """
    path = Path(path)
    if class_names and len(class_names) != model.num_classes:
        raise ValueError(f"class_names: expected {model.num_classes}, one per class, got {len(class_names)}")
    if _suffix(path) == ".weights":
        save_weights(model, path)
        with replacing(path.with_suffix(".cfg")) as part:
            part.write_text(write_cfg(model, size), encoding="utf-8")
        if class_names:
            with replacing(path.with_suffix(".names")) as part:
                part.write_text("".join(f"{name}\n" for name in class_names), encoding="utf-8")
        return
    content = {
        "format": _FORMAT,
        "model": name_of(model),
        "num_classes": model.num_classes,
        "width": model.width,
        "anchors": model.anchors.cpu(),
        "class_names": list(class_names),
        "size": size,
        "state_dict": {name: value.cpu().contiguous() for name, value in model.state_dict().items()},
    }
    save(content, path)


def load_detector(
    path: str | os.PathLike[str],
    *,
    model: str | None = None,
    num_classes: int | None = None,
    width: float | None = None,
    anchors: AnchorSizes | None = None,
    class_names: Sequence[str] | None = None,
) -> Trained:
    """Read a detector that ``save_detector`` or Darknet wrote.

    Args:
        path: a ``.pt`` or ``.weights`` file.
        model, num_classes, width, anchors: what a ``.weights`` file does not say; not looked at for ``.pt``. None: as
            the ``.cfg`` beside it says; without one width 1.0, the model and the number of classes that have a file of
            this size, and the anchors of ``load_weights``.
        class_names: one per class, in place of those that the file has. None: those of a ``.pt``, or of the ``.names``
            file beside a ``.weights``; without that COCO's for 80 classes (then ``notes`` says so), else none.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a detector's file, another suffix, a ``.cfg`` that says something else or is none, weights that
            do not fit the model or are not finite, or another number of names than of classes.
    """
    path = Path(path)
    suffix = _suffix(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; train a detector first (fastkd train) or give another path")
    if suffix == ".weights":
        found = _load_weights(path, {"model": model, "num_classes": num_classes, "width": width}, anchors)
        return _named(found, path, class_names)
    content = read_dictionary(path, "a detector's file, model.pt", _KEYS)
    if content["format"] != _FORMAT:
        raise ValueError(f"{path}: expected a file of format {_FORMAT!r}, got {content['format']!r}")
    try:
        detector = build_detector(content["model"], content["num_classes"], content["width"], content["anchors"])
        detector.load_state_dict(content["state_dict"])
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{path}: its weights do not fit the {content['model']} that it names: {error}") from error
    _require_finite(detector, path)
    names = content["class_names"] if class_names is None else class_names
    return _named(Trained(detector.eval(), (), content["size"]), path, names)


def _named(found: Trained, path: Path, names: Sequence[str] | None) -> Trained:
    """With these class names; None: those that go with a ``.weights`` file."""
    beside, classes, notes = path.with_suffix(".names"), found.model.num_classes, found.notes
    source = "class_names"
    if names is None and beside.is_file():
        names, source = read_names(beside), os.fspath(beside)
    elif names is None and classes == len(COCO_NAMES):
        names = COCO_NAMES
        notes = (*notes, f"{path.name}: its 80 classes are taken to be COCO's, as there is no {beside.name} beside it")
    if names and len(names) != classes:
        raise ValueError(f"{source}: expected {classes} names, one for each class of {path}, got {len(names)}")
    return found._replace(class_names=tuple(names or ()), notes=notes)


def _load_weights(path: Path, given: dict[str, Any], anchors: AnchorSizes | None) -> Trained:
    cfg = path.with_suffix(".cfg")
    said = read_cfg(cfg) if cfg.is_file() else None
    options = {name: value for name, value in given.items() if value is not None}
    for name, value in options.items():
        if said is not None and getattr(said, name) != value:
            raise ValueError(f"{name}: expected {getattr(said, name)!r}, as {cfg} says, got {value!r}")
    by_size = None
    if said is None and not {"model", "num_classes"} <= options.keys():
        by_size = described_by_size(path.stat().st_size, given["model"], given["width"], anchors)
    known = said or by_size or PUBLISHED
    detector = build_detector(
        options.get("model", known.model),
        options.get("num_classes", known.num_classes),
        options.get("width", known.width),
        known.anchors if anchors is None else anchors,
    )
    given_anchors = detector.anchors.clone()
    load_weights(detector, path)
    if anchors is not None:
        detector.anchors.copy_(given_anchors)
    _require_finite(detector, path)
    what = f"{path.name}: by its size a {name_of(detector)} of {detector.num_classes} classes"
    return Trained(detector.eval(), (), known.size, (what,) if by_size else ())


def read_dictionary(path: Path, what: str, keys: Sequence[str]) -> dict[str, Any]:
    """What ``torch.save`` wrote of a dictionary with these keys; no code of the file is run.

    Raises:
        ValueError: the file is damaged, carries code, or is another one than ``what`` says.
    """
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "global" not in str(error).lower():  # what the file wants to call, not a damaged pickle
            raise ValueError(f"{path}: not readable as {what}; is it whole?") from error
        raise ValueError(
            f"{path}: refused, as it carries code and not only weights (read with weights_only=True); load it where "
            "you trust it, and write its model anew with fastkd.yolov3.checkpoint.save_detector"
        ) from error
    except Exception as error:  # torch.load raises whatever a damaged file makes its parts raise
        raise ValueError(f"{path}: not readable as {what} ({type(error).__name__}); is it whole?") from error
    absent = [key for key in keys if key not in content] if isinstance(content, dict) else keys
    if absent:
        found = f" with {', '.join(map(str, list(content)[:5]))}" if isinstance(content, dict) else ""
        raise ValueError(
            f"{path}: expected {what} of this version of fastkd, got a {type(content).__name__}{found}, without "
            f"{', '.join(absent[:5])}"
        )
    return content


def _require_finite(model: Detector, path: Path) -> None:
    bad = [name for name, value in model.state_dict().items() if not bool(value.isfinite().all())]
    if bad:
        some = f"{bad[0]}, ..." if len(bad) > 1 else bad[0]
        raise ValueError(
            f"{path}: expected finite weights, got {len(bad)} tensors with NaN or infinity ({some}); the training that "
            "wrote it went wrong: take an earlier file, or train again"
        )


def _suffix(path: Path) -> str:
    if path.suffix not in (".pt", ".weights"):
        raise ValueError(f"{path}: expected a file name that ends in .pt or .weights, got {path.suffix!r}")
    return path.suffix
