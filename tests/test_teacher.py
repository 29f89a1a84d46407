"""How the teacher runs: with batch norms folded in a copy, up to its last level, with the same features."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastkd import Distiller
from fastkd.yolov3 import YOLOv3

RAN: list[str] = []


class Net(nn.Module):
    """Two stages of convolution, batch norm and ReLU, and a head; it records which modules ran."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stage = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.conv, self.norm = nn.Conv2d(width, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width)
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        RAN.append("forward")
        x = self.last(self.norm(self.conv(self.stage(x))))
        RAN.append("head")
        return self.head(x)

    def last(self, x: Tensor) -> Tensor:
        return x


def trained(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias)
            m.running_mean.normal_(0, 0.5)
            m.running_var.uniform_(0.5, 1.5)
    return model.eval()


LEVELS = [("stage", "stage"), ("norm", "norm")]
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def distiller_of(teacher: nn.Module, levels: list[tuple[str, str]] = LEVELS, **options: Any) -> Distiller:
    torch.manual_seed(0)
    return Distiller(Net(4), teacher, backbone=levels, **{"fold_teacher": True, **options}).prepare(IMAGES)


def features(distiller: Distiller) -> list[Tensor]:
    """Return the teacher's features, as the loss gets them."""
    caught: list[list[Tensor]] = []
    handle = distiller.criterion.register_forward_pre_hook(lambda _, args: caught.append([x.clone() for x in args[1]]))
    distiller.student(IMAGES)
    distiller.loss(IMAGES)
    handle.remove()
    return caught[0]


def expected(teacher: nn.Module, names: list[str]) -> list[Tensor]:
    found: dict[str, Tensor] = {}
    model = copy.deepcopy(teacher)
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda m, a, out, n=name: found.__setitem__(n, out.clone()))
    with torch.no_grad():
        model(IMAGES.to(teacher.head.weight.dtype))
    return [found[name] for name in names]


def assert_near(got: list[Tensor], exact: list[Tensor]) -> None:
    for x, y in zip(got, exact, strict=True):
        assert (x - y).abs().amax() <= 1e-4 * y.abs().amax()


def how(distiller: Distiller) -> str:
    return next(check.message for check in distiller.check().checks if check.name == "teacher runs")


def test_features_are_those_of_the_teacher_as_it_was_given() -> None:
    teacher = trained(Net())
    before = copy.deepcopy(teacher.state_dict())
    distiller = distiller_of(teacher)
    assert_near(features(distiller), expected(teacher, ["stage", "norm"]))
    assert how(distiller) == "2 batch norms folded into convolutions; stops after its last level"
    assert all(torch.equal(x, y) for x, y in zip(before.values(), teacher.state_dict().values(), strict=True))
    assert isinstance(distiller.teacher.norm, nn.BatchNorm2d)


def test_every_batch_norm_of_yolov3_is_folded() -> None:
    torch.manual_seed(0)
    teacher, images = trained(YOLOv3(4, 0.125)), torch.rand(1, 3, 64, 64)
    levels = [(x, x) for x in (*teacher.backbone_levels, *teacher.neck_levels)]
    distiller = Distiller(YOLOv3(4, 0.125), teacher, backbone=levels, fold_teacher=True).prepare(images)
    distiller.student(images)
    distiller.loss(images)
    assert "72 batch norms folded" in how(distiller)


def test_weights_that_change_later_are_the_ones_that_count() -> None:
    teacher, other = trained(Net()), trained(Net())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    distiller = distiller_of(teacher)
    features(distiller)
    for assign in (False, True):
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(0.1)
        teacher.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
        assert_near(features(distiller), expected(other, ["stage", "norm"]))
    with pytest.raises(AssertionError):
        assert_near(features(distiller), expected(trained(Net()), ["stage", "norm"]))
    teacher.double()
    student = distiller.student.double()
    assert student(IMAGES.double()).dtype == torch.float64
    distiller.loss(IMAGES.double())


def test_a_convolution_that_is_a_level_keeps_its_own_output() -> None:
    teacher = trained(Net())
    distiller = distiller_of(teacher, [("conv", "conv"), ("norm", "norm")])
    assert_near(features(distiller), expected(teacher, ["conv", "norm"]))
    assert how(distiller).startswith("1 batch norms folded")


class Residual(Net):
    part = 1.0

    def last(self, x: Tensor) -> Tensor:
        return x + self.part * self.seen

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.conv(self.stage(x))  # used twice, so folding would change it
        return self.head(self.last(self.norm(self.seen)))


def test_a_teacher_in_half_precision_is_folded_though_it_rounds() -> None:
    teacher = trained(Net())
    assert how(distiller_of(copy.deepcopy(teacher).bfloat16())).startswith("2 batch norms folded")
    for parameter in teacher.norm.parameters():
        nn.init.zeros_(parameter)  # a level without a signal
    assert how(distiller_of(teacher.bfloat16())).startswith("2 batch norms folded")


@pytest.mark.parametrize(
    ("dtype", "part"), [(torch.float32, 1.0), (torch.float32, 1e-3), (torch.bfloat16, 0.2)], ids=str
)
def test_features_that_would_differ_are_not_folded_and_that_is_said(dtype: torch.dtype, part: float) -> None:
    teacher = trained(Residual()).to(dtype)
    teacher.part = part
    levels = [("stage", "stage"), ("norm", "input:head")]
    with pytest.warns(UserWarning, match=r"not folded, as folding would change: teacher backbone\[1\] 'input:head'"):
        found = features(distiller_of(teacher, levels))
    torch.testing.assert_close(found[0], expected(teacher, ["stage"])[0], rtol=0, atol=0)


def replaced(teacher: nn.Module) -> nn.Module:
    teacher.stage.forward = teacher.stage.forward
    return teacher


def hooked(teacher: nn.Module) -> nn.Module:
    teacher.head.register_forward_hook(lambda *_: None)
    return teacher


class NoCopy(Net):
    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError("no copies")


@pytest.mark.parametrize(
    ("make", "reported"),
    [
        (lambda: replaced(Net()), "the forward of 'stage' was replaced"),
        (lambda: hooked(Net()), "'head' has other hooks"),
        (lambda: torch.compile(Net(), backend="eager"), "it is compiled or wrapped"),
        (NoCopy, "not folded, as its copy fails (RuntimeError: no copies)"),
    ],
)
def test_what_stands_against_a_copy_is_said(make: Any, reported: str) -> None:
    torch.manual_seed(2)
    teacher = trained(make())
    torch.manual_seed(2)
    exact = expected(trained(Net()), ["stage", "norm"])
    distiller = distiller_of(teacher)
    found = features(distiller)
    assert reported in how(distiller)
    for x, y in zip(found, exact, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


class Noisy(Net):
    def last(self, x: Tensor) -> Tensor:
        return x + 0 * torch.rand_like(x)


def test_to_make_it_ready_draws_nothing() -> None:
    distiller, drawn = distiller_of(trained(Noisy())), []
    for _ in range(2):  # the first time, the teacher is prepared
        torch.manual_seed(3)
        features(distiller)
        drawn.append(torch.rand(()))
    assert drawn[0] == drawn[1]


def test_it_runs_as_it_was_given_unless_asked() -> None:
    teacher = trained(Net())
    distiller = distiller_of(teacher, fold_teacher=False)
    for x, y in zip(features(distiller), expected(teacher, ["stage", "norm"]), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)
    assert how(distiller) == "as it was given, and to its end"
    with pytest.raises(TypeError, match="fold_teacher: expected True or False, got 'False'"):
        distiller_of(teacher, fold_teacher="False")


# ---- the last level


def ran_with(prior: Any, teacher: nn.Module | None = None) -> list[str]:
    """Return the modules that run in a step, except the student's, after the teacher is prepared."""
    teacher = trained(Net()) if teacher is None else teacher
    distiller = distiller_of(teacher, prior=prior, info_map="uniform")
    features(distiller)
    RAN.clear()
    features(distiller)
    assert RAN[:2] == ["forward", "head"]
    return RAN[2:]


def test_the_head_runs_only_where_the_prior_takes_the_output() -> None:
    seen = []

    def of_output(output: Tensor, sizes: list[tuple[int, int]]) -> list[Tensor]:
        seen.append(output)
        return [torch.ones(2, *size) for size in sizes]

    assert ran_with(None) == ["forward"]
    assert ran_with(lambda sizes: [torch.ones(2, *size) for size in sizes]) == ["forward"]
    assert ran_with(of_output) == ["forward", "head"]
    assert all(x.shape == (2, 2, 4, 4) for x in seen)


class Careful(Net):
    def last(self, x: Tensor) -> Tensor:
        try:
            return super().last(x)
        except Exception:
            return x * 0


class Clips(Net):
    """A teacher that changes its last level in place after its module; ending early must not leave that out."""

    def last(self, x: Tensor) -> Tensor:
        return x.relu_()


def test_a_model_that_catches_exceptions_ends_too() -> None:
    assert ran_with(None, trained(Careful())) == ["forward"]


def test_a_level_that_is_changed_later_is_run_to_its_end() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert ran_with(None, trained(Clips())) == ["forward", "head"]


class Retries(Net):
    """A model that catches every exception in its forward, as some do when memory is short."""

    def forward(self, x: Tensor) -> Tensor:
        try:
            return super().forward(x)
        except BaseException:
            return super().forward(x * 0)


def test_a_model_that_goes_on_another_way_gives_its_own_features() -> None:
    teacher = trained(Retries())
    distiller = distiller_of(teacher)
    for _ in range(3):
        assert_near(features(distiller), expected(teacher, ["stage", "norm"]))


class Raw(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.stage(x))
        self.norm(y)
        return self.head(y)  # uses the input of the batch norm


def test_an_output_that_would_differ_is_not_folded() -> None:
    with pytest.warns(UserWarning, match="folding would change: the output"):
        distiller = distiller_of(trained(Raw()))
    assert how(distiller).startswith("not folded")
