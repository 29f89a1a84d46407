"""Which cards a build is for and what it prints, with compilers that only write down what they were asked."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NVCC = """#!/bin/sh
case "$1" in
    --list-gpu-arch) printf 'compute_75\\ncompute_80\\ncompute_90\\ncompute_100\\ncompute_120\\n'; exit ;;
    --dryrun) echo "#$ TOP={folder}" >&2; exit ;;
esac
echo "$@" >> {folder}/asked
for last; do :; done
: > "$last"
"""
CXX = """#!/bin/sh
while [ $# -gt 1 ]; do [ "$1" = -o ] && : > "$2"; shift; done
"""


def build(
    folder: Path, smi: str, nvcc: bool = True, **environment: str
) -> tuple[subprocess.CompletedProcess[str], str]:
    """What a build printed and what it asked of nvcc, where ``smi`` is what the program nvidia-smi does."""
    programs = {
        "nvidia-smi": f"#!/bin/sh\n{smi}\n",
        "g++": CXX,
        **({"nvcc": NVCC.format(folder=folder)} if nvcc else {}),
    }
    (folder / "lib64").mkdir()
    (folder / "lib64" / "libcudart_static.a").touch()
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    variables = {"PATH": str(folder), "PYTHONPATH": os.pathsep.join(sys.path), "MAX_JOBS": "1"}
    variables |= {"CC": "g++", "CXX": "g++", "LDSHARED": "g++", "LDCXXSHARED": "g++", **environment}
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", folder, "--build-temp", folder / "made"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=variables, check=False)
    asked = folder / "asked"
    return done, asked.read_text() if asked.exists() else ""


def codes(asked: str) -> list[list[str]]:
    """The code that nvcc is to make of each file: sm_ for machine code, compute_ for PTX."""
    return [re.findall(r",code=(\w+)", line) for line in asked.splitlines()]


@pytest.mark.parametrize(
    ("smi", "environment", "expected", "chosen_by"),
    [
        ("printf '9.0\\n9.0\\n8.0\\n'", {}, ["sm_80", "sm_90", "compute_90"], "the cards here"),
        ("echo 12.1", {}, ["sm_120", "compute_120"], "the cards here"),  # newer than this nvcc
        ("echo 7.0", {}, ["sm_80", "sm_90", "compute_90"], "no card here that nvcc knows"),
        ("echo 'NVIDIA-SMI has failed'; exit 9", {}, ["sm_80", "sm_90", "compute_90"], "no card here that nvcc knows"),
        ("echo 9.0", {"FASTKD_CUDA_ARCH": "12.0; 80;80"}, ["sm_80", "sm_120", "compute_120"], "FASTKD_CUDA_ARCH"),
    ],
)
def test_a_build_is_for_the_cards_that_are_there(
    smi: str, environment: dict[str, str], expected: list[str], chosen_by: str, tmp_path: Path
) -> None:
    done, asked = build(tmp_path, smi, **environment)
    assert done.returncode == 0, done.stderr
    assert codes(asked) == [expected] * len([*(ROOT / "csrc" / "cuda").glob("*.cu")])
    names = ", ".join(expected[:-1])
    assert f"CUDA kernels for {names} and newer ({chosen_by}); FASTKD_CUDA=0 leaves them out\n" in done.stdout


def test_every_compiled_file_is_a_line_with_its_seconds(tmp_path: Path) -> None:
    done, _ = build(tmp_path, "echo 9.0")
    said = [line for line in done.stdout.splitlines() if line.startswith("fastkd: ")]
    files = [*(ROOT / "csrc").glob("*.cpp"), *(ROOT / "csrc" / "cpu").glob("*.cpp"), *(ROOT / "csrc").glob("cuda/*.cu")]
    assert said[0].startswith(f"fastkd: compiles {len(files)} files, 1 at a time; ")
    lines = [re.fullmatch(r"fastkd: (\d+) of (\d+) done: (\S+), \d+ s", line) for line in said[1:]]
    assert all(lines), said
    found = [line.groups() for line in lines if line]
    assert [(int(number), int(count)) for number, count, _ in found] == [(i + 1, len(files)) for i in range(len(files))]
    assert {ROOT / name for _, _, name in found} == set(files)


@pytest.mark.parametrize(("nvcc", "environment"), [(False, {}), (True, {"FASTKD_CUDA": "0"})])
def test_a_build_without_cuda_says_so(nvcc: bool, environment: dict[str, str], tmp_path: Path) -> None:
    done, asked = build(tmp_path, "echo 9.0", nvcc, **environment)
    assert done.returncode == 0, done.stderr
    assert asked == ""
    assert "; no CUDA kernels (no nvcc found, or FASTKD_CUDA=0)\n" in done.stdout


def test_a_wrong_architecture_is_refused_before_anything_is_compiled(tmp_path: Path) -> None:
    done, asked = build(tmp_path, "echo 9.0", FASTKD_CUDA_ARCH="sm_90")
    assert done.returncode != 0
    assert "FASTKD_CUDA_ARCH: expected compute capabilities such as 80;90, got 'sm_90'" in done.stderr
    assert asked == ""
