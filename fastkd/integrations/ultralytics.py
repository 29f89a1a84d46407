"""Distillation inside Ultralytics' own trainer, for its detection models (8.4 or newer)::

    from ultralytics import YOLO
    from fastkd.integrations.ultralytics import DistillationTrainer

    YOLO("yolov3-tiny.yaml").train(trainer=DistillationTrainer("yolov3.pt"), data="coco8.yaml", epochs=100)

or ``python -m fastkd.integrations.ultralytics --teacher yolov3.pt --student yolov3-tiny.yaml --data coco8.yaml``.

Ultralytics is under the AGPL-3.0 and no dependency of fastkd: install it yourself (``pip install ultralytics``). Its
``.pt`` files are pickles, which can run code when they are loaded: take teachers from people whom you trust.
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
PROBE = 256  # pixels of the image that levels are found with: whole cells up to stride 64
FINEST = 8  # backbone levels below this stride are left out, but where a detection head starts there
HANDOVER = "FASTKD_ULTRALYTICS_DISTILLATION"  # names the file with the options, for the processes of a DDP run
STATES = "distillation"  # folder beside the checkpoints


class DistillationTrainer:
    """What ``model.train(trainer=...)`` takes: makes a ``Trainer`` that distils ``teacher`` into the model.

    Levels are found in the models' graphs: the neck's are the inputs of the detection head; the backbone's the last
    layers of each stride from 8 up (from 4, where a head starts there). Both are matched by stride, so heads of unequal
    length are fine, and what only one of the models has is left out.

    Args:
        teacher: path or name of a ``.pt``, a ``YOLO`` or any module, which is frozen in place. Its classes may differ.
        backbone, neck: ``"auto"``; None for none; or as ``fastkd.Distiller`` takes them, ``[(student, teacher), ...]``
            or ``([student, ...], [teacher, ...])``, of layer indices, module names or modules.
        weight: ``"auto"`` holds the distillation loss at ``share`` times the detection loss; else a factor, beside the
            detection terms as Ultralytics shows them (it multiplies all terms by the batch size).
        **options: ``share`` and all other options of ``fastkd.Distiller`` and ``fastkd.DistillLoss``: ``info_map``,
            ``warmup_steps``, ``stop_step``, ``prior``, ... For several GPUs they must be picklable.

    Raises:
        TypeError: ``teacher`` is none of these.
        ValueError: ``reduction="none"``, where a trainer wants one number.
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
        """The teacher, for messages."""
        return f"a {type(self.teacher).__name__}" if isinstance(self.teacher, nn.Module) else str(self.teacher)

    def load_teacher(self) -> nn.Module:
        """The teacher: the module given, or from the file.

        Raises:
            FileNotFoundError: no such file, and none that Ultralytics could download.
            ValueError: a file that is no ``.pt``.
        """
        if isinstance(self.teacher, nn.Module):
            return self.teacher
        if Path(self.teacher).suffix != ".pt":
            raise ValueError(f"teacher: expected trained weights, a .pt file, got {self.name!r}")
        model: nn.Module = ultralytics.YOLO(self.teacher).model.float()
        return model

    def distiller(self, student: nn.Module, teacher: nn.Module, images: Tensor) -> Distiller:
        """A distiller that is ready to use: levels matched, adapters of their widths.

        Raises:
            ValueError: a level cannot be found; the models have no stride in common (lists both).
        """
        auto = [group for group, levels in self.levels.items() if isinstance(levels, str) and levels == "auto"]
        named = {group: _named(levels) for group, levels in self.levels.items() if levels is not None}
        if auto:
            ours, theirs = find_levels("student", student, images), find_levels("teacher", teacher, images)
            named.update({group: (ours[group], theirs[group]) for group in auto})
        options = {"fold_teacher": True, **self.options}
        return Distiller(student, teacher, **named, **options).prepare(images).to(images.device)


def find_levels(role: str, model: nn.Module, images: Tensor) -> dict[str, list[str]]:
    """Names of the layers to distil of an Ultralytics detection model: ``{"backbone": [...], "neck": [...]}``.

    Args:
        role: "student" or "teacher", for messages.
        model: its graph says where the backbone ends and which layers the detection head takes.
        images: (N, C, H, W), to see each layer's stride with.

    Raises:
        ValueError: the model is none of Ultralytics', or does not end in one of its detection heads.
    """
    layers = getattr(model, "model", None)
    if not isinstance(layers, nn.Sequential) or not isinstance(layers[-1], Detect):
        raise ValueError(
            f"{role}: expected an Ultralytics model that ends in a detection head, to find its levels, got a "
            f"{type(model).__name__}; name them: backbone=, neck="
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
    """Image height over output height of each layer whose output is one feature map."""
    found: dict[int, float] = {}

    def look(i: int) -> RemovableHandle:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.ndim == 4:
                found[i] = images.shape[2] / output.shape[2]

        return layers[i].register_forward_hook(hook)

    handles = [look(i) for i in range(len(layers))]
    mode = model.training
    try:
        model.eval()(images)
    finally:
        model.train(mode)
        for handle in handles:
            handle.remove()
    return found


def _named(levels: Any) -> Any:
    """The same levels, with names for layer indices."""
    if isinstance(levels, int):
        return f"model.{levels}"
    return type(levels)(map(_named, levels)) if isinstance(levels, (list, tuple)) else levels


class Criterion:
    """A model's own criterion and the distillation loss: what the model's ``loss`` calls, compiled or not.

    A copy is one of the model's own criterion, as a copy of the model is not listened to.
    """

    def __init__(self, criterion: Any, distiller: Distiller) -> None:
        self.criterion, self.distiller = criterion, distiller

    def __call__(self, preds: Any, batch: dict[str, Any]) -> tuple[Tensor, Any]:
        """The terms to be summed, and detached what is shown of them; ours come last."""
        terms, shown = self.criterion(preds, batch)
        count = len(batch["img"])  # the terms are multiplied by it, what is shown is not
        # validation halves model and images by itself until 8.4.1xx, but not the teacher
        images = batch["img"].to(next(self.distiller.teacher.parameters()).dtype)
        loss = self.distiller.loss(images, task_loss=terms.sum() / count)
        each = loss.detach()
        old = isinstance(shown, Tensor)  # what is shown has names since 8.4.1xx
        shown = torch.cat([shown, each.reshape(1)]) if old else {**shown, COLUMN: each}
        return torch.cat([terms.reshape(-1), count * loss.reshape(1)]), shown

    def __getattr__(self, name: str) -> Any:  # schedules of their own, which the trainer calls
        return getattr(self.__dict__["criterion"], name)

    def __deepcopy__(self, memo: Any) -> Any:
        return copy.deepcopy(self.criterion, memo)


class Student(nn.Module):
    """The student, and beside it what is trained along: one module for DDP, gradient clipping and ``torch.compile``.

    A wrapper as ``DataParallel`` is one, which Ultralytics looks through wherever it wants the model itself: for EMA,
    checkpoints, criterion and parameter groups. A copy or pickle is the student's alone.
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
    """Ultralytics' detection trainer, with a teacher. ``DistillationTrainer`` makes it; subclass it to change more.

    Beside each checkpoint, in ``weights/distillation/``, lies what ``resume=True`` needs of the distillation, of the
    same epoch: adapters, their optimiser state, the teacher's statistics, the loss's weight. The checkpoints themselves
    are those of a plain run.

    Raises:
        ValueError: another task than detection; ``distill_model`` or ``quantize=8`` as well; a teacher without levels
            in common with the student; resumed with another teacher (names both) or other levels.
        FileNotFoundError: no such teacher; resumed from a checkpoint without the state of its distillation.
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
        self._listening: list[Distiller | RemovableHandle] = []  # to be removed when all is done
        super().__init__(cfg, overrides, _callbacks)
        if self.args.task != "detect":
            raise ValueError(
                f"task: expected 'detect', the only one that can be distilled here, got {self.args.task!r}"
            )
        if getattr(self.args, "distill_model", None) is not None:
            raise ValueError("distill_model: expected none, as the trainer has a teacher already")
        if getattr(self.args, "quantize", None) == 8:
            raise ValueError("quantize: expected no quantisation-aware training; distil first, then quantise")

    def train(self) -> None:
        """Train; where Ultralytics starts other processes for it, the options follow through a file."""
        if not self.ddp:
            try:
                super().train()
            finally:
                while self._listening:
                    self._listening.pop().remove()
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
        """The model has its weights and its device: listen to it, before it gets compiled and wrapped."""
        super().set_model_attributes()
        _place(self.teacher, self.device, self.model)
        images = torch.zeros(1, self.data["channels"], PROBE, PROBE, device=self.device)
        self.distiller = self.distillation.distiller(self.model, self.teacher, images)
        self._listening += [self.distiller]
        self.teacher_fingerprint = fingerprint(self.teacher)
        self.model = Student(self.model, self.distiller)

    def build_optimizer(self, model: nn.Module, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Ultralytics' groups, and last the adapters': at the same learning rate, without weight decay."""
        optimizer: torch.optim.Optimizer = super().build_optimizer(model, *args, **kwargs)
        groups = [group for group in optimizer.param_groups if not group["weight_decay"]]
        alike = min(groups, key=lambda x: (x.get("use_muon", False), x["lr"], x.get("param_group") == "bias"))
        optimizer.add_param_group({**alike, "params": list(self.distiller.parameters()), "param_group": "adapters"})
        return optimizer

    def get_validator(self) -> Any:
        validator = super().get_validator()
        if self.loss_names:  # until 8.4.1xx they are known beforehand, later they follow from the first batch
            self.loss_names = (*self.loss_names, COLUMN)
        return validator

    def progress_string(self) -> str:
        header: str = super().progress_string()
        return header.replace(COLUMN, f"{'distill':>11}")  # its columns are 11 wide, one too few

    def resume_training(self, ckpt: Any) -> None:
        """The last step of the set-up."""
        super().resume_training(ckpt)
        student: Any = self.distiller.student
        own = getattr(student, "criterion", None) or student.init_criterion()
        student.criterion = Criterion(own, self.distiller)
        if RANK in {-1, 0}:
            self._report(own)

    def _report(self, criterion: Any) -> None:
        """Is distillation really on? On a few validation images, which differ in size between batches only."""
        data = self.test_loader.dataset
        state = random.getstate()  # reading images draws, and a run should draw what it does without a teacher
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
        """Ultralytics' validation of the EMA, which is listened to for its own distillation loss meanwhile."""
        ema, distiller = self.ema.ema, self.distiller
        student_to_map, teacher_to_map = distiller.to_maps
        ears = Distiller(
            ema,
            distiller.teacher,
            backbone=distiller.levels,
            criterion=distiller.criterion,
            prior=distiller.prior,
            align=distiller.align,
            preprocess=distiller.preprocess,
            student_to_map=student_to_map,
            teacher_to_map=teacher_to_map,
            fold_teacher=False,  # for these few batches a copy is too much
        )
        distiller.eval()  # count and calibrate nothing
        ema.criterion = Criterion(ema.init_criterion(), ears)
        try:
            return super().validate()
        finally:
            ema.criterion = None
            ears.remove()
            distiller.train()

    # ---- checkpoints

    def save_model(self) -> Any:
        """Ultralytics' checkpoint, of the student alone; before it, so that a kill between them is harmless, ours."""
        with replacing(self._state_file(self.epoch)) as part:
            torch.save(self._state(), part)
        with self._student_alone():
            saved = super().save_model()
        if saved is not False:  # it is where weights are not finite
            self._drop_states(keep=self.epoch)
        return saved

    def final_eval(self) -> None:
        """Ultralytics makes its last checkpoints final here: they can no more be resumed."""
        super().final_eval()
        if RANK in {-1, 0}:
            self._drop_states()

    def _load_checkpoint_state(self, ckpt: dict[str, Any]) -> None:
        """Go back to a checkpoint, on resume or after a loss that was not finite."""
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
        folders = (self.wdir, Path(str(self.args.model)).parent)  # this run's, or that of the checkpoint, moved here
        files = [self._state_file(epoch, folder) for folder in folders]
        file = next((file for file in files if file.is_file()), None)
        if file is None:
            raise FileNotFoundError(
                f"resume: expected the distillation state of epoch {epoch + 1} in {files[-1]}, which is not there; "
                "resume from last.pt of a distilled run, with the folder beside it"
            )
        state = torch.load(file, map_location=self.device, weights_only=True)
        name, print_ = state["teacher"]
        if print_ != self.teacher_fingerprint:
            raise ValueError(
                f"teacher: this run has learnt from {name} (fingerprint {print_}), got {self.distillation.name} "
                f"({self.teacher_fingerprint}); resume with the same weights"
            )
        if state["levels"] != self.distiller.levels:
            raise ValueError(f"levels: this run distils {state['levels']}, got {self.distiller.levels}")
        self.distiller.load_state_dict(state["distiller"])
        whole = self.optimizer.state_dict()
        adapters = zip(whole["param_groups"][-1]["params"], state["optimizer"], strict=True)
        whole["state"].update({i: values for i, values in adapters if values is not None})
        self.optimizer.load_state_dict(whole)

    @contextmanager
    def _student_alone(self) -> Iterator[None]:
        """The optimiser as Ultralytics made it, so that checkpoints are those of a plain run."""
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
        """States that no checkpoint goes with any more."""
        for file in (self.wdir / STATES).glob("epoch*.pt"):
            if file.name != f"epoch{keep}.pt" and not (self.wdir / file.name).exists():
                file.unlink()
        with suppress(OSError):
            (self.wdir / STATES).rmdir()  # where nothing is left


def _handed_over() -> DistillationTrainer:
    if HANDOVER not in os.environ:
        raise TypeError("Trainer: expected to be made by DistillationTrainer(teacher); pass that as trainer=")
    handed: DistillationTrainer = torch.load(os.environ[HANDOVER], map_location="cpu", weights_only=False)  # our own
    return handed


def _place(teacher: Any, device: torch.device, student: nn.Module) -> None:
    """Where the student is, and in its memory format, so that features lie alike."""
    weights = [p for p in student.parameters() if p.ndim == 4 and not p.is_contiguous()]
    if any(p.is_contiguous(memory_format=torch.channels_last) for p in weights):
        teacher.to(memory_format=torch.channels_last)
    teacher.to(device)


def main(argv: Sequence[str] | None = None) -> None:
    """Distil a student from the command line; ``--help`` says how."""
    parser = argparse.ArgumentParser(
        prog="python -m fastkd.integrations.ultralytics",
        description="Distil a teacher into an Ultralytics detection model, in Ultralytics' own trainer.",
        epilog="All other arguments are Ultralytics' own, as --epochs 100, --epochs=100 or epochs=100.",
    )
    parser.add_argument("--teacher", required=True, help="trained weights, a .pt file (a pickle: from whom you trust)")
    parser.add_argument("--student", required=True, help="a .yaml, or a .pt to start from; with resume=True a last.pt")
    parser.add_argument("--data", help="the data set's .yaml; not needed to resume")
    parser.add_argument("--info-map", default="self_information", help="fastkd.PRESETS (default: %(default)s)")
    parser.add_argument(
        "--weight", default="auto", type=weight_of, help='factor of the distillation loss, or "auto" (default)'
    )
    parser.add_argument("--share", type=float, default=1.0, help="of the detection loss, with auto (default: 1)")
    args, rest = parser.parse_known_args(argv)
    settings = _settings(parser, rest)
    if args.data is not None:
        settings["data"] = args.data
    trainer = DistillationTrainer(args.teacher, weight=args.weight, share=args.share, info_map=args.info_map)
    ultralytics.YOLO(args.student).train(trainer=trainer, **settings)


def _settings(parser: argparse.ArgumentParser, words: Sequence[str]) -> dict[str, Any]:
    """Ultralytics' arguments, of ``--key value``, ``--key=value`` and ``key=value``."""
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
    """A number, a list, True, False or None where it reads as one, else the text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


if __name__ == "__main__":
    from fastkd.integrations import ultralytics as importable  # what the processes of a DDP run can import

    importable.main()
