"""The study's scenes: digits scenes, and the parts of them that each student is given with labels."""

from __future__ import annotations

import json
import os
from pathlib import Path

from fastkd.files import replacing
from fastkd.yolov3.digits import write_digits


def write_scenes(root: Path, *, train: int, val: int, test: int, size: int) -> None:
    """Make the scenes; what is there stays."""
    write_digits(root / "digits", train=train, val=val, test=test, size=size)


def scene_files(root: Path, split: str) -> tuple[Path, Path]:
    """Annotations and pictures of ``"val"`` or ``"test"``."""
    return root / f"digits/annotations/{split}.json", root / f"digits/images/{split}"


def labelled(root: Path, first: int, count: int) -> dict[str, str]:
    """The training scenes ``first`` to ``first + count - 1`` as ``TrainConfig`` takes them, relative to ``root``."""
    name = f"annotations/{first}-{first + count - 1}.json"
    if not (root / name).is_file():
        content = json.loads((root / "digits/annotations/train.json").read_text(encoding="utf-8"))
        images = content["images"][first : first + count]
        if len(images) != count:
            raise ValueError(
                f"count: expected scenes of the {len(content['images'])}, got {first} to {first + count - 1}"
            )
        ids = {image["id"] for image in images}
        boxes = [x for x in content["annotations"] if x["image_id"] in ids]
        with replacing(root / name) as part:
            part.write_text(json.dumps(content | {"images": images, "annotations": boxes}), encoding="utf-8")
    return {"annotations": name, "images": "digits/images/train"}


def unlabelled(root: Path, first: int, count: int) -> str:
    """A folder with these training scenes' pictures alone, relative to ``root``."""
    folder = root / f"unlabelled/{first}-{first + count - 1}"
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(first + 1, first + count + 1):
        picture = f"{number:06d}.png"
        if not (folder / picture).exists():
            os.link(root / "digits/images/train" / picture, folder / picture)
    return str(folder.relative_to(root))
