"""One of two gloo processes of Ultralytics' trainer: started as by torchrun from ``ultralytics_checks.py``.

Ultralytics itself uses DDP for GPUs only; this program changes its device settings to CPUs, and nothing else.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import ultralytics_offline  # noqa: F401  # must come before Ultralytics
import yaml
from torch import distributed, nn
from ultralytics.utils import RANK

from fastkd.integrations.ultralytics import DistillationTrainer, Trainer


class TwoCpus(Trainer):
    """Use two CPU processes instead of two GPUs."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.world_size = 2

    def _setup_ddp(self) -> None:
        distributed.init_process_group("gloo")

    def final_eval(self) -> None:
        """The last validation would need a GPU's number."""


class OnCpu(nn.parallel.DistributedDataParallel):
    """DDP of a model without a GPU's number."""

    def __init__(self, module: nn.Module, device_ids: Any, **kwargs: Any) -> None:
        super().__init__(module, **kwargs)


def main() -> None:
    given = yaml.safe_load(Path(sys.argv[1]).read_text())
    nn.parallel.DistributedDataParallel = OnCpu  # type: ignore[misc]
    trainer = TwoCpus(overrides=given["overrides"], distillation=DistillationTrainer(given["teacher"]))
    trainer.train()
    assert isinstance(trainer.model, OnCpu)
    for tensor in (*trainer.distiller.parameters(), *trainer.distiller.buffers(), *trainer.model.parameters()):
        both = [torch.empty_like(tensor) for _ in range(2)]
        distributed.all_gather(both, tensor.detach())
        assert torch.equal(*both), RANK
    print("alike", flush=True)
    distributed.barrier()
    os._exit(0)  # sometimes gloo's threads abort a process that ends normally ("terminate called ...")


if __name__ == "__main__":
    main()
