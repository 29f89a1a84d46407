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

    Each labelled box belongs to the anchor, of all heads, whose size fits it best, in the cell that holds its centre.
    That prediction is trained on box, class (binary cross-entropy a class) and objectness 1; all others on
    objectness 0, but those whose box overlaps a labelled one by more than ``ignore_threshold`` are left alone.
    The box term is Darknet's: (2 - relative area) times cross-entropy of the centre within its cell plus half the
    squared error of log width and height. In trainings of a few hundred steps it beat 1 - CIoU (arXiv:1911.08287).
    Computed in float32 or wider, also under autocast.

    Args:
        heads: the detector, or a ``HeadLayout``: anchors, strides, num_classes.
        ignore_threshold: IoU in (0, 1]; 0.5 in the paper, 0.7 in yolov3.cfg.
        match_threshold: IoU in (0, 1]; a box belongs also to anchors whose sizes fit it better than this (Darknet's
            ``iou_thresh``). 1: to the best alone, as in the paper; short trainings learn classes much slower so.
        box_weight, objectness_weight, class_weight: factors of the three terms, finite and >= 0.

    Raises:
        ValueError: threshold or weight out of range.
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
        """The loss of a batch.

        Args:
            outputs: raw head maps, (N, A * (5 + K), H / stride, W / stride) a stride.
            targets: (M, 6) float: index of the image in the batch, class index, x1, y1, x2, y2 in pixels of the
                network's input. M = 0 and images without a box are fine. Indices are checked on the CPU only,
                where that costs no synchronisation.

        Returns:
            The weighted sum, a scalar to differentiate, and its terms ``{"box", "objectness", "class"}``,
            weighted and detached.

        Raises:
            ValueError: outputs that do not fit the anchors, targets of another shape or with unknown indices.
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
        """1 where a box belongs to an anchor, else 0: (M, heads, A)."""
        sizes = targets[:, 4:6] - targets[:, 2:4]
        fit = size_iou(sizes, self.anchors.to(targets).flatten(0, 1))
        best = F.one_hot(fit.argmax(1), fit.shape[1]) > 0
        return (best | (fit > self.match_threshold)).to(targets).view(-1, *self.anchors.shape[:2])

    def _head_terms(self, level: int, output: Tensor, targets: Tensor, owned: Tensor) -> Tensor:
        """Box, objectness and class terms (3,) of one head.

        Every box meets every anchor of its cell, (M, A) pairs weighted by ``owned``: shapes known beforehand, so
        the device never waits for the host.
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
        """1 where a predicted box overlaps a labelled one by more than the threshold, else 0: (N, A, H, W).

        Each labelled box meets the predictions of its own image only: M * A * H * W pairs.
        """
        image = targets[:, 0].long()
        predicted = decode_head(cells, anchors, stride).flatten(1, 3)
        near = box_iou(predicted[image], targets[:, None, 2:]) > self.ignore_threshold
        hits = predicted.new_zeros(predicted.shape[:2]).index_add_(0, image, near.to(predicted))
        return hits.clamp_(max=1).view(cells.shape[:-1])


def _place(targets: Tensor, stride: int, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Image, row and column (M, 3) of the cells that hold the boxes' centres; x, y (M, 2) within them, 0 to 1."""
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
