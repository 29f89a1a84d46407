"""Images of what distillation looks at and how it goes; needs matplotlib (``pip install 'fastkd[train]'``).

Each function returns a ``matplotlib.figure.Figure`` of its own, outside pyplot's global state: save it with
``figure.savefig(path)``, show it as the last line of a notebook's cell, or hand it to TensorBoard's ``add_figure``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, PowerNorm
    from matplotlib.figure import Figure

Numbers: TypeAlias = Sequence[float]

# Okabe and Ito (2008): told apart with any kind of colour vision; line styles repeat the difference in grey
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":")
HEAT = "inferno"
NOT_FINITE = "#00FFFF"  # cells that are infinite or not a number: a colour that HEAT lacks
PANEL = 2.2  # inches


def overlay_maps(
    images: Tensor, maps: Sequence[Tensor], titles: Sequence[str], *, max_images: int = 4, opacity: float = 0.75
) -> Figure:
    """Information maps as heat over the images: one row an image, one column a level, the plain image first.

    Each map is shown relative to its own highest cell (in that image), so that levels of any scale can be compared
    in shape; the number below a panel is how many times the mean its highest cell weighs. Cells have sharp edges:
    one square is one cell of the level. What is not finite is cyan.

    Args:
        images: (N, 3, H, W), float in [0, 1] or uint8.
        maps: per level (N, h, w), not negative, as of ``fastkd.info_map``.
        titles: one name a level, ``"backbone, stride 8"`` say.
        max_images: rows at most.
        opacity: of the heat where the map is highest, in [0, 1]; the lowest cells show the image.

    Raises:
        ImportError: no matplotlib.
        ValueError: no image; lengths or shapes that do not fit.
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
    """How far the student is from the teacher in each cell, as heat over the images, as ``overlay_maps``.

    With ``before``, each image has two rows, and what stands one above the other has one scale: what turned dark, the
    student has learnt. Colours go by the square root, as a few cells outweigh all others; the number below a panel is
    the mean over its cells.

    Args:
        images: (N, 3, H, W), float in [0, 1] or uint8.
        differences: per level (N, h, w), not negative, as ``DistillMaps.differences``.
        titles: one name a level.
        before: the same of an earlier student.
        names: of the two rows.
        max_images, opacity: as for ``overlay_maps``.

    Raises:
        ImportError: no matplotlib.
        ValueError: no image; lengths or shapes that do not fit.
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
    """Distillation loss of each level over training, on a logarithmic scale; and each level's share of their sum.

    Args:
        history: level name to its loss at every logged step, all of one length (``criterion.level_losses`` collected).
        steps: training step of each entry; by default 0, 1, 2, ...
        smooth: share that the running mean keeps of itself per entry, in [0, 1); the raw values stay faintly visible.
        share_of_total: also draw what the whole distillation loss, weighted, is of the total loss, in [0, 1].

    Raises:
        ImportError: no matplotlib.
        ValueError: no level, unequal lengths, ``smooth`` outside [0, 1).
    """
    if not history or not 0 <= smooth < 1:
        raise ValueError(f"history, smooth: expected a level or more and 0 <= smooth < 1, got {len(history)}, {smooth}")
    count = len(next(iter(history.values())))
    x = list(range(count)) if steps is None else list(steps)
    series = {f"history[{name!r}]": values for name, values in history.items()}
    for name, values in (series | ({} if share_of_total is None else {"share_of_total": share_of_total})).items():
        if len(values) != len(x):
            raise ValueError(f"{name}: expected {len(x)} values, one per step, got {len(values)}")
    figure = _figure((9, 3.6))
    left, right = figure.subplots(1, 2)
    means = [_running_mean(values, smooth) for values in history.values()]
    for i, (name, values) in enumerate(history.items()):
        left.plot(x, values, color=_look(i)["color"], linewidth=0.8, alpha=0.25)
        left.plot(x, means[i], label=name, marker="o" if len(x) == 1 else "", **_look(i))
    if any(value > 0 for values in history.values() for value in values):
        _log_scale(left)
    _label(left, "step", "loss of the level")
    _stack_shares(right, x, means)
    if share_of_total is not None:
        line = {"color": "black", "linestyle": (0, (4, 2)), "linewidth": 1.6}
        line["path_effects"] = _outlined()
        right.plot(x, _running_mean(share_of_total, smooth), **line)
        left.plot([], [], label="distillation, of the total loss (right)", **line)
    _legend(figure, left)
    return figure


def _stack_shares(axis: Axes, x: Sequence[float], means: Sequence[Numbers]) -> None:
    """Each level's share of the sum as a band, with its last value at the right edge."""
    totals = [sum(m[k] for m in means) or 1.0 for k in range(len(x))]
    shares = [[value / total for value, total in zip(mean, totals, strict=True)] for mean in means]
    axis.stackplot(x, shares, colors=[_look(i)["color"] for i in range(len(shares))], edgecolor="white", linewidth=0.6)
    _label(axis, "step", "share of the sum")
    axis.set(ylim=(0, 1), xlim=(x[0], x[-1]) if len(x) > 1 else None)
    axis.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axis.grid(visible=False)
    below = 0.0
    for i, share in enumerate(s[-1] for s in shares if len(x)):
        if share >= 0.03:  # a thinner band has no room for it
            axis.annotate(
                f"{share:.0%}",
                (1, below + share / 2),
                xycoords=("axes fraction", "data"),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color=_look(i)["color"],
            )
        below += share if math.isfinite(share) else 0.0


def plot_curves(
    curves: Mapping[str, tuple[Numbers, Numbers | Sequence[Numbers]]],
    *,
    references: Mapping[str, float] | None = None,
    x_label: str = "step",
    y_label: str = "mAP",
) -> Figure:
    """One line a model: students with and without distillation, say.

    Args:
        curves: name to (x, y); y is one series, or several (one per seed), drawn as their mean in a band from the
            lowest to the highest.
        references: name to a value drawn as a thin horizontal line, the teacher's for one.
        x_label, y_label: of the axes, with units.

    Raises:
        ImportError: no matplotlib.
        ValueError: no curve, or an x and a y of different lengths.
    """
    if not curves:
        raise ValueError("curves: expected at least one, got none")
    figure = _figure((6, 3.8))
    axis = figure.subplots()
    for i, (name, (x, y)) in enumerate(curves.items()):
        series = [list(s) for s in y] if y and isinstance(y[0], Sequence) else [list(y)]  # type: ignore[arg-type]
        for s in series:
            if len(s) != len(x):
                raise ValueError(f"curves[{name!r}]: expected as many y as x, {len(x)}, got {len(s)}")
        columns = list(zip(*series, strict=True))
        axis.plot(x, [sum(c) / len(c) for c in columns], label=name, marker="o", markersize=3.5, **_look(i))
        if len(series) > 1:
            low, high = [min(c) for c in columns], [max(c) for c in columns]
            axis.fill_between(x, low, high, color=_look(i)["color"], alpha=0.18, linewidth=0)
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
    _label(axis, x_label, y_label)
    _legend(figure, axis)
    return figure


def _figure(size: tuple[float, float]) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("fastkd.viz needs matplotlib: pip install 'fastkd[train]'") from error
    return Figure(figsize=size, dpi=150, layout="constrained")


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
    """The image and its levels in a row; a row for each of ``kinds``, in one scale for an image's level.

    ``caption`` gets a panel's values and those above it of the same image; colours go by the value's power ``gamma``.
    """
    if max_images < 1:
        raise ValueError(f"max_images: expected a number >= 1, got {max_images}")
    rows = [(i, kind) for i in range(min(len(images), max_images)) for kind in kinds]
    height, width = images.shape[2:]
    figure = _figure((PANEL * (len(titles) + 1) + 0.8, (PANEL * height / width + 0.12) * len(rows) + 0.3))
    heat, norm = _heat(), _power_norm(gamma)
    axes = figure.subplots(len(rows), len(titles) + 1, squeeze=False)
    for axis, title in zip(axes[0], ("image", *titles), strict=True):
        axis.set_title(title, fontsize=9)
    for (i, kind), row in zip(rows, axes, strict=True):
        pixels = _pixels(images[i])
        grey = 0.7 * pixels.mean(2, keepdim=True).expand(-1, -1, 3)  # so that colour and light mean weight
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
    """``values`` with ``other`` in place of what is infinite or not a number."""
    return values.where(values.isfinite(), other)


def _power_norm(gamma: float) -> PowerNorm:
    from matplotlib.colors import PowerNorm

    return PowerNorm(gamma, vmin=0, vmax=1)


def _ratio(a: Tensor, b: Tensor) -> float:
    return float(a / b) if b else 0.0


def _outlined() -> list[Any]:
    """Path effects that keep a dark line visible on dark colours."""
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
                    f"{name}[{i}]: expected shape ({len(images)}, h, w), as images, not empty, got {shape}"
                )


def _pixels(image: Tensor) -> Tensor:
    """(H, W, 3) float in [0, 1] of a (3, H, W) image."""
    scale = 255 if image.dtype == torch.uint8 else 1
    return (image.detach().float().cpu() / scale).clamp(0, 1).permute(1, 2, 0)


def _running_mean(values: Numbers, keep: float) -> list[float]:
    """Exponential mean that starts unbiased; what is not finite stays as it is and is left out of it."""
    out, total, weight = [], 0.0, 0.0
    for value in values:
        if math.isfinite(value):
            total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(total / weight if weight and math.isfinite(value) else math.nan)
    return out


def _look(i: int) -> dict[str, Any]:
    return {"color": COLORS[i % len(COLORS)], "linestyle": STYLES[i % len(STYLES)]}


def _label(axis: Axes, x: str, y: str) -> None:
    axis.set_xlabel(x, fontsize=9)
    axis.set_ylabel(y, fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(visible=True, color="0.9", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _log_scale(axis: Axes) -> None:
    """With plain numbers at 1, 2 and 5 of each decade, of which a loss seldom falls through more than two."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())


def _legend(figure: Figure, axis: Axes) -> None:
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
