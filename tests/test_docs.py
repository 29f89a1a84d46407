"""The pages are correct: their code runs, the parser accepts their commands, and their links and names exist.

A fenced block is ``python`` (run, page by page), ``sh`` (parsed, and run if that takes seconds), ``console`` (run, and
its output compared), ``text`` (compared with the program that prints or reads it), or a directive of Sphinx, which
``make docs`` checks.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import fnmatch
import importlib
import importlib.util
import inspect
import json
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import test_doctor
import torch
import ultralytics_offline
from PIL import Image
from torch import Tensor, nn
from torch.distributed.run import get_args_parser as torchrun_parser
from torch.utils.data import DataLoader, TensorDataset

import fastkd
from fastkd import cli
from fastkd.yolov3 import YOLOv3, YOLOv3Tiny, save_weights
from fastkd.yolov3.class_names import read_names
from fastkd.yolov3.darknet_cfg import write_cfg
from fastkd.yolov3.data import DetectionDataset, find_set
from fastkd.yolov3.data.convert import convert
from fastkd.yolov3.data.digits import write_digits

ROOT = Path(__file__).parent.parent
NOTEBOOK = "docs/examples/first_distillation.ipynb"
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(str(x.relative_to(ROOT)) for x in (ROOT / "docs").rglob("*.md"))]

# blocks that do not run, and why; all others run
DRAWINGS = {
    "docs/architecture.md": "of what imports what: test_architecture.py reads them",
    "docs/how_it_works.md": "of the data flow",
}
ONLY_PARSED = {
    "fastkd demo": "minutes; test_demo.py runs it in miniature",
    "pip": "needs the network; the extras that it names must exist",
    "make": "hours, or the tests themselves; the targets must exist",
    "torchrun": "starts several processes; test_examples.py does with the same script",
    "python": "a program of benchmarks/, minutes to hours; file and options must exist",
}
# changes that make blocks run in seconds: text in Python blocks, and options at the end of commands
SMALLER_CODE = {"416": "64", "num_classes=3": "num_classes=3, width=0.125", "max_epochs=100": "max_epochs=1"}
SMALLER_CODE["\n...\n"] = "\nmodel(imgs)\n"  # up to the loss of the reader's own loop
SMALLER_OPTIONS = {
    "train": "--steps 2 --batch 4 --size 64 --width 0.125 --eval-every 0 --no-plots --cpu",
    "digits": "--train 8 --val 40 --test 40",
}
SMALLER_NOTEBOOK = {"TEACHER_SCENES": 24, "STUDENT_SCENES": 8, "TEST_SCENES": 8, "TEACHER_STEPS": 2, "STUDENT_STEPS": 2}
SMALLER_NOTEBOOK |= {"BATCH": 8, "WIDTH": 0.125}
SMALLER_ULTRALYTICS = {"imgsz": 96, "epochs": 2, "device": "cpu", "plots": False, "workers": 0}
# names in inline code that belong to other programs or to the reader
FOREIGN_FILES = {"train.py", "metrics.jsonl"}
FOREIGN_OPTIONS = {"--max-restarts", "--epochs=100"}
FOREIGN_ARGUMENTS = {"batch", "ckpt_path", "compile", "device", "dis", "distill_model", "epochs", "loss_weight"}
FOREIGN_ARGUMENTS |= {"quantize", "strict", "throw_on_early_termination", "timeout", "weights_only"}


# the first words of a block of commands without a language
PROGRAM = re.compile(r"([A-Z_]+=\S+ )*(fastkd|pip|make|torchrun|python|\.venv/bin/python) ")


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    language: str
    code: str

    @property
    def optional(self) -> set[str]:
        """Return the frameworks that it needs beyond ``fastkd[train]``."""
        return {x for x in ("ultralytics", "lightning") if re.search(rf"^(from|import) {x}\b", self.code, re.M)}


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(*languages: str, page: str | None = None) -> list[Block]:
    fence = re.compile(r"^( *)```([^\s`]*)[^\n`]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
    read_from = [page] if page else PAGES
    found = [Block(x, m[2], textwrap.dedent(m[3])) for x in read_from for m in fence.finditer(read(x))]
    found = [x._replace(language="sh") if not x.language and PROGRAM.match(x.code) else x for x in found]
    return [x for x in found if not languages or x.language in languages]


def pages_with(*languages: str) -> list[str]:
    return list(dict.fromkeys(x.page for x in blocks(*languages)))


def spans(page: str) -> list[str]:
    """Return the inline code outside of blocks."""
    prose = re.sub(r"^ *```.*?^ *```", "", read(page), flags=re.MULTILINE | re.DOTALL)
    return [" ".join(x.split()) for x in re.findall(r"`([^`]+)`", prose)]


def commands(block: Block) -> list[list[str]]:
    """Return the words of each command, without assignments of variables."""
    lines = block.code.replace("\\\n", " ").splitlines()
    if block.language == "console":
        lines = [x.removeprefix("$ ") for x in lines if x.startswith("$ ")]
    return [words for x in lines if (words := shlex.split(x, comments=True))]


def test_every_block_says_what_it_is() -> None:
    for block in blocks():
        assert block.language in ("python", "sh", "console", "text") or block.language.startswith("{"), block


def test_no_page_has_a_place_left_to_fill() -> None:
    assert not [page for page in PAGES if "@@" in read(page)]


# ---- links


def anchors(page: str) -> set[str]:
    prose = re.sub(r"^ *```.*?^ *```", "", read(page), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", x).strip().lower().replace(" ", "-") for x in titles}


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md", NOTEBOOK])
def test_relative_links_lead_to_files(page: str) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", read(page))
    for target in targets:
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (ROOT / page).parent / name if name else ROOT / page
        assert file.is_file(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors(str(file.resolve().relative_to(ROOT))), f"{page}: {target}"


def test_every_page_is_in_the_index_and_its_first_words_are_a_sentence() -> None:
    listed = blocks("{toctree}")
    names = {x for block in listed for x in re.findall(r"<(.+)>$", block.code, re.MULTILINE)}
    assert {f"docs/{x}.md" for x in names} == {x for x in PAGES if x.startswith("docs/")} - {"docs/index.md"}
    for page in PAGES:
        after = [x for x in read(page).split("\n\n")[1:] if x.strip()]
        assert re.match(r"[`*A-Z]|fastkd ", after[0]), f"{page}: {after[0]}"
        assert "." in after[0], f"{page}: {after[0]}"


# ---- Python


class Layers(nn.Module):
    """A model of another package: modules with these names, which get the image at these strides."""

    def __init__(self, strides: dict[str, int]) -> None:
        super().__init__()
        self.strides = strides
        for name in strides:
            *parents, last = name.split(".")
            parent: nn.Module = self
            for x in parents:
                if x not in dict(parent.named_children()):
                    parent.add_module(x, nn.Module())
                parent = parent.get_submodule(x)
            parent.add_module(last, nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))

    def forward(self, images: Tensor) -> list[Tensor]:
        return [self.get_submodule(x)(nn.functional.avg_pool2d(images, s)) for x, s in self.strides.items()]


def numbered(prefix: str, strides: dict[int, int]) -> Layers:
    return Layers({f"{prefix}.{i}": stride for i, stride in strides.items()})


def pyramid() -> Layers:
    return Layers({"layer3": 16, "layer4": 32, "p3": 8, "p4": 16, "p5": 32})


def trained(model: Any, images: Tensor) -> Any:
    """Return a model with batch norms that are not as initialised."""
    with torch.no_grad():
        model.train()(images)
    return model


def reader() -> dict[str, Any]:
    """Return what a reader of a page on distillation has: two detectors, images, an optimiser and a distiller."""
    torch.manual_seed(0)
    images = torch.rand(2, 3, 64, 64)
    student, teacher = YOLOv3Tiny(3, 0.125), trained(YOLOv3(3, 0.125), images)
    distiller = fastkd.Distiller(student, teacher, images=images, weight="auto")
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    distiller.add_to(optimizer)
    task_loss = torch.tensor(5.0)
    return {"fastkd": fastkd, "torch": torch, "images": images, "student": student, "teacher": teacher} | {
        "distiller": distiller, "optimizer": optimizer, "task_loss": task_loss
    }  # fmt: skip


def repository(prefix: str, student: dict[int, int], teacher: dict[int, int]) -> dict[str, Any]:
    """Return what the training script of a YOLOv3 repository has at the place that the page names."""
    images = torch.rand(2, 3, 64, 64)
    model, theirs = numbered(prefix, student), trained(numbered(prefix, teacher), images)
    options = SimpleNamespace(teacher=["yolov3.cfg", "yolov3.weights"])
    names = {"fastkd": fastkd, "torch": torch, "model": model, "imgs": images, "imgsz": 64, "device": "cpu"}
    names |= {"args": options, "opt": options, "dataloader": [("paths", images, None)]}
    names |= dict.fromkeys(("load_model", "attempt_load"), lambda *_, **__: theirs)
    return names | {"optimizer": torch.optim.SGD(model.parameters(), 0.1), "loss": sum(x.mean() for x in model(images))}


def lightning_user() -> dict[str, Any]:
    """Return a LightningModule with a detector, its loader, and a teacher of the same kind."""
    pl = importlib.import_module("lightning.pytorch")

    class Module(pl.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.detector = pyramid()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return sum(x.square().mean() for x in self.detector(batch[0]))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    images = torch.rand(2, 3, 64, 64)
    return {"module": Module(), "teacher": trained(pyramid(), images), "loader": DataLoader(TensorDataset(images), 2)}


# names for blocks that do not continue the last block of their page, by their first line
READERS: dict[str, Callable[[], dict[str, Any]]] = {
    "# eriklindernoren/PyTorch-YOLOv3": lambda: repository(
        "module_list", {6: 8, 8: 16, 13: 32, 14: 32, 21: 16}, {37: 8, 62: 16, 75: 32, 80: 32, 92: 16, 104: 8}
    ),
    "# ultralytics/yolov3": lambda: repository(
        "model", {6: 8, 8: 16, 13: 32, 15: 32, 19: 16}, {6: 8, 8: 16, 10: 32, 15: 32, 22: 16, 27: 8}
    ),
    "from lightning": lightning_user,
}


def plain(text: str) -> str:
    return " ".join(text.split())


def run_python(page: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Run the Python blocks of a page; return what each printed."""
    names = {} if page == "README.md" else reader()
    printed: list[str] = []
    for block in blocks(page=page):
        if block.language == "text" and printed and page != "docs/doctor.md":
            assert plain(printed[-1]) == plain(block.code)
        missing = block.optional - {x for x in ("lightning",) if importlib.util.find_spec(x)}
        if block.language != "python" or missing:  # if the framework is missing, only the arguments are checked
            continue
        others = [make() for start, make in READERS.items() if block.code.startswith(start)]
        code = block.code
        for large, small in SMALLER_CODE.items():
            code = code.replace(large, small)
        with warnings.catch_warnings():
            warnings.simplefilter("default" if block.optional else "error")
            exec(compile(code, page, "exec"), others[0] if others else names)
        printed.append(capsys.readouterr().out)
    return printed


OF_THEIR_OWN = ("README.md", "docs/ultralytics.md")  # pages with a test of their own below


@pytest.mark.parametrize("page", [x for x in pages_with("python") if x not in OF_THEIR_OWN])
def test_the_python_of_a_page_runs_in_order(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (80, 60)).save("dog.jpg")
    run_python(page, capsys)


def test_the_first_example_of_the_readme_runs_as_it_stands_and_ends_with_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(blocks("python", page="README.md")[0].code.splitlines()) <= 15
    report = run_python("README.md", capsys)[0]
    found = {line[6:23].strip(): line.split()[0] for line in report.splitlines() if line[:1].strip()}
    assert {found[name] for name in ("teacher frozen", "hooks", "gradient", "optimizer")} == {"ok"}
    assert found["teacher trained"] == "FAIL"  # as the page shows


def code_of_notebook() -> str:
    """Return the code of all cells, with the constants of ``SMALLER_NOTEBOOK`` and without commands of IPython."""
    cells = ["".join(x["source"]) for x in json.loads(read(NOTEBOOK))["cells"] if x["cell_type"] == "code"]
    code = re.sub(r"^%.*\n", "", "\n".join(cells), flags=re.MULTILINE)
    for name, value in SMALLER_NOTEBOOK.items():
        code, count = re.subn(rf"^{name} = [\d.]+", f"{name} = {value}", code, flags=re.MULTILINE)
        assert count == 1, name
    return code


def test_the_notebook_runs_from_the_scenes_to_a_student_that_the_commands_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(compile(code_of_notebook(), NOTEBOOK, "exec"), names)
    assert names["results"].keys() == {"teacher", "student alone", "student distilled"}
    assert names["report"].ok, names["report"]
    command = capsys.readouterr().out.splitlines()[-1]  # with which the last cell ends
    assert cli.main(shlex.split(command)[1:]) == 0


def test_what_the_notebook_shows_is_small_and_was_computed_in_order() -> None:
    assert (ROOT / NOTEBOOK).stat().st_size < 300_000
    cells = [x for x in json.loads(read(NOTEBOOK))["cells"] if x["cell_type"] == "code"]
    assert [x["execution_count"] for x in cells] == list(range(1, len(cells) + 1))
    assert not [y for x in cells for y in x["outputs"] if y["output_type"] == "error"]


ULTRALYTICS = """
import json, sys
from pathlib import Path
import ultralytics, ultralytics_offline, yaml
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer
from fastkd.integrations.ultralytics import main

small, python, command = json.load(sys.stdin)
for name, width in (("yolov3", 1 / 16), ("yolov3-tiny", 1 / 8)):
    content = yaml.safe_load((Path(ultralytics.__file__).parent / f"cfg/models/v3/{name}.yaml").read_text())
    content |= {"nc": 10, "width_multiple": width, "depth_multiple": 0.2}
    Path(f"{name}.yaml").write_text(yaml.safe_dump(content))
YOLO("yolov3.yaml").save("yolov3u.pt")  # as which Ultralytics looks for yolov3.pt
ultralytics_offline.write_yolo_digits(Path("digits").resolve(), train=8, val=2).rename("coco8.yaml")
ultralytics.settings.update({"runs_dir": str(Path("runs").resolve())})

train, save = YOLO.train, DetectionTrainer.save_model
YOLO.train = lambda self, **options: train(self, **(options if "resume" in options else options | small))

def killed(trainer):
    if trainer.epoch == 1:
        raise KeyboardInterrupt
    return save(trainer)

DetectionTrainer.save_model = killed  # in its second epoch, so that there is a run to resume
try:
    exec(python[0])
    raise AssertionError("not killed")
except KeyboardInterrupt:
    DetectionTrainer.save_model = save
for code in python[1:]:
    exec(code)
main(command)
assert len(list(Path("runs/detect").glob("train*/weights/best.pt"))) == 3
assert {x.name for x in Path("runs/detect").glob("train*/*s.png")} >= {"maps.png", "differences.png"}
"""


@pytest.mark.skipif(
    ultralytics_offline.packages() is None, reason="without Ultralytics: pip install it as `make setup` does"
)
def test_the_page_of_ultralytics_trains_resumes_and_trains_as_a_command(tmp_path: Path) -> None:
    python = [x.code for x in blocks("python", page="docs/ultralytics.md")]
    (words,) = (x for block in blocks("sh", page="docs/ultralytics.md") for x in commands(block))
    assert words[:3] == ["python", "-m", "fastkd.integrations.ultralytics"]
    in_readme = [x.code for x in blocks("python", page="README.md") if "ultralytics" in x.optional]
    assert in_readme == python[:1]  # so that it runs here
    done = subprocess.run(
        [sys.executable, "-c", ULTRALYTICS],
        input=json.dumps([SMALLER_ULTRALYTICS, python, words[3:]]),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={k: v for k, v in ultralytics_offline.environment(tmp_path).items() if k != "PYTEST_CURRENT_TEST"},
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


# ---- commands


def known_options(parser: Any) -> dict[str, set[str]]:
    """Return the known options of every command of a parser, by its words, for example "fastkd data check"."""
    found = {parser.prog: {x for action in parser._actions for x in action.option_strings}}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                found |= known_options(child)
    return found


OPTIONS = known_options(cli._parser())


def write_voc(digits: Path, out: Path) -> None:
    """Write the digits in Pascal VOC's layout, with a list of the labelled images and a folder of the others."""
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main", "unlabelled"):
        (out / folder).mkdir(parents=True)
    for name in ("train", "val"):
        found = json.loads((digits / f"annotations/{name}.json").read_text())
        files = {x["id"]: x["file_name"] for x in found["images"]}
        for number, file in files.items():
            shutil.copy(digits / f"images/{name}/{file}", out / f"JPEGImages/{name}{file}")
            shutil.copy(digits / f"images/{name}/{file}", out / f"unlabelled/{name}{file}")
            boxes = [(x["category_id"], *x["bbox"]) for x in found["annotations"] if x["image_id"] == number]
            objects = [
                f"<object><name>{kind}</name><bndbox><xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + w}</xmax>"
                f"<ymax>{y + h}</ymax></bndbox></object>"
                for kind, x, y, w, h in boxes
            ]
            text = f"<annotation><filename>{name}{file}</filename>{''.join(objects)}</annotation>"
            (out / f"Annotations/{name}{Path(file).stem}.xml").write_text(text)
        names = "\n".join(name + Path(x).stem for x in files.values())
        for listed in (name, f"{name}_10"):
            (out / f"ImageSets/Main/{listed}.txt").write_text(names)


@pytest.fixture(scope="module")
def belongings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return what a reader of a page of commands has: data in each format, images, and published weights."""
    root = tmp_path_factory.mktemp("belongings")
    digits = write_digits(root / "my_data", train=8, val=3, test=2)
    for name in ("NEU-DET", "BCCD", "VOC2007"):
        write_voc(digits, root / name)
    convert(digits, root / "AQUARIUM", "yolo")
    for name in ("my_images", "more_images"):
        shutil.copytree(digits / "images" / "test", root / name)
    shutil.copy(next((root / "my_images").iterdir()), root / "dog.jpg")
    coco = json.loads((digits / "annotations" / "val.json").read_text())
    coco["categories"] = [{"id": i, "name": name} for i, name in enumerate(read_names("coco"))]
    shutil.copytree(digits / "images" / "val", root / "coco" / "val2017")
    (root / "coco" / "annotations").mkdir()
    (root / "coco" / "annotations" / "instances_val2017.json").write_text(json.dumps(coco))
    published = YOLOv3Tiny(80, 0.125)  # with a .cfg that gives its width
    save_weights(published, root / "yolov3-tiny.weights")
    (root / "yolov3-tiny.cfg").write_text(write_cfg(published))
    return root


@pytest.fixture(scope="module")
def unsplit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the images of docs/data.md that are in one set, not split."""
    root = tmp_path_factory.mktemp("unsplit")
    digits = write_digits(root / "digits", train=30, val=0, test=0, size=80)
    (digits / "annotations" / "train.json").rename(digits / "labels.json")
    for image in (digits / "images" / "train").iterdir():
        image.rename(digits / "images" / image.name)
    for folder in ("annotations", "images/train"):
        shutil.rmtree(digits / folder)
    return digits


def smaller(words: list[str]) -> list[str]:
    return words + [x for name in words[:2] for x in SMALLER_OPTIONS.get(name, "").split()]


def pattern(shown: str) -> str:
    """Return a regular expression for the output on a page: other numbers match too, and "..." matches anything."""
    pieces = [re.escape(x) for x in re.split(r"(\d+|#+|\.\.\.)", plain(shown))]
    return "".join(
        r"\d+" if x[:1].isdigit() else r"\\?#+" if "#" in x else ".*" if x == r"\.\.\." else x for x in pieces
    )


# pages that continue another page; commands on both are run once
GROUPS = [["README.md", "docs/quick_start.md"]]
GROUPS += [[page] for page in pages_with("sh", "console") if page not in GROUPS[0]]


@pytest.mark.parametrize("pages", GROUPS, ids=" ".join)
def test_the_commands_of_a_page_are_parsed_and_run_in_order(
    pages: list[str],
    belongings: Path,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(belongings, tmp_path, dirs_exist_ok=True)
    if pages == ["docs/data.md"]:
        shutil.rmtree("my_data")
        shutil.copytree(request.getfixturevalue("unsplit"), "my_data")
    done = []
    for block in (x for page in pages for x in blocks("sh", "console", page=page)):
        for words in (x for x in commands(block) if x not in done):
            done.append(list(words))
            run_command(words, monkeypatch, capfd)
        out, err = capfd.readouterr()
        if block.language == "console":
            shown = "\n".join(x for x in block.code.splitlines() if not x.startswith("$ "))
            assert re.search(pattern(shown), plain(out + err)), out + err


def run_command(words: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    while "=" in words[0]:
        name = words.pop(0).partition("=")[0]
        assert name == "PYTHONPATH" or name in read("setup.py"), name
    if words[0] != "fastkd":
        check_other_command(words, monkeypatch)
        return
    cli._parser().parse_args(words[1:])
    if " ".join(words) not in ONLY_PARSED:
        status = cli.main(smaller(words[1:]))
        printed = capfd.readouterr()
        faults = re.findall(r"^FAIL +([a-z ]+?)  ", printed.out, re.MULTILINE)
        assert status == bool(faults), f"{words}: {printed}"
        assert faults in ([], ["teacher scores"]), printed.out  # a teacher of 2 steps finds hardly anything
        print(printed.out, printed.err)


def check_other_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    program = Path(words[0]).name
    assert program in ONLY_PARSED, words
    if program == "pip":
        extras = [y for x in words for y in re.findall(r"\[(.*)\]", x)]
        assert all(re.search(rf"^{x} = \[", read("pyproject.toml"), re.MULTILINE) for x in extras), words
    elif program == "make":
        target, *variables = words[1:]
        makefile = read("Makefile")
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), words
        assert all(f"$({x.partition('=')[0]})" in makefile for x in variables), words
    elif program == "torchrun":
        given = torchrun_parser().parse_args(words[1:])
        script = importlib.util.spec_from_file_location("script", ROOT / "docs/examples" / given.training_script)
        assert script is not None
        assert script.loader is not None
        module = importlib.util.module_from_spec(script)
        script.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", ["script", *given.training_script_args])
        module.parse_arguments()
    elif words[1:3] != ["-m", "fastkd.integrations.ultralytics"]:  # it has a test of its own
        check_program(words[1:])


def check_program(words: list[str]) -> None:
    """Check a file or a module of this repository, and that its text has these options."""
    if words[:2] == ["-m", "pytest"]:
        files = [ROOT / x for x in words[2:] if "/" in x]
        assert all(x.is_file() for x in files), words
        return
    if words[0] == "-m":
        place = ROOT / "benchmarks" / words[1].replace(".", "/")
        file, given = (place / "__main__.py" if place.is_dir() else place.with_suffix(".py")), words[2:]
    else:
        file, given = ROOT / words[0], words[1:]
    text = file.read_text()
    assert all(f'"{x}"' in text for x in given if x.startswith("--") and x != "--help"), words


# ---- what pages print and draw


def doctor_reports() -> Iterator[Any]:
    """Return the reports of the broken distillations, in the order of the page."""
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    levels = {"backbone": test_doctor.BACKBONE, "neck": test_doctor.NECK}
    student, teacher = test_doctor.pair(images)
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    yield fastkd.Distiller(student, teacher, **levels).prepare(images).check(images, optimizer, task_loss=5.0)

    torch.manual_seed(0)
    distiller = fastkd.Distiller(YOLOv3Tiny(4, 0.125), YOLOv3(4, 0.125), **levels).prepare(images)
    optimizer = torch.optim.SGD([*distiller.student.parameters(), *distiller.parameters()], 0.1)
    yield distiller.check(images, optimizer, task_loss=5.0)

    yield test_doctor.check(images, lambda distiller: distiller.teacher.train())
    spare = test_doctor.WithSpare(), test_doctor.pair(images)[1]
    yield fastkd.Distiller(*spare, neck=[("spare", "neck16")]).check(images, task_loss=5.0)
    yield test_doctor.check(images, backbone=None, neck=[("neck16", "neck8")])
    yield test_doctor.check(images, freeze_convolutions, neck=None)
    yield test_doctor.check(images, weight=0.0)


def freeze_convolutions(distiller: fastkd.Distiller) -> None:
    for name, parameter in distiller.student.named_parameters():
        parameter.requires_grad_(not name.startswith("conv"))


def test_the_reports_of_broken_distillations_are_as_printed() -> None:
    shown = [x.code for x in blocks("text", page="docs/doctor.md")]
    for text, report in zip(shown, doctor_reports(), strict=True):
        numbers = r"\d+\.\d+%?"  # of random weights: the last digits differ between machines
        found, expected = (re.sub(numbers, "#", plain(x)) for x in (str(report), text))
        assert found == expected, f"the page is to show\n{report}"


def one_file(path: Path, line: str, folder: str) -> None:
    """A file of a layout in docs/data.md, with one image of one cat; ``line`` is the page's description of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    size, box = {"width": 64, "height": 48}, [8, 8, 16, 16]
    if path.suffix == ".jpg":
        Image.new("RGB", (64, 48)).save(path)
    elif path.suffix == ".json":
        image, annotation = (
            {"id": 1, "file_name": "a.jpg", **size},
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": box},
        )
        content = {"images": [image], "annotations": [annotation], "categories": [{"id": 1, "name": "cat"}]}
        path.write_text(json.dumps(content))
    elif path.suffix == ".xml":
        corners = "<xmin>9</xmin><ymin>9</ymin><xmax>24</xmax><ymax>24</ymax>"
        path.write_text(f"<annotation><object><name>cat</name><bndbox>{corners}</bndbox></object></annotation>")
    elif path.suffix == ".csv":
        row = {"filename": "a.jpg", **size, "class": "cat", "xmin": 8, "ymin": 8, "xmax": 24, "ymax": 24}
        columns = line.split()[-1].split(",") if "filename" in line else list(row)
        path.write_text(",".join(columns) + "\n" + ",".join(str(row[x]) for x in columns) + "\n")
    else:
        texts = {"data.yaml": "path: .\ntrain: images/train\nval: images/train\nnames: [cat]\n", "classes.txt": "cat\n"}
        texts |= {"obj.data": "train = train.txt\nvalid = train.txt\nnames = obj.names\n", "obj.names": "cat\n"}
        lists = "000005\n" if "ImageSets" in path.parts else f"{folder}/obj/a.jpg\n"
        path.write_text(texts.get(path.name, lists if path.stem == "train" else "0 0.25 0.3 0.25 0.3\n"))


@pytest.mark.parametrize("layout", [x.code for x in blocks("text", page="docs/data.md")], ids=plain)
def test_every_layout_that_is_drawn_is_read(layout: str, tmp_path: Path) -> None:
    first, *lines = layout.splitlines()
    for line in lines:
        for name in re.split(r"  +", line.strip())[0].split(", "):
            one_file(tmp_path / first.strip() / name.replace("*", "a"), line, first.strip("/"))
    for name in ("train", "all"):
        try:
            data = DetectionDataset(*find_set(tmp_path / first.strip(), name), 64)
            break
        except FileNotFoundError:
            continue
    assert (len(data), data.num_classes, len(data[0].targets)) == (1, 1, 1)


def test_drawings_are_few() -> None:
    drawn = {x.page for x in blocks("text")} - {"docs/data.md", "docs/doctor.md", "docs/your_trainer.md"}
    assert drawn == DRAWINGS.keys()


# ---- names in the text


def parameters(function: Any) -> set[str]:
    found = inspect.signature(function).parameters
    more = any(x.kind is x.VAR_KEYWORD for x in found.values())
    return found.keys() | (parameters(fastkd.DistillLoss) if more else set())


def of_integration(name: str) -> set[str]:
    """Return the arguments of a class whose framework may be missing."""
    file = {"DistillationCallback": "lightning", "DistillationTrainer": "ultralytics"}[name]
    tree = ast.parse(read(f"fastkd/integrations/{file}.py"))
    (made,) = (x for x in ast.walk(tree) if isinstance(x, ast.ClassDef) and x.name == name)
    (init,) = (x for x in made.body if isinstance(x, ast.FunctionDef) and x.name == "__init__")
    own = {x.arg for x in (*init.args.args, *init.args.kwonlyargs)}
    return own | (parameters(fastkd.Distiller) if init.args.kwarg else set())


KNOWN = {x: parameters(getattr(fastkd, x)) for x in fastkd.__all__ if callable(getattr(fastkd, x))}
for module in (fastkd.priors, fastkd.viz):
    KNOWN |= {x: parameters(y) for x, y in vars(module).items() if inspect.isfunction(y) and x[0] != "_"}
KNOWN |= {
    x: parameters(getattr(fastkd.Distiller, x)) for x in ("loss", "prepare", "check", "maps", "calibrate", "add_to")
}
KNOWN |= {x: of_integration(x) for x in ("DistillationCallback", "DistillationTrainer")}
KNOWN |= {"DetectionDataset": parameters(DetectionDataset)}
ALL_PARAMETERS = set().union(*KNOWN.values()) | FOREIGN_ARGUMENTS


def wrong_arguments(tree: ast.AST) -> list[str]:
    """Return keywords that a function of fastkd does not take, and names that fastkd does not have."""
    wrong = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            wrong += [f"{name}({x.arg}=)" for x in node.keywords if x.arg not in KNOWN.get(name, {x.arg})]
        elif isinstance(node, ast.ImportFrom) and str(node.module).startswith("fastkd"):
            wrong += [f"{node.module}.{x.name}" for x in node.names if not exists(f"{node.module}.{x.name}")]
        elif isinstance(node, ast.Attribute) and re.fullmatch(r"fastkd[\w.]+", ast.unparse(node)):
            wrong += [] if exists(ast.unparse(node)) else [ast.unparse(node)]
    return wrong


def exists(name: str) -> bool:
    """Whether a dotted name of fastkd exists."""
    module, _, rest = name.partition(".")
    if name.startswith("fastkd.integrations"):
        return name == "fastkd.integrations" or (ROOT / "/".join(name.split(".")[:3])).with_suffix(".py").is_file()
    found: Any = importlib.import_module(module)
    for part in rest.split("."):
        module = f"{module}.{part}"
        try:
            found = getattr(found, part) if hasattr(found, part) else importlib.import_module(module)
        except ImportError:
            return False
    return True


@pytest.mark.parametrize("page", PAGES)
def test_arguments_and_names_of_code_exist(page: str) -> None:
    wrong = [y for x in blocks("python", page=page) for y in wrong_arguments(ast.parse(x.code))]
    for span in spans(page):
        if re.match(r"[a-z_]+=", span):  # only arguments
            wrong += [x for x in re.findall(r"(?:^|, )([a-z_]+)=", span) if x not in ALL_PARAMETERS]
        with contextlib.suppress(SyntaxError):
            wrong += wrong_arguments(ast.parse(span))
    assert not wrong


REPOSITORY = ("benchmarks", "csrc", "docs", "fastkd", "kernels", "tests")
FILES = [str(x.relative_to(ROOT)) for folder in REPOSITORY for x in (ROOT / folder).rglob("*")]


def is_ours(name: str) -> bool:
    """Whether inline code is the path of a file of this repository, by its first folder or by its suffix."""
    suffix = re.fullmatch(r"[\w./*]+\.(py|inl|cuh|cu|cpp|h|jsonl|md)", name)
    return bool(suffix or re.fullmatch(rf"({'|'.join(REPOSITORY)})/[\w./*]*", name)) and name not in FOREIGN_FILES


@pytest.mark.parametrize("page", PAGES)
def test_commands_options_and_files_in_the_text_exist(page: str) -> None:
    every = set().union(*OPTIONS.values()) | FOREIGN_OPTIONS
    for span in spans(page):
        words = shlex.split(span.replace("'", ""))
        if is_ours(span):
            assert any(fnmatch.fnmatch(f"/{x}", f"*/{span}{'*' if span.endswith('/') else ''}") for x in FILES), span
        elif words[0] == "fastkd" and len(words) > 1:
            command = max((x for x in OPTIONS if span.startswith(x)), key=len)
            assert command != "fastkd", span
            assert all(x.rstrip(",") in OPTIONS[command] for x in words if x.startswith("--")), span
        elif words[0].startswith("--"):
            assert all(x.rstrip(",") in every for x in words if x.startswith("--")), span
        elif words[0] in ("make", "python", "PYTHONPATH=benchmarks") and words[-1] != "train.py":
            check_other_command([x for x in words if not x.startswith("PYTHONPATH")], pytest.MonkeyPatch())
