"""The CUDA kernels: on the host, thread by thread; as machine code; and, where there is one, on a GPU."""

from __future__ import annotations

import importlib.util
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

import fastkd
from fastkd import ops
from fastkd.info_map import NORMALIZERS, NORMS, PENALTIES, SCORES, InfoMap, resolve
from fastkd.levels import check
from fastkd.reference import level_losses

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
built = pytest.mark.skipif(not ops._cpp_has_cuda, reason="the extension was built without nvcc")
gpu = pytest.mark.skipif(not (ops._cpp_has_cuda and torch.cuda.is_available()), reason="needs a GPU, and nvcc to build")

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
    for info in (InfoMap("entropy", "softmax", temperature=1e-60), InfoMap("energy", "softmax", temperature=1e-60)):
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


def test_a_backend_without_cuda_kernels_says_how_to_build_them(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda:0")
    monkeypatch.setattr(ops, "_cpp_has_cuda", False)
    with pytest.raises(RuntimeError, match=r"CPU tensors, got cuda:0; build them, where nvcc .*pip install.*reference"):
        ops.choose("cpp", cuda)
    monkeypatch.setattr(ops, "_cpp_has_cuda", True)
    assert ops.choose("cpp", cuda) == "cpp"
    assert ops.choose(None, cuda) != "cpp"


@built
def test_no_kernel_spills_and_16_bits_are_read_and_written_in_16_bytes() -> None:
    import cuda_report

    tool = cuda_report.find_cuobjdump()
    if tool is None:
        pytest.skip("needs cuobjdump, of the CUDA toolkit or of Triton's wheel")
    extension = importlib.util.find_spec("fastkd._C")
    assert extension is not None
    assert extension.origin is not None
    kernels = cuda_report.kernels(Path(extension.origin), tool)
    assert len(kernels) == 15 * len({k.target for k in kernels}) > 0
    for k in kernels:
        assert (k.spills, k.local, k.stack) == (0, 0, 0), k
        if "double" not in k.name:
            assert k.load >= 16, k
            assert k.store >= 16 or k.name.startswith("forward"), k  # a forward writes sums and maps


# ---- on a GPU ----


def to_cuda(sample: dict[str, Any]) -> dict[str, Any]:
    def move(x: Any) -> Any:
        if isinstance(x, Tensor):
            return x.detach().cuda().requires_grad_(x.requires_grad)
        return type(x)(map(move, x)) if isinstance(x, (list, tuple)) else x

    return {key: move(value) for key, value in sample.items()}


def step(sample: dict[str, Any], info: InfoMap, **options: Any) -> list[Tensor]:
    loss = fastkd.distill_loss(**sample, info_map=info, reduction="none", backend="cpp", **options)
    upstream = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype, device=loss.device)
    return [loss.detach(), *torch.autograd.grad(loss, sample["student_feats"], upstream)]


@gpu
@pytest.mark.parametrize("info", INFO_MAPS, ids=lambda m: f"{m.score}-{m.norm}")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_parity_on_a_gpu(dtype: torch.dtype, info: InfoMap) -> None:
    for i, layout in enumerate(LAYOUTS):
        options = {"penalty": PENALTIES[i % 3], "beta": 0.5, "normalizer": NORMALIZERS[i % 3]}
        sample = levels(dtype, layout, seed=i)
        got = [x.cpu() for x in step(to_cuda(sample), info, **options)]
        assert_as_exact(got, sample, {"info": info, **options})


@gpu
def test_the_same_bits_on_a_gpu_in_twenty_runs() -> None:
    sample = to_cuda(levels(torch.bfloat16, shapes=[(16, 256, 52, 52), (16, 1024, 13, 13)]))
    first = step(sample, InfoMap("energy", "softmax"))
    for _ in range(20):
        assert all(torch.equal(x, y) for x, y in zip(first, step(sample, InfoMap("energy", "softmax")), strict=True))


@gpu
def test_a_side_stream() -> None:
    sample = to_cuda(levels(shapes=[(8, 64, 40, 40)]))
    expected = step(sample, resolve("energy"))
    features = [*sample["student_feats"], *sample["teacher_feats"]]
    values = [x.detach().clone() for x in features]
    for x in features:
        x.data.zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # a kernel on another stream would not wait for what follows, and see zeros
        for x, value in zip(features, values, strict=True):
            x.data.copy_(value)
        got = step(sample, resolve("energy"))
    stream.synchronize()
    assert all(torch.equal(x, y) for x, y in zip(expected, got, strict=True))


@gpu
def test_a_cuda_graph_captures_and_replays() -> None:
    sample = to_cuda(levels(shapes=[(4, 64, 13, 13), (4, 32, 26, 26)]))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # warm-up, as torch.cuda.graph asks
        step(sample, resolve("attention"))
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(sample, resolve("attention"))
    for seed in range(3):  # tickets must be cleared in every replay
        new = to_cuda(levels(shapes=[(4, 64, 13, 13), (4, 32, 26, 26)], seed=seed))
        for key in ("student_feats", "teacher_feats"):
            for x, y in zip(sample[key], new[key], strict=True):
                x.data.copy_(y)
        graph.replay()
        expected = step(sample, resolve("attention"))
        torch.cuda.synchronize()
        assert all(torch.equal(x, y) for x, y in zip(captured, expected, strict=True))


@gpu
def test_tensors_on_two_devices_are_an_error() -> None:
    sample = levels()
    student, *rest = arguments(to_cuda(sample), resolve("energy"))
    teacher = arguments(sample, resolve("energy"))[1]
    with pytest.raises(RuntimeError, match="on the device of the first student feature"):
        torch.ops.fastkd.distill_cpp(student, teacher, *rest[1:], *codes(**DEFAULTS))
