"""``DistillationCallback`` adds distillation to a Lightning trainer, without changes to the LightningModule."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastkd.distiller import Distiller
from fastkd.loss import require_scalar

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
else:
    try:
        from lightning.pytorch import Callback, LightningModule, Trainer
        from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
    except ImportError:  # the same library under its older name
        from pytorch_lightning import Callback, LightningModule, Trainer
        from pytorch_lightning.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy


def _first(batch: Any) -> Any:
    """Return the images of a batch: the batch itself, or the first entry of a tuple or list."""
    images = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if isinstance(images, Mapping):
        raise TypeError(
            f"images: expected batches that are images or begin with images, got a {type(images).__name__} with "
            f"{', '.join(map(repr, images))}; pass a function that returns the images: images=lambda batch: batch[KEY]"
        )
    return images


class DistillationCallback(Callback):
    """Adds the distillation loss to the loss that ``training_step`` returns::

        distillation = DistillationCallback(teacher, student="detector", backbone=[("layer4", "layer6")], neck=[...])
        Trainer(callbacks=[distillation, ...]).fit(module, loader)

    The module is unchanged, and its ``state_dict`` contains only the student. Adapters and the teacher's statistics are
    in the callback's part of Lightning's checkpoint, so ``fit(ckpt_path=...)`` resumes distillation too. The adapters
    join the parameter groups of the student's optimiser. Two values are logged: ``distill_loss``, weighted as in the
    sum, and for each level ``distill_loss/NAME``, unweighted, where NAME is the student's module (followed by the
    teacher's, if a module of the student has several partners).

    It works in one process or under the ``ddp`` strategies, in any precision, and with accumulated gradients (where
    ``weight="auto"`` and schedules count batches, not optimiser steps).

    Args:
        teacher: the trained teacher; it is moved to the trainer's device.
        student: name of the submodule that is the student, as in ``named_modules()``; "" is the module itself.
        images: a function of a batch of the loader that returns the input of teacher and student; by default the first
            entry of a tuple or list, else the batch itself.
        **options: arguments of ``fastkd.Distiller`` (``backbone``, ``neck``, ``prior``, ...) and of ``DistillLoss``.
            ``weight`` is ``"auto"`` by default.

    Attributes:
        distiller: the ``Distiller``; None before training starts.

    Raises:
        TypeError: a module with manual optimisation; a ``training_step`` that returns no loss; batches that are
            dictionaries, without ``images``.
        ValueError: a strategy that shards the model; ``reduction="none"``; the errors of ``fastkd.Distiller``.
    """

    def __init__(
        self,
        teacher: nn.Module,
        *,
        student: str = "",
        images: Callable[[Any], Any] = _first,
        **options: Any,
    ) -> None:
        self.teacher, self.student, self.images = teacher, student, images
        require_scalar(options)
        self.options = {"weight": "auto", **options}
        self.distiller: Distiller | None = None
        self._call: nn.Module | None = None  # the distiller, wrapped in DDP if there are several processes
        self._ready = False  # whether the adapters have their numbers of channels
        self._saved: dict[str, Any] | None = None
        self._restore: Callable[[], None] | None = None  # the module's own training_step

    # ---- Lightning's hooks, in the order that it calls them

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if not pl_module.automatic_optimization:
            raise TypeError(
                "DistillationCallback: expected automatic optimisation, as it adds to the loss that training_step "
                f"returns, got a {type(pl_module).__name__} with manual optimisation; make a fastkd.Distiller in the "
                "module instead, and add distiller.loss(images) before manual_backward"
            )
        whole = isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy))
        if not whole or isinstance(trainer.strategy, DeepSpeedStrategy):  # a subclass of DDPStrategy that shards
            raise ValueError(
                "DistillationCallback: expected one device or a ddp strategy, which do not shard the model, got "
                f"{type(trainer.strategy).__name__}"
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict["distiller"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        student = pl_module.get_submodule(self.student)
        self.teacher = trainer.precision_plugin.convert_module(self.teacher).to(pl_module.device)
        if self.distiller is None or self.distiller.student is not student:
            self.distiller, self._ready = Distiller(student, self.teacher, **self.options), False
        self.distiller.to(pl_module.device).train()
        if self._saved is not None:
            self.distiller.load_state_dict(self._saved)
            self._saved, self._ready = None, True
        if self._ready:  # before Lightning restores the state of the optimiser, which includes the adapters
            self._train_adapters(trainer)
        self._call = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step = pl_module.training_step

        @functools.wraps(step)
        def distilled(batch: Any, *args: Any, **kwargs: Any) -> Any:
            return self._add_loss(trainer, pl_module, batch, step(batch, *args, **kwargs))

        # on this instance and during training only; it runs inside DDP's forward and autocast, like the original
        before = {name: x for name, x in pl_module.__dict__.items() if name == "training_step"}  # e.g. a compiled one
        pl_module.training_step = distilled  # type: ignore[method-assign]

        def restore() -> None:
            pl_module.__dict__.pop("training_step", None)
            pl_module.__dict__.update(before)

        self._restore = restore

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._call is not None or self.distiller is None:
            return
        self.distiller.prepare(self.images(batch))
        if not self._ready:
            self._ready = True
            self._train_adapters(trainer)
        parallel = isinstance(trainer.strategy.model, DistributedDataParallel)
        self._call = DistributedDataParallel(self.distiller) if parallel else self.distiller

    def state_dict(self) -> dict[str, Any]:
        return {"distiller": self.distiller.state_dict()} if self.distiller is not None and self._ready else {}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._restore is not None:
            self._restore()
            self._restore = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)

    # ---- helpers

    def _train_adapters(self, trainer: Trainer) -> None:
        """Add the adapters to existing parameter groups, as schedulers would not know a new group."""
        assert self.distiller is not None
        weights = {id(p) for p in self.distiller.student.parameters()}
        held = [{id(p) for group in x.param_groups for p in group["params"]} for x in trainer.optimizers]
        of_student = [x for x, own in zip(trainer.optimizers, held, strict=True) if own & weights]
        self.distiller.add_to((of_student or trainer.optimizers)[0])

    def _add_loss(self, trainer: Trainer, pl_module: LightningModule, batch: Any, output: Any) -> Any:
        """Return the output of ``training_step`` with the distillation loss added to its loss."""
        if output is None:  # the step is skipped
            return None
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor):
            raise TypeError(
                "DistillationCallback: expected training_step to return a tensor or a dict with one under 'loss', got "
                f"{type(output).__name__}"
            )
        assert self.distiller is not None
        assert self._call is not None
        if isinstance(self._call, DistributedDataParallel):  # accumulated gradients are averaged at the last batch
            model = cast(DistributedDataParallel, trainer.strategy.model)
            self._call.require_backward_grad_sync = model.require_backward_grad_sync
        distill = self._call(self.images(batch), task_loss=loss)
        pl_module.log("distill_loss", distill.detach())
        levels = self.distiller.levels or []
        students = [student for student, _ in levels]
        for (student, taught_by), value in zip(levels, self.distiller.criterion.level_losses, strict=True):
            name = student if students.count(student) == 1 else f"{student}-{taught_by}"
            pl_module.log(f"distill_loss/{name}", value)
        total = loss + distill
        return {**output, "loss": total} if isinstance(output, Mapping) else total
