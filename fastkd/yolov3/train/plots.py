"""Plots of a training run and of an evaluation, for looking at: ``RunPlots`` and ``evaluation_plots``."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from fastkd.files import replacing
from fastkd.plot_style import (
    COLORS,
    STYLES,
    add_legend,
    label_axes,
    line_style,
    new_figure,
    running_mean,
    set_log_scale,
)
from fastkd.yolov3.data.annotations import Array
from fastkd.yolov3.data.dataset import DetectionDataset
from fastkd.yolov3.data.draw import write_image
from fastkd.yolov3.train.confusion import confusion_matrix
from fastkd.yolov3.train.evaluate import Detection
from fastkd.yolov3.train.log import read_log
from fastkd.yolov3.train.samples import batch_image, predictions_image
from fastkd.yolov3.train.tables import SIZES, precision_table, write_csv, write_results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLOT_SHARE = 0.05  # of a run's time
BATCHES = 3  # the first so many are drawn
SCORE = 0.3  # from which a box counts in the confusion matrix and is drawn: what `fastkd predict` draws
RESULTS, CURVES = "results.csv", "results.png"
OF_EVALUATION = (
    *("pr_curves.png", "confusion_matrix.png", "average_precision.png", "average_precision.csv"),
    "predictions.jpg",
)
OF_BATCHES = tuple(f"train_batch{number + 1}.jpg" for number in range(BATCHES))
PLOT_FILES = (RESULTS, CURVES, *OF_EVALUATION, *OF_BATCHES)
FEW = 12  # so many classes can be told apart in one plot
NOISY = 40  # lines of a log, above which losses are smoothed
MANY = 100  # more have no room for their names
LOSSES = ("loss", "box", "objectness", "class", "distill")


class RunPlots:
    """Writes the plots of one run into its folder. Only the main process of a run has one.

    Args:
        out: the run's folder, with its ``metrics.jsonl``.
        class_names: one per class.
        enabled: False: ``results.csv`` alone is written.
    """

    def __init__(self, out: Path, class_names: Sequence[str], *, enabled: bool) -> None:
        self.out, self.class_names, self.enabled = out, class_names, enabled
        self._began, self._seconds = time.perf_counter(), 0.0
        if enabled:  # if they are not installed, the run ends here and not at its first evaluation
            import matplotlib  # noqa: F401
            import sklearn.metrics  # noqa: F401

    def batch(self, step: int, images: Tensor, targets: Tensor) -> None:
        """The batch of this step, from 0, as the network gets it, if it is one of the first."""
        if self.enabled and step < BATCHES:
            write_image(self.out / OF_BATCHES[step], batch_image(images, targets, self.class_names))

    def evaluation(
        self,
        detections: list[Detection] | None,
        evaluation: COCOeval | None,
        val: DetectionDataset | None,
        *,
        last: bool,
    ) -> None:
        """Write ``results.csv``; and all plots, at the last step or if they have taken less than ``PLOT_SHARE``."""
        write_results(self.out / "metrics.jsonl", self.out / RESULTS)
        began = time.perf_counter()
        costly = self._seconds > PLOT_SHARE * (began - self._began)
        if not self.enabled or (costly and not last):
            return
        entries = read_log(self.out / "metrics.jsonl")
        if any("loss" in entry for entry in entries):
            _save(curves_figure(entries), self.out / CURVES)
        if detections is not None and evaluation is not None and val is not None:
            evaluation_plots(detections, evaluation, val, self.out)
        self._seconds += time.perf_counter() - began


def evaluation_plots(
    detections: list[Detection], evaluation: COCOeval, dataset: DetectionDataset, folder: Path
) -> None:
    """Write what an evaluation shows: ``OF_EVALUATION``.

    Args:
        detections: on the images of ``dataset``, as ``detect_all`` returns them.
        evaluation: of these, as ``coco_evaluation`` returns it.
        dataset: with the labels.
        folder: where to write; made if it is not there.
    """
    names = dataset.class_names
    table = precision_table(evaluation, names)
    write_csv(folder / "average_precision.csv", table)
    _save(precision_figure(table), folder / "average_precision.png")
    _save(recall_figure(evaluation, names), folder / "pr_curves.png")
    counts = confusion_matrix(detections, dataset, score_threshold=SCORE)
    _save(confusion_figure(counts, names), folder / "confusion_matrix.png")
    drawn = predictions_image(detections, dataset, score_threshold=SCORE)
    if drawn is not None:
        write_image(folder / "predictions.jpg", drawn)


def curves_figure(entries: Sequence[Mapping[str, Any]]) -> Figure:
    """Losses, learning rate and, where there were evaluations, average precision over the steps of a run.

    Args:
        entries: of ``metrics.jsonl``, as ``read_log`` returns them.
    """
    lines = [x for x in entries if "loss" in x]
    scores = [(x["step"], x["metrics"]) for x in entries if "metrics" in x]
    figure = new_figure((10 if scores else 7, 3.4))
    axes = figure.subplots(1, 3 if scores else 2)
    steps = [x["step"] for x in lines]
    smooth = 0.8 if len(steps) > NOISY else 0.0
    for i, name in enumerate(name for name in LOSSES if name in lines[0]):
        values = [x[name] for x in lines]
        if smooth:
            axes[0].plot(steps, values, color=line_style(i)["color"], linewidth=0.8, alpha=0.25)
        axes[0].plot(steps, running_mean(values, smooth), label=name, marker=_marker(steps), **line_style(i))
    if any(x["loss"] > 0 for x in lines):
        set_log_scale(axes[0])
    label_axes(axes[0], "step", "training loss, its terms as they are weighted")
    axes[1].plot(steps, [x["lr"] for x in lines], color=COLORS[0], marker=_marker(steps))
    axes[1].set_ylim(bottom=0)
    label_axes(axes[1], "step", "learning rate")
    if scores:
        at = [step for step, _ in scores]
        for i, name in enumerate(("mAP", "AP50", "AP75")):
            look = {**line_style(i), "marker": "o", "markersize": 3.5}
            axes[2].plot(at, [100 * x[name] for _, x in scores], label=name, **look)
        highest = max(100 * x["AP50"] for _, x in scores)
        axes[2].set_ylim(0, max(1.1 * highest, 1))
        label_axes(axes[2], "step", "average precision, validation set, %")
        axes[2].legend(frameon=False, fontsize=8)
    axes[0].legend(frameon=False, fontsize=8)
    for axis in axes:
        axis.set_xlim(0, 1.02 * steps[-1])
    return figure


def recall_figure(evaluation: COCOeval, class_names: Sequence[str]) -> Figure:
    """Precision over recall at IoU 0.5: one line per class that has boxes, and their mean in black.

    A dot marks the score ``SCORE``. With more than ``FEW`` classes the lines are grey.
    """
    recall = evaluation.params.recThrs
    precision, scores = (evaluation.eval[x][0, :, :, 0, -1] for x in ("precision", "scores"))
    known = [i for i in range(len(class_names)) if precision[0, i] > -1]
    figure = new_figure((6.4, 4))
    axis = figure.subplots()
    few = len(known) <= FEW
    for place, i in enumerate(known):
        own = {"color": COLORS[place % 6], "linestyle": STYLES[place % 4]}  # black is the mean's
        look = own if few else {"color": "0.7", "linewidth": 0.6}
        name = f"{_plain(class_names[i])}, AP50 {100 * precision[:, i].mean():.1f}"
        axis.plot(recall, precision[:, i], label=name if few else "_", **look)
        end = int((scores[:, i] >= SCORE).sum()) - 1
        if few and end >= 0:
            axis.plot(recall[end], precision[end, i], "o", color=look["color"], markersize=5, clip_on=False)
    mean = precision[:, known].mean(1)
    axis.plot(recall, mean, color="black", linewidth=2.2, label=f"mean, AP50 {100 * mean.mean():.1f}")
    dots = f" (dot: score {SCORE:g})" if few else f", {len(known)} classes in grey"
    label_axes(axis, f"recall{dots}", "precision at IoU 0.5")
    axis.set(xlim=(0, 1), ylim=(0, 1.02))
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return figure


def confusion_figure(counts: Array, class_names: Sequence[str]) -> Figure:
    """A confusion matrix: numbers are counts, colours shares of the label's row.

    Args:
        counts: (K + 1, K + 1) as ``confusion_matrix`` returns them.
        class_names: K names.
    """
    from sklearn.metrics import ConfusionMatrixDisplay

    count = len(counts)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    numbered = count <= 2 * FEW + 1
    side = min(3.4 + (0.42 if numbered else 0.16) * count, 18)
    figure = new_figure((side + 0.8, side))
    axis = figure.subplots()
    display = ConfusionMatrixDisplay(shares, display_labels=[*map(_plain, class_names), "nothing"])
    display.plot(ax=axis, cmap="Blues", include_values=numbered, colorbar=False, im_kw={"vmin": 0, "vmax": 1})
    for text, value in zip(display.text_.flat if numbered else (), counts.flat, strict=False):
        text.set(text=str(value) if value else "", fontsize=8 if count < FEW else 6)
    axis.set_xlabel(f"found as, score {SCORE:g} or more", fontsize=9)
    axis.set_ylabel("labelled as", fontsize=9)
    axis.tick_params(labelsize=8 if numbered else 6)
    axis.tick_params(axis="x", labelrotation=90)
    if count > MANY + 1:
        axis.set(xticks=[], yticks=[])
    bar = figure.colorbar(display.im_, ax=axis, fraction=0.04, pad=0.02)
    bar.set_label("share of the row", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    return figure


def precision_figure(table: Sequence[Mapping[str, Any]]) -> Figure:
    """Average precision by class (bar: mAP, dot: AP50) and by size of the boxes, as ``precision_table`` has them.

    Of more than ``MANY`` classes those with the most boxes are shown.
    """
    *classes, together = table
    if len(classes) > MANY:
        least = sorted((x["boxes"] for x in classes), reverse=True)[MANY - 1]
        classes = [x for x in classes if x["boxes"] >= least][:MANY]
    height = 1.6 + 0.24 * max(len(classes), 5)
    figure = new_figure((8.5, height))
    grid = figure.add_gridspec(2, 2, width_ratios=(3, 2), height_ratios=(2.8, max(height - 2.8, 0.01)))
    left, right = figure.add_subplot(grid[:, 0]), figure.add_subplot(grid[0, 1])
    rows = range(len(classes))
    left.barh(rows, [100 * (x["mAP"] or 0) for x in classes], color=COLORS[5], label="mAP")
    fifty = [(i, 100 * x["AP50"]) for i, x in enumerate(classes) if x["AP50"] is not None]
    left.plot([x for _, x in fifty], [i for i, _ in fifty], "o", color=COLORS[1], markersize=4, label="AP50")
    left.axvline(100 * (together["mAP"] or 0), color="black", linewidth=1, linestyle="--", label="mAP of all")
    label_axes(left, "average precision, %", "")
    names = [f"{_plain(x['class'])} ({x['boxes']:,})" for x in classes]
    left.set_yticks(rows, names, fontsize=8)
    left.set(xlim=(0, 100), ylim=(len(classes) - 0.4, -0.6))
    left.grid(visible=False, axis="y")
    add_legend(figure, left)
    _size_bars(right, together)
    return figure


def _size_bars(axis: Axes, together: Mapping[str, Any]) -> None:
    values = [together[f"AP_{size}"] for size in SIZES]
    bars = axis.bar(range(len(SIZES)), [100 * (x or 0) for x in values], color=COLORS[5], width=0.6)
    axis.bar_label(bars, ["no box" if x is None else f"{100 * x:.1f}" for x in values], fontsize=8, padding=2)
    limits = ("up to 32²", "up to 96²", "above 96²")
    axis.set_xticks(range(len(SIZES)), [f"{size}\n{limit} px" for size, limit in zip(SIZES, limits, strict=True)])
    label_axes(axis, "size of the boxes in their image", "mAP, %")
    axis.set_ylim(0, 100)
    axis.grid(visible=False, axis="x")


def _plain(name: str) -> str:
    """The name as matplotlib shows it as it stands, and not as a formula between dollars."""
    return name.replace("$", r"\$")


def _marker(steps: Sequence[int]) -> str:
    return "o" if len(steps) == 1 else ""


def _save(figure: Figure, file: Path) -> None:
    with replacing(file) as part:
        figure.savefig(part, format="png")
