"""Distillation of the heads: matching by stride, where it has weight, and the value of its loss."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastkd.yolov3 import YOLOv3, YOLOv3Tiny
from study.logits import LogitObjective, logit_distill_loss


def heads(seed: int, strides: tuple[int, ...], classes: int = 3, images: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(images, 3 * (5 + classes), 64 // stride, 96 // stride) for stride in strides]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


STUDENT, TEACHER = (16, 32), (8, 16, 32)


def test_the_loss_is_the_objectness_scaled_formula() -> None:
    (s,), (t,) = heads(0, (16,)), heads(1, (16,))
    a, b = s.unflatten(1, (3, 8)).unbind(2), t.unflatten(1, (3, 8)).unbind(2)
    expected = s.new_zeros(())
    for i in (0, 1, 5, 6, 7):
        cross = F.binary_cross_entropy_with_logits(a[i], b[i].sigmoid(), reduction="none")
        floor = F.binary_cross_entropy(b[i].sigmoid(), b[i].sigmoid(), reduction="none")
        expected = expected + (b[4].sigmoid() * (cross - floor)).sum()
    for i in (2, 3):
        expected = expected + (b[4].sigmoid() * (a[i] - b[i]).abs()).sum()
    cross = F.binary_cross_entropy_with_logits(a[4], b[4].sigmoid(), reduction="sum")
    expected = expected + cross - F.binary_cross_entropy(b[4].sigmoid(), b[4].sigmoid(), reduction="sum")
    torch.testing.assert_close(logit_distill_loss([s], [t], (16,), (16,), 3), expected / 2)


def test_equal_outputs_cost_nothing_and_others_cost_something() -> None:
    student, teacher = heads(0, STUDENT), heads(1, STUDENT)
    assert logit_distill_loss(student, student, STUDENT, STUDENT, 3).item() == pytest.approx(0, abs=1e-9)
    assert logit_distill_loss(student, teacher, STUDENT, STUDENT, 3).item() > 1


def test_heads_are_matched_by_stride_and_the_rest_left_out() -> None:
    student, teacher = heads(0, STUDENT), heads(1, TEACHER)
    loss = logit_distill_loss(student, teacher, STUDENT, TEACHER, 3)
    torch.testing.assert_close(loss, logit_distill_loss(student, teacher[1:], STUDENT, STUDENT, 3))
    swapped = logit_distill_loss(student[::-1], teacher, STUDENT[::-1], TEACHER, 3)
    torch.testing.assert_close(loss, swapped)


def test_gradient_reaches_the_student_alone_and_is_right() -> None:
    student, teacher = heads(0, STUDENT, images=1), heads(1, TEACHER, images=1)
    logit_distill_loss(student, teacher, STUDENT, TEACHER, 3).backward()
    assert all(o.grad is not None and bool(o.grad.any()) for o in student)
    assert all(o.grad is None for o in teacher)
    frozen = [o.detach() for o in teacher]
    assert torch.autograd.gradcheck(lambda *o: logit_distill_loss(o, frozen, STUDENT, TEACHER, 3), student)


def test_where_the_teacher_sees_no_object_only_objectness_is_taught() -> None:
    (s,), (t,) = heads(0, (16,)), heads(1, (16,))
    blind = t.detach().clone()
    blind.unflatten(1, (3, 8))[:, :, 4] = -60
    logit_distill_loss([s], [blind], (16,), (16,), 3).backward()
    assert s.grad is not None
    cells = s.grad.unflatten(1, (3, 8))
    assert bool((cells[:, :, 4] > 0).all())
    assert float(cells[:, :, [0, 1, 2, 3, 5, 6, 7]].abs().max()) < 1e-20


def test_with_anchors_sizes_are_compared_in_pixels() -> None:
    (s,) = heads(0, (16,))
    student_anchors, teacher_anchors = torch.full((1, 3, 2), 10.0), torch.full((1, 3, 2), 20.0)
    t = s.detach().clone()
    t.unflatten(1, (3, 8))[:, :, 2:4] -= math.log(2)
    anchors = {"student_anchors": student_anchors, "teacher_anchors": teacher_anchors}
    assert logit_distill_loss([s], [t], (16,), (16,), 3, **anchors).item() == pytest.approx(0, abs=1e-4)
    assert logit_distill_loss([s], [t], (16,), (16,), 3).item() > 1


def test_half_precision_is_computed_in_float32_under_autocast() -> None:
    student = [o.detach().bfloat16() for o in heads(0, STUDENT)]
    teacher = [o.detach().half() for o in heads(1, TEACHER)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = logit_distill_loss(student, teacher, STUDENT, TEACHER, 3)
    assert loss.dtype == torch.float32
    wide = logit_distill_loss([o.float() for o in student], [o.float() for o in teacher], STUDENT, TEACHER, 3)
    torch.testing.assert_close(loss, wide)


def test_extreme_outputs_stay_finite() -> None:
    student = [(o.detach() * 1e4).requires_grad_() for o in heads(0, STUDENT)]
    loss = logit_distill_loss(student, [o * 1e4 for o in heads(1, TEACHER)], STUDENT, TEACHER, 3)
    loss.backward()
    assert math.isfinite(loss.item())
    assert all(bool(o.grad.isfinite().all()) for o in student if o.grad is not None)


def test_it_fits_the_two_detectors() -> None:
    student, teacher = YOLOv3Tiny(4, 0.125), YOLOv3(4, 0.125).eval()
    images = torch.rand(2, 3, 64, 64)
    loss = logit_distill_loss(student(images), teacher(images), student.strides, teacher.strides, 4)
    loss.backward()
    assert student.head16.weight.grad is not None


@pytest.mark.parametrize(
    ("student", "teacher", "strides", "classes", "message"),
    [
        (
            heads(0, (16,)),
            heads(0, (8,)),
            ((16,), (8,)),
            3,
            "expected a stride that the teacher has too",
        ),
        (heads(0, (16,), 3), heads(0, (16,), 4), ((16,), (16,)), 3, "heads at stride 16: expected .* one shape"),
        (heads(0, (16,), 3), heads(0, (16,), 3), ((16,), (16,)), 4, r"A \* \(5 \+ 4\) channels for num_classes=4"),
        (heads(0, (16,)), heads(0, (16,)), ((16, 32), (16,)), 3, "student_outputs: expected one map.*got 1 maps"),
        (heads(0, (16,)), heads(0, (16,)), ((16,), (16, 32)), 3, "teacher_outputs: expected one map.*got 1 maps"),
    ],
)
def test_heads_that_do_not_match_are_refused(
    student: list[Tensor],
    teacher: list[Tensor],
    strides: tuple[tuple[int, ...], tuple[int, ...]],
    classes: int,
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        logit_distill_loss(student, teacher, *strides, classes)


def test_the_objective_adds_the_term_until_distillation_stops() -> None:
    torch.manual_seed(0)
    student, teacher = YOLOv3Tiny(4, 0.125), YOLOv3(4, 0.125)
    objective = LogitObjective(student, teacher, logit_weight=0.5, prior="graded_iou", stop_step=6, decay="linear")
    images, targets = torch.rand(2, 3, 64, 64), torch.tensor([[0, 1, 8, 8, 40, 40.0]])
    objective.distiller.prepare(images)  # type: ignore[union-attr]
    found = []
    for _ in range(7):
        loss, values = objective(images, targets)
        found.append(dict(zip(objective.terms, values.tolist(), strict=True)))
        parts = sum(found[-1][name] for name in ("box", "objectness", "class", "distill", "logit"))
        assert parts == pytest.approx(loss.item(), rel=1e-5)
    assert all(terms["logit"] > 0 for terms in found[:6])
    assert found[5]["logit"] < 0.4 * found[0]["logit"]  # a sixth of its weight, at its last step
    assert found[6]["logit"] == found[6]["distill"] == 0
