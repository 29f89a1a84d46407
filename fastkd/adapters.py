"""1x1 convolutions that map a student's features to the teacher's number of channels."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastkd.ops.arguments import require_sequence


class Adapter(nn.Conv2d):
    """A 1x1 convolution whose bias is added by the loss.

    The loss reads every feature anyway, so adding the bias there costs nothing; its gradient, the feature's gradient
    summed over images and cells, is computed there too. ``forward`` therefore returns the convolution without the bias;
    ``adapted`` adds it.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight)


class LazyAdapter(nn.LazyConv2d):
    """An ``Adapter`` that takes its numbers of channels from the first features."""

    cls_to_become = Adapter

    def prepare(self, student: Tensor, teacher: Tensor) -> None:
        """Become an ``Adapter`` from the student's number of channels to the teacher's, on the student's device.

        Args:
            student, teacher: (N, C, H, W) features of the level.
        """
        self.out_channels = teacher.shape[1]
        self.to(student.device)
        self(student[:0].to(torch.get_default_dtype()))
        forget_converted_weights()


def same_random_state(device: torch.device) -> AbstractContextManager[None]:
    """Return a context that restores the random state, so that a distiller leaves a seeded run's data and weights."""
    if device.type == "cpu":
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=[device], device_type=device.type)


def forget_converted_weights() -> None:
    """Clear autocast's weights after a forward under ``no_grad``: torch 2.10 would train with them, without a graph."""
    torch.clear_autocast_cache()


def without_bias(adapter: nn.Module, student: Tensor) -> Tensor:
    """Return the student's feature with the teacher's number of channels, before the adapter's bias is added.

    Outside autocast, a student feature of another dtype is converted to the adapter's.
    """
    weight = adapter.weight if isinstance(adapter, Adapter) else next(adapter.parameters(), None)
    if weight is not None and weight.dtype != student.dtype and not torch.is_autocast_enabled(student.device.type):
        student = student.to(weight.dtype)
    adapted: Tensor = adapter(student)
    return adapted


def bias_of(adapter: nn.Module) -> Tensor | None:
    """Return the (C,) bias that must be added to ``without_bias``; None for a module that adds its own."""
    return adapter.bias if isinstance(adapter, Adapter) else None


def adapted(adapter: nn.Module, student: Tensor) -> Tensor:
    """Return the student's feature with the teacher's number of channels, bias included."""
    feature, bias = without_bias(adapter, student), bias_of(adapter)
    return feature if bias is None else feature + bias.to(feature.dtype)[:, None, None]


def make_adapters(
    student_channels: Sequence[int] | None,
    teacher_channels: Sequence[int] | None,
    levels: int | None,
    adapters: Sequence[nn.Module] | None,
    bias: bool = True,
) -> list[nn.Module]:
    """Return one adapter per level: the given modules, or 1x1 convolutions.

    The convolutions have the given numbers of channels, or else take them from the first batch.

    Raises:
        ValueError: lengths that differ or are 0; adapters and channels together; channels of one model alone.
    """
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
            raise ValueError("adapters: expected no student_channels or teacher_channels together with adapters")
        return list(adapters)
    if student_channels is not None and teacher_channels is not None:
        with same_random_state(torch.get_default_device()):
            return [Adapter(s, t, 1, bias=bias) for s, t in zip(student_channels, teacher_channels, strict=True)]
    if student_channels is not None or teacher_channels is not None:
        raise ValueError("DistillLoss: expected both student_channels and teacher_channels, or neither; got one")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that lazy modules may change; what is used here has not
        return [LazyAdapter(0, 1, bias=bias) for _ in range(counts.pop())]
