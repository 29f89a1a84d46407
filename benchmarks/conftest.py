"""What pytest-benchmark is to write about the machine: no names of hosts."""

from __future__ import annotations

from typing import Any

import torch


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    del config, machine_info["node"]
    machine_info |= {"torch": torch.__version__, "torch_threads": torch.get_num_threads()}
