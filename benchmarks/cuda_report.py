"""What each CUDA C++ kernel of the extension takes of a card: registers, stack, shared memory, spills, widest access.

    python benchmarks/cuda_report.py

Reads the machine code with cuobjdump (of the CUDA toolkit, or of Triton's wheel), so it needs no GPU.
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

GLOBAL = re.compile(r"\b(LDG|STG)\.E((?:\.\w+)*)")
LOCAL = re.compile(r"\b(?:LDL|STL)\b")


@dataclass(frozen=True)
class Kernel:
    """One kernel for one target. Sizes in bytes; ``load`` and ``store`` are the widest of a thread, 0 where none."""

    target: str
    name: str
    registers: int
    stack: int
    local: int  # local memory, where spills go
    shared: int
    spills: int  # instructions that load from or store to local memory
    load: int
    store: int


def find_cuobjdump() -> str | None:
    """The tool's path; it looks for nvdisasm beside itself or on PATH."""
    triton = importlib.util.find_spec("triton")
    folders = [Path(p) / "backends/nvidia/bin" for p in (triton.submodule_search_locations or ())] if triton else []
    return next(filter(None, (shutil.which("cuobjdump", path=p) for p in folders)), shutil.which("cuobjdump"))


def _run(tool: str, *arguments: str) -> list[str]:
    path = os.pathsep.join([str(Path(tool).parent), os.environ.get("PATH", "")])
    run = subprocess.run(
        [tool, *arguments], capture_output=True, text=True, check=True, env={**os.environ, "PATH": path}
    )
    return run.stdout.splitlines()


def _sections(lines: list[str], function: str) -> Iterator[tuple[str, str, list[str]]]:
    """(target, mangled name, lines) of each function that a listing of cuobjdump names."""
    target, of, name, body = "", "", "", []
    for line in [*lines, f"{function} end:"]:
        if line.startswith("arch = "):
            target = line.removeprefix("arch = ")
        if found := re.match(rf"\s*{function}\s*(?:: )?(\w+)", line):
            if name:
                yield of, name, body
            of, name, body = target, found[1], []
        body.append(line)


def readable(mangled: str) -> str:
    """``forward<BFloat16, energy>`` and the like, from a mangled kernel name of ours."""
    kernel = re.search(r"4cuda\d+(forward|backward)I(.*?)EEvNS", mangled)
    if kernel is None:
        return mangled
    element = next((e for e in ("BFloat16", "Half", "Any") if e in kernel[2]), "float")
    sums = "double" if kernel[2].endswith("d") else "float"
    return f"{kernel[1]}<{element}, {'entropy, ' if 'Lb1' in kernel[2] else ''}{sums}>"


def _widest(lines: list[str], instruction: str) -> int:
    widths = [0]
    for line in lines:
        for found in GLOBAL.finditer(line):
            if found[1] == instruction:
                bits = re.findall(r"\.(?:ENL2\.)?[US]?(8|16|64|128|256)\b", found[2])
                widths.append(int(bits[-1]) // 8 if bits else 4)
    return max(widths)


def kernels(binary: Path, tool: str) -> list[Kernel]:
    """Every kernel for every target in an object file or a shared library."""
    code = {(target, name): body for target, name, body in _sections(_run(tool, "-sass", str(binary)), "Function")}
    found = []
    for target, name, usage in _sections(_run(tool, "-res-usage", str(binary)), "Function"):
        sizes = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", " ".join(usage)))
        body = code[target, name]
        found.append(
            Kernel(
                target,
                readable(name),
                *(int(sizes[key]) for key in ("REG", "STACK", "LOCAL", "SHARED")),
                spills=sum(bool(LOCAL.search(line)) for line in body),
                load=_widest(body, "LDG"),
                store=_widest(body, "STG"),
            )
        )
    return sorted(found, key=lambda k: (int(k.target.removeprefix("sm_")), k.name))


def table(found: list[Kernel]) -> str:
    """As Markdown."""
    rows = ["| target | kernel | registers | stack | local | shared | spills | load | store |", "|" + "---|" * 9]
    for k in found:
        sizes = (k.registers, k.stack, k.local, k.shared, k.spills, k.load, k.store)
        rows.append(f"| {k.target} | {k.name} | " + " | ".join(map(str, sizes)) + " |")
    return "\n".join(rows)


def main() -> None:
    tool = find_cuobjdump()
    if tool is None:
        raise SystemExit("cuda_report: needs cuobjdump, of the CUDA toolkit or of Triton's wheel (pip install triton)")
    spec = importlib.util.find_spec("fastkd._C")
    if spec is None or spec.origin is None:
        raise SystemExit("cuda_report: the extension is not built: pip install .")
    print(table(kernels(Path(spec.origin), tool)))


if __name__ == "__main__":
    main()
