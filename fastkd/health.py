"""The checks of ``Distiller.check``, which find what silently turns distillation off, and their report."""

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

SHARE = (0.01, 0.99)  # of the total loss; outside this range one of the two terms has hardly any effect
SCALES = ("weight", "running_var")
SHIFTS = ("bias", "running_mean")


@dataclass(frozen=True)
class Check:
    """The result of one check of ``Distiller.check``; ``ok`` is None where an argument for the check is missing."""

    name: str
    ok: bool | None
    message: str


@dataclass(frozen=True)
class Report:
    """The results of ``Distiller.check``; ``str(report)`` is a table."""

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """False if any check failed; checks whose result is not known are ignored."""
        return all(x.ok is not False for x in self.checks)

    def __str__(self) -> str:
        words = {True: "ok", False: "FAIL", None: "?"}
        width = max(len(x.name) for x in self.checks)
        lines = (f"{words[x.ok]:<5} {x.name:<{width}}  {x.message}" for x in self.checks)
        indent = " " * (6 + width + 2)
        return "\n".join(textwrap.fill(line, 110, subsequent_indent=indent, break_long_words=False) for line in lines)


def fingerprint(weights: nn.Module | Mapping[str, Tensor]) -> str:
    """Return a digest of the names, dtypes, shapes and values of a model's or state dict's tensors.

    ``distiller.check(teacher_fingerprint=fastkd.fingerprint(torch.load(path)))`` proves that the teacher has the file's
    weights. Prefixes of wrappers (``module.``, ``_orig_mod.``) are ignored.

    Returns:
        The first 16 hexadecimal digits of a SHA-256.
    """
    state = weights.state_dict() if isinstance(weights, nn.Module) else weights
    digest = hashlib.sha256()
    for name, value in sorted((bare_name(name), value) for name, value in state.items() if isinstance(value, Tensor)):
        value = value.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(ctypes.string_at(value.data_ptr(), value.nbytes))  # numpy is not required
    return digest.hexdigest()[:16]


def check_trained(teacher: nn.Module, expected: str | None, ran: Container[nn.Module] | None = None) -> Check:
    """Return the check whether the teacher is trained.

    It compares the fingerprint with the expected one if that is given; otherwise it looks for normalisation layers that
    still have their initial weights.

    Args:
        teacher: the model.
        expected: its fingerprint, or None.
        ran: modules that ran in a forward of the teacher, as unused layers may keep their initial weights. None: not
            known.
    """
    name = "teacher trained"
    if expected is not None:
        found = fingerprint(teacher)
        same = f"has the expected weights, fingerprint {found}"
        return Check(name, found == expected, same if found == expected else f"expected {expected}, got {found}")
    layers = {m: bare_name(n) for n, m in teacher.named_modules() if _looks_initial(m) is not None}
    initial = initial_layers(teacher)
    if len(initial) == len(layers):
        ran = None  # no layer was trained, so it does not matter which ones are used
    fresh = [layers[m] for m in initial if ran is None or m in ran]
    if not layers:
        return Check(name, None, "not known: no layer with recognisable initial weights; pass teacher_fingerprint")
    if fresh:
        some = ", ".join(fresh[:3]) + (", ..." if len(fresh) > 3 else "")
        message = (
            f"{len(fresh)} of {len(layers)} layers have their initial weights ({some}): was the whole checkpoint "
            "loaded?"
        )
        if ran is None and 2 * len(fresh) < len(layers):
            return Check(name, None, f"{message} Pass images to check whether the forward uses these layers")
        return Check(name, False, message)
    unused = f", except {len(initial)} that no forward uses" if initial else ""
    return Check(name, True, f"none of {len(layers)} normalisation layers has its initial weights{unused}")


def initial_layers(model: nn.Module) -> list[nn.Module]:
    """Return the normalisation layers that still have their initial weights."""
    return [module for module in model.modules() if _looks_initial(module)]


def _looks_initial(module: nn.Module) -> bool | None:
    """Whether a normalisation layer has scale 1, shift 0 and initial statistics; None for any other module."""
    if not isinstance(module, (nn.GroupNorm, nn.LayerNorm)) and not hasattr(module, "running_mean"):
        return None
    ones = [x for x in (getattr(module, n, None) for n in SCALES) if isinstance(x, Tensor)]
    zeros = [x for x in (getattr(module, n, None) for n in SHIFTS) if isinstance(x, Tensor)]
    if not ones + zeros:
        return None
    return all(bool((x == 1).all()) for x in ones) and all(bool((x == 0).all()) for x in zeros)


def check_frozen(teacher: nn.Module) -> Check:
    """Return the check whether the teacher is in eval mode and no parameter of it requires grad."""
    training = sum(module.training for module in teacher.modules())
    learning = sum(p.requires_grad for p in teacher.parameters())
    if training or learning:
        message = f"{training} modules in training mode, {learning} parameters that require grad; loss() resets them, "
        return Check("teacher frozen", False, message + "but call .train() on no module that contains the teacher")
    return Check("teacher frozen", True, "in eval mode, no parameter requires grad")


def check_weight(criterion: DistillLoss) -> Check:
    """Return the check whether the weight of the loss, or of every level, is zero."""
    levels = criterion.options.weights or (1.0,) * len(criterion.adapters)
    if criterion.loss_weight.weight == 0 or not any(levels):
        which = "weight is 0" if criterion.loss_weight.weight == 0 else "weights are 0 at every level"
        return Check("loss weight", False, f'{which}, so the loss is zero: choose another, or weight="auto"')
    off = levels.count(0)
    return Check("loss weight", True, f"not zero, except at {off} of {len(levels)} levels" if off else "not zero")


def check_share(losses: Tensor, task_loss: float | Tensor | None, criterion: DistillLoss) -> Check:
    """Return the check of the distillation loss's share of the total loss, at the current averages and schedule.

    Args:
        losses: (L,) losses of the levels, without the loss weight.
        task_loss: the task loss on the same images, or None.
        criterion: the ``DistillLoss``.
    """
    weight = criterion.loss_weight
    task = 1.0 if task_loss is None else float(task_loss.detach() if isinstance(task_loss, Tensor) else task_loss)
    factor, ramp = weight.now(losses, losses.new_tensor(task))
    loss = float(losses.sum()) * factor
    if not math.isfinite(loss):
        return Check("loss share", False, f"expected a finite distillation loss, got {loss}")
    if task_loss is None and weight.is_auto:
        message = f'weight="auto" keeps it at {weight.share:g} times the task loss'
        return Check("loss share", None, f"{message}; pass task_loss to see its current share")
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
    """Return the check whether the optimiser trains the adapters, with the student's learning rate and weight decay."""
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
        return Check("optimizer", False, message + "call distiller.add_to(optimizer)")
    if frozen:
        message = f"{len(frozen)} of {len(adapters)} adapter weights are frozen (adapters.{frozen[0]}, ...): call "
        return Check("optimizer", False, message + "distiller.criterion.adapters.requires_grad_()")
    trains = f"trains all {len(adapters)} adapter weights"
    weights = [[p for p in x.parameters() if p.ndim > 1 and id(p) in group_of] for x in (criterion.adapters, student)]
    own, students = ({_settings(group_of[id(p)]) for p in of} for of in weights)
    if own <= students or not students:
        return Check("optimizer", True, trains)
    listed = [" or ".join(f"learning rate {lr:g}, weight decay {decay:g}" for lr, decay in x) for x in (own, students)]
    message = (
        f"{trains}, with {listed[0]}, but the student's with {listed[1]}: if this is not intended, use "
        "distiller.add_to(optimizer)"
    )
    return Check("optimizer", None, message)


def _settings(group: Mapping[str, Any]) -> tuple[float, float]:
    return float(group.get("lr", math.nan)), float(group.get("weight_decay", 0))


def check_ranks(criterion: DistillLoss, averaged: bool | None) -> Check:
    """Return the check whether several processes average the gradients of the adapters.

    Args:
        criterion: the ``DistillLoss``.
        averaged: whether DistributedDataParallel has the adapters; None before the first training forward.
    """
    name = "ranks"
    if not any(p.requires_grad and type(p) is nn.Parameter for p in criterion.adapters.parameters()):
        return Check(name, True, "no adapter weights that DistributedDataParallel would have to average")
    if averaged is None:
        return Check(name, None, "not known before the first training forward")
    way = "distiller = DistributedDataParallel(distiller) after prepare, and call distiller(images) instead of its loss"
    if averaged:
        return Check(name, True, "DistributedDataParallel averages the adapters' gradients")
    message = (
        "no DistributedDataParallel has the adapters, so each rank trains its own unless you average them yourself; "
    )
    return Check(name, None, message + way)


def check_schedule(criterion: DistillLoss) -> Check:
    """Return the check of the step in the schedule: warm-up, calibration, and whether ``stop_step`` is reached."""
    schedule = criterion.loss_weight
    step = int(schedule.step)
    if schedule.stop_step is not None and step >= schedule.stop_step:
        over = f"distillation is over: step {step}, stop_step {schedule.stop_step}; the loss is zero"
        return Check("schedule", None if schedule.stop_step else False, over)  # no failure if the run has reached it
    warmup = "" if step >= schedule.warmup_steps else f" of {schedule.warmup_steps} of the warm-up"
    pending = "" if criterion.calibrated else "; the next training batches calibrate the teacher statistics"
    return Check("schedule", True, f"step {step}{warmup}{pending}")
