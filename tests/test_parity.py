"""Every kernel against the float64 reference: its error is at most twice that of eager PyTorch in the same dtype."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from samples import (
    DTYPES,
    INFO_MAPS,
    LAYOUTS,
    TARGETS,
    interpreted,
    learning,
    levels,
    on_every_target,
    shapes_for,
    step,
    widened,
    with_bias,
)

import fastkd
from fastkd.ops.presets import DIVISORS, PENALTIES, InfoMap


def errors(got: list[torch.Tensor], exact: list[torch.Tensor]) -> tuple[float, float]:
    """Return the largest relative error of a level's loss, and of a level's gradient; absolute if all is near 0.

    The latter occurs for equal channels, whose entropy gives them no weight, up to rounding.
    """
    by_level = [
        ((x.double() - y).norm() / y.norm().clamp_min(1e-7)).item()
        for x, y in zip([*got[0], *got[1:]], [*exact[0], *exact[1:]], strict=True)
    ]
    return max(by_level[: len(got[0])]), max(by_level[len(got[0]) :])


@pytest.mark.parametrize("info", INFO_MAPS, ids=lambda m: f"{m.score}-{m.map_norm}")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@on_every_target
def test_error_is_at_most_twice_that_of_eager(
    backend: str, dtype: torch.dtype, info: InfoMap, request: pytest.FixtureRequest, record_property: Any
) -> None:
    """Test one pass and two, with priors, moments, biases, a factor, and upstream gradients that differ by level."""
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("Triton's kernels sum in float32")
    full = request.config.getoption("--full")
    if interpreted(backend) and not full and (INFO_MAPS.index(info) // 2 + DTYPES.index(dtype)) % 2:
        pytest.skip("the interpreter is slow, so each map takes one or two dtypes: the others with --full")
    shapes = shapes_for(backend)
    # float16 always takes two passes; with the slow interpreter, a test takes one of the two ways
    ways = [True] if interpreted(backend) and INFO_MAPS.index(info) % 2 else [False]
    ways = ways if interpreted(backend) or dtype == torch.float16 else [True, False]
    worst = {name: [0.0, 0.0] for name in ("eager", *ways)}
    cases = list(itertools.product(LAYOUTS, PENALTIES, DIVISORS))
    if not full:
        # goes through layouts, penalties and divisors; the slow interpreter gets one case per map and dtype
        every = len(cases) if interpreted(backend) else 23 if backend == "triton" else 2 * len(DIVISORS) + 1
        cases = cases[(INFO_MAPS.index(info) + len(INFO_MAPS) * DTYPES.index(dtype)) % every :: every]
    for layout, penalty, divisor in cases:
        sample = with_bias(levels(dtype, layout, seed=len(layout) + len(divisor), shapes=shapes))
        options = {"info_map": info, "penalty": penalty, "beta": 0.5, "divisor": divisor}
        upstream, factor = torch.linspace(-1, 2, len(shapes)), torch.tensor(0.7)
        exact = step(widened(sample), upstream, factor, **options, backend="reference")
        for way, largest in worst.items():
            chosen = {"backend": "reference"} if way == "eager" else {"backend": backend, "one_pass": way}
            got = step(sample, upstream, factor, **options, **chosen)
            assert [x.dtype for x in got[1:]] == [x.dtype for x in learning(sample)]
            for i, error in enumerate(errors(got, exact)):
                largest[i] = max(largest[i], error)
    # in a level of one cell eager's rounding errors may cancel; each term has three to five errors of half a unit
    floor = {torch.float64: 2e-15, torch.float32: 1.5e-7}.get(dtype, 6e-8)
    eager = worst.pop("eager")
    target = f"{backend}-{torch.get_default_device().type}"
    record = {"backend": target, "dtype": str(dtype).removeprefix("torch."), "map": f"{info.score}, {info.map_norm}"}
    for one_pass, ours in worst.items():
        record_property("parity", {**record, "ours": ours, "eager": eager, "floor": floor})
        for i, what in enumerate(("loss", "gradient")):
            assert ours[i] <= 2 * max(eager[i], floor), (one_pass, what, ours[i], eager[i])


def test_a_compiled_backend_is_tested_here() -> None:
    assert "cpp-cpu" in TARGETS, fastkd.backends("cpu")["cpp"]


@pytest.mark.parametrize("capability", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_that_the_processor_has(capability: str) -> None:
    """Each set has a process of its own, as kernels are chosen once; a missing set falls back to the next lower one."""
    code = """
import torch
from samples import DTYPES, INFO_MAPS, LAYOUTS, levels, step, widened, with_bias
count = len(DTYPES)  # two dtypes for each map
pairs = [(x, DTYPES[(i + j) % count]) for i, x in enumerate(INFO_MAPS) for j in (i // count, i // count + 2)]
for i, (info, dtype) in enumerate(pairs):
    sample = with_bias(levels(dtype, LAYOUTS[i % len(LAYOUTS)], seed=i))
    options = {"info_map": info, "penalty": ("l2", "l1", "smooth_l1")[i % 3]}
    exact = step(widened(sample), **options, backend="reference")
    for one_pass in (False, True):
        for x, y in zip(step(sample, **options, backend="cpp", one_pass=one_pass), exact, strict=True):
            error = ((x.double() - y).norm() / y.norm().clamp_min(1e-12)).item()
            # in two passes the gradient of a bias is the sum of one that was rounded to the features' dtype
            rounded = x.dtype if one_pass and dtype != torch.float16 else dtype
            assert error < 16 * torch.finfo(rounded).eps, (info, dtype, one_pass, error)
"""
    environment = {**os.environ, "FASTKD_CPU_CAPABILITY": capability, "PYTHONPATH": os.path.dirname(__file__)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_unknown_instruction_set_is_a_clear_error() -> None:
    code = "import torch, fastkd; x = [torch.ones(1, 1, 1, 1)]; fastkd.distill_loss(x, x, backend='cpp')"
    environment = {**os.environ, "FASTKD_CPU_CAPABILITY": "sse"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "FASTKD_CPU_CAPABILITY: expected baseline, avx2 or avx512, got sse" in done.stderr
