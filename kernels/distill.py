"""The Triton kernels of two passes, one launch per pass for all levels, and the pieces that ``stream`` shares.

``forward`` reads the features and computes, for each cell p of each level,

    e_p = score(t'_p),   w_p = prior_p * map_norm(e)_p,   D_p = sum_c rho(x_pc),   L = weight * sum_p w_p D_p / Z,
    x_pc = (s_pc + bias_c) - t'_pc,   t'_pc = (t_pc - mean_c) * rstd_c;

``backward`` reads them again and writes ds_pc = g * weight / Z * w_p * rho'(x_pc). Without a penalty, ``forward`` reads
the teacher alone and leaves maps and masses: the score pass, after which ``stream`` knows every weight.

What must move, for features of b bytes an element (the maps, (N, H, W), are small beside them):

==========  ========================  ==========================================  ===================
kernel      bytes per element         floating-point operations per element       floor, 4.8 TB/s, b=2
==========  ========================  ==========================================  ===================
forward     2 b: reads s and t        about 8: bias, standardise 2, score 2,      0.83 ps
                                      penalty 3
score pass  b: reads t                about 4: standardise 2, score 2             0.42 ps
backward    3 b: reads s and t,       about 6: bias, standardise 2, slope 3       1.25 ps
            writes ds
==========  ========================  ==========================================  ===================

A program takes BLOCK_P cells of one image of one level; in the forward it walks over their channels in steps of
BLOCK_C, in the backward it takes one such step. Which axis of the tile is contiguous (NCHW: the cells, channels_last:
the channels) follows from strides of 1, which Triton compiles as constants; so each layout is read in place. Every load
is widened to float32 at once; what is summed over an image's cells is in float64, as a difference of near-equal scores
may decide a weight.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

EPS = tl.constexpr(1e-9)  # as in fastkd/ops/reference.py
TINY = tl.constexpr(1.1754943508222875e-38)
LOWEST_LOGIT = tl.constexpr(-1000.0)
STAGES = tl.constexpr(2)  # of the forward's loop over channels: the next tile is copied while one is worked on


class Feature(NamedTuple):
    """An (N, C, H, W) tensor by its strides, in elements. ``row`` is None where rows have no gaps between them."""

    data: Any  # None: absent (Triton 3.6 cannot ask whether a tuple is None)
    image: int
    channel: int
    row: int | None
    column: int


class Level(NamedTuple):
    """One level; the same fields as the struct of ``csrc/level.h``."""

    number: int  # among all levels, empty ones counted
    images: int
    channels: int
    cells: int  # H * W
    width: int
    per_channel: float  # 1 / channels
    scale: float  # weight / Z, of smooth_l1 also divided by beta; where Z depends on the map, without Z
    student: Feature
    teacher: Feature
    grad: Feature  # absent where it is not wanted
    prior: Any  # (N, H, W) or None: 1
    mean: Any  # (C,) or None; mean, rstd and bias are all there, or all None: t' = t and no bias
    rstd: Any
    bias: Any  # of the student's adapter, whose output comes without it
    bias_grad: Any  # (C,) or None: not wanted


# ---- terms


@triton.jit
def score_term(x, SCORE: tl.constexpr):
    """What one channel adds to the score of its cell, before division by C."""
    if SCORE == "magnitude":
        return tl.abs(x)
    elif SCORE == "energy":
        return x * x
    else:
        return tl.zeros_like(x)


@triton.jit
def scaled_penalty(x, beta, PENALTY: tl.constexpr):
    """The penalty, but smooth_l1's times beta: a sum of them needs one division."""
    if PENALTY == "l2":
        return x * x
    elif PENALTY == "l1":
        return tl.abs(x)
    else:
        a = tl.abs(x)
        c = tl.where(a < beta, a, beta)
        return c * (a - 0.5 * c)


@triton.jit
def scaled_slope(x, beta, PENALTY: tl.constexpr):
    """Derivative of the penalty, of smooth_l1's times beta."""
    if PENALTY == "l2":
        return x + x
    elif PENALTY == "l1":
        return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))  # 0 of a NaN, as PyTorch's l1_loss has it
    else:
        return tl.where(x < -beta, -beta, tl.where(x > beta, beta, x))


@triton.jit
def reciprocal(x):
    """1 / x in float64, for x that float32 can hold. Its division is a subroutine, around which ptxas spills."""
    r = (1.0 / x.to(tl.float32)).to(tl.float64)
    return tl.where(r == 0, 0.0, r * (2 - x * r))  # one step of Newton's method


# ---- tiles


@triton.jit
def at_cells(feature, width, image, block, BLOCK_P: tl.constexpr, INDEX: tl.constexpr):
    """Pointer to each cell's first channel, (BLOCK_P,). Whole blocks are skipped in 64 bits."""
    base = feature.data + image.to(tl.int64) * feature.image
    cell = tl.arange(0, BLOCK_P).to(INDEX)
    if feature.row is None:
        return base + (block * BLOCK_P).to(tl.int64) * feature.column + cell * feature.column
    else:
        p = block * BLOCK_P + cell
        return base + (p // width) * feature.row + (p % width) * feature.column


@triton.jit
def places(feature, cells, c, inside, channels, BLOCK_C: tl.constexpr, INDEX: tl.constexpr):
    """Pointers to (BLOCK_P, BLOCK_C) of a feature from channel c on, and which of them are inside it."""
    channel = tl.arange(0, BLOCK_C)
    start = tl.cast(c, tl.int64) * feature.channel
    offset = channel.to(INDEX) * feature.channel
    return cells[:, None] + start + offset[None, :], inside[:, None] & (c + channel < channels)[None, :]


@triton.jit
def read(feature, cells, c, inside, channels, BLOCK_C: tl.constexpr, INDEX: tl.constexpr):
    """The values there, as float32; 0 outside."""
    at, mask = places(feature, cells, c, inside, channels, BLOCK_C, INDEX)
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def read_vector(x, c, channels, BLOCK_C: tl.constexpr):
    """BLOCK_C entries of a (C,) vector from channel c on, as a row; 0 outside."""
    channel = c + tl.arange(0, BLOCK_C)
    return tl.load(x + channel, mask=channel < channels, other=0.0)[None, :]


@triton.jit
def read_student(level, cells, c, inside, BLOCK_C: tl.constexpr, INDEX: tl.constexpr):
    """s + bias of a tile, or s where the level has none."""
    s = read(level.student, cells, c, inside, level.channels, BLOCK_C, INDEX)
    if level.bias is not None:
        s += read_vector(level.bias, c, level.channels, BLOCK_C)
    return s


@triton.jit
def read_teacher(level, cells, c, inside, BLOCK_C: tl.constexpr, INDEX: tl.constexpr):
    """t' of a tile, or t where the level has no moments."""
    x = read(level.teacher, cells, c, inside, level.channels, BLOCK_C, INDEX)
    if level.mean is not None:
        mean = read_vector(level.mean, c, level.channels, BLOCK_C)
        x = (x - mean) * read_vector(level.rstd, c, level.channels, BLOCK_C)
    return x


# ---- forward


@triton.jit
def measure(
    level, image, block, inverse_temperature, beta,
    SCORE: tl.constexpr, PENALTY: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Score e of BLOCK_P cells and scaled penalty sum D, in one read; without a PENALTY, of the teacher alone."""
    inside = block * BLOCK_P + tl.arange(0, BLOCK_P) < level.cells
    student = at_cells(level.student, level.width, image, block, BLOCK_P, INDEX)
    teacher = at_cells(level.teacher, level.width, image, block, BLOCK_P, INDEX)
    d = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    e = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    if SCORE == "entropy":  # each lane keeps its own highest value, sum of exp and sum of u exp
        highest = tl.full((BLOCK_P, BLOCK_C), float("-inf"), tl.float32)
        weighted = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for c in tl.range(0, level.channels, BLOCK_C, num_stages=STAGES):
        x = read_teacher(level, teacher, c, inside, BLOCK_C, INDEX)
        if PENALTY is not None:
            s = read_student(level, student, c, inside, BLOCK_C, INDEX)
            d += scaled_penalty(s - x, beta, PENALTY)
        if SCORE == "entropy":
            here = (c + tl.arange(0, BLOCK_C) < level.channels)[None, :]
            e, weighted, highest = add_entropy(e, weighted, highest, x, here, inverse_temperature)
        else:
            e += score_term(x, SCORE)
    if SCORE == "entropy":
        score = entropy_score(e, weighted, highest, level.channels, inverse_temperature)
    elif SCORE == "uniform":
        score = tl.full((BLOCK_P,), 1.0, tl.float64)
    else:
        score = tl.sum(e.to(tl.float64), 1) * level.per_channel
    return score, tl.sum(d, 1)


@triton.jit
def below(x, highest, inverse_temperature):
    """(x - highest) / T, clamped so that exp() is 0 and its product with the logit too, whatever T."""
    u = (x - highest) * inverse_temperature
    return tl.where(u < LOWEST_LOGIT, LOWEST_LOGIT, u).to(tl.float32)


@triton.jit
def add_entropy(total, weighted, highest, x, here, inverse_temperature):
    """Online softmax over channels: rescale the sums of exp(u) and u exp(u) to the new highest value, add x."""
    new = tl.where(here & ((x > highest) | (x != x)), x, highest)  # a NaN stays
    shift = below(highest, new, inverse_temperature)
    shift = tl.where(highest == new, 0.0, shift)  # also where both are still -inf
    weighted = (weighted + shift * total) * tl.exp(shift)
    total = total * tl.exp(shift)
    u = below(x, new, inverse_temperature)
    p = tl.exp(u)
    return total + tl.where(here, p, 0.0), weighted + tl.where(here, u * p, 0.0), new


@triton.jit
def entropy_score(total, weighted, highest, channels, inverse_temperature):
    """1 - H / log C of each cell, from the lanes' sums; 0 where rounding is all that is left of it, of either sign."""
    top = tl.max(highest, 1)
    shift = below(highest, top[:, None], inverse_temperature)
    weighted = tl.sum(((weighted + shift * total) * tl.exp(shift)).to(tl.float64), 1)
    total = tl.sum((total * tl.exp(shift)).to(tl.float64), 1)
    log_channels = tl.log(channels.to(tl.float64))
    entropy = tl.log(total) - weighted * reciprocal(total)
    # the difference first: of equal channels it must be 0, and the reciprocal may miss by a bit
    score = tl.where(log_channels > TINY, (log_channels - entropy) * reciprocal(log_channels), 1.0 - entropy)
    return tl.where(score < 0, 0.0, score)  # a NaN stays


@triton.jit
def is_last(ticket, count):
    """Whether all other programs of `count` have come here before: then what they stored is visible."""
    tl.debug_barrier()  # all threads of this program have stored
    return tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu") == count - 1


@triton.jit
def shift_and_factor(score, first, cells, inverse_temperature, MAP_NORM: tl.constexpr, BLOCK: tl.constexpr):
    """What makes an image's weights of its scores: (e - shift) * factor, of softmax exp((e - shift) / T) * factor."""
    lane = tl.arange(0, BLOCK)
    low = tl.full((BLOCK,), float("inf"), tl.float64)
    high = tl.full((BLOCK,), float("-inf"), tl.float64)
    total = tl.zeros((BLOCK,), tl.float64)
    for p in range(0, cells, BLOCK):
        inside = p + lane < cells
        e = tl.load(score + first + p + lane, mask=inside, other=0.0, cache_modifier=".cg")
        new = tl.where(inside & ((e > high) | (e != e)), e, high)
        if MAP_NORM == "softmax":  # online: one pass gives the highest score and the sum of exponentials
            rescale = tl.where(high == new, 1.0, tl.exp(below(high, new, inverse_temperature)))
            total = total * rescale + tl.where(inside, tl.exp(below(e, new, inverse_temperature)), 0.0)
        else:
            low = tl.where(inside & ((e < low) | (e != e)), e, low)
            total += e
        high = new
    if MAP_NORM == "mean":
        mean = tl.sum(total, 0) * reciprocal(cells.to(tl.float64))
        return 0.0, reciprocal(tl.where(mean < TINY, TINY, mean))
    elif MAP_NORM == "minmax":
        sum_of = tl.sum(total, 0)  # extremes lose a NaN, which in PyTorch makes its whole image NaN
        shift = tl.where(sum_of != sum_of, sum_of, tl.min(low, 0))
        return shift, reciprocal(tl.max(high, 0) - shift + EPS)
    else:
        shift = tl.max(high, 0)
        return shift, cells * reciprocal(tl.sum(total * tl.exp(below(high, shift, inverse_temperature)), 0))


@triton.jit
def write_map(level, image, first, score, maps, inverse_temperature, MAP_NORM: tl.constexpr, BLOCK: tl.constexpr):
    """Write the map of one image, in float64 over its scores; its sum. Reads what others wrote, hence past L1."""
    lane = tl.arange(0, BLOCK)
    if MAP_NORM != "none":
        shift, factor = shift_and_factor(score, first, level.cells, inverse_temperature, MAP_NORM, BLOCK)
    mass = tl.zeros((BLOCK,), tl.float64)
    for p in range(0, level.cells, BLOCK):
        inside = p + lane < level.cells
        w = tl.load(score + first + p + lane, mask=inside, other=0.0, cache_modifier=".cg")
        if MAP_NORM == "softmax":
            w = tl.exp(below(w, shift, inverse_temperature)) * factor
        elif MAP_NORM == "mean":
            w = w * factor
        elif MAP_NORM == "minmax":
            w = (w - shift) * factor
        if level.prior is not None:
            w *= tl.load(level.prior + image.to(tl.int64) * level.cells + p + lane, mask=inside, other=0.0)
        tl.store(maps + first + p + lane, w.to(tl.float32), mask=inside)
        tl.store(score + first + p + lane, w, mask=inside)
        mass += tl.where(inside, w, 0.0)
    return tl.sum(mass, 0)


@triton.jit
def weighted_distance(level, first, weight, distance, BLOCK: tl.constexpr):
    """Sum of w D over one image. Reads what other programs wrote."""
    lane = tl.arange(0, BLOCK)
    loss = tl.zeros((BLOCK,), tl.float64)
    for p in range(0, level.cells, BLOCK):
        inside = p + lane < level.cells
        w = tl.load(weight + first + p + lane, mask=inside, other=0.0, cache_modifier=".cg")
        d = tl.load(distance + first + p + lane, mask=inside, other=0.0, cache_modifier=".cg")
        loss += tl.where(inside, w * d, 0.0)
    return tl.sum(loss, 0)


@triton.jit
def sum_parts(parts, count, BLOCK: tl.constexpr):
    """Sum of ``count`` numbers that other programs wrote, always in the same order."""
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    for n in range(0, count, BLOCK):
        total += tl.load(parts + n + lane, mask=n + lane < count, other=0.0, cache_modifier=".cg")
    return tl.sum(total, 0)


@triton.jit
def scale_of(level, mass, Z_OF_MAP: tl.constexpr):
    """weight / Z, of smooth_l1 also divided by beta."""
    if Z_OF_MAP:
        return level.scale * reciprocal(level.channels * mass + EPS)
    else:
        return level.scale


@triton.jit
def finalize_level(level, first_image, image_sums, images, losses, mass, Z_OF_MAP: tl.constexpr):
    """Mass of a level and, unless ``losses`` is None, its loss, from the sums of its images."""
    mass_sum = sum_parts(image_sums + first_image, level.images, 128)
    tl.store(mass + level.number, mass_sum.to(mass.dtype.element_ty))
    if losses is not None:
        loss_sum = sum_parts(image_sums + images + first_image, level.images, 128)
        tl.store(losses + level.number, (loss_sum * scale_of(level, mass_sum, Z_OF_MAP)).to(tl.float32))


@triton.jit(do_not_specialize=["cells", "images"])
def forward(
    levels, scratch, cells, image_sums, images, tickets, losses, mass, maps, inverse_temperature, beta,
    L: tl.constexpr, SCORE: tl.constexpr, MAP_NORM: tl.constexpr, PENALTY: tl.constexpr, Z_OF_MAP: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Losses, masses and maps of all levels; without a PENALTY the score pass: masses and maps alone.

    Args:
        levels: L ``Level``, none of them empty. Where each begins is counted here: as arguments, such numbers would
            have Triton compile again for most batch sizes.
        scratch: float64 (2, cells): e and D of the cells of all images of all levels.
        image_sums: float64 (2, images): sums of w and of w D, of all images of all levels.
        tickets: int32 (images + levels,), zeros: programs that are done with an image; images that are done.
        losses: None in the score pass.
        mass: float32, or float64 in the score pass.
    """
    program = tl.program_id(0)
    distance = scratch + cells
    program_0, first, first_image = 0, 0, 0  # programs, cells and images of the levels before
    for l in tl.static_range(L):
        level = levels[l]
        blocks = tl.cdiv(level.cells, BLOCK_P)
        end = program_0 + level.images * blocks
        if (program >= program_0) & (program < end):
            image = (program - program_0) // blocks
            block = (program - program_0) % blocks
            begin = first + image.to(tl.int64) * level.cells
            e, d = measure(level, image, block, inverse_temperature, beta, SCORE, PENALTY, BLOCK_P, BLOCK_C, INDEX)
            p = block * BLOCK_P + tl.arange(0, BLOCK_P)
            tl.store(scratch + begin + p, e, mask=p < level.cells)
            if PENALTY is not None:
                tl.store(distance + begin + p, d, mask=p < level.cells)
            nth = first_image + image
            if is_last(tickets + nth, blocks):
                tl.store(
                    image_sums + nth,
                    write_map(level, image, begin, scratch, maps, inverse_temperature, MAP_NORM, 512),
                )
                if PENALTY is not None:
                    tl.debug_barrier()  # the sum reads weights that other threads of this program have just stored
                    tl.store(image_sums + images + nth, weighted_distance(level, begin, scratch, distance, 512))
                if is_last(tickets + images + level.number, level.images):
                    finalize_level(level, first_image, image_sums, images, losses, mass, Z_OF_MAP)
        program_0 = end
        first += tl.cast(level.cells, tl.int64) * level.images
        first_image += level.images


# ---- backward


@triton.jit
def read_weights(level, maps, first, image, p, inside):
    """w of cells p of an image: of ``maps``, where the level begins at ``first``; without maps, the prior or 1."""
    if maps is not None:
        return tl.load(maps + first + image.to(tl.int64) * level.cells + p, mask=inside, other=0.0)
    elif level.prior is not None:
        return tl.load(level.prior + image.to(tl.int64) * level.cells + p, mask=inside, other=0.0)
    else:
        return tl.where(inside, 1.0, 0.0)


@triton.jit
def penalty_and_grad(
    level, maps, first, image, block, channel, slope, beta,
    PENALTY: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Of BLOCK_P cells and BLOCK_C channels, from ``channel`` on: write ds = slope * w * rho'(x), unless it is absent.

    Returns:
        The sum of w * scaled rho(x), and the column sums of ds before it is rounded, (BLOCK_C,).
    """
    p = block * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = p < level.cells
    student = at_cells(level.student, level.width, image, block, BLOCK_P, INDEX)
    teacher = at_cells(level.teacher, level.width, image, block, BLOCK_P, INDEX)
    t = read_teacher(level, teacher, channel, inside, BLOCK_C, INDEX)
    x = read_student(level, student, channel, inside, BLOCK_C, INDEX) - t
    x = tl.where(inside[:, None], x, 0.0)  # beyond the last cell it is the bias and the mean
    w = read_weights(level, maps, first, image, p, inside)
    ds = (slope.to(tl.float32) * w)[:, None] * scaled_slope(x, beta, PENALTY)
    if level.grad.data is not None:
        grad = at_cells(level.grad, level.width, image, block, BLOCK_P, INDEX)
        at, mask = places(level.grad, grad, channel, inside, level.channels, BLOCK_C, INDEX)
        tl.store(at, ds.to(grad.dtype.element_ty), mask=mask)
    return tl.sum(w[:, None] * scaled_penalty(x, beta, PENALTY)), tl.sum(ds, 0)


@triton.jit
def backward(
    levels, upstream, upstream_stride, mass, maps, beta,
    L: tl.constexpr, PENALTY: tl.constexpr, Z_OF_MAP: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """ds = g * weight / Z * w * rho'(x) of all levels; a program takes BLOCK_P cells and BLOCK_C channels.

    Args:
        levels: as in ``forward``.
        upstream: (levels,) float32 by its stride, 0 where it was expanded.
        mass, maps: of the forward.
    """
    program = tl.program_id(0)
    program_0, first = 0, 0  # programs and cells of the levels before
    for l in tl.static_range(L):
        level = levels[l]
        steps = tl.cdiv(level.channels, BLOCK_C)
        blocks = tl.cdiv(level.cells, BLOCK_P)
        end = program_0 + level.images * blocks * steps
        if (program >= program_0) & (program < end):
            g = tl.load(upstream + level.number * upstream_stride).to(tl.float64)
            slope = g * scale_of(level, tl.load(mass + level.number).to(tl.float64), Z_OF_MAP)
            channel = (program - program_0) % steps * BLOCK_C
            block = (program - program_0) // steps % blocks
            image = (program - program_0) // steps // blocks
            penalty_and_grad(level, maps, first, image, block, channel, slope, beta, PENALTY, BLOCK_P, BLOCK_C, INDEX)
        program_0 = end
        first += tl.cast(level.cells, tl.int64) * level.images
