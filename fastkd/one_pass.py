"""Eager autograd of the compiled backends: the forward may write the gradient while the features are in cache.

The forward cannot know its upstream gradient, so it writes for the one that it expects, and the backward computes anew,
level by level, where another came. PyTorch's rules for custom ops (no output is an input, backward formulas are
functional) leave no room for that, so it is an ``autograd.Function`` around ops that write into what they are given;
under ``torch.compile`` the two-pass ops of ``fastkd.ops`` do without.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd import buffers, teacher_memory
from fastkd.levels import Levels

NO_SECOND_DERIVATIVE = (
    "fastkd: the compiled backends have no second derivative; for a double backward use backend='reference'"
)
SCALABLE = (1e-10, 1e10)  # sizes of upstream gradients: scaling from these to 1e-27 to 1e27 stays within float32
KEYS = 64  # uses of a loss that are told apart


class Key(NamedTuple):
    """What tells one use of a loss from another."""

    device: torch.device
    stream: int  # whose work comes in order; 0 on the CPU
    dtype: torch.dtype  # of the sums
    channels: tuple[int, ...]


class Upstream(NamedTuple):
    """An upstream gradient of some levels."""

    gradient: Tensor  # (L,), never written to again
    values: list[float] | None = None  # the same, where reading them costs no sync
    steady: bool = False  # the one before it was the same

    def scalable(self) -> Upstream:
        """Itself; 1 where it is 0 or beyond any sense, as what is written for it may have to be scaled."""
        if self.values is not None and all(SCALABLE[0] < abs(x) < SCALABLE[1] for x in self.values):
            return self
        size = self.gradient.abs()
        return Upstream(torch.where((size > SCALABLE[0]) & (size < SCALABLE[1]), self.gradient, 1))


class Upstreams:
    """The upstream gradients that a loss got last, and so expects next. A wrong guess costs time, no correctness.

    Nothing goes in or out while a CUDA graph is captured: its tensors are written again by every replay.
    """

    def __init__(self) -> None:
        self._last: dict[Key, Upstream] = {}

    def get(self, key: Key) -> Upstream | None:
        return None if _is_captured(key.device) else self._last.get(key)

    def remember(self, key: Key, gradient: Tensor) -> Upstream:
        if _is_captured(gradient.device):
            return Upstream(gradient)
        values = gradient.tolist() if gradient.device.type == "cpu" else None
        before = self._last.get(key)
        steady = before is not None and before.values == values  # on a device nobody looks: taken for steady
        kept = before.gradient if before and steady and values is not None else gradient.detach().clone()
        this = Upstream(kept, values, steady)
        self._last[key] = this  # where another thread may put its own before this one returns
        if len(self._last) > KEYS:
            self._last.pop(next(iter(self._last)), None)
        return this


def _is_captured(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


SHARED = Upstreams()  # of all calls of ``distill_loss``; a ``DistillLoss`` has its own


@dataclass(frozen=True)
class Call:
    """One call of a backend: its levels and constants."""

    backend: str
    levels: Levels
    forward_codes: tuple[Any, ...]  # score, norm, temperature
    backward_codes: tuple[Any, ...]  # penalty, beta, normalizer
    one_pass: bool | None
    reuse_teacher_memory: bool
    upstreams: Upstreams

    @cached_property
    def key(self) -> Key:
        x = self.levels
        device = x.student[0].device
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        return Key(device, stream, x.dtype, tuple(s.shape[1] for s in x.student))

    def expected(self) -> Upstream | None:
        """The upstream gradient to write for, or None where the backward shall compute the gradient."""
        if self.one_pass is False or _saved_tensors_are_packed():
            return None
        if self.reuse_teacher_memory and any(s.dtype == torch.float16 for s in self.levels.student):
            return None  # it could not be computed anew, and scaled it could over- or underflow
        last = self.upstreams.get(self.key)
        if last is None and self.one_pass:
            last = Upstream(self.levels.student[0].new_ones(len(self.levels.student), dtype=self.levels.dtype))
        if last is None or not (last.steady or self.one_pass):
            return None
        return last.scalable() if self.reuse_teacher_memory else last

    def run(self, assumed: Tensor | None = None, gradient: list[Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Loss and map mass of each level, (L,), and all maps, one after the other; writes the gradient where given."""
        x = self.levels
        inputs = (x.student, x.teacher, x.prior, x.mean, x.rstd, x.weights, *self.forward_codes, *self.backward_codes)
        if assumed is None:
            losses, mass, maps = _op(self.backend)(*inputs)
        else:
            losses, mass, maps = _op(self.backend, "_one_pass")(*inputs, assumed, gradient)
        return losses, mass, maps


def _op(backend: str, suffix: str = "") -> Any:
    return getattr(torch.ops.fastkd, f"distill_{backend}{suffix}")


def level_losses(call: Call) -> tuple[Tensor, Tensor]:
    """Loss and map mass of each level, both (L,)."""
    if torch.is_grad_enabled() and any(s.requires_grad for s in call.levels.student):
        losses, mass, _ = _Distill.apply(call, *call.levels.student)  # type: ignore[no-untyped-call]
    else:
        losses, mass, _ = call.run()
    return losses, mass


class _Distill(torch.autograd.Function):
    """Keeps on ``ctx`` no feature but through ``save_for_backward``, and the gradient until a backward takes it."""

    @staticmethod
    def forward(ctx: Any, call: Call, *student: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = call.levels
        ctx.key, ctx.backend, ctx.constants = call.key, call.backend, (x.weights, *call.backward_codes)
        ctx.expected, ctx.gradient = call.expected(), None
        ctx.upstreams = None if call.one_pass is False else call.upstreams
        ctx.in_teacher = call.reuse_teacher_memory and teacher_memory.fits(x) and not _saved_tensors_are_packed()
        if ctx.in_teacher:
            teacher_memory.give_up(x.teacher)
        if ctx.expected is not None:
            ctx.gradient = _room(x.student, x.teacher, ctx.needs_input_grad[1:], ctx.in_teacher)
        losses, mass, maps = call.run(ctx.expected.gradient if ctx.expected else None, ctx.gradient)
        connection = losses.new_empty(0)
        ctx.is_final = ctx.in_teacher and ctx.gradient is not None  # then of the teacher only its version matters
        needed = x.teacher if ctx.is_final else (mass, maps, *x.student, *x.teacher, *x.mean, *x.rstd)
        _save(ctx, connection, *needed)
        ctx.mark_non_differentiable(mass)
        ctx.set_materialize_grads(False)
        return losses, mass, connection

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        if upstream is None:
            return None, *(None for _ in needed)
        connection, *saved = _saved(ctx)
        with torch.no_grad():
            gradient = _take_expected(ctx, upstream)
            if gradient is None:
                gradient = _rescale(ctx, upstream) if ctx.is_final else _compute(ctx, upstream, saved)
            if not _graph_is_kept():
                ctx.inference.clear()
        if torch.is_grad_enabled():  # of create_graph
            gradient = list(_Undifferentiable.apply(connection, *gradient))  # type: ignore[no-untyped-call]
        return None, *(g if needs else None for g, needs in zip(gradient, needed, strict=True))


def _save(ctx: Any, *tensors: Tensor) -> None:
    """As ``save_for_backward``, which takes no inference tensors: nothing counts their changes, nor can they learn."""
    ctx.inference = {i: x for i, x in enumerate(tensors) if x.is_inference()}
    ctx.save_for_backward(*(None if i in ctx.inference else x for i, x in enumerate(tensors)))


def _saved(ctx: Any) -> list[Tensor]:
    return [ctx.inference.get(i, x) for i, x in enumerate(ctx.saved_tensors)]


def _take_expected(ctx: Any, upstream: Tensor) -> list[Tensor] | None:
    """The gradient that the forward wrote, if it is known without a sync to be the right one."""
    if ctx.upstreams is None:
        return None
    values = ctx.upstreams.remember(ctx.key, upstream).values
    if ctx.gradient is None or values is None or values != ctx.expected.values or _graph_is_kept():
        return None
    gradient: list[Tensor]
    gradient, ctx.gradient = ctx.gradient, None
    return gradient


def _compute(ctx: Any, upstream: Tensor, saved: list[Tensor]) -> list[Tensor]:
    """The gradient by level as the forward wrote it, or computed where it did not, or for another upstream gradient."""
    mass, maps, *rest = saved
    levels = len(rest) // 4
    student, teacher, mean, rstd = (rest[i * levels : (i + 1) * levels] for i in range(4))
    assumed = upstream.new_empty(0)
    if _graph_is_kept():  # a later backward must find what the forward left
        gradient = _room(student, teacher, ctx.needs_input_grad[1:], in_teacher=False)
    elif ctx.gradient is not None:
        gradient, assumed, ctx.gradient = ctx.gradient, ctx.expected.gradient, None
    else:
        gradient = _room(student, teacher, ctx.needs_input_grad[1:], ctx.in_teacher)
        if ctx.in_teacher:
            teacher_memory.give_up(teacher)
    inputs = (mass, maps, student, teacher, mean, rstd)
    _op(ctx.backend, "_backward_into")(upstream, assumed, *inputs, *ctx.constants, gradient)
    return gradient


def _rescale(ctx: Any, upstream: Tensor) -> list[Tensor]:
    """The gradient where it replaced the teacher, without which it cannot be computed anew."""
    gradient: list[Tensor]
    if _graph_is_kept():
        gradient = [x.clone() for x in ctx.gradient]
    else:
        gradient, ctx.gradient = ctx.gradient, None
    _op(ctx.backend, "_rescale")(upstream, ctx.expected.gradient, gradient)
    return gradient


def _room(
    student: Sequence[Tensor], teacher: Sequence[Tensor], needed: Sequence[bool], in_teacher: bool
) -> list[Tensor]:
    """Where the gradient of each level goes; empty where none is needed.

    In the teacher's memory its changes are not counted as the teacher's, which stays known as given up.
    """
    wanted = [t.data if in_teacher else s for s, t, needs in zip(student, teacher, needed, strict=True) if needs]
    room = iter(wanted if in_teacher else buffers.empty_like(wanted))
    return [next(room) if needs else s.new_empty(0) for s, needs in zip(student, needed, strict=True)]


def _graph_is_kept() -> bool:
    """Whether this backward is one of ``retain_graph``. Where PyTorch does not say: it may be."""
    keeps = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return keeps is None or bool(keeps())


def _saved_tensors_are_packed() -> bool:
    """Whether what a forward saves is packed away, by activation checkpointing say, which would waste a gradient."""
    hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return hooks is not None and hooks(True) is not None


class _Undifferentiable(torch.autograd.Function):
    """Gradients as they are, tied to the node that they come from, so that a double backward ends here by name."""

    @staticmethod
    def forward(ctx: Any, connection: Tensor, *gradient: Tensor) -> tuple[Tensor, ...]:
        ctx.mark_dirty(*gradient)  # returned as they are, not as views, which could not be changed in place
        return gradient

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(NO_SECOND_DERIVATIVE)
