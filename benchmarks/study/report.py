"""Makes the tables and plots of the study from its results file."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scipy.stats import t as student_t

from fastkd.files import replacing, require_new
from fastkd.ops.presets import PRESETS
from fastkd.plot_style import COLORS
from fastkd.viz import overlay_maps, plot_curves
from fastkd.yolov3.data.dataset import DetectionDataset, some_batch
from fastkd.yolov3.train.run import batches, build_objective, training_set
from study.maps import MAPS, SHUFFLED, prior_name
from study.protocol import Protocol
from study.runs import Result, read_results, train_config
from study.scenes import scene_files

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DRAWN_MAPS = (
    *("self_information", "whitened self_information", "sensitivity", "confidence"),
    *("graded IoU", "predicted IoU", "object scale", "shuffled graded IoU"),
)
DRAWN_SCENES = 3
LEVEL = 0.95  # confidence level of the intervals
UNDER_WAY = "*Under way.*"  # table of a regime in which no row has all seeds
SETTINGS = ("lr", "weight_decay", "steps", "zoom", "distill_share", "logit_weight")
Row = dict[int, Result]  # by seed
Table = list[tuple[str, ...]]


@dataclass(frozen=True)
class Interval:
    """A mean and its two-sided confidence interval by Student's t."""

    mean: float
    half: float  # half of its width; NaN for a single value

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    def __str__(self) -> str:
        between = "" if math.isnan(self.half) else f" ({self.low:+.1f} to {self.high:+.1f})"
        return f"{self.mean:+.1f}{between}"


def interval(values: Sequence[float]) -> Interval:
    """Return the confidence interval of the mean of independent values, such as paired differences by seed."""
    mean, count = statistics.fmean(values), len(values)
    if count < 2:
        return Interval(mean, math.nan)
    quantile = float(student_t.ppf((1 + LEVEL) / 2, count - 1))
    return Interval(mean, quantile * statistics.stdev(values) / math.sqrt(count))


def gain(row: Row, other: Row, metric: str = "mAP") -> Interval:
    """Return the interval of the paired difference of two rows, over the seeds that both have.

    Raises:
        ValueError: no seed is in both.
    """
    seeds = sorted(row.keys() & other.keys())
    if not seeds:
        raise ValueError("rows: expected a seed that both have, got none")
    return interval([getattr(row[seed], metric) - getattr(other[seed], metric) for seed in seeds])


def write_report(results_file: str | os.PathLike[str], folder: str | os.PathLike[str]) -> None:
    """Write the plots of these results to a folder, and their tables to its ``README.md``.

    A table replaces the text between the lines ``<!-- table NAME -->`` and ``<!-- end -->``; all other text is kept.

    Raises:
        ValueError: there are no results, or the page has a table that the results do not have.
    """
    results = read_results(results_file)
    if not results:
        raise ValueError(f"results: expected runs of the study in {os.fspath(results_file)}, got none")
    folder = Path(folder)
    page, drawn = folder / "README.md", figures(results)
    if page.is_file():  # an earlier report, which is updated
        with replacing(page) as part:
            part.write_text(_filled(page.read_text(encoding="utf-8"), tables(results)), encoding="utf-8")
    else:
        for name in drawn:
            require_new(report=folder / f"{name}.png")
    for name, figure in drawn.items():
        with replacing(folder / f"{name}.png") as part:
            figure.savefig(part, format="png", dpi=150)


def draw_maps(results_file: str | os.PathLike[str], root: str | os.PathLike[str], file: Path) -> None:
    """Draw some of the maps over test scenes, with the study's first teacher, whose model must still be in ``root``.

    Raises:
        FileNotFoundError: the model is missing.
    """
    run = next(x.run for x in read_results(results_file) if x.run.teacher is not None)
    config = train_config(run, Path(root))
    data = training_set(config)
    objective = build_objective(config, data)
    distiller = objective.distiller
    assert distiller is not None
    distiller.calibrate(x.images for x in batches(data, config, 0, distiller.criterion.calibration_batches))
    batch = some_batch(DetectionDataset(*scene_files(Path(root), "test"), config.size), DRAWN_SCENES)
    weights = []
    for name in DRAWN_MAPS:
        objective.prior = prior_name(name)
        weights.append(distiller.maps(batch.images, objective.prior_of(batch.images, batch.targets)).information[0])
    with replacing(file) as part:
        overlay_maps(batch.images, weights, DRAWN_MAPS).savefig(part, format="png", dpi=110)


def _filled(page: str, found: Mapping[str, str]) -> str:
    pieces = page.split("<!-- table ")
    out = [pieces[0]]
    for piece in pieces[1:]:
        name, _, rest = piece.partition(" -->")
        _, end, after = rest.partition("<!-- end -->")
        if name not in found or not end:
            raise ValueError(f"README.md: expected one of the tables {', '.join(found)} with its end, got {name!r}")
        out.append(f"<!-- table {name} -->\n\n{found[name]}\n\n{end}{after}")
    return "".join(out)


# ---- tables


def tables(results: Sequence[Result]) -> dict[str, str]:
    """Return the tables as Markdown, by name: ``rows REGIME``, ``settings``, ``maps``, ``teachers`` and ``effort``."""
    regimes = list(dict.fromkeys(x.run.regime for x in results if x.run.regime != "teachers"))
    found = {f"rows {regime.name}": UNDER_WAY for regime in Protocol().regimes}
    rows = {regime: whole_rows(results, regime) for regime in regimes}
    found |= {f"rows {regime}": _rows_table(x) for regime, x in rows.items() if x}
    found["settings"] = _settings_table(results, regimes)
    found["maps"] = _maps_table(results, regimes[0])
    found["teachers"] = _teachers_table(results)
    found["effort"] = _effort_table(results, regimes)
    return found


def rows_of(results: Sequence[Result], regime: str, scored_on: str = "test") -> dict[str, Row]:
    """Return a regime's rows by name, in their order.

    If a row has several settings, those with the most seeds are taken, and among equals the last ones. To undo a later
    choice of settings, remove its lines from the results file.
    """
    rows: dict[str, dict[str, Row]] = {}
    for x in results:
        if x.run.regime == regime and x.run.scored_on == scored_on:
            settings = json.dumps(_settings_of(x.run.config), sort_keys=True)
            rows.setdefault(x.run.row, {}).setdefault(settings, {})[x.run.seed] = x
    return {name: max(reversed(found.values()), key=len) for name, found in rows.items()}


def whole_rows(results: Sequence[Result], regime: str) -> dict[str, Row]:
    """Return the rows on the test scenes that have all seeds, as fewer seeds of an unfinished study may mislead."""
    seeds = {x.run.seed for x in results if x.run.scored_on == "test" and x.run.regime != "teachers"}
    return {name: row for name, row in rows_of(results, regime).items() if row.keys() == seeds}


def _rows_table(rows: Mapping[str, Row]) -> str:
    table: Table = [("", "mAP", "AP50", "mAP over none", "mAP over uniform", "mAP over its shuffled twin")]
    for name, row in rows.items():
        twin = rows.get(SHUFFLED + name)
        table.append(
            (
                name,
                f"{_mean(row, 'mAP'):.1f}",
                f"{_mean(row, 'AP50'):.1f}",
                _over(row, rows.get("none"), name == "none"),
                _over(row, rows.get("uniform"), name in ("none", "uniform")),
                _over(row, twin),
            )
        )
    if not any(line[-1] for line in table[1:]):
        table = [line[:-1] for line in table]
    return _markdown(table)


def _over(row: Row, other: Row | None, same: bool = False) -> str:
    return "" if other is None or same or not row.keys() & other.keys() else str(gain(row, other))


def _mean(row: Row, metric: str) -> float:
    return statistics.fmean(getattr(x, metric) for x in row.values())


def _settings_table(results: Sequence[Result], regimes: Sequence[str]) -> str:
    table: Table = [("", "row", *(name.replace("_", " ") for name in SETTINGS))]
    for regime in regimes:
        for name, row in rows_of(results, regime).items():
            if name in ("none", "uniform", "logit") or SHUFFLED + name in rows_of(results, regimes[0]):
                config = next(iter(row.values())).run.config
                table.append((regime, name, *(_setting(config, key) for key in SETTINGS)))
    return _markdown(table)


def _setting(config: Mapping[str, Any], key: str) -> str:
    value = config.get(key, "")
    if key == "distill_share" and config.get("distill_weight") == 0:
        return ""
    return " to ".join(f"{x:g}" for x in value) if isinstance(value, (list, tuple)) else f"{value:g}" if value else ""


def _maps_table(results: Sequence[Result], regime: str) -> str:
    """Return the table of all maps on the validation scenes, with uniform weights' settings, the best map first."""
    chosen = next(iter(rows_of(results, regime)["uniform"].values())).run.config
    rows: dict[str, Row] = {}
    for x in results:
        if (x.run.regime, x.run.scored_on) == (regime, "val") and _settings_of(x.run.config) == _settings_of(chosen):
            rows.setdefault(x.run.row, {})[x.run.seed] = x
    uniform = rows.pop("uniform")
    table: Table = [("map", *(f"seed {seed}" for seed in sorted(uniform)), "mean over uniform")]
    table.append(("uniform", *_values(uniform, sorted(uniform)), ""))
    for name in sorted(rows.keys() & MAPS.keys(), key=lambda name: -_mean(rows[name], "mAP")):
        over = _mean(rows[name], "mAP") - _mean(uniform, "mAP")
        table.append((name, *_values(rows[name], sorted(uniform)), f"{over:+.1f}"))
    return _markdown(table)


def _settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration without its map and its scenes."""
    return {k: v for k, v in config.items() if k not in ("info_map", "prior", "annotations", "images")}


def _values(row: Row, seeds: Sequence[int]) -> list[str]:
    return [f"{row[seed].mAP:.1f}" if seed in row else "" for seed in seeds]


def _teachers_table(results: Sequence[Result]) -> str:
    table = [("a teacher of", "steps", "mAP", "AP50")]
    for name, row in rows_of(results, "teachers").items():
        steps = next(iter(row.values())).run.config["steps"]
        table.append((name, str(steps), f"{_mean(row, 'mAP'):.1f}", f"{_mean(row, 'AP50'):.1f}"))
    return _markdown(table)


def _effort_table(results: Sequence[Result], regimes: Sequence[str]) -> str:
    """Return the table of the number of runs, by kind, and of the hours of training."""
    table: Table = [("", "tuning runs: none", "uniform", "logit", "maps", "runs of the tables", "hours of training")]
    for regime in [*regimes, "teachers"]:
        runs = [x for x in results if x.run.regime == regime]
        tried = [x.run.row for x in runs if x.run.scored_on == "val"]
        counts = [tried.count(name) for name in ("none", "uniform", "logit")]
        hours = sum(x.seconds for x in runs) / 3600
        scored = len(runs) - len(tried)
        table.append((regime, *map(str, counts), str(len(tried) - sum(counts)), str(scored), f"{hours:.1f}"))
    return _markdown(table)


def _markdown(table: Sequence[Sequence[str]]) -> str:
    head, *body = [f"| {' | '.join(line)} |" for line in table]
    return "\n".join([head, "|" + "---|" * len(table[0]), *body])


# ---- plots


def figures(results: Sequence[Result]) -> dict[str, Figure]:
    """Return the plots ``gains``, of every row over no distillation, and ``learning_rates``, on validation scenes."""
    regimes = list(dict.fromkeys(x.run.regime for x in results if x.run.regime != "teachers"))
    rows = {regime: whole_rows(results, regime) for regime in regimes}
    gains = {
        regime: {name: gain(row, found["none"]) for name, row in found.items() if name != "none"}
        for regime, found in rows.items()
        if found.keys() > {"none"}
    }
    curves = {}
    for name in ("none", "uniform"):
        by_lr = _by_learning_rate(results, regimes[0], name)
        curves[name] = (list(by_lr), [list(x) for x in zip(*by_lr.values(), strict=True)])
    rates = plot_curves(curves, x_label="learning rate", y_label="mAP on validation scenes")
    rates.axes[0].set_xscale("log", base=2)
    rates.axes[0].set_xticks(sorted(x for curve in curves.values() for x in curve[0]))
    rates.axes[0].xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    return {"gains": plot_gains(gains, "mAP gained over no distillation, 95 % interval"), "learning_rates": rates}


def plot_gains(gains: Mapping[str, Mapping[str, Interval]], label: str) -> Figure:
    """Return a plot with one panel per regime and one interval per row, all on one scale."""
    from matplotlib.figure import Figure

    counts = [len(rows) for rows in gains.values()]
    figure = Figure((7, 0.9 * len(gains) + 0.26 * sum(counts)), layout="constrained")
    axes = figure.subplots(len(gains), 1, sharex=True, squeeze=False, height_ratios=counts)[:, 0]
    for axis, (regime, rows) in zip(axes, gains.items(), strict=True):
        for place, (name, x) in enumerate(reversed(list(rows.items()))):
            colour = COLORS[3] if name.startswith(SHUFFLED) else COLORS[1] if _is_map(name) else COLORS[0]
            axis.errorbar(x.mean, place, xerr=x.half, fmt="o", markersize=4, color=colour, capsize=2, linewidth=1.2)
        axis.set_yticks(range(len(rows)), list(reversed(list(rows))), fontsize=8)
        axis.set_title(regime, fontsize=9, loc="left")
        axis.axvline(0, color="0.5", linewidth=0.8)
        axis.grid(visible=True, axis="x", color="0.9", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_ylim(-0.6, len(rows) - 0.4)
    axes[-1].set_xlabel(label, fontsize=9)
    return figure


def _is_map(row: str) -> bool:
    """Whether a row differs from uniform weights by its map only."""
    return row in MAPS or (row != "uniform" and row.removesuffix(" preset") in PRESETS)


def _by_learning_rate(results: Sequence[Result], regime: str, row: str) -> dict[float, list[float]]:
    """Return the mAP of each tuning seed at each learning rate, in the runs from which the learning rate was chosen."""
    runs = [x for x in results if (x.run.regime, x.run.row, x.run.scored_on) == (regime, row, "val")]

    def others(x: Result) -> dict[str, Any]:
        return {k: v for k, v in _settings_of(x.run.config).items() if k != "lr"}

    # the largest group of runs that differ in the learning rate only
    group = max(runs, key=lambda x: len({y.run.config["lr"] for y in runs if others(y) == others(x)}))
    found: dict[float, list[float]] = {}
    for x in sorted(runs, key=lambda x: (x.run.config["lr"], x.run.seed)):
        if others(x) == others(group):
            found.setdefault(x.run.config["lr"], []).append(x.mAP)
    return found
