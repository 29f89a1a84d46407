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
from fastkd.kernels.one_pass import one_pass, rescale

DEVICE = "cpu" if triton.knobs.runtime.interpret else "cuda"  # whose tensors the kernels take
AHEAD = 2048  # programs of the one-pass kernel before the first gradient of a level: more than run at once
ABSENT = Feature(None, 0, 0, None, 0)


class Tile(NamedTuple):
    """What a program takes at a time."""

    cells: int
    channels: int
    warps: int
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
                ABSENT if g is None else feature(g),
                None if q is None else companion(q, (n, height, width), s),
                companion(mu, (channels,), s),
                companion(r, (channels,), s),
            )
        )
    return tuple(levels)


def choose_tile(levels: Sequence[Level]) -> Tile:
    """16 elements of each feature a thread (fewer of narrow levels), read 16 bytes at a time where aligned.

    Of eight shapes a layout the fastest on an H200 for ``large6``, N = 64, near it for ``same6``, N = 16 (bfloat16).
    """
    widest = max(level.channels for level in levels)
    channels_last = widest > 1 and 2 * sum(x.student.channel == 1 for x in levels) > len(levels)
    warps = 8 if channels_last else 4
    channels = max(1, min(triton.next_power_of_2(widest), 64 if channels_last else 16))
    cells = 512 * warps // max(channels, 16)
    reach = 0
    for level in levels:
        for f in (level.student, level.teacher, level.grad):
            if f.data is not None:
                by_rows = 0 if f.row is None else level.cells // level.width * f.row + level.width * f.column
                reach = max(reach, channels * f.channel, by_rows or cells * f.column)
    return Tile(cells, channels, warps, tl.int32 if reach < 2**30 else tl.int64)


def options_of(tile: Tile) -> dict[str, Any]:
    """What every kernel is compiled with.

    No product is fused with a difference: s - t', t' standardised, must be 0 where equal, and so must a logit below the
    highest.
    """
    sizes = {"BLOCK_P": tile.cells, "BLOCK_C": tile.channels, "INDEX": tile.index}
    return {**sizes, "num_warps": tile.warps, "enable_fp_fusion": False}


def occupied(levels: Sequence[Level]) -> tuple[Level, ...]:
    """Those with anything to compute."""
    return tuple(x for x in levels if x.images and x.channels and x.cells)


def usable(beta: float) -> float:
    """Under a beta of 1e-20 smooth_l1 is l1 to the last bit of a sum; what is divided by it later must not overflow."""
    return max(beta, 1e-20)


def _launch(kernel: Any, programs: int, *arguments: Any, near: Tensor, **options: Any) -> None:
    with torch.cuda.device(near.device) if near.is_cuda else contextlib.nullcontext():  # Triton takes the current one
        kernel[(programs,)](*arguments, **options)


class Forward(NamedTuple):
    """What a forward kernel is passed, but its tickets."""

    outputs: tuple[Tensor, Tensor, Tensor]  # losses, mass, maps
    levels: tuple[Level, ...]  # those that are not empty; none: nothing is left to do
    arguments: tuple[Any, ...]
    images: int
    blocks: int  # programs that take each cell once
    options: dict[str, Any]


def prepare_forward(
    student: list[Tensor],
    teacher: list[Tensor],
    gradient: Sequence[Tensor | None],
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
) -> Forward:
    require_features(student, teacher, gradient, prior, mean, rstd, weights)
    rho, beta = named(PENALTIES, penalty), usable(beta)
    every = describe(student, teacher, gradient, prior, mean, rstd, weights, rho, beta, named(NORMALIZERS, normalizer))
    images, cells = sum(x.images for x in every), sum(x.images * x.cells for x in every)
    levels = occupied(every)
    new = student[0].new_empty if len(levels) == len(every) else student[0].new_zeros  # nobody writes empty levels
    losses, mass, maps = (new(n, dtype=torch.float32) for n in (len(every), len(every), cells))
    options = {"SCORE": named(SCORES, score), "NORM": named(NORMS, norm), "PENALTY": rho, "L": len(levels)}
    if not levels:
        return Forward((losses, mass, maps), levels, (), images, 0, options)
    tile = choose_tile(levels)
    scratch = student[0].new_empty(2, cells, dtype=torch.float64)
    image_sums = student[0].new_empty(2, images, dtype=torch.float64)
    options |= {"Z_OF_MAP": NORMALIZERS[normalizer] == "map", **options_of(tile)}
    blocks = sum(x.images * triton.cdiv(x.cells, tile.cells) for x in levels)
    arguments = (levels, scratch, cells, image_sums, images)
    return Forward((losses, mass, maps), levels, arguments, images, blocks, options)


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
    codes, absent = (score, norm, temperature, penalty, beta, normalizer), [None] * len(student)
    call = prepare_forward(student, teacher, absent, prior, mean, rstd, weights, *codes)
    if call.levels:
        tickets = student[0].new_zeros(call.images + len(student), dtype=torch.int32)
        numbers = (min(1 / temperature, torch.finfo(torch.float32).max), usable(beta))
        arguments = (*call.arguments, tickets, *call.outputs, *numbers)
        _launch(forward, call.blocks, *arguments, near=student[0], **call.options)
    return call.outputs


def distill_one_pass(
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
    assumed: Tensor,
    gradient: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Implements ``fastkd::distill_triton_one_pass``."""
    codes, wanted = (score, norm, temperature, penalty, beta, normalizer), wanted_of(student, gradient)
    call = prepare_forward(student, teacher, wanted, prior, mean, rstd, weights, *codes)
    require_upstream("assumed", assumed, student)
    if call.levels:
        tickets = student[0].new_zeros(1 + 3 * call.images + 2 * len(student), dtype=torch.int32)
        numbers = (min(1 / temperature, torch.finfo(torch.float32).max), usable(beta))
        arguments = (*call.arguments, tickets, *call.outputs, assumed, *numbers)
        _launch(one_pass, 2 * call.blocks, *arguments, near=student[0], AHEAD=AHEAD, **call.options)
    return call.outputs


def distill_rescale(upstream: Tensor, assumed: Tensor, gradient: list[Tensor]) -> None:
    """Implements ``fastkd::distill_triton_rescale``."""
    require(len(gradient) > 0, "at least one level")
    require_upstream("grad", upstream, gradient)
    require_upstream("assumed", assumed, gradient)
    nothing = gradient[0].new_empty(0, dtype=torch.float32)
    there = [g if g.numel() else g.new_empty(0, 1, 1, 1) for g in gradient]
    absent, count = [nothing] * len(there), len(there)
    levels = occupied(describe(there, there, there, [None] * count, absent, absent, [1.0] * count, "l2", 1.0, "batch"))
    if levels:
        tile = choose_tile(levels)
        programs = sum(x.images * triton.cdiv(x.cells, tile.cells) for x in levels)
        arguments = (levels, upstream, upstream.stride(0), assumed)
        _launch(rescale, programs, *arguments, near=gradient[0], L=len(levels), **options_of(tile))


def wanted_of(student: Sequence[Tensor], gradient: Sequence[Tensor]) -> list[Tensor | None]:
    """Where gradients go; None where nobody wants one."""
    require(len(student) == len(gradient), "one entry per level, at least one")
    for s, g in zip(student, gradient, strict=True):
        require(g.numel() == 0 or g.shape == s.shape, "gradients of their students' shapes")
        require(g.device == student[0].device, "all tensors on the device of the first student feature")
    return [g if g.numel() else None for g in gradient]


def require_upstream(name: str, x: Tensor, features: Sequence[Tensor]) -> None:
    fits = x.shape == (len(features),) and x.dtype == torch.float32 and x.device == features[0].device
    require(fits and (name == "grad" or x.is_contiguous()), f"{name} with one float32 entry per level")


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
    wanted = wanted_of(student, gradient)
    every = describe(student, teacher, wanted, absent, mean, rstd, weights, rho, beta, named(NORMALIZERS, normalizer))
    require_upstream("grad", upstream, student)
    require_upstream("mass", mass, student)
    optional = assumed if assumed.numel() else None
    if optional is not None:
        require_upstream("assumed", optional, student)
    cells = sum(x.images * x.cells for x in every)
    fits = maps.shape == (cells,) and maps.dtype == torch.float32 and maps.device == student[0].device
    require(fits and maps.is_contiguous(), "maps as the forward gives them")
    levels = occupied(every)  # also those whose gradient nobody wants: their maps lie between others
    if all(x.grad.data is None for x in levels):
        return
    tile = choose_tile(levels)
    programs = sum(
        x.images * triton.cdiv(x.cells, tile.cells) * triton.cdiv(x.channels, tile.channels)
        for x in levels
        if x.grad.data is not None
    )
    _launch(
        backward,
        programs,
        *(levels, upstream, upstream.stride(0), optional, mass, maps, beta),
        near=student[0],
        L=len(levels),
        PENALTY=rho,
        Z_OF_MAP=NORMALIZERS[normalizer] == "map",
        **options_of(tile),
    )


def register(library: torch.library.Library) -> None:
    """Put the implementations below the ops' schemas."""
    library.impl("distill_triton", distill, DEVICE.upper())  # type: ignore[no-untyped-call]
    library.impl("distill_triton_backward", distill_backward, DEVICE.upper())  # type: ignore[no-untyped-call]
    library.impl("distill_triton_backward_into", distill_backward_into, DEVICE.upper())  # type: ignore[no-untyped-call]
    library.impl("distill_triton_one_pass", distill_one_pass, DEVICE.upper())  # type: ignore[no-untyped-call]
    library.impl("distill_triton_rescale", distill_rescale, DEVICE.upper())  # type: ignore[no-untyped-call]
