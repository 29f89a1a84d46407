"""The command ``fastkd``: train, eval, predict, export, inspect, data, demo, doctor.

Heavy imports stay inside the commands.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import fastkd
from fastkd.loss_weight import weight_of
from fastkd.ops.backends import choose
from fastkd.ops.factor import DECAYS
from fastkd.ops.presets import CWD, PENALTIES

if TYPE_CHECKING:
    from fastkd.health import Report
    from fastkd.yolov3.checkpoint import Trained
    from fastkd.yolov3.data.annotations import Annotations
    from fastkd.yolov3.onnx_detector import Exported
    from fastkd.yolov3.train.config import TrainConfig

# packages of the extra [train], and the module of each
EXTRAS = {
    "accelerate": "accelerate",
    "defusedxml": "defusedxml",
    "matplotlib": "matplotlib",
    "numpy": "numpy",
    "opencv-python-headless": "cv2",
    "pillow": "PIL",
    "pycocotools": "pycocotools",
    "pyyaml": "yaml",
    "scikit-learn": "sklearn",
    "tensorboard": "tensorboard",
    "tqdm": "tqdm",
}
EXPORT_EXTRAS = ("onnx", "onnxruntime", "onnxscript")  # what [export] brings

OVERVIEW = """\
Train small object detectors with the help of large ones (knowledge distillation).

  fastkd demo                                train a student with and without distillation, in minutes on a CPU
  fastkd doctor                              check what is installed and whether distillation works
"""

TRAIN = """\
Train a detector; with --teacher, it also learns from that teacher (knowledge distillation).

  fastkd data digits --out runs/digits
  fastkd train --data runs/digits --out runs/teacher --model yolov3 --width 0.25 --size 96 --steps 1200 \\
               --lr 1.6e-2 --match-threshold 0.3 --flip 0 --multi-scale 0 --cache
  fastkd train --data runs/digits --train train_100 --out runs/student --width 0.25 --size 96 --steps 1280 \\
               --lr 0.128 --weight-decay 0.05 --distill-share 4 --flip 0 --multi-scale 0 --cache \\
               --teacher runs/teacher/model.pt

The folder of --out gets model.pt (the detector alone), model.weights (Darknet's format), checkpoint.pt (from which
--resume continues), results.csv, metrics.jsonl, plots (docs/what_you_see.md lists them) and TensorBoard curves
(tensorboard --logdir runs). The default of --out is runs/DATA-MODEL, with a teacher runs/DATA-MODEL-distilled, and
with -2, -3, ... added if that folder exists; --resume then continues the last of these runs with the same options.
With few images of your own, start from trained weights: --init yolov3-tiny.weights; their classes may be others.
With several GPUs: torchrun --nproc-per-node 4 -m fastkd train ...
"""

DATA_HELP = """data set: a folder in the layout of COCO (annotations/NAME.json or annotations/instances_NAME.json,
images in images/NAME, NAME or images; or NAME/_annotations.coco.json beside its images), of Pascal VOC
(ImageSets/Main/NAME.txt, Annotations, JPEGImages; or .xml files beside the images of NAME), of YOLO (data.yaml, or
images and labels with classes.txt), of Darknet (obj.data), or with NAME_labels.csv; docs/data.md shows them all"""

HELP_OF_VAL = """validation set, or 'none' (default: val; if --data has no such set, a tenth of --train is held back,
and the folder split in --out lists its images)"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status: 0, 1 (doctor or data check found a fault), 2 (error), 130 (stopped)."""
    arguments = _parser().parse_args(argv)
    try:
        status: int = arguments.command(arguments)
        return status
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        extra = "train" if missing in EXTRAS.values() else "export" if missing in EXPORT_EXTRAS else None
        if extra is None:
            raise
        return _fail(f"this command needs {missing}, which is not installed: pip install 'fastkd[{extra}]'")
    except (ValueError, OSError, FloatingPointError, MemoryError) as error:
        if arguments.traceback:
            raise
        return _fail(str(error))
    except KeyboardInterrupt:
        hint = "; to continue, run the same command with --resume" if arguments.command is _train else ""
        print(f"\nstopped{hint}", file=sys.stderr)
        return 130


def _fail(message: str) -> int:
    if "Original Traceback" in message:  # an error in a data loader process: the last line has the error itself
        message = message.strip().splitlines()[-1].partition(": ")[2]
    print(f"fastkd: error: {message}", file=sys.stderr)
    return 2


# ---- arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "fastkd", description=OVERVIEW, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"fastkd {fastkd.__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from, to report a bug")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_train(commands)
    _add_eval(commands)
    _add_predict(commands)
    _add_export(commands)
    _add_inspect(commands)
    _add_data(commands)
    _add_demo(commands)
    _add_doctor(commands)
    return parser


def _command(commands: Any, name: str, run: Any, help_text: str, text: str = "") -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help_text,
        description=text or f"{help_text[0].upper()}{help_text[1:]}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=run)
    return parser


def _add_train(commands: Any) -> None:
    parser = _command(commands, "train", _train, "train a detector, with or without a teacher", TRAIN)
    data = parser.add_argument_group("data")
    data.add_argument("--data", required=True, metavar="DIR", help=DATA_HELP)
    data.add_argument("--train", default="train", metavar="NAME", help="training set in --data (default: train)")
    data.add_argument("--val", default="val", metavar="NAME", help=HELP_OF_VAL)

    # Without a default here, an option that is not given has the default of TrainConfig; a test compares the texts.
    def add(group: Any, flag: str, help_text: str, **options: Any) -> None:
        options.setdefault("default", argparse.SUPPRESS)
        if "action" not in options and "choices" not in options:
            options.setdefault("metavar", "N" if options.get("type") in (int, float) else "FILE")
        group.add_argument(flag, help=help_text, **options)

    add(data, "--size", "side of the network's square input in pixels, a multiple of 32 (default: 416)", type=int)
    add(data, "--limit", "use the first N training images (default: all)", type=int)
    add(data, "--workers", "number of processes that load images (default: 0)", type=int)
    add(data, "--strict", "stop at an image that can't be read, instead of leaving it out", action="store_true")
    add(data, "--cache", "keep decoded images in memory: faster, if they fit", action="store_true")
    flip = "probability of mirroring an image; use 0 if mirroring changes the class (default: 0.5)"
    add(data, "--flip", flip, type=float)
    add(data, "--mosaic", "probability of joining an image with three others (default: 0)", type=float)
    scales = "largest change of the input size, as a share of --size, 0 for one size (default: 0.25)"
    add(data, "--multi-scale", scales, type=float)

    model = parser.add_argument_group("model")
    names = ("yolov3", "yolov3-tiny")
    add(model, "--model", "the detector to train (default: yolov3-tiny)", choices=names)
    add(model, "--width", "multiplier of its channels (default: 1.0)", type=float)
    init = ".pt or .weights file to start from; if its classes are others, the heads' last layers start at random"
    add(model, "--init", f"{init} (default: random weights)")
    kept = "default if --init has the classes of the data, else data"
    anchors = f"data: chosen for the training set; default: those of --init or of the model (default: {kept})"
    add(model, "--anchors", anchors, choices=("data", "default"))

    match = "a box is assigned to each anchor whose size has a larger IoU with its own"
    less = "take less, for example 0.3, for a teacher with more heads than the student"
    add(model, "--match-threshold", f"{match}; {less} (default: 0.5)", type=float)

    kd = parser.add_argument_group("distillation")
    add(kd, "--teacher", "model.pt of a trained teacher, or Darknet .weights (default: no distillation)")
    add(kd, "--teacher-model", "model of a .weights teacher (default: from its .cfg file, or its size)", choices=names)
    add(kd, "--teacher-every", "run the teacher in one of N steps only: cheaper (default: 1)", type=int)
    part = "fraction of a batch's images that the teacher sees, for example 1/2 or 1/3: cheaper (default: 1.0)"
    add(kd, "--teacher-images", part, type=_fraction, metavar="N")
    unlabelled = "folder of images without labels, for the distillation loss (default: none)"
    add(kd, "--unlabelled", unlabelled, metavar="DIR")
    add(kd, "--unlabelled-batch", "number of unlabelled images per step (default: as --batch)", type=int)
    pseudo = "also train to detect there what the teacher detects with a score of at least N, for example 0.3"
    add(kd, "--pseudo-labels", f"{pseudo} (default: none)", type=float)
    add(kd, "--distill-weight", "factor of the feature loss, or auto (default: auto)", type=weight_of, metavar="N")
    add(kd, "--distill-share", "with auto: keep it at N times the detection loss (default: 1.0)", type=float)
    add(kd, "--info-map", "information map: how the cells are weighted (default: graded_iou)", metavar="NAME")
    priors = "score, confidence, iou_mask, graded_iou, box_balance or none"
    add(kd, "--prior", f"further weights of the cells: {priors} (default: as the map needs)", metavar="NAME")
    add(kd, "--penalty", "penalty of the features' difference (default: l2)", choices=(*PENALTIES, CWD))
    levels = "factor of each level, backbone first; 0 leaves a level out (default: all 1)"
    add(kd, "--level-weights", levels, type=_numbers, metavar="N,N,...")
    add(kd, "--distill-warmup", "steps until the distillation loss has its full weight (default: 0)", type=int)
    stop = "stop the distillation after N epochs; 0 with --pseudo-labels: learn from these alone (default: never)"
    add(kd, "--distill-stop", stop, type=int)
    add(kd, "--distill-decay", "decay to zero until --distill-stop or the end (default: no decay)", choices=DECAYS[1:])

    how = parser.add_argument_group("optimisation")
    add(how, "--epochs", "passes over the training set (default: 100)", type=int)
    add(how, "--steps", "number of steps, instead of --epochs", type=int)
    add(how, "--batch", "images per step, over all processes (default: 16)", type=int)
    add(how, "--optimizer", "(default: adamw)", choices=("adamw", "sgd"))
    add(how, "--lr", "highest learning rate (default: 0.001)", type=float)
    add(how, "--warmup", "steps until the learning rate is reached (default: 100)", type=int)
    add(how, "--weight-decay", "weight decay of the convolutions (default: 0.01)", type=float)
    add(how, "--clip", "largest norm of the gradient, 0 for no clipping (default: 10.0)", type=float)
    add(how, "--freeze-batchnorm", "keep the batch norm statistics of --init", action="store_true")
    add(how, "--sync-batchnorm", "compute batch norm statistics over all GPUs", action="store_true")
    add(how, "--ema", "decay of the averaged weights, 0 for no average (default: 0.999)", type=float)
    add(how, "--mixed-precision", "(default: no)", choices=("no", "bf16", "fp16"))
    add(how, "--seed", "seed of weights, order and augmentation (default: 0)", type=int)
    add(how, "--cpu", "do not use a GPU", action="store_true")

    run = parser.add_argument_group("run")
    add(run, "--out", "folder of the run (default: runs/DATA-MODEL, see above)", metavar="DIR", default=None)
    add(run, "--resume", "continue from the checkpoint of the run, if there is one", action="store_true")
    add(run, "--eval-every", "epochs between evaluations, 0 for one at the end (default: 10)", type=int)
    add(run, "--save-every", "epochs between checkpoints (default: 1)", type=int)
    add(run, "--no-plots", "draw no plots; results.csv is still written", action="store_false", dest="plots")


def _add_model(parser: argparse.ArgumentParser, kinds: str) -> None:
    parser.add_argument("model", metavar="MODEL", help=kinds)
    described = parser.add_argument_group("for a .weights file (default: from the .cfg file beside it)")
    described.add_argument("--arch", choices=("yolov3", "yolov3-tiny"), help="(without .cfg: from the file's size)")
    described.add_argument("--classes", type=int, metavar="N", help="(without .cfg: from the file's size)")
    described.add_argument("--width", type=float, metavar="N", help="(without .cfg: 1.0)")
    described.add_argument(
        "--anchors", type=_sizes, metavar="W,H,...", help="(without .cfg: as published, or the model's own)"
    )
    described.add_argument("--size", type=int, metavar="N", help="input side in pixels (default: the model's, or 416)")
    described.add_argument(
        "--names",
        metavar="FILE",
        help="class names: coco, or a file with one per line (default: those of MODEL or of the .names file beside it; "
        "without either, COCO's for 80 classes)",
    )


def _count(text: str, least: int = 1) -> int:
    if not text.isdigit() or int(text) < least:
        raise argparse.ArgumentTypeError(f"expected a number >= {least}, got {text!r}")
    return int(text)


def _count_or_none(text: str) -> int:
    return _count(text, least=0)


def _fraction(text: str) -> float:
    """Return a number, which may be written as a fraction."""
    try:
        return float(Fraction(text))
    except ZeroDivisionError:
        raise argparse.ArgumentTypeError(f"expected a number or a fraction, got {text!r}") from None


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(x) for x in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers between commas, got {text!r}") from None


def _sizes(text: str) -> list[tuple[float, float]]:
    """Return box sizes from "10,14, 16,30, ..."."""
    numbers = _numbers(text)
    if len(numbers) % 2:
        raise argparse.ArgumentTypeError(f"expected pairs of width and height, got {len(numbers)} numbers")
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def _add_eval(commands: Any) -> None:
    text = """\
Score a detector with COCO's metrics.

  fastkd eval runs/student/model.pt --data runs/digits --set test
  fastkd eval yolov3-tiny.weights --data coco --set val2017
"""
    parser = _command(commands, "eval", _eval, "score a detector with COCO's metrics", text)
    _add_model(parser, "model.pt of a run, Darknet .weights, or the .onnx of fastkd export")
    parser.add_argument("--data", required=True, metavar="DIR", help=DATA_HELP)
    parser.add_argument("--set", default="val", metavar="NAME", help="set in --data (default: val)")
    parser.add_argument("--batch", type=_count, default=32, metavar="N", help="images per step (default: 32)")
    parser.add_argument(
        "--workers",
        type=_count_or_none,
        default=0,
        metavar="N",
        help="number of processes that load images (default: 0)",
    )
    parser.add_argument("--strict", action="store_true", help="stop at an image that can't be read")
    parser.add_argument("--json", metavar="FILE", help="file to write all metrics to")
    parser.add_argument(
        "--detections",
        metavar="FILE",
        help="file to write the detections to, as COCO's server takes them: JSON with the set's image and category ids",
    )
    plots = "folder for plots: precision over recall, confusion matrix, average precision, predictions"
    parser.add_argument("--plots", metavar="DIR", help=plots)
    parser.add_argument("--cpu", action="store_true", help="do not use a GPU")


def _add_predict(commands: Any) -> None:
    text = """\
Draw the objects that a detector finds.

  fastkd predict runs/student/model.pt photo.jpg holiday/ --out runs/found
  fastkd predict yolov3-tiny.weights photo.jpg
  fastkd predict runs/student/model.onnx 'photos/**/*.jpg' clip.mp4 --detections found.json
"""
    parser = _command(
        commands, "predict", _predict, "draw the objects that a detector finds in images and videos", text
    )
    _add_model(parser, "model.pt of a run, Darknet .weights, or the .onnx of fastkd export")
    kinds = "images, videos (.mp4, .avi, .mov, .mkv, .webm), folders of them, or patterns in quotes: 'photos/*.jpg'"
    parser.add_argument("paths", nargs="+", metavar="PATH", help=kinds)
    out = "folder for the images and videos with boxes (default: runs/predict, or predict-2 and so on if it exists)"
    parser.add_argument("--out", metavar="DIR", help=out)
    parser.add_argument("--score", type=float, default=0.3, metavar="N", help="minimum score of a box (default: 0.3)")
    parser.add_argument(
        "--detections",
        metavar="FILE",
        help="file to write the drawn boxes to, as COCO results: JSON with the file's name as image_id, classes "
        "counted from 1 as category_id, and for videos the frame, counted from 0",
    )
    parser.add_argument("--cpu", action="store_true", help="do not use a GPU")


def _add_export(commands: Any) -> None:
    text = """\
Write a detector as ONNX, for programs without PyTorch, and compare the two: a file that computes something else is
not kept. Boxes are decoded, to pixels of the input; non-maximum suppression is left to the program that runs it.

  fastkd export runs/student/model.pt
  fastkd export yolov3-tiny.weights --size 416 --out tiny.onnx
"""
    parser = _command(commands, "export", _export, "write a detector as ONNX", text)
    _add_model(parser, "model.pt of a run, or Darknet .weights")
    parser.add_argument("--format", choices=("onnx",), default="onnx", help="what to write (default: onnx)")
    parser.add_argument("--out", metavar="FILE", help="file to write (default: MODEL with .onnx as its suffix)")


def _add_inspect(commands: Any) -> None:
    text = """\
Draw the distillation maps of a run: the information maps of backbone and neck, the differences between student and
teacher (initially and now), and the loss of each level over the training. Also print a table of them.

  fastkd inspect runs/student
  fastkd inspect runs/student photo.jpg holiday/ --count 6 --out runs/seen
"""
    parser = _command(commands, "inspect", _inspect, "draw the distillation maps of a run", text)
    parser.add_argument("run", metavar="RUN", help="folder of a run of fastkd train --teacher")
    parser.add_argument(
        "paths", nargs="*", metavar="IMAGE", help="files, or folders of images (default: images of the run)"
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="folder for the three figures (default: RUN/inspect, or inspect-2 and so on if it exists)",
    )
    parser.add_argument(
        "--set", metavar="NAME", help="without IMAGE: images of train or val (default: val, if the run has one)"
    )
    parser.add_argument(
        "--count", type=int, default=4, metavar="N", help="at most N of these images, evenly spaced (default: 4)"
    )


def _add_data(commands: Any) -> None:
    parser = _command(commands, "data", None, "make, check, convert or split a data set")
    sets = parser.add_subparsers(title="data sets", required=True, metavar="NAME")
    text = "Write scenes with handwritten digits, made from images in scikit-learn: nothing is downloaded."
    digits = _command(sets, "digits", _data_digits, "write scenes with handwritten digits", text)
    digits.add_argument("--out", required=True, metavar="DIR", help="folder to write, in COCO's format")
    for name, count in (("train", 4000), ("val", 300), ("test", 500)):
        digits.add_argument(
            f"--{name}", type=int, default=count, metavar="N", help=f"number of scenes (default: {count})"
        )
    digits.add_argument("--size", type=int, default=96, metavar="N", help="side of a scene in pixels (default: 96)")
    digits.add_argument("--seed", type=int, default=0, metavar="N", help="(default: 0)")

    text = (
        "Count the images, boxes and classes of each set, and look for faults: images that are missing, damaged, of\n"
        "another size or in two sets; boxes without area; classes that differ. The exit status is 1 if there are any."
    )
    check = _command(sets, "check", _data_check, "count the contents of a data set and list its faults", text)
    check.add_argument("folder", metavar="DATA", help=DATA_HELP)
    check.add_argument(
        "--set", action="append", metavar="NAME", help="check this set only; may be repeated (default: all)"
    )
    check.add_argument("--size", type=int, default=416, metavar="N", help="input side of the network (default: 416)")
    check.add_argument(
        "--out",
        metavar="DIR",
        help="folder for samples.png (default: runs/data-check, or data-check-2 and so on if it exists)",
    )
    check.add_argument("--quick", action="store_true", help="do not read the images")
    _add_convert(sets)
    _add_split(sets)


def _add_convert(sets: Any) -> None:
    text = """\
Write the sets of a folder, in any layout that fastkd reads, as COCO JSON or YOLO text.

  fastkd data convert VOC2007 --to yolo --out voc-yolo
  fastkd data convert export/ --to coco --out mine --set train --copy
"""
    parser = _command(sets, "convert", _data_convert, "write a data set as COCO JSON or YOLO text", text)
    parser.add_argument("folder", metavar="DATA", help=DATA_HELP)
    _add_target(parser)
    parser.add_argument(
        "--set", action="append", metavar="NAME", help="convert this set only; may be repeated (default: all)"
    )


def _add_split(sets: Any) -> None:
    text = """\
Divide a set into train, val and test, at random within each class, and write them. The other sets of the folder are
written too.

  fastkd data split photos --val 0.1 --test 0.1 --out photos-split
"""
    parser = _command(sets, "split", _data_split, "divide a set into train, val and test", text)
    parser.add_argument("folder", metavar="DATA", help=DATA_HELP)
    _add_target(parser, default="coco")
    for name, share in (("val", 0.1), ("test", 0.0)):
        text = f"share of the images, 0 for none (default: {share:g})"
        parser.add_argument(f"--{name}", type=float, default=share, metavar="N", help=text)
    parser.add_argument(
        "--set", metavar="NAME", help="divide this set, and leave the others out (default: train, or the only set)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the random parts (default: 0)")


def _add_target(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    text = "format to write" + (f" (default: {default})" if default else "")
    parser.add_argument("--to", choices=("coco", "yolo"), default=default, required=default is None, help=text)
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write, which must not exist")
    parser.add_argument("--copy", action="store_true", help="copy the images (default: link to them)")


def _add_demo(commands: Any) -> None:
    text = (
        "Make scenes with digits, train a teacher (or use the one that is there), then train the same student without\n"
        "and with distillation, and compare both in a table and in plots."
    )
    help_text = "train a student with and without distillation, in minutes on a CPU"
    parser = _command(commands, "demo", _demo, help_text, text)
    parser.add_argument("--out", default="runs/demo", metavar="DIR", help="folder of the demo (default: runs/demo)")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="train both students N times (default: 1)")


def _add_doctor(commands: Any) -> None:
    text = "Print what is installed, and check whether distillation works on this machine or, with --run, in that run."
    parser = _command(commands, "doctor", _doctor, "check what is installed and whether distillation works", text)
    parser.add_argument("--run", metavar="DIR", help="folder of a run of fastkd train, whose models and data to check")


# ---- commands


def _train(arguments: argparse.Namespace) -> int:
    from fastkd.yolov3.train.config import TrainConfig
    from fastkd.yolov3.train.run import train

    config = _train_config(arguments, TrainConfig)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # sent by torchrun and job queues: stop as after Ctrl-C
    result = train(config)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"{result.steps} steps in {result.seconds:.0f} s" + (f": {result.metrics}" if result.metrics else ""))
        print(f"model: {result.model_file}")
    return 0


def _train_config(arguments: argparse.Namespace, config_type: type[TrainConfig]) -> TrainConfig:
    """The run's configuration; prints the folder if it was chosen here, and a note about the sets."""
    out, main = arguments.out, int(os.environ.get("RANK", 0)) == 0
    if out is None:
        out = _default_out(arguments, config_type)
        if main:
            print(f"run: {out}", flush=True)
    config, note = _config_in(out, arguments, config_type)
    if note and main:
        print(note, flush=True)
    return config


def _default_out(arguments: argparse.Namespace, config_type: type[TrainConfig]) -> str:
    from fastkd.yolov3.train.run_folder import agreed, choose_folder, run_name

    options = vars(arguments)
    model = options.get("model", config_type.model)
    name = run_name(arguments.data, model, distilled=options.get("teacher") is not None)
    resume, cpu = options.get("resume", False), options.get("cpu", False)
    configure = partial(_config_in, arguments=arguments, config_type=config_type)
    return agreed(lambda: choose_folder(name, lambda out: configure(out)[0], resume=resume), cpu=cpu)


def _config_in(out: str, arguments: argparse.Namespace, config_type: type[TrainConfig]) -> tuple[TrainConfig, str]:
    """The configuration of a run in this folder, and a note about its sets for the user."""
    from fastkd.yolov3.data.split import sets_of_run
    from fastkd.yolov3.train.config import USUAL

    left_out = ("command", "traceback", "data", "train", "val", "out")
    options = {k: v for k, v in vars(arguments).items() if k not in left_out}
    changes = {name: options.pop(name) for name in ("flip", "mosaic") if name in options}
    val = None if arguments.val == "none" else arguments.val
    sets = sets_of_run(arguments.data, out, train=arguments.train, val=val)
    options |= {"out": out, "annotations": str(sets.train[0]), "images": str(sets.train[1])}
    if sets.val is not None:
        options |= {"val_annotations": str(sets.val[0]), "val_images": str(sets.val[1])}
    options["augmentation"] = replace(USUAL, **changes)
    return config_type(**options), sets.note


def _load(arguments: argparse.Namespace) -> tuple[Trained | Exported, int]:
    """Return the detector that the arguments name, on the device to use, and its input size."""
    if Path(arguments.model).suffix == ".onnx":
        return _load_onnx(arguments)
    found, size = _load_trained(arguments)
    found.model.to("cuda" if torch.cuda.is_available() and not arguments.cpu else "cpu")
    return found, size


def _load_onnx(arguments: argparse.Namespace) -> tuple[Exported, int]:
    from fastkd.yolov3.class_names import read_names
    from fastkd.yolov3.onnx_detector import load_onnx

    for name in ("arch", "classes", "width", "anchors"):
        if getattr(arguments, name) is not None:
            raise ValueError(f"--{name}: {arguments.model} describes itself; this option is for .weights files")
    found = load_onnx(arguments.model, class_names=None if arguments.names is None else read_names(arguments.names))
    if arguments.size not in (None, found.size):
        hint = f"write another with fastkd export --size {arguments.size}"
        raise ValueError(f"--size: expected {found.size}, that of {arguments.model}, got {arguments.size}; {hint}")
    return found, found.size


def _load_trained(arguments: argparse.Namespace) -> tuple[Trained, int]:
    """Return the detector that the arguments name, on the CPU, and its input size."""
    from fastkd.yolov3.checkpoint import load_detector
    from fastkd.yolov3.class_names import read_names

    found = load_detector(
        arguments.model,
        model=arguments.arch,
        num_classes=arguments.classes,
        width=arguments.width,
        anchors=arguments.anchors,
        class_names=None if arguments.names is None else read_names(arguments.names),
    )
    for note in found.notes:
        print(note, file=sys.stderr)
    return found, arguments.size or found.size or 416


def _eval(arguments: argparse.Namespace) -> int:
    from fastkd.files import replacing, require_new
    from fastkd.yolov3.data.dataset import DetectionDataset
    from fastkd.yolov3.data.formats import find_set
    from fastkd.yolov3.data.split import split_of_run
    from fastkd.yolov3.train.evaluate import coco_evaluation, detect_all, metrics_of, write_detections
    from fastkd.yolov3.train.run import require_classes

    require_new(**{"--json": arguments.json, "--detections": arguments.detections})
    if arguments.plots:
        from fastkd.yolov3.train.plots import OF_EVALUATION, evaluation_plots

        for name in OF_EVALUATION:
            require_new(**{"--plots": Path(arguments.plots) / name})
    found, size = _load(arguments)
    held_back = split_of_run(Path(arguments.model).parent, arguments.data, arguments.set)
    if held_back:
        print(f"{arguments.set}: the split that the training made of the data, {held_back[0]}", file=sys.stderr)
    pair = held_back or find_set(arguments.data, arguments.set)
    data = DetectionDataset(*pair, size, strict=arguments.strict)
    require_classes("MODEL", found, data)
    detections = detect_all(found.model, data, batch_size=arguments.batch, workers=arguments.workers, progress=True)
    if arguments.detections:
        write_detections(detections, arguments.detections)
    evaluation = coco_evaluation(detections, data)
    metrics = metrics_of(evaluation, data.class_names)
    for name, value in metrics.as_dict().items():
        if name != "per_class":
            print(f"{name:<10} {'-' if value is None else f'{100 * value:5.1f}'}")
    print("mAP by class: " + ", ".join(f"{k} {100 * v:.1f}" for k, v in metrics.per_class.items() if v is not None))
    if arguments.json:
        with replacing(arguments.json) as part:
            part.write_text(json.dumps(metrics.as_dict(), indent=2) + "\n", encoding="utf-8")
    if arguments.plots:
        evaluation_plots(detections, evaluation, data, Path(arguments.plots))
        print(f"drawn: {', '.join(str(Path(arguments.plots) / name) for name in OF_EVALUATION)}")
    return 0


def _predict(arguments: argparse.Namespace) -> int:
    from fastkd.files import new_folder, require_new
    from fastkd.yolov3.show.predict import predict
    from fastkd.yolov3.show.video import VIDEO_SUFFIXES

    require_new(**{"--detections": arguments.detections})
    found, size = _load(arguments)
    out = arguments.out or new_folder("runs/predict")
    written = predict(
        found.model,
        arguments.paths,
        out,
        size=size,
        class_names=found.class_names,
        score_threshold=arguments.score,
        progress=True,
        detections_file=arguments.detections,
    )
    videos = sum(file.suffix in VIDEO_SUFFIXES for file in written)
    print(f"{len(written) - videos} images" + (f" and {videos} videos" if videos else "") + f" in {out}")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from fastkd.files import require_new
    from fastkd.yolov3.export import export_onnx

    out = Path(arguments.out or Path(arguments.model).with_suffix(".onnx"))
    require_new(**{"--out": out})
    found, size = _load_trained(arguments)
    agreement = export_onnx(found.model, out, size=size, class_names=found.class_names)
    print(f"{out}: {found.model.num_classes} classes, images (N, 3, {size}, {size}), {out.stat().st_size / 1e6:.1f} MB")
    print(
        f"greatest difference from PyTorch: scores {agreement.scores:.1e}, boxes {agreement.boxes:.1e} of the input's "
        "side; non-maximum suppression is left to the program that runs it"
    )
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    from fastkd.yolov3.show.inspect import inspect_run

    found = inspect_run(arguments.run, arguments.paths, out=arguments.out, split=arguments.set, count=arguments.count)
    print(found)
    print("written: " + ", ".join(map(str, found.files)))
    return 0


def _data_digits(arguments: argparse.Namespace) -> int:
    from fastkd.yolov3.data.digits import write_digits

    counts = {name: getattr(arguments, name) for name in ("train", "val", "test")}
    out = write_digits(arguments.out, **counts, size=arguments.size, seed=arguments.seed)
    print(f"{', '.join(f'{count} {name}' for name, count in counts.items())} scenes in {out}")
    return 0


def _data_check(arguments: argparse.Namespace) -> int:
    from fastkd.files import new_folder, require_new
    from fastkd.yolov3.data.check import check_set, compare_sets, write_samples
    from fastkd.yolov3.data.formats import require_sets

    samples = (Path(arguments.out) if arguments.out else new_folder("runs/data-check")) / "samples.png"
    if not arguments.quick:
        require_new(out=samples)
    names = arguments.set or require_sets(arguments.folder)
    reports, faults = [], 0
    for name in names:
        try:
            reports.append(check_set(arguments.folder, name, size=arguments.size, quick=arguments.quick, progress=True))
            print("\n".join(reports[-1].lines()) + "\n")
        except (OSError, ValueError) as error:  # the other sets are still checked
            print(f"{name}: can't be read\n  FAULT: {error}\n")
            faults += 1
    between = compare_sets(reports)
    print("\n".join(between), end="\n" * bool(between))
    if not arguments.quick and write_samples(reports, samples):
        print(f"sample images with their boxes: {samples}")
    faults += sum(line.startswith("FAULT") for line in between) + sum(len(report.faults) for report in reports)
    unread = " (the images were not read)" if arguments.quick else ""
    print((f"{faults} kinds of fault" if faults else "no fault found") + unread)
    return 1 if faults else 0


def _data_convert(arguments: argparse.Namespace) -> int:
    from fastkd.yolov3.data.convert import convert

    written = convert(arguments.folder, arguments.out, arguments.to, names=arguments.set, copy=arguments.copy)
    _tell_written(written, arguments.out)
    return 0


def _data_split(arguments: argparse.Namespace) -> int:
    from fastkd.yolov3.data.convert import write_sets
    from fastkd.yolov3.data.split import split_folder

    shares = {name: getattr(arguments, name) for name in ("val", "test") if getattr(arguments, name)}
    parts = split_folder(arguments.folder, shares, name=arguments.set, seed=arguments.seed)
    _tell_written(write_sets(parts, arguments.out, arguments.to, copy=arguments.copy), arguments.out)
    return 0


def _tell_written(written: dict[str, Annotations], out: str) -> None:
    from fastkd.yolov3.data.annotations import some_of

    for name, found in written.items():
        print(f"{name}: {len(found)} images, {len(found.boxes)} boxes")
        for what, names in found.problems.items():
            print(f"  note: {len(names)} {what}: {some_of(names)}")
    print(f"in {out}")


def _demo(arguments: argparse.Namespace) -> int:
    from fastkd.yolov3.show.demo import run_demo

    run_demo(arguments.out, seeds=arguments.seeds)
    return 0


# ---- doctor


def _doctor(arguments: argparse.Namespace) -> int:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "torch finds none"
    print(f"fastkd {fastkd.__version__}, Python {platform.python_version()}, torch {torch.__version__}")
    spins, policy = os.environ.get("GOMP_SPINCOUNT"), os.environ.get("OMP_WAIT_POLICY", "not set")
    idle = f"an idle one checks for work {spins} times before it sleeps" if spins else f"OMP_WAIT_POLICY is {policy}"
    print(f"CPU threads: {torch.get_num_threads()} ({idle}); GPU: {device}")
    for kind in ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",):
        _print_backends(torch.device(kind))
    missing = [package for package, module in EXTRAS.items() if not _imports(module)]
    print("\ntraining, data and demo: " + (f"missing {', '.join(missing)}" if missing else "ok"))
    if missing:
        print("  pip install 'fastkd[train]'")
    missing = [name for name in EXPORT_EXTRAS if not _imports(name)]
    print("export to ONNX: " + (f"missing {', '.join(missing)}\n  pip install 'fastkd[export]'" if missing else "ok"))
    where = f"in {arguments.run}" if arguments.run else "on a small YOLOv3 and YOLOv3-tiny"
    print(f"\ndistillation, tried {where}")
    report = _check_run(arguments.run) if arguments.run else _check_small_pair()
    print(report)
    return 0 if report.ok else 1


def _print_backends(device: torch.device) -> None:
    default = choose(None, device, torch.float32)
    print(f"\nbackends of the loss, for {device.type.upper()} tensors")
    for name, reason in fastkd.backends(device).items():
        note = ": the default" if name == default else f": {reason}" if reason else ""
        print(f"  {'--' if reason else 'ok':<3} {name}{note}")


def _imports(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def _check_small_pair() -> Report:
    """Check distillation between two small detectors.

    The teacher sees a batch first: the check refuses a teacher whose batch norms are as initialised.
    """
    from fastkd.distiller import Distiller
    from fastkd.yolov3.model import YOLOv3, YOLOv3Tiny

    torch.manual_seed(0)
    images = torch.rand(2, 3, 64, 64)
    teacher, student = YOLOv3(num_classes=4, width=0.125), YOLOv3Tiny(num_classes=4, width=0.125)
    with torch.no_grad():
        teacher(images)
    distiller = Distiller(
        student,
        teacher,
        backbone=(list(student.backbone_levels), list(teacher.backbone_levels)),
        neck=(list(student.neck_levels), list(teacher.neck_levels)),
    )
    distiller.prepare(images)
    return distiller.check(images, torch.optim.SGD([*student.parameters(), *distiller.parameters()], lr=0.1))


def _check_run(folder: str) -> Report:
    """Check distillation with the models, weights and first images of a run of ``fastkd train``."""
    from fastkd.yolov3.train.config import read_config
    from fastkd.yolov3.train.run import check_distillation

    return check_distillation(read_config(folder))
