"""The loss by itself, forward and backward: every provider beside the floor, by pytest-benchmark.

    python -m pytest benchmarks/bench_loss.py --benchmark-json=loss.json

Before each round the floor is timed (one read of student and teacher, one write of the gradient, by ``torch.add``), so
that a noisy moment hits both: ``extra_info`` has its times, the case, and the peak of memory in a step.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from ctypes import CDLL
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peers import PEERS
from torch import Tensor
from workloads import WORKLOADS, Loss, floor, random_features

import fastkd
from fastkd import buffers

SECONDS = 1.5  # of rounds a case
OURS = ("fastkd", "fastkd, in place", "fastkd, two passes")


@dataclass(frozen=True)
class Case:
    """What one benchmark times."""

    group: str  # of the report
    provider: str
    workload: str = "same6"
    batch: int = 4
    mode: str = "step"  # forward and backward; or "forward"
    dtype: str = "float32"
    layout: str = "contiguous"
    threads: int = 0  # 0: as many as PyTorch takes
    levels: tuple[tuple[int, int], ...] = ()  # of a sweep: (channels, height)

    def __str__(self) -> str:
        sizes = "x".join(f"{c}@{h}" for c, h in self.levels[:1]) + (f"x{len(self.levels)}" if self.levels else "")
        parts = (self.group, self.provider, self.workload or sizes, f"N{self.batch}", self.mode, self.dtype)
        return "-".join((*parts, self.layout, f"{self.threads}t")).replace(" ", "_")


def sweeps() -> Iterator[Case]:
    """One size at a time doubled, from a base that does not fit the caches."""
    base = Case("sweep", "", workload="", levels=((256, 52),))
    for provider in ("fastkd", "fastkd, in place", "eager"):
        of = replace(base, provider=provider)
        yield from (replace(of, group="sweep N", batch=n) for n in (1, 2, 4, 8, 16))
        yield from (replace(of, group="sweep HW", levels=((256, h),)) for h in (26, 37, 52, 74, 104))
        yield from (replace(of, group="sweep C", levels=((c, 52),)) for c in (64, 128, 256, 512, 1024))
        yield from (replace(of, group="sweep levels", levels=((256, 26),) * n) for n in (2, 4, 8, 16))


def cases() -> Iterator[Case]:
    everyone = (*OURS, "eager", "torch.compile")
    for batch in (1, 4, 16):
        for provider in everyone:
            yield Case("batch", provider, batch=batch)
    yield Case("batch", "torch.compile max-autotune")
    for provider in ("fastkd", "eager", "torch.compile"):
        yield Case("forward", provider, mode="forward")
    for dtype, layout in (("bfloat16", "contiguous"), ("float32", "channels_last"), ("bfloat16", "channels_last")):
        for provider in everyone:
            yield Case("dtype and layout", provider, dtype=dtype, layout=layout)
    for workload, batch in (("tiny5", 4), ("large6", 4)):
        for provider in everyone:
            yield Case("workload", provider, workload=workload, batch=batch)
    for provider in everyone:
        yield Case("threads", provider, threads=1)
    for peer in PEERS:
        yield Case("peers", peer.name)
        if peer.same_as_ours:
            yield Case("peers", f"fastkd, as {peer.name}")
    yield from sweeps()


def _eager(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    return fastkd.distill_loss(student, teacher, backend="reference")


def provider(case: Case, teacher: Sequence[Tensor]) -> Loss:
    options: dict[str, Any] = {
        "fastkd": {},
        "fastkd, in place": {"reuse_teacher_memory": True},
        "fastkd, two passes": {"one_pass": False},
    }
    if case.provider in options:
        return lambda s, t: fastkd.distill_loss(s, t, **options[case.provider])
    if case.provider.startswith("torch.compile"):
        torch._dynamo.reset()  # else the ninth shape would run uncompiled
        mode = "max-autotune-no-cudagraphs" if "max-autotune" in case.provider else None
        return torch.compile(_eager, dynamic=False, fullgraph=True, mode=mode)
    for peer in PEERS:
        if case.provider == peer.name:
            return peer(teacher)
        if case.provider == f"fastkd, as {peer.name}":
            return peer(teacher).ours
    return _eager


def expected_loss(case: Case, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor | None:
    """What a provider of one of our formulas must return, in float64; None where it has a formula of its own."""
    s, t = ([x.detach().double() for x in features] for features in (student, teacher))
    for peer in PEERS:
        if peer.name in case.provider:
            return peer(teacher).ours(s, t, backend="reference") if peer.same_as_ours else None
    return _eager(s, t)


def milliseconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def peak_bytes(run: Callable[[], object], prepare: Callable[[], object]) -> int | None:
    """The most memory that the process had during a call, beyond what it had before; None where Linux does not say."""

    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))

    try:
        prepare()
        gc.collect()
        buffers._free.clear()
        CDLL("libc.so.6").malloc_trim(0)  # what PyTorch freed is not kept for later
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins now
        before = status("VmRSS")
        kept = run()
        del kept
        return max(status("VmHWM") - before, 0)
    except OSError:
        return None


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.node.callspec.params["case"].threads or before)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_loss(case: Case, benchmark: Any) -> None:
    shapes = [(case.batch, c, h, h) for c, h in (case.levels or WORKLOADS[case.workload])]
    student, teacher = random_features(shapes, getattr(torch, case.dtype), case.layout == "channels_last")
    loss = provider(case, teacher)
    in_place = [torch.empty_like(t) for t in teacher] if "in place" in case.provider else None
    used = in_place or teacher

    def prepare() -> None:
        for mine, t in zip(in_place or (), teacher, strict=False):
            mine.copy_(t)

    def run() -> object:
        if case.mode == "forward":
            with torch.no_grad():
                return loss(student, used)
        return torch.autograd.grad(loss(student, used), student)

    prepare()
    expected = expected_loss(case, student, teacher)
    if expected is not None:
        torch.testing.assert_close(loss(student, used).double(), expected, rtol=1e-5, atol=0)
    lower_bound, floors = floor(student, used), []

    def setup() -> None:
        prepare()
        lower_bound()  # whatever the last round left in the caches, the features are as warm as they get
        floors.append(round(milliseconds(lower_bound), 4))

    for _ in range(3):
        setup()
        estimate = milliseconds(run)
    peak = peak_bytes(run, prepare)
    setup()
    run()
    floors.clear()
    rounds = round(min(max(1e3 * SECONDS / (estimate + 1), 10), 60))
    benchmark.pedantic(run, setup=setup, rounds=rounds)
    times = [1e3 * x for x in benchmark.stats.stats.data]
    benchmark.extra_info.update(
        **asdict(case),
        title=str(case),
        elements=sum(s.numel() for s in student),
        threads_used=torch.get_num_threads(),
        floor_ms=floors,
        over_floor=statistics.median(t / f for t, f in zip(times, floors, strict=True)),
        peak_bytes=peak,
    )
