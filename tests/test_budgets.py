"""Limits for the cost of a step: its memory, and its operations, each of which is a launch on a GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from samples import allocated, levels, loss_of, on_every_target, with_bias
from torch import Tensor, nn
from workloads import Dispatched

import fastkd
from fastkd import DistillLoss
from fastkd.yolov3 import YOLOv3, YOLOv3Tiny
from fastkd.yolov3.train.objective import Objective

SIX = [(1, 8, 4, 4)] * 6
WIDE = [(2, 64, 26, 26), (2, 128, 13, 13)]


def operations(run: Callable[[], Any]) -> Counter[str]:
    """Count the operations of a second run, as the first one makes plans that are kept."""
    run()
    with Dispatched() as dispatched:
        run()
    return dispatched.names


# ---- operations


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("info_map", ["graded_iou", "self_information"])
@on_every_target
def test_the_function_takes_four_operations(backend: str, info_map: str, reduction: str) -> None:
    sample = levels(shapes=SIX)
    upstream = None if reduction == "sum" else torch.ones(6)

    def step() -> None:
        loss = fastkd.distill_loss(**sample, info_map=info_map, reduction=reduction, backend=backend)
        torch.autograd.grad(loss, sample["student_feats"], upstream)

    assert sum(operations(step).values()) <= 4


@pytest.mark.parametrize("schedule", [{}, {"warmup_steps": 9, "decay": "cosine", "stop_step": 99}])
@pytest.mark.parametrize("info_map", ["graded_iou", "self_information"])
@on_every_target
def test_the_module_takes_twelve_operations(backend: str, info_map: str, schedule: dict[str, Any]) -> None:
    sample = levels(shapes=SIX)
    student, teacher, prior = sample["student_feats"], sample["teacher_feats"], sample["prior"]
    options: dict[str, Any] = {"info_map": info_map, "weight": "auto", "calibration_batches": 1, **schedule}
    criterion = DistillLoss(adapters=[nn.Identity() for _ in SIX], backend=backend, **options)
    criterion.to(student[0].device)
    task_loss = torch.tensor(2.0)
    found = operations(lambda: torch.autograd.grad(criterion(student, teacher, prior, task_loss), student))
    assert sum(found.values()) <= 12


def test_the_trainers_distillation_takes_25_operations() -> None:
    """Operations of student, task loss, teacher and the adapters' convolutions are not counted."""
    torch.manual_seed(0)
    student, teacher = YOLOv3Tiny(num_classes=10, width=0.25), YOLOv3(num_classes=10, width=0.25)
    images, targets = torch.rand(2, 3, 64, 64), torch.tensor([[0, 3, 10, 10, 40, 50.0], [1, 2, 5, 5, 30, 20]])
    with_teacher = Objective(student, teacher, info_map="graded_iou", prior="graded_iou", calibration_batches=1)
    assert with_teacher.distiller is not None
    adapters = with_teacher.distiller.prepare(images).criterion.adapters
    inputs = [torch.rand(2, x.in_channels, 2, 2).bfloat16().requires_grad_() for x in adapters]
    gradients = [torch.rand(2, x.out_channels, 2, 2).bfloat16() for x in adapters]

    def step(objective: Objective) -> None:
        for p in objective.parameters():
            p.grad = None
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = objective(images, targets)
        loss.backward()

    def teach() -> None:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            teacher(images)

    def adapt() -> None:
        for adapter, x, gradient in zip(adapters, inputs, gradients, strict=True):
            with torch.autocast("cpu", torch.bfloat16):
                feature = adapter(x)
            torch.autograd.grad(feature, [x, adapter.weight], gradient)

    added = operations(lambda: step(with_teacher))
    for part in (lambda: step(Objective(student)), teach, adapt):
        added.subtract(operations(part))
    assert 0 < sum(added.values()) <= 25, {name: n for name, n in added.items() if n}


# ---- memory


def size(sample: dict[str, Any]) -> tuple[int, int]:
    """Return the bytes of one unit, all student features, and the allowed bytes for values per cell and channel."""
    student = sample["student_feats"]
    cells = sum(x.shape[0] * x.shape[2] * x.shape[3] for x in student)
    return sum(x.nbytes for x in student), 2 * 4 * cells + 16384


@pytest.mark.parametrize("info_map", ["attention", "graded_iou"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_allocates_the_gradient_and_no_other_tensor_of_its_size(dtype: torch.dtype, info_map: str) -> None:
    plain = levels(dtype, "channels_last", shapes=WIDE)
    unit, little = size(plain)
    # in two passes, PyTorch sums the gradient of a bias, and on a CPU converts its input
    for one_pass, sample in ((True, with_bias(plain)), (False, plain)):
        chosen = partial(loss_of, sample, info_map=info_map, backend="cpp", one_pass=one_pass)
        forward, loss = allocated(lambda run=chosen: 3 * run())
        backward, _ = allocated(partial(torch.autograd.grad, loss, sample["student_feats"]))
        larger, smaller = (forward, backward) if one_pass else (backward, forward)
        assert unit <= larger <= unit + little
        assert smaller <= little


def test_donated_features_hold_the_gradient_and_nothing_is_donated_by_default() -> None:
    sample = levels(shapes=WIDE)
    student, teacher = sample["student_feats"], sample["teacher_feats"]
    before = [t.clone() for t in teacher]
    criterion = DistillLoss(adapters=[nn.Identity()] * 2, weight=0.5, backend="cpp", info_map="energy")

    def step(donated: list[bool]) -> list[Tensor]:
        return list(torch.autograd.grad(3 * criterion(student, teacher, donated=donated), student))

    expected = step([])
    assert all(torch.equal(x, t) for x, t in zip(before, teacher, strict=True))
    taken, got = allocated(lambda: step([True, True]))
    assert taken <= size(sample)[1]
    assert [x.data_ptr() for x in got] == [t.data_ptr() for t in teacher]
    torch.testing.assert_close(got, expected)


def test_a_donation_that_cannot_be_used_leaves_the_teacher_as_it_is() -> None:
    sample = levels(shapes=[(2, 4, 3, 3)])
    (student,), (teacher,) = sample["student_feats"], sample["teacher_feats"]
    criterion = DistillLoss(adapters=[nn.Identity()], backend="cpp", info_map="energy")
    with torch.inference_mode():
        inference = teacher.clone()
    for s, t in (
        (student, teacher.double()),
        (student, inference),
        (student, teacher[:1].expand(2, -1, -1, -1)),  # the teacher's images share one memory
        (student.detach().half().requires_grad_(), teacher.half()),  # takes two passes
    ):
        before = t.clone()
        (got,) = torch.autograd.grad(criterion([s], [t], donated=[True]), s)
        assert torch.equal(t, before)
        torch.testing.assert_close(got, torch.autograd.grad(criterion([s], [t]), s)[0])
    before = teacher.clone()
    with torch.no_grad():
        criterion([student], [teacher], donated=[True])
    assert torch.equal(teacher, before)


def test_a_donation_outlives_a_graph_that_is_kept() -> None:
    sample = levels(shapes=[(2, 4, 3, 3)])
    (student,), (teacher,) = sample["student_feats"], sample["teacher_feats"]
    criterion = DistillLoss(adapters=[nn.Identity()], backend="cpp", info_map="energy")
    (expected,) = torch.autograd.grad(criterion([student], [teacher]), student)
    loss = criterion([student], [teacher], donated=[True])
    for g in (2.0, 3.0):
        (got,) = torch.autograd.grad(g * loss, student, retain_graph=g < 3)
        torch.testing.assert_close(got, g * expected)
