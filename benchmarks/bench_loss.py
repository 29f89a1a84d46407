"""The loss by itself, forward and backward: every provider beside the floor, by pytest-benchmark.

    python -m pytest benchmarks/bench_loss.py --benchmark-json=loss.json

Before each round the rivals are timed on the same features, and the floor (one read of student and teacher, one write
of the gradient, by ``torch.add``), so that a slow moment of the machine hits all: ``extra_info`` has their times, the
case, and the peak of memory in a step.
"""

from __future__ import annotations

import gc
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
RIVALS = ("eager", "torch.compile", "fastkd, two passes")  # what each provider is compared with, round by round


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


SWEEP = Case("sweep", "", workload="", levels=((256, 52),))  # 11 MiB, the base from which one size at a time changes


def sweeps() -> Iterator[Case]:
    for provider in ("fastkd", "fastkd, in place", "eager"):
        of = replace(SWEEP, provider=provider)
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
        mode = "max-autotune-no-cudagraphs" if "max-autotune" in case.provider else None
        return torch.compile(_eager, dynamic=False, fullgraph=True, mode=mode)
    for peer in PEERS:
        if case.provider == peer.name:
            return peer(teacher)
        if case.provider == f"fastkd, as {peer.name}":
            return peer(teacher).ours
    return _eager


def milliseconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


class Step:
    """What is timed: a provider on features of its own."""

    def __init__(self, case: Case) -> None:
        shapes = [(case.batch, c, h, h) for c, h in (case.levels or WORKLOADS[case.workload])]
        self.student, self.kept = random_features(shapes, getattr(torch, case.dtype), case.layout == "channels_last")
        self.loss, self.forward_only = provider(case, self.kept), case.mode == "forward"
        self.teacher = [t.clone() for t in self.kept] if "in place" in case.provider else self.kept
        self.floor = floor(self.student, self.teacher)

    def prepare(self) -> None:
        """The teacher's features filled anew where a step overwrites them, and all as warm as the caches hold them."""
        for t, kept in zip(self.teacher, self.kept, strict=True):
            if t is not kept:
                t.copy_(kept)
        self.floor()

    def __call__(self) -> object:
        if self.forward_only:
            with torch.no_grad():
                return self.loss(self.student, self.teacher)
        return torch.autograd.grad(self.loss(self.student, self.teacher), self.student)


def rivals(case: Case) -> dict[str, Step]:
    """Who is timed in the same rounds: others; in a sweep, the same provider at the sweep's base."""
    if case.group.startswith("sweep"):
        return {"base": Step(replace(SWEEP, provider=case.provider))}
    return {x: Step(replace(case, provider=x)) for x in RIVALS if x != case.provider}


def check(case: Case, step: Step) -> None:
    """A provider of one of our formulas must give its number, as in float64; others have formulas of their own."""
    s, t = ([x.detach().double() for x in features] for features in (step.student, step.teacher))
    expected = _eager(s, t)
    for peer in PEERS:
        if peer.name in case.provider:
            if not peer.same_as_ours:
                return
            expected = peer(t).ours(s, t, backend="reference")
    with torch.no_grad():
        torch.testing.assert_close(step.loss(step.student, step.teacher).double(), expected, rtol=1e-5, atol=0)


def peak_bytes(step: Step) -> int | None:
    """The most memory that the process had during a step, beyond what it had before; None where Linux does not say."""

    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))

    try:
        step.prepare()
        gc.collect()
        buffers._free.clear()
        CDLL("libc.so.6").malloc_trim(0)  # what PyTorch freed is not kept for later
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins now
        before = status("VmRSS")
        kept = step()
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
    torch._dynamo.reset()  # else the ninth shape would run uncompiled
    step, others = Step(case), rivals(case)
    check(case, step)
    floors: list[float] = []
    of_others: dict[str, list[float]] = {name: [] for name in others}

    def setup() -> None:
        for name, other in others.items():
            other.prepare()
            of_others[name].append(milliseconds(other))
        step.prepare()
        floors.append(milliseconds(step.floor))

    for _ in range(2):  # the first compiles
        round_ms = milliseconds(setup) + milliseconds(step)
    peak = peak_bytes(step)
    for times in (floors, *of_others.values()):
        times.clear()
    benchmark.pedantic(step, setup=setup, rounds=round(min(max(1e3 * SECONDS / round_ms, 10), 60)))
    benchmark.extra_info.update(
        **asdict(case),
        title=str(case),
        elements=sum(s.numel() for s in step.student),
        threads_used=torch.get_num_threads(),
        floor_ms=[round(x, 4) for x in floors],
        rivals_ms={name: [round(x, 4) for x in times] for name, times in of_others.items()},
        peak_bytes=peak,
    )
