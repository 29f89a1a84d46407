"""``Distiller``: distils whole models inside a training loop that exists already, through forward hooks."""

from __future__ import annotations

import inspect
import logging
import math
import sys
import weakref
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from inspect import Parameter
from types import NoneType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import UninitializedParameter
from torch.utils.hooks import RemovableHandle

from fastkd import health, level_maps
from fastkd.health import Check, Report
from fastkd.hooks import (
    FeatureHook,
    Group,
    Levels,
    ToMap,
    ToMaps,
    convolved_heights,
    ddp_of,
    match_by_stride,
    unwrapped,
    without_ddp,
)
from fastkd.level_finder import FoundLevels, find_levels, require_batch
from fastkd.level_maps import DistillMaps
from fastkd.loss import DistillLoss
from fastkd.modes import eval_mode
from fastkd.ops.arguments import kind_of, require_bool, require_weights
from fastkd.ops.levels import warn_if_nothing_learns
from fastkd.passes import ALL, Passes
from fastkd.ranks import world_size
from fastkd.teacher import Teacher

# of the teacher's output and the (height, width) of each level, or of these alone
Prior: TypeAlias = Callable[..., Sequence[Tensor | None]]


class Distiller(nn.Module):
    """Teaches ``student`` what ``teacher`` sees, from feature maps caught by forward hooks::

        distiller = fastkd.Distiller(student, teacher, backbone=[("layer4", "layer6")], neck=[("fpn.2", "fpn.3")])
        distiller.prepare(images).add_to(optimizer)  # the 1x1 adapters
        out = student(images)
        loss = task_loss(out, targets) + distiller.loss(images)

    The teacher is put in eval mode and frozen, and again before each use, whoever called ``.train()``. The two models
    are not submodules: ``parameters()`` and ``state_dict()`` hold the adapters, the teacher's statistics and the step
    alone. A copy or pickle of the student has nothing of fastkd. For several processes call
    ``prepare(images)``, wrap the distiller in ``DistributedDataParallel`` like the student, and call it
    (``forward`` is ``loss``), so that adapters and statistics are the same on every rank.

    Args:
        student, teacher: any modules that take a batch of images; they may be wrapped in ``DistributedDataParallel``
            or ``torch.compile`` (compile a student, or at least run it first, after the distiller is made).
        backbone, neck: whose outputs to imitate, module names or modules, in either of two forms: a *list of pairs*
            ``[(student, teacher), ...]``, or a *tuple of two lists* ``([student, ...], [teacher, ...])``, of any
            lengths, which ``prepare(images)`` pairs by stride; levels without a partner are dropped.
            A name needs no ``module.`` or ``_orig_mod.`` prefix; ``"input:name"`` is what the module gets, for example
            a sum that no module returns. Levels are counted backbone first. Where neither is given, ``images`` finds
            both.
        images: a batch that both models take, as in ``prepare``, which is called with it at once. Without ``backbone``
            and ``neck`` the levels are those that ``find_levels`` finds in both models at strides that they share;
            ``levels`` and ``check()`` name them, and so does the logger ``"fastkd"`` at level INFO.
        student_to_map, teacher_to_map: for outputs that are not (N, C, H, W) tensors: a function that makes one of a
            level's output, ``"NHWC"`` where channels come last, or one of these for each name of a level.
        align: ``"interpolate"``: where heights or widths differ, the student's feature is resized to the teacher's,
            bilinearly (as in PKD, Cao et al., 2022); lists are then paired by nearest stride, up to a factor of
            sqrt(2). None: sizes must be equal.
        prior: called as ``prior(teacher_output, sizes)`` without grad, sizes being the (height, width) of each level;
            returns one (N, height, width) tensor or None per level. One that takes the sizes alone, as of boxes, needs
            no output of the teacher: see ``fold_teacher``.
        preprocess: called on the images before the teacher gets them, where it takes others than the student does:
            another mean or range, a crop. Sizes may differ, if those of the features agree.
        last_forward: whether the student's last forward is meant where it ran more than once since the last loss, with
            gradients, and the last time not on the images given; False: that is an error.
        fold_teacher: run the teacher in a copy whose batch norms are folded into its convolutions, and end it after its
            last level where nothing needs its output; for teachers whose weights stay as they are and whose forward
            leaves nothing behind that others read. The first time, features and output must agree within 1e-4 of their
            largest, else the teacher runs as it was given, with a warning.
        teacher_every: the teacher runs in the first of every so many training steps; in the others the loss is 0, and
            in that one it is multiplied by this number, so that the mean over steps stays. Batches that come from two
            sources in turn want an odd number.
        teacher_images: 1, 1/2, 1/3, ...: the part of a training batch's images that the teacher sees and the loss is
            of; the next pass has the next part. Images must be a tensor or a list, a level's output one row an image.
        criterion: a ``DistillLoss`` made beforehand; or
        **loss_options: arguments of ``DistillLoss``: ``info_map``, ``weights``, ``warmup_steps``, ...

    Attributes:
        criterion: the ``DistillLoss``. Adapters get their widths in ``prepare``, or on the first batch.
        taught: which images of the batch the teacher saw last, a slice.

    Raises:
        ValueError: unknown module (lists near names), no level at all, models that share weights, options beside a
            criterion; levels that cannot be found, or of no stride in common (shows those to choose from).
        TypeError: a level that is neither a name nor a module; an argument of another type than above.
        With ``images`` also what ``prepare`` raises.
    """

    criterion: DistillLoss

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        backbone: Levels | None = None,
        neck: Levels | None = None,
        images: Any = None,
        student_to_map: ToMaps = None,
        teacher_to_map: ToMaps = None,
        align: str | None = None,
        prior: Prior | None = None,
        preprocess: Callable[[Any], Any] | None = None,
        last_forward: bool = False,
        fold_teacher: bool = False,
        teacher_every: int = 1,
        teacher_images: float = 1.0,
        criterion: DistillLoss | None = None,
        **loss_options: Any,
    ) -> None:
        super().__init__()
        _require_kind(nn.Module, "a module", student=student, teacher=teacher)
        _require_kind((Iterable, NoneType), "a list of levels", backbone=backbone, neck=neck)
        backbone, neck = (x if x is None or isinstance(x, Sequence) else list(x) for x in (backbone, neck))
        _require_kind((Callable, NoneType), "a function", prior=prior, preprocess=preprocess)
        _require_kind((DistillLoss, NoneType), "a DistillLoss", criterion=criterion)
        require_bool("last_forward", last_forward)
        require_bool("fold_teacher", fold_teacher)
        self._passes, self.taught = Passes(teacher_every, teacher_images), ALL
        _refuse_shared_weights(student, teacher)
        if align not in (None, "interpolate"):
            raise ValueError(f'align: expected None or "interpolate", got {align!r}')
        if images is not None:
            require_batch(images)
        given = {name: levels for name, levels in (("backbone", backbone), ("neck", neck)) if levels is not None}
        self._found = not given and images is not None
        if self._found:
            seen = _in_dtype_of(teacher, images if preprocess is None else preprocess(images))
            given = _found_levels(student, teacher, (images, seen), align)
        # whether DistributedDataParallel has the adapters; None before the first training forward
        self._averaged: bool | None = None
        self._ddp: int | None = None  # the DistributedDataParallel of the last training forward
        self._models = (student, teacher)  # in a tuple they are not registered as submodules
        to_maps = (student_to_map, teacher_to_map)
        self._groups = [Group(name, levels, student, teacher, to_maps) for name, levels in given.items()]
        most = sum(min(len(x.student), len(x.teacher)) for x in self._groups)
        if not most:
            raise ValueError(
                "backbone, neck: expected at least one level to distil, got none; Distiller(student, teacher, "
                "images=images) finds them"
            )
        paired = [x.pairs for x in self._groups if x.pairs is not None]
        self._pairs = [p for x in paired for p in x] if len(paired) == len(self._groups) else None
        self._image_height = 1.0  # of what the student's last dry run got
        if criterion is not None and loss_options:
            raise ValueError(f"criterion: expected no loss options beside it, got {', '.join(loss_options)}")
        self._owns_criterion, self._weights = criterion is None, loss_options.get("weights")
        self.criterion = criterion or self._make_criterion(most, loss_options)
        if self._pairs is not None:
            self._require_levels(len(self._pairs))
        self.align, self.prior = align, prior
        self.preprocess, self.last_forward = preprocess, last_forward
        self._feature_hooks = [hook for x in self._groups for hook in (*x.student, *x.teacher)]
        _require_names(self._feature_hooks, student=student_to_map, teacher=teacher_to_map)
        for hook in self._feature_hooks:
            hook.attach()
        # nobody calls remove() on a distiller that a notebook made anew: its hooks go with it. The finalizer may hold
        # handles alone: a hook holds the student, which may hold its distiller
        weakref.finalize(self, _remove_all, [hook.handles for hook in self._feature_hooks]).atexit = False
        # listed once: walking a large teacher at every step would take a millisecond
        self._frozen = (tuple(teacher.modules()), tuple(teacher.parameters()))
        self._freeze()
        self._teacher = Teacher(teacher, fold_teacher)
        if self._pairs is not None:
            self._teacher.listen([t for _, t in self._pairs])
        if images is not None:
            self._prepare_or_remove(images)

    def _prepare_or_remove(self, images: Any) -> None:
        """``prepare``; where it fails, nobody has the distiller to take its hooks off."""
        try:
            self.prepare(images)
        except BaseException:
            self.remove()
            raise
        if self._found:
            logging.getLogger("fastkd").info("levels found: %s", self._names_of_levels())

    def _names_of_levels(self) -> str:
        pairs = self._pairs or []
        groups = {s.group: "" for s, _ in pairs}
        listed = {name: ", ".join(f"{s.name} <- {t.name}" for s, t in pairs if s.group == name) for name in groups}
        return "; ".join(f"{name} {names}" for name, names in listed.items())

    def _make_criterion(self, most: int, options: dict[str, Any]) -> DistillLoss:
        """With as many adapters as there can be levels; ``prepare`` drops those that no stride needs."""
        if not {"adapters", "student_channels", "teacher_channels"} & options.keys():
            options = {"levels": most, **options}
        if self._pairs is None and self._weights is not None:  # one per matched level, so they are set with these
            options = {name: value for name, value in options.items() if name != "weights"}
            if len(require_weights(self._weights)) > most:
                raise ValueError(f"weights: expected one per matched level, at most {most}, got {len(self._weights)}")
        return DistillLoss(**options)

    @property
    def student(self) -> nn.Module:
        """The student, as it was given."""
        return self._models[0]

    @property
    def teacher(self) -> nn.Module:
        """The teacher, as it was given; frozen."""
        return self._models[1]

    @property
    def levels(self) -> list[tuple[str, str]] | None:
        """(student, teacher) module names of each level; None before ``prepare`` matches them by stride."""
        return None if self._pairs is None else [(s.name, t.name) for s, t in self._pairs]

    @property
    def to_maps(self) -> tuple[Mapping[str, ToMap], Mapping[str, ToMap]]:
        """``student_to_map`` and ``teacher_to_map`` by the names of the levels in use."""
        student, teacher = (
            {x.name: x.to_map for x in self._feature_hooks if x.role == role and x.to_map is not None}
            for role in ("student", "teacher")
        )
        return student, teacher

    def forward(self, images: Any, prior: Prior | None = None, task_loss: Tensor | float | None = None) -> Tensor:
        """``loss``, so that the distiller can be wrapped (``DistributedDataParallel``)."""
        return self.loss(images, prior, task_loss)

    def loss(self, images: Any, prior: Prior | None = None, task_loss: Tensor | float | None = None) -> Tensor:
        """Distillation loss of the student's last forward, which must have been on the same images.

        Args:
            images: what the teacher takes: usually the (N, 3, H, W) batch that the student has just seen. The teacher
                runs on it once, under ``no_grad`` and whatever autocast is on.
            prior: for this call instead of the constructor's, for priors made from this batch's boxes.
            task_loss: the trainer's own loss, a scalar; ``weight="auto"`` needs it. Nothing flows into it.

        Returns:
            A float32 scalar; (L,) with ``reduction="none"``. From ``stop_step`` on zero, and the teacher does not run;
            so in the steps that ``teacher_every`` leaves out.

        Raises:
            RuntimeError: a hook has not fired since the last call, ``remove()`` was called, or lists of modules were
                not yet matched by ``prepare``.
            TypeError, ValueError: a hooked output is not a 4-D tensor; levels whose sizes differ; what
                ``distill_loss`` raises.
        """
        if self._pairs is None:
            raise RuntimeError(
                "Distiller: expected prepare(images) before the first loss: its lists of modules are matched by stride "
                "then, and adapters made for those that match"
            )
        if self.training and world_size() > 1 and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._see_ddp()
        try:
            if self.training and self.criterion.loss_weight.stopped:
                outputs = [hook.output for hook in self._feature_hooks if hook.role == "student"]
                return self.criterion.zero_loss([x for x in outputs if isinstance(x, Tensor)])
            learns = self.training and torch.is_grad_enabled()
            taught, factor = ALL, 1.0
            if learns and not self._passes.all:
                taught, factor = self._passes.images_of_step(self.criterion.loss_weight, images)
            if not factor:
                skipped = self.criterion.skip_step(self._student_features(images))
                self._passes.count()
                return skipped
            student, teacher, q, output = self._features(images, prior, taught)
            warn_if_nothing_learns(student)
            donated = _held_by_hooks_alone(teacher)
            del output  # until here it kept what else holds a teacher's feature
            loss: Tensor = self.criterion(student, teacher, q, task_loss, donated=donated)
            if learns and not self._passes.all:
                self._passes.count()
            return loss if factor == 1 else loss * factor
        finally:
            self._clear()

    @torch.no_grad()
    def prepare(self, images: Any) -> Distiller:
        """Match levels and give the adapters their widths now: before DDP, an EMA or a count of parameters.

        Runs both models once on ``images`` in eval mode and leaves no other trace. Returns the distiller itself.
        Raises as ``loss``.
        """
        try:
            student, teacher, *_ = self._dry_run(images)
            self.criterion.prepare(student, teacher)
        finally:
            self._clear()
        return self

    def add_to(self, optimizer: torch.optim.Optimizer) -> Distiller:
        """Let the optimiser of the student train the adapters too: in the groups that it has, so with their settings.

        Weights join the group that has most of the student's weights, biases the one that has most of its biases and
        norms. No group is added, so a scheduler may have been made before, and a group's rate is that of the adapters.
        What the optimiser has already is left where it is. Returns the distiller itself.

        Raises:
            RuntimeError: the adapters have no widths yet: ``prepare(images)`` gives them.
            ValueError: the optimiser has no parameter of the student, or cannot take parameters once it is made.

        To resume: first ``add_to``, then the optimiser's ``load_state_dict``.
        """
        _require_extensible(optimizer)
        adapters = list(self.criterion.adapters.named_parameters(prefix="adapters"))
        if any(isinstance(p, UninitializedParameter) for _, p in adapters):
            raise RuntimeError("add_to: expected prepare(images) before, which gives the adapters their widths")
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        of_student = {id(p) for p in self.student.parameters()}
        for name, p in adapters:
            if id(p) in held:
                continue
            counts = [_elements(group["params"], of_student, vectors=p.ndim <= 1) for group in optimizer.param_groups]
            if not any(counts):  # a student without biases has no group for them
                counts = [_elements(group["params"], of_student) for group in optimizer.param_groups]
            if not any(counts):
                raise ValueError("optimizer: expected one that trains the student, got one without its weights")
            group = optimizer.param_groups[counts.index(max(counts))]
            group["params"].append(p)
            if "param_names" in group:
                group["param_names"].append(f"distiller.{name}")
        return self

    @torch.no_grad()
    def calibrate(self, loader: Iterable[Any]) -> None:
        """Take the teacher's per-channel statistics from a loader now, not from the first training batches.

        Stops after ``calibration_batches`` batches; after a shorter loader the first training batches fill up. Of
        several ranks any may call it, with whatever batches: the first training forward brings them together.

        Args:
            loader: batches, each what the teacher takes or a tuple or list that starts with it.

        Raises:
            TypeError: one tensor where batches are expected. Else as ``loss``.
            RuntimeError: of several ranks, after the first training forward.
        """
        if isinstance(loader, Tensor):
            raise TypeError("loader: expected an iterable of batches, got one tensor; wrap it: [images]")
        self._require_hooks()
        for batch in loader:
            if self.criterion.calibrated:
                return
            images = batch[0] if isinstance(batch, (tuple, list)) else batch
            if isinstance(images, Tensor):
                images = images.to(_device(self.teacher))
            if self._pairs is None:
                self.prepare(images)
            try:
                self._run_teacher(images)
                features = [t.feature() for _, t in self._matched()]
                self._move_criterion(features)
                self.criterion.calibrate(features)
            finally:
                self._clear()

    @torch.no_grad()
    def maps(self, images: Any, prior: Prior | None = None) -> DistillMaps:
        """What the loss looks at on these images, for looking at: ``fastkd.viz`` draws it.

        Runs both models once in eval mode and leaves no other trace than ``prepare``: nothing is counted or calibrated.
        No other process is needed, so that of several only one may call it. Where a teacher is standardised, that
        happens by the statistics so far: without any, before the first training batch, not at all.

        Args:
            images: what both models take.
            prior: for this call instead of the constructor's.

        Returns:
            Per matched level names, stride, information map, difference of student and teacher, and loss.

        Raises:
            As ``loss``.
        """
        try:
            self._clear()
            # DistributedDataParallel would wait for others, a compiler start again
            self._run_student(unwrapped(self.student), images)
            student, teacher, q, _ = self._features(images, prior)
            self.criterion.prepare(student, teacher)
            with eval_mode(self.criterion):
                return level_maps.measure(self.criterion, self._matched(), student, teacher, q, self._image_height)
        finally:
            self._clear()

    def check(
        self,
        images: Any = None,
        optimizer: torch.optim.Optimizer | None = None,
        task_loss: float | Tensor | None = None,
        *,
        teacher_fingerprint: str | None = None,
        prior: Prior | None = None,
    ) -> Report:
        """Is distillation really on? Looks at what silently switches it off, and says so in plain words.

        Nothing is trained or counted; the models run in eval mode; no other rank is waited for. What an argument is
        missing for is reported as unknown. ``print(distiller.check(images, optimizer, task_loss))`` shows a table.

        Args:
            images: a batch, to run both models on: hooks, gradient at every level, loss.
            optimizer: to look for the adapters in.
            task_loss: the other term of the loss on these images, to compare with.
            teacher_fingerprint: ``fastkd.fingerprint`` of the weights that the teacher should have.
            prior: for this call instead of the constructor's.

        Returns:
            A ``Report``; ``report.ok`` is False if anything is wrong.
        """
        ran: set[nn.Module] | None = None
        frozen = health.check_frozen(self.teacher)
        hooks = Check("hooks", None, "not known: pass images")
        gradient = Check("gradient", None, "not known: pass images")
        weight = health.check_weight(self.criterion)
        share = Check("loss share", None, "not known: pass images and task_loss")
        if images is not None:
            hooks, ran = self._check_hooks(images, prior)
            missing = "the hooks do not work" if not hooks.ok else "the loss is zero"
            gradient, share = (Check(name, None, f"not known: {missing}") for name in ("gradient", "loss share"))
            if hooks.ok and weight.ok:
                gradient, losses = self._check_gradient(images, task_loss, prior)
                share = health.check_share(losses, task_loss, self.criterion)
        checks = [
            health.check_trained(self.teacher, teacher_fingerprint, ran),
            frozen,
            *([Check("levels", True, f"found: {self._names_of_levels()}")] if self._found else []),
            Check("teacher runs", True, f"{self._teacher.how}{self._passes}"),
            hooks,
            gradient,
            weight,
            share,
            health.check_optimizer(self.criterion, optimizer, self.student),
            health.check_schedule(self.criterion),
            *([health.check_ranks(self.criterion, self._averaged)] if world_size() > 1 else []),
        ]
        return Report(tuple(checks))

    def remove(self) -> None:
        """Take the hooks off both models; the distiller is then of no more use."""
        for hook in self._feature_hooks:
            hook.detach()
        self._feature_hooks, self._groups = [], []
        self._teacher.forget()

    def __deepcopy__(self, memo: Any) -> Distiller:
        raise TypeError(
            "Distiller: expected not to be copied or pickled, as its hooks are in its student; copy the student, keep "
            "the distiller's state_dict(), and make a new Distiller"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.__deepcopy__(protocol)

    def extra_repr(self) -> str:
        if self._pairs is None:
            return "levels wait for the first batch, to be matched by stride"
        return "\n".join(f"{s} <- {t}" for s, t in self._pairs)

    def _require_levels(self, levels: int) -> None:
        have = len(self.criterion.adapters)
        if levels != have:
            raise ValueError(f"criterion: expected {levels} levels, as there are pairs of modules, got {have}")

    def _student_features(self, images: Any) -> list[Tensor]:
        """Of the student's last forward, which must have been on these images."""
        self._require_hooks()
        hooks = [hook for hook in self._feature_hooks if hook.role == "student"]
        features = [hook.feature() for hook in hooks]
        for hook in hooks:
            if hook.several and not self.last_forward:
                _require_images(hook, images)
        return features

    def _features(
        self, images: Any, prior: Prior | None = None, taught: slice = ALL
    ) -> tuple[list[Tensor], list[Tensor], Sequence[Tensor | None] | None, Any]:
        """Features of both models, level by level, the prior, and the teacher's output; runs the teacher."""
        self._student_features(images)  # before the teacher runs for nothing
        self.taught = taught
        prior = self.prior if prior is None else prior
        whole = prior is not None and takes_output(prior)
        output = self._run_teacher(images if taught == ALL else images[taught], whole=whole)
        pairs = self._matched()
        teacher = [t.feature() for _, t in pairs]
        student = [s.feature() if taught == ALL else _rows(s, images, taught) for s, _ in pairs]
        student = [self._aligned(s, t, x, y) for (s, t), x, y in zip(pairs, student, teacher, strict=True)]
        self._move_criterion(teacher)
        if prior is None:
            return student, teacher, None, output
        sizes = [(x.shape[2], x.shape[3]) for x in teacher]
        with torch.no_grad():
            q = prior(output, sizes) if whole else prior(sizes)
        if taught != ALL:  # what is made of boxes has all images
            q = [x[taught] if isinstance(x, Tensor) and len(x) == len(images) else x for x in q]
        return student, teacher, q, output

    def _aligned(self, s: FeatureHook, t: FeatureHook, x: Tensor, teacher: Tensor) -> Tensor:
        """The student's feature ``x`` in the teacher's height and width."""
        if x.shape[0] != teacher.shape[0]:
            raise ValueError(
                f"{s} and {t}: expected equal batch sizes, got {tuple(x.shape)} and {tuple(teacher.shape)}; "
                "run both on the same images"
            )
        if x.shape[2:] == teacher.shape[2:]:
            return x
        if self.align is None:
            raise ValueError(
                f"{s} and {t}: expected equal height and width, got {tuple(x.shape)} and {tuple(teacher.shape)}; "
                "pair modules of equal stride, or pass two lists, ([student, ...], [teacher, ...]), to have them "
                'matched, or resize the student\'s: align="interpolate"'
            )
        return F.interpolate(x, teacher.shape[2:], mode="bilinear", align_corners=False)

    def _see_ddp(self) -> None:
        """Whether this forward runs in a DistributedDataParallel that has the adapters."""
        active = getattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", None)
        if self._ddp != id(active):
            adapters = {id(p) for p in self.criterion.adapters.parameters()}
            self._averaged = active is not None and adapters <= {id(p) for p in active.parameters()}
            self._ddp = id(active)
        self._refuse_join(active)

    def _refuse_join(self, active: nn.Module | None) -> None:
        """A rank that is through its batches answers for one DistributedDataParallel, and for nothing of fastkd."""
        parallel = [x for x in (active, ddp_of(self.student)) if x is not None]
        configs = [getattr(x, "_join_config", None) for x in parallel]
        if not any(x.enable and not x.throw_on_early_termination for x in configs if x is not None):
            return
        if len({id(x) for x in parallel}) > 1:
            why = "student and distiller are in two DistributedDataParallel, which it mixes up: put them in one"
        elif self.criterion.waits_for_ranks:
            why = 'each step sums over all ranks: weight="auto", map_all_ranks, or statistics that are not yet there'
        else:
            return
        raise RuntimeError(
            f"Distiller: expected no Join of DistributedDataParallel, as {why}. Give every rank as many batches "
            "(DistributedSampler does), or Join(..., throw_on_early_termination=True)"
        )

    def _require_hooks(self) -> None:
        if not self._feature_hooks:
            raise RuntimeError("Distiller: the hooks were removed by remove(); make a new Distiller")

    def _move_criterion(self, features: Sequence[Tensor]) -> None:
        """Take the criterion to the features' device; its parameters stay the same objects."""
        if self.criterion.loss_weight.step.device != features[0].device:
            self.criterion.to(features[0].device)

    def _freeze(self) -> None:
        modules, parameters = self._frozen
        if any(module.training for module in modules):
            self.teacher.eval()
        for parameter in parameters:
            if parameter.requires_grad:
                parameter.requires_grad_(False)

    def _run_teacher(self, images: Any, *, whole: bool = False) -> Any:
        """Its output, or None where it ended after its last level, unless the whole of it is asked for."""
        self._freeze()
        with torch.no_grad():
            images = _in_dtype_of(self.teacher, images if self.preprocess is None else self.preprocess(images))
            return self._teacher.run(images, whole=whole)  # nothing of a frozen teacher is to be synchronised

    def _dry_run(
        self, images: Any, prior: Prior | None = None
    ) -> tuple[list[Tensor], list[Tensor], Sequence[Tensor | None] | None, Any]:
        """As ``_features``, after a forward of the student in eval mode."""
        self._clear()
        self._run_student(without_ddp(self.student), images)
        return self._features(images, prior)

    def _run_student(self, student: nn.Module, images: Any) -> None:
        """One forward in eval mode; also what height the images have, from which strides are told."""
        with eval_mode(self.student), convolved_heights(student) as heights:
            student(images)
        if isinstance(images, Tensor):
            heights = [images.shape[-2]]
        # most models resize a list of images; where nothing is known, strides are relative to the largest map
        maps = [x.output.shape[-2] for x in self._feature_hooks if isinstance(x.output, Tensor) and x.output.ndim == 4]
        self._image_height = heights[0] if heights else max(maps, default=1)

    def _matched(self) -> list[tuple[FeatureHook, FeatureHook]]:
        """The pairs of hooks; the first time, those of lists are found by stride and the others taken off."""
        if self._pairs is None:
            height = self._image_height
            pairs = [p for x in self._groups for p in (x.match(height, self.align) if x.pairs is None else x.pairs)]
            if self._owns_criterion:
                self.criterion.keep_levels(len(pairs), self._weights)
            self._require_levels(len(pairs))
            self._pairs = pairs
            used = [hook for pair in pairs for hook in pair]
            for hook in self._feature_hooks:
                if hook not in used:
                    hook.detach()
            self._feature_hooks = used
            self._teacher.listen([t for _, t in pairs])
        return self._pairs

    def _clear(self) -> None:
        for hook in self._feature_hooks:
            hook.reset()

    def _check_hooks(self, images: Any, prior: Prior | None) -> tuple[Check, set[nn.Module] | None]:
        """Also which of the teacher's layers that look untrained take part in its forward; None: not known."""
        seen: set[nn.Module] = set()
        ran: set[nn.Module] | None = seen
        if any(x.is_compiled for x in self._feature_hooks if x.role == "teacher"):  # hooks that come later do not fire
            ran = None
        watched = [
            module.register_forward_hook(lambda module, *_: seen.add(module))
            for module in (health.initial_layers(self.teacher) if ran is not None else [])
        ]
        try:
            with self._teacher.as_given():
                pairs = len(self._dry_run(images, prior)[0])
                often = [f"{hook} {hook.calls} times" for hook in self._feature_hooks if hook.calls != 1]
        except (RuntimeError, TypeError, ValueError) as error:
            return Check("hooks", False, str(error)), None
        finally:
            self._clear()
            _remove(watched)
        if often:
            message = f"expected once a forward, fired: {', '.join(often)}; the last output counts"
            return Check("hooks", False, message), ran
        return Check("hooks", True, f"each fired once a forward, at {pairs} levels"), ran

    def _check_gradient(
        self, images: Any, task_loss: float | Tensor | None, prior: Prior | None
    ) -> tuple[Check, Tensor]:
        """Pushes each level's own gradient through the student; also the levels' losses, without the weight."""
        try:
            with torch.enable_grad():
                student, teacher, q, _ = self._dry_run(images, prior)
                self.criterion.prepare(student, teacher)
                criterion = self.criterion.standalone_copy()
                pairs = self._matched()
                hooks = [s for s, _ in pairs]
                leaves = [s.feature().detach().requires_grad_() for s in hooks]  # cut off from the levels that follow
                aligned = [self._aligned(s, t, x, y) for (s, t), x, y in zip(pairs, leaves, teacher, strict=True)]
                loss = criterion(aligned, teacher, q, 1.0 if task_loss is None else task_loss).sum()
                gradients = torch.autograd.grad(loss, leaves)
                on = criterion.options.weights or [1.0] * len(hooks)  # a level that was switched off gets no gradient
                norms = {
                    str(s): self._student_gradient(images, s, g)
                    for s, g, weight in zip(hooks, gradients, on, strict=True)
                    if weight
                }
        finally:
            self._clear()
        bad = {name: norm for name, norm in norms.items() if not 0 < norm < math.inf}
        listed = ", ".join(f"{name} {norm:.3g}" for name, norm in (bad or norms).items())
        message = f"reaches the student at every level (norm): {listed}"
        if bad:
            message = f"none, or no finite one, reaches the student's weights (norm): {listed}; frozen or detached?"
        return Check("gradient", not bad, message), criterion.level_losses

    def _student_gradient(self, images: Any, hook: FeatureHook, gradient: Tensor) -> float:
        """Norm of the gradient of the student's weights, from ``gradient`` at this level alone."""
        parameters = [p for p in self.student.parameters() if p.requires_grad]
        with eval_mode(self.student):  # the backward too: checkpointing runs parts of the forward again there
            without_ddp(self.student)(images)  # anew for each level: a compiled graph can't always be walked twice
            feature = hook.feature()
            if not feature.requires_grad or not parameters:
                return 0.0
            found = _gradients(feature, parameters, gradient)
        return math.sqrt(sum(x.double().square().sum().item() for x in found if x is not None))


def _gradients(feature: Tensor, parameters: list[nn.Parameter], upstream: Tensor) -> Sequence[Tensor | None]:
    try:
        found = torch.autograd.grad(feature, parameters, upstream, retain_graph=True, allow_unused=True)
        if any(x is not None for x in found):
            return found
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
    # reentrant checkpointing takes a whole backward alone; whoever acts on gradients must not see this one
    gradients = [p.grad for p in parameters]
    hooks = [(x, dict(x)) for p in parameters if (x := p._post_accumulate_grad_hooks)]
    try:
        for p in parameters:
            p.grad = None
        for own, _ in hooks:
            own.clear()
        feature.backward(upstream)  # type: ignore[no-untyped-call]
        return [p.grad for p in parameters]
    finally:
        for p, grad in zip(parameters, gradients, strict=True):
            p.grad = grad
        for own, saved in hooks:
            own.update(saved)


def _found_levels(
    student: nn.Module, teacher: nn.Module, images: tuple[Any, Any], align: str | None
) -> dict[str, Levels]:
    """Backbone and neck as two lists of names each, of those that have a stride in common.

    Args:
        images: what the student gets and what the teacher gets.
    """
    found: list[FoundLevels] = []
    for role, model, seen in zip(("student", "teacher"), (student, teacher), images, strict=True):
        try:
            found.append(find_levels(model, seen))
        except ValueError as error:
            raise ValueError(f"{role}: {error}") from None
    ours, theirs = found
    groups: dict[str, Levels] = {"backbone": (ours.backbone, theirs.backbone), "neck": (ours.neck, theirs.neck)}
    for name in list(groups):
        try:
            match_by_stride(ours.strides(name), theirs.strides(name), nearest=align is not None)
        except ValueError:
            del groups[name]
    if not groups:
        raise ValueError(
            "images: expected levels of a stride that both models have, to find them; name them yourself, backbone= "
            f"and neck=. Those of the student:\n{ours}\nThose of the teacher:\n{theirs}"
        )
    return groups


def _require_images(hook: FeatureHook, images: Any) -> None:
    """Of several forwards since the last loss, the features of the last are there: it has to be that of the images."""
    last = hook.images
    if last is None or last is images:  # None: not known
        return
    tensors = isinstance(last, Tensor) and isinstance(images, Tensor)
    if tensors and last.shape == images.shape and last.data_ptr() == images.data_ptr():
        return
    raise RuntimeError(
        f"{hook}: expected the images of the student's last forward, got others, and it ran more than once since the "
        "last loss: call distiller.loss(images) after each forward, on the same images, or run the student once on "
        "torch.cat of all; where its last forward is meant all the same, Distiller(..., last_forward=True)"
    )


def takes_output(prior: Prior) -> bool:
    """Whether a prior is called with the teacher's output too."""
    try:
        kinds = [p.kind for p in inspect.signature(prior).parameters.values() if p.default is p.empty]
    except (TypeError, ValueError):  # of a function in C
        return True
    positional = [kind for kind in kinds if kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)]
    return len(positional) != 1 or Parameter.VAR_POSITIONAL in kinds


def _rows(hook: FeatureHook, images: Sequence[Any], taught: slice) -> Tensor:
    """A level's feature, of some of the images."""
    feature = hook.feature()
    if len(feature) != len(images):
        raise ValueError(
            f"{hook}: expected {len(images)} rows, one an image, as teacher_images takes some of them; got "
            f"{tuple(feature.shape)}"
        )
    return feature[taught]


def _require_names(hooks: Sequence[FeatureHook], **to_maps: ToMaps) -> None:
    for role, given in to_maps.items():
        names = [hook.name for hook in hooks if hook.role == role]
        for name in given if isinstance(given, Mapping) else ():
            if name not in names:
                raise ValueError(f"{role}_to_map: expected names of its levels, {', '.join(names)}; got {name!r}")


def _require_extensible(optimizer: torch.optim.Optimizer) -> None:
    fixed = {"LBFGS", "Muon", "ZeroRedundancyOptimizer"} & {x.__name__ for x in type(optimizer).__mro__}
    sharded = any(type(p) not in (Tensor, nn.Parameter) for group in optimizer.param_groups for p in group["params"])
    if fixed or sharded:
        which = "one of sharded tensors" if sharded else fixed.pop()
        raise ValueError(
            f"optimizer: expected one whose groups can take the adapters, got {which}; train these by an optimizer of "
            "their own, or make yours after prepare(images), with distiller.parameters()"
        )


def _elements(parameters: Sequence[Tensor], of: Container[int], *, vectors: bool | None = None) -> int:
    """How many elements of these models' parameters there are: of biases and norms alone, or of all others."""
    return sum(p.numel() for p in parameters if id(p) in of and vectors in (None, p.ndim <= 1))


def _held_by_hooks_alone(features: list[Tensor]) -> list[bool]:
    """Whether nobody but the list and a hook holds a feature, so that the gradient may take its memory.

    Holders of the tensor are counted by Python, holders of its memory (views, the images that a module returned as they
    were, a buffer) by the storage. Where PyTorch does not count, or compiles, nothing is donated.
    """
    if torch.compiler.is_compiling() or not hasattr(torch._C, "_storage_Use_Count"):
        return [False] * len(features)
    hook = [torch.empty(0)]
    (alone,) = _holders(list(hook))
    return [holders == alone for holders in _holders(features)]


def _holders(features: list[Tensor]) -> list[tuple[int, int, int]]:
    found = []
    for feature in features:
        storage = feature.untyped_storage()
        memory = torch._C._storage_Use_Count(storage._cdata)
        found.append((sys.getrefcount(feature), sys.getrefcount(storage), memory))
    return found


def _remove(handles: Sequence[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


def _remove_all(lists: Sequence[Sequence[RemovableHandle]]) -> None:
    for handles in lists:
        _remove(handles)


def _require_kind(kind: Any, expected: str, **arguments: object) -> None:
    for name, value in arguments.items():
        if not isinstance(value, kind):
            raise TypeError(f"{name}: expected {expected}, got {kind_of(value)}")


def _refuse_shared_weights(student: nn.Module, teacher: nn.Module) -> None:
    """Freezing the teacher would freeze these in the student too."""
    frozen = {id(p) for p in teacher.parameters()}
    shared = [name for name, p in student.named_parameters() if id(p) in frozen]
    if shared:
        raise ValueError(
            f"teacher: expected weights of its own, but it shares {len(shared)} parameters with the student "
            f"({shared[0]}, ...); pass copy.deepcopy(teacher), and a student that does not contain it"
        )


def _in_dtype_of(model: nn.Module, images: Any) -> Any:
    """Float images for a model in half precision, as autocast would have them."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    if dtype not in (torch.float16, torch.bfloat16) or not isinstance(images, Tensor):
        return images
    wider = images.is_floating_point() and images.dtype != dtype
    return images.to(dtype) if wider and not torch.is_autocast_enabled(images.device.type) else images


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))
