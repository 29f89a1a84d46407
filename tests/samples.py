"""Sample inputs that feed parity, gradient, opcheck and edge tests alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastkd import InfoMap

SHAPES = [(2, 7, 5, 3), (2, 64, 13, 13), (1, 3, 1, 1), (3, 257, 4, 6)]
LAYOUTS = ("contiguous", "channels_last", "cropped", "teacher_channels_last", "student_channels_last", "expanded")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def feature(shape: tuple[int, ...], dtype: torch.dtype, layout: str, generator: torch.Generator) -> Tensor:
    """Random values of one feature map.

    "cropped" has gaps between rows and between channels; "expanded" repeats its first row, or its first channel.
    """
    n, c, h, w = shape
    if layout == "expanded":
        one = (n, c, 1, w) if generator.initial_seed() % 2 else (n, 1, h, w)
        return torch.randn(one, generator=generator).to(dtype).expand(shape)
    if layout == "cropped":
        return torch.randn(n, c + 1, h + 2, w + 3, generator=generator).to(dtype)[:, 1:, 1:-1, 2:-1]
    x = torch.randn(shape, generator=generator).to(dtype)
    return x.to(memory_format=torch.channels_last) if layout == "channels_last" else x


def levels(
    dtype: torch.dtype = torch.float32, layout: str = "contiguous", seed: int = 0, shapes: list[Any] | None = None
) -> dict[str, Any]:
    """Arguments of ``distill_loss`` with priors and moments, each absent at one level."""
    shapes = SHAPES if shapes is None else shapes
    g = torch.Generator().manual_seed(seed)
    of_student = {"student_channels_last": "channels_last", "teacher_channels_last": "contiguous"}.get(layout, layout)
    of_teacher = {"student_channels_last": "contiguous", "teacher_channels_last": "channels_last"}.get(layout, layout)
    prior: list[Any] = [torch.rand(n, h, w, generator=g) for n, _, h, w in shapes]
    moments: list[Any] = [
        (torch.randn(c, generator=g), 0.5 + torch.rand(c, generator=g)) for _, c, _, _ in shapes
    ]  # fmt: skip
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
    upstream = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype).view_as(loss)
    return [loss.detach(), *torch.autograd.grad(loss, student, upstream)]


INFO_MAPS = [
    InfoMap(score, norm, temperature=0.7)
    for score in ("uniform", "magnitude", "energy", "entropy")
    for norm in ("none", "mean", "softmax", "minmax")
]
