"""Sums over the ranks of a distributed training."""

from __future__ import annotations

import torch
from torch import Tensor


def world_size() -> int:
    """Return the number of ranks of the default process group; 1 without one."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return 1
    return torch.distributed.get_world_size()


def is_first_rank() -> bool:
    """Return whether this is rank 0 of the default process group, or there is no group."""
    return world_size() == 1 or torch.distributed.get_rank() == 0


def sum_over_ranks(values: Tensor) -> int:
    """Replace ``values`` by their sum over the ranks of the default process group; return the number of ranks."""
    ranks = world_size()
    if ranks > 1:
        torch.distributed.all_reduce(values)
    return ranks
