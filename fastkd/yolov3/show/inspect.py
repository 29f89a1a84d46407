"""``fastkd inspect``: draws the information maps of a run, the differences of the features, and the level losses."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastkd import viz
from fastkd.files import new_folder, replacing, require_new
from fastkd.level_maps import DistillMaps
from fastkd.yolov3.data.annotations import Array
from fastkd.yolov3.data.dataset import fit, read_image, some_batch, spread_readable
from fastkd.yolov3.show.predict import listed, warn_left_out
from fastkd.yolov3.train.config import TrainConfig, read_config
from fastkd.yolov3.train.figures import map_figures
from fastkd.yolov3.train.log import read_log
from fastkd.yolov3.train.run import build_objective, load_checkpoint, training_set, validation_set

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURES = ("maps", "differences", "level_losses")  # names of the files
TOP = 0.1  # the table gives the share of the weight that this fraction of the cells has


@dataclass(frozen=True)
class Inspection:
    """The result of ``inspect_run``; ``str(inspection)`` is a table.

    Attributes:
        before, now: maps of the initial student and of the trained one, both with the current statistics of the
            teacher.
        images: number of images, over which the numbers are means.
        files: the figures that were written.
    """

    before: DistillMaps
    now: DistillMaps
    images: int
    files: tuple[Path, ...]

    def __str__(self) -> str:
        head = ("level", "stride", "share of loss", "mean difference", "initially", f"weight in top {TOP:.0%} of cells")
        rows = [head]
        for first, level, share in zip(self.before.levels, self.now.levels, self.now.shares, strict=True):
            rows.append(
                (
                    f"{level.group}: {level.student} <- {level.teacher}",
                    f"{level.stride:.3g}",
                    f"{share:.0%}",
                    f"{float(level.difference.mean()):.3g}",
                    f"{float(first.difference.mean()):.3g}",
                    f"{level.concentration(TOP):.0%}",
                )
            )
        widths = [max(len(row[k]) for row in rows) for k in range(len(head))]
        lines = ["  ".join([r[0].ljust(widths[0]), *map(str.rjust, r[1:], widths[1:])]) for r in rows]
        return "\n".join([f"on {self.images} image{'s' * (self.images != 1)}", *lines])


def inspect_run(
    run: str | os.PathLike[str],
    paths: Sequence[str | os.PathLike[str]] = (),
    *,
    out: str | os.PathLike[str] | None = None,
    split: str | None = None,
    count: int = 4,
) -> Inspection:
    """Draw the distillation maps of a run of ``fastkd train --teacher``, from its last checkpoint.

    Writes ``maps.png`` (information maps over the images), ``differences.png`` (differences between the features of
    student and teacher, initially and now) and ``level_losses.png`` (loss and share of each level over the training,
    from ``metrics.jsonl``).

    Args:
        run: folder of the run.
        paths: image files or folders; maps that need boxes then use those that the teacher detects. If empty, images
            of the run with their labels are used.
        out: folder for the three figures; None: ``inspect`` in the run's folder, or ``inspect-2`` and so on if it
            exists.
        split: the set of the images, ``"val"`` or ``"train"``, if there are no ``paths``; None: ``"val"`` if the run
            has a validation set.
        count: use at most this many of the images, evenly spaced. If an image can't be read, the next one takes its
            place, with a warning.

    Raises:
        FileNotFoundError: the run, its checkpoint, its log or an image is missing.
        FileExistsError: ``out`` has one of the three files.
        ValueError: the run has no teacher; no image can be read; ``split`` is unknown or given together with
            ``paths``; ``count`` < 1.
    """
    import matplotlib  # noqa: F401  # if it is missing, fail before models are built

    if count < 1:
        raise ValueError(f"count: expected at least 1 image, got {count}")
    if paths and split is not None:
        raise ValueError(f"set: expected None together with images of your own, got {split!r}")
    config = replace(read_config(run), augmentation=None)
    if not config.distils:
        raise ValueError(
            f"{os.fspath(run)}: this run imitates no teacher, so there are no maps; train with --teacher, and without "
            "--distill-stop 0"
        )
    folder = new_folder(Path(run) / "inspect") if out is None else Path(out)
    files = tuple(folder / f"{name}.png" for name in FIGURES)
    for file in files:
        require_new(out=file)
    images, targets = _read(paths, count, config) if paths else _own(config, split, count)
    before, now = _before_and_now(config, images, targets, 0 if paths else len(images))
    figures = map_figures(images, now, before) | {"level_losses": level_loss_figure(Path(run), now)}
    for file, name in zip(files, FIGURES, strict=True):
        with replacing(file) as part:
            figures[name].savefig(part, format="png")
    return Inspection(before, now, len(images), files)


def level_loss_figure(run: Path, maps: DistillMaps) -> Figure:
    """Return a plot of each level's loss and share over the distilled steps of a run, and their share of the loss."""
    entries = [x for x in read_log(run / "metrics.jsonl") if x.get("distill")]
    if not entries:
        raise FileNotFoundError(f"{run}: no distillation losses in metrics.jsonl")
    return viz.plot_level_losses(
        {level.name: [x[f"distill/{level.student}"] for x in entries] for level in maps.levels},
        steps=[x["step"] for x in entries],
        smooth=0.8,
        share_of_total=[x["distill"] / x["loss"] if x["loss"] else 0.0 for x in entries],
    )


def _read(paths: Sequence[str | os.PathLike[str]], count: int, config: TrainConfig) -> tuple[Tensor, Tensor]:
    """Return images, (n, 3, size, size) float, 0..1, and targets (0, 6), as these images have no labels."""
    files = listed(paths)
    faults: dict[Path, Exception] = {}

    def read(index: int) -> Array | None:
        try:
            return fit(read_image(files[index]), config.size)[0]
        except (ValueError, OSError) as error:
            faults[files[index]] = error
            return None

    squares = spread_readable(len(files), count, read)
    warn_left_out(faults, len(faults) + len(squares))
    images = torch.stack([torch.from_numpy(x.copy()) for x in squares]).permute(0, 3, 1, 2).float() / 255
    return images, torch.zeros(0, 6)


def _own(config: TrainConfig, split: str | None, count: int) -> tuple[Tensor, Tensor]:
    if split not in (None, "train", "val"):
        raise ValueError(f"set: expected train or val, got {split!r}; for other images, name files or a folder")
    val = None if split == "train" else validation_set(config)
    if val is None and split == "val":
        raise ValueError("set: this run has no validation set; take train, or name image files or a folder")
    data = training_set(config) if val is None else val
    batch = some_batch(data, count)
    if not len(batch.images):
        raise ValueError(f"{data.annotations.source}: none of the {len(data)} images can be read, see the warnings")
    return batch.images, batch.targets


def _before_and_now(
    config: TrainConfig, images: Tensor, targets: Tensor, labelled: int
) -> tuple[DistillMaps, DistillMaps]:
    """Return the maps of the run's initial student and of the student of its last checkpoint.

    Both are computed with the statistics of the teacher's features from that checkpoint.
    """
    if not (Path(config.out) / "checkpoint.pt").is_file():
        raise FileNotFoundError(f"{config.out}: no checkpoint yet (checkpoint.pt is missing); train it further")
    objective = build_objective(config, training_set(config))
    distiller = objective.distiller
    if distiller is None:
        raise ValueError("teacher: expected one")
    learning = (objective.student, distiller.criterion.adapters)
    initial = [copy.deepcopy(x.state_dict()) for x in learning]
    load_checkpoint(config, objective)
    prior = objective.prior_of(images, targets, labelled)
    now = distiller.maps(images, prior)
    for module, state in zip(learning, initial, strict=True):
        module.load_state_dict(state)
    return distiller.maps(images, prior), now
