"""Several ranks agree on the teacher's statistics, even if one of them used the distiller alone before."""

from __future__ import annotations

import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import CONTEXT
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.multiprocessing.spawn import start_processes
from torch.nn.parallel import DistributedDataParallel

from fastkd.distiller import Distiller
from fastkd.loss import DistillLoss


def net(width: int) -> nn.Module:
    torch.manual_seed(width)
    return nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())


def batch(number: int, rank: int) -> Tensor:
    """Return a rank's images; ranks differ in brightness, so that the statistics of one rank are not those of all."""
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(10 * number + rank)) + 3 * rank


CALIBRATING = ("no rank", "one rank")


def _rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=40)
    )
    for calibrating in CALIBRATING:
        _train(rank, folder, calibrating)
    _calibrate_with_an_empty_batch(rank)
    _join_uneven_ranks(rank)
    _see_a_part_of_the_batch(rank)
    torch.distributed.destroy_process_group()


def _look(distiller: Distiller, images: Tensor, optimizer: torch.optim.Optimizer, averaged: bool | None = True) -> None:
    """Use the distiller as one rank may do alone, while the other does something else."""
    report = distiller.check(images, optimizer, task_loss=1.0)
    assert report.ok
    assert next(check.ok for check in report.checks if check.name == "ranks") is averaged
    for training in (False, True):
        distiller.train(training)
        with torch.no_grad():
            distiller.student.module(images)
            assert distiller.loss(images, task_loss=1.0) > 0
    with pytest.raises(RuntimeError, match="calibrate: expected a call before the first training forward"):
        distiller.criterion.calibrate([torch.zeros(1, 8, 4, 4)])


def _train(rank: int, folder: str, calibrating: str) -> None:
    student, teacher = DistributedDataParallel(net(4)), DistributedDataParallel(net(8))
    teacher(batch(0, 0))
    options = {"weight": "auto", "divisor": "map_all_ranks", "calibration_batches": 2}
    distiller = Distiller(student, teacher, backbone=[("0", "0")], **options).prepare(batch(0, 0))
    optimizer = torch.optim.SGD([*student.parameters(), *distiller.parameters()], 0.01)
    if rank == 0:  # the other rank does not wait, and nothing waits for it
        assert distiller.check(batch(0, 0), optimizer, task_loss=1.0).ok
        distiller.student.module(batch(0, 0))
        with torch.no_grad():  # a validation before the first step
            assert distiller.loss(batch(0, 0), task_loss=1.0) > 0
        if calibrating == "one rank":
            distiller.calibrate([batch(9, 0)])
    parallel = DistributedDataParallel(distiller)
    for step in range(3):
        images = batch(step, rank)
        task = student(images).square().mean()
        (task + parallel(images, task_loss=task)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0:
            _look(distiller, batch(0, 0), optimizer)
    state = {**distiller.state_dict(), **student.state_dict()}
    state["batches"] = torch.tensor(distiller.criterion.get_extra_state()["batches_seen"])
    torch.save(
        {name: value for name, value in state.items() if isinstance(value, Tensor)}, f"{folder}/{calibrating} {rank}.pt"
    )


def _calibrate_with_an_empty_batch(rank: int) -> None:
    """A rank without images neither raises an error nor counts a step."""
    criterion = DistillLoss([4], [4], calibration_batches=1)
    student, teacher = torch.rand(2, 4, 3, 3, requires_grad=True), batch(0, 0)[:, :1].expand(2, 4, 16, 16)[..., :3, :3]
    images = slice(0, 2 - 2 * rank)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        criterion([student[images]], [teacher[images]]).backward()
    assert criterion.calibrated
    assert criterion.statistics[0].count == 18
    torch.testing.assert_close(criterion.statistics[0].mean, teacher.mean((0, 2, 3)))


class StudentAndLoss(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.student = net(4)
        self.distiller = Distiller(self.student, net(8), backbone=[("0", "0")], **options).prepare(batch(0, 0))

    def forward(self, images: Tensor) -> Tensor:
        task: Tensor = self.student(images).square().mean()
        return task + self.distiller.loss(images, task_loss=task)


def _join_uneven_ranks(rank: int) -> None:
    """Join lets a rank end before the others: an error names the cases where that is impossible."""
    sums = DistributedDataParallel(StudentAndLoss(weight="auto"))
    with Join([sums]), pytest.raises(RuntimeError, match=r"expected no Join .* each step sums over all ranks"):
        sums(batch(0, rank))
    student = DistributedDataParallel(net(4))
    distiller = Distiller(student, net(8), backbone=[("0", "0")]).prepare(batch(0, 0))
    parallel = DistributedDataParallel(distiller)
    with Join([student]):
        student(batch(0, rank))
        with pytest.raises(RuntimeError, match=r"expected no Join .* two DistributedDataParallel"):
            parallel(batch(0, rank))
    whole = DistributedDataParallel(StudentAndLoss(standardize=False))
    with Join([whole]):
        for step in range(1 + rank):
            whole(batch(step, rank)).backward()


def _see_a_part_of_the_batch(rank: int) -> None:
    """The ranks' teachers run in the same steps, and in the other steps DDP gets all gradients that it expects."""
    whole = DistributedDataParallel(StudentAndLoss(weight="auto", teacher_every=2, teacher_images=0.5))
    distiller = whole.module.distiller
    for step in range(4):
        whole(batch(step, rank)).backward()
        taught = [distiller.taught.start, distiller.criterion.loss_weight.factor.item()]
        gathered = [torch.zeros(2) for _ in range(2)]
        torch.distributed.all_gather(gathered, torch.tensor(taught, dtype=torch.float32))
        assert gathered[0].equal(gathered[1])
        assert taught[0] == step // 2


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    start_processes(_rank, args=(str(folder),), nprocs=2, start_method=CONTEXT.get_start_method())
    return folder


@pytest.mark.parametrize("calibrating", CALIBRATING)
def test_ranks_have_the_same_statistics_whoever_was_checked_or_calibrated_alone(
    calibrating: str, trained: Path
) -> None:
    first, second = (torch.load(trained / f"{calibrating} {rank}.pt") for rank in range(2))
    for name, value in first.items():
        if not name.startswith("module.1."):  # each rank has its own running statistics of the student's batch norms
            torch.testing.assert_close(second[name], value, rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")
    assert first["batches"] == 2

    seen = [batch(0, 0), batch(0, 1), *([batch(9, 0)] if calibrating == "one rank" else [batch(1, 0), batch(1, 1)])]
    with torch.no_grad():
        features = net(8)[0](torch.cat(seen))
    torch.testing.assert_close(first["criterion.statistics.0.mean"], features.mean((0, 2, 3)))
    variance = first["criterion.statistics.0.square"] / first["criterion.statistics.0.count"]
    torch.testing.assert_close(variance, features.var((0, 2, 3), correction=0))
