"""Checks of single arguments; each error names the argument, the expected and the actual value, and the remedy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

SMALLEST, LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def require_known(name: str, value: object, known: Sequence[str | None]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``known``; the message lists them."""
    if not isinstance(value, (str, type(None))) or value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, known))}; got {value!r}")


def require_number(name: str, value: float, expected: str, least: float = -LARGEST, most: float = LARGEST) -> float:
    """Return the value as a float.

    Raises:
        ValueError: not a number in [least, most]; ``expected`` describes the range in words.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not least <= value <= most:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")
    return float(value)


def require_positive(name: str, value: float) -> float:
    """Return the value as a float; raise ``ValueError`` unless it is finite and above zero in float32."""
    return require_number(name, value, "a finite number > 0 that float32 can hold", SMALLEST)


def require_int(name: str, value: int, least: int) -> int:
    """Return the value as an int; raise ``ValueError`` unless it is an integer >= ``least`` that 64 bits can hold."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name}: expected an integer >= {least}, got {value!r}")
    if value >= 2**63:
        raise ValueError(f"{name}: expected an integer that 64 bits can hold, got {value!r}")
    return int(value)


def require_bool(name: str, value: Any, *others: str) -> bool:
    """Return the value as a bool; raise ``TypeError`` unless it is True or False: the text "False" would be true.

    Args:
        name, value: the argument.
        others: other values that the argument may have, for the message.
    """
    of_numpy = getattr(value, "ndim", None) == 0 and str(getattr(value, "dtype", "")) == "bool"
    if not isinstance(value, bool) and not of_numpy:
        known = " or ".join([*("True, False" if others else "True or False",), *map(repr, others)])
        raise TypeError(f"{name}: expected {known}, got {value!r}")
    return bool(value)


def require_sequence(name: str, value: Any, of: str = "tensors", per: str = "level") -> list[Any]:
    """Return the entries of an argument with one entry per level as a list; raise ``TypeError`` for other types."""
    if isinstance(value, (str, bytes, Tensor)) or not isinstance(value, Sequence):
        hint = "" if value is None else "; wrap it: [x]"
        if isinstance(value, Iterable) and not isinstance(value, (str, Tensor)):
            hint = f"; pass list({name}.values())" if isinstance(value, Mapping) else f"; pass list({name})"
        raise TypeError(f"{name}: expected a list of {of}, one per {per}, got {kind_of(value)}{hint}")
    return list(value)


def require_weights(weights: Any, count: int | None = None) -> tuple[float, ...]:
    """Return a list with one finite number per level as a tuple.

    Args:
        weights: the list.
        count: its expected length; None where it is not known.

    Raises:
        TypeError: not a list.
        ValueError: another length; a number that is not finite in float32.
    """
    values = require_sequence("weights", weights, "numbers")
    if count is not None and len(values) != count:
        raise ValueError(f"weights: expected {count} entries, one per level, got {len(values)}")
    expected = "a finite number that float32 can hold"
    return tuple(require_number(f"weights[{i}]", x, expected) for i, x in enumerate(values))


def require_dense(name: str, x: Tensor) -> None:
    """Raise ``TypeError`` unless a tensor is strided and has values: not nested, sparse, quantised or on meta."""
    if x.is_nested:
        raise TypeError(f"{name}: expected a dense tensor, got a nested tensor; pad it: x.to_padded_tensor(0)")
    if x.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {x.layout}; convert it: x.to_dense()")
    if x.is_quantized:
        raise TypeError(f"{name}: expected a floating dtype, got a quantised tensor; convert it: x.dequantize()")
    if x.device.type == "meta":
        raise TypeError(f"{name}: expected a tensor with values, got one on the meta device, which has none")


def require_floating(name: str, x: Tensor) -> None:
    """Raise ``TypeError`` unless a tensor has a dtype that the kernels read."""
    if x.dtype not in FLOATING:
        raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {x.dtype}; convert it: x.float()")


def require_state(name: str, state: Any, *keys: str) -> tuple[Any, ...]:
    """Return the entries of a module's extra state; raise ``ValueError`` where another version saved it."""
    if not isinstance(state, dict) or set(state) != set(keys):
        got = sorted(state) if isinstance(state, dict) else kind_of(state)
        raise ValueError(
            f"{name}: expected a state with {', '.join(keys)}, got {got}: another version of fastkd saved it; load it "
            "with that version, or start again without it"
        )
    return tuple(state[key] for key in keys)


def kind_of(value: Any) -> str:
    """Return a short description of a value's type, for messages."""
    if isinstance(value, Tensor):
        return "one nested tensor" if value.is_nested else f"one tensor of shape {tuple(value.shape)}"
    return "None" if value is None else f"a {type(value).__name__}"
