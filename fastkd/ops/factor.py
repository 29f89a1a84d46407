"""What the distillation loss is multiplied with, as one op: its schema, and the formulas in plain PyTorch.

The factor of a step is ``schedule * weight``; the weight is given, or balances the loss against the task loss by moving
averages. ``csrc/factor.h`` has the same in C++. Nothing here waits for the device.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastkd.ops.schema import define_small

MAX_AUTO_WEIGHT = 1e12  # of features near zero the gradient must not overflow
DECAYS = (None, "linear", "cosine")  # by the op's codes
AUTO = -1.0  # the op's code of weight="auto"
_MEMORY = 49  # of n, the number of steps in the averages: n = 50 keeps 49/50, they look back over some 50 steps

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
    """Look at a step's losses, count the step and set the factor, all in place.

    Args:
        factor: () float32, set to the factor at ``step`` after it advanced.
        averages: (3,) float32: n, sum of abs(task loss), sum of abs(distillation loss), all decayed. Of magnitudes: a
            loss may be negative, as a likelihood's, or change its sign. A step that is not finite counts for nothing.
        step: () int64, advanced by ``advance``.
        losses: (L,) of the levels, without the factor; empty: the averages stay.
        task_loss: one element; needed where there are losses and the weight is balanced.
        weight: negative: balanced, such that the loss is ``share`` of the task loss, in magnitude.
        decay: 0 none, 1 linear, 2 cosine, from the end of the warm-up to ``stop_step``.
        stop_step: the factor is 0 from there on; negative: never.
    """
    if weight < 0 and losses.numel():
        values = torch.stack([losses.new_ones(()), task_loss.reshape(()), losses.sum(dtype=torch.float64)])
        values = values.double().abs()
        finite = values.float().isfinite().all()
        keep = (_MEMORY / averages[0].double()).clamp(max=1)  # n = 0: infinity, 1
        averages.copy_(torch.where(finite, averages * keep + values, averages.double()))
    step.add_(advance)
    full = _balanced(averages.double(), share) if weight < 0 else weight
    factor.copy_(_ramp(step, warmup_steps, decay, stop_step) * full)


def _balanced(averages: Tensor, share: float) -> Tensor:
    balanced = (share * averages[1] / averages[2]).clamp(max=MAX_AUTO_WEIGHT)
    return torch.where(averages[2] > 0, balanced, 0)  # times a loss of zero, whose gradient stays finite


def _ramp(step: Tensor, warmup_steps: int, decay: int, stop_step: int) -> Tensor:
    """Warm-up, decay and stop, 1 to 0."""
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
