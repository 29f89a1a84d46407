"""Checks of the tensors of a call, before any kernel runs; errors name the argument and its index.

Everything that depends only on shapes, strides, dtypes and options is checked once per combination of them, and the
result is cached as a ``Plan``. Each call checks what can change between two calls of one plan: which tensors require
grad, and the values of priors on the CPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastkd.ops import backends
from fastkd.ops.arguments import kind_of, require_dense, require_floating, require_sequence, require_weights
from fastkd.ops.options import LossOptions
from fastkd.ops.prior_ops import PriorMaps
from fastkd.ops.reference import accumulator

PLAIN = (Tensor, torch.nn.Parameter)
MAX_PLANS = 1024  # largest number of cached plans, as shapes may change with every batch


@dataclass(frozen=True)
class Plan:
    """Everything that follows from the layout of a call's tensors and from its options."""

    backend: str
    dtype: torch.dtype  # of sums, maps, priors and moments
    one_pass: bool  # whether eager autograd can compute loss and gradient in one pass
    plain: bool  # whether all student features are plain tensors, no subclasses
    weights: list[float]
    codes: tuple[int, int, float, int, float, int]  # the options as the ops take them
    cells: list[int]  # number of cells of each level, over all images
    absent: Tensor  # the empty tensor for a level without prior, or without moments
    nothing: list[Tensor]  # ``absent`` for all levels
    unknown_mass: Tensor  # the empty tensor for a mass that the op computes
    unit_factor: Tensor  # the empty tensor for a factor of 1
    uniform_mass: Tensor | None  # (L,) float64: the sums of maps that are 1 everywhere
    identity: list[tuple[Tensor, Tensor]]  # zeros and ones, (C,) each, for levels with only some of the moments


@dataclass
class LevelTensors:
    """The checked tensors of one call, one entry per level; an absent entry is an empty tensor."""

    plan: Plan
    student: list[Tensor]
    teacher: list[Tensor]
    prior: list[Tensor]
    mean: list[Tensor]
    rstd: list[Tensor]
    bias: list[Tensor]  # of the student's adapter; mean, rstd and bias are all there or all absent
    mass: Tensor | None = None  # (L,) float64: the sum of each level's prior, where known
    donated: list[bool] = field(default_factory=list)  # whether the gradient may take the teacher feature's memory


def check(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    options: LossOptions,
    *,
    prior: Sequence[Tensor | None] | None = None,
    standardize: Sequence[tuple[Tensor, Tensor] | None] | None = None,
    bias: Sequence[Tensor | None] | None = None,
) -> LevelTensors:
    """Check the tensors of ``fastkd.distill_loss`` and return them, the small ones converted to the dtype of the sums.

    Args:
        student, teacher, options, prior, standardize: as in ``fastkd.distill_loss``.
        bias: per level the (C,) bias of the adapter, to be added to the student's feature, or None.

    Raises:
        TypeError, ValueError: as documented at ``fastkd.distill_loss``.
    """
    key = None if is_traced() else _key(options, student, teacher, prior, standardize, bias)
    plan = None if key is None else _plans.get(key)
    if plan is None:
        plan = _make_plan(student, teacher, options, prior, standardize, bias)
        if key is not None:
            if len(_plans) >= MAX_PLANS:
                _plans.clear()
            _plans[key] = plan
    _require_constants(teacher, prior, standardize)
    q = mean = rstd = shift = plan.nothing
    if prior is not None:
        q = [plan.absent if x is None else _ready(x, plan.dtype) for x in prior]
    if standardize is not None or bias is not None:
        none = [None] * len(plan.weights)
        pairs = zip(standardize or none, bias or none, plan.identity, strict=True)
        moments = [_moments(pair, b, identity, plan) for pair, b, identity in pairs]
        mean, rstd, shift = ([m[k] for m in moments] for k in range(3))
    mass = _mass(prior, q, plan, options)
    return LevelTensors(plan, list(student), list(teacher), q, mean, rstd, shift, mass)


_plans: dict[Any, Plan] = {}


def _key(options: LossOptions, student: Any, teacher: Any, prior: Any, standardize: Any, bias: Any) -> Any:
    """Return the key of the cached plan; None for invalid arguments, for which ``_make_plan`` raises.

    Plans for tensor subclasses are not cached, because tensors made from them (fake tensors) must not outlive the call.
    """
    try:
        if any(type(x) not in PLAIN for x in (*student, *teacher)):
            return None
        lists = [x for x in (prior, standardize, bias) if x is not None]
        lists += [pair for pair in standardize or () if pair is not None]
        if not all(isinstance(x, (list, tuple)) for x in lists):
            return None  # an iterator must not be consumed here, nor a tensor be taken for a list
        features = [(x.shape, x.stride(), x.dtype, x.device) for x in (*student, *teacher)]
        small = [
            None if x is None else (x.shape, x.dtype, x.device, x.layout)
            for x in (*(prior or ()), *(y for pair in standardize or () for y in pair or (None,)), *(bias or ()))
        ]
        kinds = (len(student), *(None if x is None else len(x) for x in (prior, standardize, bias)))
        kinds += tuple(None if pair is None else len(pair) for pair in standardize or ())
        return options, type(student), type(teacher), *kinds, *features, *small
    except Exception:
        return None


def _ready(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype and x.is_contiguous() else x.to(dtype).contiguous()


def _moments(
    pair: Any, bias: Tensor | None, identity: tuple[Tensor, Tensor], plan: Plan
) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, rstd and bias of a level: all absent, or with zeros and ones for those that are missing."""
    if pair is None and bias is None:
        return plan.absent, plan.absent, plan.absent
    zeros, ones = identity
    mean, rstd = (zeros, ones) if pair is None else (_ready(x, plan.dtype) for x in pair)
    return mean, rstd, zeros if bias is None else _ready(bias, plan.dtype)


def _mass(prior: Any, q: list[Tensor], plan: Plan, options: LossOptions) -> Tensor | None:
    """Return the sum of each level's prior, (L,), where known or cheap; raise for a negative prior on the CPU."""
    if prior is None or all(x is None for x in prior):
        return plan.uniform_mass
    known = prior.sums if isinstance(prior, PriorMaps) else None
    on_cpu = plan.absent.device.type == "cpu"  # where NumPy may have changed the values without PyTorch noticing
    if is_traced() or (known is not None and not on_cpu):
        return known
    of_map = options.info_map.weights_are_prior and options.divisor in ("map", "map_all_ranks")
    if not on_cpu and not (plan.one_pass and of_map):
        return None
    sums: Tensor = backends.small_op("prior_sums", plan.absent.device)(q, plan.cells)
    if on_cpu:  # elsewhere, reading values would wait for the device
        for i, lowest in enumerate(sums[1].tolist()):
            if lowest < 0:
                raise ValueError(
                    f"prior[{i}]: expected weights >= 0, got a minimum of {lowest:g}; clamp it: q.clamp_min(0)"
                )
    return sums[0]


def is_eager(levels: LevelTensors) -> bool:
    """Whether the call runs eagerly: no tracer, and no tensor subclasses."""
    return levels.plan.plain and not is_traced()


def is_traced() -> bool:
    """Whether a compiler, a tracer or a transform of ``torch.func`` runs, in which tensors have no values."""
    if torch.compiler.is_compiling() or torch._C._is_tracing() or torch._C._are_functorch_transforms_active():
        return True
    if not torch._C._len_torch_dispatch_stack():
        return False
    keys = torch._C._TorchDispatchModeKey
    return any(torch._C._get_dispatch_mode(key) is not None for key in (keys.PROXY, keys.FAKE))


# ---- checked in each call


def _require_constants(teacher: Sequence[Tensor], prior: Any, standardize: Any) -> None:
    for i, t in enumerate(teacher):
        if t.requires_grad:
            raise ValueError(
                f"teacher_feats[{i}]: expected a frozen teacher, got a tensor that requires grad, which would get no "
                "gradient; run the teacher under torch.no_grad() or pass t.detach()"
            )
    for i, q in enumerate(prior or ()):
        if q is not None and q.requires_grad:
            _refuse_gradient(f"prior[{i}]")
    for i, pair in enumerate(standardize or ()):
        for k, x in enumerate(pair or ()):
            if x.requires_grad:
                _refuse_gradient(f"standardize[{i}][{k}]")


def _refuse_gradient(name: str) -> None:
    raise ValueError(
        f"{name}: expected a constant, got a tensor that requires grad, which would get no gradient; pass x.detach()"
    )


# ---- checked once per plan


def _make_plan(
    student: Any, teacher: Any, options: LossOptions, prior: Any, standardize: Any, bias: Any
) -> Plan:  # fmt: skip
    s, t = require_features("student_feats", student), require_features("teacher_feats", teacher)
    if len(s) != len(t):
        raise ValueError(
            f"student_feats and teacher_feats: expected one entry per level in both, got {len(s)} and {len(t)}; "
            "fastkd.Distiller matches unequal lists by stride"
        )
    count = len(s)
    for i in range(count):
        _require_device(f"student_feats[{i}]", s[i], s[0])
        _require_pair(i, s[i], t[i])
    q = _per_level("prior", prior, count)
    if options.info_map.needs_prior and all(x is None for x in q):
        needs = options.info_map.needs_prior
        raise ValueError(f"prior: expected {needs}, which alone weights the cells of this info_map, got None")
    moments = _per_level("standardize", standardize, count)
    for i in range(count):
        if q[i] is not None:
            _require_small(f"prior[{i}]", q[i], (t[i].shape[0], *t[i].shape[2:]), t[i])
        if moments[i] is not None:
            _require_moments(f"standardize[{i}]", moments[i], t[i])
    weights = [1.0] * count if options.weights is None else list(require_weights(options.weights, count))
    dtype, device, compiling = accumulator(*s, *t), s[0].device, torch.compiler.is_compiling()
    backend = backends.choose(options.backend, device, dtype)
    cells = [x.shape[0] * x.shape[2] * x.shape[3] for x in s]
    shifted = [m is not None or (bias is not None and bias[i] is not None) for i, m in enumerate(moments)]
    # outside inference mode, because a plan made by a validation must work in training too
    with torch.no_grad() if compiling else torch.inference_mode(False), torch.no_grad():
        empty = s[0].new_empty(0, dtype=dtype)
        identity = [
            (empty.new_zeros(x.shape[1]), empty.new_ones(x.shape[1])) if shifted[i] else (empty, empty)
            for i, x in enumerate(s)
        ]
        return Plan(
            backend=backend,
            dtype=dtype,
            one_pass=backends.has_one_pass(backend, s, t),
            plain=all(type(x) in PLAIN for x in s),
            weights=weights,
            codes=options.codes,
            cells=cells,
            absent=empty,
            nothing=[empty] * count,
            unknown_mass=empty.new_empty(0, dtype=torch.float64),
            unit_factor=empty.new_empty(0, dtype=torch.float32),
            uniform_mass=None if compiling else torch.tensor(cells, dtype=torch.float64).to(device, non_blocking=True),
            identity=identity,
        )


def require_features(name: str, value: Any) -> list[Tensor]:
    """Return the feature maps of one model as a list with at least one entry.

    Raises:
        TypeError, ValueError: as documented at ``fastkd.distill_loss``.
    """
    levels = require_sequence(name, value)
    if not levels:
        raise ValueError(f"{name}: expected at least one level, got an empty list")
    for i, x in enumerate(levels):
        _require_feature(f"{name}[{i}]", x)
    return levels


def _per_level(name: str, value: Any, count: int, of: str = "tensors") -> list[Any]:
    entries = [None] * count if value is None else require_sequence(name, value, of)
    if len(entries) != count:
        raise ValueError(f"{name}: expected {count} entries, one per level (None where absent), got {len(entries)}")
    return entries


def _require_feature(name: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {kind_of(x)}")
    require_dense(name, x)
    if x.ndim != 4:
        raise ValueError(f"{name}: expected 4 dimensions (N, C, H, W), got shape {tuple(x.shape)}")
    require_floating(name, x)


def _require_pair(i: int, s: Tensor, t: Tensor) -> None:
    _require_device(f"teacher_feats[{i}]", t, s)
    if s.shape != t.shape:
        shapes = f"level {i}: student_feats {tuple(s.shape)} and teacher_feats {tuple(t.shape)} differ in"
        if s.shape[0] != t.shape[0]:
            raise ValueError(f"{shapes} the batch size; run both models on the same images")
        if s.shape[2:] != t.shape[2:]:
            raise ValueError(
                f"{shapes} height or width; pair levels of equal stride (fastkd.Distiller matches strides)"
            )
        raise ValueError(f"{shapes} channels; fastkd.DistillLoss has 1x1 adapters for that")


def _require_device(name: str, x: Tensor, student: Tensor) -> None:
    if x.device != student.device:
        raise ValueError(
            f"{name}: expected the student's device {student.device}, got {x.device}; move it: x.to(device)"
        )


def _require_small(name: str, x: Any, shape: Sequence[int], t: Tensor) -> None:
    """Check a small tensor of a level: floating, of this shape, and on the device of ``t``."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor of shape {tuple(shape)}, got {kind_of(x)}")
    require_dense(name, x)
    if x.shape != torch.Size(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(x.shape)}")
    require_floating(name, x)
    _require_device(name, x, t)


def _require_moments(name: str, value: Any, t: Tensor) -> None:
    if isinstance(value, Tensor) or not isinstance(value, Sequence) or len(value) != 2:
        raise TypeError(f"{name}: expected a pair (mean, rstd) of vectors, or None, got {kind_of(value)}")
    for k, x in enumerate(value):
        _require_small(f"{name}[{k}]", x, (t.shape[1],), t)


def warn_if_nothing_learns(student: Sequence[Tensor]) -> None:
    """Warn once per process if gradients are recorded but no student feature requires grad."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling() and not any(x.requires_grad for x in student):
        _warn_nothing_learns()


@cache
def _warn_nothing_learns() -> None:
    warnings.warn(
        "student_feats: none requires grad, so distillation has no effect; was the student run under no_grad, frozen "
        "or detached? (to compute only the value, use torch.no_grad())",
        stacklevel=4,
    )
