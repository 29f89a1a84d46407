"""A set is the same in COCO JSON, Pascal VOC XML and YOLO text, and faults in a file are named."""

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
from fastkd.yolov3.data.check import _are_parts
from fastkd.yolov3.data.dataset import DetectionDataset
from fastkd.yolov3.data.formats import find_set, read_images, read_set, require_sets, sets_in
from fastkd.yolov3.model import YOLOv3Tiny
from fastkd.yolov3.show.predict import predict
from fastkd.yolov3.train.evaluate import score

NAMES = ["cat", "dög"]
# image to (class, x, y, width, height, difficult), whole pixels of 64 x 48
OBJECTS = {
    "a": [(0, 10, 4, 20, 30, False), (1, 40, 20, 24, 28, True)],
    "b 2": [],
    "c": [(1, 0, 0, 64, 48, False)],
}


def make_image(path: Path, width: int = 64, height: int = 48, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng([seed, *path.name.encode()]).integers(0, 256, (height, width, 3), dtype=np.uint8)
    path.write_bytes(cv2.imencode(path.suffix, noise)[1].tobytes())


def write_coco(root: Path) -> None:
    images = [{"id": 5 + i, "file_name": f"{n}.png", "width": 64, "height": 48} for i, n in enumerate(OBJECTS)]
    boxes = [(5 + i, o) for i, objects in enumerate(OBJECTS.values()) for o in objects]
    annotations = [
        {"id": i, "image_id": number, "category_id": 7 + o[0], "bbox": list(o[1:5]), "iscrowd": int(o[5])}
        for i, (number, o) in sorted(enumerate(boxes), key=lambda x: -x[1][0])  # images in another order
    ]
    categories = [{"id": 7 + i, "name": name} for i, name in enumerate(NAMES)]
    (root / "annotations").mkdir(parents=True)
    text = json.dumps({"images": images, "annotations": annotations, "categories": categories})
    (root / "annotations/train.json").write_text(text, encoding="utf-8")
    for name in OBJECTS:
        make_image(root / f"images/train/{name}.png")


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
        make_image(root / f"JPEGImages/{name}.png")
    names = [f"{name} -1" for name in OBJECTS]
    (root / "ImageSets/Main/train.txt").write_text("\ufeff" + "\r\n".join(names) + "\r\n", encoding="utf-8")


def write_yolo(root: Path, listed: bool = False) -> None:
    for name, objects in OBJECTS.items():
        make_image(root / f"images/train/{name}.png")
        lines = [f"{k} {(x + w / 2) / 64} {(y + h / 2) / 48} {w / 64} {h / 48}" for k, x, y, w, h, _ in objects]
        (root / "labels/train").mkdir(parents=True, exist_ok=True)
        if lines:  # an image without objects has no label file
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
        difficult = [o[5] and "yolo" not in kind for o in objects]  # YOLO's text can't mark them
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
    assert part.class_names == NAMES  # the classes of all files, so that all lists agree
    assert len(read_set(tmp_path / "Annotations", tmp_path / "JPEGImages")) == 3


def test_polygons_become_their_boxes_and_rules_hold_for_every_format(tmp_path: Path) -> None:
    write_yolo(tmp_path)
    (tmp_path / "labels/train/a.txt").write_text("0 0.1 0.2 0.5 0.2 0.3 0.8\n1 0.5 0.5 0 0.2\n1 1.0 0.5 0.5 0.5\n")
    with pytest.warns(UserWarning, match=r"1 boxes without area in their image dropped \(a\.png\), 1 boxes clipped"):
        data = DetectionDataset(*find_set(tmp_path, "train"), 64)
    np.testing.assert_allclose(data.annotations.boxes[:2], [[6.4, 9.6, 25.6, 28.8], [48, 12, 16, 24]])


def test_images_alone_are_a_set_without_boxes(tmp_path: Path) -> None:
    for name in ("x/10.png", "x/9.png", "1.jpg"):
        make_image(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    found = read_images(tmp_path)
    assert [Path(name).as_posix() for name in found.file_names] == ["1.jpg", "x/9.png", "x/10.png"]
    assert len(found.boxes) == 0
    assert DetectionDataset.of_images(tmp_path, 64)[2].targets.shape == (0, 5)


# ---- wrong input

ENTITY = '<!DOCTYPE a [<!ENTITY e "{0}">]><annotation><filename>&e;</filename></annotation>'
EXTERNAL = '<!DOCTYPE a [<!ENTITY e SYSTEM "file:///etc/passwd">]><annotation><filename>&e;</filename></annotation>'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ENTITY.format("x" * 100), r"c\.xml: refused, because it declares entities"),
        (EXTERNAL, r"c\.xml: refused, because it declares entities"),
        ("<annotation><object>", r"c\.xml: not Pascal VOC XML"),
        (
            "<annotation><object><name>cat</name></object></annotation>",
            r"c\.xml: not Pascal VOC XML: object 'cat': expected numbers in bndbox's xmin, .* got no bndbox$",
        ),
        (
            "<annotation><object><name>cat</name><polygon><pt><x>1</x></pt></polygon></object></annotation>",
            "it has a polygon, as files of LabelMe and others do",
        ),
        (
            "<annotation><object><name>cat</name><bndbox><xmin>a</xmin></bndbox></object></annotation>",
            r"expected numbers .* got \['a', None, None, None\]",
        ),
        (
            "<annotation><size><width>1e30</width></size></annotation>",
            r"c\.xml: .* less than 2\^31 pixels, got 1e\+30x0",
        ),
        ("<annotation><filename>../c.png</filename></annotation>", "leads out of the image folder"),
        ("<annotation><filename>C:\\c.png</filename></annotation>", "leads out of the image folder"),
        (f"<annotation>{voc_object('', 1, 1, 5, 5, False)}</annotation>", "an object without a name"),
    ],
)
def test_an_xml_file_that_is_wrong_or_malicious_is_named(text: str, message: str, tmp_path: Path) -> None:
    write_voc(tmp_path)
    (tmp_path / "Annotations/c.xml").write_text(text)
    (tmp_path / "JPEGImages/c.png").rename(tmp_path / "c.png")
    with pytest.raises(ValueError, match=message):
        read_set(*find_set(tmp_path, "train"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("2 0.5 0.5 0.1 0.1", r"line 2: expected a class index of names:, 0 to 1, got 2"),
        ("0.5 0.5 0.5 0.1 0.1", "expected a class index"),
        ("nan 0.5 0.5 0.1 0.1", "expected a class index"),
        ("0 0.5 0.5 0.1", "got 4 numbers"),
        ("0 0.5 0.5 0.1 0.1 0.2", "got 6 numbers"),
        ("cat 0.5 0.5 0.1 0.1", "expected numbers, got 'cat 0.5.*; write the class as its number, not its name"),
        ("0 0.5 nan 0.1 0.1", "expected finite numbers"),
        ("0 320 240 64 64", "expected numbers relative to the image"),
        ("0,.5,.5,.2,.2", "got '0,.5,.5,.2,.2'; are they separated by commas"),
        ("1 1 9 1 9 9 1 9 plane 0", "this looks like an oriented box of DOTA"),
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
        ("train: images/train\nnames: {0: a, 2: b}\nnc: 4\n", ValueError, "nc is 4, but names has 2"),
        ("train: images/train\nnames: {0: a, b: c}\n", ValueError, "names: expected indices from 0, got"),
        ("train: images/train\n", ValueError, "names: expected a list of class names"),
        ("train: images/train\nnames: [a, b]\nkpt_shape: [2, 2]\n", ValueError, "labels of boxes or polygons, got"),
        (
            "val: images/train\nnames: [a, b]\n",
            FileNotFoundError,
            r"expected a folder, a \.txt list, or a list of them, got no such entry; sets found: val",
        ),
        ("train: [images/train, y]\nnames: [a, b]\n", FileNotFoundError, "y does not exist"),
        ("train: [1]\nnames: [a, b]\n", FileNotFoundError, r"or a list of them, got \[1\]"),
        ("train: images/absent\nnames: [a, b]\n", FileNotFoundError, "images/absent does not exist"),
        ("- 1\n", ValueError, "expected train:, val: and names:, got list"),
        ("a: [\n", ValueError, "not YAML"),
        (
            "a: &a [x, x]\nb: &b [*a, *a]\ntrain: images/train\nnames: [*b, c]\n",
            ValueError,
            "not YAML: an alias of a list or mapping; write it out in .* line 1",
        ),
        ("a: &a {x: y}\nb: {<<: *a}\n", ValueError, "an alias of a list or mapping"),
        ("names: " + "{a: " * 1000, ValueError, "not YAML: nested too deeply"),
        ("x: 2020-99-99\n", ValueError, "not YAML: month must be in"),
        ("!!python/object/apply:os.system ['true']\n", ValueError, "not YAML"),
    ],
)
def test_a_yaml_file_that_is_wrong_is_named(text: str, error: type[Exception], message: str, tmp_path: Path) -> None:
    write_yolo(tmp_path)
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(error, match=message):
        read_set(*find_set(tmp_path / "data.yaml", "train"))


def test_names_with_gaps_and_an_alias_of_a_text_are_fine(tmp_path: Path) -> None:
    write_yolo(tmp_path)
    (tmp_path / "data.yaml").write_text("train: &t images/train\nval: *t\nnames: {4: d, 1: b, 0: a}\nnc: 3\n")
    (tmp_path / "labels/train/a.txt").write_text("4 0.5 0.5 0.1 0.1\n1 0.5 0.5 0.1 0.1\n")
    found = read_set(*find_set(tmp_path, "val"))
    assert found.class_names == ["a", "b", "d"]
    assert found.classes[found.of(0)].tolist() == [2, 1]
    assert any("indices with gaps" in note for note in found.notes)
    (tmp_path / "labels/train/a.txt").write_text("2 0.5 0.5 0.1 0.1\n")
    with pytest.raises(ValueError, match="expected a class index of names:, 0 to 4 with gaps, got 2"):
        read_set(*find_set(tmp_path, "val"))


def test_a_split_may_be_several_folders_and_lists(tmp_path: Path) -> None:
    write_yolo(tmp_path)
    make_image(tmp_path / "images/more/d.png")
    (tmp_path / "more.txt").write_text("images/more/d.png\nimages/train/a.png\n")
    (tmp_path / "data.yaml").write_text("train: [images/train, more.txt]\nnames: [a, b]\n")
    found = read_set(*find_set(tmp_path, "train"))
    assert found.file_names == [f"images/{x}.png" for x in ("train/a", "train/b 2", "train/c", "more/d")]
    assert found.problems == {"repeated entries of an image joined with its first": ["images/train/a.png"]}
    assert len(found.boxes) == 3


@pytest.mark.parametrize(
    ("corner", "shift", "reported"),
    [
        ("0", 0, "points counted from 0"),
        ("1.5", 0, "points"),
        ("-0.5", 0, "points"),
        ("1", 1, "counted from 1"),
        ("-3", 1, "counted from 1"),
    ],
)
def test_voc_corners_are_counted_as_the_set_shows(corner: str, shift: int, reported: str, tmp_path: Path) -> None:
    write_voc(tmp_path)
    box = "<xmin>{}</xmin><ymin>2</ymin><xmax>{}</xmax><ymax>22</ymax>"
    sides = ((11, 31), (9, 9), (9, 8))
    objects = [f"<object><name>cat</name><bndbox>{box.format(*x)}</bndbox></object>" for x in sides]
    (tmp_path / "Annotations/a.xml").write_text(f"<annotation>{''.join(objects)}</annotation>")
    last = f"<object><name>dog</name><bndbox>{box.format(corner, 64)}</bndbox></object>"
    (tmp_path / "Annotations/c.xml").write_text(f"<annotation>{last}</annotation>")
    found = read_set(*find_set(tmp_path, "train"))
    assert reported in found.notes[0]
    clean = found.clean()
    assert clean.boxes[0].tolist() == [11 - shift, 2 - shift, 20 + shift, 20 + shift]
    assert clean.problems.pop("boxes without area in their image dropped") == ["a.png", "a.png"]
    assert list(clean.problems) == (["boxes clipped to their image"] if corner == "-3" else [])


def test_the_image_of_an_xml_files_own_name_comes_before_the_one_that_it_names(tmp_path: Path) -> None:
    write_voc(tmp_path)
    (tmp_path / "Annotations/a.xml").write_text("<annotation><filename>c.png</filename></annotation>")
    (tmp_path / "Annotations/b 2.xml").write_text("<annotation><filename>d.png</filename></annotation>")
    (tmp_path / "JPEGImages/b 2.png").rename(tmp_path / "JPEGImages/d.png")
    found = read_set(*find_set(tmp_path, "train"))
    assert found.file_names == ["a.png", "d.png", "c.png"]
    assert any(note.endswith("own name: a.xml names c.png") for note in found.notes)


@pytest.mark.parametrize("listed", ["a\nc\na\n", "a\nc\nsame\n"])
def test_an_image_that_a_list_or_two_files_name_twice_is_one(listed: str, tmp_path: Path) -> None:
    write_voc(tmp_path)
    text = (tmp_path / "Annotations/a.xml").read_text(encoding="utf-8").replace("a.png", "z.png")
    for name in ("a", "same"):
        (tmp_path / f"Annotations/{name}.xml").write_text(text, encoding="utf-8")
    (tmp_path / "JPEGImages/a.png").rename(tmp_path / "JPEGImages/z.png")
    (tmp_path / "ImageSets/Main/train.txt").write_text(listed)
    found = read_set(*find_set(tmp_path, "train"))
    assert found.file_names == ["z.png", "c.png"]
    assert len(found.boxes) == 3
    assert found.problems == {"repeated entries of an image joined with its first": ["z.png"]}


def test_an_xml_file_without_its_image_does_not_take_the_image_of_another(tmp_path: Path, capsys: Any) -> None:
    write_voc(tmp_path)
    text = (tmp_path / "Annotations/a.xml").read_text(encoding="utf-8").replace("a.png", "c.png")
    (tmp_path / "Annotations/a.xml").write_text(text, encoding="utf-8")
    (tmp_path / "JPEGImages/a.png").unlink()
    found = read_set(*find_set(tmp_path, "train"))
    assert found.file_names == ["a.jpg", "b 2.png", "c.png"]
    assert found.classes[found.of(2)].tolist() == [1]
    assert check(tmp_path, tmp_path / "out") == 1
    assert "FAULT: 1 images are missing: a.jpg" in capsys.readouterr().out


@pytest.mark.parametrize("width", ["", "nan", "inf"])
def test_an_xml_files_size_that_is_no_number_is_read_from_the_image(width: str, tmp_path: Path) -> None:
    write_voc(tmp_path, size=f"<size><width>{width}</width><height>48</height></size>")
    assert read_set(*find_set(tmp_path, "train")).sizes.tolist() == [[64, 48]] * 3


# ---- other layouts


def roboflow(root: Path) -> None:
    write_coco(root)
    (root / "images/train").rename(root / "valid")
    (root / "annotations/train.json").rename(root / "valid/_annotations.coco.json")


def flat_coco(root: Path) -> None:
    write_coco(root)
    for file in (root / "images/train").iterdir():
        file.rename(root / "images" / file.name)
    (root / "images/train").rmdir()
    (root / "annotations/train.json").rename(root / "annotations/val.json")


def voc_beside(root: Path) -> None:
    write_voc(root)
    (root / "JPEGImages").rename(root / "valid")
    for file in (root / "Annotations").iterdir():
        file.rename(root / "valid" / file.name)
    (root / "train").mkdir()
    text = f"<annotation>{voc_object('ant', 1, 1, 5, 5, False)}</annotation>"
    (root / "train/a.xml").write_text(text)
    make_image(root / "train/a.png")


def valid_key(root: Path) -> None:
    write_yolo(root)
    (root / "data.yaml").rename(root / "mine.yml")
    (root / "mine.yml").write_text((root / "mine.yml").read_text().replace("train:", "valid:"))


@pytest.mark.parametrize("write", [roboflow, flat_coco, voc_beside, valid_key])
def test_other_layouts_are_found_and_valid_is_val(write: Any, tmp_path: Path) -> None:
    write(tmp_path)
    assert "val" in sets_in(tmp_path)
    found = DetectionDataset(*find_set(tmp_path, "val"), 64).annotations
    assert (len(found), len(found.boxes)) == (3, 3)
    # classes are those of all XML files, including train's
    assert found.class_names == (["ant"] if write is voc_beside else []) + NAMES


@pytest.mark.parametrize(("write", "name"), [(roboflow, "val"), (voc_beside, "val"), (write_voc, "train")])
def test_a_yaml_file_that_is_not_of_the_set_is_left_alone(write: Any, name: str, tmp_path: Path) -> None:
    write(tmp_path)
    found = sets_in(tmp_path)
    for file, text in {
        ".pre-commit-config.yaml": "names: [a]\ntrain: x\nval: x\n",
        "hyp.yaml": "train: 3\nval: 4\n",
        "list.yml": "- 1\n",
        "broken.yaml": "a: [\n",
    }.items():
        (tmp_path / file).write_text(text)
        assert sets_in(tmp_path) == found
        assert len(read_set(*find_set(tmp_path, name))) == 3
    write_yolo(tmp_path / "yolo")
    (tmp_path / "yolo/data.yaml").rename(tmp_path / "yolo/mine.yaml")
    (tmp_path / "yolo/hyp.yaml").write_text("lr: 1\n")
    assert sets_in(tmp_path / "yolo") == ["train"]


@pytest.mark.parametrize("beside", [False, True])
def test_xml_files_in_no_list_are_one_set(beside: bool, tmp_path: Path) -> None:
    write_voc(tmp_path)
    (tmp_path / "ImageSets/Main/train.txt").unlink()
    for file in [*(tmp_path / "Annotations").iterdir(), *(tmp_path / "JPEGImages").iterdir()] if beside else []:
        file.rename(tmp_path / file.name)
    assert sets_in(tmp_path) == ["all"]
    assert len(read_set(*find_set(tmp_path, "all"))) == 3
    with pytest.raises(FileNotFoundError, match=r"set 'train' in .* not found; sets found: all"):
        find_set(tmp_path, "train")


def csv_file(root: Path, name: str = "train_labels.csv", images: str = "images") -> None:
    lines = ["filename,width,height,class,xmin,ymin,xmax,ymax"]
    for file, objects in OBJECTS.items():
        make_image(root / images / f"{file}.png")
        lines += [f"{file}.png,64,48,{NAMES[k]},{x + 1},{y + 1},{x + w},{y + h}" for k, x, y, w, h, _ in objects]
        lines += [] if objects else [f"{file}.png,64,48,,,,,"]
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text("\n".join(lines), encoding="utf-8")


def class_list(root: Path, where: str = "classes.txt") -> None:
    write_yolo(root)
    (root / "data.yaml").unlink()
    (root / where).write_text("\n".join(NAMES), encoding="utf-8")


def flat_class_list(root: Path) -> None:
    class_list(root, "labels/classes.txt")
    for file in [*root.glob("*/train/*")]:
        file.rename(file.parent.parent / file.name)
    for part in ("images", "labels"):
        (root / part / "train").rmdir()


def labels_beside(root: Path) -> None:
    class_list(root)
    for file in [*root.glob("*/train/*")]:
        file.rename(root / file.name)


def roboflow_darknet(root: Path) -> None:
    class_list(root, "labels/train/_darknet.labels")
    for file in [*(root / "labels/train").iterdir()]:
        file.rename(root / "images/train" / file.name)
    (root / "images/train").rename(root / "train")


def darknet(root: Path, prefix: str = "data/obj") -> None:
    labels_beside(root / "data/obj")
    (root / "data/obj/classes.txt").rename(root / "data/obj.names")
    (root / "data/train.txt").write_text("".join(f"{prefix}/{name}.png\n" for name in OBJECTS))
    (root / "data/obj.data").write_text("classes = 2\ntrain  = data/train.txt\nnames = data/obj.names\nbackup = b/\n")


def whole_coco(root: Path) -> None:
    write_coco(root)
    (root / "annotations/train.json").rename(root / "result.json")
    for file in (root / "images/train").iterdir():
        file.rename(root / "images" / file.name)


LAYOUTS: dict[str, tuple[Any, str]] = {
    "CSV": (csv_file, "train"),
    "CSV in a folder": (lambda root: csv_file(root, "data/val_labels.csv", "images/val"), "val"),
    "CSV of Roboflow": (lambda root: csv_file(root, "valid/_annotations.csv", "valid"), "val"),
    "one CSV": (lambda root: csv_file(root, "raccoon_labels.csv"), "all"),
    "classes.txt": (class_list, "train"),
    "classes.txt of Label Studio and LabelImg": (flat_class_list, "all"),
    "labels beside images": (labels_beside, "all"),
    "Roboflow's Darknet": (roboflow_darknet, "train"),
    "Darknet": (darknet, "train"),
    "CVAT's Darknet": (lambda root: darknet(root, "renamed/obj"), "train"),
    "one COCO file": (whole_coco, "all"),
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_layout_is_read_as_the_same_set(kind: str, tmp_path: Path) -> None:
    write, name = LAYOUTS[kind]
    write(tmp_path / "my data")
    assert sets_in(tmp_path / "my data") == [name]
    found = DetectionDataset(*find_set(tmp_path / "my data", name), 64).truth
    assert found.class_names == NAMES
    assert found.missing() == []
    rows = {Path(file).stem: row for row, file in enumerate(found.file_names)}
    assert rows.keys() == OBJECTS.keys()
    for file, objects in OBJECTS.items():
        boxes = np.array([o[1:5] for o in objects], dtype=float).reshape(-1, 4)
        np.testing.assert_allclose(found.boxes[found.of(rows[file])], boxes, atol=1e-9)
        assert found.classes[found.of(rows[file])].tolist() == [o[0] for o in objects]


def test_darknets_file_itself_is_a_data_set_too(tmp_path: Path) -> None:
    darknet(tmp_path)
    file = tmp_path / "data/obj.data"
    assert require_sets(file) == ["train"]
    assert find_set(file, "train") == (file, tmp_path / "data/train.txt")
    with pytest.raises(FileNotFoundError, match=r"set 'val' in .*obj\.data: not found; sets found: train"):
        find_set(file, "val")


def test_csv_files_of_one_set_number_classes_alike(tmp_path: Path) -> None:
    csv_file(tmp_path)
    (tmp_path / "test_labels.csv").write_text(
        "\ufeffFilename; class; xmin; ymin; xmax; ymax\na.png; ant; 1; 1; 5; 5\n", encoding="utf-8"
    )
    train, test = (read_set(*find_set(tmp_path, name)) for name in ("train", "test"))
    assert train.class_names == test.class_names == ["ant", *NAMES]
    assert test.sizes.tolist() == [[64, 48]]  # the size of the image, if no column has it
    assert test.boxes.tolist() == [[0, 0, 5, 5]]  # corners are interpreted as train's are


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            "a.png,64,48,cat,1,2,x,4",
            r"train_labels.csv, line 2: expected numbers in xmin, ymin, xmax, ymax, got '1,2,x,4'",
        ),
        ("a.png,64,48,cat,1,2", "line 2: expected numbers in xmin, ymin, xmax, ymax"),
        ("a.png,64,48,,1,2,3,4", "line 2: expected a class"),
        (",64,48,cat,1,2,3,4", "line 2: expected a file name"),
        ("a.png,64,48,cat,0.1,0.2,0.3,0.4", "expected corners in pixels, got none above 1"),
        ("../a.png,64,48,cat,1,2,3,4", "leads out of the image folder"),
        ("", "lists no images"),
    ],
)
def test_a_row_of_csv_that_is_wrong_is_named(row: str, message: str, tmp_path: Path) -> None:
    make_image(tmp_path / "images/a.png")
    (tmp_path / "train_labels.csv").write_text(f"filename,width,height,class,xmin,ymin,xmax,ymax\n{row}\n")
    with pytest.raises(ValueError, match=message):
        read_set(*find_set(tmp_path, "train"))


def test_a_split_beside_the_training_set_needs_no_key(tmp_path: Path) -> None:
    write_yolo(tmp_path)
    for part in ("images", "labels"):
        (tmp_path / part / "train").rename(tmp_path / part / "test")
        (tmp_path / part / "train").mkdir()
    assert sets_in(tmp_path) == ["train", "test"]
    assert len(read_set(*find_set(tmp_path, "test")).boxes) == 3
    with pytest.raises(
        FileNotFoundError, match="no such entry; sets found: train, test; add a line such as 'val: images/val'"
    ):
        find_set(tmp_path / "data.yaml", "val")
    with pytest.raises(
        FileNotFoundError, match=r"write the line 'val: FOLDER' into .*data\.yaml, or make a split: fastkd"
    ):
        find_set(tmp_path, "val")


DARKNET = "classes = 2\ntrain = data/train.txt\nvalid=data/test.txt\nnames = data/obj.names\n"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"labels/train/a.txt": "", "images/train/a.txt": "", "images/valid/a.txt": ""},
            r"one per line, or write .*data\.yaml with the lines 'train: images/train', 'val: images/valid', "
            r"'names: \[first class, second",
        ),
        ({"labels/a.txt": "", "images/a.txt": ""}, r"the lines 'train: images', 'names: \[first class, second"),
        (
            {"data/obj.data": DARKNET, "data/obj.names": "cat\n"},
            r"obj\.data: data/train\.txt does not exist; looked for .*data/train\.txt",
        ),
        ({"weights.data": "\x00", "boxes.csv": "a,b\n"}, r"boxes\.csv: expected the first line 'filename,.* got 'a,b'"),
        ({"a.txt": ""}, r"which contains a\.txt; looked for annotations/"),
    ],
)
def test_a_layout_that_says_too_little_gets_the_lines_to_write(
    files: dict[str, str], message: str, tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(FileNotFoundError, match=message):
        require_sets(tmp_path)


def test_lists_of_darknet_are_relative_to_the_folder_above(tmp_path: Path) -> None:
    write_yolo(tmp_path / "data", listed=True)
    lines = (tmp_path / "data/train.txt").read_text().replace("./", "data/")
    (tmp_path / "data/train.txt").write_text(lines)
    assert len(read_set(*find_set(tmp_path / "data", "train")).boxes) == 3
    (tmp_path / "data/train.txt").write_text(f"data/images/train/absent.png\n{lines}")
    found = read_set(*find_set(tmp_path / "data", "train"))
    assert (len(found.boxes), [Path(name).name for name in found.missing()]) == (3, ["absent.png"])
    (tmp_path / "data/train.txt").write_text("elsewhere/a.png\n")
    with pytest.raises(ValueError, match=r"none of the 1 images of .* exists; looked for .*data/elsewhere/a\.png"):
        read_set(*find_set(tmp_path / "data", "train"))


def test_folders_that_are_absent_empty_or_of_nothing_known_are_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="data: no such file or folder"):
        find_set(tmp_path / "absent", "train")
    (tmp_path / "stuff").mkdir()
    with pytest.raises(FileNotFoundError, match=r"sets found: none; looked for annotations/.*\(COCO\).*VOC.*YOLO"):
        find_set(tmp_path, "train")
    with pytest.raises(ValueError, match="no images in this folder"):
        read_images(tmp_path)
    (tmp_path / "x.doc").write_text("")
    with pytest.raises(ValueError, match=r"annotations: expected a \.json file"):
        read_set(tmp_path / "x.doc", tmp_path)


def test_a_folder_that_may_not_be_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_image(tmp_path / "a.png")
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may read everything
    with pytest.raises(PermissionError, match="no permission to read"):
        read_images(tmp_path)


def test_a_yaml_file_may_be_relative_to_a_folder_beside_it_as_exports_are(tmp_path: Path) -> None:
    write_yolo(tmp_path)
    (tmp_path / "data.yaml").write_text("train: ../images/train\nnames: [a, b]\n")
    assert find_set(tmp_path, "train") == (tmp_path / "data.yaml", tmp_path / "images/train")


def test_linked_folders_are_looked_into_once(tmp_path: Path) -> None:
    make_image(tmp_path / "set/a.png")
    make_image(tmp_path / "elsewhere/b.png")
    (tmp_path / "set/linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "set", target_is_directory=True)
    (tmp_path / "set/again").symlink_to(tmp_path / "set/own", target_is_directory=True)
    (tmp_path / "set/up").symlink_to(tmp_path, target_is_directory=True)
    make_image(tmp_path / "set/own/c.png")
    assert read_images(tmp_path / "set").file_names == ["a.png", "linked/b.png", "own/c.png"]


def test_labels_may_lie_beside_images_in_any_folder(tmp_path: Path) -> None:
    make_image(tmp_path / "images/mine/a.png")
    (tmp_path / "images/mine/a.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    (tmp_path / "data.yaml").write_text("train: images/mine\nnames: [a]\n")
    assert len(read_set(*find_set(tmp_path, "train")).boxes) == 1


def test_labels_that_are_absent_or_no_text_are_named(tmp_path: Path) -> None:
    write_yolo(tmp_path)
    (tmp_path / "labels/train/a.txt").write_bytes(b"0 0.5 0.5 0.1 0.1 \xe9")
    with pytest.raises(ValueError, match=r"a\.txt: expected UTF-8 text"):
        read_set(*find_set(tmp_path, "train"))
    (tmp_path / "labels").rename(tmp_path / "label")
    with pytest.raises(ValueError, match=r"none of the \d images of .* has a label file; looked for .*labels/train"):
        read_set(*find_set(tmp_path, "train"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": "5"}, r"annotations\[0\] has unknown image_id '5'; the file has \[5, 6, 7\]"),
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
    content["annotations"][0] = {**whole, "area": None, "iscrowd": None}  # some tools write null for unknown values
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
def test_a_set_without_faults_passes_with_its_counts_and_an_image(kind: str, tmp_path: Path, capsys: Any) -> None:
    WRITERS[kind](tmp_path / "data")
    assert check(tmp_path / "data", tmp_path / "out") == 0
    reported = capsys.readouterr().out
    assert "train: 3 images, 3 boxes" in reported
    assert "images without a box: 1" in reported
    assert "no fault found" in reported
    samples = cv2.imread(str(tmp_path / "out/samples.png"))
    assert samples.shape == (480, 4 * 480, 3)
    assert samples[:, 960:].min() == 255  # two images with boxes, and two blank tiles
    assert samples[:, :960].std() > 10


def test_every_fault_is_found_and_named(tmp_path: Path, capsys: Any) -> None:
    root = tmp_path / "data"
    write_coco(root)
    content = json.loads((root / "annotations/train.json").read_text())
    content["annotations"].append({"id": 9, "image_id": 5, "category_id": 7, "bbox": [70, 0, 5, 5]})
    content["annotations"].append({"id": 10, "image_id": 5, "category_id": 7, "bbox": [1, 1, 0.1, 5]})
    (root / "annotations/train.json").write_text(json.dumps(content))
    (root / "images/train/b 2.png").unlink()
    (root / "images/train/a.png").write_bytes(b"no image")
    make_image(root / "images/train/c.png", width=32)
    assert check(root, tmp_path / "out") == 1
    reported = capsys.readouterr().out
    for line in (
        "images without a box: 1;",
        "FAULT: 1 images are missing: b 2.png",
        "FAULT: 1 images can't be read: a.png",
        "FAULT: 1 images have another size than the annotations say: c.png",
        "FAULT: 1 boxes without area in their image, or not finite: a.png",
        "note: 1 boxes are under 2 pixels",
    ):
        assert line in reported
    assert "orientation" not in reported
    assert check(root, tmp_path / "out", "--quick") == 1
    assert "can't be read" not in capsys.readouterr().out


def test_an_image_that_cannot_be_read_still_counts_as_one_with_its_boxes(tmp_path: Path, capsys: Any) -> None:
    write_voc(tmp_path, size="")
    (tmp_path / "JPEGImages/c.png").write_bytes(b"no image")
    assert check(tmp_path, tmp_path / "out") == 1
    assert "images without a box: 1;" in capsys.readouterr().out


def test_images_that_a_viewer_turns_are_counted(tmp_path: Path, capsys: Any) -> None:
    write_coco(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 48)).save(tmp_path / "images/train/a.png", exif=exif)
    assert check(tmp_path, tmp_path / "out") == 0
    assert "note: 1 images have an orientation tag, which is ignored" in capsys.readouterr().out


def test_what_sets_share_or_should_share_is_found(tmp_path: Path, capsys: Any) -> None:
    write_coco(tmp_path)
    content = json.loads((tmp_path / "annotations/train.json").read_text())
    content["categories"][0]["name"] = "cow"
    (tmp_path / "annotations/val.json").write_text(json.dumps(content))
    for name in OBJECTS:
        make_image(tmp_path / f"images/val/{name}.png", seed=int(name != "c"))
    assert check(tmp_path, tmp_path / "out") == 1
    reported = capsys.readouterr().out
    assert "FAULT: 1 images are in train and in val: c.png = c.png" in reported
    assert "FAULT: train and val have different classes, or another order of them: cat, cow" in reported


def test_a_part_of_a_set_is_no_leak_but_said(tmp_path: Path, capsys: Any) -> None:
    write_voc(tmp_path)
    names = (tmp_path / "ImageSets/Main/train.txt").read_text()
    (tmp_path / "ImageSets/Main/trainval.txt").write_text(names)
    assert check(tmp_path, tmp_path / "out") == 0
    assert f"note: {len(names.splitlines())} images are in train and in trainval" in capsys.readouterr().out
    (tmp_path / "ImageSets/Main/test.txt").write_text(names)
    assert check(tmp_path, tmp_path / "other", "--set", "train", "--set", "test") == 1
    assert check(tmp_path, tmp_path / "other") == 2  # samples are not overwritten


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
def test_names_say_which_sets_may_share_images(a: str, b: str, parts: bool) -> None:
    assert _are_parts(a, b) is _are_parts(b, a) is parts


def test_files_of_other_tasks_beside_cocos_boxes_are_no_sets(tmp_path: Path) -> None:
    write_coco(tmp_path)
    boxes = tmp_path / "annotations/train.json"
    boxes.rename(boxes.with_name("instances_train.json"))
    for task in ("captions", "person_keypoints"):
        boxes.with_name(f"{task}_train.json").write_text("{}")
    assert sets_in(tmp_path) == ["train"]


def test_a_set_without_a_box_or_an_image_is_a_fault(tmp_path: Path, capsys: Any) -> None:
    write_coco(tmp_path)
    file = tmp_path / "annotations/train.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "annotations": []}))
    assert check(tmp_path, tmp_path / "out") == 1
    assert "images, and a box in none of them" in capsys.readouterr().out
    for image_file in (tmp_path / "images/train").iterdir():
        image_file.unlink()
    assert check(tmp_path, tmp_path / "none") == 1
    assert "images are missing" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()


def test_a_set_that_cannot_be_read_does_not_hide_the_others(tmp_path: Path, capsys: Any) -> None:
    write_coco(tmp_path)
    (tmp_path / "annotations/a.json").write_text("{")
    (tmp_path / "images/a").mkdir()
    assert check(tmp_path, tmp_path / "out") == 1
    reported = capsys.readouterr().out
    assert "a: can't be read" in reported
    assert "a.json is not JSON" in reported
    assert "train: 3 images" in reported
    assert "1 kinds of fault" in reported


def test_nothing_to_check_is_an_error(tmp_path: Path, capsys: Any) -> None:
    assert check(tmp_path, tmp_path / "out") == 2
    assert "no set in" in capsys.readouterr().err
    (tmp_path / "data.yaml").write_text("names: [a]\n")
    assert check(tmp_path / "data.yaml", tmp_path / "out") == 2
    assert "data.yaml, which has no train:, val: or test:" in capsys.readouterr().err


def test_what_is_odd_is_noted(tmp_path: Path, capsys: Any) -> None:
    root = tmp_path / "data"
    write_yolo(root)
    (root / "images/train/d.png").write_bytes((root / "images/train/c.png").read_bytes())
    cv2.imwrite(str(root / "images/train/b 2.png"), np.full((48, 64), 4000, np.uint16))
    (root / "labels/train/a.txt").write_text("1 0.5 0.5 0.5 0.5\n" * 2 + "1 0.1 0.1 0.2 0.1 0.2 0.2 0.1 0.2\n")
    assert check(root, tmp_path / "out") == 0
    reported = capsys.readouterr().out
    for line in (
        "1 lines have the corners of oriented boxes; their upright",
        "1 boxes repeat another one of the same image and class: a.png",
        "1 images have the same content as another one of the set: d.png = c.png",
        "1 classes have no box: cat; do the class numbers in the labels start at 1?",
        "1 images have 16 bits per channel",
    ):
        assert f"note: {line}" in reported


def test_a_jpeg_without_its_end_is_a_fault(tmp_path: Path, capsys: Any) -> None:
    write_coco(tmp_path)
    whole = cv2.imencode(".jpg", np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))[1].tobytes()
    (tmp_path / "images/train/a.png").write_bytes(whole[: len(whole) // 2].ljust(len(whole), b"\0"))
    assert check(tmp_path, tmp_path / "out") == 1
    assert "FAULT: 1 images are JPEGs without their end: cut off, or damaged: a.png" in capsys.readouterr().out


def test_a_quick_check_finds_files_and_names_that_sets_share(tmp_path: Path, capsys: Any) -> None:
    write_yolo(tmp_path)
    for name in "ab":
        make_image(tmp_path / f"images/val/{name}.png")
    (tmp_path / "labels/val").mkdir()
    (tmp_path / "labels/val/a.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    text = "train: images/train\nval: {}\nnames: [a, b]\n"
    (tmp_path / "data.yaml").write_text(text.format("images/val"))
    assert check(tmp_path, tmp_path / "out", "--quick") == 0
    assert "note: 1 file names are in train and in val, in different folders" in capsys.readouterr().out
    (tmp_path / "list.txt").write_text("images/train/a.png\nimages/val/b.png\n")
    (tmp_path / "data.yaml").write_text(text.format("list.txt"))
    assert check(tmp_path, tmp_path / "out", "--quick") == 1
    reported = capsys.readouterr().out
    assert "FAULT: 1 images are in train and in val: a.png = images/train/a.png" in reported
    assert "file names are in" not in reported


@pytest.mark.filterwarnings("ignore")
def test_predict_leaves_out_what_cannot_be_read(tmp_path: Path) -> None:
    for name in "ab":
        make_image(tmp_path / f"in/{name}.png")
    (tmp_path / "in/a.png").write_bytes(b"no image")
    model = YOLOv3Tiny(num_classes=2, width=0.125)
    with pytest.warns(UserWarning, match=r"1 of 2 images can't be read and are left out: .*a\.png"):
        assert predict(model, [tmp_path / "in"], tmp_path / "out", size=64) == [tmp_path / "out/b.png"]
    with pytest.raises(ValueError, match=r"a\.png: not an image"):
        predict(model, [tmp_path / "in/a.png"], tmp_path / "out", size=64)
