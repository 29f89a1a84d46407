"""Time and memory of one step of the loss, forward and backward, all providers in one run, interleaved.

    python benchmarks/report.py --workload same6 --batch 4 --dtype float32

Prints a Markdown table: median and quartiles of the time in ms, its ratio to ours and to the floor (one read of student
and teacher, one write of the gradient), and the bytes that forward and backward allocate, by the PyTorch profiler.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from workloads import WORKLOADS, Loss, features, floor, providers


def times(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each run, taken in turns, so that a noisy moment hits all."""
    measured: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 3):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if repeat >= 3:  # warm-up
                measured[name].append(1e3 * (time.perf_counter() - start))
    return measured


def allocated(run: Callable[[], object]) -> int:
    """Bytes that one call allocates."""
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    return sum(
        e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]" and e.nbytes() > 0
    )


def memory(loss: Loss, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> tuple[int, int]:
    """Bytes allocated by the forward and by the backward."""
    kept: list[Tensor] = []
    forward = allocated(lambda: kept.append(loss(student, teacher)))
    return forward, allocated(lambda: torch.autograd.grad(kept[0], student))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=WORKLOADS, default="same6")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--repeats", type=int, default=30)
    options = parser.parse_args()
    student, teacher = features(
        options.workload, options.batch, getattr(torch, options.dtype), options.channels_last
    )  # fmt: skip
    losses = providers()
    runs: dict[str, Callable[[], object]] = {
        name: lambda loss=loss: torch.autograd.grad(loss(student, teacher), student) for name, loss in losses.items()
    }
    runs["floor"] = floor(student, teacher)
    measured = times(runs, options.repeats)
    median = {name: statistics.median(x) for name, x in measured.items()}
    ours = next(iter(median))
    layout = "channels_last" if options.channels_last else "contiguous"
    print(f"{options.workload}, N = {options.batch}, {options.dtype}, {layout}; torch {torch.__version__}, "
          f"{torch.get_num_threads()} threads, {platform.processor() or platform.machine()}\n")  # fmt: skip
    print("| provider | forward + backward, ms (quartiles) | times ours | times floor | forward allocates | backward |")
    print("|---|---|---|---|---|---|")
    for name, x in measured.items():
        low, _, high = statistics.quantiles(x, n=4)
        sizes = (
            ["", ""] if name == "floor" else [f"{b / 2**20:.1f} MiB" for b in memory(losses[name], student, teacher)]
        )
        print(f"| {name} | {median[name]:.2f} ({low:.2f} to {high:.2f}) | {median[name] / median[ours]:.2f} "
              f"| {median[name] / median['floor']:.2f} | {sizes[0]} | {sizes[1]} |")  # fmt: skip


if __name__ == "__main__":
    main()
