"""Builds fastkd._C: CPU kernels on the LibTorch stable ABI, one binary for every Python >= 3.10 and torch >= 2.10.

FASTKD_CPP=0 leaves the extension out; the library then computes through its PyTorch reference.
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path("csrc")


def torch_directory() -> Path:
    """Folder of the torch that fastkd will run with, without importing it, also from pip's isolated build."""
    find = "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')"
    for flags in ([], ["-I"]):  # -I ignores PYTHONPATH, and with it pip's isolation
        found = subprocess.run([sys.executable, *flags, "-c", find], capture_output=True, text=True).stdout.strip()
        if found:
            return Path(found)
    sys.exit("fastkd: torch not found; install torch>=2.10 first (pip install torch), then install fastkd")


class Build(build_ext):
    def build_extension(self, ext: Extension) -> None:
        self.force = True  # setuptools does not see a changed header
        torch = torch_directory()
        ext.include_dirs.append(str(torch / "include"))
        ext.library_dirs.append(str(torch / "lib"))
        super().build_extension(ext)


extension = Extension(
    "fastkd._C",
    sources=[str(path) for path in [CSRC / "ops.cpp", *sorted((CSRC / "cpu").glob("*.cpp"))]],
    define_macros=[("Py_LIMITED_API", "0x030a0000"), ("TORCH_TARGET_VERSION", "0x020a000000000000")],
    extra_compile_args=[
        "-O3",
        "-std=c++20",
        "-fvisibility=hidden",
        "-fopenmp-simd",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-ffp-contract=off",  # a difference of equal values must be 0 on every processor
        "-g0",
    ],
    libraries=["torch_cpu", "c10"],
    py_limited_api=True,
)

if os.environ.get("FASTKD_CPP", "1") == "0":
    setup()
else:
    torch_directory()  # before anything is built: one line that says what to install
    setup(ext_modules=[extension], cmdclass={"build_ext": Build}, options={"bdist_wheel": {"py_limited_api": "cp310"}})
