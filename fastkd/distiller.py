"""``Distiller``: knowledge distillation between two models in an existing training loop, through forward hooks."""

from __future__ import annotations

import inspect
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
from fastkd.adapters import forget_converted_weights
from fastkd.health import Check, Report
from fastkd.hooks import (
    FeatureHook,
    Group,
    LevelSpec,
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
from fastkd.ranks import is_first_rank, world_size
from fastkd.teacher import Teacher

# a function of the teacher's output and the (height, width) of each level, or of the sizes alone
Prior: TypeAlias = Callable[..., Sequence[Tensor | None]]


class Distiller(nn.Module):
    """Distils a frozen ``teacher`` into ``student``, with feature maps that forward hooks record::

        levels = {"backbone": [("layer4", "layer6")], "neck": [("fpn.2", "fpn.3")]}
        distiller = fastkd.Distiller(student, teacher, **levels, weight="auto")
        distiller.prepare(images).add_to(optimizer)  # the 1x1 adapters
        loss = task_loss(student(images), targets)
        loss = loss + distiller.loss(images, task_loss=loss)

    The teacher is frozen and put in eval mode here and before each use, even if ``.train()`` was called on it. The two
    models are not submodules: ``parameters()`` and ``state_dict()`` contain only the adapters, the teacher's statistics
    and the loss weight's state. A copy or pickle of the student contains nothing of fastkd. For several processes call
    ``prepare(images)``, wrap the distiller in ``DistributedDataParallel`` like the student, and call the wrapper
    (``forward`` is ``loss``), so that adapters and statistics are the same on every rank.

    Args:
        student, teacher: modules that take a batch of images; they may be wrapped in ``DistributedDataParallel`` or
            ``torch.compile`` (a compiled student must not have run before the distiller is made).
        backbone, neck: the modules whose outputs are distilled, as names or modules, in one of two forms: a *list of
            pairs* ``[(student, teacher), ...]``, or a *tuple of two lists* ``([student, ...], [teacher, ...])`` of any
            lengths, which ``prepare(images)`` pairs by stride; levels without a partner are dropped. A name needs no
            ``module.`` or ``_orig_mod.`` prefix; ``"input:name"`` is the input of the module, for example a sum that no
            module returns. Levels are numbered backbone first. Without either, ``images`` finds both.
        images: a batch that both models take; ``prepare`` is called with it. Without ``backbone`` and ``neck`` the
            levels are those that ``find_levels`` finds in both models at strides that they share; they are printed
            (by the first rank), and ``levels`` and ``check()`` name them.
        student_to_map, teacher_to_map: for outputs that are not (N, C, H, W) tensors: a function that turns the output
            of a level into one, ``"NHWC"`` where channels come last, or a dict from the names of levels to these.
        align: ``"interpolate"``: where height or width differ, the student's feature is resized to the teacher's by
            bilinear interpolation (as in PKD, Cao et al., 2022), and lists are paired by nearest stride, up to a factor
            of sqrt(2). None: heights and widths must be equal.
        prior: a function that is called without grad as ``prior(teacher_output, sizes)``, where sizes are the (height,
            width) of each level, and returns one (N, height, width) tensor or None per level. A function of the sizes
            alone (a prior from boxes) needs no output of the teacher, see ``fold_teacher``.
        preprocess: a function of the images whose result the teacher gets, where it needs another normalisation, range
            or crop than the student. Image sizes may differ as long as the features have the same sizes.
        last_forward: what to do if the student ran more than once with gradients since the last loss, and its last
            images are not those given. False: an error. True: the features of that last forward are used.
        fold_teacher: run a copy of the teacher with its batch norms folded into its convolutions, and stop its forward
            after the last level where nothing needs its output. For teachers whose weights do not change and whose
            forward has no side effects. In the first forward, features and output must agree within 1e-4 of their
            largest value; otherwise the teacher runs as it was given, with a warning.
        teacher_every: the teacher runs in the first of this many training steps. The loss is 0 in the other steps and
            is multiplied by this number in the first, which keeps the mean over steps. Choose an odd number if batches
            alternate between two sources.
        teacher_images: 1, 1/2, 1/3, ...: the part of a training batch that the teacher sees and the loss is computed
            on; the next forward of the teacher uses the next part. Images must be a tensor or a list, and the output of
            a level must have one row per image.
        criterion: a ``DistillLoss`` made beforehand, instead of ``loss_options``.
        **loss_options: arguments of ``DistillLoss``: ``info_map``, ``weights``, ``warmup_steps``, ...

    Attributes:
        criterion: the ``DistillLoss``. Its adapters get their numbers of channels in ``prepare`` or on the first batch.
        taught: the images of the last batch that the teacher saw, as a slice.

    Raises:
        ValueError: an unknown module (the message lists similar names); no level; models that share weights; loss
            options together with a criterion; levels that cannot be found or have no stride in common (the message
            lists the candidates).
        TypeError: a level that is neither a name nor a module; an argument of another type than above.
        With ``images`` also the errors of ``prepare``.
    """

    criterion: DistillLoss

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        backbone: LevelSpec | None = None,
        neck: LevelSpec | None = None,
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
        self._image_height = 1.0  # of the images of the student's last dry run
        if criterion is not None and loss_options:
            raise ValueError(f"criterion: expected no loss options together with it, got {', '.join(loss_options)}")
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
        # A notebook that makes the distiller again never calls remove() on the old one: the finalizer removes its
        # hooks. It may hold the handles only, as a hook holds the student, which may hold its distiller
        weakref.finalize(self, _remove_all, [hook.handles for hook in self._feature_hooks]).atexit = False
        # listed once: walking a large teacher at every step would take a millisecond
        self._frozen = (tuple(teacher.modules()), tuple(teacher.parameters()))
        self._freeze()
        self._teacher = Teacher(teacher, fold_teacher)
        if self._pairs is not None:
            self._teacher.set_levels([t for _, t in self._pairs])
        if images is not None:
            self._prepare_or_remove(images)

    def _prepare_or_remove(self, images: Any) -> None:
        """Call ``prepare``; where it fails, remove the hooks, because the caller never gets the distiller."""
        try:
            self.prepare(images)
        except BaseException:
            self.remove()
            raise
        if self._found and is_first_rank():
            print(f"fastkd: levels found: {self._names_of_levels()}", flush=True)

    def _names_of_levels(self) -> str:
        pairs = self._pairs or []
        groups = {s.group: "" for s, _ in pairs}
        listed = {name: ", ".join(f"{s.name} <- {t.name}" for s, t in pairs if s.group == name) for name in groups}
        return "; ".join(f"{name} {names}" for name, names in listed.items())

    def _make_criterion(self, most: int, options: dict[str, Any]) -> DistillLoss:
        """Return a ``DistillLoss`` for ``most`` levels; ``prepare`` drops the adapters of levels without a partner."""
        if not {"adapters", "student_channels", "teacher_channels"} & options.keys():
            options = {"levels": most, **options}
        if self._pairs is None and self._weights is not None:  # one per matched level, so they are set after matching
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
        """The frozen teacher, as it was given."""
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
        """Return ``loss(images, prior, task_loss)``, for a distiller in ``DistributedDataParallel``."""
        return self.loss(images, prior, task_loss)

    def loss(self, images: Any, prior: Prior | None = None, task_loss: Tensor | float | None = None) -> Tensor:
        """Return the distillation loss of the student's last forward, which must have been on the same images.

        Args:
            images: the teacher's input, usually the (N, 3, H, W) batch that the student has just seen. The teacher runs
                on it once, under ``no_grad`` and the autocast of the caller.
            prior: replaces the constructor's prior for this call, for priors from this batch's boxes.
            task_loss: the trainer's own loss, a scalar; ``weight="auto"`` needs it. No gradient flows into it.

        Returns:
            A float32 scalar; (L,) with ``reduction="none"``. It is zero, and the teacher does not run, from
            ``stop_step`` on and in the steps that ``teacher_every`` leaves out.

        Raises:
            RuntimeError: a hook has not fired since the last call; ``remove()`` was called; lists of modules that
                ``prepare`` has not matched yet.
            TypeError, ValueError: a hooked output that is not a 4-D tensor; levels whose sizes differ; the errors of
                ``distill_loss``.
        """
        if self._pairs is None:
            raise RuntimeError(
                "Distiller: expected prepare(images) before the first loss, which matches its lists of modules by "
                "stride and makes the adapters of the levels that match"
            )
        if self.training and world_size() > 1 and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._note_ddp()
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
            del output  # not before: it may hold a teacher feature, which then must not be donated
            loss: Tensor = self.criterion(student, teacher, q, task_loss, donated=donated)
            if learns and not self._passes.all:
                self._passes.count()
            return loss if factor == 1 else loss * factor
        finally:
            self._clear()

    @torch.no_grad()
    def prepare(self, images: Any) -> Distiller:
        """Match the levels and give the adapters their numbers of channels; return the distiller itself.

        Call it before DDP, an EMA or an optimiser needs the parameters. It runs both models once on ``images`` in eval
        mode and changes nothing else. The errors are those of ``loss``.
        """
        try:
            student, teacher, *_ = self._dry_run(images)
            self.criterion.prepare(student, teacher)
        finally:
            self._clear()
            forget_converted_weights()
        return self

    def add_to(self, optimizer: torch.optim.Optimizer) -> Distiller:
        """Add the adapters to the parameter groups of the student's optimiser; return the distiller itself.

        Weights join the group with most of the student's weights, and biases the group with most of its biases and
        norms; they share the learning rate and weight decay of that group. No group is added, so a scheduler may exist
        already. Adapter parameters that the optimiser has already stay in their group. To resume a run, call
        ``add_to`` before the optimiser's ``load_state_dict``.

        Raises:
            RuntimeError: the adapters have no weights yet; call ``prepare(images)`` before.
            ValueError: the optimiser has no parameter of the student, or cannot take parameters once it is made.
        """
        _require_extensible(optimizer)
        adapters = list(self.criterion.adapters.named_parameters(prefix="adapters"))
        if any(isinstance(p, UninitializedParameter) for _, p in adapters):
            raise RuntimeError("add_to: expected prepare(images) before, which makes the weights of the adapters")
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
        """Compute the teacher's channel statistics from a loader, instead of from the first training batches.

        It stops after ``calibration_batches`` batches; if the loader has fewer, the first training batches add the
        rest. Any of several ranks may call it, with any batches: the first training forward merges their statistics.

        Args:
            loader: an iterable of batches; each is the teacher's input, or a tuple or list that starts with it.

        Raises:
            TypeError: one tensor instead of an iterable of batches.
            RuntimeError: a call after the first training forward of several ranks.
            Otherwise the errors of ``loss``.
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
        """Return the information maps, differences and losses of these images, which ``fastkd.viz`` draws.

        It runs both models once in eval mode and changes nothing else than ``prepare`` does: it neither counts nor
        calibrates. It waits for no other process, so one rank may call it alone. A teacher is standardised by the
        statistics so far, and not at all before the first training batch.

        Args:
            images: a batch that both models take.
            prior: replaces the constructor's prior for this call.

        Returns:
            One entry per matched level: names, stride, information map, difference of student and teacher, and loss.

        Raises:
            The errors of ``loss``.
        """
        try:
            self._clear()
            # DistributedDataParallel would wait for other ranks, and torch.compile would compile again
            self._run_student(unwrapped(self.student), images)
            student, teacher, q, _ = self._features(images, prior)
            self.criterion.prepare(student, teacher)
            with eval_mode(self.criterion):
                return level_maps.measure(self.criterion, self._matched(), student, teacher, q, self._image_height)
        finally:
            self._clear()
            forget_converted_weights()

    def check(
        self,
        images: Any = None,
        optimizer: torch.optim.Optimizer | None = None,
        task_loss: float | Tensor | None = None,
        *,
        teacher_fingerprint: str | None = None,
        prior: Prior | None = None,
    ) -> Report:
        """Return a report on whether distillation works: everything that could silently turn it off is checked.

        Nothing is trained or counted, the models run in eval mode, and no other rank is waited for. A check that needs
        a missing argument is reported as not known. ``print(distiller.check(images, optimizer, task_loss))`` shows a
        table.

        Args:
            images: a batch to run both models on, for the checks of hooks, gradients and the loss.
            optimizer: the optimiser that should train the adapters.
            task_loss: the task loss on these images, to compare the distillation loss with.
            teacher_fingerprint: ``fastkd.fingerprint`` of the weights that the teacher should have.
            prior: replaces the constructor's prior for this call.

        Returns:
            A ``Report``; ``report.ok`` is False if any check failed.
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
        """Remove the hooks from both models; the distiller cannot be used afterwards."""
        for hook in self._feature_hooks:
            hook.detach()
        self._feature_hooks, self._groups = [], []
        self._teacher.clear()

    def __deepcopy__(self, memo: Any) -> Distiller:
        raise TypeError(
            "Distiller: expected no copy or pickle, as its hooks belong to its student; copy the student, save the "
            "distiller's state_dict(), and make a new Distiller"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.__deepcopy__(protocol)

    def extra_repr(self) -> str:
        if self._pairs is None:
            return "levels are not matched yet; prepare(images) matches them by stride"
        return "\n".join(f"{s} <- {t}" for s, t in self._pairs)

    def _require_levels(self, levels: int) -> None:
        have = len(self.criterion.adapters)
        if levels != have:
            raise ValueError(f"criterion: expected {levels} levels, one per pair of modules, got {have}")

    def _student_features(self, images: Any) -> list[Tensor]:
        """Return the features of the student's last forward; raise if it was on other images."""
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
        """Run the teacher; return student features, teacher features and priors per level, and the teacher's output."""
        self._student_features(images)  # raises before the teacher runs
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
        if taught != ALL:  # a prior from boxes has the maps of all images
            q = [x[taught] if isinstance(x, Tensor) and len(x) == len(images) else x for x in q]
        return student, teacher, q, output

    def _aligned(self, s: FeatureHook, t: FeatureHook, x: Tensor, teacher: Tensor) -> Tensor:
        """Return the student's feature ``x``, resized to the height and width of the teacher's where asked."""
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
                "pair modules of equal stride, or pass two lists ([student, ...], [teacher, ...]) that are matched by "
                'stride, or resize the student\'s feature: align="interpolate"'
            )
        return F.interpolate(x, teacher.shape[2:], mode="bilinear", align_corners=False)

    def _note_ddp(self) -> None:
        """Record whether this forward runs in a DistributedDataParallel that contains the adapters."""
        active = getattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", None)
        if self._ddp != id(active):
            adapters = {id(p) for p in self.criterion.adapters.parameters()}
            self._averaged = active is not None and adapters <= {id(p) for p in active.parameters()}
            self._ddp = id(active)
        self._refuse_join(active)

    def _refuse_join(self, active: nn.Module | None) -> None:
        """Raise for uneven inputs: ``Join`` answers for one DistributedDataParallel, and for no sum of fastkd."""
        parallel = [x for x in (active, ddp_of(self.student)) if x is not None]
        configs = [getattr(x, "_join_config", None) for x in parallel]
        if not any(x.enable and not x.throw_on_early_termination for x in configs if x is not None):
            return
        if len({id(x) for x in parallel}) > 1:
            why = "student and distiller are in two DistributedDataParallel, which Join mixes up: put them in one"
        elif self.criterion.waits_for_ranks:
            why = 'each step sums over all ranks: weight="auto", map_all_ranks, or statistics not yet calibrated'
        else:
            return
        raise RuntimeError(
            f"Distiller: expected no Join of DistributedDataParallel, as {why}. Give every rank the same number of "
            "batches (DistributedSampler does), or use Join(..., throw_on_early_termination=True)"
        )

    def _require_hooks(self) -> None:
        if not self._feature_hooks:
            raise RuntimeError("Distiller: the hooks were removed by remove(); make a new Distiller")

    def _move_criterion(self, features: Sequence[Tensor]) -> None:
        """Move the criterion to the features' device; its parameters stay the same objects."""
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
        """Run the frozen teacher; return its output, or None where its forward may stop and did (not ``whole``)."""
        self._freeze()
        with torch.no_grad():
            images = _in_dtype_of(self.teacher, images if self.preprocess is None else self.preprocess(images))
            return self._teacher.run(images, whole=whole)

    def _dry_run(
        self, images: Any, prior: Prior | None = None
    ) -> tuple[list[Tensor], list[Tensor], Sequence[Tensor | None] | None, Any]:
        """Run the student in eval mode, then return ``_features``."""
        self._clear()
        self._run_student(without_ddp(self.student), images)
        return self._features(images, prior)

    def _run_student(self, student: nn.Module, images: Any) -> None:
        """Run one forward in eval mode and record the height of the images, which strides are relative to."""
        with eval_mode(self.student), convolved_heights(student) as heights:
            student(images)
        if isinstance(images, Tensor):
            heights = [images.shape[-2]]
        # most models resize a list of images; where the height is unknown, strides are relative to the largest map
        maps = [x.output.shape[-2] for x in self._feature_hooks if isinstance(x.output, Tensor) and x.output.ndim == 4]
        self._image_height = heights[0] if heights else max(maps, default=1)

    def _matched(self) -> list[tuple[FeatureHook, FeatureHook]]:
        """Return the pairs of hooks; the first call matches lists by stride and removes the hooks without partner."""
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
            self._teacher.set_levels([t for _, t in pairs])
        return self._pairs

    def _clear(self) -> None:
        for hook in self._feature_hooks:
            hook.reset()

    def _check_hooks(self, images: Any, prior: Prior | None) -> tuple[Check, set[nn.Module] | None]:
        """Return the check, and the layers of the teacher that look untrained but run; None where not known."""
        seen: set[nn.Module] = set()
        ran: set[nn.Module] | None = seen
        if any(x.is_compiled for x in self._feature_hooks if x.role == "teacher"):  # hooks added later do not fire
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
            message = f"expected one call per forward, fired: {', '.join(often)}; the last output is used"
            return Check("hooks", False, message), ran
        return Check("hooks", True, f"each fired once per forward, at {pairs} levels"), ran

    def _check_gradient(
        self, images: Any, task_loss: float | Tensor | None, prior: Prior | None
    ) -> tuple[Check, Tensor]:
        """Backpropagate each level's own gradient through the student; return the check and the unweighted losses."""
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
                on = criterion.options.weights or [1.0] * len(hooks)  # a level of weight 0 gets no gradient
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
            message = f"zero or not finite at the student's weights (norm): {listed}; frozen or detached?"
        return Check("gradient", not bad, message), criterion.level_losses

    def _student_gradient(self, images: Any, hook: FeatureHook, gradient: Tensor) -> float:
        """Return the norm of the gradient of the student's weights that ``gradient`` at this level causes."""
        parameters = [p for p in self.student.parameters() if p.requires_grad]
        with eval_mode(self.student):  # during the backward too, as checkpointing runs parts of the forward again there
            without_ddp(self.student)(images)  # again for each level: a compiled graph may allow one backward only
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
    # reentrant checkpointing allows a full backward only; hooks of trainers and optimisers must not see its gradients
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
) -> dict[str, LevelSpec]:
    """Return the found levels of both models as ``backbone`` and ``neck``, if they have a stride in common.

    Args:
        student, teacher, align: as in ``Distiller``.
        images: the input of the student and that of the teacher.
    """
    found: list[FoundLevels] = []
    for role, model, seen in zip(("student", "teacher"), (student, teacher), images, strict=True):
        try:
            found.append(find_levels(model, seen))
        except ValueError as error:
            raise ValueError(f"{role}: {error}") from None
    ours, theirs = found
    groups: dict[str, LevelSpec] = {"backbone": (ours.backbone, theirs.backbone), "neck": (ours.neck, theirs.neck)}
    for name in list(groups):
        try:
            match_by_stride(ours.strides(name), theirs.strides(name), nearest=align is not None)
        except ValueError:
            del groups[name]
    if not groups:
        raise ValueError(
            "images: expected models with levels of equal stride, but none was found; name the levels yourself: "
            f"backbone=, neck=. Candidates of the student:\n{ours}\nCandidates of the teacher:\n{theirs}"
        )
    return groups


def _require_images(hook: FeatureHook, images: Any) -> None:
    """Raise if the student ran several times since the last loss, and last on other images than these."""
    last = hook.images
    if last is None or last is images:  # None: not known
        return
    tensors = isinstance(last, Tensor) and isinstance(images, Tensor)
    if tensors and last.shape == images.shape and last.data_ptr() == images.data_ptr():
        return
    raise RuntimeError(
        f"{hook}: expected the images of the student's last forward, got other images, and the student ran more than "
        "once since the last loss: call distiller.loss(images) after each forward, on the same images, or run the "
        "student once on torch.cat of all images; to use its last forward anyway: Distiller(..., last_forward=True)"
    )


def takes_output(prior: Prior) -> bool:
    """Whether a prior takes the teacher's output besides the sizes."""
    try:
        kinds = [p.kind for p in inspect.signature(prior).parameters.values() if p.default is p.empty]
    except (TypeError, ValueError):  # a function in C has no signature
        return True
    positional = [kind for kind in kinds if kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)]
    return len(positional) != 1 or Parameter.VAR_POSITIONAL in kinds


def _rows(hook: FeatureHook, images: Sequence[Any], taught: slice) -> Tensor:
    """Return the rows of a level's feature that belong to these images of the batch."""
    feature = hook.feature()
    if len(feature) != len(images):
        raise ValueError(
            f"{hook}: expected {len(images)} rows, one per image, as teacher_images selects images; got shape "
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
        which = "one with sharded tensors" if sharded else fixed.pop()
        raise ValueError(
            f"optimizer: expected one whose groups can take the adapters, got {which}; train the adapters with their "
            "own optimizer, or make yours after prepare(images), with distiller.parameters()"
        )


def _elements(parameters: Sequence[Tensor], of: Container[int], *, vectors: bool | None = None) -> int:
    """Return the number of elements of the parameters whose ids are in ``of``: all, vectors only, or no vectors."""
    return sum(p.numel() for p in parameters if id(p) in of and vectors in (None, p.ndim <= 1))


def _held_by_hooks_alone(features: list[Tensor]) -> list[bool]:
    """Whether only the list and a hook hold each feature, so that the gradient may overwrite its memory.

    Python counts the references to the tensor. The storage counts those to its memory: views, images that a module
    returned unchanged, a buffer. Where PyTorch does not count them, or compiles, no feature is donated.
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
    """Raise ``ValueError`` for shared parameters: freezing the teacher would freeze them in the student."""
    frozen = {id(p) for p in teacher.parameters()}
    shared = [name for name, p in student.named_parameters() if id(p) in frozen]
    if shared:
        raise ValueError(
            f"teacher: expected a teacher that shares no weights with the student, got {len(shared)} shared parameters "
            f"({shared[0]}, ...); pass copy.deepcopy(teacher), and a student that does not contain the teacher"
        )


def _in_dtype_of(model: nn.Module, images: Any) -> Any:
    """Return the images, converted to the model's dtype if that has 16 bits, as autocast would."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    if dtype not in (torch.float16, torch.bfloat16) or not isinstance(images, Tensor):
        return images
    wider = images.is_floating_point() and images.dtype != dtype
    return images.to(dtype) if wider and not torch.is_autocast_enabled(images.device.type) else images


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))
