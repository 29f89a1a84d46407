"""Which training steps the teacher runs in, and which images of their batches it sees."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastkd.loss_weight import LossWeight
from fastkd.ops.arguments import kind_of, require_int, require_number

ALL = slice(None)


class Passes:
    """The teacher's passes: in every so many training steps, on a part of each batch.

    The loss is 0 in a step without the teacher and ``every`` times as large in one with it. A batch is cut into
    1 / ``images`` parts, and each step that has the teacher takes the next of them, times the part's size over the mean
    part's. So the mean over steps is that of a teacher that sees everything, where Z is a count (``elements``,
    ``batch``). Where Z is the mass of the map, and in PKD, each part has its own, as a smaller batch would.

    Args:
        every, images: ``Distiller``'s ``teacher_every`` and ``teacher_images``.

    Raises:
        ValueError: no whole number >= 1; not 1 / a whole number.
    """

    def __init__(self, every: int, images: float) -> None:
        self.every = require_int("teacher_every", every, 1)
        expected = "1 or 1 divided by a whole number (1 / 2, 1 / 3, ...)"
        part = require_number("teacher_images", images, expected, 1e-3, 1.0)
        self.parts = round(1 / part)
        self._step, self._loads = 0, -1
        if abs(self.parts * part - 1) > 0.025:  # 0.33 and 0.17 are written for 1 / 3 and 1 / 6
            raise ValueError(f"teacher_images: expected {expected}, got {images!r}")

    @property
    def all(self) -> bool:
        """Whether nothing is left out."""
        return self.every == self.parts == 1

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a graph has no step of its own
    def images_of_step(self, counter: LossWeight, images: Any) -> tuple[slice, float]:
        """Which images of the next training step the teacher sees, and what the loss is multiplied with; 0: none.

        Args:
            counter: of the steps so far; asked once, and after a state was loaded, as a device has to be waited for.
            images: of the batch.

        Raises:
            TypeError: images that cannot be cut.
        """
        if self._loads != counter.loads:
            self._step, self._loads = int(counter.step), counter.loads
        step = self._step
        passes, rest = divmod(step, self.every)
        if rest:
            return ALL, 0.0
        if self.parts == 1:
            return ALL, float(self.every)
        if not isinstance(images, (Tensor, list, tuple)):
            raise TypeError(f"teacher_images: expected images that are a tensor or a list, got {kind_of(images)}")
        count = len(images)
        parts = min(self.parts, max(count, 1))
        first, last = (count * (passes % parts + k) // parts for k in (0, 1))
        return slice(first, last), self.every * (last - first) * parts / count if count else 1.0

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def count(self) -> None:
        """A training step has its loss."""
        self._step += 1

    def __str__(self) -> str:
        steps = "" if self.every == 1 else f"; in one training step of {self.every}"
        return steps if self.parts == 1 else f"{steps}; on 1/{self.parts} of the batch"
