"""The Triton kernels of the one pass: loss and gradient together, if the weight of each cell is known before.

``stream`` computes, with w_p from the prior (1 without one) or from the map of the score pass,

    L_l = weight_l / Z_l * sum_p w_p sum_c rho(x_pc),   total = factor * sum_l L_l,
    ds_pc = factor * weight_l / Z_l * w_p * rho'(x_pc),   dbias_c = sum_p ds_pc.

It must move 3 b bytes per element of b bytes (reads s and t, writes ds), or 3 units (one unit is the bytes of all
student features), and do 10 operations and 3 conversions per element, counted as in csrc/cuda/stream.cuh.
``rescale`` computes ds = upstream * ds: 1 operation per element and 2 units, or nothing if the upstream gradient is 1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastkd.kernels.distill import is_last, penalty_and_grad, scale_of, sum_parts


@triton.jit
def sum_rows(rows, count, BLOCK_C: tl.constexpr):
    """Return the column sums of (count, BLOCK_C) numbers that other programs wrote, always in the same order."""
    row, column = tl.arange(0, 16), tl.arange(0, BLOCK_C)  # with 32 rows the kernel would need more than 64 registers
    total = tl.zeros((16, BLOCK_C), tl.float64)
    for n in range(0, count, 16):
        at = rows + (n + row)[:, None] * BLOCK_C + column[None, :]
        total += tl.load(at, mask=(n + row < count)[:, None], other=0.0, cache_modifier=".cg")
    return tl.sum(total, 0).to(tl.float32)


@triton.jit
def stream(
    levels, sums, columns, tickets, maps, mass, factor, total, losses, beta,
    L: tl.constexpr, PENALTY: tl.constexpr, Z_OF_MAP: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Compute losses and gradients of all levels; a program computes BLOCK_P cells and BLOCK_C channels of one image.

    The results of the programs are summed in steps, each by the program that finishes last: over the blocks of a
    *group* (an image and BLOCK_C channels), over the images (bias gradient of these channels), over the groups of a
    level (its loss), and over the levels.

    Args:
        levels: as in ``distill.forward``.
        sums: float64 (rows,): the losses of the levels, then for each level those of its groups and its programs.
        columns: float32 (rows, BLOCK_C): the sums of ds over cells, in the same rows; None if no bias gradient is
            wanted.
        tickets: int32, zeros: the count of finished levels, then for each level the counts of finished channel blocks,
            of finished images per channel block, and of finished programs per group.
        maps: float32, the weights of all cells of all levels; None: the prior.
        mass: float64 (levels,), read if Z depends on the map.
        factor: float32 scalar, or None: 1.
        total, losses: float32, a scalar and (levels,).
    """
    program = tl.program_id(0)
    if factor is not None:
        times = tl.load(factor).to(tl.float64)
    else:
        times = tl.full((), 1.0, tl.float64)
    program_0, first, row_0, ticket_0 = 0, 0, L, 1  # numbers of programs, cells, rows and tickets before this level
    for l in tl.static_range(L):
        level = levels[l]
        steps = tl.cdiv(level.channels, BLOCK_C)
        blocks = tl.cdiv(level.cells, BLOCK_P)
        groups = steps * level.images
        end = program_0 + groups * blocks
        if (program >= program_0) & (program < end):
            step = (program - program_0) % steps
            block = (program - program_0) // steps % blocks
            image = (program - program_0) // steps // blocks
            scale = tl.full((), 1.0, tl.float64)
            if Z_OF_MAP:
                scale *= scale_of(level, tl.load(mass + level.number), Z_OF_MAP)
            else:
                scale *= level.scale
            part, column = penalty_and_grad(
                level, maps, first, image, block, step * BLOCK_C, times * scale, beta,
                PENALTY, BLOCK_P, BLOCK_C, INDEX,
            )  # fmt: skip
            group = step * level.images + image
            parts = row_0 + groups + group * blocks  # the first row of the group's programs
            c = tl.arange(0, BLOCK_C)
            tl.store(sums + parts + block, part.to(tl.float64))
            if level.bias_grad is not None:
                tl.store(columns + (parts + block) * BLOCK_C + c, column)
            if is_last(tickets + ticket_0 + 1 + steps + group, blocks):
                tl.store(sums + row_0 + group, sum_parts(sums + parts, blocks, 128))
                if level.bias_grad is not None:
                    column = sum_rows(columns + parts * BLOCK_C, blocks, BLOCK_C)
                    tl.store(columns + (row_0 + group) * BLOCK_C + c, column)
                if is_last(tickets + ticket_0 + 1 + step, level.images):
                    if level.bias_grad is not None:
                        rows = columns + (row_0 + step * level.images) * BLOCK_C
                        column = sum_rows(rows, level.images, BLOCK_C)
                        channel = step * BLOCK_C + c
                        tl.store(level.bias_grad + channel, column, mask=channel < level.channels)
                    if is_last(tickets + ticket_0, steps):
                        loss = sum_parts(sums + row_0, groups, 128) * scale
                        tl.store(losses + level.number, loss.to(tl.float32))
                        tl.store(sums + l, loss)
                        if is_last(tickets, L):
                            tl.store(total, (times * sum_parts(sums, L, 128)).to(tl.float32))
        program_0 = end
        first += tl.cast(level.cells, tl.int64) * level.images
        row_0 += groups * (blocks + 1)
        ticket_0 += 1 + steps + groups


class Flat(NamedTuple):
    """A dense tensor as a flat array of elements."""

    data: Any
    elements: int
    number: int  # index of its upstream gradient


@triton.jit
def rescale(tensors, upstream, upstream_stride, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Multiply each of COUNT ``Flat`` tensors by its upstream gradient, in place.

    There are few programs, each with many blocks, because usually the upstream gradient is 1 and they do nothing.
    """
    for i in tl.static_range(COUNT):
        x = tensors[i]
        g = tl.load(upstream + x.number * upstream_stride).to(tl.float32)
        if g != 1:
            for start in range(tl.program_id(0).to(tl.int64) * BLOCK, x.elements, tl.num_programs(0) * BLOCK):
                at = start + tl.arange(0, BLOCK)
                old = tl.load(x.data + at, mask=at < x.elements, other=0.0).to(tl.float32)
                tl.store(x.data + at, (old * g).to(x.data.dtype.element_ty), mask=at < x.elements)
