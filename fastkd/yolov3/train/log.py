"""What a training run says while it runs: a progress bar, ``metrics.jsonl`` and TensorBoard curves; and by what."""

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

FIGURE_DPI = 80  # of TensorBoard's copies, which are kept of every evaluation
FIGURE_SHARE = 0.05  # of the run's time
PACKAGES = ("torch", "numpy", "accelerate", "opencv-python-headless", "pycocotools", "scikit-learn")


class RunLog:
    """Logs the terms of a run's steps.

    Numbers are asked from the device once in ``every`` steps, so that no step waits for them. ``metrics.jsonl`` gets
    one JSON object a line: ``{"step", "epoch", "lr", "images_per_second", loss terms}``, means since the last line,
    or ``{"step", "metrics": {...}}`` after an evaluation.

    Args:
        out: the run's folder.
        terms: names of the loss terms, in the order of the vector that ``step`` takes.
        first, last: the run goes from step ``first`` to ``last``; lines after ``first``, which a killed run left
            behind, are dropped.
        batch: images per step.
        every: steps between two lines.
        show: whether this process prints and writes at all (one in a distributed run does).
        tensorboard: also write curves and figures to ``out``.
        reduce: mean of a tensor over all processes, which all log the same steps.
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
        if show:
            _drop_after(self.file, first)
            if tensorboard:
                import matplotlib  # noqa: F401  # of the figures; missing, it must not end the run at the first one
                from torch.utils.tensorboard import SummaryWriter  # here: its import takes seconds

                self._board = SummaryWriter(str(out / "tensorboard"), purge_step=first)

    def step(self, step: int, epoch: int, values: Tensor, lr: float) -> None:
        """One step is done: the ``step``-th, from 1. ``values``: one number a term, detached.

        Raises:
            FloatingPointError: a term was not finite (names the term and the step), up to ``every`` steps ago.
        """
        self._pending.append(values)
        self._step, self._epoch, self._lr = step, epoch, lr
        if step % self.every == 0 or step == self._last:
            self.flush()

    def flush(self) -> None:
        """Look at the steps since the last look, and write their means. Raises as ``step``."""
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
        """The result of an evaluation after this step: all values to the file, ``text`` to the screen."""
        self._write({"step": step, "metrics": dict(values)})
        numbers = {name: value for name, value in values.items() if isinstance(value, float)}
        self._curves({f"val/{name}": value for name, value in numbers.items()}, step)
        if self.show:
            self._bar.write(f"step {step}: {text}")

    def figures(self, step: int, draw: Callable[[], Mapping[str, Figure]]) -> None:
        """Figures to TensorBoard; where they have cost more than FIGURE_SHARE, only at the last step."""
        began = time.perf_counter()
        costly = self._figure_seconds > FIGURE_SHARE * (began - self._began)
        if self._board is None or (costly and step != self._last):
            return
        for name, figure in draw().items():
            figure.set_dpi(FIGURE_DPI)
            self._board.add_figure(f"distillation/{name}", figure, step)
        self._figure_seconds += time.perf_counter() - began

    def resume_clock(self) -> None:
        """Leave what has just been done, an evaluation say, out of the throughput."""
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
    """What a training's figures depend on."""
    found = {"fastkd": fastkd.__version__, "python": platform.python_version()}
    installed = {x.name: x.version for x in importlib.metadata.distributions()}
    return found | {name: installed[name] for name in PACKAGES if name in installed}


def read_log(file: Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl`` that have a step; one that was cut off by a kill is left out."""
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
    """``rows`` (steps, terms). The term that went wrong first is named, and not the sum that it spoils."""
    for offset, row in enumerate(rows.tolist() if not rows.isfinite().all() else []):
        bad = [name for name, value in zip(terms, row, strict=True) if not math.isfinite(value)]
        if bad:
            names = [name for name in bad if name != "loss"] or bad
            raise FloatingPointError(
                f"the {', '.join(names)} loss is not finite at step {first_step + offset} (values: "
                f"{', '.join(f'{name} {value:.4g}' for name, value in zip(terms, row, strict=True))}); "
                "lower the learning rate or that term's weight, or train without mixed precision"
            )
