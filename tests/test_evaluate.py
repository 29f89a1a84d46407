"""Evaluation gives COCO's numbers, in pixels of the original images, and restores the model's mode."""

import json
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn

from fastkd.yolov3 import YOLOv3Tiny
from fastkd.yolov3.data.augment import Augmentation
from fastkd.yolov3.data.dataset import DetectionDataset
from fastkd.yolov3.train.evaluate import detect_all, evaluate, score, write_detections

# One box per image, centred in a cell, so that a fake head can predict it exactly: x, y, w, h in the original image.
TRUTH = {1: (7, [64, 32, 40, 32]), 2: (9, [0, 0, 96, 64])}


@pytest.fixture
def dataset(tmp_path):
    """Return two images of 192 x 128 pixels, which are scaled to half the size, with 16 grey rows above and below."""
    images, annotations = [], []
    for number, (category_id, bbox) in TRUTH.items():
        cv2.imwrite(str(tmp_path / f"{number}.png"), np.full((128, 192, 3), number, dtype=np.uint8))
        images.append({"id": number, "file_name": f"{number}.png", "width": 192, "height": 128})
        annotations.append({"id": number, "image_id": number, "category_id": category_id, "bbox": bbox})
    categories = [{"id": 7, "name": "cat"}, {"id": 9, "name": "dog"}, {"id": 11, "name": "owl"}]
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return DetectionDataset(path, tmp_path, 96)


class FakeDetector(nn.Module):
    """A detector that finds the true box of each image, known by its grey level, or nothing."""

    def __init__(self, finds=True):
        super().__init__()
        self.finds = finds
        self.num_classes, self.strides = 3, (8,)
        self.register_buffer("anchors", torch.tensor([[[8.0, 8.0]]]))
        self.norm = nn.BatchNorm2d(3)
        self.frozen = nn.BatchNorm2d(3).eval()
        self.seen_training = []

    def forward(self, images):
        self.seen_training.append((self.training, self.norm.training, torch.is_inference_mode_enabled()))
        out = torch.full((len(images), 8, 12, 12), -20.0)
        for head, image in zip(out, images, strict=True):
            number = round(float(image[0, 48, 48]) * 255)
            category_id, (x, y, w, h) = TRUTH[number]
            x, y, w, h = x / 2, y / 2 + 16, w / 2, h / 2
            cx, cy = (x + w / 2) / 8, (y + h / 2) / 8
            row, column = int(cy), int(cx)
            if self.finds:
                offsets = torch.logit(torch.tensor([cx - column, cy - row]), eps=1e-6)
                head[:2, row, column] = offsets
                head[2:4, row, column] = torch.tensor([w / 8, h / 8]).log()
                head[4, row, column] = 20.0
                head[5 + (category_id - 7) // 2, row, column] = 20.0
        return [out]


def test_perfect_detections_score_one(dataset):
    metrics = evaluate(FakeDetector(), dataset, batch_size=1)
    assert metrics.mAP == pytest.approx(1)
    assert all(value == pytest.approx(1) for value in (metrics.AP50, metrics.AP75, metrics.AR100))
    assert metrics.per_class == {"cat": pytest.approx(1), "dog": pytest.approx(1), "owl": None}


def test_annotation_ids_may_begin_at_zero(dataset):
    assert [entry["id"] for entry in dataset.annotations.coco()["annotations"]] == [1, 2]


def test_a_model_of_other_classes_is_refused(dataset):
    model = FakeDetector()
    model.num_classes = 4
    with pytest.raises(ValueError, match="model: expected the data set's 3 classes, got 4"):
        evaluate(model, dataset)


def test_boxes_are_mapped_back_through_the_letterbox(dataset):
    detections = detect_all(FakeDetector(), dataset)
    assert [(d["image_id"], d["category_id"]) for d in detections] == [(1, 7), (2, 9)]
    for detection in detections:
        np.testing.assert_allclose(detection["bbox"], TRUTH[detection["image_id"]][1], atol=1e-3)
        assert detection["score"] > 0.99


def test_no_detection_scores_zero(dataset):
    metrics = evaluate(FakeDetector(finds=False), dataset)
    assert (metrics.mAP, metrics.AP50, metrics.AR100) == (0, 0, 0)
    assert metrics.per_class == {"cat": 0, "dog": 0, "owl": None}


def test_a_wrong_box_costs_what_coco_says(dataset):
    """One box of two classes is found with IoU 0.6: AP counts for thresholds 0.5, 0.55 and 0.6, i.e. 3 of 10."""
    detections = [{"image_id": 1, "category_id": 7, "bbox": [64, 32, 40, 32 * 0.6001], "score": 0.9}]
    metrics = score(detections, dataset)
    assert metrics.mAP == pytest.approx(0.3 / 2)
    assert pytest.approx(0.5) == metrics.AP50
    assert metrics.AP75 == 0


def test_sizes_without_boxes_are_none_not_minus_one(dataset):
    metrics = evaluate(FakeDetector(), dataset)
    assert metrics.AP_small is None
    assert metrics.AP_medium == pytest.approx(1)
    assert json.loads(json.dumps(metrics.as_dict()))["AP_small"] is None


def test_crowds_do_not_count_against_the_detector(dataset):
    plain, found = dataset.truth, detect_all(FakeDetector(), dataset)
    crowd = {"boxes": [[0, 0, 60, 60]], "rows": [0], "classes": [0], "crowd": [True], "areas": [3600.0]}
    dataset.truth = replace(
        plain, **{name: np.concatenate([np.array(value), getattr(plain, name)]) for name, value in crowd.items()}
    )
    inside = {"image_id": 1, "category_id": 7, "bbox": [5, 5, 40, 40], "score": 1.0}
    assert score([inside, *found], dataset).mAP == pytest.approx(1)
    dataset.truth = plain
    assert score([inside, *found], dataset).mAP < 0.8


def test_model_runs_in_eval_mode_and_gets_its_modes_back(dataset):
    model = FakeDetector()
    evaluate(model, dataset)
    assert model.seen_training == [(False, False, True)]
    assert (model.training, model.norm.training, model.frozen.training) == (True, True, False)


def test_modes_come_back_after_an_error(dataset):
    model = FakeDetector()
    model.forward = lambda images: 1 / 0
    with pytest.raises(ZeroDivisionError):
        evaluate(model, dataset)
    assert model.training


def test_scoring_leaves_the_data_set_as_it_was(dataset):
    before = json.dumps(dataset.truth.coco())
    assert evaluate(FakeDetector(), dataset) == evaluate(FakeDetector(), dataset)
    assert json.dumps(dataset.truth.coco()) == before


def test_nothing_is_printed(dataset, capfd):
    evaluate(FakeDetector(), dataset)
    assert capfd.readouterr().out == ""


def test_detections_file_is_a_coco_results_file(dataset, tmp_path):
    path = tmp_path / "deep" / "detections.json"
    evaluate(FakeDetector(), dataset, detections_file=path)
    assert json.loads(path.read_text()) == detect_all(FakeDetector(), dataset)
    assert [entry.name for entry in path.parent.iterdir()] == ["detections.json"]


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "detections.json"
    write_detections([], path)
    with pytest.raises(TypeError):
        write_detections([{"score": object()}], path)
    assert path.read_text() == "[]"
    assert [entry.name for entry in tmp_path.iterdir()] == ["detections.json"]


def test_real_detector_can_be_evaluated(dataset):
    torch.manual_seed(0)
    metrics = evaluate(YOLOv3Tiny(num_classes=3, width=0.125), dataset)
    assert 0 <= metrics.mAP <= metrics.AP50 <= 1


def test_augmented_data_set_is_refused(dataset):
    dataset.augmentation = Augmentation()
    with pytest.raises(ValueError, match="dataset: expected one without augmentation"):
        evaluate(FakeDetector(), dataset)


def test_set_without_boxes_is_refused(dataset):
    dataset.truth = dataset.truth._keeping(np.zeros(2, dtype=bool))
    with pytest.raises(ValueError, match="expected boxes to find, got none"):
        evaluate(FakeDetector(), dataset)


@pytest.mark.filterwarnings("ignore:.*left out")
def test_a_set_of_which_no_image_with_a_box_could_be_read_is_refused(dataset):
    dataset.truth = replace(dataset.truth._keeping(np.array([True, False])), unread=dataset.truth.unread)
    dataset.annotations.path(0).write_bytes(b"no image")
    with pytest.raises(ValueError, match="expected readable images with boxes, got none"):
        evaluate(FakeDetector(), dataset)


def test_wrapped_model_is_refused(dataset):
    with pytest.raises(ValueError, match="model: expected a detector with anchors, got Sequential; unwrap it"):
        evaluate(nn.Sequential(FakeDetector()), dataset)


# ---- the labels of pycocotools


def pycocotools_on_the_file(path, detections):
    """Return AP and AR of pycocotools on the raw file: mAP, AP50, AP75, of small, medium and large; and AR100."""
    truth = COCO(str(path))
    evaluation = COCOeval(truth, truth.loadRes(detections), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return [*evaluation.stats[:6], evaluation.stats[8]]


def raw_set(tmp_path, count=12):
    """Write a COCO file of crowds, and of boxes inside, at the edges of, partly or fully outside their images."""
    rng = np.random.default_rng(0)
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((120, 160, 3), dtype=np.uint8))
    images = [{"id": 3 * i + 5, "file_name": f"{i}.png", "width": 160, "height": 120} for i in range(count)]
    annotations, detections = [], []
    for image in images:
        (tmp_path / image["file_name"]).write_bytes((tmp_path / "a.png").read_bytes())
        boxes = [[130, 20, 48, 40], [-18, 5, 40, 50], [10, 100, 60, 38], [170, 10, 20, 20], [20.5, 30.25, 90, 70]]
        for box in boxes:
            x, y, w, h = box
            entry = {"image_id": image["id"], "category_id": int(rng.integers(1, 4))}
            number = len(annotations) + 1
            crowd = int(rng.random() < 0.1)
            annotations.append({**entry, "id": number, "bbox": box, "area": 0.7 * w * h, "iscrowd": crowd})
            x1, y1, x2, y2 = (np.array([x, y, x + w, y + h]) + rng.normal(0, 1, 4)).clip(0, [160, 120, 160, 120])
            seen = [float(x1), float(y1), float(max(x2 - x1, 1)), float(max(y2 - y1, 1))]
            detections.append({**entry, "bbox": seen, "score": float(rng.random())})
    categories = [{"id": i, "name": f"c{i}"} for i in (1, 2, 3)]
    path = tmp_path / "raw.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path, detections


@pytest.mark.filterwarnings("ignore:.*clipped to their image")
def test_figures_are_those_of_pycocotools_on_the_raw_file(tmp_path):
    path, detections = raw_set(tmp_path)
    data = DetectionDataset(path, tmp_path, 96)
    expected = pycocotools_on_the_file(path, detections)
    found = score(detections, data)
    names = ("mAP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR100")
    assert [getattr(found, name) for name in names if getattr(found, name) is not None] == pytest.approx(
        [x for x in expected if x >= 0]
    )
    assert 0.1 < found.mAP < 0.9


@pytest.mark.filterwarnings("ignore:.*clipped to their image")
def test_a_box_outside_its_image_is_clipped_for_training_and_whole_for_evaluation(tmp_path):
    """30 of the 48 pixels of the box are in the image: IoU 0.625 with its visible part."""
    path, _ = raw_set(tmp_path, 1)
    content = json.loads(path.read_text())
    content["annotations"] = [{**content["annotations"][0], "iscrowd": 0}]
    path.write_text(json.dumps(content))
    data = DetectionDataset(path, tmp_path, 160)
    assert data[0].targets[0, 1:].tolist() == [130, 40, 160, 80]
    seen = [{"image_id": 5, "category_id": content["annotations"][0]["category_id"], "bbox": [130, 20, 30, 40]}]
    assert score([seen[0] | {"score": 1.0}], data).mAP == pytest.approx(0.3)


def test_boxes_without_width_are_no_misses(tmp_path):
    path, _ = raw_set(tmp_path, 1)
    content = json.loads(path.read_text())
    inside = {**content["annotations"][4], "iscrowd": 0}
    content["annotations"] = [inside, {**inside, "id": 9, "bbox": [40, 40, 0, 20]}]
    path.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match="1 boxes without area"):
        data = DetectionDataset(path, tmp_path, 160)
    found = {"image_id": 5, "category_id": inside["category_id"], "bbox": inside["bbox"], "score": 1.0}
    assert score([found], data).mAP == pytest.approx(1)
