"""Sample inputs for the tests of parity, gradients, ops and edge cases."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastkd
from fastkd import InfoMap
from fastkd.ops.levels import check
from fastkd.ops.options import options_of_call
from fastkd.ops.run import run

SHAPES = [(2, 7, 5, 3), (2, 64, 13, 13), (1, 3, 1, 1), (3, 257, 4, 6)]
LAYOUTS = ("contiguous", "channels_last", "cropped", "teacher_channels_last", "student_channels_last", "expanded")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
TARGETS = [
    f"{name}-{device}"
    for device in DEVICES
    for name, refusal in fastkd.backends(device).items()
    if refusal is None and name != "reference"
]
on_every_target = pytest.mark.parametrize("backend", TARGETS, indirect=True)


def interpreted(backend: str) -> bool:
    return backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"


def shapes_for(backend: str) -> list[tuple[int, ...]]:
    """Return shapes for a backend: fewer for Triton's interpreter, which takes a second for one step of ``SHAPES``."""
    return [(2, 7, 5, 3), (1, 40, 9, 9), (1, 3, 1, 1), (2, 257, 3, 2)] if interpreted(backend) else SHAPES


def random(distribution: Any, *size: int, generator: torch.Generator) -> Tensor:
    """Return random numbers that are the same on every device."""
    return distribution(*size, generator=generator, device="cpu").to(torch.get_default_device())


def feature(shape: tuple[int, ...], dtype: torch.dtype, layout: str, generator: torch.Generator) -> Tensor:
    """Return random values of one feature map.

    "cropped" has gaps between rows and between channels; "expanded" repeats its first row, or its first channel.
    """

    def normal(*size: int) -> Tensor:
        return random(torch.randn, *size, generator=generator).to(dtype)

    n, c, h, w = shape
    if layout == "expanded":
        one = (n, c, 1, w) if generator.initial_seed() % 2 else (n, 1, h, w)
        return normal(*one).expand(shape)
    if layout == "cropped":
        return normal(n, c + 1, h + 2, w + 3)[:, 1:, 1:-1, 2:-1]
    x = normal(*shape)
    return x.to(memory_format=torch.channels_last) if layout == "channels_last" else x


def levels(
    dtype: torch.dtype = torch.float32, layout: str = "contiguous", seed: int = 0, shapes: list[Any] | None = None
) -> dict[str, Any]:
    """Return arguments of ``distill_loss`` with priors and moments, each missing at one level."""
    shapes = SHAPES if shapes is None else shapes
    g = torch.Generator(device="cpu").manual_seed(seed)
    of_student = {"student_channels_last": "channels_last", "teacher_channels_last": "contiguous"}.get(layout, layout)
    of_teacher = {"student_channels_last": "contiguous", "teacher_channels_last": "channels_last"}.get(layout, layout)
    prior: list[Any] = [random(torch.rand, n, h, w, generator=g) for n, _, h, w in shapes]
    moments: list[Any] = [
        (random(torch.randn, c, generator=g), 0.5 + random(torch.rand, c, generator=g)) for _, c, _, _ in shapes
    ]
    prior[-1] = None
    moments[0] = None
    return {
        "student_feats": [feature(s, dtype, of_student, g).requires_grad_() for s in shapes],
        "teacher_feats": [feature(s, dtype, of_teacher, g) * 2 + 0.5 for s in shapes],
        "prior": prior,
        "standardize": moments,
        "weights": [0.5 + i for i in range(len(shapes))],
    }


def with_bias(sample: dict[str, Any]) -> dict[str, Any]:
    """Return the sample for ``loss_of``, with biases of adapters, missing at one level."""
    g = torch.Generator(device="cpu").manual_seed(7)
    dtype = torch.float64 if sample["student_feats"][0].dtype == torch.float64 else torch.float32
    bias: list[Any] = [random(torch.randn, x.shape[1], generator=g).to(dtype) for x in sample["student_feats"]]
    return {**sample, "bias": [None if i == 1 else b.requires_grad_() for i, b in enumerate(bias)]}


def widened(sample: dict[str, Any]) -> dict[str, Any]:
    """Return the sample in float64."""
    wide = {
        key: [x if x is None else x.detach().double() for x in sample[key]]
        for key in ("student_feats", "teacher_feats", "bias")
        if key in sample
    }
    for x in learning(wide):
        x.requires_grad_()
    return {**sample, **wide}


def learning(sample: dict[str, Any]) -> list[Tensor]:
    """Return the tensors of a sample that may get a gradient: the student's features, then the biases."""
    return [*sample["student_feats"], *(b for b in sample.get("bias", ()) if b is not None)]


def loss_of(
    sample: dict[str, Any],
    factor: Tensor | None = None,
    *,
    one_pass: bool = True,
    info_map: Any = "self_information",
    penalty: str = "l2",
    beta: float = 1.0,
    divisor: str | None = None,
    reduction: str = "sum",
    backend: str | None = None,
) -> Tensor:
    """Return ``distill_loss`` with the inputs that only ``DistillLoss`` has: biases, a factor, and one pass or two."""
    sample = dict(sample)
    weights = sample.pop("weights", None)
    options = options_of_call(info_map, weights, penalty, beta, divisor, reduction, backend)
    checked = check(sample.pop("student_feats"), sample.pop("teacher_feats"), options, **sample)
    return run(checked, options, factor, one_pass=one_pass)[0]


def step(sample: dict[str, Any], upstream: Sequence[float] | float = 1.0, *args: Any, **options: Any) -> list[Tensor]:
    """Return all level losses and gradients of one step, with one upstream gradient for all or one for each level."""
    losses = loss_of(sample, *args, **options, reduction="none")
    given = torch.as_tensor(upstream, dtype=losses.dtype, device=losses.device).expand(losses.shape)
    wanted = [x for x in learning(sample) if x.requires_grad]
    return [losses.detach(), *torch.autograd.grad(losses, wanted, given)]


def loss_and_gradients(loss: Tensor, student: list[Tensor]) -> list[Tensor]:
    """Return the losses of all levels, then the student's gradients for a random upstream gradient."""
    upstream = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype, device=loss.device).view_as(loss)
    return [loss.detach(), *torch.autograd.grad(loss, student, upstream)]


def assert_same_bits(got: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for x, y in zip(got, expected, strict=True):
        assert torch.equal(x, y)


def compiled_for_host(source: str, folder: Path) -> Path:
    """Compile a file of tests/cuda_on_host, which has CUDA kernels, for the host; return the shared library.

    The test is skipped without g++ on Linux.
    """
    compiler = shutil.which("g++")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs g++ on Linux")
    sources, torch_directory = Path(__file__).parent / "cuda_on_host", Path(torch.__file__).parent
    library = folder / "on_host.so"
    subprocess.run(
        [compiler, "-O1", "-std=c++20", "-fPIC", "-shared", "-w", "-DTORCH_TARGET_VERSION=0x020a000000000000",
         f"-I{sources}", f"-I{torch_directory / 'include'}", sources / source, "-o", library,
         f"-L{torch_directory / 'lib'}", "-ltorch_cpu", "-lc10"],
        check=True,
    )  # fmt: skip
    return library


def allocated(run: Callable[[], Any]) -> tuple[int, Any]:
    """Return the number of bytes that a call allocates through PyTorch, and its result."""
    with torch.profiler.profile(profile_memory=True) as profile:
        result = run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]" and e.nbytes() > 0]
    return sum(e.nbytes() for e in events), result


INFO_MAPS = [
    InfoMap(score, norm, temperature=0.7)
    for score in ("uniform", "magnitude", "energy", "entropy")
    for norm in ("none", "mean", "softmax", "minmax")
]
