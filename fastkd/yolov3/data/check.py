"""``fastkd data check``: counts the images, boxes and classes of a data set and lists its faults before a training."""

from __future__ import annotations

import contextlib
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
from PIL import Image as PILImage
from tqdm import tqdm

from fastkd.yolov3.boxes import Detections
from fastkd.yolov3.data.annotations import Annotations, Array, some_of
from fastkd.yolov3.data.dataset import decode, letterbox_of
from fastkd.yolov3.data.draw import Image, draw, write_image
from fastkd.yolov3.data.formats import YAML, find_set, read_set

ORIENTATION = 0x0112  # EXIF's tag of the orientation
TINY = 2  # pixels of the network's input; smaller boxes are reported
BAR = 30  # length of the longest bar in characters
TILE = 480  # side of a sample in pixels
UNREADABLE = "images can't be read"


@dataclass
class SetReport:
    """The contents and faults of one set.

    ``faults`` maps a description of what a training would leave out, or learn wrongly from, to the names of the images.
    """

    name: str
    annotations: Annotations  # as in the files
    clean: Annotations  # as training uses them
    tiny: int  # boxes of less than TINY pixels
    quick: bool = False
    turned: int = 0  # images with an orientation tag
    deep: int = 0  # images of 16 bits per channel
    faults: dict[str, list[str]] = field(default_factory=dict)
    # maps a hash of an image's bytes, or its path if the images were not read, to its file name
    hashes: dict[str, str] = field(default_factory=dict)
    copies: list[str] = field(default_factory=list)  # images with the same bytes as another one

    def lines(self) -> list[str]:
        found, boxes = self.annotations, self.clean.boxes
        without = len(found) - len(np.unique(found.rows))
        per_image = len(boxes) / max(len(np.unique(self.clean.rows)), 1)
        lines = [
            f"{self.name}: {len(found)} images, {len(boxes)} boxes  ({found.source})",
            f"  images without a box: {without}; boxes per image with boxes: {per_image:.1f}; "
            f"crowd or difficult: {int(self.clean.crowd.sum())}",
        ]
        counts = np.bincount(self.clean.classes, minlength=len(found.class_names)).tolist()
        width = max(map(len, found.class_names), default=0)
        for name, count in zip(found.class_names, counts, strict=True):
            lines.append(f"  {name:<{width}} {count:>8} {'#' * round(BAR * count / max(*counts, 1))}")
        lines += [f"  note: {note}" for note in self._notes(counts)]
        lines += [f"  FAULT: {len(names)} {fault}: {some_of(names)}" for fault, names in self.faults.items()]
        return lines

    def _notes(self, counts: list[int]) -> list[str]:
        told = {what: names for what, names in self.clean.problems.items() if "dropped" not in what}
        told["boxes repeat another one of the same image and class"] = self.annotations.names_of(
            self.annotations.repeated()
        )
        told["images have the same content as another one of the set"] = self.copies
        notes = self.annotations.notes + [
            f"{len(names)} {what}: {some_of(names)}" for what, names in told.items() if names
        ]
        empty = [name for name, count in zip(self.annotations.class_names, counts, strict=True) if not count]
        if empty and any(counts):
            from_one = Path(self.annotations.source).suffix in YAML and empty == self.annotations.class_names[:1]
            hint = "; do the class numbers in the labels start at 1?" if from_one else ""
            notes.append(f"{len(empty)} classes have no box: {some_of(empty)}{hint}")
        if self.tiny:
            notes.append(f"{self.tiny} boxes are under {TINY} pixels wide or high in the network's input")
        if self.turned:
            notes.append(
                f"{self.turned} images have an orientation tag, which is ignored: boxes must fit the pixels as stored; "
                "if yours were drawn on the rotated image, rotate the files first"
            )
        if self.deep:
            notes.append(
                f"{self.deep} images have 16 bits per channel, of which the highest 8 that are in use are read"
            )
        return notes


def check_set(
    folder: str | os.PathLike[str], name: str, *, size: int = 416, quick: bool = False, progress: bool = False
) -> SetReport:
    """Count the contents of one set and find its faults.

    Args:
        folder, name: as for ``find_set``.
        size: side of the network's input in pixels.
        quick: do not read the images, only check that they exist.
        progress: whether to show a progress bar if the output is a terminal.

    Raises:
        FileNotFoundError, ValueError: there is no such set, or its annotations cannot be read (the message names the
            place).
    """
    annotations = read_set(*find_set(folder, name))
    readable = annotations.have_size()
    clean = annotations.only(readable).clean()
    report = SetReport(name, annotations, clean, _count_tiny(clean, size), quick)
    missing = set(annotations.missing())
    there = [row for row, file_name in enumerate(annotations.file_names) if file_name not in missing]
    faults = {
        "images are missing": [file_name for file_name in annotations.file_names if file_name in missing],
        UNREADABLE: [annotations.file_names[row] for row in there if not readable[row]],
    }
    rows = [row for row in there if readable[row]]
    if quick:
        report.hashes = {os.path.realpath(annotations.path(row)): annotations.file_names[row] for row in rows}
    else:
        for row in tqdm(rows, unit="image", leave=False, disable=None if progress else True):
            for fault in _look(report, row):
                faults.setdefault(fault, []).append(annotations.file_names[row])
    faults["boxes without area in their image, or not finite"] = [
        file_name for what, names in clean.problems.items() if "dropped" in what for file_name in names
    ]
    faults["images, and a box in none of them"] = [] if len(clean.boxes) else annotations.file_names
    report.faults = {fault: names for fault, names in faults.items() if names}
    return report


def compare_sets(reports: Sequence[SetReport]) -> list[str]:
    """Return lines on pairs of sets that share images or differ in their classes; faults start with ``FAULT``."""
    lines = []
    for a, b in combinations(reports, 2):
        keys = a.hashes.keys() & b.hashes.keys()
        if keys:
            kind = "note" if _are_parts(a.name, b.name) else "FAULT"
            shared = sorted(f"{a.hashes[key]} = {b.hashes[key]}" for key in keys)
            lines.append(f"{kind}: {len(shared)} images are in {a.name} and in {b.name}: {', '.join(shared[:3])}")
        names = {*a.annotations.file_names} & {*b.annotations.file_names} - {a.hashes[key] for key in keys}
        if a.quick and names:
            lines.append(
                f"note: {len(names)} file names are in {a.name} and in {b.name}, in different folders; without --quick "
                f"their content is compared: {some_of(sorted(names), 3)}"
            )
        if a.annotations.class_names != b.annotations.class_names:
            differ = sorted(set(a.annotations.class_names) ^ set(b.annotations.class_names))
            lines.append(
                f"FAULT: {a.name} and {b.name} have different classes, or another order of them: "
                + ", ".join(differ[:6])
            )
    return lines


def _are_parts(a: str, b: str) -> bool:
    """Whether sets may share images: train_100, train_300 and train; Pascal VOC's trainval, train and val."""
    whole = {re.sub(r"_\d+$", "", name) for name in (a, b)}
    return len(whole) == 1 or whole in ({"trainval", "train"}, {"trainval", "val"})


def write_samples(reports: Sequence[SetReport], path: str | os.PathLike[str], *, columns: int = 4) -> bool:
    """Write an image file of samples with their boxes: one row per set, evenly spaced, of images with boxes if any.

    Returns:
        Whether there was an image to show; without one, no file is written.
    """
    rows = [row for report in reports if (row := _tiles(report.clean, columns))]
    if rows:
        write_image(Path(path), np.concatenate([np.concatenate(row, axis=1) for row in rows], axis=0))
    return bool(rows)


def _look(report: SetReport, row: int) -> list[str]:
    """Return the faults of an image, and count in the report what is worth a note."""
    annotations, path = report.annotations, report.annotations.path(row)
    try:
        encoded = np.fromfile(path, dtype=np.uint8)
    except OSError:  # no permission, for example
        return [UNREADABLE]
    report.turned += _is_turned(path)
    found = decode(encoded)
    if found is None:
        return [UNREADABLE]
    key = hashlib.blake2b(encoded.tobytes(), digest_size=16).hexdigest()
    first = report.hashes.setdefault(key, annotations.file_names[row])
    report.copies += [f"{annotations.file_names[row]} = {first}"] if first != annotations.file_names[row] else []
    report.deep += found.deep
    faults = ["images are JPEGs without their end: cut off, or damaged"] if found.cut_off else []
    height, width = found.image.shape[:2]
    if annotations.sizes[row].tolist() != [width, height]:
        faults.append("images have another size than the annotations say")
    return faults


def _is_turned(path: Path) -> bool:
    try:
        with PILImage.open(path) as image:
            return bool(image.getexif().get(ORIENTATION, 1) != 1)
    except (
        OSError,
        SyntaxError,
        ValueError,
        PILImage.DecompressionBombError,
    ):  # what Pillow raises for damaged headers
        return False


def _count_tiny(clean: Annotations, size: int) -> int:
    sizes = clean.sizes[clean.rows]
    scale = size / sizes.max(1, initial=1)
    return int((clean.boxes[:, 2:].min(1, initial=size) * scale < TINY).sum())


def _tiles(clean: Annotations, count: int) -> list[Array]:
    rows = np.unique(clean.rows) if len(clean.rows) else np.arange(len(clean))
    chosen = rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int)].tolist()
    tiles = []
    for row in chosen:
        with contextlib.suppress(OSError):  # the report has this fault already
            found = decode(np.fromfile(clean.path(row), dtype=np.uint8))
            tiles += [_tile(clean, row, found.image)] if found is not None else []
    blank = np.full((TILE, TILE, 3), 255, dtype=np.uint8)
    return tiles + [blank] * (count - len(tiles)) if tiles else []


def _tile(clean: Annotations, row: int, image: Array) -> Array:
    """Return one image, scaled so that the class names can be read, in a white square."""
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
