"""Priors: per-cell weights from boxes and heads, which multiply the information map (``prior=``)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


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
    return [floor + (1 - floor) * _at_size(heads, size).sqrt() for size in sizes]


def _at_size(heads: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """(N, height, width): the maximum over the heads, each (N, 1, H, W), resized."""
    resized = []
    for x in heads:  # a side that shrinks keeps its maxima, one that grows is interpolated
        x = F.adaptive_max_pool2d(x, (min(size[0], x.shape[2]), min(size[1], x.shape[3])))
        resized.append(F.interpolate(x, size, mode="bilinear", align_corners=False))
    return torch.stack(resized).amax(0)[:, 0]
