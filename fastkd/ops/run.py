"""Computes the loss of checked levels with the backend of their plan, in one pass or two."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastkd.ops import reference
from fastkd.ops.autograd import OnePass, TwoPasses, op, saved_tensors_are_packed
from fastkd.ops.levels import LevelTensors, is_eager
from fastkd.ops.options import LossOptions
from fastkd.ranks import sum_over_ranks


def run(
    levels: LevelTensors, options: LossOptions, factor: Tensor | None = None, *, one_pass: bool = True
) -> tuple[Tensor, Tensor]:
    """Return the loss times ``factor``, and the level losses without it.

    Args:
        levels: the checked tensors.
        options: the options of the loss.
        factor: float32 scalar without gradient, known before the forward; None: 1.
        one_pass: whether the forward may write the gradient already; False if the caller multiplies the loss.

    Returns:
        The loss, a scalar or (L,) with ``reduction="none"``; and the (L,) level losses, detached.
    """
    by_level = options.reduction == "none"
    if one_pass and _takes_one_pass(levels, options):
        mass = _mass_for_one_pass(levels, options)
        scale = levels.plan.unit_factor if factor is None else factor
        bias = levels.bias if any(b.requires_grad for b in levels.bias) else ()
        loss, losses = OnePass.apply(levels, mass, scale, by_level, *levels.student, *bias)  # type: ignore[no-untyped-call]
        return loss, losses.detach()
    losses = level_losses(levels, options)
    # a copy, because the factor is updated for the next step before the backward of this one
    scaled = losses if factor is None else losses * factor.to(losses.dtype, copy=True)
    return scaled if by_level else scaled.sum(), losses.detach()


def _takes_one_pass(levels: LevelTensors, options: LossOptions) -> bool:
    """Whether eager autograd needs a gradient, and the forward can write it."""
    if not (levels.plan.one_pass and is_eager(levels) and torch.is_grad_enabled()) or saved_tensors_are_packed():
        return False
    if options.divisor == "map_all_ranks" and not (options.info_map.weights_are_prior and levels.mass is not None):
        return False  # Z is known only after the maps of all ranks
    _refuse_forward_mode(levels.student)
    return any(x.requires_grad for x in (*levels.student, *levels.bias))


def _mass_for_one_pass(levels: LevelTensors, options: LossOptions) -> Tensor:
    """Return the sums of the maps, (L,) float64, if Z needs them and they are known; else an empty tensor."""
    if not options.info_map.weights_are_prior or options.divisor not in ("map", "map_all_ranks"):
        return levels.plan.unknown_mass
    assert levels.mass is not None
    if options.divisor == "map":
        return levels.mass
    mass = levels.mass.clone()
    return mass / sum_over_ranks(mass)


def level_losses(levels: LevelTensors, options: LossOptions) -> Tensor:
    """Return the differentiable loss of each level, (L,), in two passes or by the reference."""
    plan = levels.plan
    tensors = (levels.student, levels.teacher, levels.prior, levels.mean, levels.rstd, levels.bias)
    if plan.backend == "reference":
        losses, mass = reference.level_losses(
            *tensors, plan.weights, options.info_map, options.penalty, options.beta, options.divisor
        )
    else:
        _refuse_forward_mode(levels.student)
        if is_eager(levels) and torch.is_grad_enabled():
            losses, mass, _ = TwoPasses.apply(levels, *levels.student, *levels.bias)  # type: ignore[no-untyped-call]
        else:
            losses, mass, _ = op(plan.backend)(*tensors, plan.weights, *plan.codes)
    if options.divisor == "map_all_ranks":
        losses = losses / _mean_over_ranks(mass, levels.student)
    return losses


def _mean_over_ranks(mass: Tensor, student: list[Tensor]) -> Tensor:
    """Return Z of ``map_all_ranks``: C times the sum of the map, averaged over the ranks of the process group."""
    sums = mass.detach().to(torch.float64, copy=True)  # float64 as in one pass, which another rank may run
    ranks = sum_over_ranks(sums)
    channels = torch.tensor([x.shape[1] for x in student], dtype=sums.dtype).to(sums.device, non_blocking=True)
    return (channels * sums / ranks + reference.EPS).to(mass.dtype)


def _refuse_forward_mode(student: list[Tensor]) -> None:
    """Raise for forward-mode derivatives, which a custom op lacks and PyTorch would take as 0."""
    if torch.compiler.is_compiling() or getattr(forward_ad, "_current_level", 0) < 0:  # no tangent exists
        return
    tangents = [forward_ad.unpack_dual(x).tangent for x in student]  # type: ignore[no-untyped-call]
    if any(x is not None for x in tangents):
        raise RuntimeError(
            "fastkd: the compiled backends have no forward-mode derivative; for torch.func.jvp use backend='reference'"
        )
