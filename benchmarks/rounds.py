"""Contenders beside each other: each round times them all one after the other, so that a slow moment hits all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

Run = Callable[[], object]


def milliseconds(run: Run) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


class Contender:
    """A step and its times by round.

    Args:
        run: what is timed; its result goes at once.
        prepare: what is run before each round, untimed.
        floor: what is timed before each run, after a run of its own, so that all find the caches alike.
    """

    def __init__(self, provider: str, run: Run, *, prepare: Run | None = None, floor: Run | None = None) -> None:
        self.provider, self._run, self._prepare, self._floor = provider, run, prepare, floor
        self.ms: list[float] = []
        self.floor_ms: list[float] = []

    def __call__(self) -> None:
        self._run()

    def prepare(self) -> None:
        if self._prepare is not None:
            self._prepare()
        if self._floor is not None:
            self._floor()
            self.floor_ms.append(milliseconds(self._floor))

    def measure(self) -> None:
        """One round."""
        self.prepare()
        self.ms.append(milliseconds(self))

    def forget(self) -> None:
        """What was measured so far."""
        self.ms.clear()
        self.floor_ms.clear()

    def measured(self) -> dict[str, Any]:
        times = {key: [round(x, 4) for x in getattr(self, key)[: len(self.ms)]] for key in ("ms", "floor_ms")}
        return {"provider": self.provider, **times}


def compete(benchmark: Any, contenders: Sequence[Contender], rounds: Callable[[float], int]) -> None:
    """Time all in the same rounds; pytest-benchmark's own numbers are those of the first.

    Args:
        benchmark: pytest-benchmark's fixture.
        contenders: warmed up.
        rounds: how many, from the milliseconds of one.
    """
    first, *others = contenders

    def setup() -> None:
        for other in others:
            other.measure()
        first.prepare()

    count = rounds(milliseconds(setup) + milliseconds(first))
    for contender in contenders:
        contender.forget()
    benchmark.pedantic(first, setup=setup, rounds=count)
    first.ms = [1e3 * x for x in benchmark.stats.stats.data]
