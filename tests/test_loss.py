"""DistillLoss: adapters, calibration, weights, warm-up, state; and the loss over several processes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

import fastkd
from fastkd import DistillLoss, distill_loss, levels
from fastkd.loss_weight import LossWeight


def feats(channels: tuple[int, ...] = (4, 8), seed: int = 0, n: int = 2) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n, c, 6 // (i + 1), 5, generator=g) * (1 + i) + i for i, c in enumerate(channels)]


def test_adapters_bring_the_student_to_the_teachers_width() -> None:
    criterion = DistillLoss([3, 5], [4, 8], info_map="energy")
    student, teacher = feats((3, 5), seed=1), feats()
    adapted = [a(s) for a, s in zip(criterion.adapters, student, strict=True)]
    torch.testing.assert_close(criterion(student, teacher), distill_loss(adapted, teacher, info_map="energy"))
    criterion(student, teacher).backward()
    assert all(p.grad.abs().sum() > 0 for p in criterion.parameters())


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


def test_a_dead_channel_is_not_blown_up() -> None:
    teacher = feats((4,))
    teacher[0][:, 1] = 7
    criterion = DistillLoss(adapters=[nn.Identity()], calibration_batches=1)
    criterion.calibrate(teacher)
    _, rstd = criterion.statistics[0].moments()
    assert rstd[1] <= 101 * teacher[0].var((0, 2, 3)).mean().rsqrt()
    criterion.calibrate([torch.zeros_like(teacher[0])])


def test_evaluation_neither_calibrates_nor_counts() -> None:
    criterion = DistillLoss([4, 8], [4, 8], warmup_steps=10).eval()
    with torch.no_grad():
        criterion(feats(seed=1), feats())
    assert criterion.statistics[0].count == 0
    assert criterion.loss_weight.step == 0


def test_warm_up_is_linear_and_stop_is_zero() -> None:
    criterion = DistillLoss(adapters=[nn.Identity()] * 2, info_map="energy", warmup_steps=4, stop_step=6)
    full = distill_loss(feats(seed=1), feats(), info_map="energy")
    ratios = [(criterion(feats(seed=1), feats()) / full).item() for _ in range(8)]
    assert ratios == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 0, 0])
    assert not criterion.level_losses.any()  # it is not even computed


def test_a_loss_that_has_stopped_is_zero_whatever_the_features_are() -> None:
    criterion = DistillLoss([4], [4], stop_step=1)
    criterion(feats((4,), seed=1), feats((4,)))
    student = (feats((4,), seed=1)[0] * math.inf).requires_grad_()
    loss = criterion([student], feats((4,)))
    loss.backward()
    assert loss.item() == 0
    leaves = (student, *criterion.parameters())
    assert all(x.grad is not None and not x.grad.any() for x in leaves)  # none without, as DDP expects


def test_a_compiled_loss_that_has_stopped_is_one_graph() -> None:
    criterion = DistillLoss([4], [4], stop_step=1)
    criterion(feats((4,), seed=1), feats((4,)))
    torch.compiler.reset()
    compiled = torch.compile(criterion, backend="aot_eager", fullgraph=True)
    assert compiled([x.requires_grad_() for x in feats((4,), seed=1)], feats((4,))) == 0


@pytest.mark.parametrize(("decay", "ratios"), [("linear", [0.5, 1, 1, 0.75, 0.5, 0.25, 0]), ("cosine", None)])
def test_decay_falls_from_the_end_of_the_warm_up_to_zero_at_the_stop(decay: str, ratios: list[float] | None) -> None:
    weight = LossWeight(warmup_steps=2, decay=decay, stop_step=6)
    found = [weight(torch.ones(())).item() for _ in range(7)]
    half = [0.5, 1, *((1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)), 0]
    assert found == pytest.approx(ratios or half)


def test_auto_weight_holds_the_loss_at_its_share_of_the_task_loss() -> None:
    criterion = DistillLoss([4, 8], [4, 8], weight="auto", share=0.5, calibration_batches=1)
    for k in range(40):
        scale = 10 ** (3 - 0.2 * k)  # the distillation loss falls by orders of magnitude, the task loss stays
        student = [x * scale for x in feats(seed=k)]
        loss = criterion(student, [x * scale for x in feats(seed=99)], task_loss=torch.tensor(6.0))
        assert loss.isfinite()
    criterion = DistillLoss([4, 8], [4, 8], weight="auto", share=0.5)
    losses = [criterion(feats(seed=k), feats(seed=99), task_loss=torch.tensor(6.0)).item() for k in range(100)]
    assert sum(losses[50:]) / 50 == pytest.approx(3.0, rel=0.05)


def test_auto_weight_is_averaged_and_not_differentiated() -> None:
    weight = LossWeight("auto", share=2.0)
    task, distill = torch.tensor(3.0, requires_grad=True), torch.tensor(1.5, requires_grad=True)
    assert weight(distill, task).item() == pytest.approx(4.0)
    assert not weight(distill, task).requires_grad
    assert weight(torch.tensor(3.0), 3.0).item() == pytest.approx(2 * 3 / 2)  # the third of three steps: plain means
    for _ in range(2000):
        factor = weight(torch.tensor(1.0), 5.0)
    assert factor.item() == pytest.approx(10, rel=1e-4)


def test_auto_weight_ignores_steps_that_overflowed_and_never_does() -> None:
    weight = LossWeight("auto")
    assert weight(torch.tensor(math.inf), 1.0).item() == 0
    assert weight(torch.tensor(2.0), 1.0).item() == pytest.approx(0.5)
    for distill, task in ((math.inf, 1.0), (math.nan, 1.0), (2.0, math.nan)):
        assert weight(torch.tensor(distill), task).item() == pytest.approx(0.5)
    assert LossWeight("auto")(torch.tensor(1.0), -1.0).item() == 0


@pytest.mark.parametrize("scale", [0.0, 1e-18])
def test_auto_weight_of_a_loss_near_zero_leaves_the_gradient_finite(scale: float) -> None:
    """A prior that is zero in the first batch, or features near zero; 65536 is where a gradient scaler starts."""
    criterion = DistillLoss(levels=1, adapters=[torch.nn.Identity()], info_map="uniform", weight="auto")
    (teacher,), (student,) = feats((4,)), feats((4,), seed=1)
    nowhere = [torch.zeros(len(teacher), *teacher.shape[2:])]
    for factor, prior in ((1.0, nowhere), (scale, None)):
        s = (student * factor).requires_grad_()
        (criterion([s], [teacher * factor], prior, task_loss=2.0) * 65536).backward()
        assert s.grad is not None
        assert s.grad.isfinite().all()
    assert criterion([student], [teacher], task_loss=2.0) > 0


def test_auto_weight_goes_on_from_its_state_and_looks_only_in_training() -> None:
    first = LossWeight("auto")
    for k in range(3):
        first(torch.tensor(1.0 + k), 2.0)
    second = LossWeight("auto")
    second.load_state_dict(first.state_dict())
    assert second.half().means.dtype == torch.float32
    before = second.eval().means.clone()
    second(torch.tensor(9.0), 1.0)
    assert second.means.equal(before)
    assert first(torch.tensor(5.0), 2.0) == second.train()(torch.tensor(5.0), 2.0)


@pytest.mark.parametrize(
    ("task_loss", "error", "message"),
    [
        (None, ValueError, 'task_loss: weight="auto" holds the distillation loss at a share of the task loss'),
        (torch.ones(3), ValueError, r"task_loss: expected a scalar, got shape \(3,\); sum its terms"),
        ("1", TypeError, "task_loss: expected a scalar tensor or a number, got a str"),
    ],
)
def test_auto_weight_wants_a_scalar_task_loss(task_loss: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DistillLoss([4], [4], weight="auto")(feats((4,), seed=1), feats((4,)), task_loss=task_loss)


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


def test_a_calibrated_loss_compiles_without_graph_break() -> None:
    criterion = DistillLoss([3, 5], [4, 8], calibration_batches=1, warmup_steps=3, weight="auto", share=0.5)
    student, teacher = feats((3, 5), seed=1), feats()
    criterion.calibrate(teacher)
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    for expected in (1 / 3, 2 / 3, 1, 1):
        loss = compiled(student, teacher, task_loss=torch.tensor(4.0))
        torch.testing.assert_close(loss, torch.tensor(2.0 * expected))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "student_channels and teacher_channels, or adapters, or levels"),
        ({"student_channels": [3]}, "both student_channels and teacher_channels"),
        ({"student_channels": [3], "teacher_channels": [4, 5]}, r"one length.*\[1, 2\]"),
        ({"levels": 2, "adapters": [nn.Identity()]}, r"\[1, 2\]"),
        ({"levels": 0}, "> 0"),
        ({"levels": 2, "weights": [1.0]}, "weights: expected 2 entries"),
        ({"levels": 1, "weights": [float("nan")]}, r"weights\[0\]: expected a finite number"),
        ({"levels": 1, "backend": "nothing"}, "backend: expected one of"),
        ({"levels": 1, "calibration_batches": 0}, "calibration_batches: expected an integer >= 1, got 0"),
        ({"levels": 1, "warmup_steps": 2.5}, "warmup_steps: expected an integer >= 0, got 2.5"),
        ({"levels": 1, "stop_step": -1}, "stop_step: expected an integer >= 0, got -1"),
        ({"levels": 1, "weight": "more"}, "weight: expected a finite number >= 0 or \"auto\", got 'more'"),
        ({"levels": 1, "weight": -1.0}, "weight: expected a finite number"),
        ({"levels": 1, "weight": "auto", "share": 0.0}, "share: expected a finite number > 0, of the task loss, got 0"),
        ({"levels": 1, "decay": "linear"}, "decay: expected a stop_step after the 0 steps of warm-up"),
        ({"levels": 1, "decay": "fast", "stop_step": 9}, "decay: expected one of linear, cosine or None, got 'fast'"),
        ({"student_channels": [3], "teacher_channels": [4], "adapters": [nn.Identity()]}, "adapters: expected no"),
        ({"levels": 2, "info_map": "nothing"}, "info_map: "),
        ({"levels": 2, "penalty": "nothing"}, "penalty: "),
        ({"levels": 2, "normalizer": "nothing"}, "normalizer: "),
        ({"levels": 2, "beta": -1}, "beta: "),
        ({"levels": 2, "warmup_steps": -1}, "warmup_steps: "),
    ],
)
def test_bad_options_are_a_clear_error(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistillLoss(**options)


def test_wrong_number_of_levels_is_a_clear_error() -> None:
    criterion = DistillLoss(levels=2)
    with pytest.raises(ValueError, match="student_feats: expected 2 levels, as this DistillLoss has, got 1"):
        criterion(feats((3,)), feats())
    with pytest.raises(TypeError, match=r"teacher_feats: .*one tensor"):
        criterion(feats(), feats()[0])
    with pytest.raises(TypeError, match=r"student_feats: .*got a dict; pass list\(student_feats.values\(\)\)"):
        criterion(dict(enumerate(feats())), feats())
    with pytest.raises(ValueError, match=r"teacher_feats\[1\]: expected 4 dimensions"):
        criterion(feats(), [feats()[0], feats()[1][0]])


def test_a_feature_of_another_width_than_its_adapter_takes_is_a_clear_error() -> None:
    with pytest.raises(ValueError, match=r"student_feats\[1\]: expected 5 channels, as its adapter takes, got 6"):
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
    """Each of two ranks has half the batch; DDP would average their gradients."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )  # fmt: skip
    half = slice(0, 1) if rank == 0 else slice(1, 4)
    student = [x[half].clone().requires_grad_() for x in feats(seed=1, n=4)]
    teacher = [x[half] for x in feats(n=4)]
    loss = distill_loss(student, teacher, info_map="attention", normalizer="map_all_ranks", prior=prior(half))
    gradients = torch.autograd.grad(loss, student)
    torch.save((loss.detach(), gradients), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def prior(images: slice) -> list[Tensor]:
    g = torch.Generator().manual_seed(3)
    return [torch.rand(4, *x.shape[2:], generator=g)[images] for x in feats(n=4)]


def test_map_all_ranks_averages_to_the_whole_batch(tmp_path: Path) -> None:
    spawn(_rank, args=(str(tmp_path),), nprocs=2)
    student = [x.requires_grad_() for x in feats(seed=1, n=4)]
    whole = distill_loss(student, feats(n=4), info_map="attention", normalizer="map", prior=prior(slice(4)))
    expected = torch.autograd.grad(whole, student)
    (loss0, gradients0), (loss1, gradients1) = (torch.load(tmp_path / f"{r}.pt") for r in range(2))
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
