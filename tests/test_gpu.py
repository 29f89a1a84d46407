"""Tests that need a GPU: streams, graphs, loss scaling, memory, two cards, the same bits under load."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from samples import TARGETS, assert_same_bits, learning, levels, loss_of, step, with_bias
from torch import Tensor, nn

import fastkd

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.parametrize("backend", [x for x in TARGETS if x.endswith("cuda")], indirect=True),
]

WIDE = [(8, 256, 52, 52), (8, 512, 26, 26), (8, 1024, 13, 13)]
SMALL = [(4, 64, 13, 13), (4, 32, 26, 26)]
# each way to a gradient: known weights, weights by a score pass, the score of channels; and two passes
WAYS: dict[str, dict[str, Any]] = {
    "streamed": {"info_map": "graded_iou"},
    "scored": {"info_map": "attention"},
    "by_entropy": {"info_map": fastkd.InfoMap("entropy", "minmax")},
    "two_passes": {"info_map": "attention", "one_pass": False},
}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> dict[str, Any]:
    return WAYS[request.param]


def tensors(sample: dict[str, Any]) -> list[Tensor]:
    """Return all tensors of a sample that a step reads, in a fixed order."""
    small = [x for x in sample["prior"] if x is not None]
    return [*learning(sample), *sample["teacher_feats"], *small]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_same_bits_in_twenty_runs(backend: str, way: dict[str, Any], layout: str) -> None:
    sample = with_bias(levels(torch.bfloat16, layout, shapes=WIDE))
    first = step(sample, 3.0, backend=backend, **way)
    for _ in range(20):
        assert_same_bits(step(sample, 3.0, backend=backend, **way), first)


def test_the_same_bits_under_load(backend: str, way: dict[str, Any]) -> None:
    sample = with_bias(levels(torch.bfloat16, shapes=WIDE))
    first = step(sample, backend=backend, **way)
    matrix, stream = torch.randn(4096, 4096), torch.cuda.Stream()
    for _ in range(20):
        with torch.cuda.stream(stream):  # occupies SMs, so that blocks run in another order
            for _ in range(4):
                matrix @ matrix
        assert_same_bits(step(sample, backend=backend, **way), first)
    torch.cuda.synchronize()


def test_a_side_stream(backend: str, way: dict[str, Any]) -> None:
    sample = with_bias(levels(shapes=[(8, 64, 40, 40)] * 2))
    expected = step(sample, 3.0, backend=backend, **way)
    values = [x.detach().clone() for x in tensors(sample)]
    for x in tensors(sample):
        x.data.zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # a kernel on another stream would not wait for the next copy, and read zeros
        for x, value in zip(tensors(sample), values, strict=True):
            x.data.copy_(value)
        got = step(sample, 3.0, backend=backend, **way)
    stream.synchronize()
    assert_same_bits(got, expected)


def test_a_cuda_graph_captures_and_replays(backend: str, way: dict[str, Any]) -> None:
    """Each replay has another factor and another upstream gradient."""
    sample = with_bias(levels(shapes=SMALL))
    factor, upstream = torch.tensor(1.0), torch.tensor(1.0)

    def run() -> list[Tensor]:
        loss = loss_of(sample, factor, backend=backend, **way)
        return [loss.detach(), *torch.autograd.grad(loss, learning(sample), upstream)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # warm-up, as torch.cuda.graph requires
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for seed, (f, u) in enumerate([(1.0, 1.0), (0.5, 3.0), (2.0, 1.0)]):  # a replay must not affect the next one
        for x, y in zip(tensors(sample), tensors(with_bias(levels(shapes=SMALL, seed=seed))), strict=True):
            x.data.copy_(y.detach())
        factor.fill_(f)
        upstream.fill_(u)
        graph.replay()
        expected = run()
        torch.cuda.synchronize()
        assert_same_bits(captured, expected)


def test_no_step_waits_for_the_device(backend: str, way: dict[str, Any]) -> None:
    sample = with_bias(levels(shapes=SMALL))
    info_map, upstream = way["info_map"], torch.tensor(3.0)
    options: dict[str, Any] = {"weight": "auto", "warmup_steps": 9, "calibration_batches": 1, "backend": backend}
    criterion = fastkd.DistillLoss([64, 32], [64, 32], info_map=info_map, **options).to("cuda")
    student, teacher, prior = sample["student_feats"], sample["teacher_feats"], sample["prior"]
    task_loss = torch.tensor(2.0)

    def run() -> None:
        torch.autograd.grad(loss_of(sample, backend=backend, **way), learning(sample), upstream)
        torch.autograd.grad(criterion(student, teacher, prior, task_loss), student, upstream)

    for _ in range(2):
        run()
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    torch.cuda._sleep(1_000_000_000)  # half a second
    done.record()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not done.query(), "the step came back only after the device had done what came before it"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_loss_scaling_trains_as_float32_does(backend: str, dtype: torch.dtype) -> None:
    def train(scaled: bool) -> tuple[nn.Module, float]:
        torch.manual_seed(0)
        student, teacher = nn.Conv2d(3, 32, 3), nn.Conv2d(3, 32, 3).requires_grad_(False)
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**24, enabled=scaled)  # too high: first steps are skipped
        optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
        images = torch.randn(4, 3, 16, 16)
        taken = 0
        while taken < 10:
            with torch.autocast("cuda", dtype=dtype, enabled=scaled):
                loss = fastkd.distill_loss([student(images)], [teacher(images)], backend=backend)
            scaler.scale(loss).backward()
            before = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            taken += scaler.get_scale() >= before
            optimizer.zero_grad()
        return student, loss.item()

    scaled, loss = train(scaled=True)
    plain, expected = train(scaled=False)
    tolerance = 0.02 if dtype == torch.float16 else 0.1
    assert loss == pytest.approx(expected, rel=tolerance)
    torch.testing.assert_close(scaled.weight, plain.weight, rtol=tolerance, atol=tolerance / 10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_memory_is_the_gradient_and_the_map(backend: str, dtype: torch.dtype, way: dict[str, Any]) -> None:
    sample = with_bias(levels(dtype, "channels_last", shapes=WIDE))
    student, upstream = sample["student_feats"], torch.tensor(3.0)
    cells = sum(x.shape[0] * x.shape[2] * x.shape[3] for x in student)
    gradient = sum(x.numel() * x.element_size() for x in student)

    def run() -> None:
        torch.autograd.grad(loss_of(sample, backend=backend, **way), student, upstream)

    run()
    gc.collect()  # memory of earlier tests, which would be freed during the measurement
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    run()
    peak = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
    assert gradient <= peak <= gradient + 20 * cells + 2**18  # maps in float32, score and distance in float64


def test_two_cards(backend: str, way: dict[str, Any]) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    with torch.device("cuda:0"):
        expected = step(with_bias(levels(shapes=SMALL)), 3.0, backend=backend, **way)
    with torch.device("cuda:1"):  # while cuda:0 is the current device
        got = step(with_bias(levels(shapes=SMALL)), 3.0, backend=backend, **way)
    assert_same_bits([x.cpu() for x in got], [x.cpu() for x in expected])


def test_tensors_on_two_devices_are_an_error_of_the_function_and_of_the_op(backend: str) -> None:
    s = torch.randn(1, 2, 3, 3, requires_grad=True)
    for bad in ({"teacher_feats": [s.detach().cpu()]}, {"prior": [torch.rand(1, 3, 3, device="cpu")]}):
        with pytest.raises(ValueError, match=r"\[0\]: expected the student's device cuda:0, got cpu"):
            fastkd.distill_loss(**{"student_feats": [s], "teacher_feats": [s.detach()], **bad}, backend=backend)
    none = [torch.empty(0)]
    op = getattr(torch.ops.fastkd, f"distill_{backend}")
    with pytest.raises(RuntimeError, match="on the device of the first student feature"):
        op([s.detach()], [s.detach().cpu()], none, none, none, none, [1.0], 0, 0, 1.0, 0, 1.0, 0)
