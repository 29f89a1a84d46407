"""Write sets of any layout as COCO JSON or YOLO text: ``fastkd data convert`` and ``fastkd data split``."""

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
KEYS = ("train", "val", "test")  # of a data.yaml


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
        names: of the sets; None: all that are there.
        out, to, copy: as for ``write_sets``.

    Returns:
        What was written, by the name of the set.

    Raises:
        As ``write_sets``; FileNotFoundError, ValueError: no such set, or annotations that can't be read.
    """
    chosen = require_sets(folder) if names is None else names
    return write_sets({name: read_set(*find_set(folder, name)) for name in chosen}, out, to, copy=copy)


def write_sets(
    sets: Mapping[str, Annotations], out: str | os.PathLike[str], to: str, *, copy: bool = False
) -> dict[str, Annotations]:
    """Write sets to a new folder, which appears once it is whole.

    Images go to ``images/NAME``. COCO: ``annotations/NAME.json`` has boxes, areas, crowds (VOC's difficult objects are
    crowds too) and the ids of images and categories as they were read. YOLO: ``labels/NAME`` and a ``data.yaml``;
    crowds are left out, as the text can't say what they are, and boxes are clipped to their image, as other trainers
    refuse those that reach outside. Left out of both are boxes without area or with a number that is not finite, and
    images that can't be read; ``problems`` of what is returned names them.

    Args:
        sets: annotations by the name of the set.
        out: the folder, which must not be there.
        to: ``"coco"`` or ``"yolo"``.
        copy: copy the images; False: links to them, or copies where the system has no links.

    Returns:
        What was written, by the name of the set; the file names are those in ``images/NAME``.

    Raises:
        FileExistsError: ``out`` is there already. FileNotFoundError: images are missing.
        ValueError: another format; sets of other classes, or two images with one name, which YOLO can't tell apart.
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
    """What COCO JSON can hold of a set: images of a known size with names inside one folder, boxes with an area.

    Raises:
        FileNotFoundError: images are missing.
    """
    missing = annotations.missing()
    if missing:
        raise FileNotFoundError(
            f"{annotations.source}: {len(missing)} of {len(annotations)} images are missing from "
            f"{annotations.image_dir}: {some_of(missing)}; take them out of the annotations, or put them there"
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
    """With names relative to a folder that all images are in."""
    names = [PurePath(name) for name in annotations.file_names]
    if not any(name.is_absolute() or ".." in name.parts for name in names):
        return replace(annotations, file_names=[name.as_posix() for name in names])
    files = [os.path.abspath(annotations.path(row)) for row in range(len(annotations))]
    root = Path(os.path.commonpath([os.path.dirname(file) for file in files]))
    return replace(annotations, image_dir=root, file_names=[Path(file).relative_to(root).as_posix() for file in files])


def _place_images(annotations: Annotations, folder: Path, *, copy: bool, flat: bool) -> Annotations:
    """Links or copies of the images; ``flat``: without a folder ``images`` in their names, which YOLO looks for."""
    names = annotations.file_names
    if flat:
        names = ["/".join(part for part in name.split("/") if part != "images") for name in names]
        twice = [name for name, times in Counter(os.path.splitext(name)[0] for name in names).items() if times > 1]
        if twice:
            raise ValueError(
                f"{annotations.source}: YOLO's label files are named as their images, but {len(twice)} names are those "
                f"of two images: {some_of(twice)}; rename them, or write COCO"
            )
    folder.mkdir(parents=True)
    for row, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        _place(annotations.path(row), folder / name, copy=copy)
    return replace(annotations, image_dir=folder, file_names=names)


def _place(file: Path, target: Path, *, copy: bool) -> None:
    if not copy:
        with suppress(OSError, NotImplementedError):  # not every disk has links
            target.symlink_to(os.path.abspath(file))
            return
    shutil.copyfile(file, target)


def write_coco(annotations: Annotations, path: str | os.PathLike[str]) -> None:
    """One set as COCO JSON, as ``as_coco`` leaves it. Raises as ``fastkd.files.replacing``."""
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
    """That of a data.yaml: of val2017, val, unless two sets would have it; of a set that was never split, train."""
    key = name.rstrip("0123456789")
    if key not in KEYS:
        return "train" if len(names) == 1 else name
    return key if name == key or sum(x.rstrip("0123456789") == key for x in names) == 1 else name


def _write_labels(annotations: Annotations, folder: Path) -> None:
    """A file an image, also of one without a box: class, centre, width and height relative to the image."""
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
