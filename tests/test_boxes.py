"""Decoding, IoU, non-maximum suppression and anchors."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from fastkd.yolov3 import HeadLayout, YOLOv3Tiny, box_iou, dataset_anchors, decode, detect, kmeans_anchors
from fastkd.yolov3.boxes import likely_boxes

LAYOUT = HeadLayout(torch.tensor([[[10.0, 14.0]], [[40.0, 60.0]]]), (16, 32), 2)


def silent_outputs(images: int = 1) -> list[Tensor]:
    """Return outputs for a 64 x 96 image (height x width) without detections: one anchor per cell, two classes."""
    outputs = [torch.zeros(images, 7, 64 // stride, 96 // stride) for stride in LAYOUT.strides]
    for output in outputs:
        output[:, 4:] = -20
    return outputs


def test_decoding_follows_the_papers_formula() -> None:
    outputs = silent_outputs()
    outputs[0][0, :, 2, 5] = torch.tensor([0.3, -0.7, 0.5, -0.2, 1.0, 2.0, -3.0])
    boxes = decode(outputs, LAYOUT.anchors, LAYOUT.strides)
    assert boxes.shape == (1, 4 * 6 + 2 * 3, 7)
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    x, y = (5 + sigmoid(0.3)) * 16, (2 + sigmoid(-0.7)) * 16
    w, h = 10 * math.exp(0.5), 14 * math.exp(-0.2)
    expected = [x - w / 2, y - h / 2, x + w / 2, y + h / 2, sigmoid(1), sigmoid(2), sigmoid(-3)]
    assert boxes[0, 2 * 6 + 5].tolist() == pytest.approx(expected, rel=1e-5)
    assert boxes[0, 4 * 6 + 1 * 3 + 2, :4].tolist() == [80 - 20, 48 - 30, 80 + 20, 48 + 30]


def test_decoding_keeps_anchors_rows_and_columns_apart() -> None:
    model = YOLOv3Tiny(num_classes=3, width=0.125).eval()
    outputs = [torch.randn_like(x) for x in model(torch.rand(2, 3, 64, 96))]  # all cells are different
    decoded = decode(outputs, model.anchors, model.strides)
    assert decoded.shape == (2, 3 * (24 + 6), 8)
    raw = outputs[0].unflatten(1, (3, 8))
    # vectorised sigmoids may be rounded differently from scalar ones
    torch.testing.assert_close(decoded[1, 1 * 24 + 3 * 6 + 4, 4:], raw[1, 1, 4:, 3, 4].sigmoid())


def test_huge_predictions_decode_to_finite_boxes() -> None:
    outputs = [torch.full_like(o, 1e4).half() for o in silent_outputs()]
    boxes = decode(outputs, LAYOUT.anchors, LAYOUT.strides)
    assert boxes.dtype == torch.float32
    assert bool(boxes.isfinite().all())


def test_likely_boxes_are_the_best_above_the_least_score() -> None:
    outputs = silent_outputs(images=3)
    for image, row, column, objectness in (
        (0, 1, 2, 3.0),
        (0, 3, 4, 2.0),
        (0, 2, 2, 1.0),
        (2, 0, 5, -0.5),
        (2, 3, 3, 4.0),
    ):
        outputs[0][image, 4, row, column] = objectness
        outputs[0][image, 5, row, column] = 3.0
    found = likely_boxes(outputs, LAYOUT, most=2, least=0.4)
    assert found.shape == (3 * 2, 5)
    assert found.dtype == torch.float32
    assert found[:, 0].tolist() == [0, 0, 1, 1, 2, 2]
    decoded = decode(outputs, LAYOUT.anchors, LAYOUT.strides)[..., :4]
    # the third best of an image is left out
    cells = [(0, 1 * 6 + 2), (0, 3 * 6 + 4), None, None, (2, 3 * 6 + 3), None]
    wanted = [torch.zeros(4) if cell is None else decoded[cell] for cell in cells]
    torch.testing.assert_close(found[:, 1:], torch.stack(wanted))
    assert len(likely_boxes(outputs, LAYOUT, most=100)) == 3 * 30  # there are no more


def test_decoding_does_not_change_the_outputs() -> None:
    outputs = silent_outputs()
    copies = [o.clone() for o in outputs]
    detect(outputs, LAYOUT)
    assert all(torch.equal(a, b) for a, b in zip(outputs, copies, strict=True))


def test_iou_of_known_boxes() -> None:
    a = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 10, 10], [3, 3, 3, 3]])
    b = torch.tensor([[0.0, 0, 10, 10], [5, 0, 15, 10], [20, 20, 30, 30], [3, 3, 3, 3]])
    assert box_iou(a, b).tolist() == pytest.approx([1, 1 / 3, 0, 0])
    assert box_iou(a[:, None], b[None]).shape == (4, 4)


def put(output: Tensor, row: int, column: int, objectness: float, classes: tuple[float, float]) -> None:
    output[0, 4:, row, column] = torch.tensor([objectness, *classes])


def test_a_strong_prediction_becomes_one_detection() -> None:
    outputs = silent_outputs(2)
    put(outputs[1], 1, 2, 8.0, (-20.0, 8.0))
    found, nothing = detect(outputs, LAYOUT, score_threshold=0.5)
    assert found.boxes.tolist() == [[60, 18, 100, 78]]
    assert found.classes.tolist() == [1]
    assert found.scores.item() == pytest.approx(1 / (1 + math.exp(-8)) ** 2, rel=1e-5)
    assert nothing.boxes.shape == (0, 4)
    assert nothing.scores.shape == nothing.classes.shape == (0,)


def test_suppression_is_within_a_class_and_best_first() -> None:
    outputs = silent_outputs()
    outputs[0][0, 2:4] = math.log(6)  # boxes of 60 x 84 pixels, 16 pixels apart: neighbours overlap by 0.58
    put(outputs[0], 1, 1, 2.0, (8.0, -20.0))
    put(outputs[0], 1, 2, 4.0, (8.0, -20.0))
    put(outputs[0], 1, 3, 3.0, (-20.0, 8.0))
    (found,) = detect(outputs, LAYOUT, score_threshold=0.1, iou_threshold=0.5)
    assert found.classes.tolist() == [0, 1]
    assert found.scores[0] > found.scores[1]
    (loose,) = detect(outputs, LAYOUT, score_threshold=0.1, iou_threshold=0.7)
    assert loose.classes.tolist() == [0, 1, 0]


def test_a_box_is_reported_under_every_class_above_the_threshold() -> None:
    outputs = silent_outputs()
    put(outputs[0], 0, 0, 9.0, (2.0, 1.0))
    (found,) = detect(outputs, LAYOUT, score_threshold=0.5)
    assert found.classes.tolist() == [0, 1]
    assert torch.equal(found.boxes[0], found.boxes[1])


def test_at_most_max_detections_are_kept_and_they_are_the_best() -> None:
    outputs = silent_outputs()
    for column in range(6):
        put(outputs[0], 0, column, float(column), (5.0, -20.0))
    (found,) = detect(outputs, LAYOUT, score_threshold=0.01, max_detections=2)
    assert found.boxes[:, 0].tolist() == [83, 67]


@pytest.mark.parametrize(
    "options", [{"score_threshold": -0.1}, {"score_threshold": 1.0}, {"iou_threshold": 0.0}, {"max_detections": 0}]
)
def test_thresholds_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected score_threshold in"):
        detect(silent_outputs(), LAYOUT, **options)  # type: ignore[arg-type]


def test_outputs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected one map for each of the strides.*got 1 maps"):
        decode(silent_outputs()[:1], LAYOUT.anchors, LAYOUT.strides)
    with pytest.raises(ValueError, match=r"outputs\[0\]: expected \(N, 1 \* \(5 \+ 3\), H, W\)"):
        detect(silent_outputs(), LAYOUT._replace(num_classes=3))


def test_anchors_of_clear_clusters_are_their_means_by_area() -> None:
    torch.manual_seed(0)
    centres = torch.tensor([[60.0, 20.0], [10.0, 12.0], [30.0, 90.0]])
    wh = (centres[:, None] + torch.rand(3, 50, 2) - 0.5).flatten(0, 1)
    found = kmeans_anchors(wh, 3)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wh.view(3, 50, 2).mean(1)[[1, 0, 2]])


def test_anchors_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    wh = torch.rand(300, 2) * 50 + 5
    first = kmeans_anchors(wh, 6, seed=3)
    torch.manual_seed(2)
    assert torch.equal(first, kmeans_anchors(wh.tolist(), 6, seed=3))


def test_dataset_anchors_fit_better_than_cocos() -> None:
    torch.manual_seed(0)
    wh = torch.rand(500, 2) * 28 + 20
    anchors = dataset_anchors(wh, (16, 32))
    model = YOLOv3Tiny(1, 0.125, anchors)
    assert anchors.shape == (2, 3, 2)
    assert anchors[0].prod(-1).max() < anchors[1].prod(-1).min()
    assert anchors[1].tolist() == [[64, 64], [96, 96], [128, 128]]  # no box is that large, so the anchors are squares

    def fit(sizes: Tensor) -> float:
        boxes = torch.cat([-sizes / 2, sizes / 2], -1).reshape(1, -1, 4)
        labels = torch.cat([-wh / 2, wh / 2], -1)[:, None]
        return float(box_iou(boxes, labels).amax(1).mean())

    assert fit(model.anchors) > fit(YOLOv3Tiny(1, 0.125).anchors) + 0.1


def test_fewer_sizes_than_anchors_are_refused() -> None:
    with pytest.raises(ValueError, match="k: expected 1 to 5, the number of different sizes in wh; got 6"):
        dataset_anchors([[9.0, i] for i in range(1, 6)], (16, 32))


def test_each_head_gets_anchors_of_the_boxes_its_cells_resolve() -> None:
    torch.manual_seed(0)
    wh = torch.rand(2000, 2) * 250 + 6
    size = wh.prod(-1).sqrt()
    for anchors, low, high in zip(dataset_anchors(wh, (8, 16, 32)), (0, 32, 64), (32, 64, 999), strict=True):
        own = wh[(size >= low) & (size < high)]
        torch.testing.assert_close(anchors, kmeans_anchors(own, 3))


@pytest.mark.parametrize(
    ("wh", "k", "message"),
    [
        ([[1.0, 2.0, 3.0]], 1, r"wh: expected .*shape \(n, 2\); got shape \(1, 3\)"),
        ([[1.0, 0.0]], 1, "wh: expected finite widths and heights > 0"),
        ([[1.0, 2.0]] * 5, 2, "k: expected 1 to 1, the number of different sizes in wh; got 2"),
    ],
)
def test_bad_sizes_for_anchors_are_refused(wh: list[list[float]], k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kmeans_anchors(wh, k)


def test_the_package_imports_without_opencv() -> None:
    code = "import sys; sys.modules['cv2'] = None; import fastkd.yolov3"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
