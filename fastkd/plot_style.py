"""The look of all plots: colours, labels, scales and legends; needs matplotlib (``pip install 'fastkd[train]'``)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Numbers: TypeAlias = Sequence[float]

# Okabe and Ito (2008): distinct for any kind of colour vision; line styles keep lines distinct in grey
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":")


def new_figure(size: tuple[float, float]) -> Figure:
    """Return an empty figure outside pyplot's global state.

    Raises:
        ImportError: no matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'fastkd[train]'") from error
    return Figure(figsize=size, dpi=150, layout="constrained")


def label_axes(axis: Axes, x: str, y: str) -> None:
    """Label the axes, and give them the grid and the open frame of all plots."""
    axis.set_xlabel(x, fontsize=9)
    axis.set_ylabel(y, fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(visible=True, color="0.9", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def set_log_scale(axis: Axes) -> None:
    """Set a logarithmic scale with plain numbers at 1, 2 and 5 of each decade, as a loss rarely spans more than two."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())


def add_legend(figure: Figure, axis: Axes) -> None:
    """Put the legend of an axis above the figure, at most five entries in a row."""
    handles, labels = axis.get_legend_handles_labels()
    rows = math.ceil(len(labels) / 5)
    figure.legend(
        handles,
        labels,
        loc="outside upper center",
        ncols=math.ceil(len(labels) / rows),
        frameon=False,
        fontsize=8,
    )


def line_style(i: int) -> dict[str, Any]:
    """Return the colour and dashes of the i-th line of a plot, as keyword arguments of ``plot``."""
    return {"color": COLORS[i % len(COLORS)], "linestyle": STYLES[i % len(STYLES)]}


def running_mean(values: Numbers, keep: float) -> list[float]:
    """Return the exponential running mean without initial bias; entries that are not finite become NaN."""
    out, total, weight = [], 0.0, 0.0
    for value in values:
        if math.isfinite(value):
            total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(total / weight if weight and math.isfinite(value) else math.nan)
    return out
