"""``make gpu-check`` without a GPU: its schedule, the files after each row, and that all its processes end."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import gpu_check  # noqa: E402  found beside the package
from gpu_check import Row  # noqa: E402


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """Options of a check on a CPU, with background compilers that do nothing."""
    monkeypatch.setattr(gpu_check, "LOGS", tmp_path / "logs")
    monkeypatch.setattr(gpu_check, "COMPILED", 0)
    return argparse.Namespace(device="cpu", tiny=True, full=False, seconds=100.0, results=tmp_path / "results")


def rows_of(options: argparse.Namespace, about: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(gpu_check.results_file(options.results, about).read_text())["rows"]
    return found


def test_it_begins_where_fastkd_is_not_built_yet() -> None:
    program = "import sys; sys.modules['fastkd'] = None; import gpu_check"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=BENCHMARKS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    command = [sys.executable, str(BENCHMARKS / "gpu_check.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "gpu-check: this torch finds no GPU\n")


def test_what_decides_is_done_before_330_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    begins = {row.name: at for at, row, _ in gpu_check.plan(gpu_check.ROWS, 520)}
    ends = {row.name: begins[row.name] + row.seconds for row in gpu_check.ROWS}
    essential = ("build", "correct", "ceilings", "host", "stream", "score_pass", "wall", "compiled", "training")
    assert max(ends[name] for name in essential) <= 330
    assert all(fits for _, _, fits in gpu_check.plan(gpu_check.ROWS, 520))
    gpu_check.print_plan(gpu_check.ROWS, 100)
    printed = capsys.readouterr().out
    assert "  15 s  correct, 50 s: whether results are correct" in printed
    assert "SKIP training, 60 s" in printed
    assert "predicted: large6 bf16 N = 64 0.39 to 0.43 ms" in printed


def test_the_budget_is_spent_from_the_top_and_what_does_not_fit_is_skipped() -> None:
    rows = [Row(name, seconds, "", "") for name, seconds in (("a", 40), ("b", 60), ("c", 30), ("d", 30))]
    assert [(at, row.name, fits) for at, row, fits in gpu_check.plan(rows, 90 + gpu_check.WRITING)] == [
        (0, "a", True),
        (40, "b", False),
        (40, "c", True),
        (70, "d", False),
    ]


def test_every_row_is_a_function() -> None:
    program = "import json, gpu_timing; print(json.dumps(list(gpu_timing.ROWS)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=BENCHMARKS)
    known = {*json.loads(done.stdout.splitlines()[-1]), *gpu_check.HERE}
    assert {row.name for row in gpu_check.ROWS} == known


def test_what_was_found_is_on_the_disk_after_each_row(
    options: argparse.Namespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    about, whole = {"gpu": "NVIDIA H200"}, []

    def first(_: argparse.Namespace, seconds: float) -> dict[str, Any]:
        assert 0 < seconds <= 10, "twice its seconds, at most"
        return {"failures": [], "summary": "fine", "table": [{"what": "a|b", "device, ms": [1.0, 2.0, 3.0]}]}

    def second(_: argparse.Namespace, seconds: float) -> dict[str, Any]:
        whole.append(rows_of(options, about))
        raise ValueError("broken")

    def last(_: argparse.Namespace, seconds: float) -> dict[str, Any]:
        whole.append(rows_of(options, about))
        assert seconds > 50, "all that is left"
        return {"failures": ["test_x"], "targets": [{"what": "x", "asked": "≤ 1", "measured": "2", "met": False}]}

    monkeypatch.setattr(gpu_check, "HERE", {"first": first, "second": second, "last": last})
    rows = [
        Row("first", 5, "what", "much"),
        Row("second", 5, "what", "much"),
        Row("far too long", 500, "what", "much"),
        Row("last", 5, "what", "much"),
    ]
    found = gpu_check.decide(rows, options, about)
    assert [[x["row"] for x in rows] for rows in whole] == [["first"], ["first", "second", "far too long"]]
    assert rows_of(options, about) == found
    assert [x.get("failures") for x in found] == [[], ["ValueError: broken"], None, ["test_x"]]
    assert found[2]["skipped"].startswith("needs 500 s, ")
    assert os.listdir(options.results) == ["nvidia-h200.json"]
    printed = capsys.readouterr().out
    assert "ok   first" in printed
    assert "FAIL second: ValueError: broken" in printed
    assert "skip far too long" in printed

    text = gpu_check.report(about, found)
    assert text.startswith("# NVIDIA H200\n")
    assert "| x | ≤ 1 | 2 | **missed** |" in text
    assert "| a\\|b | 2 (1 to 3) |" in text
    assert "Decides: what. Predicted: much." in text


def test_nothing_is_timed_without_an_extension(options: argparse.Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "HERE", {"build": lambda *_: {"failures": ["no nvcc"]}})
    found = gpu_check.decide([Row("build", 1, "", ""), Row("stream", 1, "", "")], options, {"gpu": "x"})
    assert [x["row"] for x in found] == ["build"]


def test_rows_run_in_a_worker_that_may_break(options: argparse.Namespace, tmp_path: Path) -> None:
    program = tmp_path / "rows.py"
    program.write_text(
        "import json, os, sys, time\n"
        "answers = os.fdopen(int(sys.argv[-1]), 'w')\n"
        "for line in sys.stdin:\n"
        "    row = json.loads(line)['row']\n"
        "    if row == 'dies': print('out of memory'); os._exit(3)\n"
        "    if row == 'hangs': time.sleep(60)\n"
        "    print(json.dumps({'failures': [], 'summary': row}), file=answers, flush=True)\n"
    )
    worker = gpu_check.Worker(options)
    worker.command = [sys.executable, str(program)]
    gpu_check.LOGS.mkdir()
    try:
        assert worker.ask("one", 10) == {"failures": [], "summary": "one"}
        assert worker.ask("dies", 10) == {"failures": ["the worker ended with status 3: out of memory"]}
        assert worker.ask("two", 10)["summary"] == "two"
        assert worker.ask("hangs", -4) == {"failures": ["not done in its time"]}
        assert worker.ask("three", 10)["summary"] == "three"
    finally:
        worker.end()


def test_a_real_row_on_this_cpu(options: argparse.Namespace) -> None:
    command = [sys.executable, str(BENCHMARKS / "gpu_check.py"), "--device", "cpu", "--tiny", "--seconds", "100"]
    command += ["--rows", "correct,stream", "--results", str(options.results)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    correct, stream = rows_of(options, {"gpu": "cpu, tiny"})
    assert len(correct["table"]) == 12
    assert {x["contender"] for x in stream["table"]} == {"floor", "fastkd-cpp", "the prior"}
    assert "graded_iou, large6, N = 64, device" in (options.results / "cpu-tiny.md").read_text()


def test_ncu_says_what_each_launch_moved() -> None:
    header = '==PROF== Connected\n"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n'
    values = {"dram__bytes_read.sum": "2,000", "dram__bytes_write.sum": "1,000", "lts__t_sector_hit_rate.pct": "3.5"}
    lines = "".join(f'"0","stream(Level)","{name}","byte","{value}"\n' for name, value in values.items())
    lines += '"1","fill","dram__bytes_read.sum","byte","1"\n'
    program = f"import json, gpu_timing; print(json.dumps(gpu_timing.read_ncu({header + lines!r}, 1000)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=BENCHMARKS)
    expected = [{"kernel": "stream", "units read": 2.0, "units written": 1.0, "L2 hits, %": 3.5}]
    assert json.loads(done.stdout.splitlines()[-1]) == expected


def test_tests_that_were_cut_short_are_counted(options: argparse.Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    output = (
        "[gw0] [ 10%] PASSED tests/a.py::b \n[gw1] [ 20%] FAILED tests/a.py::c \n[gw1] [ 30%] PASSED tests/a.py::d \n"
    )
    monkeypatch.setattr(gpu_check, "run", lambda *_: (124, output))
    found = gpu_check.test("cpp", False, 1)
    assert found["failures"] == ["tests/a.py::c"]
    assert found["summary"] == "2 passed so far; the others did not run in time"
    assert (gpu_check.LOGS / "tests_cpp.log").read_text() == output


def test_a_crash_and_no_test_at_all_are_failures(options: argparse.Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    for status, output, expected in (
        (5, "7 deselected\n", "exit status 5: 7 deselected"),
        (-11, "", "exit status -11: no output"),
    ):
        monkeypatch.setattr(gpu_check, "run", lambda *_, result=(status, output): result)
        assert gpu_check.test("cpp", False, 1)["failures"] == [expected]


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
    deadline = time.monotonic() + 30  # the kernel ends it soon; at most a zombie is left
    while child.exists() and child.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)
