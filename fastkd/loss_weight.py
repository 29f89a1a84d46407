"""What the summed levels are multiplied with: a weight, given or balanced against the task loss, and its schedule."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.ranks import sum_over_ranks

DECAYS = ("linear", "cosine")
MOST = 1e12  # that balancing multiplies with: of features near zero the gradient must not overflow
MEMORY = 0.98  # share that the moving averages keep of themselves: they look back over some 50 steps


class KeepsPrecision(nn.Module):
    """Buffers that stay as precise as they are, whatever dtype the model around them is cast to."""

    def _apply(self, fn: Any, recurse: bool = True) -> KeepsPrecision:
        kept = dict(self.named_buffers())
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in self.named_buffers():
            if value.dtype != kept[name].dtype:
                setattr(self, name, kept[name].to(value.device))
        return self


class LossWeight(KeepsPrecision):
    """Factor of the distillation loss at each training step; arguments are those of ``DistillLoss``.

    Everything is computed where the loss is: no host sync, and the same graph at every step.
    """

    step: Tensor  # training forwards so far
    count: Tensor  # of those, the ones that the averages have seen
    means: Tensor  # moving averages of the task loss and of the distillation loss
    schedule: Tensor  # warm-up, decay and stop at the last forward, 1 to 0

    def __init__(
        self,
        weight: float | str = 1.0,
        share: float = 1.0,
        warmup_steps: int = 0,
        decay: str | None = None,
        stop_step: int | None = None,
    ) -> None:
        super().__init__()
        _require_weight(weight, share)
        _require_schedule(warmup_steps, decay, stop_step)
        self.weight, self.share = weight, share
        self.warmup_steps, self.decay, self.stop_step = warmup_steps, decay, stop_step
        self._steps = 0  # what ``step`` is, as far as Python knows without asking the device
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("means", torch.zeros(2))

    @property
    def stopped(self) -> bool:
        """Whether the loss is zero for good. Steps of a compiled graph are not known here."""
        return self.stop_step is not None and self._steps >= self.stop_step

    def forward(self, distill_loss: Tensor, task_loss: Tensor | float | None = None) -> Tensor:
        """The factor, a scalar tensor without gradient.

        Args:
            distill_loss: the sum over levels.
            task_loss: what it is balanced against; a scalar, looked at for ``weight="auto"`` only.
        """
        self.schedule = self._schedule()
        if self.training:
            self.step += 1
            if not torch.compiler.is_compiling():
                self._steps += 1
        if isinstance(self.weight, str):
            return self.schedule * self._balance(distill_loss, task_loss)
        return self.schedule * self.weight

    def full(self) -> LossWeight:
        """One without schedule and memory, for a look at the loss as it is at its full weight, by one process."""
        return LossWeight(self.weight, self.share).to(self.means.device).eval()

    def _schedule(self) -> Tensor:
        """Warm-up, decay and stop, 1 to 0."""
        ramp = ((self.step + 1) / max(self.warmup_steps, 1)).clamp(max=1)
        if self.stop_step is None:
            return ramp
        if self.decay is not None:
            length = max(self.stop_step - self.warmup_steps, 1)
            past = ((self.step - self.warmup_steps) / length).clamp(0, 1)
            ramp = ramp * (1 - past if self.decay == "linear" else (1 + torch.cos(math.pi * past)) / 2)
        return ramp * (self.step < self.stop_step)

    @torch.no_grad()
    def _balance(self, distill_loss: Tensor, task_loss: Tensor | float | None) -> Tensor:
        values = torch.stack([_task(task_loss, distill_loss), distill_loss.detach().to(self.means.dtype)])
        if self.training:
            values = values / sum_over_ranks(values)  # one factor for all ranks
        finite = values.isfinite().all()  # a step that overflowed counts for nothing
        keep = torch.where(finite, (self.count / (self.count + 1)).clamp(max=MEMORY), 1)  # a plain mean at first
        means = torch.where(finite, self.means * keep + values * (1 - keep), self.means)
        if self.training:
            self.means.copy_(means)
            self.count += finite
        factor = self.share * means[0] / means[1]
        return torch.where(means[1] > 0, factor.clamp(0, MOST), 0)  # times a loss of zero, whose gradient stays finite

    def get_extra_state(self) -> dict[str, int]:
        return {"steps": self._steps}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self._steps = state["steps"]


def weight_of(text: str) -> float | str:
    """A ``weight`` from a command line."""
    return text if text == "auto" else float(text)


def _task(task_loss: Tensor | float | None, distill_loss: Tensor) -> Tensor:
    """The task loss as a float32 scalar beside the distillation loss."""
    if task_loss is None:
        raise ValueError(
            'task_loss: weight="auto" holds the distillation loss at a share of the task loss, so it needs one, got '
            "None; pass loss(..., task_loss=task), or a number as weight"
        )
    if isinstance(task_loss, Tensor):
        if task_loss.numel() != 1:
            raise ValueError(f"task_loss: expected a scalar, got shape {tuple(task_loss.shape)}; sum its terms")
        return task_loss.detach().reshape(()).to(distill_loss.device, torch.float32, non_blocking=True)
    if isinstance(task_loss, bool) or not isinstance(task_loss, Real):
        raise TypeError(f"task_loss: expected a scalar tensor or a number, got a {type(task_loss).__name__}")
    return torch.tensor(float(task_loss)).to(distill_loss.device, non_blocking=True)


def _require_weight(weight: float | str, share: float) -> None:
    if weight != "auto" and (isinstance(weight, (bool, str)) or not isinstance(weight, Real) or not _finite(weight)):
        raise ValueError(f'weight: expected a finite number >= 0 or "auto", got {weight!r}')
    if isinstance(share, bool) or not isinstance(share, Real) or not _finite(share) or not share:
        raise ValueError(f"share: expected a finite number > 0, of the task loss, got {share!r}")


def _finite(number: Real) -> bool:
    return 0 <= float(number) < math.inf


def _require_schedule(warmup_steps: int, decay: str | None, stop_step: int | None) -> None:
    for name, value in (("warmup_steps", warmup_steps), ("stop_step", 0 if stop_step is None else stop_step)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"{name}: expected an integer >= 0, got {value!r}")
    if decay is not None and decay not in DECAYS:
        raise ValueError(f"decay: expected one of {', '.join(DECAYS)} or None, got {decay!r}")
    if decay is not None and (stop_step is None or stop_step <= warmup_steps):
        raise ValueError(
            f"decay: expected a stop_step after the {warmup_steps} steps of warm-up, at which the loss has become "
            f"zero, got {stop_step}"
        )
