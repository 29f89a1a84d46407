"""Fewer passes of the teacher: the images that it sees, the mean of the loss, and the state of a run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from fastkd import Distiller
from fastkd.yolov3 import YOLOv3, YOLOv3Tiny
from fastkd.yolov3.train.objective import Objective


def net(width: int) -> nn.Sequential:
    torch.manual_seed(width)
    return nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, width, 3, 2, 1))


def images_of(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def distiller_of(**options: Any) -> Distiller:
    torch.manual_seed(0)
    pairs = {"backbone": [("0", "0"), ("2", "2")], "info_map": "energy"}
    return Distiller(net(4), net(8), **pairs, **options).prepare(images_of(2))


def seen(distiller: Distiller) -> list[Tensor]:
    """Return a list to which each pass of the teacher appends its images."""
    found: list[Tensor] = []
    distiller.teacher.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    return found


def step(distiller: Distiller, images: Tensor, **arguments: Any) -> float:
    distiller.student(images)
    loss = distiller.loss(images, **arguments)
    loss.backward()
    return loss.item()


def gradients(distiller: Distiller) -> list[Tensor]:
    modules = (distiller.student, distiller.criterion)
    return [p.grad.clone() for module in modules for p in module.parameters() if p.grad is not None]


@pytest.mark.parametrize(
    ("options", "steps", "count"),
    [
        ({"teacher_every": 3}, 3, 4),
        ({"teacher_images": 0.5}, 2, 4),
        ({"teacher_images": 1 / 3}, 3, 7),  # parts of 2, 2 and 3 images
        ({"teacher_images": 0.25}, 2, 2),  # fewer images than parts
        ({"teacher_every": 2, "teacher_images": 0.5}, 4, 5),
    ],
)
def test_the_mean_over_steps_is_that_of_a_teacher_who_sees_everything(
    options: dict[str, Any], steps: int, count: int
) -> None:
    images = images_of(count)
    whole, part = distiller_of(divisor="elements"), distiller_of(divisor="elements", **options)
    passes = seen(part)
    expected = step(whole, images)
    losses = [step(part, images) for _ in range(steps)]
    assert sum(losses) / steps == pytest.approx(expected, rel=1e-5)
    for mean, exact in zip(gradients(part), gradients(whole), strict=True):
        torch.testing.assert_close(mean / steps, exact, rtol=1e-4, atol=1e-7)
    assert torch.cat(passes).equal(images)  # each image once per cycle
    assert len(passes) == steps // options.get("teacher_every", 1)


def test_a_step_without_the_teacher_counts_for_the_schedule_and_not_for_the_balance() -> None:
    distiller = distiller_of(teacher_every=2, weight="auto", share=0.5, warmup_steps=4)
    losses = [step(distiller, images_of(2), task_loss=task) for task in (1.0, 1e9, 1.0, 1e9, 1.0, 1e9, 1.0)]
    assert losses[1::2] == [0.0, 0.0, 0.0]
    # half of the task loss in the mean over two steps, so all of it in one
    assert losses[::2] == pytest.approx([1 / 4, 3 / 4, 1.0, 1.0], rel=1e-4)
    assert distiller.criterion.level_losses.all()  # those of the last pass


def test_a_run_that_goes_on_has_the_teacher_in_the_steps_that_were_to_have_it() -> None:
    first, again = distiller_of(teacher_every=3), distiller_of(teacher_every=3)
    assert [step(first, images_of(2)) > 0 for _ in range(2)] == [True, False]
    again.load_state_dict(first.state_dict())
    assert [step(again, images_of(2)) > 0 for _ in range(3)] == [False, True, False]
    again.criterion.load_state_dict(first.criterion.state_dict())
    assert [step(again, images_of(2)) > 0 for _ in range(3)] == [False, True, False]


def test_a_step_that_failed_is_not_counted() -> None:
    distiller = distiller_of(teacher_every=2)
    distiller.student(images_of(2))
    with pytest.raises(ValueError, match="prior"):
        distiller.loss(images_of(2), lambda sizes: [torch.ones(1)] * 2)
    assert [step(distiller, images_of(2)) > 0 for _ in range(3)] == [True, False, True]


def test_parts_that_weigh_by_their_own_mass_are_those_of_smaller_batches() -> None:
    images, whole = images_of(4), distiller_of(divisor="map", teacher_images=0.5)
    parts = [step(whole, images) for _ in range(2)]
    small = distiller_of(divisor="map")
    assert parts == pytest.approx([step(small, images[:2]), step(small, images[2:])], rel=1e-5)


def test_validation_is_on_all_images_every_time() -> None:
    distiller = distiller_of(teacher_every=2, teacher_images=0.5)
    step(distiller, images_of(4))
    passes = seen(distiller)
    with torch.no_grad():
        distiller.student(images_of(4))
        assert distiller.loss(images_of(4)) > 0
    distiller.eval()
    distiller.student(images_of(4))
    assert distiller.loss(images_of(4)) > 0
    distiller.maps(images_of(4))
    assert [len(x) for x in passes] == [4, 4, 4]


def test_a_loss_without_the_teacher_is_differentiable_also_without_adapters() -> None:
    for adapter in (nn.Identity(), nn.Conv2d(4, 4, 1).requires_grad_(False)):
        distiller = Distiller(net(4), net(4), backbone=[("0", "0")], adapters=[adapter], teacher_every=2)
        assert step(distiller, images_of(2)) > 0
        assert step(distiller, images_of(2)) == 0


def test_check_says_how_often_the_teacher_runs() -> None:
    report = distiller_of(teacher_every=2, teacher_images=0.5).check(images_of(2))
    assert "in one training step of 2; on 1/2 of the batch" in str(report).replace("\n", " ")


@pytest.mark.parametrize("prior", ["confidence", "iou_mask", "graded_iou", "box_balance"])
def test_the_trainers_priors_weigh_the_images_that_the_teacher_sees(prior: str) -> None:
    torch.manual_seed(0)
    student, teacher = YOLOv3Tiny(num_classes=3, width=0.125), YOLOv3(num_classes=3, width=0.125)
    teacher.head8.bias.data[4::8] = 3.0  # it finds objects everywhere
    objective = Objective(student, teacher, prior=prior, info_map="score", teacher_images=1 / 3)
    distiller = objective.distiller
    images = torch.rand(5, 3, 64, 64)
    distiller.prepare(images)
    targets = torch.tensor([[0, 1, 10.0, 10, 40, 40], [2, 0, 20.0, 4, 60, 30]])  # labels of the first three images
    caught: list[Any] = []
    distiller.criterion.register_forward_pre_hook(lambda _, args: caught.append(args[2]))
    distiller.eval()
    objective(images[:3], targets, images[3:])
    distiller.train()
    for _ in range(3):
        objective(images[:3], targets, images[3:])
    whole, *parts = caught
    for level, expected in enumerate(whole):
        assert [len(part[level]) for part in parts] == [1, 2, 2]
        torch.testing.assert_close(torch.cat([part[level] for part in parts]), expected)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"teacher_every": 0}, ValueError, "teacher_every: expected an integer >= 1"),
        ({"teacher_every": 2.5}, ValueError, "teacher_every: expected an integer"),
        ({"teacher_images": 0}, ValueError, "teacher_images: expected 1 or 1 divided by a whole number"),
        ({"teacher_images": 1.5}, ValueError, "teacher_images: expected 1 or 1 divided by a whole number"),
        ({"teacher_images": 1e-4}, ValueError, "teacher_images: expected 1 or 1 divided by a whole number"),
        ({"teacher_images": 0.7}, ValueError, r"teacher_images: .* \(1 / 2, 1 / 3, ...\), got 0.7"),
        ({"teacher_images": 0.45}, ValueError, "teacher_images: expected 1 or 1 divided by a whole number"),
        ({"teacher_images": "half"}, ValueError, "teacher_images: expected"),
    ],
)
def test_other_parts_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        distiller_of(**options)


def test_a_part_may_be_as_small_as_a_thousandth() -> None:
    distiller = distiller_of(teacher_images=1 / 1000)
    assert "on 1/1000 of the batch" in " ".join(str(distiller.check()).split())


def test_images_that_cannot_be_cut_are_refused() -> None:
    images = images_of(4)
    distiller = distiller_of(teacher_images=0.5, preprocess=lambda x: x["images"] if isinstance(x, dict) else x)
    distiller.student(images)
    with pytest.raises(TypeError, match="teacher_images: expected images that are a tensor or a list, got a dict"):
        distiller.loss({"images": images})
    distiller = distiller_of(teacher_images=0.5, preprocess=lambda x: torch.stack(list(x)), last_forward=True)
    distiller.student(images[:3])
    with pytest.raises(ValueError, match=r"expected 4 rows, one per image, .* got shape \(3, 4, 8, 8\)"):
        distiller.loss(list(images))


@pytest.mark.parametrize("schedule", [{"teacher_every": 3}, {"teacher_images": 1 / 3}])
def test_a_compiled_step_counts_too(schedule: dict[str, Any]) -> None:
    torch._dynamo.reset()
    compiles = CompileCounter()
    losses = []
    for wrap in (lambda function: function, lambda function: torch.compile(function, backend=compiles)):
        distiller = distiller_of(**schedule)

        def forward(x: Tensor, distiller: Distiller = distiller) -> Tensor:
            distiller.student(x)
            return distiller.loss(x)

        run, counts = wrap(forward), []
        for _ in range(12):
            losses.append(run(images_of(6)).item())
            counts.append(compiles.frame_count)
    assert losses[12:] == pytest.approx(losses[:12], rel=1e-5)
    assert counts[6] == counts[-1], "compiled again in every step"
