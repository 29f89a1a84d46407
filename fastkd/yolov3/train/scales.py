"""Multi-scale training, as in YOLO9000 (arXiv:1612.08242): each batch has an input size of its own."""

from __future__ import annotations

import numpy as np
import torch.nn.functional as F
from torch import Tensor

STEP = 32  # pixels; the coarsest stride of the detectors
STREAM = 32  # keeps the draws apart from those of the order and the augmentation, which share the seed


def input_size(size: int, multi_scale: float, seed: int, step: int) -> int:
    """Side in pixels of the network's input in this step, the same in every process and after a resume.

    Drawn evenly from the multiples of 32 in ``size * (1 - multi_scale)`` to ``size * (1 + multi_scale)``, from 64 on.
    If the share is less than 32 pixels (0.25 of a size below 128), the size stays.

    Args:
        size: the usual side, a multiple of 32.
        multi_scale: largest change as a share of it, in [0, 1); 0: none.
        seed: of the run.
        step: from 0.
    """
    most = int(multi_scale * size / STEP + 1e-9)
    if most == 0:
        return size
    least = max(-most, min(0, 2 - size // STEP))  # 64 pixels: a map of one cell has no variance to normalise by
    return size + STEP * int(np.random.default_rng([seed, step, STREAM]).integers(least, most + 1))


def at_size(images: Tensor, targets: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Images (N, 3, S, S), float, resized to (N, 3, size, size), and the boxes of their targets scaled with them.

    ``targets`` is (M, 6) as of ``Batch``: index of the image, class, x1, y1, x2, y2 in pixels of the images.
    """
    before = images.shape[-1]
    if size == before or not len(images):
        return images, targets
    scale = size / before
    resized = F.interpolate(images, (size, size), mode="bilinear", antialias=size < before)
    return resized, targets * targets.new_tensor([1, 1, scale, scale, scale, scale])
