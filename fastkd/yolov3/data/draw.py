"""Draws boxes on images, and writes images to files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import cv2
import numpy as np
import numpy.typing as npt

from fastkd.files import replacing
from fastkd.yolov3.boxes import Detections

Image = npt.NDArray[np.uint8]

# Okabe & Ito (2008): colours that colour-blind people tell apart; RGB
COLOURS = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167))


def draw(image: Image, found: Detections, class_names: Sequence[str] = (), *, scores: bool = True) -> Image:
    """Return a copy of an (H, W, 3) uint8 RGB image with boxes, names and optionally scores, the best box on top."""
    canvas: Image = image.copy()
    scale = max(0.35, min(image.shape[:2]) / 900)
    width = max(1, round(2 * scale))
    columns = found.boxes.round().int().tolist(), found.scores.tolist(), found.classes.tolist()
    for (x1, y1, x2, y2), score, index in reversed(list(zip(*columns, strict=True))):
        colour = COLOURS[index % len(COLOURS)]
        name = class_names[index] if class_names else str(index)
        cv2.rectangle(canvas, (x1, y1), (x2, y2), colour, width)
        _label(canvas, f"{name} {score:.2f}" if scores else name, (x1, y1), colour, scale)
    return canvas


def _label(canvas: Image, text: str, corner: tuple[int, int], colour: tuple[int, int, int], scale: float) -> None:
    """Draw text on a filled bar above the corner, or below it if there is no room above."""
    font = cv2.FONT_HERSHEY_SIMPLEX
    (width, height), descent = cv2.getTextSize(text, font, scale, 1)
    x = max(0, min(corner[0], canvas.shape[1] - width))
    y = corner[1] if corner[1] >= height + descent else corner[1] + height + descent
    cv2.rectangle(canvas, (x, y - height - descent), (x + width, y), colour, cv2.FILLED)
    ink = (0, 0, 0) if sum(colour) > 330 else (255, 255, 255)
    cv2.putText(canvas, text, (x, y - descent // 2), font, scale, ink, 1, cv2.LINE_AA)


def write_image(target: Path, image: Image) -> None:
    """Write an (H, W, 3) uint8 RGB image to a file, atomically; the suffix chooses the format.

    Raises:
        ValueError: the image could not be encoded.
    """
    done, encoded = cv2.imencode(target.suffix, cast(Image, cv2.cvtColor(image, cv2.COLOR_RGB2BGR)))
    if not done:
        raise ValueError(f"{target}: this image could not be encoded as {target.suffix}")
    with replacing(target) as part:
        part.write_bytes(encoded.tobytes())
