"""The training loss against a plain, slow implementation of the same definition, and its promises."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from fastkd.yolov3 import DetectionLoss, HeadLayout, YOLOv3Tiny, box_iou, decode, detect

ANCHORS = torch.tensor([[[8.0, 10.0], [20.0, 14.0]], [[30.0, 40.0], [60.0, 50.0]]], dtype=torch.float64)
LAYOUT = HeadLayout(ANCHORS, (16, 32), 3)
TARGETS = torch.tensor(
    [
        [0, 2, 5, 5, 14, 17],
        [0, 0, 10, 12, 45, 50],
        [2, 1, 40, 30, 60, 44],
        [2, 2, 0, 0, 64, 64],
        [2, 2, 41, 31, 60, 44],  # same cell and anchor as a box above
    ],
    dtype=torch.float64,
)


def random_outputs(seed: int = 0, images: int = 3, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(images, 2 * 8, 64 // stride, 64 // stride) for stride in LAYOUT.strides]
    return [(torch.randn(shape, generator=generator, dtype=torch.float64) * scale).requires_grad_() for shape in shapes]


def slow_loss(outputs: list[Tensor], targets: Tensor, ignore: float, match: float) -> dict[str, Tensor]:
    """Compute the loss box by box and cell by cell, as the paper describes it."""
    boxes = decode(outputs, ANCHORS, LAYOUT.strides)
    raw = torch.cat([o.unflatten(1, (2, 8)).permute(0, 1, 3, 4, 2).flatten(1, 3) for o in outputs], 1)
    total = {name: outputs[0].new_zeros(()) for name in ("box", "objectness", "class")}
    owned: set[tuple[int, int]] = set()
    for target in targets:
        image, kind, wh = int(target[0]), int(target[1]), target[4:] - target[2:4]
        overlap = [float(torch.minimum(wh, a).prod()) for a in ANCHORS.flatten(0, 1)]
        areas = [float(a.prod()) for a in ANCHORS.flatten(0, 1)]
        fits = [o / (float(wh.prod()) + a - o) for o, a in zip(overlap, areas, strict=True)]
        for index in (i for i, fit in enumerate(fits) if fit == max(fits) or fit > match):
            head, anchor = divmod(index, 2)
            stride, cells = LAYOUT.strides[head], 64 // LAYOUT.strides[head]
            x, y = ((target[2:4] + target[4:]) / 2 / stride).tolist()
            column, row = int(x), int(y)
            p = (2 * 16 if head else 0) + (anchor * cells + row) * cells + column
            owned.add((image, p))
            t = raw[image, p]
            cost = (t[2:4] - (wh / ANCHORS[head, anchor]).log()).square().sum() / 2
            for logit, wanted in ((t[0], x - column), (t[1], y - row)):
                cost = cost - wanted * logit.sigmoid().log() - (1 - wanted) * (-logit).sigmoid().log()
            total["box"] = total["box"] + (2 - wh.prod() / 64**2) * cost
            for k in range(3):
                total["class"] = total["class"] - (t[5 + k] if k == kind else -t[5 + k]).sigmoid().log()
    for image in range(len(boxes)):
        labelled = targets[targets[:, 0] == image, 2:]
        for p, box in enumerate(boxes[image]):
            near = len(labelled) > 0 and float(box_iou(box[:4], labelled).detach().max()) > ignore
            if (image, p) in owned:
                total["objectness"] = total["objectness"] - raw[image, p, 4].sigmoid().log()
            elif not near:
                total["objectness"] = total["objectness"] - (-raw[image, p, 4]).sigmoid().log()
    return {name: value / len(boxes) for name, value in total.items()}


@pytest.mark.parametrize(("ignore", "match"), [(0.5, 1.0), (0.2, 1.0), (0.5, 0.3)])
def test_loss_and_gradient_equal_a_slow_writing_of_the_definition(ignore: float, match: float) -> None:
    outputs = random_outputs()
    total, parts = DetectionLoss(LAYOUT, ignore_threshold=ignore, match_threshold=match)(outputs, TARGETS)
    expected = slow_loss(outputs, TARGETS, ignore, match)
    assert {k: float(v) for k, v in parts.items()} == pytest.approx({k: float(v.detach()) for k, v in expected.items()})
    right = torch.autograd.grad(torch.stack(list(expected.values())).sum(), outputs)
    torch.testing.assert_close(torch.autograd.grad(total, outputs), right)


def test_the_gradient_is_that_of_the_loss() -> None:
    criterion, targets = DetectionLoss(LAYOUT), TARGETS[:2]
    assert torch.autograd.gradcheck(lambda *o: criterion(o, targets)[0], random_outputs(1, images=1))


def test_a_lower_match_threshold_gives_boxes_more_anchors() -> None:
    outputs = random_outputs()
    best = DetectionLoss(LAYOUT, match_threshold=1.0)(outputs, TARGETS)[1]
    more = DetectionLoss(LAYOUT, match_threshold=0.2)(outputs, TARGETS)[1]
    assert more["class"] > best["class"]


def test_predictions_near_a_box_are_not_taught_to_be_background() -> None:
    outputs = random_outputs()
    strict = DetectionLoss(LAYOUT, ignore_threshold=1.0)(outputs, TARGETS)[1]["objectness"]
    lenient = DetectionLoss(LAYOUT, ignore_threshold=0.1)(outputs, TARGETS)[1]["objectness"]
    assert lenient < strict


def test_boxes_count_in_their_own_image_only() -> None:
    outputs = random_outputs()
    whole = DetectionLoss(LAYOUT)(outputs, TARGETS)[0] * 3
    single = []
    for image in range(3):
        mine = TARGETS[TARGETS[:, 0] == image].clone()
        mine[:, 0] = 0
        single.append(DetectionLoss(LAYOUT)([o[image : image + 1] for o in outputs], mine)[0])
    torch.testing.assert_close(whole, sum(single))


def test_the_order_of_boxes_does_not_matter() -> None:
    outputs = random_outputs()
    criterion = DetectionLoss(LAYOUT)
    torch.testing.assert_close(criterion(outputs, TARGETS)[0], criterion(outputs, TARGETS.flip(0))[0])


def test_without_boxes_only_objectness_is_trained() -> None:
    outputs = random_outputs()
    total, parts = DetectionLoss(LAYOUT)(outputs, torch.zeros(0, 6))
    assert parts["box"] == parts["class"] == 0
    total.backward()
    for output in outputs:
        assert output.grad is not None
        cells = output.grad.unflatten(1, (2, 8))
        assert bool((cells[:, :, 4] > 0).all())
        assert not cells[:, :, [0, 1, 2, 3, 5, 6, 7]].any()


def test_nothing_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device, reading a value, or a shape that depends on one, raises an error."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # the meta device has no autocast
    outputs = [torch.zeros(2, 16, n, n, device="meta", requires_grad=True) for n in (4, 2)]
    total, parts = DetectionLoss(LAYOUT)(outputs, torch.zeros(5, 6, device="meta"))
    total.backward()
    assert outputs[0].grad is not None
    with pytest.raises(RuntimeError, match=r"meta tensors"):
        parts["box"].item()


def test_an_empty_batch_costs_nothing() -> None:
    total, _ = DetectionLoss(LAYOUT)([o[:0] for o in random_outputs()], torch.zeros(0, 6))
    assert total.item() == 0


def test_a_perfect_prediction_costs_least() -> None:
    outputs = [torch.zeros(1, 16, 4, 4), torch.zeros(1, 16, 2, 2)]
    for output in outputs:
        output.unflatten(1, (2, 8))[:, :, 4:] = -20
    cell = outputs[0].unflatten(1, (2, 8))[0, 1, :, 2, 1]
    cell[4:] = torch.tensor([20.0, -20.0, 20.0, -20.0])
    target = torch.tensor([[0.0, 1, 24 - 10, 40 - 7, 24 + 10, 40 + 7]])
    total, parts = DetectionLoss(LAYOUT)(outputs, target)
    floor = 2 * math.log(2) * (2 - 20 * 14 / 64**2)  # cross-entropy of a centre in the middle of its cell
    assert float(parts["box"]) == pytest.approx(floor, rel=1e-5)
    assert float(total) == pytest.approx(floor, rel=1e-4)
    assert float(DetectionLoss(LAYOUT)(outputs, target + torch.tensor([0, 0, -3, 0, 3, 0]))[0]) > floor + 0.03


@pytest.mark.parametrize("scale", [0.0, 1e2, 1e4])
def test_extreme_predictions_and_degenerate_boxes_stay_finite(scale: float) -> None:
    outputs = random_outputs(scale=scale)
    odd = torch.tensor(
        [[0, 0, 10, 10, 10, 10], [1, 1, 64, 64, 64, 64], [1, 1, -90, -90, 200, 200]], dtype=torch.float64
    )
    total, _ = DetectionLoss(LAYOUT)(outputs, odd)
    total.backward()
    assert math.isfinite(total.item())
    assert all(bool(o.grad.isfinite().all()) for o in outputs if o.grad is not None)


def test_weights_scale_their_terms() -> None:
    outputs = random_outputs()
    plain = DetectionLoss(LAYOUT, box_weight=1)(outputs, TARGETS)[1]
    scaled = DetectionLoss(LAYOUT, box_weight=3, objectness_weight=0, class_weight=0.5)(outputs, TARGETS)
    assert float(scaled[1]["box"]) == pytest.approx(3 * float(plain["box"]))
    assert float(scaled[1]["objectness"]) == 0
    assert float(scaled[1]["class"]) == pytest.approx(0.5 * float(plain["class"]))
    assert scaled[0].item() == pytest.approx(float(sum(scaled[1].values())))


def test_terms_are_detached_and_the_total_is_not() -> None:
    total, parts = DetectionLoss(LAYOUT)(random_outputs(), TARGETS)
    assert total.requires_grad
    assert not any(part.requires_grad for part in parts.values())


def test_half_precision_outputs_are_summed_in_float32_under_autocast() -> None:
    outputs = [o.detach().bfloat16() for o in random_outputs()]
    criterion = DetectionLoss(LAYOUT)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, _ = criterion(outputs, TARGETS.float())
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, criterion([o.float() for o in outputs], TARGETS.float())[0])


def test_the_loss_has_no_state_to_save_and_leaves_its_inputs_alone() -> None:
    criterion = DetectionLoss(LAYOUT)
    assert criterion.state_dict() == {}
    outputs, targets = random_outputs(), TARGETS.clone()
    copies = [o.detach().clone() for o in outputs]
    criterion(outputs, targets)[0].backward()
    assert torch.equal(targets, TARGETS)
    assert all(torch.equal(a, b) for a, b in zip(outputs, copies, strict=True))


def test_a_small_network_learns_to_find_its_boxes() -> None:
    torch.manual_seed(0)
    model = YOLOv3Tiny(num_classes=2, width=0.25, anchors=[[12, 12], [16, 16], [20, 20], [28, 28], [36, 36], [44, 44]])
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.3  # otherwise the running statistics change too little in so few steps
    images = torch.rand(4, 3, 64, 64) * 0.2
    targets = torch.tensor(
        [[0, 0, 4, 6, 20, 22], [1, 1, 10, 8, 46, 44], [2, 0, 30, 34, 50, 54], [3, 1, 20, 24, 56, 60]]
    )
    for image, kind, x1, y1, x2, y2 in targets.tolist():
        images[image, kind, y1:y2, x1:x2] = 0.9
    criterion = DetectionLoss(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 120)
    for _ in range(120):
        optimizer.zero_grad()
        criterion(model(images), targets.float())[0].backward()
        optimizer.step()
        schedule.step()
    for found, target in zip(detect(model.eval()(images), model, 0.3), targets.float(), strict=True):
        assert len(found.boxes) == 1
        assert found.classes[0] == target[1]
        assert float(box_iou(found.boxes[0], target[2:])) > 0.6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ignore_threshold": 0.0}, r"ignore_threshold: expected an IoU in \(0, 1\], got 0.0"),
        ({"match_threshold": 1.5}, r"match_threshold: expected an IoU in \(0, 1\], got 1.5"),
        ({"box_weight": -1.0}, "box_weight: expected a finite number >= 0, got -1.0"),
        ({"class_weight": math.nan}, "class_weight: expected a finite number >= 0, got nan"),
    ],
)
def test_bad_options_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DetectionLoss(LAYOUT, **options)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.zeros(2, 5), r"targets: expected \(M, 6\).*got \(2, 5\)"),
        (torch.tensor([[3.0, 0, 0, 0, 9, 9]]), "targets: expected image indices 0 to 2, got 3 to 3"),
        (torch.tensor([[0.0, 3, 0, 0, 9, 9]]), "targets: expected class indices 0 to 2, got 3 to 3"),
        (torch.tensor([[0.0, -1, 0, 0, 9, 9]]), "targets: expected class indices"),
    ],
)
def test_bad_targets_are_refused(targets: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DetectionLoss(LAYOUT)(random_outputs(), targets)


def test_outputs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="got 1 maps"):
        DetectionLoss(LAYOUT)(random_outputs()[:1], TARGETS)
    with pytest.raises(ValueError, match=r"outputs\[0\]: expected \(N, 2 \* \(5 \+ 4\), H, W\)"):
        DetectionLoss(LAYOUT._replace(num_classes=4))(random_outputs(), TARGETS)
