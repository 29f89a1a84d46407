"""Commands write files atomically, overwrite nothing of other programs, and lock a folder for one process."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastkd.cli import main
from fastkd.files import alone_in, new_folder, replacing, require_new, save
from fastkd.yolov3 import YOLOv3Tiny
from fastkd.yolov3.checkpoint import save_detector
from fastkd.yolov3.data.digits import CLASS_NAMES, write_digits

SMALL = ["--width", "0.125", "--size", "64", "--batch", "4", "--cpu", "--val", "none", "--warmup", "1"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("data") / "digits", train=8, val=2, test=0)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_detector(YOLOv3Tiny(num_classes=10, width=0.125), tmp_path / "model.pt", CLASS_NAMES, 64)
    return tmp_path / "model.pt"


def train(digits: Path, out: Path, *more: str) -> int:
    return main(["train", "--data", str(digits), "--out", str(out), *SMALL, "--steps", "4", *more])


# ---- nothing is overwritten


def test_eval_writes_over_neither_the_model_nor_the_annotations(
    digits: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    annotations = digits / "annotations/val.json"
    kept = model.read_bytes(), annotations.read_bytes()
    command = ["eval", str(model), "--data", str(digits), "--cpu"]
    assert main([*command, "--json", str(model)]) == 2
    assert f"--json: {model} exists already" in capsys.readouterr().err
    assert main([*command, "--detections", str(annotations)]) == 2
    same = str(model.with_name("new.json"))
    assert main([*command, "--json", same, "--detections", same]) == 2
    assert (model.read_bytes(), annotations.read_bytes()) == kept
    assert not Path(same).exists()


def test_training_writes_over_no_model_of_another_run(
    digits: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = model.read_bytes()
    assert train(digits, model.parent) == 2
    assert "already contains a run (model.pt)" in capsys.readouterr().err
    assert train(digits, model.parent, "--resume", "--teacher", str(model)) == 2
    assert "has no checkpoint.pt to continue from, but model.pt" in capsys.readouterr().err
    assert model.read_bytes() == kept


def test_a_run_that_ended_before_its_first_checkpoint(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before its first step it does not count as a run; after it, --resume continues it with the same configuration."""
    run = tmp_path / "run"
    assert train(digits, run) == 0
    for file in ("checkpoint.pt", "model.pt", "model.weights", "model.cfg", "model.names"):
        (run / file).unlink()
    assert train(digits, run, "--lr", "0.5", "--resume") == 2
    assert "got another lr (0.001 then, 0.5 now)" in capsys.readouterr().err
    assert train(digits, run) == 2
    assert train(digits, run, "--resume") == 0
    for file in ("checkpoint.pt", "model.pt", "model.weights", "model.cfg", "model.names", "metrics.jsonl"):
        (run / file).unlink()
    assert train(digits, run, "--lr", "0.5") == 0


def test_the_demo_takes_no_folder_that_holds_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results.json").write_text("mine")
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "contains other files (results.json)" in capsys.readouterr().err
    assert [x.name for x in tmp_path.iterdir()] == ["results.json"]


def test_a_new_folder_gets_a_number_where_its_name_is_taken(tmp_path: Path) -> None:
    assert new_folder(tmp_path / "seen") == tmp_path / "seen"
    for name in ("seen", "seen-2"):
        (tmp_path / name).mkdir()
    assert new_folder(tmp_path / "seen") == tmp_path / "seen-3"


def test_a_dangling_link_is_not_written_over_either(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    with pytest.raises(FileExistsError, match=r"out: .*link exists already"):
        require_new(out=tmp_path / "link")
    require_new(out=tmp_path / "new", other=None)


# ---- one process at a time


def test_a_second_run_into_one_folder_is_refused(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with alone_in(tmp_path / "run"):
        assert train(digits, tmp_path / "run") == 2
    assert "another process is writing there" in capsys.readouterr().err
    assert train(digits, tmp_path / "run") == 0


def test_what_a_killed_process_left_half_written_goes_with_the_next(digits: Path, tmp_path: Path) -> None:
    """A process that is killed while it locks the folder and writes leaves both the lock and a partial file behind."""
    run = tmp_path / "run"
    code = (
        "import sys, time\n"
        "from fastkd.files import alone_in, replacing\n"
        "with alone_in(sys.argv[1]), replacing(sys.argv[1] + '/checkpoint.pt') as part:\n"
        "    part.write_bytes(b'half')\n"
        "    print('written', flush=True)\n"
        "    time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(run)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"
        process.send_signal(signal.SIGKILL)
    assert list(run.glob(".*.part"))
    (run / ".thesis.docx.part").touch()
    assert train(digits, run) == 0
    assert [x.name for x in run.glob(".*.part")] == [".thesis.docx.part"]


# ---- atomic writes


def test_a_full_disk_is_said_with_the_file_and_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.pt").write_text("old")

    def full(content: object, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0\nmore")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"x\.pt could not be written: it ends too early, .*; [0-9,]+ MB are free there$"):
        save({}, tmp_path / "x.pt")
    with pytest.raises(FileExistsError, match=r"y could not be written: "), replacing(tmp_path / "x.pt" / "y"):
        pass
    assert [x.name for x in tmp_path.iterdir()] == ["x.pt"]
    assert (tmp_path / "x.pt").read_text() == "old"


# ---- files that are damaged, foreign or of another version: one line, status 2


@pytest.fixture(scope="module")
def finished(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a teacher, whose file is beside it."""
    folder = tmp_path_factory.mktemp("finished")
    torch.manual_seed(0)
    teacher = YOLOv3Tiny(num_classes=10, width=0.25)
    teacher(torch.rand(4, 3, 64, 64))
    save_detector(teacher, folder / "teacher.pt", CLASS_NAMES, 64)
    assert train(digits, folder / "run", "--teacher", str(folder / "teacher.pt")) == 0
    return folder / "run"


def reported_by(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(command) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fastkd: error:")]
    assert len(lines) == 1
    return lines[0]


def without(file: Path, key: str) -> None:
    content = torch.load(file, weights_only=True)
    del content[key]
    torch.save(content, file)


@pytest.mark.parametrize(
    ("damage", "reported"),
    [
        (lambda file: file.write_bytes(b""), "not readable as a checkpoint"),
        (lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]), "not readable as a checkpoint"),
        (lambda file: file.write_text("<html>"), "not readable as a checkpoint"),
        (
            lambda file: file.write_bytes((file.parent / "model.pt").read_bytes()),
            "expected a checkpoint .* without config",
        ),
        (lambda file: without(file, "scheduler"), "without scheduler"),
    ],
)
def test_a_spoilt_checkpoint_is_named_with_the_way_out(
    damage: object, reported: str, finished: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    subprocess.run(["cp", "-r", finished, run], check=True)
    damage(run / "checkpoint.pt")  # type: ignore[operator]
    teacher = str(finished.parent / "teacher.pt")
    command = ["train", "--data", str(digits), "--out", str(run), *SMALL, "--steps", "4", "--teacher", teacher]
    message = reported_by([*command, "--resume"], capsys)
    assert f"{run}/checkpoint.pt" in message
    assert re.search(reported, message), message
    assert "train into another folder, or move checkpoint.pt and the models there away" in message


def test_files_of_another_version_are_named(
    finished: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    subprocess.run(["cp", "-r", finished, run], check=True)
    without(run / "model.pt", "size")
    assert "model.pt: expected a detector's file" in reported_by(
        ["eval", str(run / "model.pt"), "--data", str(digits), "--cpu"], capsys
    )
    config = json.loads((run / "config.json").read_text())
    for text in (json.dumps(config | {"new_option": 1}), '{"annot', "[]"):
        (run / "config.json").write_text(text)
        assert f"{run}/config.json: expected a run's configuration" in reported_by(
            ["doctor", "--run", str(run)], capsys
        )
    teacher = str(finished.parent / "teacher.pt")
    for junk in (b"\xff\xfe\x00\n", b'{"a": 1}\n', b"5\n"):
        (run / "metrics.jsonl").write_bytes(junk)
        assert train(digits, run, "--teacher", teacher, "--resume") == 0


def test_a_model_with_nan_is_refused_by_every_command(
    digits: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = torch.load(model, weights_only=True)
    content["state_dict"]["conv2.conv.weight"].view(-1)[0] = float("nan")
    torch.save(content, model)
    image = str(next((digits / "images/val").iterdir()))
    for command in (
        ["eval", str(model), "--data", str(digits), "--cpu"],
        ["predict", str(model), image, "--out", str(tmp_path / "out"), "--cpu"],
        ["train", "--data", str(digits), "--out", str(tmp_path / "run"), *SMALL, "--teacher", str(model)],
    ):
        message = reported_by(command, capsys)
        assert "expected finite weights, got 1 tensors with NaN or infinity (conv2.conv.weight)" in message


def test_an_error_in_a_loader_process_is_one_line(
    digits: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    shutil.copytree(digits, data)
    broken = next((data / "images/val").iterdir())
    broken.write_bytes(broken.read_bytes()[:200])
    command = ["eval", str(model), "--data", str(data), "--cpu", "--strict", "--workers", "1"]
    assert f"error: {broken}: not" in reported_by(command, capsys)


def test_classes_that_a_file_does_not_name_are_not_made_up(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_detector(YOLOv3Tiny(4, 0.125), tmp_path / "m.weights")
    message = reported_by(["eval", str(tmp_path / "m.weights"), "--data", str(digits), "--cpu"], capsys)
    assert "expected the data set's 10 classes 0, 1, 2" in message
    assert message.endswith("got 4: without names")


def test_a_dead_loader_process_is_said_with_what_is_left(digits: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = [*SMALL, "--steps", "100000", "--workers", "1", "--eval-every", "0"]
    command = [sys.executable, "-m", "fastkd", "train", "--data", str(digits), "--out", str(run), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        while not (run / "checkpoint.pt").exists():
            assert process.poll() is None
            time.sleep(0.05)
        found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout
        os.kill(int(found.split()[0]), signal.SIGKILL)
        _, error = process.communicate()
    assert process.returncode == 2, error[-3000:]
    assert "Traceback" not in error
    assert "take fewer --workers, or 0" in error, error[-600:]
    assert re.search(r"to continue from \S+checkpoint\.pt, run the same command with --resume", error)
