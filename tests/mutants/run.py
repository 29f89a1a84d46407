"""``make mutants``: small wrong changes to fastkd's core, each met by the tests that cover its line.

cosmic-ray makes the changes, one at a time, in a copy of the repository, build/mutants/tree, where this file runs. Here
is what it leaves to its users: which changes are tried (``choose``), which tests meet them (``meet``), and the table of
docs/mutants.md (``report``). Tests run in a fork, as a new process would import torch for each mutant.
"""

from __future__ import annotations

import ast
import math
import multiprocessing
import os
import random
import signal
import sqlite3
import sys
from collections import Counter, defaultdict
from pathlib import Path
from xml.etree import ElementTree

import pytest
import toml
import torch._dynamo  # noqa: F401  # before the forks
from cosmic_ray import cli, mutating
from cosmic_ray.work_db import use_db
from cosmic_ray.work_item import TestOutcome, WorkerOutcome, WorkResult
from coverage import CoverageData

SESSION = "../session.sqlite"
MARK = "<!-- make mutants writes what follows -->\n"


def execute(most: str) -> None:
    """Try what is left to be tried."""

    def in_a_fork(_: str, timeout: float) -> tuple[TestOutcome, str]:
        child = multiprocessing.get_context("fork").Process(target=meet, args=(float(most),))
        child.start()
        child.join(timeout)
        if child.is_alive():
            os.killpg(child.pid, signal.SIGKILL)
            return TestOutcome.KILLED, "timeout"
        return (TestOutcome.KILLED if child.exitcode else TestOutcome.SURVIVED), ""

    mutating.run_tests = in_a_fork
    sys.dont_write_bytecode = True  # two mutants of a file may have the size and the second of each other
    cli.main(["exec", "tests/mutants/cosmic-ray.toml", SESSION])


def meet(most: float) -> None:
    """Run the tests that cover the line that is changed in the copy, the fastest first, up to ``most`` seconds."""
    os.setsid()
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    pairs = [(x, Path("fastkd") / x.relative_to("../original")) for x in Path("../original").rglob("*.py")]
    original, mutant = next(pair for pair in pairs if pair[0].read_text() != pair[1].read_text())
    lines, changed = (x.read_text().splitlines() for x in (original, mutant))
    row = 1 + next(i for i, line in enumerate(lines) if [line] != changed[i : i + 1])
    data = CoverageData("../coverage")
    data.read()
    found = data.contexts_by_lineno(str(mutant.resolve()))
    tests = {i: {x.partition("|")[0] for x in contexts} for i, contexts in found.items()}
    # what runs at import, such as a default, is covered by the tests of its function, its class or its module
    nodes = [x for x in ast.walk(ast.parse(original.read_text())) if isinstance(x, (ast.FunctionDef, ast.ClassDef))]
    spans = [range(min(y.lineno for y in (x, *x.decorator_list)), x.end_lineno + 1) for x in nodes]
    parts = [[row], *sorted([x for x in spans if row in x], key=len), tests]
    covering = next((x for part in parts if (x := set().union(*(tests.get(i, ()) for i in part)) - {""})), set())
    took, functions, order = {}, Counter(), {}
    for case in ElementTree.parse("../tests.xml").iter("testcase"):
        file, _, group = case.get("classname").partition(".Test")
        test = f"{file.replace('.', '/')}.py::{f'Test{group}::' * bool(group)}{case.get('name')}"
        if test in covering and not {x.tag for x in case} & {"failure", "error", "skipped"}:
            took[test] = float(case.get("time"))
    for test in sorted(took, key=took.get):
        functions[test.partition("[")[0]] += 1
        order[test] = functions[test.partition("[")[0]], took[test]  # of a test's parameters the first, then others
    chosen, seconds = [], 0.0
    for test in sorted(order, key=order.get):
        if seconds + took[test] <= most:
            chosen, seconds = [*chosen, test], seconds + took[test]
    print(f"{mutant}:{row}: {len(chosen)} of {len(covering)} tests, {seconds:.1f} s", flush=True)
    arguments = ["-x", "-q", "--tb=line", "--disable-warnings", "-p", "no:cacheprovider", *chosen]
    sys.exit(pytest.main(arguments) if chosen else 0)


def choose(size: str) -> None:
    """Leave a sample to be tried, the same each time, and what lived in an earlier run; skip the rest."""
    with sqlite3.connect(SESSION) as file:
        file.execute("delete from work_results where test_outcome = 'SURVIVED' or output = 'not in the sample'")
    with use_db(SESSION) as db:
        filtered = {job for job, result in db.results if result.test_outcome is None}
        items = [(x.mutations[0], x.job_id) for x in db.work_items if x.job_id not in filtered]
        items.sort(key=lambda x: (str(x[0].module_path), x[0].operator_name, x[0].occurrence))
        random.Random(0).shuffle(items)
        sizes, seen, order = Counter(x.module_path for x, _ in items), Counter(), {}
        for x, job in items:  # of a module as many as the square root of its size, so that small ones have some
            seen[x.module_path] += 1
            order[job] = seen[x.module_path] / math.sqrt(sizes[x.module_path])
        done = {job for job, _ in db.results}
        spared = [job for job in sorted(order, key=order.get)[int(size) :] if job not in done]
        db.set_multiple_results(spared, WorkResult(WorkerOutcome.SKIPPED, "not in the sample"))
        print(f"{len(db.pending_work_items)} mutants to try, of {len(items)}")


def report(page: str) -> None:
    """Write the table and the lists into the page."""
    reasons, ends = toml.load("tests/mutants/equivalent.toml"), ("caught", "lived", "equivalent")
    counts, lists = defaultdict(Counter), defaultdict(list)
    with use_db(SESSION) as db:
        for item, result in db.completed_work_items:
            if result.test_outcome is None:
                continue
            module, diff = str(item.mutations[0].module_path), [x for x in result.diff.split("\n")[3:] if x[1:].strip()]
            was, now = (" ".join(x[1:].partition("  #")[0].strip() for x in diff if x[0] == sign) for sign in "-+")
            reason = reasons.get(module, {}).get(now or was)
            end = "caught" if result.is_killed else "equivalent" if reason else "lived"
            counts[module][end] += 1
            lists[end].append(f"- `{module}`: `{was}` → `{now or 'nothing'}`" + f": {reason}" * bool(reason))
    rows = {**dict(sorted(counts.items())), "**all**": sum(counts.values(), Counter())}
    table = ["| module | tried | caught | lived | equivalent |", "|---|---|---|---|---|"]
    table += [f"| {name} | {n.total()} | {' | '.join(str(n[end]) for end in ends)} |" for name, n in rows.items()]
    blocks = [f"\n{end.capitalize()}:\n\n" + "\n".join(sorted(lists[end])) for end in ends[1:] if lists[end]]
    print(text := "\n".join([*table, *blocks]))
    Path(page).write_text(Path(page).read_text().partition(MARK)[0] + MARK + "\n" + text + "\n")


if __name__ == "__main__":
    {"choose": choose, "execute": execute, "report": report}[sys.argv[1]](*sys.argv[2:])
