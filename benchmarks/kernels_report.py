"""Reports the resources of the GPU kernels: those in CUDA of the extension, and those in Triton. It needs no GPU.

    python benchmarks/kernels_report.py

It prints a Markdown table: registers, bytes of stack, local and shared memory, instructions that spill, and the bytes
of the widest global load and store of a thread. Faults follow, and then the exit status is 1. Run it without
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

from fastkd.kernels import launch
from fastkd.ops import backends
from fastkd.ops.presets import DIVISORS, MAP_NORMS, PENALTIES, SCORES

CAPABILITIES = (80, 90, 100, 120)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = [(2, 256, 16, 16), (2, 512, 8, 8)]  # aligned, as most levels of a detector are in channels_last


class Driver:
    """The part of a driver that Triton's front end needs to compile for a GPU that is not there."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # Triton caches compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled_launches(
    tool: str,
    capability: int,
    dtype: torch.dtype,
    channels_last: bool,
    score: str,
    map_norm: str,
    penalty: str,
    divisor: str,
) -> Iterator[Kernel]:
    """Yield every kernel, compiled by the calls that launch it."""
    name = str(dtype).removeprefix("torch.") + (", channels_last" if channels_last else ", NCHW")
    of_map, of_loss = f"{score}, {map_norm}", f"{penalty}, {'Z of the map' if divisor == 'map' else 'Z of sizes'}"
    kept: list[tuple[str, str, Any]] = []

    def compile_only(kernel: Any, programs: int, *arguments: Any, near: Any, **options: Any) -> None:
        kind = "score" if options.get("PENALTY", "") is None else kernel.fn.__name__
        of = {"forward": f"{of_map}, {of_loss}", "score": of_map, "rescale": "all"}.get(kind, of_loss)
        kept.append((kind, f"{name}, {of}", kernel.warmup(*arguments, **options, grid=(programs,))))

    layout = torch.channels_last if channels_last else torch.contiguous_format
    student, teacher = ([torch.zeros(s, dtype=dtype).to(memory_format=layout) for s in SHAPES] for _ in range(2))
    prior = [torch.ones(n, h, w) for n, _, h, w in SHAPES]
    vectors, weights = [torch.ones(c) for _, c, _, _ in SHAPES], [1.0, 1.0]
    of_penalty = (PENALTIES.index(penalty), 1.0, DIVISORS.index(divisor))
    options = (SCORES.index(score), MAP_NORMS.index(map_norm), 1.0, *of_penalty)
    known = (SCORES.index("uniform"), MAP_NORMS.index("none"), 1.0, *of_penalty)
    features, per_channel = (student, teacher), (vectors, vectors, vectors)
    driver = mock.patch.object(triton.runtime.driver, "_active", Driver(capability))
    with driver, mock.patch.object(launch, "_launch", compile_only):
        losses, mass, maps = launch.distill(*features, prior, *per_channel, weights, *options)
        launch.distill_backward(losses, mass, maps, *features, *per_channel, weights, *of_penalty)
        gradients = ([torch.empty_like(s) for s in student], [torch.empty_like(x) for x in vectors])
        for codes in (options, known):
            arguments = (*features, prior, *per_channel, weights, *codes)
            launch.distill_one_pass(*arguments, mass.double(), torch.ones(()), *gradients)
        launch.distill_rescale(losses, gradients[0])
    for kind, of, result in kept:
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernel.cubin"
            cubin.write_bytes(result.asm["cubin"])
            (found,) = kernels(cubin, tool, f"sm_{capability}")
        yield replace(found, name=kind, options=f"Triton, {of}", shared=result.metadata.shared)


def combinations(full: bool, dtype: torch.dtype) -> list[tuple[str, str, str, str]]:
    """Return (score, map_norm, penalty, divisor): all combinations if ``full``.

    Otherwise each value occurs once in bfloat16, and once in float16 and float32 together.
    """
    every = itertools.product(SCORES, MAP_NORMS, PENALTIES, ("elements", "map"))
    some = [
        (SCORES[i], MAP_NORMS[(i + 1) % len(MAP_NORMS)], PENALTIES[i % len(PENALTIES)], ("elements", "map")[i % 2])
        for i in range(len(SCORES))
    ]
    return list(every) if full else {torch.float16: some[::2], torch.float32: some[1::2]}.get(dtype, some)


def triton_kernels(
    tool: str, full: bool, capabilities: Sequence[int] = CAPABILITIES, dtypes: Sequence[torch.dtype] = DTYPES
) -> Iterator[Kernel]:
    """Yield Triton's kernels over targets, dtypes, layouts and options."""
    for capability, dtype, channels_last in itertools.product(capabilities, dtypes, (True, False)):
        seen = set()
        for options in combinations(full, dtype):
            for kernel in compiled_launches(tool, capability, dtype, channels_last, *options):
                if kernel not in seen:  # the backward depends on the penalty alone
                    seen.add(kernel)
                    yield kernel


def cuda_kernels(tool: str) -> list[Kernel]:
    """Return the kernels of the installed extension; none if it was built without CUDA."""
    spec = importlib.util.find_spec("fastkd._C")
    return kernels(Path(spec.origin), tool) if spec and spec.origin and backends._cuda_archs else []


def faults(kernel: Kernel) -> list[str]:
    """Return the faults of a kernel: many values in local memory, or narrow accesses to aligned features.

    A CUDA kernel contains code for aligned and for other features; a Triton kernel is compiled for one of them, here
    for aligned features.
    """
    if kernel.name.startswith("_Z"):  # the small ops, whose names stay mangled, read no features
        return []
    found = {"local memory": kernel.leaks}
    if "channels_last" in kernel.options:
        found["loads of 2 bytes"] = kernel.narrow_loads > 0
    if "double" not in kernel.name and (not kernel.options or "channels_last" in kernel.options):
        found["no load of 16 bytes"] = kernel.load < 16
        found["no store of 16 bytes"] = kernel.store < 16 and not kernel.name.startswith(("forward", "score"))
    return [what for what, is_so in found.items() if is_so]


def row(k: Kernel) -> str:
    sizes = (k.registers, k.stack, k.local, k.shared, k.spills, k.load, k.store)
    return f"| {k.name} | {k.options} | {k.target} | " + " | ".join(map(str, sizes)) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("cuda", "triton"))
    parser.add_argument("--full", action="store_true", help="report every combination of options, not each value once")
    capability_help = "targets of the Triton kernels, for example 90 for sm_90"
    parser.add_argument("--capability", type=int, nargs="+", default=CAPABILITIES, help=capability_help)
    names = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
    parser.add_argument("--dtype", choices=names, nargs="+", default=list(names), help="dtypes of the Triton kernels")
    options = parser.parse_args()
    tool = find_cuobjdump()
    if tool is None:
        raise SystemExit(
            "kernels_report: needs cuobjdump, from the CUDA toolkit or from Triton's wheel: pip install triton"
        )
    wrong = []
    print("| kernel | of | target | registers | stack | local | shared | spills | load | store |")
    print("|" + "---|" * 10)
    of_cuda = cuda_kernels(tool) if options.only != "triton" else []
    dtypes = [names[name] for name in options.dtype]
    of_triton = triton_kernels(tool, options.full, options.capability, dtypes) if options.only != "cuda" else []
    for kernel in itertools.chain(of_cuda, of_triton):
        wrong += [f"{kernel.name}, {kernel.options}, {kernel.target}: {fault}" for fault in faults(kernel)]
        print(row(kernel), flush=True)
    fine = "\nat most 32 bytes of local memory; aligned features are loaded and stored 16 bytes at a time"
    print("\n".join(["", *wrong]) if wrong else fine)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
