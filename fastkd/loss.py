"""``distill_loss``, the functional form, and ``DistillLoss``, the module that owns adapters and teacher statistics."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from fastkd import ops, teacher_memory
from fastkd.info_map import NORMALIZERS, PENALTIES, InfoMap, require_known, require_positive, resolve
from fastkd.levels import check, require_features, require_sequence, require_weights, warn_if_nothing_learns
from fastkd.loss_weight import KeepsPrecision, LossWeight
from fastkd.one_pass import SHARED, Upstreams
from fastkd.ranks import sum_over_ranks, world_size
from fastkd.reference import EPS

REDUCTIONS = ("sum", "none")


def distill_loss(
    student_feats: Sequence[Tensor],
    teacher_feats: Sequence[Tensor],
    *,
    info_map: str | InfoMap = "self_information",
    prior: Sequence[Tensor | None] | None = None,
    standardize: Sequence[tuple[Tensor, Tensor] | None] | None = None,
    weights: Sequence[float] | None = None,
    penalty: str = "l2",
    beta: float = 1.0,
    normalizer: str | None = None,
    reduction: str = "sum",
    backend: str | None = None,
    reuse_teacher_memory: bool = False,
    one_pass: bool | None = None,
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
        standardize: per level (mean, rstd), two (C,) vectors: t' = (t - mean) * rstd; or None for t' = t.
        weights: one finite number per level; all 1 by default.
        penalty: rho: ``"l2"`` x^2; ``"l1"`` abs(x); ``"smooth_l1"`` as ``torch.nn.SmoothL1Loss``.
        beta: > 0, where ``smooth_l1`` turns from quadratic to linear.
        normalizer: Z: ``"elements"`` N C H W; ``"map"`` C sum(w), over the batch; ``"map_all_ranks"`` the same over
            the batches of all ranks, divided by their number, so that averaged gradients (DDP) are those of one
            process with the whole batch; ``"batch"`` N. By default the one that goes with the map.
        reduction: ``"sum"`` over levels, a scalar; ``"none"``: one loss per level, (L,).
        backend: ``"cpp"``, ``"triton"``, ``"reference"``, or None for the one that suits most here, see
            ``fastkd.backends()``.
        reuse_teacher_memory: the student's gradient may replace the teacher's features in memory, so that none is
            allocated: use them before, they are gone afterwards. Nor may that memory be filled again, by a teacher that
            writes into the same buffers say, while the gradient is held: in the ``.grad`` of a leaf, for example. For
            eager calls of a compiled backend, where all teacher features have their student's dtype, none was made in
            ``torch.inference_mode``, no hooks on saved tensors are at work (activation checkpointing), and a gradient
            is needed; else nothing is overwritten.
        one_pass: let the forward write the gradient too, for the upstream gradient of the last backward; the backward
            computes it anew where another comes (scales it, where it replaced the teacher). None: where that was
            measured to be faster, on the CPU, as long as the upstream gradient stays the same from step to step.
            The result has the same bits (but where scaled). Not under ``torch.compile``, a tracer or hooks on saved
            tensors (activation checkpointing), nor for ``map_all_ranks``.

    Returns:
        float32 scalar or (L,) tensor; float64 if any feature is float64.

    Raises:
        ValueError: lists of unequal length or empty; shapes, devices or values that do not fit; a teacher or a prior
            that requires grad; an unknown name (the message lists the known ones).
        TypeError: not a list, not a tensor, or not a floating dtype.
        RuntimeError: the backend is not built here (says how to build it); a second or a forward-mode derivative of
            a compiled backend (the reference has both, and works under ``torch.func``).
    """
    return _distill_loss(
        student_feats, teacher_feats, info_map, prior, standardize, weights, penalty, beta, normalizer, reduction,
        backend, reuse_teacher_memory, one_pass, SHARED,
    )  # fmt: skip


def _distill_loss(
    student_feats: Sequence[Tensor],
    teacher_feats: Sequence[Tensor],
    info_map: str | InfoMap,
    prior: Sequence[Tensor | None] | None,
    standardize: Sequence[tuple[Tensor, Tensor] | None] | None,
    weights: Sequence[float] | None,
    penalty: str,
    beta: float,
    normalizer: str | None,
    reduction: str,
    backend: str | None,
    reuse_teacher_memory: bool,
    one_pass: bool | None,
    upstreams: Upstreams,
) -> Tensor:
    info = resolve(info_map)
    normalizer = info.normalizer if normalizer is None else normalizer
    require_known("normalizer", normalizer, NORMALIZERS)
    require_known("penalty", penalty, PENALTIES)
    require_known("reduction", reduction, REDUCTIONS)
    require_positive("beta", beta)
    levels = check(
        student_feats, teacher_feats, info=info, prior=prior, standardize=standardize, weights=weights
    )  # fmt: skip
    backend = ops.choose(backend, levels.student[0].device, levels.dtype)
    if one_pass:
        ops.require_one_pass(backend, levels.student[0].device, normalizer)
    if not torch.compiler.is_compiling():
        teacher_memory.require_intact(levels.teacher)
        if reuse_teacher_memory:
            teacher_memory.require_own(levels)
    warn_if_nothing_learns(levels.student)
    losses, mass = ops.level_losses(
        *(levels, info, penalty, float(beta), normalizer, backend),
        in_one_pass=one_pass,
        reuse_teacher_memory=reuse_teacher_memory,
        upstreams=upstreams,
    )
    if normalizer == "map_all_ranks":
        losses = losses / _mean_over_ranks(mass, levels.student)
    return losses.sum() if reduction == "sum" else losses


def _mean_over_ranks(mass: Tensor, student: Sequence[Tensor]) -> Tensor:
    """Z of ``map_all_ranks``: C times the map's mass, averaged over the ranks of the default process group."""
    mass = mass.detach().clone()
    ranks = sum_over_ranks(mass)
    channels = torch.tensor([x.shape[1] for x in student], dtype=mass.dtype).to(mass.device, non_blocking=True)
    return channels * mass / ranks + EPS


class ChannelStatistics(KeepsPrecision):
    """Running mean and variance of one level's teacher, per channel; empty until the first batch.

    Batches are merged as by Chan et al. (1983). ``rstd`` keeps a channel whose variance is under a ten-thousandth
    of the level's mean variance, a dead one say, from being blown up.
    """

    count: Tensor
    mean: Tensor
    square: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(0))
        self.register_buffer("square", torch.zeros(0))  # sum of squared distances from the mean

    def prepare(self, channels: int) -> None:
        """Give the buffers their size, which DDP wants to stay as it is."""
        if self.mean.numel() == 0:
            self.mean, self.square = (x.new_zeros(channels) for x in (self.mean, self.square))

    @torch.no_grad()
    def update(self, feature: Tensor, *, all_ranks: bool = False) -> None:
        """Add an (N, C, H, W) batch; or those of all ranks, which then have to call this together."""
        all_ranks = all_ranks and world_size() > 1
        if feature.numel() == 0 and not all_ranks:
            return
        self.prepare(feature.shape[1])
        variance, mean = torch.var_mean(feature.to(self.mean.dtype), dim=(0, 2, 3), correction=0)
        finite = variance.isfinite().all()  # a batch that overflowed counts for nothing
        cells = finite * (feature.numel() // feature.shape[1])
        variance, mean = (torch.where(finite, x, 0) for x in (variance, mean))
        if all_ranks:
            cells, mean, variance = _over_ranks(cells, mean, variance)
        share = cells / (self.count + cells).clamp_min(1)
        distance = mean - self.mean
        self.square.add_(variance * cells + distance.square() * self.count * share)
        self.mean.add_(distance * share)
        self.count.add_(cells)

    @torch.no_grad()
    def pool(self) -> None:
        """Take what each rank has seen by itself as seen by all, which have to call this together.

        Ranks may have the same from DDP or a checkpoint, so it counts as much as one of them has on average.
        """
        holders = (self.count > 0).to(self.count.dtype)
        sum_over_ranks(holders)
        count, mean, variance = _over_ranks(self.count, self.mean, self.square / self.count.clamp_min(1))
        self.count.copy_(count / holders.clamp_min(1))
        self.mean.copy_(mean)
        self.square.copy_(variance * self.count)

    def moments(self) -> tuple[Tensor, Tensor] | None:
        """(mean, rstd), each (C,), or None before the first batch."""
        if self.mean.numel() == 0:
            return None
        variance = torch.where(self.count > 0, self.square / self.count.clamp_min(1), 1)
        # a copy, because the next batch changes the mean in place, maybe before this one's backward
        return self.mean.clone(), variance.clamp_min(1e-4 * variance.mean()).clamp_min(1e-12).rsqrt()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("mean", "square"):
            if prefix + name in state_dict:  # before the first batch the number of channels is unknown
                setattr(self, name, getattr(self, name).new_zeros(state_dict[prefix + name].shape))
        super()._load_from_state_dict(state_dict, prefix, *args)


def _over_ranks(count: Tensor, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Moments of what all ranks have seen together; in float64, where the difference of squares costs nothing."""
    m, n = mean.double(), count.double()
    sums = torch.cat([n.reshape(1), n * m, n * (variance.double() + m.square())])
    sum_over_ranks(sums)
    n, first, second = sums[0], *sums[1:].chunk(2)
    m = first / n.clamp_min(1)
    v = (second / n.clamp_min(1) - m.square()).clamp_min(0)
    return n.to(mean.dtype), m.to(mean.dtype), v.to(mean.dtype)


class DistillLoss(nn.Module):
    """``distill_loss`` with what it needs to keep: 1x1 adapters, the teacher's statistics, level weights, warm-up.

    Adapters keep their dtype: outside autocast, student features of another are converted. Statistics stay float32.

    Args:
        student_channels, teacher_channels: widths of each level's student and teacher, for the adapters: one 1x1
            convolution a level. None: adapters take their widths from the first batch (``levels`` says how many).
        levels: number of levels, where no channels and no adapters are given.
        adapters: one module per level instead (``nn.Identity()`` for none), student feature to teacher's shape.
        standardize: imitate the teacher standardised per channel; None: as the preset of ``info_map`` says.
        calibration_batches: the teacher's statistics are taken from so many first training batches, each of all ranks
            together, then fixed; what is not finite is left out. Before the first one, in eval mode, the teacher is
            not standardised.
        weight: factor of the loss; or ``"auto"``: at each training forward the one that brings the loss to ``share``
            times the task loss, both as moving averages over some 50 steps (and over all ranks), which the module's
            state keeps. ``forward`` then needs ``task_loss``. No gradient flows through the factor.
        share: of the task loss, > 0; for ``weight="auto"``.
        warmup_steps: the loss grows linearly to its full weight over so many training forwards.
        decay: ``"linear"`` or ``"cosine"``: from the end of the warm-up it falls to zero at ``stop_step``.
        stop_step: from this training forward on the loss is zero.
        info_map, weights, penalty, beta, normalizer, reduction, backend, reuse_teacher_memory, one_pass: as in
            ``distill_loss``; but ``"map_all_ranks"`` is ``"map"`` in eval mode, where no rank waits for another.

    Attributes:
        level_losses: (L,) losses of the last forward, detached, before ``weight`` and its schedule.
        loss_weight: what they were multiplied with; its buffer ``step`` counts training forwards.

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
        standardize: bool | None = None,
        calibration_batches: int = 8,
        weights: Sequence[float] | None = None,
        penalty: str = "l2",
        beta: float = 1.0,
        normalizer: str | None = None,
        weight: float | str = 1.0,
        share: float = 1.0,
        warmup_steps: int = 0,
        decay: str | None = None,
        stop_step: int | None = None,
        reduction: str = "sum",
        backend: str | None = None,
        reuse_teacher_memory: bool = False,
        one_pass: bool | None = None,
    ) -> None:
        super().__init__()
        self.info_map = resolve(info_map)
        self.standardize = self.info_map.standardize if standardize is None else standardize
        require_known("penalty", penalty, PENALTIES)
        require_known("reduction", reduction, REDUCTIONS)
        require_positive("beta", beta)
        if normalizer is not None:
            require_known("normalizer", normalizer, NORMALIZERS)
        if isinstance(calibration_batches, bool) or not isinstance(calibration_batches, int) or calibration_batches < 1:
            raise ValueError(f"calibration_batches: expected an integer >= 1, got {calibration_batches!r}")
        if backend is not None:
            ops.require_backend(backend)
        self.adapters = nn.ModuleList(_adapters(student_channels, teacher_channels, levels, adapters))
        count = len(self.adapters)
        if weights is not None:
            require_weights(weights, count)
        self.statistics = nn.ModuleList(ChannelStatistics() for _ in range(count))
        self.calibration_batches = calibration_batches
        self.calibrated = not self.standardize
        self.weights, self.penalty, self.beta = weights, penalty, beta
        self.normalizer, self.reduction, self.backend = normalizer, reduction, backend
        self.reuse_teacher_memory, self.one_pass = reuse_teacher_memory, one_pass
        self._upstreams = Upstreams()
        self.loss_weight = LossWeight(weight, share, warmup_steps, decay, stop_step)
        self._batches_seen = 0
        self._pooled = self._alone = False
        self.level_losses = torch.zeros(count)

    def forward(
        self,
        student_feats: Sequence[Tensor],
        teacher_feats: Sequence[Tensor],
        prior: Sequence[Tensor | None] | None = None,
        task_loss: Tensor | float | None = None,
    ) -> Tensor:
        """The loss, as ``distill_loss``, times its weight; in training it also calibrates and counts the step."""
        self._require_levels(student_feats, teacher_feats)
        if self.training and self.loss_weight.stopped:
            return self.zero(student_feats)
        warn_if_nothing_learns(student_feats)  # before the adapters, whose outputs require grad in any case
        self.prepare(student_feats, teacher_feats)
        if self.training:
            self._pool()
            if not self.calibrated:
                self.calibrate(teacher_feats, all_ranks=not self._alone)
        losses = _distill_loss(
            self.adapted(student_feats),
            teacher_feats,
            info_map=self.info_map,
            prior=prior,
            standardize=self.moments(),
            weights=self.weights,
            penalty=self.penalty,
            beta=self.beta,
            normalizer=self.active_normalizer,
            reduction="none",
            backend=self.backend,
            reuse_teacher_memory=self.reuse_teacher_memory,
            one_pass=self.one_pass,
            upstreams=self._upstreams,
        )
        self.level_losses = losses.detach()
        factor: Tensor = self.loss_weight(self.level_losses.sum(), task_loss)
        losses = losses * factor.to(losses.dtype)
        return losses.sum() if self.reduction == "sum" else losses

    def alone(self) -> DistillLoss:
        """A copy in training, to try: at full weight, and waiting for no other process."""
        copied = copy.deepcopy(self).train()
        copied.loss_weight, copied._alone = self.loss_weight.full(), True
        return copied

    @property
    def active_normalizer(self) -> str:
        """Z of the next forward: but in training, which all ranks do together, no other process is asked for it."""
        z = self.normalizer or self.info_map.normalizer
        return "map" if z == "map_all_ranks" and (self._alone or not self.training) else z

    def adapted(self, student_feats: Sequence[Tensor]) -> list[Tensor]:
        """The student's features at the teacher's widths."""
        return [_adapted(adapter, s) for adapter, s in zip(self.adapters, student_feats, strict=True)]

    def moments(self) -> list[tuple[Tensor, Tensor] | None] | None:
        """(mean, rstd) of each level's teacher, two (C,) vectors: ``distill_loss``'s ``standardize``."""
        return [x.moments() for x in self.statistics] if self.standardize else None  # type: ignore[operator]

    def zero(self, student_feats: Sequence[Tensor] = ()) -> Tensor:
        """What ``forward`` is once the loss has stopped: features and adapters are part of it, as DDP expects."""
        self.level_losses = torch.zeros(len(self.adapters), device=self.loss_weight.step.device)
        learning = [p for p in self.adapters.parameters() if not isinstance(p, UninitializedParameter)]
        # of what may not be finite, an empty part
        zero: Tensor = self.level_losses + sum(x.flatten()[:0].sum() for x in (*learning, *student_feats))
        return zero.sum() if self.reduction == "sum" else zero

    def _require_levels(self, student_feats: Sequence[Tensor], teacher_feats: Sequence[Tensor]) -> None:
        for name, feats in (("student_feats", student_feats), ("teacher_feats", teacher_feats)):
            levels = require_features(name, feats)
            if len(levels) != len(self.adapters):
                raise ValueError(
                    f"{name}: expected {len(self.adapters)} levels, as this DistillLoss has, got {len(levels)}"
                )
        for i, (adapter, s) in enumerate(zip(self.adapters, student_feats, strict=True)):
            takes = adapter.in_channels if isinstance(adapter, nn.Conv2d) else 0  # 0: not yet, or not ours to know
            if takes and takes != s.shape[1]:
                raise ValueError(
                    f"student_feats[{i}]: expected {takes} channels, as its adapter takes, got {s.shape[1]}"
                )

    @torch.no_grad()
    def calibrate(self, teacher_feats: Sequence[Tensor], *, all_ranks: bool = False) -> None:
        """Add one batch of teacher features to the statistics; after ``calibration_batches`` they stay fixed.

        Args:
            teacher_feats: one (N, C, H, W) tensor per level.
            all_ranks: add the batches of all ranks, which have to call this together; else this rank's own.

        Raises:
            RuntimeError: this rank's own after the first training forward of several ranks, which then differ.
        """
        if self._pooled and not (all_ranks or self._alone):
            raise RuntimeError(
                "calibrate: expected it before the first training forward, which brought the ranks' statistics "
                "together; let the training batches do it, which are those of all ranks"
            )
        for statistics, feature in zip(self.statistics, teacher_feats, strict=True):
            statistics.update(feature, all_ranks=all_ranks)  # type: ignore[operator]
        shared = all_ranks and world_size() > 1  # an empty batch of one rank counts for none, but for all as a step
        self._batches_seen += shared or all(feature.numel() for feature in teacher_feats)
        self.calibrated = self._batches_seen >= self.calibration_batches

    @torch.no_grad()
    def _pool(self) -> None:
        """Once, in the first training forward of several ranks: all go on from what any of them was calibrated with."""
        if self._pooled or self._alone or not self.standardize or world_size() == 1 or torch.compiler.is_compiling():
            return
        self._pooled = True
        seen = torch.tensor(self._batches_seen, device=self.loss_weight.step.device)
        torch.distributed.all_reduce(seen, torch.distributed.ReduceOp.MAX)
        for statistics in self.statistics:
            statistics.pool()  # type: ignore[operator]
        self._batches_seen = int(seen)
        self.calibrated = self._batches_seen >= self.calibration_batches

    @torch.no_grad()
    def prepare(self, student_feats: Sequence[Tensor], teacher_feats: Sequence[Tensor]) -> None:
        """Give adapters and statistics that wait for their first batch their widths; else there is nothing to do."""
        for statistics, t in zip(self.statistics, teacher_feats, strict=True):
            statistics.prepare(t.shape[1])  # type: ignore[operator]
        for adapter, s, t in zip(self.adapters, student_feats, teacher_feats, strict=True):
            if isinstance(adapter, nn.LazyConv2d):
                adapter.out_channels = t.shape[1]
                adapter.to(s.device)
                adapter(s[:0].to(torch.get_default_dtype()))

    def keep_levels(self, levels: int, weights: Sequence[float] | None = None) -> None:
        """Drop the adapters and statistics of all but the first ``levels``; new weights, one for each that stays."""
        if weights is not None:
            require_weights(weights, levels)
        del self.adapters[levels:], self.statistics[levels:]
        self.level_losses, self.weights = self.level_losses[:levels], weights

    def get_extra_state(self) -> dict[str, int]:
        return {"batches_seen": self._batches_seen}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self._batches_seen = state["batches_seen"]
        self.calibrated = not self.standardize or self._batches_seen >= self.calibration_batches


def require_scalar(options: Mapping[str, Any]) -> None:
    """Refuse loss options with which no trainer can go on."""
    if options.get("reduction", "sum") != "sum":
        raise ValueError(f"reduction: expected 'sum', as a trainer needs one number, got {options['reduction']!r}")


def _adapted(adapter: nn.Module, s: Tensor) -> Tensor:
    """The student's feature at the teacher's width; adapters keep their dtype where the student has another."""
    weight = next(adapter.parameters(), None)
    if weight is not None and weight.dtype != s.dtype and not torch.is_autocast_enabled(s.device.type):
        s = s.to(weight.dtype)
    adapted: Tensor = adapter(s)
    return adapted


def _adapters(
    student_channels: Sequence[int] | None,
    teacher_channels: Sequence[int] | None,
    levels: int | None,
    adapters: Sequence[nn.Module] | None,
) -> list[nn.Module]:
    """The modules given, or a 1x1 convolution per level, of the widths given or of those of the first batch."""
    adapters = list(adapters) if isinstance(adapters, nn.ModuleList) else adapters
    given = {"student_channels": student_channels, "teacher_channels": teacher_channels, "adapters": adapters}
    counts = {len(require_sequence(name, x, "entries")) for name, x in given.items() if x is not None}
    counts |= {levels} if levels is not None else set()
    if len(counts) != 1 or 0 in counts:
        raise ValueError(
            "DistillLoss: expected student_channels and teacher_channels, or adapters, or levels, all of one length "
            f"> 0; got lengths {sorted(counts) or 'none'}"
        )
    if adapters is not None:
        if student_channels is not None or teacher_channels is not None:
            raise ValueError("adapters: expected no student_channels or teacher_channels beside them")
        return list(adapters)
    if student_channels is not None and teacher_channels is not None:
        return [nn.Conv2d(s, t, 1) for s, t in zip(student_channels, teacher_channels, strict=True)]
    if student_channels is not None or teacher_channels is not None:
        raise ValueError("DistillLoss: expected both student_channels and teacher_channels, or neither; got one")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls lazy modules new; what we use of them is old
        return [nn.LazyConv2d(0, 1) for _ in range(counts.pop())]
