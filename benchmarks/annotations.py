"""Measures time and memory of reading the annotations of a large set: ``python benchmarks/annotations.py``.

It first writes the sets to a temporary folder: one small PNG under many names (hard links), and random annotations.
Each format is read twice in a process of its own; for the second reading, the files are in the system's cache.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np

BOXES = 7  # mean number per image, as in COCO
NAMES = [f"class{i}" for i in range(80)]
SIDE = 64


def make(root: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    boxes_of = rng.poisson(BOXES, count)
    corners = rng.integers(0, SIDE // 2, (boxes_of.sum(), 4))
    classes = rng.integers(0, len(NAMES), boxes_of.sum())
    ends = boxes_of.cumsum()
    for folder in ("annotations", "images/train", "labels/train", "Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True)
    pixels = cv2.imencode(".png", np.zeros((SIDE, SIDE, 3), np.uint8))[1].tobytes()
    images, annotations = [], []
    for i in range(count):
        if i % 30_000 == 0:  # common file systems limit the number of links
            (root / f"{i}.png").write_bytes(pixels)
        for folder in ("images/train", "JPEGImages"):
            os.link(root / f"{i // 30_000 * 30_000}.png", root / folder / f"{i:06}.png")
        images.append({"id": i, "file_name": f"{i:06}.png", "width": SIDE, "height": SIDE})
        lines, objects = [], []
        for j in range(ends[i] - boxes_of[i], ends[i]):
            x, y, w, h = (corners[j] + (0, 0, 2, 2)).tolist()  # a box of one pixel would have no area in VOC
            number = int(classes[j])
            polygon = [float(v) for v in rng.random(16)]  # not read for detection
            annotations.append(
                {
                    "id": j,
                    "image_id": i,
                    "category_id": number,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "segmentation": [polygon],
                }
            )
            lines.append(f"{number} {(x + w / 2) / SIDE} {(y + h / 2) / SIDE} {w / SIDE} {h / SIDE}\n")
            corner = f"<xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + w}</xmax><ymax>{y + h}</ymax>"
            objects.append(f"<object><name>{NAMES[number]}</name><bndbox>{corner}</bndbox></object>")
        (root / f"labels/train/{i:06}.txt").write_text("".join(lines))
        size = f"<size><width>{SIDE}</width><height>{SIDE}</height></size>"
        text = f"<annotation><filename>{i:06}.png</filename>{size}{''.join(objects)}</annotation>"
        (root / f"Annotations/{i:06}.xml").write_text(text)
    categories = [{"id": i, "name": name} for i, name in enumerate(NAMES)]
    coco = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations/train.json").write_text(json.dumps(coco))
    (root / "ImageSets/Main/train.txt").write_text("".join(f"{i:06}\n" for i in range(count)))
    (root / "data.yaml").write_text("train: images/train\nnames: " + json.dumps(NAMES) + "\n")


def most_memory() -> int:
    """Return the peak of this process in KiB; getrusage's also counts the process before its exec, a parent's copy."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def read(annotations: str, images: str) -> dict[str, float]:
    """Read a set twice; return the seconds, the peak of memory in MiB, its part above the imports, and the boxes."""
    from fastkd.yolov3.data.dataset import DetectionDataset

    before = most_memory()
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        data = DetectionDataset(annotations, images, 416)
        seconds.append(time.perf_counter() - began)
    peak = most_memory()
    boxes = len(data.annotations.boxes)
    return {
        "first": seconds[0],
        "second": seconds[1],
        "peak": peak / 1024,
        "added": (peak - before) / 1024,
        "boxes": boxes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--read", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read:
        print(json.dumps(read(*options.read)))
        return
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make(root, options.images)
        sets = {
            "COCO": ("annotations/train.json", "images/train"),
            "VOC": ("ImageSets/Main/train.txt", "JPEGImages"),
            "YOLO": ("data.yaml", "images/train"),
        }
        print(f"{options.images} images\n\n| format | boxes | s, first | s, second | MiB, peak | MiB of the set |")
        print("|---|---|---|---|---|---|")
        for name, (annotations, images) in sets.items():
            command = [sys.executable, __file__, "--read", str(root / annotations), str(root / images)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found = json.loads(done.stdout)
            times = f"{found['first']:.1f} | {found['second']:.1f}"
            print(f"| {name} | {found['boxes']} | {times} | {found['peak']:.0f} | {found['added']:.0f} |")


if __name__ == "__main__":
    main()
