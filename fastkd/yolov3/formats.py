"""Readers of annotated sets: COCO JSON, Pascal VOC XML, YOLO text, and pictures without labels.

A set is a pair of paths, ``annotations`` and ``images``, whose kind says the format; ``find_set`` finds the pair in a
folder, ``read_set`` reads it:

=======  ==============================================  ============================
format   annotations                                     images
=======  ==============================================  ============================
COCO     ``NAME.json``                                   folder of the pictures
VOC      ``ImageSets/Main/NAME.txt``, or the folder of   folder of the pictures
         the XML files for all of them
YOLO     ``data.yaml``                                   folder, or ``.txt`` list
=======  ==============================================  ============================
"""

from __future__ import annotations

import math
import os
import re
import sys
from array import array
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from defusedxml import DefusedXmlException
from defusedxml import ElementTree as XmlTree
from PIL import Image

from fastkd.yolov3.annotations import Annotations, from_rows, refuse_outside
from fastkd.yolov3.json_stream import read_json

# how COCO's files without our boxes begin
OTHER_TASKS = ("captions_", "image_info_", "panoptic_", "person_keypoints_", "stuff_")
PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")
LAYOUTS = (
    "looked for annotations/[instances_]{name}.json with pictures in images/{name} or {name} (COCO), "
    "ImageSets/Main/{name}.txt with Annotations and JPEGImages (VOC), data.yaml with {name}: and names: (YOLO)"
)


def read_set(annotations: str | os.PathLike[str], images: str | os.PathLike[str]) -> Annotations:
    """Read a set, its format told by what ``annotations`` is.

    Raises:
        FileNotFoundError, PermissionError: a file or folder is missing or not readable.
        ValueError: not one of the formats, or a fault in a file (names the file, and the line or position).
    """
    path = Path(annotations)
    if path.suffix == ".json":
        return read_coco(path, images)
    if path.suffix in (".yaml", ".yml"):
        return read_yolo(path, images)
    if path.suffix == ".txt" or path.is_dir():
        return read_voc(path, images)
    _require_there("annotations", path)
    raise ValueError(
        f"annotations: expected a .json file (COCO), a data.yaml (YOLO), or a .txt list or folder of .xml files (VOC), "
        f"got {path}"
    )


def find_set(folder: str | os.PathLike[str], name: str) -> tuple[Path, Path]:
    """Annotations and pictures of one set: in the layouts of COCO, ``fastkd data``, Pascal VOC and YOLO.

    ``train_100`` is found to be a part of ``train``: its pictures are in ``images/train``.

    Args:
        folder: of the data set; or YOLO's ``.yaml`` file itself.
        name: of the set: ``train``, ``val``, ``train2017``, ...

    Raises:
        FileNotFoundError: no such set (says what was looked for, and lists the sets that are there).
    """
    root = Path(folder)
    if root.suffix in (".yaml", ".yml"):
        return root, _split_of(_read_yaml(root), root, name)
    _require_there("data", root)
    files = [root / "annotations" / f"{prefix}{name}.json" for prefix in ("", "instances_")]
    images = [root / "images" / name, root / name, root / "images" / name.split("_")[0]]
    found_file = next((x for x in files if x.is_file()), None)
    found_images = next((x for x in images if x.is_dir()), None)
    if found_file is not None and found_images is not None:
        return found_file, found_images
    if (root / "ImageSets" / "Main" / f"{name}.txt").is_file():
        return root / "ImageSets" / "Main" / f"{name}.txt", root / "JPEGImages"
    if found_file is None and (root / "data.yaml").is_file():
        return root / "data.yaml", _split_of(_read_yaml(root / "data.yaml"), root / "data.yaml", name)
    if found_file is not None:
        missing = ", ".join(str(x.relative_to(root)) for x in images)
        raise FileNotFoundError(
            f"set {name!r} in {root}: {found_file.name} is there, but none of the folders {missing}"
        )
    raise FileNotFoundError(
        f"set {name!r} in {root}: not found; sets found: {', '.join(sets_in(root)) or 'none'}; "
        + LAYOUTS.format(name=name)
    )


def sets_in(folder: str | os.PathLike[str]) -> list[str]:
    """Names of the sets that ``find_set`` finds in a folder, or in a ``.yaml`` file."""
    root = Path(folder)
    if root.suffix in (".yaml", ".yml"):
        return [name for name in ("train", "val", "test") if _read_yaml(root).get(name)]
    files = [x.stem for x in sorted((root / "annotations").glob("*.json")) if not x.stem.startswith(OTHER_TASKS)]
    names = [stem.removeprefix("instances_") for stem in files]
    lists = sorted((root / "ImageSets" / "Main").glob("*.txt"))
    names += [x.stem for x in lists if (root / "Annotations").is_dir() and "_" not in x.stem]
    listed = sets_in(root / "data.yaml") if (root / "data.yaml").is_file() else []
    return names + [name for name in listed if name not in names]


def require_sets(folder: str | os.PathLike[str]) -> list[str]:
    """As ``sets_in``, of which there must be some.

    Raises:
        FileNotFoundError: no such folder, or no set in it (says what was looked for, and what is there).
    """
    root = Path(folder)
    _require_there("data", root)
    found = sets_in(root)
    if not found:
        inside = sorted(x.name for x in root.iterdir()) if root.is_dir() else []
        raise FileNotFoundError(
            f"data: no set in {root}, which holds {', '.join(inside[:8]) or 'nothing'}; " + LAYOUTS.format(name="NAME")
        )
    return found


# ---- COCO


class _Kept:
    """Stands for an annotation that has gone into the arrays."""


def read_coco(path: Path, images: str | os.PathLike[str]) -> Annotations:
    """COCO JSON. Classes are numbered 0, 1, ... in the order of the category ids; ``iscrowd`` is kept."""
    numbers, boxes, areas = array("q"), array("d"), array("d")  # ids, image and category ids, iscrowd; four; one

    def keep(entry: Any) -> Any:
        """Annotations become numbers as they are parsed: as dictionaries they would take a kilobyte each."""
        try:
            box, area = entry["bbox"], entry.get("area")
            area = math.nan if area is None else area
            if len(box) != 4 or not _are_numbers([*box, area]):
                return entry
            box, area = [float(side) for side in box], float(area)
            row = [entry["id"], entry["image_id"], entry["category_id"], int(entry.get("iscrowd") or 0)]
            numbers.extend(row)
        except (KeyError, TypeError, ValueError, OverflowError):
            return entry  # a picture, a category, or a fault that the checks below name
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
    table = np.frombuffer(numbers, dtype=np.int64).reshape(-1, 4)
    if len(table) != len(content["annotations"]):
        raise ValueError(f"annotation_file: {path}: there are annotations outside the list 'annotations'")
    _require_unique("annotations", table[:, 0].tolist(), path)
    categories = sorted(content["categories"], key=lambda category: category["id"])
    image_ids = np.array([image["id"] for image in content["images"]], dtype=np.int64)
    for image in content["images"]:
        refuse_outside(image["file_name"], str(path))
    rows = _places(table[:, 1], image_ids)
    classes = _places(table[:, 2], np.array([category["id"] for category in categories], dtype=np.int64))
    _check_known(table, rows, classes, [category["id"] for category in categories], path)
    order = np.argsort(rows, kind="stable")
    return Annotations(
        source=str(path),
        image_dir=Path(images),
        file_names=[image["file_name"] for image in content["images"]],
        image_ids=image_ids,
        sizes=np.array([(image["width"], image["height"]) for image in content["images"]], dtype=np.int64),
        class_names=[str(category["name"]) for category in categories],
        category_ids=[category["id"] for category in categories],
        boxes=np.frombuffer(boxes).reshape(-1, 4)[order],
        rows=rows[order],
        classes=classes[order],
        crowd=table[order, 3] > 0,
        areas=np.frombuffer(areas)[order],
    )


def _check_coco(content: Any, path: Path) -> None:
    """Whether all that is used of a file is there."""
    fields = {
        "images": ("id", "file_name", "width", "height"),
        "annotations": ("id", "image_id", "category_id", "bbox"),
        "categories": ("id", "name"),
    }
    for part, keys in fields.items():
        entries = content.get(part) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise ValueError(f"annotation_file: {path} has no list '{part}'; expected COCO detection JSON")
        for position, entry in enumerate(entries):
            if entry is _Kept and part == "annotations":
                continue
            absent = [key for key in keys if not isinstance(entry, dict) or key not in entry]
            if absent:
                raise ValueError(f"annotation_file: {path}: {part}[{position}] has no {', '.join(absent)}")
            if part == "annotations":
                found = {key: entry[key] for key in (*keys, "area", "iscrowd") if key in entry}
                raise ValueError(
                    f"annotation_file: {path}: annotations[{position}]: expected whole numbers as ids and iscrowd, a "
                    f"number as area, and 4 numbers in bbox, got {found}"
                )
        if part != "annotations":
            ids = [entry["id"] for entry in entries]
            if not all(isinstance(number, int) for number in ids):
                raise ValueError(f"annotation_file: {path}: {part}: expected whole numbers as ids, got {ids[:3]}")
            _require_unique(part, ids, path)
    for position, image in enumerate(content["images"]):
        if not (_are_numbers([image["width"], image["height"]]) and min(image["width"], image["height"]) >= 1):
            raise ValueError(f"annotation_file: {path}: images[{position}]: expected width and height of at least 1")
        if not isinstance(image["file_name"], str):
            raise ValueError(
                f"annotation_file: {path}: images[{position}]: expected text as file_name, got {image['file_name']!r}"
            )
    if not content["images"]:
        raise ValueError(f"annotation_file: {path} lists no images")


def _require_unique(part: str, ids: list[Any], path: Path) -> None:
    if len(set(ids)) != len(ids):
        raise ValueError(f"annotation_file: {path}: ids in '{part}' are not unique")


def _places(values: Any, known: Any) -> Any:
    """Index of each value in ``known``, -1 where it is not there."""
    if not len(known):
        return np.full(len(values), -1)
    order = np.argsort(known)
    places = order[np.searchsorted(known[order], values).clip(max=len(known) - 1)]
    return np.where(known[places] == values, places, -1)


def _check_known(table: Any, rows: Any, classes: Any, category_ids: list[int], path: Path) -> None:
    if (rows < 0).any():
        number, image_id = table[np.argmax(rows < 0), :2]
        raise ValueError(f"{path}: annotation {number} has unknown image_id {image_id}")
    if (classes < 0).any():
        number, category_id = table[np.argmax(classes < 0), [0, 2]]
        raise ValueError(
            f"{path}: annotation {number} has unknown category_id {category_id}; "
            f"the file's categories are {category_ids}"
        )


def _are_numbers(values: list[Any]) -> bool:
    return all(isinstance(value, (int, float)) for value in values)


# ---- Pascal VOC


def read_voc(path: Path, images: str | os.PathLike[str]) -> Annotations:
    """Pascal VOC XML: corners of whole pixels counted from 1, both inside the box.

    Classes are those of all XML files of the folder, sorted, so that every list of it numbers them alike. ``difficult``
    objects are treated as COCO's crowds: VOC neither counts them as misses nor their detections as false.
    """
    folder = path if path.is_dir() else path.parent.parent.parent / "Annotations"
    _require_there("annotations", folder)
    files = {file.stem: file for file in sorted(folder.glob("*.xml"))}
    if not files:
        raise ValueError(f"annotations: no .xml files in {folder}")
    listed = list(files) if path.is_dir() else _voc_names(path, files)
    absent = [name for name in listed if name not in files]
    if absent or not listed:
        raise ValueError(
            f"{path}: {len(absent)} of {len(listed)} names have no file in {folder}: {', '.join(absent[:5])}"
        )
    parsed = {name: _read_xml(file) for name, file in files.items()}
    class_names = sorted({label for _, _, labels, _ in parsed.values() for label in labels})
    index = {name: i for i, name in enumerate(class_names)}
    names, sizes = [], []
    objects = array("d")
    for row, name in enumerate(listed):
        file_name, size, labels, boxes = parsed[name]
        file_name = _voc_picture(Path(images), name, file_name, str(files[name]))
        names.append(file_name)
        sizes.append(size or picture_size(Path(images) / file_name))
        for i, label in enumerate(labels):
            objects.extend((row, index[label], *boxes[5 * i : 5 * i + 5]))
    return from_rows(str(path), Path(images), names, sizes, class_names, objects)


def _read_xml(path: Path) -> tuple[str, tuple[int, int] | None, list[str], array[float]]:
    """File name, (width, height) if there, and of each object the class, and x, y, width, height and difficult."""
    labels, boxes = [], array("d")
    try:
        root: Any = XmlTree.parse(path).getroot()
        width, height = (int(float(root.findtext(f"size/{side}", "0"))) for side in ("width", "height"))
        for entry in root.iter("object"):
            left, top, right, bottom = (
                float(entry.findtext(f"bndbox/{x}", "")) for x in ("xmin", "ymin", "xmax", "ymax")
            )
            label = entry.findtext("name", "").strip()
            if not label:
                raise ValueError("an object without a name")
            labels.append(sys.intern(label))
            difficult = entry.findtext("difficult", "0").strip() == "1"
            boxes.extend((left - 1, top - 1, right - left + 1, bottom - top + 1, difficult))
    except DefusedXmlException as error:
        raise ValueError(f"{path}: refused, as it declares entities, which no annotation needs ({error})") from None
    except (XmlTree.ParseError, ValueError, OverflowError) as error:
        raise ValueError(f"{path}: not Pascal VOC XML: {error}") from None
    size = (width, height) if width > 0 and height > 0 else None
    return root.findtext("filename", "").strip(), size, labels, boxes


def _voc_picture(folder: Path, stem: str, file_name: str, source: str) -> str:
    """The picture of an XML file: what it names, or the picture of its own name."""
    if file_name:
        refuse_outside(file_name, source)
        if (folder / file_name).is_file():
            return file_name
    beside = (f"{stem}{suffix}" for suffix in PICTURES)
    return next((name for name in beside if (folder / name).is_file()), file_name or f"{stem}.jpg")


def _voc_names(path: Path, known: Container[str]) -> list[str]:
    """Names of a list of VOC, whose lines may go on with a flag."""
    names = []
    for line in filter(None, map(str.strip, _lines(path))):
        while line not in known and len(line.split()) > 1:
            line = line.rsplit(maxsplit=1)[0]
        names.append(line)
    return names


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text, got {error}") from None


# ---- YOLO


def read_yolo(path: Path, images: str | os.PathLike[str]) -> Annotations:
    """YOLO text: one ``.txt`` a picture, beside it or with ``labels`` for ``images`` in its path.

    A line is a class index and centre, width and height relative to the picture; a longer one is a polygon, of which
    the bounding box is taken. A picture with an empty label file, or none, is background.
    """
    content = _read_yaml(path)
    if "kpt_shape" in content:
        raise ValueError(f"{path}: kpt_shape: expected labels of boxes or polygons, got those of key points")
    class_names = _class_names(content, path)
    pictures = _listed_pictures(Path(images))
    label_files = [_label_file(picture) for picture in pictures]
    labelled = [file.is_file() for file in label_files]
    if not any(labelled):
        raise ValueError(
            f"{path}: none of the {len(pictures)} pictures of {images} has a label file; looked for {label_files[0]}"
        )
    sizes = []
    objects = array("d")
    for row, (picture, labels) in enumerate(zip(pictures, label_files, strict=True)):
        sizes.append(picture_size(picture))
        width, height = sizes[-1]
        for index, x, y, w, h in _read_labels(labels, len(class_names)) if labelled[row] else ():
            objects.extend((row, index, (x - w / 2) * width, (y - h / 2) * height, w * width, h * height, False))
    root = Path(images) if Path(images).is_dir() else Path(images).parent
    names = [str(x.relative_to(root)) if x.is_relative_to(root) else str(x.absolute()) for x in pictures]
    return from_rows(str(path), root, names, sizes, class_names, objects)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise FileNotFoundError(f"data: no such file: {path}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected train:, val: and names:, got {type(content).__name__}")
    return content


def _class_names(content: dict[str, Any], path: Path) -> list[str]:
    names = content.get("names")
    if isinstance(names, dict):
        if set(names) != set(range(len(names))):
            raise ValueError(f"{path}: names: expected the indices 0 to {len(names) - 1}, got {list(names)[:5]}")
        names = [names[i] for i in range(len(names))]
    if not isinstance(names, list) or not names:
        raise ValueError(f"{path}: names: expected a list of class names, or index: name, got {names!r}")
    if content.get("nc", len(names)) != len(names):
        raise ValueError(f"{path}: nc is {content['nc']}, but names has {len(names)}")
    return [str(name) for name in names]


def _split_of(content: dict[str, Any], path: Path, name: str) -> Path:
    """Folder or list of a split; relative to ``path:``, which is relative to the file."""
    value = content.get(name)
    if not isinstance(value, str):
        known = [key for key in ("train", "val", "test") if isinstance(content.get(key), str)]
        found = "no such entry" if value is None else f"{value!r}; write the pictures' paths into one .txt list"
        raise FileNotFoundError(
            f"set {name!r} in {path}: expected a folder or a .txt list, got {found}; "
            f"sets found: {', '.join(known) or 'none'}"
        )
    root = path.parent / str(content.get("path") or "")
    # exports of Roboflow say ../train/images of what is beside the file
    places = (root / value, path.parent / value, path.parent / value.removeprefix("../"))
    place = next((x for x in places if x.exists()), None)
    if place is None:
        raise FileNotFoundError(f"set {name!r} in {path}: {root / value} does not exist")
    return place


def _listed_pictures(images: Path) -> list[Path]:
    """The pictures of a folder and its sub-folders, or of a list, whose relative paths are relative to it."""
    _require_there("images", images)
    if images.is_dir():
        return list(_pictures(images))
    found = [images.parent / line.strip().removeprefix("./") for line in _lines(images) if line.strip()]
    if not found:
        raise ValueError(f"images: {images} lists no pictures")
    return found


def _label_file(picture: Path) -> Path:
    """With the last ``images`` of its path as ``labels``; or beside the picture, where that is absent."""
    beside, parts = picture.with_suffix(".txt"), list(picture.parts)
    for place in range(len(parts) - 2, -1, -1):
        if parts[place] == "images":
            file = Path(*parts[:place], "labels", *parts[place + 1 :]).with_suffix(".txt")
            return beside if beside.is_file() and not file.is_file() else file
    return beside


def _read_labels(path: Path, classes: int) -> Iterator[tuple[int, float, float, float, float]]:
    """Class index, and centre, width and height relative to the picture, of each line."""
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            index, *values = (float(word) for word in line.split())
        except ValueError:
            raise ValueError(f"{path}, line {number}: expected numbers, got {line.strip()[:60]!r}") from None
        if not (index == int(index) if math.isfinite(index) else False) or not 0 <= index < classes:
            raise ValueError(f"{path}, line {number}: expected a class index from 0 to {classes - 1}, got {index:g}")
        if len(values) < 4 or (len(values) > 4 and len(values) % 2):
            raise ValueError(
                f"{path}, line {number}: expected class, centre x, centre y, width, height, or class and a polygon, "
                f"got {len(values) + 1} numbers"
            )
        if not all(math.isfinite(value) for value in values):
            raise ValueError(f"{path}, line {number}: expected finite numbers, got {line.strip()[:60]!r}")
        x, y, w, h = values if len(values) == 4 else _box_of(values)
        if max(abs(x), abs(y), abs(w), abs(h)) > 2:
            raise ValueError(
                f"{path}, line {number}: expected numbers relative to the picture, 0 to 1, got {line.strip()[:60]}"
            )
        yield int(index), x, y, w, h


def _box_of(polygon: list[float]) -> tuple[float, float, float, float]:
    xs, ys = polygon[::2], polygon[1::2]
    return (min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2, max(xs) - min(xs), max(ys) - min(ys)


# ---- pictures without labels


def read_pictures(folder: str | os.PathLike[str]) -> Annotations:
    """All pictures of a folder and its sub-folders, without a box or a class.

    Raises:
        FileNotFoundError: no such folder. ValueError: no picture in it.
    """
    root = Path(folder)
    _require_there("folder", root)
    pictures = list(_pictures(root))
    sizes = [picture_size(picture) for picture in pictures]
    return from_rows(str(root), root, [str(x.relative_to(root)) for x in pictures], sizes, [], array("d"))


def picture_size(path: Path) -> tuple[int, int]:
    """Width and height from the file's header; (0, 0) of what is missing or no picture."""
    try:
        with Image.open(path) as picture:
            return (picture.width, picture.height)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # what Pillow raises for damaged headers
        return 0, 0


def _pictures(folder: Path) -> Iterator[Path]:
    """In the order of their paths, numbers in them by value; linked folders are looked into, each folder once."""
    found: list[Path] = []
    seen: set[str] = set()
    top = os.path.realpath(folder)
    waiting = [Path(folder)]
    while waiting:  # links come after all folders, which keep their own names where a link leads to one of them
        links = []
        for root, folders, names in os.walk(waiting.pop(0), onerror=_raise):
            if (real := os.path.realpath(root)) in seen or (seen and Path(top).is_relative_to(real)):
                folders.clear()
                continue
            seen.add(real)
            found += [Path(root) / name for name in names if name.lower().endswith(PICTURES)]
            links += [path for name in folders if (path := Path(root) / name).is_symlink()]
        waiting += sorted(links)
    if not found:
        raise ValueError(f"{folder}: no pictures in this folder ({', '.join(PICTURES)})")
    yield from sorted(
        found, key=lambda path: [x.zfill(12) if x.isdigit() else x for x in re.split(r"(\d+)", str(path))]
    )


def _raise(error: OSError) -> None:
    raise error


def _require_there(name: str, path: Path) -> None:
    if not path.exists():
        raise FileNotFoundError(f"{name}: no such file or folder: {path}")
    if not os.access(path, os.R_OK):
        raise PermissionError(f"{name}: no permission to read {path}")
