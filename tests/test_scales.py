"""Multi-scale training: which sizes there are, that they follow from seed and step, and that boxes go with images."""

from dataclasses import asdict, replace

import pytest
import torch

from fastkd.yolov3.data.digits import write_digits
from fastkd.yolov3.train import run as training
from fastkd.yolov3.train.config import TrainConfig, read_config, require_same_run
from fastkd.yolov3.train.run import train
from fastkd.yolov3.train.scales import at_size, input_size


@pytest.mark.parametrize(
    ("size", "multi_scale", "expected"),
    [
        (416, 0.25, range(320, 513, 32)),
        (416, 0.5, range(224, 609, 32)),
        (160, 0.2, range(128, 193, 32)),
        (96, 0.25, [96]),
        (64, 0.99, [64, 96]),
        (416, 0.0, [416]),
    ],
)
def test_sizes_are_all_multiples_of_32_in_the_range(size, multi_scale, expected):
    assert {input_size(size, multi_scale, 0, step) for step in range(300)} == set(expected)


def test_sizes_follow_from_seed_and_step_alone():
    def sizes(seed):
        return [input_size(416, 0.5, seed, step) for step in range(40)]

    assert sizes(0) == sizes(0) != sizes(1)


@pytest.mark.parametrize("size", [32, 64, 96])
def test_boxes_are_scaled_with_their_image(size):
    """A white box stays where its target says that it is."""
    images = torch.zeros(2, 3, 64, 64)
    images[1, :, 16:48, 32:64] = 1
    targets = torch.tensor([[1.0, 7, 32, 16, 64, 48]])
    scaled, boxes = at_size(images, targets, size)
    assert scaled.shape == (2, 3, size, size)
    assert boxes[0, :2].tolist() == [1, 7]
    x1, y1, x2, y2 = boxes[0, 2:].round().int().tolist()
    assert scaled[1, :, y1 + 1 : y2 - 1, x1 + 1 : x2].min() > 0.9
    assert scaled[1].sum() == pytest.approx(3 * (x2 - x1) * (y2 - y1), rel=0.05)
    assert not scaled[0].any()


def test_the_same_size_and_no_image_at_all_are_left_as_they_are():
    images, targets = torch.rand(2, 3, 64, 64), torch.rand(3, 6)
    assert all(a is b for a, b in zip(at_size(images, targets, 64), (images, targets), strict=True))
    assert at_size(images[:0], targets[:0], 96)[0].shape == (0, 3, 64, 64)


@pytest.fixture
def config(tmp_path):
    digits = write_digits(tmp_path / "digits", train=4, val=1, test=0)
    return TrainConfig(
        annotations=str(digits / "annotations/train.json"),
        images=str(digits / "images/train"),
        out=str(tmp_path / "run"),
        width=0.125,
        size=64,
        batch=2,
        steps=6,
        tensorboard=False,
        plots=False,
        cpu=True,
    )


def test_every_step_of_a_run_has_its_size_and_with_0_the_same(config, monkeypatch):
    seen = []

    class Watched(training.Objective):
        def forward(self, images, targets, unlabelled=None):
            seen.append(images.shape[-1])
            return super().forward(images, targets, unlabelled)

    train(replace(config, multi_scale=0.5), make_objective=Watched)
    assert seen == [input_size(64, 0.5, 0, step) for step in range(6)]
    assert len(set(seen)) > 1
    seen.clear()
    train(replace(config, multi_scale=0.0, out=config.out + "-fixed"), make_objective=Watched)
    assert seen == [64] * 6


def test_a_run_from_before_there_was_multi_scale_goes_on_without_it(config, tmp_path):
    config = replace(config, multi_scale=0.0)
    before = {name: value for name, value in asdict(config).items() if name not in ("multi_scale", "plots")}
    require_same_run(before, asdict(config), 3)
    with pytest.raises(ValueError, match=r"multi_scale \(0.0 then, 0.25 now\)"):
        require_same_run(before, asdict(replace(config, multi_scale=0.25)), 3)
    train(replace(config, steps=1))
    file = tmp_path / "run/config.json"
    kept = [line for line in file.read_text().splitlines() if "multi_scale" not in line and '"plots"' not in line]
    file.write_text("\n".join(kept))
    assert read_config(file.parent).multi_scale == 0.0
