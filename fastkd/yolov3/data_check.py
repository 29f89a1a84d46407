"""What a data set holds and what is wrong with it, before hours are spent on it: ``fastkd data check``."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image as Picture
from tqdm import tqdm

from fastkd.yolov3.annotations import Annotations, Array
from fastkd.yolov3.boxes import Detections
from fastkd.yolov3.data import letterbox_of, read_image
from fastkd.yolov3.formats import find_set, read_set
from fastkd.yolov3.predict import Image, draw, write_picture

ORIENTATION = 0x0112  # of EXIF
TINY = 2  # pixels of the network's input, under which a box has no cell of its own at any stride
BAR = 30  # characters
TILE = 480  # pixels


@dataclass
class SetReport:
    """One set, looked at. ``faults`` are what a training would stop at or be misled by: what it is, and where."""

    name: str
    annotations: Annotations  # as they are in the files
    clean: Annotations  # as training sees them
    tiny: int
    turned: int = 0  # pictures with an orientation tag
    faults: dict[str, list[str]] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)  # of the pictures' bytes, to file names

    def lines(self) -> list[str]:
        found, boxes = self.annotations, self.clean.boxes
        with_boxes = len(np.unique(self.clean.rows))
        lines = [
            f"{self.name}: {len(found)} pictures, {len(boxes)} boxes  ({found.source})",
            f"  pictures without a box: {len(found) - with_boxes}; boxes a picture that has some: "
            f"{len(boxes) / max(with_boxes, 1):.1f}; crowd or difficult: {int(self.clean.crowd.sum())}",
        ]
        counts = np.bincount(self.clean.classes, minlength=len(found.class_names)).tolist()
        width = max(map(len, found.class_names), default=0)
        for name, count in zip(found.class_names, counts, strict=True):
            lines.append(f"  {name:<{width}} {count:>8} {'#' * round(BAR * count / max(*counts, 1))}")
        lines += [
            f"  note: {count} {problem}" for problem, count in self.clean.problems.items() if "dropped" not in problem
        ]
        if self.tiny:
            lines.append(f"  note: {self.tiny} boxes are under {TINY} pixels wide or high in the network's input")
        if self.turned:
            lines.append(
                f"  note: {self.turned} pictures have an orientation tag, which is ignored: boxes must fit the pixels "
                "as stored; if yours were drawn on the turned picture, turn the files first"
            )
        for fault, names in self.faults.items():
            some = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            lines.append(f"  FAULT: {len(names)} {fault}: {some}")
        return lines


def check_set(
    folder: str | os.PathLike[str], name: str, *, size: int = 416, quick: bool = False, progress: bool = False
) -> SetReport:
    """Look at one set.

    Args:
        folder, name: as for ``find_set``.
        size: side of the network's input in pixels.
        quick: do not read the pictures, only whether they are there.
        progress: whether to show a bar, where the output is a terminal.

    Raises:
        FileNotFoundError, ValueError: no such set, or annotations that cannot be read (names the place).
    """
    annotations = read_set(*find_set(folder, name))
    missing, unreadable = annotations.missing(), annotations.unreadable()
    clean = annotations.clean()
    report = SetReport(name, annotations, clean, _count_tiny(clean, size))
    faults = {"pictures are missing": missing, "pictures can't be read": unreadable}
    if not quick:
        known = {*missing, *unreadable}
        rows = [row for row, file_name in enumerate(annotations.file_names) if file_name not in known]
        broken, other = [], []
        for row in tqdm(rows, unit="picture", leave=False, disable=None if progress else True):
            fault = _look(annotations, row, report.hashes)
            report.turned += _is_turned(annotations.path(row))
            broken += [annotations.file_names[row]] if fault == "broken" else []
            other += [annotations.file_names[row]] if fault == "size" else []
        faults["pictures can't be read"] = unreadable + broken
        faults["pictures have another size than the annotations say"] = other
    dropped = sum(count for problem, count in clean.problems.items() if "dropped" in problem)
    faults["boxes without area in their picture, or not finite"] = _without(annotations, clean) if dropped else []
    faults["pictures, and a box in none of them"] = [] if len(clean.boxes) else annotations.file_names
    report.faults = {fault: names for fault, names in faults.items() if names}
    return report


def compare_sets(reports: Sequence[SetReport]) -> list[str]:
    """What two sets must not have in common, or must: pictures and classes. Faults begin with ``FAULT``."""
    lines = []
    for a, b in combinations(reports, 2):
        shared = [f"{a.hashes[key]} = {b.hashes[key]}" for key in a.hashes.keys() & b.hashes.keys()]
        if shared:
            kind = "note" if _are_parts(a.name, b.name) else "FAULT"
            lines.append(
                f"{kind}: {len(shared)} pictures are in {a.name} and in {b.name}: {', '.join(sorted(shared)[:3])}"
            )
        if a.annotations.class_names != b.annotations.class_names:
            differ = sorted(set(a.annotations.class_names) ^ set(b.annotations.class_names))
            lines.append(
                f"FAULT: {a.name} and {b.name} have different classes, or another order of them: "
                + ", ".join(differ[:6])
            )
    return lines


def _are_parts(a: str, b: str) -> bool:
    """Whether sets may share pictures: train_100, train_300 and train; Pascal VOC's trainval, train and val."""
    whole = {re.sub(r"_\d+$", "", name) for name in (a, b)}
    return len(whole) == 1 or whole in ({"trainval", "train"}, {"trainval", "val"})


def write_samples(reports: Sequence[SetReport], path: str | os.PathLike[str], *, columns: int = 4) -> bool:
    """A picture of some pictures with their boxes: one row a set, spread over it, those with boxes first.

    Returns:
        Whether there was a picture to show.
    """
    rows = [row for report in reports if (row := _tiles(report.clean, columns))]
    if rows:
        write_picture(Path(path), np.concatenate([np.concatenate(row, axis=1) for row in rows], axis=0))
    return bool(rows)


def _look(annotations: Annotations, row: int, hashes: dict[str, str]) -> str | None:
    """What is wrong with a picture; notes what it is."""
    path = annotations.path(row)
    hashes[hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()] = annotations.file_names[row]
    try:
        height, width = read_image(path).shape[:2]
    except ValueError:
        return "broken"
    return None if annotations.sizes[row].tolist() == [width, height] else "size"


def _is_turned(path: Path) -> bool:
    try:
        with Picture.open(path) as picture:
            return bool(picture.getexif().get(ORIENTATION, 1) != 1)
    except (OSError, SyntaxError, ValueError, Picture.DecompressionBombError):  # what Pillow raises for damaged headers
        return False


def _count_tiny(clean: Annotations, size: int) -> int:
    sizes = clean.sizes[clean.rows]
    scale = size / sizes.max(1, initial=1)
    return int((clean.boxes[:, 2:].min(1, initial=size) * scale < TINY).sum())


def _without(annotations: Annotations, clean: Annotations) -> list[str]:
    """Names of the pictures that have lost a box."""
    before = np.bincount(annotations.rows, minlength=len(annotations))
    after = np.bincount(clean.rows, minlength=len(annotations))
    return [annotations.file_names[row] for row in np.flatnonzero(before > after).tolist()]


def _tiles(clean: Annotations, count: int) -> list[Array]:
    rows = np.unique(clean.rows) if len(clean.rows) else np.arange(len(clean))
    chosen = rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int)].tolist()
    tiles = []
    for row in chosen:
        try:
            tiles.append(_tile(clean, row))
        except (ValueError, OSError):  # a fault that the report names
            continue
    blank = np.full((TILE, TILE, 3), 255, dtype=np.uint8)
    return tiles + [blank] * (count - len(tiles)) if tiles else []


def _tile(clean: Annotations, row: int) -> Array:
    """One picture, enlarged or reduced so that names can be read, in a white square."""
    image = read_image(clean.path(row))
    height, width = image.shape[:2]
    letterbox = letterbox_of(width, height, TILE - 8)
    boxes = clean.boxes[clean.of(row)]
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1) * np.array(
        [letterbox.scale_x, letterbox.scale_y] * 2
    )
    new_size = (round(width * letterbox.scale_x), round(height * letterbox.scale_y))
    shown: Image = cv2.resize(image, new_size, interpolation=cv2.INTER_AREA).astype(np.uint8)
    classes = torch.from_numpy(clean.classes[clean.of(row)])
    labelled = Detections(torch.from_numpy(corners), torch.ones(len(classes)), classes)
    drawn = draw(shown, labelled, clean.class_names, scores=False)
    tile = np.full((TILE, TILE, 3), 255, dtype=np.uint8)
    x, y = (TILE - drawn.shape[1]) // 2, (TILE - drawn.shape[0]) // 2
    tile[y : y + drawn.shape[0], x : x + drawn.shape[1]] = drawn
    return tile
