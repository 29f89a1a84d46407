"""The detectors are the published networks, and expose the levels that are distilled."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastkd.yolov3 import YOLOv3, YOLOv3Tiny

Model = YOLOv3 | YOLOv3Tiny
MODELS = [YOLOv3, YOLOv3Tiny]


def features(model: Model, names: tuple[str, ...], images: Tensor) -> list[Tensor]:
    caught: list[Tensor] = []
    hooks = [model.get_submodule(name).register_forward_hook(lambda m, i, o: caught.append(o)) for name in names]
    model(images)
    for hook in hooks:
        hook.remove()
    return sorted(caught, key=lambda f: -f.shape[-1])


@pytest.mark.parametrize(("build", "count"), [(YOLOv3, 61_949_149), (YOLOv3Tiny, 8_852_366)])
def test_parameter_counts_are_those_of_the_published_networks(build: Callable[[], Model], count: int) -> None:
    assert sum(p.numel() for p in build().parameters()) == count


@pytest.mark.parametrize(
    ("build", "backbone", "neck"),
    [(YOLOv3, [256, 512, 1024], [256, 512, 1024]), (YOLOv3Tiny, [128, 256, 512], [256, 512])],
)
def test_levels_have_the_documented_channels_and_strides(
    build: Callable[[], Model], backbone: list[int], neck: list[int]
) -> None:
    model, images = build().eval(), torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        shapes = [tuple(f.shape[1:]) for f in features(model, model.backbone_levels, images)]
        assert shapes == [(c, 64 // s, 96 // s) for c, s in zip(backbone, (8, 16, 32), strict=True)]
        shapes = [tuple(f.shape[1:]) for f in features(model, model.neck_levels, images)]
        assert shapes == [(c, 64 // s, 96 // s) for c, s in zip(neck, model.strides, strict=True)]


@pytest.mark.parametrize("build", MODELS)
def test_neck_levels_are_what_the_heads_last_convolutions_read(build: type[Model]) -> None:
    model = build(num_classes=3, width=0.125).eval()
    read: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            module.register_forward_pre_hook(lambda m, inputs: read.append(inputs[0]))
    necks = features(model, model.neck_levels, torch.rand(1, 3, 64, 64))
    read.sort(key=lambda f: -f.shape[-1])
    assert len(read) == len(necks) == len(model.strides)
    assert all(a is b for a, b in zip(read, necks, strict=True))


@pytest.mark.parametrize("build", MODELS)
def test_outputs_are_one_map_per_stride_ascending(build: type[Model]) -> None:
    model = build(num_classes=7, width=0.125)
    outputs = model(torch.rand(2, 3, 96, 64))
    assert [tuple(o.shape) for o in outputs] == [(2, 3 * 12, 96 // s, 64 // s) for s in model.strides]


@pytest.mark.parametrize("build", MODELS)
def test_width_scales_channels_to_multiples_of_8_and_leaves_the_heads(build: type[Model]) -> None:
    model = build(num_classes=4, width=0.3)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            assert module.out_channels % 8 == 0 or module.out_channels == 3 * 9
    assert model.get_submodule(model.neck_levels[-1])[0].out_channels in (round(c * 0.3 / 8) * 8 for c in (512, 1024))


@pytest.mark.parametrize("build", MODELS)
def test_every_parameter_gets_a_gradient(build: type[Model]) -> None:
    model = build(num_classes=2, width=0.125)
    sum(o.square().sum() for o in model(torch.rand(2, 3, 64, 64))).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("build", MODELS)
def test_an_untrained_model_expects_an_object_in_one_cell_of_a_hundred(build: type[Model]) -> None:
    torch.manual_seed(0)
    model = build(num_classes=10, width=0.25)
    for output in model(torch.rand(2, 3, 64, 64)):
        cells = output.detach().unflatten(1, (3, 15)).sigmoid()
        assert 0.003 < float(cells[:, :, 4].mean()) < 0.03
        assert 0.05 < float(cells[:, :, 5:].mean()) < 0.2


def test_tinys_stride_one_pooling_pads_right_and_below() -> None:
    model = YOLOv3Tiny(num_classes=1, width=0.125).eval()
    seen: dict[str, Tensor] = {}
    model.conv32.register_forward_hook(lambda m, i, o: seen.update(before=o))
    model.top32.register_forward_pre_hook(lambda m, i: seen.update(after=i[0]))
    model(torch.rand(1, 3, 96, 96) * 100)
    before, after = seen["before"], seen["after"]
    assert after.shape == before.shape
    assert torch.equal(after[..., 0, 0], before[..., :2, :2].amax((-1, -2)))
    assert torch.equal(after[..., -1, -1], before[..., -1, -1])


def test_anchors_can_be_given_flat_or_per_head_and_travel_in_the_state_dict() -> None:
    sizes = [[8, 8], [16, 12], [20, 30], [40, 44]]
    model = YOLOv3Tiny(3, 0.125, anchors=sizes)
    assert torch.equal(model.anchors, torch.tensor(sizes).float().view(2, 2, 2))
    assert torch.equal(YOLOv3Tiny(3, 0.125, anchors=model.anchors).anchors, model.anchors)
    assert model.eval()(torch.rand(1, 3, 32, 32))[0].shape[1] == 2 * 8
    other = YOLOv3Tiny(3, 0.125, anchors=torch.ones(2, 2, 2))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.anchors, model.anchors)


def test_published_tiny_weights_have_their_own_anchors() -> None:
    assert YOLOv3Tiny(1, 0.125, YOLOv3Tiny.published_anchors).anchors[:, :, 0].tolist() == [
        [23, 37, 81],
        [81, 135, 344],
    ]


def test_default_anchors_ascend_with_the_stride() -> None:
    for model in (YOLOv3(1, 0.125), YOLOv3Tiny(1, 0.125)):
        areas = model.anchors.prod(-1)
        assert bool((areas[:-1].amax(1) < areas[1:].amin(1)).all())


@pytest.mark.parametrize("build", MODELS)
def test_a_state_dict_round_trip_gives_the_same_outputs(build: type[Model], tmp_path: Path) -> None:
    model = build(2, 0.125)
    model(torch.rand(4, 3, 64, 64))  # changes the running statistics
    torch.save(model.state_dict(), tmp_path / "model.pt")
    copy = build(2, 0.125)
    copy.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    images = torch.rand(1, 3, 64, 64)
    for a, b in zip(model.eval()(images), copy.eval()(images), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(1, 3, 100, 96), (1, 1, 64, 64), (3, 64, 64)])
def test_images_of_a_wrong_shape_are_refused_with_the_shape_wanted(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"images: expected \(N, 3, H, W\).*multiples of 32.*got"):
        YOLOv3Tiny(1, 0.125)(torch.rand(shape))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "num_classes: expected at least 1, got 0"),
        ({"width": 0.0}, "width: expected a finite multiplier > 0"),
        ({"width": math.nan}, "width: expected a finite multiplier > 0"),
        ({"anchors": [[1, 2]] * 7}, r"anchors: expected sizes \(w, h\) for 3 heads.*\(7, 2\)"),
        ({"anchors": torch.ones(2, 3, 2)}, r"anchors: .*\(2, 3, 2\)"),
        ({"anchors": [[1, 0]] * 9}, "anchors: expected finite widths and heights > 0"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        YOLOv3(**{"num_classes": 1, "width": 0.125, **options})
