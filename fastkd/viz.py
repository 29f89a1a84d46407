"""Figures of information maps, feature differences and losses; needs matplotlib (``pip install 'fastkd[train]'``).

Each function returns a new ``matplotlib.figure.Figure``, outside pyplot's global state: save it with
``figure.savefig(path)``, show it as the last line of a notebook's cell, or pass it to TensorBoard's ``add_figure``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastkd.plot_style import Numbers, add_legend, label_axes, line_style, new_figure, running_mean, set_log_scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, PowerNorm
    from matplotlib.figure import Figure

HEAT = "inferno"
NOT_FINITE = "#00FFFF"  # cells that are infinite or not a number: a colour that HEAT lacks
PANEL = 2.2  # inches


def overlay_maps(
    images: Tensor, maps: Sequence[Tensor], titles: Sequence[str], *, max_images: int = 4, opacity: float = 0.75
) -> Figure:
    """Return a figure of information maps as heat over the images: a row per image, and a column per level.

    The first column shows the image. Each map is drawn relative to its own highest cell in that image, so that the
    shapes of levels of different scale can be compared; the number below a panel is the highest cell over the mean. A
    square is one cell of the level. Cells that are not finite are cyan.

    Args:
        images: (N, 3, H, W), float in [0, 1] or uint8.
        maps: one (N, h, w) tensor per level, not negative, as from ``fastkd.info_map``.
        titles: one name per level, for example ``"backbone, stride 8"``.
        max_images: the largest number of images to draw.
        opacity: of the heat where the map is highest, in [0, 1]; the lowest cells are transparent.

    Raises:
        ImportError: no matplotlib.
        ValueError: no image; lengths or shapes that do not match.
    """
    _check_overlay(images, titles, maps=maps)

    def caption(values: Tensor, _: Tensor | None) -> str:
        return f"highest {_ratio(values.max(), values.mean()):.1f} × mean"

    label = "weight, relative to the map's highest cell"
    return _overlay(images, {"": maps}, titles, caption, label, 1.0, max_images, opacity)


def overlay_differences(
    images: Tensor,
    differences: Sequence[Tensor],
    titles: Sequence[str],
    *,
    before: Sequence[Tensor] | None = None,
    names: tuple[str, str] = ("before", "now"),
    max_images: int = 4,
    opacity: float = 0.75,
) -> Figure:
    """Return a figure of the difference between student and teacher in each cell, as heat over the images.

    The layout is that of ``overlay_maps``. With ``before``, each image has two rows, and the two panels of a level have
    the same scale: cells that became dark have been learnt. Colours follow the square root of the value, as a few cells
    are much larger than all others; the number below a panel is the mean over its cells.

    Args:
        images: (N, 3, H, W), float in [0, 1] or uint8.
        differences: one (N, h, w) tensor per level, not negative, as in ``DistillMaps.differences``.
        titles: one name per level.
        before: the differences of an earlier student, of the same shapes.
        names: names of the two rows.
        max_images, opacity: as in ``overlay_maps``.

    Raises:
        ImportError: no matplotlib.
        ValueError: no image; lengths or shapes that do not match.
    """
    _check_overlay(images, titles, differences=differences, **({} if before is None else {"before": before}))

    def caption(values: Tensor, earlier: Tensor | None) -> str:
        change = f", {_ratio(values.mean(), earlier.mean()) - 1:+.0%}" if earlier is not None and earlier.any() else ""
        return f"mean {float(values.mean()):.2g}{change}"

    kinds = {"": differences} if before is None else {names[0]: before, names[1]: differences}
    label = "difference, relative to the highest" + ("" if before is None else f" of {names[0]} and {names[1]}")
    return _overlay(images, kinds, titles, caption, label, 0.5, max_images, opacity)


def plot_level_losses(
    history: Mapping[str, Numbers],
    *,
    steps: Numbers | None = None,
    smooth: float = 0.9,
    share_of_total: Numbers | None = None,
) -> Figure:
    """Return a figure of each level's loss over training, on a logarithmic scale, and of its share of their sum.

    Args:
        history: from the name of a level to its loss at every logged step (``criterion.level_losses``), of equal
            lengths.
        steps: training step of each entry; by default 0, 1, 2, ...
        smooth: decay of the exponential running mean per entry, in [0, 1); the raw values are drawn faintly.
        share_of_total: the weighted distillation loss over the total loss, in [0, 1], to draw as well.

    Raises:
        ImportError: no matplotlib.
        ValueError: no level; unequal lengths; ``smooth`` outside [0, 1).
    """
    if not history or not 0 <= smooth < 1:
        raise ValueError(
            f"history, smooth: expected at least one level and 0 <= smooth < 1, got {len(history)} levels and {smooth}"
        )
    count = len(next(iter(history.values())))
    x = list(range(count)) if steps is None else list(steps)
    series = {f"history[{name!r}]": values for name, values in history.items()}
    for name, values in (series | ({} if share_of_total is None else {"share_of_total": share_of_total})).items():
        if len(values) != len(x):
            raise ValueError(f"{name}: expected {len(x)} values, one per step, got {len(values)}")
    figure = new_figure((9, 3.6))
    left, right = figure.subplots(1, 2)
    means = [running_mean(values, smooth) for values in history.values()]
    for i, (name, values) in enumerate(history.items()):
        left.plot(x, values, color=line_style(i)["color"], linewidth=0.8, alpha=0.25)
        left.plot(x, means[i], label=name, marker="o" if len(x) == 1 else "", **line_style(i))
    if any(value > 0 for values in history.values() for value in values):
        set_log_scale(left)
    label_axes(left, "step", "loss of the level")
    _stack_shares(right, x, means)
    if share_of_total is not None:
        line = {"color": "black", "linestyle": (0, (4, 2)), "linewidth": 1.6}
        line["path_effects"] = _outlined()
        right.plot(x, running_mean(share_of_total, smooth), **line)
        left.plot([], [], label="distillation, of the total loss (right)", **line)
    add_legend(figure, left)
    return figure


def _stack_shares(axis: Axes, x: Sequence[float], means: Sequence[Numbers]) -> None:
    """Draw the share of each level in the sum as a band, with its last value at the right edge."""
    totals = [sum(m[k] for m in means) or 1.0 for k in range(len(x))]
    shares = [[value / total for value, total in zip(mean, totals, strict=True)] for mean in means]
    axis.stackplot(
        x, shares, colors=[line_style(i)["color"] for i in range(len(shares))], edgecolor="white", linewidth=0.6
    )
    label_axes(axis, "step", "share of the sum")
    axis.set(ylim=(0, 1), xlim=(x[0], x[-1]) if len(x) > 1 else None)
    axis.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axis.grid(visible=False)
    below = 0.0
    for i, share in enumerate(s[-1] for s in shares if len(x)):
        if share >= 0.03:  # a thinner band has no room for the number
            axis.annotate(
                f"{share:.0%}",
                (1, below + share / 2),
                xycoords=("axes fraction", "data"),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color=line_style(i)["color"],
            )
        below += share if math.isfinite(share) else 0.0


def plot_curves(
    curves: Mapping[str, tuple[Numbers, Numbers | Sequence[Numbers]]],
    *,
    references: Mapping[str, float] | None = None,
    x_label: str = "step",
    y_label: str = "mAP",
) -> Figure:
    """Return a figure with one line per model, for example students with and without distillation.

    Args:
        curves: from the name of a model to (x, y); y is one series, or several (one per seed), which are drawn as their
            mean and a band from the lowest to the highest.
        references: from a name to a value that is drawn as a thin horizontal line, for example the teacher's.
        x_label, y_label: labels of the axes, with units.

    Raises:
        ImportError: no matplotlib.
        ValueError: no curve, or an x and a y of different lengths.
    """
    if not curves:
        raise ValueError("curves: expected at least one, got none")
    figure = new_figure((6, 3.8))
    axis = figure.subplots()
    for i, (name, (x, y)) in enumerate(curves.items()):
        series = [list(s) for s in y] if y and isinstance(y[0], Sequence) else [list(y)]  # type: ignore[arg-type]
        for s in series:
            if len(s) != len(x):
                raise ValueError(f"curves[{name!r}]: expected as many y as x, {len(x)}, got {len(s)}")
        columns = list(zip(*series, strict=True))
        axis.plot(x, [sum(c) / len(c) for c in columns], label=name, marker="o", markersize=3.5, **line_style(i))
        if len(series) > 1:
            low, high = [min(c) for c in columns], [max(c) for c in columns]
            axis.fill_between(x, low, high, color=line_style(i)["color"], alpha=0.18, linewidth=0)
    for name, value in (references or {}).items():
        axis.axhline(value, color="0.35", linewidth=1, linestyle=(0, (1, 2)))
        axis.annotate(
            name,
            (1, value),
            xycoords=("axes fraction", "data"),
            xytext=(-3, 3),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color="0.25",
        )
    axis.margins(y=0.1)
    label_axes(axis, x_label, y_label)
    add_legend(figure, axis)
    return figure


def _overlay(
    images: Tensor,
    kinds: Mapping[str, Sequence[Tensor]],
    titles: Sequence[str],
    caption: Callable[[Tensor, Tensor | None], str],
    label: str,
    gamma: float,
    max_images: int,
    opacity: float,
) -> Figure:
    """Return a figure with the image and its levels in a row, and a row per entry of ``kinds``.

    The panels of one level and image have the same scale. ``caption`` gets the values of a panel and those of the first
    kind of the same image; colours follow the value to the power ``gamma``.
    """
    if max_images < 1:
        raise ValueError(f"max_images: expected a number >= 1, got {max_images}")
    rows = [(i, kind) for i in range(min(len(images), max_images)) for kind in kinds]
    height, width = images.shape[2:]
    figure = new_figure((PANEL * (len(titles) + 1) + 0.8, (PANEL * height / width + 0.12) * len(rows) + 0.3))
    heat, norm = _heat(), _power_norm(gamma)
    axes = figure.subplots(len(rows), len(titles) + 1, squeeze=False)
    for axis, title in zip(axes[0], ("image", *titles), strict=True):
        axis.set_title(title, fontsize=9)
    for (i, kind), row in zip(rows, axes, strict=True):
        pixels = _pixels(images[i])
        grey = 0.7 * pixels.mean(2, keepdim=True).expand(-1, -1, 3)  # so that colour and brightness show the weight
        row[0].set_ylabel(kind, fontsize=9)
        for k, axis in enumerate(row):
            axis.set(xticks=[], yticks=[])
            axis.imshow((grey if k else pixels).numpy())
        for k, axis in enumerate(row[1:]):
            stack = {name: levels[k][i].detach().float().cpu() for name, levels in kinds.items()}
            highest = torch.stack([_finite(x, 0).max() for x in stack.values()]).max()
            relative = stack[kind] / highest.clamp_min(torch.finfo(torch.float32).tiny)
            axis.imshow(
                _finite(relative, math.nan).numpy(),
                cmap=heat,
                norm=norm,
                alpha=_finite(opacity * relative.sqrt(), 1).numpy(),
                extent=(-0.5, width - 0.5, height - 0.5, -0.5),
                interpolation="nearest",
            )
            first = next(iter(kinds))
            axis.set_xlabel(caption(stack[kind], None if kind == first else stack[first]), fontsize=7, labelpad=2)
    bar = figure.colorbar(axes[0][1].images[1], ax=axes, fraction=0.025, pad=0.015)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return figure


def _heat() -> Colormap:
    from matplotlib import colormaps

    return colormaps[HEAT].with_extremes(bad=NOT_FINITE)


def _finite(values: Tensor, other: float) -> Tensor:
    """Return ``values`` with ``other`` in place of values that are infinite or not a number."""
    return values.where(values.isfinite(), other)


def _power_norm(gamma: float) -> PowerNorm:
    from matplotlib.colors import PowerNorm

    return PowerNorm(gamma, vmin=0, vmax=1)


def _ratio(a: Tensor, b: Tensor) -> float:
    return float(a / b) if b else 0.0


def _outlined() -> list[Any]:
    """Return path effects that keep a dark line visible on dark colours."""
    from matplotlib.patheffects import Normal, Stroke

    return [Stroke(linewidth=3, foreground="white"), Normal()]


def _check_overlay(images: Tensor, titles: Sequence[str], **named: Sequence[Tensor]) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or not len(images):
        raise ValueError(f"images: expected (N, 3, H, W) with N > 0, got {tuple(images.shape)}")
    for name, maps in named.items():
        if not maps or len(maps) != len(titles):
            raise ValueError(
                f"titles: expected one per map and at least one map, got {len(titles)} for {len(maps)} {name}"
            )
        for i, level in enumerate(maps):
            if level.ndim != 3 or len(level) != len(images) or not level.numel():
                shape = tuple(level.shape)
                raise ValueError(
                    f"{name}[{i}]: expected shape ({len(images)}, h, w), one row per image, not empty, got {shape}"
                )


def _pixels(image: Tensor) -> Tensor:
    """Return a (3, H, W) image as (H, W, 3) float32 in [0, 1]."""
    scale = 255 if image.dtype == torch.uint8 else 1
    return (image.detach().float().cpu() / scale).clamp(0, 1).permute(1, 2, 0)
