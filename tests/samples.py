"""Sample inputs that feed parity, gradient, opcheck and edge tests alike."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import fastkd
from fastkd import InfoMap, buffers

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
    """Triton's interpreter takes a second for one step of ``SHAPES``."""
    return [(2, 7, 5, 3), (1, 40, 9, 9), (1, 3, 1, 1), (2, 257, 3, 2)] if interpreted(backend) else SHAPES


def random(distribution: Any, *size: int, generator: torch.Generator) -> Tensor:
    """The same numbers on every device."""
    return distribution(*size, generator=generator, device="cpu").to(torch.get_default_device())


def feature(shape: tuple[int, ...], dtype: torch.dtype, layout: str, generator: torch.Generator) -> Tensor:
    """Random values of one feature map.

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
    """Arguments of ``distill_loss`` with priors and moments, each absent at one level."""
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


def widened(sample: dict[str, Any]) -> dict[str, Any]:
    """The same sample in float64."""
    wide = {key: [x.detach().double() for x in sample[key]] for key in ("student_feats", "teacher_feats")}
    for x in wide["student_feats"]:
        x.requires_grad_()
    return {**sample, **wide}


def loss_and_gradients(loss: Tensor, student: list[Tensor]) -> list[Tensor]:
    """The losses of all levels, then the student's gradients under a random upstream gradient."""
    upstream = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype, device=loss.device).view_as(loss)
    return [loss.detach(), *torch.autograd.grad(loss, student, upstream)]


def allocated(run: Callable[[], Any]) -> tuple[int, Any]:
    """Bytes that a call takes of PyTorch's allocator, and its result; memory that fastkd keeps is not at hand."""
    with (
        mock.patch.object(buffers, "_can_map", False),
        torch.profiler.profile(profile_memory=True) as profile,
    ):
        result = run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]" and e.nbytes() > 0]
    return sum(e.nbytes() for e in events), result


INFO_MAPS = [
    InfoMap(score, norm, temperature=0.7)
    for score in ("uniform", "magnitude", "energy", "entropy")
    for norm in ("none", "mean", "softmax", "minmax")
]
