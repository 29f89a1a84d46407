"""The one-pass Triton kernel: map, loss and gradient of all levels in one launch, reading the teacher again from L2.

What must move, for features of b bytes an element: 3 b (reads s and t, writes ds), if the teacher of the images under
way stays in L2, which the times of an H200 do not show (benchmarks/results/nvidia-h200.md); about 12 floating-point
operations an element. Where Z is of the map it is known only after the last image: then all scores come first, and 4 b
move.

Programs take their work by a ticket: first the scores of some images, then in turn a piece of an image's gradient and
one of the scores of an image further on. A gradient waits until its image is weighed, which only needs programs that
took their tickets before: they run already, so no order of scheduling can lock them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastkd.kernels.distill import (
    at_cells,
    conclude,
    is_last,
    measure,
    places,
    read,
    read_teacher,
    scale_of,
    scaled_penalty,
    scaled_slope,
    sum_images,
    weigh,
    weighted_distance,
)


@triton.jit
def whose_turn(turn, images, blocks, ahead):
    """(image, block, whether it is a score) of a turn within a level, ``ahead`` images scored before the rest."""
    nth, block = turn // blocks, turn % blocks  # each image has two of these: scores and gradient
    later = nth - ahead
    alternates = (later >= 0) & (later < 2 * (images - ahead))
    is_score = (later < 0) | (alternates & (later % 2 == 1))
    scored = tl.where(later < 0, nth, later // 2 + ahead)
    differentiated = tl.where(alternates, later // 2, nth - images)
    return tl.where(is_score, scored, differentiated), block, is_score


@triton.jit
def wait_for(flag):
    """Returns once the flag is set, with everything visible that was stored before."""
    while tl.atomic_add(flag, 0, sem="acquire", scope="gpu") == 0:
        pass
    tl.debug_barrier()


@triton.jit
def raise_flag(flag):
    tl.debug_barrier()  # all threads of this program have stored
    tl.atomic_xchg(flag, 1, sem="release", scope="gpu")


@triton.jit
def imitate(
    level, image, block, slope, map, beta,
    PENALTY: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Scaled penalty sum D of BLOCK_P cells, and their gradient; ``map`` points to the image's weights."""
    p = block * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = p < level.cells
    w = tl.load(map + p, mask=inside, other=0.0, cache_modifier=".cg")
    slope_of_cell = slope.to(tl.float32) * w
    student = at_cells(level.student, level.width, image, block, BLOCK_P, INDEX)
    teacher = at_cells(level.teacher, level.width, image, block, BLOCK_P, INDEX)
    d = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for c in range(0, level.channels, BLOCK_C):
        x = read_teacher(level, teacher, c, inside, BLOCK_C, INDEX)
        s = read(level.student, student, c, inside, level.channels, BLOCK_C, INDEX)
        d += scaled_penalty(s - x, beta, PENALTY)
        if level.grad.data is not None:
            grad = at_cells(level.grad, level.width, image, block, BLOCK_P, INDEX)
            ds = slope_of_cell[:, None] * scaled_slope(s - x, beta, PENALTY)
            at, mask = places(level.grad, grad, c, inside, level.channels, BLOCK_C, INDEX)
            tl.store(at, ds.to(grad.dtype.element_ty), mask=mask)
    return tl.sum(d, 1)


@triton.jit(do_not_specialize=["cells", "images"])
def one_pass(
    levels, scratch, cells, image_sums, images, tickets, losses, mass, maps, assumed, inverse_temperature, beta,
    L: tl.constexpr, SCORE: tl.constexpr, NORM: tl.constexpr, PENALTY: tl.constexpr, Z_OF_MAP: tl.constexpr,
    AHEAD: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Losses, mass, maps and, for the upstream gradient ``assumed``, the gradient of all levels.

    Args:
        levels, scratch, image_sums, losses, mass, maps: as in ``distill.forward``.
        tickets: int32 (1 + 3 * images + 2 * levels,), zeros: programs so far; per image, programs done with its scores,
            whether it is weighed, programs done with its gradient; two per level, images weighed, images done.
        assumed: (levels,) float32.
        AHEAD: programs whose scores come before the first gradient of a level: more than run at once.
    """
    turn = tl.atomic_add(tickets, 1, sem="relaxed", scope="gpu")  # counted from where the level at hand begins
    scored = tickets + 1
    weighed = scored + images
    done = weighed + images
    of_level = done + images
    distance = scratch + cells
    first, first_image = 0, 0  # cells and images of the levels before
    for l in tl.static_range(L):
        level = levels[l]
        blocks = tl.cdiv(level.cells, BLOCK_P)
        turns = level.images * blocks * 2
        if (turn >= 0) & (turn < turns):
            if Z_OF_MAP:
                ahead = level.images + 0
            else:
                ahead = tl.minimum(level.images, tl.cdiv(AHEAD, blocks))
            image, block, is_score = whose_turn(turn, level.images, blocks, ahead)
            begin = first + image.to(tl.int64) * level.cells
            p = block * BLOCK_P + tl.arange(0, BLOCK_P)
            nth = first_image + image
            if is_score:
                e, _ = measure(level, image, block, inverse_temperature, beta, SCORE, None, BLOCK_P, BLOCK_C, INDEX)
                tl.store(scratch + begin + p, e, mask=p < level.cells)
                if is_last(scored + nth, blocks):
                    mass_sum = weigh(level, image, begin, scratch, maps, inverse_temperature, NORM, 512)
                    tl.store(image_sums + images + nth, mass_sum)
                    if Z_OF_MAP:
                        if is_last(of_level + 2 * level.number, level.images):
                            total = sum_images(level, image_sums + images + first_image, 128)
                            tl.store(mass + level.number, total.to(tl.float32))
                            raise_flag(weighed + first_image)
                    else:
                        raise_flag(weighed + nth)
            else:
                slope = tl.load(assumed + level.number).to(tl.float64)
                if Z_OF_MAP:  # one flag for the level
                    wait_for(weighed + first_image)
                    total = tl.load(mass + level.number, cache_modifier=".cg").to(tl.float64)
                    slope *= scale_of(level, total, Z_OF_MAP)
                else:
                    wait_for(weighed + nth)
                    slope *= scale_of(level, 0.0, Z_OF_MAP)
                d = imitate(level, image, block, slope, maps + begin, beta, PENALTY, BLOCK_P, BLOCK_C, INDEX)
                tl.store(distance + begin + p, d, mask=p < level.cells)
                if is_last(done + nth, blocks):
                    tl.store(image_sums + nth, weighted_distance(level, begin, scratch, distance, 512))
                    if is_last(of_level + 2 * level.number + 1, level.images):
                        conclude(level, first_image, image_sums, images, losses, mass, Z_OF_MAP)
        turn -= turns
        first += tl.cast(level.cells, tl.int64) * level.images
        first_image += level.images


@triton.jit
def rescale(
    levels, upstream, upstream_stride, assumed,
    L: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Gradients that were written for ``assumed``, times upstream / assumed where they differ."""
    program = tl.program_id(0)  # counted from the first of the level at hand
    for l in tl.static_range(L):
        level = levels[l]
        blocks = tl.cdiv(level.cells, BLOCK_P)
        if (program >= 0) & (program < level.images * blocks):
            g, known = tl.load(upstream + level.number * upstream_stride), tl.load(assumed + level.number)
            if g != known:
                image, block = program // blocks, program % blocks
                inside = block * BLOCK_P + tl.arange(0, BLOCK_P) < level.cells
                cells = at_cells(level.grad, level.width, image, block, BLOCK_P, INDEX)
                for c in range(0, level.channels, BLOCK_C):
                    at, mask = places(level.grad, cells, c, inside, level.channels, BLOCK_C, INDEX)
                    x = tl.load(at, mask=mask, other=0.0).to(tl.float32)
                    tl.store(at, (x * (g / known)).to(cells.dtype.element_ty), mask=mask)
        program -= level.images * blocks
