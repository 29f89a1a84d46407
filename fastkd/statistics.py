"""What is known of a teacher's channels: running moments, calibrated on the first batches and constant from then on."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.ops.levels import is_traced
from fastkd.ranks import sum_over_ranks, world_size


class KeepsPrecision(nn.Module):
    """Buffers that stay as precise as they are, whatever dtype the model around them is cast to."""

    def _apply(self, fn: Any, recurse: bool = True) -> KeepsPrecision:
        kept = dict(self.named_buffers())
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in self.named_buffers():
            if value.dtype != kept[name].dtype:
                setattr(self, name, kept[name].to(value.device))
        return self


class ChannelStatistics(KeepsPrecision):
    """Running mean and variance of one level's teacher, per channel; empty until the first batch.

    Batches are merged as by Chan et al. (1983). ``rstd`` keeps a channel whose variance is under a ten-thousandth
    of the level's mean variance, for example of a dead one, from being blown up.
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
        if feature.numel():
            variance, mean = torch.var_mean(feature.to(self.mean.dtype), dim=(0, 2, 3), correction=0)
            finite = variance.isfinite().all()  # a batch that overflowed counts for nothing
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
        """(mean, rstd), each (C,), or None before the first batch; the same tensors until the statistics change."""
        traced, buffers = is_traced(), list(self._buffers.values())
        if self._cached is not None and not traced:
            seen, versions, moments = self._cached
            if all(map(operator.is_, buffers, seen)) and [x._version for x in seen] == versions:
                return moments
        if self.mean.numel() == 0:
            return None
        variance = torch.where(self.count > 0, self.square / self.count.clamp_min(1), 1)
        # a copy, because the next batch changes the mean in place, maybe before this one's backward
        moments = self.mean.clone(), variance.clamp_min(1e-4 * variance.mean()).clamp_min(1e-12).rsqrt()
        own = [self.count, self.mean, self.square]
        if not traced and all(type(x) is Tensor and not x.is_inference() for x in (*own, *moments)):
            self._cached = own, [x._version for x in own], moments
        return moments

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
