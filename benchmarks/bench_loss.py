"""Benchmarks of the loss alone, forward and backward, for several providers, with pytest-benchmark.

    python -m pytest benchmarks/bench_loss.py --benchmark-json=loss.json

A benchmark is one case with several providers. Each round times all providers one after the other, each after the
floor: one read of student and teacher and one write of the gradient, by ``torch.add``. The numbers of pytest-benchmark
itself are those of the first provider. ``extra_info`` has the case and, for each step, the times by round, the page
faults and the peak of memory.
"""

from __future__ import annotations

import gc
import resource
from collections.abc import Callable, Iterator, Sequence
from ctypes import CDLL
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peers import PEERS
from rounds import Contender, compete
from torch import Tensor
from workloads import Loss, eager, features, floor

import fastkd

EVERYONE = ("fastkd", "eager", "torch.compile")


@dataclass(frozen=True)
class Case:
    """The case of one benchmark."""

    group: str  # table of the report
    providers: tuple[str, ...] = EVERYONE
    workload: str = "same6"
    batch: int = 4
    mode: str = "step"  # forward and backward; or "forward"
    dtype: str = "float32"
    layout: str = "contiguous"
    threads: int = 0  # 0: PyTorch's default

    def __str__(self) -> str:
        sizes = f"{self.workload}-N{self.batch}"
        return "-".join((self.group, sizes, self.mode, self.dtype, self.layout, f"{self.threads}t")).replace(" ", "_")


def cases() -> Iterator[Case]:
    for batch in (1, 4, 16):
        yield Case("batch", batch=batch)
    yield Case("forward", mode="forward")
    for dtype, layout in (("bfloat16", "contiguous"), ("float32", "channels_last"), ("bfloat16", "channels_last")):
        yield Case("dtype and layout", dtype=dtype, layout=layout)
    yield Case("workload", workload="large6")
    yield Case("threads", threads=1)
    ours = tuple(f"fastkd, as {peer.name}" for peer in PEERS if peer.same_as_ours)
    yield Case("peers", (*EVERYONE, *(peer.name for peer in PEERS), *ours))


def loss_of(provider: str, teacher: Sequence[Tensor]) -> Loss:
    if provider == "fastkd":
        return fastkd.distill_loss
    if provider == "torch.compile":
        return torch.compile(eager, dynamic=False, fullgraph=True)
    for peer in PEERS:
        if provider == peer.name:
            return peer(teacher)
        if provider == f"fastkd, as {peer.name}":
            return peer(teacher).ours
    return eager


class Provider(Contender):
    """A loss on features of its own, and its measurements."""

    def __init__(self, provider: str, case: Case) -> None:
        dtype, channels_last = getattr(torch, case.dtype), case.layout == "channels_last"
        self.student, self.teacher = features(case.workload, case.batch, dtype, channels_last)
        self.loss, self.forward_only = loss_of(provider, self.teacher), case.mode == "forward"
        super().__init__(provider, self.run, floor=floor(self.student, self.teacher))

    def run(self) -> tuple[Tensor, ...]:
        """Return the loss and, unless only the forward is timed, the gradient of each level."""
        if self.forward_only:
            with torch.no_grad():
                return (self.loss(self.student, self.teacher),)
        loss = self.loss(self.student, self.teacher)
        return loss.detach(), *torch.autograd.grad(loss, self.student)

    def measured(self) -> dict[str, Any]:
        found = super().measured()
        before = page_faults()
        self()
        faults = page_faults() - before
        return {**found, "elements": sum(s.numel() for s in self.student), "faults": faults}

    def check(self) -> None:
        """Compare loss and gradients with those in float64, if the provider computes one of fastkd's formulas."""
        s, t = ([x.detach().double() for x in features] for features in (self.student, self.teacher))
        reference: Loss = eager
        for peer in PEERS:
            if peer.name in self.provider:
                if not peer.same_as_ours:
                    return
                reference = partial(peer(t).ours, backend="reference")
        loss = reference([x.requires_grad_() for x in s], t)
        expected = [loss.detach()] if self.forward_only else [loss.detach(), *torch.autograd.grad(loss, s)]
        for i, (x, y) in enumerate(zip(self.run(), expected, strict=True)):
            error = ((x.double() - y).norm() / y.norm()).item()
            limit = 1e-5 if i == 0 else 4 * torch.finfo(x.dtype).eps  # fastkd rounds once, eager more often
            assert error < limit, f"{self.provider}: {'loss' if i == 0 else f'gradient {i - 1}'} is off by {error:.1e}"


def page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def peak_bytes(step: Provider) -> int | None:
    """Return the peak of the process's memory in a step, above the memory before it; None if Linux does not tell."""

    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))

    try:
        step.prepare()
        gc.collect()
        CDLL("libc.so.6").malloc_trim(0)  # return freed memory to the system
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak
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
def test_loss(case: Case, benchmark: Any, rounds: Callable[[float], int]) -> None:
    torch._dynamo.reset()  # without it, the ninth shape would not be compiled
    steps = [Provider(name, case) for name in case.providers]
    for step in steps:
        step.check()  # compiles
    peaks = [peak_bytes(step) for step in steps]
    for _ in range(2):  # allocate again what was freed to measure memory
        for step in steps:
            step.measure()
    compete(benchmark, steps, rounds)
    measured = [{**step.measured(), "peak_bytes": peak} for step, peak in zip(steps, peaks, strict=True)]
    info = {key: value for key, value in asdict(case).items() if key != "providers"}
    benchmark.extra_info.update(kind="loss", **info, threads_used=torch.get_num_threads(), steps=measured)
