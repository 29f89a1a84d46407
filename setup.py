"""Builds fastkd._C on the LibTorch stable ABI: one binary for every Python >= 3.10 and torch >= 2.10.

It has the CPU kernels and, if an nvcc is found, the CUDA kernels. Neither building nor loading it needs a GPU or a
torch with CUDA.

FASTKD_CPP=0 builds no extension; the library then uses its other backends. FASTKD_CUDA=0 builds no CUDA kernels.
FASTKD_CUDA_ARCH="80;90" lists the compute capabilities to compile for, by default those of this machine's GPUs; PTX of
the highest one also runs on newer GPUs. MAX_JOBS=1 compiles one file at a time. pip shows what is printed here only
with -v.
"""

import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path("csrc")
TARGET = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
# Where no card is found. sm_80 code runs on all Ampere and Ada cards (8.x), sm_90 on Hopper, and sm_90's PTX, which the
# driver compiles at the first launch, on Blackwell: two builds for every card from 2020 on.
ANY_CARD = [80, 90]


def torch_directory() -> Path:
    """Return the folder of the torch that fastkd will run with, also in pip's isolated build; torch is not imported."""
    find = "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')"
    for flags in ([], ["-I"]):  # -I ignores PYTHONPATH, by which pip isolates the build
        found = subprocess.run([sys.executable, *flags, "-c", find], capture_output=True, text=True).stdout.strip()
        if found:
            return Path(found)
    sys.exit("fastkd: torch not found; install torch>=2.10 first (pip install torch), then install fastkd")


def find_nvcc() -> str | None:
    if os.environ.get("FASTKD_CUDA", "1") == "0":
        return None
    roots = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    return next(filter(None, (shutil.which("nvcc", path=f"{root}/bin") for root in roots)), shutil.which("nvcc"))


def cuda_runtime(nvcc: str) -> Path:
    """Return the static CUDA runtime, with which the extension needs no libcudart where it runs."""
    output = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    tops = [line.partition("TOP=")[2].strip() for line in output.splitlines() if line.startswith("#$ TOP=")]
    root = Path(tops[0]) if tops else Path(nvcc).parent.parent
    for folder in ("lib64", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib", "lib"):
        if (root / folder / "libcudart_static.a").exists():
            return root / folder / "libcudart_static.a"
    sys.exit(f"fastkd: no libcudart_static.a beside {nvcc}; install it, or build without CUDA kernels: FASTKD_CUDA=0")


def cards_here() -> set[int]:
    """Compute capabilities, times 10, of this machine's GPUs; none where there is no driver."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        says = subprocess.run(query, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return set()
    return {int(major + minor) for major, minor in re.findall(r"^(\d+)\.(\d)$", says, re.MULTILINE)}


def cuda_archs(nvcc: str) -> tuple[list[int], str]:
    """Compute capabilities, times 10, ascending, to build for, and who chose them."""
    asked = os.environ.get("FASTKD_CUDA_ARCH")
    if asked:
        archs = [arch.strip().replace(".", "") for arch in asked.split(";")]
        if not all(arch.isdecimal() for arch in archs):
            sys.exit(f"fastkd: FASTKD_CUDA_ARCH: expected compute capabilities such as 80;90, got {asked!r}")
        return sorted({int(arch) for arch in archs}), "FASTKD_CUDA_ARCH"
    says = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
    known = [int(arch) for arch in re.findall(r"^compute_(\d+)$", says, re.MULTILINE)] or ANY_CARD
    # of a card that is newer than nvcc, the newest that it can run
    archs_here = {
        max(arch for arch in known if arch <= card) for card in cards_here() if card >= max(ANY_CARD[0], min(known))
    }
    return (sorted(archs_here), "the cards here") if archs_here else (ANY_CARD, "no card here that nvcc knows")


def host_compiler() -> list[str]:
    """Return the option that makes nvcc use CXX: exceptions can't pass between objects of different compilers."""
    words = shlex.split(os.environ.get("CXX", ""))
    words = [word for word in words if Path(word).name not in ("ccache", "sccache", "distcc")]
    return [f"-ccbin={words[0]}"] if words and "NVCC_CCBIN" not in os.environ else []


def compile_cuda(nvcc: str, archs: list[int], jobs: int, include: Path, folder: Path, source: Path) -> list[str]:
    made = folder / f"cuda_{source.stem}.o"
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    codes.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    command = [
        *(nvcc, "-O3", "-std=c++20", "--expt-relaxed-constexpr", f"-t{jobs}", "--compress-mode=size"),
        *("-Xcompiler=-fPIC,-fvisibility=hidden", *host_compiler(), *TARGET, *codes, f"-I{include}"),
        *("-c", str(source), "-o", str(made)),
    ]
    if subprocess.run(command).returncode:
        needs = "it must be 12.8 or newer and support the host compiler, which CXX or NVCC_CCBIN chooses"
        sys.exit(f"fastkd: {nvcc} failed ({needs}); to build without CUDA kernels: FASTKD_CUDA=0")
    return [str(made)]


def cuda_plan(nvcc: str | None, archs: list[int], chosen_by: str) -> str:
    if nvcc is None:
        return "no CUDA kernels (no nvcc found, or FASTKD_CUDA=0)"
    codes = ", ".join(f"sm_{arch}" for arch in archs)
    return f"CUDA kernels for {codes} and newer ({chosen_by}); FASTKD_CUDA=0 leaves them out"


def say(message: str) -> None:
    print(f"fastkd: {message}", flush=True)  # at once, through pip's pipe too


class Build(build_ext):
    """Compiles the sources in parallel, with MAX_JOBS jobs or one per core: some take minutes."""

    def build_extension(self, ext: Extension) -> None:
        self.force = True  # setuptools does not see a changed header
        torch = torch_directory()
        ext.include_dirs.append(str(torch / "include"))
        ext.library_dirs.append(str(torch / "lib"))
        nvcc = find_nvcc()
        archs, chosen_by = cuda_archs(nvcc) if nvcc else ([], "")
        ext.define_macros.append(("FASTKD_CUDA_ARCHS", f'"{";".join(map(str, archs))}"'))
        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        compile_one = self.compiler.compile
        with_nvcc = sorted((CSRC / "cuda").glob("*.cu")) if nvcc else []
        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)

        def compile_all(sources: list[str], **options: Any) -> list[str]:
            threads = max(1, jobs // max(1, len(with_nvcc)))
            cuda = partial(compile_cuda, nvcc, archs, threads, torch / "include", folder)
            builds = {str(x): partial(cuda, x) for x in with_nvcc}
            builds |= {x: partial(compile_one, [x], **options) for x in sources}  # last: nvcc takes longest
            done = itertools.count(1)

            def timed(source: str) -> list[str]:
                begin = time.monotonic()
                made = builds[source]()
                say(f"{next(done)} of {len(builds)} done: {source}, {time.monotonic() - begin:.0f} s")
                return made

            say(f"compiles {len(builds)} files, {jobs} at a time; {cuda_plan(nvcc, archs, chosen_by)}")
            with ThreadPoolExecutor(jobs) as pool:
                return [made for objects in pool.map(timed, builds) for made in objects]

        self.compiler.compile = compile_all
        if nvcc:
            # libtorch.so is empty, but in a torch with CUDA it loads libtorch_cuda, which has the current stream
            ext.extra_link_args += [str(cuda_runtime(nvcc)), "-Wl,--no-as-needed", "-ltorch", "-lrt", "-ldl"]
        super().build_extension(ext)


extension = Extension(
    "fastkd._C",
    sources=[str(path) for folder in (CSRC, CSRC / "cpu") for path in sorted(folder.glob("*.cpp"))],
    define_macros=[("Py_LIMITED_API", "0x030a0000")],
    extra_compile_args=[
        *TARGET,
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
    torch_directory()  # a missing torch ends the build early, with a message
    setup(ext_modules=[extension], cmdclass={"build_ext": Build}, options={"bdist_wheel": {"py_limited_api": "cp310"}})
