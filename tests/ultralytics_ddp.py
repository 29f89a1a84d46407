"""One of two gloo processes of Ultralytics' trainer: started by torchrun from ``ultralytics_checks.py``.

Ultralytics itself wraps in DDP for GPUs only; what it says for these is said here for CPUs. All else is its code.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import ultralytics_offline  # noqa: F401  # before Ultralytics
import yaml
from torch import distributed, nn
from ultralytics.utils import RANK

from fastkd.integrations.ultralytics import DistillationTrainer, Trainer


class TwoCpus(Trainer):
    """Two CPU processes instead of two GPUs."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.world_size = 2

    def _setup_ddp(self) -> None:
        distributed.init_process_group("gloo")

    def final_eval(self) -> None:
        """The last validation asks for a GPU's number."""


class OnCpu(nn.parallel.DistributedDataParallel):
    """Takes no GPU's number."""

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
    os._exit(0)  # now and then gloo's threads abort a process that ends by itself ("terminate called ...")


if __name__ == "__main__":
    main()
