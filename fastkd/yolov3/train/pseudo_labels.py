"""Pseudo-labels: the teacher's detections as the labels of images that have none."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fastkd.yolov3.data.annotations import Annotations, Array, from_rows
from fastkd.yolov3.data.dataset import DetectionDataset
from fastkd.yolov3.model import Detector
from fastkd.yolov3.train.evaluate import detect_all


def pseudo_labelled(
    images: Annotations,
    teacher: Detector,
    class_names: Sequence[str],
    *,
    size: int,
    least_score: float,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> Annotations:
    """Return the images with the teacher's detections as their boxes.

    The teacher sees each image once, without augmentation, in batches of 32; overlapping detections are suppressed as
    in the evaluation. Images in which it finds nothing count as background.

    Args:
        images: their boxes are not used.
        teacher: a detector of these classes, on ``device``.
        class_names: one per class.
        size: side in pixels of the square network input, a multiple of 32.
        least_score: detections of a lower score are left out.
        device: see ``detect_all``.
        progress: whether to show a progress bar if the output is a terminal.

    Raises:
        ValueError: the teacher finds nothing with this score, or what ``detect_all`` raises.
    """

    def with_boxes(table: Array) -> Annotations:  # see from_rows; it numbers images and classes from 1
        sizes = images.sizes.tolist()
        return from_rows(images.source, images.image_dir, images.file_names, sizes, class_names, table)

    data = DetectionDataset(with_boxes(np.zeros((0, 7))), None, size)
    detections = detect_all(teacher, data, device=device, score_threshold=least_score, progress=progress)
    found = [x for x in detections if min(x["bbox"][2:]) > 0]  # clipped to its image, a box may have no area left
    if not found:
        raise ValueError(
            f"pseudo_labels: expected a score that the teacher's detections reach, got {least_score:g}, which none "
            f"reaches in the {len(images)} images of {images.source}; take a lower one, or train the teacher longer"
        )
    return with_boxes(np.array([[x["image_id"] - 1, x["category_id"] - 1, *x["bbox"], 0] for x in found]))
