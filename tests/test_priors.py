"""Priors from the teacher's heads."""

from __future__ import annotations

import pytest
import torch

from fastkd.priors import confidence


def test_confidence_is_the_best_objectness_times_class_over_anchors_and_heads() -> None:
    objectness = [torch.full((1, 2, 4, 4), -50.0), torch.full((1, 2, 2, 2), -50.0)]
    classes = [torch.zeros(1, 2, 3, 4, 4), torch.zeros(1, 2, 3, 2, 2)]
    objectness[0][0, 1, 1, 2], classes[0][0, 1, 2, 1, 2] = 50, 50
    (q,) = confidence(objectness, classes, [(4, 4)], floor=0.1)
    assert q.shape == (1, 4, 4)
    assert q[0, 1, 2] == pytest.approx(1)
    q[0, 1, 2] = 0.1
    torch.testing.assert_close(q, torch.full((1, 4, 4), 0.1))


def test_a_smaller_level_keeps_the_maximum_and_a_larger_one_interpolates() -> None:
    objectness, classes = [torch.full((1, 1, 4, 4), -50.0)], [torch.full((1, 1, 1, 4, 4), 50.0)]
    objectness[0][0, 0, 3, 3] = 50
    down, up = confidence(objectness, classes, [(2, 2), (8, 8)], floor=0)
    torch.testing.assert_close(down[0], torch.tensor([[0.0, 0.0], [0.0, 1.0]]))
    assert up[0, 7, 7] == pytest.approx(1)
    assert 0 < up[0, 5, 7] < 1
    assert up[0, 0, 0] == pytest.approx(0, abs=1e-6)


def test_a_side_that_shrinks_keeps_its_maxima_while_the_other_grows() -> None:
    objectness, classes = [torch.full((1, 1, 8, 2), -50.0)], [torch.full((1, 1, 1, 8, 2), 50.0)]
    objectness[0][0, 0, 3, 0] = 50
    (q,) = confidence(objectness, classes, [(2, 8)], floor=0)
    assert q[0, 0, 0] == pytest.approx(1)
    assert q[0, 1].max() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("objectness", "classes", "floor", "message"),
    [
        ([torch.zeros(1, 2, 4, 4)], [], 0.1, "class_logits: expected one entry per head"),
        ([torch.zeros(1, 2, 4, 4)], [torch.zeros(1, 3, 5, 4, 4)], 0.1, r"class_logits\[0\]: .*\(1, 3, 5, 4, 4\)"),
        ([torch.zeros(1, 2, 4, 4)], [torch.zeros(1, 2, 5, 4, 4)], 1.5, "floor: "),
        ([torch.zeros(1, 2, 4, 4)], [torch.zeros(1, 2, 0, 4, 4)], 0.1, r"objectness\[0\]: .*at least one anchor"),
        (
            [torch.zeros(1, 2, 4, 4), torch.zeros(3, 2, 2, 2)],
            [torch.zeros(1, 2, 5, 4, 4), torch.zeros(3, 2, 5, 2, 2)],
            0.1,
            r"objectness\[1\]: expected the batch of the other heads",
        ),
    ],
)
def test_bad_heads_are_a_clear_error(objectness: list, classes: list, floor: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        confidence(objectness, classes, [(4, 4)], floor=floor)
