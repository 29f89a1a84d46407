"""``find_levels`` finds the levels that a person would choose, leaves no trace, and its errors name what to do."""

from __future__ import annotations

import copy
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from ultralytics_offline import environment, packages

import fastkd
from fastkd.yolov3.model import YOLOv3, YOLOv3Tiny

IMAGES = torch.rand(2, 3, 128, 160)


def conv(cin: int, cout: int, stride: int = 1, kernel: int = 3) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(cin, cout, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(cout), nn.ReLU(inplace=True)
    )


class Block(nn.Module):
    """A residual block with squeeze and excitation, whose sum is changed in place."""

    def __init__(self, cin: int, cout: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv(cin, cout, stride), nn.Conv2d(cout, cout, 3, padding=1)
        self.short = nn.Conv2d(cin, cout, 1, stride)
        self.gate = nn.Conv2d(cout, cout, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.conv1(x))
        y = y * self.gate(F.adaptive_avg_pool2d(y, 1)).sigmoid()
        y += self.short(x)
        return F.relu_(y)


class ResNet(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = conv(3, width, 2)
        self.layer1, self.layer2 = Block(width, width, 2), Block(width, 2 * width, 2)
        self.layer3 = nn.Sequential(Block(2 * width, 4 * width, 2), Block(4 * width, 4 * width))
        self.layer4 = Block(4 * width, 8 * width, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        c3 = self.layer2(self.layer1(self.stem(x)))
        c4 = self.layer3(c3)
        return {"c3": c3, "c4": c4, "c5": self.layer4(c4)}


class Tower(nn.Module):
    """RetinaNet's head, which serves all levels and has flattened outputs."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scores = nn.Sequential(conv(width, width), nn.Conv2d(width, 6, 3, padding=1))
        self.boxes = nn.Sequential(conv(width, width), nn.Conv2d(width, 8, 3, padding=1))

    def forward(self, maps: list[Tensor]) -> dict[str, Tensor]:
        both = {"scores": (self.scores, 6), "boxes": (self.boxes, 8)}
        return {
            name: torch.cat([f(x).permute(0, 2, 3, 1).reshape(len(x), -1, n) for x in maps], 1)
            for name, (f, n) in both.items()
        }


class RetinaNet(nn.Module):
    """ResNet, top-down sums in functional code, two further levels, one head for all."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.backbone = ResNet(width)
        self.inner = nn.ModuleList(nn.Conv2d(k * width, 16, 1) for k in (2, 4, 8))
        self.outer = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1) for _ in range(3))
        self.p6, self.p7 = nn.Conv2d(16, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, 2, 1)
        self.head = Tower(16)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        c3, c4, c5 = self.backbone(images).values()
        m5 = self.inner[2](c5)
        m4 = self.inner[1](c4) + F.interpolate(m5, scale_factor=2.0)
        m3 = self.inner[0](c3) + F.interpolate(m4, scale_factor=2.0)
        p3, p4, p5 = (f(x) for f, x in zip(self.outer, (m3, m4, m5), strict=True))
        p6 = self.p6(p5)
        return self.head([p3, p4, p5, p6, self.p7(F.relu(p6))])


class OfLists(RetinaNet):
    """A detector that takes images of several sizes, resizes them, and keeps boxes above a threshold, here none."""

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:  # type: ignore[override]
        batch = torch.cat([F.interpolate(x[None], (128, 128)) for x in images])
        out = super().forward(batch)
        scores = [x.sigmoid().amax(1) for x in out["scores"]]
        return [
            {"boxes": b[s > 2], "scores": s[s > 2], "masks": torch.zeros(0)}
            for b, s in zip(out["boxes"], scores, strict=True)
        ]


class Masks(RetinaNet):
    """A detector whose head also makes masks from the finest level, at twice its size."""

    def __init__(self) -> None:
        super().__init__()
        self.head = _WithMasks(16)


class _WithMasks(Tower):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.up, self.masks = nn.ConvTranspose2d(width, width, 2, 2), nn.Conv2d(width, 4, 1)

    def forward(self, maps: list[Tensor]) -> dict[str, Tensor]:
        return {**super().forward(maps), "masks": self.masks(self.up(maps[0]))}


class SSD(nn.Module):
    """A detector with VGG-like stages that feed heads directly."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Sequential(conv(3, 8), nn.MaxPool2d(2), conv(8, 8), nn.MaxPool2d(2), conv(8, 16))
        self.stages = nn.ModuleList([conv(16, 24), conv(24, 32), conv(32, 32), conv(32, 16, 2)])
        self.scores = nn.ModuleList(nn.Conv2d(c, 6, 3, padding=1) for c in (24, 32, 32, 16))
        self.boxes = nn.ModuleList(nn.Conv2d(c, 8, 3, padding=1) for c in (24, 32, 32, 16))

    def forward(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        x, maps = self.start(x), []
        for k, stage in enumerate(self.stages):
            x = stage(F.max_pool2d(x, 2) if k < 3 else x)
            maps.append(x)
        return [(s(x), b(x)) for x, s, b in zip(maps, self.scores, self.boxes, strict=True)]


class Sums(nn.Module):
    """A flat network whose levels are sums and activations that no module returns."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 8, 8), nn.Conv2d(8, 8, 3, padding=1)
        self.down, self.side = nn.Conv2d(8, 16, 3, 2, 1), nn.Conv2d(16, 8, 1)
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = x + self.b(x).relu()
        coarse = self.down(x).relu()
        out: Tensor = self.head(x + F.interpolate(self.side(coarse), scale_factor=2.0))
        return out


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.fc = ResNet(8), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.backbone(x)["c5"].mean((2, 3)))
        return out


class Apart(nn.Module):
    """A network with two branches of the same stride, with a head each."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 8, 16, 16), nn.Conv2d(3, 8, 16, 16)
        self.scores, self.boxes = nn.Conv2d(8, 2, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.scores(self.left(x)), self.boxes(self.right(x))


class FlatDarknet(nn.Module):
    """Darknet in one list: sums that no module returns, bottlenecks between them, first layers of a head as wide."""

    def __init__(self) -> None:
        super().__init__()
        widths = [(3, 8), (8, 16), (16, 8), (8, 16), (16, 32), (32, 16), (16, 32), (32, 16), (16, 32)]
        strides, kernels = (8, 2, 1, 1, 2, 1, 1, 1, 1), (9, 3, 1, 3, 3, 1, 3, 1, 3)
        parts = [conv(*w, s, k) for w, s, k in zip(widths, strides, kernels, strict=True)]
        self.layers = nn.ModuleList([*parts, conv(32, 16, 1, 1), conv(16, 32)])
        self.side, self.out = conv(32, 16, 1, 1), conv(32, 16)
        self.heads = nn.ModuleList([nn.Conv2d(32, 5, 1), nn.Conv2d(16, 5, 1)])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        kept: list[Tensor] = []
        for k, layer in enumerate(self.layers):
            x = layer(x) + kept[k - 2] if k in (3, 6, 8) else layer(x)
            kept.append(x)
        fine = torch.cat([kept[3], F.interpolate(self.side(x), scale_factor=2.0)], 1)
        return self.heads[0](x), self.heads[1](self.out(fine))


class PaddedStem(nn.Module):
    """A stem that pads and pools without a stride, as HGNet's."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 8, 2), conv(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        out: Tensor = self.b(torch.cat([x, F.max_pool2d(F.pad(x, [0, 1, 0, 1]), 2, 1)], 1))
        return out


class Tokens(nn.Module):
    """Patches, of which a transformer makes tokens; ``maps``: they become maps again, of three strides, with heads."""

    def __init__(self, *, maps: bool) -> None:
        super().__init__()
        self.patches, self.mix, self.maps = nn.Conv2d(3, 16, 16, 16), nn.Linear(16, 16), maps
        self.up, self.down = nn.ConvTranspose2d(16, 16, 2, 2), nn.MaxPool2d(2)
        self.heads = nn.ModuleList(nn.Conv2d(16, 5, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Any:
        x = self.patches(x)
        size = x.shape[2:]
        x = x + 0  # else a head's map would be that of the patches
        tokens = self.mix(x.flatten(2).transpose(1, 2))
        if not self.maps:
            return tokens
        x = tokens.transpose(1, 2).unflatten(2, size)
        return [f(y) for f, y in zip(self.heads, (self.up(x), x, self.down(x)), strict=True)]


class ChannelsLast(nn.Module):
    """Merges patches in NHWC, as Swin does, and permutes for its heads alone."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.merge = nn.Conv2d(3, 16, 8, 8), nn.Linear(64, 32)
        self.fine, self.coarse = nn.Conv2d(16, 5, 1), nn.Conv2d(32, 5, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.layer_norm(self.patches(x).permute(0, 2, 3, 1), (16,))
        parts = [x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]
        coarse = self.merge(torch.cat(parts, -1))
        return self.fine(x.permute(0, 3, 1, 2)), self.coarse(coarse.permute(0, 3, 1, 2))


RESNET = ["backbone.layer2", "backbone.layer3", "backbone.layer4"]


@pytest.mark.parametrize("kind", [YOLOv3, YOLOv3Tiny])
def test_levels_of_our_networks_are_those_that_a_person_chose(kind: Any) -> None:
    model = kind(3, 1 / 8)
    found = fastkd.find_levels(model, IMAGES)
    assert found.backbone == list(model.backbone_levels)
    assert found.neck == list(model.neck_levels)
    assert found.strides("neck") == list(model.strides)


@pytest.mark.parametrize("kind", [RetinaNet, Masks])
def test_levels_of_a_pyramid_with_a_shared_head_and_levels_of_its_own(kind: Any) -> None:
    found = fastkd.find_levels(kind(), IMAGES)
    assert found.backbone == RESNET
    assert found.neck == ["outer.0", "outer.1", "outer.2", "p6", "p7"]
    assert found.strides("neck")[:3] == [8, 16, 32]


def test_a_model_that_takes_a_list_of_images_and_finds_no_box() -> None:
    found = fastkd.find_levels(OfLists(), [torch.rand(3, 90, 70), torch.rand(3, 40, 80)])
    assert found.backbone == RESNET
    assert found.neck == ["outer.0", "outer.1", "outer.2", "p6", "p7"]
    assert found.strides("backbone") == [8, 16, 32]


def test_a_map_that_a_head_gets_is_of_the_neck_alone() -> None:
    found = fastkd.find_levels(SSD(), IMAGES)
    assert (found.backbone, found.neck) == ([], [f"stages.{k}" for k in range(4)])


def test_what_no_module_returns_is_the_input_of_one() -> None:
    found = fastkd.find_levels(Sums(), IMAGES)
    assert (found.backbone, found.neck) == (["input:down", "input:side"], ["input:head"])


def test_a_flat_backbone_ends_with_its_last_sum() -> None:
    found = fastkd.find_levels(FlatDarknet(), IMAGES)
    assert (found.backbone, found.neck) == (["input:layers.4", "input:layers.9"], ["out", "layers.10"])


def test_a_stem_that_pads_and_pools_does_not_end_the_backbone() -> None:
    model = RetinaNet()
    model.backbone.stem = PaddedStem()
    assert fastkd.find_levels(model, IMAGES).backbone == RESNET


def test_maps_that_come_from_tokens_or_channels_last_are_found_where_a_convolution_gets_them() -> None:
    assert fastkd.find_levels(ChannelsLast(), IMAGES).neck == ["input:fine", "input:coarse"]
    found = fastkd.find_levels(Tokens(maps=True), IMAGES)
    assert (found.backbone, found.neck) == ([], ["up", "input:up", "down"])  # patches alone are no level


def test_tokens_alone_are_refused_with_what_takes_them() -> None:
    with pytest.raises(ValueError, match=r"last convolution gets the images themselves.*tokens.*student_to_map="):
        fastkd.find_levels(Tokens(maps=False), IMAGES)


def test_the_output_of_a_backbone_alone_is_its_levels() -> None:
    found = fastkd.find_levels(ResNet(8), IMAGES)
    assert (found.backbone, found.neck) == (["layer2", "layer3", "layer4"], [])
    distiller = fastkd.Distiller(ResNet(4), ResNet(8), images=IMAGES)
    assert distiller.levels == [(name, name) for name in found.backbone]


def test_inference_mode_hides_nothing() -> None:
    model = RetinaNet()
    with torch.inference_mode():
        inside = fastkd.find_levels(model, IMAGES)
    assert inside == fastkd.find_levels(model, IMAGES)


def test_the_table_says_of_each_map_what_it_is() -> None:
    found = fastkd.find_levels(RetinaNet(), IMAGES)
    rows = str(found).splitlines()
    assert rows[0].split() == ["module", "stride", "channels", "last", "of", "its", "stride", "feeds", "a", "head"]
    (layer3,) = [x for x in found.candidates if x.name == "backbone.layer3"]
    assert (layer3.stride, layer3.channels, layer3.is_last, layer3.feeds_head) == (16, 32, True, False)
    assert any(row.split()[:3] == ["backbone.layer3", "16", "32"] for row in rows)
    assert {x.name for x in found.candidates if x.feeds_head} == set(found.neck)


def test_names_are_the_same_through_wrappers() -> None:
    model = RetinaNet()
    plain = fastkd.find_levels(model, IMAGES)
    assert fastkd.find_levels(torch.compile(model), IMAGES) == plain
    assert fastkd.find_levels(nn.DataParallel(model), IMAGES) == plain
    assert fastkd.find_levels(copy.deepcopy(model).to(memory_format=torch.channels_last), IMAGES) == plain


def test_nothing_of_the_model_or_the_random_state_changes() -> None:
    model = nn.Sequential(RetinaNet())
    model[0].backbone.layer2.eval()
    model[0].head.register_forward_hook(lambda *_: torch.rand(1))
    modes = [x.training for x in model.modules()]
    hooks = [(dict(x._forward_hooks), dict(x._forward_pre_hooks)) for x in model.modules()]
    state, seed = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    fastkd.find_levels(model, IMAGES)
    with pytest.raises(RuntimeError):
        fastkd.find_levels(model, torch.zeros(1, 4, 64, 64))
    assert [x.training for x in model.modules()] == modes
    assert [(dict(x._forward_hooks), dict(x._forward_pre_hooks)) for x in model.modules()] == hooks
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), seed)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_model_without_heads_is_refused_with_the_names_to_pass() -> None:
    with pytest.raises(ValueError, match=r"(?s)no head was found.*neck=\(\[student.*backbone.layer4 +32 +64") as error:
        fastkd.find_levels(Classifier(), IMAGES)
    assert f"backbone={RESNET}" in str(error.value)


def test_two_maps_of_one_stride_that_heads_get_are_no_guess() -> None:
    with pytest.raises(ValueError, match=r"(?s)heads of stride 16 .*share no map.*left +16 +8.*right +16 +8"):
        fastkd.find_levels(Apart(), IMAGES)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (None, TypeError, r"images: expected a batch .*got None"),
        ("a.jpg", TypeError, r"images: expected a batch .*got a str"),
        (torch.utils.data.DataLoader([IMAGES[0]]), TypeError, r"images: .*next\(iter\(loader\)\)"),
        (IMAGES[0], ValueError, r"images: .*\(3, 128, 160\); .*images\[None\]"),
        (IMAGES[:0], ValueError, r"images: .*got no image"),
        ([], ValueError, r"images: .*got no image"),
    ],
)
def test_images_of_another_kind_are_refused(images: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fastkd.find_levels(SSD(), images)
    if images is not None:
        with pytest.raises(error, match=message):
            fastkd.Distiller(SSD(), RetinaNet(), images=images)


def test_a_model_of_another_kind_is_refused() -> None:
    with pytest.raises(TypeError, match="model: expected a module, got a str"):
        fastkd.find_levels("yolov3", IMAGES)  # type: ignore[arg-type]


# ---- Distiller(images=)


def test_a_distiller_finds_its_levels_prints_them_and_is_ready(capsys: pytest.CaptureFixture[str]) -> None:
    student, teacher = YOLOv3Tiny(3, 1 / 8), YOLOv3(3, 1 / 8)
    distiller = fastkd.Distiller(student, teacher, images=IMAGES, info_map="uniform")
    pairs = [
        ("conv8", "backbone.stage8"),
        ("conv16", "backbone.stage16"),
        ("conv32", "backbone.stage32"),
        ("neck16", "neck16"),
        ("neck32", "neck32"),
    ]
    assert distiller.levels == pairs
    printed = capsys.readouterr().out
    assert printed.startswith("fastkd: levels found: backbone ")
    assert all(f"{s} <- {t}" in printed for s, t in pairs)
    distiller.add_to(torch.optim.SGD(student.parameters(), 0.1))
    student.train()(IMAGES)
    distiller.loss(IMAGES).backward()
    (check,) = [x for x in distiller.check(IMAGES).checks if x.name == "levels"]
    assert check.ok
    assert all(f"{s} <- {t}" in check.message for s, t in pairs)


def test_what_one_model_lacks_is_left_out() -> None:
    distiller = fastkd.Distiller(SSD(), RetinaNet(), images=IMAGES)
    assert distiller.levels == [(f"stages.{k}", name) for k, name in enumerate(("outer.0", "outer.1", "outer.2", "p6"))]


def test_the_teacher_is_looked_at_with_its_own_images() -> None:
    distiller = fastkd.Distiller(SSD(), OfLists(), images=IMAGES[:, :, :, :128], preprocess=list)
    assert distiller.levels is not None
    assert distiller.levels[0] == ("stages.0", "outer.0")


def test_with_levels_images_only_prepare() -> None:
    distiller = fastkd.Distiller(SSD(), RetinaNet(), images=IMAGES, neck=(["stages.1"], ["outer.0", "outer.1"]))
    assert distiller.levels == [("stages.1", "outer.1")]
    assert all(x.name != "levels" for x in distiller.check(IMAGES).checks)


def test_without_levels_and_images_the_error_says_what_finds_them() -> None:
    with pytest.raises(ValueError, match=r"at least one level.*images=images"):
        fastkd.Distiller(SSD(), RetinaNet())


def test_the_error_says_which_model_has_no_levels_and_leaves_no_hook() -> None:
    student = SSD()
    with pytest.raises(ValueError, match="teacher: find_levels: no head was found"):
        fastkd.Distiller(student, Classifier(), images=IMAGES)
    with pytest.raises(ValueError, match=r"(?s)levels of equal stride.*stages +32.*input:head"):
        fastkd.Distiller(_Coarse(), Sums(), images=IMAGES)
    with pytest.raises(ValueError, match="criterion: expected 4 levels"):
        fastkd.Distiller(student, RetinaNet(), images=IMAGES, criterion=fastkd.DistillLoss(levels=2))
    assert not any(x._forward_hooks or x._forward_pre_hooks for x in student.modules())


class _Coarse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stages, self.head = nn.Sequential(nn.Conv2d(3, 8, 32, 32)), nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.stages(x))
        return out


# ---- Ultralytics and torchvision, in a process of their own

ULTRALYTICS = """
import ultralytics_offline, torch, fastkd, ultralytics
from pathlib import Path
from ultralytics.nn.tasks import DetectionModel
for name, backbone, neck in {models}:
    file = Path(ultralytics.__file__).parent / "cfg" / "models" / f"{{name}}.yaml"
    found = fastkd.find_levels(DetectionModel(str(file), verbose=False), torch.rand(1, 3, 256, 256))
    assert (found.backbone, found.neck) == tuple([f"model.{{i}}" for i in x] for x in (backbone, neck)), (name, found)

from torchvision.models.detection import retinanet_resnet50_fpn
model = retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=3, min_size=128, max_size=128)
found = fastkd.find_levels(model, [torch.rand(3, 128, 128)])
assert found.backbone == [f"backbone.body.layer{{i}}" for i in (2, 3, 4)], found
blocks = ["layer_blocks.0", "layer_blocks.1", "layer_blocks.2", "extra_blocks.p6", "extra_blocks.p7"]
assert found.neck == [f"backbone.fpn.{{name}}" for name in blocks], found
"""


@pytest.mark.skipif(packages() is None, reason="without Ultralytics: pip install it as `make setup` does")
def test_levels_of_networks_of_ultralytics_and_torchvision(tmp_path: Path) -> None:
    models = [
        ("v3/yolov3-tiny", [6, 8, 10], [19, 15]),
        ("26/yolo26n", [4, 6, 10], [16, 19, 22]),
        ("v8/yolov8n", [4, 6, 9], [15, 18, 21]),
        ("v8/yolov8n-p2", [2, 4, 6, 9], [18, 21, 24, 27]),
        ("11/yolo11n", [4, 6, 10], [16, 19, 22]),
    ]
    code = textwrap.dedent(ULTRALYTICS).format(models=models)
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment(tmp_path)
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
