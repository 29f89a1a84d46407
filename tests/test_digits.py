"""The digits scenes: identical everywhere, no leaks between splits, tight boxes, atomic writes."""

import hashlib
import json

import cv2
import numpy as np
import pytest

from fastkd.yolov3.data import digits
from fastkd.yolov3.data.dataset import DetectionDataset, read_image
from fastkd.yolov3.data.digits import load_sources, make_scene, scene_rng, write_digits


def scenes(split, count, seed=0):
    return [make_scene(load_sources(split), size=96, rng=scene_rng(seed, split, index)) for index in range(count)]


@pytest.fixture(scope="module")
def small_set(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("digits") / "set", train=120, val=6, test=7)


def files_of(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_pixels_and_boxes_of_a_seed_never_change():
    """Change the digest only together with FORMAT_VERSION."""
    digest = hashlib.sha256()
    for split in ("train", "val", "test"):
        for scene in scenes(split, 20):
            for part in scene:
                digest.update(np.ascontiguousarray(part).tobytes())
    assert (digits.FORMAT_VERSION, digest.hexdigest()) == (
        1,
        "286723787e2a10dab33c27729ac2c9d1fa219c319b8d29c389b1c7c2a0b9a735",
    )


def test_scenes_are_as_described():
    made = scenes("train", 200)
    boxes = np.concatenate([scene.boxes for scene in made])
    assert {len(scene.boxes) for scene in made} == {1, 2, 3, 4}
    assert {int(c) for scene in made for c in scene.classes} == set(range(10))
    assert all(scene.image.shape == (96, 96, 3) and scene.image.dtype == np.uint8 for scene in made)
    assert boxes.min() >= 0
    assert boxes.max() <= 96
    heights = boxes[:, 3] - boxes[:, 1]
    assert heights.min() >= 18  # half-covered edges of the smallest glyphs may be outside the box
    assert heights.max() <= 48


def test_digits_of_a_scene_hardly_overlap():
    for scene in scenes("val", 100):
        for i, a in enumerate(scene.boxes.tolist()):
            assert all(digits._iou(tuple(a), tuple(b)) <= digits.MAX_IOU for b in scene.boxes.tolist()[i + 1 :])


def test_boxes_are_tight_around_the_ink(monkeypatch):
    """With black ink on white and nothing else, a box must be the extent of the pixels that are mostly ink."""
    monkeypatch.setattr(digits, "_photograph_crop", lambda photographs, size, rng: np.full((size, size, 3), 255.0))
    monkeypatch.setattr(digits, "_add_patch", lambda *args: None)
    monkeypatch.setattr(digits, "_add_stroke", lambda *args: None)
    monkeypatch.setattr(digits, "_between", lambda rng, low, high: low)  # no noise, no slant, opacity 0.7
    monkeypatch.setattr(digits, "MAX_DIGITS", 1)

    def black_ink(canvas, alpha, place, opacity, rng):
        (y, x), (height, width) = place, alpha.shape
        canvas[y : y + height, x : x + width] *= 1 - alpha[:, :, None]

    monkeypatch.setattr(digits, "_ink", black_ink)
    for index in range(20):
        scene = make_scene(load_sources("train"), size=96, rng=scene_rng(0, "train", index))
        rows, columns = np.nonzero(scene.image[:, :, 0] < 128)
        assert scene.boxes.tolist() == [[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]]


def test_splits_share_no_digit_and_train_no_photograph_half():
    glyphs = {split: load_sources(split).glyphs for split in digits.SPLITS}
    assert sum(len(part) for part in glyphs.values()) == 1797
    assert [len(glyphs[split]) for split in digits.SPLITS] == [1078, 360, 359]
    train, test = load_sources("train").photographs, load_sources("test").photographs
    for left, right in zip(train, test, strict=True):
        assert left.shape[1] + right.shape[1] == 640
        assert not np.array_equal(left[:, :320], right[:, :320])


def test_a_scene_does_not_depend_on_how_many_there_are(tmp_path, small_set):
    fewer = write_digits(tmp_path / "fewer", train=3, val=0, test=1)
    for name in ("images/train/000003.png", "images/test/000001.png"):
        assert (fewer / name).read_bytes() == (small_set / name).read_bytes()


def test_another_seed_gives_other_scenes():
    assert not np.array_equal(scenes("train", 1, seed=0)[0].image, scenes("train", 1, seed=1)[0].image)


def test_files_hold_the_scenes_exactly(small_set):
    scene = scenes("val", 6)[5]
    assert np.array_equal(read_image(small_set / "images/val/000006.png"), scene.image)
    content = json.loads((small_set / "annotations/val.json").read_text())
    image_id = next(image["id"] for image in content["images"] if image["file_name"] == "000006.png")
    found = [a for a in content["annotations"] if a["image_id"] == image_id]
    expected = [[x1, y1, x2 - x1, y2 - y1] for x1, y1, x2, y2 in scene.boxes.tolist()]
    assert [a["bbox"] for a in found] == expected
    names = {category["id"]: category["name"] for category in content["categories"]}
    assert [names[a["category_id"]] for a in found] == [str(c) for c in scene.classes.tolist()]


def test_the_data_set_reads_every_split_without_a_warning(small_set, recwarn):
    for name, split, count in [("train", "train", 120), ("train_100", "train", 100), ("val", "val", 6)]:
        dataset = DetectionDataset(small_set / f"annotations/{name}.json", small_set / "images" / split, 96)
        assert len(dataset) == count
        assert dataset.class_names == list("0123456789")
    assert not recwarn.list


def test_subset_is_the_start_of_train(small_set):
    whole = json.loads((small_set / "annotations/train.json").read_text())
    part = json.loads((small_set / "annotations/train_100.json").read_text())
    assert part["images"] == whole["images"][:100]
    assert part["annotations"] == whole["annotations"][: len(part["annotations"])]
    assert not (small_set / "annotations/train_300.json").exists()  # train has only 120 scenes


def test_image_ids_are_unique_over_the_splits(small_set):
    ids = [
        image["id"]
        for split in digits.SPLITS
        for image in json.loads((small_set / f"annotations/{split}.json").read_text())["images"]
    ]
    assert len(ids) == len(set(ids)) == 133


def test_the_same_set_is_reused_untouched(small_set):
    before = {path: path.stat().st_mtime_ns for path in small_set.rglob("*")}
    assert write_digits(small_set, train=120, val=6, test=7) == small_set
    assert {path: path.stat().st_mtime_ns for path in small_set.rglob("*")} == before


def test_another_set_is_not_overwritten(small_set):
    with pytest.raises(FileExistsError, match=r"out_dir: expected a new folder or .*'seed': 1.*; give another folder"):
        write_digits(small_set, train=120, val=6, test=7, seed=1)


def test_foreign_files_are_not_overwritten(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="no manifest"):
        write_digits(tmp_path, train=1, val=1, test=1)
    assert files_of(tmp_path) == {"thesis.txt": b"years of work"}


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    written = []

    def fail_late(path, image, *args):
        written.append(path)
        return len(written) < 4

    monkeypatch.setattr(cv2, "imwrite", fail_late)
    with pytest.raises(OSError, match="could not write"):
        write_digits(tmp_path / "set", train=5, val=1, test=1)
    assert list(tmp_path.iterdir()) == []


def test_losing_a_race_against_the_same_set_is_fine(tmp_path, monkeypatch):
    out = tmp_path / "set"
    write_set = digits._write_set

    def other_process_first(root, *args):
        monkeypatch.setattr(digits, "_write_set", write_set)
        write_digits_in_other(*args)
        write_set(root, *args)

    def write_digits_in_other(counts, size, seed):
        monkeypatch.setattr(digits.os, "getpid", lambda: -1)
        write_digits(out, **counts, size=size, seed=seed)
        monkeypatch.undo()

    monkeypatch.setattr(digits, "_write_set", other_process_first)
    write_digits(out, train=2, val=1, test=1)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"val": -1}, "val: expected a number of scenes >= 0, got -1"), ({"size": 32}, "size: expected 80 to 320")],
)
def test_bad_arguments_are_refused_by_name(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        write_digits(tmp_path / "set", **arguments)
    assert list(tmp_path.iterdir()) == []
