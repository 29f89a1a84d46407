"""Priors: weights of the cells, from boxes or the teacher's heads, that multiply the information map (``prior=``)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastkd.ops.arguments import (
    kind_of,
    require_bool,
    require_dense,
    require_floating,
    require_int,
    require_number,
    require_sequence,
)
from fastkd.ops.backends import small_op
from fastkd.ops.prior_ops import prior_maps


@torch.no_grad()
def score(
    class_logits: Sequence[Tensor], sizes: Sequence[tuple[int, int]], *, objectness: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """Return the teacher's score of each cell: the maximum over anchors and classes in the head of the same level.

    q = max sigmoid(class), as in FRS (Du et al., 2021) and in Ultralytics' distillation; for heads with objectness
    q = max sigmoid(objectness) * sigmoid(class). Unlike ``confidence``, it is 0 where the teacher detects nothing.

    Args:
        class_logits: one (N, A, K, H, W) floating tensor of logits per level; A is 1 where the head has no anchors.
        sizes: (height, width) of each level; a head of another size is resized as in ``confidence``.
        objectness: one (N, A, H, W) floating tensor of logits per level, for heads with objectness.

    Returns:
        One (N, height, width) float32 tensor per level, in [0, 1].

    Raises:
        TypeError, ValueError: as in ``confidence``; unequal numbers of heads and sizes.
    """
    _check_sizes(sizes)
    heads = _head_scores(objectness, class_logits)
    if len(heads) != len(sizes):
        raise ValueError(f"sizes: expected one per head, as each level has its own, {len(heads)}; got {len(sizes)}")
    return [at_size([head], size) for head, size in zip(heads, sizes, strict=True)]


@torch.no_grad()
def confidence(
    objectness: Sequence[Tensor],
    class_logits: Sequence[Tensor],
    sizes: Sequence[tuple[int, int]],
    *,
    floor: float = 0.1,
) -> list[Tensor]:
    """Return the teacher's confidence that a cell contains an object, q = b + (1 - b) sqrt(c); it needs no labels.

    c is the maximum over anchors, classes and heads of sigmoid(objectness) * sigmoid(class), the score of FRS (Du et
    al., 2021) for heads with objectness. It is brought to the size of each level by adaptive max-pooling (down) or
    bilinear interpolation (up).

    Args:
        objectness: one (N, A, H, W) floating tensor of logits per head.
        class_logits: one (N, A, K, H, W) floating tensor of logits per head.
        sizes: (height, width) of each level.
        floor: b in [0, 1], the weight of a cell in which the teacher detects nothing.

    Returns:
        One (N, height, width) float32 tensor per size, in [floor, 1].

    Raises:
        ValueError: unequal numbers of heads; shapes or devices that differ; sizes that are not two ints > 0; floor
            outside [0, 1].
        TypeError: not lists; not dense floating tensors.
    """
    floor = require_number("floor", floor, "a number in [0, 1]", 0, 1)
    _check_sizes(sizes)
    heads = _head_scores(require_sequence("objectness", objectness, per="head"), class_logits)
    return [floor + (1 - floor) * at_size(heads, size).sqrt() for size in sizes]


def _head_scores(objectness: Any, class_logits: Any) -> list[Tensor]:
    """Return the (N, 1, H, W) maximum over anchors and classes of each head."""
    classes = require_sequence("class_logits", class_logits, per="head")
    of_objects = [None] * len(classes) if objectness is None else require_sequence("objectness", objectness, per="head")
    if len(of_objects) != len(classes) or not classes:
        raise ValueError(
            f"class_logits: expected one entry per head of objectness, got {len(classes)} for {len(of_objects)}"
        )
    for i, (o, k) in enumerate(zip(of_objects, classes, strict=True)):
        _check_logits(f"class_logits[{i}]", k, "(N, A, K, H, W)", 5, "class_logits[0]", classes[0])
        if o is not None or objectness is not None:
            _check_logits(f"objectness[{i}]", o, "(N, A, H, W)", 4, "class_logits[0]", classes[0])
            if k.shape[:2] + k.shape[3:] != o.shape:
                raise ValueError(
                    f"class_logits[{i}]: expected (N, A, K, H, W) for objectness {tuple(o.shape)}, got {tuple(k.shape)}"
                )
        if k.shape[0] != classes[0].shape[0] or not k.numel():
            raise ValueError(
                f"class_logits[{i}]: expected the batch of the other heads, at least one anchor and class, got "
                f"{tuple(k.shape)}"
            )
    best = [k.float().amax(2).sigmoid() for k in classes]
    if objectness is not None:
        best = [o.float().sigmoid() * k for o, k in zip(of_objects, best, strict=True)]
    return [x.amax(1, keepdim=True) for x in best]


def _check_logits(name: str, x: Any, shape: str, ndim: int, other: str, y: Any) -> None:
    _check_tensor(name, x, shape)
    if x.ndim != ndim:
        raise ValueError(f"{name}: expected {shape}, got {tuple(x.shape)}")
    require_floating(name, x)
    _check_device(name, x, other, y)


def at_size(heads: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """Return the (N, height, width) maximum over the heads, each (N, 1, H, W) and resized."""
    resized = []
    for x in heads:  # a dimension that shrinks is max-pooled, one that grows is interpolated
        x = F.adaptive_max_pool2d(x, (min(size[0], x.shape[2]), min(size[1], x.shape[3])))
        resized.append(F.interpolate(x, size, mode="bilinear", align_corners=False))
    return torch.stack(resized).amax(0)[:, 0]


def iou_mask(
    boxes: Tensor,
    anchors: Sequence[Tensor] | Tensor,
    sizes: Sequence[tuple[int, int]],
    image_size: tuple[int, int],
    batch: int,
    *,
    threshold: float = 0.5,
    graded: bool = False,
) -> list[Tensor]:
    """Return a mask of the cells near objects: those with an anchor whose IoU is near the largest IoU of a box.

    The imitation region of FGFI (Wang et al., 2019, arXiv:1906.03609). Let m_k be the largest IoU of box k over all
    cells and anchors of the level. A cell is 1 if any of its anchors has an IoU above psi * m_k (psi is ``threshold``)
    with any box k of its image, else 0. An IoU within 1e-9 (relative) of psi * m_k counts as equal, and thus not as
    above. ``graded``, a variant of ours, returns the largest IoU / m_k over anchors and boxes instead: 1 where a box
    fits best, 0 where no anchor overlaps a box.

    m_k is computed for each level on its own, while FGFI has one level only: so every box marks cells on every level,
    even where no anchor fits it well. Anchors are centred on cells and not clipped. Boxes are clipped to the image. A
    box is ignored if it is then empty, inverted or not finite, or if no anchor overlaps it; so rows of zeros may pad
    ``boxes`` to a fixed M. The call does not wait for the device, and its result is deterministic, bit by bit.

    Args:
        boxes: (M, 5) float32 or float64: image index, x1, y1, x2, y2 in pixels of the network's input. M may be 0,
            images may have no box, and rows may be in any order.
        anchors: one (A, 2) tensor of widths and heights in pixels per level, or one (levels, A, 2) tensor.
        sizes: (height, width) of each level.
        image_size: (height, width) of the network's input in pixels.
        batch: N, the number of images.
        threshold: psi, above 0 and below 1; unused if graded.
        graded: whether to return the relative IoU instead of the mask.

    Returns:
        One (N, height, width) float32 tensor per level, in [0, 1], in a list that also has their sums (``PriorMaps``).

    Raises:
        TypeError, ValueError: another type, shape, dtype or device than above; unequal numbers of levels; threshold
            outside (0, 1). On the CPU also an image index that is not an integer in [0, N), and an anchor that is not
            finite and positive (a RuntimeError if a compiled graph raises it). Other devices would have to synchronise
            to check values: there a box with an invalid index is ignored, and an invalid anchor overlaps nothing.
    """
    _check_boxes(boxes, batch)
    _check_sizes(sizes, image_size)
    levels = _checked_anchors(anchors, sizes, boxes)
    between = math.ulp(0.0), math.nextafter(1.0, 0.0)
    threshold = require_number("threshold", threshold, "a number above 0 and below 1", *between)
    op, graded = small_op("iou_mask", boxes.device), require_bool("graded", graded)
    return prior_maps(op, boxes.contiguous(), levels, sizes, image_size, batch, threshold, graded)


def box_balance(
    boxes: Tensor,
    sizes: Sequence[tuple[int, int]],
    image_size: tuple[int, int],
    batch: int,
    *,
    background: float = 1.0,
    inclusive: bool = False,
) -> list[Tensor]:
    """Return weights that give every box the same total weight, and the background of an image that of one box.

    The scale mask of FGD (Yang et al., 2022, arXiv:2111.11837, eq. 3): the weight of a cell in a box is 1 / area of the
    box, of the smallest box where several overlap; the weight of a cell outside all boxes is 1 / number of such cells
    in the image. By default, as in the paper, a box covers the cells that it overlaps, and its area is their number. So
    the weights of a box that no smaller box overlaps sum to 1, and those of the background too. ``inclusive`` follows
    FGD's published code: on each axis a box covers the cells from floor(low) to ceil(high), both included. That is at
    least one more cell than it overlaps, and all of them count towards its area, even one beyond the edge of the map.

    Clipped, ignored and padded boxes and determinism are as in ``iou_mask``.

    Args:
        boxes, sizes, image_size, batch: as in ``iou_mask``.
        background: total weight of an image's background relative to that of a box; FGD's published settings use 0.5.
        inclusive: whether a box covers the cells that FGD's code covers, to reproduce its results.

    Returns:
        One (N, height, width) float32 tensor per level, in a list as from ``iou_mask``; in an image without boxes every
        cell is background.

    Raises:
        TypeError, ValueError: as in ``iou_mask``; background negative or not finite.
    """
    _check_boxes(boxes, batch)
    _check_sizes(sizes, image_size)
    background = require_number("background", background, "a finite number >= 0 that float32 can hold", 0)
    op, inclusive = small_op("box_balance", boxes.device), require_bool("inclusive", inclusive)
    return prior_maps(op, boxes.contiguous(), None, sizes, image_size, batch, background, inclusive)


def _check_boxes(boxes: Any, batch: Any) -> None:
    _check_tensor("boxes", boxes, "(M, 5)")
    if boxes.ndim != 2 or boxes.shape[1] != 5:
        raise ValueError(f"boxes: expected shape (M, 5): image index, x1, y1, x2, y2; got {tuple(boxes.shape)}")
    if boxes.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"boxes: expected float32 or float64, which hold every image index and pixel, got {boxes.dtype}; "
            "pack them as float32"
        )
    require_int("batch", batch, 0)


def _check_sizes(sizes: Any, *image_size: Any) -> None:
    require_sequence("sizes", sizes, "(height, width)")
    for i, size in enumerate((*sizes, *image_size)):
        is_pair = isinstance(size, (tuple, Sequence)) and len(size) == 2
        if not is_pair or not all(isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in size):
            name = f"sizes[{i}]" if i < len(sizes) else "image_size"
            raise ValueError(f"{name}: expected (height, width), two ints > 0, got {size!r}")


def _checked_anchors(anchors: Any, sizes: Sequence[tuple[int, int]], boxes: Tensor) -> list[Tensor]:
    if isinstance(anchors, Tensor):
        require_dense("anchors", anchors)
    if not isinstance(anchors, (Tensor, Sequence)) or (isinstance(anchors, Tensor) and anchors.ndim != 3):
        raise TypeError(
            "anchors: expected one (A, 2) tensor per level, or all as one of shape (levels, A, 2), got "
            + kind_of(anchors)
        )
    levels = list(anchors)
    if len(levels) != len(sizes):
        raise ValueError(f"anchors: expected one entry per entry of sizes, {len(sizes)}, got {len(levels)}")
    for i, x in enumerate(levels):
        _check_anchor(f"anchors[{i}]", x, boxes)
        levels[i] = (x if x.dtype in (torch.float32, torch.float64) else x.double()).contiguous()
    return levels


def _check_anchor(name: str, x: Any, boxes: Tensor) -> None:
    _check_tensor(name, x, "(A, 2)")
    _check_device(name, x, "boxes", boxes)
    if x.ndim != 2 or x.shape[1] != 2 or not len(x):
        raise ValueError(f"{name}: expected shape (A, 2), widths and heights in pixels, A > 0; got {tuple(x.shape)}")
    if x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"{name}: expected a floating or integer dtype, got {x.dtype}")


def _check_tensor(name: str, x: Any, shape: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor of shape {shape}, got {kind_of(x)}")
    require_dense(name, x)


def _check_device(name: str, x: Tensor, other: str, y: Tensor) -> None:
    if x.device != y.device:
        raise ValueError(f"{name}: expected the device of {other}, {y.device}, got {x.device}; move it: x.to(device)")
