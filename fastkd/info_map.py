"""Information maps: where in a feature map the teacher's knowledge matters.

The one registry of scores, normalisers, penalties and presets. The order of each tuple is the code that the
compiled kernels receive (``csrc/level.h``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real

import torch
from torch import Tensor

SCORES = ("uniform", "magnitude", "energy", "entropy")
NORMS = ("none", "mean", "softmax", "minmax")
PENALTIES = ("l2", "l1", "smooth_l1")
SMALLEST = torch.finfo(torch.float32).tiny
NORMALIZERS = ("elements", "map", "batch", "map_all_ranks")


def require_known(name: str, value: object, known: Sequence[str]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``known``; the message lists them."""
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, known))}; got {value!r}")


def require_positive(name: str, value: float) -> None:
    """Raise ``ValueError`` unless ``value`` is a finite number above zero that float32 can hold."""
    if isinstance(value, bool) or not isinstance(value, Real) or not SMALLEST <= value < float("inf"):
        raise ValueError(f"{name}: expected a finite number > 0 that float32 can hold, got {value!r}")


@dataclass(frozen=True)
class InfoMap:
    """How the weight of a cell p = (n, y, x) follows from the teacher's feature t' (standardised if asked).

    ``w_p = prior_p * norm(score)_p``, all computed from the frozen teacher: no gradient flows into the map.

    Args:
        score: ``"uniform"`` 1; ``"magnitude"`` mean over channels of abs(t'); ``"energy"`` mean of t' squared;
            ``"entropy"`` 1 - H(softmax over channels of t'/T) / log C.
        norm: over the cells of one image: ``"none"``; ``"mean"`` e / mean(e); ``"softmax"`` H W softmax(e / T);
            ``"minmax"`` (e - min) / (max - min + eps).
        temperature: T > 0, of the entropy's softmax over channels and of the softmax over cells.
        normalizer: the Z that goes with this map unless the caller names one (see ``distill_loss``).
        standardize: whether ``DistillLoss`` standardises the teacher per channel for this map.
        needs_prior: what the prior must be, for maps that mean nothing without one; empty if none is needed.

    Raises:
        ValueError: unknown score, norm or normalizer; temperature not a positive finite number.
    """

    score: str = "energy"
    norm: str = "mean"
    temperature: float = 1.0
    normalizer: str = "elements"
    standardize: bool = False
    needs_prior: str = ""

    def __post_init__(self) -> None:
        require_known("score", self.score, SCORES)
        require_known("norm", self.norm, NORMS)
        require_known("normalizer", self.normalizer, NORMALIZERS)
        require_positive("temperature", self.temperature)


PRESETS: dict[str, InfoMap] = {
    # Energy of the standardised teacher is, up to a constant, -log p of the cell under the teacher's own
    # per-channel Gaussian (in nats * 2/C). Li et al. (2022) publish no formula for their map: this is our reading.
    "self_information": InfoMap("energy", "mean", standardize=True),
    # Zagoruyko & Komodakis (2017), the attention map of squares.
    "energy": InfoMap("energy", "mean"),
    # The spatial attention of FGD (Yang et al., 2022, eq. 4-5) and FBKD (Zhang & Ma, 2021).
    "attention": InfoMap("magnitude", "softmax", temperature=0.5),
    # Feature term of FRS (Du et al., 2021), with a Z that divides by C too.
    "score": InfoMap("uniform", "none", normalizer="map", needs_prior="the teacher's confidence"),
    # FGFI (Wang et al., 2019, eq. 2-3).
    "fgfi": InfoMap("uniform", "none", normalizer="map", needs_prior="the IoU mask of anchors and boxes"),
    # Ours: FGFI's region by degrees, of the standardised teacher; what the trainer does by default.
    "graded_iou": InfoMap("uniform", "none", normalizer="map", standardize=True, needs_prior="the graded IoU mask"),
    "uniform": InfoMap("uniform", "none", standardize=True),
}


def resolve(info: str | InfoMap) -> InfoMap:
    """Look a preset's name up, or pass an ``InfoMap`` through.

    Raises:
        ValueError: unknown name (lists the known ones).
        TypeError: neither a name nor an ``InfoMap``.
    """
    if isinstance(info, InfoMap):
        return info
    if not isinstance(info, str):
        raise TypeError(f"info_map: expected a preset's name or an InfoMap, got {type(info).__name__}")
    require_known("info_map", info, list(PRESETS))
    return PRESETS[info]


def info_map(
    teacher_feats: Sequence[Tensor],
    info_map: str | InfoMap = "self_information",
    *,
    prior: Sequence[Tensor | None] | None = None,
    standardize: Sequence[tuple[Tensor, Tensor] | None] | None = None,
) -> list[Tensor]:
    """The maps themselves, w_p of every level, for looking at (``fastkd.viz`` draws them).

    Args:
        teacher_feats: one (N, C, H, W) floating tensor per level.
        info_map, prior, standardize: as in ``distill_loss``.

    Returns:
        One (N, H, W) float32 tensor per level, without gradient.

    Raises:
        TypeError, ValueError: as in ``distill_loss``.
    """
    from fastkd import levels, reference, teacher_memory

    info = resolve(info_map)
    teacher = [t.detach() for t in levels.require_features("teacher_feats", teacher_feats)]
    teacher_memory.require_intact(teacher)
    checked = levels.check(teacher, teacher, prior=prior, standardize=standardize, info=replace(info, needs_prior=""))
    return [
        reference.information_map(t, info, q, mean, rstd).float()
        for t, q, mean, rstd in zip(teacher, checked.prior, checked.mean, checked.rstd, strict=True)
    ]
