"""The CUDA kernels without a GPU: compiled for the host, and in the extension."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from samples import DTYPES, INFO_MAPS, LAYOUTS, compiled_for_host, levels, loss_and_gradients, random, widened
from torch import Tensor

from fastkd.ops import backends
from fastkd.ops.arguments import SMALLEST
from fastkd.ops.presets import DIVISORS, MAP_NORMS, MAX_ENTROPY_TEMPERATURE, PENALTIES, SCORES, InfoMap, resolve
from fastkd.ops.reference import accumulator, level_losses
from fastkd.ops.schema import BACKWARD, FORWARD, ONE_PASS, RESCALE

ROOT = Path(__file__).parent.parent
built = pytest.mark.skipif(not backends._cuda_archs, reason="the extension was built without nvcc")

Options = dict[str, Any]
DEFAULTS: Options = {"info": resolve("energy"), "penalty": "l2", "beta": 0.5, "divisor": "elements"}


def arguments(sample: dict[str, Any]) -> tuple[Any, ...]:
    """Return student, teacher, prior, mean, rstd, bias and weights of a sample, as an op takes them.

    A level with moments also has a bias.
    """
    student, teacher = [x.detach() for x in sample["student_feats"]], sample["teacher_feats"]
    dtype, generator = accumulator(*student, *teacher), torch.Generator().manual_seed(7)
    absent = torch.empty(0, dtype=dtype)
    prior = [absent if q is None else q.to(dtype) for q in sample["prior"]]
    moments = [
        (absent,) * 3 if m is None else (*(x.to(dtype) for x in m), random(torch.randn, len(m[0]), generator=generator))
        for m in sample["standardize"]
    ]
    mean, rstd, bias = ([m[k].to(dtype) for m in moments] for k in range(3))
    return student, teacher, prior, mean, rstd, bias, sample["weights"]


def codes(info: InfoMap, penalty: str, beta: float, divisor: str) -> tuple[Any, ...]:
    numbers = SCORES.index(info.score), MAP_NORMS.index(info.map_norm), info.temperature, PENALTIES.index(penalty), beta
    return *numbers, DIVISORS.index(divisor)


# ---- on the host ----


@pytest.fixture(scope="module")
def on_host(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Tensor]]:
    """Losses and gradients of the CUDA kernels, compiled for the host, where fibers replace the threads of a block."""
    library = compiled_for_host("ops.cpp", tmp_path_factory.mktemp("on_host"))
    definitions = torch.library.Library("fastkd_on_host", "DEF")
    schemas = {"": FORWARD, "_backward": BACKWARD, "_one_pass": ONE_PASS, "_rescale": RESCALE}
    for name, schema in schemas.items():
        definitions.define(f"distill_cpp{name}" + " ".join(schema.split()))
    torch.ops.load_library(library)

    def run(sample: dict[str, Any], info: InfoMap, **options: Any) -> list[Tensor]:
        definitions  # noqa: B018  the ops exist as long as it does
        tensors, numbers = arguments(sample), codes(info, **options)
        losses, mass, maps = torch.ops.fastkd_on_host.distill_cpp(*tensors, *numbers)
        student, teacher, _, *rest = tensors
        upstream = torch.linspace(-1, 2, losses.numel(), dtype=losses.dtype)
        backward = torch.ops.fastkd_on_host.distill_cpp_backward
        return [losses, *backward(upstream, mass, maps, student, teacher, *rest, *numbers[3:])]

    return run


def by_reference(sample: dict[str, Any], info: InfoMap, **options: Any) -> list[Tensor]:
    tensors = arguments(sample)
    student = [x.requires_grad_() for x in tensors[0]]
    losses, _ = level_losses(student, *tensors[1:], info, **options)
    return loss_and_gradients(losses, student)


def assert_as_exact(got: list[Tensor], sample: dict[str, Any], options: Options) -> None:
    """Check that losses and gradients are as exact as those of eager PyTorch."""
    exact, eager = by_reference(widened(sample), **options), by_reference(sample, **options)
    assert_errors([got[0][:], got[1:]], [eager[0][:], eager[1:]], [exact[0][:], exact[1:]])


def assert_errors(got: list[Any], eager: list[Any], exact: list[Any]) -> None:
    """Check that the largest error in each group is at most twice that of eager PyTorch in the same dtype.

    The fourth group, if there is one, has sums by channel, whose terms cancel each other.
    """
    floor = 2e-15 if got[0].dtype == torch.float64 else 6e-8

    def error(x: Tensor, y: Tensor) -> float:
        return ((x.double() - y).norm() / y.norm().clamp_min(1e-12)).item()

    for i, (mine, theirs, truth) in enumerate(zip(got, eager, exact, strict=True)):
        least = floor if i < 3 else 10 * floor
        assert max(map(error, mine, truth)) <= 2 * max(least, *map(error, theirs, truth))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_kernels_run_on_the_host_agree_with_the_reference(on_host: Any, layout: str, dtype: torch.dtype) -> None:
    for i, info in enumerate(INFO_MAPS):
        if (i + LAYOUTS.index(layout) + DTYPES.index(dtype)) % 4:
            continue
        options = {"info": info, "penalty": PENALTIES[i % 3], "beta": 0.5, "divisor": DIVISORS[i % 4]}
        sample = levels(dtype, layout, seed=i)
        assert_as_exact(on_host(sample, **options), sample, options)


def test_more_levels_than_a_launch_takes_and_levels_of_all_dtypes(on_host: Any) -> None:
    options = {**DEFAULTS, "divisor": "map"}
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
    gap = 2**31 + 16  # elements between the two images; only the used part of the sparse file is written
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
            if value != value:  # a NaN spreads to the same values as in PyTorch
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


def test_entropy_up_to_the_highest_temperature(on_host: Any) -> None:
    """The test is as in tests/test_info_map.py: the gradient of l1 is the weight."""
    sample = levels(shapes=[(1, 64, 6, 6)])
    sample["teacher_feats"] = [torch.randn(1, 64, 6, 6, generator=torch.Generator().manual_seed(0))]
    for temperature in (1.0, MAX_ENTROPY_TEMPERATURE):
        options = {"info": InfoMap("entropy", "none", temperature), "penalty": "l1", "beta": 1.0, "divisor": "batch"}
        got, exact = on_host(sample, **options)[1].abs(), by_reference(widened(sample), **options)[1].abs()
        assert (got - exact).abs().amax() <= (1e-5 + 3e-6 * temperature**2) * exact.mean()
    sample["teacher_feats"][0] *= 1e-5
    rounding = -on_host(sample, **{**options, "info": InfoMap("entropy", "mean", temperature)})[1]
    sign = (sample["student_feats"][0].detach() - sample["teacher_feats"][0]).sign()
    assert (rounding * sign >= 0).all()
    assert (rounding * sign)[0, 0].sum() <= 36 * (1 + 1e-5)


# ---- one pass, on the host ----

# A pack is the elements of a 16-byte load. The first shape has none; in NCHW packs of 13 x 13 cells span two channels.
# In channels_last, 257 channels have no packs, 24 leave some threads of a block without work, 1024 do not, and 4096
# take several tiles. In NCHW they would take the path of 1024, and the host seven times as long.
ONE_PASS_SHAPES = {
    "contiguous": [(2, 7, 5, 3), (2, 64, 13, 13), (3, 257, 4, 6), (2, 24, 26, 26), (1, 1024, 3, 4), (3, 16, 1, 1),
                   (2, 1, 8, 8)],
    "channels_last": [(2, 7, 5, 3), (2, 64, 13, 13), (3, 257, 4, 6), (2, 24, 26, 26), (1, 1024, 3, 4), (2, 4096, 2, 2),
                      (3, 16, 1, 1), (2, 1, 8, 8)],
}  # fmt: skip


def one_pass(
    sample: dict[str, Any], info: InfoMap, factor: float = 1, donate: bool = False, skip: Sequence[int] = (),
    bias_skip: Sequence[int] = (), **options: Any,
) -> list[Any]:  # fmt: skip
    """Return total, losses, gradients and bias gradients; levels in ``skip`` need no gradient."""
    student, teacher, prior, *moments, weights = arguments(sample)
    teacher = [x.clone() for x in teacher] if donate else teacher
    absent = student[0].new_empty(0)
    out = [absent if i in skip else t if donate else torch.full_like(t, 7) for i, t in enumerate(teacher)]
    bias_out = [torch.full_like(b, 7) if i not in bias_skip else b[:0] for i, b in enumerate(moments[2])]
    pairs = zip(student, prior, strict=True)
    known = [q.double().sum() if q.numel() else torch.tensor(float(s[:, 0].numel())) for s, q in pairs]
    needs_mass = options["divisor"] == "map" and (info.score, info.map_norm) == ("uniform", "none")
    mass = torch.stack(known).double() if needs_mass else torch.empty(0, dtype=torch.float64)
    scale = torch.empty(0) if factor == 1 else torch.tensor(factor)
    op = torch.ops.fastkd_on_host.distill_cpp_one_pass
    tensors = (student, teacher, prior, *moments, weights)
    total, losses = op(*tensors, *codes(info, **options), mass, scale, out, bias_out)
    return [total, losses, [g for g in out if g.numel()], [g for g in bias_out if g.numel()]]


def one_pass_by_reference(
    sample: dict[str, Any], info: InfoMap, factor: float = 1, skip: Sequence[int] = (),
    bias_skip: Sequence[int] = (), **options: Any,
) -> list[Any]:  # fmt: skip
    student, *rest = arguments(sample)
    bias = rest[4]
    wanted = [x.requires_grad_() for i, x in enumerate(student) if i not in skip]
    wanted_bias = [x.requires_grad_() for i, x in enumerate(bias) if i not in bias_skip and x.numel()]
    losses, _ = level_losses(student, *rest, info, **options)
    total = factor * losses.sum()
    gradients = torch.autograd.grad(total, [*wanted, *wanted_bias])
    return [total.detach(), losses.detach(), gradients[: len(wanted)], gradients[len(wanted) :]]


def assert_same(got: list[Any], expected: list[Any]) -> None:
    flat = [[y for x in result for y in (x if isinstance(x, list) else [x])] for result in (got, expected)]
    assert all(torch.equal(x, y) for x, y in zip(*flat, strict=True))


def assert_one_pass(sample: dict[str, Any], donate: bool = False, **options: Any) -> None:
    got = one_pass(sample, donate=donate, **options)
    exact, eager = one_pass_by_reference(widened(sample), **options), one_pass_by_reference(sample, **options)
    got, eager, exact = ([x[0][None], x[1], *filter(len, x[2:])] for x in (got, eager, exact))
    assert_errors(got, eager, exact)


@pytest.mark.usefixtures("on_host")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_one_pass_on_the_host_agrees_with_the_reference(layout: str, dtype: torch.dtype) -> None:
    for i, info in enumerate([*INFO_MAPS, InfoMap("uniform", "none"), InfoMap("uniform", "none")]):
        if (i // 2 + (layout == "contiguous") + (dtype == torch.bfloat16)) % 2:
            continue  # half of the maps in each layout and dtype; each map in two of the four
        options = {"info": info, "penalty": PENALTIES[i % 3], "beta": 0.5, "divisor": DIVISORS[i % 3]}
        sample = levels(dtype, layout, seed=i, shapes=ONE_PASS_SHAPES[layout][i % 2 :])
        assert_one_pass(sample, factor=(1, 0.3)[i % 2], donate=i % 3 == 0, **options)


@pytest.mark.usefixtures("on_host")
def test_one_pass_where_gradients_are_not_wanted() -> None:
    for layout in ("contiguous", "channels_last"):
        sample = levels(torch.bfloat16, layout, shapes=ONE_PASS_SHAPES[layout])
        for info in (InfoMap("uniform", "none"), resolve("energy")):
            options = {**DEFAULTS, "info": info, "divisor": "map"}
            assert_one_pass(sample, skip=(1, 2, 5), bias_skip=(2, 3), **options)


@pytest.mark.usefixtures("on_host")
def test_one_pass_of_tiles_of_several_steps() -> None:
    """In NCHW packs end at the end of their channel, or do not, or have one element each."""
    options = {**DEFAULTS, "info": InfoMap("uniform", "none")}
    for layout, shapes in (
        ("contiguous", [(512, 8, 17, 32), (512, 8, 3, 179), (512, 5, 15, 15)]),
        ("channels_last", [(512, 8, 17, 32), (512, 5, 15, 15)]),
    ):
        for shape in shapes:
            assert_one_pass(levels(layout=layout, shapes=[shape, (1, 8, 3, 3)]), **options)


@pytest.mark.usefixtures("on_host")
def test_one_pass_of_more_levels_than_a_launch_takes_and_of_levels_without_elements() -> None:
    shapes = [(1 + i % 3, 1 + i, 3, 2 + i) for i in range(29)]
    assert_one_pass(levels(shapes=shapes), **{**DEFAULTS, "divisor": "map"})
    for shapes in ([(0, 8, 4, 4), (2, 8, 4, 4), (2, 8, 0, 4)], [(0, 8, 4, 4), (2, 8, 4, 0)]):
        total, losses, _, bias = one_pass(levels(shapes=shapes), **DEFAULTS)
        assert losses[0] == losses[-1] == 0
        assert total == losses.sum()
        assert (losses.sum() > 0) == (len(shapes) == 3)
        assert [x.any().item() for x in bias] == [x > 0 for x in losses[1:]]


@pytest.mark.usefixtures("on_host")
def test_one_pass_of_memory_that_is_not_aligned() -> None:
    sample = levels(torch.bfloat16, shapes=[(2, 16, 4, 8), (2, 16, 4, 4)])
    options = {**DEFAULTS, "info": InfoMap("uniform", "none")}
    aligned = one_pass(sample, **options)
    sample["prior"][0] = torch.cat([torch.zeros(1), sample["prior"][0].flatten()])[1:].view(2, 4, 8)
    assert_same(one_pass(sample, **options)[2:], aligned[2:])
    teacher = sample["teacher_feats"][0]
    sample["teacher_feats"][0] = torch.cat([teacher.new_zeros(3), teacher.flatten()])[3:].view(teacher.shape)
    assert_one_pass(sample, **options)


@pytest.mark.usefixtures("on_host")
def test_one_pass_where_student_and_teacher_agree_is_zero() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        sample = levels(dtype, shapes=[(2, 16, 4, 8), (2, 16, 13, 13)])
        sample["teacher_feats"] = [x.detach().clone() for x in sample["student_feats"]]
        sample["standardize"] = [None, None]
        total, losses, gradients, _ = one_pass(sample, **DEFAULTS)
        assert not any(x.any() for x in (total, losses, *gradients))


@pytest.mark.usefixtures("on_host")
def test_one_pass_gives_the_same_bits_in_any_order_of_blocks_and_threads() -> None:
    for layout in ("contiguous", "channels_last"):
        sample = levels(torch.bfloat16, layout, shapes=[(5, 40, 13, 13), (3, 64, 24, 24)])
        for info in (InfoMap("uniform", "none"), InfoMap("energy", "softmax")):
            first = one_pass(sample, **{**DEFAULTS, "info": info})
            for _ in range(3):
                assert_same(one_pass(sample, **{**DEFAULTS, "info": info}), first)


@pytest.mark.usefixtures("on_host")
def test_one_pass_refuses_what_python_must_not_pass() -> None:
    for dtype, layout, message in (
        (torch.float16, "contiguous", "must be bfloat16 or float32"),
        (torch.float64, "contiguous", "must be bfloat16 or float32"),
        (torch.float32, "cropped", "must be dense"),
        (torch.float32, "teacher_channels_last", "must be dense"),
    ):
        with pytest.raises(RuntimeError, match=message):
            one_pass(levels(dtype, layout), **DEFAULTS)
    with pytest.raises(RuntimeError, match="all ranks"):
        one_pass(levels(), **{**DEFAULTS, "divisor": "map_all_ranks"})


@pytest.mark.usefixtures("on_host")
def test_rescale_on_the_host() -> None:
    rescale = torch.ops.fastkd_on_host.distill_cpp_rescale
    generator = torch.Generator().manual_seed(0)

    def gradients() -> list[Tensor]:
        sizes = [(2, 16, 4, 8), (3, 7, 5, 3), (0, 4, 4, 4), (2, 64, 26, 26)]
        dense = [torch.randn(s, generator=generator).bfloat16() for s in sizes]
        dense[3] = dense[3].to(memory_format=torch.channels_last)
        unaligned = torch.randn(40, generator=generator)[3:]
        return [
            *dense,
            torch.randn(16, generator=generator),
            torch.randn(7, generator=generator),
            torch.empty(0),
            unaligned,
        ]

    for upstream in (torch.tensor(0.3), torch.tensor(1.0), torch.tensor([0.3, 1, 2, -4]), torch.tensor(3.0).expand(4),
                     torch.tensor([0.3, 1, 2, -4]).double()):  # fmt: skip
        for count in (4, 8):
            got = gradients()[:count]
            of = upstream if upstream.dim() else upstream.expand(4)
            expected = [(x.float() * of[i % 4].float()).to(x.dtype) for i, x in enumerate(got)]
            rescale(upstream, got)
            assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))
    many = [torch.ones(3) for _ in range(150)]  # more than one launch can take
    rescale(torch.arange(75.0), many)
    assert [x.unique().item() for x in many] == [*range(75)] * 2
    with pytest.raises(RuntimeError, match="must be dense"):
        rescale(torch.tensor(2.0), [torch.ones(4, 4)[:, 1:]])


# ---- in the extension ----


@built
def test_the_extension_with_cuda_kernels_loads_under_any_torch() -> None:
    for name in ("distill_cpp", "distill_cpp_backward", "distill_cpp_one_pass"):
        for device in ("CPU", "CUDA"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastkd::{name}", device)
    assert torch._C._dispatch_has_kernel_for_dispatch_key("fastkd::distill_cpp_rescale", "CUDA")


@built
def test_the_cuda_kernels_refuse_cpu_tensors() -> None:
    tensors = arguments(levels())
    on_cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    with pytest.raises(RuntimeError, match="not on a CUDA device"):
        torch.ops.fastkd.distill_cpp.default.redispatch(on_cuda, *tensors, *codes(**DEFAULTS))


def test_a_compiled_graph_takes_the_card_as_constant() -> None:
    def marked() -> None: ...

    torch.compiler.assume_constant_result(marked)
    assert vars(marked).items() <= vars(backends._capability).items()


def test_a_build_that_lacks_kernels_for_a_card_says_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda:0")
    monkeypatch.setitem(backends._unavailable, "cpp", None)
    monkeypatch.setattr(backends, "_cuda_archs", [])
    with pytest.raises(RuntimeError, match=r"'cpp': is built without its CUDA kernels; build it .*pip"):
        backends.choose("cpp", cuda, torch.float32)
    monkeypatch.setattr(backends, "_cuda_archs", [80, 90])
    for card, works in ((75, False), (80, True), (86, True), (90, True), (100, True)):
        monkeypatch.setattr(backends, "_capability", lambda device, card=card: card)
        assert (backends.choose(None, cuda, torch.float64) == "cpp") == works
        if works:
            assert backends.choose("cpp", cuda, torch.float32) == "cpp"
        else:
            with pytest.raises(RuntimeError, match=r"sm_80, sm_90, but cuda:0 is sm_75; .*FASTKD_CUDA_ARCH=75 pip"):
                backends.choose("cpp", cuda, torch.float32)
    monkeypatch.setattr(backends, "_cuda_archs", [80, 100])
    monkeypatch.setattr(
        backends, "_capability", lambda device: 90
    )  # code for 80 does not run on 90, nor does PTX for 100
    assert backends.choose(None, cuda, torch.float64) == "reference"
