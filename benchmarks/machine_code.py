"""Reads the resources of GPU kernels: registers, stack, shared memory, spills, width of global loads and stores.

They are read from machine code with cuobjdump (from the CUDA toolkit, or from Triton's wheel), so this needs no GPU.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

GLOBAL = re.compile(r"\b(LDG|STG)(?:STS)?\.E((?:\.\w+)*)")  # LDGSTS: an asynchronous copy to shared memory
LOCAL = re.compile(r"\b(?:LDL|STL)\b")


@dataclass(frozen=True)
class Kernel:
    """One kernel for one target.

    Sizes are in bytes; ``load`` and ``store`` are the widest global accesses of a thread, 0 if there are none.
    ``options`` are the options that it was compiled for, if the name does not contain them.
    """

    target: str
    name: str
    registers: int
    stack: int
    local: int  # local memory, where spills go
    shared: int
    spills: int  # instructions that load from or store to local memory
    load: int
    store: int
    narrow_loads: int  # instructions that load 2 bytes
    options: str = ""

    @property
    def leaks(self) -> bool:
        """Whether it keeps more than a few values in local memory, which is as slow as global memory.

        A few are allowed: the CUDA kernels spill up to 8 registers so that three blocks share an SM instead of two,
        which made them 7 to 20 % faster on an H200.
        """
        return max(self.stack, self.local) > 32


def find_cuobjdump() -> str | None:
    """Return the path of cuobjdump, which itself looks for nvdisasm beside it or on PATH; None if there is none."""
    triton = importlib.util.find_spec("triton")
    folders = [Path(p) / "backends/nvidia/bin" for p in (triton.submodule_search_locations or ())] if triton else []
    return next(filter(None, (shutil.which("cuobjdump", path=p) for p in folders)), shutil.which("cuobjdump"))


def _run(tool: str, *arguments: str) -> list[str]:
    path = os.pathsep.join([str(Path(tool).parent), os.environ.get("PATH", "")])
    run = subprocess.run(
        [tool, *arguments], capture_output=True, text=True, check=True, env={**os.environ, "PATH": path}
    )
    return run.stdout.splitlines()


def _sections(lines: list[str], function: str, target: str) -> Iterator[tuple[str, str, list[str]]]:
    """Yield (target, mangled name, lines) of each function in a listing of cuobjdump.

    ``target`` is the target of functions before the first line that names one.
    """
    of, name, body = "", "", []
    for line in [*lines, f"{function} end:"]:
        if line.startswith("arch = "):
            target = line.removeprefix("arch = ")
        if found := re.match(rf"\s*{function}\s*(?:: )?(\w+)", line):
            if name:
                yield of, name, body
            of, name, body = target, found[1], []
        body.append(line)


def readable(mangled: str) -> str:
    """Return a readable name such as ``forward<BFloat16, float>`` or ``stream_pass<float, l1>`` of a feature kernel."""
    kernel = re.search(r"4cuda\d+(forward|backward|score|stream_pass|rescale)(?:I(.*?)EEv|E)NS", mangled)
    if kernel is None:
        return mangled
    if kernel[2] is None:
        return kernel[1]
    element = next((e for e in ("BFloat16", "Half", "Any") if e in kernel[2]), "float")
    if penalty := re.search(r"7PenaltyE(\d)", kernel[2]):
        return f"{kernel[1]}<{element}, {('l2', 'l1', 'smooth_l1')[int(penalty[1])]}>"
    sums = "double" if kernel[2].endswith("d") else "float"
    return f"{kernel[1]}<{element}, {'entropy, ' if 'Lb1' in kernel[2] else ''}{sums}>"


def widths(lines: list[str], instruction: str) -> list[int]:
    """Return the number of bytes that each such instruction moves."""
    found_widths = []
    for line in lines:
        for found in GLOBAL.finditer(line):
            if found[1] == instruction:
                bits = re.findall(r"\.(?:ENL2\.)?[US]?(8|16|64|128|256)\b", found[2])
                found_widths.append(int(bits[-1]) // 8 if bits else 4)
    return found_widths


def kernels(binary: Path, tool: str, target: str = "") -> list[Kernel]:
    """Return every kernel for every target in a shared library, or in a cubin, which does not contain its target."""
    assembly, usages = (_run(tool, what, str(binary)) for what in ("-sass", "-res-usage"))
    code = {(of, name): body for of, name, body in _sections(assembly, "Function", target)}
    found = []
    for of, name, usage in _sections(usages, "Function", target):
        sizes = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", " ".join(usage)))
        body = code[of, name]
        loads = widths(body, "LDG")
        found.append(
            Kernel(
                of,
                readable(name),
                *(int(sizes[key]) for key in ("REG", "STACK", "LOCAL", "SHARED")),
                spills=sum(bool(LOCAL.search(line)) for line in body),
                load=max(loads, default=0),
                store=max(widths(body, "STG"), default=0),
                narrow_loads=loads.count(2),
            )
        )
    return sorted(found, key=lambda k: (int(k.target.removeprefix("sm_")), k.name))
