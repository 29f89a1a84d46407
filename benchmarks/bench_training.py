"""A whole training step, YOLOv3 teaches YOLOv3-tiny, without and with each loss, by pytest-benchmark.

    python -m pytest benchmarks/bench_training.py --benchmark-json=training.json

At 416 px, 80 classes, random weights and boxes: student forward, detection loss, teacher forward, distillation of
backbone and neck through 1x1 adapters, backward, SGD. ``extra_info`` has what map, loss and gradient take by
themselves, on the features of that step after the adapters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bench_loss import milliseconds
from torch import Tensor, nn

from fastkd import Distiller, DistillLoss
from fastkd.yolov3 import DetectionLoss, YOLOv3, YOLOv3Tiny

BATCHES = (1, 4)
PROVIDERS = ("no teacher", "fastkd", "eager", "torch.compile")
ROUNDS = 5
CACHES = 1 << 28  # bytes, more than any holds


def random_targets(batch: int, boxes: int = 8) -> Tensor:
    """(M, 6) as ``DetectionLoss`` takes them."""
    g = torch.Generator().manual_seed(0)
    image = torch.arange(batch).repeat_interleave(boxes)[:, None].float()
    label = torch.randint(80, (batch * boxes, 1), generator=g).float()
    centre, size = (torch.rand(batch * boxes, 2, generator=g) * f + o for f, o in ((0.6, 0.2), (0.25, 0.05)))
    return torch.cat([image, label, centre, size], 1)


def make_step(provider: str, images: Tensor) -> tuple[Callable[[], None], Distiller | None]:
    torch.manual_seed(0)
    student, teacher = YOLOv3Tiny(num_classes=80), YOLOv3(num_classes=80).eval().requires_grad_(False)
    detection, targets = DetectionLoss(student), random_targets(len(images))
    distiller, parameters = None, list(student.parameters())
    if provider != "no teacher":
        levels = {
            "backbone": (list(student.backbone_levels), list(teacher.backbone_levels)),
            "neck": (list(student.neck_levels), list(teacher.neck_levels)),
        }
        backend = None if provider == "fastkd" else "reference"
        options = {"backend": backend, "reuse_teacher_memory": provider == "fastkd", "calibration_batches": 1}
        distiller = Distiller(student, teacher, **levels, **options)
        distiller.prepare(images)
        parameters += list(distiller.parameters())
        if provider == "torch.compile":
            distiller.criterion.compile(dynamic=False)
    optimizer = torch.optim.SGD(parameters, lr=1e-4, momentum=0.9)

    def step() -> None:
        loss, _ = detection(student(images), targets)
        if distiller is not None:
            loss = loss + distiller.loss(images)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, distiller


def loss_alone(distiller: Distiller, images: Tensor, compiled: bool) -> list[float]:
    """Milliseconds of map, loss and gradient by themselves, on this model's features after the adapters.

    From cold caches, as the rest of the step leaves them.
    """
    caught: list[Any] = []
    hook = distiller.criterion.register_forward_pre_hook(lambda _, args: caught.append(args))
    with torch.no_grad():
        distiller.student(images)
        distiller.loss(images)
        hook.remove()
        student, teacher, _ = caught[0]
        adapters = list(distiller.criterion.adapters)
        student = [adapter(s).requires_grad_() for adapter, s in zip(adapters, student, strict=True)]
    reuses = distiller.criterion.reuse_teacher_memory
    options = {"backend": distiller.criterion.backend, "reuse_teacher_memory": reuses, "calibration_batches": 1}
    criterion = DistillLoss(adapters=[nn.Identity() for _ in student], **options)
    if compiled:
        criterion.compile(dynamic=False)
    times, swept = [], torch.empty(CACHES // 4)
    for _ in range(16):
        own = [t.clone() for t in teacher] if reuses else teacher
        swept.add_(1)
        times.append(milliseconds(lambda own=own: torch.autograd.grad(criterion(student, own), student)))
    return times[4:]  # the first calibrate and warm up


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_training_step(provider: str, batch: int, benchmark: Any) -> None:
    torch._dynamo.reset()
    images = torch.rand(batch, 3, 416, 416, generator=torch.Generator().manual_seed(1))
    step, distiller = make_step(provider, images)
    benchmark.pedantic(step, rounds=ROUNDS, warmup_rounds=3)
    alone = [] if distiller is None else loss_alone(distiller, images, provider == "torch.compile")
    benchmark.extra_info.update(training=provider, batch=batch, loss_ms=alone)
