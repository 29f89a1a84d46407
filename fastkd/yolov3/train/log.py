"""The log of a training run: a progress bar, ``metrics.jsonl``, TensorBoard curves, and versions of packages."""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

import fastkd
from fastkd.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = ("loss", "box", "objectness", "class", "distill")

FIGURE_DPI = 80  # low, because TensorBoard keeps the figures of every evaluation
FIGURE_SHARE = 0.05  # share of the run's time that figures may take
PACKAGES = ("torch", "numpy", "accelerate", "opencv-python-headless", "pycocotools", "scikit-learn")


class RunLog:
    """Logs the loss terms of a run.

    Numbers are copied from the device once in ``every`` steps, so that the other steps do not wait for it.
    ``metrics.jsonl`` gets one JSON object per line: ``{"step", "epoch", "lr", "images_per_second", loss terms}``, with
    means since the last line, or ``{"step", "metrics": {...}}`` after an evaluation.

    Args:
        out: folder of the run.
        terms: names of the loss terms, in the order of the vector that ``step`` takes.
        first, last: the steps that the run continues from and ends with; lines after step ``first``, left behind by a
            killed run, are dropped.
        batch: images per step.
        every: steps between two lines.
        show: whether this process prints and writes; in a distributed run, one process does.
        tensorboard: also write curves and figures to ``out``.
        reduce: returns the mean of a tensor over all processes, which all log the same steps.
    """

    def __init__(
        self,
        out: Path,
        terms: Sequence[str],
        *,
        first: int,
        last: int,
        batch: int,
        every: int,
        show: bool = True,
        tensorboard: bool = True,
        reduce: Callable[[Tensor], Tensor] = lambda values: values,
    ) -> None:
        self.terms, self.batch, self.every, self.show = list(terms), batch, every, show
        self.file = out / "metrics.jsonl"
        self._last, self._reduce = last, reduce
        self._pending: list[Tensor] = []
        self._step, self._epoch, self._lr = first, 0, 0.0
        self._began = self._since = time.perf_counter()
        self._figure_seconds = 0.0
        self._bar = tqdm(total=last, initial=first, unit="step", disable=not show, dynamic_ncols=True)
        self._board = None
        self._evaluated: set[int] = set()
        if show:
            _drop_after(self.file, first)
            self._evaluated = {entry["step"] for entry in read_log(self.file) if "metrics" in entry}
            if tensorboard:
                import matplotlib  # noqa: F401  # if it is missing, fail now and not at the first figure
                from torch.utils.tensorboard import SummaryWriter  # imported here, because that takes seconds

                self._board = SummaryWriter(str(out / "tensorboard"), purge_step=first + 1)

    def step(self, step: int, epoch: int, values: Tensor, lr: float) -> None:
        """Record a finished step.

        Args:
            step: its number, from 1.
            epoch: number of finished epochs.
            values: (T,) detached; one number per term.
            lr: its learning rate.

        Raises:
            FloatingPointError: a term of this or one of the last ``every`` steps was not finite (the message names term
                and step).
        """
        self._pending.append(values)
        self._step, self._epoch, self._lr = step, epoch, lr
        if step % self.every == 0 or step == self._last:
            self.flush()

    def flush(self) -> None:
        """Write the means of the steps since the last line. Raises what ``step`` raises."""
        if not self._pending:
            return
        count = len(self._pending)
        rows = self._reduce(torch.stack(self._pending)).double().cpu()
        self._pending = []
        _require_finite(rows, self.terms, self._step - count + 1)
        now = time.perf_counter()
        speed = count * self.batch / (now - self._since)
        self._since = now
        means = dict(zip(self.terms, rows.mean(0).tolist(), strict=True))
        self._bar.update(count)
        self._bar.set_postfix_str(" ".join(f"{k} {means[k]:.3g}" for k in SHOWN if k in means) + f" {speed:.0f} img/s")
        line = {"step": self._step, "epoch": self._epoch, "lr": self._lr, "images_per_second": round(speed, 2)}
        self._write({**line, **means})
        self._curves({"lr": self._lr, **{f"loss/{name}": value for name, value in means.items()}}, self._step)

    def metrics(self, step: int, values: Mapping[str, Any], text: str) -> None:
        """Record an evaluation after this step: write all values to the file, and print ``text``.

        An evaluation that an earlier process of this run has recorded is not recorded again: a finished run that is
        resumed is evaluated once more, but one that was killed during its last evaluation has no metrics yet.
        """
        if step in self._evaluated:
            return
        self._write({"step": step, "metrics": dict(values)})
        numbers = {name: value for name, value in values.items() if isinstance(value, float)}
        self._curves({f"val/{name}": value for name, value in numbers.items()}, step)
        if self.show:
            self._bar.write(f"step {step}: {text}")

    def figures(self, step: int, draw: Callable[[], Mapping[str, Figure]]) -> None:
        """Write figures to TensorBoard; if they have taken more than FIGURE_SHARE, only at the last step."""
        began = time.perf_counter()
        costly = self._figure_seconds > FIGURE_SHARE * (began - self._began)
        if self._board is None or (costly and step != self._last):
            return
        for name, figure in draw().items():
            figure.set_dpi(FIGURE_DPI)
            self._board.add_figure(f"distillation/{name}", figure, step)
        self._figure_seconds += time.perf_counter() - began

    def resume_clock(self) -> None:
        """Restart the clock of the throughput, to leave out what was just done, for example an evaluation."""
        self._since = time.perf_counter()

    def close(self) -> None:
        self._bar.close()
        if self._board is not None:
            self._board.close()

    def _write(self, entry: Mapping[str, Any]) -> None:
        if self.show:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")

    def _curves(self, values: Mapping[str, float], step: int) -> None:
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that the results of a training depend on."""
    found = {"fastkd": fastkd.__version__, "python": platform.python_version()}
    installed = {x.name: x.version for x in importlib.metadata.distributions()}
    return found | {name: installed[name] for name in PACKAGES if name in installed}


def read_log(file: Path) -> list[dict[str, Any]]:
    """Return the lines of a ``metrics.jsonl`` that have a step; a line that was cut off by a kill is left out."""
    entries = []
    if file.is_file():
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict) and isinstance(entry.get("step"), int):
                entries.append(entry)
    return entries


def _drop_after(file: Path, step: int) -> None:
    kept = [entry for entry in read_log(file) if entry["step"] <= step]
    with replacing(file) as part:
        part.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")


def _require_finite(rows: Tensor, terms: Sequence[str], first_step: int) -> None:
    """Raise FloatingPointError for the first step with a term that is not finite.

    ``rows`` is (steps, terms). The message names that term, not the sum "loss", which is then not finite either.
    """
    for offset, row in enumerate(rows.tolist() if not rows.isfinite().all() else []):
        bad = [name for name, value in zip(terms, row, strict=True) if not math.isfinite(value)]
        if bad:
            names = [name for name in bad if name != "loss"] or bad
            raise FloatingPointError(
                f"the {', '.join(names)} loss is not finite at step {first_step + offset} (values: "
                f"{', '.join(f'{name} {value:.4g}' for name, value in zip(terms, row, strict=True))}); "
                "lower the learning rate or that term's weight, or train without mixed precision"
            )
