"""The content of a wheel, and the message of a build without torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import setuptools

ROOT = Path(__file__).parent.parent


def test_a_wheel_holds_the_packages_and_nothing_else(tmp_path: Path) -> None:
    source = tmp_path / "source"  # a copy, because setuptools would also pack the files of an earlier build
    ignore = shutil.ignore_patterns(".*", "build", "runs", "*.so", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignore)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, source],
        check=True,
        capture_output=True,
        env={**os.environ, "FASTKD_CPP": "0"},
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("py3-none-any.whl")
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    packages = {p.relative_to(ROOT).as_posix() for p in (ROOT / "fastkd").rglob("*.py")}
    kernels = {f"fastkd/kernels/{p.name}" for p in (ROOT / "kernels").glob("*.py")}
    assert names == packages | kernels | {"fastkd/py.typed"}


def test_a_build_without_torch_says_in_one_line_what_to_install(tmp_path: Path) -> None:
    venv.create(tmp_path / "empty", with_pip=False)
    site = Path(setuptools.__file__).parent.parent
    for name in ("setuptools", "_distutils_hack"):
        (tmp_path / name).symlink_to(site / name)
    build = subprocess.run(
        [tmp_path / "empty" / "bin" / "python", "setup.py", "build"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path)},
    )
    assert build.returncode != 0
    assert (
        build.stderr == "fastkd: torch not found; install torch>=2.10 first (pip install torch), then install fastkd\n"
    )
