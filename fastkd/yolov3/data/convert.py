"""Writes sets of any layout as COCO JSON or YOLO text, for ``fastkd data convert`` and ``fastkd data split``."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path, PurePath

import numpy as np
import yaml

from fastkd.files import making, replacing
from fastkd.yolov3.data.annotations import Annotations, Array, some_of
from fastkd.yolov3.data.formats import find_set, read_set, require_sets

FORMATS = ("coco", "yolo")
KEYS = ("train", "val", "test")  # the sets of a data.yaml


def convert(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    to: str,
    *,
    names: Sequence[str] | None = None,
    copy: bool = False,
) -> dict[str, Annotations]:
    """Write sets of a folder, in any layout that ``find_set`` knows, to a new folder.

    Args:
        folder: as for ``find_set``.
        names: names of the sets; None: all sets.
        out, to, copy: as for ``write_sets``.

    Returns:
        The annotations that were written, by the name of the set.

    Raises:
        FileNotFoundError, ValueError: there is no such set, or its annotations can't be read.
        Also what ``write_sets`` raises.
    """
    chosen = require_sets(folder) if names is None else names
    return write_sets({name: read_set(*find_set(folder, name)) for name in chosen}, out, to, copy=copy)


def write_sets(
    sets: Mapping[str, Annotations], out: str | os.PathLike[str], to: str, *, copy: bool = False
) -> dict[str, Annotations]:
    """Write sets to a new folder, atomically.

    Images go to ``images/NAME``. For COCO, ``annotations/NAME.json`` has the boxes, areas and crowds (VOC's difficult
    objects become crowds too), and the ids of images and categories as they were read. For YOLO, labels go to
    ``labels/NAME`` and the classes to a ``data.yaml``; crowds are left out, as the format can't mark them, and boxes
    are clipped to their image, as other trainers refuse boxes that reach outside. Both formats leave out boxes without
    area, boxes that are not finite, and images that can't be read; ``problems`` of the returned annotations names them.

    Args:
        sets: annotations by the name of the set.
        out: the folder, which must not exist.
        to: ``"coco"`` or ``"yolo"``.
        copy: copy the images; False: link to them, or copy them if the system has no links.

    Returns:
        The annotations that were written, by the name of the set; file names are relative to ``images/NAME``.

    Raises:
        FileExistsError: ``out`` exists. FileNotFoundError: images are missing.
        ValueError: the format is unknown; or for YOLO, sets have different classes or two images have one name.
    """
    if to not in FORMATS:
        raise ValueError(f"to: expected coco or yolo, got {to!r}")
    with making(out) as part:
        written = {}
        for name, annotations in sets.items():
            kept = as_coco(annotations) if to == "coco" else _as_yolo(annotations)
            written[name] = _place_images(kept, part / "images" / name, copy=copy, flat=to == "yolo")
        if to == "coco":
            for name, annotations in written.items():
                write_coco(annotations, part / "annotations" / f"{name}.json")
        else:
            _write_yolo(written, part)
    return {name: replace(x, image_dir=Path(out) / "images" / name) for name, x in written.items()}


def as_coco(annotations: Annotations) -> Annotations:
    """Return the part of a set that COCO JSON can hold: images of known size in one folder, and boxes with an area.

    Raises:
        FileNotFoundError: images are missing.
    """
    missing = annotations.missing()
    if missing:
        raise FileNotFoundError(
            f"{annotations.source}: {len(missing)} of {len(annotations)} images are missing from "
            f"{annotations.image_dir}: {some_of(missing)}; remove them from the annotations, or add the files"
        )
    readable = annotations.have_size()
    found = annotations.only(readable)
    kept = found.as_given()
    finite: Array = np.logical_and.reduce(np.isfinite(found.boxes), axis=1)
    lost = ~(finite & (found.boxes[:, 2:].min(1, initial=np.inf) > 0))
    told = {
        "images that can't be read left out": [annotations.file_names[row] for row in np.flatnonzero(~readable)],
        "boxes without area or not finite left out": found.names_of(lost),
    }
    return _inside(replace(kept, problems=found.problems | {what: names for what, names in told.items() if names}))


def _as_yolo(annotations: Annotations) -> Annotations:
    found = as_coco(annotations)
    crowds = found.names_of(found.crowd)
    told = {"crowd or difficult objects left out": crowds} if crowds else {}
    kept = replace(found._keeping(~found.crowd), problems=found.problems | told)
    return kept.clean()


def _inside(annotations: Annotations) -> Annotations:
    """Return the set with file names relative to a folder that contains all images."""
    names = [PurePath(name) for name in annotations.file_names]
    if not any(name.is_absolute() or ".." in name.parts for name in names):
        return replace(annotations, file_names=[name.as_posix() for name in names])
    files = [os.path.abspath(annotations.path(row)) for row in range(len(annotations))]
    root = Path(os.path.commonpath([os.path.dirname(file) for file in files]))
    return replace(annotations, image_dir=root, file_names=[Path(file).relative_to(root).as_posix() for file in files])


def _place_images(annotations: Annotations, folder: Path, *, copy: bool, flat: bool) -> Annotations:
    """Link or copy the images to a folder.

    ``flat``: leave out folders called ``images`` below it, because YOLO finds labels by the last ``images`` of a path.
    """
    names = annotations.file_names
    if flat:
        names = ["/".join(part for part in name.split("/") if part != "images") for name in names]
        twice = [name for name, times in Counter(os.path.splitext(name)[0] for name in names).items() if times > 1]
        if twice:
            raise ValueError(
                f"{annotations.source}: expected different names, as YOLO's label files are named after their images; "
                f"got {len(twice)} names twice: {some_of(twice)}; rename the images, or write COCO"
            )
    folder.mkdir(parents=True)
    for row, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        _place(annotations.path(row), folder / name, copy=copy)
    return replace(annotations, image_dir=folder, file_names=names)


def _place(file: Path, target: Path, *, copy: bool) -> None:
    if not copy:
        with suppress(OSError, NotImplementedError):  # not every file system has links
            target.symlink_to(os.path.abspath(file))
            return
    shutil.copyfile(file, target)


def write_coco(annotations: Annotations, path: str | os.PathLike[str]) -> None:
    """Write one set, as ``as_coco`` returns it, as COCO JSON. Raises what ``fastkd.files.replacing`` raises."""
    with replacing(path) as part:
        part.write_text(json.dumps(annotations.coco(), ensure_ascii=False), encoding="utf-8")


def _write_yolo(sets: Mapping[str, Annotations], folder: Path) -> None:
    lists = {name: annotations.class_names for name, annotations in sets.items()}
    classes = next(iter(lists.values()), [])
    other = next((name for name, names in lists.items() if names != classes), None)
    if other is not None:
        raise ValueError(
            f"names: expected one list of classes, as a data.yaml has, but {next(iter(lists))} has "
            f"{some_of(classes)} and {other} has {some_of(lists[other])}; convert one set at a time (--set), or to COCO"
        )
    for name in sets:
        _write_labels(sets[name], folder / "labels" / name)
    places = {_key_of(name, sets): f"images/{name}" for name in sets}
    text = yaml.safe_dump(
        {**places, "nc": len(classes), "names": classes}, sort_keys=False, allow_unicode=True, width=1 << 20
    )
    (folder / "data.yaml").write_text(text, encoding="utf-8")


def _key_of(name: str, names: Collection[str]) -> str:
    """Return the key of a set in a data.yaml: ``val`` for ``val2017`` unless two sets would have it.

    A set that was never split is ``train``.
    """
    key = name.rstrip("0123456789")
    if key not in KEYS:
        return "train" if len(names) == 1 else name
    return key if name == key or sum(x.rstrip("0123456789") == key for x in names) == 1 else name


def _write_labels(annotations: Annotations, folder: Path) -> None:
    """Write one file per image, even without boxes: class, centre, width and height relative to the image."""
    sizes = annotations.sizes[annotations.rows]
    centres = annotations.boxes[:, :2] + annotations.boxes[:, 2:] / 2
    relative = np.concatenate([centres / sizes, annotations.boxes[:, 2:] / sizes], axis=1).tolist()
    classes = annotations.classes.tolist()
    for row, name in enumerate(annotations.file_names):
        of = annotations.of(row)
        lines = [
            f"{k} {' '.join(f'{x:.10g}' for x in box)}\n" for k, box in zip(classes[of], relative[of], strict=True)
        ]
        file = (folder / name).with_suffix(".txt")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(lines), encoding="utf-8")
