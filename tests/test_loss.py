"""DistillLoss: adapters, calibration, weights, warm-up, state; and the loss over several processes."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import CONTEXT
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.spawn import start_processes
from torch.nn import functional as F

import fastkd
from fastkd import DistillLoss, InfoMap, distill_loss
from fastkd.ops import levels


def feats(channels: tuple[int, ...] = (4, 8), seed: int = 0, n: int = 2) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n, c, 6 // (i + 1), 5, generator=g) * (1 + i) + i for i, c in enumerate(channels)]


def test_adapters_bring_the_student_to_the_teachers_width() -> None:
    criterion = DistillLoss([3, 5], [4, 8], info_map="energy")
    student, teacher = feats((3, 5), seed=1), feats()
    student = [s.requires_grad_() for s in student]
    leaves = [*student, *criterion.parameters()]
    loss = criterion(student, teacher)
    # as one convolution with its bias would do
    adapted = [F.conv2d(s, a.weight, a.bias) for a, s in zip(criterion.adapters, student, strict=True)]
    expected = distill_loss(adapted, teacher, info_map="energy")
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves))
    torch.testing.assert_close(criterion.adapted(student), adapted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_under_autocast(dtype: torch.dtype) -> None:
    criterion, teacher = DistillLoss([3], [4], info_map="energy"), feats((4,))
    (student,) = feats((3,), seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = criterion([student.to(dtype).requires_grad_()], [t.bfloat16() for t in teacher])
    loss.backward()
    found = [p.grad for p in criterion.parameters()]
    exact = torch.autograd.grad(distill_loss(criterion.adapted([student]), teacher), list(criterion.parameters()))
    torch.testing.assert_close(found, list(exact), rtol=0.05, atol=2e-3)


def test_adapters_of_ones_own_are_called_as_they_are() -> None:
    own = [nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), nn.Conv2d(5, 8, 1)]
    student, teacher = feats((3, 5), seed=1), feats()
    loss = DistillLoss(adapters=own, info_map="energy")(student, teacher)
    expected = distill_loss([a(s) for a, s in zip(own, student, strict=True)], teacher, info_map="energy")
    torch.testing.assert_close(loss, expected)


def test_lazy_adapters_take_their_widths_from_the_first_batch_and_train_in_an_earlier_optimizer() -> None:
    criterion = DistillLoss(levels=2)
    optimizer = torch.optim.AdamW(criterion.parameters(), lr=0.1)
    student, teacher = feats((3, 5), seed=1), feats()
    first = criterion(student, teacher)
    first.backward()
    before = [a.weight.clone() for a in criterion.adapters]
    assert [w.shape for w in before] == [(4, 3, 1, 1), (8, 5, 1, 1)]
    optimizer.step()
    assert all(not torch.equal(w, a.weight) for w, a in zip(before, criterion.adapters, strict=True))
    assert criterion(student, teacher) < first


def test_statistics_of_k_batches_are_those_of_their_union_and_then_stay() -> None:
    criterion = DistillLoss([4, 8], [4, 8], calibration_batches=3)
    batches = [feats(seed=k, n=k + 1) for k in range(5)]
    for batch in batches:
        criterion(feats(seed=9, n=len(batch[0])), batch)
    assert criterion.calibrated
    for level in range(2):
        union = torch.cat([b[level] for b in batches[:3]])
        mean, rstd = criterion.statistics[level].moments()
        torch.testing.assert_close(mean, union.mean((0, 2, 3)))
        torch.testing.assert_close(rstd, union.var((0, 2, 3), correction=0).rsqrt(), rtol=1e-4, atol=0)


def test_moments_follow_each_batch_each_checkpoint_and_what_is_set_from_outside() -> None:
    (statistics,) = DistillLoss(adapters=[nn.Identity()]).statistics
    for change in (
        lambda: statistics.update(feats((4,))[0]),
        lambda: statistics.update(feats((4,), seed=1)[0]),
        lambda: statistics.load_state_dict({name: x + 1 for name, x in statistics.state_dict().items()}),
        lambda: statistics.mean.add_(1),
    ):
        change()
        for mean, rstd in (statistics.moments(), statistics.moments()):
            torch.testing.assert_close(mean, statistics.mean)
            torch.testing.assert_close(rstd, (statistics.square / statistics.count).rsqrt())


def test_a_dead_channel_counts_as_one_of_a_ten_thousandth_of_the_mean_variance() -> None:
    teacher = feats((4,))
    teacher[0][:, 1] = 7
    criterion = DistillLoss(adapters=[nn.Identity()], calibration_batches=1)
    criterion.calibrate(teacher)
    _, rstd = criterion.statistics[0].moments()
    mean_variance = teacher[0].var((0, 2, 3), correction=0).mean()
    torch.testing.assert_close(rstd[1], 100 * mean_variance.rsqrt())
    criterion.calibrate([torch.zeros_like(teacher[0])])


def test_eight_batches_are_the_teachers_statistics_by_default() -> None:
    criterion = DistillLoss([4], [4])
    for seed in range(8):
        assert not criterion.calibrated
        criterion(feats((4,), seed=9), feats((4,), seed=seed))
    assert criterion.calibrated


def test_evaluation_neither_calibrates_nor_counts() -> None:
    criterion = DistillLoss([4, 8], [4, 8], warmup_steps=10).eval()
    with torch.no_grad():
        criterion(feats(seed=1), feats())
    assert criterion.statistics[0].count == 0
    assert criterion.loss_weight.step == 0


@pytest.mark.parametrize(
    "options", [{"adapters": [nn.Identity()]}, {"student_channels": [4], "teacher_channels": [4]}, {"levels": 1}]
)
def test_a_validation_under_inference_mode_may_come_before_the_first_step(options: dict[str, Any]) -> None:
    criterion, student = DistillLoss(**options).eval(), feats((4,), seed=1)[0].requires_grad_()
    with torch.inference_mode():
        criterion([student], feats((4,)))
    criterion.train()([student], feats((4,))).backward()
    assert all(x.grad is not None and x.grad.any() for x in (student, *criterion.parameters()))
    assert criterion.statistics[0].count > 0


def test_a_loss_that_has_stopped_is_zero_whatever_the_features_are() -> None:
    criterion = DistillLoss([4], [4], stop_step=1)
    criterion(feats((4,), seed=1), feats((4,)))
    student = (feats((4,), seed=1)[0] * math.inf).requires_grad_()
    loss = criterion([student], feats((4,)))
    loss.backward()
    assert loss.item() == 0
    leaves = (student, *criterion.parameters())
    assert all(x.grad is not None and not x.grad.any() for x in leaves)  # zero instead of None, as DDP expects


def test_a_compiled_loss_that_has_stopped_is_one_graph() -> None:
    criterion = DistillLoss([4], [4], stop_step=1)
    criterion(feats((4,), seed=1), feats((4,)))
    torch.compiler.reset()
    compiled = torch.compile(criterion, backend="aot_eager", fullgraph=True)
    assert compiled([x.requires_grad_() for x in feats((4,), seed=1)], feats((4,))) == 0


def test_state_returns_into_a_fresh_lazy_loss() -> None:
    trained = DistillLoss(levels=2, calibration_batches=2, warmup_steps=5)
    for k in range(3):
        trained(feats((3, 5), seed=k), feats(seed=k + 5))
    fresh = DistillLoss(levels=2, calibration_batches=2, warmup_steps=5)
    fresh.load_state_dict(trained.state_dict())
    assert fresh.calibrated
    student, teacher = feats((3, 5), seed=20), feats(seed=21)
    torch.testing.assert_close(fresh(student, teacher), trained(student, teacher), rtol=0, atol=0)


def test_state_survives_torch_save_with_weights_only(tmp_path: Path) -> None:
    criterion = DistillLoss([3], [4])
    criterion(feats((3,)), feats((4,)))
    torch.save(criterion.state_dict(), tmp_path / "loss.pt")
    DistillLoss([3], [4]).load_state_dict(torch.load(tmp_path / "loss.pt", weights_only=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "student_channels and teacher_channels, or adapters, or levels"),
        ({"student_channels": [3]}, "both student_channels and teacher_channels"),
        ({"student_channels": [3], "teacher_channels": [4, 5]}, r"one length.*\[1, 2\]"),
        ({"levels": 2, "adapters": [nn.Identity()]}, r"\[1, 2\]"),
        ({"levels": 0}, "levels: expected an integer >= 1, got 0"),
        *(({"levels": x}, f"levels: expected an integer >= 1, got {x}") for x in (-1, True, 2.5)),
        ({"student_channels": [3, 0], "teacher_channels": [4, 4]}, r"student_channels\[1\]: expected an integer >= 1"),
        ({"student_channels": [3], "teacher_channels": ["4"]}, r"teacher_channels\[0\]: .*got '4'"),
        ({"levels": 2, "weights": [1.0]}, "weights: expected 2 entries"),
        ({"levels": 1, "weights": [float("nan")]}, r"weights\[0\]: expected a finite number"),
        ({"levels": 1, "backend": "nothing"}, "backend: expected one of"),
        ({"levels": 1, "calibration_batches": 0}, "calibration_batches: expected an integer >= 1, got 0"),
        ({"levels": 1, "warmup_steps": 2.5}, "warmup_steps: expected an integer >= 0, got 2.5"),
        ({"levels": 1, "stop_step": -1}, "stop_step: expected an integer >= 0, got -1"),
        ({"levels": 1, "weight": "more"}, "weight: expected a finite number .* or \"auto\", got 'more'"),
        ({"levels": 1, "weight": -1.0}, "weight: expected a finite number"),
        ({"levels": 1, "weight": "auto", "share": 0.0}, "share: expected a finite number > 0.*, got 0"),
        *(({"levels": 1, name: x}, f"{name}: .*1") for name in ("weight", "share", "beta") for x in (1e39, 10**400)),
        *(({"levels": 1, name: True}, f"{name}: .*got True") for name in ("weight", "share", "calibration_batches")),
        ({"levels": 1, "stop_step": 2**63}, "stop_step: expected an integer that 64 bits can hold, got 9"),
        ({"levels": 1, "decay": "linear"}, "decay: expected a stop_step after the 0 steps of warm-up"),
        ({"levels": 1, "decay": "fast", "stop_step": 9}, "decay: expected one of None, 'linear', 'cosine'; got"),
        ({"student_channels": [3], "teacher_channels": [4], "adapters": [nn.Identity()]}, "adapters: expected no"),
        ({"levels": 2, "info_map": "nothing"}, "info_map: "),
        ({"levels": 2, "penalty": "nothing"}, "penalty: "),
        ({"levels": 2, "divisor": "nothing"}, "divisor: "),
        ({"levels": 2, "beta": -1}, "beta: "),
        ({"levels": 2, "warmup_steps": -1}, "warmup_steps: "),
    ],
)
def test_bad_options_are_a_clear_error(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistillLoss(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": 1, "standardize": "False"}, "standardize: expected True, False or 'batch', got 'False'"),
        (
            {"adapters": [nn.Identity(), None]},
            r"adapters\[1\]: expected a module \(nn.Identity.*got None",
        ),
        (
            {"student_channels": 3, "teacher_channels": 4},
            "student_channels: expected a list of integers",
        ),
    ],
)
def test_options_of_another_type_are_a_clear_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        DistillLoss(**options)


def test_any_real_numbers_will_do() -> None:
    half: Any = Fraction(1, 2)
    losses = [
        DistillLoss(adapters=[nn.Identity()], weight=x, beta=x, penalty="smooth_l1", info_map=InfoMap(temperature=x))
        for x in (half, 0.5)
    ]
    assert losses[0](feats((5,)), feats((5,), seed=1)) == losses[1](feats((5,)), feats((5,), seed=1))


@pytest.mark.parametrize(("key", "kept"), [("loss_weight.", "steps, has_average"), ("", "batches_seen")])
def test_a_state_of_another_version_is_a_clear_error(key: str, kept: str) -> None:
    state = {**DistillLoss(levels=1).state_dict(), f"{key}_extra_state": {"since": 3}}
    with pytest.raises(ValueError, match=rf"expected a state with {kept}, got \['since'\]: another version"):
        DistillLoss(levels=1).load_state_dict(state)


def test_wrong_number_of_levels_is_a_clear_error() -> None:
    criterion = DistillLoss(levels=2)
    with pytest.raises(ValueError, match="student_feats: expected 2 levels, as this DistillLoss has, got 1"):
        criterion(feats((3,)), feats())
    with pytest.raises(TypeError, match=r"teacher_feats: .*one tensor"):
        criterion(feats(), feats()[0])
    with pytest.raises(TypeError, match=r"student_feats: .*got a dict; pass list\(student_feats.values\(\)\)"):
        criterion(dict(enumerate(feats())), feats())
    with pytest.raises(ValueError, match="teacher_feats: expected 2 levels, as this DistillLoss has, got 1"):
        criterion.calibrate(feats((3,)))
    with pytest.raises(ValueError, match=r"teacher_feats\[1\]: expected 4 dimensions"):
        criterion(feats(), [feats()[0], feats()[1][0]])


def test_a_feature_of_another_width_than_its_adapter_takes_is_a_clear_error() -> None:
    with pytest.raises(ValueError, match=r"student_feats\[1\]: expected the 5 channels that its adapter takes, got 6"):
        DistillLoss([3, 5], [4, 8])(feats((3, 6)), feats())


def test_two_losses_may_be_summed_before_one_backward_while_calibrating() -> None:
    criterion = DistillLoss([3, 5], [4, 8], calibration_batches=8)
    losses = [criterion(feats((3, 5), seed=1 + i), feats(seed=7 + i)) for i in range(2)]
    (losses[0] + losses[1]).backward()
    assert all(p.grad.isfinite().all() for p in criterion.parameters())


def test_batches_that_are_empty_or_not_finite_calibrate_nothing() -> None:
    criterion, clean = (DistillLoss(adapters=[nn.Identity()] * 2, calibration_batches=2) for _ in range(2))
    broken = feats(seed=3)
    broken[0][0, 0, 0, 0] = float("inf")
    criterion.calibrate([x[:0] for x in feats()])
    assert not criterion.calibrated
    criterion.calibrate(broken)
    criterion.calibrate(feats(seed=4))
    assert criterion.calibrated
    clean.calibrate(feats(seed=4))
    for x, y in zip(criterion.statistics[0].moments(), clean.statistics[0].moments(), strict=True):
        torch.testing.assert_close(x, y)
    only_broken = DistillLoss(adapters=[nn.Identity()] * 2)
    only_broken.calibrate(broken)
    mean, rstd = only_broken.statistics[0].moments()
    assert not mean.any()
    assert (rstd == 1).all()


def test_statistics_stay_float32_when_the_criterion_is_cast() -> None:
    criterion = DistillLoss([3, 5], [4, 8])
    criterion.calibrate(feats())
    before = [x.clone() for x in criterion.statistics[0].moments()]
    criterion.half()
    assert criterion.adapters[0].weight.dtype == torch.float16
    assert all(torch.equal(x, y) for x, y in zip(criterion.statistics[0].moments(), before, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_student_features_of_another_dtype_than_the_adapters_are_converted(dtype: torch.dtype) -> None:
    criterion = DistillLoss([3, 5], [4, 8], info_map="energy")
    student = [x.to(dtype).requires_grad_() for x in feats((3, 5), seed=1)]
    loss = criterion(student, [x.to(dtype) for x in feats()])
    loss.backward()
    assert all(x.grad.dtype == dtype and x.grad.any() for x in student)
    torch.testing.assert_close(loss.float(), criterion(feats((3, 5), seed=1), feats()), rtol=0.02, atol=0)


def test_a_detached_student_is_warned_about_though_the_adapters_learn() -> None:
    levels._warn_nothing_learns.cache_clear()
    with pytest.warns(UserWarning, match="student_feats: none requires grad"):
        DistillLoss([3, 5], [4, 8])(feats((3, 5)), feats())


def _rank(rank: int, folder: str) -> None:
    """Each of two ranks has half of the batch; DDP would average their gradients."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )  # fmt: skip
    half = slice(0, 1) if rank == 0 else slice(1, 4)
    found = {}
    for info_map in MAPS_OF_RANKS:
        student = [x[half].clone().requires_grad_() for x in feats(seed=1, n=4)]
        options = {"info_map": info_map, "divisor": "map_all_ranks", "prior": prior(half), "standardize": False}
        loss = distill_loss(student, [x[half] for x in feats(n=4)], **options)
        found[info_map] = loss.detach(), torch.autograd.grad(loss, student)
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def prior(images: slice) -> list[Tensor]:
    g = torch.Generator().manual_seed(3)
    return [torch.rand(4, *x.shape[2:], generator=g)[images] for x in feats(n=4)]


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("of_ranks")
    start_processes(_rank, args=(str(folder),), nprocs=2, start_method=CONTEXT.get_start_method())
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


MAPS_OF_RANKS = ("attention", "graded_iou")  # whose mass is known after the features are read, and before


@pytest.mark.parametrize("info_map", MAPS_OF_RANKS)
def test_map_all_ranks_averages_to_the_whole_batch(info_map: str, of_ranks: list[dict[str, Any]]) -> None:
    student = [x.requires_grad_() for x in feats(seed=1, n=4)]
    options = {"info_map": info_map, "divisor": "map", "standardize": False}
    whole = distill_loss(student, feats(n=4), prior=prior(slice(4)), **options)
    expected = torch.autograd.grad(whole, student)
    (loss0, gradients0), (loss1, gradients1) = (found[info_map] for found in of_ranks)
    torch.testing.assert_close((loss0 + loss1) / 2, whole.detach())
    for first, second, both in zip(gradients0, gradients1, expected, strict=True):
        torch.testing.assert_close(torch.cat([first, second]) / 2, both)


def test_the_public_map_of_a_standardised_teacher_is_that_of_the_loss() -> None:
    teacher = feats()
    criterion = DistillLoss(adapters=[nn.Identity()] * 2, calibration_batches=1)
    loss = criterion(feats(seed=1), teacher)
    moments = [x.moments() for x in criterion.statistics]
    maps = fastkd.info_map(teacher, standardize=moments)
    by_hand = sum(
        (w[:, None] * (s - (t - m[:, None, None]) * r[:, None, None]) ** 2).mean()
        for w, s, t, (m, r) in zip(maps, feats(seed=1), teacher, moments, strict=True)
    )
    torch.testing.assert_close(loss, by_hand)


# ---- state between calls


def energy_loss(**options: Any) -> DistillLoss:
    return DistillLoss(adapters=[nn.Identity()], info_map="energy", standardize=True, calibration_batches=1, **options)


def test_statistics_that_were_set_from_outside_are_those_of_the_next_call() -> None:
    s, t = [torch.randn(2, 4, 5, 5, requires_grad=True)], [torch.randn(2, 4, 5, 5)]
    one, other = energy_loss(), energy_loss()
    one(s, t)
    other(s, [5 * t[0]])
    with torch.no_grad():
        one.eval(), other.eval()
        expected, own = other(s, t), one(s, t)
        assert not torch.allclose(expected, own)
        buffers = dict(other.named_buffers())
        torch.testing.assert_close(torch.func.functional_call(one, buffers, (s, t)), expected)
        torch.testing.assert_close(one(s, t), own)
        for name, buffer in one.statistics.named_buffers():
            buffer.copy_(buffers[f"statistics.{name}"])
        torch.testing.assert_close(one(s, t), expected)


def test_a_fake_call_leaves_nothing_behind() -> None:
    s, t = [torch.randn(2, 4, 5, 5)], [torch.randn(2, 4, 5, 5)]
    criterion = energy_loss().eval()
    with torch.no_grad():
        criterion.calibrate(t)
        with FakeTensorMode(allow_non_fake_inputs=True):
            criterion(s, t)
        assert type(criterion(s, t)) is Tensor


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_default_dtype_of_the_process_changes_no_statistics(dtype: torch.dtype) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        criterion = energy_loss(weight="auto")
        s, t = [torch.randn(2, 4, 5, 5, requires_grad=True)], [torch.randn(2, 4, 5, 5)]
        for _ in range(2):
            criterion(s, t, task_loss=2).backward()
    finally:
        torch.set_default_dtype(before)
    kept = (*criterion.statistics.buffers(), criterion.loss_weight.factor, criterion.loss_weight.averages)
    assert {x.dtype for x in kept} == {torch.float32}


def test_other_shapes_do_not_compile_anew() -> None:
    graphs = CompileCounter()
    criterion = DistillLoss([4], [4], info_map="energy", weight=2.0)
    torch._dynamo.reset()
    compiled = torch.compile(criterion, dynamic=True, backend=graphs)
    for size in range(4, 16):
        compiled([torch.randn(2, 4, size, size)], [torch.randn(2, 4, size, size)])
    assert graphs.frame_count <= 3


def test_donations_that_do_not_fit_the_levels_are_refused_by_name() -> None:
    s, t = [torch.randn(2, 4, 5, 5, requires_grad=True)], [torch.randn(2, 4, 5, 5)]
    for donated in (True, [True, False], ["False"]):
        with pytest.raises(ValueError, match="donated: expected one truth value per level, 1"):
            energy_loss()(s, t, donated=donated)
