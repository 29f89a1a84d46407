"""The factor of the distillation loss: a weight, given or balanced against the task loss, times its schedule."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from fastkd.ops.arguments import (
    LARGEST,
    require_dense,
    require_int,
    require_known,
    require_number,
    require_positive,
    require_state,
)
from fastkd.ops.backends import small_op
from fastkd.ops.factor import AUTO, DECAYS
from fastkd.ranks import sum_over_ranks, world_size
from fastkd.statistics import KeepsPrecision


class LossWeight(KeepsPrecision):
    """The factor of the distillation loss at each training step; the arguments are those of ``DistillLoss``.

    The factor of a step is known before its forward, as it follows from the averages of the steps *before* it (about
    50). So the kernels multiply loss and gradient with it, and autograd has nothing to do. Only the very first step of
    ``"auto"`` has no average yet and uses its own losses; where these are not finite, the factor is 0 until the losses
    of a step are finite. One op per step (``fastkd::update_factor``) computes everything on the device of the loss,
    without waiting for it.
    """

    step: Tensor  # training forwards so far
    averages: Tensor  # decayed sums over steps of 1, abs(task loss) and abs(distillation loss)
    factor: Tensor  # of the next step: the schedule times the weight, given or balanced by the averages

    def __init__(
        self,
        weight: float | str = 1.0,
        share: float = 1.0,
        warmup_steps: int = 0,
        decay: str | None = None,
        stop_step: int | None = None,
    ) -> None:
        super().__init__()
        self.weight, self.share = _checked_weight(weight), require_positive("share", share)
        self.warmup_steps, self.decay = require_int("warmup_steps", warmup_steps, 0), decay
        self.stop_step = None if stop_step is None else require_int("stop_step", stop_step, 0)
        self._require_decay()
        self._steps = 0  # ``step`` as counted on the host, without reading it from the device
        self.loads = 0  # how often a state was loaded
        self._has_average = False  # whether the averages contain a step, without reading them from the device
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("averages", torch.zeros(3, dtype=torch.float32))
        self.register_buffer("factor", torch.zeros((), dtype=torch.float32))
        self._update(self.factor, self.averages, self.step, None, None, advance=0)

    @property
    def is_auto(self) -> bool:
        """Whether the weight is balanced against the task loss."""
        return isinstance(self.weight, str)

    @property
    def stopped(self) -> bool:
        """Whether ``stop_step`` is reached. Steps that a compiled graph has counted are not known here."""
        return self.stop_step is not None and self._steps >= self.stop_step

    @property
    def is_known(self) -> bool:
        """Whether ``factor`` is known before this step's losses are: always, except in the first step of "auto"."""
        return self._has_average or not self.is_auto

    @property
    def current_factor(self) -> Tensor:
        """``factor``; in a compiled graph computed again, because its backward would read the next step's factor."""
        return self.at(self.step) if torch.compiler.is_compiling() else self.factor

    def task_value(self, task_loss: Tensor | float | None, device: torch.device) -> Tensor | None:
        """Return the task loss as one detached float32 element on the device; None where the weight does not need it.

        Raises:
            ValueError: no task loss where it is needed, or not a scalar.
            TypeError: neither a real tensor nor a number.
        """
        return _task_value(task_loss, device) if self.is_auto else None

    def balanced(self, losses: Tensor, task: Tensor | None, *, all_ranks: bool = True) -> Tensor:
        """Return the factor after these losses have entered the averages; neither averages nor step are changed."""
        factor, averages, step = (x.clone() for x in (self.factor, self.averages, self.step))
        terms = self._over_ranks(losses, task) if all_ranks else (losses, task)
        self._update(factor, averages, step, *terms, advance=0)
        return factor

    def now(self, losses: Tensor, task: Tensor | None) -> tuple[float, float]:
        """Return the factor of a training step with these losses, and the share of it that warm-up and decay leave.

        For inspection by one process: this waits for the device, but for no other rank.
        """
        ramp = LossWeight(1.0, 1.0, self.warmup_steps, self.decay, self.stop_step).to(self.step.device).at(self.step)
        factor = self.factor if self.is_known else self.balanced(losses, task, all_ranks=False)
        return float(factor), float(ramp)

    def at(self, step: Tensor) -> Tensor:
        """Return the factor at ``step``, an int64 scalar tensor, with the averages as they are."""
        factor = self.factor.clone()
        self._update(factor, self.averages.clone(), step.clone(), None, None, advance=0)
        return factor

    def count(self, losses: Tensor, task: Tensor | None) -> None:
        """Add the losses of a training step to the averages, count it, and set the factor of the next step."""
        self._update(self.factor, self.averages, self.step, *self._over_ranks(losses, task), advance=1)
        if not torch.compiler.is_compiling():
            self._steps += 1
        self._has_average = self.is_auto

    def skip(self) -> None:
        """Count a training step without losses."""
        self._update(self.factor, self.averages, self.step, None, None, advance=1)
        if not torch.compiler.is_compiling():
            self._steps += 1

    def full(self) -> LossWeight:
        """Return a copy without schedule and averages, for one process to compute the loss at its full weight."""
        return LossWeight(self.weight, self.share).to(self.step.device).eval()

    def _over_ranks(self, losses: Tensor, task: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Return losses and task loss averaged over all ranks in training, so that all ranks get the same factor."""
        if task is None:
            return None, None
        if not self.training or world_size() == 1:
            return losses, task
        values = torch.stack([task.reshape(()).float(), losses.sum().float()])
        values = values / sum_over_ranks(values)
        return values[1:], values[:1]

    @torch.no_grad()
    def _update(
        self,
        factor: Tensor,
        averages: Tensor,
        step: Tensor,
        losses: Tensor | None,
        task: Tensor | None,
        *,
        advance: int,
    ) -> None:
        nothing = averages[:0]
        small_op("update_factor", factor.device)(
            *(factor, averages, step, nothing if losses is None else losses, nothing if task is None else task),
            *(AUTO if isinstance(self.weight, str) else self.weight, self.share, self.warmup_steps),
            *(DECAYS.index(self.decay), -1 if self.stop_step is None else self.stop_step, advance),
        )

    def get_extra_state(self) -> dict[str, Any]:
        return {"steps": self._steps, "has_average": self._has_average}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self._steps, self._has_average = require_state("loss_weight", state, "steps", "has_average")
        self.loads += 1
        # weight and schedule may differ from those of the run that was saved
        self._update(self.factor, self.averages, self.step, None, None, advance=0)

    def _require_decay(self) -> None:
        require_known("decay", self.decay, DECAYS)
        if self.decay is not None and (self.stop_step is None or self.stop_step <= self.warmup_steps):
            raise ValueError(
                f"decay: expected a stop_step after the {self.warmup_steps} steps of warm-up, where the decay ends "
                f"at zero, got {self.stop_step}"
            )


def weight_of(text: str) -> float | str:
    """Return the ``weight`` that a command-line argument means: ``"auto"`` or a number."""
    return text if text == "auto" else float(text)


def _task_value(task_loss: Tensor | float | None, device: torch.device) -> Tensor:
    if task_loss is None:
        raise ValueError(
            'task_loss: expected the task loss, as weight="auto" keeps the distillation loss at a share of it, got '
            "None; pass loss(..., task_loss=task), or a number as weight"
        )
    if isinstance(task_loss, Tensor):
        require_dense("task_loss", task_loss)
        if task_loss.numel() != 1:
            raise ValueError(f"task_loss: expected a scalar, got shape {tuple(task_loss.shape)}; sum its terms")
        if task_loss.is_complex():
            raise TypeError(f"task_loss: expected a real number, got {task_loss.dtype}")
        return task_loss.detach().to(device, torch.float32, non_blocking=True)
    if isinstance(task_loss, bool) or not isinstance(task_loss, Real):
        raise TypeError(f"task_loss: expected a scalar tensor or a number, got a {type(task_loss).__name__}")
    value = float(task_loss) if abs(task_loss) <= LARGEST else math.inf  # a step that is not finite enters no average
    return torch.tensor(value, dtype=torch.float32).to(device, non_blocking=True)


def _checked_weight(weight: Any) -> float | str:
    if isinstance(weight, str) and weight == "auto":
        return weight
    return require_number("weight", weight, 'a finite number >= 0 that float32 can hold or "auto"', 0)
