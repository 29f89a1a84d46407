"""Memory for gradients on the CPU that is kept from step to step.

A fresh allocation of this size comes from the kernel page by page as it is first written, and goes back when it is
freed; for one image of YOLOv3's levels that took longer than the loss itself. Kept, and in huge pages where the kernel
has them, it costs nothing.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

SMALLEST = 1 << 20  # bytes; below, PyTorch's own allocation is as good
_LINE = 64

_free: list[mmap.mmap] = []  # as many blocks as were ever in use at once, each of the size that was last needed


def empty_like(tensors: Sequence[Tensor]) -> list[Tensor]:
    """As ``torch.empty_like`` of each; large ones, on the CPU, in a block that is used again once all are gone."""
    ends = [0]
    for x in tensors:
        ends.append(ends[-1] + -(-x.nbytes // _LINE) * _LINE)
    if ends[-1] < SMALLEST or not _can_map or not all(_is_plain(x) for x in tensors):
        return [torch.empty_like(x) for x in tensors]
    block = _take(ends[-1])
    lease = memoryview(block)  # every tensor holds it, through its storage
    weakref.finalize(lease, _free.append, block).atexit = False
    return [
        torch.frombuffer(lease, dtype=x.dtype, count=x.numel(), offset=begin).as_strided(x.shape, x.stride())
        if x.numel()
        else torch.empty_like(x)
        for x, begin in zip(tensors, ends, strict=False)
    ]


def _is_plain(x: Tensor) -> bool:
    dense = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
    return dense and x.device.type == "cpu"


def _take(size: int) -> mmap.mmap:
    """A block of at least this size. One that is too small goes back to the system: its successor replaces it."""
    while _free:
        block = _free.pop()
        if len(block) >= size:
            return block
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        block.madvise(mmap.MADV_HUGEPAGE)
    return block


_can_map = hasattr(mmap, "MAP_PRIVATE") and hasattr(mmap, "MAP_ANONYMOUS")
