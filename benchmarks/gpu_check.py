"""Checks on a GPU that the kernels are correct, how fast they are, and what that is worth in training.

    make gpu-check                                                    # on a machine with a GPU
    python benchmarks/gpu_check.py --dry                              # print the schedule, without a GPU
    python benchmarks/gpu_check.py --device cpu --tiny --seconds 300  # check on a CPU that the code of the rows runs

It needs no network, but torch, Triton, pytest and, unless the extension is built, nvcc. ``ROWS`` are sorted by
importance, each with the seconds that it needs, the question that it decides and the prediction for an H200. They run
in this order until the time is spent; a row that does not fit is skipped. The code of the rows is in ``gpu_timing.py``
and runs in a worker process, so that a row that hangs or breaks the device fails alone. Compilers run in the background
on the upper half of the cores, and are stopped while a row measures times. benchmarks/results/<gpu name>.json is
written after every row, the Markdown file at the end. The exit status is 1 if there was a failure.

An existing extension (fastkd/_C.abi3.so) is used if it loads and has code for this card; else it is built, which takes
a minute. This module must not import fastkd, because the extension may be built only later.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
LOGS = ROOT / "build" / "gpu_check"
TIMING = str(ROOT / "benchmarks" / "gpu_timing.py")
WRITING = 10  # seconds that are reserved for the reports
WARMERS = 6  # processes that compile Triton's kernels
COMPILED = 3  # cases of torch.compile, each compiled by a process
TESTS = ("parity", "ops", "one_pass", "info_map", "gpu", "priors", "loss")
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")

Result = dict[str, Any]


class Row(NamedTuple):
    """One question that is decided on the GPU."""

    name: str  # name of the function in ``gpu_timing.py``, or in this module
    seconds: float  # time that it may take; the last row gets all the time that is left
    decides: str
    predicted: str  # for an H200
    needs: tuple[str, ...] = ()  # background compilers that it waits for
    timed: bool = True  # whether background compilers are stopped during the row


ROWS = (
    Row(
        "build", 15, "whether the existing extension loads and has code for the card; else it is built, in a minute",
        "loads (abi3; glibc 2.36 on 2.39)", timed=False,
    ),
    Row(
        "correct", 50, "whether results are correct: 24 combinations of backend, dtype, layout and map against "
        "float64, in memory filled with NaN, and the ops of prior and factor against those of the CPU",
        "all correct, the same bits in two runs", needs=("triton",), timed=False,
    ),
    Row(
        "ceilings", 15, "the time of the floor, two reads and one write, and of the adapters' bias in cuDNN",
        "add at 4.2 TB/s or more; the bias about 0.1 ms of tiny5, N = 64",
    ),
    Row(
        "host", 25, "the time on the host: one autograd.Function, cached plans, priors and factor as one op each",
        "distill_loss 0.25 ms, was 1.2; DistillLoss 0.4, was 2.5; a prior under 0.05, was 5 to 7",
    ),
    Row(
        "stream", 30, "one streaming pass where the weight of a cell is its prior (graded_iou)",
        "large6 bf16 N = 64 0.39 to 0.43 ms, same6 0.17 to 0.19; float32 0.80 and 0.34", needs=("triton",),
    ),
    Row(
        "score_pass", 25, "for other maps: a score pass over the teacher and then the stream, or tiles kept on chip",
        "large6 bf16 N = 64 0.55 to 0.58 ms; above 1.45 times the floor, keep tiles on chip", needs=("triton",),
    ),
    Row(
        "wall", 15, "the time until the caller has the result, at a size where the host decides (same6, N = 16)",
        "0.25 to 0.40 ms, was 1.46",
    ),
    Row(
        "compiled", 45, "whether fastkd is faster than torch.compile of the plain step, in two cases",
        "torch.compile large6 0.72 ms on the device, same6 1.3 ms by the wall", needs=("compile 0", "compile 1"),
    ),
    Row(
        "training", 60, "the gain in training: a step of YOLOv3 to YOLOv3-tiny at 416 px, N = 16 and 64, bfloat16",
        "was 8 to 10 ms on the host for distillation; now faster than eager at both",
    ),
    Row(
        "two_passes", 20, "whether the loops of the two functional passes are pipelined",
        "forward of large6 bf16 0.30 ms, was 0.38",
    ),
    Row(
        "adapters", 20, "the bias in the loss, against a convolution with bias (tiny5, N = 64)",
        "conv and loss 0.84 ms, bias folded 0.67, and streaming 0.50",
    ),
    Row(
        "rescale", 12, "the cost of an upstream gradient of 1, and of another one",
        "under 0.01 ms, and two units",
    ),
    Row(
        "bytes_moved", 35, "units that are moved, as measured by ncu",
        "stream 3.0, score pass and stream 4.0; forward 2.0, backward 3.0",
    ),
    Row(
        "compiled_image", 20, "torch.compile of self_information", "0.72 ms at large6 bf16 N = 64",
        needs=("compile 2",),
    ),
    Row("others", 25, "no regressions: N = 1, NCHW, float16, in a CUDA graph", "at most today's times"),
    Row(
        "tests", 30, "whether anything is broken: sanitizers over a small matrix, and the tests, in parallel, in all "
        "the time that is left", "ok", timed=False,
    ),
)  # fmt: skip

SMALL_MATRIX = """
import sys, torch
sys.path[:0] = ["tests", "benchmarks"]
from samples import levels
from workloads import FallingTask, loss_step, shrink, step_inputs
import fastkd
from fastkd.priors import box_balance, iou_mask
for backend in ("cpp", "triton"):
    for layout in ("contiguous", "channels_last", "cropped"):
        for dtype, info in ((torch.bfloat16, "attention"), (torch.float32, fastkd.InfoMap("entropy", "minmax")),
                            (torch.bfloat16, "fgfi"), (torch.float16, "energy")):
            with torch.device("cuda"):
                sample = levels(dtype, layout, shapes=[(2, 7, 5, 3), (2, 64, 9, 9)])
            loss = 2 * fastkd.distill_loss(**sample, info_map=info, backend=backend)
            torch.autograd.grad(loss, sample["student_feats"])
shrink()
for dtype in (torch.bfloat16, torch.float32):
    x = step_inputs("tiny5", 2, dtype, True, "cuda", adapters=True)
    step, task = loss_step("fastkd", x), FallingTask("cuda")
    for _ in range(3):
        step(task.fall())
box_balance(x.boxes, [(8, 8), (4, 4)], (64, 64), 2)
iou_mask(x.boxes, x.anchors[:2], [(8, 8), (4, 4)], (64, 64), 2)
torch.cuda.synchronize()
"""
LOADS = """
import torch, fastkd
if device == "cuda":
    import fastkd.kernels
ops = ["distill_cpp", "distill_cpp_backward", "distill_cpp_one_pass", "iou_mask", "box_balance", "update_factor"]
has = torch._C._dispatch_has_kernel_for_dispatch_key
missing = [x for x in ops if not has(f"fastkd::{x}", device.upper())]
print("LOADS", fastkd.backends(device)["cpp"] or f"no {', '.join(missing)}" * bool(missing) or "yes")
"""


# ---- processes


def run(command: Sequence[str], seconds: float, **environment: str) -> tuple[int, str]:
    """Run a command; return exit status and output. After the timeout it is killed with its children: status 124."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=variables(**environment), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=max(seconds, 1))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its workers too, which would disturb the next times
        output, _ = process.communicate()
        return 124, output
    return process.returncode, output


def variables(**more: str) -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    of_process = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": paths, **more}
    of_process.pop("TRITON_INTERPRET", None)
    return of_process


def on_cores(upper: bool) -> list[str]:
    """Return a command prefix for half of the cores: the upper half is for compilers, the lower half for timing."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    half = cores[len(cores) // 2 :] if upper else cores[: len(cores) // 2]
    return ["taskset", "-c", ",".join(map(str, half))] if half and shutil.which("taskset") else []


class Background:
    """Background compilers, which fill the caches of Triton and torch.compile, by the names in ``Row.needs``."""

    def __init__(self, options: argparse.Namespace) -> None:
        of = [*on_cores(upper=True), "nice", sys.executable, TIMING, *target(options)]
        commands = {
            **{f"compile {i}": [[*of, "--compile", str(i)]] for i in range(COMPILED)},
            "triton": [[*of, "--warm", f"{i}/{WARMERS}"] for i in range(WARMERS)] if options.device == "cuda" else [],
        }
        log = (LOGS / "background.log").open("w")
        self.jobs = {name: [self._start(command, log) for command in each] for name, each in commands.items()}

    @staticmethod
    def _start(command: list[str], log: Any) -> subprocess.Popen[bytes]:
        more = {"TORCHINDUCTOR_COMPILE_THREADS": "2"}
        return subprocess.Popen(
            command, cwd=ROOT, env=variables(**more), stdout=log, stderr=log, start_new_session=True
        )  # fmt: skip

    def signal(self, number: int, names: Sequence[str] | None = None) -> None:
        for job in self._of(self.jobs if names is None else names):
            if job.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(job.pid, number)

    def wait(self, names: Sequence[str], seconds: float) -> None:
        """Wait for compilers; what they have not finished, the row compiles itself.

        Compilers of torch.compile are then killed: stopped, they would keep a lock that the row waits for.
        """
        end = time.monotonic() + seconds
        for job in self._of(names):
            with contextlib.suppress(subprocess.TimeoutExpired):
                job.wait(max(end - time.monotonic(), 0.01))
        self.signal(signal.SIGKILL, [name for name in names if name.startswith("compile")])

    def _of(self, names: Iterable[str]) -> list[subprocess.Popen[bytes]]:
        return [job for name in names for job in self.jobs.get(name, ())]

    def end(self) -> None:
        self.signal(signal.SIGKILL)


class Worker:
    """The process that runs the rows of ``gpu_timing.py``; if it has ended, a new one is started."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.command = [*on_cores(upper=False), sys.executable, TIMING, *target(options)]
        self.process: subprocess.Popen[str] | None = None
        self.answers = -1

    def ask(self, row: str, seconds: float) -> Result:
        running = self.process is not None and self.process.poll() is None
        process: Any = self.process if running else self._start()
        end = time.monotonic() + seconds
        print(json.dumps({"row": row, "seconds": seconds}), file=process.stdin, flush=True)
        answer = b""
        while not answer.endswith(b"\n"):
            left = end + 5 - time.monotonic()  # rows watch their own time; this ends one that hangs
            if left <= 0 or not select.select([self.answers], [], [], left)[0]:
                self.end()
                return {"failures": ["not done in its time"]}
            piece = os.read(self.answers, 1 << 16)
            if not piece:
                return {"failures": [f"the worker ended with status {process.wait()}: {last_line(self.log)}"]}
            answer += piece
        result: Result = json.loads(answer)
        return result

    @property
    def log(self) -> str:
        return (LOGS / "worker.log").read_text(errors="replace")

    def _start(self) -> subprocess.Popen[str]:
        self.end()
        self.answers, write = os.pipe()
        log = (LOGS / "worker.log").open("a")
        self.process = subprocess.Popen(
            [*self.command, "--answers", str(write)], cwd=ROOT, env=variables(), stdin=subprocess.PIPE, stdout=log,
            stderr=log, text=True, pass_fds=[write], start_new_session=True,
        )  # fmt: skip
        os.close(write)
        return self.process

    def end(self) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            os.close(self.answers)
            self.process = None


def target(options: argparse.Namespace) -> list[str]:
    return ["--device", options.device, *(["--tiny"] if options.tiny else [])]


def last_line(output: str) -> str:
    lines = [line for line in output.splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


# ---- rows that are processes of their own


def build(options: argparse.Namespace, seconds: float) -> Result:
    """Use the existing extension if it loads and has the kernels; else build one for this card."""
    end = time.monotonic() + seconds
    code = f"device = {options.device!r}{LOADS}"
    found = loads(code, 60)
    if found != "yes" and options.device == "cuda":
        install = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "-e", "."]
        major, minor = torch.cuda.get_device_capability()
        ways = [{"FASTKD_CPP": "0"}] if "fastkd.kernels" in found else []  # it may work once the package is installed
        for more in (*ways, {"FASTKD_CUDA_ARCH": f"{major}{minor}"}):
            status, output = run(install, max(end - time.monotonic(), 150), **more)
            keep("build", output)
            if status:
                return {"failures": [f"exit status {status}: {last_line(output)}"]}
            before, found = found, loads(code, 60)
            if found == "yes":
                return {"failures": [], "summary": f"{'installed' if 'FASTKD_CPP' in more else 'built'}, as: {before}"}
    return {"failures": [] if found == "yes" else [found], "summary": "the existing extension is used"}


def loads(code: str, seconds: float) -> str:
    status, output = run([sys.executable, "-c", code], seconds)
    found = re.findall(r"^LOADS (.*)$", output, re.MULTILINE)
    return found[0] if found else f"exit status {status}: {last_line(output)}"


def tests(options: argparse.Namespace, seconds: float) -> Result:
    """Run sanitizers and tests in parallel."""
    if options.device != "cuda":
        return {"failures": [], "summary": "only on a GPU"}
    with ThreadPoolExecutor() as pool:
        parts = [pool.submit(test, x, options.full, seconds) for x in ("cpp", "triton")]
        parts += [pool.submit(sanitize, x, seconds) for x in SANITIZERS]
        found = [part.result() for part in parts]
    return {
        "failures": [f"{x['part']}: {failure}" for x in found for failure in x["failures"]],
        "table": [{"part": x["part"], "found": x["summary"]} for x in found],
        "summary": f"{sum(not x['failures'] for x in found)} of {len(found)} parts without failures",
    }


def test(backend: str, full: bool, seconds: float) -> Result:
    files = [f"tests/test_{name}.py" for name in TESTS if (ROOT / f"tests/test_{name}.py").exists()]
    workers = ["-n", "6"] if importlib.util.find_spec("xdist") else []
    only = f"{backend}-cuda" if backend == "triton" else "cuda and not triton"
    options = ["-v", "--tb=line", "-k", only, *(["--full"] if full or backend == "cpp" else []), *workers]
    status, output = run([sys.executable, "-m", "pytest", *options, *files], seconds)
    counts = re.findall(r"^=+ (.*\b(?:passed|failed|error).* in .*?) =+$", output, re.MULTILINE)
    counts = counts or [f"{len(re.findall(' PASSED ', output))} passed so far"]
    errors = re.findall(r"^(?:cpp|triton)-cuda .*eager's.*$", output, re.MULTILINE)
    errors = [re.sub(" +", " ", line) for line in errors]
    failures = failed_tests(output)
    if status == 124:
        counts[-1] += "; the others did not run in time"
    elif status and not failures:
        failures = [f"exit status {status}: {last_line(output)}"]
    keep(f"tests {backend}", output)
    return {"part": f"tests, {backend}", "failures": failures, "summary": "; ".join([counts[-1], *errors])}


def failed_tests(output: str) -> list[str]:
    """Return the failed tests, with messages, from pytest's summary or, if it has none, from its lines per test."""
    summary = re.findall(r"^(?:FAILED|ERROR) (.*)$", output, re.MULTILINE)
    one_by_one = re.findall(r"^\[gw\d+\] \[ *\d+%\] (?:FAILED|ERROR) (.*\S)", output, re.MULTILINE)
    one_by_one += re.findall(r"^(\S.*) (?:FAILED|ERROR) +\[ *\d+%\]$", output, re.MULTILINE)
    return summary or one_by_one


def sanitize(tool: str, seconds: float) -> Result:
    part, program = f"compute-sanitizer {tool}", shutil.which("compute-sanitizer")
    if program is None:
        return {"part": part, "failures": [], "summary": "skipped: compute-sanitizer is not on the PATH"}
    command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", SMALL_MATRIX]
    status, output = run(command, seconds, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    keep(part, output)
    if "Device not supported" in output:
        return {"part": part, "failures": [], "summary": "skipped: it does not support this machine"}
    summaries = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", output)
    found = re.findall(r"========= ((?:Invalid|Error|Uninitialized|Barrier|Potential|Race).*)", output)
    at = re.findall(r"=========\s+at (.*)", output)
    failures = [f"{len(found)} reports, the first: {found[0]} at {at[0] if at else '?'}"] if found else []
    if status not in (0, 124) and not failures:
        failures = [f"exit status {status}: {last_line(output)}"]
    return {
        "part": part,
        "failures": failures,
        "summary": "not finished in time" if status == 124 else [*summaries, "?"][0],
    }


def keep(name: str, output: str) -> None:
    """Write the whole output to ``build/gpu_check``."""
    LOGS.mkdir(parents=True, exist_ok=True)
    (LOGS / f"{re.sub('[^a-z]+', '_', name)}.log").write_text(output)


HERE: dict[str, Callable[[argparse.Namespace, float], Result]] = {"build": build, "tests": tests}


# ---- the schedule


def plan(rows: Sequence[Row], seconds: float) -> Iterator[tuple[float, Row, bool]]:
    """Yield for each row the start, and whether it fits, if all rows take the seconds that they may."""
    at, end = 0.0, seconds - WRITING
    for row in rows:
        fits = at + row.seconds <= end
        yield at, row, fits
        at += row.seconds * fits


def print_plan(rows: Sequence[Row], seconds: float) -> None:
    for at, row, fits in plan(rows, seconds):
        print(f"{at:4.0f} s  {'' if fits else 'SKIP '}{row.name}, {row.seconds:g} s: {row.decides}")
        print(f"        predicted: {row.predicted}")


def decide(rows: Sequence[Row], options: argparse.Namespace, about: Result) -> list[Result]:
    """Run every row that fits, in order; the results are written to the disk after each row."""
    end, found = time.monotonic() + options.seconds - WRITING, []
    worker, background = Worker(options), None
    LOGS.mkdir(parents=True, exist_ok=True)
    try:
        for row in rows:
            begin = time.monotonic()
            result: Result = {"row": row.name, "decides": row.decides, "predicted": row.predicted}
            if row.seconds > end - begin:
                result["skipped"] = f"needs {row.seconds:g} s, {max(end - begin, 0):.0f} s were left"
            else:
                if background is not None:
                    background.signal(signal.SIGCONT)
                    background.wait(row.needs, min(row.seconds, end - begin - row.seconds))
                    if row.timed or row is rows[-1]:
                        background.signal(signal.SIGSTOP)
                allowed = end - time.monotonic()
                if row is not rows[-1]:
                    allowed = min(allowed, 2 * row.seconds)
                result |= attempt(HERE.get(row.name), options, worker, row, allowed)
                result["seconds"] = round(time.monotonic() - begin, 1)
            found.append(result)
            print_result(result)
            write(options, about, found)
            if row.name == "build":
                if result.get("failures"):
                    break
                background = Background(options)
    finally:
        worker.end()
        if background is not None:
            background.end()
    return found


def attempt(here: Any, options: argparse.Namespace, worker: Worker, row: Row, seconds: float) -> Result:
    """Run a row; an exception becomes its failure, so that the other rows still run."""
    try:
        found: Result = worker.ask(row.name, seconds) if here is None else here(options, seconds)
        return found
    except Exception as error:
        return {"failures": [f"{type(error).__name__}: {error}"]}


def print_result(result: Result) -> None:
    for failure in result.get("failures", ()):
        print(f"FAIL {result['row']}: {failure}", flush=True)
    if "skipped" in result:
        print(f"skip {result['row']}: {result['skipped']}", flush=True)
    elif not result["failures"]:
        print(f"ok   {result['row']}, {result['seconds']} s: {result.get('summary', '')}", flush=True)


# ---- the report


def machine(options: argparse.Namespace) -> Result:
    """Describe the machine, after which the files are named."""
    about: Result = {"gpu": "cpu, tiny" if options.tiny else "cpu"}
    if options.device == "cuda":
        card = torch.cuda.get_device_properties(0)
        about = {"gpu": card.name, "memory_gib": round(card.total_memory / 2**30)}
        about["multiprocessors"] = card.multi_processor_count
    nvcc = re.findall(r"release ([\d.]+)", run(["nvcc", "--version"], 20)[1]) if shutil.which("nvcc") else []
    status, commit = run(["git", "describe", "--always", "--dirty"], 20) if shutil.which("git") else (1, "")
    triton = importlib.util.find_spec("triton") and __import__("triton").__version__
    return {
        **about,
        "torch": torch.__version__,
        "triton": triton,
        "nvcc": nvcc[0] if nvcc else None,
        "python": platform.python_version(),
        "commit": None if status else commit.strip(),
        "arguments": " ".join(sys.argv[1:]),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def results_file(folder: Path, about: Result) -> Path:
    return folder / (re.sub(r"\W+", "-", about["gpu"].lower()).strip("-") + ".json")


def write(options: argparse.Namespace, about: Result, found: list[Result]) -> Path:
    path = results_file(options.results, about)
    replace(path, json.dumps({**about, "rows": found}, indent=1) + "\n")
    return path


def replace(path: Path, text: str) -> None:
    """Write a file atomically: a file beside it is written and renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".partial")
    beside.write_text(text)
    beside.replace(path)


def report(about: Result, found: Sequence[Result]) -> str:
    """Return the report as Markdown: the targets, then every row with its prediction and its table."""
    lines = [
        f"# {about['gpu']}", "",
        ", ".join(f"{key} {value}" for key, value in about.items() if key != "gpu" and value is not None), "",
        "`make gpu-check`, in order of importance. Times are medians (and quartiles). Times of the device are measured "
        "by events, each after a flush of the L2 cache and a sleep of the device; *wall* includes the launches. "
        "Contenders of a table were timed in the same rounds. The floor is `torch.add` of student and teacher into a "
        "third tensor: three times the bytes of all student features.", "",
    ]  # fmt: skip
    asked = [x for result in found for x in result.get("targets", ())]
    if asked:
        lines += ["| what, on an H200 | target | measured | |", "|---|---|---|---|"]
        lines += [
            f"| {x['what']} | {x['asked']} | {x['measured']} | {'met' if x['met'] else '**missed**'} |" for x in asked
        ]
        lines.append("")
    for x in found:
        state = x.get("skipped") or "; ".join(x["failures"]) or "ok"
        took = f", {x['seconds']} s" if "seconds" in x else ""
        lines += [f"## {x['row']}{took}", "", f"Decides: {x['decides']}. Predicted: {x['predicted']}.", ""]
        lines += [f"{'Skipped: ' if 'skipped' in x else ''}{state}. {x.get('summary', '')}".strip(), ""]
        lines += table(x.get("table", ()))
    return "\n".join(lines)


def table(rows: Sequence[Result]) -> list[str]:
    if not rows:
        return []
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    lines += [f"| {' | '.join(cell(row.get(name)) for name in names)} |" for row in rows]
    return [*lines, ""]


def cell(value: Any) -> str:
    """Return the text of a table's cell; a list of three numbers is the quartiles."""
    if isinstance(value, list):
        low, middle, high = (f"{x:.3g}" if abs(x) < 1000 else f"{x:.0f}" for x in value)
        return f"{middle} ({low} to {high})"
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value).replace("|", "\\|")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=520, help="time for all rows")
    parser.add_argument("--rows", help="run only these, separated by commas, in the order of ROWS")
    parser.add_argument("--dry", action="store_true", help="print the schedule")
    parser.add_argument("--full", action="store_true", help="run all of Triton's parity tests, which takes an hour")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes and few repeats, to check that the code runs")
    parser.add_argument("--results", type=Path, help="folder (default: benchmarks/results; for a CPU build/gpu_check)")
    options = parser.parse_args()
    only = options.rows.split(",") if options.rows else [row.name for row in ROWS]
    rows = [row for row in ROWS if row.name in only]
    if options.dry:
        print_plan(rows, options.seconds)
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        print("gpu-check: this torch finds no GPU")
        return 1
    options.results = options.results or (RESULTS if options.device == "cuda" else LOGS)
    about = machine(options)
    found = decide(rows, options, about)
    path = write(options, about, found)
    replace(path.with_suffix(".md"), report(about, found))
    print(f"wrote {path} and .md")
    return 1 if any(x.get("failures") for x in found) else 0


if __name__ == "__main__":
    sys.exit(main())
