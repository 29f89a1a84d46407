"""Names of classes: those of COCO and of Darknet's ``.names`` files, and whether two lists name the same classes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

# in the order of COCO's category ids, spelt as in COCO's own files
COCO_NAMES = (
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light"),
    *("fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow"),
    *("elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee"),
    *("skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard"),
    *("tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple"),
    *("sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch"),
    *("potted plant", "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard", "cell phone"),
    *("microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear"),
    *("hair drier", "toothbrush"),
)

# Darknet's coco.names spells six of them as Pascal VOC does
_SPELT_BY_DARKNET = {
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "pottedplant": "potted plant",
    "diningtable": "dining table",
    "tvmonitor": "tv",
}


def read_names(source: str | os.PathLike[str]) -> tuple[str, ...]:
    """Return the class names that ``--names`` chooses.

    Args:
        source: ``"coco"`` for the 80 names of COCO, or a ``.names`` file of Darknet: UTF-8 text, one name per line.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not text, is empty, or has an empty line before its last name.
    """
    if source == "coco":
        return COCO_NAMES
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"names: expected coco or a file with one class name per line; there is no file {path}")
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8-sig").rstrip().splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"names: expected UTF-8 text with one class name per line, got {path}: {error}") from None
    if not names or "" in names:
        what = f"an empty line {names.index('') + 1}" if names else "no name"
        raise ValueError(f"names: expected one class name per line, got {what} in {path}")
    return tuple(names)


def same_names(a: Sequence[str], b: Sequence[str]) -> bool:
    """Whether both list the same classes in the same order; COCO's names may be spelt as in ``coco.names``."""
    return [_SPELT_BY_DARKNET.get(name, name) for name in a] == [_SPELT_BY_DARKNET.get(name, name) for name in b]
