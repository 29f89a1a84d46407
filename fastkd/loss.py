"""``distill_loss``, the functional form, and ``DistillLoss``, the module with adapters and teacher statistics."""

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
    r"""Return the feature distillation loss of a student against a frozen teacher, over all levels at once.

    For each level, with w the information map (see ``InfoMap``), s the student's feature, t' the teacher's feature
    (standardised where asked), p the cells of all images and c the channels::

        loss = weights[level] * sum_p w_p * sum_c rho(s_pc - t'_pc) / Z

    Only the student gets a gradient; the teacher, the map and the prior are constants. With the defaults, the map is
    the energy of the teacher over its mean, and Z is the number of elements. The method is that of Li et al. (2022,
    doi 10.3778/j.issn.1002-8331.2101-0089), who weight a YOLOv3 teacher's backbone and neck by an information map. They
    publish no formula for the map; see ``PRESETS`` for the formulas here.

    Args:
        student_feats: one (N, C, H, W) tensor per level, backbone then neck; float16, bfloat16, float32 or float64,
            with any strides (channels_last is read without a copy).
        teacher_feats: the teacher's features, of the same shapes and without gradient; the dtype may differ.
        info_map: the name of a preset (``fastkd.PRESETS``) or an ``InfoMap``.
        prior: per level an (N, H, W) floating tensor q >= 0 that multiplies the map, or None.
        standardize: per level (mean, rstd), two (C,) vectors, where rstd is 1 / standard deviation: t' = (t - mean) *
            rstd. False or None: t' = t. Maps of the standardised teacher (``self_information``, ``graded_iou``,
            ``uniform_standardized``) need these vectors, which ``DistillLoss`` calibrates. ``"batch"``, the default of
            the map ``pkd``: student and teacher are each standardised by the mean and standard deviation of their own
            batch, with the gradient through both.
        weights: one finite number per level; all 1 by default.
        penalty: rho: ``"l2"`` x^2; ``"l1"`` abs(x); ``"smooth_l1"`` as ``torch.nn.SmoothL1Loss``. Or ``"cwd"``, the
            channel-wise distillation of Shu et al. (2021, arXiv:2011.13256), which PyTorch's own operations compute:
            beta^2 KL(P || Q), where P and Q are the softmax over the cells of each channel of t' / beta and s / beta,
            and Z is N C.
        beta: > 0; the value at which ``smooth_l1`` turns from quadratic to linear, or the temperature of ``cwd``.
        divisor: Z: ``"elements"`` N C H W; ``"map"`` C sum(w), over the batch; ``"map_all_ranks"`` C sum(w) over the
            batches of all ranks, divided by the number of ranks, so that averaged gradients (DDP) equal those of one
            process with the whole batch; ``"batch"`` N. The default is the map's own (``InfoMap.divisor``).
        reduction: ``"sum"`` over levels, a scalar; ``"none"``: one loss per level, (L,).
        backend: ``"cpp"``, ``"triton"``, ``"reference"``, or None for the preferred one that works on this device; see
            ``fastkd.backends()``.

    Returns:
        A float32 scalar, or (L,) tensor with ``reduction="none"``; float64 if any feature is float64.

    Raises:
        ValueError: lists that are empty or of unequal length; shapes or devices that differ; a negative prior; a
            teacher or a prior that requires grad; an unknown name (the message lists the known ones).
        TypeError: not a list, not a dense tensor, or not a floating dtype.
        RuntimeError: a backend that is not built (the message tells how to build it); a second or a forward-mode
            derivative of a compiled backend (``"reference"`` has both, and works under ``torch.func``).
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
    """Return the student's features and the teacher's (mean, rstd) per level for ``distill_loss``'s ``standardize``."""
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
            "standardize: expected (mean, rstd) per level, as this info_map needs a standardised teacher, got "
            f"{standardize}; DistillLoss calibrates them. To use the features without standardisation: "
            "standardize=False, or info_map='energy' or 'uniform'"
        )
    return student, None


class DistillLoss(nn.Module):
    """``distill_loss`` as a module with 1x1 adapters, the teacher's channel statistics, a loss weight and its schedule.

    Calling an adapter returns its output without its bias, because the loss adds the bias in its kernel.
    Adapters keep their dtype: outside autocast, student features of another dtype are converted. Statistics stay
    float32.

    Args:
        student_channels, teacher_channels: numbers of channels of the student and the teacher at each level, for one
            1x1 convolution per level. None: the adapters take them from the first batch.
        levels: number of levels, where neither channels nor adapters are given.
        adapters: one module per level instead, from the student's feature to the teacher's shape; ``nn.Identity()``
            for no adapter.
        standardize: whether the target is the teacher standardised per channel; ``"batch"``: student and teacher are
            each standardised by the moments of their own batch (adapters then have no bias); None: as ``info_map``.
        calibration_batches: number of first training batches (a batch of all ranks counts as one) from which the
            teacher's statistics are computed; they are constant afterwards. A batch with values that are not finite is
            left out. In eval mode before the first training batch, the teacher is not standardised.
        weight: factor of the loss; or ``"auto"``: each training step uses the factor that brings the moving average of
            the distillation loss to ``share`` times that of the task loss. The averages are over about 50 steps and all
            ranks, and are part of the module's state. They are of absolute values, as a task loss may be negative (a
            log-likelihood). The very first step has no average yet and is balanced by its own losses. ``forward`` then
            needs ``task_loss``. No gradient flows through the factor.
        share: the ratio of distillation loss and task loss, > 0; for ``weight="auto"``.
        warmup_steps: number of training forwards over which the loss grows linearly to its full weight.
        decay: ``"linear"`` or ``"cosine"``: the weight falls to zero between the end of the warm-up and ``stop_step``.
        stop_step: the loss is zero from this training forward on.
        info_map, weights, penalty, beta, divisor, reduction, backend: as in ``distill_loss``, except that
            ``"map_all_ranks"`` means ``"map"`` in eval mode, where no rank waits for another.

    Attributes:
        level_losses: (L,) losses of the last forward, detached, before ``weight`` and its schedule.
        loss_weight: the module that holds the factor; its buffer ``step`` counts training forwards, and ``factor`` is
            the factor of the next one.
        options: all other options of the loss, frozen.

    Raises:
        ValueError, TypeError: as in ``distill_loss``; arguments with different numbers of levels.
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
        self._seen_shapes: Any = None  # layout of the last features; the same layout needs no check or preparation
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
        """Return the loss of ``distill_loss`` times its weight; a training step with grad also calibrates and counts.

        Args:
            student_feats, teacher_feats, prior: as in ``distill_loss``; the student's features are those before the
                adapters.
            task_loss: the trainer's own loss, a scalar; needed for ``weight="auto"``.
            donated: per level, whether the student's gradient may overwrite the memory of the teacher's feature. The
                caller promises that nothing else uses that memory. Empty: no level.

        Raises:
            ValueError, TypeError: as in ``distill_loss``; another number of levels or channels than the adapters have;
                no ``task_loss`` where the weight needs it.
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
        learns = self.training and torch.is_grad_enabled()  # validation under no_grad is not a training step
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
        """Return the loss times its factor, and the levels' losses without it; only a training step waits for ranks."""
        options, weight = self.active_options, self.loss_weight
        if weight.is_known:
            return run(levels, options, weight.current_factor)
        loss, losses = run(levels, options, one_pass=False)  # the factor depends on these losses
        return loss * weight.balanced(losses, task, all_ranks=learns).to(loss.dtype), losses

    @property
    def waits_for_ranks(self) -> bool:
        """Whether the next training forward sums something over the ranks."""
        sums = self.loss_weight.is_auto or self.options.divisor == "map_all_ranks" or not self.calibrated
        return sums and not self.loss_weight.stopped

    def standalone_copy(self) -> DistillLoss:
        """Return a copy in training mode that has its full weight and waits for no other process, for a check."""
        copied = copy.deepcopy(self).train()
        copied.loss_weight, copied._standalone = self.loss_weight.full(), True
        return copied

    @property
    def active_options(self) -> LossOptions:
        """The options of the next forward: Z is summed over all ranks only in training steps, which all ranks take."""
        learns = self.training and torch.is_grad_enabled()
        waits = self.options.divisor == "map_all_ranks" and learns and not self._standalone
        return self.options if waits or self.options.divisor != "map_all_ranks" else self._options_of_one_rank

    def adapted(self, student_feats: Sequence[Tensor]) -> list[Tensor]:
        """Return the student's features after the adapters, bias included."""
        return [adapted(adapter, s) for adapter, s in zip(self.adapters, student_feats, strict=True)]

    def standardized(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> tuple[Sequence[Tensor], Moments]:
        """Return the adapted student features, standardised for ``"batch"``, and the teacher's (mean, rstd)."""
        if self.standardize == OWN_BATCH:
            return standardized(student, teacher, self.options.info_map, OWN_BATCH)
        return student, self.moments()

    def moments(self) -> list[tuple[Tensor, Tensor] | None] | None:
        """Return (mean, rstd) per level, two (C,) vectors, for the ``standardize`` of ``distill_loss``; or None."""
        if self.standardize is not True:
            return None
        return [x.moments() for x in self.statistics]  # type: ignore[operator]

    def skip_step(self, student_feats: Sequence[Tensor]) -> Tensor:
        """Return the loss of a training step without the teacher: 0. The step is counted, but enters no average."""
        adapters = self.adapters.parameters()
        learns = any(p.requires_grad and not isinstance(p, UninitializedParameter) for p in adapters)
        # without the features where possible: their gradients of zeros would cost a few percent of a training step
        losses, loss = self.level_losses, self.zero_loss(() if learns and world_size() == 1 else student_feats)
        self.level_losses = losses  # those of the last forward
        self.loss_weight.skip()
        return loss

    def zero_loss(self, student_feats: Sequence[Tensor] = ()) -> Tensor:
        """Return the zero loss after ``stop_step``; its graph contains features and adapters, as DDP expects."""
        self.level_losses = torch.zeros(len(self.adapters), device=self.loss_weight.step.device)
        learning = [p for p in self.adapters.parameters() if not isinstance(p, UninitializedParameter)]
        # empty slices, because 0 times a value that is not finite would be NaN
        empty = [*(p.flatten()[:0] for p in learning), *(x[:0] for x in student_feats)]
        zero: Tensor = self.level_losses + sum(x.sum() for x in empty)
        return zero.sum() if self.options.reduction == "sum" else zero

    def _require_levels(self, student_feats: Sequence[Tensor], teacher_feats: Sequence[Tensor]) -> None:
        for name, feats in (("student_feats", student_feats), ("teacher_feats", teacher_feats)):
            self._require_features(name, feats)
        for i, (adapter, s) in enumerate(zip(self.adapters, student_feats, strict=True)):
            takes = adapter.in_channels if isinstance(adapter, nn.Conv2d) else 0  # 0: not known
            if takes and takes != s.shape[1]:
                raise ValueError(
                    f"student_feats[{i}]: expected the {takes} channels that its adapter takes, got {s.shape[1]}"
                )

    def _require_features(self, name: str, feats: Sequence[Tensor]) -> None:
        count = len(require_features(name, feats))
        if count != len(self.adapters):
            raise ValueError(f"{name}: expected {len(self.adapters)} levels, as this DistillLoss has, got {count}")

    @torch.no_grad()
    def calibrate(self, teacher_feats: Sequence[Tensor], *, all_ranks: bool = False) -> None:
        """Add one batch of teacher features to the statistics, which are constant after ``calibration_batches``.

        Args:
            teacher_feats: one (N, C, H, W) tensor per level.
            all_ranks: add the batches of all ranks, which must call this together; otherwise this rank's batch alone.

        Raises:
            TypeError, ValueError: features that ``distill_loss`` refuses, or another number of levels.
            RuntimeError: one rank's batch after the first training forward of several ranks: their statistics would
                differ.
        """
        if self._pooled and not (all_ranks or self._standalone):
            raise RuntimeError(
                "calibrate: expected a call before the first training forward, which merges the statistics of all "
                "ranks; let the training batches calibrate instead, which are merged over the ranks"
            )
        self._require_features("teacher_feats", teacher_feats)
        for statistics, feature in zip(self.statistics, teacher_feats, strict=True):
            statistics.update(feature, all_ranks=all_ranks)  # type: ignore[operator]
        shared = all_ranks and world_size() > 1  # an empty batch counts as a batch only if other ranks may have images
        self._batches_seen += shared or all(feature.numel() for feature in teacher_feats)
        self.calibrated = self._batches_seen >= self.calibration_batches

    @torch.no_grad()
    def _pool(self) -> None:
        """In the first training forward of several ranks, merge the statistics that each was calibrated with."""
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
        """Give adapters and statistics that have no number of channels yet the numbers of these features."""
        self._require_levels(student_feats, teacher_feats)
        self._prepare(student_feats, teacher_feats)

    @torch.no_grad()
    def _prepare(self, student_feats: Sequence[Tensor], teacher_feats: Sequence[Tensor]) -> None:
        if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
            with torch.inference_mode(False):  # what a validation makes here has to serve training too
                self._prepare(student_feats, teacher_feats)
            return
        for statistics, t in zip(self.statistics, teacher_feats, strict=True):
            statistics.prepare(t.shape[1])  # type: ignore[operator]
        triples = zip(self.adapters, student_feats, teacher_feats, strict=True)
        waiting = [(adapter, s, t) for adapter, s, t in triples if isinstance(adapter, LazyAdapter)]
        if waiting:
            with same_random_state(student_feats[0].device):
                for adapter, s, t in waiting:
                    adapter.prepare(s, t)

    def keep_levels(self, levels: int, weights: Sequence[float] | None = None) -> None:
        """Keep the first ``levels`` levels, if the others' adapters are lazy, and set the weights of those kept."""
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
    """Check each entry of the arguments that give the number of levels; ``make_adapters`` compares the numbers."""
    for name, widths in (("student_channels", student_channels), ("teacher_channels", teacher_channels)):
        for i, width in enumerate([] if widths is None else require_sequence(name, widths, "integers")):
            require_int(f"{name}[{i}]", width, 1)
    if levels is not None:
        require_int("levels", levels, 1)
    for i, x in enumerate(adapters if isinstance(adapters, Sequence) else ()):
        if not isinstance(x, nn.Module):
            raise TypeError(f"adapters[{i}]: expected a module (nn.Identity() for none), got {kind_of(x)}")


def _can_hold_gradient(student: Tensor, teacher: Tensor) -> bool:
    """Whether the gradient can be written into the teacher feature's memory: same dtype and dense, same layout."""
    return student.dtype == teacher.dtype and not teacher.is_inference() and is_dense_like(student, teacher)


def require_scalar(options: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` for loss options that return no scalar, which a trainer needs."""
    if options.get("reduction", "sum") != "sum":
        raise ValueError(f"reduction: expected 'sum', as a trainer needs a scalar, got {options['reduction']!r}")


def _layout(*lists: Any) -> Any:
    """Return types, shapes, dtypes and layouts of all features; None for anything but lists of dense tensors."""
    try:
        if not all(isinstance(features, (list, tuple)) for features in lists):
            return None
        return [[(type(x), x.shape, x.dtype, x.layout) for x in features] for features in lists]
    except (AttributeError, RuntimeError):  # a nested tensor has no shape
        return None
