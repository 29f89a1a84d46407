"""Checks of the levels that a caller passes, with names and indices, before any kernel runs; matching by stride."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from fastkd.info_map import InfoMap
from fastkd.reference import accumulator


@dataclass(frozen=True)
class Levels:
    """Checked arguments of one call, one entry per level; an absent prior, mean or rstd is an empty tensor."""

    student: list[Tensor]
    teacher: list[Tensor]
    prior: list[Tensor]
    mean: list[Tensor]
    rstd: list[Tensor]
    weights: list[float]
    dtype: torch.dtype  # of sums and maps


def check(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    info: InfoMap,
    prior: Sequence[Tensor | None] | None = None,
    standardize: Sequence[tuple[Tensor, Tensor] | None] | None = None,
    weights: Sequence[float] | None = None,
) -> Levels:
    """Check every argument of ``distill_loss`` that comes per level, and bring the small ones to the sums' dtype.

    Raises:
        TypeError, ValueError: as documented at ``fastkd.distill_loss``.
    """
    s, t = require_features("student_feats", student), require_features("teacher_feats", teacher)
    if len(s) != len(t):
        raise ValueError(
            f"student_feats and teacher_feats: expected one entry per level in both, got {len(s)} and {len(t)}; "
            "fastkd.Distiller matches unequal lists by stride"
        )
    for i in range(len(s)):
        _pair(i, s[i], t[i])
    q = _per_level("prior", prior, len(s))
    if info.needs_prior and all(x is None for x in q):
        raise ValueError(f"prior: this info_map weights cells by {info.needs_prior} alone, so it needs one, got None")
    moments = _per_level("standardize", standardize, len(s))
    dtype = accumulator(*s, *t)
    absent = s[0].new_empty(0, dtype=dtype)
    for i in range(len(s)):
        q[i] = absent if q[i] is None else _prior(f"prior[{i}]", q[i], t[i]).to(dtype).contiguous()
        moments[i] = (
            (absent, absent)
            if moments[i] is None
            else tuple(x.to(dtype).contiguous() for x in _moments(f"standardize[{i}]", moments[i], t[i]))
        )
    return Levels(s, t, q, [m[0] for m in moments], [m[1] for m in moments], require_weights(weights, len(s)), dtype)


def require_features(name: str, value: Any) -> list[Tensor]:
    """The feature maps of one model, at least one.

    Raises:
        TypeError, ValueError: as documented at ``fastkd.distill_loss``.
    """
    levels = require_sequence(name, value)
    if not levels:
        raise ValueError(f"{name}: expected at least one level, got an empty list")
    for i, x in enumerate(levels):
        _feature(f"{name}[{i}]", x)
    return levels


def require_sequence(name: str, value: Any, of: str = "tensors") -> list[Any]:
    """The entries of an argument that has one per level."""
    if isinstance(value, (str, Tensor)) or not isinstance(value, Sequence):
        way_out = "" if value is None else "; wrap it: [x]"
        if isinstance(value, Iterable) and not isinstance(value, (str, Tensor)):
            way_out = f"; pass list({name}.values())" if isinstance(value, Mapping) else f"; pass list({name})"
        raise TypeError(f"{name}: expected a list of {of}, one per level, got {_kind(value)}{way_out}")
    return list(value)


def _per_level(name: str, value: Any, count: int, of: str = "tensors") -> list[Any]:
    entries = [None] * count if value is None else require_sequence(name, value, of)
    if len(entries) != count:
        raise ValueError(f"{name}: expected {count} entries, one per level (None where absent), got {len(entries)}")
    return entries


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"one tensor of shape {tuple(value.shape)}"
    return "None" if value is None else f"a {type(value).__name__}"


def _feature(name: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {_kind(x)}")
    if x.ndim != 4:
        raise ValueError(f"{name}: expected 4 dimensions (N, C, H, W), got shape {tuple(x.shape)}")
    _floating(name, x)


def _floating(name: str, x: Tensor) -> None:
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {x.dtype}; convert it: x.float()")


def _pair(i: int, s: Tensor, t: Tensor) -> None:
    _device(f"teacher_feats[{i}]", t, s)
    if t.requires_grad:
        raise ValueError(
            f"teacher_feats[{i}]: expected a frozen teacher, got a tensor that requires grad, and none would flow; "
            "run the teacher under torch.no_grad() or pass t.detach()"
        )
    if s.shape != t.shape:
        shapes = f"level {i}: student_feats {tuple(s.shape)} and teacher_feats {tuple(t.shape)} differ in"
        if s.shape[0] != t.shape[0]:
            raise ValueError(f"{shapes} the batch size; run both models on the same images")
        if s.shape[2:] != t.shape[2:]:
            raise ValueError(
                f"{shapes} height or width; pair levels of equal stride (fastkd.Distiller matches strides)"
            )
        raise ValueError(f"{shapes} channels; fastkd.DistillLoss has 1x1 adapters for that")


def _device(name: str, x: Tensor, student: Tensor) -> None:
    if x.device != student.device:
        raise ValueError(
            f"{name}: expected the student's device {student.device}, got {x.device}; move it: x.to(device)"
        )


def _small(name: str, x: Any, shape: Sequence[int], t: Tensor) -> Tensor:
    """A per-cell or per-channel companion of a level: floating, constant, of this shape and on this device."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor of shape {tuple(shape)}, got {_kind(x)}")
    if x.shape != torch.Size(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(x.shape)}")
    _floating(name, x)
    _device(name, x, t)
    if x.requires_grad:
        raise ValueError(
            f"{name}: expected a constant, got a tensor that requires grad, and none would flow; detach it"
        )
    return x


def _prior(name: str, x: Any, t: Tensor) -> Tensor:
    q = _small(name, x, (t.shape[0], *t.shape[2:]), t)
    # values are looked at on the CPU only: elsewhere it would cost a host sync, in a trace a graph break
    if q.device.type == "cpu" and not torch.compiler.is_compiling() and bool((q < 0).any()):
        raise ValueError(
            f"{name}: expected weights >= 0, got a minimum of {q.min().item():g}; clamp it: q.clamp_min(0)"
        )
    return q


def _moments(name: str, value: Any, t: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(value, Tensor) or not isinstance(value, Sequence) or len(value) != 2:
        raise TypeError(f"{name}: expected a pair (mean, rstd) of vectors, or None, got {_kind(value)}")
    mean, rstd = (_small(f"{name}[{k}]", x, (t.shape[1],), t) for k, x in enumerate(value))
    return mean, rstd


def require_weights(weights: Any, count: int) -> list[float]:
    """One finite number per level, 1 by default."""
    if weights is None:
        return [1.0] * count
    values = _per_level("weights", weights, count, "numbers")
    for i, x in enumerate(values):
        if isinstance(x, bool) or not isinstance(x, Real) or not math.isfinite(x):
            raise ValueError(f"weights[{i}]: expected a finite number, got {x!r}")
    return [float(x) for x in values]


def warn_if_nothing_learns(student: Sequence[Tensor]) -> None:
    """Warn, once a process, where gradients are recorded but no student feature requires one."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling() and not any(x.requires_grad for x in student):
        _warn_nothing_learns()


@cache
def _warn_nothing_learns() -> None:
    warnings.warn(
        "student_feats: none requires grad, so distillation would do nothing; was the student run under no_grad, "
        "frozen or detached? (where only the value is wanted, use torch.no_grad())",
        stacklevel=4,
    )


def match_by_stride(
    student_strides: Sequence[float], teacher_strides: Sequence[float], *, nearest: bool = False
) -> list[tuple[int, int]]:
    """Pair levels of equal stride.

    Args:
        student_strides, teacher_strides: image height over feature height of each level, each list without repeats.
        nearest: pair each of the student's with the teacher's nearest instead, if they are that of each other and
            less than a factor of sqrt(2) apart.

    Returns:
        (student index, teacher index) of every stride that both have, in the student's order.

    Raises:
        ValueError: a stride stands twice in one list, or the two have none in common.
    """
    for name, strides in (("student", student_strides), ("teacher", teacher_strides)):
        if len(set(strides)) != len(strides):
            raise ValueError(f"{name} levels: expected one level a stride to match by, got strides {list(strides)}")
    near = [
        (i, j)
        for i, s in enumerate(student_strides)
        for j, t in enumerate(teacher_strides)
        if _ratio(s, t) < math.sqrt(2)
        and _ratio(s, t) == min(_ratio(s, other) for other in teacher_strides)
        and _ratio(s, t) == min(_ratio(other, t) for other in student_strides)
    ]
    pairs = near if nearest else [(i, j) for i, j in near if student_strides[i] == teacher_strides[j]]
    if not pairs:
        way_out = '; some are near: align="interpolate" pairs and resizes these' if near else ""
        raise ValueError(
            f"levels: expected a stride that student and teacher share, got {_listed(student_strides)} "
            f"and {_listed(teacher_strides)}{way_out}"
        )
    return pairs


def _ratio(a: float, b: float) -> float:
    return max(a, b) / min(a, b)


def _listed(strides: Sequence[float]) -> str:
    return f"[{', '.join(f'{stride:g}' for stride in strides)}]"
