"""What only a GPU can show: streams, graphs, loss scaling, memory, two cards, the same bits under load."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from samples import TARGETS, levels, loss_and_gradients
from torch import Tensor, nn

import fastkd
from fastkd import ops

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.parametrize("backend", [x for x in TARGETS if x.endswith("cuda")], indirect=True),
]

WIDE = [(8, 256, 52, 52), (8, 512, 26, 26), (8, 1024, 13, 13)]
SMALL = [(4, 64, 13, 13), (4, 32, 26, 26)]


def step(sample: dict[str, Any], backend: str, one_pass: bool = False, info_map: Any = "attention") -> list[Tensor]:
    loss = fastkd.distill_loss(**sample, info_map=info_map, reduction="none", backend=backend, one_pass=one_pass)
    return loss_and_gradients(loss, sample["student_feats"])


@pytest.fixture(params=[False, True], ids=["two_passes", "one_pass"])
def one_pass(request: pytest.FixtureRequest, backend: str) -> bool:
    if request.param and (backend, "cuda") not in ops._has_one_pass:
        pytest.skip("has no one-pass kernels")
    return bool(request.param)


def assert_same(got: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


def features(sample: dict[str, Any]) -> list[Tensor]:
    return [*sample["student_feats"], *sample["teacher_feats"]]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_same_bits_in_twenty_runs(backend: str, one_pass: bool, layout: str) -> None:
    for info_map in ("attention", fastkd.InfoMap("entropy", "minmax")):
        sample = levels(torch.bfloat16, layout, shapes=WIDE)
        step(sample, backend, one_pass, info_map)  # after which one pass knows its upstream gradient
        first = step(sample, backend, one_pass, info_map)
        for _ in range(20):
            assert_same(step(sample, backend, one_pass, info_map), first)


def test_the_same_bits_under_load(backend: str, one_pass: bool) -> None:
    sample = levels(torch.bfloat16, shapes=WIDE)
    step(sample, backend, one_pass)
    first = step(sample, backend, one_pass)
    matrix, stream = torch.randn(4096, 4096), torch.cuda.Stream()
    for _ in range(20):
        with torch.cuda.stream(stream):  # takes SMs away, so that programs run in another order
            for _ in range(4):
                matrix @ matrix
        assert_same(step(sample, backend, one_pass), first)
    torch.cuda.synchronize()


def test_a_side_stream(backend: str, one_pass: bool) -> None:
    sample = levels(shapes=[(8, 64, 40, 40)])
    expected = step(sample, backend, one_pass)
    values = [x.detach().clone() for x in features(sample)]
    for x in features(sample):
        x.data.zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # a kernel on another stream would not wait for what follows, and see zeros
        for x, value in zip(features(sample), values, strict=True):
            x.data.copy_(value)
        got = step(sample, backend, one_pass)
    stream.synchronize()
    assert_same(got, expected)


def test_a_cuda_graph_captures_and_replays(backend: str, one_pass: bool) -> None:
    sample = levels(shapes=SMALL)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # warm-up, as torch.cuda.graph asks
        step(sample, backend, one_pass)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(sample, backend, one_pass)
    for seed in range(3):  # what a replay leaves behind must not enter the next
        for x, y in zip(features(sample), features(levels(shapes=SMALL, seed=seed)), strict=True):
            x.data.copy_(y.detach())
        graph.replay()
        expected = step(sample, backend, one_pass)
        torch.cuda.synchronize()
        assert_same(captured, expected)


def test_no_step_waits_for_the_device(backend: str, one_pass: bool) -> None:
    sample = levels(shapes=SMALL)
    step(sample, backend, one_pass)
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    torch.cuda._sleep(1_000_000_000)  # half a second
    done.record()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(sample, backend, one_pass)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not done.query(), "the step came back only after the device had done what came before it"


def test_loss_scaling_in_float16_trains_as_float32_does(backend: str, one_pass: bool) -> None:
    def train(half: bool) -> tuple[nn.Module, float]:
        torch.manual_seed(0)
        student, teacher = nn.Conv2d(3, 32, 3), nn.Conv2d(3, 32, 3).requires_grad_(False)
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**24, enabled=half)  # too high: first steps are skipped
        optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
        images = torch.randn(4, 3, 16, 16)
        taken = 0
        while taken < 10:
            with torch.autocast("cuda", dtype=torch.float16, enabled=half):
                loss = fastkd.distill_loss([student(images)], [teacher(images)], backend=backend, one_pass=one_pass)
            scaler.scale(loss).backward()
            before = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            taken += scaler.get_scale() >= before
            optimizer.zero_grad()
        return student, loss.item()

    scaled, loss = train(half=True)
    plain, expected = train(half=False)
    assert loss == pytest.approx(expected, rel=0.02)
    torch.testing.assert_close(scaled.weight, plain.weight, rtol=0.02, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_memory_is_the_gradient_and_the_map(backend: str, dtype: torch.dtype) -> None:
    sample = levels(dtype, "channels_last", shapes=WIDE)
    student = sample["student_feats"]
    cells = sum(x.shape[0] * x.shape[2] * x.shape[3] for x in student)
    gradient = sum(x.numel() * x.element_size() for x in student)
    torch.autograd.grad(fastkd.distill_loss(**sample, backend=backend), student)
    gc.collect()  # what earlier tests left, which would go while it is measured
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    torch.autograd.grad(fastkd.distill_loss(**sample, backend=backend), student)
    peak = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
    assert gradient <= peak <= gradient + 20 * cells + 2**16  # maps in float32, score and distance in float64


def test_two_cards(backend: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    with torch.device("cuda:0"):
        expected = step(levels(shapes=SMALL), backend)
    with torch.device("cuda:1"):  # while cuda:0 is the current one
        other = levels(shapes=SMALL)
        got = step(other, backend)
    assert_same([x.cpu() for x in got], [x.cpu() for x in expected])
    with pytest.raises(ValueError, match=r"teacher_feats\[0\]: expected the student's device cuda:0, got cuda:1"):
        fastkd.distill_loss([x.cuda(0) for x in other["student_feats"]], other["teacher_feats"], backend=backend)


def test_tensors_on_two_devices_are_an_error_of_the_op_too(backend: str) -> None:
    op = getattr(torch.ops.fastkd, f"distill_{backend}")
    s = torch.randn(1, 2, 3, 3)
    none = [torch.empty(0)]
    with pytest.raises(RuntimeError, match="on the device of the first student feature"):
        op([s], [s.cpu()], none, none, none, [1.0], 0, 0, 1.0, 0, 1.0, 0)
