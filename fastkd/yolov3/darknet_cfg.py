"""Darknet's ``.cfg`` files: the layers, classes and anchors, which a ``.weights`` file does not contain."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from fastkd.yolov3.model import Detector, YOLOv3, YOLOv3Tiny, build_detector, name_of

PUBLISHED_SIZE = 416  # side of the input in pixels
PUBLISHED_CLASSES = 80  # those of COCO
_WIDEST = 1024  # filters of both models' widest layer at width 1

# options in which a layer must agree; the last three belong to later networks and must be absent
_COMPARED = (
    *("batch_normalize", "filters", "size", "stride", "activation", "layers", "from"),
    *("groups", "scale_x_y", "new_coords"),
)

Section: TypeAlias = tuple[str, dict[str, str]]

_CONV = "convolutional"
_LAYERS: dict[type[Detector], list[str]] = {
    YOLOv3: [
        _CONV,
        *(x for n in (1, 2, 8, 8, 4) for x in [_CONV, *[_CONV, _CONV, "shortcut -3"] * n]),
        *[_CONV] * 5,
        *(_CONV, _CONV, "yolo 2", "route -4", _CONV, "upsample 2", "route -1,61", *[_CONV] * 5),
        *(_CONV, _CONV, "yolo 1", "route -4", _CONV, "upsample 2", "route -1,36", *[_CONV] * 5),
        *(_CONV, _CONV, "yolo 0"),
    ],
    YOLOv3Tiny: [
        *[_CONV, "maxpool 2"] * 5,
        *(_CONV, "maxpool 1", *[_CONV] * 2),
        *(_CONV, _CONV, "yolo 1", "route -4", _CONV, "upsample 2", "route -1,8"),
        *(_CONV, _CONV, "yolo 0"),
    ],
}


class Described(NamedTuple):
    """The detector that a ``.cfg`` file describes."""

    model: str  # "yolov3" or "yolov3-tiny"
    num_classes: int
    width: float
    anchors: Tensor | None  # (heads, A, 2) pixels, the finest head first; None: the model's own
    size: int | None  # side of the square input in pixels; None: not known


PUBLISHED = Described("yolov3", PUBLISHED_CLASSES, 1.0, None, None)  # if nothing is known about a .weights file


def write_cfg(model: Detector, size: int | None = None) -> str:
    """Return the text of a ``.cfg`` file with which Darknet can read the model's ``.weights`` file.

    Args:
        model: the detector.
        size: side of its square input in pixels; None: 416.
    """
    side = str(size or PUBLISHED_SIZE)
    net = ("net", {"batch": "1", "subdivisions": "1", "width": side, "height": side, "channels": "3"})
    text = [f"# {name_of(model)} of fastkd, width {model.width!r}"]
    for kind, options in [net, *_sections(model)]:
        text += ["", f"[{kind}]", *(f"{name}={value}" for name, value in options.items())]
    return "\n".join(text) + "\n"


def read_cfg(path: str | os.PathLike[str]) -> Described:
    """Return the YOLOv3 or YOLOv3-tiny, of any width, that a ``.cfg`` file describes.

    Raises:
        ValueError: the file describes another network (the message names the layer that differs), or is not a ``.cfg``
            file.
    """
    text = Path(path).read_text(encoding="utf-8-sig", errors="replace")
    sections = _parsed(text, path)
    heads = [options for kind, options in sections if kind == "yolo"]
    name = {3: "yolov3", 2: "yolov3-tiny"}.get(len(heads))
    if name is None:
        raise ValueError(f"{path}: expected the 3 [yolo] layers of YOLOv3 or the 2 of YOLOv3-tiny, got {len(heads)}")
    try:
        net, layers = sections[0][1], sections[1:]
        (classes,) = {int(head["classes"]) for head in heads}
        anchors = [_anchors_of(head) for head in reversed(heads)]
        (size,) = {int(net.get(side, PUBLISHED_SIZE)) for side in ("width", "height")}
        ours = re.match(r"# \S+ of fastkd, width (\S+)", text)
        filters = max(int(options["filters"]) for kind, options in layers if options.get("batch_normalize") == "1")
        width = float(ours[1]) if ours else filters / _WIDEST
        found = Described(name, classes, width, torch.tensor(anchors), size)
        with torch.device("meta"):
            expected = _sections(build_detector(name, found.num_classes, width, found.anchors))
    except (KeyError, ValueError, IndexError, RuntimeError) as error:
        raise ValueError(
            f"{path}: expected a .cfg file of Darknet with a square input and filters, and in each [yolo] section the "
            f"same classes, anchors in pairs, and a mask of anchor numbers ({type(error).__name__}: {error})"
        ) from None
    for number, (a, b) in enumerate(zip(layers, expected, strict=False)):
        if a[0] != b[0] or any(_plain(a[1].get(key)) != b[1].get(key) for key in _COMPARED):
            raise ValueError(f"{path}: expected layer {number} of {name} to be {b}, got {a}")
    if len(layers) != len(expected):
        raise ValueError(f"{path}: expected the {len(expected)} layers of {name}, got {len(layers)}")
    return found


def _plain(value: str | None) -> str | None:
    return None if value is None else value.replace(" ", "")


def _sections(model: Detector) -> list[Section]:
    """Return the layers of the model as sections of a ``.cfg`` file."""
    convolutions = (module for module in model.modules() if isinstance(module, nn.Conv2d))
    return [_section(layer, convolutions, model) for layer in _LAYERS[type(model)]]


def _section(layer: str, convolutions: Iterator[nn.Conv2d], model: Detector) -> Section:
    kind, _, value = layer.partition(" ")
    if kind == _CONV:
        conv = next(convolutions)
        normalised = {} if conv.bias is not None else {"batch_normalize": "1"}
        shape = {"filters": conv.out_channels, "size": conv.kernel_size[0], "stride": conv.stride[0], "pad": 1}
        activation = "linear" if conv.bias is not None else "leaky"
        return kind, normalised | {k: str(v) for k, v in shape.items()} | {"activation": activation}
    if kind == "yolo":
        return kind, _yolo(model, int(value))
    names = {"maxpool": "stride", "upsample": "stride", "route": "layers", "shortcut": "from"}
    more = {"size": "2"} if kind == "maxpool" else {"activation": "linear"} if kind == "shortcut" else {}
    return kind, {names[kind]: value} | more


def _yolo(model: Detector, head: int) -> dict[str, str]:
    per_head = model.anchors.shape[1]
    anchors = [f"{side:.9g}" for side in model.anchors.flatten().tolist()]
    mask = range(head * per_head, (head + 1) * per_head)
    return {
        "mask": ",".join(map(str, mask)),
        "anchors": ",".join(anchors),
        "classes": str(model.num_classes),
        "num": str(model.anchors.shape[0] * per_head),
    }


def _parsed(text: str, path: str | os.PathLike[str]) -> list[Section]:
    """Return the sections and their options, without comments and spaces."""
    sections: list[Section] = []
    for line in map(str.strip, text.splitlines()):
        if line.startswith("["):
            sections.append((line.strip("[]"), {}))
        elif line and line[0] not in "#;":
            name, _, value = line.partition("=")
            if not sections:
                raise ValueError(
                    f"{path}: expected a .cfg file of Darknet, got {line[:40]!r} before the first [section]"
                )
            sections[-1][1][name.strip()] = value.strip()
    return sections


def _anchors_of(head: dict[str, str]) -> list[tuple[float, float]]:
    """Return the anchors that the head's mask selects."""
    sides = [float(side) for side in head["anchors"].rstrip(", ").split(",")]
    pairs = dict(enumerate(zip(sides[::2], sides[1::2], strict=True)))
    return [pairs[int(number)] for number in head["mask"].split(",")]
