"""The code of the rows of ``gpu_check.py``, and the worker process that runs them by name.

    python benchmarks/gpu_timing.py --row stream --device cpu --tiny    # run one row and print its result

Times of the device are measured by CUDA events, each after a flush of the L2 cache and a sleep of the device, during
which all kernels are launched, so that the device never waits for a launch. Contenders of a case are timed in the same
rounds. On a CPU all times are by the wall clock, and serve only to check that the code runs.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import gc
import itertools
import json
import os
import shutil
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gpu_check
import torch
from bench_training import ALONE, make_objective, make_step, random_images
from torch import Tensor, nn
from workloads import (
    FallingTask,
    StepInputs,
    adapters_step,
    dispatched,
    eager,
    floor,
    floor_of,
    host_steps,
    loss_step,
    random_features,
    random_targets,
    shrink,
    step_inputs,
)

import fastkd
from fastkd.loss_weight import LossWeight
from fastkd.ops.levels import LevelTensors, check
from fastkd.ops.options import LossOptions, options_of_call
from fastkd.ops.run import run
from fastkd.priors import box_balance, iou_mask
from fastkd.statistics import ChannelStatistics

Call = Callable[[], object]
Row = dict[str, Any]
REPEATS = 25
SLEEP_CYCLES, MAX_CYCLES = 12_000_000, 200_000_000  # about 6 ms, and at most 100: longer than a step's launches
TILES_PAY_ABOVE = 1.45  # times the floor: above it, tiles kept on chip may be faster than a score pass
COMPILED = (("large6", 64, "graded_iou"), ("same6", 16, "graded_iou"), ("large6", 64, "self_information"))
BF16, F32, F16 = torch.bfloat16, torch.float32, torch.float16


class Machine:
    """The device, the end of a row's time, and the methods that measure times."""

    def __init__(self, device: str, tiny: bool) -> None:
        self.device, self.tiny, self.on_gpu = device, tiny, device == "cuda"
        self.end = time.monotonic() + 3600
        self.repeats = 3 if tiny else REPEATS
        self.sleep_cycles = SLEEP_CYCLES
        self.flush = torch.empty(2**26 if self.on_gpu else 1, device=device)  # 256 MiB, more than any L2
        if tiny:
            shrink()

    def batch(self, n: int) -> int:
        return min(n, 2) if self.tiny else n

    @property
    def backends(self) -> list[str]:
        """The backends with compiled kernels that work here, the default one first."""
        return [name for name, refusal in fastkd.backends(self.device).items() if not refusal and name != "reference"]

    def inputs(self, workload: str, n: int, dtype: torch.dtype = BF16, adapters: bool = False) -> StepInputs:
        return step_inputs(workload, self.batch(n), dtype, True, self.device, adapters)

    def over(self) -> bool:
        """Whether the row's time is over; the row then leaves out its remaining cases."""
        return time.monotonic() > self.end

    def sync(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def events(self, *runs: Call) -> list[float]:
        """Return the milliseconds on the device of each of the runs, one after the other."""
        if not self.on_gpu:
            return [1e3 * seconds(call) for call in runs]
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(runs) + 1)]
        torch.cuda._sleep(self.sleep_cycles)
        marks[0].record()
        for call, mark in zip(runs, marks[1:], strict=True):
            call()
            mark.record()
        awake = marks[0].query()
        torch.cuda.synchronize()
        if awake:  # the device woke up before all was launched, so the time includes launches
            self.sleep_cycles *= 2
            if self.sleep_cycles > MAX_CYCLES:
                raise RuntimeError("a contender takes too long to launch to be timed on the device")
            return self.events(*runs)
        return [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]

    def device_ms(self, contenders: dict[str, Call]) -> dict[str, list[float]]:
        """Return the quartiles of each contender's time on the device."""
        return self._rounds(contenders, lambda call: self.events(call)[0])

    def wall_ms(self, contenders: dict[str, Call]) -> dict[str, list[float]]:
        """Return the quartiles of each contender's time from the call until the device is done."""

        def one(call: Call) -> float:
            self.sync()
            return 1e3 * seconds(lambda: (call(), self.sync()))

        return self._rounds(contenders, one)

    def host_us(self, contenders: dict[str, Call]) -> dict[str, list[float]]:
        """Return the quartiles of each contender's time on the host, in calls that do not wait for the device."""

        def one(call: Call) -> float:
            self.sync()
            calls = min(max(int(0.01 / seconds(call)), 1), 50)
            return 1e6 * seconds(lambda: [call() for _ in range(calls)]) / calls

        return self._rounds(contenders, one)

    def passes_ms(
        self, loss: Callable[[], Tensor], wanted: Sequence[Tensor], upstream: Tensor | None = None
    ) -> tuple[list[float], list[float]]:
        """Return the quartiles of the device's time of forward and of backward."""
        kept: list[Tensor] = []
        times = []
        for _ in range(3 + self.repeats):
            kept.clear()
            self.flush.zero_()
            times.append(
                self.events(lambda: kept.append(loss()), lambda: torch.autograd.grad(kept[-1], wanted, upstream))
            )
        forward, backward = (statistics.quantiles(t, n=4) for t in zip(*times[3:], strict=True))
        return forward, backward

    def _rounds(self, contenders: dict[str, Call], measure: Callable[[Call], float]) -> dict[str, list[float]]:
        found: dict[str, list[float]] = {name: [] for name in contenders}
        for call in contenders.values():
            for _ in range(3):
                call()
        self.sync()
        for count in range(self.repeats):
            if count >= 3 and self.over():
                break
            for name, call in contenders.items():
                self.flush.zero_()
                found[name].append(measure(call))
        return {name: [round(t, 5) for t in statistics.quantiles(times, n=4)] for name, times in found.items()}


def seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def target(what: str, asked: float, measured: float, unit: str = " ms", least: bool = False) -> Row:
    met = measured >= asked if least else measured <= asked
    sign = "≥" if least else "≤"
    return {"what": what, "asked": f"{sign} {asked:g}{unit}", "measured": f"{measured:.3g}{unit}", "met": met}


def beside_floor(case: Row, times: dict[str, list[float]], unit: str = "device, ms") -> list[Row]:
    """Return a line per contender, with its time as a multiple of the floor's."""
    base = times.get("floor", [0.0, 0.0, 0.0])[1]
    return [
        {**case, "contender": name, unit: t, "times floor": t[1] / base if base else None} for name, t in times.items()
    ]


def gradient_of(loss: Callable[[], Tensor], wanted: Sequence[Tensor]) -> Call:
    return lambda: torch.autograd.grad(loss(), wanted)


# ---- correctness


class Sample:
    """A call of the loss with all optional inputs, in one dtype and layout."""

    def __init__(self, dtype: torch.dtype, channels_last: bool, device: str) -> None:
        shapes = [(2, 64, 13, 13), (1, 256, 26, 26), (2, 7, 5, 3)]
        self.student, self.teacher = random_features(shapes, dtype, channels_last, device)
        g = torch.Generator(device).manual_seed(1)

        def random(*size: int) -> Tensor:
            return torch.rand(*size, generator=g, device=device)

        self.prior = [random(n, h, w) for n, _, h, w in shapes]
        self.moments = [(random(c), 0.5 + random(c)) for _, c, _, _ in shapes]
        self.bias = [random(c).requires_grad_() for _, c, _, _ in shapes]

    def results(self, info_map: str, backend: str, wide: bool = False) -> list[Tensor]:
        """Return the level losses and the gradients, with a factor of 1.5 and an upstream gradient of 2."""

        def of(xs: Sequence[Tensor]) -> list[Tensor]:
            return [x.detach().double().requires_grad_(x.requires_grad) for x in xs] if wide else list(xs)

        student, bias = of(self.student), of(self.bias)
        options = options_of_call(info_map, None, "l2", 1.0, None, "sum", backend)
        levels = check(student, of(self.teacher), options, prior=self.prior, standardize=self.moments, bias=bias)
        factor = torch.tensor(1.5, device=student[0].device)
        loss, losses = run(levels, options, factor)
        upstream = torch.full_like(loss, 2.0)
        return [losses, *torch.autograd.grad(loss, [*student, *bias], upstream)]


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fill uninitialised memory with NaN, so that results that are not written are noticed."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def combinations(m: Machine) -> list[tuple[str, torch.dtype, bool, str]]:
    maps = ("graded_iou", "self_information", "attention")
    return list(itertools.product(m.backends, (BF16, F32), (True, False), maps))


def correct(m: Machine) -> Row:
    """Compare every combination with float64: at most twice the error of eager PyTorch, and the same bits twice."""
    lines, failures = [], []
    for backend, dtype, channels_last, info_map in combinations(m):
        name = f"{backend}, {dtype_name(dtype)}, {layout(channels_last)}, {info_map}"
        try:
            ours, eagers, same, smallest = errors(Sample(dtype, channels_last, m.device), info_map, backend)
        except Exception as error:
            failures.append(f"{name}: {first_line(error)}")
            if "CUDA" in str(error):
                break  # the device is lost to this process
            continue
        wrong = [k for k, (a, b, c) in enumerate(zip(ours, eagers, smallest, strict=True)) if not a <= 2 * max(b, c)]
        failures += [f"{name}: result {k} is off by {ours[k]:.1e}, eager by {eagers[k]:.1e}" for k in wrong]
        failures += [] if same else [f"{name}: other bits in a second run"]
        lines.append({"combination": name, "error": max(ours), "eager's": max(eagers), "same bits": same})
    failures += wrong_small_ops(m)
    return {"failures": failures, "table": lines, "summary": f"{len(lines)} combinations"}


def errors(sample: Sample, info_map: str, backend: str) -> tuple[list[float], list[float], bool, list[float]]:
    """Return relative errors of loss and gradients, fastkd's and eager's; whether two runs agree; allowed errors."""
    exact = sample.results(info_map, "reference", wide=True)
    plain = sample.results(info_map, "reference")
    with poisoned():
        ours, again = sample.results(info_map, backend), sample.results(info_map, backend)

    def off(got: list[Tensor]) -> list[float]:
        return [((x.double() - y).norm() / y.norm()).item() for x, y in zip(got, exact, strict=True)]

    same = all(torch.equal(x, y) for x, y in zip(ours, again, strict=True))
    smallest = [2e-7 if x.dtype == F32 else 6e-8 for x in ours]  # as eager's rounding errors may cancel
    return off(ours), off(plain), same, smallest


def wrong_small_ops(m: Machine) -> list[str]:
    """Compare priors and factor with those of the CPU, which the tests compare with their definitions."""
    x, host = m.inputs("same6", 2), step_inputs("same6", 2, BF16, True)
    sizes, side = [(t.shape[2], t.shape[3]) for t in x.teacher], 8 * x.teacher[0].shape[2]
    priors: dict[str, Callable[[StepInputs], list[Tensor]]] = {
        "iou_mask": lambda y: iou_mask(y.boxes, y.anchors, sizes, (side, side), 2),
        "iou_mask, graded": lambda y: iou_mask(y.boxes, y.anchors, sizes, (side, side), 2, graded=True),
        "box_balance": lambda y: box_balance(y.boxes, sizes, (side, side), 2),
    }
    failures = []
    for name, prior in priors.items():
        for level, (a, b) in enumerate(zip(prior(x), prior(host), strict=True)):
            if not torch.allclose(a.cpu(), b, rtol=1e-5, atol=1e-6):
                failures.append(f"{name}, level {level}: off by {(a.cpu() - b).abs().max().item():.1e}")
    schedule = {"weight": "auto", "warmup_steps": 2, "decay": "cosine", "stop_step": 5}
    there, here = LossWeight(**schedule).to(m.device), LossWeight(**schedule)
    for step in range(6):
        for weight in (there, here):
            weight.count(
                torch.full((3,), 2.0 + step).to(weight.step.device), torch.tensor([5.0]).to(weight.step.device)
            )
        if not torch.allclose(there.factor.cpu(), here.factor, rtol=1e-5):
            failures.append(f"factor of step {step + 1}: {there.factor.item():g}, on the CPU {here.factor.item():g}")
    return failures


# ---- times


def ceilings(m: Machine) -> Row:
    lines = []
    for name, bytes_ in (("copy of 1 GiB", 2**30),):
        source = torch.empty(bytes_ // 4 if m.on_gpu else 1024, device=m.device)
        into = torch.empty_like(source)
        times = m.device_ms({name: lambda s=source, i=into: i.copy_(s)})[name]
        lines.append({"what": name, "device, ms": times, "TB/s": 2 * source.nbytes / times[1] / 1e9})
    for workload, n in (("large6", 64), ("same6", 16)):
        x = m.inputs(workload, n)
        times = m.device_ms({"add": floor_of(x)})["add"]
        unit = sum(s.nbytes for s in x.student)
        what = f"floor of {workload}, N = {n}, bfloat16"
        lines.append({"what": what, "device, ms": times, "TB/s": 3 * unit / times[1] / 1e9})
    x = m.inputs("tiny5", 64, adapters=True)
    convolutions = {
        f"adapters of tiny5, N = 64, {'with' if bias else 'without'} bias": adapters_step(x, bias)
        for bias in (True, False)
    }
    lines += [{"what": name, "device, ms": times} for name, times in m.device_ms(convolutions).items()]
    return {"failures": [], "table": lines, "summary": f"a copy moves {lines[0]['TB/s']:.2f} TB/s"}


def host(m: Machine) -> Row:
    """Measure microseconds on the host, at sizes that take hardly any time on the device; and count operations."""
    steps: dict[str, Call] = dict(host_steps(m.device))
    boxes = torch.tensor([[0.0, 10, 10, 60, 80], [0, 30, 40, 100, 90]], device=m.device)
    sizes, anchors = [(8, 8), (4, 4), (2, 2), (4, 4), (2, 2)], [torch.rand(3, 2, device=m.device) * 50 + 1] * 5
    steps["a graded prior of 5 levels"] = lambda: iou_mask(boxes, anchors, sizes, (64, 64), 1, graded=True)
    statistic, losses, task = ChannelStatistics().to(m.device), torch.rand(5, device=m.device), FallingTask(m.device)
    statistic.update(torch.rand(2, 8, 4, 4, device=m.device))
    steps["a level's moments, once calibrated"] = statistic.moments
    weight = LossWeight("auto").to(m.device)
    steps['LossWeight("auto"), a step'] = lambda: weight.count(losses, task.value)
    images = random_images(1, 64, m.device)
    for provider in (ALONE, "fastkd"):
        objective = make_objective(provider, images, width=0.125)
        targets = random_targets(1, 64, m.device)
        steps[f"the trainer's forward and backward, tiny: {provider}"] = objective_step(objective, images, targets)
    counts = {name: sum(dispatched(step).values()) for name, step in steps.items()}
    found = m.host_us(steps)
    trivial = next(iter(found.values()))[1]
    lines = [
        {"what": name, "host, µs": t, "times a trivial Function": t[1] / trivial, "operations": counts[name]}
        for name, t in found.items()
    ]
    asked = {"distill_loss": 5, 'DistillLoss("auto"), graded_iou': 9}
    of = {x["what"]: x["times a trivial Function"] for x in lines}
    targets_ = [
        target(f"host time of {name}", most, of[name], " × a trivial Function's") for name, most in asked.items()
    ]
    return {"failures": [], "table": lines, "targets": targets_}


def objective_step(objective: nn.Module, images: Tensor, targets: Tensor) -> Call:
    def step() -> None:
        objective.zero_grad()
        objective(images, targets)[0].backward()

    return step


def op_steps(m: Machine, x: StepInputs, info_map: str) -> dict[str, Call]:
    """Return the floor, and ``distill_loss`` for each backend, with prior and moments computed beforehand."""
    prior = x.prior() if info_map == "graded_iou" else None
    moments = [(torch.zeros(t.shape[1], device=m.device), torch.ones(t.shape[1], device=m.device)) for t in x.teacher]
    if info_map == "attention":
        moments = None  # type: ignore[assignment]
    found: dict[str, Call] = {"floor": floor(x.student, x.teacher)}
    for backend in m.backends:
        more = {"info_map": info_map, "prior": prior, "standardize": moments, "backend": backend}
        found[f"fastkd-{backend}"] = gradient_of(
            lambda more=more: fastkd.distill_loss(x.student, x.teacher, **more), x.student
        )
    return found


def op_rows(
    m: Machine, cases: Sequence[tuple[str, int, torch.dtype]], info_map: str, *, prior: bool = False
) -> list[Row]:
    lines: list[Row] = []
    for workload, n, dtype in cases:
        if lines and m.over():
            break
        x = m.inputs(workload, n, dtype)
        contenders = op_steps(m, x, info_map) | ({"the prior": x.prior} if prior else {})
        case = {"case": f"{workload}, N = {n}, {dtype_name(dtype)}", "map": info_map}
        lines += beside_floor(case, m.device_ms(contenders))
    return lines


def best(lines: Sequence[Row], case: str, key: str = "device, ms") -> float:
    """Return the median of the fastest of fastkd's backends."""
    return min(x[key][1] for x in lines if x["case"] == case and x["contender"].startswith("fastkd"))


def stream(m: Machine) -> Row:
    cases = [("large6", 64, BF16), ("same6", 64, BF16), ("same6", 16, BF16), ("large6", 64, F32), ("same6", 64, F32)]
    lines = op_rows(m, cases, "graded_iou", prior=True)
    measured = best(lines, "large6, N = 64, bfloat16")
    return {"failures": [], "table": lines, "targets": [target("graded_iou, large6, N = 64, device", 0.45, measured)]}


def score_pass(m: Machine) -> Row:
    lines = op_rows(m, [("large6", 64, BF16), ("same6", 16, BF16)], "self_information")
    case = "large6, N = 64, bfloat16"
    asked = target("self_information, large6, N = 64, device", 0.60, best(lines, case))
    lines += op_rows(m, [("large6", 64, BF16)], "attention")
    times = min(x["times floor"] for x in lines if x["case"] == case and x["contender"].startswith("fastkd"))
    pays = "may pay" if times > TILES_PAY_ABOVE else "is not needed"
    summary = f"{times:.2f} times the floor at best: keeping tiles on chip {pays}"
    return {"failures": [], "table": lines, "targets": [asked], "summary": summary}


def wall(m: Machine) -> Row:
    x, task = m.inputs("same6", 16), FallingTask(m.device)
    contenders = op_steps(m, x, "graded_iou")
    contenders["eager distill_loss"] = gradient_of(
        lambda: eager(x.student, x.teacher, "graded_iou", prior=x.prior()), x.student
    )
    for provider in (*(f"fastkd-{b}" for b in m.backends), "eager"):
        step = loss_step(provider, x)
        contenders[f"{provider}: DistillLoss(auto) and prior"] = lambda step=step: step(task.fall())
    lines = beside_floor({"case": "same6, N = 16, bfloat16"}, m.wall_ms(contenders), "wall, ms")
    ours = min(x["wall, ms"][1] for x in lines if x["contender"] in {f"fastkd-{b}" for b in m.backends})
    return {"failures": [], "table": lines, "targets": [target("same6, N = 16, distill_loss, wall", 0.40, ours)]}


def rivals(m: Machine, workload: str, n: int, info_map: str) -> tuple[list[Row], list[Row]]:
    """Time the training step's loss of fastkd and of torch.compile, on the device and by the wall clock.

    Returns:
        The lines of the table, and the targets.
    """
    torch._dynamo.reset()
    x, task = m.inputs(workload, n), FallingTask(m.device)
    contenders: dict[str, Call] = {"floor": floor_of(x)}
    for provider in (*(f"fastkd-{b}" for b in m.backends), "torch.compile"):
        step = loss_step(provider, x, info_map)
        contenders[provider] = lambda step=step: step(task.value)
    case = f"{workload}, N = {n}, bfloat16"
    lines = beside_floor({"case": case, "map": info_map}, m.device_ms(contenders))
    walls = m.wall_ms(contenders)
    lines = [{**x, "wall, ms": walls[x["contender"]]} for x in lines]
    asked = []
    for key in ("device, ms", "wall, ms"):
        theirs = next(x[key][1] for x in lines if x["contender"] == "torch.compile")
        what = f"{info_map}, {case}, {key.partition(',')[0]}: times as fast as torch.compile"
        asked.append(target(what, 1.0, theirs / best(lines, case, key), " ×", least=True))
    return lines, asked


def compiled(m: Machine) -> Row:
    lines, asked = [], []
    for case in COMPILED[:2]:
        more, targets_ = rivals(m, *case)
        lines, asked = lines + more, asked + targets_
    return {"failures": [], "table": lines, "targets": asked}


def compiled_image(m: Machine) -> Row:
    lines, asked = rivals(m, *COMPILED[2])
    return {"failures": [], "table": lines, "targets": asked}


def training(m: Machine) -> Row:
    """Time consecutive training steps: the student alone, with eager's feature loss, and with fastkd's."""
    lines, steps = [], 4
    for n in (16, 64):
        if lines and m.over():
            break
        images = random_images(m.batch(n), 64 if m.tiny else 416, m.device)
        contenders = {}
        for provider in (ALONE, "eager", "fastkd"):
            objective = make_objective(provider, images, 0.125 if m.tiny else 1.0)
            step = make_step(objective, images, autocast=True)
            contenders[provider] = lambda step=step: [step() for _ in range(steps)]
        times = {name: [t / steps for t in each] for name, each in m.wall_ms(contenders).items()}
        alone = times[ALONE][1]
        lines += [
            {"case": f"416 px, N = {n}", "contender": name, "step, ms": t, "over the student alone, ms": t[1] - alone}
            for name, t in times.items()
        ]
        del contenders, objective, step
        gc.collect()
    asked = []
    for n in dict.fromkeys(x["case"] for x in lines):
        of = {x["contender"]: x["step, ms"][1] for x in lines if x["case"] == n}
        asked.append(
            target(f"a training step, {n}: times as fast as eager", 1.0, of["eager"] / of["fastkd"], " ×", True)
        )
    return {"failures": [], "table": lines, "targets": asked}


def two_passes(m: Machine) -> Row:
    """Time forward and backward as two passes, which ``torch.compile`` and float16 use."""
    lines, x = [], m.inputs("large6", 64)
    unit = m.device_ms({"floor": floor_of(x)})["floor"][1] / 3
    for backend in m.backends:
        levels, options = checked(x, backend)
        times = m.passes_ms(lambda a=(levels, options): run(*a, one_pass=False)[0], x.student)
        for name, t, units in zip(("forward", "backward"), times, (2, 3), strict=True):
            of_floor = t[1] / (units * unit)
            lines.append({"contender": f"fastkd-{backend}", "pass": name, "device, ms": t, "times its units": of_floor})
    return {"failures": [], "table": lines}


def checked(x: StepInputs, backend: str, info_map: str = "energy") -> tuple[LevelTensors, LossOptions]:
    prior = x.prior() if info_map == "graded_iou" else None
    options = options_of_call(info_map, None, "l2", 1.0, None, "sum", backend)
    return check(x.student, x.teacher, options, prior=prior), options


def adapters(m: Machine) -> Row:
    """Time tiny5 with its adapters: the bias in the loss, in the convolution, and in plain PyTorch."""
    x, task = m.inputs("tiny5", 64, adapters=True), FallingTask(m.device)
    contenders: dict[str, Call] = {"floor": floor_of(x), "the adapters alone, with bias": adapters_step(x)}
    ways = [(f"fastkd-{b}", fold) for b in m.backends for fold in (True, False)] + [("eager", False)]
    for provider, fold in ways:
        step = loss_step(provider, x, fold_bias=fold)
        name = f"{provider}, bias in the {'loss' if fold else 'convolution'}"
        contenders[name] = lambda step=step: step(task.value)
    return {"failures": [], "table": beside_floor({"case": "tiny5, N = 64, bfloat16"}, m.device_ms(contenders))}


def rescale(m: Machine) -> Row:
    """Time the backward alone, for an upstream gradient of 1 and of 0.5."""
    x, lines = m.inputs("large6", 64), []
    for backend in m.backends:
        levels, options = checked(x, backend, "graded_iou")
        for upstream in (1.0, 0.5):
            scale = torch.tensor(upstream, device=m.device)
            _, t = m.passes_ms(lambda a=(levels, options): run(*a)[0], x.student, scale)
            lines.append({"contender": f"fastkd-{backend}", "upstream gradient": upstream, "device, ms": t})
    return {"failures": [], "table": lines}


def others(m: Machine) -> Row:
    """Time further cases, to find regressions: small batches, NCHW, float16, and a CUDA graph."""
    lines: list[Row] = []
    for n, dtype, channels_last in ((1, BF16, True), (16, BF16, False), (16, F16, True), (16, F32, False)):
        if lines and m.over():
            break
        x = step_inputs("same6", m.batch(n), dtype, channels_last, m.device)
        contenders = op_steps(m, x, "self_information")
        contenders["eager"] = gradient_of(lambda x=x: eager(x.student, x.teacher), x.student)
        case = {"case": f"same6, N = {n}, {dtype_name(dtype)}, {layout(channels_last)}"}
        walls = m.wall_ms(contenders)
        lines += [
            {**line, "wall, ms": walls[line["contender"]]} for line in beside_floor(case, m.device_ms(contenders))
        ]
    if m.on_gpu and not m.over():
        graphs = {
            f"{name}, in a graph": captured(call) for name, call in op_steps(m, m.inputs("same6", 16), "energy").items()
        }
        lines += beside_floor({"case": "same6, N = 16, bfloat16, channels_last"}, m.device_ms(graphs))
    return {"failures": [], "table": lines}


def captured(call: Call) -> Call:
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph, kept = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        kept.append(call())
    return lambda: (graph.replay(), kept)


def bytes_moved(m: Machine) -> Row:
    """Measure the DRAM traffic of each pass with ncu, in units of the bytes of all student features."""
    program = shutil.which("ncu")
    if program is None or not m.on_gpu:
        return {"failures": [], "summary": "skipped: ncu is not on the PATH" if m.on_gpu else "only on a GPU"}
    metrics = "dram__bytes_read.sum,dram__bytes_write.sum,lts__t_sector_hit_rate.pct"
    command = [program, "--clock-control", "none", "--profile-from-start", "off", "--metrics", metrics, "--csv"]
    command += ["--print-units", "base", sys.executable, __file__, "--once"]
    _, output = gpu_check.run(command, m.end - time.monotonic())
    lines = read_ncu(output, sum(s.nbytes for s in m.inputs("large6", 64).student))
    failures = [] if lines else [f"ncu found nothing: {output.strip()[-300:]}"]
    return {
        "failures": failures,
        "table": lines,
        "summary": "large6, N = 64, bfloat16, kernels in the order of launches",
    }


def read_ncu(output: str, unit: int) -> list[Row]:
    """Return a line per launch, from ncu's CSV of one metric per line; small launches are left out."""
    start = output.find('"ID"')
    launches: dict[str, Row] = {}
    for x in csv.DictReader(output[start:].splitlines()) if start >= 0 else ():
        if not x.get("Metric Value"):  # other output
            continue
        launch = launches.setdefault(x["ID"], {"kernel": x["Kernel Name"].partition("(")[0][:60]})
        launch[x["Metric Name"]] = float(x["Metric Value"].replace(",", ""))
    lines = []
    for launch in launches.values():
        read, written = launch.get("dram__bytes_read.sum", 0.0) / unit, launch.get("dram__bytes_write.sum", 0.0) / unit
        hits = launch.get("lts__t_sector_hit_rate.pct")
        if read + written > 0.1:
            lines.append({"kernel": launch["kernel"], "units read": read, "units written": written, "L2 hits, %": hits})
    return lines


def once(m: Machine) -> None:
    """Run every pass once while the profiler records."""
    x = m.inputs("large6", 64)
    calls = [
        *(call for info_map in ("graded_iou", "self_information") for call in op_steps(m, x, info_map).values()),
        *(gradient_of(lambda b=b: run(*checked(x, b), one_pass=False)[0], x.student) for b in m.backends),
    ]
    for call in calls:
        call()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()
    for call in calls:
        call()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()


ROWS: dict[str, Callable[[Machine], Row]] = {
    f.__name__: f
    for f in (
        *(correct, ceilings, host, stream, score_pass, wall, compiled, training),
        *(two_passes, adapters, rescale, bytes_moved, compiled_image, others),
    )
}


# ---- compilers


def warm(m: Machine, part: int, of: int) -> None:
    """Compile one part of the Triton kernels that the rows check and time."""
    calls: list[Call] = [
        lambda c=c: Sample(c[1], c[2], m.device).results(c[3], c[0]) for c in combinations(m) if c[0] == "triton"
    ]
    if "triton" in m.backends:
        for workload, dtype, info_map in itertools.product(
            ("large6", "same6"), (BF16, F32), ("graded_iou", "self_information", "attention")
        ):
            n = 1 if workload == "same6" else 16
            calls.append(lambda a=(workload, n, dtype), i=info_map: op_steps(m, m.inputs(*a), i)["fastkd-triton"]())
    for call in calls[part::of]:
        call()


def compile_case(m: Machine, case: int) -> None:
    workload, n, info_map = COMPILED[case]
    step, task = loss_step("torch.compile", m.inputs(workload, n), info_map), FallingTask(m.device)
    step(task.fall())


# ---- the worker


def answer(m: Machine, name: str, allowed: float) -> Row:
    m.end = time.monotonic() + allowed
    try:
        return ROWS[name](m)
    except Exception as error:
        traceback.print_exc()
        return {"failures": [first_line(error)]}
    finally:
        torch._dynamo.reset()
        gc.collect()
        if m.on_gpu:
            with contextlib.suppress(RuntimeError):
                torch.cuda.empty_cache()


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def layout(channels_last: bool) -> str:
    return "channels_last" if channels_last else "NCHW"


def serve(m: Machine, file: int) -> None:
    """Answer each line of the standard input; end after a failure of the device, which later rows would repeat."""
    with os.fdopen(file, "w") as answers:
        for line in sys.stdin:
            asked = json.loads(line)
            result = answer(m, asked["row"], asked["seconds"])
            print(json.dumps(result), file=answers, flush=True)
            if any("CUDA" in failure for failure in result["failures"]):
                return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--row", choices=ROWS, help="run one row and print its result")
    parser.add_argument("--answers", type=int, help="serve rows; write answers to this file descriptor")
    parser.add_argument("--warm", help="PART/OF: compile this part of Triton's kernels")
    parser.add_argument("--compile", type=int, help="compile this case of torch.compile")
    parser.add_argument("--once", action="store_true", help="run each pass once, for ncu")
    options = parser.parse_args()
    m = Machine(options.device, options.tiny)
    if options.warm:
        warm(m, *map(int, options.warm.split("/")))
    elif options.compile is not None:
        compile_case(m, options.compile)
    elif options.once:
        once(m)
    elif options.answers is not None:
        serve(m, options.answers)
    else:
        print(json.dumps(answer(m, options.row, 600), indent=1))


if __name__ == "__main__":
    main()
