"""Plots of what distillation looks at, on some of a run's own images."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from fastkd import viz
from fastkd.level_maps import DistillMaps

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BEFORE_AND_NOW = ("initial student", "student now")


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
