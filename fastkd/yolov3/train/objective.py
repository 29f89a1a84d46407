"""The objective that a training step minimises: the detection loss and, with a teacher, the distillation loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from fastkd import priors
from fastkd.distiller import Distiller, Prior
from fastkd.ops.arguments import require_known
from fastkd.yolov3.boxes import likely_boxes
from fastkd.yolov3.loss import DetectionLoss
from fastkd.yolov3.model import Detector


class PriorContext(NamedTuple):
    """The inputs of a prior, for one batch."""

    images: Tensor  # (N, 3, H, W), those without labels last
    labelled: int  # number of images with labels
    targets: Tensor  # (M, 6) as ``DetectionLoss`` takes them
    outputs: Sequence[Tensor]  # outputs of the teacher's heads, on the images that it saw
    first: int  # index of the first image that the teacher saw
    sizes: list[tuple[int, int]]  # (height, width) of each level
    teacher: Detector
    distiller: Distiller

    @property
    def image_size(self) -> tuple[int, int]:
        return self.images.shape[2], self.images.shape[3]

    @property
    def boxes(self) -> Tensor:
        """Image index and corners, (M, 5), as ``fastkd.priors`` takes them.

        The boxes of images without labels are those that the teacher detects.
        """
        labels = torch.cat([self.targets[:, :1], self.targets[:, 2:]], 1)  # an index list would wait for the device
        if self.labelled == len(self.images):
            return labels
        known = max(self.labelled - self.first, 0)  # images with labels among those that the teacher saw
        if known >= len(self.outputs[0]):
            return labels
        found = likely_boxes([x[known:] for x in self.outputs], self.teacher)
        found[:, 0] += self.first + known
        return torch.cat([labels, found.to(labels)])

    @property
    def own_heads(self) -> list[int]:
        """For each level, the index of the teacher's head with the nearest stride."""
        return [_nearest(self.teacher.strides, self.image_size[0] / height) for height, _ in self.sizes]

    @property
    def anchors(self) -> list[Tensor]:
        """For each level, the anchors (A, 2) of the teacher's head with the nearest stride."""
        return [self.teacher.anchors[head] for head in self.own_heads]

    @property
    def logits(self) -> tuple[list[Tensor], list[Tensor]]:
        """The logits of the teacher's heads: objectness, each (n, A, H, W), and classes, each (n, A, K, H, W)."""
        anchors = self.teacher.anchors.shape[1]
        heads = [x.view(len(x), anchors, -1, *x.shape[2:]) for x in self.outputs]
        return [x[:, :, 4] for x in heads], [x[:, :, 5:] for x in heads]


LevelPriors: TypeAlias = Sequence[Tensor | None]


def _confidence(context: PriorContext) -> LevelPriors:
    return priors.confidence(*context.logits, context.sizes)


def _score(context: PriorContext) -> LevelPriors:
    objectness, classes = ([of_head[i] for i in context.own_heads] for of_head in context.logits)
    return priors.score(classes, context.sizes, objectness=objectness)


def _iou_mask(context: PriorContext, graded: bool = False) -> LevelPriors:
    boxes, anchors, count = context.boxes, context.anchors, len(context.images)
    return priors.iou_mask(boxes, anchors, context.sizes, context.image_size, count, graded=graded)


def _graded_iou(context: PriorContext) -> LevelPriors:
    return _iou_mask(context, graded=True)


def _box_balance(context: PriorContext) -> LevelPriors:
    return priors.box_balance(context.boxes, context.sizes, context.image_size, len(context.images))


def _none(context: PriorContext) -> LevelPriors:
    return [None] * len(context.sizes)


# the trainer's priors by name, see ``fastkd.priors``
PRIORS: dict[str, Callable[[PriorContext], LevelPriors]] = {
    "score": _score,
    "confidence": _confidence,
    "iou_mask": _iou_mask,
    "graded_iou": _graded_iou,
    "box_balance": _box_balance,
    "none": _none,
}


OF_BOXES = {"iou_mask", "graded_iou", "box_balance", "none"}  # priors that use only boxes, not the teacher's outputs

# the prior of each map that needs one
_USUAL = {"score": "score", "fgfi": "iou_mask", "graded_iou": "graded_iou"}


def usual_prior(info_map: str) -> str:
    """Return the prior that an information map needs; ``"none"`` if it needs none."""
    return _USUAL.get(info_map, "none")


class Objective(nn.Module):
    """Student, adapters and losses in one module, so that one ``DistributedDataParallel`` averages all gradients.

    Args:
        student: trained in place.
        teacher: frozen; None to train without distillation.
        distill_weight: factor of the feature term, or ``"auto"``: see ``fastkd.DistillLoss``, ``weight``.
        match_threshold: see ``DetectionLoss``.
        prior: further weights of the cells, one of ``PRIORS``, see the functions of ``fastkd.priors``. ``"score"`` and
            ``"confidence"`` are computed from the teacher's outputs: the scores of the head of each level, or the
            square root of the largest score of all heads with a lower bound. ``"iou_mask"``, ``"graded_iou"`` and
            ``"box_balance"`` are computed from boxes and the teacher's anchors; the boxes of images without labels are
            those that the teacher detects. ``"none"``: no prior.
        **loss_options: options of ``fastkd.DistillLoss`` and ``fastkd.Distiller``: ``info_map``, ``penalty``,
            ``warmup_steps``, ...

    Raises:
        ValueError: the prior is unknown, teacher and student have different numbers of classes, or what ``Distiller``
            raises.
    """

    distill_terms: tuple[str, ...] = ("distill",)  # names of the terms that ``_distill`` returns

    def __init__(
        self,
        student: Detector,
        teacher: Detector | None = None,
        *,
        distill_weight: float | str = "auto",
        match_threshold: float = 0.5,
        prior: str = "none",
        **loss_options: Any,
    ) -> None:
        super().__init__()
        self.student = student
        self.detection = DetectionLoss(student, match_threshold=match_threshold)
        require_known("prior", prior, list(PRIORS))
        self.prior = prior
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
            weight=distill_weight,
            **{"fold_teacher": True, **loss_options},
        )
        self._teacher = (teacher,)  # in a tuple it is not registered as a submodule

    @property
    def terms(self) -> list[str]:
        """Names of the terms that ``forward`` reports, in their order."""
        names = ["loss", "box", "objectness", "class"]
        if self.distiller is not None:
            names += [*self.distill_terms, *(f"distill/{student}" for student, _ in self.distiller.levels or [])]
        return names

    def forward(self, images: Tensor, targets: Tensor, unlabelled: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the loss of a batch and its terms.

        Args:
            images: (N, 3, H, W) float, 0..1.
            targets: (M, 6) as ``DetectionLoss`` takes them.
            unlabelled: (U, 3, H, W) float, 0..1: images that only the distillation loss uses; they share one forward
                with the others.

        Returns:
            The scalar to differentiate, and the values of ``terms`` as one detached vector, without synchronisation
            with the device. All terms are weighted as in the sum, except those of single levels.
        """
        labelled = len(images)
        images = images if unlabelled is None else torch.cat([images, unlabelled])
        outputs = self.student(images)
        loss, parts = self.detection([x[:labelled] for x in outputs], targets)
        report = list(parts.values())
        levels = loss.new_zeros(0)
        if self.distiller is not None:
            terms = self._distill(outputs, images, self.prior_of(images, targets, labelled), loss)
            for term in terms:
                loss, report = loss + term, [*report, term.detach()]
            levels = self.distiller.criterion.level_losses
        return loss, torch.cat([torch.stack([loss.detach(), *report]), levels.to(loss)])

    def _distill(self, outputs: Sequence[Tensor], images: Tensor, prior: Prior, task: Tensor) -> list[Tensor]:
        """Return the distillation terms of the loss; ``outputs`` are the student's."""
        assert self.distiller is not None
        return [self.distiller.loss(images, prior, task)]

    def prior_of(self, images: Tensor, targets: Tensor, labelled: int | None = None) -> Prior:
        """Return the prior of a batch, as ``Distiller.loss``, ``maps`` and ``check`` take it.

        Args:
            images, targets: as for ``forward``.
            labelled: number of images with labels, which come first; None: all.
        """
        (teacher,), distiller, known = self._teacher, self.distiller, len(images) if labelled is None else labelled
        assert distiller is not None

        def prior(outputs: Sequence[Tensor], sizes: list[tuple[int, int]]) -> LevelPriors:
            first = distiller.taught.start or 0
            return PRIORS[self.prior](PriorContext(images, known, targets, outputs, first, sizes, teacher, distiller))

        # without outputs of the teacher in the prior, the teacher can stop at its last level
        return partial(prior, ()) if self.prior in OF_BOXES and known == len(images) else prior


def _nearest(strides: Sequence[int], stride: float) -> int:
    """Return the index of the nearest stride, on a logarithmic scale."""
    return min(range(len(strides)), key=lambda i: abs(math.log(strides[i] / stride)))
