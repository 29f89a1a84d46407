"""DetectionDataset: what is wrong in a file has a defined end, and samples depend on (seed, epoch, index) only."""

import json

import cv2
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from fastkd.yolov3.augment import FILL, Augmentation
from fastkd.yolov3.data import DetectionDataset, collate, fit, letterbox_of, read_image


def annotation(number, bbox, *, image_id=1, category_id=7, **more):
    return {"id": number, "image_id": image_id, "category_id": category_id, "bbox": bbox, **more}


@pytest.fixture
def make(tmp_path):
    """Write a small COCO set (three pictures, 64 x 48) with the given annotations; return a data set over it."""

    def make(annotations=(), *, content=None, edit=None, size=64, **options):
        folder = tmp_path / "images"
        folder.mkdir(exist_ok=True)
        rng = np.random.default_rng(0)
        images = []
        for number in (1, 2, 3):
            cv2.imwrite(str(folder / f"{number}.png"), rng.integers(0, 256, (48, 64, 3), dtype=np.uint8))
            images.append({"id": number, "file_name": f"{number}.png", "width": 64, "height": 48})
        categories = [{"id": 9, "name": "dog"}, {"id": 7, "name": "cat"}]
        coco = {"images": images, "annotations": list(annotations), "categories": categories}
        if edit:
            edit(coco, folder)
        path = tmp_path / "annotations.json"
        path.write_text(json.dumps(coco) if content is None else content)
        return DetectionDataset(path, folder, size, **options)

    return make


def same(a, b):
    return torch.equal(a.image, b.image) and torch.equal(a.targets, b.targets)


BUSY = Augmentation(flip=0.5, mosaic=0.5)
BOXES = [annotation(i, [5 * i, 4, 20, 30], image_id=i, category_id=(7, 9)[i % 2]) for i in (1, 2, 3)]


# ---- samples


def test_sample_holds_rgb_pixels_and_boxes_of_the_input(make):
    sample = make(BOXES)[0]
    assert sample.image.shape == (3, 64, 64)
    assert sample.image.dtype == torch.uint8
    assert sample.image_id == 1
    stored = cv2.imread(str(make(BOXES).annotations.path(0)))  # BGR
    assert np.array_equal(sample.image[0, 8:56].numpy(), stored[:, :, 2])
    assert (sample.image[:, :8] == FILL).all()
    assert sample.targets.dtype == torch.float32
    assert sample.targets.tolist() == [[1, 5, 12, 25, 42]]  # "dog" has the larger category id; 8 rows of grey above


def test_classes_are_numbered_by_category_id(make):
    dataset = make(BOXES)
    assert (dataset.class_names, dataset.annotations.category_ids, dataset.num_classes) == (["cat", "dog"], [7, 9], 2)


def test_batch_packs_targets_and_scales_pixels(make):
    dataset = make([BOXES[0], BOXES[2], annotation(9, [0, 0, 8, 8], image_id=3)])
    batch = collate([dataset[i] for i in range(3)])
    assert batch.images.shape == (3, 3, 64, 64)
    assert batch.images.dtype == torch.float32
    assert torch.equal((batch.images[1] * 255).round().byte(), dataset[1].image)
    assert batch.targets[:, 0].tolist() == [0, 2, 2]  # the second picture has no box
    assert batch.targets.shape == (3, 6)
    assert batch.image_ids == [1, 2, 3]


def test_batch_without_any_box_has_empty_targets(make):
    dataset = make()
    batch = collate([dataset[0], dataset[1]])
    assert batch.targets.shape == (0, 6)
    assert batch.targets.dtype == torch.float32


def test_limit_keeps_the_first_pictures(make):
    dataset = make(BOXES, limit=2)
    assert len(dataset) == 2
    assert dataset.annotations.rows.tolist() == [0, 1]
    assert len(make(BOXES, limit=50)) == 3


def test_index_out_of_range_ends_iteration(make):
    dataset = make(BOXES)
    assert len([*dataset]) == 3
    assert same(dataset[-1], dataset[2])
    with pytest.raises(IndexError, match=r"expected 0\.\.2, got 3"):
        dataset[3]


# ---- determinism


def test_a_sample_depends_on_seed_epoch_and_index_only(make):
    first, second = make(BOXES, augmentation=BUSY, seed=3), make(BOXES, augmentation=BUSY, seed=3, cache=True)
    forward = [first[i] for i in (0, 1, 2)]
    backward = [second[i] for i in (2, 1, 0, 0, 1, 2)]
    assert all(same(a, b) for a, b in zip(forward, reversed(backward[:3]), strict=True))
    assert all(same(a, b) for a, b in zip(forward, backward[3:], strict=True))


def test_epoch_and_seed_change_the_augmentation_and_back(make):
    dataset = make(BOXES, augmentation=BUSY)
    before = dataset[0]
    dataset.set_epoch(1)
    assert not same(before, dataset[0])
    assert dataset.epoch == 1
    dataset.set_epoch(0)
    assert same(before, dataset[0])
    dataset.set_epoch(5)
    assert same(before, dataset.sample(0, epoch=0))
    assert not same(before, make(BOXES, augmentation=BUSY, seed=1)[0])


def test_workers_see_the_epoch_even_when_they_persist(make):
    dataset = make(BOXES, augmentation=BUSY)
    loader = DataLoader(dataset, batch_size=3, num_workers=2, persistent_workers=True, collate_fn=collate)
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        (batch,) = loader
        expected = collate([dataset[i] for i in range(3)])
        assert torch.equal(batch.images, expected.images)
        assert torch.equal(batch.targets, expected.targets)


def test_cached_pictures_are_not_changed_by_augmentation(make):
    dataset = make(BOXES, augmentation=Augmentation(flip=1.0), cache=True)
    first = dataset[0]
    assert same(first, dataset[0])


def test_augmented_boxes_stay_inside_the_input(make):
    dataset = make(BOXES, augmentation=BUSY)
    for epoch in range(20):
        dataset.set_epoch(epoch)
        for sample in dataset:
            boxes = sample.targets[:, 1:]
            assert boxes.numel() == 0 or (boxes.min() >= 0 and boxes.max() <= 64)
            assert (boxes[:, 2:] > boxes[:, :2]).all()


# ---- letterbox


@pytest.mark.parametrize(("width", "height"), [(64, 64), (640, 427), (427, 640), (33, 500), (1, 900), (20, 10)])
def test_letterbox_maps_boxes_there_and_back(width, height):
    image, letterbox = fit(np.zeros((height, width, 3), dtype=np.uint8), 96)
    assert image.shape == (96, 96, 3)
    boxes = np.array([[0, 0, width, height], [0, 0, width / 3, height / 4]])
    inside = letterbox.to_input(boxes)
    assert inside.min() >= 0
    assert inside.max() <= 96
    np.testing.assert_allclose(letterbox.to_original(inside), boxes, atol=1e-9)
    covered = (image != FILL).all(axis=2)
    rows, columns = np.nonzero(covered)
    extent = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    np.testing.assert_allclose(inside[0], extent, atol=1e-9)


def test_letterbox_clips_to_the_original():
    letterbox = letterbox_of(100, 50, 96)
    assert letterbox.to_original(np.array([[-5.0, -5.0, 200.0, 200.0]])).tolist() == [[0, 0, 100, 50]]


def test_box_sizes_are_in_pixels_of_the_input(make):
    sizes = make([annotation(1, [0, 0, 32, 24])], size=128).box_sizes()
    assert sizes.tolist() == [[64, 48]]
    assert make().box_sizes().shape == (0, 2)


# ---- what can be wrong with a data set


def test_missing_pictures_are_an_error_with_count_and_names(make):
    def remove(coco, folder):
        (folder / "1.png").unlink()
        (folder / "3.png").unlink()

    with pytest.raises(FileNotFoundError, match=r"images: 2 of 3 pictures not in .*: 1\.png, 3\.png"):
        make(BOXES, edit=remove)


@pytest.mark.parametrize("damaged", [b"", b"not a picture"])
def test_broken_picture_is_an_error_that_names_it(make, damaged):
    dataset = make(BOXES, edit=lambda coco, folder: (folder / "2.png").write_bytes(damaged))
    dataset[0]
    with pytest.raises(ValueError, match=r"2\.png: not a picture"):
        dataset[1]


def test_picture_of_another_size_than_the_annotations_say_is_an_error(make):
    def resize(coco, folder):
        cv2.imwrite(str(folder / "2.png"), np.zeros((64, 48, 3), dtype=np.uint8))

    with pytest.raises(ValueError, match=r"2\.png: the annotations expect 64x48 .* the file has 48x64"):
        make(BOXES, edit=resize)[1]


def test_read_image_of_a_missing_file_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        read_image(tmp_path / "absent.png")


def test_grey_and_transparent_pictures_are_read_as_rgb(tmp_path):
    cv2.imwrite(str(tmp_path / "grey.png"), np.full((4, 4), 9, dtype=np.uint8))
    cv2.imwrite(str(tmp_path / "alpha.png"), np.full((4, 4, 4), 9, dtype=np.uint8))
    assert read_image(tmp_path / "grey.png").shape == read_image(tmp_path / "alpha.png").shape == (4, 4, 3)


def test_boxes_outside_are_clipped_with_one_counted_warning(make):
    with pytest.warns(UserWarning, match="2 boxes clipped to their picture") as caught:
        dataset = make([annotation(1, [-10, 10, 30, 10]), annotation(2, [50, 40, 30, 30]), BOXES[2]])
    assert len(caught) == 1
    assert dataset.annotations.boxes[:2].tolist() == [[0, 10, 20, 10], [50, 40, 14, 8]]
    assert dataset.annotations.areas[:2].tolist() == [200, 112]


@pytest.mark.parametrize("bbox", [[5, 5, 0, 10], [5, 5, 10, -3], [100, 100, 10, 10], [-20, 0, 20, 20]])
def test_boxes_without_area_are_dropped_with_a_counted_warning(make, bbox):
    with pytest.warns(UserWarning, match="1 boxes without area in the picture dropped"):
        dataset = make([annotation(1, bbox), annotation(2, [1, 1, 5, 5])])
    assert len(dataset.annotations.boxes) == 1
    assert len(dataset[0].targets) == 1
    assert sum(dataset.annotations.problems.values()) == 1


def test_boxes_that_are_not_finite_are_dropped_with_a_counted_warning(make):
    with pytest.warns(UserWarning, match="1 boxes that are not finite dropped"):
        assert len(make([annotation(1, [1, 1, float("nan"), 5])])[0].targets) == 0


def test_rounding_at_the_border_is_not_worth_a_warning(make, recwarn):
    dataset = make([annotation(1, [40, 20, 24.3, 28.01])])
    assert dataset.annotations.boxes[0].tolist() == [40, 20, 24, 28]
    assert not recwarn.list


def test_crowds_are_kept_for_evaluation_but_not_trained_on(make):
    dataset = make([annotation(1, [1, 1, 40, 40], iscrowd=1), BOXES[0] | {"id": 2}])
    assert len(dataset[0].targets) == 1
    assert dataset.annotations.crowd.tolist() == [True, False]


def test_picture_without_boxes_is_kept(make):
    sample = make()[0]
    assert sample.targets.shape == (0, 5)
    assert make(augmentation=BUSY)[0].targets.shape == (0, 5)


def test_unknown_category_is_an_error(make):
    with pytest.raises(ValueError, match=r"annotation 4 has unknown category_id 5; the file's categories are \[7, 9\]"):
        make([annotation(4, [1, 1, 5, 5], category_id=5)])


def test_unknown_picture_is_an_error(make):
    with pytest.raises(ValueError, match="annotation 4 has unknown image_id 99"):
        make([annotation(4, [1, 1, 5, 5], image_id=99)])


@pytest.mark.parametrize(
    "name", ["../1.png", "a/../../1.png", "/etc/passwd", "..\\1.png", "C:\\1.png", "\\\\host\\1.png", ""]
)
def test_file_name_that_leaves_the_folder_is_refused(make, name):
    with pytest.raises(ValueError, match="leads out of the image folder"):
        make(edit=lambda coco, folder: coco["images"][1].update(file_name=name))


def test_picture_in_a_sub_folder_is_fine(make):
    def move(coco, folder):
        (folder / "sub").mkdir()
        (folder / "2.png").rename(folder / "sub" / "2.png")
        coco["images"][1]["file_name"] = "sub/2.png"

    assert make(edit=move)[1].image_id == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "has no list 'images'; expected COCO detection JSON"),
        (
            '{"images": [{"id": 1}], "annotations": [], "categories": []}',
            r"images\[0\] has no file_name, width, height",
        ),
        ('{"images": [], "annotations": [], "categories": []}', "lists no images"),
    ],
)
def test_file_that_is_not_coco_is_an_error_that_says_why(make, content, message):
    with pytest.raises(ValueError, match=message):
        make(content=content)


@pytest.mark.parametrize("bbox", [[1, 2, 3], [1, 2, 3, "4"], None])
def test_box_that_is_not_four_numbers_is_an_error(make, bbox):
    with pytest.raises(ValueError, match=r"annotations\[0\]: .* and 4 numbers in bbox, got"):
        make([annotation(1, bbox)])


def test_picture_without_extent_is_an_error(make):
    with pytest.raises(ValueError, match=r"images\[2\]: expected width and height of at least 1"):
        make(edit=lambda coco, folder: coco["images"][2].update(width=0))


def test_duplicate_ids_are_an_error(make):
    with pytest.raises(ValueError, match="ids in 'annotations' are not unique"):
        make([annotation(1, [1, 1, 5, 5]), annotation(1, [1, 1, 6, 6])])


def test_missing_annotation_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="annotation_file: no such file"):
        DetectionDataset(tmp_path / "absent.json", tmp_path, 64)


@pytest.mark.parametrize(("option", "value"), [("size", 100), ("size", 0), ("limit", 0)])
def test_bad_arguments_are_refused_by_name(make, option, value):
    with pytest.raises(ValueError, match=f"{option}: expected .* got {value}"):
        make(**{option: value})
