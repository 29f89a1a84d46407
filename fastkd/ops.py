"""Ops of the compiled backends: schema, fake and autograd rule, written once; and the choice of a backend.

Each backend is its own op, so that all can be compared in one process. A backend's binary only registers an
implementation below these schemas, so the ops exist, and trace, before any binary does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastkd import reference
from fastkd.info_map import NORMALIZERS, NORMS, PENALTIES, SCORES, InfoMap, require_known
from fastkd.levels import Levels

COMPILED = ("cpp",)

_FORWARD = """(Tensor[] student, Tensor[] teacher, Tensor[] prior, Tensor[] mean, Tensor[] rstd, float[] weights,
    int score, int norm, float temperature, int penalty, float beta, int normalizer)
    -> (Tensor losses, Tensor mass, Tensor maps)"""
_BACKWARD = """(Tensor grad, Tensor mass, Tensor maps, Tensor[] student, Tensor[] teacher, Tensor[] mean, Tensor[] rstd,
    float[] weights, int penalty, float beta, int normalizer) -> Tensor[]"""

_library = torch.library.Library("fastkd", "DEF")  # type: ignore[no-untyped-call]


def _forward_fake(student: list[Tensor], teacher: list[Tensor], *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype = reference.accumulator(*student, *teacher)
    cells = sum(x.shape[0] * x.shape[2] * x.shape[3] for x in student)
    losses, mass, maps = (student[0].new_empty(n, dtype=dtype) for n in (len(student), len(student), cells))
    return losses, mass, maps


def _backward_fake(grad: Tensor, mass: Tensor, maps: Tensor, student: list[Tensor], *_: Any) -> list[Tensor]:
    return [torch.empty_like(x) for x in student]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, _, mean, rstd, weights, _, _, _, penalty, beta, normalizer = inputs
    _, mass, maps = output
    ctx.save_for_backward(mass, maps, *student, *teacher, *mean, *rstd)
    ctx.constants = (weights, penalty, beta, normalizer)
    ctx.mark_non_differentiable(mass, maps)
    ctx.set_materialize_grads(False)


def _no_double_backward(ctx: Any, *grads: Any) -> None:
    raise RuntimeError(
        "fastkd: the compiled backends have no second derivative; for a double backward use backend='reference'"
    )


def _define(backend: str) -> None:
    forward, backward = f"distill_{backend}", f"distill_{backend}_backward"
    _library.define(forward + " ".join(_FORWARD.split()))  # type: ignore[no-untyped-call]
    _library.define(backward + " ".join(_BACKWARD.split()))  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"fastkd::{forward}", _forward_fake, lib=_library)
    torch.library.register_fake(f"fastkd::{backward}", _backward_fake, lib=_library)

    def differentiate(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
        mass, maps, *saved = ctx.saved_tensors
        n = len(saved) // 4
        student, teacher, mean, rstd = (saved[i * n : (i + 1) * n] for i in range(4))
        constants: list[Any] = [[None] * n] * 4 + [None] * 7  # nothing else than the student has a gradient
        if grad is None:
            return ([None] * n, *constants)
        op = getattr(torch.ops.fastkd, backward)
        return (op(grad, mass, maps, student, teacher, mean, rstd, *ctx.constants), *constants)

    torch.library.register_autograd(f"fastkd::{forward}", differentiate, setup_context=_setup_context, lib=_library)
    torch.library.register_autograd(f"fastkd::{backward}", _no_double_backward, lib=_library)


for _backend in COMPILED:
    _define(_backend)


def _load_cpp() -> str | None:
    """Load the extension, which registers its kernels; the reason why not, or None."""
    build = "build it: pip install --force-reinstall --no-deps . (needs a C++ compiler, and FASTKD_CPP not 0)"
    try:
        import fastkd._C  # noqa: F401
    except ImportError as error:
        return f"the C++ extension is not built or does not load ({error}); {build}"
    return None


_unavailable = {"reference": None, "cpp": _load_cpp()}
# whether the extension was built with CUDA kernels, by setup.py where it found nvcc
_cpp_has_cuda: bool = torch._C._dispatch_has_kernel_for_dispatch_key("fastkd::distill_cpp", "CUDA")


def backends() -> dict[str, str | None]:
    """Every backend by name: None where it works here, else the reason why it does not."""
    return dict(_unavailable)


def require_backend(name: str) -> None:
    """Raise ``ValueError`` unless there is a backend of this name (the message lists them)."""
    require_known("backend", name, list(_unavailable))


def choose(backend: str | None, device: torch.device) -> str:
    """The named backend, or the fastest that works on this device.

    Raises:
        ValueError: unknown name (lists the known ones).
        RuntimeError: a backend that is not built, or has no kernels for this device (says how to get it).
    """
    if backend is None:
        return "cpp" if device.type == "cpu" and _unavailable["cpp"] is None else "reference"
    require_backend(backend)
    if _unavailable[backend] is not None:
        raise RuntimeError(f"backend={backend!r}: {_unavailable[backend]}")
    if backend == "cpp" and device.type not in (("cpu", "cuda") if _cpp_has_cuda else ("cpu",)):
        build = "build them, where nvcc is found (FASTKD_CUDA not 0): pip install --force-reinstall --no-deps .; or "
        raise RuntimeError(
            f"backend='cpp': has kernels for {'CPU and CUDA' if _cpp_has_cuda else 'CPU'} tensors, got {device}; "
            f"{build if device.type == 'cuda' else ''}use backend=None or 'reference'"
        )
    return backend


def _refuse_forward_mode(student: list[Tensor]) -> None:
    """A custom op has no forward derivative, and PyTorch would take it for 0."""
    if torch.compiler.is_compiling():
        return
    tangents = [forward_ad.unpack_dual(x).tangent for x in student]  # type: ignore[no-untyped-call]
    if any(x is not None for x in tangents):
        raise RuntimeError(
            "fastkd: the compiled backends have no forward-mode derivative; for torch.func.jvp use backend='reference'"
        )


def level_losses(
    levels: Levels, info: InfoMap, penalty: str, beta: float, normalizer: str, backend: str
) -> tuple[Tensor, Tensor]:
    """Loss and map mass of each level, both (L,), by the backend of this name (one that ``choose`` returned)."""
    per_level = (levels.student, levels.teacher, levels.prior, levels.mean, levels.rstd, levels.weights)
    if backend == "reference":
        return reference.level_losses(*per_level, info, penalty, beta, normalizer)
    _refuse_forward_mode(levels.student)
    op = getattr(torch.ops.fastkd, f"distill_{backend}")
    losses, mass, _ = op(
        *per_level,
        SCORES.index(info.score),
        NORMS.index(info.norm),
        info.temperature,
        PENALTIES.index(penalty),
        beta,
        NORMALIZERS.index(normalizer),
    )
    return losses, mass
