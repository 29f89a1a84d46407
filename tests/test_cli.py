"""The command line: every command does what its help promises, and wrong input gives one line and status 2."""

import argparse
import dataclasses
import json
import re
import shutil
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch

import fastkd
from fastkd import cli
from fastkd.cli import main
from fastkd.yolov3 import YOLOv3, YOLOv3Tiny, save_weights
from fastkd.yolov3.checkpoint import save_detector
from fastkd.yolov3.data.digits import CLASS_NAMES
from fastkd.yolov3.data.draw import draw
from fastkd.yolov3.data.formats import find_set
from fastkd.yolov3.show.predict import predict
from fastkd.yolov3.train.config import TrainConfig

COMMANDS = ("train", "eval", "predict", "export", "inspect", "data", "demo", "doctor")


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "digits"
    assert main(["data", "digits", "--out", str(out), "--train", "8", "--val", "3", "--test", "2"]) == 0
    return out


@pytest.fixture(scope="session")
def runs(digits, tmp_path_factory):
    """Return a run without a teacher, and a run distilled from its model."""
    out = tmp_path_factory.mktemp("runs")
    assert main(train_arguments(digits, out / "teacher", "--model", "yolov3")) == 0
    teacher = str(out / "teacher" / "model.pt")
    assert main(train_arguments(digits, out / "student", "--teacher", teacher)) == 0
    return {"plain": out / "teacher", "distilled": out / "student"}


@pytest.fixture(scope="session")
def student(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("student") / "model.pt"
    save_detector(YOLOv3Tiny(num_classes=10, width=0.125), path, CLASS_NAMES, 96)
    return path


def train_arguments(digits, out, *more):
    small = ["--width", "0.125", "--size", "64", "--batch", "4", "--steps", "2", "--cpu", "--eval-every", "0"]
    return ["train", "--data", str(digits), "--out", str(out), "--no-plots", *small, *more]


# ---- help


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert len(capsys.readouterr().out) > 100


def test_the_module_runs_as_the_command_and_lists_all_commands():
    done = subprocess.run([sys.executable, "-m", "fastkd", "--help"], capture_output=True, text=True, check=True)
    assert all(command in done.stdout for command in COMMANDS)


def test_help_needs_torch_alone():
    code = (
        "import sys; from fastkd import cli; cli._parser()\n"
        "print([m for m in ('cv2', 'accelerate', 'pycocotools', 'matplotlib', 'sklearn') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_doctor_needs_torch_alone():
    code = (
        "import sys\n"
        "for m in ('numpy', 'cv2', 'accelerate', 'pycocotools', 'matplotlib', 'sklearn'): sys.modules[m] = None\n"
        "from fastkd import cli; sys.exit(cli.main(['doctor']))"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "missing" in done.stdout


def test_defaults_in_the_help_of_train_are_those_of_the_configuration():
    parser = cli._parser()._subparsers._group_actions[0].choices["train"]
    fields = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    compared = 0
    for action in parser._actions:
        stated = re.search(r"\(default: ([^)]+)\)", action.help or "")
        if action.default is not argparse.SUPPRESS or stated is None or action.dest not in fields:
            continue
        default = fields[action.dest]
        in_words = {"None": {"all", "no distillation", "random weights", "none", "as --batch", "never", "no decay"}}
        in_words["None"] |= {"as the map needs", "all 1", "from its .cfg file, or its size"}
        in_words["None"] |= {"default if --init has the classes of the data, else data"}
        assert stated[1] in in_words.get(str(default), {str(default)}), action.dest
        compared += 1
    assert compared >= 20
    texts = {action.dest: action.help for action in parser._actions}
    for name in ("flip", "mosaic"):  # which are in the augmentation of the configuration
        assert f"(default: {getattr(TrainConfig.augmentation, name):g})" in texts[name]


# ---- commands


def test_train_then_eval_then_predict(digits, runs, tmp_path, capsys):
    model = str(runs["distilled"] / "model.pt")

    options = ["--json", str(tmp_path / "m.json"), "--detections", str(tmp_path / "d.json"), "--cpu"]
    assert main(["eval", model, "--data", str(digits), "--set", "test", *options]) == 0
    assert re.search(r"^mAP +\d+\.\d$", capsys.readouterr().out, re.MULTILINE)
    assert 0 <= json.loads((tmp_path / "m.json").read_text())["mAP"] <= 1
    assert isinstance(json.loads((tmp_path / "d.json").read_text()), list)

    images = digits / "images" / "test"
    assert main(["predict", model, str(images), "--out", str(tmp_path / "found"), "--score", "0", "--cpu"]) == 0
    drawn = sorted((tmp_path / "found").iterdir())
    assert [x.name for x in drawn] == ["000001.png", "000002.png"]
    assert (cv2.imread(str(drawn[0])) != cv2.imread(str(images / "000001.png"))).any()


def test_inspect_draws_a_run_and_tells_its_levels(runs, tmp_path, capsys):
    assert main(["inspect", str(runs["distilled"]), "--count", "1", "--out", str(tmp_path)]) == 0
    reported = capsys.readouterr().out
    assert "on 1 image\n" in reported
    row = r"^(backbone|neck): \S+ <- \S+ +(\d+) +(\d+)% +([\d.]+) +([\d.]+) +(\d+)%$"
    rows = re.findall(row, reported, re.MULTILINE)
    levels = [("backbone", "8"), ("backbone", "16"), ("backbone", "32"), ("neck", "16"), ("neck", "32")]
    assert [(group, stride) for group, stride, *_ in rows] == levels
    assert sum(int(share) for _, _, share, *_ in rows) == pytest.approx(100, abs=3)
    for name in ("maps", "differences", "level_losses"):
        assert cv2.imread(str(tmp_path / f"{name}.png")).std() > 10, name


def test_inspect_compares_with_the_student_that_the_run_began_with(digits, runs):
    from fastkd.yolov3.data.dataset import collate
    from fastkd.yolov3.show.inspect import inspect_run
    from fastkd.yolov3.train.config import read_config
    from fastkd.yolov3.train.run import build_objective, training_set

    found = inspect_run(runs["distilled"], [digits / "images/train/000001.png"])
    assert found.files[0] == runs["distilled"] / "inspect" / "maps.png"
    config = dataclasses.replace(read_config(runs["distilled"]), augmentation=None)
    data = training_set(config)
    objective = build_objective(config, data)
    saved = torch.load(runs["distilled"] / "checkpoint.pt", weights_only=True)["distiller"]
    statistics = {k.removeprefix("criterion."): v for k, v in saved.items() if ".statistics." in k}
    objective.distiller.criterion.load_state_dict(statistics, strict=False)
    images = collate([data[0]]).images
    first = objective.distiller.maps(images, objective.prior_of(images, torch.zeros(0, 6), labelled=0))
    for a, b, now in zip(found.before.levels, first.levels, found.now.levels, strict=True):
        torch.testing.assert_close(a.difference, b.difference)
        torch.testing.assert_close(a.information, now.information)
        assert not torch.equal(a.difference, now.difference)


def test_train_resumes(digits, tmp_path, capsys):
    arguments = train_arguments(digits, tmp_path / "run", "--val", "none")
    assert main(arguments) == 0
    assert main(arguments) == 2
    assert "--resume" in capsys.readouterr().err
    assert main([*arguments, "--resume"]) == 0


def test_eval_reads_darknet_weights(digits, tmp_path, capsys):
    save_weights(YOLOv3Tiny(num_classes=10, width=0.125), tmp_path / "tiny.weights")
    described = ["--arch", "yolov3-tiny", "--classes", "10", "--width", "0.125", "--size", "96", "--cpu"]
    evaluate = ["eval", str(tmp_path / "tiny.weights"), "--data", str(digits), *described]
    assert main(evaluate) == 0
    anchors = [(8, 10), (12.5, 16), (20, 20), (24, 30), (32, 40), (48, 48)]
    text = ", ".join(f"{w},{h}" for w, h in anchors)
    arguments = cli._parser().parse_args([*evaluate, "--anchors", text])
    assert cli._load(arguments)[0].model.anchors.flatten(0, 1).tolist() == [list(x) for x in anchors]
    with pytest.raises(SystemExit):
        main([*evaluate, "--anchors", "8,10,12"])
    assert "expected pairs of width and height, got 3 numbers" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*evaluate, "--anchors", "8x10"])
    assert "expected numbers between commas, got '8x10'" in capsys.readouterr().err
    assert main([*evaluate, "--anchors", "8,10"]) == 2
    assert "anchors: expected sizes (w, h) for 2 heads" in capsys.readouterr().err


def test_doctor_tells_what_works(capsys):
    assert main(["doctor"]) == 0
    reported = capsys.readouterr().out
    assert all(name in reported for name in ("reference", "cpp", torch.__version__, fastkd.__version__))
    assert "for CPU tensors\n  ok  cpp: the default\n" in reported
    assert re.search(r"ok +gradient", reported)


def test_doctor_finds_an_untrained_teacher_in_a_run(digits, tmp_path, capsys):
    save_detector(YOLOv3(num_classes=10, width=0.125), tmp_path / "fresh.pt", CLASS_NAMES, 64)
    with pytest.warns(UserWarning, match="initial weights"):
        main(train_arguments(digits, tmp_path / "run", "--teacher", str(tmp_path / "fresh.pt")))
    assert main(["doctor", "--run", str(tmp_path / "run")]) == 1
    assert re.search(r"FAIL +teacher trained", capsys.readouterr().out)


def test_demo_is_run_with_its_options(monkeypatch, tmp_path):
    from fastkd.yolov3.show import demo

    calls = []
    monkeypatch.setattr(demo, "run_demo", lambda out, seeds: calls.append((out, seeds)))
    assert main(["demo", "--out", str(tmp_path), "--seeds", "3"]) == 0
    assert calls == [(str(tmp_path), 3)]


# ---- data sets


@pytest.mark.parametrize(
    ("annotations", "images", "name"),
    [
        ("annotations/train.json", "images/train", "train"),
        ("annotations/train_100.json", "images/train", "train_100"),
        ("annotations/instances_train2017.json", "train2017", "train2017"),
    ],
)
def test_sets_are_found_in_the_layouts_of_coco_and_of_digits(tmp_path, annotations, images, name):
    (tmp_path / "annotations").mkdir()
    (tmp_path / annotations).write_text("{}")
    (tmp_path / images).mkdir(parents=True)
    assert find_set(tmp_path, name) == (tmp_path / annotations, tmp_path / images)


# ---- wrong input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--data", "{digits}", "--out", "{out}", "--teacher", "{student}", "--info-map", "x"], "info_map"),
        (["eval", "absent.pt", "--data", "{digits}"], "absent.pt: no such file"),
        (["eval", "{student}", "--data", "{digits}", "--set", "tset"], "sets found: test, train, val"),
        (["predict", "{student}", "absent.jpg", "--out", "{out}"], "absent.jpg: no such image or folder"),
        (["predict", "{student}", "{digits}", "--out", "{out}"], "no images in this folder"),
        (["train", "--data", "{digits}", "--out", "{out}", "--lr", "-1"], "lr: expected a finite number > 0"),
        (
            ["train", "--data", "{digits}", "--out", "{out}", "--teacher", "{student}", "--info-map", "magic"],
            "info_map",
        ),
        (["doctor", "--run", "{out}"], "no run of fastkd train there"),
        (["inspect", "{out}"], "no run of fastkd train there"),
        (["inspect", "{plain}"], "this run imitates no teacher"),
        (["inspect", "{distilled}", "absent.jpg"], "absent.jpg: no such image or folder"),
        (["inspect", "{distilled}", "{plain}/config.json"], "not an image that can be read"),
        (["inspect", "{distilled}", "--set", "test"], "set: expected train or val, got 'test'"),
        (
            ["inspect", "{distilled}", "a.jpg", "--set", "val"],
            "set: expected None together with images of your own, got 'val'",
        ),
        (["inspect", "{distilled}", "--count", "0"], "count: expected at least 1 image, got 0"),
        (["demo", "--out", "{out}", "--seeds", "0"], "seeds: expected at least 1"),
        (["data", "digits", "--out", "{out}", "--train", "-1"], "train: expected a number of scenes >= 0"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(digits, student, runs, tmp_path, capsys, arguments, message):
    places = {"digits": digits, "student": student, "out": tmp_path / "out", **runs}
    assert main([x.format(**places) for x in arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("fastkd: error: ")
    assert message in lines[-1]
    assert not any(line.startswith("Traceback") for line in lines)


def test_traceback_can_be_asked_for(tmp_path):
    with pytest.raises(FileNotFoundError):
        main(["--traceback", "eval", str(tmp_path / "absent.pt"), "--data", str(tmp_path)])


def test_a_missing_extra_is_named_with_its_way_out(monkeypatch, capsys, digits, student):
    monkeypatch.delitem(sys.modules, "fastkd.yolov3.train.evaluate", raising=False)
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    assert main(["eval", str(student), "--data", str(digits)]) == 2
    assert "needs pycocotools, which is not installed: pip install 'fastkd[train]'" in capsys.readouterr().err


# ---- images


def test_boxes_are_drawn_where_objects_are_and_nowhere_else():
    from fastkd.yolov3 import Detections

    image = np.full((60, 80, 3), 128, dtype=np.uint8)
    found = Detections(torch.tensor([[30.0, 30, 60, 50]]), torch.tensor([0.9]), torch.tensor([1]))
    drawn = draw(image, found, ("a", "b"))
    changed = (drawn != image).any(2)
    assert changed[50, 30:60].all()
    assert changed[31:50, 30].all()
    assert not changed[35:49, 33:58].any()
    assert not changed[52:].any()
    assert (image == 128).all()


def test_images_are_not_overwritten_by_their_predictions(student, digits, tmp_path):
    from fastkd.yolov3.checkpoint import load_detector

    shutil.copy(digits / "images/test/000001.png", tmp_path)
    before = (tmp_path / "000001.png").read_bytes()
    with pytest.raises(FileExistsError, match=r"000001\.png exists already"):
        predict(load_detector(student).model, [tmp_path], tmp_path, size=96)
    assert (tmp_path / "000001.png").read_bytes() == before


def test_two_images_of_one_name_are_refused(student, digits, tmp_path):
    from fastkd.yolov3.checkpoint import load_detector

    images = [digits / "images/test/000001.png", digits / "images/val/000001.png"]
    with pytest.raises(ValueError, match="got the same one twice"):
        predict(load_detector(student).model, images, tmp_path, size=96)
