"""Memory for gradients on the CPU that is kept from step to step.

A fresh allocation of this size comes from the kernel page by page as it is first written, and goes back when it is
freed; for one image of YOLOv3's levels that took longer than the loss itself. Kept, and in huge pages where the kernel
has them, it costs nothing. Storages of such gradients cannot be resized.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
import weakref
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

SMALLEST = 1 << 18  # bytes; below, PyTorch's own allocation is as good
CALLS = 16  # a block that so many calls of ``empty_like`` found no use for goes back to the system

_lock = threading.Lock()
_free: list[tuple[int, mmap.mmap]] = []  # (when it came back, block)
_returned: deque[mmap.mmap] = deque()  # finalizers run anywhere, within the lock too, and so only append here
_calls = 0


def empty_like(tensors: Sequence[Tensor]) -> list[Tensor]:
    """As ``torch.empty_like`` of each; large ones, on the CPU, in blocks that are used again once it is gone."""
    global _calls
    with _lock:
        _calls += 1
        while _returned:
            _free.append((_calls, _returned.popleft()))
        _free[:] = [(since, block) for since, block in _free if _calls - since < CALLS]
        return [
            _lend(x) if _can_map and x.nbytes >= SMALLEST and _is_plain(x) else torch.empty_like(x) for x in tensors
        ]


def release() -> None:
    """Give all memory that no tensor uses back to the system."""
    with _lock:
        _returned.clear()
        _free.clear()


def _is_plain(x: Tensor) -> bool:
    dense = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
    return dense and x.device.type == "cpu"


def _lend(x: Tensor) -> Tensor:
    try:
        block = _take(x.nbytes)
    except OSError:  # as many mappings as the system allows
        return torch.empty_like(x)
    lease = memoryview(block)  # the tensor's storage holds it
    weakref.finalize(lease, _returned.append, block).atexit = False
    return torch.frombuffer(lease, dtype=x.dtype, count=x.numel()).as_strided(x.shape, x.stride())


def _take(size: int) -> mmap.mmap:
    """The smallest free block that fits, if it fits well, or a new one."""
    fits = [i for i, (_, block) in enumerate(_free) if size <= len(block) <= 2 * size]
    if fits:
        return _free.pop(min(fits, key=lambda i: len(_free[i][1])))[1]
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            block.madvise(mmap.MADV_HUGEPAGE)
    return block


def _renew_lock() -> None:
    """In a child process: the thread that held it may not be there."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)

_can_map = hasattr(mmap, "MAP_PRIVATE") and hasattr(mmap, "MAP_ANONYMOUS")
