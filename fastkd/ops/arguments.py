"""Checks of single arguments, whose errors name the argument, what was expected, what came, and the way out."""

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
    """The value as a float.

    Raises:
        ValueError: unless it is a number from ``least`` to ``most``, both included; ``expected`` says it in words.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not least <= value <= most:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")
    return float(value)


def require_positive(name: str, value: float) -> float:
    """The value as a float; ``ValueError`` unless it is a finite number above zero that float32 can hold."""
    return require_number(name, value, "a finite number > 0 that float32 can hold", SMALLEST)


def require_int(name: str, value: int, least: int) -> int:
    """The value as an int; ``ValueError`` unless it is an integer from ``least`` on."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name}: expected an integer >= {least}, got {value!r}")
    if value >= 2**63:
        raise ValueError(f"{name}: expected an integer that 64 bits can hold, got {value!r}")
    return int(value)


def require_bool(name: str, value: Any, *others: str) -> bool:
    """The value; ``TypeError`` unless it is True or False, as text such as "False" would be taken for True.

    What else the argument may be, ``others``, stands in the message.
    """
    of_numpy = getattr(value, "ndim", None) == 0 and str(getattr(value, "dtype", "")) == "bool"
    if not isinstance(value, bool) and not of_numpy:
        known = " or ".join([*("True, False" if others else "True or False",), *map(repr, others)])
        raise TypeError(f"{name}: expected {known}, got {value!r}")
    return bool(value)


def require_sequence(name: str, value: Any, of: str = "tensors", per: str = "level") -> list[Any]:
    """The entries of an argument that has one per level."""
    if isinstance(value, (str, bytes, Tensor)) or not isinstance(value, Sequence):
        hint = "" if value is None else "; wrap it: [x]"
        if isinstance(value, Iterable) and not isinstance(value, (str, Tensor)):
            hint = f"; pass list({name}.values())" if isinstance(value, Mapping) else f"; pass list({name})"
        raise TypeError(f"{name}: expected a list of {of}, one per {per}, got {kind_of(value)}{hint}")
    return list(value)


def require_weights(weights: Any, count: int | None = None) -> tuple[float, ...]:
    """The finite numbers of a list that has one per level: ``count``, where that is known.

    Raises:
        TypeError, ValueError: not a list; another length; a number that is not finite in float32.
    """
    values = require_sequence("weights", weights, "numbers")
    if count is not None and len(values) != count:
        raise ValueError(f"weights: expected {count} entries, one per level, got {len(values)}")
    expected = "a finite number that float32 can hold"
    return tuple(require_number(f"weights[{i}]", x, expected) for i, x in enumerate(values))


def require_dense(name: str, x: Tensor) -> None:
    """Raise ``TypeError`` unless the elements of a tensor are there, and lie in memory by strides."""
    if x.is_nested:
        raise TypeError(f"{name}: expected a dense tensor, got a nested tensor; pad it: x.to_padded_tensor(0)")
    if x.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {x.layout}; convert it: x.to_dense()")
    if x.is_quantized:
        raise TypeError(f"{name}: expected a floating dtype, got a quantised tensor; convert it: x.dequantize()")
    if x.device.type == "meta":
        raise TypeError(f"{name}: expected a tensor with values, got one on the meta device, which has none")


def require_floating(name: str, x: Tensor) -> None:
    """Raise ``TypeError`` unless a tensor is of a dtype that the kernels read."""
    if x.dtype not in FLOATING:
        raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {x.dtype}; convert it: x.float()")


def require_state(name: str, state: Any, *keys: str) -> tuple[Any, ...]:
    """The entries of what a module saved beside its tensors; ``ValueError`` where it is not of this version."""
    if not isinstance(state, dict) or set(state) != set(keys):
        came = sorted(state) if isinstance(state, dict) else kind_of(state)
        raise ValueError(
            f"{name}: expected a state with {', '.join(keys)}, got {came}: another version of fastkd saved it; load it "
            "with that version, or begin anew without it"
        )
    return tuple(state[key] for key in keys)


def kind_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return "one nested tensor" if value.is_nested else f"one tensor of shape {tuple(value.shape)}"
    return "None" if value is None else f"a {type(value).__name__}"
