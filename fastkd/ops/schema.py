"""Schemas, fakes and the autograd rule of the ops of the compiled backends.

A backend's binary only registers an implementation of these schemas, so the ops can be traced even without a binary.
``{backend}`` is ``cpp`` or ``triton``; each backend has its own ops, so that one process can compare them.

====================================  =============================================================================
``distill_{backend}``                 losses, masses (sums of the maps) and maps; functional, with an autograd rule,
                                      for ``torch.compile`` and other tracers
``distill_{backend}_backward``        the student's gradients for ``distill_{backend}``
``distill_{backend}_one_pass``        losses and gradients in one call, for eager autograd (``fastkd.ops.autograd``)
``distill_{backend}_rescale``         multiplies gradients in place by an upstream gradient, if that is not 1
====================================  =============================================================================

An entry of ``prior``, ``mean``, ``rstd`` or ``bias`` is an empty tensor for a level without it, and a list is empty if
no level has an entry. A level has all of ``mean``, ``rstd`` and ``bias`` or none. ``csrc/op.h`` documents the arguments
of ``one_pass``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastkd.ops.reference import accumulator

COMPILED = ("cpp", "triton")
NO_SECOND_DERIVATIVE = (
    "fastkd: the compiled backends have no second derivative; for a double backward use backend='reference'"
)

_LEVELS = "Tensor[] student, Tensor[] teacher, Tensor[] prior, Tensor[] mean, Tensor[] rstd, Tensor[] bias"
_OPTIONS = "int score, int map_norm, float temperature, int penalty, float beta, int divisor"
FORWARD = f"({_LEVELS}, float[] weights, {_OPTIONS}) -> (Tensor losses, Tensor mass, Tensor maps)"
BACKWARD = """(Tensor grad, Tensor mass, Tensor maps, Tensor[] student, Tensor[] teacher, Tensor[] mean, Tensor[] rstd,
    Tensor[] bias, float[] weights, int penalty, float beta, int divisor) -> Tensor[]"""
ONE_PASS = f"""({_LEVELS}, float[] weights, {_OPTIONS}, Tensor mass, Tensor factor, Tensor(a!)[] gradient,
    Tensor(b!)[] bias_gradient) -> (Tensor total, Tensor losses)"""
RESCALE = "(Tensor upstream, Tensor(a!)[] gradient) -> ()"

library = torch.library.Library("fastkd", "DEF")  # type: ignore[no-untyped-call]


def define(name: str, schema: str, fake: Any) -> None:
    """Define an op of the library with its fake."""
    library.define(name + " ".join(schema.split()))  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"fastkd::{name}", fake, lib=library)


def define_small(name: str, schema: str, fake: Any, formula: Any) -> None:
    """Define an op without gradient whose kernels only the extension has; ``formula`` in PyTorch is the fallback."""
    define(name, schema, fake)
    formulas[name] = formula
    library.impl(name, formula, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    library.impl(name, torch.library.fallthrough_kernel, "Autograd")  # type: ignore[no-untyped-call]


formulas: dict[str, Any] = {}


def _forward_fake(student: list[Tensor], teacher: list[Tensor], *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulator(*student, *teacher)
    cells = sum(x.shape[0] * x.shape[2] * x.shape[3] for x in student)
    losses, mass, maps = (student[0].new_empty(n, dtype=dtype) for n in (len(student), len(student), cells))
    return losses, mass, maps


def _backward_fake(grad: Tensor, mass: Tensor, maps: Tensor, student: list[Tensor], *_: Any) -> list[Tensor]:
    return [torch.empty_like(x) for x in student]


def _one_pass_fake(student: list[Tensor], teacher: list[Tensor], *_: Any) -> tuple[Tensor, Tensor]:
    dtype = accumulator(*student, *teacher)
    return student[0].new_empty((), dtype=dtype), student[0].new_empty(len(student), dtype=dtype)


def _rescale_fake(*_: Any) -> None:
    return None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, prior, mean, rstd, bias, weights, _, _, _, penalty, beta, divisor = inputs
    _, mass, maps = output
    lists = (student, teacher, mean, rstd, bias)
    ctx.save_for_backward(mass, maps, *(x for each in lists for x in each))
    ctx.lengths, ctx.priors = [len(each) for each in lists], len(prior)
    ctx.constants = (weights, penalty, beta, divisor)
    ctx.mark_non_differentiable(mass, maps)
    ctx.set_materialize_grads(False)


def bias_gradients(gradient: list[Tensor], bias: list[Tensor]) -> list[Tensor | None]:
    """Return the gradient summed over images and cells, (C,), for each level with a bias; None for the others."""
    return [g.sum((0, 2, 3), dtype=b.dtype) if b.numel() else None for g, b in zip(gradient, bias, strict=False)]


def _no_double_backward(ctx: Any, *grads: Any) -> None:
    raise RuntimeError(NO_SECOND_DERIVATIVE)


def _define_backend(backend: str) -> None:
    name = f"distill_{backend}"
    define(name, FORWARD, _forward_fake)
    define(f"{name}_backward", BACKWARD, _backward_fake)
    define(f"{name}_one_pass", ONE_PASS, _one_pass_fake)
    define(f"{name}_rescale", RESCALE, _rescale_fake)

    def differentiate(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
        mass, maps, *saved = ctx.saved_tensors
        rest = iter(saved)
        student, teacher, mean, rstd, bias = ([next(rest) for _ in range(length)] for length in ctx.lengths)
        none = [[None] * len(each) for each in (teacher, [None] * ctx.priors, mean, rstd)]
        if grad is None:
            return ([None] * len(student), *none, [None] * len(bias), *(None,) * 7)
        op = getattr(torch.ops.fastkd, f"{name}_backward")
        gradient = op(grad, mass, maps, student, teacher, mean, rstd, bias, *ctx.constants)
        return (gradient, *none, bias_gradients(gradient, bias), *(None,) * 7)

    torch.library.register_autograd(f"fastkd::{name}", differentiate, setup_context=_setup_context, lib=library)
    torch.library.register_autograd(f"fastkd::{name}_backward", _no_double_backward, lib=library)


for _backend in COMPILED:
    _define_backend(_backend)
