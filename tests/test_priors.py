"""Priors from the teacher's heads and from boxes, against the formulas written cell by cell."""

from __future__ import annotations

import copy
import math
import shutil
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from fastkd import distill_loss
from fastkd.ops import prior_ops
from fastkd.priors import box_balance, confidence, iou_mask, score


def test_confidence_is_the_best_objectness_times_class_over_anchors_and_heads() -> None:
    objectness = [torch.full((1, 2, 4, 4), -50.0), torch.full((1, 2, 2, 2), -50.0)]
    classes = [torch.zeros(1, 2, 3, 4, 4), torch.zeros(1, 2, 3, 2, 2)]
    objectness[0][0, 1, 1, 2], classes[0][0, 1, 2, 1, 2] = 50, 50
    (q,) = confidence(objectness, classes, [(4, 4)], floor=0.1)
    assert q.shape == (1, 4, 4)
    assert q[0, 1, 2] == pytest.approx(1)
    q[0, 1, 2] = 0.1
    torch.testing.assert_close(q, torch.full((1, 4, 4), 0.1))


def test_confidence_rises_from_a_tenth_with_the_root_of_the_score() -> None:
    half = torch.zeros(1, 1, 2, 2)  # as a probability
    (q,) = confidence([half], [half[:, :, None]], [(2, 2)])
    torch.testing.assert_close(q, torch.full((1, 2, 2), 0.1 + 0.9 * math.sqrt(0.5 * 0.5)))


def test_a_score_is_resized_from_centre_to_centre() -> None:
    (q,) = score([torch.tensor([-50.0, 50.0]).view(1, 1, 1, 1, 2)], [(1, 4)])
    torch.testing.assert_close(q, torch.tensor([[[0.0, 0.25, 0.75, 1.0]]]))


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
        (torch.zeros(1, 2, 4, 4), [], 0.1, "objectness: expected a list of tensors, one per head, got one tensor"),
        ([torch.zeros(1, 2, 4, 4)], [None], 0.1, r"class_logits\[0\]: expected a tensor of shape .*got None"),
        ([torch.zeros(1, 2, 4, 4).long()], [torch.zeros(1, 2, 5, 4, 4)], 0.1, r"objectness\[0\]: .*got torch.int64"),
        ([torch.zeros(1, 2, 4, 4)], [torch.zeros(1, 2, 5, 4, 4).to_sparse()], 0.1, r"class_logits\[0\]: .*a dense"),
        ([torch.zeros(1, 2, 4, 4)], [torch.zeros(1, 2, 5, 4, 4)], "0.1", "floor: expected a number in .*got '0.1'"),
        ([torch.zeros(1, 2, 4, 4)], [torch.zeros(1, 2, 5, 4, 4)], True, "floor: .*got True"),
        ([torch.zeros(1, 2, 4, 4)], [], 0.1, "class_logits: expected one entry per head"),
        ([torch.zeros(1, 2, 4, 4)], [torch.zeros(1, 3, 5, 4, 4)], 0.1, r"class_logits\[0\]: .*\(1, 3, 5, 4, 4\)"),
        ([torch.zeros(1, 2, 4, 4)], [torch.zeros(1, 2, 5, 4, 4)], 1.5, "floor: "),
        ([torch.zeros(1, 2, 4, 4)], [torch.zeros(1, 2, 0, 4, 4)], 0.1, r"class_logits\[0\]: .*at least one anchor"),
        (
            [torch.zeros(1, 2, 4, 4), torch.zeros(3, 2, 2, 2)],
            [torch.zeros(1, 2, 5, 4, 4), torch.zeros(3, 2, 5, 2, 2)],
            0.1,
            r"class_logits\[1\]: expected the batch of the other heads",
        ),
    ],
)
def test_bad_heads_are_a_clear_error(objectness: list, classes: list, floor: float, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        confidence(objectness, classes, [(4, 4)], floor=floor)


def test_bad_sizes_of_a_confidence_are_a_clear_error() -> None:
    with pytest.raises(ValueError, match=r"sizes\[0\]: expected \(height, width\), two ints > 0, got 4"):
        confidence([torch.zeros(1, 2, 4, 4)], [torch.zeros(1, 2, 5, 4, 4)], [4])  # type: ignore[list-item]


IMAGE = (48, 64)  # height, width in pixels
SIZES = [(6, 8), (3, 4), (5, 7)]  # strides 8 and 16, and one that is not an integer
ANCHORS = [
    torch.tensor([[10.0, 13.0], [24.0, 24.0], [33.0, 20.0]]),
    torch.tensor([[30.0, 40.0]]),
    torch.tensor([[7.5, 90.0], [12.0, 12.0]]),
]
ODD_BOXES = torch.tensor(
    [
        [0, -20, -9, 13, 17],  # partly outside: clipped
        [0, 50, 30, 500, 400],
        [0, -30, 5, -2, 25],  # outside
        [2, 64, 10, 80, 20],
        [2, 20, 20, 20, 30],  # empty
        [2, 30, 20, 10, 30],  # inverted
        [0, 10, float("nan"), 20, 30],
        [2, 5, 5, float("inf"), 30],
        [float("nan"), 5, 5, 20, 30],
        [0, 0, 0, 0, 0],  # padding
        [2, 17.1, 17.1, 17.2, 17.2],  # between the centres of cells: no small anchor overlaps it
    ]
)


def random_boxes(seed: int, count: int, whole: bool) -> Tensor:
    """Return boxes of images 0 and 2 of 4, some reaching beyond the image's edges, in random order."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand(count, 5, generator=generator)
    corner = u[:, 1:3] * torch.tensor([70.0, 54.0]) - 6
    size = 1 + u[:, 3:].square() * 40
    boxes = torch.cat([2 * u[:, :1].round(), corner, corner + size], 1)
    return boxes.round() if whole else boxes


def valid_boxes(boxes: Tensor, image: int) -> list[tuple[Fraction, ...]]:
    """Return the boxes of one image, clipped, in exact arithmetic."""
    kept = []
    for index, *corners in boxes.tolist():
        if index == image and all(map(math.isfinite, corners)):
            x1, y1, x2, y2 = (
                min(max(Fraction(v), Fraction(0)), Fraction(end))
                for v, end in zip(corners, 2 * IMAGE[::-1], strict=True)
            )
            if x1 < x2 and y1 < y2:
                kept.append((x1, y1, x2, y2))
    return kept


def iou(a: tuple[Fraction, ...], b: tuple[Fraction, ...]) -> Fraction:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return Fraction(0)
    areas = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (a, b)]
    return width * height / (sum(areas) - width * height)


def anchor_at(row: int, column: int, size: tuple[int, int], anchor: list[float]) -> tuple[Fraction, ...]:
    x = (column + Fraction(1, 2)) * IMAGE[1] / size[1]
    y = (row + Fraction(1, 2)) * IMAGE[0] / size[0]
    w, h = (Fraction(v) / 2 for v in anchor)
    return x - w, y - h, x + w, y + h


def slow_iou_mask(boxes: Tensor, size: tuple[int, int], anchors: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Return FGFI's formula, box by box and cell by cell: the mask and the relative IoU of 4 images."""
    mask, graded = torch.zeros(4, *size), torch.zeros(4, *size)
    for n in range(4):
        for box in valid_boxes(boxes, n):
            best = {
                (r, c): max(iou(anchor_at(r, c, size, a), box) for a in anchors.tolist())
                for r in range(size[0])
                for c in range(size[1])
            }
            largest = max(best.values())
            for (r, c), value in best.items():
                if value > Fraction(threshold) * largest:
                    mask[n, r, c] = 1
                if largest > 0:
                    graded[n, r, c] = max(graded[n, r, c].item(), float(value / largest))
    return mask, graded


def slow_box_balance(boxes: Tensor, size: tuple[int, int], background: float) -> Tensor:
    """Return FGD's scale mask, box by box and cell by cell."""
    weights = torch.zeros(4, *size)
    for n in range(4):
        for x1, y1, x2, y2 in valid_boxes(boxes, n):
            inside = [
                (r, c)
                for r in range(size[0])
                for c in range(size[1])
                if x1 < Fraction((c + 1) * IMAGE[1], size[1])
                and x2 > Fraction(c * IMAGE[1], size[1])
                and y1 < Fraction((r + 1) * IMAGE[0], size[0])
                and y2 > Fraction(r * IMAGE[0], size[0])
            ]
            for r, c in inside:
                weights[n, r, c] = max(weights[n, r, c].item(), 1 / len(inside))
        empty = weights[n] == 0
        weights[n][empty] = background / max(int(empty.sum()), 1)
    return weights


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("whole", [True, False], ids=["whole pixels, with ties", "any pixels"])
def test_iou_mask_is_fgfis_formula_cell_by_cell(whole: bool, threshold: float) -> None:
    boxes = torch.cat([ODD_BOXES, random_boxes(seed=1, count=6, whole=whole)])
    masks = iou_mask(boxes, ANCHORS, SIZES, IMAGE, 4, threshold=threshold)
    relative = iou_mask(boxes, ANCHORS, SIZES, IMAGE, 4, graded=True)
    for mask, grade, anchors, size in zip(masks, relative, ANCHORS, SIZES, strict=True):
        expected, graded = slow_iou_mask(boxes, size, anchors, threshold)
        assert 0 < expected.mean() < 1
        assert mask.dtype == grade.dtype == torch.float32
        assert torch.equal(mask, expected)
        torch.testing.assert_close(grade, graded, rtol=1e-6, atol=1e-7)
        assert grade.amax() == 1  # exactly 1, without rounding above or below


def test_iou_mask_holds_over_many_random_boxes_one_at_a_time() -> None:
    boxes = random_boxes(seed=2, count=60, whole=True)
    for box in boxes.split(1):
        (mask,) = iou_mask(box, ANCHORS[:1], SIZES[:1], IMAGE, 4)
        assert torch.equal(mask, slow_iou_mask(box, SIZES[0], ANCHORS[0], 0.5)[0]), box


def test_an_iou_equal_to_the_threshold_is_not_above_it() -> None:
    # one cell away, the IoU is 16 * 24 / (2 * 24 * 24 - 16 * 24) = 1/2
    box, anchor = torch.tensor([[0.0, 16, 8, 40, 32]]), torch.tensor([[24.0, 24.0]])
    (mask,) = iou_mask(box, [anchor], [(6, 8)], IMAGE, 1, threshold=0.5)
    assert mask.nonzero().tolist() == [[0, 2, 3]]
    (mask,) = iou_mask(box, [anchor], [(6, 8)], IMAGE, 1, threshold=0.4999999)
    assert mask.sum() == 5


@pytest.mark.parametrize(
    ("corners", "anchor", "threshold"),
    [((18, 28, 42, 52), (12, 40), 0.75), ((29, 24, 53, 40), (6, 24), 0.5), ((34, 20, 46, 36), (8, 8), 0.75)],
)
def test_nor_does_rounding_lift_it(corners: tuple[int, ...], anchor: tuple[int, int], threshold: float) -> None:
    # found by search: equal in exact arithmetic, larger in float64, with strides that are not integers
    box, anchors = torch.tensor([[0.0, *corners]]), torch.tensor([anchor]).float()
    (mask,) = iou_mask(box, [anchors], SIZES[2:], IMAGE, 4, threshold=threshold)
    assert torch.equal(mask, slow_iou_mask(box, SIZES[2], anchors, threshold)[0])


def test_half_of_the_largest_iou_is_the_threshold_that_fgfi_has() -> None:
    boxes = random_boxes(0, 40, whole=False)
    by_default, half, more = (
        torch.cat([x.flatten() for x in iou_mask(boxes, ANCHORS, SIZES, IMAGE, 4, **given)])
        for given in ({}, {"threshold": 0.5}, {"threshold": 0.6})
    )
    assert torch.equal(by_default, half)
    assert not torch.equal(half, more)


def test_every_level_has_its_own_largest_iou() -> None:
    small = torch.tensor([[0.0, 8, 8, 16, 16]])
    anchors = torch.tensor([[[10.0, 10.0]], [[60.0, 40.0]]])  # one tensor for all levels
    fine, coarse = iou_mask(small, anchors, SIZES[:2], IMAGE, 1)
    assert fine.sum() == 1
    assert coarse.any()  # its IoU is far below one half there


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("background", [1.0, 0.5, 0.0])
def test_box_balance_is_fgds_formula_cell_by_cell(whole: bool, background: float) -> None:
    boxes = torch.cat([ODD_BOXES, random_boxes(seed=3, count=6, whole=whole)])
    weights = box_balance(boxes, SIZES, IMAGE, 4, background=background)
    for weight, size in zip(weights, SIZES, strict=True):
        assert weight.dtype == torch.float32
        torch.testing.assert_close(weight, slow_box_balance(boxes, size, background), rtol=1e-6, atol=0)


def test_a_box_sums_to_one_and_so_does_the_background() -> None:
    boxes = torch.tensor([[0.0, 0, 0, 30, 20], [0, 40, 30, 48, 40], [1, 0, 0, 64, 48]])
    (weight,) = box_balance(boxes, SIZES[:1], IMAGE, 3)
    assert weight.sum((1, 2)).tolist() == pytest.approx([3, 1, 1])  # two boxes and the rest; all box; all background
    assert weight[0, 4, 5] == 1 / 2


@pytest.mark.parametrize("count", [0, 3])
def test_images_without_boxes_and_batches_without_images(count: int) -> None:
    none = torch.zeros(0, 5)
    for graded in (False, True):
        for mask, size in zip(iou_mask(none, ANCHORS, SIZES, IMAGE, count, graded=graded), SIZES, strict=True):
            assert torch.equal(mask, torch.zeros(count, *size))
    for weight, (height, width) in zip(box_balance(none, SIZES, IMAGE, count), SIZES, strict=True):
        torch.testing.assert_close(weight, torch.full((count, height, width), 1 / (height * width)))


def all_priors(boxes: Tensor, batch: int = 4) -> list[Tensor]:
    return [
        *iou_mask(boxes, ANCHORS, SIZES, IMAGE, batch),
        *iou_mask(boxes, ANCHORS, SIZES, IMAGE, batch, graded=True),
        *box_balance(boxes, SIZES, IMAGE, batch),
    ]


def plain_priors(
    boxes: Tensor, anchors: list[Tensor], sizes: list[tuple[int, int]], image: tuple[int, int], batch: int
) -> list[Tensor]:
    """Return ``all_priors`` by the plain PyTorch formulas, which read no values, as on a GPU without kernels."""
    flat, maps = [side for size in sizes for side in size], []
    for rows, _ in (
        prior_ops.plain_iou_mask(boxes, anchors, flat, *image, batch, 0.5, False),
        prior_ops.plain_iou_mask(boxes, anchors, flat, *image, batch, 0.5, True),
        prior_ops.plain_box_balance(boxes, flat, *image, batch, 1.0, False),
    ):
        maps += [
            x.view(batch, *size) for x, size in zip(rows.split([batch * h * w for h, w in sizes]), sizes, strict=True)
        ]
    return maps


def assert_same_bits(a: list[Tensor], b: list[Tensor]) -> None:
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)


def test_order_padding_precision_and_pieces_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    boxes = random_boxes(seed=4, count=20, whole=False)
    expected = all_priors(boxes)
    assert_same_bits(all_priors(boxes.flip(0)), expected)
    assert_same_bits(all_priors(torch.cat([torch.zeros(3, 5), boxes])), expected)
    assert_same_bits(all_priors(boxes.double()), expected)
    monkeypatch.setattr("fastkd.ops.prior_ops._PIECE", 100)
    assert_same_bits(plain_priors(boxes, ANCHORS, SIZES, IMAGE, 4), expected)


def test_a_level_of_one_cell_and_one_far_from_square() -> None:
    boxes = torch.tensor([[0.0, 1, 1, 9, 9]])
    anchors = [torch.tensor([[8.0, 8.0]])] * 3
    sizes = [(1, 1), (1, 37), (37, 1)]
    for mask, size in zip(iou_mask(boxes, anchors, sizes, (16, 16), 1), sizes, strict=True):
        assert mask.shape == (1, *size)
        assert mask.any()
    assert box_balance(boxes, [(1, 1)], (16, 16), 1)[0].item() == 1


def test_integer_anchors_will_do_and_none_of_it_has_a_gradient() -> None:
    boxes = random_boxes(seed=5, count=5, whole=True).requires_grad_()
    whole = iou_mask(boxes, [x.long() for x in ANCHORS[:1]], SIZES[:1], IMAGE, 4)
    assert_same_bits(whole, iou_mask(boxes, ANCHORS[:1], SIZES[:1], IMAGE, 4))
    assert not any(x.requires_grad for x in all_priors(boxes))


def test_priors_weight_the_loss_and_an_image_without_boxes_costs_nothing() -> None:
    boxes = random_boxes(seed=6, count=5, whole=False)
    student = [torch.randn(4, 3, *size, requires_grad=True) for size in SIZES]
    teacher = [torch.randn(4, 3, *size) for size in SIZES]
    masks = iou_mask(boxes, ANCHORS, SIZES, IMAGE, 4)
    distill_loss(student, teacher, info_map="fgfi", prior=masks).backward()
    for s, mask in zip(student, masks, strict=True):
        assert s.grad is not None
        assert torch.equal((s.grad != 0).any(1), mask > 0)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiles_into_one_graph_with_the_same_result() -> None:
    def priors(boxes: Tensor) -> list[Tensor]:
        level = SIZES[:1], IMAGE, 4
        return [
            *iou_mask(boxes, ANCHORS[:1], *level),
            *iou_mask(boxes, ANCHORS[:1], *level, graded=True),
            *box_balance(boxes, *level),
        ]

    compiled = torch.compile(priors, fullgraph=True, dynamic=True)
    for count in (5, 12):
        boxes = torch.cat([ODD_BOXES, random_boxes(seed=7, count=count, whole=False)])
        for x, y in zip(compiled(boxes), priors(boxes), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("batch", [0, 4])
def test_a_wrong_image_index_is_ignored_where_values_are_not_looked_at(batch: int) -> None:
    # on the CPU, PyTorch raises an error for a write out of bounds
    good = random_boxes(seed=8, count=6, whole=False)
    wrong = torch.tensor([[4.0, 0, 0, 20, 20], [-1, 0, 0, 20, 20], [0.5, 0, 0, 20, 20], [1e30, 0, 0, 20, 20]])
    expected = all_priors(good if batch else good[:0], batch)
    assert_same_bits(plain_priors(torch.cat([wrong, good, wrong]), ANCHORS, SIZES, IMAGE, batch), expected)


@pytest.mark.parametrize("size", [float("nan"), float("inf"), -5.0, 0.0])
def test_an_unusable_anchor_overlaps_nothing_where_values_are_not_looked_at(size: float) -> None:
    boxes = torch.cat([ODD_BOXES, random_boxes(seed=9, count=6, whole=False)])
    both, good = torch.tensor([[size, size], [24.0, 24.0]]), torch.tensor([[24.0, 24.0]])
    assert_same_bits(plain_priors(boxes, [both], SIZES[:1], IMAGE, 4), plain_priors(boxes, [good], SIZES[:1], IMAGE, 4))


def test_nothing_waits_for_the_device() -> None:
    # tensors without values, on a device that is not the CPU: .item(), nonzero and boolean indexing raise errors
    boxes, anchors = torch.empty(6400, 5, device="meta"), list(torch.empty(3, 3, 2, device="meta"))
    sizes = [(80, 80), (40, 40), (20, 20)]
    maps = plain_priors(boxes, anchors, sizes, (640, 640), 64)
    assert [(x.shape, x.device.type) for x in maps] == 3 * [((64, *size), "meta") for size in sizes]


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_graph_looks_at_values_on_the_cpu_too() -> None:
    compiled = torch.compile(all_priors, fullgraph=True, backend="eager")
    with pytest.raises((RuntimeError, ValueError), match="boxes: expected whole image indices"):
        compiled(torch.tensor([[4.0, 0, 0, 20, 20]]))


@pytest.mark.parametrize("prior", ["iou_mask", "graded", "box_balance"])
def test_the_maps_come_with_their_sums_until_one_is_changed(prior: str) -> None:
    boxes = random_boxes(seed=10, count=8, whole=False)

    def made() -> Any:
        if prior == "box_balance":
            return box_balance(boxes, SIZES, IMAGE, 4)
        return iou_mask(boxes, ANCHORS, SIZES, IMAGE, 4, graded=prior == "graded")

    maps = made()
    assert maps.sums.dtype == torch.float64
    torch.testing.assert_close(maps.sums, torch.stack([x.double().sum() for x in maps]), rtol=1e-14, atol=0)
    assert copy.deepcopy(maps).sums is None  # a copy has its own version counter
    maps[1].mul_(2)
    assert maps.sums is None
    for edit in (
        lambda x: x.append(x[0]),
        lambda x: x.pop(),
        lambda x: x.__setitem__(0, torch.ones(4, *SIZES[0])),
        lambda x: x.reverse(),
        lambda x: x[2].view(-1)[0].zero_(),
    ):
        maps = made()
        edit(maps)
        assert maps.sums is None
    assert not hasattr(made()[:2], "sums")
    assert type(made())(x + 1 for x in made()).sums is None
    with torch.inference_mode():
        assert made().sums is None  # such tensors have no version counter


def fgd_scale_mask(boxes: Tensor, size: tuple[int, int], background: float) -> Tensor:
    """Compute the mask cell by cell as in FGD's published code: floor(low) to ceil(high), both included."""
    weights = torch.zeros(4, *size)
    for n in range(4):
        for x1, y1, x2, y2 in valid_boxes(boxes, n):
            first = math.floor(y1 * size[0] / IMAGE[0]), math.floor(x1 * size[1] / IMAGE[1])
            last = math.ceil(y2 * size[0] / IMAGE[0]), math.ceil(x2 * size[1] / IMAGE[1])
            area = (last[0] + 1 - first[0]) * (last[1] + 1 - first[1])
            cells = weights[n, first[0] : last[0] + 1, first[1] : last[1] + 1]
            cells.clamp_(min=1 / area)
        empty = weights[n] == 0
        weights[n][empty] = background / max(int(empty.sum()), 1)
    return weights


@pytest.mark.parametrize("whole", [True, False])
def test_box_balance_covers_the_cells_of_fgds_code_if_asked(whole: bool) -> None:
    boxes = torch.cat([ODD_BOXES, random_boxes(seed=3, count=6, whole=whole)])
    weights = box_balance(boxes, SIZES, IMAGE, 4, background=0.5, inclusive=True)
    for weight, size in zip(weights, SIZES, strict=True):
        torch.testing.assert_close(weight, fgd_scale_mask(boxes, size, 0.5), rtol=1e-6, atol=0)


BOX = torch.tensor([[0.0, 1, 1, 9, 9]])
ANCHOR = torch.tensor([[8.0, 8.0]])
GOOD: dict[str, Any] = dict(boxes=BOX, anchors=[ANCHOR], sizes=[(2, 2)], image_size=(16, 16), batch=1)  # noqa: C408


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"boxes": [BOX]}, TypeError, r"boxes: expected a tensor of shape \(M, 5\), got a list"),
        ({"boxes": BOX[:, :4]}, ValueError, r"boxes: expected shape \(M, 5\): image index, .*\(1, 4\)"),
        ({"boxes": BOX[0]}, ValueError, r"boxes: expected shape \(M, 5\).*\(5,\)"),
        ({"boxes": BOX.bfloat16()}, TypeError, "boxes: expected float32 or float64.*bfloat16; pack"),
        ({"boxes": BOX.to_sparse()}, TypeError, "boxes: expected a dense tensor, got layout torch.sparse_coo"),
        ({"boxes": BOX.to("meta")}, TypeError, "boxes: expected a tensor with values, got one on the meta"),
        (
            {"boxes": torch.nested.nested_tensor([BOX, BOX], layout=torch.jagged)},
            TypeError,
            "boxes: expected a dense .*nested",
        ),
        ({"boxes": BOX.long()}, TypeError, "boxes: expected float32 or float64.*int64"),
        ({"boxes": BOX + 1}, ValueError, r"boxes: .*indices from 0 to 0 in column 0 \(batch = 1\), got 1"),
        ({"boxes": BOX - 1}, ValueError, "boxes: expected whole image indices.*got -1"),
        ({"boxes": BOX + 0.5}, ValueError, "boxes: expected whole image indices.*got 0.5"),
        ({"batch": 0}, ValueError, r"boxes: .*batch = 0"),
        ({"batch": -1}, ValueError, "batch: expected an integer >= 0, got -1"),
        ({"batch": 1.0}, ValueError, "batch: .*got 1.0"),
        ({"sizes": torch.ones(1, 2)}, TypeError, r"sizes: expected a list of \(height, width\).*got one tensor"),
        ({"sizes": [(2, 0)]}, ValueError, r"sizes\[0\]: expected \(height, width\), two ints > 0, got \(2, 0\)"),
        ({"sizes": [2]}, ValueError, r"sizes\[0\]: .*got 2"),
        ({"image_size": 16}, ValueError, r"image_size: expected \(height, width\), two ints > 0, got 16"),
        ({"sizes": [(True, 2)]}, ValueError, r"sizes\[0\]: .*got \(True, 2\)"),
        ({"sizes": None}, TypeError, r"sizes: expected a list of \(height, width\), one per level, got None"),
        ({"image_size": (16, -16)}, ValueError, r"image_size: .*\(16, -16\)"),
        ({"anchors": ANCHOR}, TypeError, r"anchors: expected one \(A, 2\) tensor per level.*got one tensor of shape"),
        ({"anchors": None}, TypeError, "anchors: .*got None"),
        ({"anchors": [ANCHOR, ANCHOR]}, ValueError, "anchors: expected one entry per entry of sizes, 1, got 2"),
        ({"anchors": [[8, 8]]}, TypeError, r"anchors\[0\]: expected a tensor of shape \(A, 2\), got a list"),
        ({"anchors": [ANCHOR[0]]}, ValueError, r"anchors\[0\]: expected shape \(A, 2\).*got \(2,\)"),
        ({"anchors": [ANCHOR[:0]]}, ValueError, r"anchors\[0\]: .*A > 0; got \(0, 2\)"),
        ({"anchors": [ANCHOR.to_sparse()]}, TypeError, r"anchors\[0\]: expected a dense tensor, got layout"),
        ({"anchors": ANCHOR[None].to_sparse()}, TypeError, "anchors: expected a dense tensor, got layout"),
        ({"anchors": [ANCHOR > 0]}, TypeError, r"anchors\[0\]: expected a floating or integer dtype, got torch.bool"),
        ({"anchors": [ANCHOR.to("meta")]}, TypeError, r"anchors\[0\]: expected a tensor with values, got .*meta"),
        ({"anchors": [ANCHOR - 8]}, ValueError, r"anchors\[0\]: expected finite widths and heights > 0.*0\.0"),
        ({"anchors": [ANCHOR * float("nan")]}, ValueError, r"anchors\[0\]: expected finite.*nan"),
        ({"threshold": 0}, ValueError, "threshold: expected a number above 0 and below 1, got 0"),
        ({"threshold": 1.0}, ValueError, "threshold: .*got 1.0"),
        ({"threshold": float("nan")}, ValueError, "threshold: .*got nan"),
        ({"threshold": torch.tensor(0.5)}, ValueError, "threshold: .*got tensor"),
        ({"graded": "False"}, TypeError, "graded: expected True or False, got 'False'"),
    ],
)
def test_bad_boxes_anchors_and_sizes_are_clear_errors(bad: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        iou_mask(**{**GOOD, **bad})
    shared = {k: v for k, v in {**GOOD, **bad}.items() if k not in ("anchors", "threshold", "graded")}
    if not bad.keys() & {"anchors", "threshold", "graded"}:
        with pytest.raises(error, match=message):
            box_balance(**shared)


@pytest.mark.parametrize("background", [-1.0, float("nan"), float("inf"), 1e39, 10**400, True, torch.tensor(1.0)])
def test_a_bad_background_weight_is_a_clear_error(background: Any) -> None:
    with pytest.raises(ValueError, match="background: expected a finite number >= 0"):
        box_balance(BOX, [(2, 2)], (16, 16), 1, background=background)
    with pytest.raises(TypeError, match="inclusive: expected True or False, got 'no'"):
        box_balance(BOX, [(2, 2)], (16, 16), 1, inclusive="no")  # type: ignore[arg-type]
