"""One set in COCO JSON, Pascal VOC XML and YOLO text is the same set; what is wrong in a file is named."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from fastkd.cli import main
from fastkd.yolov3.data import DetectionDataset
from fastkd.yolov3.data_check import _are_parts
from fastkd.yolov3.evaluate import score
from fastkd.yolov3.formats import find_set, read_pictures, read_set, sets_in

NAMES = ["cat", "dög"]
# picture to (class, x, y, width, height, difficult), whole pixels of 64 x 48
OBJECTS = {
    "a": [(0, 10, 4, 20, 30, False), (1, 40, 20, 24, 28, True)],
    "b 2": [],
    "c": [(1, 0, 0, 64, 48, False)],
}


def picture(path: Path, width: int = 64, height: int = 48, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng([seed, *path.name.encode()]).integers(0, 256, (height, width, 3), dtype=np.uint8)
    path.write_bytes(cv2.imencode(path.suffix, noise)[1].tobytes())


def write_coco(root: Path) -> None:
    images = [{"id": 5 + i, "file_name": f"{n}.png", "width": 64, "height": 48} for i, n in enumerate(OBJECTS)]
    boxes = [(5 + i, o) for i, objects in enumerate(OBJECTS.values()) for o in objects]
    annotations = [
        {"id": i, "image_id": number, "category_id": 7 + o[0], "bbox": list(o[1:5]), "iscrowd": int(o[5])}
        for i, (number, o) in sorted(enumerate(boxes), key=lambda x: -x[1][0])  # pictures in another order
    ]
    categories = [{"id": 7 + i, "name": name} for i, name in enumerate(NAMES)]
    (root / "annotations").mkdir(parents=True)
    text = json.dumps({"images": images, "annotations": annotations, "categories": categories})
    (root / "annotations/train.json").write_text(text, encoding="utf-8")
    for name in OBJECTS:
        picture(root / f"images/train/{name}.png")


def voc_object(name: str, x: float, y: float, w: float, h: float, difficult: bool) -> str:
    box = f"<xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + w}</xmax><ymax>{y + h}</ymax>"
    return f"<object><name>{name}</name><difficult>{int(difficult)}</difficult><bndbox>{box}</bndbox></object>"


def write_voc(root: Path, size: str = "<size><width>64</width><height>48</height></size>") -> None:
    for folder in ("Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for name, objects in OBJECTS.items():
        inside = "".join(voc_object(NAMES[o[0]], *o[1:]) for o in objects)
        text = f"<annotation><filename>{name}.png</filename>{size}{inside}</annotation>"
        (root / f"Annotations/{name}.xml").write_text(text, encoding="utf-8")
        picture(root / f"JPEGImages/{name}.png")
    names = [f"{name} -1" for name in OBJECTS]
    (root / "ImageSets/Main/train.txt").write_text("\ufeff" + "\r\n".join(names) + "\r\n", encoding="utf-8")


def write_yolo(root: Path, listed: bool = False) -> None:
    for name, objects in OBJECTS.items():
        picture(root / f"images/train/{name}.png")
        lines = [f"{k} {(x + w / 2) / 64} {(y + h / 2) / 48} {w / 64} {h / 48}" for k, x, y, w, h, _ in objects]
        (root / "labels/train").mkdir(parents=True, exist_ok=True)
        if lines:  # a picture without objects has no label file
            text = "\ufeff" + "\r\n".join(lines)
            (root / f"labels/train/{name}.txt").write_text(text, encoding="utf-8")
    place = "images/train"
    if listed:
        place = "train.txt"
        (root / place).write_text("".join(f"./images/train/{name}.png\n" for name in OBJECTS), encoding="utf-8")
    text = f"path: .\ntrain: {place}\nnc: 2\nnames:\n  0: {NAMES[0]}\n  1: {NAMES[1]}\n"
    (root / "data.yaml").write_text(text, encoding="utf-8")


WRITERS: dict[str, Any] = {
    "coco": write_coco,
    "voc": write_voc,
    "voc without sizes": lambda root: write_voc(root, size=""),
    "yolo": write_yolo,
    "yolo list": lambda root: write_yolo(root, listed=True),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_set_is_the_same_in_every_format(kind: str, tmp_path: Path) -> None:
    WRITERS[kind](tmp_path)
    assert sets_in(tmp_path) == ["train"]
    found = read_set(*find_set(tmp_path, "train"))
    order = [
        found.file_names.index(f"{name}.png" if "list" not in kind else f"images/train/{name}.png") for name in OBJECTS
    ]
    assert found.class_names == NAMES
    assert found.sizes.tolist() == [[64, 48]] * 3
    for row, objects in zip(order, OBJECTS.values(), strict=True):
        of = found.of(row)
        boxes = np.array([o[1:5] for o in objects], dtype=float).reshape(-1, 4)
        np.testing.assert_allclose(found.boxes[of], boxes, atol=1e-9)
        assert found.classes[of].tolist() == [o[0] for o in objects]
        difficult = [o[5] and "yolo" not in kind for o in objects]  # which YOLO's text can't say
        assert found.crowd[of].tolist() == difficult
        assert found.path(row).is_file()
    sample = DetectionDataset(found, None, 64)[order[2]]
    assert sample.targets.tolist() == [[1, 0, 8, 64, 56]]


@pytest.mark.parametrize("kind", ["coco", "voc", "yolo"])
def test_every_format_can_be_scored(kind: str, tmp_path: Path) -> None:
    WRITERS[kind](tmp_path)
    data = DetectionDataset(*find_set(tmp_path, "train"), 64)
    coco = data.annotations.coco()
    found = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 0.9}
        for a in coco["annotations"]
        if not a["iscrowd"]
    ]
    assert score(found, data).mAP == pytest.approx(1)


def test_all_xml_files_of_a_folder_are_a_set_too(tmp_path: Path) -> None:
    write_voc(tmp_path)
    (tmp_path / "ImageSets/Main/train.txt").write_text("c\n")
    part = read_set(*find_set(tmp_path, "train"))
    assert part.file_names == ["c.png"]
    assert part.class_names == NAMES  # of all files, so that lists agree
    assert len(read_set(tmp_path / "Annotations", tmp_path / "JPEGImages")) == 3


def test_polygons_become_their_boxes_and_rules_hold_for_every_format(tmp_path: Path) -> None:
    write_yolo(tmp_path)
    (tmp_path / "labels/train/a.txt").write_text("0 0.1 0.2 0.5 0.2 0.3 0.8\n1 0.5 0.5 0 0.2\n1 1.0 0.5 0.5 0.5\n")
    with pytest.warns(UserWarning, match="1 boxes without area in the picture dropped, 1 boxes clipped"):
        data = DetectionDataset(*find_set(tmp_path, "train"), 64)
    np.testing.assert_allclose(data.annotations.boxes[:2], [[6.4, 9.6, 25.6, 28.8], [48, 12, 16, 24]])


def test_pictures_alone_are_a_set_without_boxes(tmp_path: Path) -> None:
    for name in ("x/10.png", "x/9.png", "1.jpg"):
        picture(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    found = read_pictures(tmp_path)
    assert [Path(name).as_posix() for name in found.file_names] == ["1.jpg", "x/9.png", "x/10.png"]
    assert len(found.boxes) == 0
    assert DetectionDataset.of_pictures(tmp_path, 64)[2].targets.shape == (0, 5)


# ---- wrong input

ENTITY = '<!DOCTYPE a [<!ENTITY e "{0}">]><annotation><filename>&e;</filename></annotation>'
EXTERNAL = '<!DOCTYPE a [<!ENTITY e SYSTEM "file:///etc/passwd">]><annotation><filename>&e;</filename></annotation>'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ENTITY.format("x" * 100), r"c\.xml: refused, as it declares entities"),
        (EXTERNAL, r"c\.xml: refused, as it declares entities"),
        ("<annotation><object>", r"c\.xml: not Pascal VOC XML"),
        (
            "<annotation><object><name>cat</name></object></annotation>",
            r"c\.xml: not Pascal VOC XML: could not convert",
        ),
        ("<annotation><filename>../c.png</filename></annotation>", "leads out of the image folder"),
        ("<annotation><filename>C:\\c.png</filename></annotation>", "leads out of the image folder"),
        ("<annotation><size><width>inf</width></size></annotation>", r"c\.xml: not Pascal VOC XML: cannot convert"),
        (f"<annotation>{voc_object('', 1, 1, 5, 5, False)}</annotation>", "an object without a name"),
    ],
)
def test_an_xml_file_that_is_wrong_or_malicious_is_named(text: str, message: str, tmp_path: Path) -> None:
    write_voc(tmp_path)
    (tmp_path / "Annotations/c.xml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_set(*find_set(tmp_path, "train"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("2 0.5 0.5 0.1 0.1", r"line 2: expected a class index from 0 to 1, got 2"),
        ("0.5 0.5 0.5 0.1 0.1", "expected a class index"),
        ("nan 0.5 0.5 0.1 0.1", "expected a class index"),
        ("0 0.5 0.5 0.1", "got 4 numbers"),
        ("0 0.5 0.5 0.1 0.1 0.2", "got 6 numbers"),
        ("cat 0.5 0.5 0.1 0.1", "expected numbers, got 'cat 0.5"),
        ("0 0.5 nan 0.1 0.1", "expected finite numbers"),
        ("0 320 240 64 64", "expected numbers relative to the picture"),
    ],
)
def test_a_line_of_labels_that_is_wrong_is_named(line: str, message: str, tmp_path: Path) -> None:
    write_yolo(tmp_path)
    (tmp_path / "labels/train/a.txt").write_text(f"0 0.5 0.5 0.1 0.1\n{line}\n")
    with pytest.raises(ValueError, match=rf"a\.txt, {'' if message.startswith('line') else 'line 2: .*'}{message}"):
        read_set(*find_set(tmp_path, "train"))


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("train: images/train\nnames: [a, b]\nnc: 3\n", ValueError, "nc is 3, but names has 2"),
        ("train: images/train\nnames: {0: a, 2: b}\n", ValueError, "names: expected the indices 0 to 1"),
        ("train: images/train\nnames: {0: a, b: c}\n", ValueError, "names: expected the indices 0 to 1"),
        ("train: images/train\n", ValueError, "names: expected a list of class names"),
        ("train: images/train\nnames: [a, b]\nkpt_shape: [2, 2]\n", ValueError, "labels of boxes or polygons, got"),
        (
            "val: images/train\nnames: [a, b]\n",
            FileNotFoundError,
            "expected a folder or a .txt list, got no such entry",
        ),
        ("train: [x, y]\nnames: [a, b]\n", FileNotFoundError, "write the pictures' paths into one .txt list"),
        ("train: images/absent\nnames: [a, b]\n", FileNotFoundError, "images/absent does not exist"),
        ("- 1\n", ValueError, "expected train:, val: and names:, got list"),
        ("a: [\n", ValueError, "not YAML"),
        ("!!python/object/apply:os.system ['true']\n", ValueError, "not YAML"),
    ],
)
def test_a_yaml_file_that_is_wrong_is_named(text: str, error: type[Exception], message: str, tmp_path: Path) -> None:
    write_yolo(tmp_path)
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(error, match=message):
        read_set(*find_set(tmp_path / "data.yaml", "train"))


def test_folders_that_are_absent_empty_or_of_nothing_known_are_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="data: no such file or folder"):
        find_set(tmp_path / "absent", "train")
    (tmp_path / "stuff").mkdir()
    with pytest.raises(FileNotFoundError, match=r"sets found: none; looked for annotations/.*\(COCO\).*VOC.*YOLO"):
        find_set(tmp_path, "train")
    with pytest.raises(ValueError, match="no pictures in this folder"):
        read_pictures(tmp_path)
    (tmp_path / "x.csv").write_text("")
    with pytest.raises(ValueError, match=r"annotations: expected a \.json file"):
        read_set(tmp_path / "x.csv", tmp_path)


def test_a_folder_that_may_not_be_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "a.png")
    monkeypatch.setattr(os, "access", lambda *_: False)  # who runs as root may read everything
    with pytest.raises(PermissionError, match="no permission to read"):
        read_pictures(tmp_path)


def test_a_yaml_file_may_be_relative_to_a_folder_beside_it_as_exports_are(tmp_path: Path) -> None:
    write_yolo(tmp_path)
    (tmp_path / "data.yaml").write_text("train: ../images/train\nnames: [a, b]\n")
    assert find_set(tmp_path, "train") == (tmp_path / "data.yaml", tmp_path / "images/train")


def test_linked_folders_are_looked_into_once(tmp_path: Path) -> None:
    picture(tmp_path / "set/a.png")
    picture(tmp_path / "elsewhere/b.png")
    (tmp_path / "set/linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "set", target_is_directory=True)
    (tmp_path / "set/again").symlink_to(tmp_path / "set/own", target_is_directory=True)
    (tmp_path / "set/up").symlink_to(tmp_path, target_is_directory=True)
    picture(tmp_path / "set/own/c.png")
    assert read_pictures(tmp_path / "set").file_names == ["a.png", "linked/b.png", "own/c.png"]


def test_labels_may_lie_beside_pictures_in_any_folder(tmp_path: Path) -> None:
    picture(tmp_path / "images/mine/a.png")
    (tmp_path / "images/mine/a.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    (tmp_path / "data.yaml").write_text("train: images/mine\nnames: [a]\n")
    assert len(read_set(*find_set(tmp_path, "train")).boxes) == 1


def test_labels_that_are_absent_or_no_text_are_named(tmp_path: Path) -> None:
    write_yolo(tmp_path)
    (tmp_path / "labels/train/a.txt").write_bytes(b"0 0.5 0.5 0.1 0.1 \xe9")
    with pytest.raises(ValueError, match=r"a\.txt: expected UTF-8 text"):
        read_set(*find_set(tmp_path, "train"))
    (tmp_path / "labels").rename(tmp_path / "label")
    with pytest.raises(ValueError, match=r"none of the \d pictures of .* has a label file; looked for .*labels/train"):
        read_set(*find_set(tmp_path, "train"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": "5"}, r"annotations\[0\]: expected whole numbers as ids .* got .*'image_id': '5'"),
        ({"area": "12"}, r"annotations\[0\]: .*'area': '12'"),
        ({"bbox": []}, r"annotations\[0\]: .*'bbox': \[\]"),
        ({"bbox": [1, 1, 10**400, 1]}, r"annotations\[0\]: .*'bbox': \[1, 1, 10000"),
    ],
)
def test_a_coco_annotation_that_is_wrong_is_shown(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_coco(tmp_path)
    file = tmp_path / "annotations/train.json"
    content = json.loads(file.read_text())
    whole = content["annotations"][0]
    content["annotations"][0] = {**whole, "area": None, "iscrowd": None}  # as some tools write what they don't know
    file.write_text(json.dumps(content))
    assert len(read_set(*find_set(tmp_path, "train")).boxes) == len(content["annotations"])
    content["annotations"][0] = {**whole, **change}
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        read_set(*find_set(tmp_path, "train"))


def test_a_coco_file_name_that_is_no_text_is_named(tmp_path: Path) -> None:
    write_coco(tmp_path)
    file = tmp_path / "annotations/train.json"
    content = json.loads(file.read_text())
    content["images"][1]["file_name"] = 5
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"images\[1\]: expected text as file_name, got 5"):
        read_set(*find_set(tmp_path, "train"))


def test_a_list_may_have_flags_and_names_with_spaces(tmp_path: Path) -> None:
    write_voc(tmp_path)
    (tmp_path / "ImageSets/Main/train.txt").write_text("a 1 -1\n\nb 2\n")
    assert read_set(*find_set(tmp_path, "train")).file_names == ["a.png", "b 2.png"]


def test_sets_of_two_formats_in_one_folder_are_listed_as_they_are_found(tmp_path: Path) -> None:
    write_coco(tmp_path)
    (tmp_path / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [a, b]\n")
    assert sets_in(tmp_path) == ["train", "val"]
    assert find_set(tmp_path, "train")[0].suffix == ".json"


def test_names_of_a_list_without_a_file_are_an_error(tmp_path: Path) -> None:
    write_voc(tmp_path)
    (tmp_path / "ImageSets/Main/train.txt").write_text("a\nz\n")
    with pytest.raises(ValueError, match=r"1 of 2 names have no file in .*: z"):
        read_set(*find_set(tmp_path, "train"))


# ---- the check


def check(root: Path, out: Path, *more: str) -> int:
    return main(["data", "check", str(root), "--out", str(out), *more])


@pytest.mark.parametrize("kind", ["coco", "voc", "yolo"])
def test_a_set_without_faults_passes_with_its_counts_and_a_picture(kind: str, tmp_path: Path, capsys: Any) -> None:
    WRITERS[kind](tmp_path / "data")
    assert check(tmp_path / "data", tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "train: 3 pictures, 3 boxes" in said
    assert "pictures without a box: 1" in said
    assert "no fault found" in said
    samples = cv2.imread(str(tmp_path / "out/samples.png"))
    assert samples.shape == (480, 4 * 480, 3)
    assert samples[:, 960:].min() == 255  # two pictures with boxes, and room for two more
    assert samples[:, :960].std() > 10


def test_every_fault_is_found_and_named(tmp_path: Path, capsys: Any) -> None:
    root = tmp_path / "data"
    write_coco(root)
    content = json.loads((root / "annotations/train.json").read_text())
    content["annotations"].append({"id": 9, "image_id": 5, "category_id": 7, "bbox": [70, 0, 5, 5]})
    content["annotations"].append({"id": 10, "image_id": 5, "category_id": 7, "bbox": [1, 1, 0.1, 5]})
    (root / "annotations/train.json").write_text(json.dumps(content))
    (root / "images/train/b 2.png").unlink()
    (root / "images/train/a.png").write_bytes(b"no picture")
    picture(root / "images/train/c.png", width=32)
    assert check(root, tmp_path / "out") == 1
    said = capsys.readouterr().out
    for line in (
        "FAULT: 1 pictures are missing: b 2.png",
        "FAULT: 1 pictures can't be read: a.png",
        "FAULT: 1 pictures have another size than the annotations say: c.png",
        "FAULT: 1 boxes without area in their picture, or not finite: a.png",
        "note: 1 boxes are under 2 pixels",
    ):
        assert line in said
    assert "orientation" not in said
    assert check(root, tmp_path / "out", "--quick") == 1
    assert "can't be read" not in capsys.readouterr().out


def test_pictures_that_a_viewer_turns_are_counted(tmp_path: Path, capsys: Any) -> None:
    write_coco(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 48)).save(tmp_path / "images/train/a.png", exif=exif)
    assert check(tmp_path, tmp_path / "out") == 0
    assert "note: 1 pictures have an orientation tag, which is ignored" in capsys.readouterr().out


def test_what_sets_share_or_should_share_is_found(tmp_path: Path, capsys: Any) -> None:
    write_coco(tmp_path)
    content = json.loads((tmp_path / "annotations/train.json").read_text())
    content["categories"][0]["name"] = "cow"
    (tmp_path / "annotations/val.json").write_text(json.dumps(content))
    for name in OBJECTS:
        picture(tmp_path / f"images/val/{name}.png", seed=int(name != "c"))
    assert check(tmp_path, tmp_path / "out") == 1
    said = capsys.readouterr().out
    assert "FAULT: 1 pictures are in train and in val: c.png = c.png" in said
    assert "FAULT: train and val have different classes, or another order of them: cat, cow" in said


def test_a_part_of_a_set_is_no_leak_but_said(tmp_path: Path, capsys: Any) -> None:
    write_voc(tmp_path)
    names = (tmp_path / "ImageSets/Main/train.txt").read_text()
    (tmp_path / "ImageSets/Main/trainval.txt").write_text(names)
    assert check(tmp_path, tmp_path / "out") == 0
    assert f"note: {len(names.splitlines())} pictures are in train and in trainval" in capsys.readouterr().out
    (tmp_path / "ImageSets/Main/test.txt").write_text(names)
    assert check(tmp_path, tmp_path / "out", "--set", "train", "--set", "test") == 1


@pytest.mark.parametrize(
    ("a", "b", "parts"),
    [
        ("train_100", "train_300", True),
        ("train", "train_100", True),
        ("val", "trainval", True),
        ("my_train", "my_val", False),
        ("val", "val_unseen", False),
        ("test", "contest", False),
        ("fold1", "fold10", False),
    ],
)
def test_names_say_which_sets_may_share_pictures(a: str, b: str, parts: bool) -> None:
    assert _are_parts(a, b) is _are_parts(b, a) is parts


def test_files_of_other_tasks_beside_cocos_boxes_are_no_sets(tmp_path: Path) -> None:
    write_coco(tmp_path)
    boxes = tmp_path / "annotations/train.json"
    boxes.rename(boxes.with_name("instances_train.json"))
    for task in ("captions", "person_keypoints"):
        boxes.with_name(f"{task}_train.json").write_text("{}")
    assert sets_in(tmp_path) == ["train"]


def test_a_set_without_a_box_or_a_picture_is_a_fault(tmp_path: Path, capsys: Any) -> None:
    write_coco(tmp_path)
    file = tmp_path / "annotations/train.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "annotations": []}))
    assert check(tmp_path, tmp_path / "out") == 1
    assert "pictures, and a box in none of them" in capsys.readouterr().out
    for picture_file in (tmp_path / "images/train").iterdir():
        picture_file.unlink()
    assert check(tmp_path, tmp_path / "none") == 1
    assert "pictures are missing" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()


def test_a_set_that_cannot_be_read_does_not_hide_the_others(tmp_path: Path, capsys: Any) -> None:
    write_coco(tmp_path)
    (tmp_path / "annotations/a.json").write_text("{")
    (tmp_path / "images/a").mkdir()
    assert check(tmp_path, tmp_path / "out") == 1
    said = capsys.readouterr().out
    assert "a: can't be read" in said
    assert "a.json is not JSON" in said
    assert "train: 3 pictures" in said
    assert "1 kinds of fault" in said


def test_nothing_to_check_is_an_error(tmp_path: Path, capsys: Any) -> None:
    assert check(tmp_path, tmp_path / "out") == 2
    assert "no set in" in capsys.readouterr().err
    (tmp_path / "data.yaml").write_text("names: [a]\n")
    assert check(tmp_path / "data.yaml", tmp_path / "out") == 2
    assert "data.yaml, which holds nothing" in capsys.readouterr().err
