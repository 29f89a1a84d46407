"""The schedule of the teacher's forward passes: in which training steps, and on which images of the batch."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastkd.loss_weight import LossWeight
from fastkd.ops.arguments import kind_of, require_int, require_number

ALL = slice(None)


class Passes:
    """Schedule of the teacher's forward passes: one per ``every`` training steps, on a part of each batch.

    The loss is 0 in a step without the teacher, and is multiplied by ``every`` in a step with it. A batch is cut into
    1 / ``images`` parts, and each step with the teacher uses the next part; its loss is multiplied by the size of the
    part over the mean size. So where Z is a count (``elements``, ``batch``) the mean over steps equals that of a
    teacher that runs on every image. Where Z is the sum of the map, and in PKD, each part has its own Z or moments, as
    a smaller batch would.

    Args:
        every, images: ``teacher_every`` and ``teacher_images`` of ``Distiller``.

    Raises:
        ValueError: ``every`` is not an integer >= 1, or ``images`` is not 1 divided by an integer.
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
        """Whether the teacher runs in every step, on all images."""
        return self.every == self.parts == 1

    def images_of_step(self, counter: LossWeight, images: Any) -> tuple[slice, float]:
        """Return which images of the batch the teacher sees in the next training step, and the factor of the loss.

        Args:
            counter: counts the training steps. It is read once, and again after a state was loaded: reading it waits
                for the device.
            images: the batch.

        Returns:
            A slice of the images, and the factor that the loss is multiplied with; 0 where the teacher does not run.

        Raises:
            TypeError: images that are neither a tensor nor a list.
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

    def count(self) -> None:
        """Count one training step."""
        self._step += 1

    def __str__(self) -> str:
        steps = "" if self.every == 1 else f"; in one training step of {self.every}"
        return steps if self.parts == 1 else f"{steps}; on 1/{self.parts} of the batch"
