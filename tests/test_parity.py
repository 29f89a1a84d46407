"""Every kernel against the float64 reference: its error is at most twice that of eager PyTorch at the same dtype."""

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
    levels,
    loss_and_gradients,
    on_every_target,
    shapes_for,
    widened,
)

import fastkd
from fastkd.info_map import NORMALIZERS, PENALTIES, InfoMap


def errors(got: list[torch.Tensor], exact: list[torch.Tensor]) -> tuple[float, float]:
    """Largest relative error of a level's loss, and of a level's gradient as a whole; absolute where all is near 0.

    (Equal channels have an entropy that leaves them no weight, up to rounding.)
    """
    by_level = [
        ((x.double() - y).norm() / y.norm().clamp_min(1e-7)).item()
        for x, y in zip([*got[0], *got[1:]], [*exact[0], *exact[1:]], strict=True)
    ]
    return max(by_level[: len(got[0])]), max(by_level[len(got[0]) :])


@pytest.mark.parametrize("info", INFO_MAPS, ids=lambda m: f"{m.score}-{m.norm}")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@on_every_target
def test_error_is_at_most_twice_that_of_eager(
    backend: str, dtype: torch.dtype, info: InfoMap, request: pytest.FixtureRequest, record_property: Any
) -> None:
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("Triton's kernels sum in float32")
    shapes = shapes_for(backend)
    worst = {"reference": [0.0, 0.0], backend: [0.0, 0.0]}
    cases = list(itertools.product(LAYOUTS, PENALTIES, NORMALIZERS))
    if not request.config.getoption("--full"):
        # walks over layouts, penalties and divisors; the slow interpreter's three dtypes together meet each case once
        step = 48 if interpreted(backend) else 23 if backend == "triton" else len(NORMALIZERS) + 1
        cases = cases[(INFO_MAPS.index(info) + len(INFO_MAPS) * DTYPES.index(dtype)) % step :: step]
    for layout, penalty, normalizer in cases:
        sample = levels(dtype, layout, seed=len(layout) + len(normalizer), shapes=shapes)
        options = {"info_map": info, "penalty": penalty, "beta": 0.5, "normalizer": normalizer, "reduction": "none"}
        wide = widened(sample)
        exact = loss_and_gradients(
            fastkd.distill_loss(**wide, **options, backend="reference"), wide["student_feats"]
        )  # fmt: skip
        for name, largest in worst.items():
            loss = fastkd.distill_loss(**sample, **options, backend=name)
            gradients = loss_and_gradients(loss, sample["student_feats"])
            assert all(x.dtype == s.dtype for x, s in zip(gradients[1:], sample["student_feats"], strict=True))
            for i, error in enumerate(errors(gradients, exact)):
                largest[i] = max(largest[i], error)
    # in a level of one cell eager's own roundings may cancel: each of its terms has three to five of half a unit
    floor = {torch.float64: 2e-15, torch.float32: 1.5e-7}.get(dtype, 6e-8)
    ours, eager = worst[backend], worst["reference"]
    target = f"{backend}-{torch.get_default_device().type}"
    record = {"backend": target, "dtype": str(dtype).removeprefix("torch."), "map": f"{info.score}, {info.norm}"}
    record_property("parity", {**record, "ours": ours, "eager": eager, "floor": floor})
    for i, what in enumerate(("loss", "gradient")):
        assert ours[i] <= 2 * max(eager[i], floor), f"{what}: error {ours[i]:.3g}, eager's is {eager[i]:.3g}"


def test_a_compiled_backend_is_tested_here() -> None:
    assert "cpp-cpu" in TARGETS, fastkd.backends("cpu")["cpp"]


@pytest.mark.parametrize("capability", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_that_the_processor_has(capability: str) -> None:
    """In a process of its own each, because the kernels are chosen once; a set that is not there is the next lower."""
    code = """
import torch
from samples import DTYPES, INFO_MAPS, LAYOUTS, levels, loss_and_gradients, widened
import fastkd
for i, (info, dtype) in enumerate((info, dtype) for info in INFO_MAPS for dtype in DTYPES):
    sample = levels(dtype, LAYOUTS[i % len(LAYOUTS)], seed=i)
    options = {"info_map": info, "penalty": ("l2", "l1", "smooth_l1")[i % 3], "reduction": "none"}
    wide = widened(sample)
    got = loss_and_gradients(fastkd.distill_loss(**sample, **options, backend="cpp"), sample["student_feats"])
    exact = loss_and_gradients(fastkd.distill_loss(**wide, **options, backend="reference"), wide["student_feats"])
    for x, y in zip(got, exact, strict=True):
        error = ((x.double() - y).norm() / y.norm().clamp_min(1e-12)).item()
        assert error < 16 * torch.finfo(x.dtype).eps, (info, dtype, error)
"""
    environment = {**os.environ, "FASTKD_CPU_CAPABILITY": capability, "PYTHONPATH": os.path.dirname(__file__)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_unknown_instruction_set_is_a_clear_error() -> None:
    code = "import torch, fastkd; x = [torch.ones(1, 1, 1, 1)]; fastkd.distill_loss(x, x, backend='cpp')"
    environment = {**os.environ, "FASTKD_CPU_CAPABILITY": "sse"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "FASTKD_CPU_CAPABILITY: expected baseline, avx2 or avx512, got sse" in done.stderr
