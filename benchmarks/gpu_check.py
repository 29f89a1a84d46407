"""Proves the GPU kernels on the GPU that is here, then times them: ``make gpu-check``.

    python benchmarks/gpu_check.py [--seconds 520]

Offline, on a machine that has torch, Triton, nvcc and pytest: builds the extension for this card; runs the parity,
operator, edge and GPU tests for both backends; a small matrix under compute-sanitizer; then times every workload.
Writes benchmarks/results/<gpu name>.json and .md, prints one line per failure, and ends with status 1 if there was any.
Parity is over the whole product of options for the CUDA kernels, and over a part of it for Triton, which compiles each;
with ``--full``, which takes longer, over all of it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
LOGS = ROOT / "build" / "gpu_check"
TESTS = [f"tests/test_{name}.py" for name in ("parity", "ops", "one_pass", "info_map", "gpu")]
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
SMALL_MATRIX = """
import sys, torch
sys.path.insert(0, "tests")
from samples import levels, loss_and_gradients
import fastkd
for backend in ("cpp", "triton"):
    for layout in ("contiguous", "channels_last", "cropped"):
        for dtype, info in ((torch.bfloat16, "attention"), (torch.float32, fastkd.InfoMap("entropy", "minmax"))):
            with torch.device("cuda"):
                sample = levels(dtype, layout, shapes=[(2, 7, 5, 3), (2, 64, 9, 9)])
            for one_pass in (False, True)[: 1 + (backend == "triton")]:
                loss = fastkd.distill_loss(
                    **sample, info_map=info, reduction="none", backend=backend, one_pass=one_pass
                )
                loss_and_gradients(loss, sample["student_feats"])
torch.cuda.synchronize()
"""


class Outcome(NamedTuple):
    """What one stage found."""

    stage: str
    failures: list[str]
    summary: str


def run(command: list[str], seconds: float, **environment: str) -> tuple[int, str]:
    """Exit status and output; 124 where it took longer, and was ended with all that it had started."""
    variables = {**os.environ, "PYTHONUNBUFFERED": "1", **environment}
    variables.pop("TRITON_INTERPRET", None)
    process = subprocess.Popen(
        command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=max(seconds, 1))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its workers too: they would disturb what is timed next
        output, _ = process.communicate()
        return 124, output
    return process.returncode, output


def outcome(stage: str, status: int, output: str, failures: list[str], summary: str) -> Outcome:
    """As ``failures`` says; a bad status without any is one. The whole output is kept in ``build/gpu_check``."""
    LOGS.mkdir(parents=True, exist_ok=True)
    (LOGS / f"{re.sub('[^a-z]+', '_', stage)}.log").write_text(output)
    if status == 124:
        failures = [*failures, "not done in its time"]
    elif status and not failures:
        lines = [line for line in output.splitlines() if line.strip()]
        failures = [f"exit status {status}: {lines[-1] if lines else 'no output'}"]
    return Outcome(stage, failures, summary)


# ---- stages


def build(seconds: float) -> Outcome:
    major, minor = torch.cuda.get_device_capability()
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "-e", "."]
    start = time.monotonic()
    status, output = run(command, seconds, FASTKD_CUDA_ARCH=f"{major}{minor}")
    return outcome("build", status, output, [], f"{time.monotonic() - start:.0f} s for sm_{major}{minor}")


def test(backend: str, full: bool, seconds: float) -> Outcome:
    workers = ["-n", "6" if backend == "cpp" else "10"] if importlib.util.find_spec("xdist") else []
    options = ["-v", "--tb=line", "-k", f"{backend}-cuda", *(["--full"] if full else []), *workers]
    status, output = run([sys.executable, "-m", "pytest", *options, *TESTS], seconds)
    failures = failed_tests(output)
    counts = re.findall(r"^=+ (.*\b(?:passed|failed|error).* in .*?) =+$", output, re.MULTILINE)
    counts = counts or [f"{len(re.findall(' PASSED ', output))} passed so far"]
    errors = re.findall(r"^(?:cpp|triton)-cuda .*eager's.*$", output, re.MULTILINE)
    errors = [re.sub(" +", " ", line) for line in errors]
    return outcome(f"tests, {backend}", status, output, failures, "; ".join([counts[-1], *errors]))


def failed_tests(output: str) -> list[str]:
    """From pytest's summary, with messages; or, where it did not come to that, from what it said test by test."""
    summary = re.findall(r"^(?:FAILED|ERROR) (.*)$", output, re.MULTILINE)
    one_by_one = re.findall(r"^\[gw\d+\] \[ *\d+%\] (?:FAILED|ERROR) (.*\S)", output, re.MULTILINE)
    one_by_one += re.findall(r"^(\S.*) (?:FAILED|ERROR) +\[ *\d+%\]$", output, re.MULTILINE)
    return summary or one_by_one


def sanitize(tool: str, seconds: float) -> Outcome:
    stage, program = f"compute-sanitizer {tool}", shutil.which("compute-sanitizer")
    if program is None:
        return Outcome(stage, [], "skipped: compute-sanitizer is not on the PATH")
    command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", SMALL_MATRIX]
    status, output = run(command, seconds, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    if "Device not supported" in output:
        return Outcome(stage, [], "skipped: it does not support this machine (Device not supported)")
    summaries = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", output)
    found = re.findall(r"========= ((?:Invalid|Error|Uninitialized|Barrier|Potential|Race).*)", output)
    at = re.findall(r"=========\s+at (.*)", output)
    failures = [f"{len(found)} reports, the first: {found[0]} at {at[0] if at else '?'}"] if found else []
    return outcome(stage, status, output, failures, summaries[-1] if summaries else "no summary")


def workloads() -> list[str]:
    """Their names, asked of a process that sees what was built since this one began."""
    program = "import sys; sys.path.insert(0, 'benchmarks'); from workloads import WORKLOADS; print(*WORKLOADS)"
    status, output = run([sys.executable, "-c", program], 60)
    return [] if status else output.split()


def compile_ahead(workload: str, seconds: float) -> Outcome:
    """Fill torch.compile's cache beside the tests, so that the timings need not wait for it."""
    command = [sys.executable, "benchmarks/gpu_timing.py", "--compile", workload]
    status, _ = run(command, seconds, TORCHINDUCTOR_COMPILE_THREADS="2")
    return Outcome(f"torch.compile of {workload} ahead", [], f"exit status {status}")  # what is missing comes later


def time_all(seconds: float) -> tuple[Outcome, dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "times.json"
        command = [sys.executable, "benchmarks/gpu_timing.py", "--out", str(out), "--seconds", str(seconds - 30)]
        status, output = run(command, seconds)
        found = json.loads(out.read_text()) if out.exists() else {"times": [], "left_out": []}
    if status in (0, 124):  # cases for which there was no time are left out, but one there must be
        status = 0 if found["times"] else 124
    failures = [f"{x['workload']}, N = {x['n']}, {x['dtype']}, {x['layout']}, {x['provider']}: {x['error']}"
                for x in found["times"] if "error" in x]  # fmt: skip
    found["times"] = [x for x in found["times"] if "error" not in x]
    left_out = len(found["left_out"])
    summary = f"{len(found['times'])} rows" + (f"; {left_out} cases left out for want of time" if left_out else "")
    return outcome("timing", status, output, failures, summary), found


# ---- report


def machine() -> dict[str, Any]:
    card = torch.cuda.get_device_properties(0)
    nvcc = re.findall(r"release ([\d.]+)", run(["nvcc", "--version"], 20)[1]) if shutil.which("nvcc") else []
    commit = run(["git", "describe", "--always", "--dirty"], 20)[1].strip() if shutil.which("git") else None
    return {
        "gpu": card.name,
        "memory_gib": round(card.total_memory / 2**30),
        "multiprocessors": card.multi_processor_count,
        "torch": torch.__version__,
        "triton": __import__("triton").__version__,
        "nvcc": nvcc[0] if nvcc else None,
        "python": platform.python_version(),
        "commit": commit,
        "arguments": " ".join(sys.argv[1:]),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def targets(found: dict[str, Any]) -> list[str]:
    """What the kernels are measured by: bfloat16, channels_last, forward and backward."""
    lines = []
    for workload, n, of in (("large6", 64, "both_ms"), ("same6", 16, "wall_ms")):
        case = (workload, n, "bfloat16", "channels_last")
        rows = [x for x in found["times"] if (x["workload"], x["n"], x["dtype"], x["layout"]) == case]
        medians = {x["provider"]: x[of][1] for x in rows}
        for x in rows:
            if x["provider"].startswith("fastkd"):
                floor = 1e3 * x["bytes"] / found["copy_bytes_per_second"]
                times = {name: medians[name] / x[of][1] for name in ("eager", "torch.compile") if name in medians}
                faster = ", ".join(f"{ratio:.1f} times as fast as {name}" for name, ratio in times.items())
                lines.append(
                    f"- {workload}, N = {n}, {x['provider']}: {x['both_ms'][1] / floor:.2f} times the floor of two "
                    f"passes on the device, {x['both_ms'][1] / floor * 5 / 3:.2f} times that of one; {faster} ({of}); "
                    f"{1e3 * x['graph_ms'][1]:.0f} µs in a graph"
                )
    return lines


def table(found: dict[str, Any]) -> list[str]:
    """Markdown, medians: a provider's time by the first of ours, and of ours the share of a copy's bandwidth."""
    rows = [
        "| workload | N | dtype | layout | provider | forward, ms | backward, ms | both, ms (quartiles) | wall, ms "
        "| in a graph, ms | times ours | share of copy | peak, MiB |",
        "|" + "---|" * 13,
    ]
    ours: dict[tuple[Any, ...], float] = {}
    for x in found["times"]:
        case = (x["workload"], x["n"], x["dtype"], x["layout"])
        both = x["both_ms"][1]
        first = ours.setdefault(case, both)
        of_copy = x["bytes"] / (both / 1e3) / found["copy_bytes_per_second"]
        graph, share = (f"{x['graph_ms'][1]:.3f}", f"{of_copy:.0%}") if "graph_ms" in x else ("", "")
        rows.append(
            f"| {' | '.join(map(str, case))} | {x['provider']} | {x['forward_ms'][1]:.3f} | {x['backward_ms'][1]:.3f} "
            f"| {both:.3f} ({x['both_ms'][0]:.3f} to {x['both_ms'][2]:.3f}) | {x['wall_ms'][1]:.3f} | {graph} "
            f"| {both / first:.2f} | {share} | {x['peak_bytes'] / 2**20:.1f} |"
        )
    return rows


def write_results(about: dict[str, Any], outcomes: list[Outcome], found: dict[str, Any]) -> Path:
    """The JSON and the Markdown, each written beside and renamed."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / (re.sub(r"\W+", "-", about["gpu"].lower()).strip("-") + ".json")
    checks = [x._asdict() for x in outcomes]
    lines = [
        f"# {about['gpu']}", "",
        ", ".join(f"{key} {value}" for key, value in about.items() if key != "gpu"), "",
        "`make gpu-check`; medians of 25 repeats. Times of forward, backward, both and in a graph are the device's, "
        "after a flush of the L2 cache; wall has the launches in it.", "",
        *(f"- {x.stage}: {'; '.join(x.failures) or 'ok'} ({x.summary})" for x in outcomes), "",
    ]  # fmt: skip
    if found["times"]:
        copy = f"A copy moves {found['copy_bytes_per_second'] / 1e12:.2f} TB/s, read and written."
        lines += [copy, "", *targets(found), "", *table(found)]
    for target, text in (
        (path, json.dumps({**about, "checks": checks, **found}, indent=1)),
        (path.with_suffix(".md"), "\n".join(lines) + "\n"),
    ):
        beside = target.with_suffix(".partial")
        beside.write_text(text)
        beside.replace(target)
    return path


def attempt(stage: str, function: Callable[..., Outcome], *arguments: Any) -> Outcome:
    """A stage that breaks must not cost what the others found."""
    try:
        return function(*arguments)
    except Exception as error:
        return Outcome(stage, [f"{type(error).__name__}: {error}"], "")


def check_all(full: bool, seconds: float) -> list[Outcome]:
    """Tests and sanitizers, beside each other; and beside them what the timings will need."""
    with ThreadPoolExecutor(max_workers=16) as pool:
        stages = [pool.submit(attempt, f"tests, {x}", test, x, full or x == "cpp", seconds) for x in ("cpp", "triton")]
        stages += [pool.submit(attempt, f"compute-sanitizer {x}", sanitize, x, seconds) for x in SANITIZERS]
        stages += [pool.submit(attempt, f"torch.compile of {x} ahead", compile_ahead, x, seconds) for x in workloads()]
        return [x.result() for x in stages]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=520, help="for all of it")
    parser.add_argument("--timing", type=float, default=200, help="seconds kept for the timings, which run alone")
    parser.add_argument(
        "--full", action="store_true", help="the whole product of options for Triton too: give it an hour"
    )
    options = parser.parse_args()
    end = time.monotonic() + options.seconds
    if not torch.cuda.is_available():
        print("gpu-check: this torch finds no GPU")
        return 1
    about, found = machine(), {"times": [], "left_out": []}
    outcomes = [attempt("build", build, end - time.monotonic())]
    path = write_results(about, outcomes, found)
    if not outcomes[0].failures:
        outcomes += check_all(options.full, end - time.monotonic() - options.timing)
        write_results(about, outcomes, found)
        timing, found = time_all(end - time.monotonic())
        outcomes.append(timing)
        write_results(about, outcomes, found)
    for x in outcomes:
        for failure in x.failures:
            print(f"FAIL {x.stage}: {failure}")
        if not x.failures:
            print(f"ok   {x.stage}: {x.summary}")
    print(f"wrote {path.relative_to(ROOT)} and .md")
    return 1 if any(x.failures for x in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
