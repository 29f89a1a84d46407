"""The folder of a run whose user named none."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import accelerate
import torch
from accelerate.utils import broadcast_object_list

from fastkd.files import new_folder
from fastkd.yolov3.train.config import TrainConfig, read_config, require_same_run

RUNS = Path("runs")


def run_name(data: str | os.PathLike[str], model: str, *, distilled: bool) -> str:
    """Name of a run by its data, its model and whether it has a teacher: ``"neu-det-yolov3-tiny-distilled"``."""
    path = Path(os.path.realpath(data))
    folder = path.parent if path.is_file() else path
    of_data = re.sub(r"[^\w.-]+", "_", folder.name).strip("._") or "data"
    return f"{of_data}-{model}" + "-distilled" * distilled


def runs_named(name: str) -> list[Path]:
    """Folders ``runs/NAME``, ``runs/NAME-2``, ... that hold a run, the highest number first."""
    numbers = {}
    for config in RUNS.glob("*/config.json"):
        found = re.fullmatch(re.escape(name) + r"(?:-(\d+))?", config.parent.name)
        if found:
            numbers[config.parent] = int(found[1] or 1)
    return sorted(numbers, key=lambda folder: -numbers[folder])


def choose_folder(name: str, configure: Callable[[str], TrainConfig], *, resume: bool) -> str:
    """The folder of a run: a new one or, with ``resume``, that of the last run that was started with the same options.

    Args:
        name: as of ``run_name``.
        configure: makes the run's configuration for a folder.
        resume: whether to look for a run to continue; if none has that name, the folder is new.

    Raises:
        ValueError: there are runs of that name, but all were started with other options.
    """
    there = runs_named(name) if resume else []
    first: ValueError | OSError | None = None
    for folder in there:
        config = asdict(configure(str(folder)))  # outside the try: a wrong option is not another run's
        try:
            require_same_run(asdict(read_config(folder)), config, 0)
            return str(folder)
        except (ValueError, OSError) as error:
            first = first or error
    if first is not None:
        raise ValueError(
            f"resume: none of {', '.join(map(str, there))} was started with these options; name the run with --out. "
            f"For {there[0]}: {first}"
        )
    return str(new_folder(RUNS / name))


def agreed(choose: Callable[[], str], *, cpu: bool) -> str:
    """What the first process chooses, in all processes of a run; an error of it is raised in all of them."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return choose()
    state = accelerate.PartialState(cpu=cpu or not torch.accelerator.is_available())
    found: list[str | Exception | None] = [None]
    if state.is_main_process:
        try:
            found = [choose()]
        except Exception as error:  # whatever it is: the other processes wait
            found = [error]
    broadcast_object_list(found)  # in place
    if isinstance(found[0], Exception):
        raise found[0]
    return str(found[0])
