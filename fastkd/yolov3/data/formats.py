"""Readers of annotated sets: COCO JSON, Pascal VOC XML, YOLO text, CSV of boxes, and images without labels.

A set is a pair of paths, ``annotations`` and ``images``, whose kind determines the format. ``find_set`` finds the pair
in a folder, ``read_set`` reads it:

=======  ==============================================  ===================================================
format   annotations                                     images
=======  ==============================================  ===================================================
COCO     ``NAME.json``                                   folder of the images
VOC      ``ImageSets/Main/NAME.txt``, or a folder, of    folder of the images
         which all XML files are read
YOLO     ``data.yaml``; Darknet's ``obj.data``; or a     folder or ``.txt`` list, or several of them joined
         list of class names, ``classes.txt``            by ``os.pathsep``
CSV      ``train_labels.csv``, one row per box           folder of the images
=======  ==============================================  ===================================================
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
from pathlib import Path

from fastkd.yolov3.data.annotations import Annotations
from fastkd.yolov3.data.coco import read_coco
from fastkd.yolov3.data.csv_boxes import HEADING, columns_of, read_csv, sets_of_csv
from fastkd.yolov3.data.images import ALIASES, ALL, IMAGE_SUFFIXES, SPLITS, has_images, read_images, require_there
from fastkd.yolov3.data.voc import read_voc
from fastkd.yolov3.data.yolo import (
    DARKNET,
    YAML,
    is_class_list,
    read_yaml,
    read_yolo,
    sets_of_lists,
    sets_of_yaml,
    split_of,
)

__all__ = ["ALL", "IMAGE_SUFFIXES", "YAML", "Pair", "find_set", "read_images", "read_set", "require_sets", "sets_in"]

# prefixes of COCO's files for other tasks than detection
OTHER_TASKS = ("captions_", "image_info_", "panoptic_", "person_keypoints_", "stuff_")
LAYOUTS = (
    "looked for annotations/[instances_]{name}.json with images in images/{name}, {name} or images (COCO), "
    "{name}/_annotations.coco.json (COCO of Roboflow), ImageSets/Main/{name}.txt with Annotations and JPEGImages "
    "(VOC), {name}/*.xml beside the images (VOC), data.yaml with {name}: and names: (YOLO), images and labels with "
    "classes.txt (YOLO), obj.data (Darknet), {name}_labels.csv (CSV)"
)
ROBOFLOW = "_annotations.coco.json"
# COCO files for all images of a folder, as Label Studio, TACO, FiftyOne and Roboflow name them
WHOLE_COCO = ("result.json", "annotations.json", "labels.json", ROBOFLOW)
Pair = tuple[Path, Path]  # annotations and images


def read_set(annotations: str | os.PathLike[str], images: str | os.PathLike[str]) -> Annotations:
    """Read a set in the format that ``annotations`` determines, see the table in this module.

    Raises:
        FileNotFoundError, PermissionError: a file or folder is missing or not readable.
        ValueError: the format is unknown, or a file has a fault (the message names the file, and line or position).
    """
    path = Path(annotations)
    if path.suffix == ".json":
        return read_coco(path, images).once()
    if path.suffix in (*YAML, DARKNET) or is_class_list(path):
        return read_yolo(path, images).once()
    if path.suffix == ".csv":
        return read_csv(path, images).once()
    if path.suffix == ".txt" or path.is_dir():
        return read_voc(path, images).once()
    require_there("annotations", path)
    raise ValueError(
        "annotations: expected a .json file (COCO), a data.yaml, .data file or classes.txt (YOLO), a .csv file, or a "
        f".txt list or folder of .xml files (VOC), got {path}"
    )


def find_set(folder: str | os.PathLike[str], name: str) -> Pair:
    """Return the paths of annotations and images of one set, in any of the layouts that docs/data.md shows.

    ``train_100`` is a part of ``train``: its images are in ``images/train``. The set ``val`` may be called ``valid`` or
    ``validation``.

    Args:
        folder: folder of the data set; or YOLO's ``.yaml`` file, or Darknet's ``.data`` file.
        name: name of the set: ``train``, ``val``, ``train2017``, ...; ``all`` for the only set of a folder, if it has
            no name.

    Returns:
        The two paths, as ``read_set`` and ``DetectionDataset`` take them.

    Raises:
        FileNotFoundError: there is no such set (the message lists the files that were looked for and the sets found).
    """
    root = Path(folder)
    if root.suffix in YAML:
        return root, split_of(read_yaml(root), root, name)
    require_there("data", root)
    missing: FileNotFoundError | None = None
    for alias in ALIASES.get(name, (name,)):
        try:
            found = _listed_set(root, alias)
        except FileNotFoundError as error:  # COCO without its images; another layout may have the set
            missing = missing or error
            continue
        if found is not None:
            return found
    found = _yaml_split(root, name) or _folder_split(root, name) or _other_sets(root).get(name)
    if found is None:
        names = sets_in(root)
        file = _yaml_in(root)
        line = f", write the line '{name}: FOLDER' into {file}" if file is not None else ""
        choices = f"name one of these{line}, or make a split: fastkd data split {root} --out FOLDER"
        hint = choices if names else _hint(root)
        raise missing or FileNotFoundError(
            f"set {name!r} in {root}: not found; sets found: {', '.join(names) or 'none'}; "
            + (hint or LAYOUTS.format(name=name))
        )
    return found


def _listed_set(root: Path, name: str) -> Pair | None:
    """Return a set of COCO's or VOC's layout; None if there is none."""
    files = [root / "annotations" / f"{prefix}{name}.json" for prefix in ("", "instances_")]
    images = [root / "images" / name, root / name, root / "images" / name.split("_")[0]]
    found_file = next((x for x in files if x.is_file()), None)
    found_images = next((x for x in images if x.is_dir()), None)
    if found_images is None and (has_images(root / "images") or _has_first(found_file, root / "images")):
        found_images = root / "images"
    if found_file is not None and found_images is not None:
        return found_file, found_images
    if (root / "ImageSets" / "Main" / f"{name}.txt").is_file():
        return root / "ImageSets" / "Main" / f"{name}.txt", root / "JPEGImages"
    if found_file is not None:
        missing = ", ".join(str(x.relative_to(root)) for x in images)
        raise FileNotFoundError(
            f"set {name!r} in {root}: {found_file.name} is there, but neither a folder {missing} nor images in images"
        )
    return None


def _yaml_split(root: Path, name: str) -> Pair | None:
    """Return a set of the folder's YAML file; None if there is none."""
    file = _yaml_in(root)
    if file is None or name not in sets_of_yaml(file):
        return None
    return file, split_of(read_yaml(file), file, name)


def _folder_split(root: Path, name: str) -> Pair | None:
    """Return a set whose annotations are beside its images (Roboflow's COCO, XML), or XML files without a list."""
    for folder in [root / alias for alias in ALIASES.get(name, (name,))]:
        if (folder / ROBOFLOW).is_file():
            return folder / ROBOFLOW, folder
        if _is_labelled(folder):
            return folder, folder
    return _unlisted(root) if name == ALL else None


def _other_sets(root: Path) -> dict[str, Pair]:
    """Return the sets of the layouts that are tried last: a single COCO file, YOLO without a YAML file, CSV."""
    if not root.is_dir():
        return sets_of_lists(root)
    file = next((root / name for name in WHOLE_COCO if (root / name).is_file()), None)
    if file is not None and "images" in _start_of(file):
        return {ALL: (file, _images_beside(file))}
    return (sets_of_lists(root) if _yaml_in(root) is None else {}) or sets_of_csv(root)


def _start_of(file: Path) -> str:
    with file.open(encoding="utf-8", errors="replace") as opened:
        return opened.read(1 << 16)


def _images_beside(file: Path) -> Path:
    """Return the image folder of a COCO file, ``images``, ``data`` or its own folder: the one with its first image."""
    folders = [file.parent / "images", file.parent / "data", file.parent]
    return next((x for x in folders if _has_first(file, x)), folders[-1])


def _has_first(file: Path | None, folder: Path) -> bool:
    """Return whether a folder has the first image that a COCO file names; the name may begin with a subfolder."""
    first = None if file is None else re.search(r'"file_name"\s*:\s*("(?:[^"\\]|\\.)+")', _start_of(file))
    with contextlib.suppress(ValueError, OSError):  # no JSON, or no path
        return first is not None and (folder / json.loads(first[1])).is_file()
    return False


def _unlisted(root: Path) -> Pair | None:
    """Return the folders of XML files and images, two or one, that no list divides into sets; None without any."""
    pairs = itertools.product((root / "Annotations", root / "annotations"), (root / "JPEGImages", root / "images"))
    found = (pair for pair in pairs if any(pair[0].glob("*.xml")) and pair[1].is_dir())
    return next(found, (root, root) if _is_labelled(root) else None)


def _yaml_in(root: Path) -> Path | None:
    """Return the folder's ``data.yaml``, or its only YAML file with ``names:`` if it has no folder of other formats."""
    files = [x for suffix in YAML for x in sorted(root.glob(f"[!.]*{suffix}")) if x.is_file()]
    named = [x for x in files if x.stem == "data"]
    if named or any((root / x).is_dir() for x in ("annotations", "ImageSets")):
        return named[0] if named else None
    with_names = [x for x in files if _has_names(x)]
    return with_names[0] if len(with_names) == 1 else None


def _has_names(file: Path) -> bool:
    with contextlib.suppress(ValueError, OSError):  # a file that can't be read does not belong to the set
        return "names" in read_yaml(file)
    return False


def _is_labelled(folder: Path) -> bool:
    return any(folder.glob("*.xml")) and has_images(folder)


def sets_in(folder: str | os.PathLike[str]) -> list[str]:
    """Return the names of the sets that ``find_set`` finds in a folder, or in a ``.yaml`` or ``.data`` file."""
    root = Path(folder)
    if root.suffix in YAML:
        return sets_of_yaml(root)
    if not root.is_dir():
        return list(_other_sets(root))
    files = [x.stem for x in sorted((root / "annotations").glob("*.json")) if not x.stem.startswith(OTHER_TASKS)]
    names = [stem.removeprefix("instances_") for stem in files]
    lists = sorted((root / "ImageSets" / "Main").glob("*.txt"))
    names += [x.stem for x in lists if (root / "Annotations").is_dir() and "_" not in x.stem]
    file = _yaml_in(root)
    names += sets_of_yaml(file) if file is not None else []
    names += sorted(x.name for x in root.iterdir() if x.is_dir() and ((x / ROBOFLOW).is_file() or _is_labelled(x)))
    known = {alias: name for name, aliases in ALIASES.items() for alias in aliases}
    names = [known.get(name, name) for name in names]
    return list(dict.fromkeys(names)) or ([ALL] if _unlisted(root) else list(_other_sets(root)))


def require_sets(folder: str | os.PathLike[str]) -> list[str]:
    """Return the names of the sets of a folder, as ``sets_in``; there must be at least one.

    Raises:
        FileNotFoundError: there is no such folder, or no set in it (the message lists what was looked for, and what is
            there).
    """
    root = Path(folder)
    require_there("data", root)
    found = sets_in(root)
    if found:
        return found
    if root.is_dir():
        inside = sorted(x.name for x in root.iterdir())
        what = f"which contains {', '.join(inside[:8]) or 'nothing'}"
    else:
        what = "which has no train:, val: or test:" if root.suffix in YAML else "which is a file, not a folder"
    raise FileNotFoundError(f"data: no set in {root}, {what}; " + (_hint(root) or LAYOUTS.format(name="NAME")))


def _hint(root: Path) -> str:
    """Return what is missing for a layout that is known but incomplete; empty if it is not known."""
    parts = [name for name in SPLITS if (root / "images" / name).is_dir()]
    if (root / "images").is_dir() and (root / "labels").is_dir():
        known = {alias: name for name, aliases in ALIASES.items() for alias in aliases}
        places = {known.get(name, name): f"images/{name}" for name in parts} or {"train": "images"}
        lines = [*(f"{split}: {place}" for split, place in places.items()), "names: [first class, second, ...]"]
        return (
            "this looks like YOLO's layout without class names; write them to "
            f"{root / 'classes.txt'}, one per line, or write {root / 'data.yaml'} with the lines "
            f"{', '.join(map(repr, lines))}"
        )
    tables = sorted(root.glob("*.csv")) if root.is_dir() else []
    if tables:
        first = ",".join(columns_of(tables[0]))
        return f"{tables[0]}: expected the first line {HEADING!r}, got {first[:80]!r}"
    return ""
