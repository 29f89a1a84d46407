"""The Triton backend's ops: tensors in, one launch for all levels, tensors out.

Where Triton interprets (``TRITON_INTERPRET=1``) they are those of CPU tensors.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkd import reference
from fastkd.info_map import NORMALIZERS, NORMS, PENALTIES, SCORES
from fastkd.kernels.distill import Feature, Level, backward, forward

DEVICE = "cpu" if triton.knobs.runtime.interpret else "cuda"  # whose tensors the kernels take
SPAN = 4  # channel steps of a program of the backward: enough work a program, enough programs at N = 1


class Tile(NamedTuple):
    """What a program takes at a time."""

    cells: int
    channels: int
    index: Any  # dtype of offsets within it


def require(fits: bool, expected: str) -> None:
    """Keeps a direct call of an op from memory that is not there; what users read, fastkd/levels.py says before."""
    if not fits:
        raise RuntimeError(f"fastkd: the Triton kernels expected {expected}")


def require_features(student: Sequence[Tensor], teacher: Sequence[Tensor], *others: Sequence[Any]) -> None:
    """Levels of one device, with one entry of everything each."""
    require(
        len(student) > 0 and {len(teacher), *map(len, others)} == {len(student)}, "one entry per level, at least one"
    )
    for s, t in zip(student, teacher, strict=True):
        require(s.ndim == 4 and s.shape == t.shape, "student and teacher of the same shape (N, C, H, W)")
        require(torch.float64 not in (s.dtype, t.dtype), "features of at most 32 bits")
        require(s.device == t.device == student[0].device, "all tensors on the device of the first student feature")


def companion(x: Tensor, shape: Sequence[int], student: Tensor) -> Tensor | None:
    """A contiguous float32 companion of a level; None where it is absent, which the ops get as an empty tensor."""
    if x.numel() == 0:
        return None
    fits = x.numel() == math.prod(shape) and x.is_contiguous() and x.dtype == torch.float32
    require(
        fits and x.device == student.device, f"a contiguous float32 tensor of shape {tuple(shape)} on {student.device}"
    )
    return x


def named(names: Sequence[str], code: int) -> str:
    """What a code of the ops stands for."""
    require(0 <= code < len(names), f"a code of {', '.join(names)}")
    return names[code]


def feature(x: Tensor) -> Feature:
    """A feature map in place; where its rows follow each other without gaps, a cell is one index."""
    image, channel, row, column = x.stride()
    height, width = x.shape[2:]
    gaps = height > 1 and (row != width * column if width > 1 else False)
    return Feature(x, image, channel, row if gaps else None, row if width == 1 and height > 1 else column)


def describe(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    grad: Sequence[Tensor | None],
    prior: Sequence[Tensor | None],
    mean: Sequence[Tensor],
    rstd: Sequence[Tensor],
    weights: Sequence[float],
    penalty: str,
    beta: float,
    normalizer: str,
) -> tuple[Level, ...]:
    """The levels of one call."""
    levels: list[Level] = []
    for s, t, g, q, mu, r, weight in zip(student, teacher, grad, prior, mean, rstd, weights, strict=True):
        n, channels, height, width = s.shape
        z = 1.0 if normalizer == "map" else float(reference.divisor(s, s, normalizer))
        z *= beta if penalty == "smooth_l1" else 1.0
        levels.append(
            Level(
                len(levels),
                n,
                channels,
                height * width,
                width,
                1 / max(channels, 1),
                weight / z,
                feature(s),
                feature(t),
                None if g is None else feature(g),
                None if q is None else companion(q, (n, height, width), s),
                companion(mu, (channels,), s),
                companion(r, (channels,), s),
            )
        )
    return tuple(levels)


def choose_tile(levels: Sequence[Level]) -> Tile:
    """2,048 elements, long along the contiguous axis: 16 of each feature a thread, read in 16 bytes where aligned.

    By reasoning, not measured: the accumulators of 4 warps stay in registers, and 5 such programs share an SM.
    """
    widest = max(level.channels for level in levels)
    channels_last = widest > 1 and 2 * sum(x.student.channel == 1 for x in levels) > len(levels)
    channels = max(1, min(triton.next_power_of_2(widest), 128 if channels_last else 32))
    cells = 2048 // max(channels, 16)
    reach = 0
    for level in levels:
        for f in (level.student, level.teacher, level.grad):
            if f is not None:
                by_rows = 0 if f.row is None else level.cells // level.width * f.row + level.width * f.column
                reach = max(reach, channels * f.channel, by_rows or cells * f.column)
    return Tile(cells, channels, tl.int32 if reach < 2**30 else tl.int64)


def occupied(levels: Sequence[Level]) -> tuple[Level, ...]:
    """Those with anything to compute."""
    return tuple(x for x in levels if x.images and x.channels and x.cells)


def usable(beta: float) -> float:
    """Under a beta of 1e-20 smooth_l1 is l1 to the last bit of a sum; what is divided by it later must not overflow."""
    return max(beta, 1e-20)


def _launch(kernel: Any, programs: int, *arguments: Any, near: Tensor, **options: Any) -> None:
    with torch.cuda.device(near.device) if near.is_cuda else contextlib.nullcontext():  # Triton takes the current one
        kernel[(programs,)](*arguments, **options, num_warps=4)


def distill(
    student: list[Tensor],
    teacher: list[Tensor],
    prior: list[Tensor],
    mean: list[Tensor],
    rstd: list[Tensor],
    weights: list[float],
    score: int,
    norm: int,
    temperature: float,
    penalty: int,
    beta: float,
    normalizer: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Implements ``fastkd::distill_triton``."""
    require_features(student, teacher, prior, mean, rstd, weights)
    absent, rho, beta = [None] * len(student), named(PENALTIES, penalty), usable(beta)
    every = describe(student, teacher, absent, prior, mean, rstd, weights, rho, beta, named(NORMALIZERS, normalizer))
    images, cells = sum(x.images for x in every), sum(x.images * x.cells for x in every)
    levels = occupied(every)
    new = student[0].new_empty if len(levels) == len(every) else student[0].new_zeros  # nobody writes empty levels
    losses, mass, maps = (new(n, dtype=torch.float32) for n in (len(every), len(every), cells))
    if not levels:
        return losses, mass, maps
    tile = choose_tile(levels)
    programs = sum(x.images * triton.cdiv(x.cells, tile.cells) for x in levels)
    scratch = student[0].new_empty(2, cells, dtype=torch.float64)
    image_sums = student[0].new_empty(2, images, dtype=torch.float64)
    tickets = student[0].new_zeros(images + len(every), dtype=torch.int32)
    _launch(
        forward,
        programs,
        *(levels, scratch, cells, image_sums, images, tickets, losses, mass, maps),
        *(min(1 / temperature, torch.finfo(torch.float32).max), beta),
        near=student[0],
        L=len(levels),
        SCORE=named(SCORES, score),
        NORM=named(NORMS, norm),
        PENALTY=rho,
        Z_OF_MAP=NORMALIZERS[normalizer] == "map",
        BLOCK_P=tile.cells,
        BLOCK_C=tile.channels,
        INDEX=tile.index,
        enable_fp_fusion=SCORES[score] != "entropy",  # else x - highest, x standardised, is not 0 where they are equal
    )
    return losses, mass, maps


def distill_backward(
    upstream: Tensor,
    mass: Tensor,
    maps: Tensor,
    student: list[Tensor],
    teacher: list[Tensor],
    mean: list[Tensor],
    rstd: list[Tensor],
    weights: list[float],
    penalty: int,
    beta: float,
    normalizer: int,
) -> list[Tensor]:
    """Implements ``fastkd::distill_triton_backward``."""
    gradient = [torch.empty_like(s) for s in student]
    everywhere = upstream.new_empty(0)
    constants = (weights, penalty, beta, normalizer)
    distill_backward_into(upstream, everywhere, mass, maps, student, teacher, mean, rstd, *constants, gradient)
    return gradient


def distill_backward_into(
    upstream: Tensor,
    assumed: Tensor,
    mass: Tensor,
    maps: Tensor,
    student: list[Tensor],
    teacher: list[Tensor],
    mean: list[Tensor],
    rstd: list[Tensor],
    weights: list[float],
    penalty: int,
    beta: float,
    normalizer: int,
    gradient: list[Tensor],
) -> None:
    """Implements ``fastkd::distill_triton_backward_into``."""
    require_features(student, teacher, mean, rstd, weights, gradient)
    absent, rho, beta = [None] * len(student), named(PENALTIES, penalty), usable(beta)
    wanted = [g if g.numel() else None for g in gradient]
    every = describe(student, teacher, wanted, absent, mean, rstd, weights, rho, beta, named(NORMALIZERS, normalizer))
    for s, g in zip(student, wanted, strict=True):
        require(g is None or g.shape == s.shape, "gradients of their students' shapes")
    cells, optional = sum(x.images * x.cells for x in every), assumed if assumed.numel() else None
    for name, x, count in (
        ("grad", upstream, len(every)), ("assumed", optional, len(every)), ("mass", mass, len(every)),
        ("maps", maps, cells),
    ):  # fmt: skip
        fits = x is None or (x.shape == (count,) and x.dtype == torch.float32 and x.device == student[0].device)
        require(fits and (x is None or name == "grad" or x.is_contiguous()), f"{name} as the forward gives it")
    levels = occupied(every)  # also those whose gradient nobody wants: their maps lie between others
    if all(x.grad is None for x in levels):
        return
    tile = choose_tile(levels)
    spans = [triton.cdiv(x.channels, SPAN * tile.channels) for x in levels]
    programs = sum(
        x.images * triton.cdiv(x.cells, tile.cells) * span
        for x, span in zip(levels, spans, strict=True)
        if x.grad is not None
    )
    _launch(
        backward,
        programs,
        *(levels, upstream, upstream.stride(0), optional, mass, maps, beta),
        near=student[0],
        L=len(levels),
        PENALTY=rho,
        Z_OF_MAP=NORMALIZERS[normalizer] == "map",
        BLOCK_P=tile.cells,
        BLOCK_C=tile.channels,
        SPAN=SPAN,
        INDEX=tile.index,
    )


def register(library: torch.library.Library) -> None:
    """Put the implementations below the ops' schemas."""
    library.impl("distill_triton", distill, DEVICE.upper())  # type: ignore[no-untyped-call]
    library.impl("distill_triton_backward", distill_backward, DEVICE.upper())  # type: ignore[no-untyped-call]
    library.impl("distill_triton_backward_into", distill_backward_into, DEVICE.upper())  # type: ignore[no-untyped-call]
