"""The kernels of the small ops, in C++ and in CUDA compiled for the host, against the plain PyTorch formulas."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from samples import compiled_for_host
from torch import Tensor
from workloads import Dispatched

import fastkd.priors
from fastkd.ops import factor, prior_ops

OPS = {
    "iou_mask": prior_ops.IOU_MASK,
    "box_balance": prior_ops.BOX_BALANCE,
    "prior_sums": prior_ops.PRIOR_SUMS,
    "update_factor": factor.UPDATE_FACTOR,
}
PLAIN = {
    "iou_mask": prior_ops.plain_iou_mask,
    "box_balance": prior_ops.plain_box_balance,
    "prior_sums": prior_ops.plain_prior_sums,
    "update_factor": factor.plain_update_factor,
}
Run = Callable[..., Any]


@pytest.fixture(scope="module")
def on_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """The CUDA kernels compiled for the host, where fibers replace the threads of a block."""
    library = compiled_for_host("small_ops.cpp", tmp_path_factory.mktemp("on_host"))
    definitions = torch.library.Library("fastkd_small_on_host", "DEF")
    for name, schema in OPS.items():
        definitions.define(name + " ".join(schema.split()))
    torch.ops.load_library(library)
    yield lambda name, *arguments: getattr(torch.ops.fastkd_small_on_host, name)(*arguments)
    del definitions  # the ops exist as long as it does


@pytest.fixture(params=["cpp", "cuda on the host", "plain"])
def run(request: pytest.FixtureRequest) -> Run:
    """Return a function that calls an op by name."""
    if request.param == "cuda on the host":
        return request.getfixturevalue("on_host")
    if request.param == "plain":
        return lambda name, *arguments: PLAIN[name](*arguments)
    if not torch._C._dispatch_has_kernel_for_dispatch_key("fastkd::iou_mask", "CPU"):
        pytest.skip("the extension is not built")
    return lambda name, *arguments: getattr(torch.ops.fastkd, name)(*arguments)


# ---- priors from boxes ----

IMAGE = (96, 128)
SIZES = [(12, 16), (6, 8), (1, 1), (3, 50), (37, 2), (11, 13)]  # one tile of a block, several, and parts of one


def random_boxes(count: int, images: int, seed: int = 0) -> Tensor:
    """Return boxes: some reach beyond the image's edges, some are inverted, every seventh is padding."""
    u = torch.rand(count, 5, generator=torch.Generator().manual_seed(seed))
    corner = u[:, 1:3] * torch.tensor([140.0, 110.0]) - 10
    size = u[:, 3:].square() * 90 - 1
    boxes = torch.cat([(u[:, :1] * images).floor(), corner, corner + size], 1)
    boxes[::7] = 0
    boxes[1::9] = boxes[1::9].round()
    return boxes


def random_anchors(count: int, levels: int = len(SIZES), seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [4 * (torch.rand(count, 2, generator=generator) * 3).exp() for _ in range(levels)]


def flat(sizes: list[tuple[int, int]]) -> list[int]:
    return [side for size in sizes for side in size]


def assert_same_maps(run: Run, name: str, *arguments: Any) -> None:
    """Check that maps have the same bits, and that sums differ only by rounding, and not between two runs."""
    maps, sums = run(name, *arguments)
    expected, expected_sums = PLAIN[name](*arguments)
    assert maps.dtype == torch.float32
    assert sums.dtype == torch.float64
    assert torch.equal(maps, expected)
    torch.testing.assert_close(sums, expected_sums, rtol=1e-14, atol=0)
    again = run(name, *arguments)
    assert torch.equal(again[0], maps)
    assert torch.equal(again[1], sums)


@pytest.mark.parametrize("graded", [True, False])
@pytest.mark.parametrize(("boxes", "anchors"), [(0, 3), (9, 1), (60, 3), (600, 2), (30, 40)])
def test_iou_mask_has_the_plain_formulas_bits(run: Run, boxes: int, anchors: int, graded: bool) -> None:
    tensors = random_boxes(boxes, 3), random_anchors(anchors)
    assert_same_maps(run, "iou_mask", *tensors, flat(SIZES), *IMAGE, 3, 0.5, graded)


@pytest.mark.parametrize("inclusive", [True, False])
@pytest.mark.parametrize("boxes", [0, 9, 60, 600])
def test_box_balance_has_the_plain_formulas_bits(run: Run, boxes: int, inclusive: bool) -> None:
    assert_same_maps(run, "box_balance", random_boxes(boxes, 3), flat(SIZES), *IMAGE, 3, 0.5, inclusive)


def test_dtypes_may_differ_and_more_levels_than_a_launch_takes(run: Run) -> None:
    sizes = [(1 + i % 5, 2 + i % 7) for i in range(70)]
    anchors = [x.double() if i % 2 else x for i, x in enumerate(random_anchors(2, levels=70))]
    for boxes in (random_boxes(12, 2), random_boxes(12, 2).double()):
        for graded in (True, False):
            assert_same_maps(run, "iou_mask", boxes, anchors, flat(sizes), *IMAGE, 2, 0.4, graded)
        assert_same_maps(run, "box_balance", boxes, flat(sizes), *IMAGE, 2, 1.0, False)


def test_no_images_and_no_levels(run: Run) -> None:
    for boxes in (random_boxes(0, 1), random_boxes(5, 1) + float("nan")):
        maps, sums = run("iou_mask", boxes, random_anchors(1), flat(SIZES), *IMAGE, 0, 0.5, True)
        assert maps.numel() == 0
        assert sums.tolist() == [0] * len(SIZES)
        maps, sums = run("iou_mask", boxes, [], [], *IMAGE, 2, 0.5, True)
        assert maps.numel() == sums.numel() == 0


def test_the_cuda_kernels_ignore_a_wrong_image_index_and_an_unusable_anchor(on_host: Run) -> None:
    good, anchors = random_boxes(20, 2), random_anchors(2, levels=1)
    wrong = torch.tensor([[i, 0.0, 0, 90, 90] for i in (2, -1, 0.5, 1e30, math.nan, math.inf)])
    unusable = [torch.tensor([[x, x] for x in (math.nan, math.inf, -5.0, 0.0)] + anchors[0].tolist())]
    for graded in (True, False):
        rest = ([9, 12], *IMAGE, 2, 0.5, graded)
        expected = on_host("iou_mask", good, anchors, *rest)[0]
        assert torch.equal(on_host("iou_mask", torch.cat([wrong, good, wrong]), unusable, *rest)[0], expected)
    rest = ([9, 12], *IMAGE, 2, 0.5, False)
    expected = on_host("box_balance", good, *rest)[0]
    assert torch.equal(on_host("box_balance", torch.cat([wrong, good, wrong]), *rest)[0], expected)


@pytest.mark.parametrize("anchors", [torch.ones(5, 3, 2), [torch.ones(3, 2)] * 5], ids=["one tensor", "a list"])
def test_a_prior_is_one_operation(anchors: Any) -> None:
    sizes, boxes = [(52, 52), (26, 26), (13, 13), (26, 26), (13, 13)], random_boxes(20, 2)
    for prior in (
        lambda: fastkd.priors.iou_mask(boxes, anchors, sizes, (416, 416), 2),
        lambda: fastkd.priors.iou_mask(boxes, anchors, sizes, (416, 416), 2, graded=True),
        lambda: fastkd.priors.box_balance(boxes, sizes, (416, 416), 2),
    ):
        with Dispatched() as dispatched:
            prior()
        assert dispatched.total <= 2


# ---- sums of priors ----


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_prior_sums_adds_up_what_is_there_and_counts_cells_where_nothing_is(run: Run, dtype: torch.dtype) -> None:
    shapes = [(2, 13, 13), (0,), (1, 1, 1), (3, 52, 53), (16, 40, 90), (0,), (1, 1, 7)]
    prior = [(torch.rand(s, generator=torch.Generator().manual_seed(i)) + 0.1).to(dtype) for i, s in enumerate(shapes)]
    cells = [max(math.prod(s), 42) for s in shapes]
    sums, minima = run("prior_sums", prior, cells)
    assert sums.dtype == torch.float64
    expected = [x.double().sum().item() if x.numel() else 42 for x in prior]
    assert sums.tolist() == pytest.approx(expected, rel=1e-13)
    assert torch.equal(run("prior_sums", prior, cells)[0], sums)
    least = [x.double().min().item() if x.numel() else 1 for x in prior]
    assert minima.tolist() in (least, [0 if x.numel() else 1 for x in prior])
    assert run("prior_sums", [prior[1]], [42]).tolist() == [[42], [1]]


def test_prior_sums_of_many_levels_of_all_dtypes(run: Run) -> None:
    dtypes = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
    prior = [torch.full((i,), i / 4).to(dtypes[i % 4]) for i in range(70)]
    assert run("prior_sums", prior, [5] * 70)[0].tolist() == [5, *(i * i / 4 for i in range(1, 70))]


# ---- the factor ----


class Weight:
    """The state of a factor, and the formula of a step."""

    def __init__(self, weight: float = factor.AUTO, share: float = 1.0, **schedule: int) -> None:
        self.factor, self.averages = torch.zeros(()), torch.zeros(3)
        self.step = torch.zeros((), dtype=torch.int64)
        self.weight, self.share = weight, share
        self.schedule = {"warmup_steps": 0, "decay": 0, "stop_step": -1, **schedule}

    def update(self, run: Run, losses: Tensor, task: Tensor, advance: int = 1) -> float:
        state = self.factor, self.averages, self.step
        run("update_factor", *state, losses, task, self.weight, self.share, *self.schedule.values(), advance)
        return self.factor.item()

    def expected(self, pairs: list[tuple[float, float]], step: int) -> float:
        warmup, decay, stop = self.schedule.values()
        ramp = min((step + 1) / max(warmup, 1), 1)
        if stop >= 0:
            past = min(max((step - warmup) / max(stop - warmup, 1), 0), 1)
            ramp *= [1, 1 - past, (1 + math.cos(math.pi * past)) / 2][decay] if step < stop else 0
        if self.weight >= 0:
            return ramp * self.weight
        n = task = loss = 0.0
        for d, t in pairs:
            keep = min(1, 49 / n) if n else 1
            n, task, loss = n * keep + 1, task * keep + abs(t), loss * keep + abs(d)
        return ramp * (min(self.share * task / loss, 1e12) if loss > 0 else 0)


NONE = torch.empty(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "schedule",
    [{}, {"warmup_steps": 10}, {"warmup_steps": 5, "decay": 1, "stop_step": 60},
     {"warmup_steps": 5, "decay": 2, "stop_step": 60}, {"stop_step": 3}, {"warmup_steps": 8, "stop_step": 4}],
)  # fmt: skip
@pytest.mark.parametrize("weight", [factor.AUTO, 2.5, 0.0])
def test_the_factor_follows_its_formula_step_by_step(
    run: Run, weight: float, schedule: dict[str, int], dtype: torch.dtype
) -> None:
    state, pairs = Weight(weight, 0.5, **schedule), []
    generator = torch.Generator().manual_seed(3)
    for step in range(70):
        losses = torch.rand(5, generator=generator).to(dtype)
        task = (-1) ** (step // 3) * (1 + torch.rand((), generator=generator))
        task = task.to([torch.float16, torch.bfloat16, dtype][step % 3])
        pairs.append((losses.double().sum().item(), task.item()))
        assert state.update(run, losses, task) == pytest.approx(state.expected(pairs, step + 1), rel=1e-5, abs=1e-12)
    assert state.step.item() == 70
    assert state.averages[0].item() == (50 if weight < 0 else 0)


def test_a_step_that_is_not_finite_counts_for_nothing(run: Run) -> None:
    state = Weight()
    assert state.update(run, torch.tensor([2.0]), torch.tensor(3.0)) == 1.5
    before = state.averages.clone()
    bad = [(math.nan, 1.0), (1.0, math.inf), (math.inf, math.nan), (-math.inf, 1.0), (1e300, 1.0)]
    for loss, task in bad:
        assert state.update(run, torch.tensor([loss, 1.0]).double(), torch.tensor(task).double()) == 1.5
        assert torch.equal(state.averages, before)
    assert state.step.item() == 1 + len(bad)


def test_without_losses_or_advance_only_the_factor_is_set(run: Run) -> None:
    state = Weight(warmup_steps=4)
    assert state.update(run, NONE, NONE, advance=0) == 0  # no step yet
    assert state.update(run, torch.tensor([1.0, 1.0]), torch.tensor([[4.0]])) == 2 * 2 / 4
    assert state.update(run, NONE, NONE, advance=0) == 2 * 2 / 4
    assert state.update(run, NONE, NONE, advance=1) == 2 * 3 / 4
    assert state.averages.tolist() == [1, 4, 2]


def test_a_balanced_weight_stays_finite(run: Run) -> None:
    tiny, zero = Weight(), Weight()
    assert tiny.update(run, torch.tensor([1e-30]), torch.tensor(1.0)) == pytest.approx(factor.MAX_AUTO_WEIGHT)
    assert zero.update(run, torch.tensor([0.0]), torch.tensor(1.0)) == 0


def test_a_loss_below_zero_is_balanced_by_its_magnitude(run: Run) -> None:
    """The task loss is a likelihood, also when its sign changes; or the weight of a level is negative."""
    for task, loss in ((-3.0, 2.0), (3.0, -2.0), (-3.0, -2.0)):
        state = Weight()
        for sign in (1, -1, 1):
            assert state.update(run, torch.tensor([loss, 0.0]), torch.tensor(sign * task)) == 1.5


def test_losses_with_a_gradient_leave_none_on_the_factor() -> None:
    state = Weight()
    losses, task = torch.ones(2, requires_grad=True), torch.ones((), requires_grad=True)
    state.update(lambda name, *arguments: getattr(torch.ops.fastkd, name)(*arguments), losses * 2, task * 3)
    assert not state.factor.requires_grad
    assert not state.averages.requires_grad
    assert state.factor.item() == 0.75


def test_the_ops_refuse_what_they_cannot_read() -> None:
    boxes, anchors = random_boxes(5, 1), random_anchors(1)
    for bad in (
        lambda: torch.ops.fastkd.prior_sums([torch.ones(4, 4).t()[:2]], [8]),
        lambda: torch.ops.fastkd.iou_mask(boxes, anchors[:1], flat(SIZES), *IMAGE, 1, 0.5, True),
        lambda: torch.ops.fastkd.iou_mask(boxes[:, :4].contiguous(), anchors, flat(SIZES), *IMAGE, 1, 0.5, True),
        lambda: Weight().update(lambda name, *x: torch.ops.fastkd.update_factor(*x), torch.ones(2), NONE),
    ):
        if torch._C._dispatch_has_kernel_for_dispatch_key("fastkd::iou_mask", "CPU"):
            with pytest.raises(RuntimeError):
                bad()
