"""Compares distillation methods in Ultralytics' trainer: none, Ultralytics' own ``distill_model``, and fastkd.

    .venv/bin/python benchmarks/ultralytics_side_by_side.py            # half an hour on two idle cores
    .venv/bin/python benchmarks/ultralytics_side_by_side.py --smoke    # a short trial that it runs

The data are digits scenes. The models are a pair that Ultralytics' own method accepts (heads of equal length): a YOLOv8
of nano width, trained on many scenes, teaches a YOLOv8 of half the width, which is trained on few. All methods have the
same teacher, scenes, seeds, initial weights and settings, and otherwise their own defaults. The validation scenes are
not used to choose anything: the last weights are scored. The program writes ``ultralytics.json`` and
``ultralytics.md``. It needs what ``make setup`` installs, and downloads nothing.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))
from ultralytics_offline import environment, packages, write_yolo_digits  # noqa: E402

METHODS = ("no teacher", "Ultralytics distill_model", "fastkd")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=40, help="epochs of a student")
    parser.add_argument("--scenes", type=int, default=200, help="training scenes of a student")
    parser.add_argument("--teacher-epochs", type=int, default=8)
    parser.add_argument("--teacher-scenes", type=int, default=3000)
    parser.add_argument("--val-scenes", type=int, default=300)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--smoke", action="store_true", help="a short trial; its results are not kept")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if "YOLO_CONFIG_DIR" not in os.environ:
            sys.exit(_start_again(Path(scratch)))
        if args.smoke:
            vars(args).update(seeds=1, epochs=2, scenes=32, teacher_epochs=1, teacher_scenes=48, val_scenes=16)
            args.out = Path(scratch) / "results"
        torch.set_num_threads(args.threads)
        report = measure(args, Path(scratch))
    table = markdown(report)
    if not args.smoke:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "ultralytics.json").write_text(json.dumps(report, indent=1) + "\n")
        (args.out / "ultralytics.md").write_text(table)
    print(table)


def _start_again(scratch: Path) -> int:
    """Run this program again in a process that can import Ultralytics; return its exit status."""
    if packages() is None:
        sys.exit("Ultralytics is not installed; run: make setup")
    env = environment(scratch)
    env.pop("OMP_NUM_THREADS")
    return subprocess.run([sys.executable, *sys.argv], env=env).returncode


def measure(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    import ultralytics

    from fastkd.integrations.ultralytics import DistillationTrainer

    many = write_yolo_digits(scratch / "many", train=args.teacher_scenes, val=args.val_scenes)
    few = write_yolo_digits(scratch / "few", train=args.scenes, val=args.val_scenes)
    settings = {
        "imgsz": 96,
        "batch": 16,
        "nbs": 16,
        "optimizer": "AdamW",
        "lr0": 0.003,
        "warmup_epochs": 1,
        "mosaic": 0.0,
        "fliplr": 0.0,  # a mirrored digit is not a digit
        "device": "cpu",
        "val": False,
        "plots": False,
        "verbose": False,
        "project": str(scratch / "runs"),
    }
    yaml_of = {width: _yolov8(ultralytics, scratch, width) for width in (0.25, 0.125)}
    teacher = run(yaml_of[0.25], "teacher", {**settings, "data": str(many), "epochs": args.teacher_epochs})
    ways: dict[str, Callable[[], dict[str, Any]]] = {
        METHODS[0]: dict,
        METHODS[1]: lambda: {"distill_model": teacher["weights"]},
        METHODS[2]: lambda: {"trainer": DistillationTrainer(teacher["weights"])},
    }
    runs = []
    for seed in range(args.seeds):
        for method, way in ways.items():  # methods alternate, because the machine's speed varies
            more = {"data": str(few), "epochs": args.epochs, "seed": seed, **way()}
            runs.append({"method": method, "seed": seed, **run(yaml_of[0.125], f"s{len(runs)}", {**settings, **more})})
    return {
        "versions": {"ultralytics": ultralytics.__version__, "torch": torch.__version__},
        "machine": {"processor": platform.processor() or platform.machine(), "threads": args.threads},
        "settings": {k: v for k, v in vars(args).items() if k not in ("out", "smoke", "threads")}
        | {k: settings[k] for k in ("imgsz", "batch", "nbs", "optimizer", "lr0", "warmup_epochs", "mosaic", "fliplr")},
        "teacher": {k: v for k, v in teacher.items() if k != "weights"},
        "runs": [{k: v for k, v in entry.items() if k != "weights"} for entry in runs],
    }


def run(model: str, name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Train a model; return mAP of the last weights, in percent, and seconds per epoch."""
    from ultralytics import YOLO

    student = YOLO(model)
    student.train(name=name, **settings)
    folder = Path(student.trainer.save_dir)
    with (folder / "results.csv").open() as file:
        clock = [float(row["time"]) for row in csv.DictReader(file)]
    between = [b - a for a, b in zip([0.0, *clock], clock, strict=False)][:-1]  # the last epoch includes the validation
    last = YOLO(folder / "weights" / "last.pt")
    box = last.val(data=settings["data"], imgsz=96, batch=32, device="cpu", plots=False, verbose=False).box
    return {
        "weights": str(folder / "weights" / "last.pt"),
        "parameters": sum(p.numel() for p in last.model.parameters()),
        "map50_95": round(100 * float(box.map), 2),
        "map50": round(100 * float(box.map50), 2),
        "seconds_per_epoch": round(statistics.median(between or clock), 3),
    }


def _yolov8(ultralytics: Any, folder: Path, width: float) -> str:
    content = yaml.safe_load((Path(ultralytics.__file__).parent / "cfg/models/v8/yolov8.yaml").read_text())
    content |= {"nc": 10, "scales": {"n": [0.33, width, 1024]}}
    file = folder / f"yolov8n-{width}.yaml"
    file.write_text(yaml.safe_dump(content))
    return str(file)


def markdown(report: dict[str, Any]) -> str:
    settings, teacher, runs = report["settings"], report["teacher"], report["runs"]
    seeds = settings["seeds"]
    lines = [
        "# Ultralytics' trainer, on digits scenes",
        "",
        f"Ultralytics {report['versions']['ultralytics']}, torch {report['versions']['torch']}, "
        f"{report['machine']['threads']} threads; {settings['scenes']} scenes, {settings['epochs']} epochs, {seeds} "
        f"seeds; scored on {settings['val_scenes']} scenes that were not used to choose anything. The teacher, a "
        f"YOLOv8 of {teacher['parameters']:,} parameters, was trained on {settings['teacher_scenes']} scenes for "
        f"{settings['teacher_epochs']} epochs: {teacher['map50_95']:.1f} mAP50-95. The student has "
        f"{runs[0]['parameters']:,} parameters. Each method has its own defaults; none was tuned.",
        "",
        "| student | mAP50-95, mean | each seed | mAP50, mean | s per epoch, median |",
        "|---|---|---|---|---|",
    ]
    for method in METHODS:
        of = [entry for entry in runs if entry["method"] == method]
        each = ", ".join(f"{entry['map50_95']:.1f}" for entry in of)
        means = [statistics.mean(entry[key] for entry in of) for key in ("map50_95", "map50")]
        seconds = statistics.median(entry["seconds_per_epoch"] for entry in of)
        lines.append(f"| {method} | {means[0]:.1f} | {each} | {means[1]:.1f} | {seconds:.2f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
