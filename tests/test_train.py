"""Training: the promises of a run about its files, its batches, resuming and errors."""

import json
import math
import os
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from fastkd import priors
from fastkd.distiller import takes_output
from fastkd.yolov3 import YOLOv3, YOLOv3Tiny
from fastkd.yolov3.boxes import likely_boxes
from fastkd.yolov3.checkpoint import load_detector, save_detector
from fastkd.yolov3.data.dataset import DetectionDataset, read_image
from fastkd.yolov3.data.digits import CLASS_NAMES, write_digits
from fastkd.yolov3.show.inspect import inspect_run, level_loss_figure
from fastkd.yolov3.show.predict import detect_objects
from fastkd.yolov3.train.config import TrainConfig, read_config
from fastkd.yolov3.train.log import RunLog, read_log
from fastkd.yolov3.train.objective import Objective
from fastkd.yolov3.train.pseudo_labels import pseudo_labels
from fastkd.yolov3.train.run import (
    _Run,
    batches,
    build_objective,
    check_distillation,
    load_checkpoint,
    train,
    training_set,
    unlabelled_batches,
    unlabelled_set,
    validation_set,
)


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("data") / "digits", train=10, val=4, test=1)


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """Return a teacher's file; its weights are random, but its batch norms have seen images."""
    torch.manual_seed(1)
    model = YOLOv3(num_classes=10, width=0.125, anchors=[[20, 30], [25, 35], [30, 40]] * 3)
    with torch.no_grad():
        for _ in range(5):
            model(torch.rand(4, 3, 64, 64))
    path = tmp_path_factory.mktemp("teacher") / "model.pt"
    save_detector(model, path, CLASS_NAMES, 64)
    return path


@pytest.fixture
def config(digits, tmp_path):
    """Return a configuration of three epochs of three steps on ten small scenes."""
    return TrainConfig(
        annotations=str(digits / "annotations/train.json"),
        images=str(digits / "images/train"),
        out=str(tmp_path / "run"),
        model="yolov3-tiny",
        width=0.125,
        size=64,
        batch=4,
        epochs=3,
        warmup=2,
        log_every=2,
        eval_every=0,
        tensorboard=False,
        plots=False,
        cpu=True,
    )


def with_val(config: TrainConfig, digits: Path) -> TrainConfig:
    return replace(config, val_annotations=str(digits / "annotations/val.json"), val_images=str(digits / "images/val"))


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Make the next training run fail in this step, once."""
    original = RunLog.step

    def die(log, at, *args):
        if at == step:
            monkeypatch.setattr(RunLog, "step", original)
            raise KeyboardInterrupt
        original(log, at, *args)

    monkeypatch.setattr(RunLog, "step", die)


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- resumption


@pytest.mark.parametrize("passes", [{}, {"teacher_every": 2, "teacher_images": 0.5, "multi_scale": 0.5}])
def test_a_killed_and_resumed_run_ends_with_the_same_bits(config, teacher, tmp_path, monkeypatch, passes):
    config = replace(config, teacher=str(teacher), distill_warmup=4, **passes)
    whole = train(replace(config, out=str(tmp_path / "whole")))
    for step in (2, 5, 8):  # before the first checkpoint, and in the middle of two epochs
        kill_at(monkeypatch, step)
        with pytest.raises(KeyboardInterrupt):
            train(replace(config, resume=True))
    resumed = train(replace(config, resume=True))

    assert same(weights(whole.model_file), weights(resumed.model_file))
    states = [torch.load(tmp_path / out / "checkpoint.pt", weights_only=True) for out in ("whole", "run")]
    for part in ("student", "distiller"):
        a, b = ({k: v for k, v in s[part].items() if isinstance(v, torch.Tensor)} for s in states)
        assert same(a, b), part
    logs = [read_log(tmp_path / out / "metrics.jsonl") for out in ("whole", "run")]
    assert [x["step"] for x in logs[0]] == [x["step"] for x in logs[1]]
    assert [x["loss"] for x in logs[0]] == [x["loss"] for x in logs[1]]


def test_resuming_a_finished_run_trains_nothing_more(config, digits, tmp_path):
    config = with_val(config, digits)
    first = train(config)
    before = weights(first.model_file)
    again = train(replace(config, resume=True))
    assert same(before, weights(again.model_file))
    assert (again.steps, again.seconds) == (first.steps, first.seconds)
    assert again.metrics == first.metrics
    assert sum("metrics" in line for line in read_log(first.model_file.with_name("metrics.jsonl"))) == 1


def test_a_run_that_was_killed_in_its_last_evaluation_logs_it_when_resumed(config, digits, monkeypatch):
    config = with_val(config, digits)
    with monkeypatch.context() as patch:
        patch.setattr("fastkd.yolov3.train.run.detect_all", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(config)
    resumed = train(replace(config, resume=True))
    last = read_log(resumed.model_file.with_name("metrics.jsonl"))[-1]
    assert last == {"step": 9, "metrics": resumed.metrics.as_dict()}


def test_a_run_is_not_overwritten(config):
    train(replace(config, steps=1))
    with pytest.raises(FileExistsError, match="--resume"):
        train(replace(config, steps=1))


def test_resuming_with_another_configuration_names_what_differs(config):
    train(replace(config, steps=1))
    with pytest.raises(ValueError, match=r"lr \(0.001 then, 0.01 now\)"):
        train(replace(config, steps=1, lr=0.01, workers=0, resume=True))


def test_resuming_with_other_weights_at_the_teachers_path_is_refused(config, teacher, tmp_path):
    path = tmp_path / "teacher.pt"
    found = load_detector(teacher)
    save_detector(found.model, path, found.class_names, config.size)
    run = replace(config, teacher=str(path), steps=1)
    train(run)
    assert train(replace(run, resume=True)).steps == 1
    next(found.model.parameters()).data.mul_(2)
    save_detector(found.model, path, found.class_names, config.size)
    with pytest.raises(ValueError, match=r"teacher: expected the weights that this run has learnt from.* \w{16}, got"):
        train(replace(run, resume=True))
    with pytest.raises(ValueError, match="teacher: expected the weights that this run has learnt from"):
        check_distillation(run)


def test_log_after_a_resume_has_no_line_twice_and_no_broken_line(config, tmp_path, monkeypatch):
    kill_at(monkeypatch, 6)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    file = tmp_path / "run" / "metrics.jsonl"
    assert [x["step"] for x in read_log(file)] == [2, 3, 4]  # the checkpoint is of step 3
    with file.open("a") as log:
        log.write('{"step": 5, "lo')
    train(replace(config, resume=True))
    lines = file.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 3, 4, 6, 8, 9]


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(config, tmp_path, monkeypatch):
    run = tmp_path / "run"
    kill_at(monkeypatch, 4)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    kept = (run / "checkpoint.pt").read_bytes()

    def full_disk(content, path):
        Path(path).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(
        OSError, match=r"could not be written: no space left; .* MB are free there; to continue from .*checkpoint"
    ):
        train(replace(config, resume=True))
    assert (run / "checkpoint.pt").read_bytes() == kept
    assert not list(run.glob(".*.part"))


def test_paths_may_be_spelt_otherwise_when_a_run_is_resumed(config, tmp_path, monkeypatch):
    kill_at(monkeypatch, 4)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    annotations = os.path.relpath(config.annotations)
    assert train(replace(config, annotations=annotations, resume=True)).steps == 9


# ---- batches


def test_batches_do_not_depend_on_where_a_run_begins_or_on_workers(config):
    whole = list(batches(training_set(config), config, 0, 5))
    tail = list(batches(training_set(config), config, 3, 5))
    workers = list(batches(training_set(config), replace(config, workers=2), 0, 5))
    for a, b in [*zip(whole[3:], tail, strict=True), *zip(whole, workers, strict=True)]:
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.targets, b.targets)


def test_an_epoch_shows_every_image_once_and_the_next_in_another_order(config):
    data = training_set(config)
    seen = [i for batch in batches(data, config, 0, 5) for i in batch.image_ids]  # 20 images: two epochs of ten
    assert sorted(seen[:10]) == sorted(seen[10:]) == sorted(data.annotations.image_ids.tolist())
    assert seen[:10] != seen[10:]


def test_ranks_share_a_batch_without_overlap(config):
    data = training_set(config)
    whole = next(batches(data, config, 0, 1)).image_ids
    parts = [next(batches(data, config, 0, 1, rank=r, ranks=2)).image_ids for r in range(2)]
    assert sorted(parts[0] + parts[1]) == sorted(whole)
    assert len(parts[0]) == len(parts[1])


def test_fewer_images_than_a_batch_still_fill_it(config):
    config = replace(config, limit=3, batch=8, epochs=2, anchors="default")
    assert [len(b.images) for b in batches(training_set(config), config, 0, 2)] == [8, 8]
    assert train(config).steps == 2


# ---- what is trained


def test_a_detector_learns_a_few_scenes_by_heart(config, digits):
    config = replace(config, limit=4, width=0.25, steps=130, lr=4e-3, augmentation=None, cache=True, save_every=99)
    config = replace(config, val_annotations=str(_first(digits, 4)), val_images=config.images)
    result = train(config)
    assert result.metrics.AP50 > 0.8


def _first(digits: Path, count: int) -> Path:
    content = json.loads((digits / "annotations/train.json").read_text())
    content["images"] = content["images"][:count]
    kept = {image["id"] for image in content["images"]}
    content["annotations"] = [x for x in content["annotations"] if x["image_id"] in kept]
    file = digits / f"annotations/first_{count}.json"
    file.write_text(json.dumps(content))
    return file


def test_a_teacher_does_not_change_the_weights_that_a_student_starts_from(config, teacher):
    data = training_set(config)
    plain = build_objective(config, data).student.state_dict()
    distilled = build_objective(replace(config, teacher=str(teacher)), data).student.state_dict()
    assert same(plain, distilled)


def test_distillation_moves_student_and_adapters_but_not_the_teacher(config, teacher, tmp_path):
    before = teacher.read_bytes()
    config = replace(config, teacher=str(teacher), steps=2)
    data = training_set(config)
    objective = build_objective(config, data)
    teacher_weights = {k: v.clone() for k, v in objective.distiller.teacher.state_dict().items()}
    initial = {k: v.clone() for k, v in objective.distiller.state_dict().items() if isinstance(v, torch.Tensor)}
    objective.train()
    batch = next(batches(data, config, 0, 1))
    objective(batch.images, batch.targets)[0].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in objective.distiller.parameters())
    assert all(p.grad is not None for p in objective.student.parameters())
    assert same(teacher_weights, objective.distiller.teacher.state_dict())

    train(config)
    after = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["distiller"]
    assert any(not torch.equal(initial[name], after[name]) for name in initial if "adapters" in name)
    assert teacher.read_bytes() == before


def test_reported_terms_add_up_to_the_loss(config, teacher):
    config = replace(config, teacher=str(teacher), distill_weight=40.0)
    data = training_set(config)
    objective = build_objective(config, data).train()
    batch = next(batches(data, config, 0, 1))
    loss, values = objective(batch.images, batch.targets)
    terms = dict(zip(objective.terms, values.tolist(), strict=True))
    parts = [terms[name] for name in ("box", "objectness", "class", "distill")]
    assert terms["loss"] == pytest.approx(loss.item())
    assert sum(parts) == pytest.approx(loss.item(), rel=1e-5)
    levels = [value for name, value in terms.items() if name.startswith("distill/")]
    assert len(levels) == 5
    assert 40 * sum(levels) == pytest.approx(terms["distill"], rel=1e-5)


def test_check_of_a_run_finds_distillation_on(config, teacher):
    config = replace(config, teacher=str(teacher))
    report = check_distillation(config)
    # its weights are random, but look trained to the check
    assert [check.name for check in report.checks if check.ok is False] == ["teacher scores"]
    assert "AP50 0.0 on the first 10 images of the training set" in str(report)
    with pytest.raises(ValueError, match="expected a run that imitates a teacher, got one that does not"):
        check_distillation(replace(config, teacher=None))


def test_an_untrained_teacher_is_warned_about(config, tmp_path):
    save_detector(YOLOv3(num_classes=10, width=0.125), tmp_path / "fresh.pt", CLASS_NAMES, 64)
    with pytest.warns(UserWarning, match="initial weights"):
        train(replace(config, teacher=str(tmp_path / "fresh.pt"), steps=1))


def test_without_averaging_the_last_weights_are_exported(config, tmp_path):
    result = train(replace(config, ema=0.0))
    last = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["student"]
    exported = weights(result.model_file)
    floats = {name for name, value in last.items() if value.is_floating_point()}
    assert all(torch.equal(exported[name], last[name]) for name in floats)


def test_exported_weights_are_the_moving_average_of_each_steps(config, monkeypatch):
    history = []
    original = RunLog.step

    def remember(log, step, *args):
        history.append(log.student.conv8.conv.weight.detach().clone())
        original(log, step, *args)

    monkeypatch.setattr(RunLog, "step", remember)
    monkeypatch.setattr(RunLog, "student", None, raising=False)
    opened = _Run._open_log
    monkeypatch.setattr(_Run, "_open_log", lambda run: setattr(log := opened(run), "student", run.student) or log)
    average = build_objective(config, training_set(config)).student.conv8.conv.weight.detach().clone()
    result = train(replace(config, lr=1e-2, ema=0.9))
    for step, weight in enumerate(history):
        average.lerp_(weight, 1 - min(0.9, (1 + step) / (10 + step)))
    torch.testing.assert_close(weights(result.model_file)["conv8.conv.weight"], average)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_mixed_precision_trains(config, teacher, optimizer):
    result = train(replace(config, teacher=str(teacher), mixed_precision="bf16", optimizer=optimizer, steps=3))
    assert all(value.isfinite().all() for value in weights(result.model_file).values())
    assert all(value.dtype in (torch.float32, torch.int64) for value in weights(result.model_file).values())


def test_learning_rate_warms_up_and_falls_as_a_cosine(config, tmp_path):
    train(replace(config, lr=1.0e-3, warmup=4, steps=9, log_every=1, final_lr=0.1))
    rates = [x["lr"] for x in read_log(tmp_path / "run/metrics.jsonl")]
    assert rates[:5] == pytest.approx([0.0002, 0.0004, 0.0006, 0.0008, 0.001])
    expected = 0.0001 + 0.0009 * (1 + math.cos(math.pi * 4 / 5)) / 2
    assert rates[-1] == pytest.approx(expected)


# ---- files


def test_the_exported_student_is_alone_and_computes_the_same_everywhere(config, digits, teacher, tmp_path):
    result = train(replace(with_val(config, digits), teacher=str(teacher), steps=2))
    content = torch.load(result.model_file, weights_only=True)
    assert set(content["state_dict"]) == set(YOLOv3Tiny(num_classes=10, width=0.125).state_dict())
    assert content["class_names"] == list(CLASS_NAMES)
    loaded = load_detector(result.model_file)
    darknet = load_detector(
        result.model_file.with_suffix(".weights"),
        model="yolov3-tiny",
        num_classes=10,
        width=0.125,
        anchors=loaded.model.anchors,
    )
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        trained, again, from_darknet = (model(images) for model in (result.model, loaded.model, darknet.model))
    for a, b, c in zip(trained, again, from_darknet, strict=True):
        torch.testing.assert_close(a, b)  # the trained model has another memory layout
        assert torch.equal(b, c)
    assert (loaded.class_names, loaded.size) == (CLASS_NAMES, 64)


def test_a_trained_file_is_a_start_for_another_run(config, tmp_path):
    first = train(replace(config, steps=2))
    again = replace(config, init=str(first.model_file), out=str(tmp_path / "again"))
    assert same(
        build_objective(again, training_set(again)).student.state_dict(),
        weights(first.model_file),
    )
    with pytest.raises(ValueError, match=r"init: expected a yolov3-tiny of width 0\.25"):
        train(replace(again, width=0.25))


def convolutions_kept(config, file):
    """Return the initial student of a run from this file, the names of its new tensors, and the line about them."""
    reported = []
    student = build_objective(replace(config, init=str(file)), training_set(config), on_init=reported.append).student
    theirs = load_detector(file).model.state_dict()
    ours = student.state_dict()
    new = [k for k, x in theirs.items() if x.shape != ours[k].shape or not torch.equal(x, ours[k])]
    return student, new, " ".join(reported)


HEADS = ["head32.weight", "head32.bias", "head16.weight", "head16.bias"]


@pytest.mark.parametrize("suffix", ["pt", "weights"])
@pytest.mark.parametrize("names", [("a", "b", "c"), CLASS_NAMES[::-1]])
def test_a_start_of_other_classes_has_new_heads_alone_and_anchors_of_the_data(config, tmp_path, names, suffix):
    torch.manual_seed(3)
    file = tmp_path / f"other.{suffix}"
    trained = YOLOv3Tiny(len(names), 0.125, [[50.0, 60]] * 6)
    for parameter in trained.parameters():
        parameter.detach().add_(0.01)
    save_detector(trained, file, names, 64)
    student, new, reported = convolutions_kept(config, file)
    assert new == ["anchors", *HEADS]
    assert student.num_classes == 10
    assert torch.equal(student.anchors, build_objective(config, training_set(config)).student.anchors)
    assert reported.startswith(f"init: kept 11 of 13 convolutions of {file} (")
    assert reported.endswith("; new: the last one of each of the 2 heads, for 10 classes; anchors: of the data")
    student, new, reported = convolutions_kept(replace(config, anchors="default"), file)
    assert new == HEADS
    assert reported.endswith("anchors: those of the file")


def test_a_start_of_the_same_classes_is_kept_whole(config, tmp_path):
    save_detector(YOLOv3Tiny(10, 0.125), tmp_path / "same.pt", CLASS_NAMES, 64)
    _, new, reported = convolutions_kept(config, tmp_path / "same.pt")
    assert new == []
    assert reported == f"init: kept all 13 convolutions of {tmp_path / 'same.pt'}"


@pytest.mark.filterwarnings("ignore:anchors. those of")
@pytest.mark.parametrize("anchors", [None, "data", "default"])
@pytest.mark.parametrize("names", [("a", "b", "c"), CLASS_NAMES])
def test_a_start_may_have_another_number_of_anchors(config, tmp_path, names, anchors):
    save_detector(YOLOv3Tiny(len(names), 0.125, [[20.0, 30]] * 4), tmp_path / "two.pt", names, 64)
    result = train(replace(config, init=str(tmp_path / "two.pt"), anchors=anchors, steps=1))
    assert result.model.anchors.shape == (2, 2, 2)


def test_a_start_that_does_not_fit_is_refused_by_what_differs(config, tmp_path):
    save_detector(YOLOv3Tiny(3, 0.25), tmp_path / "wide.weights", ("a", "b", "c"))
    with pytest.raises(ValueError, match=r"width: expected 0\.25 as in .*wide\.cfg, got 0\.125"):
        train(replace(config, init=str(tmp_path / "wide.weights")))
    save_detector(YOLOv3(3, 0.125), tmp_path / "large.pt", ("a", "b", "c"))
    with pytest.raises(ValueError, match=r"init: expected a yolov3-tiny of width 0\.125, got .* with YOLOv3 of"):
        train(replace(config, init=str(tmp_path / "large.pt")))


def test_a_run_says_once_what_it_begins_with(config, tmp_path, capsys):
    save_detector(YOLOv3Tiny(3, 0.125), tmp_path / "other.pt", ("a", "b", "c"), 64)
    config = replace(config, init=str(tmp_path / "other.pt"), steps=1)
    train(config)
    assert capsys.readouterr().out.count("init: kept 11 of 13 convolutions") == 1
    train(replace(config, resume=True))
    assert "init:" not in capsys.readouterr().out


def test_a_teacher_of_other_classes_is_refused_by_name(config, tmp_path):
    save_detector(YOLOv3Tiny(3, 0.125), tmp_path / "other.weights", ("a", "b", "c"))
    with pytest.raises(ValueError, match=r"teacher: expected the data set's 10 classes .*, got 3: a, b, c"):
        train(replace(config, teacher=str(tmp_path / "other.weights")))


def test_configuration_can_be_read_back(config, tmp_path):
    train(replace(config, steps=1))
    assert read_config(tmp_path / "run") == replace(config, steps=1)
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        read_config(tmp_path)


def test_tensorboard_curves_are_written(config, tmp_path):
    train(replace(config, steps=2, tensorboard=True))
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))


def test_tensorboard_shows_what_distillation_looks_at(config, teacher, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(replace(config, steps=2, tensorboard=True, teacher=str(teacher)))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert set(events.Tags()["images"]) == {"distillation/maps", "distillation/differences"}
    assert [x.step for x in events.Images("distillation/maps")] == [2]


def test_curves_of_a_finished_run_stay_when_it_is_resumed(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first in (0, 2):
        log = RunLog(tmp_path, ["loss"], first=first, last=2, batch=1, every=1)
        for step in range(first + 1, 3):
            log.step(step, 0, torch.ones(1), 0.1)
        log.metrics(2, {"mAP": 0.5}, "")
        log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [x.step for x in events.Scalars("loss/loss")] == [1, 2]
    assert [x.step for x in events.Scalars("val/mAP")] == [2]


def test_figures_that_cost_too_much_wait_for_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr("fastkd.yolov3.train.log.FIGURE_SHARE", 0.0)
    log = RunLog(tmp_path, ["loss"], first=0, last=3, batch=1, every=1)
    drawn = []
    for step in (1, 2, 3):
        log.figures(step, lambda step=step: drawn.append(step) or {})
    log.close()
    assert drawn == [1, 3]


# ---- errors


def test_a_loss_that_is_not_finite_stops_the_run_and_is_named(config, teacher, tmp_path):
    def damage(detector):
        detector.neck32.conv.weight.data.fill_(math.nan)

    config = replace(config, teacher=str(teacher), info_map="self_information")
    with (
        pytest.warns(UserWarning, match="distillation may not work"),
        pytest.raises(
            FloatingPointError, match=r"the distill, .* loss is not finite at step 1 .*no checkpoint had been"
        ),
    ):
        train(config, on_teacher=damage)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_weights_that_are_not_finite_reach_no_file(config, tmp_path):
    with pytest.raises(FloatingPointError, match="weights are not finite after step 1"):
        train(replace(config, steps=1, lr=1e38, weight_decay=10.0, warmup=0))
    assert not (tmp_path / "run" / "checkpoint.pt").exists()
    assert not (tmp_path / "run" / "model.pt").exists()


def test_a_validation_set_of_other_classes_is_refused_before_training(config, digits, tmp_path):
    content = json.loads((digits / "annotations/val.json").read_text())
    content["categories"][0]["name"] = "nought"
    (tmp_path / "val.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"val_annotations: expected the training set's classes 0, 1.*got nought"):
        train(replace(with_val(config, digits), val_annotations=str(tmp_path / "val.json")))


def test_too_few_boxes_to_choose_anchors_by_have_a_way_out(config):
    with pytest.raises(ValueError, match=r"anchors: expected enough boxes .* got 6\); use anchors='default'"):
        train(replace(config, limit=1))


def test_a_teacher_of_other_classes_is_refused(config, tmp_path):
    for classes, names in ((3, "abc"), (10, "0123456798")):
        save_detector(YOLOv3(num_classes=classes, width=0.125), tmp_path / "other.pt", tuple(names), 64)
        with pytest.raises(ValueError, match=r"teacher: expected the data set's 10 classes 0, 1, 2"):
            train(replace(config, teacher=str(tmp_path / "other.pt")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "yolov5"}, "model: expected one of yolov3, yolov3-tiny; got 'yolov5'"),
        ({"batch": 0}, "batch: expected a number >= 1, got 0"),
        ({"lr": -1.0}, "lr: expected a finite number > 0"),
        ({"ema": 1.0}, r"ema: expected a number in \[0, 1\)"),
        ({"multi_scale": 1.0}, r"multi_scale: expected a number in \[0, 1\), got 1.0"),
        ({"distill_stop": 0}, "distill_stop: expected None or an epoch >= 1"),
        ({"teacher_every": 0}, "teacher_every: expected an integer >= 1, got 0"),
        ({"teacher_images": 0.7}, "teacher_images: expected 1 or 1 divided by a whole number"),
        ({"val_annotations": "val.json"}, "val_images"),
        ({"mixed_precision": "fp8"}, "mixed_precision: expected one of no, bf16, fp16"),
    ],
)
def test_a_wrong_value_is_named(config, options, message):
    with pytest.raises(ValueError, match=message):
        replace(config, **options)


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("absent.pt", None, FileNotFoundError, "no such file"),
        ("model.onnx", b"", ValueError, "ends in .pt or .weights"),
        ("broken.pt", b"PK not a zip", ValueError, "is the file complete"),
        ("other.pt", {"weights": 1}, ValueError, "expected a detector's file.*got a dict with weights"),
        ("code.pt", {"model": print}, ValueError, "contains code besides weights.*weights_only=True"),
        ("module.pt", nn.Linear(1, 1), ValueError, "contains code besides weights"),
    ],
)
def test_a_file_that_is_no_detector_is_refused(tmp_path, name, content, error, message):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(error, match=message):
        load_detector(path)


def test_a_teacher_file_that_is_cut_off_or_of_another_model_is_refused(teacher, tmp_path):
    content = teacher.read_bytes()
    (tmp_path / "half.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"half\.pt: not readable as a detector's file.*is the file complete"):
        load_detector(tmp_path / "half.pt")
    other = torch.load(teacher) | {"width": 0.25}
    torch.save(other, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt: its weights do not fit the yolov3 that it names"):
        load_detector(tmp_path / "other.pt")


def test_unlabelled_images_are_explained_by_the_teacher_alone(config, digits, teacher):
    config = replace(config, teacher=str(teacher), unlabelled=str(digits / "images/train"), unlabelled_batch=3)
    data = training_set(config)
    batch, more = (
        next(batches(data, config, 0, 1)),
        next(unlabelled_batches(unlabelled_set(config), config, 0, 1)).images,
    )
    assert more.shape == (3, 3, config.size, config.size)
    objective = build_objective(config, data).eval()  # in training mode, batch norm would mix the images

    def terms(unlabelled):
        return dict(zip(objective.terms, objective(batch.images, batch.targets, unlabelled)[1].tolist(), strict=True))

    alone, together = terms(None), terms(more)
    for name in ("box", "objectness", "class"):
        assert together[name] == pytest.approx(alone[name], rel=1e-5)
    assert together["distill/conv16"] != pytest.approx(alone["distill/conv16"], rel=1e-5)


@pytest.mark.parametrize("labels", [{}, {"pseudo_labels": 0.01}])
def test_a_run_with_unlabelled_images_resumes_to_the_same_bits(config, digits, teacher, tmp_path, monkeypatch, labels):
    options = {"teacher": str(teacher), "unlabelled": str(digits / "images/train"), "unlabelled_batch": 2}
    config = replace(config, **options | labels)
    whole = train(replace(config, out=str(tmp_path / "whole")))
    with monkeypatch.context() as killed:
        kill_at(killed, 5)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    resumed = train(replace(config, resume=True))
    assert same(weights(whole.model_file), weights(resumed.model_file))


def test_pseudo_labels_are_the_teachers_detections_in_each_image(digits, tmp_path):
    torch.manual_seed(3)
    model = YOLOv3Tiny(num_classes=10, width=0.125).eval()
    for name in ("000001.png", "000002.png"):
        shutil.copy(digits / "images/train" / name, tmp_path)
    cv2.imwrite(str(tmp_path / "wide.png"), read_image(tmp_path / "000001.png")[:40])
    data = DetectionDataset.of_images(tmp_path, 64)
    files = [data.annotations.path(i) for i in range(len(data))]
    everything = [detect_objects(model, read_image(file), 64, score_threshold=1e-5) for file in files]
    scores = torch.cat([x.scores for x in everything]).sort(descending=True).values[:50]
    gap = int((scores[:-1] - scores[1:]).argmax())  # far from every score, as those of a batch are rounded differently
    least = float(scores[gap : gap + 2].mean())

    labels = pseudo_labels(data, model, CLASS_NAMES, score_threshold=least)
    assert len(labels) == 3
    for row, found in enumerate(everything):
        sides = (found.boxes[:, 2:] - found.boxes[:, :2]).min(1).values
        kept = (found.scores >= least) & (sides >= 1)  # boxes that are cut off to less than a pixel are left out
        corners = np.concatenate([labels.boxes[:, :2], labels.boxes[:, :2] + labels.boxes[:, 2:]], 1)[labels.of(row)]
        np.testing.assert_allclose(corners, found.boxes[kept].numpy(), atol=1e-3)
        assert labels.classes[labels.of(row)].tolist() == found.classes[kept].tolist()
    with pytest.raises(ValueError, match=r"pseudo_labels: expected a score that .* got 0\.999, which none reaches in"):
        pseudo_labels(data, model, CLASS_NAMES, score_threshold=0.999)


def test_with_pseudo_labels_the_detection_loss_uses_the_unlabelled_images(config, digits, teacher):
    seen = []

    class Seeing(Objective):
        def forward(self, images, targets, unlabelled=None):
            seen.append((len(images), set(targets[:, 0].int().tolist()), unlabelled))
            return super().forward(images, targets, unlabelled)

    options = {"teacher": str(teacher), "unlabelled": str(digits / "images/train"), "steps": 2, "pseudo_labels": 0.01}
    config = replace(config, **options)
    train(config, make_objective=Seeing)
    assert all(count == 8 and of_image > {5, 6, 7} and more is None for count, of_image, more in seen)

    written = DetectionDataset(Path(config.out) / "pseudo_labels.json", config.unlabelled, config.size)
    expected = pseudo_labels(unlabelled_set(config), load_detector(teacher).model, CLASS_NAMES, score_threshold=0.01)
    np.testing.assert_allclose(written.annotations.boxes, expected.boxes, atol=1e-3)


def test_a_teacher_may_give_pseudo_labels_alone(config, digits, teacher, tmp_path):
    options = {"teacher": str(teacher), "unlabelled": str(digits / "images/train"), "steps": 2, "pseudo_labels": 0.01}
    config = replace(config, **options, distill_stop=0)
    assert build_objective(config, training_set(config)).distiller is None
    train(config)
    assert "distill" not in read_log(Path(config.out) / "metrics.jsonl")[-1]
    with pytest.raises(ValueError, match="this run imitates no teacher, so there are no maps"):
        inspect_run(config.out, count=1)


def test_pseudo_labels_want_images_and_a_score(config):
    with pytest.raises(ValueError, match="pseudo_labels: expected unlabelled too"):
        replace(config, teacher="teacher.pt", pseudo_labels=0.3)
    config = replace(config, teacher="teacher.pt", unlabelled="images")
    with pytest.raises(ValueError, match=r"pseudo_labels: expected None or a score between 0 and 1, got 1\.5"):
        replace(config, pseudo_labels=1.5)
    with pytest.raises(ValueError, match="distill_stop: expected None or an epoch >= 1, or pseudo_labels too, got 0"):
        replace(config, distill_stop=0)
    with pytest.raises(ValueError, match="distill_decay: expected None, as distill_stop is 0, got 'linear'"):
        replace(config, pseudo_labels=0.3, distill_stop=0, distill_decay="linear")


def test_unlabelled_images_want_a_teacher(config):
    with pytest.raises(ValueError, match="unlabelled: expected a teacher too"):
        replace(config, unlabelled="images")
    with pytest.raises(ValueError, match="unlabelled_batch: expected unlabelled too, got 4"):
        replace(config, teacher="teacher.pt", unlabelled_batch=4)


def test_a_folder_of_unlabelled_images_that_is_absent_leaves_no_run(config, teacher, tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        train(replace(config, teacher=str(teacher), unlabelled=str(tmp_path / "absent")))
    assert not Path(config.out).exists()


def test_a_prior_of_boxes_is_that_of_the_batch(config, teacher):
    run = replace(config, teacher=str(teacher), steps=1)
    data = training_set(run)
    batch = next(batches(data, run, 0, 1))
    boxes, sizes = batch.targets[:, [0, 2, 3, 4, 5]], [(8, 8), (4, 4), (2, 2), (4, 4), (2, 2)]

    def maps(**options):
        objective = build_objective(replace(run, **options), data)
        anchors = [objective.distiller.teacher.anchors[i] for i in (0, 1, 2, 1, 2)]
        prior = objective.prior_of(batch.images, batch.targets)
        return objective.distiller.maps(batch.images, prior).information, anchors

    masked, anchors = maps(info_map="fgfi")
    torch.testing.assert_close(masked, priors.iou_mask(boxes, anchors, sizes, (64, 64), 4))
    graded = maps(info_map="uniform", prior="graded_iou")[0]
    torch.testing.assert_close(graded, priors.iou_mask(boxes, anchors, sizes, (64, 64), 4, graded=True))
    balanced, plain = (maps(info_map="self_information", prior=x)[0] for x in ("box_balance", "none"))
    q = priors.box_balance(boxes, sizes, (64, 64), 4)
    torch.testing.assert_close(balanced, [x * y for x, y in zip(plain, q, strict=True)])


def test_levels_have_their_factors(config, teacher, tmp_path):
    run = replace(config, teacher=str(teacher), steps=1, level_weights=(1.0, 0.0, 2.0, 0.0, 0.0), log_every=1)
    train(run)
    assert read_config(run.out) == run
    (entry,) = [x for x in read_log(Path(run.out) / "metrics.jsonl") if "distill" in x]
    losses = [value for name, value in entry.items() if name.startswith("distill/")]
    assert [bool(x) for x in losses] == [True, False, True, False, False]
    with pytest.raises(ValueError, match=r"weights: expected .*5.*2"):
        train(replace(run, level_weights=(1.0, 1.0), out=str(tmp_path / "other")))
    with pytest.raises(ValueError, match="level_weights: expected None or finite numbers"):
        replace(run, level_weights=(1.0, math.nan))


def test_a_run_without_a_teacher_resumes_whatever_the_map_would_be(config):
    train(config := replace(config, steps=1))
    train(replace(config, info_map="uniform", distill_share=2.0, resume=True))
    with pytest.raises(ValueError, match=r"resume: .* got another lr"):
        train(replace(config, lr=1e-5, resume=True))


def test_a_map_that_is_its_prior_alone_has_it_or_is_refused(config):
    usual = {"score": "score", "fgfi": "iou_mask", "graded_iou": "graded_iou", "energy": "none", "uniform": "none"}
    assert {name: replace(config, info_map=name).effective_prior for name in usual} == usual
    assert replace(config, info_map="score", prior="iou_mask").effective_prior == "iou_mask"
    with pytest.raises(
        ValueError,
        match=r"prior: expected one of .*info_map 'graded_iou' takes the weights of the cells from it, got 'none'",
    ):
        replace(config, prior="none", teacher="teacher.pt")
    assert replace(config, prior="none").teacher is None  # without distillation it does not matter


def test_the_check_of_a_map_of_boxes_looks_at_images_that_have_some(config, teacher, digits, tmp_path):
    content = json.loads(Path(config.annotations).read_text())
    content["annotations"] = [x for x in content["annotations"] if x["image_id"] > content["images"][5]["id"]]
    (tmp_path / "late.json").write_text(json.dumps(content))
    run = replace(config, annotations=str(tmp_path / "late.json"), teacher=str(teacher), steps=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "distillation may not work")
        train(run)


def test_images_without_labels_have_the_boxes_that_the_teacher_finds(config, teacher):
    run = replace(config, teacher=str(teacher), info_map="fgfi")
    data = training_set(run)
    batch, objective = next(batches(data, run, 0, 1)), build_objective(run, data)
    outputs = [torch.full_like(x, -9) for x in objective.distiller.teacher(batch.images)]
    outputs[0][1, 4, 3, 5] = outputs[0][1, 5, 3, 5] = outputs[0][3, 4, 6, 2] = outputs[0][3, 5, 6, 2] = 9
    found = likely_boxes(outputs, objective.distiller.teacher)
    sizes, labels = [(8, 8)], batch.targets[:, [0, 2, 3, 4, 5]]
    anchors = objective.distiller.teacher.anchors[:1]

    def prior(labelled, targets):
        prior = objective.prior_of(batch.images, targets, labelled)
        (q,) = prior(outputs, sizes) if takes_output(prior) else prior(sizes)
        return q

    assert prior(0, batch.targets[:0])[[1, 3], [3, 6], [5, 2]].all()  # the cells of these two boxes
    torch.testing.assert_close(prior(0, batch.targets[:0]), *priors.iou_mask(found, anchors, sizes, (64, 64), 4))
    of_labels = priors.iou_mask(labels, anchors, sizes, (64, 64), 4)[0]
    torch.testing.assert_close(prior(None, batch.targets), of_labels)
    two = batch.targets[batch.targets[:, 0] < 2]
    mixed = prior(2, two)
    torch.testing.assert_close(mixed[:2], of_labels[:2])
    torch.testing.assert_close(mixed[2:], prior(0, batch.targets[:0])[2:])


@pytest.mark.parametrize("images", [False, True])
def test_a_run_with_a_prior_of_boxes_is_inspected(config, teacher, images):
    run = replace(config, teacher=str(teacher), info_map="fgfi", steps=1, log_every=1)
    train(run)
    maps = inspect_run(run.out, [config.images] if images else [], count=1).now.information
    assert all(x.any() for x in maps)  # images alone: boxes are those that this random teacher detects


def test_distillation_decays_and_stops_at_its_epoch(config, teacher, tmp_path):
    run = replace(config, teacher=str(teacher), distill_stop=2, distill_decay="linear", log_every=1, warmup=0)
    train(run)
    values = [x["distill"] for x in read_log(Path(run.out) / "metrics.jsonl") if "distill" in x]
    assert all(values[:6])  # an epoch has three steps
    assert values[6:] == [0, 0, 0]
    data = training_set(run)
    objective, batch = build_objective(run, data), next(batches(data, run, 0, 1))
    load_checkpoint(run, objective)
    maps = objective.distiller.maps(batch.images, objective.prior_of(batch.images, batch.targets))
    assert level_loss_figure(Path(run.out), maps).axes[1].get_xlim() == (1, 6)
    terms = dict(zip(objective.terms, objective.train()(batch.images, batch.targets)[1].tolist(), strict=True))
    assert terms["distill"] == 0


def test_frozen_batch_norms_keep_the_statistics_of_the_initial_weights(config, teacher, tmp_path):
    first = train(config)
    again = replace(config, init=str(first.model_file), out=str(tmp_path / "tuned"), freeze_batchnorm=True, ema=0.0)
    tuned, before = weights(train(again).model_file), weights(first.model_file)
    for name, value in before.items():
        if "running" in name:
            assert tuned[name].equal(value), name
    assert not tuned["conv8.norm.weight"].equal(before["conv8.norm.weight"])


def test_a_validation_set_is_not_augmented(config, digits):
    assert validation_set(config) is None
    assert validation_set(with_val(config, digits)).augmentation is None
