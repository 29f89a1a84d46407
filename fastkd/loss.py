"""``distill_loss``, the functional form, and ``DistillLoss``, the module that owns adapters and teacher statistics."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from fastkd.adapters import Adapter, LazyAdapter, adapted, bias_of, make_adapters, same_random_state, without_bias
from fastkd.loss_weight import LossWeight
from fastkd.ops import reference
from fastkd.ops.arguments import kind_of, require_int, require_sequence, require_state, require_weights
from fastkd.ops.backends import is_dense_like
from fastkd.ops.levels import LevelTensors, check, require_features, warn_if_nothing_learns
from fastkd.ops.options import LossOptions, make_options, options_of_call
from fastkd.ops.presets import OWN_BATCH, InfoMap, require_standardize
from fastkd.ops.run import run
from fastkd.ranks import world_size
from fastkd.statistics import ChannelStatistics


def distill_loss(
    student_feats: Sequence[Tensor],
    teacher_feats: Sequence[Tensor],
    *,
    info_map: str | InfoMap = "energy",
    prior: Sequence[Tensor | None] | None = None,
    standardize: Sequence[tuple[Tensor, Tensor] | None] | str | bool | None = None,
    weights: Sequence[float] | None = None,
    penalty: str = "l2",
    beta: float = 1.0,
    divisor: str | None = None,
    reduction: str = "sum",
    backend: str | None = None,
) -> Tensor:
    r"""Weighted imitation of a teacher's feature maps, over all levels at once.

    For each level, with w the information map (see ``InfoMap``) and t' the teacher, standardised where asked::

        loss = weight * sum_p w_p * sum_c rho(s - t') / Z

    Only the student gets a gradient; the teacher, the map and the prior are constants. With the defaults the map is
    the energy of the teacher over its mean, and Z the number of elements. Li et al. (2022), who weight a YOLOv3
    teacher's backbone and neck by an information map, publish no formula for it: ours is a reading, see ``PRESETS``.

    Args:
        student_feats: one (N, C, H, W) tensor per level, backbone then neck; float16, bfloat16, float32 or float64,
            any strides (channels_last is not copied).
        teacher_feats: the teacher's, of the same shapes, from a frozen teacher; the dtype may differ.
        info_map: a preset (``fastkd.PRESETS``) or an ``InfoMap``.
        prior: per level an (N, H, W) tensor q >= 0 that multiplies the map, or None.
        standardize: per level (mean, rstd), two (C,) vectors: t' = (t - mean) * rstd; False or None for t' = t. Maps
            of the standardised teacher (``self_information``, ``graded_iou``, ``uniform_standardized``) need these
            vectors, which ``DistillLoss`` calibrates. ``"batch"``, as the map ``pkd`` has it: student and teacher are
            both standardised by the moments of their own batch, the gradient included.
        weights: one finite number per level; all 1 by default.
        penalty: rho: ``"l2"`` x^2; ``"l1"`` abs(x); ``"smooth_l1"`` as ``torch.nn.SmoothL1Loss``. Or ``"cwd"``, the
            channel-wise distillation of Shu et al. (2021, arXiv:2011.13256) in PyTorch's own operations: beta^2 KL(P ||
            Q), P and Q being the softmax over cells of each channel of t' / beta and s / beta; its Z is N C.
        beta: > 0, where ``smooth_l1`` turns from quadratic to linear; the temperature of ``cwd``.
        divisor: Z: ``"elements"`` N C H W; ``"map"`` C sum(w), over the batch; ``"map_all_ranks"`` the same over
            the batches of all ranks, divided by their number, so that averaged gradients (DDP) are those of one
            process with the whole batch; ``"batch"`` N. By default the one that goes with the map.
        reduction: ``"sum"`` over levels, a scalar; ``"none"``: one loss per level, (L,).
        backend: ``"cpp"``, ``"triton"``, ``"reference"``, or None for the one that suits most here, see
            ``fastkd.backends()``.

    Returns:
        float32 scalar or (L,) tensor; float64 if any feature is float64.

    Raises:
        ValueError: lists of unequal length or empty; shapes, devices or values that do not fit; a teacher or a prior
            that requires grad; an unknown name (the message lists the known ones).
        TypeError: not a list, not a tensor, or not a floating dtype.
        RuntimeError: the backend is not built here (says how to build it); a second or a forward-mode derivative of
            a compiled backend (the reference has both, and works under ``torch.func``).
    """
    options = options_of_call(info_map, weights, penalty, beta, divisor, reduction, backend)
    student, moments = standardized(student_feats, teacher_feats, options.info_map, standardize)
    levels = check(student, teacher_feats, options, prior=prior, standardize=moments)
    warn_if_nothing_learns(levels.student)
    loss, _ = run(levels, options)
    return loss


Moments: TypeAlias = Sequence[tuple[Tensor, Tensor] | None] | None


def standardized(
    student: Sequence[Tensor], teacher: Sequence[Tensor], info: InfoMap, standardize: Moments | str | bool
) -> tuple[Sequence[Tensor], Moments]:
    """The student's features and the teacher's moments, as a call of ``distill_loss`` means them."""
    kind: Moments | str | bool = info.standardize if standardize is None else standardize
    if isinstance(kind, str):
        require_standardize(kind)
        features = [require_features(*x) for x in (("student_feats", student), ("teacher_feats", teacher))]
        with torch.no_grad():
            moments = [reference.batch_moments(x) for x in features[1]]
        return [reference.by_own_batch(x) for x in features[0]], moments
    if not isinstance(kind, bool):
        return student, kind
    if kind:
        raise ValueError(
            "standardize: expected (mean, rstd) per level, as this info_map is one of the standardised teacher, got "
            f"{standardize}; DistillLoss calibrates them. For the features as they are: standardize=False, or "
            "info_map='energy' or 'uniform'"
        )
    return student, None


class DistillLoss(nn.Module):
    """``distill_loss`` with what it needs to keep: 1x1 adapters, the teacher's statistics, level weights, warm-up.

    The bias of an adapter is added by the loss: its own output, to a hook or when called, is without. Adapters keep
    their dtype: outside autocast, student features of another are converted. Statistics stay float32.

    Args:
        student_channels, teacher_channels: widths of each level's student and teacher, for the adapters: one 1x1
            convolution a level. None: adapters take their widths from the first batch (``levels`` says how many).
        levels: number of levels, where no channels and no adapters are given.
        adapters: one module per level instead (``nn.Identity()`` for none), student feature to teacher's shape.
        standardize: imitate the teacher standardised per channel; ``"batch"``: student and teacher by the moments of
            their own batch (adapters then have no bias); None: as ``info_map`` says.
        calibration_batches: the teacher's statistics are taken from so many first training batches, each of all ranks
            together, then fixed; what is not finite is left out. Before the first one, in eval mode, the teacher is
            not standardised.
        weight: factor of the loss; or ``"auto"``: at each training forward the one that would bring the loss of the
            steps before to ``share`` times their task loss, both as moving averages over some 50 steps (and over all
            ranks), which the module's state keeps. Magnitudes are averaged, as a task loss may be negative (a
            likelihood's). The very first step has no average yet and is balanced by its own losses. ``forward`` then
            needs ``task_loss``. No gradient flows through the factor.
        share: of the task loss, > 0; for ``weight="auto"``.
        warmup_steps: the loss grows linearly to its full weight over so many training forwards.
        decay: ``"linear"`` or ``"cosine"``: from the end of the warm-up it falls to zero at ``stop_step``.
        stop_step: from this training forward on the loss is zero.
        info_map, weights, penalty, beta, divisor, reduction, backend: as in ``distill_loss``; except that
            ``"map_all_ranks"`` is ``"map"`` in eval mode, where no rank waits for another.

    Attributes:
        level_losses: (L,) losses of the last forward, detached, before ``weight`` and its schedule.
        loss_weight: what they are multiplied with; its buffer ``step`` counts training forwards, and ``factor`` is
            that of the next.
        options: everything else about the loss, frozen.

    Raises:
        ValueError, TypeError: as in ``distill_loss``; numbers of levels that do not agree.
    """

    level_losses: Tensor

    def __init__(
        self,
        student_channels: Sequence[int] | None = None,
        teacher_channels: Sequence[int] | None = None,
        *,
        levels: int | None = None,
        adapters: Sequence[nn.Module] | None = None,
        info_map: str | InfoMap = "self_information",
        standardize: bool | str | None = None,
        calibration_batches: int = 8,
        weights: Sequence[float] | None = None,
        penalty: str = "l2",
        beta: float = 1.0,
        divisor: str | None = None,
        weight: float | str = 1.0,
        share: float = 1.0,
        warmup_steps: int = 0,
        decay: str | None = None,
        stop_step: int | None = None,
        reduction: str = "sum",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self._set_options(make_options(info_map, weights, penalty, beta, divisor, reduction, backend))
        self.standardize = self.options.info_map.standardize
        if standardize is not None:
            self.standardize = require_standardize(standardize)
        _check_levels(student_channels, teacher_channels, levels, adapters)
        self.adapters = nn.ModuleList(
            make_adapters(student_channels, teacher_channels, levels, adapters, self.standardize != OWN_BATCH)
        )
        count = len(self.adapters)
        if weights is not None:
            require_weights(weights, count)
        self.statistics = nn.ModuleList(ChannelStatistics() for _ in range(count))
        self.calibration_batches = require_int("calibration_batches", calibration_batches, 1)
        self.calibrated = self.standardize is not True
        self.loss_weight = LossWeight(weight, share, warmup_steps, decay, stop_step)
        self._seen_shapes: Any = None  # of the last features, for which nothing is left to check or to prepare
        self._batches_seen = 0
        self._pooled = self._standalone = False
        self.level_losses = torch.zeros(count)

    def forward(
        self,
        student_feats: Sequence[Tensor],
        teacher_feats: Sequence[Tensor],
        prior: Sequence[Tensor | None] | None = None,
        task_loss: Tensor | float | None = None,
        *,
        donated: Sequence[bool] = (),
    ) -> Tensor:
        """The loss, as ``distill_loss``, times its weight; in training, with grad, it also calibrates and counts.

        Args:
            task_loss: a scalar, for ``weight="auto"``.
            donated: per level, whether the student's gradient may take the memory of the teacher's feature: only where
                nobody else holds that, as its content is gone afterwards. Empty: nowhere.
        """
        shapes = None if torch.compiler.is_compiling() else _layout(student_feats, teacher_feats)
        if shapes is None or shapes != self._seen_shapes:
            self._require_levels(student_feats, teacher_feats)
        if self.training and self.loss_weight.stopped:
            return self.zero_loss(student_feats)
        task = self.loss_weight.task_value(task_loss, student_feats[0].device)
        warn_if_nothing_learns(student_feats)  # before the adapters, whose outputs require grad in any case
        if shapes is None or shapes != self._seen_shapes:
            self._prepare(student_feats, teacher_feats)
            self._seen_shapes = shapes
        learns = self.training and torch.is_grad_enabled()  # a validation under no_grad is no training step
        if learns:
            self._pool()
            if not self.calibrated:
                self.calibrate(teacher_feats, all_ranks=not self._standalone)
        levels = self._checked(student_feats, teacher_feats, prior)
        if donated:
            if not isinstance(donated, (list, tuple)) or [type(x) for x in donated] != [bool] * len(self.adapters):
                raise ValueError(f"donated: expected one truth value per level, {len(self.adapters)}, got {donated!r}")
            pairs = zip(donated, levels.student, levels.teacher, strict=True)
            levels.donated = [gift and _can_hold_gradient(s, t) for gift, s, t in pairs]
        loss, self.level_losses = self._weighted(levels, task, learns)
        if learns:
            self.loss_weight.count(self.level_losses, task)
        return loss

    def _checked(
        self, student_feats: Sequence[Tensor], teacher_feats: Sequence[Tensor], prior: Sequence[Tensor | None] | None
    ) -> LevelTensors:
        adapters = list(self.adapters)
        student = [without_bias(adapter, s) for adapter, s in zip(adapters, student_feats, strict=True)]
        bias = [bias_of(adapter) for adapter in adapters] if any(isinstance(x, Adapter) for x in adapters) else None
        compared, moments = self.standardized(student, teacher_feats)
        return check(compared, teacher_feats, self.active_options, prior=prior, standardize=moments, bias=bias)

    def _weighted(self, levels: LevelTensors, task: Tensor | None, learns: bool) -> tuple[Tensor, Tensor]:
        """The loss times its factor, and the levels' losses without; only a training step waits for other ranks."""
        options, weight = self.active_options, self.loss_weight
        if weight.is_known:
            return run(levels, options, weight.current_factor)
        loss, losses = run(levels, options, one_pass=False)  # the factor is that of these very losses
        return loss * weight.balanced(losses, task, all_ranks=learns).to(loss.dtype), losses

    @property
    def waits_for_ranks(self) -> bool:
        """Whether the next training forward sums something over the ranks."""
        sums = self.loss_weight.is_auto or self.options.divisor == "map_all_ranks" or not self.calibrated
        return sums and not self.loss_weight.stopped

    def standalone_copy(self) -> DistillLoss:
        """A copy in training, to try: at full weight, and waiting for no other process."""
        copied = copy.deepcopy(self).train()
        copied.loss_weight, copied._standalone = self.loss_weight.full(), True
        return copied

    @property
    def active_options(self) -> LossOptions:
        """The options of the next forward: only in training steps, which all ranks take together, is Z that of all."""
        learns = self.training and torch.is_grad_enabled()
        waits = self.options.divisor == "map_all_ranks" and learns and not self._standalone
        return self.options if waits or self.options.divisor != "map_all_ranks" else self._options_of_one_rank

    def adapted(self, student_feats: Sequence[Tensor]) -> list[Tensor]:
        """The student's features at the teacher's widths."""
        return [adapted(adapter, s) for adapter, s in zip(self.adapters, student_feats, strict=True)]

    def standardized(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> tuple[Sequence[Tensor], Moments]:
        """The student's adapted features and the teacher's moments, with which they are compared."""
        if self.standardize == OWN_BATCH:
            return standardized(student, teacher, self.options.info_map, OWN_BATCH)
        return student, self.moments()

    def moments(self) -> list[tuple[Tensor, Tensor] | None] | None:
        """(mean, rstd) of each level's teacher, two (C,) vectors: ``distill_loss``'s ``standardize``."""
        if self.standardize is not True:
            return None
        return [x.moments() for x in self.statistics]  # type: ignore[operator]

    def skip_step(self, student_feats: Sequence[Tensor]) -> Tensor:
        """The loss of a training step in which the teacher does not run: 0; counted, but in no average."""
        adapters = self.adapters.parameters()
        learns = any(p.requires_grad and not isinstance(p, UninitializedParameter) for p in adapters)
        # a gradient of zeros for each feature would cost a step some percent
        losses, loss = self.level_losses, self.zero_loss(() if learns and world_size() == 1 else student_feats)
        self.level_losses = losses  # still those of the last forward
        self.loss_weight.skip()
        return loss

    def zero_loss(self, student_feats: Sequence[Tensor] = ()) -> Tensor:
        """What ``forward`` is once the loss has stopped: features and adapters are part of it, as DDP expects."""
        self.level_losses = torch.zeros(len(self.adapters), device=self.loss_weight.step.device)
        learning = [p for p in self.adapters.parameters() if not isinstance(p, UninitializedParameter)]
        # of what may not be finite, an empty part
        empty = [*(p.flatten()[:0] for p in learning), *(x[:0] for x in student_feats)]
        zero: Tensor = self.level_losses + sum(x.sum() for x in empty)
        return zero.sum() if self.options.reduction == "sum" else zero

    def _require_levels(self, student_feats: Sequence[Tensor], teacher_feats: Sequence[Tensor]) -> None:
        for name, feats in (("student_feats", student_feats), ("teacher_feats", teacher_feats)):
            self._require_features(name, feats)
        for i, (adapter, s) in enumerate(zip(self.adapters, student_feats, strict=True)):
            takes = adapter.in_channels if isinstance(adapter, nn.Conv2d) else 0  # 0: not yet, or not ours to know
            if takes and takes != s.shape[1]:
                raise ValueError(
                    f"student_feats[{i}]: expected {takes} channels, as its adapter takes, got {s.shape[1]}"
                )

    def _require_features(self, name: str, feats: Sequence[Tensor]) -> None:
        count = len(require_features(name, feats))
        if count != len(self.adapters):
            raise ValueError(f"{name}: expected {len(self.adapters)} levels, as this DistillLoss has, got {count}")

    @torch.no_grad()
    def calibrate(self, teacher_feats: Sequence[Tensor], *, all_ranks: bool = False) -> None:
        """Add one batch of teacher features to the statistics; after ``calibration_batches`` they stay fixed.

        Args:
            teacher_feats: one (N, C, H, W) tensor per level.
            all_ranks: add the batches of all ranks, which have to call this together; else this rank's own.

        Raises:
            TypeError, ValueError: features as ``distill_loss`` refuses them, or of another number of levels.
            RuntimeError: this rank's own after the first training forward of several ranks, which then differ.
        """
        if self._pooled and not (all_ranks or self._standalone):
            raise RuntimeError(
                "calibrate: expected it before the first training forward, which brought the ranks' statistics "
                "together; let the training batches do it, which are those of all ranks"
            )
        self._require_features("teacher_feats", teacher_feats)
        for statistics, feature in zip(self.statistics, teacher_feats, strict=True):
            statistics.update(feature, all_ranks=all_ranks)  # type: ignore[operator]
        shared = all_ranks and world_size() > 1  # an empty batch of one rank counts for none, but for all as a step
        self._batches_seen += shared or all(feature.numel() for feature in teacher_feats)
        self.calibrated = self._batches_seen >= self.calibration_batches

    @torch.no_grad()
    def _pool(self) -> None:
        """Once, in the first training forward of several ranks: all go on from what any of them was calibrated with."""
        if (
            self._pooled
            or self._standalone
            or self.standardize is not True
            or world_size() == 1
            or torch.compiler.is_compiling()
        ):
            return
        self._pooled = True
        seen = torch.tensor(self._batches_seen, device=self.loss_weight.step.device)
        torch.distributed.all_reduce(seen, torch.distributed.ReduceOp.MAX)
        for statistics in self.statistics:
            statistics.pool()  # type: ignore[operator]
        self._batches_seen = int(seen)
        self.calibrated = self._batches_seen >= self.calibration_batches

    def prepare(self, student_feats: Sequence[Tensor], teacher_feats: Sequence[Tensor]) -> None:
        """Give adapters and statistics that wait for their first batch their widths; else there is nothing to do."""
        self._require_levels(student_feats, teacher_feats)
        self._prepare(student_feats, teacher_feats)

    @torch.no_grad()
    def _prepare(self, student_feats: Sequence[Tensor], teacher_feats: Sequence[Tensor]) -> None:
        for statistics, t in zip(self.statistics, teacher_feats, strict=True):
            statistics.prepare(t.shape[1])  # type: ignore[operator]
        triples = zip(self.adapters, student_feats, teacher_feats, strict=True)
        waiting = [(adapter, s, t) for adapter, s, t in triples if isinstance(adapter, LazyAdapter)]
        if waiting:
            with same_random_state(student_feats[0].device):
                for adapter, s, t in waiting:
                    adapter.prepare(s, t)

    def keep_levels(self, levels: int, weights: Sequence[float] | None = None) -> None:
        """Drop the lazy adapters of all levels but the first ones, and set one weight for each that stays."""
        self._seen_shapes, spare = None, self.adapters[levels:]
        if not all(isinstance(adapter, LazyAdapter) for adapter in spare):
            return
        del self.adapters[levels:], self.statistics[levels:]
        if weights is not None:
            self._set_options(replace(self.options, weights=require_weights(weights, levels)))
        self.level_losses = self.level_losses[:levels]

    def _set_options(self, options: LossOptions) -> None:
        self.options, self._options_of_one_rank = options, replace(options, divisor="map")

    def get_extra_state(self) -> dict[str, int]:
        return {"batches_seen": self._batches_seen}

    def set_extra_state(self, state: dict[str, int]) -> None:
        (self._batches_seen,) = require_state("DistillLoss", state, "batches_seen")
        self.calibrated = self.standardize is not True or self._batches_seen >= self.calibration_batches


def _check_levels(student_channels: Any, teacher_channels: Any, levels: Any, adapters: Any) -> None:
    """Check each entry of what says how many levels there are; ``make_adapters`` compares their numbers."""
    for name, widths in (("student_channels", student_channels), ("teacher_channels", teacher_channels)):
        for i, width in enumerate([] if widths is None else require_sequence(name, widths, "integers")):
            require_int(f"{name}[{i}]", width, 1)
    if levels is not None:
        require_int("levels", levels, 1)
    for i, x in enumerate(adapters if isinstance(adapters, Sequence) else ()):
        if not isinstance(x, nn.Module):
            raise TypeError(f"adapters[{i}]: expected a module (nn.Identity() for none), got {kind_of(x)}")


def _can_hold_gradient(student: Tensor, teacher: Tensor) -> bool:
    """Whether the memory of a teacher's feature has room for the gradient, each element in a place of its own."""
    return student.dtype == teacher.dtype and not teacher.is_inference() and is_dense_like(student, teacher)


def require_scalar(options: Mapping[str, Any]) -> None:
    """Refuse loss options with which no trainer can go on."""
    if options.get("reduction", "sum") != "sum":
        raise ValueError(f"reduction: expected 'sum', as a trainer needs one number, got {options['reduction']!r}")


def _layout(*lists: Any) -> Any:
    """Types, shapes, dtypes and layouts of all features; None of what is no list of dense tensors."""
    try:
        if not all(isinstance(features, (list, tuple)) for features in lists):
            return None
        return [[(type(x), x.shape, x.dtype, x.layout) for x in features] for features in lists]
    except (AttributeError, RuntimeError):  # a nested tensor has no shape
        return None
