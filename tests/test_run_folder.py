"""The folder of a run without ``--out``: its name, never one that is there, and which one ``--resume`` finds."""

import json
import re
from pathlib import Path

import pytest
from processes import launched

from fastkd.cli import main
from fastkd.yolov3.data.digits import write_digits
from fastkd.yolov3.train.log import read_log
from fastkd.yolov3.train.run_folder import run_name, runs_named


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("data") / "my digits", train=4, val=1, test=0)


@pytest.fixture
def start(digits, tmp_path, monkeypatch, capsys):
    """Trains in a folder of its own; returns the status, the run's folder as printed, and what else was said."""
    monkeypatch.chdir(tmp_path)

    def run(*more, data=digits):
        small = ["--width", "0.125", "--size", "64", "--batch", "4", "--steps", "1", "--cpu", "--val", "none"]
        status = main(["train", "--data", str(data), *small, "--no-plots", *more])
        said = capsys.readouterr()
        return status, re.match(r"run: (\S+)\n", said.out), said

    return run


def test_names_are_those_of_data_and_model(tmp_path):
    (tmp_path / "set" / "obj").mkdir(parents=True)
    (tmp_path / "set" / "obj.data").touch()
    assert run_name(tmp_path / "set", "yolov3", distilled=False) == "set-yolov3"
    assert run_name(tmp_path / "set/obj.data", "yolov3-tiny", distilled=True) == "set-yolov3-tiny-distilled"
    assert run_name(tmp_path / "set" / "obj" / "..", "yolov3", distilled=False) == "set-yolov3"
    assert run_name("/", "yolov3", distilled=False) == "data-yolov3"


def test_a_run_without_out_has_a_new_folder_that_is_printed_first(start):
    for name in ("my_digits-yolov3-tiny", "my_digits-yolov3-tiny-2", "my_digits-yolov3-tiny-3"):
        status, found, _ = start()
        assert (status, found[1]) == (0, f"runs/{name}")
        assert (Path("runs") / name / "model.pt").is_file()
    assert [x.name[-1] for x in runs_named("my_digits-yolov3-tiny")] == ["3", "2", "y"]
    assert start("--teacher", "runs/my_digits-yolov3-tiny/model.pt")[1][1] == "runs/my_digits-yolov3-tiny-distilled"


def test_resume_finds_the_last_run_with_the_same_options(start):
    assert start("--resume")[1][1] == "runs/my_digits-yolov3-tiny"  # there is none, so it begins
    start()
    start("--lr", "0.01")
    before = {x: x.stat().st_mtime_ns for x in Path("runs").glob("*/checkpoint.pt")}
    assert start("--resume")[1][1] == "runs/my_digits-yolov3-tiny-2"
    assert start("--resume", "--lr", "0.01")[1][1] == "runs/my_digits-yolov3-tiny-3"
    assert before == {x: x.stat().st_mtime_ns for x in Path("runs").glob("*/checkpoint.pt")}  # nothing was trained
    status, found, said = start("--resume", "--lr", "0.02")
    assert (status, found) == (2, None)
    assert "resume: none of runs/my_digits-yolov3-tiny-3, runs/my_digits-yolov3-tiny-2, runs/my_dig" in said.err
    assert "lr (0.01 then, 0.02 now)" in said.err


def test_resume_goes_on_with_the_held_back_split_of_the_run_that_it_finds(digits, start, tmp_path):
    content = json.loads((digits / "annotations/train.json").read_text())
    data = tmp_path / "one"
    (data / "annotations").mkdir(parents=True)
    (data / "annotations/train.json").write_text(json.dumps(content))
    (data / "images").symlink_to(digits / "images")
    options = ["--val", "val", "--anchors", "default"]
    assert start(*options, data=data)[1][1] == "runs/one-yolov3-tiny"
    status, found, said = start(*options, "--resume", data=data)
    assert (status, found[1]) == (0, "runs/one-yolov3-tiny")
    assert "runs/one-yolov3-tiny/split/annotations/val.json" in said.out
    assert len(read_log(Path(found[1]) / "metrics.jsonl")) == 2


def test_all_processes_of_a_run_take_the_same_folder(digits, tmp_path):
    small = ["--width", "0.125", "--size", "64", "--batch", "4", "--steps", "1", "--cpu", "--val", "none"]
    (tmp_path / "runs/my_digits-yolov3-tiny").mkdir(parents=True)
    command = ["-m", "fastkd", "train", "--data", digits, *small, "--no-plots"]
    done = launched(command, processes=2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run: runs/my_digits-yolov3-tiny-2\n") == 1
    assert sorted(x.name for x in (tmp_path / "runs").iterdir()) == ["my_digits-yolov3-tiny", "my_digits-yolov3-tiny-2"]


def test_a_folder_with_plots_of_the_users_is_refused(start, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/results.csv").write_text("precious")
    status, _, said = start("--out", "mine")
    assert status == 2
    assert "mine has no run, but results.csv, which would be overwritten" in said.err
    assert (tmp_path / "mine/results.csv").read_text() == "precious"


def test_a_wrong_option_is_named_when_a_run_is_resumed(start):
    start()
    status, _, said = start("--resume", "--multi-scale", "2")
    assert status == 2
    assert "multi_scale: expected a number in [0, 1), got 2" in said.err
