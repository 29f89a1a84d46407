"""Augmentation: random changes to an image and its boxes in training.

All random numbers come from the `numpy.random.Generator` that the caller passes, so the same generator state gives the
same image. Images are (H, W, 3) uint8 RGB; boxes (k, 4) float32 x1, y1, x2, y2 in pixels; classes (k,) int64.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Labelled = tuple[Array, Array, Array]  # image, boxes, classes

FILL = 114  # grey of the pixels that no image covers


@dataclass(frozen=True)
class Augmentation:
    """The options of `augment`.

    Args:
        flip: probability of mirroring left to right; leave it at 0 if mirroring changes the class, as with digits.
        zoom: range of the zoom factor, for example (0.7, 1.4): below 1 the image shrinks and gets a grey border, above
            1 it is cropped.
        translate: largest shift, as a fraction of the image's sides.
        hue: largest change of the hue, as a fraction of the colour circle.
        saturation, value: largest relative change of saturation and brightness.
        mosaic: probability of joining the image with three others (YOLOv4, arXiv:2004.10934, section 3.3).
        min_visible: a box is dropped if less than this fraction of its area stays in the image.

    Raises:
        ValueError: a value is not in 0..1, or the zoom is not a range of positive numbers.
    """

    flip: float = 0.0
    zoom: tuple[float, float] = (0.75, 1.33)
    translate: float = 0.1
    hue: float = 0.02
    saturation: float = 0.5
    value: float = 0.4
    mosaic: float = 0.0
    min_visible: float = 0.3

    def __post_init__(self) -> None:
        for name in ("flip", "translate", "hue", "saturation", "value", "mosaic", "min_visible"):
            amount = getattr(self, name)
            if not 0 <= amount <= 1:
                raise ValueError(f"{name}: expected a number in 0..1, got {amount}")
        if not 0 < self.zoom[0] <= self.zoom[1]:
            raise ValueError(f"zoom: expected (low, high) with 0 < low <= high, got {self.zoom}")


def augment(
    image: Array, boxes: Array, classes: Array, rng: np.random.Generator, options: Augmentation = Augmentation()
) -> Labelled:
    """Crop or pad (zoom, shift), mirror and recolour an image.

    The zoom only selects the window that is cut out of the image, so the size of the image changes and no pixel is
    resampled: letterboxing to the network's size does that afterwards, once.

    Returns:
        The new image, and the boxes and classes that are still visible, boxes clipped to the image.
    """
    height, width = image.shape[:2]
    zoom = _log_uniform(rng, *options.zoom)
    window_width, window_height = max(1, round(width / zoom)), max(1, round(height / zoom))
    shift_x, shift_y = rng.uniform(-options.translate, options.translate, size=2)
    x = round((width - window_width) / 2 + shift_x * width)
    y = round((height - window_height) / 2 + shift_y * height)
    image, boxes, classes = crop(
        image, boxes, classes, (x, y, window_width, window_height), min_visible=options.min_visible
    )
    if rng.random() < options.flip:
        image, boxes = flip(image, boxes)
    return recolour(image, rng, options), boxes, classes


def crop(
    image: Array, boxes: Array, classes: Array, window: tuple[int, int, int, int], *, min_visible: float = 0.0
) -> Labelled:
    """Cut a window (x, y, width, height) out of an image; the parts of it outside the image are grey."""
    x, y, width, height = window
    left, top = max(x, 0), max(y, 0)
    right, bottom = min(x + width, image.shape[1]), min(y + height, image.shape[0])
    out = np.full((height, width, 3), FILL, dtype=np.uint8)
    if left < right and top < bottom:
        out[top - y : bottom - y, left - x : right - x] = image[top:bottom, left:right]

    # Only the part of a box that is in both the window and the image counts as visible.
    clipped = boxes.copy()
    clipped[:, 0::2] = clipped[:, 0::2].clip(left, max(left, right)) - x
    clipped[:, 1::2] = clipped[:, 1::2].clip(top, max(top, bottom)) - y
    area = _areas(clipped)
    keep = (area > 0) & (area >= min_visible * _areas(boxes))
    return out, clipped[keep], classes[keep]


def flip(image: Array, boxes: Array) -> tuple[Array, Array]:
    """Mirror an image and its boxes left to right."""
    mirrored = boxes.copy()
    mirrored[:, 0::2] = image.shape[1] - boxes[:, 2::-2]
    return np.ascontiguousarray(image[:, ::-1]), mirrored


def recolour(image: Array, rng: np.random.Generator, options: Augmentation) -> Array:
    """Shift the hue, and scale saturation and brightness, by random amounts within the options."""
    hue, saturation, value = rng.uniform(-1, 1, size=3) * (options.hue, options.saturation, options.value)
    if not (hue or saturation or value):
        return image
    levels = np.arange(256)
    tables = (  # a uint8 hue has 180 steps in OpenCV
        (levels + hue * 180) % 180,
        (levels * (1 + saturation)).clip(0, 255),
        (levels * (1 + value)).clip(0, 255),
    )
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    table = np.stack(tables, axis=1).astype(np.uint8)[None]
    recoloured: Array = cv2.cvtColor(cv2.LUT(hsv, table.reshape(1, 256, 3)), cv2.COLOR_HSV2RGB)
    return recoloured


def mosaic(tiles: Sequence[Labelled], rng: np.random.Generator, *, min_visible: float = 0.0) -> Labelled:
    """Join four square images of one size into one image of that size, around a random centre.

    Each quadrant shows a random part of its image, not scaled. Boxes are clipped and dropped as in `crop`.

    Raises:
        ValueError: there are not four images, or they are not square and of one size.
    """
    if len(tiles) != 4:
        raise ValueError(f"tiles: expected 4 labelled images, got {len(tiles)}")
    sizes = {tile[0].shape[:2] for tile in tiles}
    size = tiles[0][0].shape[0]
    if sizes != {(size, size)}:
        raise ValueError(f"tiles: expected square images of one size, got (height, width) {sorted(sizes)}")
    centre_x, centre_y = (round(share * size) for share in rng.uniform(0.3, 0.7, size=2))
    out = np.empty((size, size, 3), dtype=np.uint8)
    all_boxes, all_classes = [], []
    corners = ((0, 0), (centre_x, 0), (0, centre_y), (centre_x, centre_y))
    for (image, boxes, classes), (x, y) in zip(tiles, corners, strict=True):
        width = size - centre_x if x else centre_x
        height = size - centre_y if y else centre_y
        left, top = round(rng.random() * (size - width)), round(rng.random() * (size - height))
        part, kept_boxes, kept_classes = crop(
            image, boxes, classes, (left, top, width, height), min_visible=min_visible
        )
        out[y : y + height, x : x + width] = part
        all_boxes.append(kept_boxes + np.array([x, y, x, y], dtype=boxes.dtype))
        all_classes.append(kept_classes)
    return out, np.concatenate(all_boxes), np.concatenate(all_classes)


def _areas(boxes: Array) -> Array:
    areas: Array = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return areas


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """Draw a zoom factor so that zooming in and out by the same factor are equally likely."""
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))
