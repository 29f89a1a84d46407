"""Per-channel mean and variance of the teacher, calibrated on the first batches and constant from then on."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.ops.levels import is_traced
from fastkd.ranks import sum_over_ranks, world_size


class KeepsPrecision(nn.Module):
    """A module whose buffers keep their dtype when the model that contains it is cast to another."""

    def _apply(self, fn: Any, recurse: bool = True) -> KeepsPrecision:
        kept = dict(self.named_buffers())
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in self.named_buffers():
            if value.dtype != kept[name].dtype:
                setattr(self, name, kept[name].to(value.device))
        return self


class ChannelStatistics(KeepsPrecision):
    """Running mean and variance of the teacher's channels at one level; the buffers are empty until the first batch.

    Batches are merged by the formula of Chan, Golub and LeVeque (1983). A variance below 1e-4 times the level's mean
    variance counts as that in ``rstd``, so that a dead channel is not amplified.
    """

    count: Tensor
    mean: Tensor
    square: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float32))
        self.register_buffer("mean", torch.zeros(0, dtype=torch.float32))
        self.register_buffer("square", torch.zeros(0, dtype=torch.float32))  # sum of squared distances from the mean
        self._cached: tuple[list[Tensor], list[int], tuple[Tensor, Tensor]] | None = None  # buffers, versions, moments

    def prepare(self, channels: int) -> None:
        """Give the buffers their size, which must not change once DDP has seen them."""
        if self.mean.numel() == 0:
            self.mean, self.square = (x.new_zeros(channels) for x in (self.mean, self.square))

    @torch.no_grad()
    def update(self, feature: Tensor, *, all_ranks: bool = False) -> None:
        """Add an (N, C, H, W) batch to the statistics.

        Args:
            feature: the teacher's feature; floating point, N may be 0.
            all_ranks: add the batches of all ranks, which must then call this together.
        """
        all_ranks = all_ranks and world_size() > 1
        if feature.numel() == 0 and not all_ranks:
            return
        self.prepare(feature.shape[1])
        if feature.numel():
            variance, mean = torch.var_mean(feature.to(self.mean.dtype), dim=(0, 2, 3), correction=0)
            finite = variance.isfinite().all()  # a batch that overflowed gets a weight of 0
            cells = finite * (feature.numel() // feature.shape[1])
            variance, mean = (torch.where(finite, x, 0) for x in (variance, mean))
        else:
            cells, mean, variance = (torch.zeros_like(x) for x in (self.count, self.mean, self.square))
        if all_ranks:
            cells, mean, variance = _over_ranks(cells, mean, variance)
        share = cells / (self.count + cells).clamp_min(1)
        distance = mean - self.mean
        self.square.add_(variance * cells + distance.square() * self.count * share)
        self.mean.add_(distance * share)
        self.count.add_(cells)

    @torch.no_grad()
    def pool(self) -> None:
        """Merge the statistics that each rank has collected by itself; all ranks must call this together.

        Ranks may hold the same statistics, from DDP or a checkpoint, so the merged count is the mean over the ranks
        that have any.
        """
        holders = (self.count > 0).to(self.count.dtype)
        sum_over_ranks(holders)
        count, mean, variance = _over_ranks(self.count, self.mean, self.square / self.count.clamp_min(1))
        self.count.copy_(count / holders.clamp_min(1))
        self.mean.copy_(mean)
        self.square.copy_(variance * self.count)

    def moments(self) -> tuple[Tensor, Tensor] | None:
        """Return (mean, rstd), two (C,) float32 tensors, or None before the first batch.

        The same tensors are returned until the statistics change.
        """
        traced, buffers = is_traced(), list(self._buffers.values())
        if self._cached is not None and not traced:
            seen, versions, moments = self._cached
            if all(map(operator.is_, buffers, seen)) and [x._version for x in seen] == versions:
                return moments
        if self.mean.numel() == 0:
            return None
        variance = torch.where(self.count > 0, self.square / self.count.clamp_min(1), 1)
        # a copy, because the next batch may change the mean in place before the backward of this one
        moments = self.mean.clone(), variance.clamp_min(1e-4 * variance.mean()).clamp_min(1e-12).rsqrt()
        own = [self.count, self.mean, self.square]
        if not traced and all(type(x) is Tensor and not x.is_inference() for x in (*own, *moments)):
            self._cached = own, [x._version for x in own], moments
        return moments

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("mean", "square"):
            if prefix + name in state_dict:  # the number of channels is unknown before the first batch
                setattr(self, name, getattr(self, name).new_zeros(state_dict[prefix + name].shape))
        super()._load_from_state_dict(state_dict, prefix, *args)


def _over_ranks(count: Tensor, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return count, mean and variance over all ranks; in float64, where E[x^2] - E[x]^2 is precise enough."""
    m, n = mean.double(), count.double()
    sums = torch.cat([n.reshape(1), n * m, n * (variance.double() + m.square())])
    sum_over_ranks(sums)
    n, first, second = sums[0], *sums[1:].chunk(2)
    m = first / n.clamp_min(1)
    v = (second / n.clamp_min(1) - m.square()).clamp_min(0)
    return n.to(mean.dtype), m.to(mean.dtype), v.to(mean.dtype)
