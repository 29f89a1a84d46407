"""Tables of a run: its log as ``results.csv``, and the average precision of each class."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.cocoeval import COCOeval

from fastkd.files import replacing
from fastkd.yolov3.train.log import read_log

SIZES = ("small", "medium", "large")  # as COCO has them, in this order in pycocotools too
ALL = "all"


def write_results(log: Path, file: Path) -> None:
    """Write ``metrics.jsonl`` as CSV: one row per step that was logged, with the metrics of an evaluation after it."""
    rows: dict[int, dict[str, Any]] = {}
    for entry in read_log(log):
        values = entry.get("metrics", entry)
        row = rows.setdefault(entry["step"], {"step": entry["step"]})
        row.update({name: value for name, value in values.items() if not isinstance(value, Mapping)})
    write_csv(file, list(rows.values()))


def precision_table(evaluation: COCOeval, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """Average precision, 0..1, of every class and, last, their means (``all``), as COCO has them.

    A row is ``{"class", "boxes", "mAP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"}``; None where there is no
    box of that class or size.
    """
    # (IoU thresholds, recalls, classes, areas, detection limits); -1 where a class has no box
    precision = evaluation.eval["precision"][..., -1]
    thresholds = evaluation.params.iouThrs
    at = {"AP50": int(np.abs(thresholds - 0.5).argmin()), "AP75": int(np.abs(thresholds - 0.75).argmin())}
    truth = evaluation.cocoGt

    def row(name: str, of: slice, boxes: int) -> dict[str, Any]:
        parts = {"mAP": precision[:, :, of, 0]} | {x: precision[i, :, of, 0] for x, i in at.items()}
        parts |= {f"AP_{size}": precision[:, :, of, i + 1] for i, size in enumerate(SIZES)}
        return {"class": name, "boxes": boxes, **{x: _mean(values) for x, values in parts.items()}}

    categories = zip(class_names, evaluation.params.catIds, strict=True)
    counts = [len(truth.getAnnIds(catIds=[category], iscrowd=False)) for _, category in categories]
    rows = [row(name, slice(i, i + 1), counts[i]) for i, name in enumerate(class_names)]
    return [*rows, row(ALL, slice(None), sum(counts))]


def write_csv(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as CSV, whole or not at all; the columns are those of all rows, empty where a row has no value."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with replacing(file) as part, part.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        writer.writerows(rows)


def _mean(values: Any) -> float | None:
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else None
