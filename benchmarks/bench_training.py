"""Benchmarks of a whole training step in which YOLOv3 teaches YOLOv3-tiny, with pytest-benchmark.

    python -m pytest benchmarks/bench_training.py --benchmark-json=training.json

fastkd is compared with plain PyTorch, ``torch.compile`` and the student alone, at 416 px, with 80 classes, random
weights and boxes, and the trainer's defaults: student forward, detection loss, teacher forward, graded IoU prior,
distillation of backbone and neck through 1x1 adapters with ``weight="auto"``, backward, SGD. A round has one step of
each. ``extra_info`` also has the time of prior, loss and gradient alone, on the features of that step after the
adapters.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import pytest
import torch
from rounds import Contender, compete, milliseconds
from torch import Tensor, nn
from workloads import FallingTask, random_targets

from fastkd import DistillLoss
from fastkd.ops.levels import LevelTensors
from fastkd.ops.reference import level_losses
from fastkd.yolov3 import YOLOv3, YOLOv3Tiny
from fastkd.yolov3.train.objective import Objective

ALONE = "student alone"
PROVIDERS = (ALONE, "fastkd", "eager", "torch.compile")
ROUNDS = {1: 7, 4: 5}  # by batch
WARM_UP = 4  # calls of the loss alone that are not timed, as the first ones calibrate and compile
CACHES = 1 << 28  # bytes, more than the caches of any processor


def random_images(batch: int, side: int, device: str = "cpu") -> Tensor:
    images = torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(1))
    return images.to(device, memory_format=torch.channels_last)


class CompiledLoss(DistillLoss):
    """``DistillLoss`` with its plain formula compiled; moments, prior and factor are inputs of the formula."""

    def _weighted(self, levels: LevelTensors, task: Tensor | None, learns: bool) -> tuple[Tensor, Tensor]:
        weight = self.loss_weight
        tensors = (levels.student, levels.teacher, levels.prior, levels.mean, levels.rstd, levels.bias)
        losses = self.formula(*tensors, levels.plan.weights)
        factor = weight.factor.clone() if weight.is_known else weight.balanced(losses, task, all_ranks=learns)
        return factor * losses.sum(), losses.detach()

    @cached_property
    def formula(self) -> Callable[..., Tensor]:
        o = self.active_options

        def plain(*arguments: Any) -> Tensor:
            return level_losses(*arguments, o.info_map, o.penalty, o.beta, o.divisor)[0]

        return torch.compile(plain, dynamic=False, fullgraph=True)


def kind_of(provider: str) -> type[DistillLoss]:
    return CompiledLoss if provider == "torch.compile" else DistillLoss


def options_of(provider: str) -> dict[str, Any]:
    backend = None if provider == "fastkd" else "reference"
    return {"info_map": "graded_iou", "calibration_batches": 1, "backend": backend}


def make_objective(provider: str, images: Tensor, width: float = 1.0, **options: Any) -> Objective:
    """Return the trainer's objective with its defaults; eager and torch.compile use plain PyTorch's feature loss."""
    torch.manual_seed(0)
    student = YOLOv3Tiny(num_classes=80, width=width)
    if provider == ALONE:
        return Objective(student).to(images.device, memory_format=torch.channels_last)
    teacher = YOLOv3(num_classes=80, width=width)
    # a step in plain PyTorch runs the teacher without folded batch norms
    fold = {"fold_teacher": provider == "fastkd"}
    objective = Objective(student, teacher, prior="graded_iou", **options_of(provider), **fold, **options)
    assert objective.distiller is not None
    objective.distiller.prepare(images.cpu())  # makes the adapters, before the layout is changed
    for module in (objective, teacher):
        module.to(images.device, memory_format=torch.channels_last)
    objective.distiller.criterion.__class__ = kind_of(provider)
    return objective


def make_step(objective: Objective, images: Tensor, autocast: bool = False) -> Callable[[], None]:
    """Return a training step; with ``autocast`` it computes in bfloat16."""
    device = images.device.type
    targets = random_targets(len(images), images.shape[2], device)
    optimizer = torch.optim.SGD(objective.parameters(), lr=1e-4, momentum=0.9)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            loss, _ = objective(images, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def loss_alone(objective: Objective, images: Tensor, rounds: int) -> dict[str, list[float]]:
    """Return the milliseconds of prior, loss and gradient alone, on this model's features after the adapters.

    Caches are cold, as in a training step; all providers are timed in the same rounds.
    """
    student, teacher, heads = caught_features(objective, images)
    prior = objective.prior_of(images, random_targets(len(images), images.shape[2]))
    sizes, task = [(t.shape[2], t.shape[3]) for t in teacher], FallingTask()
    criteria = {
        provider: kind_of(provider)(adapters=[nn.Identity() for _ in student], weight="auto", **options_of(provider))
        for provider in PROVIDERS
        if provider != ALONE
    }
    times: dict[str, list[float]] = {provider: [] for provider in criteria}
    swept = torch.empty(CACHES // 4)
    for _ in range(WARM_UP + rounds):
        for provider, criterion in criteria.items():
            swept.add_(1)
            value = task.fall()
            times[provider].append(
                milliseconds(
                    lambda c=criterion, v=value: torch.autograd.grad(
                        c(student, teacher, prior(heads, sizes), v), student
                    )
                )
            )
    return {provider: found[WARM_UP:] for provider, found in times.items()}


def caught_features(objective: Objective, images: Tensor) -> tuple[list[Tensor], list[Tensor], Any]:
    """Return the student's features after the adapters, the teacher's features, and the outputs of its heads."""
    distiller, caught = objective.distiller, []
    assert distiller is not None

    def catch(_: nn.Module, features: Any, more: Any) -> None:
        caught.append([[x.clone() for x in level] for level in features[:2]])  # the teacher's are donated

    handle = distiller.criterion.register_forward_pre_hook(catch, with_kwargs=True)
    targets = random_targets(len(images), images.shape[2])
    with torch.no_grad():
        distiller.student(images)
        distiller.loss(images, objective.prior_of(images, targets), 1.0)
        handle.remove()
        ((student, teacher),) = caught
        return [x.requires_grad_() for x in distiller.criterion.adapted(student)], teacher, distiller.teacher(images)


@pytest.mark.parametrize("batch", ROUNDS)
def test_training_step(batch: int, benchmark: Any, request: pytest.FixtureRequest) -> None:
    torch._dynamo.reset()
    count = request.config.getoption("--rounds") or ROUNDS[batch]
    images = random_images(batch, 416)
    objectives = {provider: make_objective(provider, images) for provider in PROVIDERS}
    contenders = [Contender(provider, make_step(x, images)) for provider, x in objectives.items()]
    for contender in contenders:
        contender.measure()  # the second step compiles again, as only it has a factor
    compete(benchmark, contenders, lambda _: count)
    alone = loss_alone(objectives["fastkd"], images, 2 * count)
    steps = [{**c.measured(), "loss_ms": alone.get(c.provider, [])} for c in contenders]
    benchmark.extra_info.update(kind="training", batch=batch, steps=steps)
