"""Reader of Pascal VOC XML."""

from __future__ import annotations

import itertools
import os
import sys
from array import array
from collections.abc import Container
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

import numpy as np
from defusedxml import DefusedXmlException
from defusedxml import ElementTree as XmlTree

from fastkd.yolov3.data.annotations import Annotations, Array, from_rows, refuse_outside, some_of
from fastkd.yolov3.data.images import IMAGE_SUFFIXES, LARGEST_SIDE, SPLITS, lines_of, require_there, size_of_image


def read_voc(path: Path, images: str | os.PathLike[str]) -> Annotations:
    """Read Pascal VOC XML, in a folder of its own or beside the images.

    Corners are whole pixels counted from 1, and the last pixel is inside the box. If any corner of the set is 0 or has
    a fraction, all corners are instead points counted from 0; negative corners decide nothing. A box whose second
    corner is not greater than its first has no area.

    The classes are the sorted labels of all XML files of the folder, so that every list of it numbers them alike; if
    the files are beside the images in train/ and valid/, they are the labels of all these folders. ``difficult``
    objects are treated as COCO's crowds: in VOC's evaluation too, they count neither as misses nor as false detections.

    Raises:
        FileNotFoundError: the folder of the XML files, or the list, is missing.
        ValueError: a file is not Pascal VOC XML (the message names it), or a list has unknown names or none.
    """
    folder = path if path.is_dir() else path.parent.parent.parent / "Annotations"
    require_there("annotations", folder)
    files = {file.stem: file for file in sorted(folder.glob("*.xml"))}
    if not files:
        raise ValueError(f"annotations: no .xml files in {folder}")
    listed = list(files) if path.is_dir() else _voc_names(path, files)
    if not listed:
        raise ValueError(f"{path} lists no names; expected the names of XML files in {folder}, one per line")
    absent = [name for name in listed if name not in files]
    if absent:
        raise ValueError(f"{path}: {len(absent)} of {len(listed)} names have no file in {folder}: {some_of(absent)}")
    parsed = {name: _read_xml(file) for name, file in files.items()}
    others = [_read_xml(file) for file in _beside(folder)] if folder == Path(images) else []
    everything = [*parsed.values(), *others]
    index = {name: i for i, name in enumerate(sorted({label for xml in everything for label in xml.labels}))}
    classes = np.array([index[label] for xml in everything for label in xml.labels])
    boxes, note = boxes_of_corners(np.concatenate([xml.objects for xml in everything]))
    ends = dict(zip(parsed, itertools.accumulate(len(xml.labels) for xml in parsed.values()), strict=True))
    names, sizes, chosen, others_named = [], [], [np.zeros(0, np.int64)], []
    for name in listed:
        xml = parsed[name]
        file_name, other = _voc_image(Path(images), files[name], xml.file_name, files)
        others_named += [f"{name}.xml names {other}"] if other else []
        names.append(file_name)
        sizes.append(xml.size or size_of_image(Path(images) / file_name))
        chosen.append(np.arange(ends[name] - len(xml.labels), ends[name]))
    of = np.concatenate(chosen)
    table = np.column_stack([np.repeat(np.arange(len(listed)), [len(x) for x in chosen[1:]]), classes[of], boxes[of]])
    notes = [note]
    if others_named:
        notes.append(
            f"{len(others_named)} XML files name another image, which exists too; they are used for the image that has "
            f"the XML file's own name: {some_of(others_named)}"
        )
    return from_rows(str(path), Path(images), names, sizes, list(index), table, notes)


def _beside(folder: Path) -> list[Path]:
    """Return the XML files of the other splits, if they are beside their images."""
    if folder.name not in SPLITS:
        return []
    return [file for split in SPLITS if split != folder.name for file in sorted((folder.parent / split).glob("*.xml"))]


def boxes_of_corners(objects: Array) -> tuple[Array, str]:
    """Return (M, 5) x, y, width, height, difficult from (M, 5) corners, difficult; and a note on the corners."""
    corners = objects[:, :4]
    known = corners[np.isfinite(corners).all(1)]
    from_zero = int(((known[:, :2] == 0).any(1) | (known % 1 != 0).any(1)).sum())
    offset = 0 if from_zero else 1
    with np.errstate(invalid="ignore"):
        size = corners[:, 2:] - corners[:, :2]
    boxes = np.concatenate([corners[:, :2] - offset, size + offset * (size > 0), objects[:, 4:]], axis=1)
    if from_zero:
        return boxes, f"corners are read as points counted from 0: {from_zero} boxes have one at 0 or with a fraction"
    return boxes, "corners are read as whole pixels counted from 1, as in VOC: none is at 0 or has a fraction"


class _Xml(NamedTuple):
    file_name: str
    size: tuple[int, int] | None
    labels: list[str]
    objects: Array  # (k, 5) left, top, right, bottom, difficult


def _read_xml(path: Path) -> _Xml:
    labels, objects = [], array("d")
    try:
        root: Any = XmlTree.parse(path).getroot()
        size = _size_of(root)
        for entry in root.iter("object"):
            label = entry.findtext("name", "").strip()
            if not label:
                raise ValueError("an object without a name")
            labels.append(sys.intern(label))
            objects.extend((*_corners_of(entry, label), entry.findtext("difficult", "0").strip() == "1"))
    except DefusedXmlException as error:
        raise ValueError(
            f"{path}: refused, because it declares entities, which no annotation needs ({error})"
        ) from None
    except (XmlTree.ParseError, ValueError, OverflowError) as error:
        raise ValueError(f"{path}: not Pascal VOC XML: {error}") from None
    return _Xml(root.findtext("filename", "").strip(), size, labels, np.frombuffer(objects).reshape(-1, 5))


def _size_of(root: Any) -> tuple[int, int] | None:
    """Return width and height; None if they are not given, or not numbers."""
    try:
        width, height = (int(float(root.findtext(f"size/{side}", "0"))) for side in ("width", "height"))
    except (ValueError, OverflowError):  # empty text, nan or inf
        return None
    if max(width, height) >= LARGEST_SIDE:
        raise ValueError(f"expected a size of less than 2^31 pixels, got {float(width):g}x{float(height):g}")
    return (width, height) if width > 0 and height > 0 else None


def _corners_of(entry: Any, label: str) -> list[float]:
    texts = [entry.findtext(f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")]
    try:
        return [float(text) for text in texts]
    except (TypeError, ValueError):
        found = "no bndbox" if entry.find("bndbox") is None else texts
        other = next((tag for tag in ("polygon", "segm", "robndbox") if entry.find(tag) is not None), None)
        hint = f"; it has a {other}, as files of LabelMe and others do: convert them to boxes first" if other else ""
        raise ValueError(
            f"object {label!r}: expected numbers in bndbox's xmin, ymin, xmax, ymax, got {found}{hint}"
        ) from None


def _voc_image(folder: Path, file: Path, file_name: str, stems: Container[str]) -> tuple[str, str]:
    """Return the image of an XML file, and the name of another existing image if the file names that one.

    An XML file belongs to the image with its own name. If there is none, it belongs to the image that it names, unless
    that image belongs to another XML file; ``stems`` are the names of all XML files.
    """
    stem, named = file.stem, PureWindowsPath(file_name)
    suffixes = dict.fromkeys((named.suffix or IMAGE_SUFFIXES[0], *IMAGE_SUFFIXES, *map(str.upper, IMAGE_SUFFIXES)))
    own = next((f"{stem}{suffix}" for suffix in suffixes if (folder / f"{stem}{suffix}").is_file()), None)
    if own is None:
        if file_name:
            refuse_outside(file_name, str(file))
        of_another = named.stem != stem and named.stem in stems
        return f"{stem}.jpg" if of_another or not file_name else file_name, ""
    contradicts = named.stem not in ("", stem) and (folder / named.name).is_file()
    return own, named.name if contradicts else ""


def _voc_names(path: Path, known: Container[str]) -> list[str]:
    """Return the names in a list of VOC, where a flag may follow the name."""
    names = []
    for line in filter(None, map(str.strip, lines_of(path))):
        while line not in known and len(line.split()) > 1:
            line = line.rsplit(maxsplit=1)[0]
        names.append(line)
    return names
