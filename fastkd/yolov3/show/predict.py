"""Detects objects in images and videos, and writes copies of them with boxes."""

from __future__ import annotations

import glob
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
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
from fastkd.yolov3.onnx_detector import OnnxDetector
from fastkd.yolov3.show.video import VIDEO_SUFFIXES, Video, write_video
from fastkd.yolov3.train.evaluate import Detection, coco_results, write_detections


def predict(
    model: Detector | OnnxDetector,
    paths: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    size: int,
    class_names: Sequence[str] = (),
    score_threshold: float = 0.3,
    iou_threshold: float = 0.5,
    progress: bool = False,
    detections_file: str | os.PathLike[str] | None = None,
) -> list[Path]:
    """Detect objects in images and videos, and write copies with boxes, class names and scores drawn on them.

    Args:
        model: the detector, on any device.
        paths: image files, videos, folders of both, or patterns of ``glob`` (``"photos/*.jpg"``; ``"photos/**"`` for
            all folders below).
        out: folder for the copies, which keep their names (as PNG if OpenCV cannot write their format; videos as MP4).
        size: side in pixels of the square network input, a multiple of 32.
        class_names: one per class; without names, class numbers are drawn.
        score_threshold: minimum score of a drawn box, in [0, 1).
        iou_threshold: threshold of the non-maximum suppression.
        progress: whether to show a progress bar if the output is a terminal.
        detections_file: file to write the drawn boxes to as COCO results, in pixels of the images; None: no file. The
            ``image_id`` is the name of the file, the ``category_id`` counts the classes from 1, and boxes of a video
            have a ``frame`` besides, counted from 0.

    Returns:
        The files written, in order. Files that can't be read are left out, with one warning that names them.

    Raises:
        FileNotFoundError: there is no such file or folder, or a folder or pattern has no images or videos.
        FileExistsError: ``out`` has a file with one of these names, or ``detections_file`` exists.
        ValueError: no file can be read, two have the same name, or a threshold is out of range.
    """
    files = listed(paths, (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES))
    targets = [_named(Path(out) / file.name) for file in files]
    if len(set(targets)) != len(targets):
        raise ValueError("paths: expected different file names, got the same one twice; predict one folder at a time")
    require_new(detections_file=detections_file)
    for target in targets:
        require_new(out=target)
    finder = _Finder(model, size, class_names, score_threshold, iou_threshold)
    bar = tqdm(files, unit="image", leave=False, disable=None if progress else True)
    written: list[Path] = []
    faults: dict[Path, Exception] = {}
    for file, target in zip(bar, targets, strict=True):
        try:
            source: Video | Image = Video(file) if _is_video(file) else read_image(file)
        except (ValueError, OSError) as error:
            faults[file] = error
            continue
        if isinstance(source, Video):
            write_video(target, finder.frames(source, file.name, progress), source.rate)
        else:
            write_image(target, finder.drawn(source, file.name))
        written.append(target)
    warn_left_out(faults, len(files))
    if detections_file is not None:
        write_detections(finder.results, detections_file)
    return written


@dataclass
class _Finder:
    """Draws what is found, and keeps it as COCO results."""

    model: Detector | OnnxDetector
    size: int
    class_names: Sequence[str]
    score_threshold: float
    iou_threshold: float
    results: list[Detection] = field(default_factory=list)

    def drawn(self, image: Image, name: str, **more: int) -> Image:
        """A copy of an image with its boxes; ``more`` goes into their results."""
        found = detect_objects(self.model, image, self.size, self.score_threshold, self.iou_threshold)
        category_ids = range(1, self.model.num_classes + 1)
        self.results += [x | more for x in coco_results(name, found, found.boxes.numpy(), category_ids)]
        return draw(image, found, self.class_names)

    def frames(self, video: Video, name: str, progress: bool) -> Iterator[Image]:
        """The same of each frame."""
        total, disable = video.count or None, None if progress else True
        bar = tqdm(video, name, total, unit="frame", position=1, leave=False, disable=disable)
        return (self.drawn(image, name, frame=number) for number, image in enumerate(bar))


def warn_left_out(faults: dict[Path, Exception], tried: int) -> None:
    """Warn once, with the names of the images that can't be read; if none can be read, raise the first error."""
    if len(faults) == tried:
        raise next(iter(faults.values()))
    if faults:
        names = some_of([str(file) for file in faults])
        what = "images and videos" if any(map(_is_video, faults)) else "images"
        warnings.warn(f"{len(faults)} of {tried} {what} can't be read and are left out: {names}", stacklevel=3)


def detect_objects(
    model: Detector | OnnxDetector, image: Image, size: int, score_threshold: float = 0.3, iou_threshold: float = 0.5
) -> Detections:
    """Detect objects in one image, (H, W, 3) uint8 RGB of any size.

    Returns:
        The detections, with boxes in pixels of the image, clipped to it.
    """
    square, letterbox = fit(image, size)
    pixels = torch.from_numpy(np.ascontiguousarray(square.transpose(2, 0, 1)))[None]
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    with eval_mode(model), torch.inference_mode():
        outputs = model(pixels.to(device).float() / 255)
    found = detect(outputs, model, score_threshold, iou_threshold)[0]
    boxes = letterbox.to_original(found.boxes.cpu().numpy())
    return Detections(torch.from_numpy(boxes), found.scores, found.classes)


def listed(paths: Sequence[str | os.PathLike[str]], suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> list[Path]:
    """Return files, with folders and patterns of ``glob`` replaced by the files in them that have one of the suffixes.

    Raises:
        FileNotFoundError: there is no such file or folder, or it has no file with such a suffix.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_file():
            files.append(path)
            continue
        pattern = glob.has_magic(str(path)) and not path.is_dir()
        if not pattern and not path.is_dir():
            raise FileNotFoundError(f"{path}: no such image or folder")
        inside = map(Path, glob.glob(str(path), recursive=True)) if pattern else path.iterdir()
        found = sorted(x for x in inside if x.suffix.lower() in suffixes and x.is_file())
        if not found:
            where = "no images match this pattern" if pattern else "no images in this folder"
            raise FileNotFoundError(f"{path}: {where} ({', '.join(suffixes)})")
        files += found
    return list(dict.fromkeys(files))


def _is_video(file: Path) -> bool:
    return file.suffix.lower() in VIDEO_SUFFIXES


def _named(target: Path) -> Path:
    if _is_video(target):
        return target.with_suffix(".mp4")
    return target if target.suffix.lower() in IMAGE_SUFFIXES else target.with_suffix(".png")
