"""Reader of YOLO text."""

from __future__ import annotations

import math
import os
import re
import reprlib
from array import array
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fastkd.yolov3.class_names import read_names
from fastkd.yolov3.data.annotations import Annotations, from_rows
from fastkd.yolov3.data.images import (
    ALIASES,
    ALL,
    IMAGE_SUFFIXES,
    has_images,
    images_in,
    lines_of,
    require_there,
    size_of_image,
)

YAML = (".yaml", ".yml")
DARKNET = ".data"
CLASS_LISTS = ("classes.txt", "obj.names", "_darknet.labels")  # by Label Studio and LabelImg, Darknet, Roboflow


def read_yolo(path: Path, images: str | os.PathLike[str]) -> Annotations:
    """Read YOLO text: one ``.txt`` file per image, beside it, or in ``labels`` instead of ``images``.

    A line has a class index, and centre, width and height relative to the image. A longer line has a polygon, which is
    replaced by its bounding box. An image with an empty label file, or without one, is background.

    Args:
        path: the file with the class names: a ``data.yaml``, a list with one name per line, or a ``.data`` file of
            Darknet, which names such a list.
        images: folder of images, ``.txt`` list of images, or several of these joined by ``os.pathsep``.

    Raises:
        FileNotFoundError: a file or folder is missing.
        ValueError: a file has a fault (the message names file and line), or no image has a label file.
    """
    classes = _classes_of(path)
    places = [Path(images)]
    if not places[0].exists():
        places = [Path(place).absolute() for place in str(images).split(os.pathsep)]
    image_files = [file for place in places for file in _listed_images(place)]
    label_files = [_label_file(file) for file in image_files]
    labelled = [file.is_file() for file in label_files]
    if not any(labelled):
        what = "has a label file" if any(file.is_file() for file in image_files) else "exists"
        first = label_files[0] if what == "has a label file" else image_files[0]
        raise ValueError(f"{path}: none of the {len(image_files)} images of {images} {what}; looked for {first}")
    index = {key: i for i, key in enumerate(classes)}
    sizes, corners = [], []
    objects = array("d")
    for row, (file, labels) in enumerate(zip(image_files, label_files, strict=True)):
        sizes.append(size_of_image(file))
        width, height = sizes[-1]
        for key, x, y, w, h, points in _read_labels(labels, classes) if labelled[row] else ():
            objects.extend((row, index[key], (x - w / 2) * width, (y - h / 2) * height, w * width, h * height, False))
            corners += [points] if points else []
    root = Path(os.path.commonpath([x if x.is_dir() else x.parent for x in places]))
    names = [str(x.relative_to(root)) if x.is_relative_to(root) else str(x.absolute()) for x in image_files]
    table = np.frombuffer(objects).reshape(-1, 7)
    return from_rows(str(path), root, names, sizes, list(classes.values()), table, _yolo_notes(classes, corners))


def is_class_list(path: Path) -> bool:
    """Whether a file has the name of a list with one class name per line."""
    return path.name in CLASS_LISTS or path.suffix == ".names"


def _classes_of(path: Path) -> dict[int, str]:
    """Return the name of each class index, from a ``data.yaml``, a ``.data`` file, or a list."""
    if is_class_list(path):
        return dict(enumerate(read_names(path)))
    if path.suffix == DARKNET:
        entries = read_darknet(path)
        if "names" not in entries:
            raise ValueError(f"{path}: expected a line 'names = obj.names', a file with one class name per line")
        return dict(enumerate(read_names(darknet_place(path, entries["names"]))))
    content = read_yaml(path)
    if "kpt_shape" in content:
        raise ValueError(f"{path}: kpt_shape: expected labels of boxes or polygons, got those of key points")
    return _classes(content, path)


def _yolo_notes(classes: dict[int, str], corners: list[int]) -> list[str]:
    notes = []
    if list(classes) != list(range(len(classes))):
        notes.append(f"names: has {len(classes)} indices with gaps; the classes are numbered 0, 1, ... in their order")
    if corners:
        what = "oriented boxes" if set(corners) == {4} else "polygons"
        notes.append(f"{len(corners)} lines have the corners of {what}; their upright bounding boxes are used")
    return notes


class _Loader(yaml.SafeLoader):
    """A YAML loader that refuses aliases of lists and mappings, with which a short file can expand to a huge one."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        repeats = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        if repeats and isinstance(node, yaml.CollectionNode):
            raise yaml.MarkedYAMLError(
                problem="an alias of a list or mapping; write it out", problem_mark=node.start_mark
            )
        return node


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8-sig"), _Loader)
    except FileNotFoundError:
        raise FileNotFoundError(f"data: no such file: {path}") from None
    except RecursionError:
        raise ValueError(f"{path}: not YAML: nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:  # a ValueError for an impossible date, for example
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected train:, val: and names:, got {type(content).__name__}")
    return content


def _classes(content: dict[str, Any], path: Path) -> dict[int, str]:
    """Return the name of each index of ``names:``, in the order of the indices, which may have gaps."""
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


def sets_of_yaml(path: Path) -> list[str]:
    """Return the names of the sets of a data.yaml: train, val, test and others that ``convert`` has written."""
    content = read_yaml(path)
    known = [name for name in ("train", "val", "test") if _entry_of(content, path, name)]
    named = {alias for aliases in ALIASES.values() for alias in aliases} | {"train", "test"}
    return known + [key for key, value in content.items() if key not in named and value == f"images/{key}"]


def _entry_of(content: dict[str, Any], path: Path, name: str) -> Any:
    """Return the entry of a split in a data.yaml or, without one, a folder of its name beside the training set."""
    names = ALIASES.get(name, (name,))
    entry = next((content[x] for x in names if content.get(x)), None)
    train = content.get("train")
    if entry or name == "train" or not isinstance(train, str) or "train" not in Path(train).parts:
        return entry
    parts = list(Path(train).parts)
    place = len(parts) - 1 - parts[::-1].index("train")
    beside = [str(Path(*parts[:place], x, *parts[place + 1 :])) for x in names]
    return next((x for x in beside if any(has_labels(file) for file in _places_of(content, path, x))), None)


def _places_of(content: dict[str, Any], path: Path, value: str) -> tuple[Path, ...]:
    """Return the paths that an entry may stand for; Roboflow's exports write ../train/images for ./train/images."""
    root = path.parent / str(content.get("path") or "")
    return root / value, path.parent / value, path.parent / value.removeprefix("../")


def has_labels(folder: Path) -> bool:
    """Whether a folder directly contains an image that has a label file."""
    return has_images(folder) and any(
        _label_file(x).is_file() for x in folder.iterdir() if x.suffix.lower() in IMAGE_SUFFIXES
    )


def split_of(content: dict[str, Any], path: Path, name: str) -> Path:
    """Return the folder or list of a split, or several joined by ``os.pathsep``.

    Entries are relative to ``path:``, which is relative to the file.

    Raises:
        FileNotFoundError: there is no such split, or its folder or list does not exist.
    """
    value = _entry_of(content, path, name)
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(x, str) for x in values):
        got = "no such entry" if value is None else reprlib.repr(value)
        raise FileNotFoundError(
            f"set {name!r} in {path}: expected a folder, a .txt list, or a list of them, got {got}; "
            f"sets found: {', '.join(sets_of_yaml(path)) or 'none'}; add a line such as '{name}: images/{name}'"
        )
    found = []
    for value in values:
        places = _places_of(content, path, value)
        place = next((x for x in places if x.exists()), None)
        if place is None:
            raise FileNotFoundError(
                f"set {name!r} in {path}: {places[0]} does not exist; correct or remove the line '{name}: {value}'"
            )
        found.append(str(place))
    return Path(os.pathsep.join(found))


def sets_of_lists(root: Path) -> dict[str, tuple[Path, Path]]:
    """Return the sets of a folder with a list of class names and no data.yaml: Darknet's, or images and labels."""
    file = darknet_file(root)
    if file is not None:
        entries = read_darknet(file)
        names = [name for name in ("train", "val", "test") if name in entries]
        return {name: (file, darknet_place(file, entries[name])) for name in names}
    found: dict[str, tuple[Path, Path]] = {}
    for name in ("train", "val", "test"):
        for part in ALIASES.get(name, (name,)):
            folders = (root / "images" / part, root / part / "images", root / part)
            found |= _listed_set(root, name, part, folders) if name not in found else {}
    return found or _listed_set(root, ALL, "", (root / "images", root))


def _listed_set(root: Path, name: str, part: str, folders: tuple[Path, ...]) -> dict[str, tuple[Path, Path]]:
    places = (root, root / "labels", root / "labels" / part, root / part, root / part / "labels", root / "images")
    lists = [place / file for place in places for file in CLASS_LISTS if (place / file).is_file()]
    images = next((folder for folder in folders if has_labels(folder)), None) if lists else None
    return {} if images is None else {name: (lists[0], images)}


def darknet_file(root: Path) -> Path | None:
    """Return the first ``.data`` file with a training set that is ``root``, or in it, or in one of its folders."""
    files = [root] if root.suffix == DARKNET else sorted([*root.glob(f"*{DARKNET}"), *root.glob(f"*/*{DARKNET}")])
    return next((file for file in files if "train" in read_darknet(file)), None)


def read_darknet(file: Path) -> dict[str, str]:
    """Return the entries train, val, test and names of a ``.data`` file of Darknet; none of any other file."""
    if not file.is_file() or file.stat().st_size > 1 << 16:
        return {}
    pairs = [line.split("=") for line in file.read_text(encoding="utf-8", errors="replace").splitlines()]
    found = {pair[0].strip(): pair[1].strip() for pair in pairs if len(pair) == 2 and pair[1].strip()}
    keys = {name: next((x for x in ALIASES.get(name, (name,)) if x in found), "") for name in ("train", "val", "test")}
    return {name: found[key] for name, key in (keys | {"names": "names"}).items() if key in found}


def darknet_place(file: Path, value: str) -> Path:
    """Return the path of an entry of a ``.data`` file.

    Entries are relative to the folder that Darknet runs in, which is often the folder above the file.

    Raises:
        FileNotFoundError: the path does not exist (the message lists the places).
    """
    places = (file.parent / value, file.parent.parent / value, file.parent / Path(value).name)
    place = next((x for x in places if x.exists()), None)
    if place is None:
        raise FileNotFoundError(f"{file}: {value} does not exist; looked for {', '.join(map(str, places))}")
    return place


def _listed_images(images: Path) -> list[Path]:
    """Return the images of a folder and its sub-folders, or of a list.

    The paths in a list may be relative to the list's folder; to the folder above, as in Darknet; or to the list's
    folder under another name, as in CVAT's exports (``data/``). The choice under which most files exist is used.
    """
    require_there("images", images)
    if images.is_dir():
        return list(images_in(images))
    lines = [line.strip().removeprefix("./") for line in lines_of(images) if line.strip()]
    if not lines:
        raise ValueError(f"images: {images} lists no images")
    here = images.parent
    choices = [[folder / line for line in lines] for folder in (here, here.parent)]
    choices += [[here / line.partition("/")[2] for line in lines]] if all("/" in line for line in lines) else []
    return max(choices, key=lambda files: sum(map(os.path.isfile, files)))


def _label_file(image: Path) -> Path:
    """Return the label file of an image: the last ``images`` of its path becomes ``labels``; or beside the image."""
    beside, parts = image.with_suffix(".txt"), list(image.parts)
    for place in range(len(parts) - 2, -1, -1):
        if parts[place] == "images":
            file = Path(*parts[:place], "labels", *parts[place + 1 :]).with_suffix(".txt")
            return beside if beside.is_file() and not file.is_file() else file
    return beside


def _read_labels(path: Path, classes: Collection[int]) -> Iterator[tuple[int, float, float, float, float, int]]:
    """Yield for each line class index, centre, width and height relative to the image, number of corners or 0."""
    for number, line in enumerate(lines_of(path), start=1):
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
    """Return a guess, for the message, of what a line that is not numbers may be."""
    if any("," in word for word in words):
        return "; are they separated by commas? Separate numbers by spaces, and use a decimal point"
    numeric = [re.fullmatch(r"[-+.\deE]+", word) is not None for word in words]
    if len(words) in (9, 10) and all(numeric[:8]) and not numeric[8]:
        return "; this looks like an oriented box of DOTA: eight coordinates of corners, and a name"
    return "; write the class as its number, not its name" if not numeric[0] and all(numeric[1:]) else ""


def _box_of(polygon: list[float]) -> tuple[float, float, float, float]:
    xs, ys = polygon[::2], polygon[1::2]
    return (min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2, max(xs) - min(xs), max(ys) - min(ys)
