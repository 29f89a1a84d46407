"""Data of the studies: digits scenes or another set, and the parts of them that a student gets with labels."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import numpy as np

from fastkd.files import replacing
from fastkd.yolov3.data.digits import write_digits
from fastkd.yolov3.data.formats import find_set, read_set


def write_scenes(root: Path, *, train: int, val: int, test: int, size: int) -> None:
    """Write the digits scenes, unless they exist."""
    write_digits(root / "digits", train=train, val=val, test=test, size=size)


def scene_files(root: Path, split: str) -> tuple[Path, Path]:
    """Return annotations and images of the digits scenes of ``"val"`` or ``"test"``."""
    return root / f"digits/annotations/{split}.json", root / f"digits/images/{split}"


def set_files(folder: Path, split: str) -> tuple[Path, Path]:
    """Return annotations and images of a split of a set that ``write_set`` has written."""
    return folder / f"annotations/{split}.json", folder / "images"


def write_set(source: str | os.PathLike[str], folder: Path) -> None:
    """Write a set of any format as COCO JSON, with links to its images; existing files are kept.

    Raises:
        ValueError, FileNotFoundError: the set has no train, val or test.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "annotations").mkdir(exist_ok=True)
    for split in ("train", "val", "test"):
        file, _ = set_files(folder, split)
        if file.is_file():
            continue
        found = read_set(*find_set(source, split))
        names = [f"{split}-{Path(name).name}" for name in found.file_names]
        for row, name in enumerate(names):
            link = folder / "images" / name
            if not link.is_symlink():
                link.symlink_to(found.path(row).resolve())
        with replacing(file) as part:
            part.write_text(json.dumps(dataclasses.replace(found, file_names=names).coco()), encoding="utf-8")


def part_of_set(root: Path, name: str, share: float, seed: int) -> dict[str, str]:
    """Return a random share of a set's training images with labels, and the other images without.

    Returns:
        The paths for ``TrainConfig``, relative to ``root``: ``annotations``, ``images`` and, unless the share is 1,
        ``unlabelled``.
    """
    images = f"{name}/images"
    if share == 1:
        return {"annotations": f"{name}/annotations/train.json", "images": images}
    part, others = f"{name}/annotations/train-{share:g}-{seed}.json", f"{name}/unlabelled-{share:g}-{seed}"
    content = json.loads((root / name / "annotations/train.json").read_text(encoding="utf-8"))
    order = np.random.default_rng(seed).permutation(len(content["images"]))
    chosen = set(order[: round(share * len(order))].tolist())
    kept = [image for i, image in enumerate(content["images"]) if i in chosen]
    ids = {image["id"] for image in kept}
    boxes = [x for x in content["annotations"] if x["image_id"] in ids]
    with replacing(root / part) as file:
        file.write_text(json.dumps(content | {"images": kept, "annotations": boxes}), encoding="utf-8")
    (root / others).mkdir(exist_ok=True)
    for image in content["images"]:
        link = root / others / image["file_name"]
        if image["id"] not in ids and not link.is_symlink():
            link.symlink_to((root / images / image["file_name"]).resolve())
    return {"annotations": part, "images": images, "unlabelled": others}


def labelled(root: Path, first: int, count: int) -> dict[str, str]:
    """Return the paths for ``TrainConfig``, relative to ``root``, of scenes ``first`` to ``first + count - 1``."""
    name = f"annotations/{first}-{first + count - 1}.json"
    if not (root / name).is_file():
        content = json.loads((root / "digits/annotations/train.json").read_text(encoding="utf-8"))
        images = content["images"][first : first + count]
        if len(images) != count:
            raise ValueError(
                f"count: expected scenes of the {len(content['images'])}, got {first} to {first + count - 1}"
            )
        ids = {image["id"] for image in images}
        boxes = [x for x in content["annotations"] if x["image_id"] in ids]
        with replacing(root / name) as part:
            part.write_text(json.dumps(content | {"images": images, "annotations": boxes}), encoding="utf-8")
    return {"annotations": name, "images": "digits/images/train"}


def unlabelled(root: Path, first: int, count: int) -> str:
    """Return a folder, relative to ``root``, with the images of these training scenes."""
    folder = root / f"unlabelled/{first}-{first + count - 1}"
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(first + 1, first + count + 1):
        image = f"{number:06d}.png"
        if not (folder / image).exists():
            os.link(root / "digits/images/train" / image, folder / image)
    return str(folder.relative_to(root))
