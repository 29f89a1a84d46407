"""Boxes drawn on images."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import cv2
import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from fastkd.files import replacing, require_new
from fastkd.modes import eval_mode
from fastkd.yolov3.annotations import some_of
from fastkd.yolov3.boxes import Detections, detect
from fastkd.yolov3.data import fit, read_image
from fastkd.yolov3.formats import IMAGE_SUFFIXES
from fastkd.yolov3.model import Detector

Image = npt.NDArray[np.uint8]

# Okabe & Ito (2008): colours that colour-blind people tell apart; RGB
COLOURS = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167))


def predict(
    model: Detector,
    paths: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    size: int,
    class_names: Sequence[str] = (),
    score_threshold: float = 0.3,
    iou_threshold: float = 0.5,
    progress: bool = False,
) -> list[Path]:
    """Find objects in images, and write copies with boxes, class names and scores drawn on them.

    Args:
        model: the detector, on any device.
        paths: image files, or folders of them.
        out: folder for the copies, which keep their names (PNG for what OpenCV cannot write).
        size: side in pixels of the square network input, a multiple of 32.
        class_names: one per class; numbers are drawn without.
        score_threshold: least score of a drawn box, in [0, 1).
        iou_threshold: of the non-maximum suppression.
        progress: whether to show a bar, where the output is a terminal.

    Returns:
        The files written, in order. An image that can't be read has none; one warning names them.

    Raises:
        FileNotFoundError: no such image or folder, or a folder without images.
        FileExistsError: ``out`` has a file of one of these names.
        ValueError: no file is an image that can be read, two have one name, or a threshold is out of range.
    """
    files = listed(paths)
    targets = [_named(Path(out) / file.name) for file in files]
    if len(set(targets)) != len(targets):
        raise ValueError("paths: expected different file names, got two alike; predict one folder at a time")
    for target in targets:
        require_new(out=target)
    bar = tqdm(files, unit="image", leave=False, disable=None if progress else True)
    written: list[Path] = []
    faults: dict[Path, Exception] = {}
    for file, target in zip(bar, targets, strict=True):
        try:
            image = read_image(file)
        except (ValueError, OSError) as error:
            faults[file] = error
            continue
        found = detect_objects(model, image, size, score_threshold, iou_threshold)
        write_image(target, draw(image, found, class_names))
        written.append(target)
    warn_left_out(faults, len(files))
    return written


def warn_left_out(faults: dict[Path, Exception], tried: int) -> None:
    """One warning that names the images that can't be read; if those are all that were tried, the first one's error."""
    if len(faults) == tried:
        raise next(iter(faults.values()))
    if faults:
        names = some_of([str(file) for file in faults])
        warnings.warn(f"{len(faults)} of {tried} images can't be read and are left out: {names}", stacklevel=3)


def detect_objects(
    model: Detector, image: Image, size: int, score_threshold: float = 0.3, iou_threshold: float = 0.5
) -> Detections:
    """Objects in one image, (H, W, 3) uint8 RGB of any size; boxes in its own pixels, clipped to it."""
    square, letterbox = fit(image, size)
    pixels = torch.from_numpy(np.ascontiguousarray(square.transpose(2, 0, 1)))[None]
    device = next(model.parameters()).device
    with eval_mode(model), torch.inference_mode():
        outputs = model(pixels.to(device).float() / 255)
    found = detect(outputs, model, score_threshold, iou_threshold)[0]
    boxes = letterbox.to_original(found.boxes.cpu().numpy())
    return Detections(torch.from_numpy(boxes), found.scores, found.classes)


def draw(image: Image, found: Detections, class_names: Sequence[str] = (), *, scores: bool = True) -> Image:
    """A copy of an (H, W, 3) uint8 RGB image with boxes, names and, if asked, scores, the best on top."""
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
    """Text on a filled bar above the corner, or below it where the image ends."""
    font = cv2.FONT_HERSHEY_SIMPLEX
    (width, height), descent = cv2.getTextSize(text, font, scale, 1)
    x = max(0, min(corner[0], canvas.shape[1] - width))
    y = corner[1] if corner[1] >= height + descent else corner[1] + height + descent
    cv2.rectangle(canvas, (x, y - height - descent), (x + width, y), colour, cv2.FILLED)
    ink = (0, 0, 0) if sum(colour) > 330 else (255, 255, 255)
    cv2.putText(canvas, text, (x, y - descent // 2), font, scale, ink, 1, cv2.LINE_AA)


def listed(paths: Sequence[str | os.PathLike[str]]) -> list[Path]:
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(x for x in path.iterdir() if x.suffix.lower() in IMAGE_SUFFIXES)
            if not inside:
                raise FileNotFoundError(f"{path}: no images in this folder ({', '.join(IMAGE_SUFFIXES)})")
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise FileNotFoundError(f"{path}: no such image or folder")
    return files


def _named(target: Path) -> Path:
    return target if target.suffix.lower() in IMAGE_SUFFIXES else target.with_suffix(".png")


def write_image(target: Path, image: Image) -> None:
    """An (H, W, 3) uint8 RGB image to a file, whole or not at all."""
    done, encoded = cv2.imencode(target.suffix, cast(Image, cv2.cvtColor(image, cv2.COLOR_RGB2BGR)))
    if not done:
        raise ValueError(f"{target}: this image could not be encoded as {target.suffix}")
    with replacing(target) as part:
        part.write_bytes(encoded.tobytes())
