"""Runs the teacher fast: a copy whose batch norms are folded into its convolutions, stopped after its last level."""

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

EXACT = 1e-4  # largest allowed difference in float32, relative to the largest value
HALF = 0.05  # largest allowed norm of the difference in 16 bits, relative to the norm


class _StopForward(BaseException):
    """Stops a forward after its last level; a model's ``except Exception`` does not catch it."""


class Teacher:
    """Runs the frozen teacher, as far as its levels need it.

    A convolution followed by a batch norm, y = g (conv(x) - m) / sqrt(v + eps) + b, equals one convolution with the
    weights w g / sqrt(v + eps). One forward shows the pairs: the batch norm's input is the tensor that the convolution
    returned. They are folded in a copy that shares all other weights. The given model is unchanged; it runs itself
    where the features of the copy differ or where it cannot be copied safely. ``how`` describes what runs.

    Args:
        given: the teacher, possibly wrapped.
        fold: whether to fold batch norms and stop after the last level; False: the given model runs to its end.
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
        self._of_copy: dict[nn.Module, nn.Module] = {}  # from the given model's modules to the copy's
        self._prepared_state: list[int] | None = None  # the state of the model that the copy was made for
        self._calls = 0  # calls of all levels in one forward; 0: the forward must not be stopped early
        self._left = 0
        self._stopped = False

    def clear(self) -> None:
        """Drop the levels and the copy."""
        self._use(None)
        for hook in self._hooks:
            hook.detach()
        self._hooks, self._of_copy, self._calls = [], {}, 0

    def set_levels(self, hooks: Sequence[FeatureHook]) -> None:
        """Set the hooks of the levels, after they are matched."""
        self._hooks = list(hooks)
        for hook in self._hooks:
            hook.on_output = self._count_output

    def run(self, images: Any, *, whole: bool) -> Any:
        """Run one forward, whose features the hooks record; return its output, or None where it was stopped early.

        Args:
            images: the input of the model.
            whole: whether the output is needed.
        """
        may_fold = self.fold and bool(self._hooks) and not self._plain and not torch.compiler.is_compiling()
        if may_fold and self._prepared_state != self._state():
            device = next((x.device for store in self._stores for x in store.values() if x is not None), "cpu")
            with same_random_state(torch.device(device)):
                self._prepare(images)
            self._prepared_state = self._state()
        self._left = self._calls if may_fold and not whole else 0
        model = without_ddp(self.given) if self._copy is None else self._copy
        self._stopped = False
        try:
            output = model(images)
        except _StopForward:
            return None
        finally:
            self._left = 0
        if self._stopped:  # the model has caught the exception and continued in another way
            self._calls = 0
            output = model(images)
        return output

    @contextmanager
    def as_given(self) -> Iterator[None]:
        """Return a context in which the given model runs, to its end."""
        folded, self._plain = self._copy, True
        self._use(None)
        try:
            yield
        finally:
            self._use(folded)
            self._plain = False

    def _state(self) -> list[int]:
        """Return the number of hooks, and the address and version of each weight, which ``load_state_dict`` changes."""
        found = [sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in self._modules)]
        for store in self._stores:
            for x in store.values():
                if x is not None:
                    address = x.data_ptr() if x.layout == torch.strided else id(x)
                    found += address, 0 if x.is_inference() else x._version
        return found

    def _count_output(self) -> None:
        if self._left:
            self._left -= 1
            if not self._left:
                self._stopped = True
                raise _StopForward

    def _prepare(self, images: Any) -> None:
        self._use(None)
        self._calls = 0
        reason = _reason_not_to_copy(self.given)
        if reason:
            self.how = f"as it was given, and to its end: {reason}"
            return
        pairs, output = _find_pairs(self.given, images, {hook.module for hook in self._hooks})
        if all(hook.calls for hook in self._hooks):  # otherwise the loss raises
            changed = any(hook.was_changed for hook in self._hooks)  # by a module after the level
            self._calls = 0 if changed else sum(hook.calls for hook in self._hooks)
        if any(not isinstance(hook.output, Tensor) or hook.output.is_inference() for hook in self._hooks):
            self._calls = 0  # whether a later module changes such outputs is not known
        self.how = "nothing to fold"
        if pairs:
            self._fold(pairs, output, images)
        self.how += "; stops after its last level" if self._calls else "; runs to its end"

    def _fold(self, pairs: Sequence[tuple[nn.Conv2d, nn.BatchNorm2d]], output: Any, images: Any) -> None:
        exact = [hook.feature().clone() for hook in self._hooks]
        try:
            folded, self._of_copy = _folded(unwrapped(self.given), pairs)
            self._use(folded)
            again = folded(images)
            far = [str(hook) for hook, y in zip(self._hooks, exact, strict=True) if not _is_near(hook.feature(), y)]
        except Exception as error:  # modules may raise anything when they are copied
            self._use(None)
            self.how = f"not folded, as its copy fails ({type(error).__name__}: {error})"
            return
        tensors = _tensors(again), _tensors(output)
        if len(tensors[0]) != len(tensors[1]) or not all(map(_is_near, *tensors)):
            far.append("the output")
        self.how = f"{len(pairs)} batch norms folded into convolutions"
        if far:
            self._use(None)
            self.how = f"not folded, as folding would change: {', '.join(far)}"
            warnings.warn(f"Distiller: the teacher runs as it was given; {self.how}", stacklevel=2)

    def _use(self, folded: nn.Module | None) -> None:
        """Run the copy from now on, or the given model if None; the hooks move to it."""
        if folded is self._copy:
            return
        back = {mine: given for given, mine in self._of_copy.items()}
        for hook in self._hooks:
            hook.detach()
            moved = back if folded is None else self._of_copy
            hook.root, hook.module = moved[hook.root], moved[hook.module]
            hook.attach()
        self._copy = folded


def _reason_not_to_copy(model: nn.Module) -> str:
    """Return why a copy of this model might not compute the same; empty if it will."""
    root = unwrapped(model)
    tensors = [*root.parameters(), *root.buffers()]
    if is_compiled(model) or without_ddp(model) is not root:
        return "it is compiled or wrapped"
    if any(type(x) not in (Tensor, nn.Parameter) or x.is_inference() for x in tensors):
        return "its weights are not plain tensors"
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
    return "" if hooked is None else f"{hooked or 'the model'!r} has other hooks"


def _find_pairs(
    model: nn.Module, images: Any, levels: set[nn.Module]
) -> tuple[list[tuple[nn.Conv2d, nn.BatchNorm2d]], Any]:
    """Return the (convolution, batch norm) pairs to fold, found in one forward of the model, and its output.

    A convolution in ``levels`` is left out, because its own output is distilled.
    """
    root = unwrapped(model)
    made: dict[int, tuple[nn.Conv2d, weakref.ref[Tensor]]] = {}  # by the tensor's id, which another may get later
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
    """Whether a layer is in eval mode without parametrisations, and a batch norm has running statistics."""
    statistics = not isinstance(module, nn.BatchNorm2d) or module.running_mean is not None
    return statistics and not hasattr(module, "parametrizations") and not module.training


def _folded(
    root: nn.Module, pairs: Sequence[tuple[nn.Conv2d, nn.BatchNorm2d]]
) -> tuple[nn.Module, dict[nn.Module, nn.Module]]:
    """Return a copy with folded pairs that shares all other weights, and the map from the model's modules to it."""
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
