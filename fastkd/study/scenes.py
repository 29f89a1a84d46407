"""The study's scenes: digits scenes, and the parts of them that each student is given with labels."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastkd.files import replacing
from fastkd.yolov3.digits import write_digits

# what kinds of scenes there are, as options of ``write_digits``; a kind is also the name of its folder
KINDS: dict[str, dict[str, Any]] = {"digits": {}, "sparse": {"glyph_height": (14, 24), "max_digits": 1}}


def write_scenes(root: Path, kind: str, *, train: int, val: int, test: int, size: int = 96) -> None:
    """Make the scenes; what is there stays."""
    write_digits(root / kind, train=train, val=val, test=test, size=size, **KINDS[kind])


def scene_files(root: Path, kind: str, split: str) -> tuple[Path, Path]:
    """Annotations and pictures of ``"val"`` or ``"test"``."""
    return root / kind / f"annotations/{split}.json", root / kind / f"images/{split}"


def labelled(root: Path, kind: str, first: int, count: int) -> dict[str, str]:
    """The training scenes ``first`` to ``first + count - 1`` as ``TrainConfig`` takes them, relative to ``root``."""
    name = f"annotations/{'' if kind == 'digits' else f'{kind}-'}{first}-{first + count - 1}.json"
    if not (root / name).is_file():
        content = json.loads((root / kind / "annotations/train.json").read_text(encoding="utf-8"))
        images = content["images"][first : first + count]
        if len(images) != count:
            raise ValueError(
                f"count: expected scenes of the {len(content['images'])}, got {first} to {first + count - 1}"
            )
        ids = {image["id"] for image in images}
        boxes = [x for x in content["annotations"] if x["image_id"] in ids]
        with replacing(root / name) as part:
            part.write_text(json.dumps(content | {"images": images, "annotations": boxes}), encoding="utf-8")
    return {"annotations": name, "images": f"{kind}/images/train"}


def kind_of(config: Mapping[str, Any]) -> str:
    """The kind of the scenes in ``labelled``'s paths."""
    return str(config["images"]).partition("/")[0]


def unlabelled(root: Path, kind: str, first: int, count: int) -> str:
    """A folder with these training scenes' pictures alone, relative to ``root``."""
    folder = root / f"unlabelled/{kind}/{first}-{first + count - 1}"
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(first + 1, first + count + 1):
        picture = f"{number:06d}.png"
        if not (folder / picture).exists():
            os.link(root / kind / "images/train" / picture, folder / picture)
    return str(folder.relative_to(root))
