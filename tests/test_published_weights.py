"""The published yolov3-tiny.weights. The tests are skipped if the file is missing; it is not part of the project."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import pytest
import torch

from fastkd.cli import main
from fastkd.yolov3 import YOLOv3Tiny
from fastkd.yolov3.checkpoint import Trained, load_detector
from fastkd.yolov3.class_names import COCO_NAMES, read_names, same_names
from fastkd.yolov3.data.dataset import read_image
from fastkd.yolov3.data.digits import write_digits
from fastkd.yolov3.data.draw import Image
from fastkd.yolov3.show.predict import detect_objects
from fastkd.yolov3.train.config import TrainConfig
from fastkd.yolov3.train.run import build_objective, training_set

# ../shared/weights of the project's root or, for a nested worktree, of a folder above it
PLACES = [folder / "shared" / "weights" for folder in Path(__file__).resolve().parents[1].parents]
FOLDER = next((place for place in PLACES if (place / "yolov3-tiny.weights").is_file()), PLACES[0])
WEIGHTS, NAMES, DOG = (FOLDER / name for name in ("yolov3-tiny.weights", "coco.names", "dog.jpg"))

pytestmark = pytest.mark.skipif(
    not all(file.is_file() for file in (WEIGHTS, NAMES, DOG)), reason=f"the published files are not in {PLACES[0]}"
)


@pytest.fixture(scope="module")
def published() -> Trained:
    return load_detector(WEIGHTS)


def best(found: Trained, image: Image) -> dict[str, float]:
    """Return the best score of each class in an image."""
    seen = detect_objects(found.model, image, 416, 0.3)
    scores = zip(seen.classes.tolist(), seen.scores.tolist(), strict=True)
    return {found.class_names[index]: score for index, score in sorted(scores, key=lambda pair: pair[1])}


def test_the_file_alone_says_model_classes_size_and_anchors(published: Trained) -> None:
    assert isinstance(published.model, YOLOv3Tiny)
    assert (published.model.num_classes, published.model.width, published.size) == (80, 1.0, 416)
    assert published.model.anchors.flatten(1).tolist() == [[23, 27, 37, 58, 81, 82], [81, 82, 135, 169, 344, 319]]
    assert published.class_names == COCO_NAMES
    assert any("assumed to have COCO's 80 classes" in note for note in published.notes)


def test_the_names_beside_it_are_coco_s_as_darknet_spells_them() -> None:
    names = read_names(NAMES)
    assert same_names(names, COCO_NAMES)
    assert not same_names(names[::-1], COCO_NAMES)


def test_dog_car_and_truck_have_the_scores_of_opencv(published: Trained) -> None:
    """OpenCV's DNN module stretches the image to a square, so the same is done here."""
    image = cv2.resize(read_image(DOG), (416, 416))
    found = best(published, image)
    assert {name: found.get(name) for name in ("dog", "car", "truck")} == {
        "dog": pytest.approx(0.83, abs=0.03),
        "car": pytest.approx(0.73, abs=0.03),
        "truck": pytest.approx(0.58, abs=0.03),
    }


def test_they_are_found_in_the_letterboxed_image_too(published: Trained) -> None:
    assert {"dog", "car", "truck", "bicycle"} <= best(published, read_image(DOG)).keys()


def test_predict_needs_no_flag(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["predict", str(WEIGHTS), str(DOG)]) == 0
    assert (tmp_path / "runs/predict/dog.jpg").is_file()
    reported = capsys.readouterr().err
    assert "assumed from its size to be a yolov3-tiny of 80 classes" in reported
    assert "assumed to have COCO's 80 classes" in reported


@pytest.mark.parametrize("names", [None, "coco", str(NAMES)])
def test_eval_needs_no_flag_but_its_data(names: str | None, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "annotations").mkdir()
    (tmp_path / "images").mkdir()
    (tmp_path / "images/dog.jpg").write_bytes(DOG.read_bytes())
    image = {"id": 1, "file_name": "dog.jpg", "width": 768, "height": 576}
    boxes = {18: [131, 221, 180, 321], 3: [469, 75, 222, 95]}
    entries = [
        {"id": i, "image_id": 1, "category_id": i, "bbox": box, "area": box[2] * box[3]} for i, box in boxes.items()
    ]
    ids = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]
    categories = [{"id": i, "name": name} for i, name in zip(ids, COCO_NAMES, strict=True)]
    content = {"images": [image], "annotations": entries, "categories": categories}
    (tmp_path / "annotations/val.json").write_text(json.dumps(content))
    named = [] if names is None else ["--names", names]
    assert main(["eval", str(WEIGHTS), "--data", str(tmp_path), "--cpu", *named]) == 0
    ap50 = next(line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("AP50"))
    assert float(ap50) > 90


def test_training_of_other_classes_begins_with_all_but_the_heads(published: Trained, tmp_path: Path) -> None:
    data = write_digits(tmp_path / "digits", train=6, val=0, test=0)
    config = TrainConfig(
        annotations=str(data / "annotations/train.json"),
        images=str(data / "images/train"),
        out=str(tmp_path / "run"),
        init=str(WEIGHTS),
        anchors="default",
        size=96,
        cpu=True,
    )
    reported: list[str] = []
    student = build_objective(config, training_set(config), on_init=reported.append).student
    ours, theirs = student.state_dict(), published.model.state_dict()
    new = [name for name, value in theirs.items() if not torch.equal(value, ours[name])]
    assert new == ["head32.weight", "head32.bias", "head16.weight", "head16.bias"]
    assert len(reported) == 1
    assert reported[0].startswith("init: kept 11 of 13 convolutions of ")
    assert "(80 classes); new: the last one of each of the 2 heads, for 10 classes" in reported[0]
