"""The teacher as it runs: a copy whose batch norms are folded into its convolutions, up to its last level."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils._pytree import tree_leaves

from fastkd.adapters import same_random_state
from fastkd.hooks import FeatureHook, is_compiled, unwrapped, without_ddp

EXACT = 1e-4  # largest difference of a feature in float32, of its largest value
HALF = 0.05  # of features in fewer bits: norm of the difference, of their norm


class _Enough(BaseException):
    """Ends a forward whose levels have all been heard; no ``except Exception`` of a model takes it."""


class Teacher:
    """Runs the frozen teacher, and as little of it as its levels need.

    A convolution followed by a batch norm, y = g (conv(x) - m) / sqrt(v + eps) + b, is one convolution of weights
    w g / sqrt(v + eps). Which follow each other is seen in a forward: the batch norm gets the very tensor that the
    convolution returned. They are folded in a copy that shares all other weights; the model that was given stays as it
    is, and runs itself where the copy's features differ or something stands against it, which ``how`` tells.

    Args:
        given: the teacher, maybe wrapped.
        fold: whether to do so; else it runs as it was given, and to its end.
    """

    def __init__(self, given: nn.Module, fold: bool) -> None:
        self.given, self.fold = given, fold
        self.how = "as it was given, and to its end"
        # listed once: walking a large model at every step would take a millisecond
        self._modules = list(given.modules())
        self._stores = [store for m in self._modules for store in (m._parameters, m._buffers) if store]
        self._plain = False
        self._hooks: list[FeatureHook] = []
        self._copy: nn.Module | None = None
        self._of_copy: dict[nn.Module, nn.Module] = {}  # given module to the copy's
        self._seen: list[int] | None = None  # the model's state that it was made ready with
        self._calls = 0  # of all levels in a forward; 0: it may not be ended before
        self._left = 0
        self._ended = False

    def forget(self) -> None:
        """Its levels and its copy."""
        self._use(None)
        for hook in self._hooks:
            hook.detach()
        self._hooks, self._of_copy, self._calls = [], {}, 0

    def listen(self, hooks: Sequence[FeatureHook]) -> None:
        """The levels, once they are matched."""
        self._hooks = list(hooks)
        for hook in self._hooks:
            hook.heard = self._heard

    def run(self, images: Any, *, whole: bool) -> Any:
        """One forward, whose features the hooks keep; its output, or None where it ended before.

        Args:
            images: what it takes.
            whole: whether its output is needed.
        """
        looks = self.fold and bool(self._hooks) and not self._plain and not torch.compiler.is_compiling()
        if looks and self._seen != self._state():
            device = next((x.device for store in self._stores for x in store.values() if x is not None), "cpu")
            with same_random_state(torch.device(device)):
                self._make_ready(images)
            self._seen = self._state()
        self._left = self._calls if looks and not whole else 0
        model = without_ddp(self.given) if self._copy is None else self._copy
        self._ended = False
        try:
            output = model(images)
        except _Enough:
            return None
        finally:
            self._left = 0
        if self._ended:  # the model has caught what was to end it, and gone on in another way
            self._calls = 0
            output = model(images)
        return output

    @contextmanager
    def as_given(self) -> Iterator[None]:
        """The model that was given runs, to its end."""
        folded, self._plain = self._copy, True
        self._use(None)
        try:
            yield
        finally:
            self._use(folded)
            self._plain = False

    def _state(self) -> list[int]:
        """Where the weights are and how often they were changed, as ``load_state_dict`` and ``to`` do; and of the hooks
        how many there are."""
        found = [sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in self._modules)]
        for store in self._stores:
            for x in store.values():
                if x is not None:
                    address = x.data_ptr() if x.layout == torch.strided else id(x)
                    found += address, 0 if x.is_inference() else x._version
        return found

    def _heard(self) -> None:
        if self._left:
            self._left -= 1
            if not self._left:
                self._ended = True
                raise _Enough

    def _make_ready(self, images: Any) -> None:
        self._use(None)
        self._calls = 0
        against = _what_stands_against(self.given)
        if against:
            self.how = f"as it was given, and to its end: {against}"
            return
        pairs, output = _follow_each_other(self.given, images, {hook.module for hook in self._hooks})
        if all(hook.calls for hook in self._hooks):  # else the loss says so
            changed = any(hook.was_changed for hook in self._hooks)  # by what comes after a level
            self._calls = 0 if changed else sum(hook.calls for hook in self._hooks)
        if any(not isinstance(hook.output, Tensor) or hook.output.is_inference() for hook in self._hooks):
            self._calls = 0  # whether a later module changes these can't be seen
        self.how = "nothing to fold"
        if pairs:
            self._fold(pairs, output, images)
        self.how += "; ends after its last level" if self._calls else "; runs to its end"

    def _fold(self, pairs: Sequence[tuple[nn.Conv2d, nn.BatchNorm2d]], output: Any, images: Any) -> None:
        exact = [hook.feature().clone() for hook in self._hooks]
        try:
            folded, self._of_copy = _folded(unwrapped(self.given), pairs)
            self._use(folded)
            again = folded(images)
            far = [str(hook) for hook, y in zip(self._hooks, exact, strict=True) if not _is_near(hook.feature(), y)]
        except Exception as error:  # a copy may fail by whatever its modules like
            self._use(None)
            self.how = f"not folded, as its copy fails ({type(error).__name__}: {error})"
            return
        tensors = _tensors(again), _tensors(output)
        if len(tensors[0]) != len(tensors[1]) or not all(map(_is_near, *tensors)):
            far.append("its output")
        self.how = f"{len(pairs)} batch norms folded into convolutions"
        if far:
            self._use(None)
            self.how = f"not folded, as these would differ: {', '.join(far)}"
            warnings.warn(f"Distiller: the teacher runs as it was given; {self.how}", stacklevel=2)

    def _use(self, folded: nn.Module | None) -> None:
        """Let the copy run, or None: what was given; the hooks go along."""
        if folded is self._copy:
            return
        back = {mine: given for given, mine in self._of_copy.items()}
        for hook in self._hooks:
            hook.detach()
            moved = back if folded is None else self._of_copy
            hook.root, hook.module = moved[hook.root], moved[hook.module]
            hook.attach()
        self._copy = folded


def _what_stands_against(model: nn.Module) -> str:
    """Why a copy of this model may not do what the model does; empty: nothing."""
    root = unwrapped(model)
    tensors = [*root.parameters(), *root.buffers()]
    if is_compiled(model) or without_ddp(model) is not root:
        return "it is compiled or wrapped"
    if any(type(x) not in (Tensor, nn.Parameter) or x.is_inference() for x in tensors):
        return "its weights are no plain tensors"
    patched = next((name for name, m in root.named_modules() if "forward" in vars(m)), None)
    if patched is not None:
        return f"the forward of {patched or 'the model'!r} was replaced"
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    others = (
        name
        for name, m in root.named_modules()
        if any(not isinstance(hook, FeatureHook) for kind in kinds for hook in dict.values(getattr(m, kind)))
    )
    hooked = next(others, None)
    return "" if hooked is None else f"{hooked or 'the model'!r} has hooks of others"


def _follow_each_other(
    model: nn.Module, images: Any, levels: set[nn.Module]
) -> tuple[list[tuple[nn.Conv2d, nn.BatchNorm2d]], Any]:
    """Convolutions and the batch norms that get what they return, in one forward of the model, and its output; no
    convolution of ``levels``, whose own output is to be heard."""
    root = unwrapped(model)
    made: dict[int, tuple[nn.Conv2d, weakref.ref[Tensor]]] = {}  # by the tensor's id, which others get later
    found: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = []
    ran: list[nn.Module] = []

    def note(module: nn.Module, args: Any, output: Any) -> None:
        ran.append(module)
        if isinstance(module, nn.Conv2d):
            made[id(output)] = module, weakref.ref(output)
        elif isinstance(module, nn.BatchNorm2d) and args and id(args[0]) in made:
            conv, output = made[id(args[0])]
            if output() is args[0]:
                found.append((conv, module))

    watched = [m for m in root.modules() if type(m) in (nn.Conv2d, nn.BatchNorm2d) and _is_plain(m) and m not in levels]
    watched += [m for m in levels if type(m) is nn.BatchNorm2d and _is_plain(m)]
    handles = [module.register_forward_hook(note) for module in watched]
    try:
        output = root(images)
    finally:
        for handle in handles:
            handle.remove()
    return [pair for pair in found if all(ran.count(module) == 1 for module in pair)], output


def _is_plain(module: nn.Module) -> bool:
    """Whether a layer's weights are its own, and a batch norm has statistics."""
    statistics = not isinstance(module, nn.BatchNorm2d) or module.running_mean is not None
    return statistics and not hasattr(module, "parametrizations") and not module.training


def _folded(
    root: nn.Module, pairs: Sequence[tuple[nn.Conv2d, nn.BatchNorm2d]]
) -> tuple[nn.Module, dict[nn.Module, nn.Module]]:
    """A copy that shares the weights that stay as they are, and which module of it is which of the model."""
    shared = {id(x): x for x in (*root.parameters(), *root.buffers())}
    copied = copy.deepcopy(root, shared)
    of_copy = dict(zip(root.modules(), copied.modules(), strict=True))
    instead: dict[nn.Module, nn.Module] = {}
    for conv, norm in pairs:
        folded = fuse_conv_bn_eval(cast(nn.Conv2d, of_copy[conv]), cast(nn.BatchNorm2d, of_copy[norm]))
        instead[of_copy[conv]] = folded.requires_grad_(False)
        instead[of_copy[norm]] = nn.Identity().eval()
    for parent in list(copied.modules()):
        for name, child in parent._modules.items():
            if child in instead:
                parent._modules[name] = instead[child]
    return copied, {given: instead.get(mine, mine) for given, mine in of_copy.items()}


def _tensors(output: Any) -> list[Tensor]:
    return [x for x in tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point()]


def _is_near(x: Tensor, y: Tensor) -> bool:
    if x.shape != y.shape:
        return False
    difference = (x - y).abs()
    if y.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(y.device.type):
        return bool(difference.amax() <= EXACT * y.abs().amax()) if y.numel() else True
    return bool(difference.float().norm() <= HALF * y.float().norm())
