"""The demo: trains a small detector on few labels with and without distillation, on digits scenes, on a CPU."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import fastkd
from fastkd import viz
from fastkd.files import alone_in, new_folder, replacing
from fastkd.yolov3.checkpoint import load_detector
from fastkd.yolov3.data.augment import Augmentation
from fastkd.yolov3.data.dataset import Batch, DetectionDataset, collate, spread
from fastkd.yolov3.data.digits import write_digits
from fastkd.yolov3.data.draw import draw
from fastkd.yolov3.show.inspect import inspect_run
from fastkd.yolov3.show.predict import detect_objects
from fastkd.yolov3.train.config import TrainConfig
from fastkd.yolov3.train.evaluate import Metrics, evaluate
from fastkd.yolov3.train.log import read_log, versions
from fastkd.yolov3.train.objective import Objective
from fastkd.yolov3.train.run import TrainResult, build_objective, load_checkpoint, train, training_set

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLAIN, DISTILLED = "without distillation", "with distillation"
SHOWN = ("mAP", "AP50", "AP75")
SCENES_SHOWN = 5  # number of scenes in the figures
MARK = ".demo"  # a file that marks the folder of a demo
DRAWN = ("curves", "predictions", "maps", "differences", "level_losses")


@dataclass(frozen=True)
class Settings:
    """The trainings of the demo.

    Args:
        scenes: number of scenes for the teacher's training.
        labelled: number of these scenes, with labels, for the students' training.
        val, test: number of scenes for the curves, and for the table.
        teacher_width, student_width: width of YOLOv3 and of YOLOv3-tiny.
        teacher_steps, student_steps, batch: number of steps, and images per step.
        teacher_lr: learning rate of the teacher.
        plain, distilled: further options of each student's configuration, as the study (docs/study) chose them for 100
            labelled scenes.
        teacher_match: ``match_threshold`` of the teacher, lower than the student's: more of its heads are trained on
            each box, so that the coarse levels, which the student has too, learn boxes of every size.
        curve_points: number of evaluations during a student's training.
        size: side of a scene and of the network's input in pixels.
    """

    scenes: int = 4000
    labelled: int = 100
    val: int = 300
    test: int = 500
    teacher_width: float = 0.25
    student_width: float = 0.25
    teacher_steps: int = 1200
    student_steps: int = 1280
    batch: int = 16
    teacher_lr: float = 1.6e-2
    plain: Mapping[str, Any] = field(default_factory=lambda: {"lr": 6.4e-2, "weight_decay": 0.2})
    distilled: Mapping[str, Any] = field(
        default_factory=lambda: {"lr": 0.128, "weight_decay": 0.05, "distill_share": 4.0}
    )
    teacher_match: float = 0.3
    curve_points: int = 5
    size: int = 96


@dataclass(frozen=True)
class Student:
    """One trained student."""

    kind: str  # PLAIN or DISTILLED
    seed: int
    config: TrainConfig
    result: TrainResult


def run_demo(
    out: str | os.PathLike[str] = "runs/demo", seeds: int = 1, settings: Settings = Settings()
) -> dict[str, Any]:
    """Train teacher and students, compare them on the test scenes, print a table and write plots.

    The folder gets ``results.json`` (all numbers, seeds and versions), ``report.txt``, the plots ``curves.png``,
    ``predictions.png`` and those of ``inspect_run``, the data and the trained models. A teacher in the folder is used
    again; students are always trained, and the results of an earlier demo are moved to ``earlier``.

    Args:
        out: the folder.
        seeds: number of seeds with which both students are trained.
        settings: sizes and lengths of the trainings.

    Returns:
        The content of ``results.json``.

    Raises:
        ValueError: seeds < 1, or the teacher in ``out`` was trained with other settings.
        FileExistsError: ``out`` contains something else than a demo.
    """
    if seeds < 1:
        raise ValueError(f"seeds: expected at least 1, got {seeds}")
    started = time.perf_counter()
    root = Path(out)
    import matplotlib  # noqa: F401  # if it is missing, fail before the trainings

    _require_own(root)
    with alone_in(root):
        (root / MARK).touch()
        _put_aside(root)
        return _demo(root, seeds, settings, started)


def _require_own(root: Path) -> None:
    there = [x.name for x in root.iterdir() if not x.name.startswith(".")] if root.is_dir() else []
    if there and not (root / MARK).is_file():
        raise FileExistsError(f"out: {root} contains other files ({', '.join(there[:3])}); give another folder")


def _put_aside(root: Path) -> None:
    """Move the files of an earlier demo, except the teacher and the scenes, into a new folder."""
    names = ("students", "results.json", "report.txt", *(f"{name}.png" for name in DRAWN))
    there = [root / name for name in names if (root / name).exists()]
    if there:
        aside = new_folder(root / "earlier")
        aside.mkdir()
        for path in there:
            path.rename(aside / path.name)


def _demo(root: Path, seeds: int, settings: Settings, started: float) -> dict[str, Any]:
    print(f"making digits scenes in {root / 'digits'}")
    write_digits(root / "digits", train=settings.scenes, val=settings.val, test=settings.test, size=settings.size)
    teacher = _train_teacher(root, settings)
    students = [_train_student(root, settings, seed, x) for x in (None, teacher) for seed in range(seeds)]

    print("scoring on the test scenes")
    test = _scenes(root, settings, "test")
    scores = {"teacher": evaluate(teacher.model, test)}
    scores |= {_name(s): evaluate(s.result.model, test) for s in students}
    last = next(s for s in students if s.kind == DISTILLED)
    objective = _restored(last)
    batch = collate([test[i] for i in range(min(settings.batch, len(test)))])
    shares = _shares_of_step(objective, batch, last.result.seconds / last.result.steps)
    results = _results(settings, seeds, teacher, students, scores, shares, time.perf_counter() - started)
    report = _report(results)
    for name, text in (("results.json", json.dumps(results, indent=2)), ("report.txt", report)):
        with replacing(root / name) as part:
            part.write_text(text + "\n", encoding="utf-8")
    _draw(root, settings, teacher, students, test)
    print("\n" + report)
    print(f"\n{', '.join(f'{name}.png' for name in DRAWN)}, results.json and report.txt are in {root}")
    return results


# ---- training


def _train_teacher(root: Path, settings: Settings) -> TrainResult:
    if (root / "teacher" / "checkpoint.pt").is_file():
        print(f"using the teacher in {root / 'teacher'} (delete that folder to train it again)")
    else:
        print(f"training the teacher on {settings.scenes} scenes")
    return train(
        TrainConfig(
            **_data(root, "train", "train"),
            out=str(root / "teacher"),
            model="yolov3",
            width=settings.teacher_width,
            size=settings.size,
            steps=settings.teacher_steps,
            batch=settings.batch,
            lr=settings.teacher_lr,
            match_threshold=settings.teacher_match,
            eval_every=0,
            resume=True,
        )
    )


def _train_student(root: Path, settings: Settings, seed: int, teacher: TrainResult | None) -> Student:
    kind, options = (PLAIN, settings.plain) if teacher is None else (DISTILLED, settings.distilled)
    print(f"training the student {kind}, seed {seed}, on {settings.labelled} scenes")
    epochs = settings.student_steps / math.ceil(settings.labelled / settings.batch)
    config = TrainConfig(
        **_data(root, f"train_{settings.labelled}", "train"),
        val_annotations=str(root / "digits/annotations/val.json"),
        val_images=str(root / "digits/images/val"),
        out=str(root / "students" / f"{kind.split()[0]}-seed{seed}"),
        model="yolov3-tiny",
        width=settings.student_width,
        size=settings.size,
        teacher=None if teacher is None else str(teacher.model_file),
        steps=settings.student_steps,
        batch=settings.batch,
        seed=seed,
        eval_every=max(1, round(epochs / settings.curve_points)),
        **options,
    )
    return Student(kind, seed, config, train(config))


def _data(root: Path, annotations: str, images: str) -> dict[str, Any]:
    """Return the options that all trainings share: digits must not be mirrored, and the scenes fit in memory."""
    return {
        "annotations": str(root / f"digits/annotations/{annotations}.json"),
        "images": str(root / f"digits/images/{images}"),
        "augmentation": Augmentation(flip=0.0, mosaic=0.0),
        "multi_scale": 0.0,
        "cache": True,
        "save_every": 50,
        "tensorboard": False,
        "plots": False,
        "cpu": True,
    }


def _scenes(root: Path, settings: Settings, split: str) -> DetectionDataset:
    return DetectionDataset(
        root / f"digits/annotations/{split}.json", root / f"digits/images/{split}", settings.size, cache=True
    )


# ---- numbers


def _restored(student: Student) -> Objective:
    """Return student, teacher, adapters and statistics as they were at the end of the training."""
    objective = build_objective(student.config, training_set(student.config))
    load_checkpoint(student.config, objective)
    return objective


def _distiller(objective: Objective) -> fastkd.Distiller:
    if objective.distiller is None:
        raise ValueError("objective: expected one with a teacher")
    return objective.distiller


def _loss_arguments(
    objective: Objective, batch: Batch
) -> tuple[list[Tensor], list[Tensor], Sequence[Tensor | None] | None, Tensor]:
    """Return arguments of the distillation loss for timing: student's and teacher's features, prior, task loss."""
    caught: list[Any] = []
    distiller = _distiller(objective)
    hook = distiller.criterion.register_forward_pre_hook(lambda _, arguments: caught.append(arguments))
    try:
        with torch.no_grad():
            objective.eval().student(batch.images)
            distiller.loss(batch.images, objective.prior_of(batch.images, batch.targets), torch.ones(()))
    finally:
        hook.remove()
    student, teacher, prior, task_loss = caught[0]
    return student, teacher, prior, task_loss


def _shares_of_step(objective: Objective, batch: Batch, step_seconds: float, repeats: int = 15) -> dict[str, float]:
    """Return the shares of a mean training step of the distillation loss, forward and backward, and the teacher."""
    distiller = _distiller(objective)
    criterion, model = distiller.criterion, distiller.teacher
    student, *constants = _loss_arguments(objective, batch)
    leaves = [x.detach().requires_grad_() for x in student]
    parameters = [*leaves, *criterion.parameters()]

    def loss() -> None:
        torch.autograd.grad(criterion(leaves, *constants), parameters)

    @torch.no_grad()
    def forward() -> None:
        model(batch.images)

    return {
        "distillation_loss": _median_seconds(loss, repeats) / step_seconds,
        "teacher": _median_seconds(forward, repeats) / step_seconds,
    }


def _median_seconds(work: Any, repeats: int) -> float:
    times = []
    for _ in range(repeats + 2):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times[2:])  # the first two warm up


def _results(
    settings: Settings,
    seeds: int,
    teacher: TrainResult,
    students: Sequence[Student],
    scores: dict[str, Metrics],
    shares: dict[str, float],
    seconds: float,
) -> dict[str, Any]:
    by_kind = {kind: [scores[_name(s)] for s in students if s.kind == kind] for kind in (PLAIN, DISTILLED)}
    gains = {
        name: [getattr(b, name) - getattr(a, name) for a, b in zip(by_kind[PLAIN], by_kind[DISTILLED], strict=True)]
        for name in SHOWN
    }
    return {
        "note": _note(settings),
        "versions": versions(),
        "machine": {"system": platform.system(), "cpu_threads": torch.get_num_threads()},
        "settings": asdict(settings),
        "seeds": list(range(seeds)),
        "teacher": {
            "test": scores["teacher"].as_dict(),
            "seconds": teacher.seconds,
            "steps": teacher.steps,
            "labelled_scenes": settings.scenes,
        },
        "students": [
            {
                "kind": s.kind,
                "seed": s.seed,
                "seconds": s.result.seconds,
                "steps": s.result.steps,
                "labelled_scenes": settings.labelled,
                "test": scores[_name(s)].as_dict(),
            }
            for s in students
        ],
        "mean_test": {kind: _mean_and_spread(by_kind[kind]) for kind in by_kind},
        "gain": {name: _summary(values) for name, values in gains.items()},
        "share_of_step": shares,
        "seconds": seconds,
    }


def _mean_and_spread(metrics: Sequence[Metrics]) -> dict[str, Any]:
    return {name: _summary([getattr(m, name) for m in metrics]) for name in SHOWN}


def _summary(values: Sequence[float]) -> dict[str, Any]:
    """Return the mean and, if there are several values, the sample's standard deviation."""
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.mean(values), "standard_deviation": spread, "values": list(values)}


def _note(settings: Settings) -> str:
    return (
        f"The teacher was trained on the labels of {settings.scenes} scenes for {settings.teacher_steps} steps. Both "
        f"students see only {settings.labelled} of these scenes, with labels, for the same {settings.student_steps} "
        "steps and from the same initial weights; the distilled one also sees the teacher's features on them, which "
        "takes more time. So distillation passes on what the teacher learnt from its larger data. "
        "Learning rate and weight decay of each student are those that the study of the maps chose on other scenes. "
        f"Scores are on {settings.test} test scenes, which were not used to choose anything; they are made of other "
        "digits and the other halves of the photographs than the training scenes."
    )


def _report(results: dict[str, Any]) -> str:
    """Return the table and the note as text."""
    settings = results["settings"]
    rows = [f"{'on the test scenes':<34}{'mAP':>12}{'AP50':>12}{'AP75':>12}{'seconds':>9}"]
    test = results["teacher"]["test"]
    name = f"teacher, YOLOv3 x{settings['teacher_width']:g}"
    rows.append(_row(name, [f"{100 * test[x]:.1f}" for x in SHOWN], f"{results['teacher']['seconds']:.0f}"))
    for kind, means in results["mean_test"].items():
        seconds = statistics.mean(s["seconds"] for s in results["students"] if s["kind"] == kind)
        rows.append(_row(f"student, {kind}", [_points(means[x]) for x in SHOWN], f"{seconds:.0f}"))
    rows.append(_row("gain, paired by seed", [_points(results["gain"][x], "+") for x in SHOWN], ""))
    shares = results["share_of_step"]
    rows.append(
        f"\nof a step of the distilled student, the distillation loss with its adapters takes "
        f"{shares['distillation_loss']:.1%} and the teacher's forward {shares['teacher']:.1%}; the demo took "
        f"{results['seconds']:.0f} s"
    )
    return "\n".join(rows) + "\n\n" + textwrap.fill(results["note"], 100)


def _row(name: str, values: Sequence[str], seconds: str) -> str:
    return f"{name:<34}" + "".join(f"{value:>12}" for value in values) + f"{seconds:>9}"


def _points(summary: dict[str, Any], sign: str = "") -> str:
    spread = summary["standard_deviation"]
    return f"{100 * summary['mean']:{sign}.1f}" + ("" if spread is None else f" ± {100 * spread:.1f}")


def _name(student: Student) -> str:
    return f"{student.kind}, seed {student.seed}"


# ---- plots


def _draw(
    root: Path,
    settings: Settings,
    teacher: TrainResult,
    students: Sequence[Student],
    test: DetectionDataset,
) -> None:
    """Write the plots ``DRAWN``, of a few of the test scenes."""
    pair = {s.kind: s for s in students if s.seed == 0}
    models = {
        f"teacher ({settings.scenes} labelled scenes)": teacher.model,
        **{f"student {kind}": load_detector(s.result.model_file).model for kind, s in pair.items()},
    }
    rows = spread(len(test), SCENES_SHOWN)
    images = collate([test[i] for i in rows]).images
    figures = {
        "curves": _curves(settings, students),
        "predictions": _predictions(models, images, teacher.class_names, settings.size),
    }
    for name, figure in figures.items():
        with replacing(root / f"{name}.png") as part:
            figure.savefig(part, format="png")
    files = [test.annotations.path(i) for i in rows]
    inspect_run(pair[DISTILLED].config.out, files, out=root, count=SCENES_SHOWN)


def _curves(settings: Settings, students: Sequence[Student]) -> Figure:
    """Return a plot of both students' mAP on the validation scenes over the training, with bands over the seeds."""
    curves = {}
    for kind in (PLAIN, DISTILLED):
        logs = [read_log(Path(s.config.out) / "metrics.jsonl") for s in students if s.kind == kind]
        points = [[(x["step"], 100 * x["metrics"]["mAP"]) for x in log if "metrics" in x] for log in logs]
        steps = [step for step, _ in points[0]]
        curves[f"student {kind}"] = (steps, [[value for _, value in seed] for seed in points])
    return viz.plot_curves(curves, y_label=f"mAP on {settings.val} validation scenes")


def _predictions(models: dict[str, Any], images: Tensor, class_names: Sequence[str], size: int) -> Figure:
    """Return a figure with one row per scene and one column per model; scenes are enlarged to make names readable."""
    import cv2
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.6 * len(models), 2.6 * len(images)), dpi=150, layout="constrained")
    axes = figure.subplots(len(images), len(models), squeeze=False)
    for axis, name in zip(axes[0], models, strict=True):
        axis.set_title(name, fontsize=8)
    for row, image in zip(axes, images, strict=True):
        pixels = (image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
        enlarged = cv2.resize(pixels, (4 * size, 4 * size), interpolation=cv2.INTER_CUBIC)
        for axis, model in zip(row, models.values(), strict=True):
            found = detect_objects(model, pixels, size)
            axis.imshow(draw(enlarged, found._replace(boxes=4 * found.boxes), class_names))
            axis.set(xticks=[], yticks=[])
    return figure
