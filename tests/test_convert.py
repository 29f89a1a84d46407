"""A converted set is the same set; a split is complete, stays the same, and has its share of every class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from test_annotations import LAYOUTS, NAMES, OBJECTS, WRITERS, csv_file, make_image, write_coco, write_voc, write_yolo

from fastkd.cli import main
from fastkd.yolov3.data.annotations import Annotations, from_rows
from fastkd.yolov3.data.convert import convert, write_sets
from fastkd.yolov3.data.formats import find_set, read_set, sets_in
from fastkd.yolov3.data.split import split, split_folder

WRITTEN = {kind: (write, "train") for kind, write in WRITERS.items()} | LAYOUTS


def tree(root: Path) -> dict[str, bytes]:
    return {str(x.relative_to(root)): x.read_bytes() for x in sorted(root.rglob("*")) if x.is_file()}


@pytest.mark.parametrize("to", ["coco", "yolo"])
@pytest.mark.parametrize("kind", WRITTEN)
def test_a_set_of_any_layout_is_the_same_after_it_was_converted(kind: str, to: str, tmp_path: Path) -> None:
    write, name = WRITTEN[kind]
    write(tmp_path / "mine")
    before = tree(tmp_path / "mine")
    assert main(["data", "convert", str(tmp_path / "mine"), "--to", to, "--out", str(tmp_path / "out")]) == 0
    assert tree(tmp_path / "mine") == before
    given = read_set(*find_set(tmp_path / "mine", name)).as_given()
    found = read_set(*find_set(tmp_path / "out", "train" if to == "yolo" and name == "all" else name)).as_given()
    assert found.class_names == NAMES
    rows = {Path(file).stem: row for row, file in enumerate(found.file_names)}
    assert rows.keys() == OBJECTS.keys()
    for row, file in enumerate(given.file_names):
        then, now = given.of(row), found.of(rows[Path(file).stem])
        kept = ~given.crowd[then] if to == "yolo" else np.ones(len(given.crowd[then]), dtype=bool)
        np.testing.assert_allclose(found.boxes[now], given.boxes[then][kept], atol=1e-6 if to == "coco" else 1e-4)
        assert found.classes[now].tolist() == given.classes[then][kept].tolist()
        assert found.crowd[now].tolist() == given.crowd[then][kept].tolist()
        assert found.path(rows[Path(file).stem]).read_bytes() == given.path(row).read_bytes()


def test_coco_keeps_its_ids_and_areas(tmp_path: Path) -> None:
    write_coco(tmp_path / "mine")
    convert(tmp_path / "mine", tmp_path / "out", "coco")
    then, now = (json.loads((tmp_path / x / "annotations/train.json").read_text()) for x in ("mine", "out"))
    assert now["images"] == then["images"]
    assert now["categories"] == then["categories"]
    assert [a["area"] for a in now["annotations"]] == [20 * 30, 24 * 28, 64 * 48]


def test_images_are_links_or_with_copy_files_and_nothing_is_written_over(tmp_path: Path, capsys: Any) -> None:
    write_voc(tmp_path / "mine")
    arguments = ["data", "convert", str(tmp_path / "mine"), "--to", "coco", "--out"]
    assert main([*arguments, str(tmp_path / "links")]) == 0
    assert main([*arguments, str(tmp_path / "files"), "--copy", "--set", "train"]) == 0
    assert (tmp_path / "links/images/train/a.png").is_symlink()
    assert not (tmp_path / "files/images/train/a.png").is_symlink()
    before = tree(tmp_path)
    assert main([*arguments, str(tmp_path / "files")]) == 2
    assert "exists already, and no file is overwritten" in capsys.readouterr().err
    assert tree(tmp_path) == before


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path) -> None:
    write_coco(tmp_path / "mine")
    csv_file(tmp_path / "mine/other", "test_labels.csv")
    sets = {"train": read_set(*find_set(tmp_path / "mine", "train"))}
    sets["test"] = read_set(*find_set(tmp_path / "mine/other", "test"))
    sets["test"].class_names = ["ant", "bee"]
    with pytest.raises(ValueError, match=r"one list of classes.* train has cat, dög and test has ant, bee"):
        write_sets(sets, tmp_path / "out", "yolo")
    (tmp_path / "mine/images/train/a.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 3 images are missing from .*: a\.png"):
        convert(tmp_path / "mine", tmp_path / "out", "coco")
    assert [x.name for x in tmp_path.iterdir()] == ["mine"]


def test_two_images_of_one_name_are_refused_for_yolo(tmp_path: Path) -> None:
    for suffix in (".png", ".jpg"):
        make_image(tmp_path / f"a{suffix}")
    both = from_rows("here", tmp_path, ["a.png", "a.jpg"], [(64, 48)] * 2, ["x"], np.zeros((0, 7)))
    with pytest.raises(
        ValueError, match=r"expected different names, .* got 1 names twice: a; rename the images, or write COCO"
    ):
        write_sets({"train": both}, tmp_path / "out", "yolo")


def test_what_a_format_cannot_hold_is_left_out_and_said(tmp_path: Path, capsys: Any) -> None:
    write_voc(tmp_path / "mine", size="")
    xml = tmp_path / "mine/Annotations/c.xml"
    xml.write_text(xml.read_text().replace("<xmax>64", "<xmax>99"))
    (tmp_path / "mine/JPEGImages/b 2.png").write_bytes(b"no image")
    arguments = ["data", "convert", str(tmp_path / "mine"), "--to", "yolo", "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    reported = capsys.readouterr().out
    assert "train: 2 images, 2 boxes" in reported
    for note in (
        "1 images that can't be read left out: b 2.png",
        "1 crowd or difficult objects left out: a.png",
        "1 boxes clipped to their image: c.png",
    ):
        assert f"note: {note}" in reported


def test_yolo_names_its_sets_as_trainers_do(tmp_path: Path) -> None:
    write_coco(tmp_path)
    found = read_set(*find_set(tmp_path, "train"))
    write_sets({"train2017": found, "val2017": found, "extra": found}, tmp_path / "out", "yolo")
    content = yaml.safe_load((tmp_path / "out/data.yaml").read_text(encoding="utf-8"))
    places = {"train": "images/train2017", "val": "images/val2017", "extra": "images/extra"}
    assert content == places | {"nc": 2, "names": NAMES}
    assert sets_in(tmp_path / "out") == ["train", "val", "extra"]
    assert len(read_set(*find_set(tmp_path / "out", "extra"))) == len(found)


@pytest.mark.parametrize(
    ("names", "keys"),
    [
        (["all"], ["train"]),
        (["val2017"], ["val"]),
        (["train", "val2014", "val2017"], ["train", "val2014", "val2017"]),
        (["train", "trainval", "val"], ["train", "val", "trainval"]),
    ],
)
def test_no_set_of_a_yaml_takes_the_name_of_another(names: list[str], keys: list[str], tmp_path: Path) -> None:
    write_coco(tmp_path)
    found = read_set(*find_set(tmp_path, "train"))
    write_sets(dict.fromkeys(names, found), tmp_path / "out", "yolo")
    assert sets_in(tmp_path / "out") == keys


def test_images_of_one_name_in_two_folders_stay_two(tmp_path: Path) -> None:
    images = [{"id": k, "file_name": f"{x}/a b.png", "width": 20, "height": 20} for k, x in enumerate(("ä", "ß"), 1)]
    boxes = [{"id": k, "image_id": k, "category_id": 1, "bbox": [k, 1, 2, 3]} for k in (1, 2)]
    for image in images:
        make_image(tmp_path / "in/images" / str(image["file_name"]), 20, 20)
    content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "c"}]}
    (tmp_path / "in/annotations").mkdir()
    (tmp_path / "in/annotations/train.json").write_text(json.dumps(content), encoding="utf-8")
    convert(tmp_path / "in", tmp_path / "yolo", "yolo")
    found = convert(tmp_path / "yolo", tmp_path / "coco", "coco")["train"]
    assert {name: found.boxes[found.of(row)][0, 0] for row, name in enumerate(found.file_names)} == {
        "ä/a b.png": pytest.approx(1),
        "ß/a b.png": pytest.approx(2),
    }


# ---- splits


def many(counts: dict[int, int]) -> Annotations:
    """Return annotations with this many images with a box of each class; class -1 stands for no box."""
    classes = [k for k, count in counts.items() for _ in range(count)]
    table = np.array([(row, k, 0, 0, 9, 9, 0) for row, k in enumerate(classes) if k >= 0], dtype=float)
    names = [f"{row}.jpg" for row in range(len(classes))]
    return from_rows("here", Path("x"), names, [(9, 9)] * len(classes), ["a", "b", "c"], table)


def test_every_part_has_its_share_of_every_class() -> None:
    found = many({0: 200, 1: 50, 2: 20, -1: 30})
    parts = split(found, {"val": 0.1, "test": 0.2})
    assert {name: len(part) for name, part in parts.items()} == {"train": 210, "val": 30, "test": 60}
    names = [name for part in parts.values() for name in part.file_names]
    assert sorted(names) == sorted(found.file_names)
    for name, share in (("val", 0.1), ("test", 0.2)):
        counts = np.bincount(parts[name].classes, minlength=3)
        assert np.abs(counts - share * np.array([200, 50, 20])).max() <= 1
    again, other = split(found, {"val": 0.1, "test": 0.2}), split(found, {"val": 0.1, "test": 0.2}, seed=1)
    assert again["val"].file_names == parts["val"].file_names != other["val"].file_names


@pytest.mark.parametrize("shares", [{}, {"val": 0.0}, {"val": 0.5, "test": 0.5}, {"val": -0.1}])
def test_shares_that_are_none_are_refused(shares: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"shares: expected numbers above 0 that are less than 1 together"):
        split(many({0: 9}), shares)


def test_the_only_image_of_a_class_stays_in_train() -> None:
    for seed in range(9):
        parts = split(many({0: 30, 1: 1, 2: 1}), {"val": 0.1, "test": 0.1}, seed=seed)
        assert {1, 2} <= set(parts["train"].classes.tolist())
    assert len(split(many({0: 1, 1: 1, 2: 1}), {"val": 0.3})["val"]) == 1


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(ValueError, match="seed: expected 0 or more, got -1"):
        split(many({0: 9}), {"val": 0.1}, seed=-1)


def test_a_set_of_one_image_cannot_be_split() -> None:
    assert len(split(many({0: 2}), {"val": 0.1})["val"]) == 1
    with pytest.raises(ValueError, match="here: expected enough images for every part, got 1"):
        split(many({0: 1}), {"val": 0.1})


def unsplit(root: Path) -> None:
    """Return a VOC set without lists, of twenty images."""
    write_voc(root)
    (root / "ImageSets/Main/train.txt").unlink()
    text = (root / "Annotations/a.xml").read_text(encoding="utf-8")
    for number in range(17):
        make_image(root / f"JPEGImages/{number}.png", seed=number)
        (root / f"Annotations/{number}.xml").write_text(text.replace("a.png", f"{number}.png"), encoding="utf-8")


def test_the_command_splits_and_takes_the_other_sets_along(tmp_path: Path, capsys: Any) -> None:
    unsplit(tmp_path / "mine")
    out = str(tmp_path / "out")
    assert main(["data", "split", str(tmp_path / "mine"), "--test", "0.2", "--to", "yolo", "--out", out]) == 0
    assert [line.split(",")[0] for line in capsys.readouterr().out.splitlines() if "images" in line] == [
        *("train: 14 images", "val: 2 images", "test: 4 images")
    ]
    assert main(["data", "check", out, "--out", str(tmp_path / "check")]) == 0
    parts = split_folder(out, {"val2": 0.2})
    assert {name: len(part) for name, part in parts.items()} == {"train": 12, "val2": 2, "val": 2, "test": 4}
    assert main(["data", "split", out, "--out", str(tmp_path / "again")]) == 2
    assert "already has a set val: --val 0 keeps it" in capsys.readouterr().err


RUN = ["--width", "0.125", "--size", "64", "--batch", "4", "--cpu", "--anchors", "default", "--warmup", "1"]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_run_makes_the_split_that_is_missing_and_keeps_it(tmp_path: Path, capsys: Any) -> None:
    data, run = tmp_path / "mine", tmp_path / "run"
    unsplit(data)
    before = tree(data)
    arguments = ["train", "--data", str(data), "--out", str(run), *RUN, "--steps"]
    assert main([*arguments, "2"]) == 0
    reported = capsys.readouterr().out
    assert f"val: not in {data}, so 2 of the 20 images of all are held back" in reported
    assert tree(data) == before
    made = tree(run / "split")
    assert sets_in(run / "split") == ["train", "val"]
    train, val = (read_set(*find_set(run / "split", name)) for name in ("train", "val"))
    assert (len(train), len(val), train.missing() + val.missing()) == (18, 2, [])
    assert not {*train.file_names} & {*val.file_names}
    make_image(data / "JPEGImages/new.png")
    (data / "Annotations/new.xml").write_bytes((data / "Annotations/a.xml").read_bytes())
    assert main([*arguments, "2", "--resume"]) == 0
    assert tree(run / "split") == made
    capsys.readouterr()
    results = []
    for source in (data, run / "split"):
        file = tmp_path / f"{len(results)}.json"
        assert main(["eval", str(run / "model.pt"), "--data", str(source), "--detections", str(file), "--cpu"]) == 0
        results.append(file.read_bytes())
    assert results[0] == results[1]
    reported = capsys.readouterr().err
    assert f"val: the split that the training made of the data, {run / 'split/annotations/val.json'}" in reported


def test_no_split_is_made_where_it_is_not_missing_or_not_asked_for(tmp_path: Path, capsys: Any) -> None:
    write_coco(tmp_path / "coco")
    (tmp_path / "coco/annotations/val2017.json").write_bytes((tmp_path / "coco/annotations/train.json").read_bytes())
    for more in ([], ["--val", "dev"]):
        assert main(["train", "--data", str(tmp_path / "coco"), "--out", str(tmp_path / "run"), *RUN, *more]) == 2
        assert "sets found: train, val2017; name one of these, or make a split: fastkd data split" in (
            capsys.readouterr().err
        )
    write_yolo(tmp_path / "yolo")
    unsplit(tmp_path / "voc")
    for name, begins in (("yolo", 0), ("voc", 2)):  # the second time, the folder has a split of other data
        out = ["--out", str(tmp_path / "run"), *RUN, "--steps", "1"]
        assert main(["train", "--data", str(tmp_path / name), *out]) == begins
    assert "is the split of" in capsys.readouterr().err
    more = ["--out", str(tmp_path / "all"), "--val", "none", *RUN, "--steps", "1"]
    assert main(["train", "--data", str(tmp_path / "voc"), "--train", "all", *more]) == 0
    assert not (tmp_path / "all/split").exists()
