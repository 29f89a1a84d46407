"""Darknet .weights files: the layout, exact round trips, and errors that give the difference in size."""

from __future__ import annotations

import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fastkd.yolov3 import YOLOv3, YOLOv3Tiny, load_weights, save_weights
from fastkd.yolov3.checkpoint import load_detector, save_detector
from fastkd.yolov3.class_names import read_names
from fastkd.yolov3.darknet import weights_size
from fastkd.yolov3.darknet_cfg import read_cfg, write_cfg
from fastkd.yolov3.model import Detector, name_of


def scrambled(model: nn.Module, seed: int = 0) -> nn.Module:
    """Return a model whose weights and statistics are all random, so that no two tensors can be confused."""
    torch.manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and name != "anchors":
            tensor.copy_(torch.rand_like(tensor) + 0.1)
    return model


def tiny(seed: int = 0) -> YOLOv3Tiny:
    model = scrambled(YOLOv3Tiny(num_classes=3, width=0.125), seed)
    assert isinstance(model, YOLOv3Tiny)
    return model


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().items(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for (name, x), y in pairs if not name.endswith("num_batches_tracked"))


@pytest.mark.parametrize(("build", "size"), [(YOLOv3, 248_007_048), (YOLOv3Tiny, 35_434_956)])
def test_sizes_are_those_of_the_official_files(build: type[YOLOv3] | type[YOLOv3Tiny], size: int) -> None:
    assert weights_size(build()) == size


def test_the_backbone_alone_has_the_size_of_darknet53_conv_74() -> None:
    assert weights_size(YOLOv3().backbone) == 162_482_580


def test_a_full_size_file_has_the_size_it_should(tmp_path: Path) -> None:
    save_weights(YOLOv3Tiny(), tmp_path / "tiny.weights")
    assert (tmp_path / "tiny.weights").stat().st_size == 35_434_956


@pytest.mark.parametrize("build", [YOLOv3, YOLOv3Tiny])
def test_a_round_trip_is_exact(build: type[YOLOv3] | type[YOLOv3Tiny], tmp_path: Path) -> None:
    model, other = scrambled(build(3, 0.125), 0), scrambled(build(3, 0.125), 1)
    assert not same_weights(model, other)
    save_weights(model, tmp_path / "a.weights", seen=32_013_312)
    assert load_weights(other, tmp_path / "a.weights") == 32_013_312
    assert same_weights(model, other)
    save_weights(other, tmp_path / "b.weights", seen=32_013_312)
    assert (tmp_path / "a.weights").read_bytes() == (tmp_path / "b.weights").read_bytes()


def test_the_layout_is_darknets(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 1, 1))
    values = np.arange(1, 14, dtype="<f4")
    (tmp_path / "x.weights").write_bytes(struct.pack("<iiiq", 0, 2, 5, 77) + values.tobytes())
    assert load_weights(model, tmp_path / "x.weights") == 77
    conv, norm, _, head = model
    assert norm.bias.tolist() == [1, 2]
    assert norm.weight.tolist() == [3, 4]
    assert norm.running_mean.tolist() == [5, 6]
    assert norm.running_var.tolist() == [7, 8]
    assert conv.weight.flatten().tolist() == [9, 10]
    assert head.bias.tolist() == [11]
    assert head.weight.flatten().tolist() == [12, 13]


@pytest.mark.parametrize(
    ("build", "widths"),
    [
        (YOLOv3Tiny, [16, 32, 64, 128, 256, 512, 1024, 256, 512, 255, 128, 256, 255]),
        (
            YOLOv3,
            [
                *(32, 64, 32, 64, 128, *[64, 128] * 2, 256, *[128, 256] * 8, 512, *[256, 512] * 8),
                *(1024, *[512, 1024] * 4, 512, 1024, 512, 1024, 512, 1024, 255),
                *(256, 256, 512, 256, 512, 256, 512, 255),
                *(128, 128, 256, 128, 256, 128, 256, 255),
            ],
        ),
    ],
)
def test_layers_come_in_the_order_of_the_cfg_file(build: type[YOLOv3] | type[YOLOv3Tiny], widths: list[int]) -> None:
    assert [m.out_channels for m in build().modules() if isinstance(m, nn.Conv2d)] == widths


def test_files_from_before_version_0_2_have_a_short_header(tmp_path: Path) -> None:
    save_weights(tiny(), tmp_path / "new.weights")
    body = (tmp_path / "new.weights").read_bytes()[20:]
    (tmp_path / "old.weights").write_bytes(struct.pack("<iiii", 0, 1, 0, 640) + body)
    model = tiny(1)
    assert load_weights(model, tmp_path / "old.weights") == 640
    assert same_weights(model, tiny())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (-8, r"truncated.* 8 bytes \(2 values\) fewer than the .*YOLOv3Tiny\(num_classes=3, width=0.125\)"),
        (-3, r"truncated.* 3 bytes \(1 values\) fewer"),
        (12, r"too long.* 12 bytes \(3 values\) more"),
    ],
)
def test_a_file_of_another_length_is_refused_by_how_much(change: int, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.weights"
    save_weights(tiny(1), path)
    data = path.read_bytes()
    path.write_bytes(data[:change] if change < 0 else data + bytes(change))
    model = tiny()
    with pytest.raises(ValueError, match=message):
        load_weights(model, path)
    assert same_weights(model, tiny())


def test_a_file_of_another_model_is_refused_by_how_much(tmp_path: Path) -> None:
    other = YOLOv3Tiny(num_classes=5, width=0.125)
    save_weights(other, tmp_path / "x.weights")
    gap = weights_size(other) - weights_size(tiny())
    with pytest.raises(ValueError, match=rf"of a larger model.* {gap:,} bytes \({gap // 4:,} values\) more"):
        load_weights(tiny(), tmp_path / "x.weights")


def test_a_long_header_without_a_version_is_told_by_the_length(tmp_path: Path) -> None:
    model, other = (scrambled(YOLOv3Tiny(num_classes=3, width=0.125), seed) for seed in (0, 1))
    save_weights(model, tmp_path / "model.weights", seen=7)
    data = (tmp_path / "model.weights").read_bytes()
    (tmp_path / "model.weights").write_bytes(bytes(12) + data[12:])
    assert load_weights(other, tmp_path / "model.weights") == 7
    assert all(torch.equal(x, y) for x, y in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_a_file_without_a_whole_header_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.weights").write_bytes(b"\0" * 7)
    with pytest.raises(ValueError, match=r"7 bytes, too short for a \.weights header of 20 bytes"):
        load_weights(tiny(), tmp_path / "x.weights")


def test_a_missing_file_is_reported_as_such(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_weights(tiny(), tmp_path / "none.weights")


def test_a_failed_save_leaves_the_old_file_and_no_part(tmp_path: Path) -> None:
    path = tmp_path / "x.weights"
    save_weights(tiny(), path)
    before = path.read_bytes()
    broken = nn.Sequential(OrderedDict(a=nn.Conv2d(1, 1, 1), b=nn.Conv2d(1, 1, 1, bias=False)))
    with pytest.raises(ValueError, match="a convolution without bias that no batch norm follows"):
        save_weights(broken, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_half_precision_models_are_saved_as_float32(tmp_path: Path) -> None:
    model = tiny().bfloat16()
    save_weights(model, tmp_path / "x.weights")
    copy = tiny(1)
    load_weights(copy, tmp_path / "x.weights")
    assert torch.equal(copy.head16.weight, model.head16.weight.float())


# ---- the .cfg beside the weights


@pytest.mark.parametrize(
    "model",
    [
        YOLOv3(3, 0.125, [[[10.5, 11.25], [12, 13]], [[20, 30], [21, 31]], [[50, 60], [60, 1e3 / 7]]]),
        YOLOv3Tiny(2, 0.3),
    ],
)
def test_a_detector_comes_back_from_weights_and_cfg_alone(model: Detector, tmp_path: Path) -> None:
    save_detector(model, tmp_path / "x.weights", size=96)
    found = load_detector(tmp_path / "x.weights")
    assert type(found.model) is type(model)
    assert (found.model.num_classes, found.model.width, found.size) == (model.num_classes, model.width, 96)
    assert torch.equal(found.model.anchors, model.anchors)
    assert same_weights(found.model, model)
    with pytest.raises(ValueError, match=rf"num_classes: expected {model.num_classes} as in .*x\.cfg, got 80"):
        load_detector(tmp_path / "x.weights", num_classes=80)


def test_the_cfg_is_the_published_one() -> None:
    """Compare the layers with yolov3-tiny.cfg, as Darknet numbers them: filters, or the layers that are joined."""
    text = write_cfg(YOLOv3Tiny())
    found = [line.split("=")[1] for line in text.splitlines() if line.startswith(("filters", "layers", "mask"))]
    convolutions = ["16", "32", "64", "128", "256", "512", "1024", "256", "512", "255"]
    assert found == [*convolutions, "3,4,5", "-4", "128", "-1,8", "256", "255", "0,1,2"]
    assert text.count("[maxpool]") == 6
    assert "anchors=10,14,23,27,37,58,81,82,135,169,344,319\nclasses=80\nnum=6" in text
    joined = [line for line in write_cfg(YOLOv3()).splitlines() if line.startswith("layers")]
    assert joined == ["layers=-4", "layers=-1,61", "layers=-4", "layers=-1,36"]


def test_a_cfg_of_darknet_is_read_with_its_comments_and_spaces(tmp_path: Path) -> None:
    text = write_cfg(YOLOv3Tiny(7, 0.5), 320).replace("=", " = ").replace("[yolo]", "[yolo]\n; a comment\n# another")
    (tmp_path / "x.cfg").write_text(text.split("\n", 1)[1])  # without fastkd's own first line
    found = read_cfg(tmp_path / "x.cfg")
    assert (found.model, found.num_classes, found.width, found.size) == ("yolov3-tiny", 7, 0.5, 320)


@pytest.mark.parametrize(
    ("old", "new", "reported"),
    [
        ("size=3", "size=5", "expected layer 0 of yolov3-tiny to be .*got"),
        ("[yolo]", "[region]", r"the 2 of YOLOv3-tiny, got 0"),
        ("classes=80", "class=80", r"the same classes, anchors in pairs"),
        ("mask=0,1,2", "mask=0,1,6", r"a mask of anchor numbers"),
        ("height=416", "height=320", "with a square input"),
        ("activation=leaky", "activation=mish", "expected layer 0"),
        ("layers=-1,8", "layers=-1,6", "expected layer 20"),
        ("[upsample]", "[upsample]\ngroups=2", "expected layer 19"),
        ("[net]", "net", "got 'net' before the first"),
    ],
)
def test_a_cfg_of_another_network_is_refused(old: str, new: str, reported: str, tmp_path: Path) -> None:
    (tmp_path / "x.cfg").write_text(write_cfg(YOLOv3Tiny()).replace(old, new))
    with pytest.raises(ValueError, match=reported):
        read_cfg(tmp_path / "x.cfg")


# ---- without a .cfg


@pytest.mark.filterwarnings("ignore:.*with the model's default anchors")
@pytest.mark.parametrize(
    ("model", "given"),
    [
        (YOLOv3Tiny(80, 0.125), {"width": 0.125}),
        (YOLOv3(7, 0.125), {"width": 0.125}),
        (YOLOv3Tiny(1), {}),
        (YOLOv3Tiny(3, 0.25, [[9, 9]] * 4), {"width": 0.25, "anchors": [[9, 9]] * 4}),
    ],
)
def test_the_size_of_a_file_says_model_and_classes(model: Detector, given: dict[str, Any], tmp_path: Path) -> None:
    save_weights(model, tmp_path / "x.weights")
    found = load_detector(tmp_path / "x.weights", **given)
    assert type(found.model) is type(model)
    assert (found.model.num_classes, found.model.width) == (model.num_classes, model.width)
    assert same_weights(found.model, model)
    assert any(f"a {name_of(model)} of {model.num_classes} classes" in note for note in found.notes)
    assert (len(found.class_names), found.size) == ((80, 416) if model.num_classes == 80 else (0, None))


def test_a_size_that_no_number_of_classes_has_is_refused(tmp_path: Path) -> None:
    save_weights(tiny(), tmp_path / "x.weights")
    (tmp_path / "x.weights").write_bytes((tmp_path / "x.weights").read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"check model \(--arch\), num_classes \(--classes\), width"):
        load_detector(tmp_path / "x.weights")


# ---- class names


def test_names_are_kept_beside_the_weights(tmp_path: Path) -> None:
    save_detector(tiny(), tmp_path / "x.weights", ("a b", "c", "é"))
    assert (tmp_path / "x.names").read_text(encoding="utf-8") == "a b\nc\né\n"
    assert load_detector(tmp_path / "x.weights").class_names == ("a b", "c", "é")
    assert load_detector(tmp_path / "x.weights", class_names=("1", "2", "3")).class_names == ("1", "2", "3")


@pytest.mark.parametrize("name", ["x.pt", "x.weights"])
def test_another_number_of_names_than_of_classes_is_refused(name: str, tmp_path: Path) -> None:
    save_detector(tiny(), tmp_path / name, ("a", "b", "c"))
    with pytest.raises(ValueError, match=rf"class_names: expected 3 names, one for each class of .*{name}, got 2"):
        load_detector(tmp_path / name, class_names=("a", "b"))


def test_names_beside_the_weights_that_do_not_fit_are_refused_by_their_file(tmp_path: Path) -> None:
    save_detector(tiny(), tmp_path / "x.weights", ("a", "b", "c"))
    (tmp_path / "x.names").write_text("a\nb\n")
    with pytest.raises(ValueError, match=r"x\.names: expected 3 names, one for each class of .*x\.weights, got 2"):
        load_detector(tmp_path / "x.weights")


@pytest.mark.parametrize(
    ("content", "reported"),
    [
        (b"", "got no name in"),
        (b"a\n\nb\n", "got an empty line 2 in"),
        (b"\xff\xfe\x00", "expected UTF-8 text"),
    ],
)
def test_a_file_that_lists_no_names_is_refused(content: bytes, reported: str, tmp_path: Path) -> None:
    (tmp_path / "x.names").write_bytes(content)
    with pytest.raises(ValueError, match=f"names: .*{reported}"):
        read_names(tmp_path / "x.names")
    with pytest.raises(FileNotFoundError, match="names: expected coco or a file"):
        read_names(tmp_path / "y.names")


# ---- anchors


def test_weights_bring_the_anchors_that_they_were_trained_with(tmp_path: Path) -> None:
    own = [[9.0 + i, 9.0 + i] for i in range(6)]
    save_detector(YOLOv3Tiny(3, 0.125, own), tmp_path / "x.weights")
    default, chosen = YOLOv3Tiny(3, 0.125), YOLOv3Tiny(3, 0.125, [[7.0, 8.0]] * 6)
    for model in (default, chosen):
        load_weights(model, tmp_path / "x.weights")
    assert default.anchors.reshape(-1, 2).tolist() == own
    assert chosen.anchors.reshape(-1, 2).tolist() == [[7.0, 8.0]] * 6  # anchors that are given are kept


def test_a_cfg_of_another_model_beside_weights_is_said_and_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.weights"
    save_weights(YOLOv3Tiny(3, 0.125), path)
    for text, why in (
        ("notes", "before the first"),
        (write_cfg(YOLOv3Tiny(9, 0.5, [[7, 7]] * 6)), "of 9 classes"),
    ):
        (tmp_path / "x.cfg").write_text(text)
        model = YOLOv3Tiny(3, 0.125)
        with pytest.warns(UserWarning, match=f"with the model's default anchors, .*{why}"):
            load_weights(model, path)
        assert torch.equal(model.anchors, YOLOv3Tiny(3, 0.125).anchors)
    (tmp_path / "x.cfg").unlink()
    with pytest.warns(UserWarning, match=r"there is no \.cfg beside it"):
        load_detector(path, model="yolov3-tiny", num_classes=3, width=0.125)


def test_the_published_tiny_weights_bring_theirs(tmp_path: Path) -> None:
    """They were trained with other anchors than those in their .cfg; the header identifies the file."""
    model = YOLOv3Tiny()
    save_weights(model, tmp_path / "x.weights", seen=32_013_312)
    (tmp_path / "x.cfg").write_text(write_cfg(model))
    load_weights(model, tmp_path / "x.weights")
    assert model.anchors.reshape(-1, 2).tolist() == [list(pair) for pair in YOLOv3Tiny.published_anchors]
