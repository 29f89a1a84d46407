"""Reader of CSV files with one box per row, as in TensorFlow's tutorials and in Roboflow's exports."""

from __future__ import annotations

import csv
import os
import re
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastkd.yolov3.data.annotations import Annotations, Array, from_rows, refuse_outside
from fastkd.yolov3.data.images import ALIASES, ALL, SPLITS, require_there, size_of_image
from fastkd.yolov3.data.voc import boxes_of_corners

CORNERS = ("xmin", "ymin", "xmax", "ymax")
COLUMNS = ("filename", "class", *CORNERS)  # width and height are optional
HEADING = "filename,width,height,class,xmin,ymin,xmax,ymax"


def read_csv(path: Path, images: str | os.PathLike[str]) -> Annotations:
    """Read CSV with the columns ``filename, width, height, class, xmin, ymin, xmax, ymax``: one box per row, in pixels.

    The classes are the sorted labels of all such files in this folder and in the folders of the other splits, so that
    every split numbers them alike. Corners are interpreted as in ``read_voc``, because most such files are made from
    VOC XML. A row with only a file name is an image without a box. ``width`` and ``height`` are optional: without
    them, the size is read from the image.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a column is missing, or a row is not valid (the message names file and line).
    """
    tables = {file: _read_table(file) for file in dict.fromkeys([path, *_beside(path)])}
    labels = sorted({label for table in tables.values() for label in table.labels})
    index = {label: i for i, label in enumerate(labels)}
    corners = np.concatenate([table.corners for table in tables.values()])
    boxes, note = boxes_of_corners(np.column_stack([corners, np.zeros(len(corners))]))
    if len(corners) and np.nanmax(np.abs(corners)) <= 1:
        raise ValueError(f"{path}: expected corners in pixels, got none above 1; multiply them by width and height")
    found = tables[path]
    if not found.file_names:
        raise ValueError(f"{path} lists no images; expected rows of {HEADING}")
    for name in found.file_names:
        refuse_outside(name, str(path))
    sizes = [
        size or size_of_image(Path(images) / name) for name, size in zip(found.file_names, found.sizes, strict=True)
    ]
    classes = [index[label] for label in found.labels]
    table = np.column_stack([found.rows, np.array(classes, dtype=np.int64), boxes[: len(classes)]])
    table = table[np.argsort(table[:, 0], kind="stable")]
    return from_rows(str(path), Path(images), found.file_names, sizes, labels, table, [note])


def sets_of_csv(root: Path) -> dict[str, tuple[Path, Path]]:
    """Return the sets of CSV files in a folder: ``train_labels.csv``, ``data/test.csv``, ``valid/_annotations.csv``."""
    folders = (root, root / "data", root / "annotations", root / "images", *(root / split for split in SPLITS))
    files = [file for folder in folders for file in sorted(folder.glob("*.csv")) if _has_boxes(file)]
    found: dict[str, tuple[Path, Path]] = {}
    for file in files:
        words = [file.parent.name] * (file.parent != root) + re.split(r"[^a-z]+", file.stem.lower())
        split = next((word for word in words if word in SPLITS), "")
        name = split or (file.stem if len(files) > 1 else ALL)
        name = next((known for known, others in ALIASES.items() if name in others), name)
        found.setdefault(name, (file, _images_of(file, root, split)))
    return dict(sorted(found.items(), key=lambda x: SPLITS.index(x[0]) if x[0] in SPLITS else len(SPLITS)))


def columns_of(file: Path) -> list[str]:
    """Return the columns of a CSV file, from its first line; none for a file that is not CSV text."""
    try:
        with _rows_of(file) as reader:
            return list(reader.fieldnames or ())
    except (OSError, ValueError):
        return []


def _has_boxes(file: Path) -> bool:
    return set(COLUMNS) <= set(columns_of(file))


def _images_of(file: Path, root: Path, split: str) -> Path:
    """Return the folder that contains the first image of a CSV file."""
    with _rows_of(file) as reader:
        first = next((row["filename"] or "" for row in reader), "")
    folders = [root / "images" / split, root / split, root / "images", file.parent, root] if split else []
    folders = folders or [root / "images", file.parent, root]
    there = [folder for folder in folders if folder.is_dir()]
    return next((folder for folder in there if first and (folder / first).is_file()), there[0])


def _beside(path: Path) -> Iterator[Path]:
    """Yield the CSV files with boxes in the same folder and in the folders of the other splits."""
    splits = [path.parent.parent / split for split in SPLITS] if path.parent.name in SPLITS else []
    for folder in (path.parent, *splits):
        yield from (file for file in sorted(folder.glob("*.csv")) if _has_boxes(file))


class _Table(NamedTuple):
    file_names: list[str]
    sizes: list[tuple[int, int] | None]
    rows: Array  # (k,) int64: index of the image of each box
    labels: list[str]
    corners: Array  # (k, 4)


def _read_table(path: Path) -> _Table:
    require_there("annotations", path)
    places: dict[str, int] = {}
    sizes: list[tuple[int, int] | None] = []
    rows, corners, labels = array("q"), array("d"), []
    with _rows_of(path) as reader:
        absent = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
        if absent:
            raise ValueError(
                f"{path}, line 1: no column {', '.join(absent)}; expected {HEADING}, got {_shown(reader.fieldnames)}"
            )
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            name, label = _text(row, "filename"), _text(row, "class")
            if not name:
                raise ValueError(f"{where}: expected a file name, got {_shown(row.values())}")
            image = places.setdefault(name, len(places))
            if image == len(sizes):
                sizes.append(_size_of(row))
            if not label and not any(_text(row, side) for side in CORNERS):
                continue
            if not label:
                raise ValueError(f"{where}: expected a class, got {_shown(row.values())}")
            rows.append(image)
            corners.extend(_corners_of(row, where))
            labels.append(label)
    return _Table(
        list(places), sizes, np.frombuffer(rows, dtype=np.int64), labels, np.frombuffer(corners).reshape(-1, 4)
    )


@contextmanager
def _rows_of(path: Path) -> Iterator[csv.DictReader[str]]:
    """Open a CSV file as a reader of its rows; the first line decides between commas, semicolons and tabs."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            first = file.readline(4096)
            file.seek(0)
            reader = csv.DictReader(file, delimiter=max(",;\t", key=first.count))
            reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or ()]
            yield reader
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text, got {error}") from None
    except csv.Error as error:
        raise ValueError(f"{path}: not CSV: {error}") from None


def _text(row: dict[str, Any], column: str) -> str:
    return (row.get(column) or "").strip()


def _size_of(row: dict[str, Any]) -> tuple[int, int] | None:
    """Return width and height; None if they are not given, or not numbers."""
    try:
        width, height = (int(float(_text(row, side))) for side in ("width", "height"))
    except (ValueError, OverflowError):
        return None
    return (width, height) if width > 0 and height > 0 else None


def _corners_of(row: dict[str, Any], where: str) -> list[float]:
    texts = [_text(row, side) for side in CORNERS]
    try:
        return [float(text) for text in texts]
    except ValueError:
        raise ValueError(f"{where}: expected numbers in {', '.join(CORNERS)}, got {_shown(texts)}") from None


def _shown(values: Any) -> str:
    return repr(",".join(str(value) for value in values or () if value is not None)[:80])
