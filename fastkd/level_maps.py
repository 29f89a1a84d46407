"""Information maps to inspect: ``fastkd.info_map``, and the maps per level that ``Distiller.maps`` returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastkd.hooks import FeatureHook
from fastkd.loss import DistillLoss, standardized
from fastkd.ops import reference
from fastkd.ops.arguments import require_number
from fastkd.ops.levels import check, require_features
from fastkd.ops.options import options_of_call
from fastkd.ops.presets import InfoMap, resolve


def info_map(
    teacher_feats: Sequence[Tensor],
    info_map: str | InfoMap = "energy",
    *,
    prior: Sequence[Tensor | None] | None = None,
    standardize: Sequence[tuple[Tensor, Tensor] | None] | str | bool | None = None,
) -> list[Tensor]:
    """Return the information map w_p of every level, to inspect (``fastkd.viz`` draws it).

    Args:
        teacher_feats: one (N, C, H, W) floating tensor per level.
        info_map, prior, standardize: as in ``distill_loss``.

    Returns:
        One (N, H, W) float32 tensor per level, without gradient.

    Raises:
        TypeError, ValueError: as in ``distill_loss``.
    """
    info = replace(resolve(info_map), needs_prior="")
    options = options_of_call(info, None, "l2", 1.0, None, "none", "reference")
    teacher = [t.detach() for t in require_features("teacher_feats", teacher_feats)]
    _, moments = standardized(teacher, teacher, info, standardize)
    checked = check(teacher, teacher, options, prior=prior, standardize=moments)
    return [
        reference.information_map(t, info, q, mean, rstd).float()
        for t, q, mean, rstd in zip(teacher, checked.prior, checked.mean, checked.rstd, strict=True)
    ]


@dataclass(frozen=True, eq=False)
class LevelMaps:
    """The maps and the loss of one level on some images; the loss is ``weight * sum(product) * channels / Z``.

    Attributes:
        student, teacher: module names.
        group: ``"backbone"`` or ``"neck"``.
        stride: image height / map height.
        information: (N, h, w) float32: the weight of each cell in the loss, including prior and map norm.
        difference: (N, h, w) float32: the penalty of adapted student minus standardised teacher, mean over channels.
        channels: number of channels of the teacher.
        loss: the loss of the level on these images, times the weight of the level, as in
            ``DistillLoss.level_losses``; with several processes, of this process's images alone.
    """

    student: str
    teacher: str
    group: str
    stride: float
    information: Tensor
    difference: Tensor
    channels: int
    loss: float

    @property
    def name(self) -> str:
        """The name of the level, for example ``"backbone, stride 8"``."""
        return f"{self.group}, stride {self.stride:.3g}"

    @property
    def product(self) -> Tensor:
        """(N, h, w) float32: ``information * difference``, the part of a cell in the loss, up to common factors."""
        return self.information * self.difference

    def concentration(self, part: float = 0.1) -> float:
        """Return the share of the total weight that the heaviest ``part`` of each image's cells has.

        It is ``part`` if all cells have the same weight, and at most 1.

        Raises:
            ValueError: ``part`` outside [0, 1].
        """
        part = require_number("part", part, "a share in [0, 1]", 0, 1)
        cells = self.information.flatten(1).double().sort(1, descending=True).values
        count = cells.shape[1]
        taken = (part * count - torch.arange(count, device=cells.device)).clamp(0, 1)  # a fraction of the last cell
        return float((cells * taken).sum() / cells.sum().clamp_min(reference.TINY))


@dataclass(frozen=True, eq=False)
class DistillMaps:
    """The result of ``Distiller.maps``: one entry per matched level, backbone first. ``fastkd.viz`` draws it.

    Attributes:
        levels: the levels; each property lists one attribute of all levels.
    """

    levels: tuple[LevelMaps, ...]

    @property
    def names(self) -> list[str]:
        return [x.name for x in self.levels]

    @property
    def information(self) -> list[Tensor]:
        return [x.information for x in self.levels]

    @property
    def differences(self) -> list[Tensor]:
        return [x.difference for x in self.levels]

    @property
    def products(self) -> list[Tensor]:
        return [x.product for x in self.levels]

    @property
    def shares(self) -> list[float]:
        """The share of each level in the sum of the losses; with negative level weights it may be outside [0, 1]."""
        total = sum(x.loss for x in self.levels)
        return [x.loss / total if total else 0.0 for x in self.levels]


def measure(
    criterion: DistillLoss,
    pairs: Sequence[tuple[FeatureHook, FeatureHook]],
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    prior: Sequence[Tensor | None] | None,
    image_height: float,
) -> DistillMaps:
    """Return the maps of each pair's features, computed by the reference, which waits for no other process.

    Args:
        criterion: the ``DistillLoss``.
        pairs: (student, teacher) hooks of each level.
        student, teacher: one (N, C, H, W) feature per level.
        prior: as in ``distill_loss``.
        image_height: height of the images in pixels.
    """
    options = criterion.active_options
    info = options.info_map
    adapted, moments = criterion.standardized(criterion.adapted(student), teacher)
    given = check(adapted, teacher, options, prior=prior, standardize=moments)
    found = []
    for i, (s, t) in enumerate(pairs):
        feature, target = given.student[i].to(given.plan.dtype), given.teacher[i].to(given.plan.dtype)
        information = reference.information_map(target, info, given.prior[i], given.mean[i], given.rstd[i])
        standardised = reference.standardize(target, given.mean[i], given.rstd[i])
        penalty = reference.penalty_sum(feature, standardised, options.penalty, options.beta)
        z = reference.z_of(feature, information.sum(), options.divisor)
        loss = given.plan.weights[i] * (information * penalty).sum() / z
        channels = feature.shape[1]
        found.append(
            LevelMaps(
                student=s.name,
                teacher=t.name,
                group=s.group,
                stride=image_height / max(feature.shape[2], 1),
                information=information.float(),
                difference=(penalty / max(channels, 1)).float(),
                channels=channels,
                loss=float(loss),
            )
        )
    return DistillMaps(tuple(found))
