"""The study of fewer passes of the teacher, at equal time and at equal steps, on digits scenes::

    PYTHONPATH=benchmarks python -m study.passes --out runs/passes

Data, models and regimes are those of docs/study, and so are the settings of the rows, which were chosen there. Lengths
at equal time are computed from the time of a step (``step_parts.py``, two cores). If the study is stopped, the same
command continues; ``--report`` prints the tables of the existing results.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from study import scenes
from study.protocol import Protocol
from study.report import Row, gain, interval
from study.runs import Bench, Ledger, Result, Run, read_results

RESULTS = Path(__file__).parent.parent / "results"
# options, and the time of a step in steps of the student alone: width 0.25, 96 px, N = 16
PASSES: dict[str, tuple[dict[str, Any], float]] = {
    "every step": ({}, 1.85),
    "every 2nd step": ({"teacher_every": 2}, 1.43),
    "half of the images": ({"teacher_images": 0.5}, 1.53),
}
MAP = {"info_map": "graded_iou", "prior": "graded_iou", "zoom": [0.85, 1.18], "weight_decay": 0.05}
# settings of the student alone and of the distilled one, as in docs/study
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "few": ({"lr": 0.064, "weight_decay": 0.2, "zoom": [0.75, 1.33]}, {"lr": 0.128, "distill_share": 4.0}),
    "some": ({"lr": 0.032, "weight_decay": 0.2, "zoom": [0.85, 1.18]}, {"lr": 0.064, "distill_share": 1.0}),
    "equal": ({"lr": 0.032, "weight_decay": 0.2, "zoom": [0.85, 1.18]}, {"lr": 0.032, "distill_share": 1.0}),
}
STEPS = {"few": 1280, "some": 1280, "equal": 1920}  # of the student alone
EQUAL_STEPS = "some"  # the regime that also compares the rows at equal steps
ALONE = "student alone"
MAIN = (ALONE, "every step, equal time", "every 2nd step, equal time")
P = Protocol()


def runs(root: Path, teachers: dict[int, tuple[str, str]], seed: int, *, main: bool) -> list[Run]:
    """Return the runs of one seed: the rows of ``MAIN`` if ``main``, else the others."""
    found = []
    for regime in P.regimes:
        alone, distilled = SETTINGS[regime.name]
        steps = STEPS[regime.name]
        rows: dict[str, dict[str, Any]] = {ALONE: alone | {"steps": steps}}
        for name, (passes, cost) in PASSES.items():
            rows[f"{name}, equal time"] = MAP | distilled | passes | {"steps": round(steps / cost)}
            if regime.name == EQUAL_STEPS:
                rows[f"{name}, equal steps"] = MAP | distilled | passes | {"steps": steps // 2}
        first = seed * regime.labelled if (seed + 1) * regime.labelled <= regime.taught else 0
        for row, config in rows.items():
            teacher = None if row == ALONE else teachers[regime.taught]
            if (row in MAIN) == main:
                found.append(_run(root, regime.name, row, seed, (first, regime.labelled), config, teacher))
    return found


def _run(
    root: Path, regime: str, row: str, seed: int, data: tuple[int, int], config: dict[str, Any], teacher: Any
) -> Run:
    usual = {"size": P.size, "batch": P.batch, "model": "yolov3-tiny", "width": P.student_width}
    return Run(regime, row, seed, "test", usual | scenes.labelled(root, *data) | config, teacher)


def train_all(root: Path, results: Path, workers: int) -> None:
    scenes.write_scenes(root, train=P.train, val=P.val, test=P.test, size=P.size)
    ledger = Ledger(results)
    bench = Bench(root, ledger, workers)
    try:
        counts = [4000, 2000]
        config = {"model": "yolov3", "width": P.teacher_width, "match_threshold": P.teacher_match}
        config |= {"steps": P.teacher_steps, "lr": P.teacher_lr}
        of_teachers = [_run(root, "teachers", f"{count} scenes", 0, (0, count), config, None) for count in counts]
        teachers = dict(zip(counts, bench.teachers(of_teachers), strict=True))
        for main in (True, False):
            for seed in P.seeds:
                bench.results(runs(root, teachers, seed, main=main))
                bench.forget()
    finally:
        bench.close()
        ledger.close()


def table(results: list[Result]) -> str:
    """Return mAP on the test scenes and the gain over the student alone, with 95 % intervals of paired differences."""
    rows: dict[tuple[str, str], Row] = {}
    for result in results:
        rows.setdefault((result.run.regime, result.run.row), {})[result.run.seed] = result
    lines = ["| labels | teacher | steps | mAP | over the student alone |", "|---|---|---|---|---|"]
    labels = {regime.name: f"{regime.labelled:,}" for regime in P.regimes}
    for (regime, row), found in rows.items():
        if regime not in labels:
            continue
        steps = next(iter(found.values())).run.config["steps"]
        mean = interval([x.mAP for x in found.values()]).mean
        alone = rows.get((regime, ALONE), {})
        over = str(gain(found, alone)) if row != ALONE and alone.keys() & found.keys() else ""
        lines.append(f"| {labels[regime]} | {row} | {steps:,} | {mean:.1f} | {over} |")
    lines += ["", "| at equal steps | over every step |", "|---|---|"]
    usual = rows.get((EQUAL_STEPS, "every step, equal steps"), {})
    for name in PASSES:
        found = rows.get((EQUAL_STEPS, f"{name}, equal steps"), {})
        if found.keys() & usual.keys() and found is not usual:
            lines.append(f"| {name} | {gain(found, usual)} |")
    seeds = {seed: sum(x.run.seed == seed and x.run.regime in labels for x in results) for seed in P.seeds}
    return "\n".join(lines) + f"\n\nRuns of each seed: {seeds}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/passes"), help="folder of scenes and models")
    parser.add_argument("--results", type=Path, default=RESULTS / "teacher_passes.jsonl")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--report", action="store_true", help="train nothing, and print the tables")
    options = parser.parse_args()
    if not options.report:
        train_all(options.out, options.results, options.workers)
    print(table(read_results(options.results)))


if __name__ == "__main__":
    main()
