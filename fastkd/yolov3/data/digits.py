"""Digits scenes: a detection data set that is made from real images in scikit-learn, so nothing is downloaded.

Handwritten digits (`sklearn.datasets.load_digits`, 8x8 scans) are enlarged smoothly and drawn onto crops of the two
photographs of `sklearn.datasets.load_sample_images`, among strokes and patches that are not digits.

A set is identical, pixel for pixel, on every machine: random numbers are uniform doubles of PCG64, and pixels are
computed by exact integer sums and single IEEE operations only (no BLAS, no transcendental functions, no sums whose
order depends on SIMD).
"""

import json
import os
import shutil
from collections.abc import Iterable
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
from sklearn.datasets import load_digits, load_sample_images

FORMAT_VERSION = 1  # increased when the pixels or boxes of a given seed change
SPLITS = ("train", "val", "test")
SUBSETS = (100, 300)  # the first scenes of "train" are also written as small labelled sets

CLASS_NAMES = tuple("0123456789")
GLYPH_HEIGHT = (20, 48)  # pixels
MAX_DIGITS = 4
MAX_IOU = 0.02  # between the boxes of one scene
SHARE_OF_DIGITS = {"train": 0.6, "val": 0.2, "test": 0.2}  # of the 1,797 source digits

Array = npt.NDArray[Any]
Box = tuple[int, int, int, int]  # x1, y1, x2, y2


class Scene(NamedTuple):
    """One image and its labels."""

    image: Array  # (size, size, 3) uint8, RGB
    boxes: Array  # (k, 4) int64: x1, y1, x2, y2 in pixels, tight around the ink, x2 and y2 exclusive
    classes: Array  # (k,) int64: the digit


class Sources(NamedTuple):
    """What the scenes of one split are made from.

    Splits share no digits, and "train" uses other halves of the photographs than "val" and "test".
    """

    glyphs: list[Array]  # (h, w) int64, ink 0..16, cropped to the ink
    labels: list[int]
    photographs: list[Array]  # (H, W, 3) uint8, RGB


def write_digits(
    out_dir: str | os.PathLike[str],
    *,
    train: int = 4000,
    val: int = 300,
    test: int = 500,
    size: int = 96,
    seed: int = 0,
) -> Path:
    """Write digits scenes as PNG files and COCO JSON; return `out_dir`.

    The layout is `annotations/{train,val,test}.json`, `images/{train,val,test}/000001.png` and `manifest.json`. If
    `train` is large enough, `annotations/train_100.json` and `train_300.json` list its first scenes. A scene depends on
    (seed, split, its number, size) only, not on the number of scenes.

    The folder is written atomically. A folder that already contains this set is left as it is.

    Args:
        out_dir: the folder.
        train, val, test: number of scenes of each split.
        size: side of a scene in pixels.
        seed: seed of the random numbers.

    Raises:
        ValueError: a count is negative, or `size` is outside 80..320: a digit must fit into a scene, and a scene into
            half a photograph.
        FileExistsError: `out_dir` contains something else.
    """
    out = Path(out_dir)
    counts = dict(zip(SPLITS, (train, val, test), strict=True))
    for name, count in counts.items():
        if count < 0:
            raise ValueError(f"{name}: expected a number of scenes >= 0, got {count}")
    if not 80 <= size <= 320:
        raise ValueError(f"size: expected 80 to 320 pixels, got {size}")
    manifest = {"format": "fastkd digits", "version": FORMAT_VERSION, "seed": seed, "size": size, "scenes": counts}
    if _holds(out, manifest):
        return out

    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        _write_set(partial, counts, size, seed)
        _write_json(partial / "manifest.json", manifest)
        try:
            partial.rename(out)
        except OSError:  # another process was faster, which is fine if it wrote the same set
            if not _holds(out, manifest):
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def make_scene(sources: Sources, *, size: int, rng: np.random.Generator) -> Scene:
    """Compose one scene from a crop of a photograph, clutter, and 1 to 4 digits that hardly overlap."""
    canvas = _photograph_crop(sources.photographs, size, rng)
    for _ in range(_integer(rng, 0, 2)):
        _add_patch(canvas, sources.photographs, rng)
    for _ in range(_integer(rng, 0, 2)):
        _add_stroke(canvas, rng)

    boxes: list[Box] = []
    classes: list[int] = []
    for _ in range(_integer(rng, 1, MAX_DIGITS)):
        source = _integer(rng, 0, len(sources.glyphs) - 1)
        alpha = _enlarge(sources.glyphs[source], rng)
        found = _free_place(alpha, boxes, size, rng)
        if found is None:
            continue
        place, box = found
        _ink(canvas, alpha, place, _between(rng, 0.85, 1.0), rng)
        boxes.append(box)
        classes.append(sources.labels[source])
    noise = (rng.random(canvas.shape) - 0.5) * _between(rng, 0.0, 16.0)
    image = np.clip(np.rint(canvas + noise), 0, 255).astype(np.uint8)
    return Scene(image, np.array(boxes, dtype=np.int64).reshape(-1, 4), np.array(classes, dtype=np.int64))


def scene_rng(seed: int, split: str, index: int) -> np.random.Generator:
    """Return the random generator of scene `index` (from 0) of a split."""
    return np.random.Generator(np.random.PCG64([seed, SPLITS.index(split), index]))


@lru_cache
def load_sources(split: str) -> Sources:
    """Load the digits and photograph halves that the scenes of `split` ("train", "val" or "test") may use."""
    digits = load_digits()
    # The shuffle is the same for every seed, so that sets of different seeds can be mixed without a leak to the test.
    order = np.argsort(np.random.Generator(np.random.PCG64(0)).random(len(digits.target)), kind="stable")
    ends = np.rint(np.cumsum([0.0, *SHARE_OF_DIGITS.values()]) * len(order)).astype(int)
    position = SPLITS.index(split)
    chosen = order[ends[position] : ends[position + 1]]

    photographs = []
    for photograph in load_sample_images().images:
        middle = photograph.shape[1] // 2
        photographs.append(np.asarray(photograph[:, :middle] if split == "train" else photograph[:, middle:]))
    glyphs = [_crop_to_ink(digits.images[i].astype(np.int64)) for i in chosen]
    return Sources(glyphs, [int(digits.target[i]) for i in chosen], photographs)


# ---- pixels: each function changes a float64 canvas (H, W, 3) or returns an opacity mask (h, w) in 0..1


def _photograph_crop(photographs: list[Array], size: int, rng: np.random.Generator) -> Array:
    photograph = photographs[_integer(rng, 0, len(photographs) - 1)]
    y = _integer(rng, 0, photograph.shape[0] - size)
    x = _integer(rng, 0, photograph.shape[1] - size)
    crop: Array = photograph[y : y + size, x : x + size]
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    scaled: Array = crop * _between(rng, 0.6, 1.2)
    return scaled


def _add_patch(canvas: Array, photographs: list[Array], rng: np.random.Generator) -> None:
    """Blend in a rectangle: a single colour, or another part of a photograph."""
    size = canvas.shape[0]
    height, width = _integer(rng, 8, size // 2), _integer(rng, 8, size // 2)
    y, x = _integer(rng, 0, size - height), _integer(rng, 0, size - width)
    opacity = _between(rng, 0.3, 0.9)
    fill = _photograph_crop(photographs, size, rng)[:height, :width] if rng.random() < 0.5 else rng.random(3) * 255
    area = canvas[y : y + height, x : x + width]
    area += (fill - area) * opacity


def _add_stroke(canvas: Array, rng: np.random.Generator) -> None:
    """Draw a quadratic Bézier curve with about the length, width and colour of a digit's strokes."""
    size = _integer(rng, 12, GLYPH_HEIGHT[1])
    control = rng.random((3, 2)) * size
    t = (np.arange(33) / 32)[:, None]
    curve = control[0] * (1 - t) * (1 - t) + control[1] * 2 * t * (1 - t) + control[2] * t * t
    radius = size * _between(rng, 0.04, 0.1)
    pixel = np.arange(size) + 0.5
    dx, dy = pixel[None, :, None] - curve[:, 0], pixel[:, None, None] - curve[:, 1]
    nearest = np.sqrt((dx * dx + dy * dy).min(axis=2))
    alpha = np.clip(radius + 0.5 - nearest, 0.0, 1.0)
    place = _integer(rng, 0, canvas.shape[0] - size), _integer(rng, 0, canvas.shape[1] - size)
    _ink(canvas, alpha, place, _between(rng, 0.5, 1.0), rng)


def _ink(canvas: Array, alpha: Array, place: tuple[int, int], opacity: float, rng: np.random.Generator) -> None:
    """Blend a random colour, clearly lighter or darker than the canvas below, through the mask `alpha` at (y, x)."""
    (y, x), (height, width) = place, alpha.shape
    area = canvas[y : y + height, x : x + width]
    below = int(area.astype(np.int64).sum()) / area.size  # an integer sum, so that its order cannot matter
    colour = rng.random(3) * 255
    brightness = (colour[0] + colour[1] + colour[2]) / 3
    contrast = _between(rng, 90, 150)
    lighter = below + contrast <= 250 and (rng.random() < 0.5 or below < contrast)
    wanted = below + contrast if lighter else below - contrast
    colour = np.clip(colour * 0.4 + (wanted - brightness * 0.4), 0, 255)
    area += (colour - area) * (alpha * opacity)[:, :, None]


def _enlarge(glyph: Array, rng: np.random.Generator) -> Array:
    """Enlarge 8x8 ink to an opacity mask of a height in GLYPH_HEIGHT, with a slightly random width and slant."""
    height = _integer(rng, *GLYPH_HEIGHT)
    width = max(6, int(height * glyph.shape[1] / glyph.shape[0] * _between(rng, 0.9, 1.1)))
    rows, columns = _cubic_weights(glyph.shape[0], height), _cubic_weights(glyph.shape[1], width)
    ink = (rows @ glyph @ columns.T) / (16 * 1024 * 1024)  # integer products: exact, so identical everywhere
    alpha: Array = np.clip((_slant(ink, _between(rng, -0.1, 0.1)) - 0.35) / 0.3, 0.0, 1.0)
    return alpha


def _slant(ink: Array, slope: float) -> Array:
    """Shear (h, w) horizontally, by linear interpolation in each row; the result is wider by the largest shift."""
    height, width = ink.shape
    shifts = slope * np.arange(height) + max(0.0, -slope * (height - 1))
    whole = shifts.astype(np.int64)
    part = (shifts - whole)[:, None]
    margin = int(whole.max()) + 1
    padded = np.pad(ink, ((0, 0), (margin, margin)))
    columns = np.arange(margin, margin + width + margin) - whole[:, None]
    here, left = (np.take_along_axis(padded, columns - step, axis=1) for step in (0, 1))
    slanted: Array = here * (1 - part) + left * part
    return slanted


@cache
def _cubic_weights(n_in: int, n_out: int) -> Array:
    """Return Catmull-Rom resampling as an integer matrix (n_out, n_in), whose rows sum to about 1024 inside."""
    at = (np.arange(n_out) + 0.5) * n_in / n_out - 0.5
    d = np.abs(at[:, None] - np.arange(n_in))
    near = (1.5 * d - 2.5) * d * d + 1
    far = ((-0.5 * d + 2.5) * d - 4) * d + 2
    weights = np.where(d < 1, near, np.where(d < 2, far, 0.0))
    rounded: Array = np.rint(weights * 1024).astype(np.int64)
    return rounded


def _free_place(
    alpha: Array, boxes: list[Box], size: int, rng: np.random.Generator
) -> tuple[tuple[int, int], Box] | None:
    """Return a place (y, x) and the box of a glyph that hardly overlaps `boxes`; None after 20 attempts."""
    height, width = alpha.shape
    x1, y1, x2, y2 = _tight_box(alpha)
    for _ in range(20):
        y, x = _integer(rng, 0, size - height), _integer(rng, 0, size - width)
        box = (x + x1, y + y1, x + x2, y + y2)
        if all(_iou(box, other) <= MAX_IOU for other in boxes):
            return (y, x), box
    return None


def _tight_box(alpha: Array) -> Box:
    """Return the box of the pixels that are at least half covered with ink."""
    rows, columns = np.flatnonzero((alpha >= 0.5).any(axis=1)), np.flatnonzero((alpha >= 0.5).any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _iou(a: Box, b: Box) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    overlap = max(width, 0) * max(height, 0)
    return overlap / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap)


def _crop_to_ink(glyph: Array) -> Array:
    rows, columns = np.flatnonzero(glyph.any(axis=1)), np.flatnonzero(glyph.any(axis=0))
    return glyph[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _between(rng: np.random.Generator, low: float, high: float) -> float:
    return low + (high - low) * rng.random()


def _integer(rng: np.random.Generator, low: int, high: int) -> int:
    """Draw an integer from low..high, both included; only NumPy's doubles are the same in all of its versions."""
    return low + int(rng.random() * (high - low + 1))


# ---- files


def _holds(out: Path, manifest: dict[str, Any]) -> bool:
    """Whether `out` contains this set; False if it is empty or missing; raise FileExistsError if it is neither."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        found = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = "no manifest of digits scenes"
    if found == manifest:
        return True
    raise FileExistsError(f"out_dir: expected a new folder or {manifest} in {out}, got {found}; give another folder")


def _write_set(root: Path, counts: dict[str, int], size: int, seed: int) -> None:
    (root / "annotations").mkdir()
    first_id = 1
    for split, count in counts.items():
        folder = root / "images" / split
        folder.mkdir(parents=True)
        sources, scenes = load_sources(split), []
        for index in range(count):
            scene = make_scene(sources, size=size, rng=scene_rng(seed, split, index))
            _write_png(folder / f"{index + 1:06d}.png", scene.image)
            scenes.append((scene.boxes, scene.classes))
        _write_json(root / "annotations" / f"{split}.json", _coco(scenes, size, first_id))
        for part in SUBSETS if split == "train" else ():
            if part < count:
                _write_json(root / "annotations" / f"{split}_{part}.json", _coco(scenes[:part], size, first_id))
        first_id += count


def _coco(scenes: Iterable[tuple[Array, Array]], size: int, first_id: int) -> dict[str, Any]:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, (boxes, classes) in enumerate(scenes, start=1):
        image_id = first_id + number - 1
        images.append({"id": image_id, "file_name": f"{number:06d}.png", "width": size, "height": size})
        for (x1, y1, x2, y2), digit in zip(boxes.tolist(), classes.tolist(), strict=True):
            annotation = {"id": len(annotations) + 1, "image_id": image_id, "category_id": digit + 1, "iscrowd": 0}
            annotations.append(annotation | {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)})
    categories = [{"id": i, "name": name} for i, name in enumerate(CLASS_NAMES, start=1)]
    info = {"description": "digits scenes, made from images that scikit-learn ships"}
    return {"info": info, "images": images, "annotations": annotations, "categories": categories}


def _write_png(path: Path, image: Array) -> None:
    if not cv2.imwrite(str(path), cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_PNG_COMPRESSION, 1]):
        raise OSError(f"could not write {path}")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")
