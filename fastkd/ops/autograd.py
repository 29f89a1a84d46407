"""Eager autograd of the compiled backends: ``autograd.Function``s around their ops.

``OnePass``: everything that the loss is multiplied with is known before the forward, so the forward writes the final
gradients, and the backward hands them on. Where another upstream gradient than 1 arrives (a loss divided for
accumulation, a GradScaler) it scales them in place; on a GPU that is decided on the device. PyTorch's rules for custom
ops (no output is an input, backward formulas are functional) leave no room for that; ``torch.compile`` and other
tracers see the two-pass ops and their autograd rule (``fastkd.ops.schema``).

``TwoPasses``: the same two functional ops, for what cannot be written before its upstream gradient is known.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastkd.ops.levels import LevelTensors
from fastkd.ops.presets import DIVISORS
from fastkd.ops.schema import NO_SECOND_DERIVATIVE, bias_gradients

Z_OF_MAP = DIVISORS.index("map")


@cache
def op(backend: str, suffix: str = "") -> Any:
    """The overload of a backend's op; faster to call than its packet."""
    return getattr(torch.ops.fastkd, f"distill_{backend}{suffix}").default


class OnePass(torch.autograd.Function):
    """(factor * sum of the levels' losses, the levels' losses): the gradients are kept until a backward takes them.

    The second output is for the caller to detach: it only ties what a graph of the backward computes to this node.
    """

    @staticmethod
    def forward(
        ctx: Any, levels: LevelTensors, mass: Tensor, factor: Tensor, by_level: bool, *differentiable: Tensor
    ) -> tuple[Tensor, Tensor]:
        plan = levels.plan
        count = len(plan.weights)
        wanted = ctx.needs_input_grad[4:]
        gradient = _room(levels, wanted[:count])
        bias_gradient = [
            torch.empty_like(b) if needs else plan.absent for b, needs in zip(levels.bias, wanted[count:], strict=False)
        ]
        codes = (*plan.codes[:5], Z_OF_MAP) if mass.numel() else plan.codes
        small = [[] if x is plan.nothing else x for x in (levels.prior, levels.mean, levels.rstd, levels.bias)]
        total, losses = op(plan.backend, "_one_pass")(
            levels.student, levels.teacher, *small, plan.weights, *codes, mass, factor, gradient, bias_gradient
        )
        ctx.gradient, ctx.backend = [*gradient, *bias_gradient], plan.backend
        ctx.save_for_backward(losses)
        ctx.set_materialize_grads(False)
        if by_level:
            return losses * factor if factor.numel() else losses.clone(), losses
        return total, losses

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        (connection,) = ctx.saved_tensors  # PyTorch's own error where the graph is gone
        wanted = ctx.needs_input_grad[4:]
        if upstream is None:
            return (None,) * (4 + len(wanted))
        gradient: list[Tensor] = ctx.gradient
        if _graph_is_kept():
            gradient = [g.clone() for g in gradient]
        else:
            ctx.gradient = None
        _scale(ctx.backend, upstream, gradient)
        return (None, None, None, None, *_result(connection, gradient, wanted))


class TwoPasses(torch.autograd.Function):
    """(losses, masses of the maps), both (L,): the backward reads student and teacher again."""

    @staticmethod
    def forward(ctx: Any, levels: LevelTensors, *differentiable: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        plan = levels.plan
        # inference tensors cannot be saved for the backward
        teacher, mean, rstd = (
            [x.clone() if x.is_inference() else x for x in each] for each in (levels.teacher, levels.mean, levels.rstd)
        )
        losses, mass, maps = op(plan.backend)(
            levels.student, teacher, levels.prior, mean, rstd, levels.bias, plan.weights, *plan.codes
        )
        connection = losses.new_empty(0)
        ctx.plan = plan
        ctx.save_for_backward(connection, mass, maps, *levels.student, *teacher, *mean, *rstd, *levels.bias)
        ctx.mark_non_differentiable(mass)
        ctx.set_materialize_grads(False)
        return losses, mass, connection

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        wanted, plan = ctx.needs_input_grad[1:], ctx.plan
        connection, mass, maps, *saved = ctx.saved_tensors
        if upstream is None:
            return (None,) * (1 + len(wanted))
        n = len(plan.weights)
        student, teacher, mean, rstd, bias = (list(saved[i * n : (i + 1) * n]) for i in range(5))
        with torch.no_grad():
            gradient = op(plan.backend, "_backward")(
                upstream, mass, maps, student, teacher, mean, rstd, bias, plan.weights, *plan.codes[3:]
            )
            sums = bias_gradients(
                gradient, [b if needs else plan.absent for b, needs in zip(bias, wanted[n:], strict=True)]
            )
        found = [*gradient, *(plan.absent if x is None else x for x in sums)]
        return (None, *_result(connection, found, wanted))


def _room(levels: LevelTensors, wanted: tuple[bool, ...]) -> list[Tensor]:
    """Where the gradient of each level goes; empty where none is wanted."""
    donated = levels.donated or [False] * len(wanted)
    return [
        levels.plan.absent if not needs else t.detach() if gift else torch.empty_like(s)
        for s, t, needs, gift in zip(levels.student, levels.teacher, wanted, donated, strict=True)
    ]


def _scale(backend: str, upstream: Tensor, gradient: list[Tensor]) -> None:
    """Multiply the gradients by their upstream gradient: a scalar, or one per level."""
    if not upstream.is_cpu:  # decided on the device
        op(backend, "_rescale")(upstream.detach(), gradient)
        return
    values = upstream.tolist() if upstream.ndim else [upstream.item()]
    if all(value == 1 for value in values):
        return
    with torch.no_grad():
        factors = values * (len(gradient) // len(values))
        there = [(g, factor) for g, factor in zip(gradient, factors, strict=True) if g.numel()]
        if there:
            torch._foreach_mul_([g for g, _ in there], [factor for _, factor in there])


def _result(connection: Tensor, gradient: list[Tensor], wanted: tuple[bool, ...]) -> list[Tensor | None]:
    """The gradients that are wanted; where a graph of the backward is made, tied to an error by name."""
    if torch.is_grad_enabled():  # of create_graph
        gradient = list(_Undifferentiable.apply(connection, *gradient))  # type: ignore[no-untyped-call]
    if all(wanted):
        return gradient  # type: ignore[return-value]
    return [g if needs else None for g, needs in zip(gradient, wanted, strict=True)]


def _graph_is_kept() -> bool:
    """Whether this backward is one of ``retain_graph``. Where PyTorch does not say: it may be."""
    return _keeps_graph is None or bool(_keeps_graph())


def saved_tensors_are_packed() -> bool:
    """Whether hooks pack what a forward saves, as in activation checkpointing, which may run this forward twice."""
    return _top_hooks is not None and _top_hooks(True) is not None


_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


class _Undifferentiable(torch.autograd.Function):
    """Gradients as they are, tied to the node that they come from, so that a double backward ends here by name."""

    @staticmethod
    def forward(ctx: Any, connection: Tensor, *gradient: Tensor) -> tuple[Tensor, ...]:
        ctx.mark_dirty(*gradient)  # returned as they are, not as views, which could not be changed in place
        return gradient

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(NO_SECOND_DERIVATIVE)
