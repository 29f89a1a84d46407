"""Readers of annotated sets: COCO JSON, Pascal VOC XML, YOLO text, and pictures without labels.

A set is a pair of paths, ``annotations`` and ``images``, whose kind says the format; ``find_set`` finds the pair in a
folder, ``read_set`` reads it:

=======  ==============================================  ===================================================
format   annotations                                     images
=======  ==============================================  ===================================================
COCO     ``NAME.json``                                   folder of the images
VOC      ``ImageSets/Main/NAME.txt``, or the folder of   folder of the images
         the XML files for all of them
YOLO     ``data.yaml``                                   folder or ``.txt`` list, or several of them joined
                                                         by ``os.pathsep``
=======  ==============================================  ===================================================
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import re
import reprlib
import sys
from array import array
from collections import Counter
from collections.abc import Collection, Container, Iterator
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

import numpy as np
import yaml
from defusedxml import DefusedXmlException
from defusedxml import ElementTree as XmlTree
from PIL import Image

from fastkd.yolov3.annotations import Annotations, Array, from_rows, refuse_outside, some_of
from fastkd.yolov3.json_stream import read_json

# how COCO's files without our boxes begin
OTHER_TASKS = ("captions_", "image_info_", "panoptic_", "person_keypoints_", "stuff_")
PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")
LAYOUTS = (
    "looked for annotations/[instances_]{name}.json with images in images/{name}, {name} or images (COCO), "
    "{name}/_annotations.coco.json (COCO of Roboflow), ImageSets/Main/{name}.txt with Annotations and JPEGImages "
    "(VOC), {name}/*.xml beside the images (VOC), data.yaml with {name}: and names: (YOLO)"
)
YAML = (".yaml", ".yml")
ROBOFLOW = "_annotations.coco.json"
SPLITS = ("train", "val", "valid", "test")
ALL = "all"  # the set of a folder that has none by name
LARGEST_SIDE = 1 << 31


def read_set(annotations: str | os.PathLike[str], images: str | os.PathLike[str]) -> Annotations:
    """Read a set, its format told by what ``annotations`` is.

    Raises:
        FileNotFoundError, PermissionError: a file or folder is missing or not readable.
        ValueError: not one of the formats, or a fault in a file (names the file, and the line or position).
    """
    path = Path(annotations)
    if path.suffix == ".json":
        return read_coco(path, images).once()
    if path.suffix in YAML:
        return read_yolo(path, images).once()
    if path.suffix == ".txt" or path.is_dir():
        return read_voc(path, images).once()
    _require_there("annotations", path)
    raise ValueError(
        f"annotations: expected a .json file (COCO), a data.yaml (YOLO), or a .txt list or folder of .xml files (VOC), "
        f"got {path}"
    )


def find_set(folder: str | os.PathLike[str], name: str) -> tuple[Path, Path]:
    """Annotations and images of one set: in the layouts of COCO, ``fastkd data``, Roboflow, Pascal VOC and YOLO.

    ``train_100`` is found to be a part of ``train``: its images are in ``images/train``. ``val`` may be
    called ``valid``.

    Args:
        folder: of the data set; or YOLO's ``.yaml`` file itself.
        name: of the set: ``train``, ``val``, ``train2017``, ...; ``all`` for XML files that are in no list.

    Raises:
        FileNotFoundError: no such set (says what was looked for, and lists the sets that are there).
    """
    root = Path(folder)
    if root.suffix in YAML:
        return root, _split_of(_read_yaml(root), root, name)
    _require_there("data", root)
    files = [root / "annotations" / f"{prefix}{name}.json" for prefix in ("", "instances_")]
    images = [root / "images" / name, root / name, root / "images" / name.split("_")[0]]
    found_file = next((x for x in files if x.is_file()), None)
    found_images = next((x for x in images if x.is_dir()), root / "images" if _has_images(root / "images") else None)
    if found_file is not None and found_images is not None:
        return found_file, found_images
    if (root / "ImageSets" / "Main" / f"{name}.txt").is_file():
        return root / "ImageSets" / "Main" / f"{name}.txt", root / "JPEGImages"
    if found_file is not None:
        missing = ", ".join(str(x.relative_to(root)) for x in images)
        raise FileNotFoundError(
            f"set {name!r} in {root}: {found_file.name} is there, but neither a folder {missing} nor images in images"
        )
    found = _yaml_split(root, name) or _folder_split(root, name)
    if found is None:
        raise FileNotFoundError(
            f"set {name!r} in {root}: not found; sets found: {', '.join(sets_in(root)) or 'none'}; "
            + (_hint(root) or LAYOUTS.format(name=name))
        )
    return found


def _yaml_split(root: Path, name: str) -> tuple[Path, Path] | None:
    """Of the folder's YAML file, if that has this set."""
    file = _yaml_in(root)
    if file is None or name not in sets_in(file):
        return None
    return file, _split_of(_read_yaml(file), file, name)


def _folder_split(root: Path, name: str) -> tuple[Path, Path] | None:
    """Annotations in the folder of the images: Roboflow's COCO, and XML files; or XML files that are in no list."""
    for folder in [root / name, root / "valid"] if name == "val" else [root / name]:
        if (folder / ROBOFLOW).is_file():
            return folder / ROBOFLOW, folder
        if _is_labelled(folder):
            return folder, folder
    return _unlisted(root) if name == ALL else None


def _unlisted(root: Path) -> tuple[Path, Path] | None:
    """XML files and images, in two folders or in one, without lists."""
    pairs = itertools.product((root / "Annotations", root / "annotations"), (root / "JPEGImages", root / "images"))
    found = (pair for pair in pairs if any(pair[0].glob("*.xml")) and pair[1].is_dir())
    return next(found, (root, root) if _is_labelled(root) else None)


def _yaml_in(root: Path) -> Path | None:
    """The folder's ``data.yaml``, or its only YAML file with ``names:`` where there is no other format's folder."""
    files = [x for suffix in YAML for x in sorted(root.glob(f"[!.]*{suffix}")) if x.is_file()]
    named = [x for x in files if x.stem == "data"]
    if named or any((root / x).is_dir() for x in ("annotations", "ImageSets")):
        return named[0] if named else None
    with_names = [x for x in files if _has_names(x)]
    return with_names[0] if len(with_names) == 1 else None


def _has_names(file: Path) -> bool:
    with contextlib.suppress(ValueError, OSError):  # a file that can't be read is not of the set
        return "names" in _read_yaml(file)
    return False


def _has_images(folder: Path) -> bool:
    return folder.is_dir() and any(x.suffix.lower() in PICTURES for x in folder.iterdir())


def _is_labelled(folder: Path) -> bool:
    return any(folder.glob("*.xml")) and _has_images(folder)


def sets_in(folder: str | os.PathLike[str]) -> list[str]:
    """Names of the sets that ``find_set`` finds in a folder, or in a ``.yaml`` file."""
    root = Path(folder)
    if root.suffix in YAML:
        content = _read_yaml(root)
        return [name for name in ("train", "val", "test") if _entry_of(content, name)]
    if not root.is_dir():
        return []
    files = [x.stem for x in sorted((root / "annotations").glob("*.json")) if not x.stem.startswith(OTHER_TASKS)]
    names = [stem.removeprefix("instances_") for stem in files]
    lists = sorted((root / "ImageSets" / "Main").glob("*.txt"))
    names += [x.stem for x in lists if (root / "Annotations").is_dir() and "_" not in x.stem]
    file = _yaml_in(root)
    names += sets_in(file) if file is not None else []
    folders = sorted(x for x in root.iterdir() if x.is_dir() and ((x / ROBOFLOW).is_file() or _is_labelled(x)))
    names += ["val" if x.name == "valid" else x.name for x in folders]
    return list(dict.fromkeys(names)) or ([ALL] if _unlisted(root) else [])


def require_sets(folder: str | os.PathLike[str]) -> list[str]:
    """As ``sets_in``, of which there must be some.

    Raises:
        FileNotFoundError: no such folder, or no set in it (says what was looked for, and what is there).
    """
    root = Path(folder)
    _require_there("data", root)
    found = sets_in(root)
    if found:
        return found
    if root.is_dir():
        inside = sorted(x.name for x in root.iterdir())
        what = f"which holds {', '.join(inside[:8]) or 'nothing'}"
    else:
        what = "as none of train:, val: and test: is in it" if root.suffix in YAML else "which is a file, not a folder"
    raise FileNotFoundError(f"data: no set in {root}, {what}; " + (_hint(root) or LAYOUTS.format(name="NAME")))


def _hint(root: Path) -> str:
    """What to write where the layout is known, but says too little to be read."""
    darknet = [root] if root.suffix == ".data" else sorted([*root.glob("*.data"), *root.glob("*/*.data")])
    said = next(((file.parent, found) for file in darknet if (found := _darknet(file))), None)
    if said:
        kind, folder, places = "Darknet", *said
    elif (root / "images").is_dir() and (root / "labels").is_dir():
        parts = [name for name in SPLITS if (root / "images" / name).is_dir()]
        places = {name.replace("valid", "val"): f"images/{name}" for name in parts} or {"train": "images"}
        kind, folder, places = "YOLO", root, places | {"names": "classes.txt"}
    elif any(root.glob("*.csv")):
        return "boxes in CSV files are not read: convert them to COCO JSON"
    else:
        return ""
    file = folder / places.pop("names", "")
    names = ", ".join(filter(None, map(str.strip, _lines(file)))) if file.is_file() else "first class, second, ..."
    lines = [*(f"{split}: {place}" for split, place in places.items()), f"names: [{names}]"]
    where = folder / "data.yaml"
    return (
        f"this looks like {kind}'s layout; to have it read, write {where} with the lines {', '.join(map(repr, lines))}"
    )


def _darknet(file: Path) -> dict[str, str]:
    """What a .data file of Darknet says of train, val and names; nothing of another file."""
    if not file.is_file() or file.stat().st_size > 1 << 16:
        return {}
    pairs = [line.split("=") for line in file.read_text(encoding="utf-8", errors="replace").splitlines()]
    said = {pair[0].strip(): Path(pair[1].strip()).name for pair in pairs if len(pair) == 2}
    return {key: said[name] for key, name in (("train", "train"), ("val", "valid"), ("names", "names")) if name in said}


# ---- COCO


TEXT_IDS = -(1 << 62)  # image ids that are text are numbered from here
NOT_BOXES = {"segments_info": "the segments of panoptic segmentation", "caption": "captions"}


class _Kept:
    """Stands for an annotation that has gone into the arrays."""


def read_coco(path: Path, images: str | os.PathLike[str]) -> Annotations:
    """COCO JSON. Classes are numbered 0, 1, ... in the order of the category ids; ``iscrowd`` is kept.

    Ids of annotations are not used, so they may repeat. Image ids that are text become 1, 2, ...
    """
    numbers, boxes, areas = array("q"), array("d"), array("d")  # image and category ids, iscrowd; four; one
    texts: dict[str, int] = {}

    def number_of(image_id: Any) -> Any:
        return texts.setdefault(image_id, TEXT_IDS + len(texts)) if isinstance(image_id, str) else image_id

    def keep(entry: Any) -> Any:
        """Annotations become numbers as they are parsed: as dictionaries they would take a kilobyte each."""
        try:
            box, area = entry["bbox"], entry.get("area")
            area = math.nan if area is None else area
            if len(box) != 4 or not _are_numbers([*box, area]):
                return entry
            box, area = [float(side) for side in box], float(area)
            row = [number_of(entry["image_id"]), entry["category_id"], int(entry.get("iscrowd") or 0)]
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
        notes=["image ids are text; detections number the images 1, 2, ... in their order"] if texts else [],
    )


def _check_coco(content: Any, path: Path) -> None:
    """Whether all that is used of a file is there."""
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
    """Whole numbers of 64 bits or, of images, text; each once."""
    whole = all(isinstance(number, int) and abs(number) < 1 << 63 for number in ids)
    if not (whole or (part == "images" and all(isinstance(number, str) for number in ids))):
        wrong = next(i for i, number in enumerate(ids) if not isinstance(number, int) or abs(number) >= 1 << 63)
        raise ValueError(
            f"annotation_file: {path}: {part}[{wrong}]: expected a whole number of 64 bits as id, "
            f"got {reprlib.repr(ids[wrong])}"
        )
    again = [number for number, times in Counter(ids).items() if times > 1]
    if again:
        raise ValueError(f"annotation_file: {path}: ids in '{part}' are not unique: {again[0]!r} is there twice")


def _places(values: Any, known: Any) -> Any:
    """Index of each value in ``known``, -1 where it is not there."""
    if not len(known):
        return np.full(len(values), -1)
    order = np.argsort(known)
    places = order[np.searchsorted(known[order], values).clip(max=len(known) - 1)]
    return np.where(known[places] == values, places, -1)


def _require_known(key: str, ids: Array, places: Array, known: list[Any], texts: dict[str, int], path: Path) -> None:
    """Whether the image or category of each annotation is there."""
    if (places < 0).any():
        position = int(np.argmax(places < 0))
        number = int(ids[position])
        value = next((text for text, place in texts.items() if place == number), number)
        raise ValueError(
            f"{path}: annotations[{position}] has unknown {key} {value!r}; the file has {reprlib.repr(known)}"
        )


def _are_numbers(values: list[Any]) -> bool:
    return all(isinstance(value, (int, float)) for value in values)


# ---- Pascal VOC


def read_voc(path: Path, images: str | os.PathLike[str]) -> Annotations:
    """Pascal VOC XML, in a folder of its own or beside the images.

    Corners are whole pixels counted from 1, of which the last is inside the box. Where a corner of the set is at 0 or
    has a fraction, they are points counted from 0 instead; negative ones show neither. A box whose last corner is not
    behind its first has no area.

    Classes are those of all XML files of the folder, sorted, so that every list of it numbers them alike; of files
    beside the images in train/ and valid/, those of all these folders. ``difficult`` objects are treated as COCO's
    crowds: VOC neither counts them as misses nor their detections as false.
    """
    folder = path if path.is_dir() else path.parent.parent.parent / "Annotations"
    _require_there("annotations", folder)
    files = {file.stem: file for file in sorted(folder.glob("*.xml"))}
    if not files:
        raise ValueError(f"annotations: no .xml files in {folder}")
    listed = list(files) if path.is_dir() else _voc_names(path, files)
    if not listed:
        raise ValueError(f"{path} lists no names; expected the names of XML files in {folder}, one a line")
    absent = [name for name in listed if name not in files]
    if absent:
        raise ValueError(f"{path}: {len(absent)} of {len(listed)} names have no file in {folder}: {some_of(absent)}")
    parsed = {name: _read_xml(file) for name, file in files.items()}
    others = [_read_xml(file) for file in _beside(folder)] if folder == Path(images) else []
    everything = [*parsed.values(), *others]
    index = {name: i for i, name in enumerate(sorted({label for xml in everything for label in xml.labels}))}
    classes = np.array([index[label] for xml in everything for label in xml.labels])
    boxes, note = _voc_boxes(np.concatenate([xml.objects for xml in everything]))
    ends = dict(zip(parsed, itertools.accumulate(len(xml.labels) for xml in parsed.values()), strict=True))
    names, sizes, chosen, others_named = [], [], [np.zeros(0, np.int64)], []
    for name in listed:
        xml = parsed[name]
        file_name, other = _voc_picture(Path(images), files[name], xml.file_name, files)
        others_named += [f"{name}.xml says {other}"] if other else []
        names.append(file_name)
        sizes.append(xml.size or picture_size(Path(images) / file_name))
        chosen.append(np.arange(ends[name] - len(xml.labels), ends[name]))
    of = np.concatenate(chosen)
    table = np.column_stack([np.repeat(np.arange(len(listed)), [len(x) for x in chosen[1:]]), classes[of], boxes[of]])
    notes = [note]
    if others_named:
        notes.append(
            f"{len(others_named)} XML files name another image that is there too; the image of the XML file's own name "
            f"is taken: {some_of(others_named)}"
        )
    return from_rows(str(path), Path(images), names, sizes, list(index), table, notes)


def _beside(folder: Path) -> list[Path]:
    """XML files of the other splits, where they are beside their images."""
    if folder.name not in SPLITS:
        return []
    return [file for split in SPLITS if split != folder.name for file in sorted((folder.parent / split).glob("*.xml"))]


def _voc_boxes(objects: Array) -> tuple[Array, str]:
    """(M, 5) x, y, width, height and difficult of (M, 5) corners and difficult, and how the corners were understood."""
    corners = objects[:, :4]
    known = corners[np.isfinite(corners).all(1)]
    from_zero = int(((known[:, :2] == 0).any(1) | (known % 1 != 0).any(1)).sum())
    offset = 0 if from_zero else 1
    with np.errstate(invalid="ignore"):
        size = corners[:, 2:] - corners[:, :2]
    boxes = np.concatenate([corners[:, :2] - offset, size + offset * (size > 0), objects[:, 4:]], axis=1)
    if from_zero:
        return boxes, f"corners are read as points counted from 0: {from_zero} boxes have one at 0 or with a fraction"
    return boxes, "corners are read as whole pixels counted from 1, as VOC has them: none is at 0 or has a fraction"


class _Xml(NamedTuple):
    file_name: str
    size: tuple[int, int] | None
    labels: list[str]
    objects: Array  # (k, 5) left, top, right, bottom, difficult


def _read_xml(path: Path) -> _Xml:
    labels, objects = [], array("d")
    try:
        root: Any = XmlTree.parse(path).getroot()
        size = _size_of(root)
        for entry in root.iter("object"):
            label = entry.findtext("name", "").strip()
            if not label:
                raise ValueError("an object without a name")
            labels.append(sys.intern(label))
            objects.extend((*_corners_of(entry, label), entry.findtext("difficult", "0").strip() == "1"))
    except DefusedXmlException as error:
        raise ValueError(f"{path}: refused, as it declares entities, which no annotation needs ({error})") from None
    except (XmlTree.ParseError, ValueError, OverflowError) as error:
        raise ValueError(f"{path}: not Pascal VOC XML: {error}") from None
    return _Xml(root.findtext("filename", "").strip(), size, labels, np.frombuffer(objects).reshape(-1, 5))


def _size_of(root: Any) -> tuple[int, int] | None:
    """Width and height; None where they are not given, or are no numbers."""
    try:
        width, height = (int(float(root.findtext(f"size/{side}", "0"))) for side in ("width", "height"))
    except (ValueError, OverflowError):  # of nothing, nan or inf
        return None
    if max(width, height) >= LARGEST_SIDE:
        raise ValueError(f"expected a size of less than 2^31 pixels, got {float(width):g}x{float(height):g}")
    return (width, height) if width > 0 and height > 0 else None


def _corners_of(entry: Any, label: str) -> list[float]:
    texts = [entry.findtext(f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")]
    try:
        return [float(text) for text in texts]
    except (TypeError, ValueError):
        found = "no bndbox" if entry.find("bndbox") is None else texts
        other = next((tag for tag in ("polygon", "segm", "robndbox") if entry.find(tag) is not None), None)
        hint = f"; it has a {other}, as files of LabelMe and others do: convert these to boxes first" if other else ""
        raise ValueError(
            f"object {label!r}: expected numbers in bndbox's xmin, ymin, xmax, ymax, got {found}{hint}"
        ) from None


def _voc_picture(folder: Path, file: Path, file_name: str, stems: Container[str]) -> tuple[str, str]:
    """The image of an XML file, and another image that it names.

    It is the image of the XML file's own name or, without one, the image that it names, unless that has the name of
    another XML file (``stems`` are all their names), whose image it is.
    """
    stem, named = file.stem, PureWindowsPath(file_name)
    suffixes = dict.fromkeys((named.suffix or PICTURES[0], *PICTURES, *map(str.upper, PICTURES)))
    own = next((f"{stem}{suffix}" for suffix in suffixes if (folder / f"{stem}{suffix}").is_file()), None)
    if own is None:
        if file_name:
            refuse_outside(file_name, str(file))
        of_another = named.stem != stem and named.stem in stems
        return f"{stem}.jpg" if of_another or not file_name else file_name, ""
    contradicts = named.stem not in ("", stem) and (folder / named.name).is_file()
    return own, named.name if contradicts else ""


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
    """YOLO text: one ``.txt`` per image, beside it or with ``labels`` for ``images`` in its path.

    A line is a class index and centre, width and height relative to the image; a longer one is a polygon, of which the
    bounding box is taken. An image with an empty label file, or none, is background.
    """
    content = _read_yaml(path)
    if "kpt_shape" in content:
        raise ValueError(f"{path}: kpt_shape: expected labels of boxes or polygons, got those of key points")
    classes = _classes(content, path)
    places = [Path(images)]
    if not places[0].exists():
        places = [Path(place).absolute() for place in str(images).split(os.pathsep)]
    pictures = [picture for place in places for picture in _listed_pictures(place)]
    label_files = [_label_file(picture) for picture in pictures]
    labelled = [file.is_file() for file in label_files]
    if not any(labelled):
        what = "has a label file" if any(picture.is_file() for picture in pictures) else "exists"
        first = label_files[0] if what == "has a label file" else pictures[0]
        raise ValueError(f"{path}: none of the {len(pictures)} images of {images} {what}; looked for {first}")
    index = {key: i for i, key in enumerate(classes)}
    sizes, corners = [], []
    objects = array("d")
    for row, (picture, labels) in enumerate(zip(pictures, label_files, strict=True)):
        sizes.append(picture_size(picture))
        width, height = sizes[-1]
        for key, x, y, w, h, points in _read_labels(labels, classes) if labelled[row] else ():
            objects.extend((row, index[key], (x - w / 2) * width, (y - h / 2) * height, w * width, h * height, False))
            corners += [points] if points else []
    root = Path(os.path.commonpath([x if x.is_dir() else x.parent for x in places]))
    names = [str(x.relative_to(root)) if x.is_relative_to(root) else str(x.absolute()) for x in pictures]
    table = np.frombuffer(objects).reshape(-1, 7)
    return from_rows(str(path), root, names, sizes, list(classes.values()), table, _yolo_notes(classes, corners))


def _yolo_notes(classes: dict[int, str], corners: list[int]) -> list[str]:
    notes = []
    if list(classes) != list(range(len(classes))):
        notes.append(f"names: has {len(classes)} indices with gaps; the classes are numbered 0, 1, ... in their order")
    if corners:
        what = "oriented boxes" if set(corners) == {4} else "polygons"
        notes.append(f"{len(corners)} rows have corners, as those of {what}; their upright bounding boxes are taken")
    return notes


class _Loader(yaml.SafeLoader):
    """Refuses what makes a short file large: repetitions of lists and mappings."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        repeats = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        if repeats and isinstance(node, yaml.CollectionNode):
            raise yaml.MarkedYAMLError(
                problem="an alias of a list or mapping; write it out", problem_mark=node.start_mark
            )
        return node


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8-sig"), _Loader)
    except FileNotFoundError:
        raise FileNotFoundError(f"data: no such file: {path}") from None
    except RecursionError:
        raise ValueError(f"{path}: not YAML: nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:  # of a date that is none, for example
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected train:, val: and names:, got {type(content).__name__}")
    return content


def _classes(content: dict[str, Any], path: Path) -> dict[int, str]:
    """Name of each index of ``names:``, in the order of the indices, which may have gaps."""
    names = content.get("names")
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{path}: names: expected a list of class names, or index: name, got {reprlib.repr(names)}")
    if not all(isinstance(key, int) and key >= 0 for key in names):
        raise ValueError(f"{path}: names: expected indices from 0, got {reprlib.repr(list(names))}")
    if content.get("nc", len(names)) not in (len(names), max(names) + 1):
        raise ValueError(f"{path}: nc is {reprlib.repr(content['nc'])}, but names has {len(names)}")
    return {key: str(names[key]) for key in sorted(names)}


def _entry_of(content: dict[str, Any], name: str) -> Any:
    """What a data.yaml has of a split; ``val`` may be called ``valid``."""
    return content.get(name) or (content.get("valid") if name == "val" else None)


def _split_of(content: dict[str, Any], path: Path, name: str) -> Path:
    """Folder or list of a split, or several joined; relative to ``path:``, which is relative to the file."""
    value = _entry_of(content, name)
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(x, str) for x in values):
        known = [key for key in ("train", "val", "test") if _entry_of(content, key)]
        raise FileNotFoundError(
            f"set {name!r} in {path}: expected a folder, a .txt list, or a list of them, "
            f"got {'no such entry' if value is None else reprlib.repr(value)}; sets found: {', '.join(known) or 'none'}"
        )
    root = path.parent / str(content.get("path") or "")
    found = []
    for value in values:
        # exports of Roboflow say ../train/images of what is beside the file
        places = (root / value, path.parent / value, path.parent / value.removeprefix("../"))
        place = next((x for x in places if x.exists()), None)
        if place is None:
            raise FileNotFoundError(f"set {name!r} in {path}: {root / value} does not exist")
        found.append(str(place))
    return Path(os.pathsep.join(found))


def _listed_pictures(images: Path) -> list[Path]:
    """The images of a folder and its sub-folders, or of a list.

    Relative paths of a list are relative to its folder or, as Darknet has them, to the folder above: to the one in
    which more of them exist.
    """
    _require_there("images", images)
    if images.is_dir():
        return list(_pictures(images))
    lines = [line.strip().removeprefix("./") for line in _lines(images) if line.strip()]
    if not lines:
        raise ValueError(f"images: {images} lists no images")
    folders = (images.parent, images.parent.parent)
    folder = max(folders, key=lambda folder: sum(os.path.isfile(os.path.join(folder, line)) for line in lines))
    return [folder / line for line in lines]


def _label_file(picture: Path) -> Path:
    """With the last ``images`` of its path as ``labels``; or beside the picture, where that is absent."""
    beside, parts = picture.with_suffix(".txt"), list(picture.parts)
    for place in range(len(parts) - 2, -1, -1):
        if parts[place] == "images":
            file = Path(*parts[:place], "labels", *parts[place + 1 :]).with_suffix(".txt")
            return beside if beside.is_file() and not file.is_file() else file
    return beside


def _read_labels(path: Path, classes: Collection[int]) -> Iterator[tuple[int, float, float, float, float, int]]:
    """Of each line: class index; centre, width and height relative to the image; number of corners, 0 of a box."""
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        where, shown = f"{path}, line {number}", line.strip()[:60]
        try:
            index, *values = (float(word) for word in line.split())
        except ValueError:
            raise ValueError(f"{where}: expected numbers, got {shown!r}{_looks_like(line.split())}") from None
        if index not in classes:
            raise ValueError(f"{where}: expected a class index of names:, {_range(classes)}, got {index:g}")
        if len(values) < 4 or (len(values) > 4 and len(values) % 2):
            raise ValueError(
                f"{where}: expected class, centre x, centre y, width, height, or class and a polygon, "
                f"got {len(values) + 1} numbers"
            )
        if not all(math.isfinite(value) for value in values):
            raise ValueError(f"{where}: expected finite numbers, got {shown!r}")
        x, y, w, h = values if len(values) == 4 else _box_of(values)
        if max(abs(x), abs(y), abs(w), abs(h)) > 2:
            raise ValueError(f"{where}: expected numbers relative to the image, 0 to 1, got {shown}")
        yield int(index), x, y, w, h, len(values) // 2 if len(values) > 4 else 0


def _range(classes: Collection[int]) -> str:
    return f"{min(classes)} to {max(classes)}" + (" with gaps" if len(classes) <= max(classes) else "")


def _looks_like(words: list[str]) -> str:
    """What a row that is not numbers may be, for the message."""
    if any("," in word for word in words):
        return "; are they separated by commas? Expected spaces between the numbers, and a decimal point"
    numeric = [re.fullmatch(r"[-+.\deE]+", word) is not None for word in words]
    if len(words) in (9, 10) and all(numeric[:8]) and not numeric[8]:
        return "; this looks like an oriented box of DOTA: eight coordinates of corners, and a name"
    return "; the first is the class as a number, not its name" if not numeric[0] and all(numeric[1:]) else ""


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
    return from_rows(str(root), root, [str(x.relative_to(root)) for x in pictures], sizes, [], np.zeros((0, 7)))


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
