"""The contract of an op: what torch.library, autograd and torch.compile may rely on."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from samples import (
    INFO_MAPS,
    LAYOUTS,
    SHAPES,
    allocated,
    interpreted,
    levels,
    loss_and_gradients,
    on_every_target,
    shapes_for,
    widened,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastkd
from fastkd.info_map import NORMALIZERS, NORMS, PENALTIES, SCORES, resolve
from fastkd.levels import check


def op_arguments(sample: dict[str, Any], code: int = 2) -> tuple[Any, ...]:
    """Arguments of the forward op: score, norm, penalty and normalizer chosen by one number."""
    rest = {k: v for k, v in sample.items() if not k.endswith("feats")}
    checked = check(sample["student_feats"], sample["teacher_feats"], **rest, info=resolve("energy"))
    codes = (code % len(SCORES), code % len(NORMS), 0.7, code % len(PENALTIES), 0.5, code % len(NORMALIZERS))
    return (
        checked.student, checked.teacher, checked.prior, checked.mean, checked.rstd, checked.weights, *codes
    )  # fmt: skip


def skip_without_float64(backend: str) -> None:
    if backend == "triton":
        pytest.skip("Triton's kernels take no float64")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@on_every_target
def test_opcheck(backend: str, dtype: torch.dtype, layout: str) -> None:
    if dtype == torch.float64:
        skip_without_float64(backend)
    forward = getattr(torch.ops.fastkd, f"distill_{backend}").default
    backward = getattr(torch.ops.fastkd, f"distill_{backend}_backward").default
    shapes = SHAPES[:1] if interpreted(backend) else SHAPES
    arguments = op_arguments(levels(dtype, layout, shapes=shapes), code=LAYOUTS.index(layout))
    torch.library.opcheck(forward, arguments)
    losses, mass, maps = forward(*arguments)
    student, teacher, _, mean, rstd, weights, _, _, _, penalty, beta, normalizer = arguments
    student = [s.detach() for s in student]
    torch.library.opcheck(
        backward,
        (losses.detach(), mass, maps, student, teacher, mean, rstd, weights, penalty, beta, normalizer),
    )


@pytest.mark.parametrize("info", INFO_MAPS, ids=lambda m: f"{m.score}-{m.norm}")
@on_every_target
def test_gradcheck_in_float64(backend: str, info: fastkd.InfoMap) -> None:
    skip_without_float64(backend)
    sample = levels(torch.float64, shapes=[(2, 3, 2, 2), (1, 3, 1, 1)])
    student = sample.pop("student_feats")
    for penalty, normalizer in zip(PENALTIES, ("elements", "map", "batch"), strict=True):
        options = {"info_map": info, "penalty": penalty, "normalizer": normalizer, "backend": backend}

        def losses(*s: Tensor, options: dict[str, Any] = options) -> Tensor:
            return fastkd.distill_loss(s, **sample, **options, reduction="none")

        torch.autograd.gradcheck(losses, student)


@on_every_target
def test_double_backward_is_a_clear_error(backend: str) -> None:
    sample = levels(shapes=shapes_for(backend))
    loss = fastkd.distill_loss(**sample, backend=backend)
    (gradient, *_) = torch.autograd.grad(loss, sample["student_feats"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative.*backend='reference'"):
        gradient.sum().backward()


@on_every_target
def test_forward_mode_is_a_clear_error_and_not_zero(backend: str) -> None:
    s, t = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)

    def loss(x: Tensor, name: str = backend) -> Tensor:
        return fastkd.distill_loss([x], [t], backend=name)

    with pytest.raises(RuntimeError, match=r"no forward-mode derivative.*backend='reference'"):
        torch.func.jvp(loss, (s,), (torch.ones_like(s),))
    _, tangent = torch.func.jvp(lambda x: loss(x, "reference"), (s,), (torch.ones_like(s),))
    assert tangent != 0


@on_every_target
def test_backward_twice_with_retain_graph_accumulates(backend: str) -> None:
    sample = levels(shapes=shapes_for(backend))
    loss = fastkd.distill_loss(**sample, backend=backend)
    loss.backward(retain_graph=True)
    once = [x.grad.clone() for x in sample["student_feats"]]
    (2 * loss).backward()
    for first, x in zip(once, sample["student_feats"], strict=True):
        torch.testing.assert_close(x.grad, 3 * first)


def test_same_bits_for_any_number_of_threads() -> None:
    shapes = [(3, 64, 26, 26), (3, 128, 13, 13)]
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 2, 1):
            torch.set_num_threads(threads)
            for layout in LAYOUTS:
                sample = levels(layout=layout, shapes=shapes)
                loss = fastkd.distill_loss(**sample, info_map="attention", reduction="none", backend="cpp")
                results.append((layout, loss_and_gradients(loss, sample["student_feats"])))
    finally:
        torch.set_num_threads(before)
    first = dict(results[: len(LAYOUTS)])
    for layout, tensors in results:
        for x, y in zip(tensors, first[layout], strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_feature_sized_temporary_is_allocated(dtype: torch.dtype) -> None:
    """Forward: the map and per-level scalars. Backward: the gradient."""
    sample = levels(dtype, "channels_last", shapes=[(2, 64, 26, 26), (2, 128, 13, 13)])
    student = sample["student_feats"]
    cells = sum(x.shape[0] * x.shape[2] * x.shape[3] for x in student)
    gradient = sum(x.numel() * x.element_size() for x in student)

    def run() -> Tensor:
        return fastkd.distill_loss(**sample, backend="cpp", one_pass=False)

    run()
    forward, loss = allocated(run)
    # the map, the prior brought to contiguous float32, and less than 16 KiB of vectors and scalars
    assert forward <= 2 * 4 * cells + 16384
    backward, _ = allocated(lambda: torch.autograd.grad(loss, student, retain_graph=True))
    assert gradient <= backward <= gradient + 4096


@on_every_target
def test_compiles_without_graph_break(backend: str) -> None:
    sample = levels(shapes=SHAPES[:2])

    def loss(s: list[Tensor], t: list[Tensor]) -> Tensor:
        rest = {k: v for k, v in sample.items() if not k.endswith("feats")}
        return fastkd.distill_loss([2 * x for x in s], t, **rest, normalizer="map", backend=backend) * 3

    compiled = torch.compile(loss, fullgraph=True)
    student, teacher = sample["student_feats"], sample["teacher_feats"]
    for x, y in zip(
        loss_and_gradients(compiled(student, teacher), student),
        loss_and_gradients(loss(student, teacher), student),
        strict=True,
    ):
        torch.testing.assert_close(x, y)


@on_every_target
def test_under_autocast_half_features_give_a_float32_loss(backend: str) -> None:
    torch.manual_seed(0)
    convolution, teacher = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3).requires_grad_(False)
    images = torch.randn(2, 3, 9, 9)
    with torch.autocast(images.device.type, dtype=torch.bfloat16):
        loss = fastkd.distill_loss([convolution(images)], [teacher(images)], backend=backend)
    assert loss.dtype == torch.float32
    loss.backward()
    plain = copy.deepcopy(convolution)
    plain.zero_grad()
    fastkd.distill_loss([plain(images)], [teacher(images)], backend=backend).backward()
    torch.testing.assert_close(convolution.weight.grad, plain.weight.grad, rtol=0.05, atol=1e-3)


@on_every_target
def test_activation_checkpointing_gives_the_same_gradient(backend: str) -> None:
    sample = levels(shapes=shapes_for(backend))
    student = sample.pop("student_feats")

    def loss(*s: Tensor) -> Tensor:
        return fastkd.distill_loss([x * 2 for x in s], **sample, backend=backend)

    kept = torch.autograd.grad(loss(*student), student)
    recomputed = torch.autograd.grad(checkpoint(loss, *student, use_reentrant=False), student)
    for x, y in zip(kept, recomputed, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("scale", [1.0, 65536.0, 2.0**-10])
@on_every_target
def test_a_scaled_loss_scales_the_float16_gradient(backend: str, scale: float) -> None:
    """As GradScaler does: what would underflow unscaled arrives, because the factor enters before the rounding."""
    sample = levels(torch.float16, shapes=shapes_for(backend))
    wide = widened(sample)
    loss = fastkd.distill_loss(**sample, backend=backend) * scale
    exact = fastkd.distill_loss(**wide, backend="reference") * scale
    for got, want in zip(
        torch.autograd.grad(loss, sample["student_feats"]),
        torch.autograd.grad(exact, wide["student_feats"]),
        strict=True,
    ):
        normal = (want.abs() > 6.2e-5) & (want.abs() < 6e4)
        torch.testing.assert_close(got[normal].double(), want[normal], rtol=2**-10, atol=0)


@on_every_target
def test_a_direct_call_with_wrong_shapes_is_an_error_not_a_crash(backend: str) -> None:
    op = getattr(torch.ops.fastkd, f"distill_{backend}")
    student, teacher, prior, mean, rstd, weights, *codes = op_arguments(levels(shapes=shapes_for(backend)))
    for wrong in (
        (student, teacher[:1], prior, mean, rstd, weights),
        (student, [t[:, :1] for t in teacher], prior, mean, rstd, weights),
        (student, teacher, [p[:, :1] if p.numel() else p for p in prior], mean, rstd, weights),
        (student, teacher, prior, [m[:1] for m in mean], rstd, weights),
        (student, teacher, prior, mean, rstd, weights[:1]),
        ([], [], [], [], [], []),
    ):
        with pytest.raises(RuntimeError):
            op(*wrong, *codes)
    with pytest.raises(RuntimeError):
        op(student, teacher, prior, mean, rstd, weights, 9, *codes[1:])
    student = [x.detach() for x in student]
    losses, mass, maps = op(student, teacher, prior, mean, rstd, weights, *codes)
    backward = getattr(torch.ops.fastkd, f"distill_{backend}_backward")
    rest = (student, teacher, mean, rstd, weights, codes[3], codes[4], codes[5])
    for wrong in ((losses[0], mass, maps), (losses, mass[:0], maps), (losses, mass, maps[:0])):
        with pytest.raises(RuntimeError):
            backward(*wrong, *rest)


@pytest.mark.parametrize("axis", [0, 1])
@on_every_target
def test_offsets_beyond_32_bits(backend: str, axis: int, tmp_path: Path) -> None:
    """Images, or channels, whose strides 32 bits can hold, and whose offsets they cannot."""
    shape, strides = (4, 4, 4, 8), [128, 32, 8, 1]
    strides[axis] = 2**30 + 16
    size = 3 * 2**30 + 4096

    def far(name: str) -> Tensor:  # on the CPU a file with a hole, of which no more than is touched is ever there
        path = str(tmp_path / name)
        cpu = torch.get_default_device().type == "cpu"
        flat = (
            torch.from_file(path, shared=True, size=size, dtype=torch.float16)
            if cpu
            else torch.empty(size, dtype=torch.float16)
        )
        return flat.as_strided(shape, strides)

    torch.manual_seed(0)
    student, teacher = torch.randn(shape).half(), torch.randn(shape).half()
    near = student.clone().requires_grad_()
    expected = fastkd.distill_loss([near], [teacher], backend=backend)
    (gradient,) = torch.autograd.grad(expected, near)
    far_student, far_teacher = far("student").copy_(student).requires_grad_(), far("teacher").copy_(teacher)
    loss = fastkd.distill_loss([far_student], [far_teacher], backend=backend)
    assert torch.equal(loss, expected)
    assert torch.equal(torch.autograd.grad(loss, far_student)[0], gradient)
