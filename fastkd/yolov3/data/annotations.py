"""``Annotations``: images and boxes of a set in memory, whatever format they came in; and the rules for faults."""

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
    """A set of P images and M boxes, as arrays: 100,000 images take some 100 MB, and workers share them.

    Args:
        source: where they come from, for messages.
        image_dir: the folder that file names are relative to.
        file_names: P names.
        image_ids: (P,) int64, as in the file, or 1, 2, ... where it has none.
        sizes: (P, 2) int64, width and height in pixels; 0 where the image could not be read.
        class_names: one a class, in the order of the class indices.
        category_ids: one a class, as in the file, or 1, 2, ... where it has none.
        boxes: (M, 4) float64 x, y, width, height in pixels of the image, as in the files, or as ``clean`` left them;
            image by image in ``rows``' order.
        rows: (M,) int64, ascending: the image of each box.
        classes: (M,) int64.
        crowd: (M,) bool: not a training target, and neither a hit nor a miss in evaluation.
        areas: (M,) float64 of the objects in pixels, for COCO's small, medium and large.
        problems: what was left out or changed, to the name of the image of each case: a name may be there twice.
        notes: how the files were understood, where they leave it open; whole sentences.
        unread: (P,) bool, or None: images that were found to be unreadable when they were decoded.
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
        """The file of an image."""
        return self.image_dir / self.file_names[row]

    def of(self, row: int) -> slice:
        """Where an image's boxes are."""
        return slice(int(self._starts[row]), int(self._starts[row + 1]))

    @cached_property
    def _starts(self) -> Array:
        starts: Array = np.searchsorted(self.rows, np.arange(len(self) + 1))
        return starts

    def first(self, count: int | None) -> Annotations:
        """The first ``count`` images, or all, with their boxes."""
        if count is None or count >= len(self):
            return self
        return self.only(np.arange(len(self)) < count)

    def only(self, kept: Array) -> Annotations:
        """The images that ``kept`` (P,) bool marks, with their boxes."""
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
        """Each file once: the boxes of its later entries go to the first one, except those that repeat a box."""
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
        """(M,) bool: boxes that have image, class and corners of an earlier one."""
        table = np.column_stack([self.rows, self.classes, self.boxes])
        order = np.lexsort(table.T[::-1])
        again = np.zeros(len(table), dtype=bool)
        again[order[1:]] = (table[order[1:]] == table[order[:-1]]).all(1)
        return again

    def _keeping(self, kept: Array) -> Annotations:
        """With these boxes alone."""
        boxes, rows, classes, crowd, areas = (
            x[kept] for x in (self.boxes, self.rows, self.classes, self.crowd, self.areas)
        )
        return replace(self, boxes=boxes, rows=rows, classes=classes, crowd=crowd, areas=areas)

    def clean(self) -> Annotations:
        """For training: boxes clipped to their images; those without area there, or not finite, left out.

        ``problems`` tells how many, and where.
        """
        finite: Array = np.logical_and.reduce(np.isfinite(self.boxes), axis=1)
        boxes = self.boxes if finite.all() else np.where(finite[:, None], self.boxes, 0)
        limit = self.sizes[self.rows].astype(np.float64)
        low, high = boxes[:, :2].clip(0, limit), (boxes[:, :2] + boxes[:, 2:]).clip(0, limit)
        kept: Array = finite & (high > low).all(1)
        # half a pixel outside is rounding, common in real sets, and not worth a word
        outside = np.maximum(low - boxes[:, :2], boxes[:, :2] + boxes[:, 2:] - high).max(1, initial=0) > 0.5
        # a box inside keeps its own numbers: x + width - x rounds
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
        """Boxes as in the files, also where they reach outside their image: for evaluation.

        Left out are those that are not finite or have no width or height, which no detection can match. Areas that the
        files do not give are those of the boxes.
        """
        has_area = self.boxes[:, 2:].min(1, initial=np.inf) > 0
        kept: Array = np.logical_and.reduce(np.isfinite(self.boxes), axis=1) & has_area
        with np.errstate(invalid="ignore"):
            areas = np.where(np.isfinite(self.areas), self.areas, self.boxes[:, 2] * self.boxes[:, 3])
        found = replace(self, areas=areas)
        return found if kept.all() else found._keeping(kept)

    def names_of(self, boxes: Array) -> list[str]:
        """The image's name of each of these boxes, given as (M,) bool."""
        return [self.file_names[row] for row in self.rows[boxes].tolist()]

    def missing(self) -> list[str]:
        """Names of the images that are not there."""
        return [name for name in self.file_names if not (self.image_dir / name).is_file()]

    def have_size(self) -> Array:
        """(P,) bool: images whose size is known; of the others the header could not be read."""
        known: Array = np.logical_and.reduce(self.sizes > 0, axis=1)
        return known

    def coco(self, *, boxes: bool = True) -> dict[str, Any]:
        """The set as COCO JSON has it, without boxes if so asked. Annotations are numbered from 1.

        Images that were found to be unreadable are left out: no detector has seen them.
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
    """Of formats without ids. ``table``: (M, 7) float64, image's row, class, x, y, width, height, crowd."""
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
    """The first names, each once, for a message."""
    different = list(dict.fromkeys(names))
    return ", ".join(different[:most]) + (", ..." if len(different) > most else "")


def refuse_outside(file_name: str, source: str) -> None:
    """A file name comes from outside: it may not lead out of the image folder, on any system."""
    for path in (PurePosixPath(file_name), PureWindowsPath(file_name)):
        if not path.parts or path.is_absolute() or path.drive or path.root or ".." in path.parts:
            raise ValueError(
                f"{source}: file_name {file_name!r} leads out of the image folder; expected a path inside it"
            )
