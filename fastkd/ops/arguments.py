"""Checks of single arguments, whose errors name the argument, what was expected, what came, and the way out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

SMALLEST = torch.finfo(torch.float32).tiny


def require_known(name: str, value: object, known: Sequence[str]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``known``; the message lists them."""
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, known))}; got {value!r}")


def require_positive(name: str, value: float) -> None:
    """Raise ``ValueError`` unless ``value`` is a finite number above zero that float32 can hold."""
    if isinstance(value, bool) or not isinstance(value, Real) or not SMALLEST <= value < float("inf"):
        raise ValueError(f"{name}: expected a finite number > 0 that float32 can hold, got {value!r}")


def require_sequence(name: str, value: Any, of: str = "tensors") -> list[Any]:
    """The entries of an argument that has one per level."""
    if isinstance(value, (str, Tensor)) or not isinstance(value, Sequence):
        hint = "" if value is None else "; wrap it: [x]"
        if isinstance(value, Iterable) and not isinstance(value, (str, Tensor)):
            hint = f"; pass list({name}.values())" if isinstance(value, Mapping) else f"; pass list({name})"
        raise TypeError(f"{name}: expected a list of {of}, one per level, got {kind_of(value)}{hint}")
    return list(value)


def require_weights(weights: Any, count: int | None = None) -> tuple[float, ...]:
    """The finite numbers of a list that has one per level: ``count``, where that is known.

    Raises:
        TypeError, ValueError: not a list; another length; a number that is not finite in float32.
    """
    values = require_sequence("weights", weights, "numbers")
    if count is not None and len(values) != count:
        raise ValueError(f"weights: expected {count} entries, one per level, got {len(values)}")
    for i, x in enumerate(values):
        if isinstance(x, bool) or not isinstance(x, Real) or not abs(float(x)) <= torch.finfo(torch.float32).max:
            raise ValueError(f"weights[{i}]: expected a finite number that float32 can hold, got {x!r}")
    return tuple(float(x) for x in values)


def kind_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"one tensor of shape {tuple(value.shape)}"
    return "None" if value is None else f"a {type(value).__name__}"
