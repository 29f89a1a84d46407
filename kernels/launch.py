"""The ops of the Triton backend: one launch for all levels, or two if the score pass must compute the map first.

With Triton's interpreter (``TRITON_INTERPRET=1``) they are registered for CPU tensors.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastkd.kernels.distill import Feature, Level, backward, forward
from fastkd.kernels.stream import Flat, rescale, stream
from fastkd.ops import reference
from fastkd.ops.presets import DIVISORS, MAP_NORMS, PENALTIES, SCORES

DEVICE = "cpu" if triton.knobs.runtime.interpret else "cuda"  # device of the tensors that the kernels take
ABSENT = Feature(None, 0, 0, None, 0)
PROGRAMS_PER_SM = 4  # of the rescale kernel, which usually has nothing to do
RESCALE_BLOCK = 4096


class Tensors(NamedTuple):
    """The tensors of a call: one entry per level in each list; an absent entry is None or empty."""

    student: Sequence[Tensor]
    teacher: Sequence[Tensor]
    prior: Sequence[Tensor | None]
    mean: Sequence[Tensor]
    rstd: Sequence[Tensor]
    bias: Sequence[Tensor]
    grad: Sequence[Tensor | None]
    bias_grad: Sequence[Tensor | None]


class Options(NamedTuple):
    """The options of a call, by name instead of code; the kernels are compiled for them."""

    score: str
    map_norm: str
    temperature: float
    penalty: str
    beta: float
    divisor: str

    @property
    def weights_are_known(self) -> bool:
        """Whether the weight of each cell is its prior, and so known before any feature is read."""
        return self.score == "uniform" and self.map_norm == "none"

    @property
    def of_penalty(self) -> dict[str, Any]:
        return {"PENALTY": self.penalty, "Z_OF_MAP": self.divisor == "map"}

    @property
    def of_map(self) -> dict[str, Any]:
        return {"SCORE": self.score, "MAP_NORM": self.map_norm}

    @property
    def inverse_temperature(self) -> float:
        return min(1 / self.temperature, torch.finfo(torch.float32).max)


class Tile(NamedTuple):
    """The cells and channels that a program computes at a time."""

    cells: int
    channels: int
    warps: int
    index: Any  # dtype of offsets within the tile

    def blocks(self, level: Level) -> int:
        return int(triton.cdiv(level.cells, self.cells))

    def steps(self, level: Level) -> int:
        return int(triton.cdiv(level.channels, self.channels))

    @property
    def options(self) -> dict[str, Any]:
        """The compile-time options of every kernel.

        No product is fused with a difference, as s - t' must be exactly 0 where both are equal, and so must the
        difference of a logit and the highest logit.
        """
        sizes = {"BLOCK_P": self.cells, "BLOCK_C": self.channels, "INDEX": self.index}
        return {**sizes, "num_warps": self.warps, "enable_fp_fusion": False}


# ---- checks


def require(condition: bool, expected: str) -> None:
    """Raise ``RuntimeError`` unless the condition holds, so that a direct call of an op cannot access invalid memory.

    Users get the messages of fastkd/ops/levels.py before.
    """
    if not condition:
        raise RuntimeError(f"fastkd: the Triton kernels expected {expected}")


def require_features(tensors: Tensors, weights: Sequence[float]) -> None:
    """Check that lists have one entry per level, and features equal shapes and one device."""
    student, count = tensors.student, len(tensors.student)
    require(count > 0 and {*map(len, tensors), len(weights)} == {count}, "one entry per level, at least one")
    for s, t, g in zip(student, tensors.teacher, tensors.grad, strict=True):
        require(s.ndim == 4 and s.shape == t.shape, "student and teacher of the same shape (N, C, H, W)")
        require(torch.float64 not in (s.dtype, t.dtype), "features of at most 32 bits")
        require(s.device == t.device == student[0].device, "all tensors on the device of the first student feature")
        if g is not None and g.numel():
            require(g.shape == s.shape and g.device == s.device, "gradients of their students' shapes and device")


def companion(
    x: Tensor | None, shape: Sequence[int], student: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor | None:
    """Check a small contiguous tensor of a level and return it; None for an empty tensor, which means absent."""
    if x is None or x.numel() == 0:
        return None
    valid = x.numel() == math.prod(shape) and x.is_contiguous() and x.dtype == dtype and x.device == student.device
    require(valid, f"a contiguous {dtype} tensor of shape {tuple(shape)} on {student.device}")
    return x


def require_upstream(grad: Tensor, like: Tensor, *counts: int) -> None:
    """Check an upstream gradient, which must have one of these numbers of elements."""
    valid = grad.ndim <= 1 and grad.numel() in counts and grad.is_floating_point() and grad.device == like.device
    require(valid, "an upstream gradient with one entry per level")


def name_of(names: Sequence[str], code: int) -> str:
    """Return the name that a code of the ops stands for."""
    require(0 <= code < len(names), f"a code of {', '.join(names)}")
    return names[code]


# ---- descriptions


def clamp_beta(beta: float) -> float:
    """Return beta, at least 1e-20: below that, smooth_l1 equals l1 in float32, and division by beta could overflow."""
    return max(beta, 1e-20)


def options_of(score: int, map_norm: int, temperature: float, penalty: int, beta: float, divisor: int) -> Options:
    """Return the options for the codes of the ops."""
    of_map = (name_of(SCORES, score), name_of(MAP_NORMS, map_norm), temperature)
    return Options(*of_map, name_of(PENALTIES, penalty), clamp_beta(beta), name_of(DIVISORS, divisor))


def feature(x: Tensor | None) -> Feature:
    """Return pointer and strides of a feature map; ``row`` is None if there are no gaps between rows."""
    if x is None or x.numel() == 0:
        return ABSENT
    image, channel, row, column = x.stride()
    height, width = x.shape[2:]
    gaps = height > 1 and (row != width * column if width > 1 else False)
    return Feature(x, image, channel, row if gaps else None, row if width == 1 and height > 1 else column)


def describe(tensors: Tensors, weights: Sequence[float], options: Options) -> tuple[Level, ...]:
    """Return the levels of one call; a list may be empty if no level has an entry."""
    tensors = Tensors(*(each or [None] * len(tensors.student) for each in tensors))  # type: ignore[arg-type]
    require_features(tensors, weights)
    levels: list[Level] = []
    for weight, s, t, prior, mean, rstd, bias, grad, bias_grad in zip(weights, *tensors, strict=True):
        n, channels, height, width = s.shape
        z = 1.0 if options.divisor == "map" else float(reference.z_of(s, s, options.divisor))
        z *= options.beta if options.penalty == "smooth_l1" else 1.0
        vectors = [companion(x, (channels,), s) for x in (mean, rstd, bias)]
        require(len({x is None for x in vectors}) == 1, "mean, rstd and bias together")
        shape = (len(levels), n, channels, height * width, width, 1 / max(channels, 1), weight / z)
        optional = (companion(prior, (n, height, width), s), *vectors, companion(bias_grad, (channels,), s))
        levels.append(Level(*shape, feature(s), feature(t), feature(grad), *optional))
    return tuple(levels)


def non_empty(levels: Sequence[Level]) -> tuple[Level, ...]:
    """Return the levels that have elements."""
    return tuple(x for x in levels if x.images and x.channels and x.cells)


def choose_tile(levels: Sequence[Level]) -> Tile:
    """Return the tile: 16 elements of each feature per thread (fewer if there are few channels), for 16-byte loads.

    Among eight tile shapes per layout these were the fastest on an H200 for ``large6`` with N = 64 in bfloat16, and
    close to the fastest for ``same6`` with N = 16.
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


# ---- launches


def _launch(kernel: Any, programs: int, *arguments: Any, near: Tensor, **options: Any) -> None:
    with torch.cuda.device(near.device) if near.is_cuda else contextlib.nullcontext():  # Triton takes the current one
        kernel[(programs,)](*arguments, **options)


def _launch_forward(
    levels: tuple[Level, ...],
    tile: Tile,
    options: Options,
    near: Tensor,
    losses: Tensor | None,
    mass: Tensor,
    maps: Tensor,
) -> None:
    """Launch the forward of the two passes; without ``losses`` the score pass, which reads only the teacher."""
    images = sum(x.images for x in levels)
    scratch = near.new_empty(2, maps.numel(), dtype=torch.float64)
    image_sums = near.new_empty(2, images, dtype=torch.float64)
    tickets = near.new_zeros(images + mass.numel(), dtype=torch.int32)
    compiled_for = {**options.of_map, **options.of_penalty, **tile.options, "L": len(levels)}
    if losses is None:
        compiled_for |= {"PENALTY": None, "Z_OF_MAP": False}
    outputs, numbers = (losses, mass, maps), (options.inverse_temperature, options.beta)
    arguments = (levels, scratch, maps.numel(), image_sums, images, tickets, *outputs, *numbers)
    programs = sum(x.images * tile.blocks(x) for x in levels)
    _launch(forward, programs, *arguments, near=near, **compiled_for)


def _launch_stream(
    levels: tuple[Level, ...], tile: Tile, options: Options, near: Tensor, total: Tensor, losses: Tensor, *weights: Any
) -> None:
    """Launch the one pass; ``weights`` are maps, mass and factor, each None if absent."""
    groups = [x.images * tile.steps(x) for x in levels]
    programs = sum(n * tile.blocks(x) for n, x in zip(groups, levels, strict=True))
    rows = len(levels) + sum(groups) + programs
    sums, columns = near.new_empty(rows, dtype=torch.float64), None
    if any(x.bias_grad is not None for x in levels):
        columns = near.new_empty(rows, tile.channels, dtype=torch.float32)
    tickets = near.new_zeros(1 + sum(1 + tile.steps(x) for x in levels) + sum(groups), dtype=torch.int32)
    arguments = (levels, sums, columns, tickets, *weights, total, losses, options.beta)
    _launch(stream, programs, *arguments, near=near, L=len(levels), **options.of_penalty, **tile.options)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


# ---- the ops, by the names of fastkd/ops/schema.py


def distill(
    student: list[Tensor],
    teacher: list[Tensor],
    prior: list[Tensor],
    mean: list[Tensor],
    rstd: list[Tensor],
    bias: list[Tensor],
    weights: list[float],
    score: int,
    map_norm: int,
    temperature: float,
    penalty: int,
    beta: float,
    divisor: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Implement ``fastkd::distill_triton``: losses, masses and maps."""
    absent = [None] * len(student)
    options = options_of(score, map_norm, temperature, penalty, beta, divisor)
    every = describe(Tensors(student, teacher, prior, mean, rstd, bias, absent, absent), weights, options)
    levels, cells = non_empty(every), sum(x.images * x.cells for x in every)
    new = student[0].new_empty if len(levels) == len(every) else student[0].new_zeros  # no program writes empty levels
    losses, mass, maps = (new(n, dtype=torch.float32) for n in (len(every), len(every), cells))
    if levels:
        _launch_forward(levels, choose_tile(levels), options, student[0], losses, mass, maps)
    return losses, mass, maps


def distill_backward(
    grad: Tensor,
    mass: Tensor,
    maps: Tensor,
    student: list[Tensor],
    teacher: list[Tensor],
    mean: list[Tensor],
    rstd: list[Tensor],
    bias: list[Tensor],
    weights: list[float],
    penalty: int,
    beta: float,
    divisor: int,
) -> list[Tensor]:
    """Implement ``fastkd::distill_triton_backward``: the student's gradients."""
    gradient, absent = [torch.empty_like(s) for s in student], [None] * len(student)
    options = options_of(0, 0, 1.0, penalty, beta, divisor)
    every = describe(Tensors(student, teacher, absent, mean, rstd, bias, gradient, absent), weights, options)
    levels = non_empty(every)
    require_upstream(grad, student[0], len(every))
    require(companion(mass, (len(every),), student[0]) is not None, "the mass of the forward")
    companion(maps, (sum(x.images * x.cells for x in every),), student[0])
    if levels:
        require(maps.numel() > 0, "the maps of the forward")
        tile = choose_tile(levels)
        programs = sum(x.images * tile.blocks(x) * tile.steps(x) for x in levels)
        arguments = (levels, grad, grad.stride(0), mass, maps, options.beta)
        _launch(backward, programs, *arguments, near=student[0], L=len(levels), **options.of_penalty, **tile.options)
    return gradient


def distill_one_pass(
    student: list[Tensor],
    teacher: list[Tensor],
    prior: list[Tensor],
    mean: list[Tensor],
    rstd: list[Tensor],
    bias: list[Tensor],
    weights: list[float],
    score: int,
    map_norm: int,
    temperature: float,
    penalty: int,
    beta: float,
    divisor: int,
    mass: Tensor,
    factor: Tensor,
    gradient: list[Tensor],
    bias_gradient: list[Tensor],
) -> tuple[Tensor, Tensor]:
    """Implement ``fastkd::distill_triton_one_pass``: factor * sum of losses, and losses; writes the gradients."""
    options = options_of(score, map_norm, temperature, penalty, beta, divisor)
    tensors = Tensors(student, teacher, prior, mean, rstd, bias, gradient, bias_gradient)
    every, near = describe(tensors, weights, options), student[0]
    levels = non_empty(every)
    known_mass, scale = companion(mass, (len(every),), near, torch.float64), companion(factor, (1,), near)
    require(options.divisor != "map_all_ranks", "divisor map, with the mass averaged over all ranks")
    mass_is_known = known_mass is not None or not options.weights_are_known or options.divisor != "map"
    require(mass_is_known, "the mass, as the map is the prior")
    new = near.new_empty if len(levels) == len(every) else near.new_zeros  # no program writes empty levels
    total, losses = new((), dtype=torch.float32), new(len(every), dtype=torch.float32)
    for x in every:
        if x.bias_grad is not None and not x.images * x.cells:
            x.bias_grad.zero_()
    if not levels:
        return total, losses
    tile, maps = choose_tile(levels), None
    if not options.weights_are_known:
        maps = near.new_empty(sum(x.images * x.cells for x in every), dtype=torch.float32)
        map_mass = near.new_empty(len(every), dtype=torch.float64)
        _launch_forward(levels, tile, options, near, None, map_mass, maps)
        known_mass = map_mass if known_mass is None else known_mass
    mass_of_z = known_mass if options.divisor == "map" else None
    _launch_stream(levels, tile, options, near, total, losses, maps, mass_of_z, scale)
    return total, losses


def distill_rescale(upstream: Tensor, gradient: list[Tensor]) -> None:
    """Implement ``fastkd::distill_triton_rescale``: multiply entry i by ``upstream[i % numel]``, in place."""
    require(len(gradient) > 0, "at least one gradient")
    require_upstream(upstream, gradient[0], 1, len(gradient), len(gradient) // 2)
    tensors = [Flat(x, x.numel(), i % upstream.numel()) for i, x in enumerate(gradient) if x.numel()]
    for x, size, _ in tensors:
        reach = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
        require(reach == size and x.device == upstream.device, "dense gradients on the device of the upstream one")
    if tensors:
        needed = max(triton.cdiv(x.elements, RESCALE_BLOCK) for x in tensors)
        programs = min(needed, PROGRAMS_PER_SM * _processors(upstream.device))
        stride = upstream.stride(0) if upstream.ndim else 0
        sizes = {"COUNT": len(tensors), "BLOCK": RESCALE_BLOCK, "num_warps": 8}
        _launch(rescale, programs, tuple(tensors), upstream, stride, near=upstream, **sizes)


def register(library: torch.library.Library) -> None:
    """Register the implementations of the ops."""
    for suffix, op in {
        "": distill, "_backward": distill_backward, "_one_pass": distill_one_pass, "_rescale": distill_rescale
    }.items():  # fmt: skip
        library.impl(f"distill_triton{suffix}", op, DEVICE.upper())  # type: ignore[no-untyped-call]
