"""Detectors in ONNX files, as ``fastkd export`` writes them, run by ONNX Runtime."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastkd.yolov3.anchors import Heads
from fastkd.yolov3.boxes import Decoded

INPUT, BOXES, SCORES = "images", "boxes", "scores"  # names in the file
_FORMAT = "fastkd onnx 1"


class Exported(NamedTuple):
    """A detector from an ONNX file."""

    model: OnnxDetector
    class_names: tuple[str, ...]  # one per class; empty where the file does not say them
    size: int  # side in pixels of its square input
    notes: tuple[str, ...] = ()  # as of ``Trained``


class OnnxDetector(nn.Module):
    """A detector that ONNX Runtime runs, on the CPU: ``evaluate``, ``predict`` and ``detect`` take it as any other.

    ``load_onnx`` makes it. It has no parameters, cannot be trained, and returns ``Decoded`` instead of raw head maps.

    Attributes:
        num_classes, strides, anchors: as of the detector that was exported.
        size: side in pixels of the square input.
    """

    def __init__(self, session: Any, num_classes: int, size: int, strides: tuple[int, ...], anchors: Tensor) -> None:
        super().__init__()
        self._session = session
        self.num_classes, self.size, self.strides, self.anchors = num_classes, size, strides, anchors

    def forward(self, images: Tensor) -> Decoded:
        """Boxes and scores of RGB images, on the CPU.

        Args:
            images: (N, 3, size, size) floating point, 0..1, on any device.

        Raises:
            ValueError: images of another shape.
        """
        if images.shape[1:] != (3, self.size, self.size):
            raise ValueError(
                f"images: expected (N, 3, {self.size}, {self.size}), as the detector was exported, got "
                f"{tuple(images.shape)}; letterbox them to that size, or export it for another"
            )
        found = self._session.run([BOXES, SCORES], {INPUT: images.detach().float().cpu().numpy()})
        return Decoded(*map(torch.from_numpy, found))


def load_onnx(
    path: str | os.PathLike[str],
    *,
    class_names: Sequence[str] | None = None,
    providers: Sequence[str] = ("CPUExecutionProvider",),
) -> Exported:
    """Read a detector that ``export_onnx`` wrote. It runs on as many threads as PyTorch has.

    Args:
        path: the ``.onnx`` file.
        class_names: one per class, in place of those that the file has.
        providers: ONNX Runtime's execution providers, the preferred first.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an ONNX file, one that another program wrote, or another number of names than of classes.
        ModuleNotFoundError: onnxruntime is not installed (the extra ``[export]``).
    """
    import onnxruntime  # here, so that the package imports with torch alone

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; write it with fastkd export, or give another path")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(os.fspath(path), options, providers=list(providers))
    except Exception as error:  # ONNX Runtime has a type of its own for each fault, all below Exception alone
        raise ValueError(f"{path}: not readable as an ONNX model ({type(error).__name__}); is it whole?") from error
    properties = session.get_modelmeta().custom_metadata_map
    if properties.get("format") != _FORMAT:
        raise ValueError(
            f"{path}: expected a file that fastkd export wrote, of format {_FORMAT!r}, got {properties.get('format')!r}"
        )
    classes, size = int(properties["num_classes"]), int(properties["size"])
    names = json.loads(properties["class_names"]) if class_names is None else class_names
    if names and len(names) != classes:
        raise ValueError(f"class_names: expected {classes}, one per class, got {len(names)}")
    anchors = torch.tensor(json.loads(properties["anchors"]))
    model = OnnxDetector(session, classes, size, tuple(json.loads(properties["strides"])), anchors)
    return Exported(model.eval(), tuple(names), size)


def metadata(heads: Heads, size: int, class_names: Sequence[str] = ()) -> dict[str, str]:
    """What an ONNX file says of its detector, for ``load_onnx``; lists are in JSON."""
    return {
        "format": _FORMAT,
        "num_classes": str(heads.num_classes),
        "class_names": json.dumps(list(class_names), ensure_ascii=False),
        "size": str(size),
        "strides": json.dumps(heads.strides),
        "anchors": json.dumps(heads.anchors.tolist()),
    }
