"""What one training step minimises: the detection loss, and with a teacher the distillation terms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastkd import priors
from fastkd.distiller import Distiller
from fastkd.yolov3.checkpoint import Detector
from fastkd.yolov3.logits import logit_distill_loss
from fastkd.yolov3.loss import DetectionLoss


class Objective(nn.Module):
    """Student, adapters and losses in one module, so that one ``DistributedDataParallel`` averages all gradients.

    Args:
        student: trained in place.
        teacher: frozen; None to train without distillation.
        distill_weight: factor of the feature term, or ``"auto"``: see ``fastkd.DistillLoss``, ``weight``.
        logit_weight: factor of the term on the heads' outputs (``logit_distill_loss``).
        match_threshold: see ``DetectionLoss``.
        confidence_prior: weight cells by the teacher's own confidence (``fastkd.priors.confidence``).
        **loss_options: of ``fastkd.DistillLoss``: ``info_map``, ``penalty``, ``warmup_steps``, ...

    Raises:
        ValueError: teacher and student have different numbers of classes; what ``Distiller`` raises.
    """

    def __init__(
        self,
        student: Detector,
        teacher: Detector | None = None,
        *,
        distill_weight: float | str = "auto",
        logit_weight: float = 0.0,
        match_threshold: float = 0.5,
        confidence_prior: bool = True,
        **loss_options: Any,
    ) -> None:
        super().__init__()
        self.student = student
        self.detection = DetectionLoss(student, match_threshold=match_threshold)
        self.logit_weight = logit_weight
        self.confidence_prior = confidence_prior
        self.distiller: Distiller | None = None
        if teacher is None:
            return
        if teacher.num_classes != student.num_classes:
            raise ValueError(
                f"teacher: expected the student's {student.num_classes} classes, got {teacher.num_classes}; "
                "train a teacher on the same classes"
            )
        self.distiller = Distiller(
            student,
            teacher,
            backbone=(list(student.backbone_levels), list(teacher.backbone_levels)),
            neck=(list(student.neck_levels), list(teacher.neck_levels)),
            prior=self._prior,
            weight=distill_weight,
            **{"reuse_teacher_memory": True, **loss_options},  # nobody reads the teacher's features after the loss
        )
        self._teacher = (teacher,)  # in a tuple it is not registered as a submodule
        self._teacher_outputs: Sequence[Tensor] = ()

    @property
    def terms(self) -> list[str]:
        """Names of what ``forward`` reports, in its order."""
        names = ["loss", "box", "objectness", "class"]
        if self.distiller is not None:
            names += ["distill"] + ["logit"] * (self.logit_weight > 0)
            names += [f"distill/{student}" for student, _ in self.distiller.levels or []]
        return names

    def forward(self, images: Tensor, targets: Tensor, unlabelled: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Loss of a batch.

        Args:
            images: (N, 3, H, W) float, 0..1.
            targets: (M, 6) as ``DetectionLoss`` takes them.
            unlabelled: (U, 3, H, W) float, 0..1: images that only the teacher explains, in one forward with the others.

        Returns:
            The scalar to differentiate, and ``terms`` as one detached vector, without a host sync. Terms are weighted
            as they stand in the sum, except those of single levels.
        """
        labelled = len(images)
        images = images if unlabelled is None else torch.cat([images, unlabelled])
        outputs = self.student(images)
        loss, parts = self.detection([x[:labelled] for x in outputs], targets)
        report = list(parts.values())
        levels = loss.new_zeros(0)
        if self.distiller is not None:
            self._teacher_outputs = ()  # whoever ran the teacher since the last step, for maps say, left its own
            distill = self.distiller.loss(images, task_loss=loss)
            loss, report = loss + distill, [*report, distill.detach()]
            levels = self.distiller.criterion.level_losses
            if self.logit_weight:
                # no outputs: distillation has stopped, and the teacher rests
                logit = self.logit_weight * self._logit_loss(outputs) if self._teacher_outputs else loss.new_zeros(())
                loss, report = loss + logit, [*report, logit.detach()]
            self._teacher_outputs = ()
        return loss, torch.cat([torch.stack([loss.detach(), *report]), levels.to(loss)])

    def _prior(self, outputs: Sequence[Tensor], sizes: list[tuple[int, int]]) -> Sequence[Tensor | None]:
        """The teacher's confidence; its outputs are kept for the logit term, so that it runs once a step."""
        self._teacher_outputs = outputs
        if not self.confidence_prior:
            return [None] * len(sizes)
        (teacher,) = self._teacher
        heads = [x.view(len(x), teacher.anchors.shape[1], 5 + teacher.num_classes, *x.shape[2:]) for x in outputs]
        return priors.confidence([x[:, :, 4] for x in heads], [x[:, :, 5:] for x in heads], sizes)

    def _logit_loss(self, outputs: Sequence[Tensor]) -> Tensor:
        (teacher,) = self._teacher
        return logit_distill_loss(
            outputs,
            self._teacher_outputs,
            self.student.strides,
            teacher.strides,
            teacher.num_classes,
            student_anchors=self.student.anchors,
            teacher_anchors=teacher.anchors,
        )
