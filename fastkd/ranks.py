"""Sums over the ranks of a distributed training, but for what one rank does by itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_alone = False


def world_size() -> int:
    """Number of ranks that work together here; 1 without ``torch.distributed``, or within ``alone``."""
    if _alone or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return 1
    return torch.distributed.get_world_size()


def sum_over_ranks(values: Tensor) -> int:
    """Replaces ``values`` by their sum over the default process group; returns its number of ranks."""
    ranks = world_size()
    if ranks > 1:
        torch.distributed.all_reduce(values)
    return ranks


@contextmanager
def alone() -> Iterator[None]:
    """Within it nothing waits for another rank: for what may be called on one of them only."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before
