"""The imports follow docs/architecture.md: no module imports one of a higher floor, and there are no circles."""

from __future__ import annotations

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/architecture.md").read_text()
INSTALLED = {"torch", "filelock", "triton"}  # torch's requirements; triton only if it is installed


def floors(drawing: int = 0) -> dict[str, int]:
    """Return the floor of each module or folder, from a drawing of the page: 0 for fastkd's, 1 for fastkd.yolov3's."""
    found: dict[str, int] = {}
    floor = -1
    for line in PAGE.split("```")[1 + 2 * drawing].splitlines()[1:]:
        names = line[: (42, 26)[drawing]]
        if names[:2].strip().isdigit():
            floor = int(names[:2])
            names = names[2:]
        found |= {name.rstrip("/"): floor for name in names.split()}
    return found


def imports(file: Path) -> set[str]:
    """Return the modules that a file imports, also inside functions, except imports for types only."""
    found: set[str] = set()
    tree = ast.parse(file.read_text())
    for_types = [x for x in ast.walk(tree) if isinstance(x, ast.If) and "TYPE_CHECKING" in ast.unparse(x.test)]
    left_out = {id(x) for branch in for_types for x in ast.walk(branch)}
    for node in ast.walk(tree):
        if id(node) in left_out:
            continue
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            found |= {f"{node.module}.{x.name}" for x in node.names} | {node.module}
        elif isinstance(node, ast.Import):
            found |= {x.name for x in node.names}
    return found


def modules() -> dict[str, Path]:
    files = (ROOT / "fastkd").rglob("*.py")
    return {".".join(x.relative_to(ROOT).with_suffix("").parts): x for x in files if x.name != "__init__.py"}


def place(module: str) -> str:
    """Return the name of a module of fastkd in the drawing."""
    return module.split(".")[1] if module.count(".") else ""


def test_the_drawing_has_every_module() -> None:
    of_code = {place(module) for module in modules()} - {"__main__"}
    assert of_code == floors().keys()


def test_no_floor_imports_one_above_it() -> None:
    floor = floors() | {"__main__": 5}
    for module, file in modules().items():
        for other in imports(file):
            name = place(other)
            if other.startswith("fastkd.") and name in floor:
                assert floor[name] <= floor[place(module)], f"{module} imports {other}"


def test_the_detector_knows_no_data_and_data_no_training() -> None:
    floor = floors(1)
    inside = {module: file for module, file in modules().items() if place(module) == "yolov3"}
    assert {module.split(".")[2] for module in inside} == floor.keys()
    for module, file in inside.items():
        for other in imports(file):
            name = other.split(".")[2] if other.startswith("fastkd.yolov3.") else ""
            if name in floor:
                assert floor[name] <= floor[module.split(".")[2]], f"{module} imports {other}"


def test_yolov3_and_the_other_trainers_do_not_know_each_other() -> None:
    for module, file in modules().items():
        for one, other in (("yolov3", "integrations"), ("integrations", "yolov3")):
            if place(module) == one:
                assert not any(place(x) == other for x in imports(file) if x.startswith("fastkd.")), module


def test_no_two_modules_import_each_other() -> None:
    known = modules()
    graph = {module: {x for x in imports(file) if x in known and x != module} for module, file in known.items()}
    assert len(list(TopologicalSorter(graph).static_order())) == len(known)  # a circle raises


def test_the_core_imports_torch_alone() -> None:
    core = {name for name, floor in floors().items() if floor <= 3}
    for module, file in modules().items():
        if place(module) not in core:
            continue
        at_import = [x for x in ast.parse(file.read_text()).body if isinstance(x, (ast.Import, ast.ImportFrom))]
        names = {a.name for x in at_import if isinstance(x, ast.Import) for a in x.names}
        names |= {x.module or "" for x in at_import if isinstance(x, ast.ImportFrom)}
        outside = {x.split(".")[0] for x in names} - {"fastkd"} - INSTALLED
        assert outside <= sys.stdlib_module_names, module
