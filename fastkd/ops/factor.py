"""The op that updates the factor of the distillation loss: its schema, and its formula in plain PyTorch.

    factor = schedule(step) * weight,    weight given, or = share * mean(abs(task loss)) / mean(abs(distillation loss))

where the means are moving averages over about 50 steps. ``csrc/factor.h`` has the same formula in C++. Nothing here
waits for the device.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastkd.ops.schema import define_small

MAX_AUTO_WEIGHT = 1e12  # so that the gradient of features near zero does not overflow
DECAYS = (None, "linear", "cosine")  # the index is the op's code
AUTO = -1.0  # the op's code for weight="auto"
_EMA_STEPS = 49  # the decay of the averages is min(1, 49 / n), n being the decayed number of steps, which reaches 50

UPDATE_FACTOR = """(Tensor(a!) factor, Tensor(b!) averages, Tensor(c!) step, Tensor losses, Tensor task_loss,
    float weight, float share, int warmup_steps, int decay, int stop_step, int advance) -> ()"""


@torch.no_grad()
def plain_update_factor(
    factor: Tensor,
    averages: Tensor,
    step: Tensor,
    losses: Tensor,
    task_loss: Tensor,
    weight: float,
    share: float,
    warmup_steps: int,
    decay: int,
    stop_step: int,
    advance: int,
) -> None:
    """Add a step's losses to the averages, count the step and set the factor, all in place.

    Args:
        factor: () float32; set to the factor at ``step`` after ``step`` was advanced.
        averages: (3,) float32, decayed sums over steps of 1, abs(task loss) and abs(distillation loss). They are of
            absolute values, as a loss may be negative (a log-likelihood) or change its sign. A step whose losses are
            not finite is left out.
        step: () int64, advanced by ``advance``.
        losses: (L,) losses of the levels, without the factor; empty: the averages do not change.
        task_loss: one element; needed with ``losses`` and a balanced weight.
        weight: the weight; negative: balanced, so that the loss is ``share`` times the task loss, in absolute value.
        share: the ratio of distillation and task loss, for a balanced weight.
        warmup_steps: number of steps over which the factor rises linearly.
        decay: 0 none, 1 linear, 2 cosine, from the end of the warm-up to ``stop_step``.
        stop_step: the factor is 0 from this step on; negative: never.
        advance: number to add to ``step``.
    """
    if weight < 0 and losses.numel():
        values = torch.stack([losses.new_ones(()), task_loss.reshape(()), losses.sum(dtype=torch.float64)])
        values = values.double().abs()
        finite = values.float().isfinite().all()
        keep = (_EMA_STEPS / averages[0].double()).clamp(max=1)  # n = 0 gives infinity, clamped to 1
        averages.copy_(torch.where(finite, averages * keep + values, averages.double()))
    step.add_(advance)
    full = _balanced(averages.double(), share) if weight < 0 else weight
    factor.copy_(_ramp(step, warmup_steps, decay, stop_step) * full)


def _balanced(averages: Tensor, share: float) -> Tensor:
    balanced = (share * averages[1] / averages[2]).clamp(max=MAX_AUTO_WEIGHT)
    return torch.where(averages[2] > 0, balanced, 0)  # a distillation loss of zero: 0, so that gradients stay finite


def _ramp(step: Tensor, warmup_steps: int, decay: int, stop_step: int) -> Tensor:
    """Return the schedule at ``step``, in [0, 1]: warm-up, decay and stop."""
    at = step.double()
    ramp = ((at + 1) / max(warmup_steps, 1)).clamp(max=1)
    if stop_step < 0:
        return ramp
    if decay:
        past = ((at - warmup_steps) / max(stop_step - warmup_steps, 1)).clamp(0, 1)
        ramp = ramp * (1 - past if DECAYS[decay] == "linear" else (1 + torch.cos(math.pi * past)) / 2)
    return ramp * (step < stop_step)


def _fake(*_: Any) -> None:
    return None


define_small("update_factor", UPDATE_FACTOR, _fake, plain_update_factor)
