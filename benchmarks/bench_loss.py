"""The loss by itself, forward and backward: providers beside each other and the floor, by pytest-benchmark.

    python -m pytest benchmarks/bench_loss.py --benchmark-json=loss.json

One benchmark is one case: several providers, or one on several sizes. Each round times them all one after the other,
each after the floor (one read of student and teacher, one write of the gradient, by ``torch.add``), so that a slow
moment of the machine hits all alike; pytest-benchmark's own numbers are those of the first. ``extra_info`` has the
case, and of each step the times by round, the page faults and the peak of memory.
"""

from __future__ import annotations

import gc
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from ctypes import CDLL
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peers import PEERS
from torch import Tensor
from workloads import WORKLOADS, Loss, floor, random_features

import fastkd
from fastkd import buffers

SECONDS = 4.0  # of rounds a case
OURS = ("fastkd", "fastkd, in place", "fastkd, two passes")
EVERYONE = (*OURS, "eager", "torch.compile")
Size = tuple[int, tuple[tuple[int, int], ...]]  # batch and, by level, (channels, height)


@dataclass(frozen=True)
class Case:
    """What one benchmark times."""

    group: str  # of the report
    providers: tuple[str, ...] = EVERYONE
    workload: str = "same6"
    batch: int = 4
    mode: str = "step"  # forward and backward; or "forward"
    dtype: str = "float32"
    layout: str = "contiguous"
    threads: int = 0  # 0: as many as PyTorch takes
    sweep: tuple[Size, ...] = ()  # sizes in place of workload and batch
    turn: int = 1  # of several, minutes apart, that the report takes together: one bad minute must not decide

    def __str__(self) -> str:
        sizes = f"{self.workload}-N{self.batch}" if self.workload else self.providers[0]
        parts = (self.group, sizes, self.mode, self.dtype, self.layout, f"{self.threads}t", f"turn{self.turn}")
        return "-".join(parts).replace(" ", "_")

    @property
    def sizes(self) -> tuple[Size, ...]:
        return self.sweep or ((self.batch, tuple(WORKLOADS[self.workload])),)


def sweeps() -> Iterator[Case]:
    """One size at a time, around a batch of 4 of one level that is 11 MiB in all."""
    for provider in ("fastkd", "fastkd, in place", "eager"):
        of = Case("", (provider,), workload="")
        yield replace(of, group="sweep N", sweep=tuple((n, ((256, 52),)) for n in (1, 2, 4, 8, 16)))
        yield replace(of, group="sweep HW", sweep=tuple((4, ((256, h),)) for h in (26, 37, 52, 74, 104)))
        yield replace(of, group="sweep C", sweep=tuple((4, ((c, 52),)) for c in (64, 128, 256, 512, 1024)))
        yield replace(of, group="sweep levels", sweep=tuple((4, ((256, 26),) * n) for n in (1, 2, 4, 8, 16)))


def batches(turn: int) -> Iterator[Case]:
    for batch in (1, 4, 16):
        autotuned = ("torch.compile max-autotune",) if batch == 4 else ()
        yield Case("batch", (*EVERYONE, *autotuned), batch=batch, turn=turn)


def cases() -> Iterator[Case]:
    yield from batches(turn=1)
    yield Case("forward", ("fastkd", "eager", "torch.compile"), mode="forward")
    for dtype, layout in (("bfloat16", "contiguous"), ("float32", "channels_last"), ("bfloat16", "channels_last")):
        yield Case("dtype and layout", dtype=dtype, layout=layout)
    for workload in ("tiny5", "large6"):
        yield Case("workload", workload=workload)
    yield Case("threads", threads=1)
    ours = tuple(f"fastkd, as {peer.name}" for peer in PEERS if peer.same_as_ours)
    yield Case("peers", (*EVERYONE, *(peer.name for peer in PEERS), *ours))
    yield from batches(turn=2)
    yield from sweeps()
    yield from batches(turn=3)


def _eager(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    return fastkd.distill_loss(student, teacher, backend="reference")


def loss_of(provider: str, teacher: Sequence[Tensor]) -> Loss:
    options: dict[str, Any] = {
        "fastkd": {},
        "fastkd, in place": {"reuse_teacher_memory": True},
        "fastkd, two passes": {"one_pass": False},
    }
    if provider in options:
        return partial(fastkd.distill_loss, **options[provider])
    if provider.startswith("torch.compile"):
        mode = "max-autotune-no-cudagraphs" if "max-autotune" in provider else None
        return torch.compile(_eager, dynamic=False, fullgraph=True, mode=mode)
    for peer in PEERS:
        if provider == peer.name:
            return peer(teacher)
        if provider == f"fastkd, as {peer.name}":
            return peer(teacher).ours
    return _eager


class Step:
    """A provider on features of its own, and what was measured of it."""

    def __init__(self, provider: str, size: Size, case: Case) -> None:
        shapes = [(size[0], c, h, h) for c, h in size[1]]
        self.student, self.kept = random_features(shapes, getattr(torch, case.dtype), case.layout == "channels_last")
        self.teacher = [t.clone() for t in self.kept] if "in place" in provider else self.kept
        self.provider, self.loss, self.forward_only = provider, loss_of(provider, self.kept), case.mode == "forward"
        self.batch, self.elements = size[0], sum(s.numel() for s in self.student)
        self.floor = floor(self.student, self.teacher)
        self.ms: list[float] = []
        self.floor_ms: list[float] = []

    def prepare(self) -> None:
        """The teacher's features filled anew where a step overwrites them, and all as warm as the caches hold them."""
        for t, kept in zip(self.teacher, self.kept, strict=True):
            if t is not kept:
                t.copy_(kept)
        self.floor()
        self.floor_ms.append(milliseconds(self.floor))

    def __call__(self) -> None:
        self.run()  # whose result goes at once, whoever calls

    def run(self) -> tuple[Tensor, ...]:
        """Loss and, where asked for, the gradient of each level."""
        if self.forward_only:
            with torch.no_grad():
                return (self.loss(self.student, self.teacher),)
        loss = self.loss(self.student, self.teacher)
        return loss.detach(), *torch.autograd.grad(loss, self.student)

    def measure(self) -> None:
        """One round."""
        self.prepare()
        self.ms.append(milliseconds(self))

    def measured(self) -> dict[str, Any]:
        self.prepare()
        before = page_faults()
        self()
        faults = page_faults() - before
        times = {key: [round(x, 4) for x in getattr(self, key)[: len(self.ms)]] for key in ("ms", "floor_ms")}
        return {**times, "provider": self.provider, "batch": self.batch, "elements": self.elements, "faults": faults}

    def forget(self) -> None:
        """What was measured so far."""
        self.ms.clear()
        self.floor_ms.clear()

    def check(self) -> None:
        """A provider of one of our formulas must give its numbers, as in float64; others have formulas of their own."""
        s, t = ([x.detach().double() for x in features] for features in (self.student, self.kept))
        reference: Loss = _eager
        for peer in PEERS:
            if peer.name in self.provider:
                if not peer.same_as_ours:
                    return
                reference = partial(peer(t).ours, backend="reference")
        loss = reference([x.requires_grad_() for x in s], t)
        expected = [loss.detach()] if self.forward_only else [loss.detach(), *torch.autograd.grad(loss, s)]
        for _ in range(3):  # from the third on the forward writes the gradient
            self.prepare()
            got = self.run()
        for i, (x, y) in enumerate(zip(got, expected, strict=True)):
            error = ((x.double() - y).norm() / y.norm()).item()
            limit = 1e-5 if i == 0 else 4 * torch.finfo(x.dtype).eps  # rounded once, and in eager more often
            assert error < limit, f"{self.provider}: {'loss' if i == 0 else f'gradient {i - 1}'} is off by {error:.1e}"


def milliseconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def peak_bytes(step: Step) -> int | None:
    """The most memory that the process had during a step, beyond what it had before; None where Linux does not say."""

    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))

    try:
        step.prepare()
        gc.collect()
        buffers.release()
        CDLL("libc.so.6").malloc_trim(0)  # what PyTorch freed is not kept for later
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins now
        before = status("VmRSS")
        step()
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
    first, *others = steps = [Step(provider, size, case) for size in case.sizes for provider in case.providers]

    def setup() -> None:
        for other in others:
            other.measure()
        first.prepare()

    for step in steps:
        step.check()
        step.measure()  # compiles
    round_ms = milliseconds(setup) + milliseconds(first)
    peaks = [peak_bytes(step) for step in steps]
    for _ in range(2):  # until what the measuring of memory threw away is there again
        setup()
        first.measure()
    for step in steps:
        step.forget()
    benchmark.pedantic(first, setup=setup, rounds=round(min(max(1e3 * SECONDS / round_ms, 12), 60)))
    first.ms = [1e3 * x for x in benchmark.stats.stats.data]
    info = {key: value for key, value in asdict(case).items() if key not in ("providers", "sweep", "batch", "turn")}
    measured = [{**step.measured(), "peak_bytes": peak} for step, peak in zip(steps, peaks, strict=True)]
    benchmark.extra_info.update(
        **info, title=str(replace(case, turn=1)), threads_used=torch.get_num_threads(), steps=measured
    )
