"""The contract of the gradient that the forward writes, and of the teacher's memory that it may write it into."""

from __future__ import annotations

import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from samples import (
    DTYPES,
    INFO_MAPS,
    LAYOUTS,
    TARGETS,
    allocated,
    interpreted,
    levels,
    on_every_target,
    shapes_for,
    widened,
)
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import fastkd
from fastkd import loss as loss_module
from fastkd import one_pass as one_pass_module
from fastkd import ops
from fastkd.info_map import NORMALIZERS, PENALTIES

ONE_PASS = [x for x in TARGETS if tuple(x.split("-")) in ops._has_one_pass]
ONE_PASS_NORMALIZERS = [x for x in NORMALIZERS if x != "map_all_ranks"]
on_every_one_pass = pytest.mark.parametrize("backend", ONE_PASS, indirect=True)
LARGE = [(2, 64, 64, 64), (1, 37, 91, 33), (1, 9, 80, 80), (3, 600, 7, 5)]  # large enough to be written past caches


def step(sample: dict[str, Any], upstream: Tensor | float = 1.0, **options: Any) -> list[Tensor]:
    """Losses by level and gradients of one step."""
    losses = fastkd.distill_loss(**sample, reduction="none", **options)
    upstream = torch.as_tensor(upstream, dtype=losses.dtype).expand(losses.shape)
    wanted = [s for s in sample["student_feats"] if s.requires_grad]
    return [losses.detach(), *torch.autograd.grad(losses, wanted, upstream)]


def few_shapes(backend: str) -> list[tuple[int, ...]]:
    return [(2, 7, 5, 3), (1, 3, 1, 1)] if interpreted(backend) else shapes_for(backend)


def fresh(sample: dict[str, Any]) -> dict[str, Any]:
    """The sample with a teacher of its own, whose memory may be taken."""
    return {**sample, "teacher_feats": [t.detach().clone() for t in sample["teacher_feats"]]}


def assert_same_bits(got: list[Tensor], expected: list[Tensor]) -> None:
    """On a GPU nearly the same: there each kernel is contracted to multiply-adds for itself."""
    for x, y in zip(got, expected, strict=True):
        if x.is_cuda:
            torch.testing.assert_close(x, y)
        else:
            assert torch.equal(x, y)


# ---- the same result as in two passes


@pytest.mark.parametrize("info", INFO_MAPS, ids=lambda m: f"{m.score}-{m.norm}")
@on_every_one_pass
def test_one_pass_gives_the_bits_of_two(backend: str, info: fastkd.InfoMap) -> None:
    shapes = shapes_for(backend)
    cases = [(d, x) for d in DTYPES for x in LAYOUTS if not (backend == "triton" and d == torch.float64)]
    start, every = INFO_MAPS.index(info), 14 if interpreted(backend) else 3
    for i, (dtype, layout) in enumerate(cases[start % every :: every]):
        sample = levels(dtype, layout, seed=i, shapes=shapes)
        options = {
            "info_map": info,
            "penalty": PENALTIES[i % 3],
            "beta": 0.5,
            "normalizer": ONE_PASS_NORMALIZERS[(i + start) % 3],
            "backend": backend,
        }
        upstream = torch.linspace(-1, 2, len(shapes))
        expected = step(sample, upstream, one_pass=False, **options)
        for _ in range(2):  # written for another upstream gradient, then for this one
            assert_same_bits(step(sample, upstream, one_pass=True, **options), expected)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "cropped"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_gradients_written_past_the_caches_have_the_same_bits(dtype: torch.dtype, layout: str) -> None:
    sample = levels(dtype, layout, shapes=LARGE)
    wide = widened(sample)
    for normalizer in ("elements", "map"):
        options: dict[str, Any] = {"info_map": "attention", "normalizer": normalizer}
        expected = step(sample, 4096.0, one_pass=False, backend="cpp", **options)
        step(sample, 4096.0, one_pass=True, backend="cpp", **options)
        assert_same_bits(step(sample, 4096.0, one_pass=True, backend="cpp", **options), expected)
        for got, exact in zip(expected, step(wide, 4096.0, backend="reference", **options), strict=True):
            error = (got.double() - exact).norm() / exact.norm()
            assert error < 64 * torch.finfo(got.dtype).eps


def test_same_bits_for_any_number_of_threads() -> None:
    """Whether threads take whole images or share them."""
    sample = levels(shapes=[(1, 64, 26, 26), (2, 128, 13, 13), (1, 8, 5, 5)])
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 16, 1):
            torch.set_num_threads(threads)
            for normalizer in ("elements", "map"):
                options = {"info_map": "attention", "normalizer": normalizer, "backend": "cpp", "one_pass": True}
                results.append((normalizer, step(sample, **options)))
    finally:
        torch.set_num_threads(before)
    for normalizer, got in results:
        assert_same_bits(got, dict(results[:2])[normalizer])


@on_every_one_pass
def test_levels_without_elements_and_images_without_weight(backend: str) -> None:
    for shapes in ([(0, 8, 4, 4), (2, 8, 4, 4), (2, 8, 0, 4)], [(1, 1, 1, 1)], [(0, 8, 4, 4)]):
        sample = levels(shapes=shapes)
        sample["prior"] = [torch.zeros(n, h, w) for n, _, h, w in shapes]
        for normalizer in ONE_PASS_NORMALIZERS:
            options = {"normalizer": normalizer, "backend": backend}
            got = step(sample, one_pass=True, **options)
            assert_same_bits(got, step(sample, one_pass=False, **options))
            assert all(x.isfinite().all() for x in got)


@on_every_one_pass
def test_nan_goes_through(backend: str) -> None:
    sample = levels(shapes=[(1, 8, 4, 4), (1, 8, 4, 4)])
    sample["teacher_feats"][0][0, 3, 2, 1] = float("nan")
    losses, spoilt, fine = step(sample, one_pass=True, backend=backend)
    assert losses.isnan().tolist() == [True, False]
    assert spoilt.isnan().all()
    assert fine.isfinite().all()


# ---- when it is written


def test_the_forward_writes_once_the_upstream_gradient_stays_the_same() -> None:
    sample = levels(shapes=[(2, 61, 26, 26)])
    size = sample["student_feats"][0].numel() * 4

    def in_forward(upstream: float) -> bool:
        forward, loss = allocated(lambda: upstream * fastkd.distill_loss(**sample, backend="cpp"))
        backward, _ = allocated(lambda: torch.autograd.grad(loss, sample["student_feats"]))
        assert min(forward, backward) < size
        assert size <= max(forward, backward) < size + 65536
        return forward > backward

    assert [in_forward(g) for g in (3, 3, 3, 3, 5, 5, 5, 7, 8, 9, 9, 9)] == [
        *(False, False, True, True),  # two of a kind, then on
        *(True, False, True),  # 5 was not expected, and after that not yet trusted
        *(True, False, False, False, True),
    ]
    with torch.no_grad():
        assert allocated(lambda: fastkd.distill_loss(**sample, backend="cpp"))[0] < size


@on_every_one_pass
def test_a_changed_upstream_gradient_is_applied(backend: str) -> None:
    """As a GradScaler changes its factor; float16 too, where a gradient scaled after rounding would have been lost."""
    for dtype in (torch.float32, torch.float16):
        sample = levels(dtype, shapes=few_shapes(backend))
        for scale in (2.0**-24, 65536.0, 65536.0, 32768.0, 3.0, 0.0, 1.0):
            expected = step(sample, scale, one_pass=False, backend=backend)
            assert_same_bits(step(sample, scale, one_pass=True, backend=backend), expected)
            assert_same_bits(step(sample, scale, backend=backend), expected)


def test_what_another_thread_gets_is_not_taken_for_this_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    class Overtaken(dict):  # type: ignore[type-arg]
        """Another thread remembers another upstream gradient before the writer goes on."""

        def __setitem__(self, key: Any, value: Any) -> None:
            super().__setitem__(key, one_pass_module.Upstream(torch.ones(1), [1.0]))

    upstreams = one_pass_module.Upstreams()
    upstreams._last = Overtaken()
    monkeypatch.setattr(loss_module, "SHARED", upstreams)
    sample = levels(shapes=[(2, 7, 5, 3)])
    expected = step(sample, 3.0, one_pass=False, backend="cpp")
    for _ in range(2):  # from the second on the forward writes for that of the other thread
        assert_same_bits(step(sample, 3.0, one_pass=True, backend="cpp"), expected)


@pytest.mark.parametrize("one_pass", [None, False, True])
def test_statistics_that_change_before_the_backward_are_told_by_autograd(one_pass: bool | None) -> None:
    student, teacher = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(2, 3, 4, 4)
    mean, rstd = torch.zeros(3), torch.ones(3)
    loss = fastkd.distill_loss([student], [teacher], standardize=[(mean, rstd)], one_pass=one_pass, backend="cpp")
    mean.add_(5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_uses_are_remembered_up_to_a_number_whatever_their_weights() -> None:
    upstreams = one_pass_module.Upstreams()
    for i in range(2 * one_pass_module.KEYS):
        for weight in (1.0, 0.5):  # annealed, say
            x = torch.ones(1, i + 1, 1, 1, requires_grad=True)
            loss_module._distill_loss(
                *([x], [torch.ones_like(x).detach()], "uniform", None, None, [weight], "l2", 1.0, None, "sum", "cpp"),
                *(False, None, upstreams),
            ).backward()
    assert len(upstreams._last) == one_pass_module.KEYS
    assert all(upstream.steady for upstream in upstreams._last.values())


def test_grad_scaler_trains_as_without() -> None:
    results = []
    for one_pass in (False, True):
        torch.manual_seed(0)
        student, teacher = nn.Conv2d(3, 32, 3), nn.Conv2d(3, 32, 3).requires_grad_(False)
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        for _ in range(7):
            x = torch.randn(2, 3, 14, 14)
            optimizer.zero_grad()
            loss = fastkd.distill_loss([student(x)], [teacher(x)], backend="cpp", one_pass=one_pass)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 1024.0 * 8
        results.append(student.weight.detach())
    assert torch.equal(*results)


@on_every_one_pass
def test_only_the_levels_that_need_a_gradient_get_one(backend: str) -> None:
    sample = levels(shapes=few_shapes(backend))
    sample["student_feats"][1] = sample["student_feats"][1].detach()
    for reuse in (False, True):
        own = fresh(sample)
        got = step(own, one_pass=True, reuse_teacher_memory=reuse, backend=backend)
        torch.testing.assert_close(got, step(sample, one_pass=False, backend=backend))
        assert torch.equal(own["teacher_feats"][1], sample["teacher_feats"][1])


# ---- autograd


@pytest.mark.parametrize("reuse", [False, True])
@on_every_one_pass
def test_each_backward_of_a_retained_graph_gives_its_own_gradient(backend: str, reuse: bool) -> None:
    sample = levels(shapes=few_shapes(backend))
    student = sample["student_feats"]
    expected = [step(sample, g, one_pass=False, backend=backend)[1:] for g in (1.0, 3.0, 0.0, 2.0)]
    loss = fastkd.distill_loss(**fresh(sample), backend=backend, one_pass=True, reuse_teacher_memory=reuse)
    for g, gradient in zip((1.0, 3.0, 0.0), expected, strict=False):
        got = torch.autograd.grad(loss, student, torch.tensor(g), retain_graph=True)
        torch.testing.assert_close(list(got), gradient)
        for x in got:  # theirs to change
            x.fill_(float("nan"))
    got = torch.autograd.grad(loss, student, torch.tensor(2.0))
    torch.testing.assert_close(list(got), expected[-1])
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, student)


@pytest.mark.parametrize("reuse", [False, True])
@on_every_one_pass
def test_gradients_accumulate_in_leaves(backend: str, reuse: bool) -> None:
    sample = levels(shapes=few_shapes(backend))
    once = step(sample, one_pass=False, backend=backend)[1:]
    for _ in range(3):
        loss = fastkd.distill_loss(**fresh(sample), backend=backend, one_pass=True, reuse_teacher_memory=reuse)
        loss.backward(retain_graph=True)
        (2 * loss).backward()
    for x, first in zip(sample["student_feats"], once, strict=True):
        torch.testing.assert_close(x.grad, 9 * first)


@pytest.mark.parametrize("one_pass", [False, True])
def test_a_gradient_of_create_graph_may_be_changed_in_place(one_pass: bool) -> None:
    sample = levels(shapes=[(2, 7, 5, 3)])
    loss = fastkd.distill_loss(**sample, backend="cpp", one_pass=one_pass)
    (gradient,) = torch.autograd.grad(loss, sample["student_feats"], create_graph=True)
    expected = 2 * gradient.detach()
    assert torch.equal(gradient.mul_(2), expected)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(gradient.sum(), sample["student_feats"])


@pytest.mark.parametrize("reuse", [False, True])
@on_every_one_pass
def test_a_second_derivative_is_a_clear_error(backend: str, reuse: bool) -> None:
    sample = levels(shapes=few_shapes(backend))
    student = sample["student_feats"]
    loss = fastkd.distill_loss(**fresh(sample), backend=backend, one_pass=True, reuse_teacher_memory=reuse)
    gradient = torch.autograd.grad(loss, student, create_graph=True)
    torch.testing.assert_close(list(gradient), step(sample, one_pass=False, backend=backend)[1:])
    penalty = sum(x.square().sum() for x in gradient) + student[0].sum()  # which alone would have a derivative
    with pytest.raises(RuntimeError, match=r"no second derivative.*backend='reference'"):
        torch.autograd.grad(penalty, student)


@pytest.mark.parametrize("reentrant", [False, True])
@on_every_one_pass
def test_under_activation_checkpointing(backend: str, reentrant: bool) -> None:
    sample = levels(shapes=few_shapes(backend))
    student = sample.pop("student_feats")

    def loss(*s: Tensor) -> Tensor:
        return fastkd.distill_loss([2 * x for x in s], **sample, backend=backend, one_pass=True)

    expected = torch.autograd.grad(loss(*student), student)
    for g in (1.0, 5.0):  # the expected upstream gradient changes between forward and recomputation
        total = g * checkpoint(loss, *student, use_reentrant=reentrant)
        fastkd.distill_loss(student, **sample, backend=backend).mul(7).backward(inputs=student)
        for s in student:
            s.grad = None
        total.backward(inputs=student) if not reentrant else total.backward()
        torch.testing.assert_close([s.grad for s in student], [g * x for x in expected])
        for s in student:
            s.grad = None


@on_every_one_pass
def test_with_saved_tensors_packed_away(backend: str) -> None:
    sample = levels(shapes=few_shapes(backend))
    with torch.autograd.graph.save_on_cpu():
        got = step(sample, one_pass=True, backend=backend)
    assert_same_bits(got, step(sample, one_pass=False, backend=backend))


@on_every_target
def test_torch_compile_takes_the_two_passes(backend: str) -> None:
    sample = fresh(levels(shapes=[(2, 7, 5, 3), (2, 40, 9, 9)]))
    kept = [t.clone() for t in sample["teacher_feats"]]
    here = f"{backend}-{torch.get_default_device().type}"
    options = {"one_pass": True if here in ONE_PASS else None, "reuse_teacher_memory": True}
    compiled = torch.compile(lambda **kw: fastkd.distill_loss(**kw, backend=backend, **options), fullgraph=True)
    got = torch.autograd.grad(compiled(**sample), sample["student_feats"])
    torch.testing.assert_close(list(got), step(sample, one_pass=False, backend=backend)[1:])
    assert_same_bits(sample["teacher_feats"], kept)


def test_a_traced_step_gives_memory_of_its_own_at_each_run() -> None:
    student, teacher = torch.randn(2, 2, 64, 26, 26)

    def gradient(s: Tensor) -> Tensor:
        return torch.autograd.grad(fastkd.distill_loss([s], [teacher], backend="cpp"), s)[0]

    traced = make_fx(gradient)(student.requires_grad_())
    first, kept = traced(student), gradient(student)
    traced(2 * student)
    torch.testing.assert_close(first, kept)
    torch.jit.trace(lambda s: fastkd.distill_loss([s], [teacher], backend="cpp"), student)


@on_every_one_pass
def test_opcheck_of_the_ops_that_write(backend: str) -> None:
    from test_ops import op_arguments

    arguments = op_arguments(levels(shapes=[(2, 7, 5, 3), (1, 3, 1, 1)]))
    student = [s.detach() for s in arguments[0]]
    room = [torch.empty_like(s) for s in student]
    upstream = torch.tensor([1.0, 2.0])
    tests = ("test_schema", "test_faketensor")
    op = getattr(torch.ops.fastkd, f"distill_{backend}_one_pass").default
    torch.library.opcheck(op, (student, *arguments[1:], upstream, room), test_utils=tests)
    _, mass, maps = op(student, *arguments[1:], upstream, room)
    _, teacher, _, mean, rstd, weights, _, _, _, *rest = arguments
    features = (mass, maps, student, teacher, mean, rstd, weights, *rest)
    into = getattr(torch.ops.fastkd, f"distill_{backend}_backward_into").default
    torch.library.opcheck(into, (2 * upstream, upstream, *features, room), test_utils=tests)
    rescale = getattr(torch.ops.fastkd, f"distill_{backend}_rescale").default
    torch.library.opcheck(rescale, (2 * upstream, upstream, room), test_utils=tests)
    for wrong in ([room[0]], [room[0], room[1][:, :2]], [room[1], room[0]]):
        with pytest.raises(RuntimeError):
            op(student, *arguments[1:], upstream, wrong)
        with pytest.raises(RuntimeError):
            into(upstream, upstream, *features, wrong)
    for wrong in (upstream[:1], upstream.double(), upstream[:0]):
        with pytest.raises(RuntimeError):
            op(student, *arguments[1:], wrong, room)
        with pytest.raises(RuntimeError):
            rescale(upstream, wrong, room)


@on_every_one_pass
def test_nothing_is_kept_of_a_graph_that_is_captured(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each replay writes its tensors again, so neither may it expect them, nor what it expects be freed."""
    sample = levels(shapes=few_shapes(backend))
    expected = step(sample, 3.0, one_pass=False, backend=backend)
    upstreams = one_pass_module.Upstreams()
    monkeypatch.setattr(loss_module, "SHARED", upstreams)
    step(sample, 7.0, one_pass=True, backend=backend)
    before = dict(upstreams._last)
    monkeypatch.setattr(one_pass_module, "_is_captured", lambda device: True)
    for _ in range(2):
        assert_same_bits(step(sample, 3.0, one_pass=True, backend=backend), expected)
    assert upstreams._last == before


# ---- in the teacher's memory


@pytest.mark.parametrize("one_pass", [False, None, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "teacher_channels_last", "student_channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@on_every_target
def test_the_gradient_takes_the_teachers_memory(
    backend: str, dtype: torch.dtype, layout: str, one_pass: bool | None
) -> None:
    if one_pass and f"{backend}-{torch.get_default_device().type}" not in ONE_PASS:
        pytest.skip("has no one-pass kernels")
    sample = levels(dtype, layout, shapes=few_shapes(backend))
    expected = step(sample, 64.0, one_pass=False, backend=backend)
    for _ in range(3):
        own = fresh(sample)
        got = step(own, 64.0, one_pass=one_pass, reuse_teacher_memory=True, backend=backend)
        torch.testing.assert_close(got, expected)
        for x, t in zip(got[1:], own["teacher_feats"], strict=True):
            assert x.data_ptr() == t.data_ptr()
    assert_same_bits(got, expected)  # the last was written for the upstream gradient that came


def test_the_gradient_that_took_the_teachers_memory_follows_its_factor() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        sample = levels(dtype, shapes=LARGE)
        for factor in (1.0, 3.0, 3.0, 0.5, 1e-3, 1e-30, 1.0, 2e-20, 2e-20, 1e19, 9e19, 9e19, 1e-30):
            got = step(fresh(sample), factor, one_pass=True, reuse_teacher_memory=True, backend="cpp")
            expected = step(sample, factor, one_pass=False, backend="cpp")
            tolerance = 3 * torch.finfo(dtype).eps  # rounded twice
            torch.testing.assert_close(got, expected, rtol=tolerance, atol=torch.finfo(torch.float32).tiny)


def test_nothing_of_the_size_of_a_feature_is_allocated() -> None:
    sample = levels(shapes=[(2, 64, 26, 26), (2, 128, 13, 13)])
    cells = sum(x.shape[0] * x.shape[2] * x.shape[3] for x in sample["student_feats"])
    for one_pass in (False, True):
        own = fresh(sample)
        run = lambda own=own, p=one_pass: step(own, one_pass=p, reuse_teacher_memory=True, backend="cpp")  # noqa: E731
        assert allocated(run)[0] <= 2 * 4 * cells + 16384


@on_every_target
def test_without_a_gradient_the_teacher_stays(backend: str) -> None:
    sample = fresh(levels(shapes=few_shapes(backend)))
    kept = [t.clone() for t in sample["teacher_feats"]]
    with torch.no_grad():
        fastkd.distill_loss(**sample, backend=backend, reuse_teacher_memory=True)
    frozen = {**sample, "student_feats": [s.detach() for s in sample["student_feats"]]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nothing learns, said once a process
        fastkd.distill_loss(**frozen, backend=backend, reuse_teacher_memory=True)
    fastkd.distill_loss(**sample, backend="reference", reuse_teacher_memory=True).backward()
    assert_same_bits(sample["teacher_feats"], kept)
    fastkd.info_map(sample["teacher_feats"])  # and may be used


def test_a_teacher_of_another_dtype_is_not_overwritten() -> None:
    sample = levels(torch.bfloat16, shapes=[(2, 7, 5, 3)])
    sample["teacher_feats"] = [t.float() for t in sample["teacher_feats"]]
    kept = [t.clone() for t in sample["teacher_feats"]]
    expected = step(sample, one_pass=False, backend="cpp")
    assert_same_bits(step(sample, one_pass=True, reuse_teacher_memory=True, backend="cpp"), expected)
    assert_same_bits(sample["teacher_feats"], kept)


@pytest.mark.parametrize("one_pass", [False, True])
def test_a_teacher_that_was_given_up_is_refused(one_pass: bool) -> None:
    sample = fresh(levels(shapes=[(2, 7, 5, 3), (1, 3, 1, 1)]))
    loss = fastkd.distill_loss(**sample, backend="cpp", one_pass=one_pass, reuse_teacher_memory=True)
    way_out = r"teacher_feats\[0\]: expected the teacher's feature, but an earlier .*run the teacher again"
    for _ in range(2):
        with pytest.raises(ValueError, match=way_out):
            fastkd.distill_loss(**sample)
        with pytest.raises(ValueError, match=way_out):
            fastkd.info_map([t.detach() for t in sample["teacher_feats"]])
        loss.backward(retain_graph=True)
    loss.backward()
    with pytest.raises(ValueError, match=way_out):
        fastkd.distill_loss(**sample)
    for t in sample["teacher_feats"]:
        t.normal_()  # filled anew, as a buffer that is kept from step to step
    assert fastkd.distill_loss(**sample, backend="cpp", one_pass=one_pass, reuse_teacher_memory=True).isfinite()


def test_a_change_of_the_gradient_makes_no_teacher_of_it() -> None:
    for one_pass in (False, True):
        sample = fresh(levels(shapes=[(2, 7, 5, 3)]))
        for gradient in step(sample, one_pass=one_pass, reuse_teacher_memory=True, backend="cpp")[1:]:
            gradient.mul_(2)  # as clipping does, and accumulation
        with pytest.raises(ValueError, match="run the teacher again"):
            fastkd.distill_loss(**sample)


def test_a_teacher_that_is_filled_before_the_backward_is_told_by_autograd() -> None:
    for one_pass in (False, True):
        sample = fresh(levels(shapes=[(2, 7, 5, 3)]))
        loss = fastkd.distill_loss(**sample, backend="cpp", one_pass=one_pass, reuse_teacher_memory=True)
        sample["teacher_feats"][0].normal_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_what_else_needs_the_teacher_is_told_by_autograd() -> None:
    for one_pass in (False, True):
        sample = fresh(levels(shapes=[(2, 7, 5, 3)]))
        other = (sample["student_feats"][0] * sample["teacher_feats"][0]).sum()  # saves the teacher
        loss = fastkd.distill_loss(**sample, backend="cpp", one_pass=one_pass, reuse_teacher_memory=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            (loss + other).backward()


@pytest.mark.parametrize("one_pass", [False, True])
def test_under_checkpointing_the_teacher_stays(one_pass: bool) -> None:
    sample = fresh(levels(shapes=[(2, 7, 5, 3)]))
    kept = [t.clone() for t in sample["teacher_feats"]]
    expected = step(sample, one_pass=False, backend="cpp")[1:]
    (student,) = sample.pop("student_feats")

    def loss(s: Tensor) -> Tensor:
        return fastkd.distill_loss([s], **sample, backend="cpp", one_pass=one_pass, reuse_teacher_memory=True)

    checkpoint(loss, student, use_reentrant=False).backward()
    assert_same_bits([student.grad], expected)
    assert_same_bits(sample["teacher_feats"], kept)


def test_memory_that_is_not_the_teachers_alone_is_refused() -> None:
    def loss(s: list[Tensor], t: list[Tensor], **options: Any) -> Tensor:
        return fastkd.distill_loss(s, t, reuse_teacher_memory=True, **options)

    x = torch.randn(2, 3, 4, 4)
    s = [torch.randn(2, 3, 4, 4, requires_grad=True) for _ in range(2)]
    with pytest.raises(ValueError, match=r"teacher_feats\[1\]: expected memory of its own.*that of teacher_feats\[0\]"):
        loss(s, [x, x])
    with pytest.raises(ValueError, match=r"teacher_feats\[0\]: expected memory of its own.*that of student_feats\[0\]"):
        loss(s[:1], [s[0].detach()])
    with pytest.raises(ValueError, match=r"teacher_feats\[0\]: expected memory of its own.*that of prior\[0\]"):
        loss(s[:1], [x.abs_()], prior=[x.view(-1)[:32].view(2, 4, 4)])
    with pytest.raises(ValueError, match=r"teacher_feats\[0\]: expected memory for each element.*strides"):
        loss(s[:1], [x[:1].expand(2, 3, 4, 4)])
    assert loss(s[:1], [torch.randn(2, 4, 4, 4)[:, 1:]]).isfinite()  # a view with gaps is its own


@pytest.mark.parametrize("reuse", [False, True])
@on_every_target
def test_a_teacher_of_inference_mode_is_taken_and_stays(backend: str, reuse: bool) -> None:
    sample = levels(shapes=few_shapes(backend))
    with torch.inference_mode():
        inference = {**sample, "teacher_feats": [t.clone() for t in sample["teacher_feats"]]}
    for scale in (1.0, 1.0, 1.0, 2.0, 2.0, 0.5):  # written in the forward, and computed anew
        expected = step(sample, scale, one_pass=False, backend=backend)
        assert_same_bits(step(inference, scale, reuse_teacher_memory=reuse, backend=backend), expected)
    assert_same_bits(inference["teacher_feats"], sample["teacher_feats"])


def test_one_pass_that_cannot_be_is_a_clear_error() -> None:
    x = [torch.ones(1, 1, 1, 1)]
    with pytest.raises(ValueError, match="one_pass: normalizer='map_all_ranks' takes two passes"):
        fastkd.distill_loss(x, x, normalizer="map_all_ranks", one_pass=True)
    with pytest.raises(RuntimeError, match=r"one_pass=True: backend='reference' has none on cpu, only .*one_pass=None"):
        fastkd.distill_loss(x, x, backend="reference", one_pass=True)


# ---- through the modules


def test_modules_pass_both_options_on() -> None:
    student, teacher = torch.randn(2, 8, 26, 26, requires_grad=True), torch.randn(2, 8, 26, 26)
    criterion = fastkd.DistillLoss(adapters=[nn.Identity()], one_pass=True, reuse_teacher_memory=True, backend="cpp")
    criterion([student], [teacher]).backward()
    assert student.grad.data_ptr() == teacher.data_ptr()


def test_a_process_without_pytorchs_word_on_kept_graphs_is_correct_all_the_same() -> None:
    code = """
import torch
del torch._C._autograd._get_current_graph_task_keep_graph, torch._C._autograd._top_saved_tensors_default_hooks
import fastkd
for reuse in (False, True):
    s, t = torch.randn(1, 8, 4, 4, requires_grad=True), torch.randn(1, 8, 4, 4)
    (expected,) = torch.autograd.grad(fastkd.distill_loss([s], [t], backend="reference"), s)
    for _ in range(3):
        loss = fastkd.distill_loss([s], [t.clone()], backend="cpp", one_pass=True, reuse_teacher_memory=reuse)
        torch.testing.assert_close(torch.autograd.grad(loss, s)[0], expected)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
