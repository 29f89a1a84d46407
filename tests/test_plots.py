"""What a run and an evaluation leave to look at: files that hold what the metrics say, and no row twice."""

import csv
import json
import os
import time
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

from fastkd.cli import main
from fastkd.yolov3.data.dataset import DetectionDataset
from fastkd.yolov3.data.digits import CLASS_NAMES, write_digits
from fastkd.yolov3.train import plots
from fastkd.yolov3.train.config import TrainConfig
from fastkd.yolov3.train.confusion import confusion_matrix
from fastkd.yolov3.train.evaluate import coco_evaluation, metrics_of
from fastkd.yolov3.train.log import RunLog, read_log
from fastkd.yolov3.train.plots import OF_BATCHES, OF_EVALUATION, PLOT_FILES, RunPlots
from fastkd.yolov3.train.run import train
from fastkd.yolov3.train.samples import CAPTION, GAP, TILE, batch_image, predictions_image
from fastkd.yolov3.train.tables import precision_table


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("data") / "digits", train=8, val=4, test=2)


@pytest.fixture(scope="session")
def config(digits):
    return TrainConfig(
        annotations=str(digits / "annotations/train.json"),
        images=str(digits / "images/train"),
        val_annotations=str(digits / "annotations/val.json"),
        val_images=str(digits / "images/val"),
        out="",
        width=0.125,
        size=64,
        batch=4,
        steps=4,
        warmup=1,
        log_every=1,
        eval_every=1,
        save_every=1,
        tensorboard=False,
        cpu=True,
    )


@pytest.fixture(scope="session")
def run(config, tmp_path_factory):
    """A run of four steps with plots, with what it scored."""
    out = tmp_path_factory.mktemp("runs") / "run"
    return train(replace(config, out=str(out)))


def rows(file):
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


SIDES = {"a": [10, 10, 40, 40], "b": [60, 10, 40, 40], "c": [10, 60, 30, 30]}


@pytest.fixture
def labelled(tmp_path):
    """Makes a set of 120 x 120 pixels from boxes (image, class, box, crowd)."""

    def make(boxes, images=2):
        for number in range(1, images + 1):
            cv2.imwrite(str(tmp_path / f"{number}.png"), np.full((120, 120, 3), 90, np.uint8))
        content = {
            "images": [{"id": i, "file_name": f"{i}.png", "width": 120, "height": 120} for i in range(1, images + 1)],
            "categories": [{"id": 3, "name": "cat"}, {"id": 8, "name": "dog"}],
            "annotations": [
                {"id": i, "image_id": image, "category_id": category, "bbox": box, "iscrowd": crowd, "area": 900}
                for i, (image, category, box, crowd) in enumerate(boxes, start=1)
            ],
        }
        (tmp_path / "set.json").write_text(json.dumps(content))
        return DetectionDataset(tmp_path / "set.json", tmp_path, 64)

    return make


def find(image, category, box, score=0.9):
    return {"image_id": image, "category_id": category, "bbox": box, "score": score}


# ---- the confusion matrix


def test_confusion_matrix_of_a_hand_made_case(labelled):
    """A cat is found and one is not; a dog is found as a cat and one is not; two dogs are found where nothing is."""
    a, b, c = SIDES.values()
    data = labelled([(1, 3, a, 0), (1, 8, b, 0), (1, 8, c, 0), (2, 3, a, 0)])
    found = [find(1, 3, a), find(1, 3, b), find(1, 8, [90, 90, 20, 20]), find(1, 8, c, score=0.2), find(2, 8, b)]
    assert confusion_matrix(found, data).tolist() == [[1, 0, 1], [1, 0, 1], [0, 2, 0]]
    assert confusion_matrix(found, data, score_threshold=0.1).tolist() == [[1, 0, 1], [1, 1, 0], [0, 2, 0]]


def test_each_box_is_matched_once_by_what_overlaps_it_most(labelled):
    data = labelled([(1, 3, [0, 0, 40, 40], 0)])
    worse, better = [4, 0, 40, 40], [1, 0, 40, 40]
    counts = confusion_matrix([find(1, 3, worse, 0.95), find(1, 8, better, 0.5)], data)
    assert counts.tolist() == [[0, 1, 0], [0, 0, 0], [1, 0, 0]]
    counts = confusion_matrix([find(1, 8, better, 0.4), find(1, 3, better, 0.6)], data)  # one box under two classes
    assert counts.tolist() == [[1, 0, 0], [0, 0, 0], [0, 1, 0]]


def test_crowds_and_images_that_cannot_be_read_do_not_count(labelled, tmp_path):
    crowd, a = [0, 50, 100, 60], SIDES["a"]
    data = labelled([(1, 3, crowd, 1), (1, 3, a, 0), (2, 3, a, 0)])
    inside = find(1, 3, [10, 60, 30, 30])
    assert confusion_matrix([inside], data).tolist() == [[0, 0, 2], [0, 0, 0], [0, 0, 0]]
    data.truth.unread[1] = True
    assert confusion_matrix([inside, find(2, 3, a)], data).tolist() == [[0, 0, 1], [0, 0, 0], [0, 0, 0]]


# ---- average precision


def test_the_table_of_average_precision_is_that_of_the_metrics(labelled):
    a, b, c = SIDES.values()
    data = labelled([(1, 3, a, 0), (2, 3, b, 0), (2, 8, c, 0), (1, 8, c, 1)])
    found = [find(1, 3, a, 0.9), find(2, 3, [62, 10, 40, 40], 0.8), find(2, 8, a, 0.7)]
    evaluation = coco_evaluation(found, data)
    metrics = metrics_of(evaluation, data.class_names).as_dict()
    *classes, together = precision_table(evaluation, data.class_names)
    assert {x["class"]: x["mAP"] for x in classes} == pytest.approx(metrics["per_class"])
    assert [x["boxes"] for x in (*classes, together)] == [2, 1, 3]  # a crowd is none
    for name in ("mAP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"):
        assert together[name] == pytest.approx(metrics[name]), name
    assert classes[0]["AP50"] == 1
    assert classes[1]["AP50"] == 0


def test_a_class_without_boxes_has_no_average_precision(labelled):
    data = labelled([(1, 3, SIDES["a"], 0)])
    evaluation = coco_evaluation([find(1, 3, SIDES["a"])], data)
    *_, dog, together = precision_table(evaluation, data.class_names)
    assert (dog["mAP"], dog["boxes"], together["mAP"]) == (None, 0, pytest.approx(1))
    figure = plots.recall_figure(evaluation, data.class_names)
    assert [x.get_text() for x in figure.legends[0].get_texts()] == ["cat, AP50 100.0", "mean, AP50 100.0"]
    plots.precision_figure([dog, together])


# ---- the files of a run


def test_a_run_leaves_what_one_looks_at(run):
    out = run.model_file.parent
    assert all((out / name).stat().st_size > 200 for name in PLOT_FILES)
    assert not list(out.glob("*.part")) + list(out.glob(".*.part"))
    for name in PLOT_FILES:
        assert name.endswith(".csv") or cv2.imread(str(out / name)) is not None, name


def test_results_are_the_log_and_the_metrics_of_the_run(run):
    out = run.model_file.parent
    found = rows(out / "results.csv")
    lines = [x for x in read_log(out / "metrics.jsonl") if "loss" in x]
    assert [int(x["step"]) for x in found] == [x["step"] for x in lines] == [1, 2, 3, 4]
    assert [float(x["loss"]) for x in found] == [x["loss"] for x in lines]
    assert [bool(x["mAP"]) for x in found] == [False, True, False, True]  # an epoch has two steps
    for name in ("mAP", "AP50", "AR100"):
        assert float(found[-1][name]) == getattr(run.metrics, name)


def test_the_table_of_a_run_has_the_average_precision_of_its_classes(run):
    *classes, together = rows(run.model_file.parent / "average_precision.csv")
    written = {x["class"]: float(x["mAP"]) if x["mAP"] else None for x in classes}
    assert written == pytest.approx(run.metrics.per_class)
    assert list(written) == list(CLASS_NAMES)
    assert float(together["mAP"]) == pytest.approx(run.metrics.mAP)


def test_eval_draws_the_same_as_the_run_and_overwrites_nothing(run, digits, tmp_path, capsys):
    command = ["eval", str(run.model_file), "--data", str(digits), "--cpu", "--plots", str(tmp_path / "seen")]
    assert main(command) == 0
    assert f"drawn: {tmp_path / 'seen' / OF_EVALUATION[0]}" in capsys.readouterr().out
    assert sorted(x.name for x in (tmp_path / "seen").iterdir()) == sorted(OF_EVALUATION)
    (tmp_path / "seen/pr_curves.png").unlink()
    assert main(command) == 2
    assert "confusion_matrix.png exists already" in capsys.readouterr().err
    assert not (tmp_path / "seen/pr_curves.png").exists()
    ours, theirs = (rows(x / "average_precision.csv")[-1] for x in (tmp_path / "seen", run.model_file.parent))
    assert float(ours["AP50"]) == pytest.approx(float(theirs["AP50"]), abs=0.02)


def test_without_plots_there_is_the_table_alone(config, tmp_path):
    train(replace(config, out=str(tmp_path), plots=False))
    assert [name for name in PLOT_FILES if (tmp_path / name).exists()] == ["results.csv"]


def test_a_run_without_validation_set_has_its_curves_and_batches(config, tmp_path):
    train(replace(config, out=str(tmp_path), val_annotations=None, val_images=None, steps=2))
    there = [name for name in PLOT_FILES if (tmp_path / name).exists()]
    assert there == ["results.csv", "results.png", *OF_BATCHES[:2]]


def test_a_resumed_run_has_no_row_twice(config, run, tmp_path, monkeypatch):
    original = RunLog.step

    def die(log, at, *args):
        if at == 4:
            raise KeyboardInterrupt
        original(log, at, *args)

    monkeypatch.setattr(RunLog, "step", die)
    with pytest.raises(KeyboardInterrupt):
        train(replace(config, out=str(tmp_path)))
    assert [x["step"] for x in rows(tmp_path / "results.csv")] == ["1", "2"]
    monkeypatch.setattr(RunLog, "step", original)
    first = (tmp_path / OF_BATCHES[0]).stat().st_mtime_ns
    train(replace(config, out=str(tmp_path), resume=True))
    assert (tmp_path / OF_BATCHES[0]).stat().st_mtime_ns == first
    whole = rows(run.model_file.parent / "results.csv")
    for a, b in zip(rows(tmp_path / "results.csv"), whole, strict=True):
        assert {k: v for k, v in a.items() if k != "images_per_second"} == {
            k: v for k, v in b.items() if k != "images_per_second"
        }
    train(replace(config, out=str(tmp_path), resume=True))  # which has nothing left to train
    assert len(rows(tmp_path / "results.csv")) == 4


def test_plots_that_cost_too_much_wait_for_the_end(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "evaluation_plots", lambda *_: (time.sleep(0.01), drawn.append(1)))
    monkeypatch.setattr(plots, "PLOT_SHARE", 0.0)
    of_run = RunPlots(tmp_path, ["a"], enabled=True)
    for last in (False, False, True):
        of_run.evaluation([], object(), object(), last=last)
        assert (tmp_path / "results.csv").is_file()
    assert len(drawn) == 2


# ---- images


def tile(image, column):
    left = column * (TILE + GAP)
    return image[CAPTION : CAPTION + TILE, left : left + TILE]


def test_labels_stand_beside_predictions_on_their_image(labelled):
    data = labelled([(1, 3, SIDES["a"], 0)], images=1)
    image = predictions_image([find(1, 8, SIDES["b"]), find(1, 8, SIDES["c"], score=0.1)], data)
    assert image.shape == (TILE + CAPTION, 2 * TILE + GAP, 3)
    for column, box in ((0, SIDES["a"]), (1, SIDES["b"])):
        shown, (x, y, width, height) = tile(image, column), (round(v * TILE / 120) for v in box)
        coloured = np.argwhere((shown != 90).any(2))
        assert coloured.max(0).tolist() == pytest.approx([y + height, x + width], abs=2)
        assert coloured[:, 1].min() == pytest.approx(x, abs=2)


def test_an_image_that_cannot_be_read_leaves_its_place_to_the_next(labelled, tmp_path):
    data = labelled([(1, 3, SIDES["a"], 0)], images=3)
    (tmp_path / "1.png").unlink()
    assert predictions_image([], data, count=1).shape[1] == 2 * TILE + GAP
    for file in tmp_path.glob("*.png"):
        os.unlink(file)
    assert predictions_image([], data) is None


def test_a_batch_is_drawn_as_the_network_gets_it():
    images = torch.full((5, 3, 32, 32), 0.5)
    drawn = batch_image(images, torch.tensor([[4.0, 1, 8, 8, 24, 24]]), ("cat", "dog"))
    assert drawn.shape == (2 * (TILE + CAPTION) + GAP, 4 * TILE + 3 * GAP, 3)
    second_row = drawn[TILE + CAPTION + GAP + CAPTION :, :TILE]
    coloured = np.argwhere((second_row != 128).any(2))
    assert coloured.max(0).tolist() == pytest.approx([300, 300], abs=2)
    assert not (tile(drawn, 0) != 128).any()
    many = batch_image(torch.rand(40, 3, 32, 32), torch.zeros(0, 6), ("cat",))
    assert many.shape[0] == 4 * (TILE + CAPTION + GAP) - GAP
