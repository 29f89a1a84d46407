"""The training scripts of docs/examples do what docs/your_trainer.md promises, in one process and in two."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import launched

from fastkd.yolov3 import YOLOv3, YOLOv3Tiny
from fastkd.yolov3.checkpoint import load_detector, save_detector
from fastkd.yolov3.data.digits import CLASS_NAMES, write_digits

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "docs" / "examples"
PLAIN, DISTILLED, ACCELERATE = (
    EXAMPLES / f"{name}.py" for name in ("plain_loop", "plain_loop_distilled", "accelerate_loop")
)
SMALL = ["--size", "64", "--batch", "4"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with data, a teacher and a student, both with batch norms that are not as initialised."""
    root = tmp_path_factory.mktemp("files")
    write_digits(root / "digits", train=8, val=1, test=0)
    for name, kind in (("teacher", YOLOv3), ("student", YOLOv3Tiny)):
        torch.manual_seed(0)
        model = kind(10, 0.125)
        for _ in range(3):
            model(torch.rand(4, 3, 64, 64))
        save_detector(model, root / f"{name}.pt", CLASS_NAMES, 64)
    return root


def run(script: Path, files: Path, out: Path, *options: str, processes: int = 1) -> list[dict[str, float]]:
    """Return the lines that a script prints."""
    done = launched([script, "--data", files / "digits", "--out", out, *SMALL, *options], processes)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def distilled(files: Path) -> list[str]:
    return ["--teacher", str(files / "teacher.pt")]


def test_six_lines_make_the_plain_script_one_that_distils() -> None:
    plain, ours = (path.read_text().splitlines() for path in (PLAIN, DISTILLED))
    changes = [line for line in difflib.ndiff(plain, ours) if line[0] in "+-"]
    assert len(changes) <= 6
    assert all(line.startswith("+ ") for line in changes)  # no line of the plain script is changed


def test_the_distilled_student_is_an_ordinary_checkpoint_of_the_plain_script(files: Path, tmp_path: Path) -> None:
    first = run(DISTILLED, files, tmp_path, *distilled(files), "--width", "0.125", "--epochs", "1", "--amp")
    after_one = torch.load(tmp_path / "training.pt")["training"]
    more = run(DISTILLED, files, tmp_path, *distilled(files), "--width", "0.125", "--epochs", "8", "--resume")
    after_all = torch.load(tmp_path / "training.pt")["training"]

    assert [(line["epoch"], line["step"]) for line in first + more] == [(e, s) for e in range(8) for s in range(2)]
    assert more[-1]["distill"] < first[0]["distill"]
    averages = [state["distiller.criterion.loss_weight.averages"] for state in (after_one, after_all)]
    assert (
        averages[1][2] / averages[1][0] < 0.9 * averages[0][2] / averages[0][0]
    )  # the logged loss is balanced against the task loss; this is the distance itself
    assert after_all["distiller.criterion.loss_weight.step"] == 16

    exported = load_detector(tmp_path / "model.pt").model.state_dict()
    assert exported.keys() == YOLOv3Tiny(10, 0.125).state_dict().keys()
    again = run(PLAIN, files, tmp_path / "plain", "--weights", str(tmp_path / "model.pt"), "--epochs", "1")
    assert [list(line) for line in again] == [["epoch", "step", "detection"]] * 2


@pytest.mark.parametrize("options", ["", ', info_map="attention", divisor="map_all_ranks"'], ids=["default", "map"])
def test_two_processes_train_as_one_with_the_whole_batch(
    options: str, files: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if options and not request.config.getoption("--full"):
        pytest.skip("the trainer's processes share a map's divisor in test_distributed.py: with --full")
    script = tmp_path / "script.py"
    script.write_text(DISTILLED.read_text().replace('weight="auto"', f'weight="auto"{options}'))
    arguments = [*distilled(files), "--weights", str(files / "student.pt"), "--epochs", "2", "--freeze-batchnorm"]
    one = run(script, files, tmp_path / "one", *arguments)
    two = run(script, files, tmp_path / "two", *arguments, processes=2)

    assert len(one) == 4
    for a, b in zip(two, one, strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    states: list[dict[str, Any]] = [torch.load(tmp_path / x / "training.pt")["training"] for x in ("two", "one")]
    for name, value in states[1].items():  # the student, the adapters, the teacher's statistics, the averages of "auto"
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(states[0][name], value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_the_accelerate_loop_resumes_and_trains_in_two_processes(files: Path, tmp_path: Path) -> None:
    arguments = [*distilled(files), "--width", "0.125"]
    first = run(ACCELERATE, files, tmp_path / "two", *arguments, "--epochs", "2", processes=2)
    assert [line["epoch"] for line in first] == [0, 1]
    before = torch.load(tmp_path / "two" / "state" / "pytorch_model_1.bin")
    assert before["criterion.loss_weight.step"] == 4
    more = run(ACCELERATE, files, tmp_path / "two", *arguments, "--epochs", "5", "--resume")  # in one process
    assert [line["epoch"] for line in more] == [2, 3, 4]
    after = torch.load(tmp_path / "two" / "state" / "pytorch_model_1.bin")
    assert after["criterion.loss_weight.step"] == 10
    assert not torch.equal(after["criterion.adapters.0.weight"], before["criterion.adapters.0.weight"])
    averages = [state["criterion.loss_weight.averages"] for state in (after, before)]
    assert averages[0][2] / averages[0][0] < averages[1][2] / averages[1][0]
    exported = load_detector(tmp_path / "two" / "model.pt").model.state_dict()
    assert exported.keys() == YOLOv3Tiny(10, 0.125).state_dict().keys()
