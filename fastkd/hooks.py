"""Forward hooks on modules found by name, through the wrappers of DistributedDataParallel and torch.compile."""

from __future__ import annotations

import difflib
import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NoReturn, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Place: TypeAlias = str | nn.Module
ToMap: TypeAlias = str | Callable[[Any], Tensor]
ToMaps: TypeAlias = ToMap | Mapping[str, ToMap] | None
LevelSpec: TypeAlias = Sequence[tuple[Place, Place]] | tuple[Sequence[Place], Sequence[Place]]

INPUT = "input:"  # prefix of a name: the input of the module instead of its output

# parts of module names that wrappers insert: torch.compile, FullyShardedDataParallel, activation checkpointing
WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


class FeatureHook:
    """A forward hook that records the last output of one module and counts its calls in one forward of the model.

    ``"input:name"`` records the first argument of the module instead. ``to_map`` turns the recorded value into an
    (N, C, H, W) tensor.

    If a later module changes the output in place (ReLU(inplace=True), ``out += identity``), the changed value is
    distilled, with a warning. Values that checkpointing recomputes during a backward are not recorded. Copies and
    pickles of the model do not contain the hook, so that they load without fastkd, and an EMA of the student does not
    write into the distiller.
    """

    def __init__(self, role: str, label: str, model: nn.Module, place: Place, to_maps: ToMaps = None) -> None:
        self.role, self.label = role, label
        self.of_input = isinstance(place, str) and place.startswith(INPUT)
        place = place.removeprefix(INPUT) if isinstance(place, str) else place
        self.root = unwrapped(model)
        self.given = model
        self.name, self.module = _find(role, label, model, place)
        self.name = INPUT * self.of_input + self.name
        self.to_map = _to_map(role, self.name, to_maps)
        self.output: Any = None
        self.map: Tensor | None = None  # the (N, C, H, W) tensor that ``to_map`` made of the output
        self.version = 0  # version counter of the output when the module returned it
        self.warned = False
        self.calls = 0
        self.images: Any = None  # the first argument of the model's last forward
        self.several = False  # whether an earlier forward since the last loss had gradients too
        self.handles: list[RemovableHandle] = []
        self.on_output: Callable[[], None] | None = None  # called after each output that is recorded

    def __str__(self) -> str:
        return f"{self.role} {self.label} {self.name!r}"

    @property
    def group(self) -> str:
        """``"backbone"`` or ``"neck"``."""
        return self.label.partition("[")[0]

    @property
    def is_compiled(self) -> bool:
        """Whether the model, or a part of it, is compiled with ``torch.compile``."""
        return is_compiled(self.given)

    def attach(self) -> None:
        """Register the hook on the model and on the module."""
        leave_hooks_behind(self.root, self.module)
        before = self.root.register_forward_pre_hook(self)
        self.handles += [before, self.module.register_forward_hook(self)]

    def detach(self) -> None:
        """Remove the hook from the model and the module."""
        while self.handles:  # in place, as a finalizer has the list
            self.handles.pop().remove()
        self.reset()

    def reset(self) -> None:
        """Forget the recorded output and the count of calls."""
        self.output, self.map, self.images, self.calls, self.several = None, None, None, 0, False

    def __call__(self, module: nn.Module, args: Any, *output: Any) -> None:
        """Called before a forward of the model (without an output), and after one of the module."""
        if _in_backward():  # a checkpointed model runs its forward again, which must not replace the recorded output
            return
        if not output and module is self.root:
            # drop the output of an earlier forward, for example of a validation
            if not torch.compiler.is_compiling():
                self.several |= isinstance(self.output, Tensor) and self.output.requires_grad
                self.images = args[0] if args else None
            self.output, self.map, self.calls = None, None, 0
        elif output and module is self.module:  # not a replica of DataParallel, which shares the hooks
            if self.of_input and not args:
                raise TypeError(f"{self}: expected the module to be called with its input as first positional argument")
            self.output, self.map = args[0] if self.of_input else output[0], None
            self.version = _version(self.output)
            self.calls += 1
            if self.on_output is not None:
                self.on_output()

    @property
    def was_changed(self) -> bool:
        """Whether a later module has changed the recorded output in place."""
        return not torch.compiler.is_compiling() and _version(self.output) != self.version

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies of a module that had other hooks before get a function that takes anything and does nothing."""
        return getattr, (nullcontext(), "__exit__")

    def feature(self) -> Tensor:
        """Return the last output as an (N, C, H, W) tensor.

        Raises:
            RuntimeError: the module has not run since the last loss.
            TypeError, ValueError: the output is not a 4-D tensor, or its channels come last.
        """
        if not self.calls:
            run = (
                "call student(images) before each distiller.loss(images), and check"
                if self.role == "student"
                else "check"
            )
            hint = f"{run} whether the forward uses the module"
            if self.is_compiled:
                hint += "; if the model ran compiled before the Distiller was made, call torch.compiler.reset()"
            raise RuntimeError(f"{self}: expected it to run, but its hook has not fired since the last call; {hint}")
        self._warn_if_changed()
        feature = self.output
        if self.to_map is not None:
            self.map = feature = self.to_map(self.output) if self.map is None else self.map
        if not isinstance(feature, Tensor):
            raise TypeError(
                f"{self}: expected an output tensor (N, C, H, W), got a {type(feature).__name__}; "
                f"choose a module whose output is one tensor, or select it: {self._hint('lambda output: output[0]')}"
            )
        if feature.ndim != 4:
            raise ValueError(
                f"{self}: expected an output of 4 dimensions (N, C, H, W), got shape {tuple(feature.shape)}; "
                f"turn tokens into a map: {self._hint('lambda x: x.transpose(1, 2).unflatten(2, (height, width))')}"
            )
        if self.to_map is None and not self.of_input:
            self._refuse_channels_last(feature)
        return feature

    def _hint(self, example: str) -> str:
        return f"Distiller(..., {self.role}_to_map={{{self.name!r}: {example}}})"

    def _refuse_channels_last(self, x: Tensor) -> None:
        """Raise ``ValueError`` where the module's last layer shows that channels come last, as in Swin."""
        widths = [w for module in self.module.modules() if (w := _last_width(module)) is not None]
        if widths and x.shape[3] == widths[-1] != x.shape[1]:
            example = '"NHWC"'
            raise ValueError(
                f"{self}: expected an output (N, C, H, W), got shape {tuple(x.shape)}, whose last size is the width "
                f"{widths[-1]} of the module's last layer: channels seem to come last; {self._hint(example)}"
            )

    def _warn_if_changed(self) -> None:
        if not self.warned and self.was_changed:
            self.warned = True
            warnings.warn(
                f"{self}: a later module changed its output in place, so the changed output is distilled; to distil "
                "the original output, use inplace=False there; to distil the changed one, name the later module",
                stacklevel=2,
            )


def _in_backward() -> bool:
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _last_width(module: nn.Module) -> int | None:
    """Return the size of the last dimension of the output of a LayerNorm or Linear; None for any other module."""
    if type(module) is nn.LayerNorm:
        return int(module.normalized_shape[-1])
    return module.out_features if isinstance(module, nn.Linear) else None


def _to_map(role: str, name: str, to_maps: ToMaps) -> Callable[[Any], Tensor] | None:
    """Return the function that turns the output of the level ``name`` into an (N, C, H, W) tensor; None for none."""
    found = to_maps.get(name) if isinstance(to_maps, Mapping) else to_maps
    if found == "NHWC":
        return _channels_first
    if found is not None and not callable(found):
        raise TypeError(
            f'{role}_to_map: expected a function of the module\'s output or "NHWC", got {found!r} for {name!r}'
        )
    return found


def _channels_first(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def _version(output: Any) -> int:
    """Return how often a tensor was changed in place; 0 for values that do not count it."""
    counts = isinstance(output, Tensor) and not torch.compiler.is_compiling() and not output.is_inference()
    return output._version if counts else 0


class Group:
    """The hooks of the levels of the backbone or the neck; ``pairs`` is None until two lists are matched by stride."""

    def __init__(
        self, name: str, levels: LevelSpec, student: nn.Module, teacher: nn.Module, to_maps: tuple[ToMaps, ToMaps]
    ) -> None:
        by_stride = isinstance(levels, tuple) and len(levels) == 2
        if by_stride and all(isinstance(x, tuple) and len(x) == 2 for x in levels):
            raise TypeError(
                f"{name}: expected a list of pairs or a tuple of two lists, got {levels!r}, which could be either; "
                f"write {list(levels)!r} for pairs, {tuple(map(list, levels))!r} to match by stride"
            )
        if isinstance(levels, str) or not all(isinstance(x, (list, tuple)) for x in levels):
            self._refuse(name, levels)
        if not by_stride and not all(len(x) == 2 for x in levels):
            self._refuse(name, levels)
        sides = levels if by_stride else [[pair[k] for pair in levels] for k in (0, 1)]
        self.name = name
        self.student = [FeatureHook("student", f"{name}[{i}]", student, x, to_maps[0]) for i, x in enumerate(sides[0])]
        self.teacher = [FeatureHook("teacher", f"{name}[{i}]", teacher, x, to_maps[1]) for i, x in enumerate(sides[1])]
        self.pairs = None if by_stride else list(zip(self.student, self.teacher, strict=True))

    @staticmethod
    def _refuse(name: str, levels: object) -> NoReturn:
        raise TypeError(
            f"{name}: expected a list of pairs [(student, teacher), ...] or a tuple of two lists "
            f"([student, ...], [teacher, ...]), of module names or modules, got {levels!r}"
        )

    def match(self, image_height: float, align: str | None = None) -> list[tuple[FeatureHook, FeatureHook]]:
        """Return the pairs of hooks of equal stride, or of nearest stride where features get resized."""
        heights = [[hook.feature().shape[2] for hook in hooks] for hooks in (self.student, self.teacher)]
        try:
            strides = [[image_height / max(height, 1) for height in side] for side in heights]
            pairs = match_by_stride(*strides, nearest=align is not None)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None
        return [(self.student[i], self.teacher[j]) for i, j in pairs]


@contextmanager
def convolved_heights(model: nn.Module) -> Iterator[list[int]]:
    """Yield a list that records the input height of each convolution that runs; the first is that of the images.

    The list stays empty for a compiled model, whose graph would keep the hooks.
    """
    heights: list[int] = []
    modules = [] if is_compiled(model) else [x for x in unwrapped(model).modules() if isinstance(x, nn.Conv2d)]

    def note(module: nn.Module, args: Any) -> None:
        if args and isinstance(args[0], Tensor):
            heights.append(args[0].shape[-2])

    handles = [module.register_forward_pre_hook(note) for module in modules]
    try:
        yield heights
    finally:
        for handle in handles:
            handle.remove()


class ModuleHooks(OrderedDict[int, Any]):
    """A module's dict of hooks that hides those of fastkd from copies, pickles and ``torch.jit.script``."""

    def values(self) -> Any:
        """Return the hooks that ``torch.jit.script`` would compile; a call of the module uses ``items()``."""
        return [hook for hook in super().values() if not isinstance(hook, FeatureHook)]

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, ([(key, hook) for key, hook in self.items() if not isinstance(hook, FeatureHook)],)


def leave_hooks_behind(root: nn.Module, module: nn.Module) -> None:
    """Replace the modules' empty dicts of hooks, so that copies and pickles of the model lack the hooks of fastkd.

    A dict that contains hooks already is kept, because their handles remove them from that dict.
    """
    if not root._forward_pre_hooks:
        root._forward_pre_hooks = ModuleHooks()
    if not module._forward_hooks:
        module._forward_hooks = ModuleHooks()


def is_compiled(model: nn.Module) -> bool:
    """Whether the model or a part of it is compiled with ``torch.compile``."""
    wrapped = any(hasattr(x, "_orig_mod") for x in (model, getattr(model, "module", None)))
    return wrapped or any(x._compiled_call_impl is not None for x in unwrapped(model).modules())


def bare_name(name: str) -> str:
    """Return the name of a module or tensor without the parts that wrappers insert."""
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    while parts and parts[0] == "module":  # DistributedDataParallel, AveragedModel
        parts = parts[1:]
    return ".".join(parts)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside ``torch.compile``, ``DistributedDataParallel`` and ``DataParallel``."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        else:
            return model


def ddp_of(model: nn.Module) -> nn.Module | None:
    """Return the DistributedDataParallel around the model, or None."""
    while hasattr(model, "_orig_mod"):
        model = model._orig_mod  # type: ignore[assignment]
    return model if isinstance(model, nn.parallel.DistributedDataParallel) else None


def without_ddp(model: nn.Module) -> nn.Module:
    """Return the model without DistributedDataParallel, whose forward would wait for the other ranks."""
    ddp = ddp_of(model)
    return model if ddp is None else unwrapped(ddp)


def _find(role: str, label: str, model: nn.Module, place: Place) -> tuple[str, nn.Module]:
    """Return the name (without wrappers) and the module of one level.

    Raises:
        ValueError: no such module; the message lists similar names.
        TypeError: neither a name nor a module.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    if isinstance(place, nn.Module):
        for name, module in modules.items():
            if module is place:
                return bare_name(name), module
        raise ValueError(f"{label}: expected a module of the {role}, got a {type(place).__name__} that is not in it")
    if not isinstance(place, str):
        raise TypeError(f"{label}: expected the name of a module of the {role} or a module, got {place!r}")
    bare = {bare_name(name): module for name, module in modules.items()}  # the last of several is the innermost
    if place in modules or bare_name(place) in bare:
        return bare_name(place), modules[place] if place in modules else bare[bare_name(place)]
    near = difflib.get_close_matches(bare_name(place), bare, n=5, cutoff=0.4)
    hint = f"similar names: {', '.join(map(repr, near))}" if near else f"see {role}.named_modules()"
    raise ValueError(f"{label}: the {role} has no module named {place!r}; {hint}")


def match_by_stride(
    student_strides: Sequence[float], teacher_strides: Sequence[float], *, nearest: bool = False
) -> list[tuple[int, int]]:
    """Return the index pairs of student and teacher levels of equal stride.

    Args:
        student_strides, teacher_strides: image height over feature height of each level; no stride twice per list.
        nearest: pair the levels whose strides are each other's nearest, less than a factor of sqrt(2) apart, instead.

    Returns:
        (student index, teacher index) per pair, in the student's order.

    Raises:
        ValueError: a stride occurs twice in one list, or the two lists have no stride in common.
    """
    for name, strides in (("student", student_strides), ("teacher", teacher_strides)):
        if len(set(strides)) != len(strides):
            raise ValueError(f"{name} levels: expected one level per stride, to match by, got strides {list(strides)}")
    near = [
        (i, j)
        for i, s in enumerate(student_strides)
        for j, t in enumerate(teacher_strides)
        if _ratio(s, t) < math.sqrt(2)
        and _ratio(s, t) == min(_ratio(s, other) for other in teacher_strides)
        and _ratio(s, t) == min(_ratio(other, t) for other in student_strides)
    ]
    pairs = near if nearest else [(i, j) for i, j in near if student_strides[i] == teacher_strides[j]]
    if not pairs:
        hint = '; some are similar: align="interpolate" pairs and resizes these' if near else ""
        raise ValueError(
            f"levels: expected a stride that student and teacher share, got {_listed(student_strides)} "
            f"and {_listed(teacher_strides)}{hint}"
        )
    return pairs


def _ratio(a: float, b: float) -> float:
    return max(a, b) / min(a, b)


def _listed(strides: Sequence[float]) -> str:
    return f"[{', '.join(f'{stride:g}' for stride in strides)}]"
