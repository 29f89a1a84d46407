"""The Triton kernels of the two passes, one launch per pass for all levels, and functions that ``stream`` shares.

``forward`` reads the features and computes, for each cell p of each level,

    x_pc = (s_pc + bias_c) - t'_pc,   t'_pc = (t_pc - mean_c) * rstd_c,
    e_p = score(t'_p),   w_p = prior_p * map_norm(e)_p,   D_p = sum_c rho(x_pc),   L = weight * sum_p w_p D_p / Z;

``backward`` reads them again and writes ds_pc = g * weight / Z * w_p * rho'(x_pc), g being the upstream gradient.
Without a penalty, ``forward`` is the score pass: it reads only the teacher, and computes maps and masses (sums of the
maps) for ``stream``.

Bytes that each kernel must move per element of b bytes, in units too (one unit is the bytes of all student features),
and its arithmetic operations per element. The (N, H, W) maps are small compared with the features and left out.

==========  ========================  ==========================================  ===================
kernel      bytes per element         floating-point operations per element       floor, 4.8 TB/s, b=2
==========  ========================  ==========================================  ===================
forward     2 b (2 units): s and t    about 8: bias, standardise 2, score 2,      0.83 ps
                                      penalty 3
score pass  b (1 unit): t             about 4: standardise 2, score 2             0.42 ps
backward    3 b (3 units): s, t, ds   about 6: bias, standardise 2, slope 3       1.25 ps
==========  ========================  ==========================================  ===================

A program computes a tile: BLOCK_P cells of one image of one level. In the forward it loops over their channels in
steps of BLOCK_C; in the backward it computes one such step. Strides of 1, which Triton compiles as constants, determine
the contiguous axis of the tile (NCHW: the cells, channels_last: the channels), so each layout is read in place. Loads
are converted to float32 at once. Sums over the cells of an image are in float64, as the difference of nearly equal
scores may decide a weight.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

EPS = tl.constexpr(1e-9)  # as in fastkd/ops/reference.py
TINY = tl.constexpr(1.1754943508222875e-38)
LOWEST_LOGIT = tl.constexpr(-1000.0)
STAGES = tl.constexpr(2)  # of the forward's loop over channels: the next step is loaded while one is computed


class Feature(NamedTuple):
    """An (N, C, H, W) tensor with its strides in elements. ``row`` is None if there are no gaps between rows."""

    data: Any  # None: absent (Triton 3.6 cannot ask whether a tuple is None)
    image: int
    channel: int
    row: int | None
    column: int


class Level(NamedTuple):
    """One level, with the same fields as the struct in ``csrc/level.h``."""

    number: int  # index among all levels, including empty ones
    images: int
    channels: int
    cells: int  # H * W
    width: int
    per_channel: float  # 1 / channels
    scale: float  # weight / Z, for smooth_l1 also divided by beta; without Z where Z depends on the map
    student: Feature
    teacher: Feature
    grad: Feature  # absent if not wanted
    prior: Any  # (N, H, W) or None: 1
    mean: Any  # (C,) or None; mean, rstd and bias are all present, or all None: t' = t and no bias
    rstd: Any
    bias: Any  # of the student's adapter, whose output lacks it
    bias_grad: Any  # (C,) or None: not wanted


# ---- terms


@triton.jit
def score_term(x, SCORE: tl.constexpr):
    """Return the part of one channel in the score of its cell, before division by C."""
    if SCORE == "magnitude":
        return tl.abs(x)
    elif SCORE == "energy":
        return x * x
    else:
        return tl.zeros_like(x)


@triton.jit
def scaled_penalty(x, beta, PENALTY: tl.constexpr):
    """Return rho(x), for smooth_l1 times beta, so that a sum needs only one division."""
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
    """Return rho'(x), for smooth_l1 times beta."""
    if PENALTY == "l2":
        return x + x
    elif PENALTY == "l1":
        return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))  # 0 for a NaN, as in PyTorch's l1_loss
    else:
        return tl.where(x < -beta, -beta, tl.where(x > beta, beta, x))


@triton.jit
def reciprocal(x):
    """Return 1 / x in float64, for x in the range of float32: a float64 division is a call, which spills registers."""
    r = (1.0 / x.to(tl.float32)).to(tl.float64)
    return tl.where(r == 0, 0.0, r * (2 - x * r))  # one step of Newton's method


# ---- tiles


@triton.jit
def at_cells(feature, width, image, block, BLOCK_P: tl.constexpr, INDEX: tl.constexpr):
    """Return pointers to the first channel of each cell, (BLOCK_P,); the offset of the block has 64 bits."""
    base = feature.data + image.to(tl.int64) * feature.image
    cell = tl.arange(0, BLOCK_P).to(INDEX)
    if feature.row is None:
        return base + (block * BLOCK_P).to(tl.int64) * feature.column + cell * feature.column
    else:
        p = block * BLOCK_P + cell
        return base + (p // width) * feature.row + (p % width) * feature.column


@triton.jit
def places(feature, cells, c, inside, channels, BLOCK_C: tl.constexpr, INDEX: tl.constexpr):
    """Return pointers to (BLOCK_P, BLOCK_C) elements of a feature from channel c on, and the mask of valid ones."""
    channel = tl.arange(0, BLOCK_C)
    start = tl.cast(c, tl.int64) * feature.channel
    offset = channel.to(INDEX) * feature.channel
    return cells[:, None] + start + offset[None, :], inside[:, None] & (c + channel < channels)[None, :]


@triton.jit
def read(feature, cells, c, inside, channels, BLOCK_C: tl.constexpr, INDEX: tl.constexpr):
    """Return the elements of ``places`` as float32; 0 outside the feature."""
    at, mask = places(feature, cells, c, inside, channels, BLOCK_C, INDEX)
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def read_vector(x, c, channels, BLOCK_C: tl.constexpr):
    """Return BLOCK_C entries of a (C,) vector from channel c on, as a row; 0 outside."""
    channel = c + tl.arange(0, BLOCK_C)
    return tl.load(x + channel, mask=channel < channels, other=0.0)[None, :]


@triton.jit
def read_student(level, cells, c, inside, BLOCK_C: tl.constexpr, INDEX: tl.constexpr):
    """Return s + bias of a tile, or s if the level has no bias."""
    s = read(level.student, cells, c, inside, level.channels, BLOCK_C, INDEX)
    if level.bias is not None:
        s += read_vector(level.bias, c, level.channels, BLOCK_C)
    return s


@triton.jit
def read_teacher(level, cells, c, inside, BLOCK_C: tl.constexpr, INDEX: tl.constexpr):
    """Return t' of a tile, or t if the level has no moments."""
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
    """Return score e and scaled penalty sum D of BLOCK_P cells; without a PENALTY only e, from the teacher alone."""
    inside = block * BLOCK_P + tl.arange(0, BLOCK_P) < level.cells
    student = at_cells(level.student, level.width, image, block, BLOCK_P, INDEX)
    teacher = at_cells(level.teacher, level.width, image, block, BLOCK_P, INDEX)
    d = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    e = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    if SCORE == "entropy":  # each lane has its own maximum, sum of exp(u) and sum of u exp(u)
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
    """Return u = (x - highest) / T, clamped so that exp(u) and u exp(u) are 0 for very negative u, for any T."""
    u = (x - highest) * inverse_temperature
    return tl.where(u < LOWEST_LOGIT, LOWEST_LOGIT, u).to(tl.float32)


@triton.jit
def add_entropy(total, weighted, highest, x, here, inverse_temperature):
    """Rescale the sums of exp(u) and u exp(u) over channels to the new maximum, and add x: an online softmax."""
    new = tl.where(here & ((x > highest) | (x != x)), x, highest)  # propagates a NaN
    shift = below(highest, new, inverse_temperature)
    shift = tl.where(highest == new, 0.0, shift)  # also if both are -inf
    weighted = (weighted + shift * total) * tl.exp(shift)
    total = total * tl.exp(shift)
    u = below(x, new, inverse_temperature)
    p = tl.exp(u)
    return total + tl.where(here, p, 0.0), weighted + tl.where(here, u * p, 0.0), new


@triton.jit
def entropy_score(total, weighted, highest, channels, inverse_temperature):
    """Return 1 - H / log C of each cell, from the sums of the lanes; 0 where rounding makes it negative."""
    top = tl.max(highest, 1)
    shift = below(highest, top[:, None], inverse_temperature)
    weighted = tl.sum(((weighted + shift * total) * tl.exp(shift)).to(tl.float64), 1)
    total = tl.sum((total * tl.exp(shift)).to(tl.float64), 1)
    log_channels = tl.log(channels.to(tl.float64))
    entropy = tl.log(total) - weighted * reciprocal(total)
    # the difference first, as it must be 0 for equal channels, and the reciprocal may be wrong in the last bit
    score = tl.where(log_channels > TINY, (log_channels - entropy) * reciprocal(log_channels), 1.0 - entropy)
    return tl.where(score < 0, 0.0, score)  # propagates a NaN


@triton.jit
def is_last(ticket, count):
    """Whether this is the last of `count` programs to take a ticket; it then sees everything that the others stored."""
    tl.debug_barrier()  # waits until all threads of this program have stored
    return tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu") == count - 1


@triton.jit
def shift_and_factor(score, first, cells, inverse_temperature, MAP_NORM: tl.constexpr, BLOCK: tl.constexpr):
    """Return shift and factor of map_norm(e) = (e - shift) * factor, for softmax exp((e - shift) / T) * factor."""
    lane = tl.arange(0, BLOCK)
    low = tl.full((BLOCK,), float("inf"), tl.float64)
    high = tl.full((BLOCK,), float("-inf"), tl.float64)
    total = tl.zeros((BLOCK,), tl.float64)
    for p in range(0, cells, BLOCK):
        inside = p + lane < cells
        e = tl.load(score + first + p + lane, mask=inside, other=0.0, cache_modifier=".cg")
        new = tl.where(inside & ((e > high) | (e != e)), e, high)
        if MAP_NORM == "softmax":  # online: one pass for the maximum and the sum of exponentials
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
        sum_of = tl.sum(total, 0)  # minimum and maximum drop a NaN, which in PyTorch makes the whole image NaN
        shift = tl.where(sum_of != sum_of, sum_of, tl.min(low, 0))
        return shift, reciprocal(tl.max(high, 0) - shift + EPS)
    else:
        shift = tl.max(high, 0)
        return shift, cells * reciprocal(tl.sum(total * tl.exp(below(high, shift, inverse_temperature)), 0))


@triton.jit
def write_map(level, image, first, score, maps, inverse_temperature, MAP_NORM: tl.constexpr, BLOCK: tl.constexpr):
    """Write the map of one image, in float64 over its scores too, and return its sum; reads the scores past the L1."""
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
    """Return the sum of w D over one image, from values that other programs wrote."""
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
    """Return the sum of ``count`` numbers that other programs wrote, always in the same order."""
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    for n in range(0, count, BLOCK):
        total += tl.load(parts + n + lane, mask=n + lane < count, other=0.0, cache_modifier=".cg")
    return tl.sum(total, 0)


@triton.jit
def scale_of(level, mass, Z_OF_MAP: tl.constexpr):
    """Return weight / Z, for smooth_l1 also divided by beta."""
    if Z_OF_MAP:
        return level.scale * reciprocal(level.channels * mass + EPS)
    else:
        return level.scale


@triton.jit
def finalize_level(level, first_image, image_sums, images, losses, mass, Z_OF_MAP: tl.constexpr):
    """Store the mass of a level and, unless ``losses`` is None, its loss, from the sums of its images."""
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
    """Compute losses, masses and maps of all levels; without a PENALTY (the score pass) only masses and maps.

    Args:
        levels: L ``Level``, none of them empty. The kernel itself counts where each level begins: as arguments, these
            numbers would make Triton compile again for most batch sizes.
        scratch: float64 (2, cells): e and D of the cells of all images of all levels.
        cells, images: numbers of cells and images of all levels.
        image_sums: float64 (2, images): sums of w and of w D, of all images of all levels.
        tickets: int32 (images + levels,), zeros: counts of finished programs per image, of finished images per level.
        losses: float32 (levels,); None in the score pass.
        mass: (levels,), float32, or float64 in the score pass.
        maps: float32 (cells,): the weights w.
    """
    program = tl.program_id(0)
    distance = scratch + cells
    program_0, first, first_image = 0, 0, 0  # numbers of programs, cells and images of the levels before
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
                    tl.debug_barrier()  # the sum reads weights that other threads of this program have stored
                    tl.store(image_sums + images + nth, weighted_distance(level, begin, scratch, distance, 512))
                if is_last(tickets + images + level.number, level.images):
                    finalize_level(level, first_image, image_sums, images, losses, mass, Z_OF_MAP)
        program_0 = end
        first += tl.cast(level.cells, tl.int64) * level.images
        first_image += level.images


# ---- backward


@triton.jit
def read_weights(level, maps, first, image, p, inside):
    """Return w of cells p of an image: from ``maps``, where the level begins at ``first``, else the prior or 1."""
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
    """Write ds = slope * w * rho'(x) of BLOCK_P cells and BLOCK_C channels from ``channel`` on, if ds is wanted.

    Returns:
        The sum of w * scaled rho(x), and the sums of ds over the cells, before rounding, (BLOCK_C,).
    """
    p = block * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = p < level.cells
    student = at_cells(level.student, level.width, image, block, BLOCK_P, INDEX)
    teacher = at_cells(level.teacher, level.width, image, block, BLOCK_P, INDEX)
    t = read_teacher(level, teacher, channel, inside, BLOCK_C, INDEX)
    x = read_student(level, student, channel, inside, BLOCK_C, INDEX) - t
    x = tl.where(inside[:, None], x, 0.0)  # outside, x is made of bias and mean
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
    """Write ds = g * weight / Z * w * rho'(x) of all levels; a program computes BLOCK_P cells and BLOCK_C channels.

    Args:
        levels: as in ``forward``.
        upstream: g, (levels,) float32 with a stride, which is 0 if it was expanded.
        mass, maps: the results of the forward.
    """
    program = tl.program_id(0)
    program_0, first = 0, 0  # numbers of programs and cells of the levels before
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
