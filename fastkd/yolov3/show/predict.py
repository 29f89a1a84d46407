"""Detects objects in images, and writes copies of the images with boxes."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from fastkd.files import require_new
from fastkd.modes import eval_mode
from fastkd.yolov3.boxes import Detections, detect
from fastkd.yolov3.data.annotations import some_of
from fastkd.yolov3.data.dataset import fit, read_image
from fastkd.yolov3.data.draw import Image, draw, write_image
from fastkd.yolov3.data.formats import IMAGE_SUFFIXES
from fastkd.yolov3.model import Detector


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
    """Detect objects in images, and write copies with boxes, class names and scores drawn on them.

    Args:
        model: the detector, on any device.
        paths: image files, or folders of them.
        out: folder for the copies, which keep their names (as PNG if OpenCV cannot write their format).
        size: side in pixels of the square network input, a multiple of 32.
        class_names: one per class; without names, class numbers are drawn.
        score_threshold: minimum score of a drawn box, in [0, 1).
        iou_threshold: threshold of the non-maximum suppression.
        progress: whether to show a progress bar if the output is a terminal.

    Returns:
        The files written, in order. Images that can't be read are left out, with one warning that names them.

    Raises:
        FileNotFoundError: there is no such image or folder, or a folder has no images.
        FileExistsError: ``out`` has a file with one of these names.
        ValueError: no image can be read, two have the same name, or a threshold is out of range.
    """
    files = listed(paths)
    targets = [_named(Path(out) / file.name) for file in files]
    if len(set(targets)) != len(targets):
        raise ValueError("paths: expected different file names, got the same one twice; predict one folder at a time")
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
    """Warn once, with the names of the images that can't be read; if none can be read, raise the first error."""
    if len(faults) == tried:
        raise next(iter(faults.values()))
    if faults:
        names = some_of([str(file) for file in faults])
        warnings.warn(f"{len(faults)} of {tried} images can't be read and are left out: {names}", stacklevel=3)


def detect_objects(
    model: Detector, image: Image, size: int, score_threshold: float = 0.3, iou_threshold: float = 0.5
) -> Detections:
    """Detect objects in one image, (H, W, 3) uint8 RGB of any size.

    Returns:
        The detections, with boxes in pixels of the image, clipped to it.
    """
    square, letterbox = fit(image, size)
    pixels = torch.from_numpy(np.ascontiguousarray(square.transpose(2, 0, 1)))[None]
    device = next(model.parameters()).device
    with eval_mode(model), torch.inference_mode():
        outputs = model(pixels.to(device).float() / 255)
    found = detect(outputs, model, score_threshold, iou_threshold)[0]
    boxes = letterbox.to_original(found.boxes.cpu().numpy())
    return Detections(torch.from_numpy(boxes), found.scores, found.classes)


def listed(paths: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Return image files, with folders replaced by the images in them.

    Raises:
        FileNotFoundError: there is no such file or folder, or a folder has no images.
    """
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
