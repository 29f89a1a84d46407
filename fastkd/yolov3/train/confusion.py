"""Which classes a detector takes for which."""

from __future__ import annotations

import numpy as np
from pycocotools import mask

from fastkd.yolov3.data.annotations import Annotations, Array
from fastkd.yolov3.data.dataset import DetectionDataset
from fastkd.yolov3.train.evaluate import Detection


def confusion_matrix(
    detections: list[Detection], dataset: DetectionDataset, *, score_threshold: float = 0.3, iou_threshold: float = 0.5
) -> Array:
    """How often a labelled box of one class was found as another: (K + 1, K + 1) int64, labels by detections.

    The last column counts labelled boxes that were not found, the last row detections where nothing is labelled. In
    each image, pairs of a labelled box and a detection, whatever their classes, are matched from the largest IoU down,
    each at most once. Detections in a crowd that match nothing are left out, and so are images that can't be read.

    Args:
        detections: COCO results, as ``detect_all`` returns them.
        dataset: whose ``truth`` they are compared with.
        score_threshold: least score of a detection that counts.
        iou_threshold: least IoU of a pair.
    """
    truth = dataset.truth
    index = {category: i for i, category in enumerate(truth.category_ids)}
    by_image: dict[int, list[Detection]] = {}
    for found in detections:
        if found["score"] >= score_threshold:
            by_image.setdefault(found["image_id"], []).append(found)
    background = len(index)
    counts = np.zeros((background + 1, background + 1), np.int64)
    for row, image_id in enumerate(truth.image_ids.tolist()):
        if truth.unread is not None and truth.unread[row]:
            continue
        here = sorted(by_image.get(image_id, []), key=lambda found: -found["score"])
        labels, found_as = _pairs(here, truth, row, index, iou_threshold)
        np.add.at(counts, (labels, found_as), 1)
    return counts


def _pairs(
    found: list[Detection], truth: Annotations, row: int, index: dict[int, int], least: float
) -> tuple[list[int], list[int]]:
    """Class of the label and of the detection of each match, miss and false find in one image."""
    of, background = truth.of(row), len(index)
    boxes, classes, crowd = truth.boxes[of], truth.classes[of].tolist(), truth.crowd[of].astype(bool)
    found_classes = [index[x["category_id"]] for x in found]
    overlaps = np.zeros((len(found), len(boxes)))
    if overlaps.size:
        overlaps = mask.iou(np.array([x["bbox"] for x in found], float), boxes.astype(float), crowd.astype(np.uint8))
    single = np.where(crowd, 0.0, overlaps)
    candidates = np.argwhere(single >= least)
    order = np.argsort(-single[tuple(candidates.T)], kind="stable")  # of equal IoUs the better score first
    label_of: dict[int, int] = {}
    matched: set[int] = set()  # labels
    for detection, label in candidates[order].tolist():
        if detection not in label_of and label not in matched:
            label_of[detection] = label
            matched.add(label)
    in_crowd: Array = np.where(crowd, overlaps, 0.0).max(1, initial=0) >= least
    labels, found_as = [], []
    for detection, found_class in enumerate(found_classes):
        if detection in label_of or not in_crowd[detection]:
            labels.append(classes[label_of[detection]] if detection in label_of else background)
            found_as.append(found_class)
    missed = [classes[i] for i in np.flatnonzero(~crowd).tolist() if i not in matched]
    return [*labels, *missed], [*found_as, *[background] * len(missed)]
