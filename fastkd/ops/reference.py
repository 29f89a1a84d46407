"""The whole loss in plain differentiable PyTorch: the definition of the loss, and the fallback on any device.

For each level, over the cells p of all images and the channels c,

    t'_pc = (t_pc - mean_c) * rstd_c,   e_p = score(t'_p),   w_p = prior_p * map_norm(e)_p,
    D_p = sum_c rho((s_pc + bias_c) - t'_pc),   loss = weight * sum_p w_p * D_p / Z.

It has no hand-written backward, so autograd checks the gradients of the kernels independently.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastkd.ops.presets import CHANNELS, CWD, InfoMap

EPS = 1e-9  # added to the denominators of min-max and of Z = "map"
BATCH_EPS, STD_EPS = 1e-12, 1e-6  # added to a variance, and to a standard deviation
TINY = torch.finfo(torch.float32).tiny


def accumulator(*features: Tensor) -> torch.dtype:
    """Return the dtype of maps, sums and losses: float64 if any feature is float64, else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in features) else torch.float32


def standardize(teacher: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """Return t' = (t - mean_c) * rstd_c, (N, C, H, W); empty vectors mean identity."""
    return (teacher - mean.view(-1, 1, 1)) * rstd.view(-1, 1, 1) if mean.numel() else teacher


def add_bias(student: Tensor, bias: Tensor) -> Tensor:
    """Return s + bias_c, with the (C,) bias that the adapter's convolution leaves out; an empty bias is absent."""
    return student + bias.view(-1, 1, 1) if bias.numel() else student


def score(teacher: Tensor, info: InfoMap) -> Tensor:
    """Return the score e_p, (N, H, W), of a standardised (N, C, H, W) teacher."""
    if info.score == "magnitude":
        return teacher.abs().mean(1)
    if info.score == "energy":
        return teacher.square().mean(1)
    if info.score == "entropy":
        # clamped, so that for any T the term of a channel whose probability underflows is 0 and not inf * 0
        logits = ((teacher - teacher.amax(1, keepdim=True)) / info.temperature).clamp_min(-1000)
        entropy = logits.exp().sum(1).log() - (logits.softmax(1) * logits).sum(1)
        # clamped, so that for equal channels rounding does not decide the sign of the mean score
        return (1 - entropy / max(math.log(teacher.shape[1]), TINY)).clamp_min(0)
    return torch.ones_like(teacher[:, 0])


def apply_map_norm(e: Tensor, info: InfoMap) -> Tensor:
    """Return map_norm(e)_p, (N, H, W): the scores normalised over the cells of each image."""
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
    """Return w_p = prior_p * map_norm(e)_p, (N, H, W); an empty prior, mean or rstd is absent."""
    if teacher.numel() == 0:
        return teacher.new_ones(teacher.shape[0], *teacher.shape[2:])
    w = apply_map_norm(score(standardize(teacher.to(accumulator(teacher)), mean, rstd), info), info)
    return w * prior if prior.numel() else w


def by_own_batch(x: Tensor) -> Tensor:
    """Return (x - mean_c) / (std_c + 1e-6) of an (N, C, H, W) batch, differentiable, as in PKD's published code.

    std is the unbiased standard deviation (divisor N H W - 1); for a single cell it is undefined, and the result is 0.
    The gradient treats std + 1e-6 as a multiple of std, which causes a relative error of 1e-6 / std.
    """
    if x.numel() < 2 * x.shape[1]:
        return x - x
    with torch.no_grad():
        std = torch.std(x.to(accumulator(x)), (0, 2, 3), correction=0)
        scale = (std.square() + BATCH_EPS).sqrt() / (std * _unbiased(x) + STD_EPS)
    return F.batch_norm(x, None, None, scale, training=True, eps=BATCH_EPS)


def batch_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return (mean, rstd), two (C,) vectors, with which ``standardize`` equals ``by_own_batch``."""
    if x.numel() < 2 * x.shape[1]:
        return tuple(x.new_zeros(2, x.shape[1], dtype=accumulator(x)))
    std, mean = torch.std_mean(x.to(accumulator(x)), (0, 2, 3), correction=0)
    return mean, 1 / (std * _unbiased(x) + STD_EPS)


def _unbiased(x: Tensor) -> float:
    """Return the factor from the biased to the unbiased standard deviation over the cells of a channel."""
    cells = x.numel() // x.shape[1]
    return math.sqrt(cells / (cells - 1))


def penalty_sum(student: Tensor, teacher: Tensor, penalty: str, beta: float) -> Tensor:
    """Return D_p, (N, H, W): the penalty of s - t' summed over channels.

    ``"cwd"`` (CWD, Shu et al., 2021): beta^2 times the cell's part of KL(P || Q), where P and Q are the softmax over
    the cells of a channel of t' / beta and s / beta. The part of a cell is P log(P / Q) - P + Q, which is never below
    0; -P + Q sums to 0 over the cells.
    """
    if penalty == CWD:
        q, p = (x.flatten(2).div(beta).log_softmax(2).view_as(x) for x in (student, teacher))
        return beta**2 * (p.exp() * (p - q) - p.exp() + q.exp()).sum(1)
    difference = student - teacher
    zero = torch.zeros_like(difference)
    if penalty == "l2":
        return difference.square().sum(1)
    if penalty == "l1":
        return F.l1_loss(difference, zero, reduction="none").sum(1)
    return F.smooth_l1_loss(difference, zero, reduction="none", beta=beta).sum(1)


def z_of(student: Tensor, mass: Tensor, divisor: str) -> Tensor | float:
    """Return Z of one level, given the sum of its map; 1 for ``map_all_ranks``, where the caller divides."""
    n, c, h, w = student.shape
    if divisor == "elements":
        return max(n * c * h * w, 1)
    if divisor == "batch":
        return max(n, 1)
    if divisor == CHANNELS:
        return max(n * c, 1)
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
    """Return loss and mass (sum of w_p) of each level, both (L,); the arguments are those of the ops of the kernels."""
    dtype = accumulator(*student, *teacher)
    losses, masses = [], []
    for s, t, q, mu, r, b, weight in zip(student, teacher, prior, mean, rstd, bias, weights, strict=True):
        t = t.detach().to(dtype)
        w = information_map(t, info, q, mu, r)
        mass = w.sum()
        total = (w * penalty_sum(add_bias(s.to(dtype), b), standardize(t, mu, r), penalty, beta)).sum()
        losses.append(weight * total / z_of(s, mass, divisor))
        masses.append(mass)
    return torch.stack(losses), torch.stack(masses)
