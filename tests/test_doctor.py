"""Five ways in which distillation has silently failed, and the answer of the check to each."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastkd
from fastkd.cli import main
from fastkd.yolov3 import YOLOv3, YOLOv3Tiny

BACKBONE = (list(YOLOv3Tiny.backbone_levels), list(YOLOv3.backbone_levels))
NECK = (list(YOLOv3Tiny.neck_levels), list(YOLOv3.neck_levels))


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def pair(images: Tensor) -> tuple[YOLOv3Tiny, YOLOv3]:
    torch.manual_seed(0)
    student, teacher = YOLOv3Tiny(4, 0.125), YOLOv3(4, 0.125)
    with torch.no_grad():
        teacher(images)  # the batch norms are not as initialised
    return student, teacher


def check(images: Tensor, damage: Callable[[fastkd.Distiller], object] = lambda _: None, **options: Any) -> Any:
    student, teacher = pair(images)
    distiller = fastkd.Distiller(student, teacher, **{"backbone": BACKBONE, "neck": NECK, **options})
    with contextlib.suppress(ValueError):  # the check reports levels that do not fit
        distiller.prepare(images)
    damage(distiller)
    optimizer = torch.optim.SGD([*student.parameters(), *distiller.parameters()], 0.1)
    return distiller.check(images, optimizer, task_loss=5.0)


def failed(report: Any) -> dict[str, str]:
    return {x.name: x.message for x in report.checks if x.ok is False}


def test_a_distillation_that_works_passes(images: Tensor) -> None:
    assert check(images).ok


def test_adapters_that_are_in_no_optimizer(images: Tensor) -> None:
    student, teacher = pair(images)
    optimizer = torch.optim.SGD(student.parameters(), 0.1)  # made before the distiller, as in most scripts
    distiller = fastkd.Distiller(student, teacher, backbone=BACKBONE, neck=NECK)
    distiller.prepare(images)
    report = distiller.check(images, optimizer, task_loss=5.0)
    assert list(failed(report)) == ["optimizer"]
    assert "does not train 10 of 10 adapter weights" in failed(report)["optimizer"]
    assert "distiller.add_to(optimizer)" in failed(report)["optimizer"]
    distiller.add_to(optimizer)
    assert distiller.check(images, optimizer, task_loss=5.0).ok


def test_a_teacher_whose_weights_were_never_loaded(images: Tensor) -> None:
    torch.manual_seed(0)
    student, teacher = YOLOv3Tiny(4, 0.125), YOLOv3(4, 0.125)
    report = fastkd.Distiller(student, teacher, backbone=BACKBONE, neck=NECK).check(images)
    assert list(failed(report)) == ["teacher trained"]
    assert "have their initial weights" in failed(report)["teacher trained"]


def test_a_teacher_in_training_mode(images: Tensor) -> None:
    report = check(images, lambda distiller: distiller.teacher.train())
    assert list(failed(report)) == ["teacher frozen"]
    assert "modules in training mode" in failed(report)["teacher frozen"]


class WithSpare(YOLOv3Tiny):
    """A student with a module that its forward does not use."""

    def __init__(self) -> None:
        super().__init__(4, 0.125)
        self.spare = nn.Conv2d(3, 3, 1)


def test_a_hook_on_a_module_that_does_not_run(images: Tensor) -> None:
    distiller = fastkd.Distiller(WithSpare(), pair(images)[1], neck=[("spare", "neck16")])
    assert "student neck[0] 'spare': expected it to run" in failed(distiller.check(images))["hooks"]


def test_a_hook_on_a_module_of_another_stride(images: Tensor) -> None:
    report = check(images, backbone=None, neck=[("neck16", "neck8")])
    assert list(failed(report)) == ["hooks"]
    assert "expected equal height and width" in failed(report)["hooks"]


def test_a_hook_that_no_gradient_reaches(images: Tensor) -> None:
    def freeze(distiller: fastkd.Distiller) -> None:
        for name, parameter in distiller.student.named_parameters():
            parameter.requires_grad_(not name.startswith("conv"))

    report = check(images, freeze, neck=None)
    assert list(failed(report)) == ["gradient"]
    assert "student backbone[0] 'conv8' 0" in failed(report)["gradient"]


@pytest.mark.parametrize(
    ("options", "reported"), [({"weight": 0.0}, "weight is 0"), ({"weights": [0] * 5}, "weights are 0 at every level")]
)
def test_a_loss_weight_of_zero(options: dict[str, Any], reported: str, images: Tensor) -> None:
    report = check(images, **options)
    assert list(failed(report)) == ["loss weight"]
    assert reported in failed(report)["loss weight"]


def test_a_level_that_was_switched_off_is_no_fault(images: Tensor) -> None:
    report = check(images, weights=[0, 1, 1, 1, 1])
    assert report.ok, str(report)
    assert "not zero, except at 1 of 5 levels" in str(report)


def test_the_doctor_prints_the_same_table(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "ok    loss weight      not zero" in printed
