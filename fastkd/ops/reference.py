"""The whole loss in plain differentiable PyTorch: the definition of truth, and the fallback on any device.

It has no backward of its own, so it checks the hand-written gradients of the kernels independently.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastkd.ops.presets import InfoMap

EPS = 1e-9  # of min-max and of Z = "map"
TINY = torch.finfo(torch.float32).tiny


def accumulator(*features: Tensor) -> torch.dtype:
    """The dtype of maps, sums and losses: float64 if any feature is float64, else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in features) else torch.float32


def standardize(teacher: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """t' = (t - mean_c) * rstd_c; empty vectors mean identity."""
    return (teacher - mean.view(-1, 1, 1)) * rstd.view(-1, 1, 1) if mean.numel() else teacher


def add_bias(student: Tensor, bias: Tensor) -> Tensor:
    """s + bias_c: the bias of the adapter, whose convolution runs without it; an empty one is absent."""
    return student + bias.view(-1, 1, 1) if bias.numel() else student


def score(teacher: Tensor, info: InfoMap) -> Tensor:
    """e_p, (N, H, W), of a standardised (N, C, H, W) teacher."""
    if info.score == "magnitude":
        return teacher.abs().mean(1)
    if info.score == "energy":
        return teacher.square().mean(1)
    if info.score == "entropy":
        # clamped, so that the term of a channel whose probability underflows is 0 and not inf * 0, whatever T
        logits = ((teacher - teacher.amax(1, keepdim=True)) / info.temperature).clamp_min(-1000)
        entropy = logits.exp().sum(1).log() - (logits.softmax(1) * logits).sum(1)
        # clamped, so that of equal channels rounding does not decide the sign of a mean
        return (1 - entropy / max(math.log(teacher.shape[1]), TINY)).clamp_min(0)
    return torch.ones_like(teacher[:, 0])


def normalise(e: Tensor, info: InfoMap) -> Tensor:
    """a_p, (N, H, W), over the cells of each image."""
    cells = e.flatten(1)
    if info.map_norm == "mean":
        cells = cells / cells.mean(1, keepdim=True).clamp_min(TINY)
    elif info.map_norm == "softmax":
        logits = (cells - cells.amax(1, keepdim=True)) / info.temperature
        cells = cells.shape[1] * logits.softmax(1)
    elif info.map_norm == "minmax":
        low, high = cells.aminmax(dim=1, keepdim=True)
        cells = (cells - low) / (high - low + EPS)
    return cells.view_as(e)


def information_map(teacher: Tensor, info: InfoMap, prior: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """w_p = q_p * a_p, (N, H, W); an empty prior, mean or rstd is an absent one."""
    if teacher.numel() == 0:
        return teacher.new_ones(teacher.shape[0], *teacher.shape[2:])
    w = normalise(score(standardize(teacher.to(accumulator(teacher)), mean, rstd), info), info)
    return w * prior if prior.numel() else w


def penalty_sum(difference: Tensor, penalty: str, beta: float) -> Tensor:
    """D_p, (N, H, W): the penalty of s - t' summed over channels."""
    zero = torch.zeros_like(difference)
    if penalty == "l2":
        return difference.square().sum(1)
    if penalty == "l1":
        return F.l1_loss(difference, zero, reduction="none").sum(1)
    return F.smooth_l1_loss(difference, zero, reduction="none", beta=beta).sum(1)


def z_of(student: Tensor, mass: Tensor, divisor: str) -> Tensor | float:
    """Z of one level; 1 where the caller divides by itself (``map_all_ranks``)."""
    n, c, h, w = student.shape
    if divisor == "elements":
        return max(n * c * h * w, 1)
    if divisor == "batch":
        return max(n, 1)
    return c * mass + EPS if divisor == "map" else 1.0


def level_losses(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    prior: Sequence[Tensor],
    mean: Sequence[Tensor],
    rstd: Sequence[Tensor],
    bias: Sequence[Tensor],
    weights: Sequence[float],
    info: InfoMap,
    penalty: str,
    beta: float,
    divisor: str,
) -> tuple[Tensor, Tensor]:
    """Loss and map mass (sum of w_p) of each level, both (L,); the arguments are those of the kernels' ops."""
    dtype = accumulator(*student, *teacher)
    losses, masses = [], []
    for s, t, q, mu, r, b, weight in zip(student, teacher, prior, mean, rstd, bias, weights, strict=True):
        t = t.detach().to(dtype)
        w = information_map(t, info, q, mu, r)
        mass = w.sum()
        difference = add_bias(s.to(dtype), b) - standardize(t, mu, r)
        total = (w * penalty_sum(difference, penalty, beta)).sum()
        losses.append(weight * total / z_of(s, mass, divisor))
        masses.append(mass)
    return torch.stack(losses), torch.stack(masses)
