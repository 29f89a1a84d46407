"""Trains the runs of the study; the result of each run is a line of the results file, and is not computed again."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import platform
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fastkd.files import hold, replacing
from fastkd.health import fingerprint
from fastkd.yolov3.checkpoint import load_detector
from fastkd.yolov3.data.augment import Augmentation
from fastkd.yolov3.data.dataset import DetectionDataset
from fastkd.yolov3.train.config import PATHS, TrainConfig
from fastkd.yolov3.train.evaluate import evaluate
from fastkd.yolov3.train.log import versions
from fastkd.yolov3.train.objective import Objective
from fastkd.yolov3.train.run import epoch_steps, train, training_set
from study import maps  # noqa: F401  # registers the study's priors
from study.logits import LogitObjective
from study.memo import remember
from study.scenes import scene_files, set_files

SCORES = ("mAP", "AP50", "AP75")
MEMO = "memo"  # folder of the teachers' stored outputs, by fingerprint
SAVE_STEPS = 200  # approximate number of steps between checkpoints
# fixed here, because the trainer's defaults have changed since the study began
AUGMENTATION: dict[str, Any] = {
    "flip": 0.0,
    "zoom": (0.75, 1.33),
    "translate": 0.1,
    "hue": 0.02,
    "saturation": 0.5,
    "value": 0.4,
}
AUGMENTATION |= {"mosaic": 0.0, "min_visible": 0.3}
FIXED = {"multi_scale": 0.0, "plots": False}
ORPHAN_CHECK = 2.0  # seconds between two checks whether the study still runs


@dataclass(frozen=True)
class Run:
    """One detector to train and to score.

    Args:
        regime: name of the amount of data for student and teacher.
        row: name of the row in the tables; for a teacher, the data that it has learnt from.
        seed: seed of the initial weights, the order, the augmentation, and the choice of labelled scenes.
        scored_on: ``"val"`` for choices, ``"test"`` for the tables.
        config: arguments of ``TrainConfig`` except ``out`` and ``teacher``; paths are relative to the study's folder.
            Options of the augmentation are ``zoom``, ``flip`` (digits must not be mirrored) and ``mosaic``. ``set`` is
            the folder of another data set than the digits scenes.
        teacher: key of the teacher's run and the fingerprint of its weights, so that no two teachers are mixed.
    """

    regime: str
    row: str
    seed: int
    scored_on: str
    config: dict[str, Any]
    teacher: tuple[str, str] | None = None

    @property
    def key(self) -> str:
        """An identifier that depends on this run only; also the name of its folder."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        return f"{self.regime}-{self.row}-{self.scored_on}-{self.seed}-{digest[:8]}".replace(" ", "_")


@dataclass(frozen=True)
class Result:
    """The result of a run; metrics are in percent, on the scenes that it was scored on."""

    run: Run
    mAP: float  # noqa: N815  (the usual name)
    AP50: float
    AP75: float
    seconds: float  # of the training steps
    machine: str
    versions: dict[str, str]
    per_class: dict[str, float | None] | None = None  # mAP; not stored for the digits


class Ledger:
    """The results file: one JSON object per line, appended when a run ends; one study at a time may write to it.

    A last line that was cut off by a kill is dropped, and its run is repeated.

    Raises:
        BlockingIOError: another study is writing to this file.
        ValueError: a complete line is not a result.
    """

    def __init__(self, file: str | os.PathLike[str]) -> None:
        self.file = Path(file)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self._lock = hold(self.file.with_name(f".{self.file.name}.lock"), self.file)
        self.results = {result.run.key: result for result in read_results(self.file)}
        with replacing(self.file) as part:
            part.write_text("".join(map(_line, self.results.values())), encoding="utf-8")

    def add(self, result: Result) -> None:
        self.results[result.run.key] = result
        with self.file.open("a", encoding="utf-8") as file:
            file.write(_line(result))
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        self._lock.release()


def read_results(file: str | os.PathLike[str]) -> list[Result]:
    """Return the results in a file, in their order; none if there is no file.

    Raises:
        ValueError: a complete line is not a result.
    """
    if not Path(file).is_file():
        return []
    lines = Path(file).read_text(encoding="utf-8").split("\n")
    results = []
    for number, line in enumerate(lines[:-1], start=1):  # a last line without its end was cut off
        try:
            values = json.loads(line)
            run = values["run"]
            run["teacher"] = run["teacher"] and tuple(run["teacher"])
            results.append(Result(**values | {"run": Run(**run)}))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{os.fspath(file)}: line {number} is not a result of the study: {error}") from None
    return results


def _line(result: Result) -> str:
    return json.dumps(asdict(result)) + "\n"


class Bench:
    """Trains runs in worker processes; runs that are in the results file are not trained again.

    Args:
        root: the study's folder, for models and data.
        ledger: the results file.
        workers: number of runs at a time; they share the cores.
    """

    def __init__(self, root: Path, ledger: Ledger, workers: int) -> None:
        self.root, self.ledger, self.workers = root, ledger, workers
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = max(1, cores // workers)
        spawn = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(workers, spawn, initializer=_become_worker, initargs=(threads, os.getpid()))

    def results(self, runs: Sequence[Run], *, keep: bool = False) -> list[Result]:
        """Return the results of these runs, in their order; with ``keep``, their models are kept."""
        self._train([run for run in runs if run.key not in self.ledger.results], keep=keep)
        return [self.ledger.results[run.key] for run in runs]

    def teachers(self, runs: Sequence[Run]) -> list[tuple[str, str]]:
        """Return key and fingerprint of the model of each of these runs; the models are kept."""
        self._train([run for run in runs if not model_file(self.root, run.key).is_file()], keep=True)
        return [(run.key, _fingerprint(model_file(self.root, run.key))) for run in runs]

    def forget(self) -> None:
        """Delete the teachers' stored outputs, which take some GB per seed."""
        shutil.rmtree(self.root / MEMO, ignore_errors=True)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _train(self, runs: Sequence[Run], *, keep: bool) -> None:
        if not runs:
            return
        rows = list(dict.fromkeys(f"{run.regime}: {run.row}" for run in runs))
        name = rows[0] if len(rows) == 1 else f"{rows[0]} ... {rows[-1]}"
        futures = [self._pool.submit(_train_and_score, run, self.root, keep) for run in runs]
        try:
            for future in tqdm(as_completed(futures), name, len(futures), unit="run"):
                self.ledger.add(future.result())
        except BaseException:  # for example Ctrl-C; unfinished runs continue from their checkpoints the next time
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise


def model_file(root: Path, key: str) -> Path:
    """Return the file of a run's model."""
    return root / "models" / f"{key}.pt"


def _fingerprint(model: Path) -> str:
    return fingerprint(load_detector(model).model)


# ---- in the workers


def _become_worker(threads: int, study: int) -> None:
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore", "distillation may not work")  # a teacher is untrained on purpose
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # after Ctrl-C, the study itself ends its workers
    threading.Thread(target=_end_with, args=(study,), daemon=True).start()


def _end_with(study: int) -> None:
    """End this worker when the study is gone, so that it does not write to the folders of the next study."""
    while os.getppid() == study:
        time.sleep(ORPHAN_CHECK)
    os._exit(1)


def _train_and_score(run: Run, root: Path, keep: bool) -> Result:
    """Train and score a run; a run that was stopped before continues from its checkpoint."""
    out = root / "runs" / run.key
    config = train_config(run, root)
    weight = run.config.get("logit_weight")
    objective = partial(LogitObjective, logit_weight=weight) if weight else Objective
    with contextlib.redirect_stderr(io.StringIO()):  # hide the progress bars of parallel runs
        folder = root / MEMO / str(run.teacher and run.teacher[1])
        memory = partial(remember, folder=folder) if config.cpu else None
        result = train(config, on_teacher=memory, make_objective=objective)
    own = run.config.get("set")
    files = scene_files(root, run.scored_on) if own is None else set_files(root / own, run.scored_on)
    metrics = evaluate(result.model, DetectionDataset(*files, config.size))
    if keep:
        with replacing(model_file(root, run.key)) as part:
            shutil.copyfile(result.model_file, part)
    shutil.rmtree(out)
    percent = {name: round(100 * getattr(metrics, name), 3) for name in SCORES}
    seconds = round(result.seconds, 1)
    per_class = None if own is None else {x: v and round(100 * v, 2) for x, v in metrics.per_class.items()}
    return Result(run, **percent, seconds=seconds, machine=_machine(), versions=versions(), per_class=per_class)


def train_config(run: Run, root: Path) -> TrainConfig:
    """Return the run's configuration, with paths in ``root``; images are cached, as they fit in memory."""
    values: dict[str, Any] = {name: str(root / x) if name in PATHS else x for name, x in run.config.items()}
    for name in ("logit_weight", "set"):  # used by the objective and by the evaluation
        values.pop(name, None)
    changes = {name: values.pop(name) for name in ("zoom", "flip", "mosaic") if name in values}
    if "zoom" in changes:
        changes["zoom"] = tuple(changes["zoom"])
    values["augmentation"] = Augmentation(**AUGMENTATION | changes)
    if run.teacher is not None:
        values["teacher"] = str(model_file(root, run.teacher[0]))
    config = TrainConfig(
        out=str(root / "runs" / run.key), seed=run.seed, cache=True, tensorboard=False, eval_every=0, resume=True,
        **FIXED | {"cpu": True} | values,
    )  # fmt: skip
    epoch = epoch_steps(config, training_set(config))
    return replace(config, save_every=max(1, round(SAVE_STEPS / epoch)))


def _machine() -> str:
    """Return the name of the processor, because weights depend on its rounding."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
