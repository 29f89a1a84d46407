"""The factor of DistillLoss: a constant or balanced weight, and its schedule."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastkd import DistillLoss, InfoMap


def criterion(**options: Any) -> DistillLoss:
    """Return a criterion whose loss, without its weight, is the square of a number."""
    return DistillLoss(adapters=[nn.Identity()], info_map=InfoMap("uniform", "none"), **options)


def step(criterion: DistillLoss, distill: float = 1.0, task: Any = 1.0) -> float:
    """Return the factor of a forward with these losses, by which loss and gradient have been multiplied."""
    student = torch.full((1, 1, 1, 1), math.sqrt(distill)).requires_grad_()
    loss = criterion([student], [torch.zeros(1, 1, 1, 1)], task_loss=task)
    (gradient,) = torch.autograd.grad(3 * loss, student)
    torch.testing.assert_close(gradient, (6 * loss / student).detach().nan_to_num())
    assert criterion.loss_weight.stopped or criterion.level_losses.item() == pytest.approx(distill)
    return loss.item() / distill if distill else math.nan


def by_hand(losses: list[tuple[float, float]], share: float) -> list[float]:
    """Return the first step's own ratio; then that of the means before the step, over 50 steps at most."""
    n = task = distill = 0.0
    found = []
    for d, t in losses:
        found.append(share * task / distill if n else share * t / d)
        keep = min(1.0, 49 / n) if n else 0.0
        n, task, distill = n * keep + 1, task * keep + t, distill * keep + d
    return found


def test_auto_balances_by_the_averages_before_the_step_and_the_first_by_itself() -> None:
    auto = criterion(weight="auto", share=2.0)
    assert step(auto, 1.5, 3.0) == pytest.approx(4)
    assert step(auto, 100.0, 3.0) == pytest.approx(4)
    assert step(auto, 1.0, 1.0) == pytest.approx(2 * 6 / 101.5)

    auto, losses = criterion(weight="auto", share=0.5), [(10 ** (2 - 0.03 * k), 3 + math.sin(k)) for k in range(150)]
    assert [step(auto, *x) for x in losses] == pytest.approx(by_hand(losses, 0.5), rel=1e-3)


def test_auto_holds_the_loss_at_its_share_of_the_task_loss() -> None:
    auto = criterion(weight="auto", share=0.5)
    losses = [d * step(auto, d, 6.0) for d in (1 + 0.5 * math.cos(k) for k in range(100))]
    assert sum(losses[50:]) / 50 == pytest.approx(3.0, rel=0.05)


def test_a_negative_task_loss_counts_as_its_magnitude() -> None:
    auto = criterion(weight="auto", share=0.5)
    assert [step(auto, 2.0, x) for x in (-6.0, 6.0, -6)] == pytest.approx([1.5] * 3)
    assert step(criterion(weight="auto").eval(), 2.0, torch.tensor(-6.0)) == pytest.approx(3)


def test_the_largest_float32_is_still_a_task_loss() -> None:
    assert step(criterion(weight="auto"), 1.0, torch.finfo(torch.float32).max) == pytest.approx(1e12)


def test_nothing_flows_into_the_task_loss() -> None:
    auto, task = criterion(weight="auto"), torch.tensor(3.0, requires_grad=True)
    for _ in range(2):
        student = torch.ones(1, 1, 1, 1, requires_grad=True)
        auto([student], [torch.zeros(1, 1, 1, 1)], task_loss=task).backward()
    assert task.grad is None
    assert step(auto, 1.0, 3.0) == step(auto, 1.0, 3)  # a Python number is accepted too


@pytest.mark.parametrize(
    ("options", "ramp"),
    [
        ({}, [1] * 8),
        ({"warmup_steps": 4}, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
        ({"warmup_steps": 4, "stop_step": 6}, [0.25, 0.5, 0.75, 1, 1, 1, 0, 0]),
        ({"warmup_steps": 2, "decay": "linear", "stop_step": 6}, [0.5, 1, 1, 0.75, 0.5, 0.25, 0, 0]),
        (
            {"warmup_steps": 2, "decay": "cosine", "stop_step": 6},
            [0.5, 1, *((1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)), 0, 0],
        ),
    ],
)
@pytest.mark.parametrize(("weight", "full"), [(1.0, 1.0), (0.3, 0.3), ("auto", 2.0)])
def test_schedules(options: dict[str, Any], ramp: list[float], weight: Any, full: float) -> None:
    scheduled = criterion(weight=weight, share=0.5, **options)
    assert [step(scheduled, 1.0, 4.0) for _ in range(8)] == pytest.approx([full * x for x in ramp])
    assert scheduled.loss_weight.step == (options.get("stop_step") or 8)


def test_a_step_that_is_not_finite_counts_for_nothing() -> None:
    for begins_well in (True, False):
        auto = criterion(weight="auto")
        if begins_well:
            step(auto, 2.0, 1.0)
        for value, task in ((math.inf, 1.0), (math.nan, 1.0), (2.0, math.nan), (2.0, math.inf), (2.0, 10**400)):
            auto([torch.full((1, 1, 1, 1), value, requires_grad=True)], [torch.zeros(1, 1, 1, 1)], task_loss=task)
        assert auto.loss_weight.factor.item() == pytest.approx(0.5 if begins_well else 0)
        step(auto, 2.0, 1.0)
        assert step(auto, 2.0, 1.0) == pytest.approx(0.5)


@pytest.mark.parametrize("scale", [0.0, 1e-18])
def test_a_loss_near_zero_leaves_the_gradient_finite(scale: float) -> None:
    """The prior is zero in the first batch, or features are near zero; a gradient scaler starts at 65536."""
    auto, teacher = criterion(weight="auto"), torch.randn(2, 4, 3, 3)
    for factor, prior in ((1.0, [torch.zeros(2, 3, 3)]), (scale, None), (scale, None)):
        student = (torch.randn(2, 4, 3, 3) * factor).requires_grad_()
        (auto([student], [teacher * factor], prior, task_loss=2.0) * 65536).backward()
        assert student.grad is not None
        assert student.grad.isfinite().all()


# ---- state


@pytest.mark.parametrize("options", [{"weight": "auto"}, {"weight": 2.0}, {"weight": "auto", "decay": "cosine"}])
def test_a_resumed_run_has_the_same_factors(options: dict[str, Any], tmp_path: Path) -> None:
    options = {"warmup_steps": 3, "stop_step": 9, **options}
    losses = [(1.0 + k, 9.0 - k) for k in range(12)]
    whole = criterion(**options)
    expected = [step(whole, *x) for x in losses]
    for at in (0, 1, 2, 5, 10):
        first, second = criterion(**options), criterion(**options)
        for x in losses[:at]:
            step(first, *x)
        torch.save(first.state_dict(), tmp_path / "loss.pt")
        second.load_state_dict(torch.load(tmp_path / "loss.pt", weights_only=True))
        assert [step(second, *x) for x in losses[at:]] == pytest.approx(expected[at:])


def test_what_is_changed_on_resume_takes_effect_at_once() -> None:
    trained = criterion(weight=1.0)
    balanced = criterion(weight="auto", share=1.0)
    for c in (trained, balanced):
        for _ in range(4):
            step(c, 2.0, 6.0)
    for source, options, expected in (
        (trained, {"weight": 0.25}, 0.25),
        (trained, {"weight": 1.0, "warmup_steps": 10}, 0.5),
        (trained, {"weight": 1.0, "stop_step": 4}, 0.0),
        (trained, {"weight": "auto", "share": 2.0}, 2 * 1.0 / 8.0),  # by its own losses, as there are no earlier ones
        (balanced, {"weight": "auto", "share": 0.5}, 1.5),
        (balanced, {"weight": 0.25}, 0.25),
    ):
        changed = criterion(**options)
        changed.load_state_dict(source.state_dict())
        assert step(changed, 8.0, 1.0) == pytest.approx(expected), options


def test_evaluation_changes_nothing() -> None:
    for weight in (1.0, "auto"):
        c = criterion(weight=weight, warmup_steps=10)
        for _ in range(3):
            before = {name: x.clone() for name, x in c.loss_weight.named_buffers()}
            c.eval()
            factor = step(c, 5.0, 1.0)
            assert all(torch.equal(x, before[name]) for name, x in c.loss_weight.named_buffers())
            assert factor == pytest.approx(c.loss_weight.factor.item() or 0.1 / 5)  # without a step, of its own losses
            c.train()
            step(c, 2.0, 3.0)


def test_the_state_stays_as_precise_as_it_is() -> None:
    half = criterion(weight="auto").half()
    assert all(x.dtype in (torch.float32, torch.int64) for x in half.loss_weight.buffers())


@pytest.mark.parametrize(
    ("task_loss", "error", "message"),
    [
        (None, ValueError, 'task_loss: expected the task loss, as weight="auto" keeps the distillation loss'),
        (torch.ones(3), ValueError, r"task_loss: expected a scalar, got shape \(3,\); sum its terms"),
        (torch.ones(1).to_sparse(), TypeError, "task_loss: expected a dense tensor, got layout torch.sparse_coo"),
        ("1", TypeError, "task_loss: expected a scalar tensor or a number, got a str"),
    ],
)
def test_auto_wants_a_scalar_task_loss(task_loss: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        step(criterion(weight="auto"), 1.0, task_loss)
