"""The workloads that every benchmark names, and the providers that it compares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

import fastkd
from fastkd import ops

# (channels, height) of each level, teacher side: YOLOv3's backbone and neck
WORKLOADS = {
    "same6": [(256, 52), (512, 26), (1024, 13), (128, 52), (256, 26), (512, 13)],
    "tiny5": [(256, 52), (512, 26), (1024, 13), (512, 26), (1024, 13)],
    "large6": [(256, 80), (512, 40), (1024, 20), (128, 80), (256, 40), (512, 20)],
}
Loss = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]


def features(
    workload: str, n: int, dtype: torch.dtype, channels_last: bool, device: str = "cpu"
) -> tuple[list[Tensor], list[Tensor]]:
    """Random student (requires grad) and teacher features of a workload, after the adapters."""
    return random_features([(n, c, h, h) for c, h in WORKLOADS[workload]], dtype, channels_last, device)


def random_features(
    shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, channels_last: bool, device: str = "cpu"
) -> tuple[list[Tensor], list[Tensor]]:
    """Random student (requires grad) and teacher features of these shapes."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    generator = torch.Generator(device).manual_seed(0)
    student, teacher = (
        [torch.randn(s, generator=generator, device=device).to(dtype, memory_format=layout) for s in shapes]
        for _ in range(2)
    )
    return [s.requires_grad_() for s in student], teacher


def _eager(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    return fastkd.distill_loss(student, teacher, backend="reference")


def providers(device: str = "cpu") -> dict[str, Loss]:
    """By name: every compiled backend that works on the device, then plain PyTorch, eager and compiled."""
    ours: dict[str, Loss] = {}
    for name, reason in fastkd.backends(device).items():
        if reason is None and name != "reference":
            ours[f"fastkd-{name}"] = partial(fastkd.distill_loss, backend=name, one_pass=False)
            if (name, device) in ops._has_one_pass:
                ours[f"fastkd-{name}, one pass"] = partial(fastkd.distill_loss, backend=name, one_pass=True)
    return {**ours, "eager": _eager, "torch.compile": torch.compile(_eager, dynamic=False)}


def floor(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Callable[[], None]:
    """What no loss can beat: read student and teacher once, write one gradient (3 units of the student's bytes)."""
    out = [torch.empty_like(s) for s in student]

    def run() -> None:
        for s, t, o in zip(student, teacher, out, strict=True):
            torch.add(s.detach(), t, out=o)

    return run
