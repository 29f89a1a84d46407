"""Is distillation really on? The single checks of ``Distiller.check``, and their report."""

from __future__ import annotations

import ctypes
import hashlib
import math
import textwrap
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.hooks import bare_name
from fastkd.loss import DistillLoss

SHARE = (0.01, 0.99)  # of the total loss: outside, one of the two terms hardly counts
SCALES = ("weight", "running_var")
SHIFTS = ("bias", "running_mean")


@dataclass(frozen=True)
class Check:
    """One thing that ``Distiller.check`` looked at: ``ok`` is None where it could not be known."""

    name: str
    ok: bool | None
    message: str


@dataclass(frozen=True)
class Report:
    """What ``Distiller.check`` found; ``str(report)`` is a table."""

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """False if any check failed; what is not known does not count."""
        return all(x.ok is not False for x in self.checks)

    def __str__(self) -> str:
        words = {True: "ok", False: "FAIL", None: "?"}
        width = max(len(x.name) for x in self.checks)
        lines = (f"{words[x.ok]:<5} {x.name:<{width}}  {x.message}" for x in self.checks)
        indent = " " * (6 + width + 2)
        return "\n".join(textwrap.fill(line, 110, subsequent_indent=indent, break_long_words=False) for line in lines)


def fingerprint(weights: nn.Module | Mapping[str, Tensor]) -> str:
    """Digest of a model's or state dict's names, dtypes, shapes and values: 16 hexadecimal digits of a SHA-256.

    ``distiller.check(teacher_fingerprint=fastkd.fingerprint(torch.load(path)))`` proves that the teacher has the file's
    weights. Wrappers' prefixes (``module.``, ``_orig_mod.``) don't count.
    """
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    digest = hashlib.sha256()
    for name, value in sorted((bare_name(name), value) for name, value in state.items() if isinstance(value, Tensor)):
        value = value.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(ctypes.string_at(value.data_ptr(), value.nbytes))  # numpy is not required
    return digest.hexdigest()[:16]


def check_trained(teacher: nn.Module, expected: str | None, ran: Container[nn.Module] | None = None) -> Check:
    """Compares with the expected weights; else looks for layers that still are as a constructor leaves them.

    Args:
        ran: modules that ran in a forward of the teacher: one that no forward uses may be as it was. None: not known.
    """
    name = "teacher trained"
    if expected is not None:
        found = fingerprint(teacher)
        same = f"has the expected weights, fingerprint {found}"
        return Check(name, found == expected, same if found == expected else f"expected {expected}, got {found}")
    layers = {m: bare_name(n) for n, m in teacher.named_modules() if _looks_initial(m) is not None}
    initial = initial_layers(teacher)
    if len(initial) == len(layers):
        ran = None  # none of them was ever trained, whichever are used
    fresh = [layers[m] for m in initial if ran is None or m in ran]
    if not layers:
        return Check(name, None, "not known: no layer whose initial weights can be told; pass teacher_fingerprint")
    if fresh:
        some = ", ".join(fresh[:3]) + (", ..." if len(fresh) > 3 else "")
        message = (
            f"{len(fresh)} of {len(layers)} layers look as initialised ({some}): was a checkpoint loaded, all of it?"
        )
        if ran is None and 2 * len(fresh) < len(layers):
            return Check(name, None, f"{message} Pass images to see whether they are used at all")
        return Check(name, False, message)
    unused = f"; {len(initial)} are, which no forward uses" if initial else ""
    return Check(name, True, f"none of {len(layers)} normalisation layers is as initialised{unused}")


def initial_layers(model: nn.Module) -> list[nn.Module]:
    """The normalisation layers that look as a constructor leaves them."""
    return [module for module in model.modules() if _looks_initial(module)]


def _looks_initial(module: nn.Module) -> bool | None:
    """Whether a normalisation layer has scale 1, shift 0 and no statistics, which any training changes; else None."""
    if not isinstance(module, (nn.GroupNorm, nn.LayerNorm)) and not hasattr(module, "running_mean"):
        return None
    ones = [x for x in (getattr(module, n, None) for n in SCALES) if isinstance(x, Tensor)]
    zeros = [x for x in (getattr(module, n, None) for n in SHIFTS) if isinstance(x, Tensor)]
    if not ones + zeros:
        return None
    return all(bool((x == 1).all()) for x in ones) and all(bool((x == 0).all()) for x in zeros)


def check_frozen(teacher: nn.Module) -> Check:
    training = sum(module.training for module in teacher.modules())
    learning = sum(p.requires_grad for p in teacher.parameters())
    if training or learning:
        message = f"{training} modules in training mode, {learning} parameters that require grad; loss() resets them, "
        return Check("teacher frozen", False, message + "yet keep the teacher out of what you call .train() on")
    return Check("teacher frozen", True, "in eval mode, no parameter requires grad")


def check_weight(criterion: DistillLoss) -> Check:
    levels = criterion.options.weights or (1.0,) * len(criterion.adapters)
    if criterion.loss_weight.weight == 0 or not any(levels):
        which = "weight is 0" if criterion.loss_weight.weight == 0 else "weights are 0 at every level"
        return Check("loss weight", False, f'{which}, so the loss is zero: choose another, or weight="auto"')
    off = levels.count(0)
    return Check("loss weight", True, f"not zero, but for {off} of {len(levels)} levels" if off else "not zero")


def check_share(losses: Tensor, task_loss: float | Tensor | None, criterion: DistillLoss) -> Check:
    """What a training step adds to the task loss now, by the averages, warm-up and decay that it has reached."""
    weight = criterion.loss_weight
    task = 1.0 if task_loss is None else float(task_loss.detach() if isinstance(task_loss, Tensor) else task_loss)
    factor, ramp = weight.now(losses, losses.new_tensor(task))
    loss = float(losses.sum()) * factor
    if not math.isfinite(loss):
        return Check("loss share", False, f"expected a finite distillation loss, got {loss}")
    if task_loss is None and weight.is_auto:
        message = f'weight="auto" holds it at {weight.share:g} times the task loss'
        return Check("loss share", None, f"{message}; pass task_loss to see what it is now")
    if task_loss is None:
        return Check("loss share", None, f"distillation loss {loss:.4g} now; pass task_loss to compare")
    if ramp == 0:
        return Check("loss share", None, "distillation is over")
    share, full = (abs(x) / (abs(x) + abs(task)) if x or task else math.nan for x in (loss, loss / ramp))
    message = f"distillation {loss:.4g}, task {task:.4g}: {share:.1%} of the total"
    message += f" now, {full:.1%} without warm-up and decay" if ramp < 1 else ""
    ok = full >= SHARE[0] and share <= SHARE[1]
    hint = f"; expected {SHARE[0]:.0%} to {SHARE[1]:.0%}: "
    lag = "the averages have not yet followed the task loss" if weight.is_auto else 'choose another weight, or "auto"'
    return Check("loss share", ok, message if ok else message + hint + lag)


def check_optimizer(criterion: DistillLoss, optimizer: torch.optim.Optimizer | None, student: nn.Module) -> Check:
    """Whether the optimiser has the adapters, and at the student's learning rate and weight decay."""
    groups = [] if optimizer is None else optimizer.param_groups
    group_of = {id(p): group for group in groups for p in group["params"]}
    adapters = dict(criterion.adapters.named_parameters())
    missing = [name for name, p in adapters.items() if id(p) not in group_of]
    frozen = [name for name, p in adapters.items() if not p.requires_grad]
    if not adapters:
        return Check("optimizer", True, "nothing to train: the adapters have no weights")
    if optimizer is None:
        return Check("optimizer", None, "not known: pass optimizer")
    if missing:
        message = f"does not train {len(missing)} of {len(adapters)} adapter weights (adapters.{missing[0]}, ...); "
        return Check("optimizer", False, message + "distiller.add_to(optimizer)")
    if frozen:
        message = f"{len(frozen)} of {len(adapters)} adapter weights are frozen (adapters.{frozen[0]}, ...): "
        return Check("optimizer", False, message + "distiller.criterion.adapters.requires_grad_()")
    trains = f"trains all {len(adapters)} adapter weights"
    weights = [[p for p in x.parameters() if p.ndim > 1 and id(p) in group_of] for x in (criterion.adapters, student)]
    own, students = ({_settings(group_of[id(p)]) for p in of} for of in weights)
    if own <= students or not students:
        return Check("optimizer", True, trains)
    listed = [" or ".join(f"learning rate {lr:g}, weight decay {decay:g}" for lr, decay in x) for x in (own, students)]
    message = (
        f"{trains}, their matrices at {listed[0]}, the student's at {listed[1]}: is that meant? Else add_to(optimizer)"
    )
    return Check("optimizer", None, message)


def _settings(group: Mapping[str, Any]) -> tuple[float, float]:
    return float(group.get("lr", math.nan)), float(group.get("weight_decay", 0))


def check_ranks(criterion: DistillLoss, averaged: bool | None) -> Check:
    """Of several processes: whether the gradients of the adapters are averaged over them."""
    name = "ranks"
    if not any(p.requires_grad and type(p) is nn.Parameter for p in criterion.adapters.parameters()):
        return Check(name, True, "no adapter weights to be averaged, or by other means")
    if averaged is None:
        return Check(name, None, "not known before the first training forward")
    way = (
        "distiller = DistributedDataParallel(distiller) after prepare, and call distiller(images) in place of its loss"
    )
    if averaged:
        return Check(name, True, "DistributedDataParallel averages the adapters' gradients")
    message = (
        "no DistributedDataParallel has the adapters, so each rank trains its own unless you average them yourself; "
    )
    return Check(name, None, message + way)


def check_schedule(criterion: DistillLoss) -> Check:
    schedule = criterion.loss_weight
    step = int(schedule.step)
    if schedule.stop_step is not None and step >= schedule.stop_step:
        over = f"distillation is over: step {step}, stop_step {schedule.stop_step}; the loss is zero"
        return Check("schedule", None if schedule.stop_step else False, over)  # a run that has got there is in order
    warmup = "" if step >= schedule.warmup_steps else f" of {schedule.warmup_steps} of the warm-up"
    pending = "" if criterion.calibrated else "; teacher statistics still come from the next training batches"
    return Check("schedule", True, f"step {step}{warmup}{pending}")
