"""Several processes train as one, and a run can be resumed after a process dies."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import launched

from fastkd.cli import main
from fastkd.files import alone_in
from fastkd.yolov3 import YOLOv3Tiny
from fastkd.yolov3.checkpoint import load_detector, save_detector
from fastkd.yolov3.data.digits import CLASS_NAMES, write_digits

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("data") / "digits", train=8, val=2, test=0)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = YOLOv3Tiny(num_classes=10, width=0.25)
    model(torch.rand(4, 3, 64, 64))  # the batch norms are not as initialised
    path = tmp_path_factory.mktemp("teacher") / "model.pt"
    save_detector(model, path, CLASS_NAMES, 64)
    return path


def arguments(digits: Path, out: Path, *more: str) -> list[str]:
    small = ["--width", "0.125", "--size", "64", "--batch", "4", "--cpu", "--val", "none"]
    return ["train", "--data", str(digits), "--out", str(out), *small, *more]


def log(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_train_as_one_with_the_whole_batch(digits: Path, teacher: Path, tmp_path: Path) -> None:
    def run(name: str) -> list[str]:
        # the divisor of this map is its mass, so ranks need each other's; weight="auto" needs other ranks too
        options = ["--teacher", str(teacher), "--info-map", "score", "--steps", "4", "--freeze-batchnorm"]
        options += ["--multi-scale", "0.5"]
        return arguments(digits, tmp_path / name, *options)

    done = launched(["-m", "fastkd", *run("two")], processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("4 steps in") == 1
    assert main(run("one")) == 0

    two, one = (torch.load(tmp_path / name / "checkpoint.pt") for name in ("two", "one"))
    for part in ("student", "distiller"):  # adapters, statistics and the averages of weight="auto" too
        for name, value in one[part].items():
            if "statistics" in name and name.endswith((".count", ".square")):  # both processes used the same images
                torch.testing.assert_close(two[part][name], 2 * value, rtol=1e-4, atol=1e-6)
            elif isinstance(value, torch.Tensor):
                torch.testing.assert_close(
                    two[part][name], value, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
                )
    for a, b in zip(log(tmp_path / "two"), log(tmp_path / "one"), strict=True):
        assert {name: a[name] for name in b if name != "images_per_second"} == pytest.approx(
            {name: value for name, value in b.items() if name != "images_per_second"}, rel=1e-4
        )


def test_every_process_says_that_the_folder_is_taken(digits: Path, tmp_path: Path) -> None:
    with alone_in(tmp_path / "run"):
        done = launched(["-m", "fastkd", *arguments(digits, tmp_path / "run", "--steps", "2")], processes=2)
    lines = [line for line in done.stderr.splitlines() if line.startswith("fastkd: error:")]
    assert lines, done.stderr  # the second process may be killed before it prints anything
    assert all("another process is writing there" in line for line in lines)
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_process_that_dies_ends_the_run_with_a_message_and_a_checkpoint(
    digits: Path, teacher: Path, tmp_path: Path
) -> None:
    dying = tmp_path / "dying.py"
    dying.write_text(
        "import os, signal, sys\n"
        "from fastkd.yolov3.train.log import RunLog\n"
        "from fastkd.cli import main\n"
        "log = RunLog.step\n"
        "def step(self, number, *values):\n"
        "    if number == 5 and os.environ['RANK'] == '1':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    log(self, number, *values)\n"
        "RunLog.step = step\n"
        "sys.exit(main())\n"
    )
    options = arguments(digits, tmp_path / "run", "--teacher", str(teacher), "--steps", "8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*TORCHRUN, str(dying), *options], capture_output=True, text=True, env=environment)
    assert done.returncode != 0
    # the other process finds the connection broken, or torchrun stops it first
    assert re.search("(another process has died.*|stopped); to continue.* with --resume", done.stderr)
    assert torch.load(tmp_path / "run" / "checkpoint.pt")["step"] == 4
    assert main([*options, "--resume"]) == 0
    assert load_detector(tmp_path / "run" / "model.pt").model.num_classes == 10
