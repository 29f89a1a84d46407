"""Trains a detector, with or without a teacher: ``train(TrainConfig(...))``, or ``fastkd train`` in a shell."""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import accelerate
import numpy as np
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset, Sampler

from fastkd.distiller import Distiller
from fastkd.files import alone_in, replacing, save
from fastkd.health import Check, Report, fingerprint
from fastkd.ops.presets import CWD, resolve
from fastkd.yolov3.anchors import dataset_anchors
from fastkd.yolov3.checkpoint import Trained, load_detector, read_dictionary, save_detector
from fastkd.yolov3.class_names import same_names
from fastkd.yolov3.data.dataset import Batch, DetectionDataset, Sample, collate, joined, some_batch
from fastkd.yolov3.model import MODELS, Detector, build_detector
from fastkd.yolov3.onnx_detector import Exported
from fastkd.yolov3.train.config import TrainConfig, read_config, require_same_run
from fastkd.yolov3.train.evaluate import Metrics, coco_evaluation, detect_all, evaluate, metrics_of
from fastkd.yolov3.train.figures import map_figures
from fastkd.yolov3.train.log import RunLog, read_log
from fastkd.yolov3.train.objective import Objective
from fastkd.yolov3.train.plots import PLOT_FILES, RunPlots
from fastkd.yolov3.train.pseudo_labels import PSEUDO_LABELS, pseudo_labels
from fastkd.yolov3.train.scales import at_size, input_size

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CHECKPOINT_KEYS = (
    *("config", "step", "seconds", "student", "average", "teacher"),
    *("distiller", "optimizer", "scheduler", "scaler"),
)
RUN_FILES = (
    *("checkpoint.pt", "model.pt", "model.weights", "model.cfg", "model.names"),
    *("config.json", "metrics.jsonl", PSEUDO_LABELS),
)
SCORED_IMAGES = 32  # number of images on which `fastkd doctor --run` evaluates the teacher
LEAST_AP50 = 0.01  # the check fails below it
FIGURE_IMAGES = 2  # number of images whose maps are written to TensorBoard at every evaluation


@dataclass(frozen=True)
class TrainResult:
    """The result of a run."""

    model: Detector  # with the exported weights, in eval mode, on the device of the run
    class_names: tuple[str, ...]
    metrics: Metrics | None  # on the validation set; None without one
    steps: int
    seconds: float  # of training steps alone, those before a resume included
    model_file: Path


def train(
    config: TrainConfig,
    *,
    on_teacher: Callable[[Detector], None] | None = None,
    make_objective: Callable[..., Objective] = Objective,
) -> TrainResult:
    """Train, evaluate and export a detector.

    A run can be killed at any point and resumed, because files are written atomically. On a CPU, a resumed run ends
    with the same weights, bit for bit, as one that was not interrupted (with the same number of threads).

    Args:
        config: the configuration.
        on_teacher: called with the teacher when it is loaded; it may change how the teacher computes its outputs, not
            their values.
        make_objective: called instead of ``Objective``, for a loss of your own.

    Returns:
        The exported model and its metrics.

    Raises:
        FileNotFoundError: a file of the configuration is missing.
        FileExistsError: ``out`` contains a run and ``resume`` is off, or it contains models without a checkpoint.
        BlockingIOError: another process trains into ``out``.
        ValueError: the configuration does not fit the data, the teacher or the run to be resumed.
        FloatingPointError: a loss or a weight is not finite (the message names the loss).
        OSError: a file could not be written, for example on a full disk.
        ChildProcessError: a process that loads images has died.
        ConnectionError: in a distributed run, another process has died.
        MemoryError: the memory of the GPU is not enough.
        Errors in the training loop name the checkpoint from which the run can be resumed.
    """
    with contextlib.ExitStack() as held:
        run = _Run(config, on_teacher, make_objective, held)
        try:
            with contextlib.closing(run):  # closing may raise too, for a loader process that died
                while run.step < run.steps:
                    run.train_to_next_stop()
                return run.result()
        except (RuntimeError, OSError, EOFError, FloatingPointError) as error:
            _explain(error, run)
            raise


def build_objective(
    config: TrainConfig,
    data: DetectionDataset,
    *,
    ranks: int = 1,
    on_teacher: Callable[[Detector], None] | None = None,
    make_objective: Callable[..., Objective] = Objective,
    on_init: Callable[[str], None] | None = None,
) -> Objective:
    """Return the objective of a run, on the CPU: student with initial weights, teacher, adapters and losses.

    Args:
        config: the configuration.
        data: the training set.
        ranks: number of processes that train.
        on_teacher, make_objective: as for ``train``.
        on_init: called with a line that lists which layers of ``init`` are kept, and which are new.

    Raises:
        ValueError: ``init`` has another model or width than the run, or the teacher has other classes than the data.
    """
    torch.manual_seed(config.seed)
    student, kept = _initial(config, data)
    if kept and on_init is not None:
        on_init(kept)
    teacher = None
    if config.distils:
        teacher = _teacher_of(config, data)
        if on_teacher is not None:
            on_teacher(teacher)
    objective = make_objective(
        student,
        teacher,
        distill_weight=config.distill_weight,
        prior=config.effective_prior,
        match_threshold=config.match_threshold,
        **(_loss_options(config, data, ranks) if teacher is not None else {}),
    )
    if objective.distiller is not None:  # adapters must exist before optimiser and DDP collect parameters
        objective.distiller.prepare(torch.zeros(1, 3, config.size, config.size))
        _to_channels_last(objective.distiller.teacher)
    _to_channels_last(objective)
    return objective


def _teacher_of(config: TrainConfig, data: DetectionDataset) -> Detector:
    """Return the teacher, which must have the classes of the data."""
    found = load_detector(cast(str, config.teacher), model=config.teacher_model)
    require_classes("teacher", found, data)
    return found.model


def _loss_options(config: TrainConfig, data: DetectionDataset, ranks: int) -> dict[str, Any]:
    """Return the configuration's options of the feature loss, with epochs converted to steps."""
    stop = None if config.distill_stop is None else config.distill_stop * epoch_steps(config, data)
    if stop is None and config.distill_decay is not None:
        stop = total_steps(config, data)
    options = {
        "info_map": config.info_map,
        "penalty": config.penalty,
        "weights": config.level_weights,
        "share": config.distill_share,
        "warmup_steps": config.distill_warmup,
        "decay": config.distill_decay,
        "stop_step": stop,
        "teacher_every": config.teacher_every,
        "teacher_images": config.teacher_images,
    }
    if ranks > 1 and config.penalty != CWD and resolve(config.info_map).divisor == "map":
        options["divisor"] = "map_all_ranks"  # then the gradient that DDP averages equals that of one process
    return options


def epoch_steps(config: TrainConfig, data: DetectionDataset) -> int:
    """Return the number of steps per epoch."""
    return math.ceil(len(data) / config.batch)


def total_steps(config: TrainConfig, data: DetectionDataset) -> int:
    """Return the number of steps of the run."""
    return config.steps or config.epochs * epoch_steps(config, data)


class _Run:
    """State of a training run; ``train_to_next_stop`` trains to the next checkpoint or evaluation."""

    def __init__(
        self,
        config: TrainConfig,
        on_teacher: Callable[[Detector], None] | None,
        make_objective: Callable[..., Objective],
        held: contextlib.ExitStack,
    ) -> None:
        self.config, self.out = config, Path(config.out)
        self.data = training_set(config)
        self.val = validation_set(config)
        if self.val is not None:
            _require_scorable(self.val, self.data)
        unlabelled = unlabelled_set(config)
        AcceleratorState._reset_state()  # a process may train several runs, with different precisions
        on_cpu = config.cpu or not torch.accelerator.is_available()  # accelerate must be told to use CPU processes
        self.accelerator = accelerate.Accelerator(mixed_precision=config.mixed_precision, cpu=on_cpu)
        ranks = self.accelerator.num_processes
        for name, count in (("batch", config.batch), ("unlabelled_batch", config.unlabelled_batch or 0)):
            if count % ranks:
                raise ValueError(f"{name}: expected a multiple of the {ranks} processes, got {count}")
        self.epoch_steps, self.steps = epoch_steps(config, self.data), total_steps(config, self.data)
        self.step, self.seconds = 0, 0.0
        self.evaluated, self.metrics = False, cast(Metrics | None, None)
        self._hold(held)
        saved = self._saved()

        on_init = print if saved is None and self.accelerator.is_main_process else None
        objective = build_objective(
            config, self.data, ranks=ranks, on_teacher=on_teacher, make_objective=make_objective, on_init=on_init
        ).to(self.accelerator.device)
        self.student, self.distiller = objective.student, objective.distiller
        if self.distiller is not None:  # the teacher is not a submodule of the objective
            self.distiller.teacher.to(self.accelerator.device)
        self.teacher_fingerprint = None if self.distiller is None else fingerprint(self.distiller.teacher)
        self.average = copy.deepcopy(self.student)
        self._averaged, self._current = _floats(self.average), _floats(self.student)
        optimizer = _optimizer(config, objective)
        self.scheduler = LambdaLR(optimizer, lambda step: _lr_factor(step, self.steps, config.warmup, config.final_lr))
        if saved is not None:
            self._restore(saved, optimizer)
        elif self.distiller is not None:
            if self.accelerator.is_main_process:
                report = _report(objective, self.distiller, self.data, optimizer)  # before a long training
                if not report.ok:
                    warnings.warn(f"distillation may not work:\n{report}", stacklevel=3)
            # before DDP, under which a buffer cannot change its size; from the same batches on every rank
            count = self.distiller.criterion.calibration_batches
            self.distiller.calibrate(b.images for b in batches(self.data, config, 0, count))
        if config.sync_batchnorm and ranks > 1:
            if self.accelerator.device.type == "cpu":
                raise ValueError("sync_batchnorm: expected GPUs, got a CPU, for which PyTorch lacks it; leave it off")
            nn.SyncBatchNorm.convert_sync_batchnorm(self.student)  # type: ignore[no-untyped-call]  # in place
        self.terms, self.prior_of = objective.terms, objective.prior_of
        self.parameters = list(objective.parameters())
        self.objective, self.optimizer = self.accelerator.prepare(objective, optimizer)
        if saved is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(saved["scaler"])
        if unlabelled is not None and config.pseudo_labels is not None:
            unlabelled = self._pseudo_labelled(unlabelled, resumed=saved is not None)
        self.log = self._open_log()
        main = self.accelerator.is_main_process
        self.plots = RunPlots(self.out, self.data.class_names, enabled=config.plots) if main else None
        rank = self.accelerator.process_index
        self.batches = batches(self.data, config, self.step, self.steps, rank=rank, ranks=ranks)
        self.unlabelled = unlabelled_batches(unlabelled, config, self.step, self.steps, rank=rank, ranks=ranks)

    def train_to_next_stop(self) -> None:
        """Train to the next checkpoint or evaluation, or to the end."""
        started = time.perf_counter()
        self.log.resume_clock()
        self.objective.train()
        config = self.config
        if config.freeze_batchnorm:
            for module in self.student.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        while True:
            self._train_step(next(self.batches))
            epoch, rest = divmod(self.step, self.epoch_steps)
            ended = self.step == self.steps
            saves = ended or (rest == 0 and epoch % config.save_every == 0)
            evaluates = ended or (rest == 0 and config.eval_every > 0 and epoch % config.eval_every == 0)
            if saves or evaluates:
                break
        self.log.flush()
        self._require_finite()  # weights that are not finite are never written to a file
        self.seconds += time.perf_counter() - started
        if saves:  # before the evaluation, which may fail at a fault of the validation set
            self._save()
        if evaluates:
            self._evaluate()

    def _train_step(self, batch: Batch) -> None:
        lr = float(self.scheduler.get_last_lr()[0])
        unlabelled = next(self.unlabelled)
        if unlabelled is not None and self.config.pseudo_labels is not None:
            batch, unlabelled = joined(batch, unlabelled), None
        size = input_size(self.config.size, self.config.multi_scale, self.config.seed, self.step)
        targets = batch.targets.to(self.accelerator.device, non_blocking=True)
        images, targets = at_size(self._moved(batch.images), targets, size)
        if self.plots is not None:
            self.plots.batch(self.step, images, targets)
        more = None if unlabelled is None else at_size(self._moved(unlabelled.images), targets[:0], size)[0]
        loss, terms = self.objective(images, targets, more)
        self.accelerator.backward(loss)
        if self.config.clip:
            self.accelerator.clip_grad_norm_(self.parameters, self.config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if (
            not self.accelerator.optimizer_step_was_skipped
        ):  # the gradient scaler of fp16 skips a step after an overflow
            self.scheduler.step()
            self._update_average()
        self.step += 1
        self.log.step(self.step, self.step // self.epoch_steps, terms, lr)

    def _moved(self, images: Tensor) -> Tensor:
        return images.to(self.accelerator.device, non_blocking=True, memory_format=torch.channels_last)

    def result(self) -> TrainResult:
        """Return the result of a finished run; evaluate first if a resumed run had no step left."""
        if not self.evaluated:
            self._evaluate()
        model = self.average.eval()
        return TrainResult(
            model, tuple(self.data.class_names), self.metrics, self.step, self.seconds, self.out / "model.pt"
        )

    def how_to_continue(self) -> str:
        """Return the end of an error message: how to continue the run after the error."""
        file = self.out / "checkpoint.pt"
        if not file.is_file():
            return f"no checkpoint had been written to {self.out} yet"
        return f"to continue from {file}, run the same command with --resume"

    def close(self) -> None:
        self.log.close()
        del self.objective, self.optimizer
        self.accelerator.free_memory()  # DDP must be freed before its process group, or the exit may hang
        if self.distiller is not None:
            self.distiller.remove()

    def _evaluate(self) -> None:
        """Evaluate, export and plot the averaged weights, on the main process."""
        self.evaluated = True
        if self.plots is not None:
            detections = evaluation = None
            if self.val is not None:
                config = self.config
                detections = detect_all(self.average, self.val, batch_size=config.batch, workers=config.workers)
                evaluation = coco_evaluation(detections, self.val)
                self.metrics = metrics_of(evaluation, self.val.class_names)
                self.log.metrics(self.step, self.metrics.as_dict(), str(self.metrics))
            for name in ("model.pt", "model.weights"):
                save_detector(self.average, self.out / name, self.data.class_names, self.config.size)
            if self.distiller is not None:  # on this process only: maps need no collective operation
                self.log.figures(self.step, self._figures)
            self.plots.evaluation(detections, evaluation, self.val, last=self.step == self.steps)
        self.accelerator.wait_for_everyone()

    def _figures(self) -> dict[str, Figure]:
        """Return figures of the distillation maps on a few images, always the same."""
        batch = some_batch(self.val or self.data, FIGURE_IMAGES)
        if not len(batch.images):  # no image can be read
            return {}
        images, targets = self._moved(batch.images), batch.targets.to(self.accelerator.device)
        return map_figures(images, cast(Distiller, self.distiller).maps(images, self.prior_of(images, targets)))

    def _update_average(self) -> None:
        """Update the moving average of weights and batch norm statistics; its decay increases up to ``ema``.

        One call updates lists that are made once; ``AveragedModel`` would visit all modules in every step.
        """
        decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self._averaged, self._current, 1 - decay)

    def _require_finite(self) -> None:
        if not all(bool(x.isfinite().all()) for x in (*self._current, *self._averaged)):
            raise FloatingPointError(f"weights are not finite after step {self.step}; lower the learning rate")

    def _save(self) -> None:
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            content = {
                "config": asdict(self.config),
                "step": self.step,
                "seconds": self.seconds,
                "student": self.student.state_dict(),
                "average": self.average.state_dict(),
                "teacher": self.teacher_fingerprint,
                "distiller": None if self.distiller is None else self.distiller.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
            }
            save(content, self.out / "checkpoint.pt")
        self.accelerator.wait_for_everyone()

    def _pseudo_labelled(self, unlabelled: DetectionDataset, *, resumed: bool) -> DetectionDataset:
        """Return these images with the teacher's detections as labels; the main process writes them for all."""
        config, file = self.config, self.out / PSEUDO_LABELS
        if self.accelerator.is_main_process and not (resumed and file.is_file()):
            labels = pseudo_labels(
                unlabelled,
                _teacher_of(config, self.data).to(self.accelerator.device),
                self.data.class_names,
                score_threshold=cast(float, config.pseudo_labels),
                batch_size=config.batch,
                workers=config.workers,
            )
            with replacing(file) as part:
                part.write_text(json.dumps(labels.coco()), encoding="utf-8")
            counts = (len(labels.rows) / len(labels), len(self.data.annotations.rows) / len(self.data))
            print("pseudo-labels: {:.1f} boxes per image; the labelled images have {:.1f}".format(*counts))
        self.accelerator.wait_for_everyone()
        return DetectionDataset(file, cast(str, config.unlabelled), config.size, **_training_options(config))

    def _hold(self, held: contextlib.ExitStack) -> None:
        """Lock the run's folder against other processes; if that fails, all ranks raise the error."""
        refused: list[Exception | None] = [None]
        if self.accelerator.is_main_process:
            try:
                held.enter_context(alone_in(self.out, (*RUN_FILES, *PLOT_FILES)))
            except OSError as error:
                refused = [error]
        broadcast_object_list(refused)  # in place
        if refused[0] is not None:
            raise refused[0]

    def _saved(self) -> dict[str, Any] | None:
        """Return the checkpoint to continue from, or None to start from the beginning."""
        there = [name for name in RUN_FILES if (self.out / name).exists()]
        begun = read_log(self.out / "metrics.jsonl")
        plots = [name for name in PLOT_FILES if (self.out / name).exists()]
        if plots and not there:
            raise FileExistsError(
                f"out: {self.out} has no run, but {', '.join(plots)}, which would be overwritten; choose another folder"
            )
        if not begun and not {"checkpoint.pt", "model.pt", "model.weights"} & set(there):
            return None  # a run that ended before its first step does not count
        if there and not self.config.resume:
            raise FileExistsError(
                f"out: {self.out} already contains a run ({', '.join(there)}); resume it (--resume) or choose another "
                "folder"
            )
        if "checkpoint.pt" not in there:
            trained = [name for name in there if name.startswith("model")]
            if trained:
                raise FileExistsError(
                    f"out: {self.out} has no checkpoint.pt to continue from, but {', '.join(trained)}, which are not "
                    "overwritten; move them away, or choose another folder"
                )
            require_same_run(asdict(read_config(self.out)), asdict(self.config), 0)
            return None
        saved = _read_checkpoint(self.out)
        require_same_run(saved["config"], asdict(self.config), saved["step"])
        return saved

    def _restore(self, saved: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
        _require_same_teacher(saved, self.config, self.teacher_fingerprint)
        self.step, self.seconds = saved["step"], saved["seconds"]
        with _fitting(self.out):
            self.student.load_state_dict(saved["student"])
            self.average.load_state_dict(saved["average"])
            if self.distiller is not None:
                self.distiller.load_state_dict(saved["distiller"])
            optimizer.load_state_dict(saved["optimizer"])
            self.scheduler.load_state_dict(saved["scheduler"])

    def _open_log(self) -> RunLog:
        main = self.accelerator.is_main_process
        self.out.mkdir(parents=True, exist_ok=True)
        if main:
            with replacing(self.out / "config.json") as part:
                part.write_text(json.dumps(asdict(self.config), indent=2) + "\n", encoding="utf-8")
        return RunLog(
            self.out,
            self.terms,
            first=self.step,
            last=self.steps,
            batch=self.config.images_per_step,
            every=self.config.log_every,
            show=main,
            tensorboard=self.config.tensorboard,
            reduce=self._mean_over_ranks,
        )

    def _mean_over_ranks(self, values: Tensor) -> Tensor:
        return cast(Tensor, self.accelerator.reduce(values, "mean"))


def _explain(error: RuntimeError | OSError | EOFError | FloatingPointError, run: _Run) -> None:
    """Raise the error that ended a run again, with its cause in words and how to continue; return for other errors."""
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    of_loader = run.config.workers > 0 and isinstance(error, (ConnectionError, EOFError))
    if of_loader or "DataLoader worker" in first:
        hint = "probably out of memory or of shared memory (/dev/shm); take fewer --workers, or 0"
        raise ChildProcessError(
            f"a process that loads images has died ({first}): {hint}; {run.how_to_continue()}"
        ) from error
    if isinstance(error, (OSError, FloatingPointError)):
        raise type(error)(f"{error}; {run.how_to_continue()}") from error
    if isinstance(error, torch.OutOfMemoryError):
        hint = "take a smaller --batch, --size or --multi-scale, or --mixed-precision bf16"
        raise MemoryError(f"{first} {hint}; {run.how_to_continue()}") from error
    # gloo raises plain RuntimeErrors
    if run.accelerator.num_processes > 1 and (
        isinstance(error, torch.distributed.DistError) or "gloo" in str(error).lower()
    ):
        raise ConnectionError(
            f"process {run.accelerator.process_index} of {run.accelerator.num_processes}: another process has died "
            f"after step {run.step} ({first}); see the output of that process; {run.how_to_continue()}"
        ) from error


# ---- checkpoints


def _read_checkpoint(out: Path) -> dict[str, Any]:
    try:
        found = read_dictionary(out / "checkpoint.pt", "a checkpoint", CHECKPOINT_KEYS)
        if not isinstance(found["config"], dict) or not isinstance(found["step"], int):
            raise ValueError(f"{out / 'checkpoint.pt'}: expected a configuration and a step, got values of other types")
        return found
    except ValueError as error:
        raise ValueError(
            f"{error}; train into another folder, or move checkpoint.pt and the models there away to start again"
        ) from error


@contextlib.contextmanager
def _fitting(out: Path) -> Iterator[None]:
    """Turn errors of loading a run's checkpoint into a ValueError that names the file."""
    try:
        yield
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        first = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{out / 'checkpoint.pt'}: does not fit the run's models; was it written by another version of fastkd? "
            f"({type(error).__name__}: {first})"
        ) from error


# ---- data


def training_set(config: TrainConfig) -> DetectionDataset:
    """Return the run's training set, augmented. Raises what ``DetectionDataset`` raises."""
    options = _training_options(config)
    return DetectionDataset(config.annotations, config.images, config.size, limit=config.limit, **options)


def _training_options(config: TrainConfig) -> dict[str, Any]:
    """Return the options that all images of the training share, with labels or without."""
    return {
        "augmentation": config.augmentation,
        "seed": config.seed,
        "cache": config.cache,
        "strict": config.strict,
    }


def validation_set(config: TrainConfig) -> DetectionDataset | None:
    """Return the run's validation set, or None."""
    if config.val_annotations is None or config.val_images is None:
        return None
    annotations, images = config.val_annotations, config.val_images
    return DetectionDataset(annotations, images, config.size, cache=config.cache, strict=config.strict)


def unlabelled_set(config: TrainConfig) -> DetectionDataset | None:
    """Return the images without labels, augmented like the training set, or None."""
    if config.unlabelled is None:
        return None
    return DetectionDataset.of_images(config.unlabelled, config.size, **_training_options(config))


def unlabelled_batches(
    data: DetectionDataset | None, config: TrainConfig, first: int, last: int, *, rank: int = 0, ranks: int = 1
) -> Iterator[Batch | None]:
    """Yield the images without labels of the steps ``first`` to ``last`` - 1; None for each step if there are none."""
    if data is None:
        return itertools.repeat(None)
    return batches(
        data, replace(config, batch=config.unlabelled_batch or config.batch), first, last, rank=rank, ranks=ranks
    )


def batches(
    data: DetectionDataset, config: TrainConfig, first: int, last: int, *, rank: int = 0, ranks: int = 1
) -> Iterator[Batch]:
    """Yield the batches of the steps ``first`` to ``last`` - 1: this rank's share of each."""
    loader = DataLoader(
        _ByEpoch(data),
        batch_sampler=cast(Sampler[list[int]], _Steps(len(data), config, first, last, rank, ranks)),
        num_workers=config.workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available() and not config.cpu,
    )
    return iter(loader)


class _ByEpoch(Dataset[Sample]):
    """A data set indexed by (epoch, index), so that one loader serves the whole run and a batch may span two epochs."""

    def __init__(self, data: DetectionDataset) -> None:
        self.data = data

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        return self.data.sample(index, epoch)


class _Steps(Sampler[list[tuple[int, int]]]):
    """Yields a list of (epoch, index) per step; every epoch visits the data set in another order."""

    def __init__(self, size: int, config: TrainConfig, first: int, last: int, rank: int, ranks: int) -> None:
        self.size, self.batch, self.seed = size, config.batch, config.seed
        self.steps, self.share = range(first, last), range(rank, config.batch, ranks)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in self.steps:
            places = (divmod(step * self.batch + slot, self.size) for slot in self.share)
            yield [(epoch, _order(self.size, self.seed, epoch)[place]) for epoch, place in places]

    def __len__(self) -> int:
        return len(self.steps)


@lru_cache(maxsize=4)
def _order(size: int, seed: int, epoch: int) -> list[int]:
    order: list[int] = np.random.default_rng([seed, epoch]).permutation(size).tolist()
    return order


# ---- model and optimiser


def _initial(config: TrainConfig, data: DetectionDataset) -> tuple[Detector, str]:
    """Return the model that training starts from, and a line that lists which layers of ``init`` it has kept.

    Random weights depend on the seed alone, so they are the same with and without distillation. The line is empty
    without ``init``.
    """
    found = None if config.init is None else _init_of(config)
    same_heads = found is not None and _has_classes(found, data)
    anchors = None if found is None else found.model.anchors
    if config.anchors == "data" or (config.anchors is None and not same_heads):
        anchors = _anchors(data, MODELS[config.model].strides, 3 if anchors is None else anchors.shape[1])
    if found is None:
        return build_detector(config.model, data.num_classes, config.width, anchors), ""
    if not same_heads:
        return _with_new_heads(found, config, data, cast(Tensor, anchors))
    if not torch.allclose(cast(Tensor, anchors), found.model.anchors):
        warnings.warn(
            f"anchors: those of {config.init}, {_listed(found.model.anchors)}, are replaced by those of the data, "
            f"{_listed(cast(Tensor, anchors))}, because of anchors='data'; the heads have to learn them",
            stacklevel=2,
        )
    found.model.anchors.copy_(cast(Tensor, anchors))
    count = sum(isinstance(module, nn.Conv2d) for module in found.model.modules())
    return found.model.train(), f"init: kept all {count} convolutions of {config.init}"


def _init_of(config: TrainConfig) -> Trained:
    """Return the detector of ``init``, which must have the run's model and width."""
    found = load_detector(cast(str, config.init), model=config.model, width=config.width)
    if not isinstance(found.model, MODELS[config.model]) or found.model.width != config.width:
        raise ValueError(
            f"init: expected a {config.model} of width {config.width}, got {config.init} with "
            f"{type(found.model).__name__} of width {found.model.width}"
        )
    return found


def _with_new_heads(
    found: Trained, config: TrainConfig, data: DetectionDataset, anchors: Tensor
) -> tuple[Detector, str]:
    """Return a model with all weights of ``found`` except those of the heads' last convolutions, and a line on it."""
    model = build_detector(config.model, data.num_classes, config.width, anchors)
    kept = {name: x for name, x in found.model.state_dict().items() if not name.startswith(("head", "anchors"))}
    model.load_state_dict(model.state_dict() | kept)
    count, heads = sum(isinstance(module, nn.Conv2d) for module in model.modules()), len(model.strides)
    of_file = found.model.num_classes
    which = f"{of_file} classes" if of_file != data.num_classes else f"other classes: {_shorten(found.class_names)}"
    origin = "of the data" if config.anchors != "default" else "those of the file"
    return model, (
        f"init: kept {count - heads} of {count} convolutions of {config.init} ({which}); "
        f"new: the last one of each of the {heads} heads, for {data.num_classes} classes; anchors: {origin}"
    )


def _listed(anchors: Tensor) -> str:
    return "  ".join(f"{w:.0f},{h:.0f}" for w, h in anchors.flatten(0, 1).tolist())


def _anchors(data: DetectionDataset, strides: Sequence[int], per_head: int) -> Tensor:
    try:
        return dataset_anchors(data.box_sizes(), strides, per_head)
    except ValueError as error:
        raise ValueError(
            f"anchors: expected enough boxes in the training set to choose them ({error}); use anchors='default' "
            "(--anchors default), or more images"
        ) from error


def _require_scorable(val: DetectionDataset, data: DetectionDataset) -> None:
    """Raise ValueError for faults of a validation set that would end the run at its first evaluation."""
    if val.class_names != data.class_names:
        raise ValueError(
            f"val_annotations: expected the training set's classes {_shorten(data.class_names)}, "
            f"got {_shorten(val.class_names)}"
        )
    if val.annotations.crowd.all():
        raise ValueError("val_annotations: expected boxes to find, got none; to train without validation, leave it out")


def require_classes(name: str, found: Trained | Exported, data: DetectionDataset) -> None:
    """Check that a detector from a file has the data set's classes, in the same order; names may be missing.

    Raises:
        ValueError: it has other classes (the message names them, and where their names come from).
    """
    if not _has_classes(found, data):
        of_file = _shorten(found.class_names) if found.class_names else "without names"
        raise ValueError(
            f"{name}: expected the data set's {data.num_classes} classes {_shorten(data.class_names)}, "
            f"got {found.model.num_classes}: {'; '.join((of_file, *found.notes))}"
        )


def _has_classes(found: Trained | Exported, data: DetectionDataset) -> bool:
    names = found.class_names or data.class_names
    return found.model.num_classes == data.num_classes and same_names(names, data.class_names)


def _shorten(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")


def _optimizer(config: TrainConfig, objective: nn.Module) -> torch.optim.Optimizer:
    parameters = list(objective.parameters())
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    fused = parameters[0].device.type in ("cpu", "cuda")
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, fused=fused)
    return torch.optim.SGD(groups, lr=config.lr, momentum=0.9, nesterov=True, fused=fused)


def _to_channels_last(model: Any) -> None:
    """Change the model to the layout in which convolutions are fastest: on CPUs by a quarter, and on tensor cores."""
    model.to(memory_format=torch.channels_last)


def _floats(model: nn.Module) -> list[Tensor]:
    """Return weights and batch norm statistics, which share the model's memory."""
    return [x.detach() for x in (*model.parameters(), *model.buffers()) if x.is_floating_point()]


def _lr_factor(step: int, steps: int, warmup: int, final: float) -> float:
    """Return the learning rate's factor: linear from near 0 to 1 in ``warmup`` steps, then a cosine to ``final``."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(steps - warmup, 1)
    return final + (1 - final) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2


# ---- checks


def check_distillation(config: TrainConfig) -> Report:
    """Check whether distillation works in a run of this configuration, as ``Distiller.check`` does.

    The models are those of the run's last checkpoint or, without one, the initial models. The teacher is also
    evaluated on the first images of the validation set or, without one, of the training set.

    Raises:
        ValueError: the run has no teacher, or what ``build_objective`` raises.
    """
    data = training_set(config)
    objective = build_objective(config, data)
    if objective.distiller is None:
        raise ValueError(
            "teacher: expected a run that imitates a teacher, got one that does not, so nothing can be checked"
        )
    load_checkpoint(config, objective)
    report = _report(objective, objective.distiller, data, _optimizer(config, objective))
    teacher = cast(Detector, objective.distiller.teacher)
    return Report((report.checks[0], _check_score(teacher, config), *report.checks[1:]))


def _check_score(teacher: Detector, config: TrainConfig) -> Check:
    """Check that the teacher detects objects: its weights may have been trained for other images or classes."""
    name = "teacher scores"
    of_val = config.val_annotations is not None
    annotations, images = (config.val_annotations, config.val_images) if of_val else (config.annotations, config.images)
    data = DetectionDataset(cast(str, annotations), images, config.size, limit=SCORED_IMAGES)
    if data.annotations.crowd.all():
        return Check(name, None, f"not known: the first {len(data)} images have no box")
    found = evaluate(teacher, data, batch_size=8).AP50
    message = (
        f"AP50 {100 * found:.1f} on the first {len(data)} images of the {'validation' if of_val else 'training'} set"
    )
    if found < LEAST_AP50:
        return Check(
            name, False, f"{message}, which is hardly anything; was it trained on these classes, in this order?"
        )
    return Check(name, True, message)


def load_checkpoint(config: TrainConfig, objective: Objective) -> None:
    """Load weights, adapters and statistics of the run's last checkpoint into an objective, if there is one."""
    out = Path(config.out)
    if not (out / "checkpoint.pt").is_file():
        return
    saved = _read_checkpoint(out)
    if objective.distiller is not None:
        _require_same_teacher(saved, config, fingerprint(objective.distiller.teacher))
    with _fitting(out):
        objective.student.load_state_dict(saved["student"])
        if objective.distiller is not None:
            objective.distiller.load_state_dict(saved["distiller"])


def _require_same_teacher(saved: dict[str, Any], config: TrainConfig, found: str | None) -> None:
    if saved["teacher"] != found:
        raise ValueError(
            f"teacher: expected the weights that this run has learnt from, with fingerprint {saved['teacher']}, got "
            f"{found} in {config.teacher}; put the same weights there, or choose another out"
        )


def _report(
    objective: Objective, distiller: Distiller, data: DetectionDataset, optimizer: torch.optim.Optimizer
) -> Report:
    device = next(objective.parameters()).device
    # maps that are computed from boxes are zero on images without boxes
    rows = np.unique(data.annotations.rows)[:4].tolist() or [0]
    batch = collate([data[rows[i % len(rows)]] for i in range(4)])
    images, targets = batch.images.to(device), batch.targets.to(device)
    with torch.no_grad():
        task, _ = objective.detection(objective.student.eval()(images), targets)
    objective.train()
    return distiller.check(images, optimizer, task, prior=objective.prior_of(images, targets))
