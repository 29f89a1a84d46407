"""``TrainConfig``, everything that a training run depends on, and the check that a run is resumed with the same one."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastkd.ops.presets import CWD, PENALTIES, resolve
from fastkd.passes import Passes
from fastkd.yolov3.data.augment import Augmentation
from fastkd.yolov3.model import MODELS
from fastkd.yolov3.train.objective import PRIORS, usual_prior

OPTIMIZERS = ("adamw", "sgd")
# what a resumed run may change, because it does not influence the weights
FREE_TO_CHANGE = {
    *("out", "resume", "workers", "cache", "eval_every", "save_every", "log_every", "tensorboard", "cpu"),
    *("val_annotations", "val_images", "strict", "plots"),
}
OF_DISTILLATION = {  # without a teacher these have no effect
    *("teacher_model", "distill_weight", "distill_share", "info_map", "prior", "penalty", "level_weights"),
    *("distill_warmup", "distill_stop", "distill_decay", "teacher_every", "teacher_images"),
}
# the behaviour of runs whose configuration is older than these options
EARLIER = {"multi_scale": 0.0, "plots": True}
USUAL = Augmentation(flip=0.5)  # of photographs; digits, which must not be mirrored, want flip=0
PATHS = {"annotations", "images", "teacher", "init", "unlabelled"}


@dataclass(frozen=True)
class TrainConfig:
    """Everything that a training run depends on.

    An epoch is ``ceil(images / batch)`` steps. The images of a step and their augmentation depend on (seed, step) only,
    so that a resumed run, or one with more workers or processes, sees the same batches.

    Args:
        annotations, images: training set, as ``fastkd.yolov3.data.formats.read_set`` takes it, for example COCO's JSON
            file and the folder of its images.
        out: folder of the run: ``checkpoint.pt`` to resume from, ``model.pt`` and ``model.weights`` (the detector
            alone), ``config.json``, ``metrics.jsonl``, ``results.csv``, ``tensorboard/`` and the images of ``plots``.
        val_annotations, val_images: validation set, or None for no evaluation.
        model: ``"yolov3-tiny"`` or ``"yolov3"``.
        width: multiplier of the model's channels.
        size: side of the square network input in pixels, a multiple of 32.
        init: ``.pt`` or ``.weights`` file of the same model and width to start from; None: random weights. If its
            classes are not those of the data, the heads' last 1x1 convolutions start from random weights.
        anchors: ``"data"``: ``dataset_anchors`` of the training set, per head as many as ``init`` has, or 3;
            ``"default"``: those of ``init``, or the model's own; None: those of ``init`` if its heads are kept, else as
            ``"data"``, because new heads have nothing to keep.
        teacher: ``.pt`` or ``.weights`` file of the teacher; None: train without distillation.
        teacher_model: model of a ``.weights`` teacher; None: from the ``.cfg`` file beside it, or from its size.
        unlabelled: folder of images without labels, with its sub-folders, which only the distillation loss uses, unless
            ``pseudo_labels`` is given; None: no such images.
        unlabelled_batch: number of these images per step, over all processes; None: ``batch``.
        pseudo_labels: label these images, before the training, with the teacher's detections of at least this score,
            so that the detection loss uses them too, as many as ``unlabelled_batch`` beside ``batch``, see
            ``fastkd.yolov3.train.pseudo_labels``; None: no labels.
        match_threshold: see ``fastkd.yolov3.DetectionLoss``.
        distill_weight, info_map: see ``Objective`` and ``fastkd.DistillLoss``.
        prior: see ``Objective``; None: the prior that the map needs, which is ``"score"`` for ``"score"``,
            ``"iou_mask"`` for ``"fgfi"``, ``"graded_iou"`` for ``"graded_iou"``, else ``"none"``.
        penalty: see ``fastkd.DistillLoss``.
        level_weights: factor of each level of the feature loss, backbone first; 0 leaves a level out; None: all 1.
        distill_share: with ``distill_weight="auto"``, the distillation loss is kept at this multiple of the detection
            loss.
        distill_warmup: number of steps until the distillation loss has its full weight.
        distill_stop: number of epochs with distillation; None: all; 0: none, so that the teacher gives pseudo-labels
            alone.
        distill_decay: ``"linear"`` or ``"cosine"``: the weight of the distillation loss decays from the end of the
            warm-up to zero at ``distill_stop`` (or the end); None: it stays constant.
        teacher_every, teacher_images: see ``fastkd.Distiller``: fewer passes of the teacher.
        steps, epochs: length of the training; ``steps`` counts if it is given.
        batch: images per step, over all processes.
        optimizer: ``"adamw"`` or ``"sgd"`` (Nesterov momentum 0.9). Biases and batch norms have no weight decay.
        lr: highest learning rate, reached after ``warmup`` steps; then it decays as a cosine to ``final_lr * lr``.
        clip: largest norm of the gradient; 0: do not clip.
        freeze_batchnorm: batch norms keep their initial statistics, those of ``init``, for fine-tuning with few images
            per process.
        sync_batchnorm: compute batch norm statistics over all processes (GPUs only); False: each process uses those of
            its own images.
        ema: decay of the moving average of the weights, which is evaluated and exported; 0: no average.
        mixed_precision: ``"no"``, ``"bf16"`` or ``"fp16"`` (with a gradient scaler).
        seed: seed of initial weights, order and augmentation.
        augmentation: options of the augmentation; None: no augmentation.
        multi_scale: largest change of the input size as a share of ``size``, in [0, 1). Each batch is resized to a
            multiple of 32 in this range, drawn by seed and step. 0: every batch has ``size``, as evaluation always has.
        limit: use only this many training images, the first ones; None: all.
        workers: number of processes that load images; 0 is best for small sets with ``cache``.
        cache: keep decoded images in memory.
        strict: raise an error for an image that can't be read, instead of leaving it out.
        eval_every: epochs between evaluations (and exports); 0: at the end only.
        save_every: epochs between checkpoints.
        log_every: steps between two lines of the log.
        tensorboard: also write curves for TensorBoard.
        plots: also draw curves, precision and recall, the confusion matrix, average precision, training batches and
            predictions, see ``fastkd.yolov3.train.plots``.
        cpu: do not use an accelerator.
        resume: continue from the checkpoint in ``out``, if there is one.

    Raises:
        ValueError: a value is out of range.
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
    pseudo_labels: float | None = None
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
    augmentation: Augmentation | None = USUAL
    multi_scale: float = 0.25
    limit: int | None = None
    workers: int = 0
    cache: bool = False
    strict: bool = False
    eval_every: int = 10
    save_every: int = 1
    log_every: int = 20
    tensorboard: bool = True
    plots: bool = True
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
        self._require("level_weights", finite, "None or finite numbers, one per level")
        self._require("prior", self.prior is None or self.prior in PRIORS, f"None or one of {', '.join(PRIORS)}")
        if self.teacher is not None and resolve(self.info_map).needs_prior and self.effective_prior == "none":
            raise ValueError(
                f"prior: expected one of {', '.join(x for x in PRIORS if x != 'none')}, because info_map "
                f"{self.info_map!r} takes the weights of the cells from it, got 'none'; for equal weights, take "
                "info_map 'uniform'"
            )
        if self.unlabelled is not None and self.teacher is None:
            raise ValueError("unlabelled: expected a teacher too, as only it can say what these images show, got None")
        if self.unlabelled is None and self.unlabelled_batch is not None:
            raise ValueError(f"unlabelled_batch: expected unlabelled too, got {self.unlabelled_batch} alone")
        if self.pseudo_labels is not None:
            self._require("pseudo_labels", 0 < self.pseudo_labels < 1, "None or a score between 0 and 1")
            if self.unlabelled is None:
                raise ValueError("pseudo_labels: expected unlabelled too, whose images they label, got None")
        elif self.distill_stop == 0:
            raise ValueError("distill_stop: expected None or an epoch >= 1, or pseudo_labels too, got 0 alone")
        self._require("distill_stop", self.distill_stop is None or self.distill_stop >= 0, "None or an epoch >= 0")
        if self.distill_stop == 0 and self.distill_decay is not None:
            raise ValueError(f"distill_decay: expected None, as distill_stop is 0, got {self.distill_decay!r}")
        Passes(self.teacher_every, self.teacher_images)  # raises if they are out of range
        self._require("steps", self.steps is None or self.steps >= 1, "None or a number >= 1")
        self._require("lr", 0 < self.lr < math.inf, "a finite number > 0")
        for name in ("weight_decay", "clip", "warmup", "distill_warmup", "final_lr"):
            self._require(name, 0 <= getattr(self, name) < math.inf, "a finite number >= 0")
        self._require("multi_scale", 0 <= self.multi_scale < 1, "a number in [0, 1)")
        self._require("ema", 0 <= self.ema < 1, "a number in [0, 1)")
        both = (self.val_annotations is None) == (self.val_images is None)
        self._require("val_images", both, "val_annotations and val_images together, or neither")

    @property
    def distils(self) -> bool:
        """Whether the student imitates features of a teacher, which may also give nothing but pseudo-labels."""
        return self.teacher is not None and self.distill_stop != 0

    @property
    def images_per_step(self) -> int:
        """Images of a step over all processes, with labels and without."""
        return self.batch + (0 if self.unlabelled is None else self.unlabelled_batch or self.batch)

    @property
    def effective_prior(self) -> str:
        """``prior`` or, if it is None, the prior that the map needs."""
        return self.prior or usual_prior(self.info_map)

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")


def read_config(folder: str | os.PathLike[str]) -> TrainConfig:
    """Return the configuration of the run in a folder; its ``out`` is this folder, even if the run has been moved.

    Raises:
        FileNotFoundError: there is no run.
        ValueError: the file is damaged, or was written by another version of fastkd.
    """
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder}: no run of fastkd train there (config.json is missing)")
    try:
        values = EARLIER | json.loads(file.read_text(encoding="utf-8"))
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
    """Check that a run is resumed with its own configuration, except for values that cannot change the weights.

    Raises:
        ValueError: the configurations differ (the message names the values).
    """
    saved = EARLIER | saved
    free = FREE_TO_CHANGE if saved.get("teacher") or asked["teacher"] else FREE_TO_CHANGE | OF_DISTILLATION
    differ = [k for k in asked if k not in free and _plain(k, saved.get(k)) != _plain(k, asked[k])]
    if differ:
        raise ValueError(
            "resume: expected the configuration that the run was started with, got another "
            + ", ".join(f"{name} ({saved.get(name)!r} then, {asked[name]!r} now)" for name in differ)
            + f"; {step} steps are done: give the same values, or another out"
        )


def _plain(name: str, value: Any) -> Any:
    """Return a value in a form that can be compared: as JSON stores it (tuples as lists), and paths resolved."""
    return os.path.realpath(value) if name in PATHS and value else json.loads(json.dumps(value))
