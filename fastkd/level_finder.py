"""``find_levels`` finds the feature maps of a detector to distil, from the data flow of one forward."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastkd.adapters import same_random_state
from fastkd.hooks import INPUT, bare_name, is_compiled, unwrapped
from fastkd.modes import eval_mode
from fastkd.ops.arguments import kind_of

FINEST = 3  # backbone levels below stride 2^3 are left out, unless a head starts at a finer stride
NAMELESS = "(no module returns it)"

Key: TypeAlias = tuple[int, tuple[int, ...], tuple[int, ...]]  # offset, shape and strides of a tensor in its memory

_STARTS = ("image", "convolution", "convolution_overrideable", "_convolution")
_LAYOUTS = ("view", "_unsafe_view", "reshape", "permute", "transpose", "t", "unfold", "expand", "as_strided")
_REDUCES = ("mean", "sum", "amax", "max", "adaptive_avg_pool2d", "_adaptive_avg_pool2d", "adaptive_max_pool2d")


@dataclass(frozen=True)
class Candidate:
    """One feature map that could be a level.

    Attributes:
        name: of the module that returns it, or ``"input:name"`` of the module whose input it is.
        stride: image height / feature height.
        channels: C of its (N, C, H, W).
        is_last: whether it is the last map of its stride in the backbone.
        feeds_head: whether it is the input of a head.
    """

    name: str
    stride: float
    channels: int
    is_last: bool
    feeds_head: bool


@dataclass(frozen=True)
class FoundLevels:
    """The result of ``find_levels``; ``print`` shows it as a table.

    Attributes:
        backbone: names of the last feature map of each stride in the backbone, finest first.
        neck: names of the inputs of the heads, one per stride, finest first.
        candidates: the feature maps to choose from, in the order of the forward.
    """

    backbone: list[str]
    neck: list[str]
    candidates: tuple[Candidate, ...]

    def strides(self, group: str) -> list[float]:
        """Return image height / feature height of each level of ``"backbone"`` or ``"neck"``."""
        by_name = {x.name: x.stride for x in self.candidates}
        return [by_name[name] for name in (self.backbone if group == "backbone" else self.neck)]

    def __str__(self) -> str:
        return _table(self.candidates)


def find_levels(model: nn.Module, images: Any) -> FoundLevels:
    """Return the levels of a detector to distil, found without reading its code::

        ours, theirs = fastkd.find_levels(student, images), fastkd.find_levels(teacher, images)
        print(ours)  # the modules to choose from, as a table
        fastkd.Distiller(student, teacher, backbone=(ours.backbone, theirs.backbone), neck=(ours.neck, theirs.neck))

    The model runs once on the first image, in eval mode and under ``no_grad``. Its hooks, training mode, statistics and
    the random state are unchanged afterwards. The inputs and outputs of every operation are recorded, so code between
    modules is covered too.

    *Heads* end in the last convolutions before the model's output. *Neck* levels are the inputs of the heads, one per
    stride: a head is the largest module that computes each of its outputs from one map of the same stride. *Backbone*
    levels are the last map of each stride >= 8 (or finer, if a head starts there) before a map becomes larger again; at
    the coarsest stride, the last map before the number of channels becomes smaller after the last residual sum. The
    input of a head is a neck level; neither it nor any map computed from it belongs to the backbone, and neither do
    patches, which one convolution computes from the images. A model that returns the maps of a backbone and nothing
    else, such as timm's ``features_only``, has these as backbone levels and no neck. Levels that are neither the only
    output nor the only input of a module are left out of the lists, but appear in the table.

    Args:
        model: a detector; it may be wrapped in ``DistributedDataParallel`` or ``torch.compile``.
        images: a batch as the model takes it: (N, C, H, W) floating point, a list of (C, H, W), or any other input.
            Heights and widths should be multiples of the coarsest stride and several cells large there: 256 pixels are
            enough for stride 64.

    Returns:
        ``.backbone`` and ``.neck``: names that ``fastkd.Distiller`` takes; ``.candidates``: all feature maps.

    Raises:
        TypeError: ``model`` is not a module, or ``images`` is not a batch.
        ValueError: no images; no head was found, as in a classifier or a model whose first convolution is followed by
            tokens; or heads of one stride with unrelated inputs. The message shows the table and the likely names.
            Errors that the model itself raises are passed on.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a module, got {kind_of(model)}")
    images = _first_image(images)
    root = unwrapped(model)
    flow = _Flow(images)
    device = next((p.device for p in root.parameters()), torch.device("cpu"))
    with (
        eval_mode(root),
        same_random_state(device),
        torch.inference_mode(False),  # there convolutions and sums are dispatched under other names, or not at all
        torch.no_grad(),
        torch.compiler.set_stance("force_eager") if is_compiled(model) else nullcontext(),
        flow.recording(root),
        flow,
    ):
        output = root(images)
    return _Finder(flow, output).found()


def require_batch(images: Any) -> None:
    """Raise for values that cannot be a batch of images.

    Raises:
        TypeError: None, a number, a string, or a loader instead of one of its batches.
        ValueError: no image, or one tensor that is not 4-D.
    """
    expected = "images: expected a batch as the model takes it, (N, C, H, W) or a list of images"
    if isinstance(images, torch.utils.data.DataLoader):
        raise TypeError(f"{expected}, got a {type(images).__name__}; take a batch of it: next(iter(loader))")
    if images is None or isinstance(images, (bool, int, float, str, bytes)):
        raise TypeError(f"{expected}, got {kind_of(images)}")
    if isinstance(images, Tensor) and images.ndim != 4:
        raise ValueError(f"{expected}, got {kind_of(images)}; make a batch of one image: images[None]")
    if isinstance(images, (Tensor, list, tuple, Mapping)) and not len(images):
        raise ValueError(f"{expected}, got no image in {kind_of(images)}")


def _first_image(images: Any) -> Any:
    """Return a batch of the first image alone, which is enough; other inputs than tensors and lists are unchanged."""
    require_batch(images)
    in_list = isinstance(images, (list, tuple)) and all(isinstance(x, Tensor) and x.ndim == 3 for x in images)
    return images[:1] if isinstance(images, Tensor) or in_list else images


@dataclass
class _Value:
    """The value of a tensor that one operation returned or changed."""

    parents: list[int]  # the values, computed from the images, that it was computed from
    shape: tuple[int, ...]
    op: str
    pooled: bool  # a mean over the map, or computed from such means alone: the gate of squeeze and excitation


@dataclass
class _Call:
    """One forward of a module, in which the values from ``start`` to ``end`` were computed."""

    name: str
    module: nn.Module
    start: int
    outer: int | None  # the call that contains it
    end: int = -1
    given: int | None = None  # its first argument
    returned: int | None = None  # its output, where that is one tensor
    parts: list[int] = field(default_factory=list)  # the tensors of its output


class _Flow(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records which values are computed from which, and in which module; it keeps no tensor alive.

    Tensors are identified by their place in memory. A result in newly allocated memory replaces the record of that
    memory, so reused memory causes no confusion.
    """

    def __init__(self, images: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.values: list[_Value] = []
        self.calls: list[_Call] = []
        self.convolved: set[int] = set()  # inputs of convolutions, which are (N, C, H, W)
        self.image: tuple[int, int] | None = None  # height and width
        self.batch = 0
        self._known: dict[int, dict[Key, int | None]] = {}  # by memory; None: not computed from the images
        self._call_stack: list[int] = []
        for x in _tensors(images):
            self._known.setdefault(_memory(x), {})[_key(x)] = self._add("image", [], tuple(x.shape))
        if isinstance(images, Tensor):
            self.image = images.shape[2], images.shape[3]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        parents = sorted({i for x in inputs for i in self.of(x)})
        output = func(*args, **kwargs)
        op = func._schema.name.partition("::")[2]
        if "convolution" in op and self.image is None and inputs[0].ndim == 4:
            self.image = inputs[0].shape[2], inputs[0].shape[3]  # most models resize a list of images
        if "convolution" in op and not self.batch:
            self.batch = len(inputs[0])
        if "convolution" in op:
            self.convolved.update(self.of(inputs[0]))
        if func._schema.is_mutable:
            for x in _written(func, args, kwargs):
                self._write(op, parents, x)
        read = {_memory(x) for x in inputs}
        for x in tree_leaves(output):
            if isinstance(x, Tensor):
                self._keep(op, parents, x, fresh=_memory(x) not in read)
        return output

    def of(self, x: Tensor) -> list[int]:
        """Return the values of a tensor: one, or all in its memory where no recorded operation returned it."""
        known = self._known.get(_memory(x), {})
        found = [known[_key(x)]] if _key(x) in known else list(known.values())
        return [i for i in found if i is not None]

    def _add(self, op: str, parents: list[int], shape: tuple[int, ...]) -> int | None:
        if not parents and op != "image":
            return None
        pooled = bool(parents) and all(self.values[i].pooled for i in parents)
        pooled |= op in _REDUCES and any(_is_pooled(op, self.values[i].shape, shape) for i in parents)
        self.values.append(_Value(parents, shape, op, pooled))
        return len(self.values) - 1

    def _keep(self, op: str, parents: list[int], x: Tensor, *, fresh: bool) -> None:
        if not x.numel():  # for example no box found: empty tensors have no memory that would tell them apart
            fresh, parents = False, sorted({*parents, *self.of(x)})
            self._known.get(_memory(x), {}).pop(_key(x), None)
        known = {} if fresh else self._known.get(_memory(x), {})
        self._known[_memory(x)] = known
        if _key(x) not in known:  # otherwise it is the same tensor, from detach() or changed in place
            known[_key(x)] = self._add(op, parents, tuple(x.shape))

    def _write(self, op: str, parents: list[int], x: Tensor) -> None:
        """Give all tensors in this memory a new value."""
        known = self._known.setdefault(_memory(x), {_key(x): None})
        for key, old in list(known.items()):
            parts = sorted({*parents, *([] if old is None else [old])})
            known[key] = self._add(op, parts, key[1])

    @contextmanager
    def recording(self, root: nn.Module) -> Iterator[None]:
        """Record the calls of all modules of the model, by hooks that are removed afterwards."""
        handles = []
        for name, module in root.named_modules():
            handles.append(module.register_forward_pre_hook(self._make_start(bare_name(name)), prepend=True))
            handles.append(module.register_forward_hook(self._end_call))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _make_start(self, name: str) -> Any:
        def start_call(module: nn.Module, args: Any) -> None:
            call = _Call(name, module, len(self.values), self._call_stack[-1] if self._call_stack else None)
            call.given = self._one(args[0]) if args else None
            self._call_stack.append(len(self.calls))
            self.calls.append(call)

        return start_call

    def _end_call(self, module: nn.Module, args: Any, output: Any) -> None:
        while self.calls[self._call_stack[-1]].module is not module:  # that call raised, and the model caught it
            self._call_stack.pop()
        call = self.calls[self._call_stack.pop()]
        tensors = _tensors(output)
        inputs = sorted({i for x in _tensors(args) for i in self.of(x)})
        for x in tensors:
            if not self.of(x):  # computed by code that dispatches no operation
                self._keep("module", inputs, x, fresh=True)
        call.returned = self._one(output)
        call.parts = [i for x in tensors for i in self.of(x)]
        call.end = len(self.values)

    def _one(self, x: Any) -> int | None:
        found = self.of(x) if isinstance(x, Tensor) else []
        return found[0] if len(found) == 1 else None


class _Finder:
    """Finds heads, neck and backbone in the recorded data flow."""

    def __init__(self, flow: _Flow, output: Any) -> None:
        self.values, self.calls, self.batch = flow.values, flow.calls, flow.batch
        self.height, self.width = flow.image or (0, 0)
        self.maps: set[int] = set()
        self.padded: set[int] = set()  # maps that were padded, as part of the operation that follows
        self.convolved = flow.convolved
        self._find_maps()
        self.depth = self._find_depth()
        self.ends = {i for x in _tensors(output) for i in flow.of(x)}
        self.used = self._ancestors(self.ends)
        self.coarsest = max((self._octave(i) for i in self.maps & self.used), default=0)
        names = [call.name for call in self.calls]
        self.once = [call for call in self.calls if call.outer is not None and names.count(call.name) == 1]
        self.neck: dict[int, int] = {}  # values by octave of their stride, finest first
        self.backbone: dict[int, int] = {}
        self.scope = 0  # the call whose parts make up the backbone

    def found(self) -> FoundLevels:
        if self._returns_backbone():
            return FoundLevels(self._names(self.backbone), [], self._candidates())
        heads = self._heads()
        if not heads:
            raise self._undecided(
                "no head was found: no convolution reaches the output without another convolution or a mean over the "
                "map after it"
            )
        self._find_neck(heads)
        if any(not self.depth[i] for i in self.neck.values()):
            self.neck = {}
            raise self._undecided(
                "the last convolution gets the images themselves, as a transformer's patch embedding does, and what "
                "follows are tokens or maps whose channels come last"
            )
        self._find_backbone()
        backbone, neck = (self._names(x) for x in (self.backbone, self.neck))
        if not neck:
            raise self._undecided("the inputs of the heads are neither the only output nor the only input of a module")
        return FoundLevels(backbone, neck, self._candidates())

    def _undecided(self, why: str) -> ValueError:
        if not self.backbone:
            self._find_backbone()
        lists = {"backbone": self._names(self.backbone), "neck": self._names(self.neck)}
        likely = " and ".join(f"{group}={names}" for group, names in lists.items() if names)
        shown = self._candidates()
        return ValueError(
            f"find_levels: {why}. Name the levels yourself: Distiller(student, teacher, backbone=([student, ...], "
            "[teacher, ...]), neck=([student, ...], [teacher, ...])), with student_to_map= and teacher_to_map= where a "
            "module returns tokens, channels that come last, or a tuple."
            + f" Likely here: {likely}." * bool(likely)
            + f" What was found:\n{_table(shown)}" * bool(shown)
        )

    def _returns_backbone(self) -> bool:
        """Take the output as the backbone's levels if it is nothing else: maps, each computed from the next finer one.

        timm's ``features_only`` returns such an output. A detector returns no map that it uses further.
        """
        ends = sorted(self.ends)
        octaves = [self._octave(i) for i in ends if i in self.maps]
        if len(octaves) < max(2, len(ends)) or octaves != sorted(set(octaves)):
            return False
        made_of_finer = all(i in self._ancestors([j]) for i, j in itertools.pairwise(ends))
        levels = {octave: i for octave, i in zip(octaves, ends, strict=True) if octave >= FINEST}
        if not made_of_finer or not levels or any(self._name(i) == NAMELESS for i in levels.values()):
            return False
        self.backbone = levels
        return True

    def _find_maps(self) -> None:
        """Find the values that are feature maps (N, C, H, W) of the whole image.

        A value that is computed from a map and has the image's proportions is a map, and so is the output of a
        convolution. Other layouts, such as tokens or products of queries and keys, are not, until a value has the
        height and width of an earlier map again.
        """
        sizes: list[set[tuple[int, ...]]] = []  # of the nearest maps that each value was computed from
        for i, value in enumerate(self.values):
            before = set().union(*(sizes[p] for p in value.parents))
            near = any(p in self.maps or p in self.padded for p in value.parents) and value.op not in _LAYOUTS
            near = near or value.op in _STARTS or value.shape[2:] in before or i in self.convolved
            if near and self._has_proportions(value):
                (self.padded if "pad" in value.op else self.maps).add(i)
            sizes.append({value.shape[2:]} if i in self.maps else before)

    def _find_depth(self) -> list[int]:
        """How many convolutions each value is behind."""
        depth: list[int] = []
        for i, value in enumerate(self.values):
            depth.append(max((depth[p] for p in value.parents), default=0) + self._is_conv(i))
        return depth

    def _has_proportions(self, value: _Value) -> bool:
        if not self.height or len(value.shape) != 4 or value.pooled or value.shape[0] != self.batch:
            return False
        _, _, height, width = value.shape
        return height > 0 and abs(height * self.width / self.height - width) < 1.5

    def _stride(self, i: int) -> float:
        return self.height / self.values[i].shape[2]

    def _octave(self, i: int) -> int:
        """Return the rounded log2 of the stride, so that maps whose heights differ by a border have one stride."""
        return round(math.log2(self._stride(i)))

    def _is_conv(self, i: int) -> bool:
        return "convolution" in self.values[i].op and i in self.maps

    def _ancestors(self, ends: Iterable[int], start: int = 0) -> set[int]:
        """Return these values and all that they were computed from; values before ``start`` are not followed."""
        todo = list(ends)
        found = set(todo)
        while todo:
            i = todo.pop()
            new = set(self.values[i].parents) - found if i >= start else set()
            found |= new
            todo += new
        return found

    def _heads(self) -> list[int]:
        """Return the last convolutions: neither another convolution nor a mean over the map follows them."""
        after: set[int] = set()
        for i in sorted(self.used, reverse=True):  # a value comes after those that it was computed from
            if i in after or self._is_conv(i) or self.values[i].pooled:
                after.update(self.values[i].parents)
        return [i for i in sorted(self.used) if self._is_conv(i) and i not in after]

    def _find_neck(self, heads: list[int]) -> None:
        inputs: dict[int, set[int]] = {}
        for head in heads:
            i = self._input_of(head, heads)
            inputs.setdefault(self._octave(i), set()).add(i)
        for octave, several in sorted(inputs.items()):
            common = set.intersection(*(self._ancestors([i]) for i in several)) & self.maps
            of_stride = [i for i in common if self._octave(i) == octave]
            if not of_stride:
                stride = self._stride(min(several))
                raise self._undecided(f"the heads of stride {stride:g} have inputs that share no map of that stride")
            self.neck[octave] = max(of_stride)

    def _input_of(self, head: int, heads: list[int]) -> int:
        """Return the input of the head: of the largest module around it whose outputs each come from one such map."""
        for call in self.calls:  # outer ones come first
            if call.outer is not None and call.start <= head < call.end:
                inside = [i for i in heads if call.start <= i < call.end]
                given = {i: [x for x in self._ancestors([i], call.start) if x < call.start] for i in inside}
                of_own_stride = {x[0] for i, x in given.items() if self._is_like(x[0], i)}
                # a map of masks may be larger than the map that it is computed from, if that map is a level anyway
                if all(len(x) == 1 and x[0] in of_own_stride for x in given.values()):
                    return given[head][0]
        return max(self._ancestors([head]) & self.maps - {head}, default=head)

    def _is_like(self, i: int, head: int) -> bool:
        return i in self.maps and self._octave(i) == self._octave(head)

    def _find_backbone(self) -> None:
        finest = min([FINEST, *self.neck])
        maps = [i for i in self._bottom_up() if self._octave(i) >= finest and self.depth[i] > 1]  # no mere patches
        self.scope = self._find_scope(maps)
        visible = self._seen_in(self.scope)
        taken = set() if self._has_top_down() else {x for x, i in self.neck.items() if i in visible}
        seen = [i for i in maps if i in visible and self._octave(i) not in taken]
        octaves = sorted({self._octave(i) for i in seen})
        widths = {x: max(self.values[i].shape[1] for i in seen if self._octave(i) == x) for x in octaves}
        while octaves and widths[octaves[-1]] < max(widths.values()):  # extra levels after the widest
            del widths[octaves.pop()]
        for octave, coarser in itertools.zip_longest(octaves, octaves[1:]):
            of_stride = [i for i in seen if self._octave(i) == octave]
            if coarser is None:
                self.backbone[octave] = self._end_of_widest(of_stride)
            else:  # a side branch to the neck is left out
                onward = self._ancestors(i for i in maps if self._octave(i) == coarser)
                self.backbone[octave] = max((i for i in of_stride if i in onward), default=of_stride[-1])

    def _has_top_down(self) -> bool:
        """Whether the input of a head is computed from coarser maps; otherwise heads follow the backbone directly."""
        before = {i: [self._octave(p) for p in self._ancestors([i]) & self.maps] for i in self.neck.values()}
        return any(max(octaves) > self._octave(i) for i, octaves in before.items())

    def _end_of_widest(self, of_stride: list[int]) -> int:
        """Return the last of the widest maps in a row, counted from the last residual sum among them.

        In a flat network narrow bottlenecks lie between such sums, and a head's first layers may be as wide again.
        """
        widest = max(self.values[i].shape[1] for i in of_stride)
        wide = [k for k, i in enumerate(of_stride) if self.values[i].shape[1] == widest]
        start = max((k for k in wide if self._is_residual(of_stride[k])), default=wide[0])
        return list(itertools.takewhile(lambda i: self.values[i].shape[1] == widest, of_stride[start:]))[-1]

    def _is_residual(self, i: int) -> bool:
        """Return whether a value is the sum of a map and another that was computed from it."""
        parents = [p for p in self.values[i].parents if p in self.maps]
        one_of_other = len(parents) == 2 and parents[0] in self._ancestors(parents[1:])
        return self.values[i].op in ("add", "add_") and one_of_other

    def _bottom_up(self) -> list[int]:
        """Return the maps that are computed from no coarser map and from no input of a head."""
        coarsest: dict[int, int] = {}  # octave of the coarsest map so far
        out: set[int] = set(self.neck.values())
        found = []
        for i in sorted(self.used):
            parents = self.values[i].parents
            before = max((coarsest[p] for p in parents), default=-1)
            is_finer = i in self.maps and (self._octave(i) < before or self._pools_in_place(i, before))
            if is_finer or not out.isdisjoint(parents):
                out.add(i)
            if i in self.maps and i not in out:
                found.append(i)
            coarsest[i] = max(before, self._octave(i)) if i in self.maps else before
        return found

    def _pools_in_place(self, i: int, before: int) -> bool:
        """Whether a map of the coarsest stride was padded and then pooled to its size, as in Darknet's tiny networks.

        What follows it belongs to the head. A stem that does so, such as HGNet's, is followed by coarser maps.
        """
        after_pad = not self.padded.isdisjoint(self.values[i].parents)
        return after_pad and "pool" in self.values[i].op and self._octave(i) == before == self.coarsest

    def _find_scope(self, maps: list[int]) -> int:
        """Return the innermost call in which at least two strides begin: the backbone, or the whole model."""
        first: dict[int, int] = {}
        for i in maps:
            first.setdefault(self._octave(i), i)
        scope = 0
        for k, call in enumerate(self.calls):
            if call.outer == scope and sum(call.start <= i < call.end for i in first.values()) > 1:
                scope = k
        return scope

    def _seen_in(self, scope: int) -> set[int]:
        """Return the values that the code of this call sees: its own, and the outputs of the modules that it calls."""
        call = self.calls[scope]
        children = [x for x in self.calls if x.outer == scope]
        inside = {i for x in children for i in range(x.start, x.end)}
        return (set(range(call.start, call.end)) - inside) | {i for x in children for i in x.parts}

    def _name(self, i: int) -> str:
        """Return the name of the module that returns a value, or ``"input:name"`` of one whose input it is.

        A child of the backbone is preferred, then the outermost module.
        """
        returned = [x for x in self.once if x.returned == i]
        own = [x for x in returned if x.outer == self.scope and self.scope]
        if returned:
            return (own or returned)[0].name
        given = [x.name for x in self.once if x.given == i]
        return INPUT + given[0] if given else NAMELESS

    def _names(self, by_octave: dict[int, int]) -> list[str]:
        return [name for i in by_octave.values() if (name := self._name(i)) != NAMELESS]

    def _candidates(self) -> tuple[Candidate, ...]:
        """Return the maps that modules of the model and the backbone return, and the levels themselves."""
        chosen = {*self.backbone.values(), *self.neck.values()}
        seen = [x.returned for x in self.once if x.outer in (0, self.scope)]
        shown = {i for i in seen if i in self.maps and i in self.used} | chosen
        return tuple(
            Candidate(
                self._name(i),
                self._stride(i),
                self.values[i].shape[1],
                i in self.backbone.values(),
                i in self.neck.values(),
            )
            for i in sorted(shown)
        )


def _table(candidates: Iterable[Candidate]) -> str:
    rows = [("module", "stride", "channels", "last of its stride", "feeds a head")]
    for x in candidates:
        rows.append((x.name, f"{x.stride:g}", str(x.channels), "yes" * x.is_last, "yes" * x.feeds_head))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join([row[0].ljust(widths[0]), row[1].rjust(widths[1]), row[2].rjust(widths[2]), *_padded(row, widths)])
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def _padded(row: tuple[str, ...], widths: list[int]) -> list[str]:
    return [text.ljust(width) for text, width in zip(row[3:], widths[3:], strict=True)]


def _is_pooled(op: str, before: tuple[int, ...], after: tuple[int, ...]) -> bool:
    """Whether a reduction left one value per channel of a map, or a few."""
    is_one = math.prod(after[2:]) == 1 or "adaptive" in op
    return len(before) == 4 and is_one and before[:2] == after[:2]


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """Return the tensors that an operation changes in place."""
    found = []
    for k, argument in enumerate(func._schema.arguments):
        value = args[k] if k < len(args) else kwargs.get(argument.name)
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += [x for x in tree_leaves(value) if isinstance(x, Tensor)]
    return found


def _memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _key(x: Tensor) -> Key:
    return int(x.storage_offset()), tuple(x.shape), tuple(x.stride())


def _tensors(x: Any, depth: int = 4) -> list[Tensor]:
    """Return all tensors in nested lists, dicts and plain objects, for example in a list of boxes."""
    found: list[Tensor] = []
    for leaf in tree_leaves(x):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif depth and not isinstance(leaf, (nn.Module, type)) and hasattr(leaf, "__dict__"):
            found += _tensors(dict(vars(leaf)), depth - 1)
    return found
