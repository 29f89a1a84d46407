"""Augmentation is deterministic, and boxes follow their pixels."""

import numpy as np
import pytest

from fastkd.yolov3.data.augment import FILL, Augmentation, augment, crop, flip, mosaic, recolour

STILL = Augmentation(zoom=(1, 1), translate=0, hue=0, saturation=0, value=0)
RED = (255, 0, 0)


def make_image(height=60, width=80, box=(20, 10, 50, 40), background=30):
    """Return a red rectangle on grey, and its box, which can be found again from the pixels."""
    image = np.full((height, width, 3), background, dtype=np.uint8)
    x1, y1, x2, y2 = box
    image[y1:y2, x1:x2] = RED
    return image, np.array([box], dtype=np.float32), np.array([3], dtype=np.int64)


def red_box(image):
    rows, columns = np.nonzero((image == RED).all(axis=2))
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_the_same_generator_state_gives_the_same_image():
    options = Augmentation(flip=0.5)
    first, second, third = (augment(*make_image(), np.random.default_rng(seed), options) for seed in (5, 5, 6))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert first[0].shape != third[0].shape or not np.array_equal(first[0], third[0])


@pytest.mark.parametrize("seed", range(30))
def test_boxes_follow_their_pixels(seed):
    options = Augmentation(flip=0.5, zoom=(0.6, 1.6), translate=0.2, hue=0, saturation=0, value=0, min_visible=0)
    image, boxes, classes = augment(*make_image(), np.random.default_rng(seed), options)
    assert boxes.tolist() == [red_box(image)]
    assert classes.tolist() == [3]
    assert (boxes.dtype, classes.dtype, image.dtype) == (np.float32, np.int64, np.uint8)


def test_nothing_to_do_changes_nothing():
    image, boxes, classes = make_image()
    out = augment(image, boxes, classes, np.random.default_rng(0), STILL)
    assert all(np.array_equal(a, b) for a, b in zip(out, (image, boxes, classes), strict=True))


def test_inputs_are_left_alone():
    image, boxes, classes = make_image()
    copies = image.copy(), boxes.copy(), classes.copy()
    augment(image, boxes, classes, np.random.default_rng(1), Augmentation(flip=1.0))
    assert all(np.array_equal(a, b) for a, b in zip((image, boxes, classes), copies, strict=True))


def test_no_flip_by_default():
    """Mirrored digits would be wrong."""
    image, boxes, classes = make_image(box=(0, 10, 30, 40))
    quiet = Augmentation(zoom=(1, 1), translate=0)
    for seed in range(20):
        assert augment(image, boxes, classes, np.random.default_rng(seed), quiet)[1][0, 0] == 0


def test_flip_mirrors_and_twice_is_the_identity():
    image, boxes, _ = make_image(box=(0, 10, 30, 40))
    mirrored, mirrored_boxes = flip(image, boxes)
    assert mirrored_boxes.tolist() == [[50, 10, 80, 40]] == [red_box(mirrored)]
    assert np.array_equal(flip(mirrored, mirrored_boxes)[0], image)


def test_crop_outside_is_grey():
    image, boxes, classes = crop(*make_image(), (-10, -5, 100, 80))
    assert image.shape == (80, 100, 3)
    assert (image[:5] == FILL).all()
    assert (image[:, 90:] == FILL).all()
    assert boxes.tolist() == [[30, 15, 60, 45]]
    assert len(classes) == 1


@pytest.mark.parametrize(("min_visible", "kept"), [(0.2, 1), (0.4, 0)])
def test_crop_drops_boxes_that_are_hardly_visible(min_visible, kept):
    _, boxes, classes = crop(*make_image(), (41, 0, 30, 60), min_visible=min_visible)  # 9 of the box's 30 columns stay
    assert len(boxes) == len(classes) == kept


def test_crop_away_from_the_image_is_empty():
    image, boxes, _ = crop(*make_image(), (500, 500, 20, 10))
    assert image.shape == (10, 20, 3)
    assert (image == FILL).all()
    assert boxes.shape == (0, 4)


def test_image_without_boxes_stays_without():
    image, _, _ = make_image()
    none = np.zeros((0, 4), dtype=np.float32), np.zeros(0, dtype=np.int64)
    _, boxes, classes = augment(image, *none, np.random.default_rng(0), Augmentation(flip=1.0))
    assert boxes.shape == (0, 4)
    assert classes.shape == (0,)


def test_recolour_changes_colour_within_its_bounds():
    image = np.full((4, 4, 3), (200, 100, 100), dtype=np.uint8)
    options = Augmentation(hue=0, saturation=0, value=0.2)
    values = [int(recolour(image, np.random.default_rng(seed), options).max()) for seed in range(50)]
    assert 158 <= min(values) < 180
    assert 220 < max(values) <= 241


def test_mosaic_joins_four_images_with_their_boxes():
    tiles = [(*make_image(64, 64, box=(8, 8, 56, 56))[:2], np.array([i])) for i in range(4)]
    for seed in range(10):
        image, boxes, classes = mosaic(tiles, np.random.default_rng(seed))
        assert image.shape == (64, 64, 3)
        covered = np.zeros((64, 64), dtype=bool)
        for x1, y1, x2, y2 in boxes.astype(int).tolist():
            covered[y1:y2, x1:x2] = True
        assert np.array_equal(covered, (image == RED).all(axis=2))
        assert classes.tolist() == [0, 1, 2, 3]


def test_mosaic_refuses_unequal_images():
    with pytest.raises(ValueError, match=r"tiles: expected square images of one size, got .*\(60, 80\)"):
        mosaic([make_image()] * 4, np.random.default_rng(0))
    with pytest.raises(ValueError, match="expected 4 labelled images, got 1"):
        mosaic([make_image(64, 64)], np.random.default_rng(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flip": 1.5}, "flip: expected a number in 0..1, got 1.5"),
        ({"zoom": (2, 1)}, "zoom: expected .low, high."),
        ({"zoom": (0, 1)}, "zoom"),
    ],
)
def test_bad_options_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**options)
