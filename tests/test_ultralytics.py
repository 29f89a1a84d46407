"""Distillation in Ultralytics' trainer; its promises are checked by ``ultralytics_checks.py``, see there."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from ultralytics_offline import environment, packages

CHECKS = Path(__file__).with_name("ultralytics_checks.py")


@pytest.mark.skipif(packages() is None, reason="without Ultralytics: pip install it as `make setup` does")
def test_distillation_works_in_ultralytics_own_trainer(tmp_path: Path) -> None:
    options = ["-q", "-p", "no:xdist", "-p", "no:cacheprovider", "--tb=short", "--show-capture=no", "--durations=10"]
    found = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            str(CHECKS),
            *options,
            f"--basetemp={tmp_path / 'checks'}",
        ],
        capture_output=True,
        text=True,
        cwd=CHECKS.parent.parent,
        env=environment(tmp_path),
    )
    assert found.returncode == 0, found.stdout[-12000:] + found.stderr[-4000:]
    assert "skipped" not in found.stdout


def test_without_ultralytics_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ultralytics", None)
    with pytest.raises(ImportError, match=r"needs Ultralytics, .*AGPL-3\.0.*: pip install ultralytics"):
        importlib.import_module("fastkd.integrations.ultralytics")


def test_ultralytics_is_no_dependency() -> None:
    project = (CHECKS.parent.parent / "pyproject.toml").read_text()
    assert "ultralytics" not in project.split("[tool.setuptools]")[0]
