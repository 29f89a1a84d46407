"""Detection data as a PyTorch data set whose samples depend on (seed, epoch, index) only."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastkd.yolov3.annotations import Annotations
from fastkd.yolov3.augment import FILL, Array, Augmentation, Labelled, augment, mosaic
from fastkd.yolov3.formats import read_pictures, read_set


class Letterbox(NamedTuple):
    """How a picture was fitted into the network's square input: input = original * scale + pad, in pixels."""

    scale_x: float
    scale_y: float
    pad_x: int
    pad_y: int
    width: int  # of the original picture
    height: int

    def to_input(self, boxes: Array) -> Array:
        """Map (k, 4) x1, y1, x2, y2 boxes from the original picture to the network's input."""
        mapped: Array = boxes * self._scale(boxes.dtype) + self._pad(boxes.dtype)
        return mapped

    def to_original(self, boxes: Array) -> Array:
        """Map (k, 4) x1, y1, x2, y2 boxes from the network's input to the original picture, clipped to it."""
        mapped: Array = (boxes - self._pad(boxes.dtype)) / self._scale(boxes.dtype)
        return _clip(mapped, self.width, self.height)

    def _scale(self, dtype: np.dtype[Any]) -> Array:
        return np.array([self.scale_x, self.scale_y] * 2, dtype=dtype)

    def _pad(self, dtype: np.dtype[Any]) -> Array:
        return np.array([self.pad_x, self.pad_y] * 2, dtype=dtype)


class Sample(NamedTuple):
    """One picture, ready for the network but for its scale to 0..1."""

    image: Tensor  # (3, size, size) uint8, RGB
    targets: Tensor  # (k, 5) float32: class index, x1, y1, x2, y2 in pixels of the network's input
    image_id: int
    letterbox: Letterbox  # without augmentation, the way back to the original picture


class Batch(NamedTuple):
    """What the network trains on."""

    images: Tensor  # (N, 3, size, size) float32, RGB, 0..1
    targets: Tensor  # (M, 6) float32: index in the batch, class index, x1, y1, x2, y2 in pixels of the input
    image_ids: list[int]
    letterboxes: list[Letterbox]


class DetectionDataset(Dataset[Sample]):
    """Pictures and boxes of a set in COCO JSON, Pascal VOC XML or YOLO text.

    A sample depends on (seed, epoch, index) only: not on the order of access, the number of workers, or where a run was
    resumed. Classes are numbered 0, 1, ...: in COCO in the order of the category ids, in VOC sorted by name.

    What is wrong in a file is found when it is opened, or is an error that names the picture:

    - missing picture: FileNotFoundError with the count and the first few, at construction;
    - broken picture, or one whose size is not the one in the file: ValueError naming it, when it is read;
    - unknown class or picture, duplicate id, file name outside the image folder: ValueError at construction;
    - box outside the picture: clipped to it; box without area (also after clipping) or not finite: dropped. One warning
      gives the counts, which stay in `annotations.problems`;
    - crowd annotation (`iscrowd`; VOC's `difficult`): not a training target, but part of the evaluation;
    - picture without boxes: kept, as background.

    Args:
        annotations, images: the set, see ``fastkd.yolov3.formats``; or an ``Annotations`` that has been read.
        size: side of the network's square input in pixels, a multiple of 32. Pictures are letterboxed to it.
        augmentation: what to vary at random while training; None for evaluation.
        seed: of the augmentation.
        cache: keep decoded pictures in memory (in each worker process), for sets that fit.
        limit: use the first `limit` pictures only.
    """

    def __init__(
        self,
        annotations: str | os.PathLike[str] | Annotations,
        images: str | os.PathLike[str] | None,
        size: int,
        *,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        cache: bool = False,
        limit: int | None = None,
    ) -> None:
        if size <= 0 or size % 32:
            raise ValueError(f"size: expected a positive multiple of 32, got {size}")
        if limit is not None and limit < 1:
            raise ValueError(f"limit: expected None or at least 1 picture, got {limit}")
        self.size = size
        self.augmentation = augmentation
        self.seed = seed
        if not isinstance(annotations, Annotations):
            annotations = read_set(annotations, annotations if images is None else images)
        annotations = annotations.first(limit)
        _require_files(annotations)
        self.annotations = annotations.clean()
        if self.annotations.problems:
            counts = ", ".join(f"{count} {problem}" for problem, count in self.annotations.problems.items())
            warnings.warn(f"{annotations.source}: {counts}", stacklevel=2)
        boxes = self.annotations.boxes
        self._corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1).astype(np.float32)

        # In shared memory, so that workers that outlive an epoch see the new one.
        self._epoch: Tensor = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
        self._cache: dict[int, Array] | None = {} if cache else None

    @classmethod
    def of_pictures(cls, folder: str | os.PathLike[str], size: int, **options: Any) -> DetectionDataset:
        """All pictures of a folder and its sub-folders, without boxes or classes. Options as of the constructor."""
        return cls(read_pictures(folder), None, size, **options)

    @property
    def class_names(self) -> list[str]:
        return self.annotations.class_names

    def __len__(self) -> int:
        return len(self.annotations)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the augmentation's random numbers; call it before iterating over a loader."""
        self._epoch.fill_(epoch)

    def __getitem__(self, index: int) -> Sample:
        return self.sample(index, self.epoch)

    def sample(self, index: int, epoch: int) -> Sample:
        """The sample as it is in this epoch, whatever `set_epoch` says: for samplers that hand out (epoch, index)."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"index: expected 0..{len(self) - 1}, got {index}")
        index %= len(self)
        width, height = self.annotations.sizes[index].tolist()
        letterbox = letterbox_of(width, height, self.size)
        if self.augmentation is None:
            image, boxes, classes = self._fitted(*self._load(index))
        else:
            rng = np.random.default_rng([self.seed, epoch, index])
            image, boxes, classes = self._augmented(index, rng, self.augmentation)
        targets = np.concatenate([classes[:, None].astype(np.float32), boxes], axis=1)
        pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        return Sample(pixels, torch.from_numpy(targets), int(self.annotations.image_ids[index]), letterbox)

    def box_sizes(self) -> Tensor:
        """Widths and heights (M, 2), float32, of all target boxes as the network sees them: for choosing anchors."""
        trained = ~self.annotations.crowd
        sizes = self.annotations.sizes[self.annotations.rows[trained]]
        boxes = self._corners[trained]
        # letterbox_of, of all pictures at once
        scaled = np.rint(sizes * (self.size / sizes.max(1, keepdims=True))).clip(min=1) / sizes
        return torch.from_numpy(((boxes[:, 2:] - boxes[:, :2]) * scaled).astype(np.float32))

    def _augmented(self, index: int, rng: np.random.Generator, options: Augmentation) -> Labelled:
        """The labelled picture, augmented and letterboxed, perhaps in a mosaic with three others."""
        members = [index]
        if rng.random() < options.mosaic:
            members += rng.integers(len(self), size=3).tolist()
        tiles = [self._fitted(*augment(*self._load(member), rng, options)) for member in members]
        return tiles[0] if len(tiles) == 1 else mosaic(tiles, rng, min_visible=options.min_visible)

    def _fitted(self, image: Array, boxes: Array, classes: Array) -> Labelled:
        fitted, letterbox = fit(image, self.size)
        return fitted, letterbox.to_input(boxes), classes

    def _load(self, index: int) -> Labelled:
        image = self._cache.get(index) if self._cache is not None else None
        if image is None:
            path = self.annotations.path(index)
            image = read_image(path)
            height, width = image.shape[:2]
            stated = tuple(self.annotations.sizes[index].tolist())
            if (width, height) != stated:
                raise ValueError(
                    f"{path}: the annotations expect {stated[0]}x{stated[1]} pixels (width x height), "
                    f"the file has {width}x{height}"
                )
            if self._cache is not None:
                self._cache[index] = image
        of = self.annotations.of(index)
        trained = ~self.annotations.crowd[of]
        return image, self._corners[of][trained], self.annotations.classes[of][trained]


def _require_files(annotations: Annotations) -> None:
    for fault, error, names in (
        ("not in", FileNotFoundError, annotations.missing()),
        ("that can't be read in", ValueError, annotations.unreadable()),
    ):
        if names:
            some = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            raise error(
                f"images: {len(names)} of {len(annotations)} pictures {fault} {annotations.image_dir}: {some}; "
                "fastkd data check lists all faults of a set"
            )


def collate(samples: Sequence[Sample]) -> Batch:
    """Join samples into a batch: pass it to a DataLoader as `collate_fn`."""
    targets = [
        torch.cat([sample.targets.new_full((len(sample.targets), 1), index), sample.targets], dim=1)
        for index, sample in enumerate(samples)
    ]
    return Batch(
        images=torch.stack([sample.image for sample in samples]).float().div_(255),
        targets=torch.cat(targets),
        image_ids=[sample.image_id for sample in samples],
        letterboxes=[sample.letterbox for sample in samples],
    )


def read_image(path: str | os.PathLike[str]) -> Array:
    """Read a picture as (H, W, 3) uint8 RGB, as stored: an orientation tag is ignored, as COCO's boxes expect.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a picture that OpenCV can read.
    """
    # From bytes, because cv2.imread returns None for a missing and a broken file alike, and trips over some names.
    encoded = np.fromfile(path, dtype=np.uint8)
    image = cv2.imdecode(encoded, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION) if encoded.size else None
    if image is None:
        raise ValueError(f"{os.fspath(path)}: not a picture that can be read ({encoded.size} bytes); is it damaged?")
    rgb: Array = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    return rgb


def fit(image: Array, size: int) -> tuple[Array, Letterbox]:
    """Letterbox a picture: scale its longer side to `size`, centre it in a grey square (size, size, 3)."""
    height, width = image.shape[:2]
    letterbox = letterbox_of(width, height, size)
    new_width, new_height = round(width * letterbox.scale_x), round(height * letterbox.scale_y)
    if (new_width, new_height) != (width, height):
        shrinks = new_width < width or new_height < height
        image = cv2.resize(
            image, (new_width, new_height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        )
    if (new_width, new_height) == (size, size):
        return image, letterbox
    square = np.full((size, size, 3), FILL, dtype=np.uint8)
    x, y = letterbox.pad_x, letterbox.pad_y
    square[y : y + new_height, x : x + new_width] = image
    return square, letterbox


def letterbox_of(width: int, height: int, size: int) -> Letterbox:
    """The letterbox of a picture of this width and height in a square of side `size`, in whole pixels."""
    scale = size / max(width, height)
    new_width, new_height = max(1, round(width * scale)), max(1, round(height * scale))
    return Letterbox(
        scale_x=new_width / width,
        scale_y=new_height / height,
        pad_x=(size - new_width) // 2,
        pad_y=(size - new_height) // 2,
        width=width,
        height=height,
    )


def _clip(boxes: Array, width: int, height: int) -> Array:
    return np.stack(
        [boxes[:, i].clip(0, limit) for i, limit in enumerate((width, height, width, height))], axis=1
    ).astype(boxes.dtype)
