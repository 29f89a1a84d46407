"""Options of the benchmarks; and what pytest-benchmark writes about the machine, without the name of the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

MIN_ROUNDS, MAX_ROUNDS = 12, 60  # per case


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seconds", type=float, default=4.0, help="time of the rounds of a case")
    parser.addoption("--rounds", type=int, default=0, help="number of rounds per case, for a quick trial of all cases")


@pytest.fixture
def rounds(request: pytest.FixtureRequest) -> Callable[[float], int]:
    """Return a function from the milliseconds of a round to the number of rounds of the case."""
    option = request.config.getoption
    return lambda ms: option("--rounds") or round(min(max(1e3 * option("--seconds") / ms, MIN_ROUNDS), MAX_ROUNDS))


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    del config, machine_info["node"]
    machine_info |= {"torch": torch.__version__, "torch_threads": torch.get_num_threads()}
