"""``--full``: the whole product of options in the parity tests; and a table of the largest errors that they met."""

from __future__ import annotations

from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="parity over the whole product of options, not a part of it")


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
            terminalreporter.write_line(f"{backend:9} {dtype:9} {what:9} largest {largest:.2e}; {at_most}")
