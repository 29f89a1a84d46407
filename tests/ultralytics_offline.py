"""Runs Ultralytics without network and without torchvision's compiled ops, for tests and benchmarks.

In a process with the variables of ``environment``, ``import ultralytics_offline`` before Ultralytics. The packages are
those of ``tests/ultralytics-requirements.txt``; ``make setup`` installs them where no other test can import them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent


def packages() -> Path | None:
    """Return the folder of the packages, or None if they are not installed."""
    folder = Path(os.environ.get("FASTKD_ULTRALYTICS", Path(sys.prefix) / "ultralytics"))
    return folder if (folder / "ultralytics").is_dir() else None


def environment(scratch: Path) -> dict[str, str]:
    """Return the environment of a process that uses Ultralytics, which writes its settings to ``scratch``."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests", packages()))),
        "YOLO_CONFIG_DIR": str(scratch),
        "YOLO_OFFLINE": "1",
        "YOLO_AUTOINSTALL": "False",
        "OMP_NUM_THREADS": "1",  # the models are tiny, and other tests run in parallel
    }


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Replace ``torchvision.ops.nms``, of (N, 4) corners: the compiled one needs the CUDA torch of its release."""
    order = scores.argsort(descending=True, stable=True)
    x = boxes[order].float()
    area = (x[:, 2:] - x[:, :2]).prod(1)
    overlap = (torch.minimum(x[:, None, 2:], x[:, 2:]) - torch.maximum(x[:, None, :2], x[:, :2])).clamp(min=0).prod(2)
    suppresses = (overlap / (area[:, None] + area - overlap) > iou_threshold).triu(1)
    kept = torch.ones(len(x), dtype=torch.bool, device=x.device)
    for i in range(len(x)):
        if kept[i]:
            kept &= ~suppresses[i]
    return order[kept]


def write_yolo_digits(out: Path, *, train: int, val: int, size: int = 96, labelled: int | None = None) -> Path:
    """Write digits scenes in YOLO's format; return the data set's YAML file.

    Args:
        out: the folder.
        train, val: number of scenes.
        size: side of a scene in pixels.
        labelled: number of scenes of ``train`` in the training list; None: all.
    """
    import yaml

    from fastkd.yolov3.data.digits import CLASS_NAMES, write_digits

    coco = write_digits(out / "coco", train=train, val=val, test=0, size=size)
    for split in ("train", "val"):
        found: dict[str, Any] = json.loads((coco / "annotations" / f"{split}.json").read_text())
        lines: dict[int, list[str]] = {image["id"]: [] for image in found["images"]}
        for a in found["annotations"]:
            x, y, w, h = (v / size for v in a["bbox"])
            lines[a["image_id"]].append(f"{a['category_id'] - 1} {x + w / 2:.6f} {y + h / 2:.6f} {w:.6f} {h:.6f}")
        images, labels = out / "images" / split, out / "labels" / split
        images.mkdir(parents=True)
        labels.mkdir(parents=True)
        for image in found["images"][: labelled if split == "train" else None]:
            shutil.move(coco / "images" / split / image["file_name"], images / image["file_name"])
            text = "\n".join(lines[image["id"]])
            (labels / image["file_name"]).with_suffix(".txt").write_text(text)
    data = out / "digits.yaml"
    content = {"path": str(out), "train": "images/train", "val": "images/val", "names": dict(enumerate(CLASS_NAMES))}
    data.write_text(yaml.safe_dump(content))
    return data


def _stub_torchvision() -> None:
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.impl("nms", nms, "CPU")
    _stub_torchvision.library = library  # type: ignore[attr-defined]  # its operators live as long as it does
    import torchvision.extension

    torchvision.extension._has_ops = lambda: True


if importlib.util.find_spec("torchvision") and not torch.cuda.is_available():
    _stub_torchvision()
