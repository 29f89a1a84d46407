"""Schemas, fakes and the autograd rule of the compiled backends' ops, written once.

A backend's binary only registers an implementation below these schemas, so the ops exist, and trace, before any binary
does. ``{backend}`` is ``cpp`` or ``triton``; each is its own op, so that all can be compared in one process.

====================================  =============================================================================
``distill_{backend}``                 the two passes that ``torch.compile`` and other tracers see: losses, masses
                                      and maps; functional, with an autograd rule
``distill_{backend}_backward``        its backward: the student's gradients
``distill_{backend}_one_pass``        loss and gradients in one call, for eager autograd (``fastkd.ops.autograd``)
``distill_{backend}_rescale``         multiplies gradients by an upstream gradient that is not 1
====================================  =============================================================================

Entries of ``prior``, ``mean``, ``rstd`` and ``bias`` are empty tensors where a level has none, and the lists are empty
where no level has any; of a level, ``mean``, ``rstd`` and ``bias`` are all there or all empty. ``csrc/op.h`` says what
each argument of ``one_pass`` is.
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
    """Define an op without gradient that has kernels in the extension alone, and ``formula`` in PyTorch elsewhere."""
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
    """The gradient summed over images and cells, (C,), of each level that has a bias."""
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
