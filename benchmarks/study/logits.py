"""Distillation of the heads' outputs, weighted by the teacher's objectness.

This is a row of the study, in which it made students worse, alone and together with a feature loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastkd.distiller import Prior, takes_output
from fastkd.loss_weight import LossWeight
from fastkd.yolov3.boxes import head_cells, widen
from fastkd.yolov3.train.objective import LevelPriors, Objective


class LogitObjective(Objective):
    """``Objective`` with a teacher and the additional term ``logit_distill_loss`` on the heads' outputs.

    Args:
        logit_weight: factor of the term, which has the warm-up, decay and stop of the feature loss.

    Raises:
        ValueError: the teacher does not run on every image of every step.
    """

    distill_terms = ("distill", "logit")

    def __init__(self, *args: Any, logit_weight: float, **options: Any) -> None:
        super().__init__(*args, **options)
        if options.get("teacher_every", 1) != 1 or options.get("teacher_images", 1) != 1:
            raise ValueError("teacher_every, teacher_images: expected 1 together with the logit term, got other values")
        schedule = {name: options[name] for name in ("warmup_steps", "decay", "stop_step") if name in options}
        self.logit_factor = LossWeight(logit_weight, **schedule)

    def _distill(self, outputs: Sequence[Tensor], images: Tensor, prior: Prior, task: Tensor) -> list[Tensor]:
        found: Sequence[Tensor] = ()

        def see_outputs(of_teacher: Sequence[Tensor], sizes: list[tuple[int, int]]) -> LevelPriors:
            nonlocal found
            found = of_teacher
            return prior(of_teacher, sizes) if takes_output(prior) else prior(sizes)

        assert self.distiller is not None
        factor = self.logit_factor.at(self.distiller.criterion.loss_weight.step)
        terms = super()._distill(outputs, images, see_outputs, task)
        if not found:  # distillation has stopped, so the teacher did not run
            return [*terms, outputs[0].new_zeros(())]
        (teacher,) = self._teacher
        term = logit_distill_loss(
            outputs,
            found,
            self.student.strides,
            teacher.strides,
            teacher.num_classes,
            student_anchors=self.student.anchors,
            teacher_anchors=teacher.anchors,
        )
        return [*terms, factor * term]


def logit_distill_loss(
    student_outputs: Sequence[Tensor],
    teacher_outputs: Sequence[Tensor],
    student_strides: Sequence[int],
    teacher_strides: Sequence[int],
    num_classes: int,
    *,
    student_anchors: Tensor | None = None,
    teacher_anchors: Tensor | None = None,
) -> Tensor:
    """Return the objectness-scaled distillation loss of a detector's outputs.

    The loss is that of Mehta & Ozturk (2018, arXiv:1811.05588, section 3). For each cell and anchor, with w the sigmoid
    of the teacher's objectness, it is the sum of w times cross-entropy on x and y, w times absolute error on log width
    and height, w times cross-entropy per class, and cross-entropy on objectness. Targets are the teacher's sigmoids;
    their entropy is subtracted, so that equal outputs have a loss of 0, with the same gradient. The loss is summed over
    cells and averaged over images, as in ``DetectionLoss``, and computed in float32 or wider, also under autocast.

    Heads are matched by stride; heads with a stride that only one detector has are left out. The n-th anchors of a cell
    are compared, so both detectors should have similar anchors at equal strides.

    Args:
        student_outputs, teacher_outputs: one raw head map per stride, (N, A * (5 + K), H / stride, W / stride).
        student_strides, teacher_strides: strides of those maps.
        num_classes: K, the same for both.
        student_anchors, teacher_anchors: (heads, A, 2) in pixels. If both are given, the logarithms of widths and
            heights in pixels are compared; otherwise, those of the ratios to each detector's own anchors.

    Returns:
        A scalar, whose gradient reaches the student only.

    Raises:
        ValueError: lists have different lengths, no stride is common, or matched heads have different shapes.
    """
    _check_lengths(student_outputs, student_strides, teacher_outputs, teacher_strides)
    common = [stride for stride in student_strides if stride in teacher_strides]
    if not common:
        raise ValueError(
            f"student_strides: expected a stride that the teacher has too, got {tuple(student_strides)} and "
            f"{tuple(teacher_strides)}"
        )
    total = student_outputs[0].new_zeros((), dtype=widen(student_outputs[0]).dtype)
    for stride in common:
        s, t = list(student_strides).index(stride), list(teacher_strides).index(stride)
        _check_pair(student_outputs[s], teacher_outputs[t], stride, num_classes)
        log_ratio = None
        if student_anchors is not None and teacher_anchors is not None:
            log_ratio = (student_anchors[s].to(total) / teacher_anchors[t].to(total)).log()
        total = total + _head_loss(student_outputs[s], teacher_outputs[t], num_classes, log_ratio)
    return total


def _head_loss(student: Tensor, teacher: Tensor, num_classes: int, log_ratio: Tensor | None) -> Tensor:
    with torch.autocast(student.device.type, enabled=False):
        anchors = student.shape[1] // (5 + num_classes)
        s = head_cells(widen(student), anchors)
        t = head_cells(widen(teacher.detach()), anchors).to(s)
        excess = s[..., 2:4] - t[..., 2:4]
        if log_ratio is not None:
            excess = excess + log_ratio[:, None, None]
        where_object = (
            _cross_entropy(s[..., :2], t[..., :2]).sum(-1)
            + excess.abs().sum(-1)
            + _cross_entropy(s[..., 5:], t[..., 5:]).sum(-1)
        )
        objectness = _cross_entropy(s[..., 4], t[..., 4])
        return (t[..., 4].sigmoid() * where_object + objectness).sum() / max(len(s), 1)


def _cross_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the KL divergence of two Bernoulli variables: cross-entropy of the logits minus its minimum."""
    target = teacher.sigmoid()
    cross = F.binary_cross_entropy_with_logits(student, target, reduction="none")
    return cross - F.binary_cross_entropy_with_logits(teacher, target, reduction="none")


def _check_lengths(
    student_outputs: Sequence[Tensor],
    student_strides: Sequence[int],
    teacher_outputs: Sequence[Tensor],
    teacher_strides: Sequence[int],
) -> None:
    for name, outputs, strides in (
        ("student", student_outputs, student_strides),
        ("teacher", teacher_outputs, teacher_strides),
    ):
        if len(outputs) != len(strides):
            raise ValueError(
                f"{name}_outputs: expected one map for each of {name}_strides {tuple(strides)}, got {len(outputs)} maps"
            )


def _check_pair(student: Tensor, teacher: Tensor, stride: int, num_classes: int) -> None:
    if student.shape != teacher.shape or student.ndim != 4:
        raise ValueError(
            f"heads at stride {stride}: expected the student's and the teacher's output to have one shape, got "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}; both detectors need the same images, classes and "
            "number of anchors per cell"
        )
    if student.shape[1] % (5 + num_classes):
        raise ValueError(
            f"heads at stride {stride}: expected A * (5 + {num_classes}) channels for num_classes={num_classes}, "
            f"got {student.shape[1]}"
        )
