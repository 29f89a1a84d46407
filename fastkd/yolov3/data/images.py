"""Reads folders of images without labels; and what all readers share: file names, image sizes, lines of a list."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from fastkd.yolov3.data.annotations import Annotations, from_rows

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")
SPLITS = ("train", "val", "valid", "validation", "test")
ALIASES = {"val": ("val", "valid", "validation")}  # maps a set to the names that its folder or file may have
ALL = "all"  # name of a folder's only set, if it has none
LARGEST_SIDE = 1 << 31


def read_images(folder: str | os.PathLike[str]) -> Annotations:
    """Return all images of a folder and its sub-folders, without boxes or classes.

    Raises:
        FileNotFoundError: there is no such folder. ValueError: there is no image in it.
    """
    root = Path(folder)
    require_there("folder", root)
    images = list(images_in(root))
    sizes = [size_of_image(image) for image in images]
    return from_rows(str(root), root, [str(x.relative_to(root)) for x in images], sizes, [], np.zeros((0, 7)))


def has_images(folder: Path) -> bool:
    """Whether a folder directly contains an image."""
    return folder.is_dir() and any(x.suffix.lower() in IMAGE_SUFFIXES for x in folder.iterdir())


def size_of_image(path: Path) -> tuple[int, int]:
    """Return width and height from the file's header; (0, 0) if the file is missing or not an image."""
    try:
        with Image.open(path) as image:
            return (image.width, image.height)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # what Pillow raises for damaged headers
        return 0, 0


def images_in(folder: Path) -> Iterator[Path]:
    """Yield the images of a folder and its sub-folders, sorted by path with numbers by value.

    Linked folders are followed; each folder is read once.

    Raises:
        ValueError: there is no image.
    """
    found: list[Path] = []
    seen: set[str] = set()
    top = os.path.realpath(folder)
    waiting = [Path(folder)]
    while waiting:  # links come last: a folder that is also linked keeps its own path
        links = []
        for root, folders, names in os.walk(waiting.pop(0), onerror=_raise):
            if (real := os.path.realpath(root)) in seen or (seen and Path(top).is_relative_to(real)):
                folders.clear()
                continue
            seen.add(real)
            found += [Path(root) / name for name in names if name.lower().endswith(IMAGE_SUFFIXES)]
            links += [path for name in folders if (path := Path(root) / name).is_symlink()]
        waiting += sorted(links)
    if not found:
        raise ValueError(f"{folder}: no images in this folder ({', '.join(IMAGE_SUFFIXES)})")
    yield from sorted(
        found, key=lambda path: [x.zfill(12) if x.isdigit() else x for x in re.split(r"(\d+)", str(path))]
    )


def _raise(error: OSError) -> None:
    raise error


def require_there(name: str, path: Path) -> None:
    if not path.exists():
        raise FileNotFoundError(f"{name}: no such file or folder: {path}")
    if not os.access(path, os.R_OK):
        raise PermissionError(f"{name}: no permission to read {path}")


def lines_of(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text, got {error}") from None
