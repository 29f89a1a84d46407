"""DetectionDataset: every fault of a file is handled, and samples depend on (seed, epoch, index) only."""

import copy
import json
import pickle
import struct
import zlib
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from fastkd.yolov3.data.augment import FILL, Augmentation
from fastkd.yolov3.data.dataset import DetectionDataset, collate, fit, letterbox_of, read_image, some_batch
from fastkd.yolov3.model import YOLOv3Tiny
from fastkd.yolov3.show.inspect import _read
from fastkd.yolov3.train.evaluate import evaluate


def annotation(number, bbox, *, image_id=1, category_id=7, **more):
    return {"id": number, "image_id": image_id, "category_id": category_id, "bbox": bbox, **more}


@pytest.fixture
def make(tmp_path):
    """Write a small COCO set (three images, 64 x 48) with these annotations, and return its data set."""

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
    assert sample.targets.tolist() == [[1, 5, 12, 25, 42]]  # "dog" has the larger category id; grey adds 8 rows above


def test_classes_are_numbered_by_category_id(make):
    dataset = make(BOXES)
    assert (dataset.class_names, dataset.annotations.category_ids, dataset.num_classes) == (["cat", "dog"], [7, 9], 2)


def test_batch_packs_targets_and_scales_pixels(make):
    dataset = make([BOXES[0], BOXES[2], annotation(9, [0, 0, 8, 8], image_id=3)])
    batch = collate([dataset[i] for i in range(3)])
    assert batch.images.shape == (3, 3, 64, 64)
    assert batch.images.dtype == torch.float32
    assert torch.equal((batch.images[1] * 255).round().byte(), dataset[1].image)
    assert batch.targets[:, 0].tolist() == [0, 2, 2]  # the second image has no box
    assert batch.targets.shape == (3, 6)
    assert batch.image_ids == [1, 2, 3]


def test_batch_without_any_box_has_empty_targets(make):
    dataset = make()
    batch = collate([dataset[0], dataset[1]])
    assert batch.targets.shape == (0, 6)
    assert batch.targets.dtype == torch.float32


def test_limit_keeps_the_first_images(make):
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


def test_cached_images_are_not_changed_by_augmentation(make):
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


# ---- faults of a data set


def test_missing_images_are_an_error_with_count_and_names(make):
    def remove(coco, folder):
        (folder / "1.png").unlink()
        (folder / "3.png").unlink()

    with pytest.raises(FileNotFoundError, match=r"images: 2 of 3 images are not in .*: 1\.png, 3\.png"):
        make(BOXES, edit=remove)


def damage(coco, folder):
    (folder / "2.png").write_bytes(b"not an image")


def resize(coco, folder):
    cv2.imwrite(str(folder / "2.png"), np.zeros((64, 48, 3), dtype=np.uint8))


def claim(coco, folder):
    """Change a file's header to more pixels than OpenCV reads."""
    content = bytearray((folder / "2.png").read_bytes())
    content[16:24] = struct.pack(">II", 60000, 60000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    (folder / "2.png").write_bytes(content)


def forbid(dataset):
    """Replace an image's file by a folder, which even root can't read as a file."""
    file = dataset.annotations.path(1)
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (damage, r"2\.png: not an image that can be read"),
        (claim, r"2\.png: not an image that can be read"),
        (resize, r"2\.png: the annotations expect 64x48 .* the file has 48x64"),
    ],
)
def test_an_image_that_cannot_be_read_is_named_once_and_left_out(make, edit, message):
    plain = make(BOXES, edit=edit)
    with pytest.warns(UserWarning, match=message) as caught:
        batch = collate([plain[0], plain[1], plain[1], plain[2]])
    assert len(caught) == 1
    assert batch.image_ids == [1, 3]
    assert batch.targets[:, 0].tolist() == [0, 1]
    assert [entry["image_id"] for entry in plain.annotations.coco()["annotations"]] == [1, 3]
    assert collate([plain[1]]).images.shape == (0, 3, 64, 64)


@pytest.mark.filterwarnings("ignore:.*2.png")
def test_another_image_takes_its_place_in_training_whatever_was_read_before(make):
    augmented = make(BOXES, edit=damage, augmentation=BUSY)
    first = [augmented[i] for i in (0, 1, 2)]
    again = make(BOXES, edit=damage, augmentation=BUSY)
    assert all(same(a, b) for a, b in zip(first, reversed([again[i] for i in (2, 1, 0)]), strict=True))
    assert [sample.image_id for sample in first] == [1, 3, 3]


def test_an_image_that_the_system_cannot_read_is_left_out_too(make):
    dataset = make(BOXES)
    forbid(dataset)
    with pytest.warns(UserWarning, match=r"this image is left out: .*2\.png: this file can't be read: Is a directory"):
        assert not dataset[1].readable
    dataset.annotations.path(1).rmdir()
    strict = make(BOXES, strict=True)
    forbid(strict)
    with pytest.raises(ValueError, match=r"2\.png: this file can't be read"):
        strict[1]


def test_warnings_of_images_that_cannot_be_read_come_to_an_end(tmp_path):
    for number in range(9):
        cv2.imwrite(str(tmp_path / f"{number}.png"), np.zeros((8, 8, 3), np.uint8))
    dataset = DetectionDataset.of_images(tmp_path, 32)
    for file in tmp_path.iterdir():
        file.write_bytes(b"no image")
    with pytest.warns(UserWarning, match="left out") as caught:
        assert not any(sample.readable for sample in dataset)
    told = [str(warning.message) for warning in caught]
    assert ["this image is left out" in text for text in told] == [True] * 5 + [False]
    assert told[5].startswith("more images are left out, without further warnings")


@pytest.mark.filterwarnings("ignore:.*.png")
def test_some_batch_goes_on_to_the_next_image_that_can_be_read_each_once(make):
    dataset = make(BOXES, edit=damage)
    assert some_batch(dataset, 3).image_ids == [1, 3]
    assert some_batch(make(BOXES), 2).image_ids == [1, 2]
    assert some_batch(make(BOXES, edit=damage), 2).image_ids == [1, 3]
    for row in range(3):
        dataset.annotations.path(row).write_bytes(b"no image")
    assert some_batch(DetectionDataset(dataset.annotations, None, 64), 3).images.shape == (0, 3, 64, 64)


def test_inspect_leaves_out_image_files_that_it_cannot_read(make):
    dataset, config = make(BOXES, edit=damage), SimpleNamespace(size=64)
    files = [dataset.annotations.path(row) for row in range(3)]
    with pytest.warns(UserWarning, match=r"1 of 3 images can't be read and are left out: .*2\.png"):
        images, _ = _read(files, 3, config)
    expected = torch.stack([dataset[0].image, dataset[2].image]).float() / 255
    assert torch.equal(images, expected)
    with pytest.raises(ValueError, match=r"2\.png: not an image"):
        _read(files[1:2], 3, config)


def again(dataset):
    return pickle.loads(pickle.dumps(dataset))


@pytest.mark.filterwarnings("ignore:.*2.png")
@pytest.mark.parametrize("made", [lambda dataset: dataset, copy.deepcopy, again], ids=["itself", "deepcopy", "pickle"])
def test_workers_tell_what_they_could_not_read_and_it_is_not_scored(make, made):
    original = make(BOXES, edit=damage)
    dataset = made(original)
    metrics = evaluate(YOLOv3Tiny(num_classes=2, width=0.125), dataset, batch_size=1, workers=1)
    assert metrics.mAP >= 0
    assert dataset.annotations.unread.tolist() == [False, True, False]
    assert original.annotations.unread.any() == (dataset is original)


def test_strict_sets_stop_at_an_image_that_cannot_be_read(make):
    for options in ({}, {"augmentation": BUSY}):
        with pytest.raises(ValueError, match=r"2\.png"):
            make(BOXES, edit=damage, strict=True, **options)[1]


def test_strict_sets_stop_in_a_worker_too_and_the_last_line_names_the_image(make):
    loader = DataLoader(make(BOXES, edit=damage, strict=True), num_workers=1, collate_fn=collate)
    with pytest.raises(ValueError, match=r"\nValueError: .*2\.png: not an image that can be read .*\n*\Z"):
        list(loader)


def test_a_set_of_which_nothing_can_be_read_is_an_error(make):
    def damage_all(coco, folder):
        for file in folder.iterdir():
            file.write_bytes(b"")

    data = make(BOXES, edit=damage_all, augmentation=BUSY)
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(ValueError, match="none of the 3 images can be read, see the warnings"),
    ):
        data[0]
    with pytest.raises(ValueError, match="none of the 3 images could be read"):
        data.annotations.coco()


def jpeg(height=64, width=64, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return cv2.imencode(".jpg", noise)[1].tobytes()


@pytest.mark.parametrize("change", ["its end cut off", "half cut off", "half zeros"])
def test_a_jpeg_that_is_cut_off_is_read_as_far_as_it_goes_and_named(tmp_path, change):
    whole, file = jpeg(), tmp_path / "a.jpg"
    half = whole[: len(whole) // 2]
    file.write_bytes({"its end cut off": whole[:-20], "half cut off": half}.get(change, half.ljust(len(whole), b"\0")))
    with pytest.warns(UserWarning, match=r"a\.jpg: this JPEG has no end"):
        image = read_image(file)
    np.testing.assert_array_equal(image, cv2.imread(str(file))[:, :, ::-1])


def test_a_thumbnail_in_a_jpeg_is_not_its_end_and_bytes_after_the_end_are_ignored(tmp_path, recwarn):
    whole, file = jpeg(), tmp_path / "a.jpg"
    thumbnail = jpeg(8, 8)
    segment = b"\xff\xe1" + struct.pack(">H", len(thumbnail) + 2) + thumbnail
    file.write_bytes(whole[:2] + segment + whole[2:] + b"\xff\xda and more")
    read_image(file)
    assert not recwarn.list
    file.write_bytes(whole[:2] + segment + whole[2:-20])
    with pytest.warns(UserWarning, match="has no end"):
        read_image(file)


def test_fill_bytes_before_a_marker_of_a_jpeg_are_allowed(tmp_path, recwarn):
    whole, file = jpeg(), tmp_path / "a.jpg"
    filled = whole[:2] + b"\xff\xff" + whole[2:]
    file.write_bytes(filled)
    read_image(file)
    assert not recwarn.list
    file.write_bytes(filled[:-20])
    with pytest.warns(UserWarning, match="has no end"):
        read_image(file)


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("channels", [1, 3])
def test_of_sixteen_bits_the_eight_that_are_in_use_are_read(tmp_path, bits, channels):
    values = np.linspace(0, (1 << bits) - 1, 64).astype(np.uint16).reshape(8, 8, 1).repeat(channels, axis=2)
    cv2.imwrite(str(tmp_path / "a.png"), values)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png")[:, :, :channels], values >> (bits - 8))


def test_read_image_of_a_missing_file_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        read_image(tmp_path / "absent.png")


def test_grey_and_transparent_images_are_read_as_rgb(tmp_path):
    cv2.imwrite(str(tmp_path / "grey.png"), np.full((4, 4), 9, dtype=np.uint8))
    cv2.imwrite(str(tmp_path / "alpha.png"), np.full((4, 4, 4), 9, dtype=np.uint8))
    assert read_image(tmp_path / "grey.png").shape == read_image(tmp_path / "alpha.png").shape == (4, 4, 3)


def test_boxes_outside_are_clipped_with_one_counted_warning(make):
    with pytest.warns(UserWarning, match=r"2 boxes clipped to their image \(1\.png\)") as caught:
        dataset = make([annotation(1, [-10, 10, 30, 10]), annotation(2, [50, 40, 30, 30]), BOXES[2]])
    assert len(caught) == 1
    assert dataset.annotations.boxes[:2].tolist() == [[0, 10, 20, 10], [50, 40, 14, 8]]
    assert dataset.annotations.areas[:2].tolist() == [200, 112]


@pytest.mark.parametrize("bbox", [[5, 5, 0, 10], [5, 5, 10, -3], [100, 100, 10, 10], [-20, 0, 20, 20]])
def test_boxes_without_area_are_dropped_with_a_counted_warning(make, bbox):
    with pytest.warns(UserWarning, match=r"1 boxes without area in their image dropped \(1\.png\)"):
        dataset = make([annotation(1, bbox), annotation(2, [1, 1, 5, 5])])
    assert len(dataset.annotations.boxes) == 1
    assert len(dataset[0].targets) == 1
    assert [*dataset.annotations.problems.values()] == [["1.png"]]


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


def test_image_without_boxes_is_kept(make):
    sample = make()[0]
    assert sample.targets.shape == (0, 5)
    assert make(augmentation=BUSY)[0].targets.shape == (0, 5)


def test_unknown_category_is_an_error(make):
    with pytest.raises(ValueError, match=r"annotations\[0\] has unknown category_id 5; the file has \[7, 9\]"):
        make([annotation(4, [1, 1, 5, 5], category_id=5)])


def test_unknown_image_is_an_error(make):
    with pytest.raises(ValueError, match=r"annotations\[0\] has unknown image_id 99; the file has \[1, 2, 3\]"):
        make([annotation(4, [1, 1, 5, 5], image_id=99)])


@pytest.mark.parametrize(
    "name", ["../1.png", "a/../../1.png", "/etc/passwd", "..\\1.png", "C:\\1.png", "\\\\host\\1.png", ""]
)
def test_file_name_that_leaves_the_folder_is_refused(make, name):
    with pytest.raises(ValueError, match="leads out of the image folder"):
        make(edit=lambda coco, folder: coco["images"][1].update(file_name=name))


def test_image_in_a_sub_folder_is_fine(make):
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


def test_image_without_extent_is_an_error(make):
    with pytest.raises(ValueError, match=r"images\[2\]: expected width and height of at least 1"):
        make(edit=lambda coco, folder: coco["images"][2].update(width=0))


def test_ids_of_annotations_may_repeat(make):
    assert len(make([annotation(1, [1, 1, 5, 5]), annotation(1, [1, 1, 6, 6])]).annotations.boxes) == 2


def test_ids_of_images_may_not_repeat(make):
    with pytest.raises(ValueError, match="expected different ids in 'images', got 1 twice"):
        make(edit=lambda coco, folder: coco["images"][2].update(id=1))


def test_ids_of_images_may_be_text(make):
    def edit(coco, folder):
        for entry in coco["images"]:
            entry["id"] = f"n{entry['id']}"

    dataset = make([annotation(1, [1, 1, 5, 5], image_id="n3")], edit=edit)
    assert (dataset.annotations.rows.tolist(), dataset.annotations.image_ids.tolist()) == ([2], [1, 2, 3])
    with pytest.raises(ValueError, match=r"unknown image_id 'n4'; the file has \['n1', 'n2', 'n3'\]"):
        make([annotation(1, [1, 1, 5, 5], image_id="n4")], edit=edit)


def test_entries_of_one_file_are_one_image_with_the_boxes_of_all(make):
    def edit(coco, folder):
        coco["images"][2]["file_name"] = "./1.png"

    boxes = [
        annotation(1, [1, 1, 5, 5]),
        annotation(2, [1, 1, 5, 5], image_id=3),
        annotation(3, [2, 2, 5, 5], image_id=3),
    ]
    with pytest.warns(UserWarning, match=r"1 repeated entries of an image joined with its first \(\./1\.png\)"):
        dataset = make(boxes, edit=edit)
    assert dataset.annotations.file_names == ["1.png", "2.png"]
    assert dataset.annotations.boxes[:, :2].tolist() == [[1, 1], [2, 2]]
    assert dataset.annotations.rows.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("images", {"id": 2**70}, r"images\[0\]: expected a whole number of 64 bits as id, got 1180"),
        ("images", {"id": "a"}, r"images\[0\]: expected a whole number of 64 bits as id, got 'a'"),
        ("categories", {"id": -(2**70)}, r"categories\[0\]: expected a whole number of 64 bits as id"),
        ("categories", {"id": "a"}, r"categories\[0\]: expected a whole number"),
        ("images", {"width": 1e30}, r"images\[0\]: expected width and height of at least 1, got \[1e\+30, 48\]"),
        ("images", {"width": float("inf")}, r"images\[0\]: .* got \[inf, 48\]"),
        ("images", {"height": float("nan")}, r"images\[0\]: .* got \[64, nan\]"),
        ("annotations", {"category_id": 2**70}, r"annotations\[0\]: expected whole numbers of 64 bits as ids"),
        ("annotations", {"bbox": None}, r"annotations\[0\]: .* 4 numbers in bbox"),
    ],
)
def test_numbers_that_are_none_or_too_large_are_named(make, part, change, message):
    with pytest.raises(ValueError, match=rf"annotations\.json: {message}"):
        make(BOXES, edit=lambda coco, folder: coco[part][0].update(change))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"id": 1, "image_id": 1, "caption": "a cat"}, "these are captions: detection needs the instances_ file"),
        ({"image_id": 1, "segments_info": []}, "these are the segments of panoptic segmentation"),
    ],
)
def test_files_of_other_tasks_are_told_apart(make, entry, message):
    with pytest.raises(ValueError, match=rf"annotations\[0\] has no category_id, bbox; {message}"):
        make([entry])


def test_missing_annotation_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="annotation_file: no such file"):
        DetectionDataset(tmp_path / "absent.json", tmp_path, 64)


@pytest.mark.parametrize(("option", "value"), [("size", 100), ("size", 0), ("limit", 0)])
def test_bad_arguments_are_refused_by_name(make, option, value):
    with pytest.raises(ValueError, match=f"{option}: expected .* got {value}"):
        make(**{option: value})
