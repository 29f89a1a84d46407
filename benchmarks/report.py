"""The benchmarks' JSON as a Markdown report with plots: what ``make bench`` ends with.

    python benchmarks/report.py benchmarks/results/cpu.json

Writes cpu.md and three pictures beside it.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
OURS = ("fastkd", "fastkd, in place", "fastkd, two passes")
TARGETS = (  # (of whom, against whom or None for the floor, factor, batches)
    ("fastkd, in place", "eager", 10.0, (4, 16)),
    ("fastkd, in place", "torch.compile", 1.8, (4, 16)),
    ("fastkd, in place", None, 1.5, (4, 16)),
    ("fastkd", "eager", 7.0, (4, 16)),
    ("fastkd", "torch.compile", 1.4, (4, 16)),
    ("fastkd", "eager", 5.0, (1,)),
    ("fastkd", "fastkd, two passes", 1.0, (1, 4, 16)),
)
COLOURS = {
    "fastkd": "#1b6ca8", "fastkd, in place": "#0b3c5d", "fastkd, two passes": "#7fb2d9", "eager": "#c44536",
    "torch.compile": "#e09f3e", "torch.compile max-autotune": "#e09f3e", "floor": "#777777",
}  # fmt: skip


def read(path: Path) -> tuple[Row, list[Row], list[Row]]:
    """(machine and versions, rows of the loss: one a case and provider; rows of the training step)."""
    found = json.loads(path.read_text())
    about = {**found["machine_info"], "date": found["datetime"]}
    infos = [{**b["extra_info"], "first_ms": [1e3 * x for x in b["stats"]["data"]]} for b in found["benchmarks"]]
    loss = [row for case in together(info for info in infos if "steps" in info) for row in rows_of(case)]
    training = [{**info, "median": statistics.median(info["first_ms"])} for info in infos if "training" in info]
    return about, loss, training


def together(cases: Iterable[Row]) -> list[Row]:
    """The turns of a case as one: its rounds of all of them."""
    of: dict[str, Row] = {}
    for case in cases:
        first = of.setdefault(case["title"], case)
        if first is not case:
            for step, more in zip(first["steps"], case["steps"], strict=True):
                step["ms"] += more["ms"]
                step["floor_ms"] += more["floor_ms"]
    return list(of.values())


def rows_of(case: Row) -> Iterator[Row]:
    """One row a provider and size; ``rounds`` has the times of all providers in the same rounds."""
    rounds = {step["provider"]: step["ms"] for step in case["steps"]}
    for step in case["steps"]:
        yield {**case, **step, "rounds": rounds, "median": statistics.median(step["ms"])}


def quartiles(values: Sequence[float]) -> str:
    low, middle, high = (f"{x:.0f}" if x >= 100 else f"{x:.3g}" for x in statistics.quantiles(values, n=4))
    return f"{middle} ({low} to {high})"


def pick(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    return [r for r in rows if all(r[k] == v for k, v in wanted.items())]


def one(rows: Iterable[Row], **wanted: Any) -> Row:
    (row,) = pick(rows, **wanted)
    return row


def faster(row: Row, other: str) -> list[float]:
    """How many times as fast as another in each round: times of one round share the machine's speed."""
    return ratios(row["rounds"][other], row["ms"])


def over_floor(row: Row) -> list[float]:
    return ratios(row["ms"], row["floor_ms"])


def ratios(times: Sequence[float], others: Sequence[float]) -> list[float]:
    return [x / y for x, y in zip(times, others, strict=True)]


def exponent(rows: Sequence[Row], least_bytes: int = 8 << 20) -> float:
    """Slope of log time by log size, over features of at least so many bytes in all."""
    points = [(math.log(r["elements"]), math.log(r["median"])) for r in rows if 4 * r["elements"] >= least_bytes]
    return statistics.linear_regression(*zip(*points, strict=True)).slope


# ---- tables


def table(rows: Sequence[Row], beside: Sequence[str] = ()) -> list[str]:
    """One line a provider: time, how many times as fast as others of the same case, floor, memory."""
    lines = [
        f"| provider | ms, median (quartiles) | {' | '.join([*beside, 'times floor', 'page faults', 'peak MiB'])} |",
        "|---|---|" + "---|" * (len(beside) + 3),
    ]
    for r in rows:
        factors = "".join(f"{statistics.median(faster(r, rival)):.2f} | " for rival in beside)
        peak = "" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 2**20:.1f}"
        own = f"{statistics.median(over_floor(r)):.2f} | {r['faults']} | {peak} |"
        lines.append(f"| {r['provider']} | {quartiles(r['ms'])} | {factors}{own}")
    return [*lines, f"| *floor* | {quartiles(rows[0]['floor_ms'])} | {'| ' * len(beside)}1 | 0 | |", ""]


def tables_of(rows: Sequence[Row], heading: str, key: Callable[[Row], Any]) -> list[str]:
    lines: list[str] = []
    for value in dict.fromkeys(map(key, rows)):
        lines += [f"**{heading.format(value)}**", "", *table([r for r in rows if key(r) == value], BESIDE)]
    return lines


BESIDE = ("eager", "torch.compile")


def targets(rows: Sequence[Row]) -> list[str]:
    lines = ["| target, `same6`, float32 | asked | measured, median (quartiles) | |", "|---|---|---|---|"]
    batch = pick(rows, group="batch")
    for who, whom, factor, batches in TARGETS:
        measured = []
        for n in batches:
            row = one(batch, provider=who, batch=n)
            found = over_floor(row) if whom is None else faster(row, whom)
            ratio = statistics.median(found)
            measured.append((n, quartiles(found), ratio <= factor if whom is None else ratio >= factor))
        asked = f"at most {factor:g} × the floor" if whom is None else f"at least {factor:g} × as fast as {whom}"
        got = "; ".join(f"N = {n}: {found}" for n, found, _ in measured)
        lines.append(f"| {who} | {asked} | {got} | {verdict([ok for *_, ok in measured])} |")
    most = [(n, quartiles(over_floor(one(batch, provider="eager", batch=n)))) for n in (1, 4, 16)]
    got = "; ".join(f"N = {n}: {found}" for n, found in most)
    lines.append(f"| *the floor* | to compare with: times as fast as eager | {got} | |")
    lines += [*(linear_target(rows, who) for who in ("fastkd", "fastkd, in place")), half_target(rows), ""]
    return lines


def verdict(fulfilled: Sequence[bool]) -> str:
    return "met" if all(fulfilled) else "missed" if not any(fulfilled) else "in part"


def linear_target(rows: Sequence[Row], who: str) -> str:
    of = {g: exponent(pick(rows, group=g, provider=who)) for g in ("sweep N", "sweep HW", "sweep C")}
    got = ", ".join(f"{x:.2f} ({g.removeprefix('sweep ')})" for g, x in of.items())
    fulfilled = verdict([abs(x - 1) <= 0.05 for x in of.values()])
    return f"| {who} | cost grows with exponent 1.0 ± 0.05 | {got} | {fulfilled} |"


def half_target(rows: Sequence[Row]) -> str:
    of = []
    for layout in ("contiguous", "channels_last"):
        group = "batch" if layout == "contiguous" else "dtype and layout"
        full = one(rows, group=group, provider="fastkd", batch=4, dtype="float32", layout=layout)
        half = one(rows, group="dtype and layout", provider="fastkd", dtype="bfloat16", layout=layout)
        of.append((layout, full["median"] / half["median"]))
    got = ", ".join(f"{ratio:.2f} ({layout})" for layout, ratio in of)
    return f"| fastkd, bfloat16 | at least as fast as float32 | {got} | {verdict([x >= 1 for _, x in of])} |"


def sweep_table(rows: Sequence[Row]) -> list[str]:
    lines = ["| sweep, float32 | provider | ms, by size | exponent past 8 MiB of features |", "|---|---|---|---|"]
    for group in ("sweep N", "sweep HW", "sweep C", "sweep levels"):
        for who in ("fastkd", "fastkd, in place", "eager"):
            of = sorted(pick(rows, group=group, provider=who), key=lambda r: r["elements"])
            sizes = ", ".join(f"{r['median']:.2f}" for r in of)
            lines.append(f"| {group.removeprefix('sweep ')} | {who} | {sizes} | {exponent(of):.2f} |")
    return [*lines, ""]


def training_table(rows: Sequence[Row]) -> list[str]:
    lines = ["| batch | loss | step, ms | map, loss and gradient, ms | share of the step |", "|---|---|---|---|---|"]
    for r in sorted(rows, key=lambda r: r["batch"]):
        loss = statistics.median(r["loss_ms"]) if r["loss_ms"] else None
        alone = "" if loss is None else quartiles(r["loss_ms"])
        share = "" if loss is None else f"{100 * loss / r['median']:.1f} %"
        lines.append(f"| {r['batch']} | {r['training']} | {quartiles(r['first_ms'])} | {alone} | {share} |")
    return [*lines, ""]


# ---- pictures


def draw(rows: Sequence[Row], folder: Path, stem: str) -> dict[str, Path]:
    from matplotlib.figure import Figure

    pictures = {}
    for name, size, painter in (
        ("scaling", (9.5, 3.8), _scaling), ("peers", (9.5, 4.2), _peers), ("memory", (9.5, 3.6), _memory)
    ):  # fmt: skip
        figure = Figure(figsize=size, dpi=150, layout="constrained")
        painter(figure, rows)
        pictures[name] = folder / f"{stem}_{name}.png"
        figure.savefig(pictures[name])
    return pictures


def _scaling(figure: Any, rows: Sequence[Row]) -> None:
    axes = figure.subplots(1, 2)
    batch = [r for r in pick(rows, group="batch") if r["provider"] != "torch.compile max-autotune"]
    for who in dict.fromkeys(r["provider"] for r in batch):
        of = pick(batch, provider=who)
        axes[0].loglog([r["batch"] for r in of], [r["median"] for r in of], "o-", color=COLOURS[who], label=who)
    mine = pick(batch, provider="fastkd, in place")
    floors = [statistics.median(r["floor_ms"]) for r in mine]
    axes[0].loglog([r["batch"] for r in mine], floors, "--", color=COLOURS["floor"], label="floor")
    axes[0].set(xlabel="batch N", ylabel="forward + backward, ms", title="YOLOv3's six levels at 416 px (same6)")
    axes[0].set_xticks([1, 4, 16], ["1", "4", "16"])
    axes[0].minorticks_off()
    axes[0].set_yticks([1, 3, 10, 30, 100], ["1", "3", "10", "30", "100"])
    axes[0].legend(fontsize=7)
    for who in ("eager", "fastkd", "fastkd, in place"):
        sweeps = [r for r in rows if r["group"].startswith("sweep") and r["provider"] == who]
        slope = exponent([r for r in sweeps if r["group"] != "sweep levels"])
        axes[1].loglog(
            [r["elements"] for r in sweeps], [r["median"] for r in sweeps], "o", ms=4, color=COLOURS[who],
            label=f"{who}: exponent {slope:.2f}",
        )  # fmt: skip
    axes[1].set(xlabel="elements of the student's features", title="N, H·W, C or the number of levels doubled")
    axes[1].set_yticks([1, 3, 10, 30, 100], ["1", "3", "10", "30", "100"])
    axes[1].minorticks_off()
    axes[1].legend(fontsize=7, loc="upper left")


def _bars(axis: Any, labels: Sequence[str], values: Sequence[float], unit: str) -> None:
    places = range(len(labels))
    colours = [COLOURS.get(x, COLOURS["fastkd"] if x.startswith("fastkd") else "#b7a99a") for x in labels]
    axis.barh(places, values, color=colours)
    axis.set_yticks(places, labels, fontsize=8)
    axis.invert_yaxis()
    for place, value in zip(places, values, strict=True):
        axis.text(value, place, f" {value:.1f}", va="center", fontsize=8)
    axis.set(xlabel=unit, xlim=(0, 1.12 * max(values)))
    axis.spines[["top", "right"]].set_visible(False)


def _peers(figure: Any, rows: Sequence[Row]) -> None:
    axis = figure.subplots()
    compared = pick(rows, group="peers")
    floor = statistics.median(compared[0]["floor_ms"])
    labels, values = ["floor", *(r["provider"] for r in compared)], [floor, *(r["median"] for r in compared)]
    _bars(axis, labels, values, "forward + backward, ms")
    axis.set_title("One step of the loss: same6, N = 4, float32", fontsize=10)


def _memory(figure: Any, rows: Sequence[Row]) -> None:
    axis = figure.subplots()
    compared = [r for r in pick(rows, group="peers") if r["peak_bytes"] is not None]
    if compared:
        _bars(axis, [r["provider"] for r in compared], [r["peak_bytes"] / 2**20 for r in compared], "MiB")
    unit = compared[0]["elements"] * 4 / 2**20 if compared else 0
    axis.axvline(unit, color=COLOURS["floor"], ls="--", lw=1)
    axis.set_title(f"Peak memory of a step beyond the features; dashed: one gradient ({unit:.1f} MiB)", fontsize=10)


# ---- the report


def report(about: Row, loss: Sequence[Row], training: Sequence[Row], pictures: dict[str, Path]) -> str:
    cpu = about.get("cpu", {})
    machine = f"{cpu.get('brand_raw', about.get('machine'))}, {about.get('torch_threads')} threads of PyTorch"
    lines = [
        "# Benchmarks on a CPU",
        "",
        f"`make bench`, {about['date'][:10]}: {machine}; torch {about.get('torch')}, Python {about['python_version']}.",
        "Forward and backward of the default loss (energy, mean) unless said, features as the workloads of",
        "`benchmarks/workloads.py` have them. All providers of a table were timed in the same rounds, each after the",
        "floor: one read of student and teacher and one write of the gradient, by `torch.add(out=)`. Columns *eager*",
        "and *torch.compile* say how many times as fast as these a provider is, *times floor* how many times as slow",
        "as that: medians over rounds of the ratio within a round, as the machine's speed comes and goes by half.",
        "*Page faults* are those of one step: fresh pages can cost eager half of its time, and how many it needs",
        "depends on what else the process has freed. A provider of the same formula first had to give the same number.",
        "Peak memory is of the process, in one step, beyond the features and what was allocated before.",
        "",
        f"![time against batch and size]({pictures['scaling'].name})",
        "",
        "## Targets",
        "",
        *targets(loss),
        "## By batch",
        "",
        *tables_of(pick(loss, group="batch"), "same6, float32, contiguous, N = {}", lambda r: r["batch"]),
        "## The value alone",
        "",
        *table(pick(loss, group="forward"), BESIDE),
        "## By dtype and layout",
        "",
        *tables_of(
            pick(loss, group="dtype and layout"), "same6, N = 4, {0[0]}, {0[1]}", lambda r: (r["dtype"], r["layout"])
        ),
        "## By workload",
        "",
        *tables_of(pick(loss, group="workload"), "{}, N = 4, float32, contiguous", lambda r: r["workload"]),
        "## On one thread",
        "",
        *table(pick(loss, group="threads"), BESIDE),
        "## Against what else is used",
        "",
        "From the formulas, in plain PyTorch as their users run it; ours of the same formula beside it, if it has one.",
        "",
        f"![time of each]({pictures['peers'].name})",
        "",
        *table(pick(loss, group="peers"), BESIDE),
        f"![peak memory of each]({pictures['memory'].name})",
        "",
        "## By size",
        "",
        *sweep_table(loss),
        "## In a training step",
        "",
        "YOLOv3 teaches YOLOv3-tiny at 416 px, both of full width, float32: detection loss, distillation of backbone",
        "and neck through 1×1 adapters, SGD. The share is what map, loss and gradient by themselves take of the step.",
        "",
        *training_table(training),
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path)
    path = parser.parse_args().json
    about, loss, training = read(path)
    pictures = draw(loss, path.parent, path.stem)
    path.with_suffix(".md").write_text(report(about, loss, training, pictures))
    print(path.with_suffix(".md"))


if __name__ == "__main__":
    main()
