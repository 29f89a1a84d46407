"""Plots of the distillation maps over images."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from fastkd import viz
from fastkd.level_maps import DistillMaps

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BEFORE_AND_NOW = ("initial student", "student now")


def map_figures(images: Tensor, maps: DistillMaps, before: DistillMaps | None = None) -> dict[str, Figure]:
    """Return the figures ``maps``, the information maps, and ``differences``, those of student and teacher.

    Args:
        images: (N, 3, H, W) float, 0..1.
        maps: the distillation maps of these images.
        before: maps of an earlier student, whose differences are drawn beside those of ``maps``; None: none.
    """
    options = {"max_images": len(images)}
    earlier = None if before is None else before.differences
    return {
        "maps": viz.overlay_maps(images, maps.information, maps.names, **options),
        "differences": viz.overlay_differences(
            images, maps.differences, maps.names, before=earlier, names=BEFORE_AND_NOW, **options
        ),
    }
