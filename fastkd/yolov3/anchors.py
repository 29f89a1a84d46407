"""Anchor boxes: the sizes that a detector's heads start from, and functions that choose them for a data set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

_MAX_ROUNDS = 300
_CELLS_PER_BOX = 4  # a head is given boxes of up to this many of its cells


class Heads(Protocol):
    """What decoding and the losses need to know about a detector; ``YOLOv3`` and ``YOLOv3Tiny`` have it."""

    @property
    def anchors(self) -> Tensor: ...  # (heads, A, 2), width and height in pixels
    @property
    def strides(self) -> tuple[int, ...]: ...  # ascending
    @property
    def num_classes(self) -> int: ...


class HeadLayout(NamedTuple):
    """``Heads`` without a model: anchors (heads, A, 2) in pixels, strides ascending, number of classes."""

    anchors: Tensor
    strides: tuple[int, ...]
    num_classes: int


def size_iou(a: Tensor, b: Tensor) -> Tensor:
    """Return the IoU (n, m) of boxes that share their centre, from their sizes (n, 2) and (m, 2)."""
    inter = torch.minimum(a[:, None], b[None]).prod(-1)
    return inter / (a.prod(-1)[:, None] + b.prod(-1)[None] - inter).clamp(min=1e-9)


def kmeans_anchors(wh: Tensor | Sequence[Sequence[float]], k: int, seed: int = 0) -> Tensor:
    """Choose k box sizes for a data set by k-means with distance 1 - IoU (YOLOv2, arXiv:1612.08242, section 2).

    Args:
        wh: (n, 2) widths and heights of the labelled boxes, in pixels of the network's input.
        k: number of sizes.
        seed: seed of the initial centres (k-means++, Arthur & Vassilvitskii 2007).

    Returns:
        (k, 2) float32 on the CPU, the smallest area first.

    Raises:
        ValueError: ``wh`` has another shape, is not finite and positive, or has fewer than k different sizes.
    """
    sizes = _checked_sizes(wh, k)
    centres = _spread_out(sizes, k, torch.Generator().manual_seed(seed))
    labels = torch.full((len(sizes),), -1)
    for _ in range(_MAX_ROUNDS):
        nearest = size_iou(sizes, centres).argmax(1)
        if torch.equal(nearest, labels):
            break
        labels = nearest
        member = torch.nn.functional.one_hot(labels, k).to(sizes.dtype)
        count = member.sum(0)[:, None]
        centres = torch.where(count > 0, member.T @ sizes / count.clamp(min=1), centres)
    return centres[centres.prod(1).argsort()].float()


def dataset_anchors(
    wh: Tensor | Sequence[Sequence[float]], strides: Sequence[int], per_head: int = 3, seed: int = 0
) -> Tensor:
    """Choose anchors for a detector's heads, so that each head finds the boxes of a size that its cells resolve.

    A box is given to the head of the smallest stride s with sqrt(w * h) < 4 s, or to the coarsest head if there is
    none; COCO's published anchors nearly follow this rule. The anchors of a head are ``kmeans_anchors`` of its boxes.
    The usual rule sorts all anchors by area and deals them out: with a data set of small objects, it gives half of
    the objects to the coarsest head, where several of them fall into one cell. A head whose boxes have fewer
    different sizes than it has anchors gets squares of sides 2 s to 4 s instead.

    Args:
        wh: (n, 2) widths and heights of the labelled boxes, in pixels of the network's input.
        strides: strides of the heads, ascending.
        per_head: A, the number of anchors per head.
        seed: as in ``kmeans_anchors``.

    Returns:
        (heads, A, 2) float32, pixels, heads by ascending stride: what ``YOLOv3(anchors=...)`` takes.

    Raises:
        ValueError: ``wh`` has another shape, is not finite and positive, or has fewer different sizes than anchors.
    """
    sizes = _checked_sizes(wh, len(strides) * per_head)
    limits = torch.tensor([_CELLS_PER_BOX * stride for stride in strides[:-1]], dtype=sizes.dtype)
    head_of = torch.bucketize(sizes.prod(1).sqrt(), limits, right=True)
    heads = []
    for head, stride in enumerate(strides):
        own = sizes[head_of == head]
        if _count_distinct(own) >= per_head:
            heads.append(kmeans_anchors(own, per_head, seed))
        else:
            heads.append(torch.linspace(2.0 * stride, _CELLS_PER_BOX * stride, per_head)[:, None].expand(-1, 2))
    return torch.stack(heads)


def _checked_sizes(wh: Tensor | Sequence[Sequence[float]], k: int) -> Tensor:
    sizes = torch.as_tensor(wh, dtype=torch.float64).detach().cpu()
    if sizes.ndim != 2 or sizes.shape[1] != 2 or not bool((sizes.isfinite() & (sizes > 0)).all()):
        raise ValueError(f"wh: expected finite widths and heights > 0, shape (n, 2); got shape {tuple(sizes.shape)}")
    distinct = _count_distinct(sizes)
    if not 1 <= k <= distinct:
        raise ValueError(f"k: expected 1 to {distinct}, the number of different sizes in wh; got {k}")
    return sizes


def _count_distinct(sizes: Tensor) -> int:
    return len(set(map(tuple, sizes.tolist())))


def _spread_out(sizes: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Choose initial centres by k-means++: a size is drawn with a probability that grows with its distance to them."""
    first = int(torch.randint(len(sizes), (1,), generator=generator))
    centres = sizes[first : first + 1]
    while len(centres) < k:
        distance = (1 - size_iou(sizes, centres)).amin(1).clamp(min=0)
        distance[distance < 1e-12] = 0  # rounding must not let the same size be drawn twice
        drawn = torch.multinomial(distance.square(), 1, generator=generator)
        centres = torch.cat([centres, sizes[drawn]])
    return centres
