"""``Annotations``: pictures and boxes of a set in memory, whatever format they came in; and the rules for faults."""

from __future__ import annotations

from array import array
from collections import Counter
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
    """A set of P pictures and M boxes, as arrays: 100,000 pictures take some 100 MB, and workers share them.

    Args:
        source: where they come from, for messages.
        image_dir: the folder that file names are relative to.
        file_names: P names.
        image_ids: (P,) int64, as in the file, or 1, 2, ... where it has none.
        sizes: (P, 2) int64, width and height in pixels; 0 where the picture could not be read.
        class_names: one a class, in the order of the class indices.
        category_ids: one a class, as in the file, or 1, 2, ... where it has none.
        boxes: (M, 4) float64 x, y, width, height in pixels of the picture; picture by picture in ``rows``' order.
        rows: (M,) int64, ascending: the picture of each box.
        classes: (M,) int64.
        crowd: (M,) bool: not a training target, and neither a hit nor a miss in evaluation.
        areas: (M,) float64 of the objects in pixels, for COCO's small, medium and large.
        problems: what was dropped or clipped, and how often.
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
    problems: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.file_names)

    def path(self, row: int) -> Path:
        """The file of a picture."""
        return self.image_dir / self.file_names[row]

    def of(self, row: int) -> slice:
        """Where a picture's boxes are."""
        return slice(int(self._starts[row]), int(self._starts[row + 1]))

    @cached_property
    def _starts(self) -> Array:
        starts: Array = np.searchsorted(self.rows, np.arange(len(self) + 1))
        return starts

    def first(self, count: int | None) -> Annotations:
        """The first ``count`` pictures, or all, with their boxes."""
        if count is None or count >= len(self):
            return self
        kept: Array = np.less(self.rows, count)
        return replace(
            self._keeping(kept),
            file_names=self.file_names[:count],
            image_ids=self.image_ids[:count],
            sizes=self.sizes[:count],
        )

    def _keeping(self, kept: Array) -> Annotations:
        """With these boxes alone."""
        boxes, rows, classes, crowd, areas = (
            x[kept] for x in (self.boxes, self.rows, self.classes, self.crowd, self.areas)
        )
        return replace(self, boxes=boxes, rows=rows, classes=classes, crowd=crowd, areas=areas)

    def clean(self) -> Annotations:
        """Boxes clipped to their pictures; those without area there, or not finite, left out; ``problems`` counted."""
        finite: Array = np.logical_and.reduce(np.isfinite(self.boxes), axis=1)
        boxes = np.where(finite[:, None], self.boxes, 0)
        limit = self.sizes[self.rows].astype(np.float64)
        low, high = boxes[:, :2].clip(0, limit), (boxes[:, :2] + boxes[:, 2:]).clip(0, limit)
        kept: Array = finite & (high > low).all(1)
        # half a pixel outside is rounding, common in real sets, and not worth a word
        outside = np.maximum(low - boxes[:, :2], boxes[:, :2] + boxes[:, 2:] - high).max(1, initial=0) > 0.5
        # a box inside keeps its own numbers: x + width - x rounds
        changed = (low != boxes[:, :2]) | (high != boxes[:, :2] + boxes[:, 2:])
        boxes = np.where(changed.any(1)[:, None], np.concatenate([low, high - low], 1), boxes)
        problems = Counter(
            {
                "boxes that are not finite dropped": int((~finite).sum()),
                "boxes without area in the picture dropped": int((finite & ~kept).sum()),
                "boxes clipped to their picture": int((kept & outside).sum()),
            }
        )
        areas = np.where(np.isnan(self.areas), boxes[:, 2] * boxes[:, 3], self.areas)
        return replace(self, boxes=boxes, areas=areas, problems=+problems)._keeping(kept)

    def missing(self) -> list[str]:
        """Names of the pictures that are not there."""
        return [name for name in self.file_names if not (self.image_dir / name).is_file()]

    def unreadable(self) -> list[str]:
        """Names of the pictures that are there but have no size."""
        rows = np.flatnonzero((self.sizes < 1).any(1)).tolist()
        return [self.file_names[row] for row in rows if self.path(row).is_file()]

    def coco(self, *, boxes: bool = True) -> dict[str, Any]:
        """The set as COCO JSON has it, without boxes if so asked. Annotations are numbered from 1."""
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
    objects: array[float],
) -> Annotations:
    """Of formats without ids. ``objects``: seven doubles each, picture's row, class, x, y, width, height, crowd."""
    table = np.frombuffer(objects).reshape(-1, 7)
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
    )


def refuse_outside(file_name: str, source: str) -> None:
    """A file name comes from outside: it may not lead out of the image folder, on any system."""
    for path in (PurePosixPath(file_name), PureWindowsPath(file_name)):
        if not path.parts or path.is_absolute() or path.drive or path.root or ".." in path.parts:
            raise ValueError(
                f"{source}: file_name {file_name!r} leads out of the image folder; expected a path inside it"
            )
