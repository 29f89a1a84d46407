"""GPU kernels compiled for cards that are not here: their machine code has few spills and wide loads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastkd.ops import backends

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
from machine_code import Kernel, find_cuobjdump, readable, widths  # noqa: E402  found beside the package

needs_tools = pytest.mark.skipif(find_cuobjdump() is None, reason="needs cuobjdump, as in Triton's wheel")


def report(*arguments: str) -> list[str]:
    """Return the rows of the table, from a process of its own, because Triton may be interpreted in this one."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(BENCHMARKS / "kernels_report.py"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return [line for line in done.stdout.splitlines() if "| sm_" in line]


@needs_tools
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("capability", [80, 90, 100, 120])
def test_triton(capability: int, dtype: str, request: pytest.FixtureRequest) -> None:
    if (capability, dtype) != (90, "float32") and not request.config.getoption("--full"):
        pytest.skip("half a minute for each card and dtype: with --full")
    rows = report("--only", "triton", "--capability", str(capability), "--dtype", dtype)
    for name in ("forward", "backward", "score", "stream", "rescale"):
        for layout in ("NCHW", "channels_last"):
            assert any(row.startswith(f"| {name} | Triton, {dtype}, {layout}") for row in rows), name


@needs_tools
@pytest.mark.skipif(not backends._cuda_archs, reason="the extension was built without nvcc")
def test_cuda(request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--full"):
        pytest.skip("half a minute for each card: with --full")
    rows = [row for row in report("--only", "cuda") if not row.startswith("| _Z")]  # without the small ops
    assert len(rows) == 26 * len(backends._cuda_archs)


def test_names_of_the_cuda_kernels() -> None:
    prefix, any_double = "_ZN6fastkd4cuda", "INS0_3AnyELb1EdEEvNS0_6LaunchIT1_EE"
    assert readable(f"{prefix}7forward{any_double}") == "forward<Any, entropy, double>"
    stream = f"{prefix}11stream_passIN3c108BFloat16ELNS_7PenaltyE2EEEvNS0_12StreamLaunchE"
    assert readable(stream) == "stream_pass<BFloat16, smooth_l1>"
    assert readable(f"{prefix}7rescaleENS0_13RescaleLaunchE") == "rescale"


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
    assert widths(["@!P1 LDGSTS.E.BYPASS.LTC128B.128 [R5], [R2.64]"], "LDG") == [16]
    clean = Kernel("sm_90", "forward", 64, 0, 0, 512, spills=0, load=16, store=16, narrow_loads=0)
    assert not clean.leaks
    for what in ("stack", "local"):
        assert not Kernel(**{**vars(clean), what: 32}).leaks
        assert Kernel(**{**vars(clean), what: 40}).leaks
