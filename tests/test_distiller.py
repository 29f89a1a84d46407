"""The promises of the Distiller: hooks that fire, a frozen teacher, levels that fit, and a check that is right."""

from __future__ import annotations

import copy
import dataclasses
import gc
import io
import itertools
import math
import pickle
import re
import subprocess
import sys
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fastkd
from fastkd.distiller import Distiller
from fastkd.health import fingerprint
from fastkd.hooks import match_by_stride
from fastkd.level_maps import LevelMaps


def block(cin: int, cout: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(cin, cout, 3, 2, 1, bias=False), nn.BatchNorm2d(cout), nn.ReLU())


class Net(nn.Module):
    """Stages of strides 2, 4, 8, and a neck convolution on each of the last two; the output is a list of neck maps."""

    def __init__(self, width: int, stages: int = 3) -> None:
        super().__init__()
        channels = [3, *(width * 2**i for i in range(stages))]
        self.stages = nn.ModuleList(block(a, b) for a, b in itertools.pairwise(channels))
        self.neck = nn.ModuleDict({f"p{i}": nn.Conv2d(channels[i], width, 1) for i in range(2, stages + 1)})
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.pair = Pair()
        self.unused = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        out = []
        for i, stage in enumerate(self.stages, 1):
            x = stage(x)
            if i > 1:
                out.append(self.neck[f"p{i}"](x))
        self.pair(self.pool(x).flatten(1))
        return out


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class Wrapper(nn.Module):
    """A wrapper such as an averaged model, which holds the model under the name ``module``."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Any:
        return self.module(x)


BACKBONE = [("stages.1", "stages.1"), ("stages.2", "stages.2")]
NECK = [("neck.p3", "neck.p3")]


def trained(model: nn.Module) -> nn.Module:
    """Return the module as if it were trained: with batch norms that do not have their initial values."""
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 1.5)
    return model


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def student() -> Net:
    return Net(4)


@pytest.fixture
def teacher() -> nn.Module:
    return trained(Net(8))


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 32, 32)


def named(report: fastkd.health.Report) -> dict[str, bool | None]:
    return {check.name: check.ok for check in report.checks}


def text(report: fastkd.health.Report) -> str:
    """Return the table of a report without its line breaks."""
    return " ".join(str(report).split())


# --- hooks


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_hooks_go_with_their_distiller(student: Net, teacher: Net, images: Tensor) -> None:
    for _ in range(3):
        distiller = Distiller(student, teacher, backbone=BACKBONE)
        student(images)
        distiller.loss(images)
    gc.collect()
    assert hooks_of(student) == hooks_of(teacher) == 2 * len(BACKBONE)
    del distiller
    gc.collect()
    assert hooks_of(student) == hooks_of(teacher) == 0


def test_a_distiller_is_not_copied_or_pickled(student: Net, teacher: Net) -> None:
    distiller = Distiller(student, teacher, backbone=BACKBONE)
    for copied in (copy.deepcopy, pickle.dumps, torch.optim.swa_utils.AveragedModel):
        with pytest.raises(TypeError, match=r"Distiller: expected no copy or pickle.*make a new Distiller"):
            copied(distiller)


def test_an_output_changed_in_place_is_warned_about_once(teacher: Net, images: Tensor) -> None:
    student = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(inplace=True))
    distiller = Distiller(student, teacher, backbone=[("0", "stages.0")])
    student(images)
    with pytest.warns(UserWarning, match="student backbone.0. '0': a later module changed its output in place"):
        distiller.loss(images)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        student(images)
        distiller.loss(images)
        plain = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU())
        distiller = Distiller(plain, teacher, backbone=[("0", "stages.0")])
        plain(images)
        distiller.loss(images)


def test_what_a_backward_recomputes_is_not_taken_for_a_forward(teacher: Net, images: Tensor) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stage = block(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.stage, x, use_reentrant=False)

    student = Checkpointed()
    distiller = Distiller(student, teacher, backbone=[("stage.1", "stages.0")])
    student(images)
    distiller.loss(images).backward()
    assert student.stage[0].weight.grad.any()
    with pytest.raises(RuntimeError, match="its hook has not fired since the last call"):
        distiller.loss(images)


def test_a_whole_model_recomputed_in_a_backward_leaves_the_next_forward_alone(teacher: Net, images: Tensor) -> None:
    student = block(3, 4)
    distiller = Distiller(student, teacher, backbone=[("1", "stages.0")])
    checkpoint(student, images, use_reentrant=False)
    first = distiller.loss(images)
    checkpoint(student, images, use_reentrant=False)
    first.backward()
    assert distiller.loss(images).isfinite()


def test_a_student_that_holds_its_distiller_is_freed(teacher: Net) -> None:
    student = Net(4)
    student.distiller = Distiller(student, teacher, backbone=BACKBONE)
    gone = weakref.ref(student)
    del student
    gc.collect()
    assert gone() is None
    assert hooks_of(teacher) == 0


def test_matching_by_stride_keeps_the_criterion(student: Net, teacher: Net, images: Tensor) -> None:
    stages = ["stages.0", "stages.1", "stages.2"]
    distiller = Distiller(student, teacher, backbone=(stages[1:], stages), weights=[1.0, 2.0])
    criterion, adapters = distiller.criterion, distiller.criterion.adapters
    distiller.prepare(images)
    student(images)
    distiller.loss(images)
    assert distiller.criterion is criterion
    assert criterion.adapters is adapters
    assert len(adapters) == 2
    assert criterion.level_losses.all()
    assert criterion.options.weights == (1.0, 2.0)


def test_too_many_weights_for_any_matching_are_refused_at_once(student: Net, teacher: Net) -> None:
    stages = ["stages.0", "stages.1"]
    with pytest.raises(ValueError, match="weights: expected one per matched level, at most 2, got 3"):
        Distiller(student, teacher, backbone=(stages, stages), weights=[1.0, 2.0, 3.0])


def test_two_tuples_of_two_may_mean_either_form_and_are_refused(student: Net, teacher: Net) -> None:
    either = (("stages.0", "stages.1"), ("stages.1", "stages.2"))
    with pytest.raises(TypeError, match=r"backbone.*could be either; write \[\('stages.0'.*for pairs, \(\['stages.0'"):
        Distiller(student, teacher, backbone=either)


def test_names_and_modules_are_the_same_levels(student: Net, teacher: Net, images: Tensor) -> None:
    by_name = Distiller(student, teacher, backbone=BACKBONE, neck=NECK)
    by_module = Distiller(
        student,
        teacher,
        backbone=[(student.stages[1], teacher.stages[1]), (student.stages[2], "stages.2")],
        neck=[(student.neck["p3"], teacher.neck["p3"])],
        adapters=by_name.criterion.adapters,
    )
    student(images)
    first, second = by_name.loss(images), by_module.loss(images)
    assert by_name.levels == by_module.levels == [*BACKBONE, *NECK]
    assert first.item() == second.item() > 0


def test_loss_is_the_criterion_of_the_hooked_features(student: Net, teacher: Net, images: Tensor) -> None:
    distiller = Distiller(student, teacher, neck=[("neck.p2", "neck.p2"), ("neck.p3", "neck.p3")], info_map="energy")
    loss = (student(images), distiller.loss(images))[1]
    with torch.no_grad():
        expected = distiller.criterion(student(images), teacher(images))
    torch.testing.assert_close(loss, expected)


def test_unknown_module_names_the_near_ones(student: Net, teacher: Net) -> None:
    with pytest.raises(ValueError, match=r"backbone\[1\]: the teacher has no module named 'stage.2'.*'stages.2'"):
        Distiller(student, teacher, backbone=[BACKBONE[0], ("stages.2", "stage.2")])
    assert not any(m._forward_hooks for m in student.modules())


def test_a_module_of_another_model_is_refused(student: Net, teacher: Net) -> None:
    with pytest.raises(ValueError, match=r"neck\[0\]: expected a module of the student, got a Conv2d"):
        Distiller(student, teacher, neck=[(teacher.neck["p3"], teacher.neck["p3"])])


@pytest.mark.parametrize("levels", ["stages.1", ["stages.1"], [("a", "b", "c")], (["a"], "b")])
def test_levels_of_another_form_are_refused(student: Net, teacher: Net, levels: Any) -> None:
    with pytest.raises(TypeError, match=r"backbone: expected a list of pairs"):
        Distiller(student, teacher, backbone=levels)


def test_no_level_is_refused(student: Net, teacher: Net) -> None:
    with pytest.raises(ValueError, match="at least one level"):
        Distiller(student, teacher, backbone=[])


def test_loss_without_a_new_forward_is_an_error(student: Net, teacher: Net, images: Tensor) -> None:
    distiller = Distiller(student, teacher, backbone=BACKBONE)
    student(images)
    distiller.loss(images)
    with pytest.raises(RuntimeError, match=r"student backbone\[0\] 'stages.1'.*has not fired.*call student\(images\)"):
        distiller.loss(images)


@pytest.mark.parametrize(
    ("levels", "error", "message"),
    [
        ({"neck": [("neck.p3", "unused")]}, RuntimeError, r"teacher neck\[0\] 'unused'.*has not fired"),
        ({"neck": [("pair", "neck.p3")]}, TypeError, r"student neck\[0\] 'pair'.*got a tuple"),
        (
            {"neck": [("pool", "neck.p3")]},
            ValueError,
            r"student neck\[0\] 'pool' and teacher neck\[0\] 'neck.p3'.*\(2, 16, 1, 1\)",
        ),
        (
            {"backbone": [("stages.1", "stages.2")]},
            ValueError,
            r"student backbone\[0\] 'stages.1'.*'stages.2'.*\(2, 8, 8, 8\).*two lists",
        ),
    ],
    ids=["a module outside the forward", "a tuple", "another size", "another stride"],
)
def test_outputs_that_cannot_be_compared_are_an_error_that_names_their_modules(
    levels: dict[str, Any], error: type[Exception], message: str, student: Net, teacher: Net, images: Tensor
) -> None:
    distiller = Distiller(student, teacher, **levels)
    student(images)
    with pytest.raises(error, match=message):
        distiller.loss(images)


def test_an_output_that_is_not_4d_is_an_error_with_its_shape(teacher: Net, images: Tensor) -> None:
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4))
    distiller = Distiller(flat, teacher, neck=[("1", "neck.p3")])
    flat(images)
    with pytest.raises(ValueError, match=r"4 dimensions \(N, C, H, W\), got shape \(2, 4\)"):
        distiller.loss(images)


def test_other_images_for_the_teacher_are_noticed(student: Net, teacher: Net, images: Tensor) -> None:
    distiller = Distiller(student, teacher, backbone=BACKBONE)
    student(images)
    with pytest.raises(ValueError, match="equal batch"):
        distiller.loss(images[:1])


def test_copies_of_the_student_do_not_feed_the_distiller(student: Net, teacher: Net, images: Tensor) -> None:
    distiller = Distiller(student, teacher, backbone=BACKBONE[:1])
    average = torch.optim.swa_utils.AveragedModel(student)
    student(images)
    average(torch.randn(5, 3, 32, 32))
    twins = (copy.deepcopy(student), pickle.loads(pickle.dumps(student)))
    assert distiller.loss(images) > 0
    for twin in twins:
        twin(images)
        copy.copy(student.stages[1])(torch.randn(2, 4, 16, 16))  # shares the hooks, as the replicas of DataParallel do
        with pytest.raises(RuntimeError, match="has not fired"):
            distiller.loss(images)


def test_a_student_saved_whole_has_nothing_of_fastkd(tmp_path: Path) -> None:
    """The same holds for a student with hooks of other code, whose handles still remove them, and for an EMA's copy."""
    student, teacher = (nn.Sequential(block(3, 4), block(4, 8)) for _ in range(2))
    images, seen = torch.randn(2, 3, 16, 16), []
    theirs = student[1].register_forward_hook(print)  # a function that can be pickled
    distiller = Distiller(student, teacher, backbone=[("0", "0"), ("1", "1")]).prepare(images)
    later = student[0].register_forward_hook(lambda *_: seen.append(1))
    student(images)
    later.remove()
    assert seen == [1]
    for i, model in enumerate((student, copy.deepcopy(student), torch.optim.swa_utils.AveragedModel(student))):
        torch.save(model, tmp_path / f"{i}.pt")
    code = f"""
import sys
sys.modules["fastkd"] = None
import torch
for i in range(3):
    torch.load({str(tmp_path)!r} + f"/{{i}}.pt", weights_only=False)(torch.rand(2, 3, 16, 16))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert distiller.loss(images) > 0
    theirs.remove()
    assert len(student[1]._forward_hooks) == 1
    assert not copy.deepcopy(student)[0]._forward_hooks


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


def test_a_student_with_hooks_can_be_scripted_traced_and_exported() -> None:
    student, x = Scripted(), torch.randn(1, 3, 16, 16)
    distiller = Distiller(student, Scripted(), backbone=[("a", "a"), ("b", "b")]).prepare(x)
    for found in (
        torch.jit.script(student),
        torch.jit.script(copy.deepcopy(student)),
        torch.jit.trace(student, x),
        torch.export.export(student, (x,)).module(),
    ):
        with torch.no_grad():
            torch.testing.assert_close(found(x), student(x))
    student(x)
    assert distiller.loss(x) > 0


def test_a_validation_in_between_leaves_nothing_behind(student: Net, teacher: Net, images: Tensor) -> None:
    distiller = Distiller(student, teacher, backbone=BACKBONE)
    student.eval()
    with torch.no_grad():
        student(torch.randn(7, 3, 64, 64))
    student.train()
    student(images)
    assert distiller.loss(images).requires_grad


@pytest.mark.parametrize("first", [True, False])
def test_a_student_validated_under_inference_mode_trains_on(
    first: bool, student: Net, teacher: Net, images: Tensor
) -> None:
    student.eval()  # no batch norm shall count what it sees
    distiller = Distiller(student, teacher, backbone=BACKBONE, neck=NECK, calibration_batches=1)

    def gradients() -> list[Tensor]:
        student(images)
        return list(torch.autograd.grad(distiller.loss(images), list(student.stages.parameters())))

    expected = None if first else gradients()
    with torch.inference_mode():
        student(images)
        distiller.eval().loss(images)
        distiller.maps(images)
    distiller.train()
    got = gradients()
    torch.testing.assert_close(got, gradients() if first else expected)
    assert all(x.any() for x in got)


def test_remove_takes_every_hook_off(student: Net, teacher: Net, images: Tensor) -> None:
    distiller = Distiller(student, teacher, backbone=BACKBONE, neck=NECK)
    distiller.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for x in (student, teacher) for m in x.modules())
    student(images)
    with pytest.raises(RuntimeError, match="hooks were removed"):
        distiller.loss(images)


# --- the teacher


def test_teacher_stays_frozen_whoever_calls_train(student: Net, teacher: nn.Module, images: Tensor) -> None:
    distiller = Distiller(student, teacher, backbone=BACKBONE)
    before = fingerprint(teacher)
    student.teacher = teacher  # one module holds both models
    student.train()
    distiller.train()
    for p in teacher.parameters():
        p.requires_grad_(True)
    student(images)
    distiller.loss(images).backward()
    assert fingerprint(teacher) == before
    assert not any(m.training for m in teacher.modules())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def test_weights_shared_with_the_student_are_refused(student: Net) -> None:
    with pytest.raises(ValueError, match=r"no weights with the student, got .* shared parameters"):
        Distiller(student, Wrapper(student), backbone=BACKBONE)


# --- wrappers


@pytest.fixture
def process_group(tmp_path: Any) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_ddp_student_and_ddp_distiller_train_as_bare_ones(student: Net, teacher: Net, images: Tensor) -> None:
    def gradients(parallel: bool) -> list[Tensor]:
        torch.manual_seed(1)
        model: nn.Module = nn.parallel.DistributedDataParallel(Net(4)) if parallel else Net(4)
        distiller = Distiller(model, teacher, backbone=[("module.stages.1", "stages.1"), BACKBONE[1]], neck=NECK)
        distiller.prepare(images)
        call: nn.Module = nn.parallel.DistributedDataParallel(distiller) if parallel else distiller
        for _ in range(2):  # the second forward fails if DDP waits for a gradient of the first
            outputs = model(images)
            bare = model.module if parallel else model
            task = sum(x.square().mean() for x in outputs) + sum(p.sum() for p in bare.unused.parameters())
            (task + call(images)).backward()
        return [p.grad for p in (*model.parameters(), *distiller.parameters())]

    for ours, plain in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(ours, plain)


def test_a_wrapper_named_module_needs_no_prefix(student: Net, teacher: Net, images: Tensor) -> None:
    wrapped = Wrapper(Wrapper(student))
    distiller = Distiller(wrapped, Wrapper(teacher), backbone=BACKBONE)
    wrapped(images)
    assert distiller.loss(images) > 0
    assert distiller.levels == BACKBONE


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("first", ["compile", "distiller"])
def test_compiled_student_gets_the_gradient_of_the_eager_one(
    teacher: Net, images: Tensor, backend: str, first: str
) -> None:
    def gradients(compiled: bool) -> list[Tensor]:
        torch.manual_seed(1)
        student: nn.Module = Net(4)
        bare = student
        if compiled and first == "compile":
            student = torch.compile(student, backend=backend)
        distiller = Distiller(student, teacher, backbone=BACKBONE, neck=NECK)
        if compiled and first == "distiller":
            student = torch.compile(student, backend=backend)
        for _ in range(2):
            student(images)
            distiller.loss(images).backward()
        return [p.grad for name, p in bare.named_parameters() if name.startswith("stages")]

    torch.compiler.reset()
    for ours, plain in zip(gradients(True), gradients(False), strict=True):
        assert ours.abs().sum() > 0
        torch.testing.assert_close(ours, plain)


def test_hooks_do_not_make_the_compiler_start_again(student: Net, teacher: Net, images: Tensor) -> None:
    from torch._dynamo.testing import CompileCounter  # torch does not import it

    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(student, backend=counter, fullgraph=True)
    distiller = Distiller(compiled, teacher, backbone=BACKBONE, neck=NECK)
    for _ in range(4):
        compiled(images)
        distiller.loss(images).backward()
        distiller.maps(images[:1])
    assert counter.frame_count == 1


class Inside(nn.Module):
    """As FullyShardedDataParallel, activation checkpointing and the compiler wrap a part of a model."""

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, module)

    def forward(self, x: Tensor) -> Any:
        return getattr(self, self.name)(x)


@pytest.mark.parametrize("wrapper", ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
def test_names_need_no_part_of_a_wrappers(wrapper: str, student: Net, teacher: Net) -> None:
    before = fingerprint(student)
    student.stages[1] = Inside(wrapper, student.stages[1])
    distiller = Distiller(student, teacher, backbone=[("stages.1.0", "stages.1.0")])
    assert distiller.levels == [("stages.1.0", "stages.1.0")]
    assert fingerprint(student) == before


def test_a_compiled_submodule_is_found_by_its_plain_name(student: Net, teacher: Net, images: Tensor) -> None:
    torch.compiler.reset()
    student.stages[1] = torch.compile(student.stages[1], backend="eager")
    distiller = Distiller(student, teacher, backbone=[("stages.1.0", "stages.1.0"), BACKBONE[1]])
    student(images)
    assert distiller.loss(images) > 0
    assert distiller.levels == [("stages.1.0", "stages.1.0"), BACKBONE[1]]


@pytest.mark.parametrize("before", [None, "prepare", "maps", "check"])  # they convert weights too, without a graph
def test_bfloat16_autocast_trains_the_student(before: str | None, student: Net, teacher: Net, images: Tensor) -> None:
    distiller = Distiller(student, teacher, backbone=BACKBONE, neck=NECK)
    with torch.autocast("cpu", torch.bfloat16):
        if before is not None:
            getattr(distiller, before)(images)
        student(images)
        loss = distiller.loss(images)
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in distiller.parameters())
    assert student.stages[0][0].weight.grad.abs().sum() > 0


# --- levels by stride


def test_unequal_lists_are_matched_by_stride(images: Tensor) -> None:
    student, teacher = Net(4, stages=3), trained(Net(8, stages=4))
    distiller = Distiller(
        student,
        teacher,
        backbone=(["stages.2", "stages.1"], ("stages.1", "stages.2", "stages.3")),
        neck=(["neck.p3"], ["neck.p4", "neck.p3"]),
        weights=[1.0, 2.0, 0.5],
    )
    assert distiller.levels is None
    student(images)
    with pytest.raises(RuntimeError, match=r"expected prepare\(images\) before the first loss"):
        distiller.loss(images)
    distiller.prepare(images)
    student(images)
    assert distiller.loss(images) > 0
    assert distiller.levels == [("stages.2", "stages.2"), ("stages.1", "stages.1"), ("neck.p3", "neck.p3")]
    assert not teacher.stages[3]._forward_hooks
    assert not teacher.neck["p4"]._forward_hooks


def test_a_stride_that_one_model_lacks_is_dropped_on_both_sides(images: Tensor) -> None:
    student, teacher = Net(4, stages=3), trained(Net(8, stages=4))
    distiller = Distiller(
        student, teacher, backbone=(["stages.0", "stages.2"], ["stages.2", "stages.3"]), weights=[2.0]
    )
    optimizer = torch.optim.SGD(distiller.prepare(images).parameters(), lr=0.1)
    student(images)
    distiller.loss(images).backward()
    optimizer.step()
    assert distiller.levels == [("stages.2", "stages.2")]
    assert len(distiller.criterion.adapters) == 1
    assert not student.stages[0]._forward_hooks


def test_no_common_stride_names_the_group(images: Tensor, student: Net, teacher: Net) -> None:
    distiller = Distiller(student, teacher, neck=(["neck.p3"], ["neck.p2"]))
    with pytest.raises(ValueError, match=r"neck: levels: expected a stride that student and teacher share"):
        distiller.prepare(images)


def test_levels_pair_where_each_is_the_others_nearest_within_a_root_of_two() -> None:
    def pairs(student: list[float], teacher: list[float]) -> list[tuple[int, int]]:
        return match_by_stride(student, teacher, nearest=True)

    assert pairs([16, 8], [8.5, 15, 32]) == [(0, 1), (1, 0)]
    assert pairs([8, 10], [8]) == pairs([8], [8, 10]) == [(0, 0)]  # of two the nearer one
    assert pairs([8, 11.3], [16, 8]) == [(0, 1)]
    for far in (8 * math.sqrt(2), 8 / math.sqrt(2), 12):
        with pytest.raises(ValueError, match="a stride that student and teacher share"):
            pairs([8], [far])


def test_strides_are_those_of_heights_whatever_the_widths() -> None:
    """As detectors of text have them, whose later stages halve the height alone."""
    student, teacher = (nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, (2, 1), 1)) for _ in range(2))
    seen: list[Any] = []

    def prior(sizes: list[tuple[int, int]]) -> list[None]:
        seen.append(sizes)
        return [None] * len(sizes)

    distiller = Distiller(student, teacher, backbone=(["0", "1"], ["1", "0"]), prior=prior)
    found = distiller.prepare(torch.randn(2, 3, 32, 48)).maps(torch.randn(2, 3, 32, 48))
    assert distiller.levels == [("0", "0"), ("1", "1")]
    assert found.names == ["backbone, stride 2", "backbone, stride 4"]
    assert seen == [[(16, 24), (8, 24)]] * 2


class Shrinking(nn.Module):
    """A network without padding: of 33 pixels its stage keeps 16, while a padded stage of stride 2 keeps 17."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = nn.Conv2d(3, 4, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.stage(x)


def test_sizes_that_nearly_agree_are_aligned_where_asked(teacher: Net) -> None:
    student, images = Shrinking(), torch.randn(2, 3, 33, 33)
    for levels in (([student.stage], ["stages.0", "stages.1"]), [("stage", "stages.0")]):
        refusing = Distiller(student, teacher, backbone=levels)
        with pytest.raises(ValueError, match='align="interpolate"'):
            refusing.prepare(images)
        distiller = Distiller(student, teacher, backbone=levels, align="interpolate").prepare(images)
        student(images)
        distiller.loss(images).backward()
        assert distiller.levels == [("stage", "stages.0")]
        assert student.stage.weight.grad.any()
        student.zero_grad()
    with pytest.raises(ValueError, match="align: expected None or \"interpolate\", got 'crop'"):
        Distiller(student, teacher, backbone=levels, align="crop")


def test_aligned_features_are_the_students_resized(teacher: Net) -> None:
    student, images = Shrinking(), torch.randn(2, 3, 33, 33)
    distiller = Distiller(student, teacher, backbone=[("stage", "stages.0")], align="interpolate")
    caught: list[Any] = []
    distiller.criterion.register_forward_pre_hook(lambda _, args: caught.append(args))
    feature = student(images)
    distiller.loss(images)
    resized = nn.functional.interpolate(feature, (17, 17), mode="bilinear", align_corners=False)
    torch.testing.assert_close(caught[0][0][0], resized)


def test_a_far_stride_is_not_aligned(student: Net, teacher: Net, images: Tensor) -> None:
    distiller = Distiller(student, teacher, neck=(["neck.p3"], ["neck.p2"]), align="interpolate")
    with pytest.raises(ValueError, match=r"a stride that student and teacher share, got \[8\] and \[4\]$"):
        distiller.prepare(images)


def test_the_teacher_rests_once_the_loss_has_stopped(student: Net, teacher: Net, images: Tensor) -> None:
    distiller = Distiller(student, teacher, backbone=BACKBONE, stop_step=2)
    runs: list[Any] = []
    teacher.register_forward_hook(lambda *_: runs.append(1))
    for step in range(4):
        student(images)
        loss = distiller.loss(images)
        assert bool(loss) == (step < 2)
        distiller.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in distiller.parameters())  # DDP expects gradients for all parameters
    assert len(runs) == 2
    resumed = Distiller(student, teacher, backbone=BACKBONE, stop_step=2)
    resumed.load_state_dict(distiller.state_dict())
    student(images)
    assert not resumed.loss(images)
    assert len(runs) == 2


def test_auto_weight_holds_the_share_within_a_trainers_loop(student: Net, teacher: Net, images: Tensor) -> None:
    distiller = Distiller(student, teacher, backbone=BACKBONE, neck=NECK, weight="auto", share=0.25)
    for _ in range(3):
        task = sum(x.square().mean() for x in student(images))
        assert distiller.loss(images, task_loss=task).item() == pytest.approx(task.item() / 4, rel=0.2)
    student(images)
    with pytest.raises(ValueError, match="task_loss: expected the task loss"):
        distiller.loss(images)
    assert "0.25 times the task loss; pass task_loss" in text(distiller.check(images))
    share = re.search(r"([\d.]+)% of the total", text(distiller.check(images, task_loss=task)))
    assert share is not None
    assert float(share[1]) == pytest.approx(20, rel=0.2)
    assert share[0] in text(distiller.check(images, task_loss=-task))  # a likelihood counts by its magnitude


@pytest.mark.parametrize("scale", [1.0, 100.0, 10_000.0])
@pytest.mark.parametrize("weight", ["auto", 1.0])
def test_the_first_steps_in_float16_stay_finite_whatever_the_scale(scale: float, weight: Any, images: Tensor) -> None:
    student, teacher = Net(4), trained(Net(8))
    for model in (student, teacher):
        for stage in model.stages:
            stage[1].weight.data.mul_(scale)  # scales the features and the input of the next stage
            stage.register_forward_hook(lambda _, __, x: x.clamp(max=60_000))
    distiller = Distiller(student, teacher, backbone=BACKBONE, neck=NECK, weight=weight, calibration_batches=2)
    distiller.prepare(images)
    parameters = [*student.parameters(), *distiller.parameters()]
    optimizer, scaler = torch.optim.AdamW(parameters, lr=1e-3), torch.amp.GradScaler("cpu")
    before = [p.detach().clone() for p in student.stages.parameters()]
    for _ in range(32):  # the scaler starts at 65536 and halves when a gradient overflows
        with torch.autocast("cpu", torch.float16):
            task = sum(x.float().square().mean() for x in student(images)) / scale**2
            loss = task + distiller.loss(images, task_loss=task)
        assert loss.isfinite()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert all(p.isfinite().all() for p in parameters)
    assert not all(a.equal(b) for a, b in zip(before, student.stages.parameters(), strict=True))


def test_a_criterion_of_another_length_is_refused(student: Net, teacher: Net, images: Tensor) -> None:
    criterion = fastkd.DistillLoss(levels=3)
    with pytest.raises(ValueError, match="criterion: expected 2 levels, one per pair of modules, got 3"):
        Distiller(student, teacher, backbone=BACKBONE, criterion=criterion)
    distiller = Distiller(student, teacher, backbone=tuple(map(list, zip(*BACKBONE, strict=True))), criterion=criterion)
    with pytest.raises(ValueError, match="criterion: expected 2 levels"):
        distiller.prepare(images)
    with pytest.raises(ValueError, match="criterion: expected no loss options together with it, got penalty"):
        Distiller(student, teacher, backbone=BACKBONE, criterion=fastkd.DistillLoss(levels=2), penalty="l1")


# --- memory of the teacher's features


class Holder(nn.Module):
    """A teacher of one feature, to which another object may hold a reference after the forward, in one of many ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.held = way, []
        self.feature = nn.Identity() if way == "returns its input" else nn.Conv2d(3, 3, 1)
        self.register_buffer("constant", torch.randn(2, 3, 8, 8))
        if way == "keeps it by a hook":
            self.feature.register_forward_hook(lambda module, args, output: self.held.append(output))
        if way == "returns a buffer":
            self.feature.register_forward_hook(lambda module, args, output: self.constant)

    def forward(self, x: Tensor) -> Any:
        feature = self.feature(x)
        if self.way == "keeps a view of it":
            self.held.append(feature[:, 1:])
        if self.way == "keeps its storage":
            self.storage = feature.untyped_storage()
            self.bytes = bytes(self.storage)
        if self.way == "keeps a detached one":
            self.held.append(feature.detach())
        return {"features": [feature]} if self.way == "is in its output" else feature.mean()


WAYS = (
    "returns its input",
    "returns a buffer",
    "keeps it by a hook",
    "keeps a view of it",
    "keeps a detached one",
    "keeps its storage",
)


@pytest.mark.parametrize("way", [*WAYS, "is in its output"])
def test_nothing_that_somebody_else_holds_is_overwritten(way: str) -> None:
    teacher, student, images = Holder(way), nn.Conv2d(3, 3, 1), torch.randn(2, 3, 8, 8)
    seen: list[Any] = []

    def prior(output: Any, sizes: Any) -> list[None]:
        seen.append(output)
        return [None]

    distiller = Distiller(student, teacher, backbone=[(student, "feature")], prior=prior, weight=2.0).prepare(images)
    for _ in range(2):
        teacher.held.clear()
        seen.clear()
        student(images)
        kept = [images, teacher.constant, *teacher.held]
        before = [x.clone() for x in kept]
        loss = distiller.loss(images)
        kept += [*teacher.held, *(seen[0]["features"] if isinstance(seen[0], dict) else [])]
        before += [x.clone() for x in kept[len(before) :]]
        loss.backward()
        assert all(torch.equal(x, y) for x, y in zip(kept, before, strict=True))
        assert way != "keeps its storage" or bytes(teacher.storage) == teacher.bytes
    expected = teacher.constant if way == "returns a buffer" else teacher.feature.eval()(images)
    assert all(torch.equal(x, expected[:, 1:] if "view" in way else expected) for x in teacher.held)


def test_the_gradient_takes_the_memory_of_features_that_only_the_hooks_hold() -> None:
    teacher, student, images = Holder("the hooks alone"), nn.Conv2d(3, 3, 1), torch.randn(2, 3, 64, 64)
    distiller = Distiller(student, teacher, backbone=[(student, "feature")]).prepare(images)
    memory: list[tuple[int, int]] = []
    teacher.feature.register_forward_hook(lambda module, args, output: memory.append((output.data_ptr(), 0)))
    distiller.criterion.adapters[0].register_full_backward_hook(
        lambda module, inputs, outputs: memory.append((outputs[0].data_ptr(), 1))
    )
    student(images)
    distiller.loss(images).backward()
    (feature, _), (gradient, _) = memory
    assert (feature == gradient) == (fastkd.backends("cpu")["cpp"] is None)


# --- adapters, statistics, state


def test_state_dict_holds_adapters_statistics_and_step_alone(student: Net, teacher: Net, images: Tensor) -> None:
    distiller = Distiller(student, teacher, backbone=BACKBONE, neck=NECK)
    student(images)
    distiller.loss(images)
    parts = {key.split(".")[1] for key in distiller.state_dict() if key.startswith("criterion.")}
    assert parts == {"adapters", "statistics", "loss_weight", "_extra_state"}
    assert {key.split(".")[0] for key in distiller.state_dict()} == {"criterion"}
    assert len(list(distiller.parameters())) == 6


@pytest.mark.parametrize("form", ["pairs", "lists"])
def test_state_round_trips_into_a_fresh_lazy_distiller(teacher: Net, images: Tensor, form: str) -> None:
    def make() -> tuple[Net, Distiller, torch.optim.Optimizer]:
        torch.manual_seed(3)
        student = Net(4)
        lists = (["stages.0", "stages.1"], ["stages.2", "stages.1"])
        distiller = Distiller(student, teacher, backbone=BACKBONE if form == "pairs" else lists, calibration_batches=2)
        distiller.prepare(images)
        return student, distiller, torch.optim.AdamW([*student.parameters(), *distiller.parameters()], lr=1e-2)

    def step(student: Net, distiller: Distiller, optimizer: torch.optim.Optimizer, seed: int) -> float:
        batch = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        student(batch)
        loss = distiller.loss(batch)
        loss.backward()
        optimizer.step()
        return loss.item()

    first = make()
    for seed in range(3):
        step(*first, seed)
    file = io.BytesIO()
    torch.save([x.state_dict() for x in first], file)
    file.seek(0)
    second = make()
    torch.manual_seed(99)  # a resumed process has another random state
    for part, state in zip(second, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    assert second[1].criterion.calibrated
    assert [step(*second, seed) for seed in (3, 4, 5)] == [step(*first, seed) for seed in (3, 4, 5)]


def test_statistics_come_from_the_first_batches_alone(student: Net, teacher: nn.Module) -> None:
    distiller = Distiller(student, teacher, neck=NECK, calibration_batches=2)
    batches = [torch.randn(2, 3, 32, 32) * 2**i for i in range(4)]
    for batch in batches:
        student(batch)
        distiller.loss(batch)
    mean, rstd = distiller.criterion.statistics[0].moments()
    with torch.no_grad():
        features = torch.cat([teacher(batch)[1] for batch in batches[:2]])
    torch.testing.assert_close(mean, features.mean((0, 2, 3)))
    torch.testing.assert_close(rstd, features.var((0, 2, 3), correction=0).rsqrt())


def test_calibrate_takes_a_loader_and_no_more_batches_than_it_needs(student: Net, teacher: nn.Module) -> None:
    batches = [torch.randn(2, 3, 32, 32) for _ in range(4)]
    used = []
    distiller = Distiller(student, teacher, neck=(["neck.p3"], ["neck.p2", "neck.p3"]), calibration_batches=2)
    distiller.calibrate((used.append(i) or x, "targets") for i, x in enumerate(batches))
    assert distiller.criterion.calibrated
    assert len(used) <= 3
    with torch.no_grad():
        features = torch.cat([teacher(batch)[1] for batch in batches[:2]])
    torch.testing.assert_close(distiller.criterion.statistics[0].moments()[0], features.mean((0, 2, 3)))
    with pytest.raises(TypeError, match="loader: expected an iterable of batches, got one tensor"):
        distiller.calibrate(batches[0])


def test_an_optimizer_made_before_the_first_batch_trains_the_adapters(
    student: Net, teacher: Net, images: Tensor
) -> None:
    distiller = Distiller(student, teacher, backbone=BACKBONE, neck=[("neck.p3", "neck.p3")])
    optimizer = torch.optim.AdamW([*student.parameters(), *distiller.parameters()], lr=1e-2)
    losses = []
    for i in range(8):
        optimizer.zero_grad()
        student(images)
        loss = distiller.loss(images)
        loss.backward()
        if i == 0:
            before = [p.detach().clone() for p in distiller.parameters()]
        optimizer.step()
        losses.append(loss.item())
    assert all((p != q).any() for p, q in zip(distiller.parameters(), before, strict=True))
    assert losses[-1] < losses[0]


def test_prepare_gives_adapters_their_widths_and_leaves_no_other_trace(
    student: Net, teacher: Net, images: Tensor
) -> None:
    distiller = Distiller(student, teacher, backbone=(["stages.1"], ["stages.0", "stages.1"]))
    student.stages[0].eval()
    before = fingerprint(student)
    distiller.prepare(images)
    assert [p.shape for p in distiller.parameters()] == [(16, 8, 1, 1), (16,)]
    assert fingerprint(student) == before
    assert student.stages[1].training
    assert not student.stages[0].training
    assert distiller.criterion.loss_weight.step == 0
    assert not distiller.criterion.calibrated
    with pytest.raises(RuntimeError, match="has not fired"):
        distiller.loss(images)


# --- priors and options


def test_prior_gets_the_teachers_output_and_the_sizes(student: Net, teacher: nn.Module, images: Tensor) -> None:
    seen = []

    def nothing(output: list[Tensor], sizes: list[tuple[int, int]]) -> list[Tensor]:
        seen.append((len(output), output[0].requires_grad, sizes))
        return [torch.zeros(2, *size) for size in sizes]

    distiller = Distiller(student, teacher, backbone=BACKBONE, prior=nothing)
    student(images)
    assert distiller.loss(images) == 0
    student(images)
    assert distiller.loss(images, prior=lambda output, sizes: [None, torch.ones(2, *sizes[1])]) > 0
    assert seen == [(2, False, [(8, 8), (4, 4)])]


def test_reduction_none_gives_a_loss_per_level(student: Net, teacher: Net, images: Tensor) -> None:
    distiller = Distiller(student, teacher, backbone=BACKBONE, neck=NECK, reduction="none", weights=[1.0, 0.0, 2.0])
    student(images)
    losses = distiller.loss(images)
    assert losses.shape == (3,)
    assert losses[1] == 0 < losses[2]


# --- check


@pytest.fixture
def healthy(student: Net, teacher: Net) -> tuple[Distiller, torch.optim.Optimizer]:
    distiller = Distiller(student, teacher, backbone=BACKBONE, neck=(["neck.p3"], ["neck.p2", "neck.p3"]))
    return distiller, torch.optim.AdamW([*student.parameters(), *distiller.parameters()])


Healthy = tuple[Distiller, torch.optim.Optimizer]


def test_check_is_content_with_a_healthy_set_up_and_changes_nothing(healthy: Healthy, images: Tensor) -> None:
    distiller, optimizer = healthy
    before = fingerprint(distiller.student)
    report = distiller.check(images, optimizer, task_loss=torch.tensor(3.0, requires_grad=True))
    assert report.ok
    assert set(named(report).values()) == {True}
    assert "at 3 levels" in text(report)
    assert "student neck[0] 'neck.p3'" in text(report)
    assert fingerprint(distiller.student) == before
    assert distiller.student.training
    assert distiller.criterion.loss_weight.step == 0
    assert not distiller.criterion.calibrated
    assert all(p.grad is None for p in (*distiller.parameters(), *distiller.student.parameters()))


def test_check_calls_unknown_what_it_was_not_given(healthy: Healthy) -> None:
    report = healthy[0].check()
    unknown = {name for name, ok in named(report).items() if ok is None}
    assert unknown == {"hooks", "gradient", "loss share", "optimizer"}
    assert report.ok


def test_check_names_a_teacher_without_a_checkpoint(student: Net, images: Tensor) -> None:
    teacher = Net(8)
    assert named(Distiller(student, teacher, backbone=BACKBONE).check())["teacher trained"] is False
    trained(teacher.stages[0])  # a checkpoint that fits only a part of the model
    report = Distiller(student, teacher, backbone=BACKBONE).check()
    assert named(report)["teacher trained"] is False
    assert "2 of 3 layers have their initial weights (stages.1.1, stages.2.1)" in text(report)


def test_check_forgives_a_layer_that_no_forward_of_the_teacher_uses(student: Net, teacher: Net, images: Tensor) -> None:
    teacher.spare = nn.BatchNorm2d(8)
    distiller = Distiller(student, teacher, backbone=BACKBONE)
    assert named(distiller.check())["teacher trained"] is None
    report = distiller.check(images)
    assert named(report)["teacher trained"] is True
    assert "except 1 that no forward uses" in text(report)
    teacher.stages[1][1].reset_parameters()
    assert named(distiller.check(images))["teacher trained"] is False
    assert not teacher.spare._forward_hooks


def add_one(p: Tensor) -> None:
    p.data.add_(1)


class Checkpointed(Net):
    reentrant, first = False, 0

    def forward(self, x: Tensor) -> list[Tensor]:
        x = x.detach().requires_grad_()
        for i, stage in enumerate(self.stages):
            x = checkpoint(stage, x, use_reentrant=self.reentrant) if self.first <= i < 2 else stage(x)
        return [self.neck["p3"](x)]


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("reentrant", [False, True])
def test_check_is_content_with_a_student_that_checkpoints_activations(
    reentrant: bool, first: int, teacher: Net, images: Tensor
) -> None:
    student = Checkpointed(4)
    student.reentrant, student.first = reentrant, first
    before = fingerprint(student)
    for p in student.parameters():  # an optimiser that steps during the backward
        p.register_post_accumulate_grad_hook(add_one)
    distiller = Distiller(student, teacher, backbone=BACKBONE, neck=NECK).prepare(images)
    for p in student.parameters():
        p.grad = torch.ones_like(p)
    assert named(distiller.check(images))["gradient"] is True
    assert fingerprint(student) == before
    assert all(bool((p.grad == 1).all()) and p._post_accumulate_grad_hooks for p in student.parameters())
    student.stages[0].requires_grad_(False)
    student.stages[1].requires_grad_(False)
    assert named(distiller.check(images))["gradient"] is False


def test_check_is_content_with_features_that_are_resized(teacher: Net, images: Tensor) -> None:
    student = Net(4)
    student.stages[0][0].padding = (0, 0)
    distiller = Distiller(student, teacher, backbone=BACKBONE, align="interpolate").prepare(images)
    student(images)
    assert distiller.loss(images) > 0
    assert distiller.check(images, torch.optim.SGD(distiller.parameters(), 0.1)).ok


@pytest.mark.parametrize("schedule", [{}, {"warmup_steps": 100}, {"stop_step": 40, "decay": "linear"}])
def test_check_measures_the_share_that_a_training_step_has(
    schedule: dict[str, Any], student: Net, teacher: Net, images: Tensor
) -> None:
    """If the task loss falls faster than the averages follow, the share is far from the requested one."""
    student.eval()  # as in the check
    distiller = Distiller(student, teacher, backbone=BACKBONE, weight="auto", calibration_batches=1, **schedule)
    for step in range(20):
        student(images)
        distiller.loss(images, task_loss=0.5**step)
    task = 0.5**20
    report = distiller.check(images, task_loss=task)
    student(images)
    found = distiller.loss(images, task_loss=task).item()
    assert f"distillation {found:.4g}, task {task:.4g}: {found / (found + task):.1%} of the total" in text(report)


def test_check_names_a_compiled_teacher_without_a_checkpoint(student: Net, images: Tensor) -> None:
    teacher = Net(8)
    trained(teacher.stages[2])
    distiller = Distiller(student, torch.compile(teacher, backend="eager"), backbone=BACKBONE).prepare(images)
    assert named(distiller.check(images))["teacher trained"] is False
    torch.compiler.reset()


def test_check_compares_the_teacher_with_a_fingerprint(healthy: Healthy) -> None:
    distiller = healthy[0]
    right = fingerprint({f"module.{k}": v for k, v in distiller.teacher.state_dict().items()})
    assert named(distiller.check(teacher_fingerprint=right))["teacher trained"] is True
    with torch.no_grad():
        distiller.teacher.stages[0][0].weight[0, 0, 0, 0] += 1
    assert named(distiller.check(teacher_fingerprint=right))["teacher trained"] is False


def test_check_cannot_know_a_teacher_without_normalisation(student: Net) -> None:
    teacher = nn.Sequential(nn.Conv2d(3, 4, 3, 4, 1))
    report = Distiller(student, teacher, backbone=[("stages.1", "0")]).check()
    assert named(report)["teacher trained"] is None


@pytest.mark.parametrize("harm", ["train", "grad"])
def test_check_names_a_teacher_that_is_not_frozen(healthy: Healthy, harm: str) -> None:
    distiller = healthy[0]
    before = named(distiller.check())
    assert before["teacher frozen"] is True
    if harm == "train":
        distiller.teacher.train()
    else:
        distiller.teacher.requires_grad_(True)
    assert named(distiller.check()) == before | {"teacher frozen": False}


def test_check_names_adapters_that_no_optimizer_trains(healthy: Healthy, images: Tensor) -> None:
    distiller, _ = healthy
    report = distiller.check(images, torch.optim.AdamW(distiller.student.parameters()))
    assert [name for name, ok in named(report).items() if ok is False] == ["optimizer"]
    assert "does not train 6 of 6 adapter weights" in text(report)


def test_check_names_a_hook_that_does_not_fire_once(student: Net, teacher: Net, images: Tensor) -> None:
    report = Distiller(student, teacher, backbone=[("unused", "stages.0")]).check(images)
    assert named(report)["hooks"] is False
    assert "'unused': expected it to run" in text(report)
    shared = nn.Sequential(student.stages[0], once := nn.Conv2d(4, 4, 1), once)
    report = Distiller(shared, teacher, backbone=[("1", "stages.0")]).check(images)
    assert named(report)["hooks"] is False
    assert "student backbone[0] '1' 2 times" in text(report)


def test_check_names_a_level_that_gets_no_gradient(student: Net, teacher: Net, images: Tensor) -> None:
    for p in (*student.stages[0].parameters(), *student.stages[1].parameters()):
        p.requires_grad_(False)
    report = Distiller(student, teacher, backbone=BACKBONE).check(images)
    assert named(report)["gradient"] is False
    line = next(x.message for x in report.checks if x.name == "gradient")
    assert "'stages.1' 0" in line
    assert "stages.2" not in line


@pytest.mark.parametrize("task", [1e-9, 1e9])
def test_check_names_a_share_that_drowns_one_of_the_losses(healthy: Healthy, images: Tensor, task: float) -> None:
    report = healthy[0].check(images, task_loss=task)
    assert named(report)["loss share"] is False
    assert "expected 1% to 99%" in text(report)


def test_check_names_a_gradient_that_is_infinite() -> None:
    student, teacher = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
    teacher.bias.data.fill_(math.inf)
    distiller = Distiller(student, teacher, backbone=[(student, teacher)], adapters=[nn.Identity()], info_map="uniform")
    assert named(distiller.check(torch.ones(1, 3, 8, 8)))["gradient"] is False


def test_check_names_features_that_are_not_finite(student: Net, teacher: Net, images: Tensor) -> None:
    teacher.stages[1][0].weight.data.fill_(float("nan"))
    report = Distiller(student, teacher, backbone=BACKBONE).check(images)
    assert named(report)["gradient"] is False
    assert named(report)["loss share"] is False


@pytest.mark.parametrize(("stop_step", "ok"), [(0, False), (1, None)])
def test_check_names_a_loss_that_has_stopped(
    stop_step: int, ok: bool | None, student: Net, teacher: Net, images: Tensor
) -> None:
    """Stopping at a later step is intended; stopping before the first step means that it never does anything."""
    distiller = Distiller(student, teacher, backbone=BACKBONE, stop_step=stop_step)
    student(images)
    distiller.loss(images)
    report = distiller.check(images)
    assert named(report)["schedule"] is ok
    assert report.ok is (ok is not False)
    assert "distillation is over" in str(report)


def test_check_works_on_a_compiled_student(student: Net, teacher: Net, images: Tensor) -> None:
    torch.compiler.reset()
    compiled = torch.compile(student, backend="aot_eager")
    distiller = Distiller(compiled, teacher, backbone=BACKBONE, neck=NECK)
    report = distiller.check(images, torch.optim.SGD(distiller.parameters(), 0.1), 1.0)
    assert report.ok, str(report)
    assert student.training


# --- maps


def halves(outputs: Any, sizes: list[tuple[int, int]]) -> list[Tensor | None]:
    """A prior that ignores the lower half of every image, and has no value for the last level."""
    priors: list[Tensor | None] = []
    for height, width in sizes:
        prior = torch.ones(len(outputs[0]), height, width)
        prior[:, height // 2 :] = 0
        priors.append(prior)
    return [*priors[:-1], None]


@pytest.mark.parametrize("divisor", ["elements", "map", "map_all_ranks", "batch"])
@pytest.mark.parametrize(
    ("info_map", "penalty", "prior"),
    [
        ("self_information", "l2", None),
        ("self_information", "smooth_l1", halves),
        ("attention", "l1", halves),
        ("uniform", "l2", halves),
        (fastkd.InfoMap("entropy", "minmax"), "l2", None),
    ],
)
def test_maps_are_those_that_make_the_loss(
    student: Net, teacher: Net, images: Tensor, divisor: str, info_map: Any, penalty: str, prior: Any
) -> None:
    options = {"info_map": info_map, "penalty": penalty, "divisor": divisor, "weights": [1.0, 0.5, 2.0]}
    student, teacher, images = student.double(), teacher.double(), images.double()
    distiller = Distiller(student, teacher, backbone=BACKBONE, neck=NECK, prior=prior, **options)
    distiller.prepare(images).double().calibrate([images, images + 1])
    found = distiller.maps(images)
    with torch.no_grad():
        student.eval()(images)
        distiller.eval().loss(images)
    for level, loss, weight in zip(
        found.levels, distiller.criterion.level_losses.tolist(), options["weights"], strict=True
    ):
        n, h, w = level.information.shape
        mass = level.information.sum()
        z = {"elements": n * level.channels * h * w, "batch": n}.get(divisor, level.channels * mass)
        total = level.product.sum() * level.channels / z
        assert float(weight * total) == pytest.approx(loss, rel=1e-6)  # maps are float32
        assert level.loss == pytest.approx(loss, rel=1e-12)
    assert sum(found.shares) == pytest.approx(1)
    if prior is halves:
        assert not found.products[0][:, 4:].any()
        assert not found.information[0][:, 4:].any()
        assert found.information[0][:, :4].any()


def test_maps_of_a_single_channel_make_the_loss_too(images: Tensor) -> None:
    student, teacher = nn.Conv2d(3, 1, 3), nn.Conv2d(3, 1, 3)
    (level,) = Distiller(student, teacher, backbone=[(student, teacher)], info_map="energy").maps(images).levels
    assert level.product.mean().item() == pytest.approx(level.loss)


def test_maps_name_their_levels(student: Net, teacher: Net, images: Tensor) -> None:
    distiller = Distiller(
        student, teacher, backbone=(["stages.1", "stages.2"], ["stages.2", "stages.1"]), neck=NECK, align="interpolate"
    )
    found = distiller.maps(images)
    assert found.names == ["backbone, stride 4", "backbone, stride 8", "neck, stride 8"]
    assert [(x.student, x.teacher) for x in found.levels] == distiller.levels
    assert [x.shape for x in found.information] == [x.shape for x in found.differences] == [(2, 8, 8), *[(2, 4, 4)] * 2]


class Resizing(nn.Module):
    """A model that takes a list of images and resizes them itself, like torchvision's detectors."""

    def __init__(self, net: Net, size: tuple[int, int] = (64, 96)) -> None:
        super().__init__()
        self.net, self.size = net, size

    def forward(self, images: list[Tensor]) -> list[Tensor]:
        return self.net(torch.stack([F.interpolate(x[None], self.size)[0] for x in images]))


def test_strides_of_a_list_of_images_are_those_of_what_the_model_made_of_it(student: Net, teacher: Net) -> None:
    backbone = (["net.stages.1", "net.stages.2"], ["net.stages.0", "net.stages.1", "net.stages.2"])
    images = [torch.rand(3, 40, 56), torch.rand(3, 32, 32)]
    distiller = Distiller(Resizing(student), Resizing(teacher), backbone=backbone).prepare(images)
    assert distiller.maps(images).names == ["backbone, stride 4", "backbone, stride 8"]


def test_maps_leave_no_trace(student: Net, teacher: Net, images: Tensor) -> None:
    adapter = nn.Sequential(nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16))
    distiller = Distiller(
        student, teacher, backbone=[("stages.1", "stages.1")], adapters=[adapter], weight="auto", warmup_steps=3
    )
    student(images)
    distiller.loss(images, task_loss=1.0)
    student.stages[0].eval()
    losses = distiller.criterion.level_losses
    before = copy.deepcopy((student.state_dict(), teacher.state_dict(), distiller.state_dict()))
    modes = [m.training for m in (*student.modules(), *distiller.modules())]
    found = distiller.maps(images)
    assert torch.equal(found.information[0], distiller.maps(images).information[0])
    after = (student.state_dict(), teacher.state_dict(), distiller.state_dict())
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert modes == [m.training for m in (*student.modules(), *distiller.modules())]
    assert distiller.criterion.level_losses is losses
    assert not any(x.requires_grad for x in (*found.information, *found.differences))
    with pytest.raises(RuntimeError, match="its hook has not fired"):
        distiller.loss(images, task_loss=1.0)  # the forward of the maps does not count as the student's


def test_maps_ask_no_other_process(student: Net, teacher: Net, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a collective")

    distiller = Distiller(student, teacher, backbone=BACKBONE, divisor="map_all_ranks", weight="auto")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", refuse)
    assert all(x.loss > 0 for x in distiller.maps(images).levels)
    student(images)
    with pytest.raises(AssertionError, match="a collective"):
        distiller.loss(images, task_loss=1.0)


def test_concentration_is_the_share_of_the_heaviest_cells() -> None:
    level = LevelMaps("s", "t", "neck", 8.0, torch.ones(2, 3, 5), torch.zeros(2, 3, 5), 4, 0.0)
    assert level.concentration() == pytest.approx(0.1)  # 1.5 of 15 cells
    peaked = torch.zeros(1, 4, 5)
    peaked[0, 1, 2], peaked[0, 0, 0] = 3, 1
    level = dataclasses.replace(level, information=peaked)
    assert level.concentration(0.05) == pytest.approx(0.75)
    assert level.concentration(0.1) == pytest.approx(1)
    assert dataclasses.replace(level, information=peaked * 0).concentration() == 0
    with pytest.raises(ValueError, match=r"part: expected a share in \[0, 1\], got 10"):
        level.concentration(10)


# --- in other trainers


def test_two_forwards_of_the_student_are_told_apart(student: Net, teacher: Net, images: Tensor) -> None:
    """The features of the last forward are used; a loss on the first images would compare different images."""
    others = torch.randn_like(images)
    distiller = Distiller(student, teacher, backbone=BACKBONE)
    student(images), student(others)
    with pytest.raises(
        RuntimeError, match=r"expected the images of the student's last forward, got other images.*last_forward"
    ):
        distiller.loss(images)
    student(images)  # a loss that failed does not affect the next one
    first = distiller.loss(images)
    student(others)
    assert (first + distiller.loss(others)).requires_grad
    student(images), student(others)
    assert distiller.loss(others).requires_grad


def test_forwards_without_a_loss_are_no_error(student: Net, teacher: Net, images: Tensor) -> None:
    """Every second step is distilled, a validation has gradients, a model is traced, a step is skipped or repeated."""
    distiller = Distiller(student, teacher, backbone=BACKBONE).prepare(images)
    for step in range(4):
        batch = torch.randn_like(images)
        task = sum(x.square().mean() for x in student(batch))
        (task + distiller.loss(batch) if step % 2 else task).backward()
    student.eval()(torch.randn(5, 3, 32, 32))
    torch.jit.trace(student.train(), images)
    student(images), student(images[:1])
    assert distiller.loss(images[:1]).requires_grad


def test_the_last_forward_counts_where_it_is_meant(student: Net, teacher: Net, images: Tensor) -> None:
    student.eval()
    distiller = Distiller(student, teacher, backbone=BACKBONE, last_forward=True).prepare(images)
    student(images)
    expected = distiller.loss(images)
    student(torch.randn_like(images)), student(images.clone())
    torch.testing.assert_close(distiller.loss(images), expected)


def test_the_teacher_gets_images_of_its_own_everywhere(student: Net, teacher: Net, images: Tensor) -> None:
    seen: list[Tensor] = []
    teacher.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    distiller = Distiller(student, teacher, backbone=BACKBONE, neck=NECK, preprocess=lambda x: 255 * x)
    distiller.prepare(images).check(images)
    student(images)
    distiller.loss(images)
    distiller.calibrate([images])
    distiller.maps(images)
    assert len(seen) >= 5
    assert all(torch.equal(x, 255 * images) for x in seen)


def test_a_distiller_leaves_the_random_state_alone(student: Net, teacher: Net, images: Tensor) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    Distiller(student, teacher, backbone=BACKBONE, neck=NECK).prepare(images)
    fastkd.DistillLoss([4, 8], [8, 8])
    torch.testing.assert_close(torch.rand(3), expected)


def test_a_loss_in_a_validation_is_no_training_step(student: Net, teacher: Net, images: Tensor) -> None:
    distiller = Distiller(student, teacher, backbone=BACKBONE, weight="auto").prepare(images)
    with torch.no_grad():
        student(images)
        distiller.loss(images, task_loss=1.0)
    assert distiller.criterion.loss_weight.step == 0
    assert all(x.count == 0 for x in distiller.criterion.statistics)


@pytest.mark.parametrize("scheduler", [None, "OneCycleLR", "LambdaLR", "LinearLR"])
def test_the_optimizer_trains_the_adapters_as_it_trains_the_student(
    scheduler: str | None, student: Net, teacher: Net, images: Tensor
) -> None:
    matrices, vectors = ([p for p in student.parameters() if (p.ndim > 1) is many] for many in (True, False))
    groups = [{"params": vectors, "weight_decay": 0.0}, {"params": matrices, "weight_decay": 0.1}]
    optimizer = torch.optim.SGD(groups, 0.1, momentum=0.9)
    options = {"OneCycleLR": {"max_lr": 0.1, "total_steps": 9}, "LambdaLR": {"lr_lambda": lambda step: 0.5**step}}
    schedule = scheduler and getattr(torch.optim.lr_scheduler, scheduler)(optimizer, **options.get(scheduler, {}))
    distiller = Distiller(student, teacher, backbone=BACKBONE, neck=NECK)
    with pytest.raises(RuntimeError, match=r"prepare\(images\) before"):
        distiller.add_to(optimizer)
    distiller.prepare(images).add_to(optimizer).add_to(optimizer)
    assert len(optimizer.param_groups) == 2
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {decay[id(p)] for p in distiller.parameters() if p.ndim > 1} == {0.1}
    assert {decay[id(p)] for p in distiller.parameters() if p.ndim == 1} == {0.0}
    before = [p.detach().clone() for p in distiller.parameters()]
    for _ in range(2):
        student(images)
        distiller.loss(images).backward()
        optimizer.step()
        if schedule:
            schedule.step()
    assert all(not torch.equal(x, p) for x, p in zip(before, distiller.parameters(), strict=True))
    assert named(distiller.check(images, optimizer))["optimizer"] is True
    with pytest.raises(ValueError, match="one that trains the student"):
        distiller.add_to(torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1))
    with pytest.raises(ValueError, match="got LBFGS; train the adapters with their own"):
        distiller.add_to(torch.optim.LBFGS(student.parameters()))
    distiller.requires_grad_(False)
    assert "are frozen (adapters.0.weight, ...)" in text(distiller.check(images, optimizer))


def test_check_compares_the_rate_of_the_adapters_with_the_students(student: Net, teacher: Net, images: Tensor) -> None:
    distiller = Distiller(student, teacher, backbone=BACKBONE).prepare(images)
    optimizer = torch.optim.SGD(student.parameters(), 0.01, weight_decay=0.1)
    optimizer.add_param_group({"params": list(distiller.parameters()), "lr": 0.1})
    report = distiller.check(images, optimizer)
    assert named(report)["optimizer"] is None
    assert "learning rate 0.1, weight decay 0.1, but the student's with learning rate 0.01" in text(report)


def test_a_teacher_in_half_precision_gets_images_of_its_dtype(student: Net, teacher: Net, images: Tensor) -> None:
    distiller = Distiller(student, teacher.bfloat16(), backbone=BACKBONE, neck=NECK).prepare(images)
    student(images)
    distiller.loss(images).backward()
    assert distiller.check(images).ok


def test_a_module_that_does_not_run_is_named_and_compiling_only_where_it_was(
    student: Net, teacher: Net, images: Tensor
) -> None:
    for model, compiled in ((student, False), (torch.compile(student, backend="eager"), True)):
        distiller = Distiller(model, teacher, backbone=BACKBONE)
        with pytest.raises(RuntimeError, match="whether the forward uses the module") as error:
            distiller.loss(images)
        assert ("torch.compiler.reset" in str(error.value)) is compiled


class Swin(nn.Module):
    """A stage that returns (N, H, W, C), tokens (N, L, C), a tuple, and a sum that is not the output of a module."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 8, 8)
        self.stage = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width))
        self.tokens, self.pair, self.head = nn.Linear(width, width), Pair(), nn.Conv2d(width, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage(self.patch(x).permute(0, 2, 3, 1))
        x = self.tokens(x.flatten(1, 2)).transpose(1, 2).unflatten(2, x.shape[1:3])
        return self.head(self.pair(x)[0] + x)


@pytest.mark.parametrize(("width", "align"), [(6, None), (8, None), (8, "interpolate")])
def test_channels_that_come_last_are_refused(width: int, align: str | None, images: Tensor) -> None:
    distiller = Distiller(Swin(6), Swin(width), backbone=[("stage", "stage")], align=align)
    with pytest.raises(ValueError, match=r"channels seem to come last; .*student_to_map={'stage': \"NHWC\"}"):
        distiller.prepare(images)


def test_outputs_of_any_kind_become_maps(images: Tensor) -> None:
    student, teacher = Swin(4), Swin(8)
    grid = {
        "stage": "NHWC",
        "tokens": lambda x: x.transpose(1, 2).unflatten(2, (4, 4)),
        "pair": lambda output: output[1],
    }
    names = [*grid, "input:head"]
    distiller = Distiller(
        student, teacher, backbone=[(x, x) for x in names], student_to_map=grid, teacher_to_map=grid
    ).prepare(images)
    student(images)
    assert [(s, t) for s, t in distiller.levels or []] == [(x, x) for x in names]
    distiller.loss(images).backward()
    assert student.patch.weight.grad is not None
    assert [list(x) for x in distiller.to_maps] == [list(grid)] * 2
    assert [level.information.shape[1:] for level in distiller.maps(images).levels] == [(4, 4)] * 4
    assert named(distiller.check(images))["gradient"] is True
    with pytest.raises(ValueError, match=r"student_to_map: expected names of its levels, stage; got 'stages'"):
        Distiller(student, teacher, backbone=[("stage", "stage")], student_to_map={"stages": "NHWC"})
    with pytest.raises(TypeError, match=r"student_to_map: expected a function of the module's output"):
        Distiller(student, teacher, backbone=[("stage", "stage")], student_to_map="NCHW")
