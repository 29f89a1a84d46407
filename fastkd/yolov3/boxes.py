"""From raw head maps to boxes: decoding, IoU, non-maximum suppression."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd.yolov3.anchors import Heads

_MAX_LOG_RATIO = 4.0  # a box is at most e^4 = 55 times its anchor, which keeps exp() finite, in float16 too
_MAX_CANDIDATES = 3000  # per image; those with the best scores reach the suppression


class Detections(NamedTuple):
    """The detections of one image, best first, on the CPU."""

    boxes: Tensor  # (k, 4) float32: x1, y1, x2, y2 in pixels of the network's input, not clipped to it
    scores: Tensor  # (k,) float32: objectness times class probability
    classes: Tensor  # (k,) int64


class Decoded(NamedTuple):
    """All boxes of a batch before suppression: what an exported detector returns in place of raw head maps."""

    boxes: Tensor  # (N, M, 4) float32 or wider: x1, y1, x2, y2 in pixels of the network's input
    scores: Tensor  # (N, M, K): objectness times class probability


def head_cells(output: Tensor, anchors: int) -> Tensor:
    """Return a view of a raw head map (N, A * (5 + K), H, W) as (N, A, H, W, 5 + K)."""
    n, channels, height, width = output.shape
    return output.view(n, anchors, channels // anchors, height, width).permute(0, 1, 3, 4, 2)


def decode_head(cells: Tensor, anchors: Tensor, stride: int) -> Tensor:
    """Return the boxes of one head, (N, A, H, W, 4): x1, y1, x2, y2 in pixels (arXiv:1804.02767, section 2.1).

    Unlike in Darknet, a side is at most e^4 = 54.6 times that of its anchor, so that even an extreme output gives a
    finite box, in float16 too.

    Args:
        cells: (N, A, H, W, 5 + K) raw predictions, see ``head_cells``.
        anchors: (A, 2) width and height in pixels.
        stride: pixels per cell.
    """
    column = torch.arange(cells.shape[3], device=cells.device, dtype=cells.dtype)
    row = torch.arange(cells.shape[2], device=cells.device, dtype=cells.dtype)
    corner = torch.stack(torch.meshgrid(column, row, indexing="xy"), -1)
    centre = (cells[..., :2].sigmoid() + corner) * stride
    half = anchors.to(cells)[:, None, None] * cells[..., 2:4].clamp(max=_MAX_LOG_RATIO).exp() / 2
    return torch.cat([centre - half, centre + half], -1)


def decode(outputs: Sequence[Tensor], anchors: Tensor, strides: Sequence[int]) -> Tensor:
    """Return all predictions of a batch, in pixels and probabilities.

    Args:
        outputs: raw head maps as the detectors return them, each (N, A * (5 + K), H / stride, W / stride).
        anchors: (heads, A, 2) in pixels.
        strides: strides of the heads, in the order of ``outputs``.

    Returns:
        (N, M, 5 + K) float32 or wider: x1, y1, x2, y2 in pixels, objectness, class probabilities; M runs over
        heads, anchors, rows, columns. A side is at most e^4 = 54.6 times that of its anchor.

    Raises:
        ValueError: the number of heads or of channels does not fit the anchors.
    """
    check_outputs(outputs, anchors, strides)
    decoded = []
    for output, head_anchors, stride in zip(outputs, anchors, strides, strict=True):
        cells = head_cells(widen(output), anchors.shape[1])
        boxes = decode_head(cells, head_anchors, stride)
        decoded.append(torch.cat([boxes, cells[..., 4:].sigmoid()], -1).flatten(1, 3))
    return torch.cat(decoded, 1)


def boxes_and_scores(outputs: Sequence[Tensor], heads: Heads) -> Decoded:
    """``decode``, with objectness and class probabilities multiplied. Raises ``ValueError`` as ``detect`` does."""
    check_outputs(outputs, heads.anchors, heads.strides, heads.num_classes)
    predictions = decode(outputs, heads.anchors, heads.strides)
    return Decoded(predictions[..., :4], predictions[..., 4:5] * predictions[..., 5:])


@torch.no_grad()
def detect(
    outputs: Sequence[Tensor],
    heads: Heads,
    score_threshold: float = 0.001,
    iou_threshold: float = 0.5,
    max_detections: int = 100,
) -> list[Detections]:
    """Return the detections of each image, after non-maximum suppression within each class.

    A box may be reported under several classes, because COCO's metric rewards that. The best 3,000 pairs of box and
    class of an image that are above the threshold are considered.

    Args:
        outputs: raw head maps of a batch, as the detector returns them; or ``Decoded``, as an ``OnnxDetector`` does.
        heads: the detector, or a ``HeadLayout``: anchors, strides, num_classes.
        score_threshold: minimum score, in [0, 1).
        iou_threshold: in (0, 1]; of two boxes of a class whose IoU is larger, only the one with the better score stays.
        max_detections: maximum number of detections per image.

    Returns:
        One ``Detections`` per image.

    Raises:
        ValueError: a threshold is out of range, or the outputs do not fit ``heads``.
        ModuleNotFoundError: OpenCV is not installed.
    """
    if not 0 <= score_threshold < 1 or not 0 < iou_threshold <= 1 or max_detections < 1:
        raise ValueError(
            "expected score_threshold in [0, 1), iou_threshold in (0, 1], max_detections >= 1; "
            f"got {score_threshold}, {iou_threshold}, {max_detections}"
        )
    found = outputs if isinstance(outputs, Decoded) else boxes_and_scores(outputs, heads)
    return [
        _suppress(boxes, scores, score_threshold, iou_threshold, max_detections)
        for boxes, scores in zip(found.boxes, found.scores, strict=True)
    ]


@torch.no_grad()
def likely_boxes(outputs: Sequence[Tensor], heads: Heads, *, most: int = 100, least: float = 0.3) -> Tensor:
    """Return the boxes of the highest scores, before suppression, packed as ``fastkd.priors`` takes them.

    The shape of the result depends on the shapes of the outputs alone, so the host never waits for the device.

    Args:
        outputs: raw head maps of a batch, as the detector returns them.
        heads: the detector, or a ``HeadLayout``.
        most: maximum number of boxes per image.
        least: a box counts if its score, objectness times the probability of its best class, is above this.

    Returns:
        (M, 5) float32: image index, x1, y1, x2, y2 in pixels; boxes that do not count are empty: their corners are 0.

    Raises:
        ValueError: the outputs do not fit ``heads``.
    """
    found = decode(outputs, heads.anchors, heads.strides)
    scores, index = (found[..., 4] * found[..., 5:].amax(-1)).topk(min(most, found.shape[1]), dim=1)
    corners = found[..., :4].gather(1, index[..., None].expand(-1, -1, 4)).float()
    corners = torch.where(scores[..., None] > least, corners, 0.0)
    image = torch.arange(len(corners), device=corners.device, dtype=corners.dtype)
    return torch.cat([image[:, None, None].expand_as(corners[..., :1]), corners], -1).flatten(0, 1)


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """Return the IoU (...) of boxes x1, y1, x2, y2, (..., 4) and (..., 4), element by element with broadcasting."""
    overlap = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])
    inter = overlap.clamp(min=0).prod(-1)
    union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - inter
    return inter / union.clamp(min=1e-9)


def widen(x: Tensor) -> Tensor:
    """Return float16 and bfloat16 as float32, and other dtypes as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def check_outputs(
    outputs: Sequence[Tensor], anchors: Tensor, strides: Sequence[int], num_classes: int | None = None
) -> None:
    """Raise ``ValueError`` unless there is one 4-D map per stride, with the channels of the anchors and classes."""
    if len(outputs) != len(strides) or len(anchors) != len(strides):
        raise ValueError(
            f"outputs: expected one map for each of the strides {tuple(strides)} and of the {len(anchors)} rows of "
            f"anchors, got {len(outputs)} maps"
        )
    per_cell = anchors.shape[1]
    for index, output in enumerate(outputs):
        classes = output.shape[1] // per_cell - 5 if output.ndim == 4 else 0
        fits = classes >= 1 and output.shape[1] % per_cell == 0 and num_classes in (None, classes)
        if not fits:
            wanted = "K" if num_classes is None else num_classes
            raise ValueError(
                f"outputs[{index}]: expected (N, {per_cell} * (5 + {wanted}), H, W) for {per_cell} anchors per cell, "
                f"got {tuple(output.shape)}"
            )


def _suppress(boxes: Tensor, scores: Tensor, least: float, iou_threshold: float, most: int) -> Detections:
    import cv2  # imported here, so that importing the package needs torch alone

    ranked, index = scores.flatten().topk(min(_MAX_CANDIDATES, scores.numel()))
    kept = ranked > least
    ranked, index = ranked[kept].float().cpu(), index[kept]
    classes = (index % scores.shape[1]).cpu()
    found = boxes[index // scores.shape[1]].float().cpu()
    if len(found) == 0:
        return Detections(found, ranked, classes)
    corner_and_size = torch.cat([found[:, :2], found[:, 2:] - found[:, :2]], 1)
    suppress: Any = cv2.dnn.NMSBoxesBatched  # its type stub asks for lists, its code for arrays
    order = suppress(corner_and_size.double().numpy(), ranked.numpy(), classes.int().numpy(), least, iou_threshold)
    best = torch.as_tensor(order, dtype=torch.long).flatten()[:most]
    return Detections(found[best], ranked[best], classes[best])
