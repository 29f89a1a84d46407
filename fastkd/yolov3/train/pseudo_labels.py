"""Pseudo-labels: the teacher's detections as the labels of images that have none."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastkd.yolov3.data.annotations import Annotations, from_rows
from fastkd.yolov3.data.dataset import DetectionDataset
from fastkd.yolov3.model import Detector
from fastkd.yolov3.train.evaluate import detect_all

PSEUDO_LABELS = "pseudo_labels.json"  # in the folder of a run
LEAST_SIDE = 1.0  # pixels; the size of a smaller box, for example one that is cut off by its image, can't be learnt


def pseudo_labels(
    data: DetectionDataset,
    teacher: Detector,
    class_names: Sequence[str],
    *,
    score_threshold: float,
    batch_size: int = 32,
    workers: int = 0,
) -> Annotations:
    """Return the images of a data set with the teacher's detections as their boxes.

    The teacher sees each image once, without augmentation; overlapping detections are suppressed as in the evaluation.
    Images in which it finds nothing count as background.

    Args:
        data: its boxes are not used.
        teacher: a detector of these classes, which computes on the device of its parameters.
        class_names: one per class.
        score_threshold: least score of a detection.
        batch_size, workers: see ``detect_all``.

    Raises:
        ValueError: the teacher finds nothing with this score, or what ``detect_all`` raises.
    """
    given, rows = data.annotations, np.zeros((0, 7))
    sizes = given.sizes.tolist()
    images = from_rows(given.source, given.image_dir, given.file_names, sizes, class_names, rows)
    found = detect_all(
        teacher,
        DetectionDataset(images, None, data.size),
        batch_size=batch_size,
        score_threshold=score_threshold,
        workers=workers,
        progress=True,
    )
    kept = [x for x in found if min(x["bbox"][2:]) >= LEAST_SIDE]
    if not kept:
        raise ValueError(
            f"pseudo_labels: expected a score that the teacher's detections reach, got {score_threshold:g}, which none "
            f"reaches in the images of {given.source} that can be read; take a lower one, or train the teacher longer"
        )
    # images and classes are numbered from 1 there
    rows = np.array([[x["image_id"] - 1, x["category_id"] - 1, *x["bbox"], 0] for x in kept])
    return from_rows(given.source, given.image_dir, given.file_names, sizes, class_names, rows)
