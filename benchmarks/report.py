"""Writes the report of the benchmarks, as Markdown with plots, from their JSON file: the last step of ``make bench``.

    python benchmarks/report.py benchmarks/results/cpu.json

It writes cpu.md and three figures beside the JSON file.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
BESIDE = ("eager", "torch.compile")
FLOOR = "the floor"
STEP_TARGETS = ((16, FLOOR, 1.4), (16, "eager", 7.0), (16, "torch.compile", 1.8),
                (1, FLOOR, 1.7), (1, "eager", 4.0), (1, "torch.compile", 1.7))  # fmt: skip
CONSTANT_TARGET = 1.3  # times the floor, as before the step was one pass
HOST_TARGETS = {"distill_loss": 5.0, 'DistillLoss("auto"), graded_iou': 9.0}
OPERATION_TARGETS = {
    "distill_loss": 4,
    'DistillLoss("auto"), identity adapters': 12,
    "a graded prior of 5 levels": 2,
    "the trainer's step, beyond student, teacher and the adapters' convolutions": 25,
}
COLOURS = {"fastkd": "#1b6ca8", "eager": "#c44536", "torch.compile": "#e09f3e", "floor": "#777777"}


def read(path: Path) -> tuple[Row, list[Row]]:
    """Return machine and versions, and each benchmark's ``extra_info``; the turns of a case are joined into one."""
    found = json.loads(path.read_text())
    infos = [x["extra_info"] for x in found["benchmarks"]]
    return {**found["machine_info"], "date": found["datetime"]}, together(infos)


def together(infos: Iterable[Row]) -> list[Row]:
    """Join the rounds of benchmarks that are turns of the same case."""
    of: dict[str, Row] = {}
    for info in infos:
        title = str({key: value for key, value in info.items() if not isinstance(value, (list, dict))})
        first = of.setdefault(title, info)
        if first is not info:
            for step, more in zip(first["steps"], info["steps"], strict=True):
                step["ms"] += more["ms"]
                step["floor_ms"] += more["floor_ms"]
    return list(of.values())


def rows_of(infos: Iterable[Row], kind: str) -> Iterator[Row]:
    """Yield a row per provider of a kind's benchmarks; ``rounds`` has the times of all providers in the same rounds."""
    for info in pick(infos, kind=kind):
        rounds = {step["provider"]: step["ms"] for step in info["steps"]}
        for step in info["steps"]:
            yield {**info, **step, "rounds": rounds, "median": statistics.median(step["ms"])}


def number(x: float) -> str:
    return f"{x:.0f}" if x >= 100 else f"{x:.3g}"


def quartiles(values: Sequence[float]) -> str:
    if len(values) < 2:
        return number(values[0])
    low, middle, high = map(number, statistics.quantiles(values, n=4))
    return f"{middle} ({low} to {high})"


def pick(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    return [r for r in rows if all(r.get(k) == v for k, v in wanted.items())]


def one(rows: Iterable[Row], **wanted: Any) -> Row:
    (row,) = pick(rows, **wanted)
    return row


def faster(row: Row, other: str) -> list[float]:
    """Return how many times as fast as another provider it is in each round, which cancels the machine's speed."""
    return ratios(row["rounds"][other], row["ms"])


def over_floor(row: Row) -> list[float]:
    return ratios(row["ms"], row["floor_ms"])


def ratios(times: Sequence[float], others: Sequence[float]) -> list[float]:
    return [x / y for x, y in zip(times, others, strict=True)]


# ---- the step, and its targets


def targets(infos: Sequence[Row]) -> list[str]:
    """Return a table of the targets of the step, and whether they are met."""
    lines = ["| what | target | measured, median (quartiles) | |", "|---|---|---|---|"]
    lines += [*step_targets(infos), *constant_target(infos), *host_targets(infos), *operation_targets(infos)]
    return [*lines, ""]


def target(what: str, asked: str, found: str, met: bool) -> str:
    return f"| {what} | {asked} | {found} | {'met' if met else '**missed**'} |"


def step_targets(infos: Sequence[Row]) -> Iterator[str]:
    steps = list(rows_of(infos, "step"))
    for n, whom, factor in STEP_TARGETS:
        for row in pick(steps, workload="same6", batch=n, adapters=False, provider="fastkd"):
            what = f'the step of `DistillLoss(weight="auto")`, graded_iou, prior included, same6, N = {n}'
            if whom == FLOOR:
                found = over_floor(row)
                yield target(what, f"≤ {factor:g} × the floor", quartiles(found), statistics.median(found) <= factor)
            else:
                found = faster(row, whom)
                asked = f"≥ {factor:g} × as fast as {whom}"
                yield target(what, asked, quartiles(found), statistics.median(found) >= factor)


def constant_target(infos: Sequence[Row]) -> Iterator[str]:
    for row in pick(rows_of(infos, "constant weight"), provider="fastkd"):
        what, found = "the loss with a constant weight, energy + softmax, same6, N = 16", over_floor(row)
        met = statistics.median(found) <= CONSTANT_TARGET
        yield target(what, f"≤ {CONSTANT_TARGET:g} × the floor", quartiles(found), met)


def host_targets(infos: Sequence[Row]) -> Iterator[str]:
    for info in pick(infos, kind="host"):
        trivial, *others = info["microseconds"]
        for name in others:
            found = ratios(info["microseconds"][name], info["microseconds"][trivial])
            asked = f"≤ {HOST_TARGETS[name]:g} × {trivial}"
            what = f"host time of {name}, six tiny levels, forward and backward"
            yield target(what, asked, quartiles(found), statistics.median(found) <= HOST_TARGETS[name])


def operation_targets(infos: Sequence[Row]) -> Iterator[str]:
    for info in pick(infos, kind="operations"):
        for name, names in info["found"].items():
            count, most = sum(names.values()), OPERATION_TARGETS[name]
            yield target(f"dispatched operations of {name}", f"≤ {most}", str(count), count <= most)


def step_tables(infos: Sequence[Row]) -> list[str]:
    lines: list[str] = []
    for info in pick(infos, kind="step"):
        adapters = ", 1×1 adapters with bias from YOLOv3-tiny's widths" if info["adapters"] else ""
        lines += [f"**{info['workload']}, N = {info['batch']}, float32{adapters}**", ""]
        lines += table(list(rows_of([info], "step")), BESIDE)
    for info in pick(infos, kind="constant weight"):
        lines += ["**same6, N = 16, float32, energy + softmax, constant weight**", ""]
        lines += table(list(rows_of([info], "constant weight")))
    for info in pick(infos, kind="host"):
        lines += ["| host, one thread | µs, median (quartiles) |", "|---|---|"]
        lines += [f"| {name} | {quartiles(times)} |" for name, times in info["microseconds"].items()]
        lines.append("")
    for info in pick(infos, kind="operations"):
        lines += ["| operations | which |", "|---|---|"]
        for name, names in info["found"].items():
            lines.append(f"| {name} | {', '.join(f'{n} {op}' if n > 1 else op for op, n in names.items())} |")
        lines.append("")
    return lines


# ---- tables of the loss alone and of training


def table(rows: Sequence[Row], beside: Sequence[str] = ()) -> list[str]:
    """Return one line per provider: time, how many times as fast as others in the same case, floor, memory."""
    memory = ("page faults", "peak MiB") if "faults" in rows[0] else ()
    lines = [
        f"| provider | ms, median (quartiles) | {' | '.join([*beside, 'times floor', *memory])} |",
        "|---|---|" + "---|" * (len(beside) + 1 + len(memory)),
    ]
    for r in rows:
        cells = [r["provider"], quartiles(r["ms"])]
        cells += [f"{statistics.median(faster(r, rival)):.2f}" for rival in beside]
        cells.append(f"{statistics.median(over_floor(r)):.2f}")
        if memory:
            cells += [str(r["faults"]), "" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 2**20:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    blank = [""] * (len(beside))
    floor = ["*floor*", quartiles(rows[0]["floor_ms"]), *blank, "1", *[""] * len(memory)]
    return [*lines, f"| {' | '.join(floor)} |", ""]


def tables_of(rows: Sequence[Row], heading: str, key: Callable[[Row], Any]) -> list[str]:
    lines: list[str] = []
    for value in dict.fromkeys(map(key, rows)):
        lines += [f"**{heading.format(value)}**", "", *table([r for r in rows if key(r) == value], BESIDE)]
    return lines


def training_table(infos: Sequence[Row]) -> list[str]:
    lines = [
        "| batch | loss | step, ms | over the student alone, ms | prior, loss and gradient, ms |",
        "|---|---|---|---|---|",
    ]
    for r in sorted(rows_of(infos, "training"), key=lambda r: r["batch"]):
        alone = r["rounds"]["student alone"]
        more = [a - b for a, b in zip(r["ms"], alone, strict=True)]
        cells = [str(r["batch"]), r["provider"], quartiles(r["ms"])]
        cells += [quartiles(more), quartiles(r["loss_ms"])] if r["loss_ms"] else ["", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


# ---- figures


def draw(loss: Sequence[Row], folder: Path, stem: str) -> dict[str, Path]:
    from matplotlib.figure import Figure

    figures = {}
    for name, size, painter in (
        ("scaling", (5.5, 3.8), _scaling), ("peers", (9.5, 4.2), _peers), ("memory", (9.5, 3.6), _memory)
    ):  # fmt: skip
        figure = Figure(figsize=size, dpi=150, layout="constrained")
        painter(figure, loss)
        figures[name] = folder / f"{stem}_{name}.png"
        figure.savefig(figures[name])
    return figures


def _scaling(figure: Any, rows: Sequence[Row]) -> None:
    axis, batch = figure.subplots(), pick(rows, group="batch")
    for who in dict.fromkeys(r["provider"] for r in batch):
        of = pick(batch, provider=who)
        axis.loglog([r["batch"] for r in of], [r["median"] for r in of], "o-", color=COLOURS[who], label=who)
    mine = pick(batch, provider="fastkd")
    floors = [statistics.median(r["floor_ms"]) for r in mine]
    axis.loglog([r["batch"] for r in mine], floors, "--", color=COLOURS["floor"], label="floor")
    axis.set(xlabel="batch N", ylabel="forward + backward, ms", title="YOLOv3's six levels at 416 px (same6)")
    axis.set_xticks([1, 4, 16], ["1", "4", "16"])
    axis.minorticks_off()
    axis.set_yticks([1, 3, 10, 30, 100], ["1", "3", "10", "30", "100"])
    axis.legend(fontsize=7)


def _bars(axis: Any, labels: Sequence[str], values: Sequence[float], unit: str) -> None:
    places = range(len(labels))
    colours = [COLOURS.get(x, COLOURS["fastkd"] if x.startswith("fastkd") else "#b7a99a") for x in labels]
    axis.barh(places, values, color=colours)
    axis.set_yticks(places, labels, fontsize=8)
    axis.invert_yaxis()
    for place, value in zip(places, values, strict=True):
        axis.text(value, place, f" {value:.1f}", va="center", fontsize=8)
    axis.set(xlabel=unit, xlim=(0, 1.12 * max(*values, 1e-9)))
    axis.spines[["top", "right"]].set_visible(False)


def _peers(figure: Any, rows: Sequence[Row]) -> None:
    axis, compared = figure.subplots(), pick(rows, group="peers")
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


def report(about: Row, infos: Sequence[Row], loss: Sequence[Row], figures: dict[str, Path]) -> str:
    cpu = about.get("cpu", {})
    machine = f"{cpu.get('brand_raw', about.get('machine'))}, {about.get('torch_threads')} threads of PyTorch"
    lines = [
        "# Benchmarks on a CPU",
        "",
        f"`make bench`, {about['date'][:10]}: {machine}; torch {about.get('torch')}, Python {about['python_version']}.",
        "",
        "## The loss in training",
        "",
        '`DistillLoss(weight="auto")` in training, calibrated, with the trainer\'s map and a task loss that decreases',
        "from step to step. The time of each provider includes the prior from 8 boxes per image (`priors.iou_mask`,",
        "graded), the adapters if there are any, the loss with its factor, the averages for the next step's factor,",
        "and the gradients of the student's features and the adapters. *eager* is the same loss with",
        '`backend="reference"`; *torch.compile* compiles its formula and the adapters, and gets prior and factor from',
        "fastkd's ops. *The floor* is one read of student and teacher and one write of the gradient, by",
        "`torch.add(out=)`: three times the bytes of all student features. All providers were timed in the same",
        "rounds, each after the floor; ratios are medians over rounds of the ratio within a round, because the",
        "machine's speed varies by half. Before the timing, all had to give the same loss and gradients.",
        "",
        *targets(infos),
        *step_tables(infos),
        "## In a training step",
        "",
        "YOLOv3 teaches YOLOv3-tiny at 416 px, both of full width, float32, with the trainer's defaults: detection",
        'loss, graded_iou with its prior, `weight="auto"`, backbone and neck through 1×1 adapters, SGD; one step of',
        "each per round. Every step except that of the student alone includes the teacher's forward. The last column",
        "was measured separately, with cold caches, after the adapters.",
        "",
        *training_table(infos),
        "## The loss alone",
        "",
        "Forward and backward of the default map (energy, mean) with a constant weight. Columns *eager* and",
        "*torch.compile* give how many times as fast as these a provider is. *Page faults* are those of one step: new",
        "pages can take half of eager's time. Peak memory is that of the process in one step, above the memory before",
        "it, which includes the features.",
        "",
        f"![time against batch and size]({figures['scaling'].name})",
        "",
        *tables_of(pick(loss, group="batch"), "same6, float32, contiguous, N = {}", lambda r: r["batch"]),
        "**The value alone, N = 4**",
        "",
        *table(pick(loss, group="forward"), BESIDE),
        *tables_of(
            pick(loss, group="dtype and layout"), "same6, N = 4, {0[0]}, {0[1]}", lambda r: (r["dtype"], r["layout"])
        ),
        *tables_of(pick(loss, group="workload"), "{}, N = 4, float32, contiguous", lambda r: r["workload"]),
        "**On one thread, same6, N = 4**",
        "",
        *table(pick(loss, group="threads"), BESIDE),
        "## Other distillation losses",
        "",
        "They are written from their formulas in plain PyTorch, as their users run them.",
        "*fastkd, as ...* is fastkd's loss with the same formula.",
        "",
        f"![time of each]({figures['peers'].name})",
        "",
        *table(pick(loss, group="peers"), BESIDE),
        f"![peak memory of each]({figures['memory'].name})",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path)
    path = parser.parse_args().json
    about, infos = read(path)
    loss = list(rows_of(infos, "loss"))
    figures = draw(loss, path.parent, path.stem)
    path.with_suffix(".md").write_text(report(about, infos, loss, figures))
    print(path.with_suffix(".md"))


if __name__ == "__main__":
    main()
