"""ONNX files compute what PyTorch does, and every command takes them; skipped without the extra [export]."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from fastkd.cli import main
from fastkd.yolov3 import YOLOv3, YOLOv3Tiny, decode
from fastkd.yolov3.checkpoint import load_detector, save_detector
from fastkd.yolov3.data.digits import CLASS_NAMES, write_digits
from fastkd.yolov3.model import Detector

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

from fastkd.yolov3 import export  # noqa: E402
from fastkd.yolov3.onnx_detector import load_onnx  # noqa: E402

SIZE = 96


def lively(model: Detector) -> Detector:
    """The detector in eval mode, with statistics of random images, and heads whose boxes and scores differ."""
    for name, module in model.named_modules():
        if name.startswith("head"):
            module.weight.data *= 10
            module.bias.data.view(3, -1)[:, 4] = 0
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean over what follows
    with torch.no_grad():
        for _ in range(3):
            model(torch.rand(4, 3, 64, 64))
    return model.eval()


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("export") / "digits", train=1, val=0, test=4, size=128)


@pytest.fixture(scope="session")
def files(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """model.pt and the model.onnx that the command writes beside it; data, whose boxes are some that model.pt finds."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    save_detector(lively(YOLOv3Tiny(10, width=0.125)), folder / "model.pt", CLASS_NAMES, SIZE)
    assert main(["export", str(folder / "model.pt")]) == 0
    found = folder / "found.json"
    assert main(["eval", str(folder / "model.pt"), *data_of(digits), "--cpu", "--detections", str(found)]) == 0
    content = json.loads((digits / "annotations/test.json").read_text())
    some = [(number, x) for number, x in enumerate(json.loads(found.read_text())) if number % 7 == 0]
    content["annotations"] = [
        {"id": n + 1, "area": x["bbox"][2] * x["bbox"][3], "iscrowd": 0, **{k: x[k] for k in KEYS}} for n, x in some
    ]
    (folder / "data/annotations").mkdir(parents=True)
    (folder / "data/annotations/test.json").write_text(json.dumps(content))
    (folder / "data/images").symlink_to(digits / "images")
    return {"pt": folder / "model.pt", "onnx": folder / "model.onnx", "data": folder / "data"}


KEYS = ("image_id", "category_id", "bbox")


def data_of(folder: Path) -> list[str]:
    return ["--data", str(folder), "--set", "test"]


@pytest.mark.parametrize(
    "model",
    [lambda: YOLOv3(7, width=0.125), lambda: YOLOv3Tiny(1, width=0.125).double().train()],
    ids=["yolov3", "tiny of one class, in float64, training"],
)
def test_onnx_runtime_and_pytorch_agree(model: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    detector = model()
    training, dtype = detector.training, detector.anchors.dtype
    lively(detector.float()).to(dtype).train(training)
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    assert max(export.export_onnx(detector, tmp_path / "model.onnx", size=64)) <= 1e-4
    assert detector.training == training
    for name, value in detector.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(parameter.requires_grad for parameter in detector.parameters())

    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for count in (1, 3):
        images = torch.rand(count, 3, 64, 64)
        boxes, scores = session.run(["boxes", "scores"], {"images": images.numpy()})
        with torch.no_grad():
            expected = decode(detector.float().eval()(images), detector.anchors, detector.strides)
        torch.testing.assert_close(torch.from_numpy(scores), expected[..., 4:5] * expected[..., 5:], atol=1e-4, rtol=0)
        torch.testing.assert_close(torch.from_numpy(boxes), expected[..., :4], atol=1e-4 * 64, rtol=1e-4)


def test_the_file_says_what_it_is_and_nothing_of_the_machine(files: dict[str, Path]) -> None:
    onnx.checker.check_model(onnx.load(files["onnx"]), full_check=True)
    found = load_onnx(files["onnx"])
    assert (found.class_names, found.size, found.model.num_classes) == (CLASS_NAMES, SIZE, 10)
    assert found.model.strides == YOLOv3Tiny.strides
    assert found.model.anchors.flatten(0, 1).tolist() == [list(x) for x in YOLOv3Tiny.default_anchors]
    content = files["onnx"].read_bytes()
    assert b".py" not in content
    assert str(Path(__file__).parent).encode() not in content
    assert [x.name for x in files["onnx"].parent.iterdir() if x.name.endswith(".part")] == []


def test_eval_gives_the_metrics_of_pytorch(files: dict[str, Path], tmp_path: Path) -> None:
    found = {}
    for kind in ("pt", "onnx"):
        out = tmp_path / f"{kind}.json"
        assert main(["eval", str(files[kind]), *data_of(files["data"]), "--cpu", "--json", str(out)]) == 0
        found[kind] = json.loads(out.read_text())
    assert 0.05 < found["pt"]["mAP"] < 1
    for name in ("mAP", "AP50", "AP75", "AR100"):
        assert found["onnx"][name] == pytest.approx(found["pt"][name], abs=1e-3)


def test_detections_of_eval_are_coco_results(files: dict[str, Path], tmp_path: Path) -> None:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    metrics, detections = tmp_path / "metrics.json", tmp_path / "detections.json"
    options = ["--json", str(metrics), "--detections", str(detections)]
    assert main(["eval", str(files["onnx"]), *data_of(files["data"]), *options]) == 0
    truth = COCO(str(files["data"] / "annotations/test.json"))
    scored = COCOeval(truth, truth.loadRes(str(detections)), "bbox")
    scored.evaluate()
    scored.accumulate()
    scored.summarize()
    assert scored.stats[0] == pytest.approx(json.loads(metrics.read_text())["mAP"], abs=1e-9)


def test_predict_finds_the_boxes_of_pytorch(files: dict[str, Path], digits: Path, tmp_path: Path) -> None:
    found = {}
    for kind in ("pt", "onnx"):
        out = tmp_path / f"{kind}.json"
        written = ["--out", str(tmp_path / kind), "--detections", str(out), "--score", "0.2", "--cpu"]
        assert main(["predict", str(files[kind]), str(digits / "images/test"), *written]) == 0
        assert len(list((tmp_path / kind).iterdir())) == 4
        found[kind] = json.loads(out.read_text())
    assert len(found["pt"]) == len(found["onnx"]) > 4
    for ours, theirs in zip(found["pt"], found["onnx"], strict=True):
        assert ours.keys() == {*KEYS, "score"}
        assert (ours["image_id"], ours["category_id"]) == (theirs["image_id"], theirs["category_id"])
        assert theirs["bbox"] == pytest.approx(ours["bbox"], abs=0.02)
        assert theirs["score"] == pytest.approx(ours["score"], abs=1e-4)
    assert {x["image_id"] for x in found["pt"]} <= {f"{n:06}.png" for n in range(1, 5)}
    assert {x["category_id"] for x in found["pt"]} <= set(range(1, 11))


# ---- videos and patterns


def make_video(path: Path, count: int = 5, fourcc: str = "mp4v", size: tuple[int, int] = (64, 48)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*fourcc), 10, size)
    rng = np.random.default_rng(0)
    for _ in range(count):
        writer.write(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))
    writer.release()


def frames_of(path: Path) -> list[Any]:
    capture, frames = cv2.VideoCapture(str(path)), []
    while (read := capture.read())[0]:
        frames.append(read[1])
    assert capture.get(cv2.CAP_PROP_FPS) == 10
    return frames


@pytest.mark.parametrize(("name", "fourcc"), [("clip.mp4", "mp4v"), ("CLIP.AVI", "MJPG"), ("clip.mkv", "mp4v")])
def test_a_video_is_drawn_frame_by_frame(name: str, fourcc: str, files: dict[str, Path], tmp_path: Path) -> None:
    make_video(tmp_path / "in" / name, fourcc=fourcc)
    out, detections = tmp_path / "out", tmp_path / "found.json"
    options = ["--out", str(out), "--detections", str(detections), "--score", "0.1", "--cpu"]
    assert main(["predict", str(files["pt"]), str(tmp_path / "in"), *options]) == 0
    target = Path(name).with_suffix(".mp4").name
    assert [x.name for x in out.iterdir()] == [target]
    before, after = frames_of(tmp_path / "in" / name), frames_of(out / target)
    assert len(before) == len(after) == 5
    assert all(a.shape == b.shape and (a != b).any() for a, b in zip(before, after, strict=True))
    found = json.loads(detections.read_text())
    assert {x["frame"] for x in found} == set(range(5))
    assert {x["image_id"] for x in found} == {name}


@pytest.mark.filterwarnings("ignore")
def test_damaged_videos_are_named(files: dict[str, Path], tmp_path: Path) -> None:
    make_video(tmp_path / "in/cut.avi", 20, "MJPG")
    make_video(tmp_path / "in/whole.mp4")
    for name, kept in (("cut.avi", 0.5), ("whole.mp4", 1)):
        content = (tmp_path / "in" / name).read_bytes()
        (tmp_path / "in" / name).write_bytes(content[: int(kept * len(content))])
    (tmp_path / "in/broken.mov").write_bytes(b"no video")
    command = ["predict", str(files["pt"]), str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--cpu"]
    with pytest.warns(UserWarning, match=r"1 of 3 images and videos can't be read and are left out: .*broken\.mov"):
        assert main(command) == 0
    assert sorted(x.name for x in (tmp_path / "out").iterdir()) == ["cut.mp4", "whole.mp4"]
    assert 1 < len(frames_of(tmp_path / "out/cut.mp4")) < 20
    with pytest.warns(UserWarning, match=r"cut\.avi: this video ends after \d+ of 20 frames"):
        assert main([*command[:2], str(tmp_path / "in/cut.avi"), "--out", str(tmp_path / "again"), "--cpu"]) == 0


@pytest.mark.parametrize("rate", [29.97, 119.9534, 239.7412])
def test_a_video_of_any_rate_is_written(tmp_path: Path, rate: float) -> None:
    from fastkd.yolov3.show.video import write_video

    write_video(tmp_path / "clip.mp4", [np.zeros((48, 64, 3), np.uint8)] * 5, rate)
    assert (tmp_path / "clip.mp4").is_file()


def test_a_video_that_the_codec_does_not_take_is_an_error_and_not_there(tmp_path: Path) -> None:
    from fastkd.yolov3.show.video import write_video

    with pytest.raises(OSError, match="can't write 1 x 48 pixels"):
        write_video(tmp_path / "clip.mp4", [np.zeros((48, 1, 3), np.uint8)] * 5, 10)
    assert list(tmp_path.iterdir()) == []


def test_a_video_that_cannot_be_written_whole_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastkd.yolov3.show.video import write_video

    monkeypatch.setattr(cv2, "VideoWriter", Full)
    with pytest.raises(OSError, match=r"clip\.mp4 could not be written: OpenCV wrote it incompletely; .* MB are free"):
        write_video(tmp_path / "clip.mp4", [np.zeros((48, 64, 3), np.uint8)] * 5, 10)
    assert list(tmp_path.iterdir()) == []


class Full:
    """A writer of videos on a disk that is full: it says nothing."""

    fourcc = staticmethod(cv2.VideoWriter.fourcc)

    def open(self, path: str, *_: object) -> bool:
        Path(path).write_bytes(b"")
        return True

    def write(self, frame: object) -> None:
        pass

    def release(self) -> None:
        pass


def test_patterns_mean_what_a_shell_would_make_of_them(files: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    for name in ("in/a.jpg", "in/b.png", "in/deep/c.jpg", "in/deep/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        done, encoded = cv2.imencode(".png", np.full((40, 60, 3), 99, np.uint8))
        (tmp_path / name).write_bytes(encoded.tobytes() if done else b"")
    make_video(tmp_path / "in/deep/d.mp4", 1)

    def predicted(*paths: str) -> list[str]:
        out = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
        assert main(["predict", str(files["pt"]), *(f"{tmp_path}/{x}" for x in paths), "--out", str(out), "--cpu"]) == 0
        return sorted(x.name for x in out.iterdir())

    assert predicted("in/*.jpg") == ["a.jpg"]
    assert predicted("in/*", "in/a.jpg") == ["a.jpg", "b.png"]
    assert predicted("in/**/*.jpg") == ["a.jpg", "c.jpg"]
    assert predicted("in/**") == ["a.jpg", "b.png", "c.jpg", "d.mp4"]
    assert "3 images and 1 videos in" in capsys.readouterr().out
    assert main(["predict", str(files["pt"]), str(tmp_path / "in/*.tif"), "--out", str(tmp_path / "out")]) == 2
    assert "in/*.tif: no images match this pattern" in capsys.readouterr().err


# ---- wrong input


@pytest.fixture
def wrong(files: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """Files that are no detector's."""
    content = files["onnx"].read_bytes()
    (tmp_path / "cut.onnx").write_bytes(content[: len(content) // 2])
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "g", [value], [value])
    graph.output[0].name = "y"
    foreign = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(foreign, tmp_path / "foreign.onnx")
    (tmp_path / "two.names").write_text("a\nb\n")
    return {"here": tmp_path, **files}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "{pt}"], "model.onnx exists already"),
        (
            ["predict", "{onnx}", "{here}", "--classes", "5"],
            "model.onnx describes itself; this option is for .weights files",
        ),
        (["export", "{pt}", "--out", "{here}/model.pb"], "expected a file name that ends in .onnx, got '.pb'"),
        (["export", "{pt}", "--out", "{here}/a.onnx", "--size", "100"], "size: expected a positive multiple of 32"),
        (["export", "{onnx}", "--out", "{here}/a.onnx"], "expected a file name that ends in .pt or .weights"),
        (["export", "{here}/absent.pt"], "absent.pt: no such file"),
        (["eval", "{here}/absent.onnx", "--data", "{data}"], "absent.onnx: no such file; write it with fastkd export"),
        (["eval", "{here}/cut.onnx", "--data", "{data}"], "cut.onnx: not readable as an ONNX model"),
        (["predict", "{here}/foreign.onnx", "x.jpg"], "expected a file that fastkd export wrote"),
        (["predict", "{onnx}", "x.jpg", "--size", "64"], "--size: expected 96, that of"),
        (
            ["predict", "{onnx}", "x.jpg", "--names", "{here}/two.names"],
            "class_names: expected 10, one per class, got 2",
        ),
        (["predict", "{onnx}", "x.jpg", "--detections", "{onnx}"], "--detections: "),
    ],
)
def test_wrong_input_is_one_line_and_status_2(
    wrong: dict[str, Path], capsys: Any, arguments: list[str], message: str
) -> None:
    assert main([x.format(**wrong) for x in arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("fastkd: error: ")
    assert message in lines[-1]
    assert not {x.name for x in wrong["here"].iterdir()} & {"a.onnx", "model.pb"}


def test_images_of_another_size_are_refused(files: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"expected \(N, 3, 96, 96\), as the detector was exported"):
        load_onnx(files["onnx"]).model(torch.rand(1, 3, 64, 64))


def test_a_file_that_computes_something_else_is_not_kept(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Other:
        """The program of a detector with other weights."""

        model = SimpleNamespace(metadata_props={})

        def save(self, path: str, external_data: bool) -> None:
            shutil.copy(files["onnx"], path)

    monkeypatch.setattr(export, "_trace", lambda *_: Other())
    nan_in_boxes = load_detector(files["pt"]).model
    nan_in_boxes.head32.bias.data[0] = math.nan
    for detector in (YOLOv3Tiny(10, width=0.125), nan_in_boxes):
        with pytest.raises(ValueError, match=r"not written, as ONNX Runtime and PyTorch differ by more than 0\.0001"):
            export.export_onnx(detector, tmp_path / "model.onnx", size=SIZE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("command", "package"), [("export", "onnxscript"), ("predict", "onnxruntime")])
def test_a_missing_package_is_named_with_its_way_out(
    command: str, package: str, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    more = {"export": [str(files["pt"]), "--out", str(tmp_path / "a.onnx")], "predict": [str(files["onnx"]), "x.jpg"]}
    assert main([command, *more[command]]) == 2
    assert f"needs {package}, which is not installed: pip install 'fastkd[export]'" in capsys.readouterr().err
