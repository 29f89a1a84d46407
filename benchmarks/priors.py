"""Times the priors that are computed from boxes, their plain PyTorch formulas, and loops over images and boxes.

    python benchmarks/priors.py --images 64 --boxes 100

There are three levels of a 640 px input (80 x 80, 40 x 40, 20 x 20 cells) with three anchors each. The loops are
written from the formulas; the anchors of each level are placed once, before the timing. The output is a Markdown table
with median and quartiles in ms and the ratio to fastkd's time. The program fails unless loops in float64 give the same
maps; random boxes have no ties.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastkd.ops.prior_ops import plain_box_balance, plain_iou_mask
from fastkd.priors import box_balance, iou_mask

Maps = Callable[[], list[Tensor]]
IMAGE = (640, 640)
SIZES = [(80, 80), (40, 40), (20, 20)]
ANCHORS = [
    [[10.0, 13.0], [16.0, 30.0], [33.0, 23.0]],
    [[30.0, 61.0], [62.0, 45.0], [59.0, 119.0]],
    [[116.0, 90.0], [156.0, 198.0], [373.0, 326.0]],
]


def random_boxes(images: int, count: int) -> Tensor:
    """Return (images * count, 5) boxes within the images, with sides from 8 to 320 px, uniform in their logarithm."""
    u = torch.rand(images, count, 4, generator=torch.Generator().manual_seed(0))
    size = 8 * (u[..., 2:] * math.log(40)).exp()
    corner = u[..., :2] * (IMAGE[0] - size)
    index = torch.arange(images).float()[:, None, None].expand(-1, count, 1)
    return torch.cat([index, corner, corner + size], 2).flatten(0, 1)


def placed(anchors: Tensor, size: tuple[int, int]) -> Tensor:
    """Return every anchor of a level, (H, W, A, 4), as corners in pixels."""
    y, x = ((torch.arange(n, dtype=anchors.dtype, device=anchors.device) + 0.5) * IMAGE[0] / n for n in size)
    centre = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)[:, :, None]
    return torch.cat([centre - anchors / 2, centre + anchors / 2], -1)


def iou(anchors: Tensor, boxes: Tensor) -> Tensor:
    """Return the IoU (...) of (..., 4) and (..., 4), with broadcasting."""
    low, high = torch.maximum(anchors[..., :2], boxes[..., :2]), torch.minimum(anchors[..., 2:], boxes[..., 2:])
    overlap = (high - low).clamp(min=0).prod(-1)
    return overlap / (
        (anchors[..., 2:] - anchors[..., :2]).prod(-1) + (boxes[..., 2:] - boxes[..., :2]).prod(-1) - overlap
    )


def loop_iou_mask(boxes: Tensor, levels: list[Tensor], images: int, graded: bool) -> list[Tensor]:
    """Compute the prior image by image and box by box."""
    maps = []
    for anchors in levels:
        result = torch.zeros(images, *anchors.shape[:2], device=boxes.device)
        for n in range(images):
            for box in boxes[boxes[:, 0] == n, 1:].to(anchors.dtype):
                best = iou(anchors, box).amax(-1)
                marked = best / best.max() if graded else best > 0.5 * best.max()
                result[n] = torch.maximum(result[n], marked.float())
        maps.append(result)
    return maps


def images_iou_mask(boxes: Tensor, levels: list[Tensor], images: int, graded: bool) -> list[Tensor]:
    """Compute the prior image by image, with all boxes of an image at once: (boxes, H, W, A)."""
    maps = []
    for anchors in levels:
        result = torch.zeros(images, *anchors.shape[:2], device=boxes.device)
        for n in range(images):
            own = boxes[boxes[:, 0] == n, 1:].to(anchors.dtype)
            if len(own):
                best = iou(anchors, own[:, None, None, None]).amax(-1)
                largest = best.amax((1, 2), keepdim=True)
                result[n] = (best / largest if graded else (best > 0.5 * largest).float()).amax(0)
        maps.append(result)
    return maps


def loop_box_balance(boxes: Tensor, images: int) -> list[Tensor]:
    """Compute the prior image by image and box by box."""
    maps = []
    for height, width in SIZES:
        result = torch.zeros(images, height, width, device=boxes.device)
        for n in range(images):
            for x1, y1, x2, y2 in (boxes[boxes[:, 0] == n, 1:] * (width / IMAGE[1])).tolist():
                cells = slice(math.floor(y1), math.ceil(y2)), slice(math.floor(x1), math.ceil(x2))
                area = (cells[0].stop - cells[0].start) * (cells[1].stop - cells[1].start)
                result[n][cells] = result[n][cells].clamp(min=1 / area)
            empty = result[n] == 0
            result[n][empty] = 1 / max(int(empty.sum()), 1)
        maps.append(result)
    return maps


def milliseconds(run: Callable[[], object], repeats: int, device: torch.device) -> list[float]:
    measured = []
    for repeat in range(repeats + 1):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if repeat:  # the first run warms up
            measured.append(1e3 * (time.perf_counter() - start))
    return measured


class Case(NamedTuple):
    """A prior: fastkd's op, the loops to compare it with, and the loop in float64 that gives the expected maps."""

    name: str
    ours: Maps
    loops: dict[str, Maps]
    truth: Maps
    tolerance: float


def cases(boxes: Tensor, images: int) -> list[Case]:
    anchors = torch.tensor(ANCHORS, device=boxes.device)
    flat = [side for size in SIZES for side in size]
    single = [placed(a, s) for a, s in zip(anchors, SIZES, strict=True)]
    double = [placed(a, s) for a, s in zip(anchors.double(), SIZES, strict=True)]
    masks = [
        Case(
            name,
            lambda graded=graded: iou_mask(boxes, anchors, SIZES, IMAGE, images, graded=graded),
            {
                "plain PyTorch": lambda graded=graded: list(
                    plain_iou_mask(boxes, list(anchors), flat, *IMAGE, images, 0.5, graded)
                ),
                "loop over images and boxes": lambda graded=graded: loop_iou_mask(boxes, single, images, graded),
                "loop over images": lambda graded=graded: images_iou_mask(boxes, single, images, graded),
            },
            lambda graded=graded: loop_iou_mask(boxes, double, images, graded),
            tolerance,
        )
        for name, graded, tolerance in (("`iou_mask`", False, 0), ("`iou_mask`, graded", True, 1e-6))
    ]
    balance = Case(
        "`box_balance`",
        lambda: box_balance(boxes, SIZES, IMAGE, images),
        {
            "plain PyTorch": lambda: list(plain_box_balance(boxes, flat, *IMAGE, images, 1.0, False)),
            "loop over images and boxes": lambda: loop_box_balance(boxes, images),
        },
        lambda: loop_box_balance(boxes.double(), images),
        1e-6,
    )
    return [*masks, balance]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--boxes", type=int, default=100, help="per image")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--loop-repeats", type=int, default=3)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    options = parser.parse_args()
    device = options.device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{options.images} images x {options.boxes} boxes at {IMAGE[0]} px; torch {torch.__version__}, {where}\n")
    print("| prior | provider | ms (quartiles) | times fastkd's |\n|---|---|---|---|")
    for case in cases(random_boxes(options.images, options.boxes).to(device), options.images):
        for ours, right in zip(case.ours(), case.truth(), strict=True):
            torch.testing.assert_close(ours, right, rtol=case.tolerance, atol=case.tolerance)
        measured = {"fastkd": milliseconds(case.ours, options.repeats, device)}
        for name, loop in case.loops.items():
            measured[name] = milliseconds(loop, options.loop_repeats, device)
        ours_median = statistics.median(measured["fastkd"])
        for name, x in measured.items():
            low, median, high = statistics.quantiles(x, n=4)
            print(f"| {case.name} | {name} | {median:.1f} ({low:.1f} to {high:.1f}) | {median / ours_median:.1f} |")


if __name__ == "__main__":
    main()
