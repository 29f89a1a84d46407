"""``make gpu-check`` without a GPU: what it says, what it writes, and that nothing it started outlives its time."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import gpu_check  # noqa: E402  found beside the package


def row(provider: str, both: float, **more: object) -> dict[str, object]:
    case = {"workload": "large6", "n": 64, "dtype": "bfloat16", "layout": "channels_last", "bytes": 4 * 10**9}
    times = {x: [both * 0.9, both, both * 1.2] for x in ("forward_ms", "backward_ms", "both_ms", "wall_ms")}
    return {**case, "provider": provider, **times, "peak_bytes": 2**20, **more}


FOUND = {
    "copy_bytes_per_second": 4e12,
    "times": [row("fastkd-cpp", 1.25, graph_ms=[1.1, 1.2, 1.3]), row("eager", 10.0), row("torch.compile", 2.5)],
    "left_out": [],
}


@pytest.fixture(autouse=True)
def _logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "LOGS", tmp_path / "logs")


def test_it_begins_where_fastkd_is_not_built_yet() -> None:
    program = "import sys; sys.modules['fastkd'] = None; import gpu_check"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=BENCHMARKS)


def test_tests_that_were_cut_short_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    output = (
        "[gw0] [ 10%] PASSED tests/a.py::b \n[gw1] [ 20%] FAILED tests/a.py::c \n[gw1] [ 30%] PASSED tests/a.py::d \n"
    )
    monkeypatch.setattr(gpu_check, "run", lambda *_: (124, output))
    found = gpu_check.test("cpp", False, 1)
    assert found == ("tests, cpp", ["tests/a.py::c", "not done in its time"], "2 passed so far")
    assert (gpu_check.LOGS / "tests_cpp.log").read_text() == output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    command = [sys.executable, str(BENCHMARKS / "gpu_check.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "gpu-check: this torch finds no GPU\n")


def test_ratios_to_the_floor_and_to_other_providers() -> None:
    (line,) = gpu_check.targets(FOUND)  # 4 GB at 4 TB/s are 1 ms
    assert "fastkd-cpp: 1.25 times the floor of two passes on the device, 2.08 times that of one" in line
    assert "8.0 times as fast as eager, 2.0 times as fast as torch.compile (both_ms); 1200 µs in a graph" in line
    ours, eager, _ = gpu_check.table(FOUND)[2:]
    assert "| fastkd-cpp | 1.250 | 1.250 | 1.250 (1.125 to 1.500) | 1.250 | 1.200 | 1.00 | 80% | 1.0 |" in ours
    assert "| eager | 10.000 | 10.000 | 10.000 (9.000 to 12.000) | 10.000 |  | 8.00 |  | 1.0 |" in eager


def test_results_are_named_after_the_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "RESULTS", tmp_path / "results")
    outcomes = [gpu_check.Outcome("build", [], "30 s"), gpu_check.Outcome("tests, cpp", ["test_x"], "1 failed")]
    path = gpu_check.write_results({"gpu": "NVIDIA H200", "torch": "2.11"}, outcomes, FOUND)
    assert sorted(x.name for x in path.parent.iterdir()) == ["nvidia-h200.json", "nvidia-h200.md"]
    written = json.loads(path.read_text())
    assert written["times"] == FOUND["times"]
    assert written["checks"][1]["failures"] == ["test_x"]
    assert "- tests, cpp: test_x (1 failed)" in path.with_suffix(".md").read_text()


def test_a_failing_test_a_crash_and_no_test_at_all_are_failures() -> None:
    def failures(status: int, output: str, found: list[str]) -> list[str]:
        return gpu_check.outcome("tests", status, output, found, "").failures

    assert failures(0, "3 passed", []) == []
    assert failures(1, "FAILED a", ["a"]) == ["a"]
    assert failures(5, "7 deselected\n", []) == ["exit status 5: 7 deselected"]
    assert failures(-11, "", []) == ["exit status -11: no output"]
    assert failures(124, "half", []) == ["not done in its time"]


def test_timings_that_measured_nothing_are_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    for status, expected in ((0, "not done in its time"), (124, "not done in its time"), (1, "exit status 1: no GPU")):
        monkeypatch.setattr(gpu_check, "run", lambda *_, status=status: (status, "no GPU\n"))
        timing, found = gpu_check.time_all(60)
        assert (timing.failures, found["times"]) == ([expected], [])


def test_failed_tests_are_named_also_where_pytest_was_ended_before_its_summary() -> None:
    summary = "FAILED tests/test_a.py::test_x[cpp-cuda] - AssertionError: 3\n1 failed in 2 s\n"
    assert gpu_check.failed_tests(summary) == ["tests/test_a.py::test_x[cpp-cuda] - AssertionError: 3"]
    parallel = "[gw0] [  5%] PASSED tests/test_a.py::test_y\n[gw1] [ 10%] FAILED tests/test_a.py::test_x[cpp-cuda] \n"
    assert gpu_check.failed_tests(parallel) == ["tests/test_a.py::test_x[cpp-cuda]"]
    alone = "tests/test_a.py::test_x[cpp-cuda] FAILED      [  1%]\ntests/test_a.py::test_y PASSED   [  2%]\n"
    assert gpu_check.failed_tests(alone) == ["tests/test_a.py::test_x[cpp-cuda]"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks processes up in /proc")
def test_what_takes_too_long_is_ended_with_its_children() -> None:
    status, output = gpu_check.run(["bash", "-c", "sleep 60 & echo $!; sleep 60"], seconds=1)
    assert status == 124
    child = Path("/proc", output.strip(), "stat")
    deadline = time.monotonic() + 30  # the kernel ends it soon; what is left is a zombie at most
    while child.exists() and child.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)
