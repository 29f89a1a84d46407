"""Reader of COCO JSON."""

from __future__ import annotations

import math
import os
import reprlib
from array import array
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from fastkd.yolov3.data.annotations import Annotations, Array, refuse_outside
from fastkd.yolov3.data.images import LARGEST_SIDE
from fastkd.yolov3.data.json_stream import read_json

TEXT_IDS = -(1 << 62)  # image ids that are text are numbered from here
NOT_BOXES = {"segments_info": "the segments of panoptic segmentation", "caption": "captions"}


class _Kept:
    """Stands in the list for an annotation that has been moved to the arrays."""


def read_coco(path: Path, images: str | os.PathLike[str]) -> Annotations:
    """Read COCO JSON. Classes are numbered 0, 1, ... in the order of the category ids; ``iscrowd`` is kept.

    The ids of annotations are not used, so they may repeat. Image ids that are text are replaced by 1, 2, ...

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not COCO detection JSON (the message names the place).
    """
    numbers, boxes, areas = array("q"), array("d"), array("d")  # per box: image id, category id, iscrowd; 4; 1
    texts: dict[str, int] = {}

    def number_of(image_id: Any) -> Any:
        return texts.setdefault(image_id, TEXT_IDS + len(texts)) if isinstance(image_id, str) else image_id

    def keep(entry: Any) -> Any:
        """Move an annotation to the arrays as soon as it is parsed: a dictionary would take about a kilobyte."""
        try:
            box, area = entry["bbox"], entry.get("area")
            area = math.nan if area is None else area
            if len(box) != 4 or not _are_numbers([*box, area]):
                return entry
            box, area = [float(side) for side in box], float(area)
            row = [number_of(entry["image_id"]), entry["category_id"], int(entry.get("iscrowd") or 0)]
            numbers.extend(row)
        except (KeyError, TypeError, ValueError, OverflowError):
            return entry  # an image, a category, or a fault that the checks below report
        boxes.extend(box)
        areas.append(area)
        return _Kept

    try:
        content = read_json(path, keep)
    except FileNotFoundError:
        raise FileNotFoundError(f"annotation_file: no such file: {path}") from None
    except ValueError as error:
        raise ValueError(f"annotation_file: {path} is not JSON: {error}") from None
    _check_coco(content, path)
    table = np.frombuffer(numbers, dtype=np.int64).reshape(-1, 3)
    if len(table) != len(content["annotations"]):
        raise ValueError(f"annotation_file: {path}: there are annotations outside the list 'annotations'")
    categories = sorted(content["categories"], key=lambda category: category["id"])
    image_ids = np.array([number_of(image["id"]) for image in content["images"]], dtype=np.int64)
    for image in content["images"]:
        refuse_outside(image["file_name"], str(path))
    rows = _places(table[:, 0], image_ids)
    classes = _places(table[:, 1], np.array([category["id"] for category in categories], dtype=np.int64))
    _require_known("image_id", table[:, 0], rows, [image["id"] for image in content["images"]], texts, path)
    _require_known("category_id", table[:, 1], classes, [category["id"] for category in categories], {}, path)
    order = np.argsort(rows, kind="stable")
    return Annotations(
        source=str(path),
        image_dir=Path(images),
        file_names=[image["file_name"] for image in content["images"]],
        image_ids=np.arange(1, len(image_ids) + 1) if texts else image_ids,
        sizes=np.array([(image["width"], image["height"]) for image in content["images"]], dtype=np.int64),
        class_names=[str(category["name"]) for category in categories],
        category_ids=[category["id"] for category in categories],
        boxes=np.frombuffer(boxes).reshape(-1, 4)[order],
        rows=rows[order],
        classes=classes[order],
        crowd=table[order, 2] > 0,
        areas=np.frombuffer(areas)[order],
        notes=["image ids are text; in detections the images are numbered 1, 2, ... in their order"] if texts else [],
    )


def _check_coco(content: Any, path: Path) -> None:
    """Raise ``ValueError`` if something that is read from a file is missing or has another type."""
    fields = {
        "images": ("id", "file_name", "width", "height"),
        "annotations": ("image_id", "category_id", "bbox"),
        "categories": ("id", "name"),
    }
    for part, keys in fields.items():
        entries = content.get(part) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise ValueError(f"annotation_file: {path} has no list '{part}'; expected COCO detection JSON")
        for position, entry in enumerate(entries):
            if entry is _Kept and part == "annotations":
                continue
            _check_entry(entry, keys, f"annotation_file: {path}: {part}[{position}]")
            if part == "annotations":
                found = {key: entry[key] for key in (*keys, "area", "iscrowd") if key in entry}
                raise ValueError(
                    f"annotation_file: {path}: annotations[{position}]: expected whole numbers of 64 bits as ids and "
                    f"iscrowd, a number as area, and 4 numbers in bbox, got {found}"
                )
        if part != "annotations":
            _check_ids(part, [entry["id"] for entry in entries], path)
    for position, image in enumerate(content["images"]):
        size = [image["width"], image["height"]]
        if not (_are_numbers(size) and all(1 <= side < LARGEST_SIDE for side in size)):
            raise ValueError(
                f"annotation_file: {path}: images[{position}]: expected width and height of at least 1, got {size}"
            )
        if not isinstance(image["file_name"], str):
            raise ValueError(
                f"annotation_file: {path}: images[{position}]: expected text as file_name, got {image['file_name']!r}"
            )
    if not content["images"]:
        raise ValueError(f"annotation_file: {path} lists no images")


def _check_entry(entry: Any, keys: tuple[str, ...], where: str) -> None:
    absent = [key for key in keys if not isinstance(entry, dict) or key not in entry]
    if absent:
        other = next((what for key, what in NOT_BOXES.items() if isinstance(entry, dict) and key in entry), None)
        hint = f"; these are {other}: detection needs the instances_ file of the set" if other else ""
        raise ValueError(f"{where} has no {', '.join(absent)}{hint}")


def _check_ids(part: str, ids: list[Any], path: Path) -> None:
    """Raise ``ValueError`` unless all ids are different and 64-bit integers or, for images, text."""
    whole = all(isinstance(number, int) and abs(number) < 1 << 63 for number in ids)
    if not (whole or (part == "images" and all(isinstance(number, str) for number in ids))):
        wrong = next(i for i, number in enumerate(ids) if not isinstance(number, int) or abs(number) >= 1 << 63)
        raise ValueError(
            f"annotation_file: {path}: {part}[{wrong}]: expected a whole number of 64 bits as id, "
            f"got {reprlib.repr(ids[wrong])}"
        )
    again = [number for number, times in Counter(ids).items() if times > 1]
    if again:
        raise ValueError(f"annotation_file: {path}: expected different ids in '{part}', got {again[0]!r} twice")


def _places(values: Any, known: Any) -> Any:
    """Return the index of each value in ``known``, -1 for a value that is not there."""
    if not len(known):
        return np.full(len(values), -1)
    order = np.argsort(known)
    places = order[np.searchsorted(known[order], values).clip(max=len(known) - 1)]
    return np.where(known[places] == values, places, -1)


def _require_known(key: str, ids: Array, places: Array, known: list[Any], texts: dict[str, int], path: Path) -> None:
    """Raise ``ValueError`` if the image or category of an annotation is not in the file."""
    if (places < 0).any():
        position = int(np.argmax(places < 0))
        number = int(ids[position])
        value = next((text for text, place in texts.items() if place == number), number)
        raise ValueError(
            f"{path}: annotations[{position}] has unknown {key} {value!r}; the file has {reprlib.repr(known)}"
        )


def _are_numbers(values: list[Any]) -> bool:
    return all(isinstance(value, (int, float)) for value in values)
