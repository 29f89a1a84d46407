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
Levels: TypeAlias = Sequence[tuple[Place, Place]] | tuple[Sequence[Place], Sequence[Place]]

INPUT = "input:"  # before a name: what the module gets, not what it returns

# names that wrappers put in between: torch.compile, FullyShardedDataParallel, activation checkpointing
WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


class FeatureHook:
    """Forward hook that keeps the last output of one module and counts its calls in one forward of the model.

    ``"input:name"`` keeps what the module gets as its first argument instead. ``to_map`` makes an (N, C, H, W) tensor
    of what is kept.

    If a later module changes that output in place (ReLU(inplace=True), ``out += identity``), the changed one is what
    is kept, with a warning. What checkpointing recomputes during a backward is not recorded. Copies and pickles of the
    model are without it, so that they load without fastkd and an EMA of the student can't feed the distiller.
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
        self.map: Tensor | None = None  # the (N, C, H, W) tensor that was made of the output
        self.version = 0  # of the output, as the module left it
        self.warned = False
        self.calls = 0
        self.images: Any = None  # what the model's last forward got first
        self.several = False  # whether an earlier forward since the last loss could have been distilled too
        self.handles: list[RemovableHandle] = []
        self.heard: Callable[[], None] | None = None  # called after each output that is kept

    def __str__(self) -> str:
        return f"{self.role} {self.label} {self.name!r}"

    @property
    def group(self) -> str:
        """``"backbone"`` or ``"neck"``."""
        return self.label.partition("[")[0]

    @property
    def is_compiled(self) -> bool:
        """Whether the model runs by ``torch.compile``."""
        return is_compiled(self.given)

    def attach(self) -> None:
        leave_hooks_behind(self.root, self.module)
        before = self.root.register_forward_pre_hook(self)
        self.handles += [before, self.module.register_forward_hook(self)]

    def detach(self) -> None:
        while self.handles:  # in place: a finalizer has the list
            self.handles.pop().remove()
        self.reset()

    def reset(self) -> None:
        self.output, self.map, self.images, self.calls, self.several = None, None, None, 0, False

    def __call__(self, module: nn.Module, args: Any, *output: Any) -> None:
        """Before a forward of the model (without an output), and after one of the module."""
        if _in_backward():  # where the whole model is checkpointed, a forward that is waiting must not be lost
            return
        if not output and module is self.root:
            # what an earlier forward left behind, for example one of a validation, is dropped
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
            if self.heard is not None:
                self.heard()

    @property
    def was_changed(self) -> bool:
        """Whether a later module has changed the output in place."""
        return not torch.compiler.is_compiling() and _version(self.output) != self.version

    def __reduce__(self) -> tuple[Any, ...]:
        """In copies of a module that others had hooks on before: a function that takes anything and does nothing."""
        return getattr, (nullcontext(), "__exit__")

    def feature(self) -> Tensor:
        """The last output, a 4-D tensor."""
        if not self.calls:
            run = (
                "call student(images) before each distiller.loss(images), and see" if self.role == "student" else "see"
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
                f"choose a module whose output is one tensor, or pick it: {self._way_out('lambda output: output[0]')}"
            )
        if feature.ndim != 4:
            raise ValueError(
                f"{self}: expected an output of 4 dimensions (N, C, H, W), got shape {tuple(feature.shape)}; "
                f"tokens become a map by {self._way_out('lambda x: x.transpose(1, 2).unflatten(2, (height, width))')}"
            )
        if self.to_map is None and not self.of_input:
            self._refuse_channels_behind(feature)
        return feature

    def _way_out(self, example: str) -> str:
        return f"Distiller(..., {self.role}_to_map={{{self.name!r}: {example}}})"

    def _refuse_channels_behind(self, x: Tensor) -> None:
        """Whether the module's own last layer says that channels come last, as in Swin."""
        widths = [w for module in self.module.modules() if (w := _width_behind(module)) is not None]
        if widths and x.shape[3] == widths[-1] != x.shape[1]:
            example = '"NHWC"'
            raise ValueError(
                f"{self}: expected an output (N, C, H, W), got shape {tuple(x.shape)}, whose last size is the width "
                f"{widths[-1]} of the module's last layer: channels seem to come last; {self._way_out(example)}"
            )

    def _warn_if_changed(self) -> None:
        if not self.warned and self.was_changed:
            self.warned = True
            warnings.warn(
                f"{self}: a later module changed its output in place, and what is distilled is the result; to distil "
                "the output itself use inplace=False there, else hook the later module to have it said",
                stacklevel=2,
            )


def _in_backward() -> bool:
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _width_behind(module: nn.Module) -> int | None:
    """The width of a layer that works on the last dimension."""
    if type(module) is nn.LayerNorm:
        return int(module.normalized_shape[-1])
    return module.out_features if isinstance(module, nn.Linear) else None


def _to_map(role: str, name: str, to_maps: ToMaps) -> Callable[[Any], Tensor] | None:
    """What makes a map of this level's output."""
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
    """How often a tensor was changed in place; 0 for what does not count that."""
    counts = isinstance(output, Tensor) and not torch.compiler.is_compiling() and not output.is_inference()
    return output._version if counts else 0


class Group:
    """The hooks of the backbone's or the neck's levels, in pairs if they were given so."""

    def __init__(
        self, name: str, levels: Levels, student: nn.Module, teacher: nn.Module, to_maps: tuple[ToMaps, ToMaps]
    ) -> None:
        by_stride = isinstance(levels, tuple) and len(levels) == 2
        if by_stride and all(isinstance(x, tuple) and len(x) == 2 for x in levels):
            raise TypeError(
                f"{name}: expected a list of pairs or a tuple of two lists, got {levels!r}, which may be either; write "
                f"{list(levels)!r} for pairs, {tuple(map(list, levels))!r} to match by stride"
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
        """Pairs of equal stride, or of the nearest where features get aligned."""
        heights = [[hook.feature().shape[2] for hook in hooks] for hooks in (self.student, self.teacher)]
        try:
            strides = [[image_height / max(height, 1) for height in side] for side in heights]
            pairs = match_by_stride(*strides, nearest=align is not None)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None
        return [(self.student[i], self.teacher[j]) for i, j in pairs]


@contextmanager
def convolved_heights(model: nn.Module) -> Iterator[list[int]]:
    """Heights of what the model's convolutions get, as they run: the first one is that of the images.

    Empty for a compiled model, whose graph would keep the hooks.
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
    """A module's dict of hooks, of which copies, pickles and ``torch.jit.script`` get those that are not fastkd's."""

    def values(self) -> Any:
        """What ``torch.jit.script`` would compile; a call of the module goes through ``items()``."""
        return [hook for hook in super().values() if not isinstance(hook, FeatureHook)]

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, ([(key, hook) for key, hook in self.items() if not isinstance(hook, FeatureHook)],)


def leave_hooks_behind(root: nn.Module, module: nn.Module) -> None:
    """Let the hooks stay behind when the model is copied or pickled.

    A dict that has hooks stays as it is: it is the one that their handles remove them from.
    """
    if not root._forward_pre_hooks:
        root._forward_pre_hooks = ModuleHooks()
    if not module._forward_hooks:
        module._forward_hooks = ModuleHooks()


def is_compiled(model: nn.Module) -> bool:
    """Whether the model or a part of it runs by ``torch.compile``."""
    wrapped = any(hasattr(x, "_orig_mod") for x in (model, getattr(model, "module", None)))
    return wrapped or any(x._compiled_call_impl is not None for x in unwrapped(model).modules())


def bare_name(name: str) -> str:
    """A module's or tensor's name without what wrappers put into it."""
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    while parts and parts[0] == "module":  # DistributedDataParallel, AveragedModel
        parts = parts[1:]
    return ".".join(parts)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile and DistributedDataParallel, whose forward every wrapper ends in."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        else:
            return model


def ddp_of(model: nn.Module) -> nn.Module | None:
    """The DistributedDataParallel around the model, if there is one."""
    while hasattr(model, "_orig_mod"):
        model = model._orig_mod  # type: ignore[assignment]
    return model if isinstance(model, nn.parallel.DistributedDataParallel) else None


def without_ddp(model: nn.Module) -> nn.Module:
    """The model itself where it is in DistributedDataParallel, whose forward waits for the other ranks."""
    ddp = ddp_of(model)
    return model if ddp is None else unwrapped(ddp)


def _find(role: str, label: str, model: nn.Module, place: Place) -> tuple[str, nn.Module]:
    """Bare name and module of one level."""
    modules = dict(model.named_modules(remove_duplicate=False))
    if isinstance(place, nn.Module):
        for name, module in modules.items():
            if module is place:
                return bare_name(name), module
        raise ValueError(f"{label}: expected a module of the {role}, got a {type(place).__name__} that is not in it")
    if not isinstance(place, str):
        raise TypeError(f"{label}: expected the name of a module of the {role} or a module, got {place!r}")
    bare = {bare_name(name): module for name, module in modules.items()}  # of several, the innermost, which is the last
    if place in modules or bare_name(place) in bare:
        return bare_name(place), modules[place] if place in modules else bare[bare_name(place)]
    near = difflib.get_close_matches(bare_name(place), bare, n=5, cutoff=0.4)
    hint = f"near names: {', '.join(map(repr, near))}" if near else f"see {role}.named_modules()"
    raise ValueError(f"{label}: the {role} has no module named {place!r}; {hint}")


def match_by_stride(
    student_strides: Sequence[float], teacher_strides: Sequence[float], *, nearest: bool = False
) -> list[tuple[int, int]]:
    """Pair levels of equal stride.

    Args:
        student_strides, teacher_strides: image height over feature height of each level, each list without repeats.
        nearest: pair each of the student's with the teacher's nearest instead, if they are that of each other and
            less than a factor of sqrt(2) apart.

    Returns:
        (student index, teacher index) of every stride that both have, in the student's order.

    Raises:
        ValueError: a stride stands twice in one list, or the two have none in common.
    """
    for name, strides in (("student", student_strides), ("teacher", teacher_strides)):
        if len(set(strides)) != len(strides):
            raise ValueError(f"{name} levels: expected one level a stride to match by, got strides {list(strides)}")
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
        hint = '; some are near: align="interpolate" pairs and resizes these' if near else ""
        raise ValueError(
            f"levels: expected a stride that student and teacher share, got {_listed(student_strides)} "
            f"and {_listed(teacher_strides)}{hint}"
        )
    return pairs


def _ratio(a: float, b: float) -> float:
    return max(a, b) / min(a, b)


def _listed(strides: Sequence[float]) -> str:
    return f"[{', '.join(f'{stride:g}' for stride in strides)}]"
