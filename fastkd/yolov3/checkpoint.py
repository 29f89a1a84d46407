"""Files of trained detectors: they are written atomically, and reading one runs no code from it."""

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
    class_names: tuple[str, ...]  # one per class; empty if no file gives them (.weights)
    size: int | None  # side in pixels of the square input that it was trained on; None if the file does not give it
    notes: tuple[str, ...] = ()  # assumptions that were made; each is a sentence that names the file


def save_detector(
    model: Detector, path: str | os.PathLike[str], class_names: Sequence[str] = (), size: int | None = None
) -> None:
    """Write a file for ``load_detector``: the detector alone, without optimiser, adapters or teacher.

    Args:
        model: the detector.
        path: a ``.pt`` file is a dictionary that ``torch.load(path, weights_only=True)`` reads; a ``.weights`` file has
            Darknet's format, and beside it are written a ``.cfg`` file (layers, classes, anchors and size) and a
            ``.names`` file (class names). Existing files are replaced.
        class_names: one per class. If there are none, an existing ``.names`` file stays, and is read with the weights.
        size: side in pixels of the network's input.

    Raises:
        ValueError: the suffix is another one, or the number of names is not the number of classes.
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
        model, num_classes, width, anchors: what a ``.weights`` file does not contain; ignored for ``.pt``. None: taken
            from the ``.cfg`` file beside the weights. If there is no ``.cfg`` file, the size of the weights file gives
            the model and the number of classes, the width is 1.0, and the anchors are those of ``load_weights``.
        class_names: one per class, which replace the file's own. None: those of the ``.pt`` file, or of the ``.names``
            file beside the ``.weights`` file. If there is no ``.names`` file, a detector of 80 classes gets COCO's
            names, with a note in ``notes``, and any other detector gets none.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a detector's or has another suffix; the ``.cfg`` file is not valid or contradicts
            the arguments; the weights do not fit the model or are not finite; or the number of names is not the number
            of classes.
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
    """Return the detector with these class names; None: those that go with a ``.weights`` file."""
    beside, classes, notes = path.with_suffix(".names"), found.model.num_classes, found.notes
    source = "class_names"
    if names is None and beside.is_file():
        names, source = read_names(beside), os.fspath(beside)
    elif names is None and classes == len(COCO_NAMES):
        names = COCO_NAMES
        notes = (*notes, f"{path.name}: assumed to have COCO's 80 classes, as there is no {beside.name} beside it")
    if names and len(names) != classes:
        raise ValueError(f"{source}: expected {classes} names, one for each class of {path}, got {len(names)}")
    return found._replace(class_names=tuple(names or ()), notes=notes)


def _load_weights(path: Path, given: dict[str, Any], anchors: AnchorSizes | None) -> Trained:
    cfg = path.with_suffix(".cfg")
    described = read_cfg(cfg) if cfg.is_file() else None
    options = {name: value for name, value in given.items() if value is not None}
    for name, value in options.items():
        if described is not None and getattr(described, name) != value:
            raise ValueError(f"{name}: expected {getattr(described, name)!r} as in {cfg}, got {value!r}")
    by_size = None
    if described is None and not {"model", "num_classes"} <= options.keys():
        by_size = described_by_size(path.stat().st_size, given["model"], given["width"], anchors)
    known = described or by_size or PUBLISHED
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
    note = f"{path.name}: assumed from its size to be a {name_of(detector)} of {detector.num_classes} classes"
    return Trained(detector.eval(), (), known.size, (note,) if by_size else ())


def read_dictionary(path: Path, what: str, keys: Sequence[str]) -> dict[str, Any]:
    """Read a dictionary with these keys that ``torch.save`` wrote; no code from the file is run.

    Args:
        path: the file.
        what: the kind of file that is expected, for error messages.
        keys: the keys that have to be there.

    Raises:
        ValueError: the file is damaged, contains code, or lacks some of the keys.
    """
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "global" not in str(error).lower():  # a damaged pickle, not one that calls something
            raise ValueError(f"{path}: not readable as {what}; is the file complete?") from error
        raise ValueError(
            f"{path}: refused, because it contains code besides weights (read with weights_only=True); if you trust "
            "the file, load it yourself and write its model again with fastkd.yolov3.checkpoint.save_detector"
        ) from error
    except Exception as error:  # for a damaged file, torch.load may raise any exception
        raise ValueError(f"{path}: not readable as {what} ({type(error).__name__}); is the file complete?") from error
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
            "wrote the file diverged: take an earlier file, or train again"
        )


def _suffix(path: Path) -> str:
    if path.suffix not in (".pt", ".weights"):
        raise ValueError(f"{path}: expected a file name that ends in .pt or .weights, got {path.suffix!r}")
    return path.suffix
