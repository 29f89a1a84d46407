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
import os
from pathlib import Path

from fastkd.yolov3.annotations import Annotations
from fastkd.yolov3.format_coco import read_coco
from fastkd.yolov3.format_images import PICTURES, SPLITS, lines_of, read_pictures, require_there
from fastkd.yolov3.format_voc import read_voc
from fastkd.yolov3.format_yolo import entry_of, read_yaml, read_yolo, split_of

__all__ = ["PICTURES", "find_set", "read_pictures", "read_set", "require_sets", "sets_in"]

# how COCO's files without our boxes begin
OTHER_TASKS = ("captions_", "image_info_", "panoptic_", "person_keypoints_", "stuff_")
LAYOUTS = (
    "looked for annotations/[instances_]{name}.json with images in images/{name}, {name} or images (COCO), "
    "{name}/_annotations.coco.json (COCO of Roboflow), ImageSets/Main/{name}.txt with Annotations and JPEGImages "
    "(VOC), {name}/*.xml beside the images (VOC), data.yaml with {name}: and names: (YOLO)"
)
YAML = (".yaml", ".yml")
ROBOFLOW = "_annotations.coco.json"
ALL = "all"  # the set of a folder that has none by name


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
    require_there("annotations", path)
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
        return root, split_of(read_yaml(root), root, name)
    require_there("data", root)
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
    return file, split_of(read_yaml(file), file, name)


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
        return "names" in read_yaml(file)
    return False


def _has_images(folder: Path) -> bool:
    return folder.is_dir() and any(x.suffix.lower() in PICTURES for x in folder.iterdir())


def _is_labelled(folder: Path) -> bool:
    return any(folder.glob("*.xml")) and _has_images(folder)


def sets_in(folder: str | os.PathLike[str]) -> list[str]:
    """Names of the sets that ``find_set`` finds in a folder, or in a ``.yaml`` file."""
    root = Path(folder)
    if root.suffix in YAML:
        content = read_yaml(root)
        return [name for name in ("train", "val", "test") if entry_of(content, name)]
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
    require_there("data", root)
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
    names = ", ".join(filter(None, map(str.strip, lines_of(file)))) if file.is_file() else "first class, second, ..."
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
