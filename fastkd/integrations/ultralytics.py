"""Distillation in Ultralytics' own trainer, for its detection models (Ultralytics 8.4 or newer)::

    from ultralytics import YOLO
    from fastkd.integrations.ultralytics import DistillationTrainer

    YOLO("yolov3-tiny.yaml").train(trainer=DistillationTrainer("yolov3.pt"), data="coco8.yaml", epochs=100)

or ``python -m fastkd.integrations.ultralytics --teacher yolov3.pt --student yolov3-tiny.yaml --data coco8.yaml``.

Ultralytics is under the AGPL-3.0 and not a dependency of fastkd: install it yourself (``pip install ultralytics``). Its
``.pt`` files are pickles, which can run code when they are loaded: use only teachers from sources that you trust.
"""

from __future__ import annotations

import argparse
import ast
import copy
import os
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastkd.distiller import Distiller
from fastkd.files import replacing
from fastkd.health import fingerprint
from fastkd.loss import require_scalar
from fastkd.loss_weight import weight_of
from fastkd.modes import eval_mode

try:
    import ultralytics
    from ultralytics.engine.model import Model
    from ultralytics.models.yolo.detect import DetectionTrainer
    from ultralytics.nn.modules.head import Detect
    from ultralytics.utils import DEFAULT_CFG, LOGGER, RANK
except ImportError as error:
    raise ImportError(
        "fastkd.integrations.ultralytics needs Ultralytics, which is not a dependency of fastkd (AGPL-3.0): "
        f"pip install ultralytics ({error})"
    ) from error

if tuple(map(int, ultralytics.__version__.split(".")[:2])) < (8, 4):
    raise ImportError(
        f"fastkd.integrations.ultralytics needs Ultralytics 8.4 or newer, got {ultralytics.__version__}: "
        "pip install --upgrade ultralytics"
    )

COLUMN = "distill_loss"  # of the progress table and of results.csv
PROBE = 256  # height and width of the image that levels are found with: a multiple of all strides up to 256
FINEST = 8  # backbone levels below this stride are left out, unless a detection head starts at a finer stride
HANDOVER = "FASTKD_ULTRALYTICS_DISTILLATION"  # environment variable: file with the options, for processes of a DDP run
STATES = "distillation"  # folder next to the checkpoints


class DistillationTrainer:
    """The value for ``model.train(trainer=...)``: it makes a ``Trainer`` that distils ``teacher`` into the model.

    Levels are found in the graphs of the models. Neck levels are the inputs of the detection head; backbone levels are
    the last layers of each stride >= 8 (>= 4, if a head starts there). Both are matched by stride, so the models may
    have different numbers of levels; a level of only one model is left out.

    Args:
        teacher: path or name of a ``.pt``, a ``YOLO`` or any module, which is frozen in place. Its classes may differ.
        backbone, neck: ``"auto"``; None for no levels; or as in ``fastkd.Distiller``: ``[(student, teacher), ...]`` or
            ``([student, ...], [teacher, ...])``, of layer indices, module names or modules.
        weight: ``"auto"`` keeps the distillation loss at ``share`` times the detection loss; a number is the factor
            relative to the detection terms as Ultralytics shows them (it multiplies all terms by the batch size).
        **options: ``share`` and all other options of ``fastkd.Distiller`` and ``fastkd.DistillLoss``: ``info_map``,
            ``warmup_steps``, ``stop_step``, ``prior``, ... For several GPUs they must be picklable.

    Raises:
        TypeError: ``teacher`` is of another type.
        ValueError: ``reduction="none"``, as a trainer needs a scalar.
    """

    def __init__(
        self,
        teacher: str | os.PathLike[str] | nn.Module,
        *,
        backbone: Any = "auto",
        neck: Any = "auto",
        weight: float | str = "auto",
        **options: Any,
    ) -> None:
        if not isinstance(teacher, (str, os.PathLike, nn.Module)):
            raise TypeError(f"teacher: expected a path, a YOLO or a module, got a {type(teacher).__name__}")
        require_scalar(options)
        self.teacher = teacher.model if isinstance(teacher, Model) else teacher
        self.levels = {"backbone": backbone, "neck": neck}
        self.options = {"weight": weight, **options}

    def __call__(self, cfg: Any = DEFAULT_CFG, overrides: Any = None, _callbacks: Any = None) -> Trainer:
        return Trainer(cfg, overrides, _callbacks, distillation=self)

    @property
    def name(self) -> str:
        """The description of the teacher, for messages."""
        return f"a {type(self.teacher).__name__}" if isinstance(self.teacher, nn.Module) else str(self.teacher)

    def load_teacher(self) -> nn.Module:
        """Return the teacher: the given module, or the model of the file.

        Raises:
            FileNotFoundError: no such file, and none that Ultralytics could download.
            ValueError: not a ``.pt`` file.
        """
        if isinstance(self.teacher, nn.Module):
            return self.teacher
        if Path(self.teacher).suffix != ".pt":
            raise ValueError(f"teacher: expected trained weights, a .pt file, got {self.name!r}")
        model: nn.Module = ultralytics.YOLO(self.teacher).model.float()
        return model

    def distiller(self, student: nn.Module, teacher: nn.Module, images: Tensor) -> Distiller:
        """Return a distiller with matched levels and adapters, on the device of the images.

        Args:
            student, teacher: the models.
            images: (N, C, H, W) batch to find the strides with.

        Raises:
            ValueError: a level cannot be found; the models have no stride in common (the message lists both).
        """
        auto = [group for group, levels in self.levels.items() if isinstance(levels, str) and levels == "auto"]
        named = {group: _named(levels) for group, levels in self.levels.items() if levels is not None}
        if auto:
            ours, theirs = find_levels("student", student, images), find_levels("teacher", teacher, images)
            named.update({group: (ours[group], theirs[group]) for group in auto})
        options = {"fold_teacher": True, **self.options}
        return Distiller(student, teacher, **named, **options).prepare(images).to(images.device)


def find_levels(role: str, model: nn.Module, images: Tensor) -> dict[str, list[str]]:
    """Return the names of the layers of an Ultralytics detection model to distil, under "backbone" and "neck".

    Args:
        role: "student" or "teacher", for messages.
        model: an Ultralytics model; its graph defines the backbone and the inputs of the detection head.
        images: (N, C, H, W) batch that the stride of each layer is measured with.

    Raises:
        ValueError: not an Ultralytics model, or one that does not end in a detection head.
    """
    layers = getattr(model, "model", None)
    if not isinstance(layers, nn.Sequential) or not isinstance(layers[-1], Detect):
        raise ValueError(
            f"{role}: expected an Ultralytics model that ends in a detection head, to find its levels, got a "
            f"{type(model).__name__}; name the levels: backbone=, neck="
        )
    strides = _strides(model, layers, images)
    head = layers[-1]
    neck = [i if i >= 0 else head.i + i for i in head.f]
    least = min(FINEST, *(strides[i] for i in neck))
    last = {
        strides[i]: i
        for i in range(len(model.yaml["backbone"]))  # type: ignore[index]
        if i in strides and strides[i] >= least and strides[i].is_integer()
    }
    backbone = [i for _, i in sorted(last.items()) if i not in neck]
    return {"backbone": [f"model.{i}" for i in backbone], "neck": [f"model.{i}" for i in neck]}


@torch.no_grad()
def _strides(model: nn.Module, layers: nn.Sequential, images: Tensor) -> dict[int, float]:
    """Return image height over output height of each layer whose output is one feature map."""
    found: dict[int, float] = {}

    def measure(i: int) -> RemovableHandle:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.ndim == 4:
                found[i] = images.shape[2] / output.shape[2]

        return layers[i].register_forward_hook(hook)

    handles = [measure(i) for i in range(len(layers))]
    mode = model.training
    try:
        model.eval()(images)
    finally:
        model.train(mode)
        for handle in handles:
            handle.remove()
    return found


def _named(levels: Any) -> Any:
    """Return the levels with layer indices replaced by module names."""
    if isinstance(levels, int):
        return f"model.{levels}"
    return type(levels)(map(_named, levels)) if isinstance(levels, (list, tuple)) else levels


class Criterion:
    """The criterion of a model with the distillation loss added; the model's ``loss`` calls it, compiled or not.

    A copy is a copy of the original criterion, because a copy of the model has no hooks.
    """

    def __init__(self, criterion: Any, distiller: Distiller) -> None:
        self.criterion, self.distiller = criterion, distiller

    def __call__(self, preds: Any, batch: dict[str, Any]) -> tuple[Tensor, Any]:
        """Return the terms to be summed, and the detached terms to be shown, each with the distillation loss last."""
        terms, shown = self.criterion(preds, batch)
        count = len(batch["img"])  # the terms are multiplied by the batch size, the shown terms are not
        # until 8.4.1xx, validation converts model and images to float16, but not the teacher
        images = batch["img"].to(next(self.distiller.teacher.parameters()).dtype)
        loss = self.distiller.loss(images, task_loss=terms.sum() / count)
        each = loss.detach()
        old = isinstance(shown, Tensor)  # the shown terms have names since 8.4.1xx
        shown = torch.cat([shown, each.reshape(1)]) if old else {**shown, COLUMN: each}
        return torch.cat([terms.reshape(-1), count * loss.reshape(1)]), shown

    def __getattr__(self, name: str) -> Any:  # for schedules of the original criterion, which the trainer calls
        return getattr(self.__dict__["criterion"], name)

    def __deepcopy__(self, memo: Any) -> Any:
        return copy.deepcopy(self.criterion, memo)


class Student(nn.Module):
    """The student and the distiller in one module, for DDP, gradient clipping and ``torch.compile``.

    Like ``DataParallel`` it has the model in ``module``, which Ultralytics unwraps for EMA, checkpoints, criterion and
    parameter groups. A copy or pickle contains only the student.
    """

    def __init__(self, module: nn.Module, distiller: Distiller) -> None:
        super().__init__()
        self.module, self.distiller = module, distiller

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def __deepcopy__(self, memo: Any) -> nn.Module:
        return copy.deepcopy(self.module, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return copy.deepcopy(self).__reduce_ex__(protocol)


class Trainer(DetectionTrainer):  # type: ignore[misc]
    """Ultralytics' detection trainer with a teacher. ``DistillationTrainer`` makes it; subclass it to change more.

    The folder ``weights/distillation/`` has, for the epoch of each checkpoint, the state of the distillation that
    ``resume=True`` needs: adapters, their optimiser state, the teacher's statistics and the state of the loss weight.
    The checkpoints themselves are those of a run without teacher.

    Raises:
        ValueError: another task than detection; ``distill_model`` or ``quantize=8``; a teacher that has no stride in
            common with the student; a run resumed with another teacher (the message names both) or other levels.
        FileNotFoundError: no such teacher; a run resumed from a checkpoint without its distillation state.
    """

    model: Any  # nn.Module
    loss_names: tuple[str, ...]

    def __init__(
        self,
        cfg: Any = DEFAULT_CFG,
        overrides: Any = None,
        _callbacks: Any = None,
        *,
        distillation: DistillationTrainer | None = None,
    ) -> None:
        self.distillation = _handed_over() if distillation is None else distillation
        self.teacher = self.distillation.load_teacher()
        self._distillers: list[Distiller] = []  # whose hooks are removed after training
        super().__init__(cfg, overrides, _callbacks)
        if self.args.task != "detect":
            raise ValueError(
                f"task: expected 'detect', the only task that this trainer supports, got {self.args.task!r}"
            )
        if getattr(self.args, "distill_model", None) is not None:
            raise ValueError("distill_model: expected None, as this trainer has a teacher already")
        if getattr(self.args, "quantize", None) == 8:
            raise ValueError("quantize: expected no quantisation-aware training; distil first, then quantise")

    def train(self) -> None:
        """Train; where Ultralytics starts other processes, they get the options through a temporary file."""
        if not self.ddp:
            try:
                super().train()
            finally:
                while self._distillers:
                    self._distillers.pop().remove()
            return
        with tempfile.TemporaryDirectory() as folder:
            os.environ[HANDOVER] = os.path.join(folder, "distillation.pt")
            torch.save(self.distillation, os.environ[HANDOVER])
            try:
                super().train()
            finally:
                del os.environ[HANDOVER]

    # ---- set-up

    def set_model_attributes(self) -> None:
        """Make the distiller when the model has its weights and device, before it is compiled and wrapped."""
        super().set_model_attributes()
        _place(self.teacher, self.device, self.model)
        images = torch.zeros(1, self.data["channels"], PROBE, PROBE, device=self.device)
        self.distiller = self.distillation.distiller(self.model, self.teacher, images)
        self._distillers.append(self.distiller)
        self.teacher_fingerprint = fingerprint(self.teacher)
        self.model = Student(self.model, self.distiller)

    def build_optimizer(self, model: nn.Module, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Return Ultralytics' optimiser with a last group for the adapters, of equal rate and without weight decay."""
        optimizer: torch.optim.Optimizer = super().build_optimizer(model, *args, **kwargs)
        groups = [group for group in optimizer.param_groups if not group["weight_decay"]]
        alike = min(groups, key=lambda x: (x.get("use_muon", False), x["lr"], x.get("param_group") == "bias"))
        optimizer.add_param_group({**alike, "params": list(self.distiller.parameters()), "param_group": "adapters"})
        return optimizer

    def get_validator(self) -> Any:
        validator = super().get_validator()
        if self.loss_names:  # known here until 8.4.1xx; newer versions take them from the first batch
            self.loss_names = (*self.loss_names, COLUMN)
        return validator

    def progress_string(self) -> str:
        header: str = super().progress_string()
        return header.replace(COLUMN, f"{'distill':>11}")  # columns are 11 wide, one too few for the name

    def resume_training(self, ckpt: Any) -> None:
        """Run Ultralytics' last step of the set-up, then add the distillation loss to the criterion and report."""
        super().resume_training(ckpt)
        student: Any = self.distiller.student
        own = getattr(student, "criterion", None) or student.init_criterion()
        student.criterion = Criterion(own, self.distiller)
        if RANK in {-1, 0}:
            self._report(own)

    def _report(self, criterion: Any) -> None:
        """Log ``Distiller.check`` on a few validation images, all of which have one size within a batch."""
        data = self.test_loader.dataset
        state = random.getstate()  # reading images uses the random state, which the run must have as without teacher
        batch = data.collate_fn([data[i] for i in range(min(4, self.test_loader.batch_size, len(data)))])
        random.setstate(state)
        batch = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        batch["img"] = batch["img"].float() / 255
        student = self.distiller.student
        with torch.no_grad(), eval_mode(student):
            terms, _ = criterion(student(batch["img"]), batch)
        report = self.distiller.check(batch["img"], self.optimizer, terms.sum() / len(batch["img"]))
        if report.ok:
            LOGGER.info(f"distillation from {self.distillation.name}:\n{report}")
        else:
            LOGGER.warning(f"distillation from {self.distillation.name} may not work:\n{report}")

    # ---- validation

    def validate(self) -> Any:
        """Run Ultralytics' validation of the EMA, with a distiller on the EMA for its own distillation loss."""
        ema, distiller = self.ema.ema, self.distiller
        student_to_map, teacher_to_map = distiller.to_maps
        of_ema = Distiller(
            ema,
            distiller.teacher,
            backbone=distiller.levels,
            criterion=distiller.criterion,
            prior=distiller.prior,
            align=distiller.align,
            preprocess=distiller.preprocess,
            student_to_map=student_to_map,
            teacher_to_map=teacher_to_map,
            fold_teacher=False,  # a copy does not pay for these few batches
        )
        distiller.eval()  # neither count nor calibrate
        ema.criterion = Criterion(ema.init_criterion(), of_ema)
        try:
            return super().validate()
        finally:
            ema.criterion = None
            of_ema.remove()
            distiller.train()

    # ---- checkpoints

    def save_model(self) -> Any:
        """Write the distillation state, then Ultralytics' checkpoint; in this order, a kill in between is harmless."""
        with replacing(self._state_file(self.epoch)) as part:
            torch.save(self._state(), part)
        with self._student_alone():
            saved = super().save_model()
        if saved is not False:  # False: weights are not finite
            self._drop_states(keep=self.epoch)
        return saved

    def final_eval(self) -> None:
        """Finish the last checkpoints, which can then no longer be resumed, and remove their distillation states."""
        super().final_eval()
        if RANK in {-1, 0}:
            self._drop_states()

    def _load_checkpoint_state(self, ckpt: dict[str, Any]) -> None:
        """Restore a checkpoint, on resume or after a loss that is not finite."""
        with self._student_alone():
            super()._load_checkpoint_state(ckpt)
        self._restore(ckpt["epoch"])

    def _state(self) -> dict[str, Any]:
        whole = self.optimizer.state_dict()
        return {
            "teacher": (self.distillation.name, self.teacher_fingerprint),
            "levels": self.distiller.levels,
            "distiller": self.distiller.state_dict(),
            "optimizer": [whole["state"].get(i) for i in whole["param_groups"][-1]["params"]],
        }

    def _restore(self, epoch: int) -> None:
        folders = (self.wdir, Path(str(self.args.model)).parent)  # this run's, or that of a checkpoint that was moved
        files = [self._state_file(epoch, folder) for folder in folders]
        file = next((file for file in files if file.is_file()), None)
        if file is None:
            raise FileNotFoundError(
                f"resume: expected the distillation state of epoch {epoch + 1} in {files[-1]}, which does not exist; "
                f"resume from last.pt of a distilled run, with the folder {STATES!r} next to it"
            )
        state = torch.load(file, map_location=self.device, weights_only=True)
        name, saved_fingerprint = state["teacher"]
        if saved_fingerprint != self.teacher_fingerprint:
            raise ValueError(
                f"teacher: expected the teacher of this run, {name} (fingerprint {saved_fingerprint}), got "
                f"{self.distillation.name} ({self.teacher_fingerprint}); resume with the same weights"
            )
        if state["levels"] != self.distiller.levels:
            raise ValueError(f"levels: expected those of this run, {state['levels']}, got {self.distiller.levels}")
        self.distiller.load_state_dict(state["distiller"])
        whole = self.optimizer.state_dict()
        adapters = zip(whole["param_groups"][-1]["params"], state["optimizer"], strict=True)
        whole["state"].update({i: values for i, values in adapters if values is not None})
        self.optimizer.load_state_dict(whole)

    @contextmanager
    def _student_alone(self) -> Iterator[None]:
        """Return a context in which the optimiser has no adapters, as in a run without teacher."""
        group = self.optimizer.param_groups.pop()
        state = {p: self.optimizer.state.pop(p) for p in group["params"] if p in self.optimizer.state}
        try:
            yield
        finally:
            self.optimizer.param_groups.append(group)
            self.optimizer.state.update(state)

    def _state_file(self, epoch: int, folder: Path | None = None) -> Path:
        return (folder or self.wdir) / STATES / f"epoch{epoch}.pt"

    def _drop_states(self, keep: int | None = None) -> None:
        """Remove distillation states whose checkpoint no longer exists, except that of the epoch ``keep``."""
        for file in (self.wdir / STATES).glob("epoch*.pt"):
            if file.name != f"epoch{keep}.pt" and not (self.wdir / file.name).exists():
                file.unlink()
        with suppress(OSError):
            (self.wdir / STATES).rmdir()  # if it is empty


def _handed_over() -> DistillationTrainer:
    if HANDOVER not in os.environ:
        raise TypeError("Trainer: expected a call by DistillationTrainer(teacher); pass that as trainer=")
    # a pickle, but one that the parent process wrote
    handed: DistillationTrainer = torch.load(os.environ[HANDOVER], map_location="cpu", weights_only=False)
    return handed


def _place(teacher: Any, device: torch.device, student: nn.Module) -> None:
    """Move the teacher to the device, in the student's memory format, so that their features have one layout."""
    weights = [p for p in student.parameters() if p.ndim == 4 and not p.is_contiguous()]
    if any(p.is_contiguous(memory_format=torch.channels_last) for p in weights):
        teacher.to(memory_format=torch.channels_last)
    teacher.to(device)


def main(argv: Sequence[str] | None = None) -> None:
    """Distil a student from the command line; ``--help`` lists the arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m fastkd.integrations.ultralytics",
        description="Distil a teacher into an Ultralytics detection model, in Ultralytics' own trainer.",
        epilog="All other arguments are passed to Ultralytics: --epochs 100, --epochs=100 or epochs=100.",
    )
    parser.add_argument("--teacher", required=True, help="trained weights, a .pt file (a pickle: trusted files only)")
    parser.add_argument("--student", required=True, help="a .yaml, or a .pt to start from; with resume=True a last.pt")
    parser.add_argument("--data", help="the .yaml of the data set; not needed to resume")
    parser.add_argument("--info-map", default="self_information", help="one of fastkd.PRESETS (default: %(default)s)")
    parser.add_argument(
        "--weight", default="auto", type=weight_of, help='factor of the distillation loss, or "auto" (default)'
    )
    parser.add_argument(
        "--share", type=float, default=1.0, help="distillation loss / detection loss, with --weight auto (default: 1)"
    )
    args, rest = parser.parse_known_args(argv)
    settings = _settings(parser, rest)
    if args.data is not None:
        settings["data"] = args.data
    trainer = DistillationTrainer(args.teacher, weight=args.weight, share=args.share, info_map=args.info_map)
    ultralytics.YOLO(args.student).train(trainer=trainer, **settings)


def _settings(parser: argparse.ArgumentParser, words: Sequence[str]) -> dict[str, Any]:
    """Return Ultralytics' arguments from ``--key value``, ``--key=value`` and ``key=value``."""
    found: dict[str, Any] = {}
    queue = list(words)
    while queue:
        word = queue.pop(0)
        key, equals, value = word.removeprefix("--").partition("=")
        if not equals:
            if not word.startswith("--") or not queue:
                parser.error(f"expected key=value or --key value, got {word!r}")
            value = queue.pop(0)
        found[key.replace("-", "_")] = _value(value)
    return found


def _value(text: str) -> Any:
    """Return the Python literal (number, list, True, False, None) that the text is, else the text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


if __name__ == "__main__":
    from fastkd.integrations import ultralytics as importable  # the module name that processes of a DDP run can import

    importable.main()
