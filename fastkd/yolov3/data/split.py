"""Splits of a set: random parts with a share of every class; and the validation split that a training run makes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastkd.files import replacing
from fastkd.yolov3.data.annotations import Annotations, Array
from fastkd.yolov3.data.convert import as_coco, write_coco
from fastkd.yolov3.data.formats import Pair, find_set, read_set, require_sets

SHARE = 0.1  # share of the images that a run holds back for validation
RECORD = "split.json"


def split(annotations: Annotations, shares: Mapping[str, float], *, seed: int = 0) -> dict[str, Annotations]:
    """Divide a set at random, so that each part has its share of every class.

    Images are grouped by the rarest class among their boxes, with a further group for images without boxes. Every part
    gets its share of each group, rounded up or down. The only image of a class stays in ``train`` if enough other
    images have boxes. Images that show the same scene, such as the frames of a video, should be in one part: split
    such sets by hand.

    Args:
        annotations: the set, of P images.
        shares: maps the name of each part to its share of the images, more than 0 and together less than 1; a part has
            ``int(share * P)`` images, but at least one.
        seed: seed of the random parts.

    Returns:
        The parts by name, and the remaining images as ``train``; images are in their original order.

    Raises:
        ValueError: the shares are out of range, the seed is negative, or there are too few images.
    """
    if seed < 0:
        raise ValueError(f"seed: expected 0 or more, got {seed}")
    if not shares or not all(0 < share < 1 for share in shares.values()) or sum(shares.values()) >= 1:
        raise ValueError(f"shares: expected numbers above 0 that are less than 1 together, got {dict(shares)}")
    free = np.ones(len(annotations), dtype=bool)
    order = _by_class(annotations, seed)
    boxed, alone = np.isin(np.arange(len(annotations)), annotations.rows), _show_a_class_alone(annotations)
    chosen = {}
    for name, share in shares.items():
        count = max(1, int(share * len(annotations) + 1e-9))
        left = order[free[order]]
        if count >= len(left):
            raise ValueError(f"{annotations.source}: expected enough images for every part, got {len(annotations)}")
        others = left[~alone[left]]
        # images with boxes come first in the order: enough of them, and the part has at least one
        if len(others) >= count and np.count_nonzero(boxed[others]) > len(others) // (2 * count):
            left = others
        places = ((np.arange(count) + 0.5) * len(left) / count).astype(np.int64)
        chosen[name] = np.isin(np.arange(len(annotations)), left[places])
        free &= ~chosen[name]
    return {name: annotations.only(kept) for name, kept in {"train": free, **chosen}.items()}


def _by_class(annotations: Annotations, seed: int) -> Array:
    """Return (P,) indices of the images: those of the rarest class first, each class in random order."""
    boxes, images = _images_of_classes(annotations)
    rank = np.argsort(np.argsort(images, kind="stable"))
    group = np.full(len(annotations), len(rank))
    np.minimum.at(group, boxes[:, 0], rank[boxes[:, 1]])
    order: Array = np.lexsort([np.random.default_rng(seed).random(len(annotations)), group])
    return order


def _show_a_class_alone(annotations: Annotations) -> Array:
    """Return (P,) bool: whether an image has a class that no other image has."""
    boxes, images = _images_of_classes(annotations)
    alone = np.zeros(len(annotations), dtype=bool)
    alone[boxes[images[boxes[:, 1]] == 1, 0]] = True
    return alone


def _images_of_classes(annotations: Annotations) -> tuple[Array, Array]:
    """Return (K, 2) pairs of image and class, each pair once, and the number of images of each class."""
    boxes = np.unique(np.column_stack([annotations.rows, annotations.classes]), axis=0)
    return boxes, np.bincount(boxes[:, 1], minlength=len(annotations.class_names))


def set_to_split(folder: str | os.PathLike[str], name: str = "train") -> str:
    """Return ``name`` or, if there is no such set, the name of a folder's only set, unless it is for evaluation.

    Raises:
        FileNotFoundError: there is neither.
    """
    names = require_sets(folder)
    if name not in names and len(names) == 1 and not names[0].startswith(("val", "test")):
        return names[0]
    find_set(folder, name)
    return name


def split_folder(
    folder: str | os.PathLike[str], shares: Mapping[str, float], *, name: str | None = None, seed: int = 0
) -> dict[str, Annotations]:
    """Divide a set of a folder as ``split`` does, and return the parts together with the folder's other sets.

    Args:
        folder: as for ``find_set``.
        shares, seed: as for ``split``.
        name: name of the set to divide, and then the other sets are left out; None: ``train``, or the only set.

    Raises:
        FileExistsError: the folder already has a set with the name of a part.
        FileNotFoundError, ValueError: there is no such set, or its annotations can't be read.
        Also what ``split`` raises.
    """
    whole = set_to_split(folder) if name is None else name
    others = [x for x in require_sets(folder) if x != whole] if name is None else []
    there = [x for x in others if x in shares]
    if there:
        raise FileExistsError(
            f"{folder} already has a set {there[0]}: --{there[0]} 0 keeps it, --set {whole} leaves it out"
        )
    parts = split(read_set(*find_set(folder, whole)), shares, seed=seed)
    return parts | {x: read_set(*find_set(folder, x)) for x in others}


# ---- the split of a run


class RunSets(NamedTuple):
    """Training and validation set of a run, as ``TrainConfig`` takes them, and a note for the user."""

    train: Pair
    val: Pair | None
    note: str = ""


def sets_of_run(
    folder: str | os.PathLike[str], out: str | os.PathLike[str], *, train: str = "train", val: str | None = "val"
) -> RunSets:
    """Return the sets of a run; if the folder has no ``val``, a part of the training set is held back for it.

    That part is the same in every run on the same data: a tenth of the images, drawn by class (``split``, seed 0). It
    is written to the folder ``split`` of the run, in COCO's layout, so that a resumed run uses the same part, and other
    runs can use it as their data (``--data RUN/split``). The folder of the data is not written to.

    Args:
        folder: as for ``find_set``.
        out: folder of the run.
        train: name of the training set; if a folder has only one set, ``train`` stands for it.
        val: name of the validation set; None: no validation.

    Raises:
        FileNotFoundError: there is no such set, and nothing is held back: that is done for ``val`` only, and only if no
            set has a name that starts with ``val``.
        ValueError: ``out`` has a split of other data.
    """
    whole = set_to_split(folder, train) if train == "train" else train
    if val is None:
        return RunSets(find_set(folder, whole), None)
    record = Path(out) / "split" / RECORD
    source = _source_of(folder, whole)
    if val != "val" or any(name.startswith("val") for name in require_sets(folder)):
        return RunSets(find_set(folder, whole), find_set(folder, val))
    if not record.is_file():
        if (Path(out) / "config.json").is_file():  # a run that was started without a split
            find_set(folder, val)
        _write_split(read_set(*find_set(folder, whole)), record, source)
    made = _read_record(record)
    if {key: made[key] for key in source} != source:
        raise ValueError(
            f"out: {record.parent} is the split of {made['data']}, set {made['set']}, not of {source['data']}, set "
            f"{source['set']}; give another --out"
        )
    note = (
        f"{val}: not in {folder}, so {made['val']} of the {made['images']} images of {whole} are held back, drawn by "
        f"class and listed in {record.parent / 'annotations' / 'val.json'}; --val none trains on all"
    )
    return RunSets(_pair(record, "train"), _pair(record, "val"), note)


def split_of_run(run: str | os.PathLike[str], folder: str | os.PathLike[str], name: str) -> Pair | None:
    """Return the training or validation set of a folder as the run in ``run`` split it; None if it did not."""
    record = Path(run) / "split" / RECORD
    if name not in ("train", "val") or not record.is_file():
        return None
    return _pair(record, name) if _read_record(record)["data"] == os.path.realpath(folder) else None


def _source_of(folder: str | os.PathLike[str], whole: str) -> dict[str, str]:
    return {"data": os.path.realpath(folder), "set": whole}


def _write_split(annotations: Annotations, record: Path, source: dict[str, str]) -> None:
    """Write both parts, and the record last, so that a record is always of a complete split.

    All processes of a run write the same files.
    """
    found = as_coco(annotations)
    found = replace(found, image_dir=Path(os.path.abspath(found.image_dir)))
    parts = split(found, {"val": SHARE})
    for name, part in parts.items():
        write_coco(part, record.parent / "annotations" / f"{name}.json")
        link = record.parent / "images" / name
        link.parent.mkdir(exist_ok=True)
        with suppress(OSError, NotImplementedError):  # another process made it, or there are no links here
            link.symlink_to(found.image_dir, target_is_directory=True)
    made = {**source, "image_dir": str(found.image_dir), "images": len(found), "val": len(parts["val"]), "seed": 0}
    with replacing(record) as file:
        file.write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")


def _read_record(record: Path) -> dict[str, Any]:
    try:
        made: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
        [made[key] for key in ("data", "set", "image_dir", "images", "val")]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{record}: expected the split that fastkd train writes there, got {error!r}") from None
    return made


def _pair(record: Path, name: str) -> Pair:
    return record.parent / "annotations" / f"{name}.json", Path(_read_record(record)["image_dir"])
