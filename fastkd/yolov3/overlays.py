"""Plots of what distillation looks at, on some of a run's own images."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor

from fastkd import viz
from fastkd.level_maps import DistillMaps
from fastkd.yolov3.data import Batch, DetectionDataset, Sample, collate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

T = TypeVar("T")
BEFORE_AND_NOW = ("initial student", "student now")


def spread(total: int, count: int) -> list[int]:
    """At most ``count`` of ``total`` indices, evenly spaced."""
    return [i * total // min(count, total) for i in range(min(count, total))]


def spread_readable(total: int, count: int, read: Callable[[int], T | None]) -> list[T]:
    """What ``read`` returns for ``spread`` indices, or for the next index in place of one where it returns None."""
    found: dict[int, T | None] = {}
    for start in spread(total, count):
        for index in itertools.chain(range(start, total), range(start)):
            if index not in found:
                found[index] = read(index)
                if found[index] is not None:
                    break
    return [x for x in found.values() if x is not None]


def some_batch(data: DetectionDataset, count: int) -> Batch:
    """At most ``count`` images of a data set, evenly spaced and always the same.

    The next readable image takes the place of one that can't be read; the batch is empty where none can be read.
    """

    def read(index: int) -> Sample | None:
        sample = data.sample(index, epoch=0)
        return sample if sample.readable else None

    return collate(spread_readable(len(data), count, read) or [data.sample(0, epoch=0)])


def map_figures(images: Tensor, maps: DistillMaps, before: DistillMaps | None = None) -> dict[str, Figure]:
    """``maps``: the information maps; ``differences``: student against teacher, beside an earlier student's."""
    options = {"max_images": len(images)}
    earlier = None if before is None else before.differences
    return {
        "maps": viz.overlay_maps(images, maps.information, maps.names, **options),
        "differences": viz.overlay_differences(
            images, maps.differences, maps.names, before=earlier, names=BEFORE_AND_NOW, **options
        ),
    }
