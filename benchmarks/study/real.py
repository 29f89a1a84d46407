"""The study of distillation on real images, in which YOLOv3 teaches YOLOv3-tiny, with paired seeds::

    PYTHONPATH=benchmarks python -m study.real neu-det --data path/to/neu-det --out runs/real

The teacher has the labels of all training images; students have a share of the labels, and the other images without
labels. Settings are chosen on the validation set; those of the distilled students are chosen with the map
``graded_iou`` and used for all maps. The tables are for the test set. If the study is stopped, the same command
continues; ``--minutes`` stops it in time. ``--report`` prints the tables of the existing results.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from fastkd.files import replacing
from fastkd.plot_style import COLORS
from fastkd.yolov3.boxes import Detections
from fastkd.yolov3.checkpoint import load_detector
from fastkd.yolov3.data.dataset import DetectionDataset, spread
from fastkd.yolov3.data.draw import draw
from fastkd.yolov3.show.predict import detect_objects
from study.protocol import Config
from study.report import Interval, Row, gain
from study.runs import SCORES, Bench, Ledger, Result, Run, model_file, read_results
from study.scenes import part_of_set, set_files, write_set

RESULTS = Path(__file__).parent.parent / "results"
ALONE, LONGER = "student alone", "student alone, equal time"
GRADED = {"info_map": "graded_iou"}
# the name of a row, and the settings that it changes
ROWS: dict[str, Config] = {
    "graded_iou": GRADED,
    "uniform": {"info_map": "uniform_standardized"},
    "graded_iou, pseudo-labels": GRADED | {"pseudo_labels": 0.3},
    "pseudo-labels alone": {"pseudo_labels": 0.3, "distill_stop": 0},
    "PKD": {"info_map": "pkd"},
    "CWD": {"info_map": "uniform", "penalty": "cwd"},
    "score": {"info_map": "score"},
    "self_information": {"info_map": "self_information"},
    "attention, box_balance": {"info_map": "attention", "prior": "box_balance"},
    "graded_iou, backbone only": GRADED | {"level_weights": [1, 1, 1, 0, 0]},
    "graded_iou, neck only": GRADED | {"level_weights": [0, 0, 0, 1, 1]},
    "graded_iou, shuffled": {"info_map": "uniform_standardized", "prior": "study: shuffled graded IoU"},
    f"{ALONE}, multi-scale": {"multi_scale": 0.25},
    f"{ALONE}, mosaic": {"mosaic": 0.5},
}
MAIN = ("graded_iou", "uniform")
PSEUDO = ("graded_iou, pseudo-labels", "pseudo-labels alone")


@dataclass(frozen=True)
class Regime:
    """A share of the labels, and the trainings with it.

    Args:
        share: share of the training images that have labels for the student.
        steps: length of the training of the distilled student, and of the student alone at equal steps.
        cost: time of a distilled step, in steps of the student alone; at equal time, the student alone trains for this
            multiple of ``steps``.
        alone, longer, distilled: settings of the student alone at equal steps and at equal time, and of the distilled
            student, to choose from on the validation set, with a seed of its own.
        rows: names of the rows in ``ROWS`` that are run.
    """

    share: float
    steps: int
    cost: float
    alone: tuple[Config, ...]
    longer: tuple[Config, ...]
    distilled: tuple[Config, ...]
    rows: tuple[str, ...] = MAIN


@dataclass(frozen=True)
class Plan:
    """The models and regimes of a data set.

    Args:
        usual: settings of all students.
        teacher: settings of the teacher.
        regimes: the regimes by name.
        seeds: every row has one student per seed.
        tuning_seed: the seed with which settings are chosen.
    """

    usual: Config
    teacher: Config
    regimes: dict[str, Regime]
    seeds: tuple[int, ...] = (0, 1, 2)
    tuning_seed: int = 9


DECAYS: tuple[Config, ...] = ({"lr": 1e-2}, {"lr": 1e-2, "weight_decay": 0.2})
SHARES: tuple[Config, ...] = ({"lr": 1e-2, "distill_share": 4.0}, {"lr": 1e-2, "distill_share": 1.0})
SMALL: Config = {"width": 0.25, "flip": 0.5, "size": 160, "weight_decay": 0.05}
STUDENT = SMALL | {"model": "yolov3-tiny", "batch": 8}
TEACHER = SMALL | {"model": "yolov3", "batch": 16, "match_threshold": 0.3, "lr": 1e-2}
LARGE = {"width": 1.0, "flip": 0.5, "cpu": False, "mixed_precision": "bf16", "workers": 4}
PLANS = {
    "neu-det": Plan(
        usual=STUDENT,
        teacher=TEACHER | {"epochs": 60},
        regimes={
            "10 % of the labels": Regime(
                share=0.1,
                steps=1200,
                cost=4.2,
                alone=({"lr": 1e-2}, {"lr": 3e-2}),
                longer=DECAYS,
                distilled=SHARES,
                rows=tuple(ROWS),
            ),
            "25 % of the labels": Regime(  # with the settings that were chosen for 10 %
                0.25, steps=1200, cost=4.2, alone=DECAYS[:1], longer=DECAYS[1:], distilled=SHARES[:1]
            ),
            "all labels": Regime(
                share=1,
                steps=1800,
                cost=2.6,
                alone=({"lr": 1e-2}, {"lr": 2e-2}),
                longer=DECAYS,
                distilled=SHARES,
            ),
        },
    ),
    "bccd": Plan(
        usual=STUDENT,
        teacher=TEACHER | {"epochs": 200},
        regimes={
            "10 % of the labels": Regime(
                0.1, steps=800, cost=4.2, alone=DECAYS, longer=DECAYS, distilled=SHARES, rows=(*MAIN, *PSEUDO)
            ),
            "25 % of the labels": Regime(  # with the settings that were chosen for 10 %
                0.25, steps=800, cost=4.2, alone=DECAYS[:1], longer=DECAYS[:1], distilled=SHARES[:1]
            ),
            "all labels": Regime(1, steps=800, cost=2.6, alone=DECAYS, longer=DECAYS, distilled=SHARES),
        },
    ),
    "neu-det-gpu": Plan(
        usual=LARGE | {"size": 416, "model": "yolov3-tiny", "batch": 16, "weight_decay": 0.05},
        teacher=LARGE
        | {"size": 416, "model": "yolov3", "batch": 32, "match_threshold": 0.3, "epochs": 60}
        | {"lr": 2e-3, "weight_decay": 0.05},
        regimes={
            "10 % of the labels": Regime(
                share=0.1,
                steps=1200,
                cost=4.2,
                alone=({"lr": 2e-3},),
                longer=({"lr": 2e-3},),
                distilled=({"lr": 2e-3, "distill_share": 4.0},),
                rows=("graded_iou",),
            ),
        },
    ),
}


class Study:
    """The runs on one data set; runs that are in the results file are not repeated."""

    def __init__(self, name: str, root: Path, bench: Bench, until: float) -> None:
        self.name, self.plan, self.root, self.bench, self.until = name, PLANS[name], root, bench, until

    def run(self) -> None:
        teacher = self._run("teacher", "all labels", 0, "test", 1.0, self.plan.teacher, None)
        (found,) = self.bench.teachers([teacher])
        chosen = {regime: self._choose(regime, r, found) for regime, r in self.plan.regimes.items()}
        for first in (True, False):
            for regime, r in self.plan.regimes.items():
                names = [x for x in r.rows if (x in MAIN) == first]
                for seed in self.plan.seeds:
                    rows = {x: ROWS[x] | chosen[regime][ALONE if _is_alone(x) else MAIN[0]] for x in names}
                    if first:
                        rows = {x: chosen[regime][x] for x in (ALONE, LONGER)} | rows
                    runs = [self._student(regime, r, row, seed, "test", c, found) for row, c in rows.items()]
                    self._go(runs, keep=first and seed == self.plan.seeds[0])
                    self.bench.forget()

    def _choose(self, regime: str, r: Regime, teacher: tuple[str, str]) -> dict[str, Config]:
        """Return the settings of each kind of student that have the best mAP on the validation set."""
        longer = {"steps": round(r.cost * r.steps)}
        tried = {
            ALONE: [x | {"steps": r.steps} for x in r.alone],
            LONGER: [x | longer for x in r.longer],
            MAIN[0]: [x | {"steps": r.steps} for x in r.distilled],
        }
        chosen = {}
        for row, configs in tried.items():
            with_map = [x | ROWS.get(row, {}) for x in configs]
            runs = [self._student(regime, r, row, self.plan.tuning_seed, "val", c, teacher) for c in with_map]
            if len(configs) == 1:
                chosen[row] = configs[0]
                continue
            self._go(runs)
            found = [self.bench.ledger.results[run.key].mAP for run in runs]
            chosen[row] = configs[found.index(max(found))]
        self.bench.forget()
        return chosen

    def _student(
        self, regime: str, r: Regime, row: str, seed: int, scored_on: str, config: Config, teacher: tuple[str, str]
    ) -> Run:
        teacher_of_row = None if _is_alone(row) else teacher
        return self._run(regime, row, seed, scored_on, r.share, self.plan.usual | config, teacher_of_row)

    def _run(self, regime: str, row: str, seed: int, scored_on: str, share: float, config: Config, teacher: Any) -> Run:
        part = part_of_set(self.root, self.name, share, seed)
        if teacher is None:
            part.pop("unlabelled", None)
        return Run(f"{self.name}: {regime}", row, seed, scored_on, {"set": self.name} | part | config, teacher)

    def _go(self, runs: list[Run], *, keep: bool = False) -> None:
        """Train these runs, as many at a time as there are workers; raise TimeoutError when the time is over."""
        left = [run for run in runs if run.key not in self.bench.ledger.results]
        for first in range(0, len(left), self.bench.workers):
            if time.monotonic() > self.until:
                raise TimeoutError
            self.bench.results(left[first : first + self.bench.workers], keep=keep)


def _is_alone(row: str) -> bool:
    """Whether the students of this row have no teacher."""
    return row.startswith(ALONE)


def by_row(results: list[Result], regime: str) -> dict[str, Row]:
    """Return a regime's results on the test set, by row and seed, in the order of ``ROWS``."""
    rows: dict[str, Row] = {}
    for result in results:
        if result.run.regime == regime and result.run.scored_on == "test":
            rows.setdefault(result.run.row, {})[result.run.seed] = result
    order = [ALONE, LONGER, *ROWS]
    return dict(sorted(rows.items(), key=lambda item: order.index(item[0]) if item[0] in order else 0))


def regimes_of(results: list[Result]) -> list[str]:
    """Return the regimes that have results, in the order of the plans."""
    found = {x.run.regime for x in results}
    planned = [f"{name}: {regime}" for name, plan in PLANS.items() for regime in ("teacher", *plan.regimes)]
    return [regime for regime in planned if regime in found]


def gains(rows: dict[str, Row], other: str) -> dict[str, Interval]:
    """Return the gain of each row over another, paired by seed; only distilled students take the time of ``LONGER``."""
    over = rows.get(other, {})
    compared = {name: row for name, row in rows.items() if not (other == LONGER and _is_alone(name))}
    return {name: gain(row, over) for name, row in compared.items() if name != other and row.keys() & over.keys()}


def table(results: list[Result]) -> str:
    """Return a table per regime: means over the seeds on the test set, and paired gains with 95 % intervals."""
    lines = []
    for regime in regimes_of(results):
        rows = by_row(results, regime)
        if not rows:
            continue
        over = [gains(rows, other) for other in (ALONE, LONGER, MAIN[1])]
        columns = "| | seeds | mAP | AP50 | AP75 | over alone | over alone, equal time | over uniform |"
        lines += ["", f"**{regime}**", "", columns, "|---|---|---|---|---|---|---|---|"]
        for row, found in rows.items():
            means = [f"{fmean(getattr(x, metric) for x in found.values()):.1f}" for metric in SCORES]
            lines.append(f"| {' | '.join([row, str(len(found)), *means, *(str(x.get(row, '')) for x in over)])} |")
        lines += ["", *_classes(rows)]
    return "\n".join(lines[1:])


def _classes(rows: dict[str, Row]) -> list[str]:
    """Return the table of mAP by class."""
    names = list(next(iter(next(iter(rows.values())).values())).per_class or ())
    lines = [f"| mAP of | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    for row, found in rows.items():
        scores = [[(x.per_class or {}).get(name) for x in found.values()] for name in names]
        cells = [f"{fmean(known):.1f}" if (known := [x for x in each if x is not None]) else "" for each in scores]
        lines.append(f"| {' | '.join([row, *cells])} |")
    return lines


def draw_gains(results: list[Result], file: Path) -> None:
    """Plot the gain of each row over the student alone, at equal steps and at equal time, with one panel per regime."""
    panels = {
        regime.replace(": ", ", "): [gains(rows, other) for other in (ALONE, LONGER)]
        for regime in regimes_of(results)
        if ALONE in (rows := by_row(results, regime)) and len(rows) > 1
    }
    counts = [len(same_steps) for same_steps, _ in panels.values()]
    figure = Figure((7, 0.7 + 0.45 * len(panels) + 0.26 * sum(counts)), layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=counts)[:, 0]
    styles = (("as many steps", COLORS[0], "o", 0.12), ("as much time", COLORS[1], "s", -0.12))
    for axis, (title, both) in zip(axes, panels.items(), strict=True):
        names = list(both[0])[::-1]
        for found, (label, colour, marker, shift) in zip(both, styles, strict=True):
            places = [place for place, name in enumerate(names) if name in found]
            shown = [found[names[place]] for place in places]
            at, means, halves = [place + shift for place in places], [x.mean for x in shown], [x.half for x in shown]
            axis.errorbar(means, at, xerr=halves, fmt=marker, ms=4, color=colour, capsize=2, lw=1.2, label=label)
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.set_title(title, fontsize=9, loc="left")
        axis.axvline(0, color="0.5", linewidth=0.8)
        axis.grid(visible=True, axis="x", color="0.9", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_ylim(-0.6, len(names) - 0.4)
    axes[0].legend(fontsize=8, title="over the student alone, for", title_fontsize=8)
    axes[-1].set_xlabel("mAP gained, 95 % interval", fontsize=9)
    with replacing(file) as part:
        figure.savefig(part, format="png", dpi=150)


def draw_predictions(results: list[Result], root: Path, name: str, file: Path, count: int = 4) -> None:
    """Draw the boxes of the labels, the teacher and the students for some test images.

    The images themselves are not drawn, because they may not be published. The models are those of the first regime and
    seed 0.

    Raises:
        FileNotFoundError: the models are not in ``root``.
    """
    regimes = ("teacher", next(iter(PLANS[name].regimes)))
    shown = [x.run for x in results if x.run.scored_on == "test" and x.run.seed == 0]
    runs = {x.row: x for x in shown if x.regime in {f"{name}: {regime}" for regime in regimes}}
    columns = {"teacher": "all labels", ALONE: ALONE, f"distilled, {MAIN[0]}": MAIN[0]}
    models = {title: load_detector(model_file(root, runs[row].key)).model for title, row in columns.items()}
    data = DetectionDataset(*set_files(root / name, "test"), PLANS[name].usual["size"])
    figure = Figure(figsize=(2.4 * (len(models) + 1), 2.4 * count), dpi=130, layout="constrained")
    axes = figure.subplots(count, len(models) + 1, squeeze=False)
    for axis, title in zip(axes[0], ["labels", *models], strict=True):
        axis.set_title(title, fontsize=8)
    for cells, index in zip(axes, spread(len(data), count), strict=True):
        sample = data[index]
        pixels = sample.image.permute(1, 2, 0).numpy()
        of_labels = Detections(sample.targets[:, 1:], torch.ones(len(sample.targets)), sample.targets[:, 0].long())
        found = [of_labels, *(detect_objects(model, pixels, data.size) for model in models.values())]
        for axis, boxes in zip(cells, found, strict=True):
            canvas = np.full((3 * data.size, 3 * data.size, 3), 255, np.uint8)
            enlarged = boxes._replace(boxes=3 * boxes.boxes)
            axis.imshow(draw(canvas, enlarged, data.class_names, scores=boxes is not of_labels))
            axis.set(xticks=[], yticks=[])
    with replacing(file) as part:
        figure.savefig(part, format="png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=PLANS)
    parser.add_argument("--data", type=Path, help="folder of the data set, in any format")
    parser.add_argument("--out", type=Path, default=Path("runs/real"), help="folder of models and links")
    parser.add_argument("--results", type=Path, default=RESULTS / "real_study.jsonl")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=1e6, help="start no run after N minutes", metavar="N")
    parser.add_argument("--report", action="store_true", help="train nothing, and print the tables")
    parser.add_argument("--figures", type=Path, help="folder for plots of gains and of predictions")
    options = parser.parse_args()
    if not options.report:
        if options.data is None:
            parser.error("--data: expected the folder of the data set; docs/real_data.md has its sources")
        write_set(options.data, options.out / options.name)
        ledger = Ledger(options.results)
        bench = Bench(options.out, ledger, options.workers)
        try:
            Study(options.name, options.out, bench, time.monotonic() + 60 * options.minutes).run()
        except TimeoutError:
            print("the time is over; the same command continues from here")
        finally:
            bench.close()
            ledger.close()
    results = read_results(options.results)
    print(table(results))
    if options.figures is not None:
        draw_gains(results, options.figures / "gains.png")
        draw_predictions(results, options.out, options.name, options.figures / f"{options.name}.png")


if __name__ == "__main__":
    main()
