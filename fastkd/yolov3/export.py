"""Detectors written as ONNX, for programs without PyTorch: one file, compared with PyTorch before it is kept."""

from __future__ import annotations

import copy
import importlib
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastkd.files import replacing
from fastkd.yolov3.boxes import Decoded, boxes_and_scores
from fastkd.yolov3.data.dataset import fit
from fastkd.yolov3.model import Detector
from fastkd.yolov3.onnx_detector import BOXES, INPUT, SCORES, load_onnx, metadata

TOLERANCE = 1e-4
_LARGEST = 2**31 - 2**20  # bytes of one ONNX file: protobuf's limit, less what is not weights


class Agreement(NamedTuple):
    """The greatest differences between what ONNX Runtime and PyTorch compute."""

    scores: float
    boxes: float  # of a coordinate, as a part of the input's side; of the box's own longer side where that is larger


def export_onnx(
    model: Detector, path: str | os.PathLike[str], *, size: int, class_names: Sequence[str] = ()
) -> Agreement:
    """Write a detector as ONNX, and return how well ONNX Runtime agrees with PyTorch on it.

    The file's input ``images`` is (N, 3, size, size) float32, RGB in [0, 1], for any N. Its outputs are ``boxes``
    (N, M, 4), x1, y1, x2, y2 in pixels of the input, and ``scores`` (N, M, K), objectness times class probability; M
    runs over heads, anchors, rows and columns. Non-maximum suppression is not in the file: ``fastkd.yolov3.detect``
    does it, so that its thresholds stay free. The metadata have what ``load_onnx`` needs.

    Both run on random images and on two photographs. If they differ by more than 1e-4 no file is written.

    Args:
        model: what to write, in any mode, on any device, of any dtype: the file computes in float32. It is not changed.
        path: ``.onnx`` file; replaced if there.
        size: side in pixels of the square input, a multiple of 32.
        class_names: one per class, for the metadata.

    Raises:
        ValueError: another suffix, size or number of names; weights of 2 GB or more, which one ONNX file cannot hold;
            or ONNX Runtime and PyTorch differ by more than 1e-4.
        OSError: the file could not be written.
        ModuleNotFoundError: onnx, onnxscript or onnxruntime is not installed (the extra ``[export]``).
    """
    path = Path(path)
    for name in ("onnx", "onnxscript", "onnxruntime"):
        importlib.import_module(name)  # before the work: torch imports them late
    if path.suffix != ".onnx":
        raise ValueError(f"{path}: expected a file name that ends in .onnx, got {path.suffix!r}")
    if size <= 0 or size % 32:
        raise ValueError(f"size: expected a positive multiple of 32, got {size}")
    if class_names and len(class_names) != model.num_classes:
        raise ValueError(f"class_names: expected {model.num_classes}, one per class, got {len(class_names)}")
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    if weights > _LARGEST:
        raise ValueError(f"model: expected weights of less than 2 GB, all that one ONNX file holds, got {weights:,} B")
    decoding = _Decoding(copy.deepcopy(model).to("cpu", torch.float32)).eval().requires_grad_(False)
    program = _trace(decoding, size)
    program.model.metadata_props.update(metadata(decoding.detector, size, class_names))
    with replacing(path) as part:
        program.save(os.fspath(part), external_data=False)
        found = _compare(decoding, part, size)
        if not all(difference <= TOLERANCE for difference in found):  # NaN too
            raise ValueError(
                f"{path}: not written, as ONNX Runtime and PyTorch differ by more than {TOLERANCE:g}: scores by "
                f"{found.scores:.1e}, boxes by {found.boxes:.1e} of the input's side; try other versions of "
                "onnxscript and onnxruntime"
            )
    return found


class _Decoding(nn.Module):
    """A detector and the decoding of its heads, as one network."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        boxes, scores = boxes_and_scores(self.detector(images), self.detector)
        return boxes, scores


def _trace(decoding: _Decoding, size: int) -> Any:
    """The ONNX program of a network, without the places in source files that the exporter notes at each node."""
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            decoding,
            (torch.zeros(2, 3, size, size),),  # 2, because a batch of 1 would be taken as a constant
            dynamo=True,
            verbose=False,
            input_names=[INPUT],
            output_names=[BOXES, SCORES],
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
        )
    assert program is not None
    for node in program.model.graph:
        node.metadata_props.clear()
    return program


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on packages that it does not need, and on what PyTorch deprecates in its own."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        log.setLevel(level)


@torch.inference_mode()
def _compare(decoding: _Decoding, file: Path, size: int) -> Agreement:
    """The greatest differences on random images, one alone and three as a batch, and on photographs."""
    exported = load_onnx(file).model
    random = torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    found = [_differences(Decoded(*decoding(x)), exported(x), size) for x in (random[:1], random, _photographs(size))]
    return Agreement(*torch.tensor(found).amax(0).tolist())


def _differences(ours: Decoded, theirs: Decoded, size: int) -> Agreement:
    sides = (ours.boxes[..., 2:] - ours.boxes[..., :2]).amax(-1, keepdim=True).clamp(min=size)
    scores, boxes = (ours.scores - theirs.scores).abs().max(), ((ours.boxes - theirs.boxes).abs() / sides).max()
    return Agreement(scores.item(), boxes.item())


def _photographs(size: int) -> Tensor:
    """(2, 3, size, size) float32, RGB in [0, 1]: the two that scikit-learn ships, letterboxed."""
    from sklearn.datasets import load_sample_images

    images = [torch.from_numpy(fit(image, size)[0]) for image in load_sample_images().images]
    return torch.stack(images).permute(0, 3, 1, 2).float() / 255
