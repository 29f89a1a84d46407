"""The promises of ``fastkd.integrations.ultralytics``, tested with Ultralytics' own trainer, offline and on the CPU.

``test_ultralytics.py`` runs these tests in a process of its own, so that no other test can import Ultralytics or
torchvision.
"""

from __future__ import annotations

import copy
import csv
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import cloudpickle
import pytest
import torch
import ultralytics
import yaml
from processes import launched
from torch import Tensor, nn
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.tasks import DetectionModel
from ultralytics_offline import write_yolo_digits

from fastkd.hooks import FeatureHook
from fastkd.integrations import ultralytics as integration
from fastkd.integrations.ultralytics import DistillationTrainer, find_levels

MODELS = Path(ultralytics.__file__).parent / "cfg" / "models"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ultralytics")


@pytest.fixture(scope="session")
def data(folder: Path) -> Path:
    return write_yolo_digits(folder / "digits", train=48, val=8)


@pytest.fixture(scope="session")
def settings(folder: Path, data: Path) -> dict[str, Any]:
    """Return the arguments of ``YOLO.train`` that all runs share."""
    return {
        "data": str(data),
        "project": str(folder / "runs"),
        "imgsz": 96,
        "batch": 16,
        "epochs": 1,
        "device": "cpu",
        "plots": False,
        "workers": 0,
    }


def narrow(name: str, width: float, folder: Path) -> str:
    """Return a model's YAML file, with reduced width and depth, for the ten digits."""
    content = yaml.safe_load((MODELS / "v3" / f"{name}.yaml").read_text())
    content |= {"nc": 10, "width_multiple": width, "depth_multiple": 0.2}
    file = folder / f"{name}-narrow.yaml"
    file.write_text(yaml.safe_dump(content))
    return str(file)


@pytest.fixture(scope="session")
def tiny(folder: Path) -> str:
    return narrow("yolov3-tiny", 1 / 8, folder)


@pytest.fixture(scope="session")
def teacher(folder: Path, settings: dict[str, Any]) -> str:
    YOLO(narrow("yolov3", 1 / 16, folder)).train(name="teacher", **settings)
    return str(folder / "runs" / "teacher" / "weights" / "best.pt")


Train = Callable[..., Any]


@pytest.fixture(scope="session")
def train(tiny: str, settings: dict[str, Any]) -> Train:
    def run(
        trainer: Any, name: str, *, model: str = tiny, on: dict[str, Callable[..., None]] | None = None, **more: Any
    ):
        """Train, and return the finished trainer; ``on`` are callbacks."""
        student = YOLO(model)
        for event, callback in (on or {}).items():
            student.add_callback(event, callback)
        student.train(trainer=trainer, **{**settings, "name": name, **more})
        return student.trainer

    return run


@pytest.fixture(scope="session")
def run(train: Train, teacher: str) -> Any:
    """Return a finished run with the default options."""
    return train(DistillationTrainer(teacher), "plain", epochs=2)


def columns(trainer: Any) -> dict[str, list[float]]:
    rows = list(csv.DictReader(trainer.csv.open()))
    return {name.strip(): [float(row[name]) for row in rows] for name in rows[0]}


def hooks_of(model: nn.Module) -> list[Any]:
    hooks = [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    return [hook for hook in hooks if isinstance(getattr(hook, "__self__", hook), FeatureHook)]


# ---- levels


@pytest.mark.parametrize(
    ("name", "backbone", "neck"),
    [
        ("v5/yolov5n", [4, 6, 9], [17, 20, 23]),
        ("v8/yolov8n", [4, 6, 9], [15, 18, 21]),
        ("v8/yolov8n-p2", [2, 4, 6, 9], [18, 21, 24, 27]),
        ("v8/yolov8n-p6", [4, 6, 8, 11], [20, 23, 26, 29]),
        ("v9/yolov9t", [4, 6, 9], [15, 18, 21]),
        ("11/yolo11n", [4, 6, 10], [16, 19, 22]),
        ("26/yolo26n", [4, 6, 10], [16, 19, 22]),
    ],
)
def test_levels_are_found_in_the_graphs_of_detection_models(name: str, backbone: list[int], neck: list[int]) -> None:
    model = DetectionModel(str(MODELS / f"{name}.yaml"), verbose=False)
    before = copy.deepcopy(model.state_dict())
    found = find_levels("student", model, torch.zeros(1, 3, 256, 256))
    assert found == {"backbone": [f"model.{i}" for i in backbone], "neck": [f"model.{i}" for i in neck]}
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_unequal_heads_are_matched_by_stride_in_backbone_and_neck(run: Any) -> None:
    assert [(s, t) for s, t in run.distiller.levels] == [
        ("model.6", "model.6"),
        ("model.8", "model.8"),
        ("model.12", "model.10"),
        ("model.19", "model.22"),
        ("model.15", "model.15"),
    ]


def test_without_a_stride_in_common_the_error_lists_both(train: Train, teacher: str) -> None:
    trainer = DistillationTrainer(teacher, backbone=None, neck=([19, 15], [27]))
    with pytest.raises(ValueError, match=r"neck: .* share, got \[16, 32\] and \[8\]"):
        train(trainer, "apart")


def test_a_model_without_detection_head_is_refused_by_its_role() -> None:
    with pytest.raises(ValueError, match="teacher: expected an Ultralytics model that ends in a detection head"):
        find_levels("teacher", nn.Conv2d(3, 8, 1), torch.zeros(1, 3, 64, 64))


def test_the_teacher_must_be_weights() -> None:
    with pytest.raises(ValueError, match=r"teacher: expected trained weights, a \.pt file, got 'yolov3.yaml'"):
        DistillationTrainer("yolov3.yaml").load_teacher()
    with pytest.raises(FileNotFoundError):
        DistillationTrainer("nowhere/teacher.pt").load_teacher()
    with pytest.raises(TypeError, match="teacher: expected a path, a YOLO or a module, got a int"):
        DistillationTrainer(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="reduction: expected 'sum'"):
        DistillationTrainer("teacher.pt", reduction="none")


# ---- the loss


def test_a_factor_means_the_same_for_every_batch_size_and_dtype_of_the_images(tiny: str, teacher: str) -> None:
    """Ultralytics multiplies its terms by the batch size, and older versions validate in half precision."""
    student, images = YOLO(tiny).model.eval(), torch.rand(4, 3, 64, 64)
    distiller = DistillationTrainer(teacher, weight=3.0).distiller(student, YOLO(teacher).model.float(), images)

    def own(preds: Any, batch: Any) -> tuple[Tensor, Tensor]:
        return torch.ones(3) * len(preds), torch.ones(3)

    criterion = integration.Criterion(own, distiller.eval())
    losses = []
    for part in (images, images[:2], images[2:], images.half()):
        preds = student(part.float())[0]
        terms, shown = criterion(preds, {"img": part})
        assert terms[-1] == len(part) * shown[-1]
        losses.append(shown[-1].item())
    whole, first, second, halved = losses
    assert whole == pytest.approx((first + second) / 2, rel=1e-4)
    assert halved == pytest.approx(whole, rel=1e-2)


# ---- training


def test_the_distillation_loss_has_its_own_column_in_training_and_validation(run: Any) -> None:
    table = columns(run)
    names = ["box_loss", "cls_loss", "dfl_loss", "distill_loss"]
    assert [c for c in table if c.startswith("train/")] == [f"train/{n}" for n in names]
    assert [c for c in table if c.startswith("val/")] == [f"val/{n}" for n in names]
    assert all(0 < x < float("inf") for part in ("train", "val") for x in table[f"{part}/distill_loss"])
    header = run.progress_string().strip("\n")
    assert len(header) == 11 * (4 + len(names))
    assert header.split()[2:6] == ["box_loss", "cls_loss", "dfl_loss", "distill"]


def test_the_distillation_loss_falls(train: Train, teacher: str) -> None:
    quick = {"optimizer": "AdamW", "lr0": 0.01, "warmup_epochs": 0}
    trainer = train(DistillationTrainer(teacher, weight=1.5), "falls", epochs=8, nbs=16, **quick)
    for part in ("train", "val"):
        losses = columns(trainer)[f"{part}/distill_loss"]
        assert losses[-1] < 0.8 * losses[0]


def test_without_weight_the_loss_is_held_at_its_share_of_the_detection_loss(train: Train, teacher: str) -> None:
    table = columns(train(DistillationTrainer(teacher, share=0.5), "share"))
    task = sum(table[f"train/{name}_loss"][0] for name in ("box", "cls", "dfl"))
    assert table["train/distill_loss"][0] == pytest.approx(0.5 * task, rel=0.2)


def test_every_level_of_the_student_gets_a_gradient_also_under_autocast(train: Train, teacher: str) -> None:
    found: dict[str, list[float]] = {}

    def gradients(trainer: Any, batch: dict[str, Any], dtype: torch.dtype) -> list[float]:
        outputs: list[Tensor] = []
        layers = [trainer.distiller.student.get_submodule(name) for name, _ in trainer.distiller.levels]
        hooks = [layer.register_forward_hook(lambda *args: outputs.append(args[-1])) for layer in layers]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
            terms, _ = trainer.model(batch)
        for hook in hooks:
            hook.remove()
        assert {x.dtype for x in outputs} == {dtype}
        return [float(g.float().norm()) for g in torch.autograd.grad(terms[-1], outputs)]

    def look(trainer: Any) -> None:
        batch = trainer.preprocess_batch(next(iter(trainer.train_loader)))
        for dtype in (torch.float32, torch.bfloat16):
            found[str(dtype)] = gradients(trainer, batch, dtype)
        trainer.train_loader.reset()
        trainer.stop = True

    train(DistillationTrainer(teacher), "gradients", on={"on_train_start": look})
    assert [len(norms) for norms in found.values()] == [5, 5]
    assert all(0 < norm < float("inf") for norms in found.values() for norm in norms)


def test_what_is_random_is_what_it_is_without_a_teacher(train: Train, teacher: str) -> None:
    seen: list[tuple[float, ...]] = []

    def look(trainer: Any) -> None:
        if trainer.batch_number == 0:
            seen.append(tuple(float(v) for k, v in trainer.loss_items.items() if k != "distill_loss"))
        trainer.batch_number += 1

    def begin(trainer: Any) -> None:
        trainer.batch_number = 0

    callbacks = {"on_train_start": begin, "on_train_batch_end": look}
    train(None, "alone", on=callbacks)
    train(DistillationTrainer(teacher), "taught", on=callbacks)
    assert seen[0] == seen[1]


def test_adapters_are_clipped_warmed_up_and_stepped_with_the_student(train: Train, teacher: str) -> None:
    rates: list[list[float]] = []
    start: list[Tensor] = []

    def begin(trainer: Any) -> None:
        start.extend(p.detach().clone() for p in trainer.distiller.parameters())
        held = {id(p) for p in trainer.model.parameters()}
        assert all(id(p) in held for p in trainer.distiller.parameters())  # the parameters that Ultralytics clips
        assert trainer.optimizer.param_groups[-1]["weight_decay"] == 0
        for name, p in trainer.distiller.student.named_parameters():
            assert p.requires_grad is not name.startswith(("model.0.", "model.2.", "model.20.dfl"))

    def look(trainer: Any) -> None:
        rates.append([g["lr"] for g in trainer.optimizer.param_groups if g.get("param_group") != "bias"])

    callbacks = {"on_train_start": begin, "on_train_batch_end": look}
    trainer = train(DistillationTrainer(teacher), "groups", on=callbacks, epochs=2, nbs=16, warmup_epochs=1, freeze=3)
    assert all(len(set(at_once)) == 1 for at_once in rates)
    assert rates[0][-1] < rates[1][-1]
    after = list(trainer.distiller.parameters())
    assert all(not torch.equal(a, b) for a, b in zip(start, after, strict=True))


def test_sizes_of_images_may_change_from_batch_to_batch(train: Train, teacher: str) -> None:
    sizes: set[int] = set()

    class Sized(integration.Trainer):  # type: ignore[misc]
        def preprocess_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
            batch = super().preprocess_batch(batch)
            sizes.add(batch["img"].shape[-1])
            return batch

    options = DistillationTrainer(teacher)
    train(lambda **kwargs: Sized(**kwargs, distillation=options), "sizes", epochs=3, multi_scale=0.33)
    assert len(sizes) > 1


def test_a_compiled_student_is_listened_to(train: Train, teacher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original, wrapped = torch.compile, []

    def compile_quickly(model: nn.Module, **kwargs: Any) -> Any:
        wrapped.append(model)
        return original(model, backend="aot_eager")  # everything except the C++ compiler, which takes a minute

    monkeypatch.setattr(torch, "compile", compile_quickly)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    trainer = train(DistillationTrainer(teacher), "compiled", compile=True, epochs=2)
    assert trainer.args.compile
    assert isinstance(trainer.model, torch._dynamo.eval_frame.OptimizedModule)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    assert all(x > 0 for x in columns(trainer)["train/distill_loss"])


def test_an_end_to_end_student_keeps_its_own_schedule(train: Train, teacher: str) -> None:
    trainer = train(DistillationTrainer(teacher), "end2end", model=str(MODELS / "26" / "yolo26n.yaml"), fraction=0.4)
    assert [t for _, t in trainer.distiller.levels] == [f"model.{i}" for i in (6, 8, 10, 27, 22, 15)]
    assert trainer.distiller.student.criterion.updates == 1
    assert columns(trainer)["train/distill_loss"][0] > 0


def test_a_loss_that_is_not_finite_takes_the_adapters_back_to_the_last_epoch(train: Train, teacher: str) -> None:
    damaged: list[int] = []

    def damage(trainer: Any) -> None:
        if trainer.epoch == 1 and not damaged:
            damaged.append(1)
            with torch.no_grad():
                next(trainer.distiller.parameters()).fill_(float("nan"))

    trainer = train(DistillationTrainer(teacher), "nan", epochs=3, on={"on_train_epoch_start": damage})
    assert damaged
    assert len(columns(trainer)["epoch"]) == 3
    assert all(bool(p.isfinite().all()) for p in trainer.model.parameters())


def test_a_teacher_given_as_a_model_is_as_it_was_afterwards(train: Train, teacher: str) -> None:
    model = YOLO(teacher)
    image = torch.rand(1, 3, 96, 96)
    with torch.no_grad():
        before = model.model.eval()(image)[0]
    trainer = train(DistillationTrainer(model), "module")
    with torch.no_grad():
        assert torch.equal(model.model(image)[0], before)
    assert not hooks_of(model.model)
    assert not hooks_of(trainer.distiller.student)


# ---- checkpoints

STOCK = """
import sys
from pathlib import Path
sys.modules["fastkd"] = None
import ultralytics_offline
from ultralytics import YOLO
best, unfinished, image = sys.argv[1:]
model = YOLO(best)
assert type(model.model).__name__ == "DetectionModel" and "teacher" not in dir(model.model)
model.predict(image, imgsz=96, verbose=False)
YOLO(unfinished).train(resume=True, save_dir=str(Path(unfinished).parent.parent))
print("epochs", YOLO(unfinished).ckpt["epoch"])
"""


class Interrupted(NamedTuple):
    """A run that was killed while it saved its second epoch: its files after the first one."""

    last: Path
    content: bytes  # content of last.pt
    state: dict[str, Any]  # state of the distillation

    def copied(self, folder: Path) -> Path:
        """Return a copy of last.pt without the files beside it."""
        last = folder / "weights" / "last.pt"
        last.parent.mkdir(parents=True)
        last.write_bytes(self.content)
        return last


@pytest.fixture(scope="session")
def interrupted(train: Train, teacher: str) -> Interrupted:
    kept: dict[str, Any] = {}

    class KilledError(Exception):
        pass

    def remember(trainer: Any) -> None:
        kept.update(trainer=trainer, state=copy.deepcopy(trainer._state()))

    save = DetectionTrainer.save_model

    def kill(trainer: Any) -> bool:
        if trainer.epoch == 1:
            raise KilledError
        return save(trainer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DetectionTrainer, "save_model", kill)
        with pytest.raises(KilledError):
            train(DistillationTrainer(teacher), "killed", epochs=3, on={"on_model_save": remember})
    return Interrupted(kept["trainer"].last, kept["trainer"].last.read_bytes(), kept["state"])


def test_the_checkpoint_loads_and_resumes_in_stock_ultralytics_without_fastkd(
    run: Any, interrupted: Interrupted, data: Path, folder: Path
) -> None:
    last = interrupted.copied(folder / "stock")
    image = next((data.parent / "images" / "val").iterdir())
    stock = subprocess.run(
        [sys.executable, "-c", STOCK, run.best, last, image], capture_output=True, text=True, cwd=folder
    )
    assert stock.returncode == 0, stock.stdout + stock.stderr
    assert stock.stdout.rstrip().endswith("epochs -1")  # finished


def test_checkpoint_and_ema_are_the_students_alone(run: Any, tiny: str) -> None:
    plain = DetectionModel(tiny, verbose=False).state_dict().keys()
    for model in (run.ema.ema, YOLO(run.last).model, YOLO(run.best).model):
        assert model.state_dict().keys() == plain
        assert not hooks_of(model)
        assert model.criterion is None
    saved = torch.load(run.last, weights_only=False)
    del saved["git"]  # of the folder in which the test runs, with the message of its last commit
    assert b"fastkd" not in pickle.dumps(saved)
    assert sorted(p.name for p in run.wdir.iterdir()) == ["best.pt", "last.pt"]


def test_a_killed_run_resumes_with_adapters_statistics_and_optimiser(
    interrupted: Interrupted, train: Train, teacher: str
) -> None:
    last, state = interrupted.last, interrupted.state
    assert sorted(p.name for p in (last.parent / "distillation").iterdir()) == ["epoch0.pt", "epoch1.pt"]
    seen: dict[str, Any] = {}

    def look(trainer: Any) -> None:
        seen.update(state=copy.deepcopy(trainer._state()), epoch=trainer.start_epoch)

    trainer = train(DistillationTrainer(teacher), "killed", model=str(last), resume=True, on={"on_train_start": look})
    assert seen["epoch"] == 1
    assert seen["state"]["levels"] == state["levels"]
    for part in ("distiller", "optimizer"):
        torch.testing.assert_close(seen["state"][part], state[part], rtol=0, atol=0)
    assert all(values["exp_avg"].norm() > 0 for values in state["optimizer"])
    assert state["distiller"]["criterion.statistics.0.count"] > 0
    assert columns(trainer)["epoch"] == [1, 2, 2, 3]  # the second epoch had ended, but its checkpoint was not written
    assert sorted(p.name for p in trainer.wdir.iterdir()) == ["best.pt", "last.pt"]


def test_resuming_with_another_teacher_names_both(
    interrupted: Interrupted, train: Train, teacher: str, folder: Path
) -> None:
    last = interrupted.copied(folder / "resumed")
    other = YOLO(teacher)
    with torch.no_grad():
        next(other.model.parameters()).add_(1)
    other.save(folder / "other.pt")
    again = {"model": str(last), "resume": True, "save_dir": str(last.parent.parent)}
    with pytest.raises(FileNotFoundError, match="resume: expected the distillation state of epoch 1"):
        train(DistillationTrainer(teacher), "", **again)
    (last.parent / "distillation").mkdir()
    torch.save(interrupted.state, last.parent / "distillation" / "epoch0.pt")
    with pytest.raises(ValueError, match=r"teacher: expected the teacher of this run, .*best\.pt .* got .*other\.pt"):
        train(DistillationTrainer(folder / "other.pt"), "", **again)


# ---- processes, callbacks, command


def test_the_trainer_is_picklable_as_ultralytics_own_is_and_keeps_callbacks(
    teacher: str, tiny: str, settings: dict[str, Any]
) -> None:
    overrides = {**settings, "model": tiny, "name": "pickled"}
    callbacks = YOLO(tiny).callbacks
    callbacks["on_train_start"].append(print)
    pickle.loads(cloudpickle.dumps(DetectionTrainer(overrides=overrides, _callbacks=callbacks)))
    trainer = DistillationTrainer(teacher)(overrides=overrides, _callbacks=callbacks)
    again = pickle.loads(cloudpickle.dumps(trainer))
    assert again.distillation.teacher == teacher
    assert print in again.callbacks["on_train_start"]


def test_options_survive_the_file_that_ultralytics_starts_processes_with(
    teacher: str, tiny: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    trainer = DistillationTrainer(teacher, share=0.25)(overrides={**settings, "model": tiny, "name": "spawned"})
    trainer.ddp = True  # as if several GPUs were requested
    started: list[subprocess.CompletedProcess[str]] = []
    start = subprocess.run

    def start_one(command: Any, check: bool) -> None:
        run = [
            sys.executable,
            "-c",
            f"import ultralytics_offline, runpy; runpy.run_path({command[-1]!r}, None, '__main__')",
        ]
        started.append(start(run, capture_output=True, text=True, cwd=folder))

    monkeypatch.setattr(subprocess, "run", start_one)
    monkeypatch.setattr(trainer, "world_size", 1)
    trainer.train()
    assert started[0].returncode == 0, started[0].stdout + started[0].stderr
    table = columns(trainer)
    task = sum(table[f"train/{name}_loss"][0] for name in ("box", "cls", "dfl"))
    assert table["train/distill_loss"][0] == pytest.approx(0.25 * task, rel=0.2)


def test_two_processes_keep_adapters_and_statistics_alike(
    teacher: str, tiny: str, settings: dict[str, Any], folder: Path
) -> None:
    script = Path(__file__).with_name("ultralytics_ddp.py")
    overrides = {**settings, "model": tiny, "name": "two"}
    (folder / "two.yaml").write_text(yaml.safe_dump({"teacher": teacher, "overrides": overrides}))
    found = launched([script, folder / "two.yaml"], processes=2, cwd=folder)
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-4000:]
    assert found.stdout.count("alike") == 2


def test_one_command_distils(teacher: str, tiny: str, settings: dict[str, Any]) -> None:
    words = [f"{key}={value}" for key, value in settings.items() if key not in ("data", "epochs")]
    integration.main(
        ["--teacher", teacher, "--student", tiny, "--data", settings["data"], "--epochs", "1", "--name=command", *words]
    )
    run = Path(settings["project"]) / "command"
    assert "distill_loss" in (run / "results.csv").read_text()
    assert (run / "weights" / "best.pt").is_file()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"task": "segment"}, "task: expected 'detect'"),
        ({"distill_model": "yolov3.pt"}, "distill_model: expected None"),
        ({"quantize": 8}, "quantize: expected no quantisation-aware training"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    setting: dict[str, Any], message: str, teacher: str, tiny: str, settings: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=message):
        DistillationTrainer(teacher)(overrides={**settings, "model": tiny, **setting})
