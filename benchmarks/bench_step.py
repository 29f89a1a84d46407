"""Benchmarks of the loss as it is used in training, with pytest-benchmark: the first tables of ``make bench``.

    python -m pytest benchmarks/bench_step.py --benchmark-json=step.json

The loss is ``DistillLoss(weight="auto")`` in training, calibrated, with the trainer's map ``graded_iou`` and a task
loss that decreases from step to step. The time of each provider includes the prior from the boxes (``priors.iou_mask``,
one op for all levels), the adapters if the case has them, the loss with its factor, the averages for the next factor,
and the gradients of the student's features and of the adapters. ``fastkd`` is called as a ``Distiller`` calls it: the
teacher's features are donated, so that the gradients take their memory. *Features kept* is without donation, for a
trainer that still needs them. Other benchmarks here are the loss alone with a constant weight, the time of the host
for tiny levels, and the number of operations in a step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import pytest
import torch
from rounds import Contender, compete
from torch import Tensor, nn
from workloads import (
    FallingTask,
    Step,
    StepInputs,
    adapters_step,
    dispatched,
    floor_of,
    host_steps,
    loss_step,
    random_targets,
    step_inputs,
)

import fastkd
from fastkd import InfoMap
from fastkd.priors import iou_mask
from fastkd.yolov3 import YOLOv3, YOLOv3Tiny
from fastkd.yolov3.train.objective import Objective

KEPT = "fastkd, features kept"
PROVIDERS = ("fastkd", KEPT, "eager", "torch.compile")
CALLS = 50  # calls per round when the host's time is measured
Rounds = Callable[[float], int]


@dataclass(frozen=True)
class Case:
    """A step on one workload."""

    workload: str
    batch: int
    adapters: bool = False  # 1x1 convolutions with bias from the widths of YOLOv3-tiny; False: the identity
    turn: int = 1  # turns are minutes apart, and the report joins them, so that one slow minute does not decide

    def __str__(self) -> str:
        return f"{self.workload}-N{self.batch}{'-adapters' * self.adapters}-turn{self.turn}"

    @property
    def title(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "turn"}


CASES = [
    *(Case("same6", batch) for batch in (16, 1)),
    *(Case("tiny5", batch, adapters=True) for batch in (16, 1)),
    *(Case("same6", batch, turn=2) for batch in (16, 1)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_step(case: Case, benchmark: Any, rounds: Rounds) -> None:
    torch._dynamo.reset()
    x = step_inputs(case.workload, case.batch, adapters=case.adapters)
    task = FallingTask()
    steps = {name: loss_step(name, x, donate=name == "fastkd") for name in PROVIDERS}
    require_same(x, steps)
    parts = {"the prior alone": x.prior, **({"the adapters alone": adapters_step(x)} if case.adapters else {})}
    contenders = [
        *(
            Contender(name, lambda step=step: step(task.fall()), prepare=x.restore, floor=floor_of(x))
            for name, step in steps.items()
        ),
        *(Contender(name, part, prepare=x.restore, floor=floor_of(x)) for name, part in parts.items()),
    ]
    compete(benchmark, contenders, rounds)
    benchmark.extra_info.update(kind="step", **case.title, steps=[c.measured() for c in contenders])


def require_same(x: StepInputs, steps: dict[str, Step]) -> None:
    """Check that all providers give the same loss and gradients in a later step, when all have a factor."""
    task = FallingTask()
    for _ in range(3):
        value, results = task.fall(), []
        for step in steps.values():
            x.restore()
            results.append([y.clone() for y in step(value)])
    first, *others = results
    for result in others:
        for a, b in zip(result, first, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


@pytest.mark.parametrize("turn", [1, 2])
def test_constant_weight(turn: int, benchmark: Any, rounds: Rounds) -> None:
    """The loss with a constant weight, and a map with a softmax over each image."""
    x = step_inputs("same6", 16)
    info = InfoMap("energy", "softmax")
    layers = [nn.Identity() for _ in x.teacher]
    criterion = fastkd.DistillLoss(adapters=layers, info_map=info, weight=1.0, standardize=False)
    steps: dict[str, Callable[[], Tensor]] = {
        "fastkd": lambda: criterion(x.student, x.teacher, donated=[True] * len(layers)),
        KEPT: lambda: fastkd.distill_loss(x.student, x.teacher, info_map=info),
    }
    contenders = [
        Contender(
            name,
            lambda step=step: torch.autograd.grad(step(), x.student),
            prepare=x.restore,
            floor=floor_of(x),
        )
        for name, step in steps.items()
    ]
    for contender in contenders:
        contender.measure()
    compete(benchmark, contenders, rounds)
    benchmark.extra_info.update(kind="constant weight", steps=[c.measured() for c in contenders])


def test_host_time(benchmark: Any, rounds: Rounds) -> None:
    """CPU time on one thread, in rounds of many calls."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        steps = host_steps()
        found: dict[str, list[float]] = {name: [] for name in steps}

        def one_round() -> None:
            for name, step in steps.items():
                start = time.thread_time()
                for _ in range(CALLS):
                    step()
                found[name].append(1e6 * (time.thread_time() - start) / CALLS)

        for _ in range(3):
            one_round()
        for times in found.values():
            times.clear()
        benchmark.pedantic(one_round, rounds=rounds(50))
    finally:
        torch.set_num_threads(threads)
    benchmark.extra_info.update(kind="host", microseconds=found)


def test_dispatched_operations(benchmark: Any) -> None:
    found = operations()
    benchmark.pedantic(lambda: None, rounds=1)
    benchmark.extra_info.update(kind="operations", found={name: dict(names) for name, names in found.items()})


def operations() -> dict[str, dict[str, int]]:
    """Return, by name, the operations that launch a kernel, each with the number of times it is dispatched."""
    steps = host_steps()
    boxes = torch.tensor([[0.0, 10, 10, 60, 80], [0, 30, 40, 100, 90], [0, 1, 1, 20, 20]])
    sizes, anchors = [(8, 8), (4, 4), (2, 2), (4, 4), (2, 2)], [torch.tensor([[10.0, 13], [16, 30], [33, 23]])] * 5
    return {
        "distill_loss": dispatched(steps["distill_loss"]),
        'DistillLoss("auto"), identity adapters': dispatched(steps['DistillLoss("auto"), graded_iou']),
        "a graded prior of 5 levels": dispatched(lambda: iou_mask(boxes, anchors, sizes, (128, 128), 1, graded=True)),
        "the trainer's step, beyond student, teacher and the adapters' convolutions": trainer_operations(),
    }


def trainer_operations() -> dict[str, int]:
    """Return the operations of the trainer's objective without those of student, task loss, teacher and adapters."""
    images, targets = torch.rand(1, 3, 64, 64), random_targets(1, 64)
    student = YOLOv3Tiny(num_classes=80, width=0.125)
    teacher = YOLOv3(num_classes=80, width=0.125).eval().requires_grad_(False)

    def step(objective: Objective) -> Callable[[], None]:
        def run() -> None:
            objective.zero_grad()
            objective(images, targets)[0].backward()

        return run

    found = dispatched(step(Objective(student)))
    with torch.no_grad():
        found += dispatched(lambda: teacher(images))
    options = {"info_map": "graded_iou", "prior": "graded_iou", "calibration_batches": 1}
    objective = Objective(student, teacher, **options)
    objective.distiller.prepare(images)
    levels = len(objective.distiller.levels)
    found.update(convolution=levels, convolution_backward=levels)
    whole = dispatched(step(objective))
    whole.subtract(found)
    return {name: count for name, count in whole.items() if count}
