"""What the study compares, on which scenes, and what its settings are chosen from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from study.maps import MAPS, prior_name

Config = dict[str, Any]  # of ``TrainConfig``


@dataclass(frozen=True)
class Regime:
    """How much data there is.

    Args:
        labelled: scenes that a student has with labels; each seed has others, as far as there are.
        taught: scenes that its teacher was trained on.
        plain_steps: lengths of the training without distillation to choose from.
        distilled_steps: length of that with distillation, of which a step takes about twice the time: half as long, so
            that all students train for about as many seconds.
    """

    name: str
    labelled: int
    taught: int
    plain_steps: tuple[int, ...]
    distilled_steps: int


@dataclass(frozen=True)
class Protocol:
    """Sizes, lengths and choices of the study; the defaults are those of the published one.

    Args:
        regimes: few labels, some, equal data. All rows run in the first, the main ones in the others.
        seeds: one student of every row each.
        tuning_seeds: those that settings are chosen with; their scenes are their own, as far as there are.
        lr, weight_decay, plain_zoom, distilled_zoom, share, logit_weight: values to choose from, one after the other.
            Zoom is a range of the augmentation, of which the distilled student tries fewer, as it chooses its share.
            Regimes after the first try the first two zooms or shares.
        later_factors: of the plain student's weight decay, and of the share of uniform weights and of each of the best
            maps, that regimes after the first then choose from: with more labels all may want less.
        maps: those that are tried, of ``study.maps``.
        map_shares: factors of uniform's share that each of the best maps may choose from.
        finalists: how many maps go on from the trial of all to the tables.
        train, val, test: scenes for teachers and students, to choose on, and for the tables.
        own_steps: length of the training of teachers on a student's own few scenes.
        blank_steps: forwards of the untrained teacher, from which its batch norms get statistics.
        unlabelled: the last so many of ``train``, for the row that also has images without labels.
    """

    regimes: tuple[Regime, ...] = (
        Regime("few", 100, 4000, plain_steps=(640, 1280), distilled_steps=640),
        Regime("some", 300, 4000, plain_steps=(1280,), distilled_steps=640),
        Regime("equal", 2000, 2000, plain_steps=(1920,), distilled_steps=960),
    )
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    tuning_seeds: tuple[int, ...] = (5, 6)
    lr: tuple[float, ...] = (3.2e-2, 1.6e-2, 6.4e-2, 1.28e-1)
    weight_decay: tuple[float, ...] = (0.01, 0.05, 0.2, 0.8)
    plain_zoom: tuple[tuple[float, float], ...] = ((0.75, 1.33), (0.85, 1.18), (0.6, 1.67))
    distilled_zoom: tuple[tuple[float, float], ...] = ((0.75, 1.33), (0.85, 1.18))
    share: tuple[float, ...] = (4.0, 1.0, 16.0)
    later_factors: tuple[float, ...] = (1.0, 0.25)
    maps: tuple[str, ...] = tuple(MAPS)
    map_shares: tuple[float, ...] = (1.0, 0.5, 2.0)
    logit_weight: tuple[float, ...] = (1.0, 0.5, 2.0, 0.25)
    finalists: int = 2
    train: int = 4000
    val: int = 1000
    test: int = 2000
    unlabelled: int = 1000
    size: int = 96
    batch: int = 16
    student_width: float = 0.25
    teacher_width: float = 0.25
    teacher_steps: int = 1200
    teacher_lr: float = 1.6e-2
    teacher_match: float = 0.3
    own_steps: int = 400
    blank_steps: int = 50


UNIFORM: Config = {"info_map": "uniform_standardized", "prior": "none"}
LOGIT_ALONE: Config = {"distill_weight": 0.0}

# the library's presets as their papers have them, with the priors that they need; the last two are ours
PRESETS: dict[str, Config] = {
    "self_information": {"info_map": "self_information", "prior": "none"},
    "energy": {"info_map": "energy", "prior": "none"},
    "attention": {"info_map": "attention", "prior": "none"},
    "confidence alone": {"info_map": "score", "prior": "confidence"},
    "fgfi": {"info_map": "fgfi", "prior": "iou_mask"},
    "self_information, confidence prior": {"info_map": "self_information", "prior": "confidence"},
    "graded_iou preset": {"info_map": "graded_iou", "prior": "graded_iou"},
}

# levels of YOLOv3-tiny: backbone at strides 8, 16, 32, neck at 16, 32
PLACES: dict[str, Config] = {
    "backbone only": {"level_weights": [1, 1, 1, 0, 0]},
    "neck only": {"level_weights": [0, 0, 0, 1, 1]},
    "without stride 8": {"level_weights": [0, 1, 1, 1, 1]},
}


def of_map(name: str) -> Config:
    """``"uniform"``, a preset, or a map of ``study.maps``."""
    named = {"uniform": UNIFORM} | PRESETS
    return named[name] if name in named else UNIFORM | {"prior": prior_name(name)}
