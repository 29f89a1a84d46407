"""The training loss of YOLOv3, without loops over boxes or images and without host synchronisation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastkd.yolov3.anchors import Heads, size_iou
from fastkd.yolov3.boxes import box_iou, check_outputs, decode_head, head_cells, widen

TERMS = ("box", "objectness", "class")


class DetectionLoss(nn.Module):
    """YOLOv3's loss (Redmon & Farhadi 2018, arXiv:1804.02767, section 2), summed over cells, averaged over images.

    A labelled box is assigned to the anchor of all heads whose size has the best IoU with its own, in the cell that
    contains its centre. That prediction is trained on the box, on the class (binary cross-entropy per class) and on an
    objectness of 1. All other predictions are trained on an objectness of 0, except those whose box overlaps a labelled
    box by more than ``ignore_threshold``: they have no objectness loss. The box term is that of Darknet: (2 - relative
    area) times the sum of the cross-entropy of the centre within its cell and half the squared error of log width and
    log height. In trainings of a few hundred steps it gave better detectors than 1 - CIoU (arXiv:1911.08287). The loss
    is computed in float32 or wider, also under autocast.

    Args:
        heads: the detector, or a ``HeadLayout``: anchors, strides, num_classes.
        ignore_threshold: IoU in (0, 1]; 0.5 in the paper, 0.7 in yolov3.cfg.
        match_threshold: IoU in (0, 1]; a box is also assigned to every anchor whose size has a larger IoU with its own
            (Darknet's ``iou_thresh``). 1: to the best anchor alone, as in the paper; short trainings then learn the
            classes much more slowly.
        box_weight, objectness_weight, class_weight: factors of the three terms, finite and >= 0.

    Raises:
        ValueError: a threshold or weight is out of range.
    """

    anchors: Tensor
    weights: Tensor

    def __init__(
        self,
        heads: Heads,
        *,
        ignore_threshold: float = 0.5,
        match_threshold: float = 0.5,
        box_weight: float = 1.0,
        objectness_weight: float = 1.0,
        class_weight: float = 1.0,
    ) -> None:
        super().__init__()
        for name, threshold in (("ignore_threshold", ignore_threshold), ("match_threshold", match_threshold)):
            if not 0 < threshold <= 1:
                raise ValueError(f"{name}: expected an IoU in (0, 1], got {threshold}")
        weights = (box_weight, objectness_weight, class_weight)
        for name, weight in zip(TERMS, weights, strict=True):
            if not 0 <= weight < math.inf:
                raise ValueError(f"{name}_weight: expected a finite number >= 0, got {weight}")
        self.ignore_threshold = ignore_threshold
        self.match_threshold = match_threshold
        self.strides = tuple(heads.strides)
        self.num_classes = heads.num_classes
        self.register_buffer("weights", torch.tensor(weights), persistent=False)
        self.register_buffer("anchors", heads.anchors.detach().clone(), persistent=False)

    def forward(self, outputs: Sequence[Tensor], targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a batch and its terms.

        Args:
            outputs: one raw head map per stride, (N, A * (5 + K), H / stride, W / stride).
            targets: (M, 6) float: index of the image in the batch, class index, x1, y1, x2, y2 in pixels of the
                network's input. M may be 0, and images may have no box. Indices are checked on the CPU only, where
                the check needs no synchronisation.

        Returns:
            The weighted sum, a scalar to differentiate, and its terms ``{"box", "objectness", "class"}``,
            weighted and detached.

        Raises:
            ValueError: the outputs do not fit the anchors, or targets have another shape or unknown indices.
        """
        check_outputs(outputs, self.anchors, self.strides, self.num_classes)
        _check_targets(targets, outputs[0].shape[0], self.num_classes)
        device = outputs[0].device
        if self.anchors.device != device:
            self.to(device)
        with torch.autocast(device.type, enabled=False):
            outputs = [widen(output) for output in outputs]
            targets = targets.to(outputs[0])
            owned = self._owned(targets)
            per_head = [self._head_terms(i, output, targets, owned[:, i]) for i, output in enumerate(outputs)]
            terms = torch.stack(per_head).sum(0) * self.weights / max(len(outputs[0]), 1)
        return terms.sum(), dict(zip(TERMS, terms.detach(), strict=True))

    def _owned(self, targets: Tensor) -> Tensor:
        """Return (M, heads, A): 1 where a box is assigned to an anchor, else 0."""
        sizes = targets[:, 4:6] - targets[:, 2:4]
        fit = size_iou(sizes, self.anchors.to(targets).flatten(0, 1))
        best = F.one_hot(fit.argmax(1), fit.shape[1]) > 0
        return (best | (fit > self.match_threshold)).to(targets).view(-1, *self.anchors.shape[:2])

    def _head_terms(self, level: int, output: Tensor, targets: Tensor, owned: Tensor) -> Tensor:
        """Return the box, objectness and class terms (3,) of one head.

        Every box is paired with every anchor of its cell, (M, A) pairs weighted by ``owned``: these shapes do not
        depend on values, so the host never waits for the device.
        """
        stride, anchors = self.strides[level], self.anchors[level].to(output)
        cells = head_cells(output, len(anchors))
        at, within = _place(targets, stride, cells.shape[2:4])
        raw = cells[at[:, 0, None], torch.arange(len(anchors), device=at.device), at[:, 1, None], at[:, 2, None]]
        wh = (targets[:, 4:6] - targets[:, 2:4]).clamp(min=1e-3)
        area = wh.prod(1) / (output.shape[2] * output.shape[3] * stride**2)
        centre = F.binary_cross_entropy_with_logits(
            raw[..., :2], within[:, None].expand_as(raw[..., :2]), reduction="none"
        )
        size = (raw[..., 2:4] - (wh[:, None] / anchors).log()).square() / 2
        box = (owned * (2 - area)[:, None] * (centre + size).sum(-1)).sum()
        is_class = (targets[:, 1:2] == torch.arange(self.num_classes, device=targets.device)).to(raw)
        of_class = F.binary_cross_entropy_with_logits(
            raw[..., 5:], is_class[:, None].expand_as(raw[..., 5:]), reduction="none"
        )
        found = torch.zeros_like(cells[..., 4])
        found.permute(0, 2, 3, 1).index_put_(tuple(at.unbind(1)), owned, accumulate=True)
        found.clamp_(max=1)
        counts = torch.maximum(found, 1 - self._near_box(cells, anchors, stride, targets))
        objectness = F.binary_cross_entropy_with_logits(cells[..., 4], found, counts, reduction="sum")
        return torch.stack([box, objectness, (owned * of_class.sum(-1)).sum()])

    @torch.no_grad()
    def _near_box(self, cells: Tensor, anchors: Tensor, stride: int, targets: Tensor) -> Tensor:
        """Return (N, A, H, W): 1 where a predicted box overlaps a labelled one by more than the threshold, else 0.

        Each labelled box is compared with the predictions of its own image only: M * A * H * W pairs.
        """
        image = targets[:, 0].long()
        predicted = decode_head(cells, anchors, stride).flatten(1, 3)
        near = box_iou(predicted[image], targets[:, None, 2:]) > self.ignore_threshold
        hits = predicted.new_zeros(predicted.shape[:2]).index_add_(0, image, near.to(predicted))
        return hits.clamp_(max=1).view(cells.shape[:-1])


def _place(targets: Tensor, stride: int, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return image, row and column (M, 3) of the cells of the boxes' centres, and x, y within them (M, 2), 0..1."""
    centre = (targets[:, 2:4] + targets[:, 4:6]) / (2 * stride)
    column = centre[:, 0].long().clamp(0, size[1] - 1)
    row = centre[:, 1].long().clamp(0, size[0] - 1)
    within = (centre - torch.stack([column, row], 1)).clamp(0, 1)
    return torch.stack([targets[:, 0].long(), row, column], 1), within


def _check_targets(targets: Tensor, images: int, num_classes: int) -> None:
    if targets.ndim != 2 or targets.shape[1] != 6:
        raise ValueError(
            f"targets: expected (M, 6) of image index, class index, x1, y1, x2, y2; got {tuple(targets.shape)}"
        )
    if targets.device.type != "cpu" or len(targets) == 0:
        return
    for column, (name, limit) in enumerate((("image", images), ("class", num_classes))):
        low, high = targets[:, column].aminmax()
        if not 0 <= low <= high < limit:
            raise ValueError(f"targets: expected {name} indices 0 to {limit - 1}, got {low:g} to {high:g}")
