"""Images of a run with their boxes: what the network trains on, and what it finds beside what is labelled."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import torch
from torch import Tensor

from fastkd.yolov3.boxes import Detections
from fastkd.yolov3.data.dataset import DetectionDataset, fit, letterbox_of, read_image, spread, spread_readable
from fastkd.yolov3.data.draw import Image, draw
from fastkd.yolov3.train.evaluate import Detection

TILE = 400  # pixels; names can be read on it
CAPTION = 24  # pixels of the line above a tile
GAP = 4
MAX_TILES = 16  # of a batch


def batch_image(images: Tensor, targets: Tensor, class_names: Sequence[str]) -> Image:
    """A batch as the network gets it, with its labels: (H, W, 3) uint8 RGB, at most 16 images of it, evenly spaced.

    Args:
        images: (N, 3, S, S) float in 0..1, on any device.
        targets: (M, 6) as of ``Batch``.
        class_names: one per class.
    """
    tiles = []
    places = spread(len(images), MAX_TILES)
    shown = (images[places].detach().float().cpu() * 255).round().clamp(0, 255).byte()
    targets = targets.detach().float().cpu()
    for i, image in zip(places, shown, strict=True):
        of = targets[targets[:, 0] == i]
        pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
        boxes = of[:, 2:] * (TILE / pixels.shape[0])
        tile = draw(_enlarged(pixels), _labels(boxes, of[:, 1]), class_names, scores=False)
        tiles.append(_captioned(tile, f"{i + 1}" if i else f"1, {pixels.shape[1]} x {pixels.shape[0]} pixels"))
    return _grid(tiles, columns=4)


def predictions_image(
    detections: list[Detection], dataset: DetectionDataset, *, count: int = 8, score_threshold: float = 0.3
) -> Image | None:
    """Some images of a set, evenly spaced, in pairs: with their labels, and with what was found in them.

    Args:
        detections: COCO results, as ``detect_all`` returns them.
        dataset: what they were found in.
        count: at most so many images; the next one takes the place of one that can't be read.
        score_threshold: least score of a box that is drawn.

    Returns:
        (H, W, 3) uint8 RGB, or None where no image can be read.
    """
    index = {category: i for i, category in enumerate(dataset.annotations.category_ids)}

    def pair(row: int) -> list[Image] | None:
        annotations = dataset.annotations
        try:
            pixels = read_image(annotations.path(row))
        except (ValueError, OSError):
            return None
        if pixels.shape[:2] != (annotations.sizes[row][1], annotations.sizes[row][0]):
            return None  # left out of training and evaluation, too
        of, image_id = annotations.of(row), int(annotations.image_ids[row])
        found = [x for x in detections if x["image_id"] == image_id and x["score"] >= score_threshold]
        found.sort(key=lambda x: -x["score"])
        labels = annotations.boxes[of], torch.from_numpy(annotations.classes[of]), None
        scores = torch.tensor([x["score"] for x in found])
        classes = torch.tensor([index[x["category_id"]] for x in found], dtype=torch.int64)
        finds = np.array([x["bbox"] for x in found], float).reshape(-1, 4), classes, scores
        captions = (f"labels: {annotations.file_names[row]}", f"found, score {score_threshold:g} or more")
        return [
            _captioned(_tile(pixels, *boxes, dataset.class_names), caption)
            for boxes, caption in zip((labels, finds), captions, strict=True)
        ]

    pairs = spread_readable(len(dataset), count, pair)
    return _grid([tile for both in pairs for tile in both], columns=4) if pairs else None


def _tile(
    pixels: Image, boxes: np.ndarray, classes: Tensor, scores: Tensor | None, class_names: Sequence[str]
) -> Image:
    """An image in a square with boxes x, y, width, height, in its own pixels."""
    height, width = pixels.shape[:2]
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
    placed = torch.from_numpy(letterbox_of(width, height, TILE).to_input(corners)).float()
    shown = _labels(placed, classes) if scores is None else Detections(placed, scores, classes)
    return draw(fit(pixels, TILE)[0], shown, class_names, scores=scores is not None)


def _labels(boxes: Tensor, classes: Tensor) -> Detections:
    return Detections(boxes, torch.ones(len(boxes)), classes.long())


def _enlarged(pixels: Image) -> Image:
    """A square image at the side of a tile."""
    shrinks = pixels.shape[0] > TILE
    resized = cv2.resize(pixels, (TILE, TILE), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)
    return resized.astype(np.uint8)


def _captioned(tile: Image, text: str) -> Image:
    bar = np.full((CAPTION, TILE, 3), 255, np.uint8)
    longest = TILE // 9
    shown = text if len(text) <= longest else f"{text[: longest - 12]}...{text[-9:]}"
    cv2.putText(bar, shown, (4, CAPTION - 8), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (0, 0, 0), 1, cv2.LINE_AA)
    return np.concatenate([bar, tile])


def _grid(tiles: Sequence[Image], columns: int) -> Image:
    """Tiles of one size in rows, on white."""
    columns = min(columns, len(tiles))
    rows = -(-len(tiles) // columns)
    height, width = tiles[0].shape[0] + GAP, tiles[0].shape[1] + GAP
    canvas = np.full((rows * height - GAP, columns * width - GAP, 3), 255, np.uint8)
    for i, tile in enumerate(tiles):
        y, x = i // columns * height, i % columns * width
        canvas[y : y + tile.shape[0], x : x + tile.shape[1]] = tile
    return canvas
