"""Gradients' memory on the CPU: used again, but never while anyone holds it."""

from __future__ import annotations

import gc
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import fastkd
from fastkd.ops import buffers

SHAPES = [(2, 64, 52, 52), (2, 330, 13, 13), (2, 3, 13, 13)]  # the last is too small to be kept


def gradients(scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = ([torch.randn(s, generator=generator) for s in SHAPES] for _ in range(2))
    student = [s.requires_grad_() for s in student]
    loss = scale * fastkd.distill_loss(student, teacher, backend="cpp")
    return list(torch.autograd.grad(loss, student))


@pytest.fixture(autouse=True)
def no_blocks() -> None:
    gc.collect()
    buffers.release()


def free_blocks() -> list[int]:
    """Their sizes."""
    buffers.empty_like([])  # counts what has come back
    return sorted(len(block) for _, block in buffers._free)


def test_steps_use_the_same_memory() -> None:
    first = gradients()
    places, values = [g.data_ptr() for g in first[:2]], [g.clone() for g in first]
    del first
    for _ in range(3):
        again = gradients()
        assert [g.data_ptr() for g in again[:2]] == places
        assert all(torch.equal(x, y) for x, y in zip(again, values, strict=True))
        del again
    assert len(free_blocks()) == 2


def test_a_gradient_that_is_held_keeps_its_memory() -> None:
    first = gradients(1.0)
    kept = [g.clone() for g in first]
    last = first[1][1:]  # a view keeps its level's block, and no other
    del first
    second, third = gradients(2.0), gradients(3.0)
    assert torch.equal(last, kept[1][1:])
    torch.testing.assert_close(second, [2 * x for x in kept])
    torch.testing.assert_close(third, [3 * x for x in kept])
    del last, second, third
    assert len(free_blocks()) == 5  # two of each gradient, but the second took the first's larger one


def test_layouts_dtypes_and_lines() -> None:
    features = [
        torch.empty(4, 130, 33, 31, dtype=torch.bfloat16).to(memory_format=torch.channels_last),
        torch.empty(2, 3, 1, 1, dtype=torch.float64),
        torch.empty(0, 3, 4, 4),
        torch.empty(4, 130, 33, 31),
        torch.empty(1, 1, 3, 3, dtype=torch.float16),
    ]
    room = buffers.empty_like(features)
    for got, x in zip(room, features, strict=True):
        assert (got.shape, got.stride(), got.dtype) == (x.shape, x.stride(), x.dtype)
        assert got.data_ptr() % 64 == 0
    for i, got in enumerate(room):
        got.fill_(i)
    assert all((got == i).all() for i, got in enumerate(room))


def room_of(size: int) -> Tensor:
    return buffers.empty_like([torch.empty(size, dtype=torch.uint8).view(1, 1, 1, size)])[0]


def test_a_block_serves_sizes_down_to_half_of_its_own() -> None:
    for size in (1 << 20, 3 << 19, 1 << 19):
        room = room_of(size)
        del room
    assert free_blocks() == [1 << 20, 3 << 19]


def test_blocks_that_nobody_needs_any_more_go_back_to_the_system() -> None:
    held = [room_of(1 << 19) for _ in range(5)]
    del held
    assert len(free_blocks()) == 5
    for _ in range(buffers.CALLS):
        room = room_of(1 << 20)
        del room
    assert free_blocks() == [1 << 20]


def test_small_or_strange_features_are_allocated_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    small, cropped = torch.empty(1, 2, 3, 4), torch.empty(2, 64, 99, 99)[..., 1:]
    for x in (small, cropped):
        assert buffers.empty_like([x])[0].stride() == torch.empty_like(x).stride()
    monkeypatch.setattr(buffers, "_can_map", False)
    assert buffers.empty_like([torch.empty(2, 64, 99, 99)])[0].shape == (2, 64, 99, 99)
    assert not free_blocks()


def test_threads_do_not_share_a_block() -> None:
    expected = gradients()

    def same(i: int) -> bool:
        return all(torch.equal(x, i * y) for x, y in zip(gradients(float(i)), expected, strict=True))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(same, [1, 2, 4, 8] * 8))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_does_not_wait_for_a_thread_that_it_lacks() -> None:
    with buffers._lock:
        child = os.fork()
        if child == 0:
            os._exit(0 if buffers._lock.acquire(blocking=False) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("call", ["madvise", "mmap"])
def test_a_system_that_refuses_gets_ordinary_memory(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(mmap.mmap):
        def madvise(self, *_: Any) -> None:
            raise OSError(22, "Invalid argument")

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(12, "Cannot allocate memory")

    expected = gradients()
    buffers.release()
    monkeypatch.setattr(mmap, "mmap", Refusing if call == "madvise" else refuse)
    assert all(torch.equal(x, y) for x, y in zip(gradients(), expected, strict=True))
