"""A detection data set for PyTorch whose samples depend on (seed, epoch, index) only."""

from __future__ import annotations

import itertools
import os
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastkd.yolov3.data.annotations import Annotations, some_of
from fastkd.yolov3.data.augment import FILL, Array, Augmentation, Labelled, augment, mosaic
from fastkd.yolov3.data.formats import read_images, read_set

T = TypeVar("T")
READ_FLAGS = cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH | cv2.IMREAD_IGNORE_ORIENTATION
JPEG_START, JPEG_END, JPEG_SCAN = b"\xff\xd8", b"\xff\xd9", b"\xda"  # markers
JPEG_SEGMENT = re.compile(rb"\xff+([^\xff])(.{0,2})", re.DOTALL)  # fill bytes, marker and length
NAMED = 5  # the number of left-out images that are named in warnings


class Letterbox(NamedTuple):
    """The mapping from an image to the network's square input: input = original * scale + pad, in pixels."""

    scale_x: float
    scale_y: float
    pad_x: int
    pad_y: int
    width: int  # of the original image
    height: int

    def to_input(self, boxes: Array) -> Array:
        """Map (k, 4) x1, y1, x2, y2 boxes from the original image to the network's input."""
        mapped: Array = boxes * self._scale(boxes.dtype) + self._pad(boxes.dtype)
        return mapped

    def to_original(self, boxes: Array) -> Array:
        """Map (k, 4) x1, y1, x2, y2 boxes from the network's input to the original image, clipped to it."""
        mapped: Array = (boxes - self._pad(boxes.dtype)) / self._scale(boxes.dtype)
        return _clip(mapped, self.width, self.height)

    def _scale(self, dtype: np.dtype[Any]) -> Array:
        return np.array([self.scale_x, self.scale_y] * 2, dtype=dtype)

    def _pad(self, dtype: np.dtype[Any]) -> Array:
        return np.array([self.pad_x, self.pad_y] * 2, dtype=dtype)


class Sample(NamedTuple):
    """One image as uint8, and its targets; ``collate`` scales it to 0..1."""

    image: Tensor  # (3, size, size) uint8, RGB
    targets: Tensor  # (k, 5) float32: class index, x1, y1, x2, y2 in pixels of the network's input
    image_id: int
    letterbox: Letterbox  # maps boxes back to the original image, if there is no augmentation
    readable: bool = True  # False: the file could not be read; the image is grey, and `collate` leaves the sample out


class Batch(NamedTuple):
    """The images and targets of a training step."""

    images: Tensor  # (N, 3, size, size) float32, RGB, 0..1
    targets: Tensor  # (M, 6) float32: index in the batch, class index, x1, y1, x2, y2 in pixels of the input
    image_ids: list[int]
    letterboxes: list[Letterbox]


class DetectionDataset(Dataset[Sample]):
    """The images and boxes of a set in COCO JSON, Pascal VOC XML, YOLO text or CSV.

    A sample depends on (seed, epoch, index) only: not on the order of access, the number of workers, or where a run was
    resumed. Classes are numbered 0, 1, ...: for COCO in the order of the category ids, for VOC sorted by name.

    Faults are found when the annotations or the images are read, and are reported with the file's name:

    - a missing image: FileNotFoundError at construction, with the count and the first names;
    - an image that can't be read, or has another size than annotated: left out; warnings name the first five.
      With augmentation, the next readable image takes its place, so that a sample still depends on (seed, epoch, index)
      only. Without augmentation, `collate` drops the sample, and the evaluation does not count its boxes;
    - a JPEG that is cut off: read as far as it goes, with the rest grey, and a warning that names the file;
    - a file that is listed twice: one image, with the boxes of both entries;
    - an unknown class or image, or a file name outside the image folder: ValueError at construction;
    - a box that reaches outside its image is clipped; a box without area (also after clipping) or not finite is
      dropped. One warning gives counts and names, which stay in `annotations.problems`. `truth`, which the evaluation
      scores against, has the boxes as in the files, see `Annotations.as_given`;
    - a crowd annotation (`iscrowd`; VOC's `difficult`): not a training target, but part of the evaluation;
    - an image without boxes: kept, as background.

    Args:
        annotations, images: the paths of the set, see ``fastkd.yolov3.data.formats``; or an ``Annotations`` and None.
        size: side of the network's square input in pixels, a multiple of 32. Images are letterboxed to it.
        augmentation: options of the augmentation in training; None for evaluation.
        seed: seed of the augmentation.
        cache: keep decoded images in memory (in each worker process), if they fit.
        limit: use the first `limit` images only; None: all.
        strict: raise a ValueError for an image that can't be read or has another size, instead of leaving it out.

    Raises:
        FileNotFoundError: images are missing, or what ``read_set`` raises.
        ValueError: ``size`` or ``limit`` is out of range, no image can be read, or the annotations are faulty.
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
        strict: bool = False,
    ) -> None:
        if size <= 0 or size % 32:
            raise ValueError(f"size: expected a positive multiple of 32, got {size}")
        if limit is not None and limit < 1:
            raise ValueError(f"limit: expected None or at least 1 image, got {limit}")
        self.size = size
        self.augmentation = augmentation
        self.seed = seed
        self.strict = strict
        if not isinstance(annotations, Annotations):
            annotations = read_set(annotations, annotations if images is None else images)
        annotations = annotations.first(limit)
        readable = _readable(annotations, strict)
        self.annotations, self.truth = readable.clean(), readable.as_given()
        if self.annotations.problems:
            told = (f"{len(names)} {what} ({some_of(names)})" for what, names in self.annotations.problems.items())
            warnings.warn(f"{annotations.source}: {', '.join(told)}", stacklevel=2)
        boxes = self.annotations.boxes
        self._corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1).astype(np.float32)

        # In shared memory: workers that live longer than an epoch see the new epoch, and all see what was unreadable.
        self._epoch = torch.zeros((), dtype=torch.int64)
        self._unread = torch.zeros(len(self), dtype=torch.bool)
        self._share()
        self._cache: dict[int, Array] | None = {} if cache else None

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy, which shares memory of its own with its own workers."""
        self.__dict__.update(state)
        self._share()

    def _share(self) -> None:
        for tensor in (self._epoch, self._unread):
            tensor.share_memory_()  # type: ignore[no-untyped-call]
        self.annotations.unread = self.truth.unread = self._unread.numpy()

    @classmethod
    def of_images(cls, folder: str | os.PathLike[str], size: int, **options: Any) -> DetectionDataset:
        """Return all images of a folder and its sub-folders, without boxes; options are those of the constructor."""
        return cls(read_images(folder), None, size, **options)

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
        """Set the epoch, which selects the augmentation's random numbers; call it before iterating over a loader."""
        self._epoch.fill_(epoch)

    def __getitem__(self, index: int) -> Sample:
        return self.sample(index, self.epoch)

    def sample(self, index: int, epoch: int) -> Sample:
        """Return the sample of this epoch, independent of `set_epoch`, for samplers that yield (epoch, index)."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"index: expected 0..{len(self) - 1}, got {index}")
        index %= len(self)
        if self.augmentation is None:
            loaded = self._load(index)
            labelled = None if loaded is None else self._fitted(*loaded)
        else:
            rng = np.random.default_rng([self.seed, epoch, index])
            index, loaded = self._next_readable(index)
            labelled = self._augmented(loaded, rng, self.augmentation)
        image, boxes, classes = labelled or _blank(self.size)
        targets = np.concatenate([classes[:, None].astype(np.float32), boxes], axis=1)
        width, height = self.annotations.sizes[index].tolist()
        return Sample(
            torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))),
            torch.from_numpy(targets),
            int(self.annotations.image_ids[index]),
            letterbox_of(width, height, self.size),
            readable=labelled is not None,
        )

    def box_sizes(self) -> Tensor:
        """Return widths and heights (M, 2), float32, of all target boxes in pixels of the network's input."""
        trained = ~self.annotations.crowd
        sizes = self.annotations.sizes[self.annotations.rows[trained]]
        boxes = self._corners[trained]
        # as in letterbox_of, for all images at once
        scaled = np.rint(sizes * (self.size / sizes.max(1, keepdims=True))).clip(min=1) / sizes
        return torch.from_numpy(((boxes[:, 2:] - boxes[:, :2]) * scaled).astype(np.float32))

    def _augmented(self, loaded: Labelled, rng: np.random.Generator, options: Augmentation) -> Labelled:
        """Return the labelled image, augmented and letterboxed; with probability `mosaic` joined with three others."""
        members = [loaded]
        if rng.random() < options.mosaic:
            members += [self._next_readable(other)[1] for other in rng.integers(len(self), size=3).tolist()]
        tiles = [self._fitted(*augment(*member, rng, options)) for member in members]
        return tiles[0] if len(tiles) == 1 else mosaic(tiles, rng, min_visible=options.min_visible)

    def _fitted(self, image: Array, boxes: Array, classes: Array) -> Labelled:
        fitted, letterbox = fit(image, self.size)
        return fitted, letterbox.to_input(boxes), classes

    def _next_readable(self, index: int) -> tuple[int, Labelled]:
        """Return the image of this index or, if it can't be read, the next one that can, and the index used."""
        for place in itertools.chain(range(index, len(self)), range(index)):
            loaded = self._load(place)
            if loaded is not None:
                return place, loaded
        raise ValueError(f"{self.annotations.source}: none of the {len(self)} images can be read, see the warnings")

    def _load(self, index: int) -> Labelled | None:
        """Return image, boxes and classes; None if the image can't be read or its size is not the annotated one."""
        image = self._cache.get(index) if self._cache is not None else None
        if image is None and not self._unread[index]:
            try:
                image = _read_as(self.annotations.path(index), *self.annotations.sizes[index].tolist())
            except ValueError as error:
                if self.strict:
                    raise
                self._leave_out(index, error)
        if image is None:
            return None
        if self._cache is not None:
            self._cache[index] = image
        of = self.annotations.of(index)
        trained = ~self.annotations.crowd[of]
        return image, self._corners[of][trained], self.annotations.classes[of][trained]

    def _leave_out(self, index: int, error: ValueError) -> None:
        """Mark an image as unread, with a warning for the first ``NAMED`` of them."""
        before = int(self._unread.sum())
        self._unread[index] = True
        if before < NAMED:
            warnings.warn(f"this image is left out: {error}", stacklevel=3)
        elif before == NAMED:
            more = "more images are left out, without further warnings; fastkd data check lists all of them"
            warnings.warn(more, stacklevel=3)


def _readable(annotations: Annotations, strict: bool) -> Annotations:
    """Return the set without images whose header can't be read.

    Raises:
        FileNotFoundError: files are missing.
        ValueError: no image can be read; with ``strict``: some can't be read.
    """
    missing = annotations.missing()
    if missing:
        raise FileNotFoundError(
            f"images: {len(missing)} of {len(annotations)} images are not in {annotations.image_dir}: "
            f"{some_of(missing)}; fastkd data check lists all faults of a set"
        )
    readable = annotations.have_size()
    if readable.all():
        return annotations
    names = [annotations.file_names[row] for row in np.flatnonzero(~readable)]
    if strict or not readable.any():
        raise ValueError(
            f"images: {len(names)} of {len(annotations)} images in {annotations.image_dir} can't be read: "
            f"{some_of(names)}; fastkd data check lists all faults of a set"
        )
    kept = annotations.only(readable)
    return replace(kept, problems=kept.problems | {"images that can't be read left out": names})


def _read_as(path: Path, width: int, height: int) -> Array:
    """Read an image, which must have this size; every fault of the file is raised as a ValueError that names it."""
    try:
        image = read_image(path)
    except OSError as error:  # no permission, for example
        raise ValueError(f"{path}: this file can't be read: {error.strerror or error}") from None
    found_height, found_width = image.shape[:2]
    if (found_width, found_height) != (width, height):
        raise ValueError(
            f"{path}: the annotations expect {width}x{height} pixels (width x height), "
            f"the file has {found_width}x{found_height}"
        )
    return image


def _blank(size: int) -> Labelled:
    """Return a grey image without boxes, in place of an image that can't be read."""
    return np.full((size, size, 3), FILL, np.uint8), np.zeros((0, 4), np.float32), np.zeros(0, np.int64)


def collate(samples: Sequence[Sample]) -> Batch:
    """Join samples into a batch, as a DataLoader's `collate_fn`; samples that could not be read are left out."""
    kept = [sample for sample in samples if sample.readable]
    targets = [
        torch.cat([sample.targets.new_full((len(sample.targets), 1), index), sample.targets], dim=1)
        for index, sample in enumerate(kept)
    ]
    images = torch.stack([sample.image for sample in kept or samples])[: len(kept)]
    return Batch(
        images=images.float().div_(255),
        targets=torch.cat([torch.zeros(0, 6), *targets]),
        image_ids=[sample.image_id for sample in kept],
        letterboxes=[sample.letterbox for sample in kept],
    )


def joined(first: Batch, second: Batch) -> Batch:
    """Return one batch with the images of two."""
    moved = second.targets + second.targets.new_tensor([len(first.images), 0, 0, 0, 0, 0])
    return Batch(
        images=torch.cat([first.images, second.images]),
        targets=torch.cat([first.targets, moved]),
        image_ids=first.image_ids + second.image_ids,
        letterboxes=first.letterboxes + second.letterboxes,
    )


def spread(total: int, count: int) -> list[int]:
    """Return at most ``count`` of ``total`` indices, evenly spaced."""
    return [i * total // min(count, total) for i in range(min(count, total))]


def spread_readable(total: int, count: int, read: Callable[[int], T | None]) -> list[T]:
    """Return what ``read`` returns for the indices of ``spread``; where it returns None, the next index is tried."""
    found: dict[int, T | None] = {}
    for start in spread(total, count):
        for index in itertools.chain(range(start, total), range(start)):
            if index not in found:
                found[index] = read(index)
                if found[index] is not None:
                    break
    return [x for x in found.values() if x is not None]


def some_batch(data: DetectionDataset, count: int) -> Batch:
    """Return a batch of at most ``count`` images of a data set, evenly spaced and always the same.

    The next readable image takes the place of one that can't be read; the batch is empty if no image can be read.
    """

    def read(index: int) -> Sample | None:
        sample = data.sample(index, epoch=0)
        return sample if sample.readable else None

    return collate(spread_readable(len(data), count, read) or [data.sample(0, epoch=0)])


class Decoded(NamedTuple):
    """The pixels of a decoded image, and what a data check reports about its file."""

    image: Array  # (H, W, 3) uint8 RGB
    deep: bool  # the file has 16 bits per channel
    cut_off: bool  # a JPEG without its end: the rest may be grey or wrong


def read_image(path: str | os.PathLike[str]) -> Array:
    """Read an image as (H, W, 3) uint8 RGB, as stored: an orientation tag is ignored, as COCO's boxes expect.

    A JPEG that is cut off is read as far as it goes, with a warning. An image of 16 bits per channel is shifted right
    by 0, 2, 4, 6 or 8 bits, as its largest value needs, so that an image with 12-bit values does not become black.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not an image that OpenCV can read.
    """
    # From bytes, because cv2.imread returns None for missing and for damaged files, and can't open some file names.
    encoded = np.fromfile(path, dtype=np.uint8)
    found = decode(encoded)
    if found is None:
        raise ValueError(f"{os.fspath(path)}: not an image that can be read ({encoded.size} bytes); is it damaged?")
    if found.cut_off:
        warnings.warn(f"{os.fspath(path)}: this JPEG has no end, so a part of the image may be missing", stacklevel=2)
    return found.image


def decode(encoded: Array) -> Decoded | None:
    """Return the image in the bytes of a file, (n,) uint8; None if OpenCV cannot read it."""
    data = encoded.tobytes()
    cut_off = _is_cut_off(data)
    for end in (b"", JPEG_END) if cut_off else (b"",):  # with an end added, OpenCV reads the part that is there
        try:
            image = cv2.imdecode(np.frombuffer(data + end, np.uint8), READ_FLAGS) if data else None
        except cv2.error:  # for example, more pixels than OpenCV's limit
            image = None
        if image is not None and image.dtype in (np.uint8, np.uint16):
            deep = image.dtype == np.uint16
            rgb: Array = cv2.cvtColor(_eight_bits(image) if deep else image, cv2.COLOR_BGR2RGB)
            return Decoded(rgb, deep, cut_off)
    return None


def _is_cut_off(data: bytes) -> bool:
    """Whether this is a JPEG without an end marker after the start of its first scan."""
    if not data.startswith(JPEG_START):
        return False
    place = len(JPEG_START)
    while (segment := JPEG_SEGMENT.match(data, place)) and segment[1] != JPEG_SCAN:
        place = segment.end(1) + int.from_bytes(segment[2], "big")  # skips a thumbnail, which has an end marker too
    return data.find(JPEG_END, place) < 0


def _eight_bits(image: Array) -> Array:
    """Return the highest 8 bits in use of uint16 pixels: cameras store 10, 12 or 14 bits in 16."""
    bits = next(bits for bits in (8, 10, 12, 14, 16) if image.max() < 1 << bits)
    return (image >> (bits - 8)).astype(np.uint8)


def fit(image: Array, size: int) -> tuple[Array, Letterbox]:
    """Letterbox an image: scale its longer side to `size`, and centre it in a grey square (size, size, 3)."""
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
    """Return the letterbox of an image of this width and height in a square of side `size`, in whole pixels."""
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
