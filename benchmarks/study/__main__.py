"""Runs the study of docs/study: ``make study``, or ``PYTHONPATH=benchmarks python -m study --help``."""

from __future__ import annotations

import argparse
import signal
from pathlib import Path

from study.plan import run_study
from study.report import draw_maps, write_report

DESCRIPTION = """\
Train hundreds of students with and without teachers, maps and levels, with several seeds, on digits scenes, and make
the tables and plots of docs/study. This takes hours on two cores, and tens of GB of disk while it runs. Each run is a
line of the results file; if the study is stopped, the same command continues.
"""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="study", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="folder of scenes and models")
    parser.add_argument("--results", type=Path, help="the results file (default: OUT/results.jsonl)")
    parser.add_argument("--workers", type=int, default=2, help="number of runs at a time")
    parser.add_argument("--report", type=Path, help="folder for the plots; its README.md gets the tables")
    parser.add_argument("--only-report", action="store_true", help="train nothing, and report the existing results")
    options = parser.parse_args(arguments)
    results = options.results or options.out / "results.jsonl"
    if not options.only_report:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        run_study(options.out, results=results, workers=options.workers)
    if options.report:
        write_report(results, options.report)
        if not options.only_report:
            draw_maps(results, options.out, options.report / "maps.png")
        print(f"tables and plots: {options.report}")
    print(f"results: {results}")


if __name__ == "__main__":
    main()
