"""Plots have the right values in the right places, no global state, and clear errors."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from fastkd import viz

pytest.importorskip("matplotlib")


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 3, 32, 48, generator=torch.Generator().manual_seed(0))


def test_overlay_has_a_row_an_image_and_a_column_a_level(images: Tensor) -> None:
    maps = [torch.rand(3, 4, 6), torch.rand(3, 2, 3)]
    figure = viz.overlay_maps(images, maps, ["backbone, stride 8", "neck, stride 16"], max_images=2)
    panels = figure.axes[:-1]  # the last is the colour bar
    assert len(panels) == 2 * 3
    assert [x.get_title() for x in panels[:3]] == ["image", "backbone, stride 8", "neck, stride 16"]
    assert all(len(x.images) == 1 for x in panels[::3])


def test_overlay_is_relative_to_the_highest_cell_and_lies_over_the_whole_image(images: Tensor) -> None:
    level = torch.ones(3, 2, 3)
    level[0, 1, 2] = 4
    figure = viz.overlay_maps(images, [level], ["level"])
    heat = figure.axes[1].images[1]
    torch.testing.assert_close(torch.as_tensor(heat.get_array().data), level[0] / 4)
    assert heat.get_extent() == [-0.5, 47.5, 31.5, -0.5]
    assert "2.7 × mean" in figure.axes[1].get_xlabel()


def test_overlay_draws_an_all_zero_map(images: Tensor) -> None:
    figure = viz.overlay_maps((images * 255).to(torch.uint8), [torch.zeros(3, 2, 2)], ["nothing"])
    assert float(figure.axes[1].images[1].get_array().max()) == 0


@pytest.mark.parametrize(
    ("shape", "maps", "titles", "message"),
    [
        ((3, 32, 32), [(3, 2, 2)], ["a"], r"images: expected \(N, 3, H, W\)"),
        ((3, 3, 32, 32), [(3, 2, 2)], ["a", "b"], "titles: expected one per map"),
        ((3, 3, 32, 32), [], [], "at least one map"),
        ((3, 3, 32, 32), [(3, 2, 2), (2, 2, 2)], ["a", "b"], r"maps\[1\]: expected shape \(3, h, w\).*got \(2, 2, 2\)"),
    ],
)
def test_overlay_names_what_does_not_fit(
    shape: tuple[int, ...], maps: list[tuple[int, ...]], titles: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        viz.overlay_maps(torch.zeros(shape), [torch.zeros(x) for x in maps], titles)


def test_differences_before_and_now_share_one_scale_per_image_and_level(images: Tensor) -> None:
    before, now = torch.full((3, 2, 3), 4.0), torch.ones(3, 2, 3)
    now[1] = 8
    figure = viz.overlay_differences(images, [now], ["level"], before=[before], names=("untrained", "trained"))
    panels = figure.axes[:-1]
    assert [x.get_ylabel() for x in panels[::2]] == ["untrained", "trained"] * 3
    heat = [float(x.images[1].get_array().max()) for x in panels[1::2]]
    assert heat[:4] == [1, 0.25, 0.5, 1]
    assert [x.get_xlabel() for x in panels[1:8:2]] == ["mean 4", "mean 1, -75%", "mean 4", "mean 8, +100%"]


def test_differences_alone_are_relative_to_their_highest_cell(images: Tensor) -> None:
    level = torch.ones(3, 2, 3)
    level[0, 1, 2] = 4
    figure = viz.overlay_differences(images, [level], ["level"], max_images=1)
    assert len(figure.axes) == 3
    torch.testing.assert_close(torch.as_tensor(figure.axes[1].images[1].get_array().data), level[0] / 4)
    assert figure.axes[1].get_xlabel() == "mean 1.5"


def test_cells_that_are_not_finite_have_their_own_colour(images: Tensor, tmp_path) -> None:
    level = torch.tensor([[[1.0, 4.0], [float("nan"), float("inf")]]]).expand(3, -1, -1)
    figure = viz.overlay_differences(images, [level], ["level"], before=[torch.full_like(level, float("nan"))])
    figure.savefig(tmp_path / "differences.png")
    now = figure.axes[3].images[1]
    assert now.get_array().mask.tolist() == [[False, False], [True, True]]
    assert now.get_array().compressed().tolist() == [0.25, 1]
    assert now.get_alpha()[1].tolist() == [1, 1]
    red, green, blue, _ = now.cmap.get_bad()
    assert (red, green, blue) == (0, 1, 1)
    assert figure.axes[3].get_xlabel().startswith("mean nan")


def test_differences_of_another_shape_are_refused_by_name(images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"before\[0\]: expected shape \(3, h, w\).*got \(2, 2, 2\)"):
        viz.overlay_differences(images, [torch.ones(3, 2, 2)], ["a"], before=[torch.ones(2, 2, 2)])
    with pytest.raises(ValueError, match="got 1 for 0 differences"):
        viz.overlay_differences(images, [], ["a"])


def test_level_losses_are_drawn_with_their_shares() -> None:
    figure = viz.plot_level_losses({"stride 8": [3.0, 3.0], "stride 16": [1.0, 1.0]}, steps=[10, 20], smooth=0.5)
    left, right = figure.axes
    assert left.get_yscale() == "log"
    assert left.lines[1].get_xydata().tolist() == [[10, 3], [20, 3]]
    figure.canvas.draw()
    assert {"1", "2"} <= {x.get_text() for x in left.get_yticklabels()}
    assert not any(x.get_text() for x in left.get_yticklabels(minor=True))
    first = right.collections[0].get_paths()[0].vertices
    assert first[:, 1].max() == pytest.approx(0.75)
    assert [x.get_text() for x in figure.legends[0].get_texts()] == ["stride 8", "stride 16"]
    assert [x.get_text() for x in right.texts] == ["75%", "25%"]


def test_the_share_of_the_total_loss_is_drawn_over_the_shares() -> None:
    figure = viz.plot_level_losses({"a": [3.0, 1.0]}, smooth=0, share_of_total=[0.5, 0.25])
    assert figure.axes[1].lines[0].get_ydata().tolist() == [0.5, 0.25]
    assert "of the total loss" in figure.legends[0].get_texts()[1].get_text()
    with pytest.raises(ValueError, match="share_of_total: expected 2 values, one per step, got 1"):
        viz.plot_level_losses({"a": [3.0, 1.0]}, share_of_total=[0.5])


def test_level_losses_survive_zeros_and_nan(tmp_path) -> None:
    figure = viz.plot_level_losses({"a": [0.0, 0.0, float("nan")], "b": [0.0, 0.0, 1.0]})
    figure.savefig(tmp_path / "losses.png")


def test_level_losses_of_unequal_length_are_refused() -> None:
    with pytest.raises(ValueError, match=r"history\['b'\]: expected 2 values, one per step, got 1"):
        viz.plot_level_losses({"a": [1.0, 2.0], "b": [1.0]})
    with pytest.raises(ValueError, match="at least one level"):
        viz.plot_level_losses({})


def test_curves_of_several_seeds_are_their_mean_and_band() -> None:
    figure = viz.plot_curves(
        {"plain": ([0, 1], [1.0, 2.0]), "distilled": ([0, 1], [[1.0, 3.0], [3.0, 5.0]])}, references={"teacher": 9.0}
    )
    axis = figure.axes[0]
    assert axis.lines[1].get_ydata().tolist() == [2.0, 4.0]
    assert axis.collections[0].get_paths()[0].vertices[:, 1].max() == 5.0
    assert axis.lines[2].get_ydata()[0] == 9.0
    assert axis.texts[0].get_text() == "teacher"


def test_curves_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"curves\['a'\]: expected as many y as x, 2, got 3"):
        viz.plot_curves({"a": ([0, 1], [1.0, 2.0, 3.0])})
    with pytest.raises(ValueError, match="curves: expected at least one"):
        viz.plot_curves({})


def test_pyplot_is_left_alone(images: Tensor) -> None:
    plt = pytest.importorskip("matplotlib.pyplot")
    before = plt.get_fignums()
    viz.plot_curves({"a": ([0], [1.0])})
    assert plt.get_fignums() == before


def test_a_missing_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'fastkd\[train\]'"):
        viz.plot_curves({"a": ([0], [1.0])})
