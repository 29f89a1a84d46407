"""What distillation is worth on real images: YOLOv3 teaches YOLOv3-tiny, with paired seeds::

    PYTHONPATH=benchmarks python -m study.real neu-det --data path/to/neu-det --out runs/real

The teacher has the labels of all training images; students have a share of them, and the other images without labels.
Settings are chosen on the validation set, the tables are of the test set. Killed and started again, it goes on where it
was; ``--minutes`` ends it in time. ``--report`` prints the tables of what is there.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from study.protocol import Config
from study.report import Row, gain
from study.runs import Bench, Ledger, Result, Run, read_results
from study.scenes import part_of_set, write_set

RESULTS = Path(__file__).parent.parent / "results"
ALONE, LONGER = "student alone", "student alone, equal time"
GRADED = {"info_map": "graded_iou"}
# the name of a row, and what it changes; the first ones of all seeds come first
ROWS: dict[str, Config] = {
    "graded_iou": GRADED,
    "uniform": {"info_map": "uniform_standardized"},
    "PKD": {"info_map": "pkd"},
    "CWD": {"info_map": "uniform", "penalty": "cwd"},
    "score": {"info_map": "score"},
    "self_information": {"info_map": "self_information"},
    "FGD, focal": {"info_map": "attention", "prior": "box_balance"},
    "graded_iou, backbone only": GRADED | {"level_weights": [1, 1, 1, 0, 0]},
    "graded_iou, neck only": GRADED | {"level_weights": [0, 0, 0, 1, 1]},
    "graded_iou, shuffled": {"info_map": "uniform_standardized", "prior": "study: shuffled graded IoU"},
}
MAIN = ("graded_iou", "uniform")


@dataclass(frozen=True)
class Regime:
    """How many of the training images a student has labels for.

    Args:
        share: of the training images.
        steps: of the distilled student, and of the one alone at equal steps.
        cost: a distilled step, in steps of the student alone, which trains for so many times the steps at equal time.
        alone, longer, distilled: settings of each to choose from, on the validation set with a seed of its own.
    """

    share: float
    steps: int
    cost: float
    alone: tuple[Config, ...]
    longer: tuple[Config, ...]
    distilled: tuple[Config, ...]


@dataclass(frozen=True)
class Plan:
    """A set, its models and its regimes.

    Args:
        usual: settings of all students.
        teacher: of the teacher.
    """

    usual: Config
    teacher: Config
    regimes: dict[str, Regime]
    seeds: tuple[int, ...] = (0, 1, 2)
    tuning_seed: int = 9


SMALL = {"width": 0.25, "flip": 0.5}
PLANS = {
    "neu-det": Plan(
        usual=SMALL | {"size": 160, "model": "yolov3-tiny", "batch": 8, "weight_decay": 0.05},
        teacher=SMALL
        | {"size": 160, "model": "yolov3", "batch": 16, "match_threshold": 0.3, "epochs": 60}
        | {"lr": 1e-2, "weight_decay": 0.05},
        regimes={
            "10 % of the labels": Regime(
                share=0.1,
                steps=1200,
                cost=4.2,
                alone=({"lr": 1e-2}, {"lr": 3e-2}),
                longer=({"lr": 1e-2}, {"lr": 1e-2, "weight_decay": 0.2}),
                distilled=({"lr": 1e-2, "distill_share": 4.0}, {"lr": 1e-2, "distill_share": 1.0}),
            ),
        },
    ),
}


class Study:
    """The runs of one set; those that the results file has already take no time."""

    def __init__(self, name: str, root: Path, bench: Bench, until: float) -> None:
        self.name, self.plan, self.root, self.bench, self.until = name, PLANS[name], root, bench, until

    def run(self) -> None:
        teacher = self._run("teacher", "all labels", 0, "test", 1.0, self.plan.teacher, None)
        (found,) = self.bench.teachers([teacher])
        chosen = {regime: self._choose(regime, r, found) for regime, r in self.plan.regimes.items()}
        for names in (MAIN, tuple(x for x in ROWS if x not in MAIN)):
            for regime, r in self.plan.regimes.items():
                for seed in self.plan.seeds:
                    rows = {x: ROWS[x] | chosen[regime][MAIN[0]] for x in names}
                    if names == MAIN:
                        rows = {x: chosen[regime][x] for x in (ALONE, LONGER)} | rows
                    self._go([self._student(regime, r, row, seed, "test", c, found) for row, c in rows.items()])
                    self.bench.forget()

    def _choose(self, regime: str, r: Regime, teacher: tuple[str, str]) -> dict[str, Config]:
        """The settings of each kind of student with the best mAP on the validation set."""
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
            self._go(runs)
            found = [self.bench.ledger.results[run.key].mAP for run in runs]
            chosen[row] = configs[found.index(max(found))]
        self.bench.forget()
        return chosen

    def _student(
        self, regime: str, r: Regime, row: str, seed: int, scored_on: str, config: Config, teacher: tuple[str, str]
    ) -> Run:
        alone = row in (ALONE, LONGER)
        return self._run(regime, row, seed, scored_on, r.share, self.plan.usual | config, None if alone else teacher)

    def _run(self, regime: str, row: str, seed: int, scored_on: str, share: float, config: Config, teacher: Any) -> Run:
        part = part_of_set(self.root, self.name, share, seed)
        if teacher is None:
            part.pop("unlabelled", None)
        return Run(f"{self.name}: {regime}", row, seed, scored_on, {"set": self.name} | part | config, teacher)

    def _go(self, runs: list[Run]) -> None:
        """As many at a time as there are workers, until the time is over."""
        left = [run for run in runs if run.key not in self.bench.ledger.results]
        for first in range(0, len(left), self.bench.workers):
            if time.monotonic() > self.until:
                raise TimeoutError
            self.bench.results(left[first : first + self.bench.workers])


def table(results: list[Result]) -> str:
    """By regime: means over the seeds on the test set, and paired gains with their 95 % intervals."""
    lines = []
    for regime in dict.fromkeys(x.run.regime for x in results):
        rows: dict[str, Row] = {}
        for result in results:
            if result.run.regime == regime and result.run.scored_on == "test":
                rows.setdefault(result.run.row, {})[result.run.seed] = result
        lines += ["", f"**{regime}**", "", "| | seeds | mAP | AP50 | AP75 | over alone | over alone, equal time |"]
        lines.append("|---|---|---|---|---|---|---|")
        for row, found in rows.items():
            means = [f"{fmean(getattr(x, metric) for x in found.values()):.1f}" for metric in ("mAP", "AP50", "AP75")]
            over = [
                str(gain(found, rows[other])) if rows.get(other, {}).keys() & found.keys() and other != row else ""
                for other in (ALONE, LONGER)
            ]
            lines.append(f"| {' | '.join([row, str(len(found)), *means, *over])} |")
    return "\n".join(lines[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=PLANS)
    parser.add_argument("--data", type=Path, help="folder of the set as it comes")
    parser.add_argument("--out", type=Path, default=Path("runs/real"), help="folder of models and links")
    parser.add_argument("--results", type=Path, default=RESULTS / "real_study.jsonl")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=1e6, help="begin no run after so many")
    parser.add_argument("--report", action="store_true", help="print the tables alone")
    options = parser.parse_args()
    if not options.report:
        if options.data is None:
            parser.error("--data: expected the folder of the set; docs/real_data.md says where it is to be had")
        write_set(options.data, options.out / options.name)
        ledger = Ledger(options.results)
        bench = Bench(options.out, ledger, options.workers)
        try:
            Study(options.name, options.out, bench, time.monotonic() + 60 * options.minutes).run()
        except TimeoutError:
            print("the time is over; the same command goes on from here")
        finally:
            bench.close()
            ledger.close()
    print(table(read_results(options.results)))


if __name__ == "__main__":
    main()
