"""Priors: per-cell weights from boxes and heads, which multiply the information map (``prior=``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

_TIE = 1e-9  # relative; far above float64's rounding, far below what float32 boxes can tell apart
_PIECE_CPU = 1 << 18  # cells of boxes at a time, 1 MiB of float32
_PIECE_GPU = 1 << 23


@torch.no_grad()
def confidence(
    objectness: Sequence[Tensor],
    class_logits: Sequence[Tensor],
    sizes: Sequence[tuple[int, int]],
    *,
    floor: float = 0.1,
) -> list[Tensor]:
    """The teacher's own confidence, q = b + (1 - b) sqrt(c): where it sees objects, without any ground truth.

    c is the maximum over anchors, classes and heads of sigmoid(objectness) * sigmoid(class), brought to each level's
    size by adaptive max-pooling (down) or bilinear interpolation (up). The score of FRS (Du et al., 2021) for heads
    with an objectness.

    Args:
        objectness: one (N, A, H, W) tensor of logits per head.
        class_logits: one (N, A, K, H, W) tensor of logits per head.
        sizes: (height, width) of each level that wants a prior.
        floor: b in [0, 1], the weight of a cell where the teacher sees nothing.

    Returns:
        One (N, height, width) float32 tensor per size.

    Raises:
        ValueError: unequal numbers of heads, shapes that do not fit, floor outside [0, 1].
    """
    if not 0 <= floor <= 1:
        raise ValueError(f"floor: expected a number in [0, 1], got {floor!r}")
    if len(objectness) != len(class_logits) or not objectness:
        raise ValueError(
            f"class_logits: expected one entry per head of objectness, got {len(class_logits)} for {len(objectness)}"
        )
    heads = []
    for i, (o, k) in enumerate(zip(objectness, class_logits, strict=True)):
        if o.ndim != 4 or k.ndim != 5 or k.shape[:2] + k.shape[3:] != o.shape:
            raise ValueError(
                f"class_logits[{i}]: expected (N, A, K, H, W) for objectness {tuple(o.shape)}, got {tuple(k.shape)}"
            )
        if o.shape[0] != objectness[0].shape[0] or not k.numel():
            raise ValueError(
                f"objectness[{i}]: expected the batch of the other heads, at least one anchor and class, "
                f"got {tuple(o.shape)} and classes {tuple(k.shape)}"
            )
        heads.append((o.float().sigmoid() * k.float().amax(2).sigmoid()).amax(1, keepdim=True))
    return [floor + (1 - floor) * at_size(heads, size).sqrt() for size in sizes]


def at_size(heads: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """(N, height, width): the maximum over the heads, each (N, 1, H, W), resized."""
    resized = []
    for x in heads:  # a side that shrinks keeps its maxima, one that grows is interpolated
        x = F.adaptive_max_pool2d(x, (min(size[0], x.shape[2]), min(size[1], x.shape[3])))
        resized.append(F.interpolate(x, size, mode="bilinear", align_corners=False))
    return torch.stack(resized).amax(0)[:, 0]


class _Boxes(NamedTuple):
    """The M boxes, clipped to the image; those to be ignored are empty, so that they overlap nothing."""

    image: Tensor  # (M,) int64 in [0, batch)
    x1: Tensor  # (M,) float64 pixels, as are the others
    y1: Tensor
    x2: Tensor
    y2: Tensor


class _Axis(NamedTuple):
    """One axis of every box and anchor of a level, in cells, float64.

    An anchor whose centre is ``distance`` from the box's overlaps it by min(smaller, reach - distance).
    """

    box: Tensor  # (M,) lengths
    anchor: Tensor  # (A,) lengths
    centre: Tensor  # (M,) of the boxes
    distance: Tensor  # (M, cells) from each cell's centre to the box's
    smaller: Tensor  # (M, A) the shorter of box and anchor
    reach: Tensor  # (M, A) the distance at which they only touch

    def overlap(self, distance: Tensor) -> Tensor:
        """(M, A, n) for distances (M, n)."""
        return (self.reach[..., None] - distance[:, None]).minimum(self.smaller[..., None]).clamp_(min=0)

    def most(self) -> Tensor:
        """(M, A): the overlap at the cell that is nearest to the box."""
        return self.overlap(self.distance.amin(1, keepdim=True))[..., 0]


@torch.no_grad()
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
    """Cells near objects: those where an anchor fits a box nearly as well as any anchor of the level does.

    The imitation region of FGFI (Wang et al., 2019, arXiv:1906.03609). With m_k the largest IoU of box k over all
    cells and anchors of the level, a cell is 1 if any of its anchors has an IoU above psi * m_k with any box k of its
    image, else 0. Strictly above: an IoU within 1e-9 of psi * m_k (relative) counts as equal. Graded, our variant,
    gives a cell its largest IoU / m_k over anchors and boxes: 1 where a box fits best, 0 where nothing overlaps.

    The largest IoU is each level's own, as FGFI has one map: every box marks cells on every level, also where the
    anchors suit it badly. Anchors are centred on cells and not clipped. Boxes are clipped to the image; a box that is
    empty then, inverted or not finite is ignored, and so is one that no anchor overlaps. Rows of zeros may pad
    ``boxes`` to a fixed M. Nothing here waits for the device, and the same input gives the same bits.

    Args:
        boxes: (M, 5) float32 or float64: image index, x1, y1, x2, y2 in pixels of the network's input. M may be 0,
            images may have no box, and rows may come in any order.
        anchors: one (A, 2) tensor of widths and heights in pixels per level, or all as one (levels, A, 2).
        sizes: (height, width) of each level.
        image_size: (height, width) of the network's input in pixels.
        batch: N, the number of images.
        threshold: psi, above 0 and below 1; unused if graded.
        graded: whether to return the relative IoU instead of the mask.

    Returns:
        One (N, height, width) float32 tensor per level, in [0, 1].

    Raises:
        TypeError, ValueError: another type, shape, dtype or device than above; unequal numbers of levels; threshold
            outside (0, 1). On the CPU also: an image index that is not a whole number in [0, N), an anchor that is
            not finite and positive. On other devices, and in a trace, looking at values would cost a sync: a box of
            a wrong index is ignored there, and an anchor that is not finite and positive overlaps nothing.
    """
    _check_boxes(boxes, batch)
    _check_sizes(sizes, image_size)
    levels = _checked_anchors(anchors, sizes, boxes)
    if not isinstance(threshold, (int, float)) or not 0 < threshold < 1:
        raise ValueError(f"threshold: expected a number above 0 and below 1, got {threshold!r}")
    kept = _kept(boxes, image_size, batch)
    maps = []
    for (height, width), anchor in zip(sizes, levels, strict=True):
        x = _axis(kept.x1, kept.x2, anchor[:, 0], width, image_size[1])
        y = _axis(kept.y1, kept.y2, anchor[:, 1], height, image_size[0])
        maps.append(_relative_iou(kept.image, x, y, batch) if graded else _above(threshold, kept.image, x, y, batch))
    return maps


@torch.no_grad()
def box_balance(
    boxes: Tensor,
    sizes: Sequence[tuple[int, int]],
    image_size: tuple[int, int],
    batch: int,
    *,
    background: float = 1.0,
) -> list[Tensor]:
    """Every box weighs the same, however large, and the background of an image as much as one box.

    The scale mask of FGD (Yang et al., 2022, arXiv:2111.11837, eq. 3): a cell in a box weighs 1 / the box's area,
    where boxes overlap that of the smallest; a cell in none 1 / the image's number of such cells. A box covers the
    cells that it overlaps, and its area is their number: the weights of a box that no smaller one overlaps sum to 1.

    Boxes are clipped and ignored, rows padded, and bits repeated as in ``iou_mask``.

    Args:
        boxes, sizes, image_size, batch: as in ``iou_mask``.
        background: weight of an image's background relative to one box's; FGD's published settings have 0.5.

    Returns:
        One (N, height, width) float32 tensor per level; an image without boxes is background all over.

    Raises:
        TypeError, ValueError: as in ``iou_mask``; background negative or not finite.
    """
    _check_boxes(boxes, batch)
    _check_sizes(sizes, image_size)
    if not isinstance(background, (int, float)) or not 0 <= background < float("inf"):
        raise ValueError(f"background: expected a finite number >= 0, got {background!r}")
    kept = _kept(boxes, image_size, batch)
    maps = []
    for height, width in sizes:
        x1, x2 = _covered(kept.x1, kept.x2, width, image_size[1])
        y1, y2 = _covered(kept.y1, kept.y2, height, image_size[0])
        row = torch.arange(height, device=boxes.device)
        end = torch.where((y1[:, None] <= row) & (row < y2[:, None]), x2[:, None], 0)
        inverse = ((x2 - x1) * (y2 - y1)).clamp(min=1).reciprocal().float()
        objects = _paint_rows(x1[:, None].expand_as(end), end, inverse, kept.image, batch, width)
        empty = (objects == 0).sum((1, 2), keepdim=True)
        maps.append(torch.where(objects > 0, objects, background / empty.clamp(min=1)))
    return maps


def _kept(boxes: Tensor, image_size: tuple[int, int], batch: int) -> _Boxes:
    height, width = image_size
    boxes = boxes if batch else boxes[:0]  # without images there is no place to write even what is ignored
    image = boxes[:, 0]
    x1, x2 = (boxes[:, i].double().clamp(0, width) for i in (1, 3))
    y1, y2 = (boxes[:, i].double().clamp(0, height) for i in (2, 4))
    keep = boxes.isfinite().all(1) & _in_batch(image, batch) & (x1 < x2) & (y1 < y2)
    # masking by where keeps the shapes, whatever the data; index 0 is a place to write even for what is ignored
    x1, y1, x2, y2 = (torch.where(keep, x, 0) for x in (x1, y1, x2, y2))
    return _Boxes(torch.where(keep, image, 0).long(), x1, y1, x2, y2)


def _in_batch(image: Tensor, batch: int) -> Tensor:
    return (image >= 0) & (image < batch) & (image == image.floor())


def _axis(low: Tensor, high: Tensor, anchor: Tensor, cells: int, pixels: int) -> _Axis:
    # IoU does not change when an axis is scaled. Multiplied first: whole pixels at a power of two stay exact.
    usable = anchor.double().nan_to_num(0, 0, 0).clamp(min=0)
    low, high, anchor = (v * cells / pixels for v in (low, high, usable))
    box, centre = high - low, (low + high) / 2
    middle = torch.arange(cells, device=low.device, dtype=low.dtype) + 0.5
    smaller = torch.minimum(box[:, None], anchor)
    return _Axis(box, anchor, centre, (middle - centre[:, None]).abs(), smaller, (box[:, None] + anchor) / 2)


def _covered(low: Tensor, high: Tensor, cells: int, pixels: int) -> tuple[Tensor, Tensor]:
    """First cell that a box overlaps, and the one after the last."""
    return (low * cells / pixels).floor(), (high * cells / pixels).ceil()


def _both_areas(x: _Axis, y: _Axis) -> Tensor:
    """(M, A): area of the box plus area of the anchor, from which the overlap has yet to be taken."""
    areas = (x.box * y.box)[:, None] + x.anchor * y.anchor
    return areas.clamp(min=torch.finfo(areas.dtype).tiny)  # an ignored box and an unusable anchor: 0 / 0


def _above(threshold: float, image: Tensor, x: _Axis, y: _Axis, batch: int) -> Tensor:
    """(batch, H, W): 1 where an IoU is above threshold times the box's largest.

    IoU > c is overlap > c / (1 + c) * (both areas), and the overlap is one in x times one in y. So in a given row an
    anchor passes where its overlap in x exceeds some t: at distances below reach - t. All anchors are centred alike,
    hence the cells of one row that a box marks are one interval, the widest of its anchors'. That takes M * A * H
    numbers instead of M * A * H * W: at 64 x 100 boxes and 3 anchors on 80 x 80 cells 12 MB a temporary, read or
    written some 20 times, where all IoUs would be 490 MB each.
    """
    areas = _both_areas(x, y)
    overlap = x.most() * y.most()
    bar = threshold * (overlap / (areas - overlap)).amax(1)
    # an equal IoU must not pass by rounding; nothing must pass where no anchor overlaps the box
    least = torch.where(bar > 0, (1 + _TIE) * bar / (1 + bar), float("inf"))[:, None] * areas
    needed = least[..., None] / y.overlap(y.distance)
    passes = needed < x.smaller[..., None]
    half = torch.where(passes, x.reach[..., None] - needed, -float("inf")).amax(1)
    width = x.distance.shape[1]
    first = (x.centre[:, None] - half - 0.5).floor().add_(1).clamp_(0, width)
    end = (x.centre[:, None] + half - 0.5).ceil().clamp_(0, width)
    return _paint_rows(first, end, torch.ones_like(x.centre, dtype=torch.float32), image, batch, width)


def _paint_rows(first: Tensor, end: Tensor, value: Tensor, image: Tensor, batch: int, width: int) -> Tensor:
    """(batch, H, width): the largest value of the intervals that cover a cell; 0 where none does.

    An interval is two, which may overlap, of a power of two: so each writes two cells in the plane of that power,
    and each plane is then brought down to the next by halving its intervals. A maximum is the same in any order, so
    the atomics of ``scatter_reduce_`` cost no determinism.

    Args:
        first, end: (M, H) whole numbers in [0, width]: cells [first, end) of each row; empty if end <= first.
        value: (M,) float32, above 0.
        image: (M,) int64.
    """
    height = first.shape[1]
    planes = int(width).bit_length()
    length = (end - first).clamp(min=1)
    plane = torch.frexp(length.float()).exponent.long() - 1  # Inductor's frexp of float64 does not compile
    row = (image[:, None] * planes + plane) * height + torch.arange(height, device=image.device)
    left = row * width + first.clamp(max=width - 1).long()
    right = left + length.long() - (1 << plane)
    painted = torch.where(end > first, value[:, None], 0).flatten()
    table = value.new_zeros(batch * planes * height * width)
    for cell in (left, right):
        table = table.scatter_reduce_(0, cell.flatten(), painted, "amax")
    table = table.view(batch, planes, height, width)
    largest = table[:, -1]
    for k in range(planes - 2, -1, -1):
        largest = largest.maximum(F.pad(largest[..., : -(1 << k)], (1 << k, 0))).maximum(table[:, k])
    return largest


def _relative_iou(image: Tensor, x: _Axis, y: _Axis, batch: int) -> Tensor:
    """(batch, H, W): each cell's IoU relative to the box's largest, the most over anchors and boxes.

    g = overlap / (both areas) grows with the IoU = g / (1 - g), so the best anchor is found by one multiplication
    each, and only the best is divided: 2 A + 3 passes over M * H * W float32, 164 MB each at 64 x 100 boxes on
    80 x 80 cells. So boxes are taken in pieces, which stay in a CPU's cache or fill a GPU (32 MiB a temporary).
    A compiler fuses all but the scatter, whose M * H * W * 4 bytes it then does keep.
    """
    columns = (x.overlap(x.distance) / _both_areas(x, y)[..., None]).float()  # (M, A, W)
    rows = y.overlap(y.distance).float()  # (M, A, H)
    best = (columns.amax(2) * rows.amax(2)).amax(1)  # these very products come again below: the best cell is 1
    best = torch.where(best > 0, best / (1 - best), 1)[:, None, None]
    height, width = rows.shape[2], columns.shape[2]
    largest = columns.new_zeros(batch, height * width)
    for part in _pieces(image, height * width):
        share = _outer(rows[part, 0], columns[part, 0])
        for a in range(1, rows.shape[1]):
            share = share.maximum(_outer(rows[part, a], columns[part, a]))
        grade = ((share / (1 - share)) / best[part]).flatten(1)
        # a maximum is the same in any order: atomics cost no determinism
        largest = largest.scatter_reduce_(0, image[part, None].expand_as(grade), grade, "amax")
    return largest.view(batch, height, width)


def _outer(rows: Tensor, columns: Tensor) -> Tensor:
    return rows[:, :, None] * columns[:, None, :]


def _pieces(image: Tensor, cells: int) -> list[slice]:
    """Pieces of the M boxes, by shapes alone."""
    if torch.compiler.is_compiling():
        return [slice(None)]
    size = max(1, (_PIECE_CPU if image.device.type == "cpu" else _PIECE_GPU) // cells)
    return [slice(i, i + size) for i in range(0, len(image), size)]


def _check_boxes(boxes: Any, batch: Any) -> None:
    if not isinstance(boxes, Tensor):
        raise TypeError(f"boxes: expected one tensor of shape (M, 5), got a {type(boxes).__name__}")
    if boxes.ndim != 2 or boxes.shape[1] != 5:
        raise ValueError(f"boxes: expected shape (M, 5): image index, x1, y1, x2, y2; got {tuple(boxes.shape)}")
    if boxes.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"boxes: expected float32 or float64, which hold every image index and pixel, got {boxes.dtype}; "
            "pack them as float32"
        )
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 0:
        raise ValueError(f"batch: expected the number of images, an int >= 0, got {batch!r}")
    # values are looked at on the CPU only: elsewhere it would cost a host sync, in a trace a graph break
    if boxes.device.type == "cpu" and not torch.compiler.is_compiling():
        image = boxes[:, 0]
        wrong = image[image.isfinite() & ~_in_batch(image, batch)]
        if len(wrong):
            raise ValueError(
                f"boxes: expected whole image indices from 0 to {batch - 1} in column 0 (batch = {batch}), "
                f"got {wrong[0].item():g}"
            )


def _check_sizes(sizes: Any, image_size: Any) -> None:
    if isinstance(sizes, Tensor) or not isinstance(sizes, Sequence):
        raise TypeError(f"sizes: expected a list of (height, width), one per level, got a {type(sizes).__name__}")
    named = {f"sizes[{i}]": size for i, size in enumerate(sizes)}
    for name, size in {**named, "image_size": image_size}.items():
        if not isinstance(size, Sequence) or len(size) != 2 or not all(isinstance(v, int) and v > 0 for v in size):
            raise ValueError(f"{name}: expected (height, width), two ints > 0, got {size!r}")


def _checked_anchors(anchors: Any, sizes: Sequence[tuple[int, int]], boxes: Tensor) -> list[Tensor]:
    if not isinstance(anchors, (Tensor, Sequence)) or (isinstance(anchors, Tensor) and anchors.ndim != 3):
        raise TypeError(
            "anchors: expected one (A, 2) tensor per level, or all as one of shape (levels, A, 2), got "
            + (f"shape {tuple(anchors.shape)}" if isinstance(anchors, Tensor) else f"a {type(anchors).__name__}")
        )
    levels = list(anchors)
    if len(levels) != len(sizes):
        raise ValueError(f"anchors: expected one entry per entry of sizes, {len(sizes)}, got {len(levels)}")
    for i, x in enumerate(levels):
        _check_anchor(f"anchors[{i}]", x, boxes)
    return levels


def _check_anchor(name: str, x: Any, boxes: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor of shape (A, 2), got a {type(x).__name__}")
    if x.ndim != 2 or x.shape[1] != 2 or not len(x):
        raise ValueError(f"{name}: expected shape (A, 2), widths and heights in pixels, A > 0; got {tuple(x.shape)}")
    if x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"{name}: expected a floating or integer dtype, got {x.dtype}")
    if x.device != boxes.device:
        raise ValueError(f"{name}: expected the boxes' device {boxes.device}, got {x.device}; move it: x.to(device)")
    # on the CPU only, as for the boxes
    if x.device.type == "cpu" and not torch.compiler.is_compiling() and not bool((x.isfinite() & (x > 0)).all()):
        raise ValueError(f"{name}: expected finite widths and heights > 0, got {x.tolist()}")
