"""The workloads of the benchmarks, and steps of the loss on them: fastkd's, plain PyTorch's and torch.compile's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastkd
from fastkd import DistillLoss, InfoMap
from fastkd.loss_weight import LossWeight
from fastkd.priors import iou_mask
from fastkd.yolov3 import YOLOv3

# (channels, height) of the teacher's features at each level of YOLOv3's backbone and neck
WORKLOADS = {
    "same6": [(256, 52), (512, 26), (1024, 13), (128, 52), (256, 26), (512, 13)],
    "tiny5": [(256, 52), (512, 26), (1024, 13), (512, 26), (1024, 13)],
    "large6": [(256, 80), (512, 40), (1024, 20), (128, 80), (256, 40), (512, 20)],
}
STUDENT_CHANNELS = {"tiny5": [128, 256, 512, 256, 512]}  # YOLOv3-tiny's, for steps with adapters
BOXES = 8  # per image
Loss = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]
Step = Callable[[Tensor], tuple[Tensor, ...]]  # from the task loss to the loss and the gradients


def shrink() -> None:
    """Make all workloads tiny, to check that code runs."""
    for name, levels in WORKLOADS.items():
        WORKLOADS[name] = [(max(c // 32, 4), 8 * h // levels[0][1]) for c, h in levels]
    for name, channels in STUDENT_CHANNELS.items():
        STUDENT_CHANNELS[name] = [max(c // 32, 4) for c in channels]


def features(
    workload: str, n: int, dtype: torch.dtype, channels_last: bool, device: str = "cpu"
) -> tuple[list[Tensor], list[Tensor]]:
    """Return random features of a workload after the adapters: the student's, which require grad, and the teacher's."""
    return random_features([(n, c, h, h) for c, h in WORKLOADS[workload]], dtype, channels_last, device)


def random_features(
    shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, channels_last: bool, device: str = "cpu"
) -> tuple[list[Tensor], list[Tensor]]:
    """Return random features of these shapes: the student's, which require grad, and the teacher's."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    generator = torch.Generator(device).manual_seed(0)
    student, teacher = (
        [torch.randn(s, generator=generator, device=device).to(dtype, memory_format=layout) for s in shapes]
        for _ in range(2)
    )
    return [s.requires_grad_() for s in student], teacher


def random_targets(n: int, side: int, device: str = "cpu") -> Tensor:
    """Return targets (M, 6) of square images of this side, as ``DetectionLoss`` takes them: image, class, corners."""
    g = torch.Generator().manual_seed(0)
    image = torch.arange(n).repeat_interleave(BOXES)[:, None].float()
    label = torch.randint(80, (n * BOXES, 1), generator=g).float()
    centre, size = (side * (torch.rand(n * BOXES, 2, generator=g) * f + o) for f, o in ((0.6, 0.2), (0.25, 0.05)))
    return torch.cat([image, label, centre - size / 2, centre + size / 2], 1).to(device)


@dataclass
class StepInputs:
    """The inputs of a step of the loss: features, and the boxes from which its prior is computed."""

    student: list[Tensor]
    teacher: list[Tensor]
    boxes: Tensor  # (M, 5): image and corners in pixels
    anchors: list[Tensor]  # anchors of each level, (A, 2)
    adapters: bool  # whether the student's features still need adapters to the teacher's widths
    saved: list[Tensor] = field(default_factory=list)  # a copy of the teacher's features

    def restore(self) -> None:
        """Restore the teacher's features, which may have been donated to a gradient."""
        self.saved = self.saved or [t.clone() for t in self.teacher]
        torch._foreach_copy_(self.teacher, self.saved)

    def prior(self) -> list[Tensor]:
        """Return the graded IoU mask of the boxes, the trainer's default prior."""
        sizes = [(t.shape[2], t.shape[3]) for t in self.teacher]
        side = YOLOv3.strides[0] * sizes[0][0]
        return iou_mask(self.boxes, self.anchors, sizes, (side, side), len(self.teacher[0]), graded=True)


def step_inputs(
    workload: str,
    n: int,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    device: str = "cpu",
    adapters: bool = False,
) -> StepInputs:
    """Return random inputs of a step; with ``adapters``, the student's features have the student's widths."""
    student, teacher = features(workload, n, dtype, channels_last, device)
    if adapters:
        narrow = [(n, c, *t.shape[2:]) for c, t in zip(STUDENT_CHANNELS[workload], teacher, strict=True)]
        student, _ = random_features(narrow, dtype, channels_last, device)
    height = teacher[0].shape[2]
    nearest = [round(height / t.shape[2]).bit_length() - 1 for t in teacher]
    anchors = torch.tensor(YOLOv3.default_anchors, dtype=torch.float32, device=device).view(3, 3, 2)
    targets = random_targets(n, YOLOv3.strides[0] * height, device)
    boxes = torch.cat([targets[:, :1], targets[:, 2:]], 1)
    return StepInputs(student, teacher, boxes, [anchors[i] for i in nearest], adapters)


def eager(
    student: Sequence[Tensor], teacher: Sequence[Tensor], info_map: str | InfoMap = "self_information", **more: Any
) -> Tensor:
    """Return the loss in plain PyTorch."""
    return fastkd.distill_loss(student, teacher, info_map=info_map, backend="reference", **more)


def loss_step(
    provider: str, x: StepInputs, info_map: str = "graded_iou", *, fold_bias: bool = True, donate: bool = False
) -> Step:
    """Return a step of the loss as in training: prior from the boxes, adapters, loss with auto weight, gradients.

    Args:
        provider: ``"fastkd"`` for the default backend, or ``"fastkd-<backend>"``: ``DistillLoss`` in training with
            ``weight="auto"``, calibrated. ``"eager"``: the same in plain PyTorch (the adapters with their bias in the
            convolution). ``"torch.compile"``: the plain formula and the adapters, compiled; prior and weight come from
            the same ops as fastkd's, so that their cost is the same for all.
        x: the inputs.
        info_map: the information map.
        fold_bias: whether fastkd's adapters leave their bias to the loss; False: plain convolutions.
        donate: whether the teacher's features are donated to the gradients, as a ``Distiller`` does if it is the only
            owner; call ``x.restore()`` before each step.
    """
    torch.manual_seed(0)
    device, kind = x.student[0].device, x.student[0].dtype
    widths = [(s.shape[1], t.shape[1]) for s, t in zip(x.student, x.teacher, strict=True)]
    plain = [nn.Conv2d(a, b, 1) if x.adapters else nn.Identity() for a, b in widths]
    ours = provider.startswith("fastkd")
    layers: dict[str, Any] = {"adapters": plain}
    if ours and x.adapters and fold_bias:
        torch.manual_seed(0)  # the same weights as the plain ones
        layers = {"student_channels": [a for a, _ in widths], "teacher_channels": [b for _, b in widths]}
    backend = provider.partition("-")[2] or None if ours else "reference"
    criterion = DistillLoss(**layers, info_map=info_map, weight="auto", calibration_batches=1, backend=backend)
    criterion.train().to(device).adapters.to(kind)
    criterion.calibrate(x.teacher)
    wanted = [*x.student, *criterion.adapters.parameters()]
    donated = [donate] * len(x.teacher)
    if provider == "torch.compile":
        return _compiled_step(x, criterion, info_map, wanted)

    def step(task: Tensor) -> tuple[Tensor, ...]:
        loss = criterion(x.student, x.teacher, x.prior(), task, donated=donated)
        return loss.detach(), *torch.autograd.grad(loss, wanted)

    return step


def _compiled_step(x: StepInputs, criterion: DistillLoss, info_map: str, wanted: list[Tensor]) -> Step:
    adapters, moments, weight = criterion.adapters, criterion.moments(), LossWeight("auto").to(wanted[0].device)

    def plain(prior: list[Tensor], factor: Tensor) -> tuple[Tensor, Tensor]:
        student = [adapter(s) for adapter, s in zip(adapters, x.student, strict=True)]
        losses = eager(student, x.teacher, info_map, prior=prior, standardize=moments, reduction="none")
        return factor * losses.sum(), losses.detach()

    compiled = torch.compile(plain, dynamic=False, fullgraph=True)

    def step(task: Tensor) -> tuple[Tensor, ...]:
        loss, losses = compiled(list(x.prior()), weight.factor)
        gradients = torch.autograd.grad(loss, wanted)
        weight.count(losses, task)
        return loss.detach(), *gradients

    return step


class FallingTask:
    """A task loss that decreases at every step, as in training."""

    def __init__(self, device: str = "cpu") -> None:
        self.value = torch.tensor(10.0, device=device)

    def fall(self) -> Tensor:
        self.value = self.value * 0.999
        return self.value


def adapters_step(x: StepInputs, bias: bool = True) -> Callable[[], tuple[Tensor, ...]]:
    """Return a step of the adapters alone, forward and backward."""
    layers = [
        nn.Conv2d(s.shape[1], t.shape[1], 1, bias=bias, device=s.device, dtype=s.dtype)
        for s, t in zip(x.student, x.teacher, strict=True)
    ]
    wanted = [*x.student, *(p for layer in layers for p in layer.parameters())]

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad([layer(s) for layer, s in zip(layers, x.student, strict=True)], wanted, x.teacher)

    return step


def floor(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Callable[[], None]:
    """Return a lower bound of a step: read student and teacher once, and write one gradient.

    It moves three units, where one unit is the bytes of all student features.
    """
    out = [torch.empty_like(s) for s in student]

    def run() -> None:
        for s, t, o in zip(student, teacher, out, strict=True):
            torch.add(s.detach(), t, out=o)

    return run


def floor_of(x: StepInputs) -> Callable[[], None]:
    """Return the floor at the teacher's widths."""
    return floor([torch.zeros_like(t) for t in x.teacher] if x.adapters else x.student, x.teacher)


class TrivialFunction(torch.autograd.Function):
    """A function that does nothing, to measure the time of autograd itself, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        return upstream


def host_steps(device: str = "cpu") -> dict[str, Callable[[], object]]:
    """Return steps that take time on the host only: six levels of 128 elements, bfloat16, channels_last, with prior."""
    student, teacher = random_features([(1, 8, 4, 4)] * 6, torch.bfloat16, True, device)
    box, anchors = torch.tensor([[0.0, 10, 10, 60, 80]], device=device), torch.ones(6, 1, 2, device=device)
    prior = iou_mask(box, anchors, [(4, 4)] * 6, (128, 128), 1, graded=True)
    criterion = DistillLoss(
        adapters=[nn.Identity() for _ in student], info_map="graded_iou", weight="auto", calibration_batches=1
    ).to(device)
    task, one = FallingTask(device), torch.ones((), device=device)
    scalar = torch.zeros((), device=device, requires_grad=True)
    return {
        "a trivial autograd.Function": lambda: torch.autograd.grad(TrivialFunction.apply(scalar), scalar, one),
        "distill_loss": lambda: torch.autograd.grad(fastkd.distill_loss(student, teacher), student),
        'DistillLoss("auto"), graded_iou': lambda: torch.autograd.grad(
            criterion(student, teacher, prior, task.value), student
        ),
    }


class Dispatched(TorchDispatchMode):
    """Counts the operations that a block dispatches, by name, without views and allocations, which launch no kernel."""

    NOTHING = ("detach", "empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "_unsafe_view")

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return sum(self.names.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not is_view and name not in self.NOTHING:
            self.names[name] += 1
        return func(*args, **(kwargs or {}))


def dispatched(run: Callable[[], object]) -> Counter[str]:
    """Return the operations of a call, by name, after two calls that warm up."""
    for _ in range(2):
        run()
    with Dispatched() as found:
        run()
    return found.names
