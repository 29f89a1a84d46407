"""Videos, frame by frame, by OpenCV."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import cast

import cv2

from fastkd.files import replacing
from fastkd.yolov3.data.draw import Image

VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm")
_USUAL_RATE = 25.0  # frames a second, where a file says none


class Video:
    """The frames of a video file, (H, W, 3) uint8 RGB, upright, in order. To be iterated over once.

    A file that is cut off is read as far as it goes, with a warning.

    Attributes:
        rate: frames a second.
        count: number of frames that the file announces, or 0: not every format says it, and some only nearly.

    Raises:
        ValueError: not a video that OpenCV can read, or frames of one pixel, which no codec writes (names the file).
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = os.fspath(path)
        self._capture = cv2.VideoCapture(self._path)
        there, self._next = self._capture.read()
        if not there:
            self._capture.release()
            raise ValueError(f"{self._path}: not a video that can be read; is it damaged?")
        if min(self._next.shape[:2]) < 2:
            self._capture.release()
            raise ValueError(f"{self._path}: expected frames of at least 2 x 2 pixels, got one of 1 pixel")
        rate, count = self._capture.get(cv2.CAP_PROP_FPS), self._capture.get(cv2.CAP_PROP_FRAME_COUNT)
        self.rate = rate if 0 < rate < 1000 else _USUAL_RATE
        self.count = round(count) if 0 < count < 1e9 else 0

    def __iter__(self) -> Iterator[Image]:
        there, read = True, 0
        while there:
            yield cast(Image, cv2.cvtColor(self._next, cv2.COLOR_BGR2RGB))
            read += 1
            there, self._next = self._capture.read()
        self._capture.release()
        if read < self.count - 1:  # by one frame Matroska and WebM are off, which announce seconds
            what = f"this video ends after {read} of {self.count} frames, and is used so far"
            warnings.warn(f"{self._path}: {what}", stacklevel=2)


def write_video(target: Path, frames: Iterable[Image], rate: float) -> None:
    """Write frames, (H, W, 3) uint8 RGB of one size, as MP4 (MPEG-4 part 2, without sound), whole or not at all.

    A last row or column is left out where height or width is odd, as the codec wants.

    Raises:
        OSError: it could not be written.
    """
    rate = round(rate, 2) if rate < 60 else round(rate)  # the codec takes no fractions of more digits
    writer, count = cv2.VideoWriter(), 0
    with replacing(target) as part:
        unfinished = part.with_suffix(".mp4")  # OpenCV tells the format by it
        try:
            for frame in frames:
                if not count:
                    size = frame.shape[1], frame.shape[0]
                    if not writer.open(os.fspath(unfinished), cv2.VideoWriter.fourcc(*"mp4v"), rate, size):
                        raise OSError(f"OpenCV can't write {size[0]} x {size[1]} pixels at {rate:g} frames a second")
                writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
                count += 1
            writer.release()
            if _frames_in(unfinished) != count:  # a full disk, of which OpenCV says nothing
                raise OSError("OpenCV wrote it incompletely")
            os.replace(unfinished, part)
        finally:
            writer.release()
            unfinished.unlink(missing_ok=True)


def _frames_in(file: Path) -> int:
    return round(cv2.VideoCapture(os.fspath(file)).get(cv2.CAP_PROP_FRAME_COUNT))
