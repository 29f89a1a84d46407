"""``autograd.Function``s around the ops of the compiled backends, for eager mode.

``OnePass``: all factors of the loss are known before the forward, so the forward writes the final gradients, and the
backward returns them. If the upstream gradient is not 1 (a loss divided for gradient accumulation, a GradScaler), the
backward scales them in place; on a GPU the device itself checks that. PyTorch's rules for custom ops (no output may be
an input, backward formulas are functional) do not allow this. ``torch.compile`` and other tracers therefore see the
two-pass ops and their autograd rule (``fastkd.ops.schema``).

``TwoPasses``: the same two functional ops, for gradients that cannot be written before the upstream gradient is known.
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
    """Return the default overload of a backend's op, which is faster to call than its packet."""
    return getattr(torch.ops.fastkd, f"distill_{backend}{suffix}").default


class OnePass(torch.autograd.Function):
    """Returns factor * the sum of the level losses, and the level losses; keeps their gradients for the backward.

    The caller detaches the second output. It exists to connect a graph of the backward (``create_graph``) to this node.
    """

    @staticmethod
    def forward(
        ctx: Any, levels: LevelTensors, mass: Tensor, factor: Tensor, by_level: bool, *differentiable: Tensor
    ) -> tuple[Tensor, Tensor]:
        plan = levels.plan
        count = len(plan.weights)
        wanted = ctx.needs_input_grad[4:]
        gradient = _gradient_buffers(levels, wanted[:count])
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
        (connection,) = ctx.saved_tensors  # raises PyTorch's own error where the graph was freed
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
    """Returns losses and sums of the maps, both (L,); the backward reads student and teacher again."""

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


def _gradient_buffers(levels: LevelTensors, wanted: tuple[bool, ...]) -> list[Tensor]:
    """Return the tensor to write each level's gradient into, which may be a donated teacher feature; empty for none."""
    donated = levels.donated or [False] * len(wanted)
    return [
        levels.plan.absent if not needs else t.detach() if gift else torch.empty_like(s)
        for s, t, needs, gift in zip(levels.student, levels.teacher, wanted, donated, strict=True)
    ]


def _scale(backend: str, upstream: Tensor, gradient: list[Tensor]) -> None:
    """Multiply the gradients in place by their upstream gradient: a scalar, or one per level."""
    if not upstream.is_cpu:  # the device checks whether it is 1
        op(backend, "_rescale")(upstream.detach(), gradient)
        return
    values = upstream.tolist() if upstream.ndim else [upstream.item()]
    if all(value == 1 for value in values):
        return
    with torch.no_grad():
        factors = values * (len(gradient) // len(values))
        present = [(g, factor) for g, factor in zip(gradient, factors, strict=True) if g.numel()]
        if present:
            torch._foreach_mul_([g for g, _ in present], [factor for _, factor in present])


def _result(connection: Tensor, gradient: list[Tensor], wanted: tuple[bool, ...]) -> list[Tensor | None]:
    """Return the wanted gradients, None for others; with ``create_graph``, a backward through them raises."""
    if torch.is_grad_enabled():  # only with create_graph
        gradient = list(_Undifferentiable.apply(connection, *gradient))  # type: ignore[no-untyped-call]
    if all(wanted):
        return gradient  # type: ignore[return-value]
    return [g if needs else None for g, needs in zip(gradient, wanted, strict=True)]


def _graph_is_kept() -> bool:
    """Whether this backward runs with ``retain_graph``; True where PyTorch cannot tell."""
    return _keeps_graph is None or bool(_keeps_graph())


def saved_tensors_are_packed() -> bool:
    """Whether hooks pack the saved tensors, as in activation checkpointing, which may run this forward twice."""
    return _top_hooks is not None and _top_hooks(True) is not None


_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


class _Undifferentiable(torch.autograd.Function):
    """Returns gradients unchanged, connected to the node that computed them; a double backward raises an error here."""

    @staticmethod
    def forward(ctx: Any, connection: Tensor, *gradient: Tensor) -> tuple[Tensor, ...]:
        ctx.mark_dirty(*gradient)  # else the outputs would be views, which could not be changed in place
        return gradient

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(NO_SECOND_DERIVATIVE)
