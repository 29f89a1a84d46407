"""Times one step of the loss on a GPU: every workload, batch, dtype and layout, all providers beside each other.

    python benchmarks/gpu_timing.py --out times.json --seconds 240

Forward and backward are timed by CUDA events, each repeat after a flush of the L2 cache and behind a sleep of the
device, so that it never waits for a launch; the whole call also by the wall clock, launches included, and ours in a
CUDA graph. ``bytes`` is what two passes must move: the forward reads student and teacher, the backward reads them again
and writes the gradient. Cases for which the seconds do not suffice are left out.
``--compile`` only fills the cache of torch.compile, so that many processes can do so at once.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from workloads import WORKLOADS, Loss, features, providers

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
REPEATS = 25
SLEEP_CYCLES = 12_000_000  # about 6 ms, longer than any provider takes to launch a step


def cases(workload: str | None = None) -> Iterator[tuple[str, int, str, bool]]:
    """(workload, batch, dtype, channels_last), those with a target first."""
    every = list(itertools.product(WORKLOADS, (64, 16, 1), DTYPES, (True, False)))
    targets = [("large6", 64, "bfloat16", True), ("same6", 16, "bfloat16", True)]
    for case in [*targets, *(x for x in every if x not in targets)]:
        if workload in (None, case[0]):
            yield case


def copy_bandwidth() -> float:
    """Bytes a second that a copy on the device reads and writes; the median of copies of 1 GiB."""
    source = torch.empty(2**28, device="cuda")
    target = torch.empty_like(source)
    ms = [_events(lambda: target.copy_(source))[0] for _ in range(REPEATS)]
    return 2 * source.numel() * source.element_size() / (statistics.median(ms) / 1e3)


def _events(*runs: Callable[[], object]) -> list[float]:
    """Milliseconds of the device for each of the runs, one after the other."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(runs) + 1)]
    torch.cuda._sleep(SLEEP_CYCLES)
    marks[0].record()
    for run, mark in zip(runs, marks[1:], strict=True):
        run()
        mark.record()
    if marks[0].query():
        raise RuntimeError("the device woke before all was launched, so launches would be timed; raise SLEEP_CYCLES")
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]


def _spread(values: Sequence[float]) -> list[float]:
    """Quartiles."""
    return [round(x, 5) for x in statistics.quantiles(values, n=4)]


def step(loss: Loss, student: list[Tensor], teacher: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss(student, teacher), student)


def on_device(loss: Loss, student: list[Tensor], teacher: list[Tensor], flush: Tensor) -> dict[str, list[float]]:
    forward, backward = [], []
    kept: list[Tensor] = []
    for _ in range(REPEATS):
        kept.clear()
        flush.zero_()
        a, b = _events(
            lambda: kept.append(loss(student, teacher)), lambda: torch.autograd.grad(kept[0], student)
        )  # fmt: skip
        forward.append(a)
        backward.append(b)
    both = [a + b for a, b in zip(forward, backward, strict=True)]
    return {"forward_ms": _spread(forward), "backward_ms": _spread(backward), "both_ms": _spread(both)}


def by_the_wall_clock(loss: Loss, student: list[Tensor], teacher: list[Tensor]) -> list[float]:
    measured = []
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step(loss, student, teacher)
        torch.cuda.synchronize()
        measured.append(1e3 * (time.perf_counter() - start))
    return _spread(measured)


def in_a_graph(loss: Loss, student: list[Tensor], teacher: list[Tensor], flush: Tensor) -> list[float]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gradients = step(loss, student, teacher)  # noqa: F841  kept while the graph writes them
    measured = []
    for _ in range(REPEATS):
        flush.zero_()
        measured.append(_events(graph.replay)[0])
    return _spread(measured)


def time_provider(name: str, loss: Loss, student: list[Tensor], teacher: list[Tensor], flush: Tensor) -> dict[str, Any]:
    for _ in range(3):  # warm-up, compilation
        step(loss, student, teacher)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    step(loss, student, teacher)
    peak = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
    times = on_device(loss, student, teacher, flush)
    times["wall_ms"] = by_the_wall_clock(loss, student, teacher)
    if name.startswith("fastkd"):
        times["graph_ms"] = in_a_graph(loss, student, teacher, flush)
    return {"provider": name, **times, "peak_bytes": peak}


def time_case(workload: str, n: int, dtype: str, channels_last: bool, flush: Tensor) -> list[dict[str, Any]]:
    """One entry per provider."""
    torch._dynamo.reset()  # each case compiled for its own shapes
    student, teacher = features(workload, n, DTYPES[dtype], channels_last, device="cuda")
    unit = sum(s.numel() * s.element_size() for s in student)
    layout = "channels_last" if channels_last else "NCHW"
    case = {"workload": workload, "n": n, "dtype": dtype, "layout": layout, "bytes": 5 * unit}
    found = []
    for name, loss in providers("cuda").items():
        try:
            found.append({**case, **time_provider(name, loss, student, teacher, flush)})
        except Exception as error:  # one that fails must not cost the others' times
            found.append({**case, "provider": name, "error": f"{type(error).__name__}: {error}".splitlines()[0]})
    return found


def compile_only(workload: str) -> None:
    for name, n, dtype, channels_last in cases(workload):
        torch._dynamo.reset()
        step(providers("cuda")["torch.compile"], *features(name, n, DTYPES[dtype], channels_last, device="cuda"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu_timing.json"))
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--compile", choices=WORKLOADS, help="only compile this workload's cases")
    options = parser.parse_args()
    if options.compile:
        return compile_only(options.compile)
    end = time.monotonic() + options.seconds
    found: dict[str, Any] = {"copy_bytes_per_second": copy_bandwidth(), "times": []}
    flush = torch.empty(2**26, device="cuda")  # 256 MiB, more than any L2
    left, slowest = list(cases()), 0.0
    options.out.write_text(json.dumps({**found, "left_out": left}))
    while left and time.monotonic() + 1.5 * slowest < end:
        start = time.monotonic()
        found["times"] += time_case(*left.pop(0), flush)
        slowest = max(slowest, time.monotonic() - start)
        options.out.write_text(json.dumps({**found, "left_out": left}))  # stays, should a later case not end


if __name__ == "__main__":
    main()
