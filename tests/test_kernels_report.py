"""Every GPU kernel compiled for cards that are not here, and its machine code read: little spills, loads are wide."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastkd import ops

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
from machine_code import Kernel, find_cuobjdump, widths  # noqa: E402  found beside the package

needs_tools = pytest.mark.skipif(find_cuobjdump() is None, reason="needs cuobjdump, as in Triton's wheel")


def report(*arguments: str) -> list[str]:
    """Rows of the table, in a process of its own because here Triton may interpret."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(BENCHMARKS / "kernels_report.py"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return [line for line in done.stdout.splitlines() if "| sm_" in line]


@needs_tools
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_triton(capability: int, request: pytest.FixtureRequest) -> None:
    if capability != 90 and not request.config.getoption("--full"):
        pytest.skip("a minute for each card: with --full")
    rows = report("--only", "triton", "--capability", str(capability))
    for name in ("forward", "backward", "one_pass", "rescale"):
        for dtype in ("bfloat16", "float16", "float32"):
            for layout in ("NCHW", "channels_last"):
                assert any(row.startswith(f"| {name} | Triton, {dtype}, {layout}") for row in rows), (name, dtype)


@needs_tools
@pytest.mark.skipif(not ops._cuda_archs, reason="the extension was built without nvcc")
def test_cuda() -> None:
    rows = report("--only", "cuda")
    assert len(rows) == 15 * len(ops._cuda_archs)


def test_what_the_report_would_find() -> None:
    code = [
        "LDG.E.128.CONSTANT R4, [R2.64]",
        "LDG.E.U16 R4, [R2.64]",
        "LDG.E R4, [R2.64]",
        "@P0 LDG.E.ENL2.256 R4, [R2.64]",
        "STG.E.64 [R2.64], R4",
    ]
    assert widths(code, "LDG") == [16, 2, 4, 32]
    assert widths(code, "STG") == [8]
    clean = Kernel("sm_90", "forward", 64, 0, 0, 512, spills=0, load=16, store=16, narrow_loads=0)
    assert not clean.leaks
    for what in ("stack", "local"):
        assert not Kernel(**{**vars(clean), what: 32}).leaks
        assert Kernel(**{**vars(clean), what: 40}).leaks
