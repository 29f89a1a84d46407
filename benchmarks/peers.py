"""Other distillation losses for detectors, written from their formulas in plain PyTorch, as their users run them.

Each is a loss of (student, teacher) lists of (N, C, H, W) features. Extra inputs of a formula (the teacher's class
scores, masks, boxes) are random and made before the timing. Only FGD's masks are made inside the loss, box by box, as
in FGD itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

import fastkd

TEMPERATURE = 0.5  # FGD, FBKD
BOXES = 10  # per image


class ScoreWeighted:
    """Ultralytics' distillation: per level sum w (s - t)^2 / (C sum w), w the teacher's best class score per cell."""

    name, same_as_ours = "Ultralytics SL2", "score"

    def __init__(self, teacher: Sequence[Tensor]) -> None:
        generator = torch.Generator().manual_seed(1)
        self.scores = [torch.randn(len(t), 80, *t.shape[2:], generator=generator).sigmoid() for t in teacher]

    def __call__(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        losses = []
        for s, t, scores in zip(student, teacher, self.scores, strict=True):
            w = scores.amax(1, keepdim=True)
            losses.append((F.mse_loss(s, t, reduction="none") * w).sum() / (s.shape[1] * w.sum() + 1e-9))
        return torch.stack(losses).sum()

    def ours(self, student: Sequence[Tensor], teacher: Sequence[Tensor], backend: str | None = None) -> Tensor:
        prior = [x.amax(1) for x in self.scores]
        return fastkd.distill_loss(student, teacher, info_map="score", prior=prior, backend=backend)


class FineGrained:
    """FGFI (Wang et al., 2019, eq. 3): sum of (s - t)^2 over cells near objects, divided by twice their number."""

    name, same_as_ours = "FGFI", "fgfi"

    def __init__(self, teacher: Sequence[Tensor]) -> None:
        generator = torch.Generator().manual_seed(2)
        self.prior = [(torch.rand(len(t), *t.shape[2:], generator=generator) > 0.8).float() for t in teacher]

    def __call__(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        losses = []
        for s, t, mask in zip(student, teacher, self.prior, strict=True):
            losses.append(((s - t) ** 2 * mask[:, None]).sum() / (2 * mask.sum()))
        return torch.stack(losses).sum()

    def ours(self, student: Sequence[Tensor], teacher: Sequence[Tensor], backend: str | None = None) -> Tensor:
        half_channels = [s.shape[1] / 2 for s in student]  # fastkd divides by C times the number
        return fastkd.distill_loss(
            student, teacher, info_map="fgfi", prior=self.prior, weights=half_channels, backend=backend
        )


class FocalAttention:
    """FGD's focal part (Yang et al., 2022, eq. 4-9), alpha = 1e-3, beta = 5e-4, over foreground and background."""

    name, same_as_ours = "FGD, focal part", None  # it also weights channels

    def __init__(self, teacher: Sequence[Tensor]) -> None:
        generator = torch.Generator().manual_seed(3)
        corner = torch.rand(len(teacher[0]), BOXES, 2, generator=generator) * 0.7
        size = 0.05 + 0.25 * torch.rand(len(teacher[0]), BOXES, 2, generator=generator)
        self.boxes = torch.cat([corner, corner + size], 2)  # fractions of the image

    def masks(self, t: Tensor) -> tuple[Tensor, Tensor]:
        height, width = t.shape[2:]
        scale = torch.tensor([width, height, width, height])
        foreground, background = torch.zeros(len(t), height, width), torch.ones(len(t), height, width)
        for n, boxes in enumerate(self.boxes * scale):
            for x1, y1, x2, y2 in zip(*(f(boxes[:, i]).int().tolist() for i, f in enumerate(ROUND)), strict=True):
                area = torch.tensor(1.0 / ((x2 - x1) * (y2 - y1)))
                cells = foreground[n, y1:y2, x1:x2]
                foreground[n, y1:y2, x1:x2] = torch.maximum(cells, area)
            background[n][foreground[n] > 0] = 0
            background[n] /= background[n].sum().clamp_min(1)
        return foreground, background

    def __call__(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        losses = []
        for s, t in zip(student, teacher, strict=True):
            n, c, height, width = t.shape
            spatial = height * width * (t.abs().mean(1).view(n, -1) / TEMPERATURE).softmax(1).view(n, 1, height, width)
            channel = c * (t.abs().mean((2, 3)) / TEMPERATURE).softmax(1).view(n, c, 1, 1)
            foreground, background = self.masks(t)
            attention = spatial.sqrt(), channel.sqrt()
            for mask, weight in ((foreground, 1e-3), (background, 5e-4)):
                part = [x * attention[0] * attention[1] * mask[:, None].sqrt() for x in (s, t)]
                losses.append(weight * F.mse_loss(*part, reduction="sum") / n)
        return torch.stack(losses).sum()


ROUND = (torch.floor, torch.floor, torch.ceil, torch.ceil)


class BothAttend:
    """FBKD's first term (Zhang & Ma, 2021, eq. 5): 7e-5 sqrt(sum M (s - t)^2), M the mean of both attention maps."""

    name, same_as_ours = "FBKD, first term", None  # its map depends on the student, and it has a root of the sum

    def __init__(self, teacher: Sequence[Tensor]) -> None:
        del teacher

    def __call__(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        losses = []
        for s, t in zip(student, teacher, strict=True):
            n, _, height, width = t.shape
            attention = [
                height * width * (x.detach().abs().mean(1).view(n, -1) / TEMPERATURE).softmax(1) for x in (s, t)
            ]
            mask = (sum(attention) / 2).view(n, 1, height, width)
            losses.append(7e-5 * (mask * (s - t) ** 2).sum().sqrt())
        return torch.stack(losses).sum()


PEERS = (ScoreWeighted, FocalAttention, FineGrained, BothAttend)
