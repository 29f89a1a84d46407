"""Darknet ``.weights`` files: a header of 20 bytes, then float32 values, little-endian, layer after layer.

A layer with batch norm stores its bias, scale, running mean and running variance, then the weights of the convolution;
a layer without batch norm stores the bias, then the weights. Layers come in the order in which a model registers its
modules.
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
PUBLISHED_SEEN = 32_013_312  # images seen in training, in the header of the published files
_LONG_HEADER = struct.Struct("<iiiq")  # major, minor, revision, images seen
_SHORT_HEADER = struct.Struct("<iiii")  # before version 0.2


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> int:
    """Read a Darknet ``.weights`` file into a model, in place; a file that does not fit changes nothing.

    The model may be a part of a detector: ``load_weights(yolov3.backbone, "darknet53.conv.74")``. A detector that has
    the default anchors of its class gets the anchors that the weights were trained with, if these are known: from the
    ``.cfg`` file beside the weights, or for the published yolov3-tiny.weights, whose own ``.cfg`` file is wrong.

    Args:
        model: a module of convolutions and batch norms in the file's order, such as ``YOLOv3`` and ``YOLOv3Tiny``.
        path: the file.

    Returns:
        The number of images that the network had seen in training, from the file's header.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is shorter or longer than the model's weights (the message gives the difference).
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
    """Return the anchors that the weights were trained with; None if unknown, or if the model has its own."""
    if model.anchors.reshape(-1, 2).tolist() != [list(size) for size in model.default_anchors]:
        return None
    published = model.num_classes == PUBLISHED_CLASSES and seen == PUBLISHED_SEEN
    if published and isinstance(model, YOLOv3Tiny):
        return torch.tensor(model.published_anchors).view_as(model.anchors)
    cfg, why = path.with_suffix(".cfg"), "there is no .cfg beside it"
    if cfg.is_file():
        try:
            described = read_cfg(cfg)
        except ValueError as error:
            why = str(error)
        else:
            found = (described.model, described.num_classes, described.width)
            if found == (name_of(model), model.num_classes, model.width):
                return described.anchors
            why = f"{cfg} describes a {found[0]} of {found[1]} classes and width {found[2]:g}"
    if not published:
        warnings.warn(f"{path}: these weights are used with the model's default anchors, as {why}", stacklevel=3)
    return None


def save_weights(model: nn.Module, path: str | os.PathLike[str], seen: int = 0) -> None:
    """Write a model as a Darknet ``.weights`` file, atomically.

    Args:
        model: as for ``load_weights``; reading the file back gives the same float32 weights bit for bit.
        path: the file, replaced if it exists.
        seen: number of images seen in training, for the header.

    Raises:
        ValueError: a convolution of the model has neither a bias nor a batch norm after it.
    """
    with replacing(path) as part, part.open("wb") as file:
        file.write(_LONG_HEADER.pack(*_VERSION, seen))
        for tensor in _in_file_order(model):
            values = tensor.detach().cpu().contiguous().float()
            file.write(ctypes.string_at(values.data_ptr(), values.nbytes))  # numpy is not required


def weights_size(model: nn.Module) -> int:
    """Return the size of the model's ``.weights`` file in bytes."""
    return _LONG_HEADER.size + 4 * sum(t.numel() for t in _in_file_order(model))


def described_by_size(
    size: int, model: str | None = None, width: float | None = None, anchors: AnchorSizes | None = None
) -> Described | None:
    """Return the detector whose ``.weights`` file has this size, which depends on the number of classes.

    Args:
        size: size of the file in bytes.
        model: ``"yolov3"`` or ``"yolov3-tiny"``; None: either.
        width: multiplier of the model's channels; None: 1.0, as published.
        anchors: any anchors with the right number per head; None: three per head.

    Returns:
        Model, number of classes and width, and for 80 classes the published input size of 416 pixels; None if no
        number of classes gives a file of this size.
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
            raise ValueError(
                "model: expected a Darknet network, got a convolution without bias that no batch norm follows"
            )
        yield layer.weight


def _read_header(data: bytes, size: int, path: str | os.PathLike[str]) -> tuple[int, int]:
    """Return the length of the header before ``size`` bytes of values, and the number of images seen.

    Some programs write the long header without its version, so the file's length decides too.
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
