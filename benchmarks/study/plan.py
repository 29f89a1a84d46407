"""The order of the study: what is trained, and which settings are chosen from which results."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from study import scenes
from study.maps import SHUFFLED
from study.protocol import LOGIT_ALONE, PLACES, PRESETS, UNIFORM, Config, Protocol, Regime, of_map
from study.runs import Bench, Ledger, Run

NO_LR = 1e-12  # changes no weight, but batch norms get their statistics
PUBLISHED = Protocol()
Teacher = tuple[str, str]  # key and fingerprint, as in ``Run``
Axes = Sequence[tuple[str, Sequence[object]]]  # a setting's name, and its values, the usual one first


class Chosen(NamedTuple):
    """The settings that were chosen on a regime's validation scenes."""

    plain: Config  # of the student without a teacher
    uniform: Config  # of a distilled student with uniform weights; all other rows start from it
    maps: dict[str, Config]  # of the best maps, the best one first
    logit: Config  # of the logit term alone


class Study:
    """The runs of one study; runs that are in the results file are not repeated.

    Args:
        root: folder of scenes, models and runs.
        ledger: the results file.
        protocol: sizes, lengths and choices.
        workers: number of runs at a time.
    """

    def __init__(self, root: Path, ledger: Ledger, protocol: Protocol, workers: int) -> None:
        self.root, self.protocol = root, protocol
        self.bench = Bench(root, ledger, workers)

    def run(self) -> None:
        p = self.protocol
        scenes.write_scenes(self.root, train=p.train, val=p.val, test=p.test, size=p.size)
        counts = list(dict.fromkeys(regime.taught for regime in p.regimes))
        runs = [self._teacher(f"{count} scenes", 0, 0, count, p.teacher_steps, p.teacher_lr) for count in counts]
        teachers = dict(zip(counts, self.bench.teachers(runs), strict=True))
        first, *others = p.regimes
        chosen = self._choose(first, teachers[first.taught])
        self._compare_all(first, teachers[first.taught], chosen)
        self.bench.forget()
        for regime in others:
            teacher = teachers[regime.taught]
            self._compare_again(regime, teacher, self._choose_again(regime, teacher, chosen))
            self.bench.forget()

    # ---- choices, on the validation scenes

    def _choose(self, regime: Regime, teacher: Teacher) -> Chosen:
        """Choose all settings of the first regime: of the plain student, of uniform weights, and then the maps."""
        p = self.protocol
        usual: list[tuple[str, Sequence[object]]] = [("lr", p.lr), ("weight_decay", p.weight_decay)]
        plain = self._tune(regime, "none", {}, [("steps", regime.plain_steps), *usual, ("zoom", p.plain_zoom)])
        start = UNIFORM | {"steps": regime.distilled_steps}
        axes = [("distill_share", p.share), *usual, ("zoom", p.distilled_zoom)]
        uniform = self._tune(regime, "uniform", start, axes, teacher)
        axes = [("logit_weight", p.logit_weight), ("lr", p.lr)]
        logit = self._tune(regime, "logit", uniform | LOGIT_ALONE, axes, teacher)
        # all maps are tried with uniform's settings; the best ones then choose their own share, as uniform did
        trials = {name: uniform | of_map(name) for name in p.maps}
        means = self._means(regime, trials, teacher)
        best = sorted(trials, key=lambda name: -means[name])[: p.finalists]
        shares = [("distill_share", _times(uniform["distill_share"], p.map_shares))]
        tuned = {name: self._tune(regime, name, trials[name], shares, teacher) for name in best}
        return Chosen(plain, uniform, tuned, logit)

    def _choose_again(self, regime: Regime, teacher: Teacher, first: Chosen) -> Chosen:
        """Choose learning rate, zoom and weight decay, or share, again; keep the first regime's other choices."""
        p = self.protocol
        less = ("weight_decay", _times(first.plain["weight_decay"], p.later_factors))
        axes: Axes = [("steps", regime.plain_steps), ("lr", p.lr), ("zoom", p.plain_zoom[:2]), less]
        plain = self._tune(regime, "none", first.plain, axes)
        start = first.uniform | {"steps": regime.distilled_steps}
        uniform = self._tune(regime, "uniform", start, [("distill_share", p.share[:2]), ("lr", p.lr)], teacher)
        new = {name: uniform[name] for name in ("steps", "lr")}
        factor = uniform["distill_share"] / first.uniform["distill_share"]
        rows = {"uniform": first.uniform, **first.maps}
        tuned = {}
        for name, config in rows.items():  # the best share of a map may differ from uniform's, as in the first regime
            axes = [("distill_share", _times(factor * config["distill_share"], p.later_factors))]
            tuned[name] = self._tune(regime, name, config | new, axes, teacher)
        uniform = tuned.pop("uniform")
        return Chosen(plain, uniform, tuned, first.logit | new)

    def _tune(self, regime: Regime, row: str, start: Config, axes: Axes, teacher: Teacher | None = None) -> Config:
        """Choose the best value of each axis in turn; the other axes have their best values so far.

        Before it is chosen, an axis has its value in ``start``, or its first value.
        """
        best = {name: values[0] for name, values in axes} | start
        for name, values in axes:
            trials = {str(value): best | {name: value} for value in values}
            means = self._means(regime, trials, teacher, row)
            best = trials[max(trials, key=lambda value: means[value])]
        return best

    def _means(
        self, regime: Regime, trials: dict[str, Config], teacher: Teacher | None, row: str | None = None
    ) -> dict[str, float]:
        """Return the mean mAP on the validation scenes of each of these configurations."""
        seeds = self.protocol.tuning_seeds
        runs = [
            self._student(regime, row or name, seed, "val", config, teacher)
            for name, config in trials.items()
            for seed in seeds
        ]
        found = [result.mAP for result in self.bench.results(runs)]
        return {name: statistics.fmean(found[i * len(seeds) :][: len(seeds)]) for i, name in enumerate(trials)}

    # ---- comparisons, on the test scenes

    def _compare_main(self, regime: Regime, teacher: Teacher, chosen: Chosen) -> None:
        rows = {"uniform": chosen.uniform, **chosen.maps, "logit": chosen.logit}
        self._score(regime, {"none": chosen.plain})
        self._score(regime, rows, teacher)

    def _compare_again(self, regime: Regime, teacher: Teacher, chosen: Chosen) -> None:
        self._compare_main(regime, teacher, chosen)
        name, best = next(iter(chosen.maps.items()))
        self._score(regime, {f"{name}, twice as long": _longer(best)}, teacher)  # as many steps as the plain student
        self._score(regime, {"none, twice as long": _longer(chosen.plain)})  # about the time of the row before

    def _compare_all(self, regime: Regime, teacher: Teacher, chosen: Chosen) -> None:
        self._compare_main(regime, teacher, chosen)
        name, best = next(iter(chosen.maps.items()))
        term = {"logit_weight": chosen.logit["logit_weight"]}
        p = self.protocol
        rows = {x: chosen.uniform | config for x, config in PRESETS.items() if x not in chosen.maps}
        rows |= {f"{name} + logit": best | term}
        rows |= {f"{name}, {place}": best | config for place, config in PLACES.items()}
        rows |= {f"{SHUFFLED}{x}": config | of_map(SHUFFLED + x) for x, config in chosen.maps.items()}
        prolonged = {"uniform": chosen.uniform, name: best, "logit": chosen.logit, f"{name} + logit": best | term}
        rows |= {f"{row}, twice as long": _longer(config) for row, config in prolonged.items()}
        self._score(regime, rows, teacher)
        twice = _longer(chosen.plain)
        self._score(regime, {"none, twice as long": twice})
        self.bench.forget()
        more = best | {"unlabelled": scenes.unlabelled(self.root, p.train - p.unlabelled, p.unlabelled)}
        self._score(regime, {f"{name}, unlabelled": more}, teacher)
        self._score(regime, {f"{name}, unlabelled, twice as long": _longer(more)}, teacher)
        self._score(regime, {"none, four times as long": _longer(twice)})  # about the time of the row before
        self._score_teachers(regime, name, best)

    def _score_teachers(self, regime: Regime, name: str, best: Config) -> None:
        """Score students of teachers without further knowledge: trained on the student's scenes, or untrained."""
        p = self.protocol
        count = regime.labelled
        own = [self._teacher("the student's scenes", s, s * count, count, p.own_steps, p.teacher_lr) for s in p.seeds]
        blank = self._teacher("nothing", 0, 0, p.train, p.blank_steps, NO_LR)
        *teachers, untrained = self.bench.teachers([*own, blank])
        runs = [
            self._student(regime, f"{name}, teacher of the student's scenes", seed, "test", best, teacher)
            for seed, teacher in zip(p.seeds, teachers, strict=True)
        ]
        self.bench.results(runs)
        self._score(regime, {f"{name}, untrained teacher": best}, untrained)

    def _score(self, regime: Regime, rows: dict[str, Config], teacher: Teacher | None = None) -> None:
        seeds = self.protocol.seeds
        # seed by seed, so that an unfinished study has complete pairs
        runs = [self._student(regime, row, s, "test", config, teacher) for s in seeds for row, config in rows.items()]
        self.bench.results(runs)

    # ---- single runs

    def _student(
        self, regime: Regime, row: str, seed: int, scored_on: str, config: Config, teacher: Teacher | None
    ) -> Run:
        first = seed * regime.labelled if (seed + 1) * regime.labelled <= regime.taught else 0
        whole = {"model": "yolov3-tiny", "width": self.protocol.student_width} | config
        return self._trained(regime.name, row, seed, scored_on, first, regime.labelled, whole, teacher)

    def _teacher(self, what: str, seed: int, first: int, count: int, steps: int, lr: float) -> Run:
        p = self.protocol
        config = {"model": "yolov3", "width": p.teacher_width, "match_threshold": p.teacher_match}
        return self._trained("teachers", what, seed, "test", first, count, config | {"steps": steps, "lr": lr}, None)

    def _trained(
        self,
        regime: str,
        row: str,
        seed: int,
        scored_on: str,
        first: int,
        count: int,
        config: Config,
        teacher: Teacher | None,
    ) -> Run:
        p = self.protocol
        data = scenes.labelled(self.root, first, count)
        return Run(regime, row, seed, scored_on, {"size": p.size, "batch": p.batch} | data | config, teacher)


def _times(value: float, factors: Sequence[float]) -> list[float]:
    return [value * factor for factor in factors]


def _longer(config: Config) -> Config:
    return config | {"steps": 2 * config["steps"]}


def run_study(
    out: str | os.PathLike[str] = "runs/study",
    *,
    results: str | os.PathLike[str] | None = None,
    protocol: Protocol = PUBLISHED,
    workers: int = 2,
) -> Path:
    """Train and score all runs that are not in the results file yet; a study that was stopped can be continued so.

    Args:
        out: folder of scenes, models and unfinished runs.
        results: the results file; None: ``results.jsonl`` in ``out``.
        protocol: sizes, lengths and choices.
        workers: number of runs at a time; they share the cores.

    Returns:
        The results file.

    Raises:
        ValueError: workers < 1, or a line of the results file is not a result.
        BlockingIOError: another study writes to the results file.
    """
    if workers < 1:
        raise ValueError(f"workers: expected at least 1, got {workers}")
    root = Path(out)
    ledger = Ledger(root / "results.jsonl" if results is None else results)
    try:
        study = Study(root, ledger, protocol, workers)
        try:
            study.run()
        finally:
            study.bench.close()
    finally:
        ledger.close()
    return ledger.file
