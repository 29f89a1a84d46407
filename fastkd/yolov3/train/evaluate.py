"""COCO metrics of a detector on a data set, by pycocotools."""

import contextlib
import io
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from fastkd.files import replacing
from fastkd.modes import eval_mode
from fastkd.yolov3.anchors import Heads
from fastkd.yolov3.boxes import Detections, detect
from fastkd.yolov3.data.annotations import Annotations
from fastkd.yolov3.data.dataset import DetectionDataset, collate

Detection = dict[str, Any]  # one entry of a COCO results file: image_id, category_id, bbox (x, y, w, h), score


@dataclass(frozen=True)
class Metrics:
    """COCO's average precisions, 0..1, at most 100 detections an image.

    A value that the set cannot give (it has no box of that size or class) is None.
    """

    mAP: float  # noqa: N815  (the field's name; over IoU 0.5, 0.55, ..., 0.95)
    AP50: float
    AP75: float
    AP_small: float | None  # boxes of up to 32x32 pixels
    AP_medium: float | None  # up to 96x96
    AP_large: float | None  # larger
    AR100: float  # average recall
    per_class: dict[str, float | None]  # mAP of each class, by name

    def as_dict(self) -> dict[str, Any]:
        """The values by name, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return f"mAP {100 * self.mAP:.1f}  AP50 {100 * self.AP50:.1f}  AP75 {100 * self.AP75:.1f}"


def evaluate(
    model: nn.Module,
    dataset: DetectionDataset,
    *,
    batch_size: int = 32,
    device: torch.device | str | None = None,
    score_threshold: float = 0.001,
    iou_threshold: float = 0.5,
    workers: int = 0,
    progress: bool = False,
    detections_file: str | os.PathLike[str] | None = None,
) -> Metrics:
    """Run a detector over a data set and score it with pycocotools.

    Args:
        model: a detector that returns raw head maps and has `anchors` and `strides`, not wrapped; or an `OnnxDetector`.
        dataset: without augmentation.
        batch_size: images per step.
        device: where to run; None: where the model's parameters are. The model is not moved.
        score_threshold: detections below it are left out; low, because the metric integrates over all scores.
        iou_threshold: of the non-maximum suppression.
        workers: processes that load images.
        progress: whether to show a bar, where the output is a terminal.
        detections_file: where to keep the detections as a COCO results file; None: nowhere.

    Raises:
        ValueError: the data set augments, or no image that could be read has a box to find, or the model is wrapped.
    """
    detections = detect_all(
        model,
        dataset,
        batch_size=batch_size,
        device=device,
        score_threshold=score_threshold,
        iou_threshold=iou_threshold,
        workers=workers,
        progress=progress,
    )
    if detections_file is not None:
        write_detections(detections, detections_file)
    return score(detections, dataset)


def detect_all(
    model: nn.Module,
    dataset: DetectionDataset,
    *,
    batch_size: int = 32,
    device: torch.device | str | None = None,
    score_threshold: float = 0.001,
    iou_threshold: float = 0.5,
    workers: int = 0,
    progress: bool = False,
) -> list[Detection]:
    """The detections on every image as COCO results: boxes in pixels of the original images.

    The model runs in eval mode; every module's own mode is put back afterwards.
    """
    if dataset.augmentation is not None:
        raise ValueError("dataset: expected one without augmentation; build it with augmentation=None")
    for attribute in ("anchors", "strides", "num_classes"):
        if not hasattr(model, attribute):
            raise ValueError(
                f"model: expected a detector with {attribute}, got {type(model).__name__}; unwrap it first"
            )
    if model.num_classes != dataset.num_classes:
        raise ValueError(f"model: expected the data set's {dataset.num_classes} classes, got {model.num_classes}")
    if device is None:
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    loader = DataLoader(dataset, batch_size=batch_size, num_workers=workers, collate_fn=collate)
    results: list[Detection] = []
    with eval_mode(model), torch.inference_mode():
        for batch in tqdm(loader, unit="step", leave=False, disable=None if progress else True):
            outputs = model(batch.images.to(device))
            found = detect(outputs, cast(Heads, model), score_threshold=score_threshold, iou_threshold=iou_threshold)
            for image_id, letterbox, detections in zip(batch.image_ids, batch.letterboxes, found, strict=True):
                boxes = letterbox.to_original(detections.boxes.double().cpu().numpy())
                results += coco_results(image_id, detections, boxes, dataset.annotations.category_ids)
    return results


def coco_results(
    image_id: int | str, found: Detections, boxes: npt.NDArray[np.floating], category_ids: Sequence[int]
) -> list[Detection]:
    """What was found in one image, as COCO results; ``boxes`` are (k, 4) x1, y1, x2, y2 in the image's own pixels."""
    boxes = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)
    columns = zip(found.classes.tolist(), boxes.tolist(), found.scores.tolist(), strict=True)
    return [
        {"image_id": image_id, "category_id": category_ids[index], "bbox": box, "score": value}
        for index, box, value in columns
    ]


def score(detections: list[Detection], dataset: DetectionDataset) -> Metrics:
    """Score COCO results against a data set's boxes, as pycocotools does with its annotation file.

    The boxes are those of the files: one that reaches outside its image is not clipped, though a detection is. Crowds
    are ignored, as COCO does; boxes without width or height are left out.

    Args:
        detections: one a box: ``image_id``, ``category_id``, ``bbox`` (x, y, width, height in pixels of the original
            image) and ``score``.
        dataset: whose ``truth`` they are scored against.

    Raises:
        ValueError: no image that could be read has a box to find.
    """
    annotations = dataset.truth
    if annotations.crowd.all():
        raise ValueError("dataset: it has no box to find, so there is nothing to score")
    if annotations.unread is not None and (annotations.crowd | annotations.unread[annotations.rows]).all():
        raise ValueError("dataset: no image that could be read has a box to find, so there is nothing to score")
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        truth = _coco(annotations)
        found = truth.loadRes(detections) if detections else _coco(annotations, boxes=False)
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    # precision: (IoU thresholds, recalls, classes, areas, detection limits); -1 where a class has no box
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    ap, ap50, ap75, small, medium, large, _, _, recall = evaluation.stats[:9].tolist()
    return Metrics(
        mAP=ap,
        AP50=ap50,
        AP75=ap75,
        AP_small=_defined(small),
        AP_medium=_defined(medium),
        AP_large=_defined(large),
        AR100=recall,
        per_class={name: _defined(float(precision[:, :, i].mean())) for i, name in enumerate(dataset.class_names)},
    )


def write_detections(detections: list[Detection], path: str | os.PathLike[str]) -> None:
    """Write COCO results as JSON, whole or not at all."""
    with replacing(path) as part:
        part.write_text(json.dumps(detections), encoding="utf-8")


def _coco(annotations: Annotations, *, boxes: bool = True) -> COCO:
    coco = COCO()
    coco.dataset = annotations.coco(boxes=boxes)
    coco.createIndex()
    return coco


def _defined(value: float) -> float | None:
    """pycocotools says -1 where there is nothing to average."""
    return None if value < 0 else value
