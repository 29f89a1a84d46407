"""The choice of a backend: which backends exist, which can compute on the tensors of a call, and which is preferred."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd.ops.arguments import require_known
from fastkd.ops.schema import formulas, library


def _load_cpp() -> str | None:
    """Load the extension, which registers its kernels; return the reason why it does not load, or None."""
    build = "build it: pip install --force-reinstall --no-deps . (needs a C++ compiler, and FASTKD_CPP not 0)"
    try:
        from fastkd import _C
    except ImportError as error:
        return f"the C++ extension is not built or does not load ({error}); {build}"
    _cuda_archs.extend(int(arch) for arch in _C.cuda_archs.split(";") if arch)
    return None


def _load_triton() -> str | None:
    """Register the Triton kernels, if they can run, as the import is slow; return why they cannot run, or None."""
    if not (torch.version.cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        return "this torch is built without CUDA (TRITON_INTERPRET=1 interprets the kernels on the CPU, for tests)"
    try:
        from fastkd.kernels import launch
    except Exception as error:  # an old or broken Triton must not cost the other backends
        return f"Triton does not import ({type(error).__name__}: {error}); install it: pip install 'triton>=3.6'"
    if launch.DEVICE == "cuda" and not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton needs a C compiler to launch its kernels; install gcc, or name one in CC"
    launch.register(library)
    _devices["triton"] = (launch.DEVICE,)
    return None


_cuda_archs: list[int] = []  # compute capability * 10 of the extension's CUDA kernels, ascending
_devices = {"cpp": ("cpu", "cuda"), "triton": ("cuda",)}
_unavailable = {"cpp": _load_cpp(), "triton": _load_triton(), "reference": None}
# By device, the preferred backend first. On an H200 Triton's kernels take 3 to 25 % less device time (7 to 129 us per
# step), but 0.7 to 1.0 ms more host time, and must be compiled on first use (benchmarks/results/nvidia-h200.md).
_preferred = {"cpu": ("cpp",), "cuda": ("cpp", "triton")}


def backends(device: torch.device | str | None = None) -> dict[str, str | None]:
    """Return which backends work on a device: for each name None, or the reason why the backend does not work.

    Args:
        device: the device of the tensors; by default the current GPU if torch finds one, else the CPU.

    Returns:
        A dict with the keys ``"cpp"``, ``"triton"`` and ``"reference"``, valid for features of at most 32 bits.
    """
    has_gpu = torch.cuda.is_available()
    device = torch.device(device or ("cuda" if has_gpu else "cpu"))
    if device.type == "cuda" and not has_gpu:
        return dict.fromkeys(_unavailable, "torch finds no GPU here")
    return {name: _refusal(name, device, torch.float32) for name in _unavailable}


def require_backend(name: str) -> None:
    """Raise ``ValueError`` unless there is a backend of this name (the message lists them)."""
    require_known("backend", name, list(_unavailable))


def choose(backend: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """Return the named backend, or for None the first preferred one that can compute on these tensors.

    Args:
        backend: a name, or None.
        device: of the tensors.
        dtype: of the sums.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
        RuntimeError: a backend that is not built, or has no kernels for this device or dtype; the message tells how to
            get it.
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
    """Return why the backend cannot compute on these tensors, and the remedy; None if it can."""
    if backend == "reference" or _unavailable[backend] is not None:
        return _unavailable[backend]
    if device.type not in _devices[backend]:
        has = " and ".join(x.upper() for x in _devices[backend])
        return f"has kernels for {has} tensors, got {device}; use backend=None or 'reference'"
    if backend == "triton" and dtype == torch.float64:
        return "sums in float32 and takes no float64; use backend='cpp' or 'reference'"
    return _cuda_refusal(device) if backend == "cpp" and device.type == "cuda" else None


def _cuda_refusal(device: torch.device) -> str | None:
    """Return why the extension's CUDA kernels cannot run on this card; None if they can.

    Machine code runs on cards of its major version and the same or a higher minor version, PTX on any newer card.
    """
    hint = "build it where nvcc is found: {}pip install --force-reinstall --no-deps . (or use backend=None)"
    if not _cuda_archs:
        return "is built without its CUDA kernels; " + hint.format("")
    card = _capability(device)
    if card >= _cuda_archs[-1] or any(card // 10 == arch // 10 and card >= arch for arch in _cuda_archs):
        return None
    has = ", ".join(f"sm_{arch}" for arch in _cuda_archs)
    return f"has code for {has}, but {device} is sm_{card}; " + hint.format(f"FASTKD_CUDA_ARCH={card} ")


def small_op(name: str, device: torch.device) -> Any:
    """Return an op of the priors or the factor, or its PyTorch formula on a card that the extension has no code for."""
    if device.type == "cuda" and _cuda_archs and _cuda_refusal(device) is not None:
        return formulas[name]
    return getattr(torch.ops.fastkd, name).default


def has_one_pass(backend: str, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> bool:
    """Whether the backend can compute loss and gradient of these levels in one pass.

    A gradient in float16 must not be written before its upstream gradient is known: it may underflow before a
    GradScaler lifts it into the range of float16. On GPUs student and teacher must be dense and have the same layout.
    """
    features = (*student, *teacher)
    if backend == "reference" or any(x.dtype == torch.float16 for x in features):
        return False
    if backend == "cpp" and student[0].device.type == "cpu":
        return True
    if {x.dtype for x in features} not in ({torch.float32}, {torch.bfloat16}):
        return False
    return all(is_dense_like(s, t) for s, t in zip(student, teacher, strict=True))


def is_dense_like(s: Tensor, t: Tensor) -> bool:
    """Whether both tensors are dense (no gaps, no repeated elements) and have the same layout."""
    return any(
        s.is_contiguous(memory_format=layout) and t.is_contiguous(memory_format=layout)
        for layout in (torch.contiguous_format, torch.channels_last)
    )


def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


# torch.compiler.assume_constant_result sets this, but it imports torch._dynamo first, which takes as long as torch
_capability._dynamo_marked_constant = True  # type: ignore[attr-defined]
