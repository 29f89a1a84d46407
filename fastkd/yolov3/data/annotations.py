"""``Annotations``: the images and boxes of a set in memory, read from any format, and the rules for faulty boxes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass
class Annotations:
    """A set of P images and M boxes, as arrays, which worker processes share; 100,000 images take about 100 MB.

    Args:
        source: the file or folder that was read, for messages.
        image_dir: the folder that file names are relative to.
        file_names: P names.
        image_ids: (P,) int64, as in the file, or 1, 2, ... if it has none.
        sizes: (P, 2) int64, width and height in pixels; 0 if the image could not be read.
        class_names: one per class, in the order of the class indices.
        category_ids: one per class, as in the file, or 1, 2, ... if it has none.
        boxes: (M, 4) float64 x, y, width, height in pixels of the image, as in the files, or as ``clean`` returns
            them; sorted by image, as ``rows``.
        rows: (M,) int64, ascending: index of the image of each box.
        classes: (M,) int64.
        crowd: (M,) bool: boxes that are no training targets, and count neither as hits nor as misses in evaluation.
        areas: (M,) float64, areas of the objects in pixels, for COCO's small, medium and large.
        problems: maps a description of what was left out or changed to the image name of each case; a name may be
            listed twice.
        notes: how the files were interpreted if they are ambiguous; whole sentences.
        unread: (P,) bool, or None: images that could not be decoded.
    """

    source: str
    image_dir: Path
    file_names: list[str]
    image_ids: Array
    sizes: Array
    class_names: list[str]
    category_ids: list[int]
    boxes: Array
    rows: Array
    classes: Array
    crowd: Array
    areas: Array
    problems: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    unread: Array | None = None

    def __len__(self) -> int:
        return len(self.file_names)

    def path(self, row: int) -> Path:
        """Return the file of an image."""
        return self.image_dir / self.file_names[row]

    def of(self, row: int) -> slice:
        """Return the slice of an image's boxes."""
        return slice(int(self._starts[row]), int(self._starts[row + 1]))

    @cached_property
    def _starts(self) -> Array:
        starts: Array = np.searchsorted(self.rows, np.arange(len(self) + 1))
        return starts

    def first(self, count: int | None) -> Annotations:
        """Return the first ``count`` images with their boxes; None: all."""
        if count is None or count >= len(self):
            return self
        return self.only(np.arange(len(self)) < count)

    def only(self, kept: Array) -> Annotations:
        """Return the images where ``kept``, (P,) bool, is True, with their boxes."""
        boxes = kept[self.rows]
        return replace(
            self._keeping(boxes),
            file_names=[self.file_names[row] for row in np.flatnonzero(kept)],
            image_ids=self.image_ids[kept],
            sizes=self.sizes[kept],
            rows=(np.cumsum(kept) - 1)[self.rows[boxes]],
            unread=None,
        )

    def once(self) -> Annotations:
        """Return each file once: boxes of its later entries are added to the first entry, unless they repeat a box."""
        places: dict[str, int] = {}
        first = np.array([places.setdefault(os.path.normpath(x), row) for row, x in enumerate(self.file_names)])
        kept = np.isin(np.arange(len(self)), first)
        if kept.all():
            return self
        order = np.argsort(first[self.rows], kind="stable")
        joined = replace(self._keeping(order), rows=first[self.rows][order])
        joined = joined._keeping(~(joined.repeated() & ~kept[self.rows][order]))
        again = [self.file_names[row] for row in np.flatnonzero(~kept)]
        return replace(
            joined.only(kept), problems={**self.problems, "repeated entries of an image joined with its first": again}
        )

    def repeated(self) -> Array:
        """Return (M,) bool: boxes with the same image, class and corners as an earlier box."""
        table = np.column_stack([self.rows, self.classes, self.boxes])
        order = np.lexsort(table.T[::-1])
        again = np.zeros(len(table), dtype=bool)
        again[order[1:]] = (table[order[1:]] == table[order[:-1]]).all(1)
        return again

    def _keeping(self, kept: Array) -> Annotations:
        """Return the set with these boxes only."""
        boxes, rows, classes, crowd, areas = (
            x[kept] for x in (self.boxes, self.rows, self.classes, self.crowd, self.areas)
        )
        return replace(self, boxes=boxes, rows=rows, classes=classes, crowd=crowd, areas=areas)

    def clean(self) -> Annotations:
        """Return the set for training: boxes are clipped to their images, and dropped if no area is left or not finite.

        ``problems`` lists the images of the boxes that were changed or dropped.
        """
        finite: Array = np.logical_and.reduce(np.isfinite(self.boxes), axis=1)
        boxes = self.boxes if finite.all() else np.where(finite[:, None], self.boxes, 0)
        limit = self.sizes[self.rows].astype(np.float64)
        low, high = boxes[:, :2].clip(0, limit), (boxes[:, :2] + boxes[:, 2:]).clip(0, limit)
        kept: Array = finite & (high > low).all(1)
        # boxes that reach out by at most half a pixel are common in real sets, by rounding, and are not reported
        outside = np.maximum(low - boxes[:, :2], boxes[:, :2] + boxes[:, 2:] - high).max(1, initial=0) > 0.5
        # a box inside its image keeps its exact numbers, as x + width - x would be rounded
        changed = (low != boxes[:, :2]) | (high != boxes[:, :2] + boxes[:, 2:])
        if changed.any():
            boxes = np.where(changed.any(1)[:, None], np.concatenate([low, high - low], 1), boxes)
        found = {
            "boxes that are not finite dropped": ~finite,
            "boxes without area in their image dropped": finite & ~kept,
            "boxes clipped to their image": kept & outside,
        }
        problems = self.problems | {what: self.names_of(which) for what, which in found.items() if which.any()}
        areas = np.where(np.isfinite(self.areas), self.areas, boxes[:, 2] * boxes[:, 3])
        cleaned = replace(self, boxes=boxes, areas=areas, problems=problems)
        return cleaned if kept.all() else cleaned._keeping(kept)

    def as_given(self) -> Annotations:
        """Return the set for evaluation: boxes as in the files, even if they reach outside their image.

        Boxes that are not finite or have no width or height are left out: no detection can match them. An object whose
        area the files do not give gets the area of its box.
        """
        has_area = self.boxes[:, 2:].min(1, initial=np.inf) > 0
        kept: Array = np.logical_and.reduce(np.isfinite(self.boxes), axis=1) & has_area
        with np.errstate(invalid="ignore"):
            areas = np.where(np.isfinite(self.areas), self.areas, self.boxes[:, 2] * self.boxes[:, 3])
        found = replace(self, areas=areas)
        return found if kept.all() else found._keeping(kept)

    def names_of(self, boxes: Array) -> list[str]:
        """Return the image name of each box where ``boxes``, (M,) bool, is True."""
        return [self.file_names[row] for row in self.rows[boxes].tolist()]

    def missing(self) -> list[str]:
        """Return the names of the images whose files do not exist."""
        return [name for name in self.file_names if not (self.image_dir / name).is_file()]

    def have_size(self) -> Array:
        """Return (P,) bool: False for images whose header could not be read, so that their size is unknown."""
        known: Array = np.logical_and.reduce(self.sizes > 0, axis=1)
        return known

    def coco(self, *, boxes: bool = True) -> dict[str, Any]:
        """Return the set as COCO JSON, with or without boxes; annotations are numbered from 1.

        Images that could not be decoded are left out: no detector has seen them.

        Raises:
            ValueError: no image could be decoded.
        """
        if self.unread is not None and self.unread.any():
            if self.unread.all():
                raise ValueError(f"{self.source}: none of the {len(self)} images could be read")
            return self.only(~self.unread).coco(boxes=boxes)
        images = [
            {"id": int(number), "file_name": name, "width": int(width), "height": int(height)}
            for number, name, (width, height) in zip(self.image_ids, self.file_names, self.sizes, strict=True)
        ]
        categories = [
            {"id": number, "name": name} for number, name in zip(self.category_ids, self.class_names, strict=True)
        ]
        ids, classes = self.image_ids[self.rows].tolist(), self.classes.tolist()
        columns = (self.boxes.tolist(), ids, classes, self.crowd.tolist(), self.areas.tolist())
        annotations = [
            {
                "id": number,
                "image_id": image_id,
                "category_id": self.category_ids[index],
                "bbox": box,
                "area": area,
                "iscrowd": int(crowd),
            }
            for number, (box, image_id, index, crowd, area) in enumerate(zip(*columns, strict=True), start=1)
        ]
        found = annotations if boxes else []
        return {"info": {}, "images": images, "annotations": found, "categories": categories}


def from_rows(
    source: str,
    image_dir: Path,
    file_names: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    class_names: Sequence[str],
    table: Array,
    notes: Sequence[str] = (),
) -> Annotations:
    """Return the annotations of a format without ids.

    Args:
        source, image_dir, file_names, sizes, class_names, notes: as for ``Annotations``.
        table: (M, 7) float64: index of the image, class, x, y, width, height, crowd.
    """
    return Annotations(
        source=source,
        image_dir=image_dir,
        file_names=list(file_names),
        image_ids=np.arange(1, len(file_names) + 1),
        sizes=np.array(sizes, dtype=np.int64).reshape(-1, 2),
        class_names=list(class_names),
        category_ids=list(range(1, len(class_names) + 1)),
        boxes=table[:, 2:6],
        rows=table[:, 0].astype(np.int64),
        classes=table[:, 1].astype(np.int64),
        crowd=table[:, 6] > 0,
        areas=np.full(len(table), np.nan),
        notes=list(notes),
    )


def some_of(names: Sequence[str], most: int = 5) -> str:
    """Return the first ``most`` different names, for a message."""
    different = list(dict.fromkeys(names))
    return ", ".join(different[:most]) + (", ..." if len(different) > most else "")


def refuse_outside(file_name: str, source: str) -> None:
    """Raise ``ValueError`` if a file name from an annotation file leads out of the image folder, on any system."""
    for path in (PurePosixPath(file_name), PureWindowsPath(file_name)):
        if not path.parts or path.is_absolute() or path.drive or path.root or ".." in path.parts:
            raise ValueError(
                f"{source}: file_name {file_name!r} leads out of the image folder; expected a path inside it"
            )
