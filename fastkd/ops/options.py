"""The options of a call, as one frozen and validated object; csrc/level.h has the same ``Options``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from fastkd.ops.arguments import require_known, require_positive, require_weights
from fastkd.ops.backends import require_backend
from fastkd.ops.presets import CHANNELS, CWD, DIVISORS, MAP_NORMS, PENALTIES, SCORES, InfoMap, resolve

REDUCTIONS = ("sum", "none")


@dataclass(frozen=True, eq=False)  # compared by identity, which is what cached plans are found by
class LossOptions:
    """All arguments of ``fastkd.distill_loss`` except the tensors."""

    info_map: InfoMap
    weights: tuple[float, ...] | None  # one per level
    penalty: str
    beta: float
    divisor: str
    reduction: str
    backend: str | None

    @property
    def codes(self) -> tuple[int, int, float, int, float, int]:
        """Score, map norm, temperature, penalty, beta and divisor, as the ops take them."""
        info = self.info_map
        codes = (0, 0) if self.penalty == CWD else (PENALTIES.index(self.penalty), DIVISORS.index(self.divisor))
        return (
            *(SCORES.index(info.score), MAP_NORMS.index(info.map_norm), info.temperature),
            *(codes[0], self.beta, codes[1]),
        )


def make_options(
    info_map: str | InfoMap,
    weights: Sequence[float] | None,
    penalty: str,
    beta: float,
    divisor: str | None,
    reduction: str,
    backend: str | None,
) -> LossOptions:
    """Return the validated options of ``fastkd.distill_loss``.

    Raises:
        ValueError, TypeError: as documented there.
    """
    info = resolve(info_map)
    require_known("penalty", penalty, (*PENALTIES, CWD))
    require_known("divisor", divisor, (None, *DIVISORS))
    require_known("reduction", reduction, REDUCTIONS)
    if backend is not None:
        require_backend(backend)
    if penalty == CWD:
        for name, value, only in (("divisor", divisor, None), ("backend", backend, "reference")):
            if value not in (None, only):
                raise ValueError(f"{name}: expected None with penalty='cwd', which has its own {name}, got {value!r}")
        divisor, backend = CHANNELS, "reference"
    divisor = info.divisor if divisor is None else divisor
    numbers = None if weights is None else require_weights(weights)
    return LossOptions(info, numbers, penalty, require_positive("beta", beta), divisor, reduction, backend)


_cached_options = lru_cache(maxsize=256, typed=True)(make_options)


def options_of_call(*arguments: Any) -> LossOptions:
    """Return ``make_options(*arguments)`` from a cache, as most calls of ``distill_loss`` repeat their options."""
    if torch.compiler.is_compiling():
        return make_options(*arguments)
    info_map, weights, *rest = arguments
    numbers = None if weights is None else require_weights(weights)
    try:
        return _cached_options(info_map, numbers, *rest)
    except TypeError:  # an argument that cannot be hashed is invalid, and this raises an error that names it
        return make_options(*arguments)
