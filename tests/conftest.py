"""Options and fixtures of the tests.

``--full`` runs all combinations of options, reads the machine code for every card and dtype, and prints a table of
errors.
Without a GPU the Triton kernels are interpreted, which must be set before they are imported.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    import triton.language as tl
    from triton.runtime import interpreter

    def rounds(builder: Any, source: Any, dtype: Any, truncates: Any = interpreter.InterpreterBuilder.cast_impl) -> Any:
        """Round float32 to the nearest bfloat16, as GPUs do; the interpreter truncates instead."""
        if (source.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
            return truncates(builder, source, dtype)
        bits = torch.tensor(source.data).bfloat16().view(torch.uint16).numpy()
        return interpreter.TensorHandle(bits, dtype.scalar)

    interpreter.InterpreterBuilder.cast_impl = rounds

    BUILTINS = {
        package: [(name, member) for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]
        for package in (tl, tl.core, tl.math, tl.tensor)
    }

    def patches(package: Any, *patch: Any, original: Any = interpreter._patch_builtin) -> None:
        """Replace the builtins of Triton's language, as the interpreter does at each call of a function of a kernel.

        The interpreter searches its modules for them each time, which takes 40 % of the time of a test.
        """
        if package not in BUILTINS:
            return original(package, *patch)
        for name, member in BUILTINS[package]:
            if getattr(package, name) is member:
                interpreter._patch_attr(package, name, member, *patch)

    interpreter._patch_builtin = patches


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Return the name of a backend, one of ``samples.TARGETS``; the test's tensors are made on its device."""
    name, device = request.param.split("-")
    with torch.device(device) if device != "cpu" else contextlib.nullcontext():
        yield name


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full", action="store_true", help="all combinations of options, and the machine code of every card and dtype"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the test that takes a minute, so that no other process waits for it at the end."""
    items.sort(key=lambda item: item.path.name != "test_ultralytics.py")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    records = [
        value
        for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
        for name, value in report.user_properties
        if name == "parity"
    ]
    if not records:
        return
    terminalreporter.section("largest error against float64, and relative to eager's own", sep="-")
    for backend, dtype in sorted({(r["backend"], r["dtype"]) for r in records}):
        rows = [r for r in records if (r["backend"], r["dtype"]) == (backend, dtype)]
        for i, what in enumerate(("loss", "gradient")):
            worst = max(rows, key=lambda r: r["ours"][i] / max(r["eager"][i], r["floor"]))
            ratio = worst["ours"][i] / max(worst["eager"][i], worst["floor"])
            largest = max(r["ours"][i] for r in rows)
            at_most = f"at most {ratio:.2f} times eager's ({worst['map']})"
            terminalreporter.write_line(f"{backend:11} {dtype:9} {what:9} largest {largest:.2e}; {at_most}")
