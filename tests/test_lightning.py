"""DistillationCallback with a LightningModule that has no code for it."""

from __future__ import annotations

import functools
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from processes import launched
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fastkd.yolov3 import YOLOv3, YOLOv3Tiny

lightning = pytest.importorskip("lightning.pytorch")
from fastkd.integrations.lightning import DistillationCallback  # noqa: E402

LEVELS = {
    "backbone": (list(YOLOv3Tiny.backbone_levels), list(YOLOv3.backbone_levels)),
    "neck": (list(YOLOv3Tiny.neck_levels), list(YOLOv3.neck_levels)),
}


class Module(lightning.LightningModule):
    """A module as users write it; its task is to keep the heads' outputs small."""

    def __init__(self, returns: str = "tensor") -> None:
        super().__init__()
        torch.manual_seed(1)
        self.detector = YOLOv3Tiny(4, 0.125)
        self.returns = returns

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = sum(x.square().mean() for x in self.detector(batch[0]))
        return loss if self.returns == "tensor" else {"loss": loss, "extra": batch_idx}

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=100)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class ByHand(Module):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Records(lightning.Callback):
    """Records what was logged, and the norm of each adapter's gradient, by step."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []
        self.gradients: list[list[float]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        (callback,) = (x for x in trainer.callbacks if isinstance(x, DistillationCallback))
        self.gradients.append([p.grad.norm().item() for p in callback.distiller.parameters()])

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.logged.append({name: value.item() for name, value in trainer.callback_metrics.items()})


def teacher() -> YOLOv3:
    torch.manual_seed(0)
    model = YOLOv3(4, 0.125)
    for _ in range(3):
        model(torch.rand(4, 3, 64, 64))
    return model


def loader(batches: int) -> DataLoader[Any]:
    images = torch.rand(2 * batches, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    return DataLoader(TensorDataset(images), batch_size=2)


def fit(
    module: Any,
    *,
    folder: Path,
    steps: int,
    ckpt_path: Path | None = None,
    more: Any = (),
    batches: Any = 4,
    loss: Any = None,
    **trainer: Any,
) -> tuple[Records, DistillationCallback, Any]:
    records = Records()
    callback = DistillationCallback(teacher(), student="detector", **{**LEVELS, **(loss or {})})
    options = {
        "accelerator": "cpu",
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "logger": False,
        **trainer,
    }
    made = lightning.Trainer(max_steps=steps, callbacks=[callback, records, *more], default_root_dir=folder, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The 'train_dataloader' does not have many workers")
        made.fit(module, loader(batches) if isinstance(batches, int) else batches, ckpt_path=ckpt_path)
    return records, callback, made


@pytest.mark.parametrize("returns", ["tensor", "dict"])
def test_an_unchanged_module_learns_at_every_level(returns: str, tmp_path: Path) -> None:
    module = Module(returns)
    records, callback, _ = fit(module, folder=tmp_path, steps=12, loss={"weight": 1.0, "info_map": "uniform"})
    names = {f"distill_loss/{name}" for name in (*YOLOv3Tiny.backbone_levels, *YOLOv3Tiny.neck_levels)}
    assert records.logged[0].keys() == {"distill_loss", *names}
    for name in ("distill_loss", *names):  # the same four batches at the beginning and at the end
        first, last = (sum(x[name] for x in part) for part in (records.logged[:4], records.logged[-4:]))
        assert last < first
    assert len(records.gradients) == 12
    assert all(norm > 0 for norms in records.gradients for norm in norms)
    assert "training_step" not in vars(module)  # as it was before
    assert callback.distiller is not None
    assert len(callback.distiller.levels or []) == 5


def test_a_checkpoint_holds_the_student_alone_and_a_run_that_was_resumed_ends_as_one_that_was_not(
    tmp_path: Path,
) -> None:
    each_epoch = lightning.callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    one = {"folder": tmp_path, "steps": 8, "batches": 1}  # one epoch: a resumed loader starts from its beginning
    whole, _, _ = fit(Module(), **one, enable_checkpointing=True, more=[each_epoch])
    saved = torch.load(tmp_path / "epoch=3.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == Module().state_dict().keys()
    assert saved["callbacks"]["DistillationCallback"]["distiller"]["criterion.loss_weight.step"] == 4

    rest, callback, _ = fit(Module(), **one, ckpt_path=tmp_path / "epoch=3.ckpt")
    assert rest.logged == whole.logged[4:]
    assert rest.gradients == whole.gradients[4:]
    assert callback.distiller is not None
    assert callback.distiller.criterion.loss_weight.step == 8


def test_mixed_precision_and_accumulated_gradients(tmp_path: Path) -> None:
    records, callback, _ = fit(
        Module(), folder=tmp_path, steps=2, precision="bf16-mixed", accumulate_grad_batches=2, gradient_clip_val=1.0
    )
    assert len(records.gradients) == 2
    assert len(records.logged) == 4
    assert callback.distiller is not None
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in callback.distiller.parameters())
    weights, _, _ = fit(Module(), folder=tmp_path, steps=2, precision="bf16-true")
    assert all(norm > 0 for norms in weights.gradients for norm in norms)


def test_a_module_that_optimises_by_hand_is_told_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"with manual optimisation; make a fastkd.Distiller"):
        fit(ByHand(), folder=tmp_path, steps=1)


def test_a_strategy_that_shards_the_module_is_refused(tmp_path: Path) -> None:
    for name in ("FSDPStrategy", "DeepSpeedStrategy"):  # the second is a subclass of DDPStrategy
        strategy = object.__new__(getattr(lightning.strategies, name))
        callback = DistillationCallback(teacher(), student="detector", **LEVELS)
        with pytest.raises(ValueError, match=f"expected one device or a ddp strategy, .* got {name}"):
            callback.setup(SimpleNamespace(strategy=strategy), Module(), "fit")


def test_levels_of_one_student_module_are_logged_apart(tmp_path: Path) -> None:
    levels = {"backbone": [("conv16", "backbone.stage16"), ("conv16", "neck16")], "neck": None}
    records, _, _ = fit(Module(), folder=tmp_path, steps=1, loss=levels)
    assert {"distill_loss/conv16-backbone.stage16", "distill_loss/conv16-neck16"} <= records.logged[0].keys()


def test_a_training_step_of_the_instance_comes_back(tmp_path: Path) -> None:
    """A method of the instance, such as ``torch.compile(module)`` leaves, is restored."""
    module = Module()
    module.training_step = step = functools.partial(Module.training_step, module)
    fit(module, folder=tmp_path, steps=1)
    assert vars(module)["training_step"] is step


def test_batches_that_are_dictionaries_want_to_know_where_the_images_are(tmp_path: Path) -> None:
    class Named(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step([batch["pixels"]], batch_idx)

    batches = DataLoader([{"pixels": torch.rand(2, 3, 64, 64), "boxes": torch.zeros(1)}], batch_size=None)
    with pytest.raises(TypeError, match=r"images: .*got a dict with 'pixels', 'boxes'; .*images=lambda batch"):
        fit(Named(), folder=tmp_path, steps=1, batches=batches)
    records, _, _ = fit(Named(), folder=tmp_path, steps=1, batches=batches, loss={"images": lambda x: x["pixels"]})
    assert records.logged[0]["distill_loss"] > 0


def test_a_step_without_a_loss_is_named(tmp_path: Path) -> None:
    class Lossless(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.detector(batch[0])
            return {"total": 1.0}

    with pytest.raises(TypeError, match=r"a dict with one under 'loss', got dict"):
        fit(Lossless(), folder=tmp_path, steps=1)


def _two_processes(folder: str) -> None:
    """Train in each process, and save its adapters; batch norms are in eval mode, so that one process does the same."""
    module = Module()
    module.detector.eval()
    module.on_train_epoch_start = lambda: module.detector.eval()  # type: ignore[method-assign]
    _, callback, trainer = fit(
        module, folder=Path(folder), steps=2, strategy="ddp", devices=2, accumulate_grad_batches=2
    )
    assert callback.distiller is not None
    state = {**module.state_dict(), **callback.distiller.state_dict()}
    torch.save({k: v for k, v in state.items() if isinstance(v, Tensor)}, f"{folder}/{trainer.global_rank}.pt")


def test_two_processes_have_the_same_student_adapters_and_statistics(tmp_path: Path) -> None:
    done = launched([__file__, tmp_path], processes=2)
    assert done.returncode == 0, done.stderr
    ours, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name, value in ours.items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")
    start = nn.ModuleDict({"detector": Module().detector}).state_dict()
    assert not torch.equal(ours["detector.conv8.conv.weight"], start["detector.conv8.conv.weight"])


if __name__ == "__main__":
    _two_processes(sys.argv[1])
