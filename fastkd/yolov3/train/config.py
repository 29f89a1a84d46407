"""What a training run depends on, and when two runs are the same."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastkd.ops.presets import CWD, PENALTIES, resolve
from fastkd.passes import Passes
from fastkd.yolov3.data.augment import Augmentation
from fastkd.yolov3.model import MODELS
from fastkd.yolov3.train.objective import PRIORS, usual_prior

OPTIMIZERS = ("adamw", "sgd")
# what a resumed run may change: it has no influence on the weights
FREE_TO_CHANGE = {
    *("out", "resume", "workers", "cache", "eval_every", "save_every", "log_every", "tensorboard", "cpu"),
    *("val_annotations", "val_images", "strict"),
}
OF_DISTILLATION = {  # without a teacher they do nothing
    *("teacher_model", "distill_weight", "distill_share", "info_map", "prior", "penalty", "level_weights"),
    *("distill_warmup", "distill_stop", "distill_decay", "teacher_every", "teacher_images"),
}
PATHS = {"annotations", "images", "teacher", "init", "unlabelled"}


@dataclass(frozen=True)
class TrainConfig:
    """Everything that a training run depends on.

    An epoch is ``ceil(images / batch)`` steps. The images of a step, and how they are augmented, follow from
    (seed, step) only, so that a resumed run, or one with more workers or processes, sees the same batches.

    Args:
        annotations, images: training set, as ``fastkd.yolov3.data.formats.read_set`` takes it: COCO's JSON file and the
            folder of its images, say.
        out: folder of the run: ``checkpoint.pt`` to resume from, ``model.pt`` and ``model.weights`` (the detector
            alone), ``config.json``, ``metrics.jsonl``, ``tensorboard/``.
        val_annotations, val_images: validation set, or None for no evaluation.
        model: ``"yolov3-tiny"`` or ``"yolov3"``.
        width: multiplier of the model's channels.
        size: side of the square network input in pixels, a multiple of 32.
        init: ``.pt`` or ``.weights`` file of the same model and width to start from; None: random weights. Where its
            classes are not those of the data, the heads' last 1x1 convolutions are new, and all else is kept.
        anchors: ``"data"``: k-means on the training set, as many a head as ``init`` has, or 3; ``"default"``: those of
            ``init``, or the model's own; None: those of ``init`` if its heads are kept, else of the data, as new heads
            have to learn any.
        teacher: ``.pt`` or ``.weights`` file of the teacher; None: train without distillation.
        teacher_model: what a ``.weights`` teacher is; None: as the ``.cfg`` beside it says, else by the file's size.
        unlabelled: folder of images, with its sub-folders, that only the teacher explains; None: none.
        unlabelled_batch: how many of these a step has, over all processes; None: as many as ``batch``.
        match_threshold: IoU of sizes above which a box trains an anchor; 1: the best anchor alone, as in the paper.
        distill_weight, info_map: see ``Objective`` and ``fastkd.DistillLoss``.
        prior: as in ``Objective``; None: the one that goes with the map, ``"score"`` for that map,
            ``"iou_mask"`` for ``"fgfi"``, ``"graded_iou"`` for that map, else none.
        penalty: as in ``fastkd.DistillLoss``.
        level_weights: a factor for each level of the feature loss, backbone first; 0 leaves a level out; None: all 1.
        distill_share: where ``distill_weight`` is ``"auto"``: the distillation loss is held at so many times the
            detection loss.
        distill_warmup: steps over which the distillation loss grows to its weight.
        distill_stop: epoch from which on there is no distillation; None: it lasts to the end.
        distill_decay: ``"linear"`` or ``"cosine"``: fall from the end of the warm-up to zero at ``distill_stop`` (or
            the end); None: stay.
        teacher_every, teacher_images: see ``fastkd.Distiller``: fewer passes of the teacher.
        steps, epochs: how long; ``steps`` wins where both are given.
        batch: images per step, over all processes.
        optimizer: ``"adamw"`` or ``"sgd"`` (momentum 0.9). Biases and batch norms have no weight decay.
        lr: highest learning rate, reached after ``warmup`` steps, then falling as a cosine to ``final_lr * lr``.
        clip: largest norm of the gradient; 0: do not clip.
        freeze_batchnorm: batch norms keep the statistics that they begin with, those of ``init``: for fine-tuning with
            few images per process.
        sync_batchnorm: batch norm statistics over all processes (GPUs only); else each has those of its own images.
        ema: decay of the moving average of the weights, which is what gets evaluated and exported; 0: no average.
        mixed_precision: ``"no"``, ``"bf16"`` or ``"fp16"`` (with a gradient scaler).
        seed: of initial weights, order and augmentation.
        augmentation: what to vary; None: nothing.
        limit: use the first so many training images.
        workers: processes that load images; 0 is best for small sets with ``cache``.
        cache: keep decoded images in memory.
        strict: an image that can't be read ends the run, which leaves it out otherwise.
        eval_every: epochs between evaluations (and exports); 0: at the end only.
        save_every: epochs between checkpoints.
        log_every: steps between two lines of the log.
        cpu: do not use an accelerator.
        resume: go on from ``out``'s checkpoint, if there is one.

    Raises:
        ValueError: a value that is out of range (at construction).
    """

    annotations: str
    images: str
    out: str
    val_annotations: str | None = None
    val_images: str | None = None
    model: str = "yolov3-tiny"
    width: float = 1.0
    size: int = 416
    init: str | None = None
    anchors: str | None = None
    teacher: str | None = None
    teacher_model: str | None = None
    unlabelled: str | None = None
    unlabelled_batch: int | None = None
    distill_weight: float | str = "auto"
    distill_share: float = 1.0
    info_map: str = "graded_iou"
    prior: str | None = None
    penalty: str = "l2"
    level_weights: tuple[float, ...] | None = None
    match_threshold: float = 0.5
    distill_warmup: int = 0
    distill_stop: int | None = None
    teacher_every: int = 1
    teacher_images: float = 1.0
    distill_decay: str | None = None
    steps: int | None = None
    epochs: int = 100
    batch: int = 16
    optimizer: str = "adamw"
    lr: float = 1e-3
    final_lr: float = 0.01
    warmup: int = 100
    weight_decay: float = 0.01
    clip: float = 10.0
    freeze_batchnorm: bool = False
    sync_batchnorm: bool = False
    ema: float = 0.999
    mixed_precision: str = "no"
    seed: int = 0
    augmentation: Augmentation | None = field(default_factory=Augmentation)
    limit: int | None = None
    workers: int = 0
    cache: bool = False
    strict: bool = False
    eval_every: int = 10
    save_every: int = 1
    log_every: int = 20
    tensorboard: bool = True
    cpu: bool = False
    resume: bool = False

    def __post_init__(self) -> None:
        known = {
            "model": tuple(MODELS),
            "teacher_model": (None, *MODELS),
            "anchors": (None, "data", "default"),
            "optimizer": OPTIMIZERS,
            "penalty": (*PENALTIES, CWD),
            "mixed_precision": ("no", "bf16", "fp16"),
        }
        for name, choices in known.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(map(str, choices))}; got {getattr(self, name)!r}")
        for name, least in (
            *(("epochs", 1), ("batch", 1), ("save_every", 1), ("log_every", 1)),
            *(("eval_every", 0), ("workers", 0), ("seed", 0)),
        ):
            self._require(name, getattr(self, name) >= least, f"a number >= {least}")
        self._require("unlabelled_batch", self.unlabelled_batch is None or self.unlabelled_batch >= 1, "a number >= 1")
        finite = self.level_weights is None or all(map(math.isfinite, self.level_weights))
        self._require("level_weights", finite, "None or finite numbers, one a level")
        self._require("prior", self.prior is None or self.prior in PRIORS, f"None or one of {', '.join(PRIORS)}")
        if self.teacher is not None and resolve(self.info_map).needs_prior and self.effective_prior == "none":
            raise ValueError(
                f"prior: expected one, as info_map {self.info_map!r} weighs cells by it alone, got 'none'; to weigh "
                "all cells alike, take info_map 'uniform'"
            )
        if self.unlabelled is not None and self.teacher is None:
            raise ValueError("unlabelled: expected a teacher beside it, which explains these images, got None")
        if self.unlabelled is None and self.unlabelled_batch is not None:
            raise ValueError(f"unlabelled_batch: expected unlabelled beside it, got {self.unlabelled_batch} alone")
        self._require("distill_stop", self.distill_stop is None or self.distill_stop >= 1, "None or an epoch >= 1")
        Passes(self.teacher_every, self.teacher_images)  # which refuses others
        self._require("steps", self.steps is None or self.steps >= 1, "None or a number >= 1")
        self._require("lr", 0 < self.lr < math.inf, "a finite number > 0")
        for name in ("weight_decay", "clip", "warmup", "distill_warmup", "final_lr"):
            self._require(name, 0 <= getattr(self, name) < math.inf, "a finite number >= 0")
        self._require("ema", 0 <= self.ema < 1, "a number in [0, 1)")
        self._require("val_images", (self.val_annotations is None) == (self.val_images is None), "it with the other")

    @property
    def effective_prior(self) -> str:
        """``prior``, or the one that goes with the map."""
        return self.prior or usual_prior(self.info_map)

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")


def read_config(folder: str | os.PathLike[str]) -> TrainConfig:
    """The configuration of the run in a folder.

    Its ``out`` is this folder, wherever the run was made.

    Raises:
        FileNotFoundError: there is no run.
        ValueError: the file is damaged, or of another version of fastkd.
    """
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder}: no run of fastkd train there (config.json is missing)")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if values["augmentation"] is not None:
            values["augmentation"]["zoom"] = tuple(values["augmentation"]["zoom"])
            values["augmentation"] = Augmentation(**values["augmentation"])
        if values["level_weights"] is not None:
            values["level_weights"] = tuple(values["level_weights"])
        return TrainConfig(**values | {"out": os.fspath(folder)})
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{file}: expected a run's configuration as this version of fastkd writes it: {error}"
        ) from None


def require_same_run(saved: dict[str, Any], asked: dict[str, Any], step: int) -> None:
    """Refuse to resume a run with other values than it was begun with, but for those that cannot change its weights.

    Raises:
        ValueError: names what differs.
    """
    free = FREE_TO_CHANGE if saved.get("teacher") or asked["teacher"] else FREE_TO_CHANGE | OF_DISTILLATION
    differ = [k for k in asked if k not in free and _plain(k, saved.get(k)) != _plain(k, asked[k])]
    if differ:
        raise ValueError(
            "resume: expected the configuration that the run was begun with; it differs in "
            + ", ".join(f"{name} ({saved.get(name)!r} then, {asked[name]!r} now)" for name in differ)
            + f"; {step} steps are done: give the same values, or another out"
        )


def _plain(name: str, value: Any) -> Any:
    """As JSON keeps it, tuples being lists; a path however it is spelt."""
    return os.path.realpath(value) if name in PATHS and value else json.loads(json.dumps(value))
