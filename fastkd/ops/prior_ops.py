"""The ops of the priors from boxes and of their sums: schemas, fakes, and formulas in plain PyTorch.

``csrc/small_ops.cpp`` and ``csrc/cuda/small_ops.cuh`` have the kernels. Where those are not built, the plain functions
here run; tests compare the kernels with them. ``fastkd/priors.py`` defines each prior.

``sizes`` is the flat list h0, w0, h1, w1, ...; ``maps`` has the (N, h, w) float32 maps of all levels one after the
other, and ``sums`` is (L,) float64, the sum of each level's map.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd.ops.schema import define_small

TIE = 1e-9  # relative; far above the rounding of float64, far below the resolution of float32 boxes
_PIECE = 1 << 20  # largest number of elements of a temporary tensor: boxes x anchors x cells

IOU_MASK = """(Tensor boxes, Tensor[] anchors, int[] sizes, int height, int width, int batch, float threshold,
    bool graded) -> (Tensor maps, Tensor sums)"""
BOX_BALANCE = """(Tensor boxes, int[] sizes, int height, int width, int batch, float background, bool inclusive)
    -> (Tensor maps, Tensor sums)"""
PRIOR_SUMS = "(Tensor[] prior, int[] cells) -> Tensor"

Sizes = Sequence[int]
Pair = tuple[Tensor, Tensor]


class PriorMaps(list[Tensor]):
    """A list of one (N, h, w) float32 map per level that also has the sums of the maps, until a map is changed."""

    def __init__(self, maps: Iterable[Tensor] = (), sums: Tensor | None = None) -> None:
        super().__init__(maps)
        if any(x.is_inference() for x in self):  # inference tensors do not count their changes
            sums = None
        self._sums = sums
        self._written = tuple((x, x._version) for x in self) if sums is not None else ()

    @property
    def sums(self) -> Tensor | None:
        """The sums, (L,) float64; None if a map was, or may have been, changed or replaced."""
        if self._sums is None or len(self) != len(self._written):
            return None
        same = all(x is y and x._version == version for x, (y, version) in zip(self, self._written, strict=True))
        return self._sums if same else None

    def __reduce__(self) -> tuple[type[PriorMaps], tuple[list[Tensor]]]:
        return PriorMaps, (list(self),)  # without the sums, as copies start a new count of changes


def prior_maps(
    op: Callable[..., Pair],
    boxes: Tensor,
    anchors: list[Tensor] | None,
    sizes: Sequence[tuple[int, int]],
    image_size: tuple[int, int],
    batch: int,
    *options: Any,
) -> list[Tensor]:
    """Run an op and return its maps per level, as ``PriorMaps``.

    A graph of ``torch.compile`` gets a plain list, as it cannot know whether its tensors were changed.

    Args:
        op: ``iou_mask`` or ``box_balance``.
        boxes, sizes, image_size, batch: as in ``fastkd.priors``.
        anchors: one (A, 2) tensor per level; None for an op without anchors.
        options: the other arguments of the op.
    """
    tensors = (boxes,) if anchors is None else (boxes, anchors)
    try:
        flat, sums = op(*tensors, [side for size in sizes for side in size], *image_size, batch, *options)
    except RuntimeError:
        if boxes.device.type == "cpu":
            require_values(boxes, anchors or [], batch)  # raises a better message than the kernel
        raise
    maps, at = [], 0
    for h, w in sizes:
        maps.append(flat.as_strided((batch, h, w), (h * w, w, 1), at))
        at += batch * h * w
    return maps if torch.compiler.is_compiling() else PriorMaps(maps, sums)


def require_values(boxes: Tensor, anchors: list[Tensor], batch: int) -> None:
    """Raise ``ValueError`` for invalid image indices and anchors. It reads values, which synchronises a GPU."""
    image = boxes[:, 0]
    wrong = image[image.isfinite() & ~_in_batch(image, batch)]
    if len(wrong):
        raise ValueError(
            f"boxes: expected whole image indices from 0 to {batch - 1} in column 0 (batch = {batch}), "
            f"got {wrong[0].item():g}"
        )
    for i, x in enumerate(anchors):
        if not bool((x.isfinite() & (x > 0)).all()):
            raise ValueError(f"anchors[{i}]: expected finite widths and heights > 0, got {x.tolist()}")


# ---- the formulas in plain PyTorch ----


class _Boxes(NamedTuple):
    """The M boxes, clipped to the image; boxes to ignore are empty, so that they overlap nothing."""

    image: Tensor  # (M,) int64 in [0, batch)
    x1: Tensor  # (M,) float64 pixels, as are y1, x2 and y2
    y1: Tensor
    x2: Tensor
    y2: Tensor


class _Axis(NamedTuple):
    """One axis of all boxes and anchors of a level, float64, in units of cells."""

    box: Tensor  # (M,) lengths
    anchor: Tensor  # (A,) lengths
    overlap: Tensor  # (M, A, cells): overlap of the box and the anchor centred on each cell


@torch.no_grad()
def plain_iou_mask(
    boxes: Tensor,
    anchors: Sequence[Tensor],
    sizes: Sizes,
    height: int,
    width: int,
    batch: int,
    threshold: float,
    graded: bool,
) -> Pair:
    """Compute ``iou_mask`` without checking values: boxes of no image are ignored, invalid anchors overlap nothing."""
    kept = _kept(boxes, height, width, batch)
    maps = []
    for h, w, anchor in zip(sizes[::2], sizes[1::2], anchors, strict=True):
        x, y = _axis(kept.x1, kept.x2, anchor[:, 0], w, width), _axis(kept.y1, kept.y2, anchor[:, 1], h, height)
        areas = (x.box * y.box)[:, None] + x.anchor * y.anchor
        areas = areas.clamp(min=torch.finfo(areas.dtype).tiny)  # avoids 0 / 0 for an ignored box and invalid anchor
        value = _grades(x, y, areas) if graded else _marks(x, y, areas, threshold)
        maps.append(_largest(value, kept.image, batch, h * w, len(anchor)))
    return _joined(maps, boxes)


def _grades(x: _Axis, y: _Axis, areas: Tensor) -> Callable[[slice], Tensor]:
    """Return a function of a slice of m boxes that computes IoU / m_k of each cell, (m, H, W).

    g = overlap / (sum of both areas) is monotone in the IoU = g / (1 - g), so anchors are compared by g.
    """
    columns, rows = (x.overlap / areas[..., None]).float(), y.overlap.float()
    best = (columns.amax(2) * rows.amax(2)).amax(1)  # the same products as below, so that the best cell is exactly 1
    best = torch.where(best > 0, best / (1 - best), 1)[:, None, None]

    def grade(part: slice) -> Tensor:
        g = (rows[part, :, :, None] * columns[part, :, None, :]).amax(1)
        return (g / (1 - g)) / best[part]

    return grade


def _marks(x: _Axis, y: _Axis, areas: Tensor, threshold: float) -> Callable[[slice], Tensor]:
    """Return a function of a slice of m boxes that computes 1 where an IoU is above threshold * m_k, (m, H, W).

    IoU > c is equivalent to overlap > c / (1 + c) * (sum of both areas). An equal IoU must not pass because of
    rounding, and no cell may pass for a box that no anchor overlaps.
    """
    most = x.overlap.amax(2) * y.overlap.amax(2)
    bar = threshold * (most / (areas - most)).amax(1)
    least = torch.where(bar > 0, (1 + TIE) * bar / (1 + bar), float("inf"))[:, None] * areas

    def mark(part: slice) -> Tensor:
        overlap = y.overlap[part, :, :, None] * x.overlap[part, :, None, :]
        return (overlap > least[part, :, None, None]).any(1).float()

    return mark


@torch.no_grad()
def plain_box_balance(
    boxes: Tensor, sizes: Sizes, height: int, width: int, batch: int, background: float, inclusive: bool
) -> Pair:
    """Compute ``box_balance`` without checking values: boxes of no image are ignored."""
    kept = _kept(boxes, height, width, batch)
    maps = []
    for h, w in zip(sizes[::2], sizes[1::2], strict=True):
        in_x, length_x = _covered(kept.x1, kept.x2, w, width, inclusive)
        in_y, length_y = _covered(kept.y1, kept.y2, h, height, inclusive)
        weight = (length_x * length_y).clamp(min=1).reciprocal().float()

        def value(part: slice, x: Tensor = in_x, y: Tensor = in_y, weight: Tensor = weight) -> Tensor:
            return (y[part, :, None] & x[part, None, :]) * weight[part, None, None]

        objects = _largest(value, kept.image, batch, h * w)
        empty = (objects == 0).sum(1, keepdim=True).clamp(min=1)
        maps.append(torch.where(objects > 0, objects, (background / empty.double()).float()))
    return _joined(maps, boxes)


@torch.no_grad()
def plain_prior_sums(prior: Sequence[Tensor], cells: Sequence[int]) -> Tensor:
    """Return (2, L) float64: sums of the priors, and their minima on the CPU (elsewhere 0).

    An empty tensor is an absent prior, which is 1 at each cell.
    """

    def minimum(x: Tensor) -> Tensor:
        return x.amin().double() if x.device.type == "cpu" else x.new_zeros((), dtype=torch.float64)

    def number(x: Tensor, value: int) -> Tensor:
        return x.new_full((), value, dtype=torch.float64)

    sums = [x.sum(dtype=torch.float64) if x.numel() else number(x, n) for x, n in zip(prior, cells, strict=True)]
    return torch.stack([torch.stack(sums), torch.stack([minimum(x) if x.numel() else number(x, 1) for x in prior])])


def _kept(boxes: Tensor, height: int, width: int, batch: int) -> _Boxes:
    boxes = boxes if batch else boxes[:0]  # without images, index 0 does not exist for ignored boxes
    image = boxes[:, 0]
    x1, x2 = (boxes[:, i].double().clamp(0, width) for i in (1, 3))
    y1, y2 = (boxes[:, i].double().clamp(0, height) for i in (2, 4))
    keep = boxes.isfinite().all(1) & _in_batch(image, batch) & (x1 < x2) & (y1 < y2)
    # masked by where, as shapes must not depend on the data; ignored boxes get index 0 and are empty
    x1, y1, x2, y2 = (torch.where(keep, x, 0) for x in (x1, y1, x2, y2))
    return _Boxes(torch.where(keep, image, 0).long(), x1, y1, x2, y2)


def _in_batch(image: Tensor, batch: int) -> Tensor:
    return (image >= 0) & (image < batch) & (image == image.floor())


def _axis(low: Tensor, high: Tensor, anchor: Tensor, cells: int, pixels: int) -> _Axis:
    # The IoU does not change when an axis is scaled. The product comes first, so that integer pixels are exact at
    # strides that are powers of two.
    lengths = anchor.double().nan_to_num(0, 0, 0).clamp(min=0)
    low, high, anchor = (v * cells / pixels for v in (low, high, lengths))
    box, centre = high - low, (low + high) / 2
    middle = torch.arange(cells, device=low.device, dtype=low.dtype) + 0.5
    distance = (middle - centre[:, None]).abs()[:, None]
    # an anchor at a distance of half of both lengths only touches the box; the overlap is at most the shorter length
    touching, shorter = (box[:, None] + anchor) / 2, torch.minimum(box[:, None], anchor)
    overlap = (touching[..., None] - distance).minimum(shorter[..., None]).clamp_(min=0)
    return _Axis(box, anchor, overlap)


def _covered(low: Tensor, high: Tensor, cells: int, pixels: int, inclusive: bool) -> Pair:
    """Return which cells each box covers, (M, cells), and how many, (M,); ``inclusive`` may count one past the edge."""
    first, end = (low * cells / pixels).floor(), (high * cells / pixels).ceil() + inclusive
    cell = torch.arange(cells, device=low.device)
    covered = (first[:, None] <= cell) & (cell < end[:, None]) & (low < high)[:, None]
    return covered, end - first


def _largest(value: Callable[[slice], Tensor], image: Tensor, batch: int, cells: int, anchors: int = 1) -> Tensor:
    """Return the largest value over the boxes of each image, (batch, cells); 0 for an image without boxes."""
    largest = torch.zeros(batch, cells, device=image.device)
    size = max(1, _PIECE // (cells * anchors))
    for i in range(0, len(image), size):
        part = slice(i, i + size)
        found = value(part).flatten(1)
        # a maximum does not depend on the order, so atomics keep the result deterministic
        largest = largest.scatter_reduce_(0, image[part, None].expand_as(found), found, "amax")
    return largest


def _joined(maps: list[Tensor], boxes: Tensor) -> Pair:
    flat = [x.flatten() for x in maps]
    sums = [x.sum(dtype=torch.float64) for x in flat]
    if not maps:
        return boxes.new_empty(0, dtype=torch.float32), boxes.new_empty(0, dtype=torch.float64)
    return torch.cat(flat), torch.stack(sums)


# ---- the ops ----


def _checked_iou_mask(boxes: Tensor, anchors: list[Tensor], sizes: Sizes, *rest: Any) -> Pair:
    if boxes.device.type == "cpu":
        require_values(boxes, anchors, rest[2])
    return plain_iou_mask(boxes, anchors, sizes, *rest)


def _checked_box_balance(boxes: Tensor, sizes: Sizes, *rest: Any) -> Pair:
    if boxes.device.type == "cpu":
        require_values(boxes, [], rest[2])
    return plain_box_balance(boxes, sizes, *rest)


def _iou_mask_fake(boxes: Tensor, anchors: list[Tensor], sizes: Sizes, *rest: Any) -> Pair:
    return _maps_fake(boxes, sizes, rest[2])


def _box_balance_fake(boxes: Tensor, sizes: Sizes, *rest: Any) -> Pair:
    return _maps_fake(boxes, sizes, rest[2])


def _maps_fake(boxes: Tensor, sizes: Sizes, batch: int) -> Pair:
    cells = sum(batch * h * w for h, w in zip(sizes[::2], sizes[1::2], strict=True))
    return boxes.new_empty(cells, dtype=torch.float32), boxes.new_empty(len(sizes) // 2, dtype=torch.float64)


def _prior_sums_fake(prior: list[Tensor], cells: Sequence[int]) -> Tensor:
    return prior[0].new_empty((2, len(prior)), dtype=torch.float64)


for _name, _schema, _fake, _plain in (
    ("iou_mask", IOU_MASK, _iou_mask_fake, _checked_iou_mask),
    ("box_balance", BOX_BALANCE, _box_balance_fake, _checked_box_balance),
    ("prior_sums", PRIOR_SUMS, _prior_sums_fake, plain_prior_sums),
):
    define_small(_name, _schema, _fake, _plain)
