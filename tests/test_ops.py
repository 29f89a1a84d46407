"""The contract of an op with torch.library, torch.compile and other tracers."""

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
    interpreted,
    learning,
    levels,
    loss_of,
    on_every_target,
    shapes_for,
    step,
    with_bias,
)
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx

import fastkd
from fastkd import DistillLoss
from fastkd.ops.levels import check
from fastkd.ops.options import options_of_call
from fastkd.ops.presets import DIVISORS, MAP_NORMS, PENALTIES, SCORES


def op_arguments(sample: dict[str, Any], code: int = 2) -> tuple[Any, ...]:
    """Arguments of the forward op: score, map norm, penalty and divisor chosen by one number."""
    options = options_of_call("energy", None, "l2", 1.0, None, "sum", None)
    student = [s.detach() for s in sample["student_feats"]]
    bias = [b if b is None else b.detach() for b in sample["bias"]]
    rest = {"prior": sample["prior"], "standardize": sample["standardize"], "bias": bias}
    x = check(student, sample["teacher_feats"], options, **rest)
    codes = (code % len(SCORES), code % len(MAP_NORMS), 0.7, code % len(PENALTIES), 0.5, code % len(DIVISORS))
    return x.student, x.teacher, x.prior, x.mean, x.rstd, x.bias, sample["weights"], *codes


def skip_without_float64(backend: str) -> None:
    if backend == "triton":
        pytest.skip("Triton's kernels take no float64")


def op(backend: str, suffix: str = "") -> Any:
    return getattr(torch.ops.fastkd, f"distill_{backend}{suffix}").default


# ---- the ops


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@on_every_target
def test_opcheck(backend: str, dtype: torch.dtype, layout: str, request: pytest.FixtureRequest) -> None:
    full = request.config.getoption("--full")
    if dtype == torch.float64:
        skip_without_float64(backend)
    dtypes = 2 if backend == "triton" else 3
    if not full and LAYOUTS.index(layout) % dtypes != (torch.float32, torch.bfloat16, torch.float64).index(dtype):
        pytest.skip("each layout takes one dtype: the others with --full")
    shapes = SHAPES[:1] if interpreted(backend) else SHAPES
    arguments = op_arguments(with_bias(levels(dtype, layout, shapes=shapes)), code=LAYOUTS.index(layout))
    student, teacher, _, mean, rstd, bias, weights, *codes = arguments
    losses, mass, maps = op(backend)(*arguments)
    backward = (losses, mass, maps, student, teacher, mean, rstd, bias, weights, *codes[3:])
    torch.library.opcheck(op(backend, "_backward"), backward)
    wanted = [s.requires_grad_() for s in student], [b.requires_grad_() if b.numel() else b for b in bias]
    torch.library.opcheck(op(backend), (wanted[0], *arguments[1:5], wanted[1], *arguments[6:]))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@on_every_target
def test_opcheck_of_the_ops_that_write(backend: str, layout: str) -> None:
    for code in (0, 2):  # for a map that is known beforehand, and for another one
        arguments = op_arguments(with_bias(levels(layout=layout, shapes=[(2, 7, 5, 3), (1, 3, 1, 1)])), code)
        student, bias = arguments[0], arguments[5]
        given = torch.tensor([3.0, 4.0], dtype=torch.float64), torch.tensor(0.5)
        room = [torch.empty_like(s) for s in student], [torch.empty_like(b) for b in bias]
        names = ("test_schema", "test_faketensor")
        for mass, factor in (given, (torch.empty(0, dtype=torch.float64), torch.empty(0))):
            torch.library.opcheck(op(backend, "_one_pass"), (*arguments, mass, factor, *room), test_utils=names)
        if student[0].is_cuda:
            for upstream in (torch.tensor(2.0), torch.tensor([1.0, 2.0])):
                torch.library.opcheck(op(backend, "_rescale"), (upstream, [*room[0], *room[1]]), test_utils=names)


@on_every_target
def test_a_direct_call_with_wrong_tensors_is_an_error_not_a_crash(backend: str) -> None:
    shapes = shapes_for(backend)
    good = op_arguments(with_bias(levels(shapes=shapes)))
    student, teacher, prior, mean, rstd, bias, weights, *codes = good
    wrong: dict[int, list[Any]] = {
        0: [[]],
        1: [teacher[:1], [t[:, :1] for t in teacher]],
        2: [[p[:, :1] if p.numel() else p for p in prior], [p.double() for p in prior]],
        3: [[m[:1] for m in mean], [m[:0] for m in mean]],
        5: [bias[:1], [b[:1] for b in bias]],
        6: [weights[:1]],
        7: [9],
    }
    losses, mass, maps = op(backend)(*good)
    room = [torch.empty_like(s) for s in student], [torch.empty_like(b) for b in bias]
    absent = torch.empty(0, dtype=torch.float64), torch.empty(0)
    op(backend, "_one_pass")(*good, *absent, *room)
    for place, values in wrong.items():
        for value in values:
            changed = (*good[:place], value, *good[place + 1 :])
            with pytest.raises(RuntimeError):
                op(backend)(*changed)
            with pytest.raises(RuntimeError):
                op(backend, "_one_pass")(*changed, *absent, *room)
    for gradient, bias_gradient in (
        (room[0][:1], room[1]),
        ([x[:, :1] for x in room[0]], room[1]),
        (room[0], room[1][:1]),
        (room[0], [x[:1] for x in room[1]]),
    ):
        with pytest.raises(RuntimeError):
            op(backend, "_one_pass")(*good, *absent, gradient, bias_gradient)
    known = (*codes[:3], codes[3], codes[4], DIVISORS.index("map"))
    for bad in (
        (*good[:7], *codes[:5], DIVISORS.index("map_all_ranks"), *absent),
        (*good[:7], 0, 0, *known[2:], *absent),  # the mass has to be given
        (*good[:7], 0, 0, *known[2:], mass.double()[:1], absent[1]),
    ):
        with pytest.raises(RuntimeError):
            op(backend, "_one_pass")(*bad, *room)
    rest = (student, teacher, mean, rstd, bias, weights, *codes[3:])
    for found in ((losses[0], mass, maps), (losses, mass[:0], maps), (losses, mass, maps[:0])):
        with pytest.raises(RuntimeError):
            op(backend, "_backward")(*found, *rest)


@pytest.mark.parametrize("info", INFO_MAPS, ids=lambda m: f"{m.score}-{m.map_norm}")
@on_every_target
def test_gradcheck_in_float64(backend: str, info: fastkd.InfoMap) -> None:
    skip_without_float64(backend)
    sample = with_bias(levels(torch.float64, shapes=[(2, 3, 2, 2), (1, 3, 1, 1)]))
    count = len(sample["student_feats"])
    for i, penalty in enumerate(PENALTIES):
        options = {"info_map": info, "penalty": penalty, "divisor": ("elements", "map", "batch")[i], "backend": backend}

        def losses(*x: Tensor, one_pass: bool = bool(i % 2), options: dict[str, Any] = options) -> Tensor:
            given = {**sample, "student_feats": list(x[:count]), "bias": [x[count], None]}
            return loss_of(given, torch.tensor(0.5), one_pass=one_pass, reduction="none", **options)

        torch.autograd.gradcheck(losses, learning(sample))


@pytest.mark.parametrize("axis", [0, 1])
@on_every_target
def test_offsets_beyond_32_bits(backend: str, axis: int, tmp_path: Path) -> None:
    """Strides of images or channels fit into 32 bits, but offsets do not."""
    shape, strides = (4, 4, 4, 8), [128, 32, 8, 1]
    strides[axis] = 2**30 + 16
    size = 3 * 2**30 + 4096

    def far(name: str, dtype: torch.dtype) -> Tensor:
        """Return a tensor over a sparse file on the CPU, of which only the used part exists."""
        if torch.get_default_device().type == "cpu":
            flat = torch.from_file(str(tmp_path / name), shared=True, size=size, dtype=dtype)
        else:
            flat = torch.empty(size, dtype=dtype)
        return flat.as_strided(shape, strides)

    torch.manual_seed(0)
    for dtype in (torch.float16, torch.bfloat16):  # in two passes, and in one
        student, teacher = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
        near = student.clone().requires_grad_()
        expected = fastkd.distill_loss([near], [teacher], backend=backend)
        (gradient,) = torch.autograd.grad(expected, near)
        far_student = far("student", dtype).copy_(student).requires_grad_()
        far_teacher = far("teacher", dtype).copy_(teacher)
        loss = fastkd.distill_loss([far_student], [far_teacher], backend=backend)
        torch.testing.assert_close(loss, expected)
        assert torch.equal(torch.autograd.grad(loss, far_student)[0], gradient)


# ---- transforms and tracers


@on_every_target
def test_forward_mode_is_a_clear_error_and_not_zero(backend: str) -> None:
    s, t = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)

    def loss(x: Tensor, name: str = backend) -> Tensor:
        return fastkd.distill_loss([x], [t], backend=name)

    for _ in range(2):  # plans of one transform must not be used in the next
        with pytest.raises(RuntimeError, match=r"no forward-mode derivative.*backend='reference'"):
            torch.func.jvp(loss, (s,), (torch.ones_like(s),))
        _, tangent = torch.func.jvp(lambda x: loss(x, "reference"), (s,), (torch.ones_like(s),))
        assert tangent != 0
        (expected,) = torch.autograd.grad(loss(x := s.clone().requires_grad_()), x)
        torch.testing.assert_close(torch.func.grad(lambda x: loss(x, "reference"))(s), expected)


@on_every_target
def test_a_compiled_function_is_one_graph(backend: str) -> None:
    sample = with_bias(levels(shapes=SHAPES[:2]))
    rest = {k: v for k, v in sample.items() if k not in ("student_feats", "bias")}

    def loss(s: list[Tensor], bias: list[Tensor | None]) -> Tensor:
        given = {**rest, "student_feats": [2 * x for x in s], "bias": bias}
        return loss_of(given, info_map="attention", divisor="map", reduction="none", backend=backend) * 3

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True)
    found = []
    for f in (compiled, loss):
        losses = f(sample["student_feats"], sample["bias"])
        found.append([losses.detach(), *torch.autograd.grad(losses, learning(sample), torch.tensor([1.0, 2.0]))])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("options", [{}, {"weight": "auto"}, {"weight": "auto", "decay": "linear", "stop_step": 4}])
def test_a_compiled_module_is_one_graph_and_compiles_at_most_twice(options: dict[str, Any]) -> None:
    """Its gradients are those of the same steps without a compiler, also when the factor changes."""
    counter = CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()
    torch.manual_seed(0)
    eager = DistillLoss([3, 5], [4, 8], calibration_batches=1, warmup_steps=2, **options)
    eager.calibrate(features((4, 8), 0))
    copied = copy.deepcopy(eager)
    compiled = torch.compile(copied, backend=counter, fullgraph=True)
    for k in range(5):
        student, teacher, task_loss = features((3, 5), k), features((4, 8), k + 9), torch.tensor(4.0 + k)
        found = []
        for module in (eager, compiled):
            loss = module([s.requires_grad_() for s in student], teacher, task_loss=task_loss)
            found.append([loss.detach(), *torch.autograd.grad(loss, [*student, *module.parameters()])])
        torch.testing.assert_close(*found)
    assert counter.frame_count <= 2
    torch.testing.assert_close(copied.loss_weight.factor, eager.loss_weight.factor)


def features(channels: tuple[int, ...], seed: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(2, c, 6 // (i + 1), 5, generator=g) for i, c in enumerate(channels)]


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_a_traced_step_gives_memory_of_its_own_at_each_run(mode: str) -> None:
    student, teacher = torch.randn(2, 2, 64, 26, 26)

    def gradient(s: Tensor, t: Tensor) -> Tensor:
        return torch.autograd.grad(fastkd.distill_loss([s], [t], backend="cpp"), s)[0]

    for _ in range(2):
        traced = make_fx(gradient, tracing_mode=mode)(student.requires_grad_(), teacher)
        first, kept = traced(student, teacher), gradient(student, teacher)
        traced(2 * student, teacher)
        torch.testing.assert_close(first, kept)


def test_the_loss_can_be_exported_and_traced() -> None:
    class Loss(nn.Module):
        def forward(self, s: Tensor, t: Tensor) -> Tensor:
            return fastkd.distill_loss([s], [t], backend="cpp")

    s, t = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    expected = Loss()(s, t)
    torch.testing.assert_close(torch.export.export(Loss(), (s, t)).module()(s, t), expected)
    torch.testing.assert_close(torch.jit.trace(Loss(), (s, t))(s, t), expected)


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


def test_a_subclass_of_tensor_is_taken() -> None:
    class Feature(Tensor):
        pass

    sample = levels(shapes=[(2, 4, 3, 3)] * 2)
    expected = step(sample, backend="cpp", one_pass=False)
    student = [s.detach().as_subclass(Feature).requires_grad_() for s in sample["student_feats"]]
    losses = fastkd.distill_loss(**{**sample, "student_feats": student}, reduction="none", backend="cpp")
    gradients = torch.autograd.grad(losses.sum(), student)
    for got, want in zip([losses, *gradients], expected, strict=True):
        torch.testing.assert_close(got.detach().as_subclass(Tensor), want)
