"""The CUDA kernels without a GPU: on the host, thread by thread; and in the extension."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from samples import DTYPES, INFO_MAPS, LAYOUTS, levels, loss_and_gradients, widened
from torch import Tensor

from fastkd import ops
from fastkd.info_map import NORMALIZERS, NORMS, PENALTIES, SCORES, SMALLEST, InfoMap, resolve
from fastkd.levels import check
from fastkd.reference import level_losses

ROOT = Path(__file__).parent.parent
built = pytest.mark.skipif(not ops._cuda_archs, reason="the extension was built without nvcc")

Options = dict[str, Any]
DEFAULTS: Options = {"info": resolve("energy"), "penalty": "l2", "beta": 0.5, "normalizer": "elements"}


def arguments(sample: dict[str, Any], info: InfoMap) -> tuple[Any, ...]:
    """Tensors of a sample as an op takes them."""
    per_level = {k: sample[k] for k in ("prior", "standardize", "weights")}
    checked = check(sample["student_feats"], sample["teacher_feats"], info=info, **per_level)
    student = [x.detach() for x in checked.student]
    return student, checked.teacher, checked.prior, checked.mean, checked.rstd, checked.weights


def codes(info: InfoMap, penalty: str, beta: float, normalizer: str) -> tuple[Any, ...]:
    numbers = SCORES.index(info.score), NORMS.index(info.norm), info.temperature, PENALTIES.index(penalty), beta
    return *numbers, NORMALIZERS.index(normalizer)


# ---- on the host ----


@pytest.fixture(scope="module")
def on_host(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Tensor]]:
    """Losses and gradients by the CUDA kernels compiled for the host, whose fibers stand for a block's threads."""
    compiler = shutil.which("g++")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs g++ on Linux")
    library, torch_directory = tmp_path_factory.mktemp("on_host") / "on_host.so", Path(torch.__file__).parent
    source = ROOT / "tests" / "cuda_on_host"
    subprocess.run(
        [compiler, "-O1", "-std=c++20", "-fPIC", "-shared", "-w", "-DTORCH_TARGET_VERSION=0x020a000000000000",
         f"-I{source}", f"-I{torch_directory / 'include'}", source / "ops.cpp", "-o", library,
         f"-L{torch_directory / 'lib'}", "-ltorch_cpu", "-lc10"],
        check=True,
    )  # fmt: skip
    definitions = torch.library.Library("fastkd_on_host", "DEF")
    definitions.define("distill_cpp" + " ".join(ops._FORWARD.split()))
    definitions.define("distill_cpp_backward" + " ".join(ops._BACKWARD.split()))
    torch.ops.load_library(library)

    def run(sample: dict[str, Any], info: InfoMap, **options: Any) -> list[Tensor]:
        definitions  # noqa: B018  the ops live as long as it does
        tensors, numbers = arguments(sample, info), codes(info, **options)
        losses, mass, maps = torch.ops.fastkd_on_host.distill_cpp(*tensors, *numbers)
        student, teacher, _, *rest = tensors
        upstream = torch.linspace(-1, 2, losses.numel(), dtype=losses.dtype)
        backward = torch.ops.fastkd_on_host.distill_cpp_backward
        return [losses, *backward(upstream, mass, maps, student, teacher, *rest, *numbers[3:])]

    return run


def by_reference(sample: dict[str, Any], info: InfoMap, **options: Any) -> list[Tensor]:
    tensors = arguments(sample, info)
    student = [x.requires_grad_() for x in tensors[0]]
    losses, _ = level_losses(student, *tensors[1:], info, **options)
    return loss_and_gradients(losses, student)


def assert_as_exact(got: list[Tensor], sample: dict[str, Any], options: Options) -> None:
    """Errors per level at most twice those of eager PyTorch at the same dtype."""
    exact, eager = by_reference(widened(sample), **options), by_reference(sample, **options)
    floor = 2e-15 if got[0].dtype == torch.float64 else 6e-8
    exact, eager, got = ([*x[0], *x[1:]] for x in (exact, eager, got))

    def error(x: Tensor, y: Tensor) -> float:
        return ((x.double() - y).norm() / y.norm().clamp_min(1e-12)).item()

    count = len(got) // 2
    for part in (slice(0, count), slice(count, None)):
        largest = max(map(error, eager[part], exact[part]))
        assert max(map(error, got[part], exact[part])) <= 2 * max(largest, floor)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_kernels_run_on_the_host_agree_with_the_reference(on_host: Any, layout: str, dtype: torch.dtype) -> None:
    for i, info in enumerate(INFO_MAPS):
        if (i + LAYOUTS.index(layout) + DTYPES.index(dtype)) % 4:
            continue
        options = {"info": info, "penalty": PENALTIES[i % 3], "beta": 0.5, "normalizer": NORMALIZERS[i % 4]}
        sample = levels(dtype, layout, seed=i)
        assert_as_exact(on_host(sample, **options), sample, options)


def test_more_levels_than_a_launch_takes_and_levels_of_all_dtypes(on_host: Any) -> None:
    options = {**DEFAULTS, "normalizer": "map"}
    many = levels(shapes=[(1 + i % 3, 1 + i, 3, 2 + i) for i in range(29)])
    assert_as_exact(on_host(many, **options), many, options)
    mixed = levels(shapes=[(2, 16, 4, 8)] * 9)
    for i, (s, t) in enumerate((s, t) for s in DTYPES[:3] for t in DTYPES[:3]):
        mixed["student_feats"][i] = mixed["student_feats"][i].detach().to(s).requires_grad_()
        mixed["teacher_feats"][i] = mixed["teacher_feats"][i].to(t)
    assert_as_exact(on_host(mixed, **options), mixed, options)


def test_levels_without_elements_add_nothing(on_host: Any) -> None:
    sample = levels(shapes=[(0, 8, 4, 4), (2, 8, 4, 4), (2, 8, 0, 4)])
    losses, *gradients = on_host(sample, **DEFAULTS)
    assert losses[0] == 0
    assert losses[2] == 0
    assert losses[1] > 0
    assert [g.shape for g in gradients] == [s.shape for s in sample["student_feats"]]
    assert on_host(levels(shapes=[(0, 8, 4, 4)]), **DEFAULTS)[0] == 0


def test_order_of_blocks_and_threads_does_not_change_a_bit(on_host: Any) -> None:
    sample = levels(shapes=[(5, 40, 13, 13), (3, 64, 24, 24)])
    for info in (InfoMap("entropy", "softmax"), InfoMap("energy", "minmax")):
        first = on_host(sample, **{**DEFAULTS, "info": info})
        for _ in range(3):  # each launch shuffles blocks and threads
            again = on_host(sample, **{**DEFAULTS, "info": info})
            assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


def test_offsets_beyond_32_bits(on_host: Any, tmp_path: Path) -> None:
    gap = 2**31 + 16  # elements between the two images: no more of the sparse file than they are is ever written
    flat = torch.from_file(str(tmp_path / "features"), shared=True, size=gap + 4096, dtype=torch.float16)
    sample = levels(torch.float16, shapes=[(2, 8, 4, 4)])
    far = flat.as_strided((2, 8, 4, 4), (gap, 16, 4, 1))
    far.copy_(sample["teacher_feats"][0])
    near = on_host(sample, **DEFAULTS)
    sample["teacher_feats"][0] = far
    assert all(torch.equal(x, y) for x, y in zip(near, on_host(sample, **DEFAULTS), strict=True))


def test_nan_and_inf_go_through(on_host: Any) -> None:
    for value in (float("nan"), float("inf")):
        for info in INFO_MAPS:
            sample = levels(shapes=[(1, 8, 4, 4), (1, 8, 4, 4)])
            sample["teacher_feats"][0][0, 3, 2, 1] = value
            options = {**DEFAULTS, "info": info, "penalty": PENALTIES[len(info.score) % 3]}
            losses, *gradients = on_host(sample, **options)
            assert not losses[0].isfinite()
            assert losses[1].isfinite()
            if value != value:  # what a NaN spoils is what it spoils in PyTorch
                for got, expected in zip(gradients, by_reference(sample, **options)[1:], strict=True):
                    assert torch.equal(got.isnan(), expected.isnan())


def test_temperature_and_beta_near_zero(on_host: Any) -> None:
    for info in (
        InfoMap("entropy", "softmax", temperature=SMALLEST),
        InfoMap("energy", "softmax", temperature=SMALLEST),
    ):
        assert all(x.isfinite().all() for x in on_host(levels(), **{**DEFAULTS, "info": info}))
    sharp = on_host(levels(), **{**DEFAULTS, "penalty": "smooth_l1", "beta": 1e-42})
    for x, y in zip(sharp, on_host(levels(), **{**DEFAULTS, "penalty": "l1"}), strict=True):
        torch.testing.assert_close(x, y)


# ---- in the extension ----


@built
def test_the_extension_with_cuda_kernels_loads_under_any_torch() -> None:
    for name in ("distill_cpp", "distill_cpp_backward"):
        for device in ("CPU", "CUDA"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastkd::{name}", device)


@built
def test_the_cuda_kernels_refuse_cpu_tensors() -> None:
    tensors = arguments(levels(), resolve("energy"))
    on_cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    with pytest.raises(RuntimeError, match="not on a CUDA device"):
        torch.ops.fastkd.distill_cpp.default.redispatch(on_cuda, *tensors, *codes(**DEFAULTS))


def test_a_build_that_lacks_kernels_for_a_card_says_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda:0")
    monkeypatch.setitem(ops._unavailable, "cpp", None)
    monkeypatch.setattr(ops, "_cuda_archs", [])
    with pytest.raises(RuntimeError, match=r"'cpp': is built without its CUDA kernels; build it .*pip"):
        ops.choose("cpp", cuda, torch.float32)
    monkeypatch.setattr(ops, "_cuda_archs", [80, 90])
    for card, works in ((75, False), (80, True), (86, True), (90, True), (100, True)):
        monkeypatch.setattr(ops, "_capability", lambda device, card=card: card)
        assert (ops.choose(None, cuda, torch.float64) == "cpp") == works
        if works:
            assert ops.choose("cpp", cuda, torch.float32) == "cpp"
        else:
            with pytest.raises(RuntimeError, match=r"sm_80, sm_90, but cuda:0 is sm_75; .*FASTKD_CUDA_ARCH=75 pip"):
                ops.choose("cpp", cuda, torch.float32)
    monkeypatch.setattr(ops, "_cuda_archs", [80, 100])
    monkeypatch.setattr(ops, "_capability", lambda device: 90)  # code of 80 does not run on 90, nor does PTX of 100
    assert ops.choose(None, cuda, torch.float64) == "reference"
