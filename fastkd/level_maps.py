"""What the distillation loss looks at: the maps behind ``Distiller.maps``, level by level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastkd import levels, reference
from fastkd.hooks import Tap
from fastkd.loss import DistillLoss


@dataclass(frozen=True, eq=False)
class LevelMaps:
    """One level on some images. ``weight * sum(product) * channels / Z`` is its loss.

    Attributes:
        student, teacher: module names.
        group: ``"backbone"`` or ``"neck"``.
        stride: height of the images over that of the maps.
        information: (N, h, w) float32: what the loss weighs each cell with, prior included, normalised as in the loss.
        difference: (N, h, w) float32: penalty of adapted student minus standardised teacher, mean over channels.
        channels: the teacher's.
        loss: of the level on these images, with its level's weight, as ``DistillLoss.level_losses``; of several
            processes, for this one's images alone.
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
        """``"backbone, stride 8"``, say."""
        return f"{self.group}, stride {self.stride:.3g}"

    @property
    def product(self) -> Tensor:
        """(N, h, w) float32: ``information * difference``, what a cell adds to the loss but for common factors."""
        return self.information * self.difference

    def concentration(self, part: float = 0.1) -> float:
        """Share of the weight that the heaviest ``part`` of each image's cells have: ``part``, if all weigh alike.

        Raises:
            ValueError: ``part`` outside [0, 1].
        """
        if not 0 <= part <= 1:
            raise ValueError(f"part: expected a share in [0, 1], got {part!r}")
        cells = self.information.flatten(1).double().sort(1, descending=True).values
        count = cells.shape[1]
        taken = (part * count - torch.arange(count, device=cells.device)).clamp(0, 1)  # the last cell by its part
        return float((cells * taken).sum() / cells.sum().clamp_min(reference.TINY))


@dataclass(frozen=True, eq=False)
class DistillMaps:
    """What ``Distiller.maps`` returns: one entry per matched level, backbone first. ``fastkd.viz`` draws them.

    Attributes:
        levels: the levels; the properties list one thing of each.
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
        """Share of each level in the sum of their losses, which weights of both signs can take out of [0, 1]."""
        total = sum(x.loss for x in self.levels)
        return [x.loss / total if total else 0.0 for x in self.levels]


def measure(
    criterion: DistillLoss,
    pairs: Sequence[tuple[Tap, Tap]],
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    prior: Sequence[Tensor | None] | None,
    image_height: int,
) -> DistillMaps:
    """The maps of features that belong to the pairs; by the reference, which talks to no other process."""
    info = criterion.info_map
    given = levels.check(
        criterion.adapted(student),
        teacher,
        info=info,
        prior=prior,
        standardize=criterion.moments(),
        weights=criterion.weights,
    )
    found = []
    for i, (s, t) in enumerate(pairs):
        feature, target = given.student[i].to(given.dtype), given.teacher[i].to(given.dtype)
        information = reference.information_map(target, info, given.prior[i], given.mean[i], given.rstd[i])
        difference = feature - reference.standardize(target, given.mean[i], given.rstd[i])
        penalty = reference.penalty_sum(difference, criterion.penalty, criterion.beta)
        z = reference.divisor(feature, information.sum(), criterion.active_normalizer)
        loss = given.weights[i] * (information * penalty).sum() / z
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
