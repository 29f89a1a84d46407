"""The content of a wheel, what ``make wheel`` refuses to publish, and the message of a build without torch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import build_wheel  # noqa: E402  found beside the package

TAG = "cp310-abi3-manylinux_2_34_x86_64"


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


def wheel_of(folder: Path, tag: str, names: set[str]) -> Path:
    """A wheel of empty files, with its folders, as auditwheel writes them."""
    path = folder / f"fastkd-1.0-{tag}.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name in sorted(names | {f"{Path(name).parent}/" for name in names}):
            wheel.writestr(name, b"")
    return path


def test_a_wheel_that_may_be_published(tmp_path: Path) -> None:
    said = build_wheel.check(wheel_of(tmp_path, TAG, build_wheel.contents("1.0")))
    assert said.startswith(f"fastkd-1.0-{TAG}.whl: 0.0 MB, ")


@pytest.mark.parametrize(
    ("tag", "more", "less", "message"),
    [
        ("cp310-abi3-linux_x86_64", set(), set(), "expected a name like"),
        ("cp311-cp311-manylinux_2_34_x86_64", set(), set(), "expected a name like"),
        (TAG, {"fastkd.libs/libtorch_cpu.so"}, set(), "too much: ['fastkd.libs/libtorch_cpu.so']; missing: []"),
        (TAG, {"tests/test_loss.py"}, set(), "too much: ['tests/test_loss.py']"),
        (TAG, set(), {"fastkd-1.0.dist-info/licenses/LICENSE"}, "missing: ['fastkd-1.0.dist-info/licenses/LICENSE']"),
        (TAG, set(), {"fastkd/_C.abi3.so"}, "missing: ['fastkd/_C.abi3.so']"),
    ],
)
def test_a_wheel_that_may_not_be_published(
    tag: str, more: set[str], less: set[str], message: str, tmp_path: Path
) -> None:
    wheel = wheel_of(tmp_path, tag, (build_wheel.contents("1.0") | more) - less)
    with pytest.raises(SystemExit, match=re.escape(message)):
        build_wheel.check(wheel)


def test_a_wheel_that_is_too_large(tmp_path: Path) -> None:
    wheel = wheel_of(tmp_path, TAG, build_wheel.contents("1.0"))
    with wheel.open("ab") as file:
        file.truncate(100_000_000)  # sparse: nothing is written
    with pytest.raises(SystemExit, match=r"expected at most \d+ MB, got 100.0"):
        build_wheel.check(wheel)


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
