"""Ops of the compiled backends: schema, fake and autograd rule, written once; and the choice of a backend.

Each backend is its own op, so that all can be compared in one process. A backend's binary only registers an
implementation below these schemas, so the ops exist, and trace, before any binary does.
"""

from __future__ import annotations

import os
import shutil
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastkd import one_pass, reference
from fastkd.info_map import NORMALIZERS, NORMS, PENALTIES, SCORES, InfoMap, require_known
from fastkd.levels import Levels
from fastkd.one_pass import NO_SECOND_DERIVATIVE, Call, Upstreams

COMPILED = ("cpp", "triton")

_FORWARD = """(Tensor[] student, Tensor[] teacher, Tensor[] prior, Tensor[] mean, Tensor[] rstd, float[] weights,
    int score, int norm, float temperature, int penalty, float beta, int normalizer)
    -> (Tensor losses, Tensor mass, Tensor maps)"""
_BACKWARD = """(Tensor grad, Tensor mass, Tensor maps, Tensor[] student, Tensor[] teacher, Tensor[] mean, Tensor[] rstd,
    float[] weights, int penalty, float beta, int normalizer) -> Tensor[]"""

_ONE_PASS = _FORWARD.replace("normalizer)", "normalizer, Tensor assumed, Tensor(a!)[] gradient)")
_BACKWARD_INTO = """(Tensor grad, Tensor assumed, Tensor mass, Tensor maps, Tensor[] student, Tensor[] teacher,
    Tensor[] mean, Tensor[] rstd, float[] weights, int penalty, float beta, int normalizer, Tensor(a!)[] gradient)
    -> ()"""
_RESCALE = "(Tensor grad, Tensor assumed, Tensor(a!)[] gradient) -> ()"

_library = torch.library.Library("fastkd", "DEF")  # type: ignore[no-untyped-call]


def _forward_fake(student: list[Tensor], teacher: list[Tensor], *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype = reference.accumulator(*student, *teacher)
    cells = sum(x.shape[0] * x.shape[2] * x.shape[3] for x in student)
    losses, mass, maps = (student[0].new_empty(n, dtype=dtype) for n in (len(student), len(student), cells))
    return losses, mass, maps


def _backward_fake(grad: Tensor, mass: Tensor, maps: Tensor, student: list[Tensor], *_: Any) -> list[Tensor]:
    return [torch.empty_like(x) for x in student]


def _nothing_fake(*_: Any) -> None:
    return None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, _, mean, rstd, weights, _, _, _, penalty, beta, normalizer = inputs
    _, mass, maps = output
    ctx.save_for_backward(mass, maps, *student, *teacher, *mean, *rstd)
    ctx.constants = (weights, penalty, beta, normalizer)
    ctx.mark_non_differentiable(mass, maps)
    ctx.set_materialize_grads(False)


def _no_double_backward(ctx: Any, *grads: Any) -> None:
    raise RuntimeError(NO_SECOND_DERIVATIVE)


def _define(backend: str) -> None:
    forward, backward = f"distill_{backend}", f"distill_{backend}_backward"
    _library.define(forward + " ".join(_FORWARD.split()))  # type: ignore[no-untyped-call]
    _library.define(backward + " ".join(_BACKWARD.split()))  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"fastkd::{forward}", _forward_fake, lib=_library)
    torch.library.register_fake(f"fastkd::{backward}", _backward_fake, lib=_library)
    for suffix, schema, fake in (
        ("one_pass", _ONE_PASS, _forward_fake),
        ("backward_into", _BACKWARD_INTO, _nothing_fake),
        ("rescale", _RESCALE, _nothing_fake),
    ):
        _library.define(f"{forward}_{suffix}" + " ".join(schema.split()))  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"fastkd::{forward}_{suffix}", fake, lib=_library)

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
        from fastkd import _C  # type: ignore[attr-defined]
    except ImportError as error:
        return f"the C++ extension is not built or does not load ({error}); {build}"
    _cuda_archs.extend(int(arch) for arch in _C.cuda_archs.split(";") if arch)
    return None


def _load_triton() -> str | None:
    """Register the Triton kernels; the reason why not, or None. Only where they can run: the import takes time."""
    if not (torch.version.cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        return "this torch is built without CUDA (TRITON_INTERPRET=1 interprets the kernels on the CPU, for tests)"
    try:
        from fastkd.kernels import launch
    except Exception as error:  # an old or broken Triton must not cost the other backends
        return f"Triton does not import ({type(error).__name__}: {error}); install it: pip install 'triton>=3.6'"
    if launch.DEVICE == "cuda" and not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton needs a C compiler to launch its kernels; install gcc, or name one in CC"
    launch.register(_library)
    _devices["triton"] = (launch.DEVICE,)
    _has_one_pass.add(("triton", launch.DEVICE))
    return None


_has_one_pass = {("cpp", "cpu")}
_prefers_one_pass = {("cpp", "cpu")}  # where it was measured to be faster
_cuda_archs: list[int] = []  # compute capabilities, times 10, that the extension has CUDA kernels for, ascending
_devices = {"cpp": ("cpu", "cuda"), "triton": ("cuda",)}
_unavailable = {"cpp": _load_cpp(), "triton": _load_triton(), "reference": None}
# By device, what suits most first. On an H200 Triton's kernels take 3 to 25 % less of the device, 7 to 129 us a step,
# but 0.7 to 1.0 ms more of the host, and have to be compiled when first met (benchmarks/results/nvidia-h200.md).
_preferred = {"cpu": ("cpp",), "cuda": ("cpp", "triton")}


def backends(device: torch.device | str | None = None) -> dict[str, str | None]:
    """Every backend by name: None where it works here, else the reason why it does not.

    Args:
        device: what its tensors are on; by default the current GPU where torch finds one, else the CPU.

    Returns:
        One entry for ``"cpp"``, ``"triton"`` and ``"reference"`` each, for features of up to 32 bits.
    """
    has_gpu = torch.cuda.is_available()
    device = torch.device(device or ("cuda" if has_gpu else "cpu"))
    if device.type == "cuda" and not has_gpu:
        return dict.fromkeys(_unavailable, "torch finds no GPU here")
    return {name: _refusal(name, device, torch.float32) for name in _unavailable}


def require_backend(name: str) -> None:
    """Raise ``ValueError`` unless there is a backend of this name (the message lists them)."""
    require_known("backend", name, list(_unavailable))


def require_one_pass(backend: str, device: torch.device, normalizer: str) -> None:
    """Raise ``RuntimeError`` unless this backend can write the gradient in the forward, ``ValueError`` for this Z."""
    if normalizer == "map_all_ranks":  # its upstream gradient carries Z, which is another at each step
        raise ValueError(
            "one_pass: normalizer='map_all_ranks' takes two passes; expected one_pass=None or False, got True"
        )
    if (backend, device.type) not in _has_one_pass:
        has = ", ".join(f"backend={name!r} on {kind.upper()}" for name, kind in sorted(_has_one_pass))
        raise RuntimeError(f"one_pass=True: backend={backend!r} has none on {device}, only {has}; use one_pass=None")


def choose(backend: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """The named backend, or the first of the preferred ones that can take these tensors.

    Args:
        dtype: that of the sums.

    Raises:
        ValueError: unknown name (lists the known ones).
        RuntimeError: a backend that is not built, or has no kernels for this device or dtype (says how to get it).
    """
    if backend is None:
        works = (x for x in _preferred.get(device.type, ()) if _refusal(x, device, dtype) is None)
        return next(works, "reference")
    require_backend(backend)
    refusal = _refusal(backend, device, dtype)
    if refusal is not None:
        raise RuntimeError(f"backend={backend!r}: {refusal}")
    return backend


def _refusal(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the backend cannot take these tensors, and the way out; None if it can."""
    if backend == "reference" or _unavailable[backend] is not None:
        return _unavailable[backend]
    if device.type not in _devices[backend]:
        has = " and ".join(x.upper() for x in _devices[backend])
        return f"has kernels for {has} tensors, got {device}; use backend=None or 'reference'"
    if backend == "triton" and dtype == torch.float64:
        return "sums in float32 and takes no float64; use backend='cpp' or 'reference'"
    return _cuda_refusal(device) if backend == "cpp" and device.type == "cuda" else None


def _cuda_refusal(device: torch.device) -> str | None:
    """Of the extension: machine code runs on cards of its major version and no smaller minor, PTX on any newer one."""
    way_out = "build it where nvcc is found: {}pip install --force-reinstall --no-deps . (or use backend=None)"
    if not _cuda_archs:
        return "is built without its CUDA kernels; " + way_out.format("")
    card = _capability(device)
    if card >= _cuda_archs[-1] or any(card // 10 == arch // 10 and card >= arch for arch in _cuda_archs):
        return None
    has = ", ".join(f"sm_{arch}" for arch in _cuda_archs)
    return f"has code for {has}, but {device} is sm_{card}; " + way_out.format(f"FASTKD_CUDA_ARCH={card} ")


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _refuse_forward_mode(student: list[Tensor]) -> None:
    """A custom op has no forward derivative, and PyTorch would take it for 0."""
    if torch.compiler.is_compiling() or getattr(forward_ad, "_current_level", 0) < 0:  # no tangent exists anywhere
        return
    tangents = [forward_ad.unpack_dual(x).tangent for x in student]  # type: ignore[no-untyped-call]
    if any(x is not None for x in tangents):
        raise RuntimeError(
            "fastkd: the compiled backends have no forward-mode derivative; for torch.func.jvp use backend='reference'"
        )


def level_losses(
    levels: Levels,
    info: InfoMap,
    penalty: str,
    beta: float,
    normalizer: str,
    backend: str,
    *,
    in_one_pass: bool | None,
    reuse_teacher_memory: bool,
    upstreams: Upstreams,
) -> tuple[Tensor, Tensor]:
    """Loss and map mass of each level, both (L,), by the backend of this name (one that ``choose`` returned)."""
    per_level = (levels.student, levels.teacher, levels.prior, levels.mean, levels.rstd, levels.weights)
    if backend == "reference":
        return reference.level_losses(*per_level, info, penalty, beta, normalizer)
    _refuse_forward_mode(levels.student)
    forward_codes = (SCORES.index(info.score), NORMS.index(info.norm), info.temperature)
    backward_codes = (PENALTIES.index(penalty), beta, NORMALIZERS.index(normalizer))
    here = (backend, levels.student[0].device.type)
    cannot = here not in _has_one_pass or normalizer == "map_all_ranks"
    if cannot or (in_one_pass is None and here not in _prefers_one_pass):
        in_one_pass = False
    wants = in_one_pass or reuse_teacher_memory or here in _prefers_one_pass
    if _is_eager(levels.student) and (wants or any(t.is_inference() for t in levels.teacher)):
        call = Call(backend, levels, forward_codes, backward_codes, in_one_pass, reuse_teacher_memory, upstreams)
        return one_pass.level_losses(call)
    op = getattr(torch.ops.fastkd, f"distill_{backend}")
    losses, mass, _ = op(*per_level, *forward_codes, *backward_codes)
    return losses, mass


def _is_eager(student: list[Tensor]) -> bool:
    """Whether nobody traces: tensors are what they seem, and their values can be looked at."""
    traced = torch.compiler.is_compiling() or torch._C._is_tracing() or torch._C._len_torch_dispatch_stack()
    return not traced and all(type(x) in (Tensor, torch.nn.Parameter) for x in student)
