"""COCO metrics of a detector on a data set, computed by pycocotools."""

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
    """COCO's average precisions, 0..1, with at most 100 detections per image.

    A value is None if the set has no box of that size or class.
    """

    mAP: float  # noqa: N815  (the usual name; mean over IoU 0.5, 0.55, ..., 0.95)
    AP50: float
    AP75: float
    AP_small: float | None  # boxes of up to 32x32 pixels
    AP_medium: float | None  # up to 96x96
    AP_large: float | None  # larger
    AR100: float  # average recall
    per_class: dict[str, float | None]  # mAP of each class, by name

    def as_dict(self) -> dict[str, Any]:
        """Return the values by name, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return f"mAP {100 * self.mAP:.1f}  AP50 {100 * self.AP50:.1f}  AP75 {100 * self.AP75:.1f}"


def evaluate(
    model: nn.Module,
    dataset: DetectionDataset,
    *,
    batch_size: int = 32,
    workers: int = 0,
    progress: bool = False,
    detections_file: str | os.PathLike[str] | None = None,
) -> Metrics:
    """Run a detector over a data set and score it with pycocotools.

    For other thresholds or another device, call ``score(detect_all(...), dataset)``.

    Args:
        model, dataset, batch_size, workers, progress: as for ``detect_all``.
        detections_file: COCO results file to write the detections to; None: no file.

    Raises:
        ValueError: no readable image has a box to find, or what ``detect_all`` raises.
    """
    detections = detect_all(model, dataset, batch_size=batch_size, workers=workers, progress=progress)
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
    """Return the detections on every image as COCO results, with boxes in pixels of the original images.

    The model runs in eval mode; the mode of every module is restored afterwards.

    Args:
        model: a detector that returns raw head maps and has `anchors`, `strides` and `num_classes`, not wrapped; or an
            ``OnnxDetector``.
        dataset: a data set without augmentation.
        batch_size: images per step.
        device: the device of the images; None: the device of the model's parameters. The model is not moved.
        score_threshold: minimum score of a detection; it is low, because the metric integrates over all scores.
        iou_threshold: threshold of the non-maximum suppression.
        workers: number of processes that load images.
        progress: whether to show a progress bar if the output is a terminal.

    Raises:
        ValueError: the data set augments or has another number of classes, or the model is wrapped.
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
    """Score COCO results against the boxes of a data set, as pycocotools does with its annotation file.

    The boxes are those of the files: a box that reaches outside its image is not clipped, although a detection is.
    Crowds are ignored, as in COCO; boxes without width or height are left out.

    Args:
        detections: one entry per box: ``image_id``, ``category_id``, ``bbox`` (x, y, width, height in pixels of the
            original image) and ``score``.
        dataset: the data set, of which ``truth`` is used.

    Raises:
        ValueError: no readable image has a box to find.
    """
    return metrics_of(coco_evaluation(detections, dataset), dataset.class_names)


def coco_evaluation(detections: list[Detection], dataset: DetectionDataset) -> COCOeval:
    """pycocotools' evaluation of COCO results, accumulated and summed up. Arguments and errors as of ``score``."""
    annotations = dataset.truth
    if annotations.crowd.all():
        raise ValueError("dataset: expected boxes to find, got none, so there is nothing to score")
    if annotations.unread is not None and (annotations.crowd | annotations.unread[annotations.rows]).all():
        raise ValueError("dataset: expected readable images with boxes, got none, so there is nothing to score")
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        truth = _coco(annotations)
        found = truth.loadRes(detections) if detections else _coco(annotations, boxes=False)
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def metrics_of(evaluation: COCOeval, class_names: Sequence[str]) -> Metrics:
    """The metrics of pycocotools' evaluation of a set with these classes."""
    # precision: (IoU thresholds, recalls, classes, areas, detection limits); -1 for a class without boxes
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
        per_class={name: _defined(float(precision[:, :, i].mean())) for i, name in enumerate(class_names)},
    )


def write_detections(detections: list[Detection], path: str | os.PathLike[str]) -> None:
    """Write COCO results as JSON, atomically."""
    with replacing(path) as part:
        part.write_text(json.dumps(detections), encoding="utf-8")


def _coco(annotations: Annotations, *, boxes: bool = True) -> COCO:
    coco = COCO()
    coco.dataset = annotations.coco(boxes=boxes)
    coco.createIndex()
    return coco


def _defined(value: float) -> float | None:
    """Return a metric, or None for the -1 that pycocotools returns if there is nothing to average."""
    return None if value < 0 else value
