"""The gradient that the forward computes: when it does, and what autograd does with it for any upstream gradient."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from samples import (
    DTYPES,
    INFO_MAPS,
    assert_same_bits,
    interpreted,
    learning,
    levels,
    loss_of,
    on_every_target,
    shapes_for,
    step,
    widened,
    with_bias,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastkd
from fastkd.ops.presets import DIVISORS

LARGE = [(2, 64, 64, 64), (1, 37, 91, 33), (1, 9, 80, 80), (3, 600, 7, 5)]  # large enough for stores past the caches


def small(backend: str, dtype: torch.dtype = torch.float32, **options: Any) -> dict[str, Any]:
    shapes = [(2, 7, 5, 3), (1, 3, 1, 1)] if interpreted(backend) else shapes_for(backend)
    return with_bias(levels(dtype, shapes=shapes, **options))


def forward_has_the_gradient(sample: dict[str, Any], **options: Any) -> bool:
    """Whether the teacher's features may change before the backward, which no longer reads them."""
    loss = loss_of(sample, **options)
    for feature in sample["teacher_feats"]:
        feature.mul_(2)
    try:
        torch.autograd.grad(loss, learning(sample))
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        return False
    return True


# ---- when one pass is taken


@pytest.mark.parametrize("info", INFO_MAPS, ids=lambda m: f"{m.score}-{m.map_norm}")
@on_every_target
def test_every_map_takes_one_pass_but_in_float16_or_where_ranks_first_sum_it(
    backend: str, info: fastkd.InfoMap
) -> None:
    known = info.score == "uniform" and info.map_norm == "none"
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for divisor in ("map", "map_all_ranks") if interpreted(backend) else DIVISORS:
            sample = levels(dtype, shapes=[(1, 3, 2, 2)])
            expected = dtype != torch.float16 and (known or divisor != "map_all_ranks")
            assert forward_has_the_gradient(sample, info_map=info, divisor=divisor, backend=backend) == expected


@on_every_target
def test_levels_of_any_strides_and_dtypes_take_one_pass_on_the_cpu(backend: str) -> None:
    on_cpu = backend == "cpp" and torch.get_default_device().type == "cpu"
    mixed = levels(torch.bfloat16, "student_channels_last", shapes=[(2, 7, 5, 3)])
    mixed["teacher_feats"] = [t.float() for t in mixed["teacher_feats"]]
    for sample in (mixed, *(levels(layout=x, shapes=[(2, 7, 5, 3)]) for x in ("cropped", "teacher_channels_last"))):
        assert forward_has_the_gradient(sample, backend=backend) == on_cpu
    for layout in ("contiguous", "channels_last"):
        assert forward_has_the_gradient(levels(layout=layout, shapes=[(2, 7, 5, 3)]), backend=backend)


# ---- its results


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "cropped"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_gradients_too_large_for_the_caches(dtype: torch.dtype, layout: str) -> None:
    sample = with_bias(levels(dtype, layout, shapes=LARGE))
    for info_map in ("attention", fastkd.InfoMap("uniform", "none")):
        options: dict[str, Any] = {"info_map": info_map, "divisor": "map"}
        exact = step(widened(sample), 4096.0, **options, backend="reference")
        for one_pass in (False, True):
            got = step(sample, 4096.0, **options, backend="cpp", one_pass=one_pass)
            for x, y in zip(got, exact, strict=True):
                assert (x.double() - y).norm() / y.norm() < 64 * torch.finfo(dtype).eps


@pytest.mark.parametrize("one_pass", [False, True])
def test_same_bits_for_any_number_of_threads(one_pass: bool) -> None:
    """Threads take whole images or share them."""
    before = torch.get_num_threads()
    cases = [
        (with_bias(levels(layout=layout, shapes=[(1, 64, 26, 26), (3, 128, 13, 13), (2, 8, 5, 5)])), info_map, divisor)
        for layout in ("contiguous", "channels_last", "cropped", "expanded")
        for info_map, divisor in (("attention", "map"), ("energy", "elements"), ("uniform", "map"))
    ]
    results = []
    try:
        for threads in (1, 2, 3, 16, 1):
            torch.set_num_threads(threads)
            results.append([
                x
                for sample, info_map, divisor in cases
                for x in step(sample, info_map=info_map, divisor=divisor, backend="cpp", one_pass=one_pass)
            ])  # fmt: skip
    finally:
        torch.set_num_threads(before)
    for got in results[1:]:
        assert_same_bits(got, results[0])


@on_every_target
def test_features_may_begin_anywhere_in_memory(backend: str) -> None:
    """Kernels load 16 bytes at a time, also if one model's features are aligned and the other's are not."""
    aligned = small(backend, torch.bfloat16)
    for info_map in ("attention", "uniform"):
        expected = step(aligned, 3.0, info_map=info_map, backend=backend)
        for moved in ("student_feats", "teacher_feats"):
            shifted = [torch.cat([x.flatten()[:1], x.flatten()])[1:].view_as(x).detach() for x in aligned[moved]]
            sample = {**aligned, moved: [x.requires_grad_(moved == "student_feats") for x in shifted]}
            torch.testing.assert_close(step(sample, 3.0, info_map=info_map, backend=backend), expected)


@on_every_target
def test_levels_without_elements_and_images_without_weight(backend: str) -> None:
    for shapes in ([(0, 8, 4, 4), (2, 8, 4, 4), (2, 8, 0, 4)], [(1, 1, 1, 1)], [(0, 8, 4, 4)]):
        sample = with_bias(levels(shapes=shapes))
        sample["prior"] = [torch.zeros(n, h, w) for n, _, h, w in shapes]
        for info_map in ("energy", "uniform"):
            for divisor in DIVISORS:
                options = {"info_map": info_map, "divisor": divisor, "backend": backend}
                assert not any(
                    x.any() for one_pass in (True, False) for x in step(sample, one_pass=one_pass, **options)
                )


@pytest.mark.parametrize("info_map", ["energy", "uniform"])
@on_every_target
def test_nan_spoils_its_own_level_alone(backend: str, info_map: str) -> None:
    sample = levels(shapes=[(1, 8, 4, 4), (1, 8, 4, 4)])
    sample["teacher_feats"][0][0, 3, 2, 1] = float("nan")
    losses, damaged, fine = step(sample, backend=backend, info_map=info_map)
    assert losses.isnan().tolist() == [True, False]
    assert damaged[0, 3, 2, 1].isnan()
    assert fine.isfinite().all()


@on_every_target
def test_gradients_that_nobody_wants_change_nothing(backend: str) -> None:
    sample = small(backend)
    everything = step(sample, 3.0, backend=backend)
    for wanted in range(1, len(learning(sample))):
        for i, x in enumerate(learning(sample)):
            x.requires_grad_(i % (wanted + 1) == 0)
        kept = [x for x, leaf in zip(everything[1:], learning(sample), strict=True) if leaf.requires_grad]
        assert_same_bits(step(sample, 3.0, backend=backend), [everything[0], *kept])
    for i, x in enumerate(learning(sample)):
        x.requires_grad_(i >= len(sample["student_feats"]))  # a frozen student, whose adapters still learn
    torch.testing.assert_close(
        step(sample, 3.0, backend=backend), [everything[0], *everything[1 + len(sample["student_feats"]) :]]
    )


# ---- what multiplies the loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@on_every_target
def test_the_loss_may_be_multiplied_by_something_else_at_each_call(backend: str, dtype: torch.dtype) -> None:
    """Accumulation divides the loss and a GradScaler multiplies it; in float16, small gradients must not underflow."""
    sample = small(backend, dtype)
    exact, sizes = step(widened(sample), backend="reference")[1:], [s.numel() for s in sample["student_feats"]]
    sizes += [n for n, b in zip(sizes, sample["bias"], strict=True) if b is not None]
    rounding = 2.0**-25 if dtype == torch.float16 else 0.0  # rounding of an element, however small
    for scale in (1.0, 2.0**-10, 4096.0, 4096.0, 1 / 3, 0.0, -1.0, 1.0):
        for got, y, n in zip(step(sample, scale, backend=backend)[1:], exact, sizes, strict=True):
            allowed = 4 * torch.finfo(dtype).eps * (scale * y).norm() + rounding * n**0.5
            assert (got.double() - scale * y).norm() <= allowed


@on_every_target
def test_levels_may_be_multiplied_each_by_something_else(backend: str) -> None:
    sample = small(backend)
    once, several = step(sample, backend=backend)[1:], len(sample["student_feats"])
    upstream = [1.0, 0.0, -2.0, 0.5][:several]
    of_bias = [u for u, b in zip(upstream, sample["bias"], strict=True) if b is not None]
    expected = [u * g for u, g in zip([*upstream, *of_bias], once, strict=True)]
    torch.testing.assert_close(step(sample, upstream, backend=backend)[1:], expected)


@on_every_target
def test_a_factor_multiplies_loss_and_gradient(backend: str) -> None:
    sample = small(backend)
    plain = step(sample, backend=backend)
    for factor in (0.0, 0.5, 65536.0):
        given = torch.tensor(factor)
        torch.testing.assert_close(step(sample, 1.0, given, backend=backend), [factor * x for x in plain])
        total = loss_of(sample, given, backend=backend)
        given.fill_(float("nan"))  # the factor of the next step, before this step's backward
        assert total.dtype == torch.float32
        torch.testing.assert_close(total, factor * plain[0].sum())
        torch.testing.assert_close(
            list(torch.autograd.grad(total, learning(sample))), [factor * x for x in plain[1:]]
        )  # fmt: skip


def test_grad_scaler_trains_as_without() -> None:
    weights = []
    for enabled in (False, True):
        torch.manual_seed(0)
        student, teacher = nn.Conv2d(3, 32, 3), nn.Conv2d(3, 32, 3).requires_grad_(False)
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2, enabled=enabled)
        for _ in range(7):
            x = torch.randn(2, 3, 14, 14)
            optimizer.zero_grad()
            scaler.scale(fastkd.distill_loss([student(x)], [teacher(x)], backend="cpp")).backward()
            scaler.step(optimizer)
            scaler.update()
        weights.append(student.weight.detach())
    torch.testing.assert_close(*weights)


@on_every_target
def test_accumulated_gradients_are_sums(backend: str) -> None:
    batches = [small(backend, seed=seed) for seed in range(3)]
    student = learning(batches[0])
    for batch in batches[1:]:
        batch["student_feats"], batch["bias"] = batches[0]["student_feats"], batches[0]["bias"]
    expected = [step(batch, 1 / 3, backend=backend)[1:] for batch in batches]
    for _ in range(2):
        for batch in batches:
            (loss_of(batch, backend=backend) / 3).backward()
        torch.testing.assert_close([x.grad for x in student], [sum(x) for x in zip(*expected, strict=True)])
        for x in student:
            x.grad = None


# ---- autograd


@on_every_target
def test_each_backward_of_a_retained_graph_gives_its_own_gradient(backend: str) -> None:
    sample = small(backend)
    once, student = step(sample, backend=backend)[1:], learning(sample)
    loss = loss_of(sample, backend=backend)
    for g in (1.0, 3.0, 0.0):
        got = torch.autograd.grad(loss, student, torch.tensor(g), retain_graph=True)
        torch.testing.assert_close(list(got), [g * x for x in once])
        for x in got:  # users may change them
            x.fill_(float("nan"))
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close([x.grad for x in student], [2 * x for x in once])
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("one_pass", [False, True])
@on_every_target
def test_a_second_derivative_is_a_clear_error(backend: str, one_pass: bool) -> None:
    sample = small(backend)
    loss = loss_of(sample, backend=backend, one_pass=one_pass)
    gradients = torch.autograd.grad(loss, learning(sample), create_graph=True)
    torch.testing.assert_close([x.detach() for x in gradients], step(sample, backend=backend)[1:])
    with pytest.raises(RuntimeError, match=r"no second derivative.*backend='reference'"):
        sum(x.square().sum() for x in gradients).backward()


@pytest.mark.parametrize("reentrant", [False, True])
@on_every_target
def test_under_activation_checkpointing(backend: str, reentrant: bool) -> None:
    sample = small(backend)
    student, expected = sample.pop("student_feats"), step(small(backend), 2.0, backend=backend)
    student = [x.detach().requires_grad_() for x in student]

    def loss(*s: Tensor) -> Tensor:
        return loss_of({**sample, "student_feats": [x * 1 for x in s]}, backend=backend)

    (2 * checkpoint(loss, *student, use_reentrant=reentrant)).backward()
    torch.testing.assert_close([s.grad for s in student], expected[1 : 1 + len(student)])


@on_every_target
def test_with_saved_tensors_packed_away(backend: str) -> None:
    sample = small(backend)
    with torch.autograd.graph.save_on_cpu():
        got = step(sample, 3.0, backend=backend)
    torch.testing.assert_close(got, step(sample, 3.0, backend=backend))


def test_hooks_see_the_gradient_and_may_replace_it() -> None:
    student, teacher, seen = torch.randn(2, 4, 3, 3, requires_grad=True), torch.randn(2, 4, 3, 3), []
    loss = lambda s: fastkd.distill_loss([s], [teacher])  # noqa: E731
    (expected,) = torch.autograd.grad(loss(student), student)
    feature = student * 1
    feature.register_hook(lambda g: seen.append(g) or 2 * g)
    (got,) = torch.autograd.grad(loss(feature), student)
    assert_same_bits([seen[0], got], [expected, 2 * expected])

    criterion = fastkd.DistillLoss(adapters=[nn.Identity()], standardize=False, info_map="self_information")
    criterion.register_full_backward_hook(lambda _, to_input, __: seen.append(to_input))
    criterion([student], [teacher]).backward()
    assert_same_bits([student.grad], [expected])
    assert len(seen) == 2


def test_a_student_that_is_changed_by_its_next_layer() -> None:
    """ReLU(inplace=True) follows a hooked layer; the loss has read the features before."""
    student, teacher = torch.randn(2, 4, 3, 3, requires_grad=True), torch.randn(2, 4, 3, 3)
    feature = student * 1
    loss = fastkd.distill_loss([feature], [teacher])
    (expected,) = torch.autograd.grad(fastkd.distill_loss([student], [teacher]), student)
    feature.relu_()
    assert_same_bits(torch.autograd.grad(loss, student), [expected])


def test_what_changes_before_the_backward_is_told_by_autograd_or_does_no_harm() -> None:
    for changed in ("teacher", "mean"):
        for one_pass in (False, True):
            sample = levels(shapes=[(2, 3, 4, 4)] * 2)
            expected = step(sample, backend="cpp", one_pass=one_pass)[1:]
            loss = loss_of(sample, backend="cpp", one_pass=one_pass)
            {"teacher": sample["teacher_feats"][1], "mean": sample["standardize"][1][0]}[changed].add_(5)
            if one_pass:
                assert_same_bits(torch.autograd.grad(loss, sample["student_feats"]), expected)
            else:
                with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                    loss.backward()


@on_every_target
def test_inference_mode(backend: str) -> None:
    """The teacher may run in inference mode, and a validation in it does not affect training."""
    for one_pass in (True, False):
        sample = with_bias(levels(shapes=[(2, 5, 4, 4 + one_pass)] * 3))
        with torch.inference_mode():
            inference = {**sample, "teacher_feats": [t.clone() for t in sample["teacher_feats"]]}
            value = loss_of(inference, backend=backend, reduction="none")
        got = step(inference, 3.0, backend=backend, one_pass=one_pass)
        assert_same_bits(got, step(sample, 3.0, backend=backend, one_pass=one_pass))
        torch.testing.assert_close(value, got[0])


@on_every_target
def test_without_gradients_the_value_is_the_same(backend: str) -> None:
    sample = small(backend)
    with torch.no_grad():
        value = loss_of(sample, backend=backend)
    assert not value.requires_grad
    torch.testing.assert_close(value, loss_of(sample, backend=backend).detach())


def test_a_process_without_pytorchs_word_on_kept_graphs_is_correct_all_the_same() -> None:
    code = """
import torch
del torch._C._autograd._get_current_graph_task_keep_graph, torch._C._autograd._top_saved_tensors_default_hooks
import fastkd
s, t = torch.randn(1, 8, 4, 4, requires_grad=True), torch.randn(1, 8, 4, 4)
(expected,) = torch.autograd.grad(fastkd.distill_loss([s], [t], backend="reference"), s)
loss = fastkd.distill_loss([s], [t], backend="cpp")
for g in (1.0, 2.0):
    (got,) = torch.autograd.grad(loss, s, torch.tensor(g), retain_graph=True)
    torch.testing.assert_close(got, g * expected)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
