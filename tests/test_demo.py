"""The demo with tiny settings: its files, its pairing and its arithmetic."""

import json
import statistics

import cv2
import pytest

from fastkd.yolov3.show.demo import DISTILLED, DRAWN, PLAIN, Settings, run_demo
from fastkd.yolov3.train.config import read_config

TINY = Settings(
    scenes=104,
    val=5,
    test=4,
    teacher_width=0.125,
    student_width=0.125,
    teacher_steps=6,
    student_steps=8,
    batch=4,
    curve_points=1,
    size=96,
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    return out, run_demo(out, seeds=2, settings=TINY)


def test_results_hold_every_run_with_its_seed_and_the_versions(demo):
    out, results = demo
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    assert [(s["kind"], s["seed"]) for s in results["students"]] == [(x, i) for x in (PLAIN, DISTILLED) for i in (0, 1)]
    assert {"fastkd", "torch", "python", "pycocotools"} <= results["versions"].keys()
    assert results["share_of_step"].keys() == {"distillation_loss", "teacher"}
    assert all(share > 0 for share in results["share_of_step"].values())  # a busy machine has no upper limit


def test_each_student_has_settings_of_its_own(demo):
    out, _ = demo
    for kind, options in (("without", TINY.plain), ("with", TINY.distilled)):
        for seed in (0, 1):
            config = read_config(out / f"students/{kind}-seed{seed}")
            assert {name: getattr(config, name) for name in options} == options
            assert (config.seed, config.steps, config.teacher is None) == (seed, 8, kind == "without")


def test_the_gain_is_paired_by_seed(demo):
    _, results = demo
    test = {(s["kind"], s["seed"]): s["test"] for s in results["students"]}
    for name in ("mAP", "AP50", "AP75"):
        pairs = [test[DISTILLED, seed][name] - test[PLAIN, seed][name] for seed in (0, 1)]
        assert results["gain"][name]["values"] == pytest.approx(pairs)
        assert results["gain"][name]["mean"] == pytest.approx(statistics.mean(pairs))
        assert results["gain"][name]["standard_deviation"] == pytest.approx(statistics.stdev(pairs))


def test_the_report_says_what_only_the_teacher_had(demo):
    out, _ = demo
    report = " ".join((out / "report.txt").read_text().split())
    assert "the labels of 104 scenes for 6 steps" in report
    assert "which were not used to choose anything" in report
    assert "mAP" in report


def test_images_are_there_and_not_blank(demo):
    out, _ = demo
    for name in DRAWN:
        image = cv2.imread(str(out / f"{name}.png"))
        assert image is not None, name
        assert image.std() > 10, name


def test_a_teacher_that_is_there_is_used_again(demo):
    out, first = demo
    trained = (out / "teacher" / "checkpoint.pt").stat().st_mtime_ns
    (out / "students" / "marks.csv").write_text("not ours")
    again = run_demo(out, seeds=1, settings=TINY)
    assert (out / "earlier" / "students" / "marks.csv").read_text() == "not ours"
    assert json.loads((out / "earlier" / "results.json").read_text())["seeds"] == first["seeds"]
    assert (out / "teacher" / "checkpoint.pt").stat().st_mtime_ns == trained
    assert again["teacher"]["test"] == first["teacher"]["test"]
    assert again["gain"]["mAP"]["standard_deviation"] is None
