"""Detection data in COCO JSON, as a PyTorch data set whose samples depend on (seed, epoch, index) only."""

import json
import math
import os
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastkd.yolov3.augment import FILL, Array, Augmentation, Labelled, augment, mosaic


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


class CocoDetection(Dataset[Sample]):
    """Pictures and boxes of a COCO JSON file.

    Classes are numbered 0, 1, ... in the order of the file's category ids. A sample depends on (seed, epoch, index)
    only: not on the order of access, the number of workers, or where a run was resumed.

    What is wrong in a file is found when it is opened, or is an error that names the picture:

    - missing picture: FileNotFoundError with the count and the first few, at construction;
    - broken picture, or one whose size is not the one in the file: ValueError naming it, when it is read;
    - unknown category or picture id, duplicate id, `file_name` outside the image folder: ValueError at construction;
    - box outside the picture: clipped to it; box without area (also after clipping) or not finite: dropped. One warning
      gives the counts, which stay in `problems`;
    - crowd annotation (`iscrowd`): not a training target, but part of `annotations` for evaluation;
    - picture without boxes: kept, as background.

    Args:
        annotation_file: the COCO JSON file.
        image_dir: the folder that `file_name` is relative to.
        size: side of the network's square input in pixels, a multiple of 32. Pictures are letterboxed to it.
        augmentation: what to vary at random while training; None for evaluation.
        seed: of the augmentation.
        cache: keep decoded pictures in memory (in each worker process), for sets that fit.
        limit: use the first `limit` pictures only.
    """

    def __init__(
        self,
        annotation_file: str | os.PathLike[str],
        image_dir: str | os.PathLike[str],
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
        self.image_dir = Path(image_dir)
        content = _read_coco(Path(annotation_file))

        self.categories: list[dict[str, Any]] = sorted(content["categories"], key=lambda category: category["id"])
        self.class_names: list[str] = [str(category["name"]) for category in self.categories]
        self.category_ids: list[int] = [category["id"] for category in self.categories]
        self.images: list[dict[str, Any]] = content["images"][:limit]
        self._check_files(str(annotation_file))
        self.problems: Counter[str] = Counter()
        self.annotations = self._clean(content, str(annotation_file))
        self._boxes, self._classes = self._targets()
        if self.problems:
            counts = ", ".join(f"{count} {problem}" for problem, count in self.problems.items())
            warnings.warn(f"{annotation_file}: {counts}", stacklevel=2)

        # In shared memory, so that workers that outlive an epoch see the new one.
        self._epoch: Tensor = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
        self._cache: dict[int, Array] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.images)

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
        record = self.images[index]
        letterbox = letterbox_of(record["width"], record["height"], self.size)
        if self.augmentation is None:
            image, boxes, classes = self._fitted(*self._load(index))
        else:
            rng = np.random.default_rng([self.seed, epoch, index])
            image, boxes, classes = self._augmented(index, rng, self.augmentation)
        targets = np.concatenate([classes[:, None].astype(np.float32), boxes], axis=1)
        pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        return Sample(pixels, torch.from_numpy(targets), record["id"], letterbox)

    def box_sizes(self) -> Tensor:
        """Widths and heights (M, 2), float32, of all target boxes as the network sees them: for choosing anchors."""
        sizes = [np.zeros((0, 2), dtype=np.float32)]
        for image, boxes in zip(self.images, self._boxes, strict=True):
            fitted = letterbox_of(image["width"], image["height"], self.size).to_input(boxes)
            sizes.append(fitted[:, 2:] - fitted[:, :2])
        return torch.from_numpy(np.concatenate(sizes))

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
            record = self.images[index]
            image = read_image(self.image_dir / record["file_name"])
            height, width = image.shape[:2]
            if (width, height) != (record["width"], record["height"]):
                raise ValueError(
                    f"{self.image_dir / record['file_name']}: the annotations expect {record['width']}x"
                    f"{record['height']} pixels (width x height), the file has {width}x{height}"
                )
            if self._cache is not None:
                self._cache[index] = image
        return image, self._boxes[index], self._classes[index]

    def _check_files(self, source: str) -> None:
        for image in self.images:
            _refuse_outside(image["file_name"], source)
        missing = [image["file_name"] for image in self.images if not (self.image_dir / image["file_name"]).is_file()]
        if missing:
            some = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            raise FileNotFoundError(
                f"image_dir: {len(missing)} of {len(self)} pictures not in {self.image_dir}: {some}"
            )

    def _clean(self, content: dict[str, Any], source: str) -> list[dict[str, Any]]:
        """The annotations of the pictures in use, boxes clipped, those without area left out; counts `problems`."""
        known = {image["id"] for image in content["images"]}
        used = {image["id"]: image for image in self.images}
        categories = set(self.category_ids)
        kept = []
        for annotation in content["annotations"]:
            if annotation["image_id"] not in known:
                raise ValueError(
                    f"{source}: annotation {annotation['id']} has unknown image_id {annotation['image_id']}"
                )
            if annotation["category_id"] not in categories:
                raise ValueError(
                    f"{source}: annotation {annotation['id']} has unknown category_id {annotation['category_id']}; "
                    f"the file's categories are {self.category_ids}"
                )
            image = used.get(annotation["image_id"])
            cleaned = self._clean_box(annotation, image) if image is not None else None
            if cleaned is not None:
                kept.append(cleaned)
        return kept

    def _clean_box(self, annotation: dict[str, Any], image: dict[str, Any]) -> dict[str, Any] | None:
        x, y, width, height = annotation["bbox"]
        if not all(math.isfinite(value) for value in (x, y, width, height)):
            self.problems["boxes that are not finite dropped"] += 1
            return None
        left, right = min(max(x, 0), image["width"]), max(min(x + width, image["width"]), 0)
        top, bottom = min(max(y, 0), image["height"]), max(min(y + height, image["height"]), 0)
        if right <= left or bottom <= top:
            self.problems["boxes without area in the picture dropped"] += 1
            return None
        cleaned = {**annotation, "iscrowd": int(annotation.get("iscrowd", 0))}
        # Half a pixel outside is rounding, common in real sets, and not worth a word.
        if max(left - x, top - y, x + width - right, y + height - bottom) > 0.5:
            self.problems["boxes clipped to their picture"] += 1
        if (left, top, right, bottom) != (x, y, x + width, y + height):
            cleaned["bbox"] = [left, top, right - left, bottom - top]
        cleaned.setdefault("area", cleaned["bbox"][2] * cleaned["bbox"][3])
        return cleaned

    def _targets(self) -> tuple[list[Array], list[Array]]:
        """Boxes (k, 4) float32 and classes (k,) int64 of each picture, in its own pixels, without crowds."""
        class_of = {category_id: index for index, category_id in enumerate(self.category_ids)}
        row_of = {image["id"]: row for row, image in enumerate(self.images)}
        boxes: list[list[list[float]]] = [[] for _ in self.images]
        classes: list[list[int]] = [[] for _ in self.images]
        for annotation in self.annotations:
            if not annotation["iscrowd"]:
                x, y, width, height = annotation["bbox"]
                boxes[row_of[annotation["image_id"]]].append([x, y, x + width, y + height])
                classes[row_of[annotation["image_id"]]].append(class_of[annotation["category_id"]])
        return (
            [np.array(rows, dtype=np.float32).reshape(-1, 4) for rows in boxes],
            [np.array(rows, dtype=np.int64) for rows in classes],
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


def _read_coco(path: Path) -> dict[str, Any]:
    """Parse a COCO file and check that what is used of it is there and unique."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"annotation_file: no such file: {path}") from None
    except ValueError as error:
        raise ValueError(f"annotation_file: {path} is not JSON: {error}") from None
    fields = {
        "images": ("id", "file_name", "width", "height"),
        "annotations": ("id", "image_id", "category_id", "bbox"),
        "categories": ("id", "name"),
    }
    for part, keys in fields.items():
        entries = content.get(part) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise ValueError(f"annotation_file: {path} has no list '{part}'; expected COCO detection JSON")
        for position, entry in enumerate(entries):
            absent = [key for key in keys if not isinstance(entry, dict) or key not in entry]
            if absent:
                raise ValueError(f"annotation_file: {path}: {part}[{position}] has no {', '.join(absent)}")
        if len({entry["id"] for entry in entries}) != len(entries):
            raise ValueError(f"annotation_file: {path}: ids in '{part}' are not unique")
    for position, image in enumerate(content["images"]):
        if not (_are_numbers([image["width"], image["height"]]) and min(image["width"], image["height"]) >= 1):
            raise ValueError(f"annotation_file: {path}: images[{position}]: expected width and height of at least 1")
    for position, annotation in enumerate(content["annotations"]):
        box = annotation["bbox"]
        if not (isinstance(box, list) and len(box) == 4 and _are_numbers(box)):
            raise ValueError(f"annotation_file: {path}: annotations[{position}]: expected 4 numbers in bbox, got {box}")
    if not content["images"]:
        raise ValueError(f"annotation_file: {path} lists no images")
    result: dict[str, Any] = content
    return result


def _are_numbers(values: list[Any]) -> bool:
    return all(isinstance(value, (int, float)) for value in values)


def _refuse_outside(file_name: str, source: str) -> None:
    """A file name comes from outside: it may not lead out of the image folder, on any system."""
    for path in (PurePosixPath(file_name), PureWindowsPath(file_name)):
        if not path.parts or path.is_absolute() or path.drive or path.root or ".." in path.parts:
            raise ValueError(
                f"{source}: file_name {file_name!r} leads out of the image folder; expected a path inside it"
            )
