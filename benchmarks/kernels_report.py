"""What the GPU kernels take of a card: the CUDA ones of the extension, and Triton's, compiled for GPUs not there.

    python benchmarks/kernels_report.py

Prints a Markdown table: registers, bytes of stack, local and shared memory, instructions that spill, and the bytes of
the widest global load and store of a thread; then what is wrong, if anything, and ends with status 1. Run it without
TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from machine_code import Kernel, find_cuobjdump, kernels
from triton.backends.compiler import GPUTarget

from fastkd import ops
from fastkd.info_map import NORMS, PENALTIES, SCORES
from fastkd.kernels import launch

CAPABILITIES = (80, 90, 100)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = [(2, 256, 16, 16), (2, 512, 8, 8)]  # aligned, as most levels of a detector are in channels_last


class Driver:
    """As much of a driver as Triton's front end asks for to compile for a GPU that is not there."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # Triton keeps what it has compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled_launches(
    tool: str,
    capability: int,
    dtype: torch.dtype,
    channels_last: bool,
    score: str,
    norm: str,
    penalty: str,
    normalizer: str,
) -> Iterator[Kernel]:
    """Every kernel, compiled by the very calls that launch them."""
    kept: list[tuple[str, Any]] = []

    def compile_only(kernel: Any, programs: int, *arguments: Any, near: Any, **options: Any) -> None:
        kept.append((kernel.fn.__name__, kernel.warmup(*arguments, **options, grid=(programs,))))

    layout = torch.channels_last if channels_last else torch.contiguous_format
    student, teacher = ([torch.zeros(s, dtype=dtype).to(memory_format=layout) for s in SHAPES] for _ in range(2))
    prior = [torch.ones(n, h, w) for n, _, h, w in SHAPES]
    vectors = [torch.ones(c) for _, c, _, _ in SHAPES]
    codes = (SCORES.index(score), NORMS.index(norm), 1.0, PENALTIES.index(penalty), 1.0)
    z = launch.NORMALIZERS.index(normalizer)
    driver = mock.patch.object(triton.runtime.driver, "_active", Driver(capability))
    with driver, mock.patch.object(launch, "_launch", compile_only):
        losses, mass, maps = launch.distill(student, teacher, prior, vectors, vectors, [1.0, 1.0], *codes, z)
        launch.distill_backward(losses, mass, maps, student, teacher, vectors, vectors, [1.0, 1.0], *codes[3:], z)
        room = [torch.empty_like(s) for s in student]
        constants = (prior, vectors, vectors, [1.0, 1.0], *codes, z)
        launch.distill_one_pass(student, teacher, *constants, losses, room)
        launch.distill_rescale(losses, mass, room)
    name = str(dtype).removeprefix("torch.") + (", channels_last" if channels_last else ", NCHW")
    z = "Z of the map" if normalizer == "map" else "Z of sizes"
    all_options = f"{name}, {score}, {norm}, {penalty}, {z}"
    of_kernel = {
        "forward": all_options, "one_pass": all_options, "backward": f"{name}, {penalty}, {z}", "rescale": name
    }  # fmt: skip
    for kernel, result in kept:
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernel.cubin"
            cubin.write_bytes(result.asm["cubin"])
            (found,) = kernels(cubin, tool, f"sm_{capability}")
        yield replace(found, options="Triton, " + of_kernel[kernel], shared=result.metadata.shared)


def combinations(full: bool, dtype: torch.dtype) -> list[tuple[str, str, str, str]]:
    """(score, norm, penalty, normalizer): all of them; or each value once in bfloat16, and in the others together."""
    every = itertools.product(SCORES, NORMS, PENALTIES, ("elements", "map"))
    some = [
        (SCORES[i], NORMS[(i + 1) % len(NORMS)], PENALTIES[i % len(PENALTIES)], ("elements", "map")[i % 2])
        for i in range(len(SCORES))
    ]
    return list(every) if full else {torch.float16: some[::2], torch.float32: some[1::2]}.get(dtype, some)


def triton_kernels(tool: str, full: bool, capabilities: Sequence[int] = CAPABILITIES) -> Iterator[Kernel]:
    """Over targets, dtypes, layouts and options."""
    for capability, dtype, channels_last in itertools.product(capabilities, DTYPES, (True, False)):
        seen = set()
        for options in combinations(full, dtype):
            for kernel in compiled_launches(tool, capability, dtype, channels_last, *options):
                if kernel not in seen:  # backwards of one penalty are one kernel
                    seen.add(kernel)
                    yield kernel


def cuda_kernels(tool: str) -> list[Kernel]:
    """Those of the extension that is installed; none where it was built without."""
    spec = importlib.util.find_spec("fastkd._C")
    return kernels(Path(spec.origin), tool) if spec and spec.origin and ops._cuda_archs else []


def faults(kernel: Kernel) -> list[str]:
    """What no kernel may do: keep many values in local memory, or read features in pieces where they lie in 16 bytes.

    A CUDA kernel has its code for features that are not aligned beside that for those that are; a Triton kernel is
    compiled for the one or the other, here for aligned ones.
    """
    found = {"local memory": kernel.leaks}
    if "channels_last" in kernel.options:
        found["loads of 2 bytes"] = kernel.narrow_loads > 0
    if "double" not in kernel.name and (not kernel.options or "channels_last" in kernel.options):
        found["no load of 16 bytes"] = kernel.load < 16
        found["no store of 16 bytes"] = kernel.store < 16 and not kernel.name.startswith("forward")
    return [what for what, is_so in found.items() if is_so]


def row(k: Kernel) -> str:
    sizes = (k.registers, k.stack, k.local, k.shared, k.spills, k.load, k.store)
    return f"| {k.name} | {k.options} | {k.target} | " + " | ".join(map(str, sizes)) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("cuda", "triton"))
    parser.add_argument("--full", action="store_true", help="every combination of options, not each value once")
    parser.add_argument("--capability", type=int, nargs="+", default=CAPABILITIES, help="Triton's, as 90 for sm_90")
    options = parser.parse_args()
    tool = find_cuobjdump()
    if tool is None:
        raise SystemExit(
            "kernels_report: needs cuobjdump, of the CUDA toolkit or of Triton's wheel: pip install triton"
        )
    wrong = []
    print("| kernel | of | target | registers | stack | local | shared | spills | load | store |")
    print("|" + "---|" * 10)
    of_cuda = cuda_kernels(tool) if options.only != "triton" else []
    of_triton = triton_kernels(tool, options.full, options.capability) if options.only != "cuda" else []
    for kernel in itertools.chain(of_cuda, of_triton):
        wrong += [f"{kernel.name}, {kernel.options}, {kernel.target}: {fault}" for fault in faults(kernel)]
        print(row(kernel), flush=True)
    print("\n".join(["", *wrong]) if wrong else "\nat most 32 bytes of local memory; aligned features move in 16 bytes")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
