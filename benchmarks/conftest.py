"""Options of the benchmarks, and what pytest-benchmark is to write about the machine: no names of hosts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

LEAST, MOST = 12, 60  # rounds a case


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seconds", type=float, default=4.0, help="of rounds a case")
    parser.addoption("--rounds", type=int, default=0, help="a case, whatever they take: to see that all of it runs")


@pytest.fixture
def rounds(request: pytest.FixtureRequest) -> Callable[[float], int]:
    """How many rounds a case gets, from the milliseconds of one."""
    option = request.config.getoption
    return lambda ms: option("--rounds") or round(min(max(1e3 * option("--seconds") / ms, LEAST), MOST))


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    del config, machine_info["node"]
    machine_info |= {"torch": torch.__version__, "torch_threads": torch.get_num_threads()}
