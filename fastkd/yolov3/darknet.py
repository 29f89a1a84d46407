"""Darknet ``.weights`` files: a header of 20 bytes, then float32 values, little-endian, layer after layer.

A layer with batch norm holds its bias, scale, running mean, running variance, then the convolution; one without
holds bias, then convolution. Layers come in the order in which a model registers its modules.
"""

from __future__ import annotations

import ctypes
import os
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from fastkd.files import replacing
from fastkd.yolov3.darknet_cfg import PUBLISHED_CLASSES, PUBLISHED_SIZE, Described, read_cfg
from fastkd.yolov3.model import MODELS, AnchorSizes, Detector, YOLOv3, YOLOv3Tiny, build_detector, name_of

_VERSION = (0, 2, 0)  # as in the files published with the paper
PUBLISHED_SEEN = 32_013_312  # images that the published files had seen, by their header
_LONG_HEADER = struct.Struct("<iiiq")  # major, minor, revision, images seen
_SHORT_HEADER = struct.Struct("<iiii")  # before version 0.2


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> int:
    """Read a Darknet ``.weights`` file into a model, in place; nothing is changed when the file does not fit.

    Also takes a part of a model: ``load_weights(yolov3.backbone, "darknet53.conv.74")``. A detector with the default
    anchors of its class gets those that the weights were trained with, where these are known: of the ``.cfg`` beside
    the file, or of the published yolov3-tiny.weights, whose own ``.cfg`` is wrong.

    Args:
        model: of convolutions and batch norms in the file's order, such as ``YOLOv3`` and ``YOLOv3Tiny``.
        path: the file.

    Returns:
        How many images the file's network had seen in training.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is shorter or longer than the model's weights (says by how much).
    """
    data = Path(path).read_bytes()
    tensors = list(_in_file_order(model))
    size = 4 * sum(t.numel() for t in tensors)
    header, seen = _read_header(data, size, path)
    _check_length(len(data), header + size, model, path)
    values = torch.frombuffer(bytearray(data), dtype=torch.float32, offset=header)
    anchors = _known_anchors(model, Path(path), seen) if isinstance(model, YOLOv3 | YOLOv3Tiny) else None
    with torch.no_grad():
        for tensor, chunk in zip(tensors, torch.split(values, [t.numel() for t in tensors]), strict=True):
            tensor.copy_(chunk.view_as(tensor))
        if anchors is not None:
            model.anchors.copy_(anchors)  # type: ignore[operator]
    return seen


def _known_anchors(model: Detector, path: Path, seen: int) -> Tensor | None:
    """Those that the weights were trained with; None where they are not known, or the model has some of its own."""
    if model.anchors.reshape(-1, 2).tolist() != [list(size) for size in model.default_anchors]:
        return None
    published = model.num_classes == PUBLISHED_CLASSES and seen == PUBLISHED_SEEN
    if published and isinstance(model, YOLOv3Tiny):
        return torch.tensor(model.published_anchors).view_as(model.anchors)
    cfg, why = path.with_suffix(".cfg"), "there is no .cfg beside it"
    if cfg.is_file():
        try:
            said = read_cfg(cfg)
        except ValueError as error:
            why = str(error)
        else:
            if (said.model, said.num_classes, said.width) == (name_of(model), model.num_classes, model.width):
                return said.anchors
            why = f"{cfg} describes a {said.model} of {said.num_classes} classes and width {said.width:g}"
    if not published:
        warnings.warn(f"{path}: the model's own anchors are taken for those of the weights, as {why}", stacklevel=3)
    return None


def save_weights(model: nn.Module, path: str | os.PathLike[str], seen: int = 0) -> None:
    """Write a model as a Darknet ``.weights`` file, whole or not at all.

    Args:
        model: as for ``load_weights``; reading the file back gives the same float32 weights bit for bit.
        path: replaced if it exists.
        seen: images seen in training, for the header.
    """
    with replacing(path) as part, part.open("wb") as file:
        file.write(_LONG_HEADER.pack(*_VERSION, seen))
        for tensor in _in_file_order(model):
            values = tensor.detach().cpu().contiguous().float()
            file.write(ctypes.string_at(values.data_ptr(), values.nbytes))  # numpy is not required


def weights_size(model: nn.Module) -> int:
    """Bytes of the model's ``.weights`` file."""
    return _LONG_HEADER.size + 4 * sum(t.numel() for t in _in_file_order(model))


def described_by_size(
    size: int, model: str | None = None, width: float | None = None, anchors: AnchorSizes | None = None
) -> Described | None:
    """The detector whose ``.weights`` file has so many bytes: the file's size says the number of classes.

    Args:
        size: of the file, in bytes.
        model: ``"yolov3"`` or ``"yolov3-tiny"``; None: either.
        width: of the model's channels; None: 1.0, as published.
        anchors: for their number a head; None: three.

    Returns:
        What the size says, with an input of 416 pixels for 80 classes, as published; None where no number of classes
        has files of this size.
    """
    for name in MODELS if model is None else (model,):
        try:
            with torch.device("meta"):
                one, two = (weights_size(build_detector(name, classes, width or 1.0, anchors)) for classes in (1, 2))
        except ValueError:  # these anchors are for another number of heads
            continue
        for header in (_LONG_HEADER, _SHORT_HEADER):
            more, rest = divmod(size - header.size - (one - _LONG_HEADER.size), two - one)
            if more >= 0 and rest == 0:
                side = PUBLISHED_SIZE if more + 1 == PUBLISHED_CLASSES else None
                return Described(name, more + 1, width or 1.0, None, side)
    return None


def _in_file_order(model: nn.Module) -> Iterator[Tensor]:
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)]
    for layer, following in zip(layers, [*layers[1:], None], strict=True):
        if not isinstance(layer, nn.Conv2d):
            continue
        if layer.bias is not None:
            yield layer.bias
        elif isinstance(following, nn.BatchNorm2d) and following.running_mean is not None:
            yield from (following.bias, following.weight, following.running_mean, following.running_var)  # type: ignore[misc]
        else:
            raise ValueError("model: a convolution without bias is not followed by a batch norm; not a Darknet network")
        yield layer.weight


def _read_header(data: bytes, size: int, path: str | os.PathLike[str]) -> tuple[int, int]:
    """Length of the header before ``size`` bytes of values, and images seen.

    Some programs write the long header without a version: then the file's length tells.
    """
    if len(data) < _LONG_HEADER.size:
        raise ValueError(f"{path}: {len(data)} bytes, too short for a .weights header of {_LONG_HEADER.size} bytes")
    major, minor, _, seen = _LONG_HEADER.unpack_from(data)
    if (major, minor) >= (0, 2) or len(data) == _LONG_HEADER.size + size:
        return _LONG_HEADER.size, seen
    return _SHORT_HEADER.size, _SHORT_HEADER.unpack_from(data)[3]


def _check_length(got: int, expected: int, model: nn.Module, path: str | os.PathLike[str]) -> None:
    if got == expected:
        return
    cause, relation = (
        ("truncated, or of a smaller", "fewer") if got < expected else ("too long, or of a larger", "more")
    )
    gap = abs(got - expected)
    raise ValueError(
        f"{path}: {cause} model: {got:,} bytes, {gap:,} bytes ({gap / 4:,.0f} values) {relation} than the "
        f"{expected:,} of {_describe(model)}; check model (--arch), num_classes (--classes), width, or fetch it again"
    )


def _describe(model: nn.Module) -> str:
    options = [f"{name}={getattr(model, name)}" for name in ("num_classes", "width") if hasattr(model, name)]
    return f"{type(model).__name__}({', '.join(options)})"
