"""The protocol of the study: what it compares, on which scenes, and the values that its settings are chosen from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from study.maps import MAPS, prior_name

Config = dict[str, Any]  # of ``TrainConfig``


@dataclass(frozen=True)
class Regime:
    """An amount of data.

    Args:
        labelled: number of scenes with labels for a student; each seed has other scenes, if there are enough.
        taught: number of scenes for its teacher's training.
        plain_steps: lengths of the training without distillation, to choose from.
        distilled_steps: length of the training with distillation. A step takes about twice the time, so it has half the
            steps, and all students train for about the same time.
    """

    name: str
    labelled: int
    taught: int
    plain_steps: tuple[int, ...]
    distilled_steps: int


@dataclass(frozen=True)
class Protocol:
    """Sizes, lengths and choices of the study; the defaults are those of the published study.

    Args:
        regimes: few labels, some labels, equal data. All rows are run in the first regime, the main ones in the others.
        seeds: every row has one student per seed.
        tuning_seeds: seeds for choosing settings; they have other scenes, if there are enough.
        lr, weight_decay, plain_zoom, distilled_zoom, share, logit_weight: values to choose from, one setting after the
            other. The zoom is a range of the augmentation; the distilled student tries fewer, because it also chooses
            its share. Regimes after the first try the first two zooms or shares.
        later_factors: factors of the plain student's weight decay, and of the share of uniform weights and of each of
            the best maps, which regimes after the first choose from: with more labels, less may be better.
        maps: the maps of ``study.maps`` that are tried.
        map_shares: factors of uniform's share that each of the best maps chooses from.
        finalists: number of maps that are chosen from the trial of all for the tables.
        train, val, test: number of scenes for training, for choices, and for the tables.
        size, batch: side of a scene in pixels; images per step.
        student_width, teacher_width, teacher_steps, teacher_lr, teacher_match: settings of the models, and of the
            teachers' trainings.
        own_steps: length of the training of teachers on a student's own few scenes.
        blank_steps: number of forwards of the untrained teacher, from which its batch norms get statistics.
        unlabelled: number of scenes, the last ones of ``train``, for the rows with images without labels.
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

# the library's presets as in their papers, with the priors that they need; the last two are fastkd's own
PRESETS: dict[str, Config] = {
    "self_information": {"info_map": "self_information", "prior": "none"},
    "energy": {"info_map": "energy", "prior": "none"},
    "attention": {"info_map": "attention", "prior": "none"},
    "confidence alone": {"info_map": "score", "prior": "confidence"},
    "fgfi": {"info_map": "fgfi", "prior": "iou_mask"},
    "self_information, confidence prior": {"info_map": "self_information", "prior": "confidence"},
    "graded_iou preset": {"info_map": "graded_iou", "prior": "graded_iou"},
}

# the levels of YOLOv3-tiny are the backbone at strides 8, 16, 32 and the neck at strides 16, 32
PLACES: dict[str, Config] = {
    "backbone only": {"level_weights": [1, 1, 1, 0, 0]},
    "neck only": {"level_weights": [0, 0, 0, 1, 1]},
    "without stride 8": {"level_weights": [0, 1, 1, 1, 1]},
}


def of_map(name: str) -> Config:
    """Return the configuration of ``"uniform"``, of a preset, or of a map of ``study.maps``."""
    named = {"uniform": UNIFORM} | PRESETS
    return named[name] if name in named else UNIFORM | {"prior": prior_name(name)}
