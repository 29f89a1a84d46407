"""Times contenders in rounds: each round times all of them one after the other, so that a slow moment affects all."""

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
    """A function that is timed, and its times by round.

    Args:
        provider: its name.
        run: the function; its result is freed at once.
        prepare: is called before each round, without timing.
        floor: is called twice before each run, the second time with timing, so that the caches are the same for all
            contenders.
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
        """Run and time one round."""
        self.prepare()
        self.ms.append(milliseconds(self))

    def forget(self) -> None:
        """Drop the times so far."""
        self.ms.clear()
        self.floor_ms.clear()

    def measured(self) -> dict[str, Any]:
        times = {key: [round(x, 4) for x in getattr(self, key)[: len(self.ms)]] for key in ("ms", "floor_ms")}
        return {"provider": self.provider, **times}


def compete(benchmark: Any, contenders: Sequence[Contender], rounds: Callable[[float], int]) -> None:
    """Time all contenders in the same rounds; pytest-benchmark's own numbers are those of the first.

    Args:
        benchmark: pytest-benchmark's fixture.
        contenders: the contenders, warmed up.
        rounds: returns the number of rounds from the milliseconds of one.
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
