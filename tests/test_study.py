"""The study: its choices, pairs, intervals and maps; a kill costs at most one run."""

import copy
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import pytest
import torch

import fastkd
from fastkd.yolov3 import YOLOv3, YOLOv3Tiny
from fastkd.yolov3.data.digits import write_digits
from fastkd.yolov3.train.objective import Objective
from study import plan as study
from study.logits import LogitObjective
from study.maps import MAPS, SHUFFLED, prior_name
from study.memo import remember
from study.protocol import Protocol, Regime
from study.report import draw_maps, gain, interval, rows_of, write_report
from study.runs import Bench, Ledger, Result, Run, _train_and_score, read_results
from study.scenes import labelled, part_of_set, unlabelled, write_scenes, write_set

HERE = Path(__file__).parent
TINY = Protocol(
    regimes=(Regime("few", 4, 12, (2, 3), 2), Regime("equal", 12, 12, (2,), 2)),
    seeds=(0, 1),
    tuning_seeds=(2,),
    lr=(1e-3, 2e-3),
    weight_decay=(0.01,),
    plain_zoom=((0.75, 1.33), (0.9, 1.1)),
    distilled_zoom=((0.75, 1.33), (0.9, 1.1)),
    share=(1.0, 2.0),
    maps=("self_information", "graded IoU"),
    map_shares=(1.0,),
    logit_weight=(1.0,),
    finalists=1,
    train=12,
    val=3,
    test=3,
    unlabelled=2,
    batch=4,
    student_width=0.125,
    teacher_width=0.125,
    teacher_steps=2,
    own_steps=2,
    blank_steps=1,
)


def result(run, score):
    return Result(run, mAP=score, AP50=score + 1, AP75=score - 1, seconds=1.0, machine="m", versions={})


class Scored(Bench):
    """A bench that trains nothing: the score of a run depends on its configuration only."""

    def __init__(self, root, ledger, workers):
        self.root, self.ledger, self.trained = root, ledger, []

    def teachers(self, runs):
        self._train(runs, keep=True)
        return [(run.key, "print") for run in runs]

    def close(self):
        pass

    def forget(self):
        pass

    def _train(self, runs, *, keep):
        for run in runs:
            self.trained.append(run)
            self.ledger.add(result(run, self.score(run)))

    @staticmethod
    def score(run):
        config = run.config
        score = 10 + run.seed + (10 if run.teacher else 0)
        score += {2e-3: 3}.get(config["lr"], 0) + {2.0: 2}.get(config.get("distill_share"), 0)
        score += 4 * (config.get("prior") == prior_name("graded IoU"))
        return score - 1 * str(config.get("prior")).startswith(prior_name(SHUFFLED))


def plan(root, monkeypatch, bench=Scored):
    """Return the runs of a whole study, without training."""
    monkeypatch.setattr(study, "Bench", bench)
    ledger = Ledger(root / "results.jsonl")
    done = study.Study(root, ledger, TINY, 2)
    done.run()
    ledger.close()
    return done


@pytest.fixture
def planned(tmp_path, monkeypatch):
    return plan(tmp_path, monkeypatch)


def test_settings_are_chosen_on_validation_scenes_with_seeds_that_no_table_has(planned):
    tried = [run for run in planned.bench.trained if run.scored_on == "val"]
    assert {run.seed for run in tried} == set(TINY.tuning_seeds)
    tables = [run for run in planned.bench.trained if run.scored_on == "test" and run.regime != "teachers"]
    assert {run.seed for run in tables} == set(TINY.seeds)
    assert {run.config["lr"] for run in tables} == {2e-3}
    assert {run.config["distill_share"] for run in tables if run.teacher} == {2.0}
    few = {run.seed: run.config["annotations"] for run in [*tried, *tables] if run.regime == "few"}
    assert len(set(few.values())) == 3  # each seed has its own scenes


def test_plain_and_distilled_student_have_as_many_trials(planned):
    for p in (Protocol(), TINY):
        first, *others = p.regimes
        assert len(first.plain_steps) - 1 + len(p.plain_zoom) - 1 == len(p.share) - 1 + len(p.distilled_zoom) - 1
        assert all(len(x.plain_steps) - 1 + len(p.plain_zoom[:2]) - 1 == len(p.share[:2]) - 1 for x in others)
    runs = [x.run for x in planned.bench.ledger.results.values() if x.run.scored_on == "val"]
    for regime, count in (("few", 4), ("equal", 4)):  # per axis: the first one has all values, others have one less
        tried = [run.row for run in runs if run.regime == regime]
        assert tried.count("none") == tried.count("uniform") == count


def test_a_map_and_uniform_weights_may_choose_unlike_shares_in_later_regimes(tmp_path, monkeypatch):
    class LessIfUniform(Scored):
        @staticmethod
        def score(run):
            return Scored.score(run) + 9 * (run.config.get("distill_share") == 0.5 and run.config["prior"] == "none")

    done = plan(tmp_path, monkeypatch, LessIfUniform)
    equal = rows_of(list(done.bench.ledger.results.values()), "equal")
    shares = {name: row[0].run.config["distill_share"] for name, row in equal.items() if row[0].run.teacher}
    assert shares == {"uniform": 0.5, "graded IoU": 2.0, "graded IoU, twice as long": 2.0, "logit": 2.0}


def test_a_row_has_one_setting_that_of_most_seeds_or_the_latest():
    def row(share, scores):
        runs = [Run("few", "uniform", seed, "test", {"distill_share": share}) for seed in range(len(scores))]
        return [result(run, score) for run, score in zip(runs, scores, strict=True)]

    whole, begun = row(4.0, [1.0, 2.0]), row(1.0, [7.0])
    assert rows_of([*whole, *begun], "few") == {"uniform": {0: whole[0], 1: whole[1]}}
    later = row(1.0, [7.0, 8.0])
    assert rows_of([*whole, *later], "few") == {"uniform": {0: later[0], 1: later[1]}}


def test_rows_are_paired_and_controls_have_their_own_teachers(planned):
    results = list(planned.bench.ledger.results.values())
    few, equal = rows_of(results, "few"), rows_of(results, "equal")
    best = "graded IoU"
    assert list(equal) == ["none", "uniform", best, "logit", f"{best}, twice as long", "none, twice as long"]
    assert equal[f"{best}, twice as long"][0].run.config["steps"] == 2 * equal[best][0].run.config["steps"]
    assert {
        *equal,
        "self_information",
        "energy",
        "attention",
        "confidence alone",
        "fgfi",
        f"{best} + logit",
    } < few.keys()
    assert {f"{best}, {place}" for place in ("backbone only", "neck only", "without stride 8")} < few.keys()
    assert all(row.keys() == set(TINY.seeds) for rows in (few, equal) for row in rows.values())
    for seed in TINY.seeds:  # the students of one seed have the same initial weights and scenes
        assert len({row[seed].run.config["annotations"] for row in few.values()}) == 1
        assert len({row[seed].run.config["annotations"] for row in equal.values()}) == 1
    own = few[f"{best}, teacher of the student's scenes"]
    taught = {x.run.key: x.run for x in results if x.run.regime == "teachers"}
    for x in own.values():
        assert taught[x.run.teacher[0]].config["annotations"] == x.run.config["annotations"]
    assert few[f"{best}, unlabelled"][0].run.config["unlabelled"] == "unlabelled/10-11"
    longer = few[f"{best}, unlabelled, twice as long"][0].run.config
    assert longer == few[f"{best}, unlabelled"][0].run.config | {"steps": 2 * few[best][0].run.config["steps"]}
    assert few["none, four times as long"][0].run.config["steps"] == 4 * few["none"][0].run.config["steps"]
    twin = few[SHUFFLED + best][0].run.config
    assert twin == few[best][0].run.config | {"prior": prior_name(SHUFFLED + best)}


def test_a_study_that_was_stopped_goes_on_where_it_was(planned, tmp_path):
    lines = planned.bench.ledger.file.read_text().splitlines(keepends=True)
    half = tmp_path / "half.jsonl"
    half.write_text("".join(lines[:20]) + lines[20][:30])  # the last line was cut off
    ledger = Ledger(half)
    again = study.Study(tmp_path, ledger, TINY, 2)
    again.run()
    ledger.close()
    kept = {json.loads(line)["run"]["seed"] for line in lines[:20]}
    assert kept
    trained = {run.key for run in again.bench.trained if run.regime != "teachers"}
    assert trained == {x.run.key for x in read_results(planned.bench.ledger.file)[20:] if x.run.regime != "teachers"}
    assert half.read_text().splitlines(keepends=True)[:20] == lines[:20]


def test_the_report_fills_tables_between_its_marks(planned, tmp_path):
    page = tmp_path / "README.md"
    page.write_text("# Study\n\n<!-- table rows few -->\nold\n<!-- end -->\n\nlast words\n")
    write_report(planned.bench.ledger.file, tmp_path)
    text = page.read_text()
    assert "old" not in text
    assert text.startswith("# Study\n\n<!-- table rows few -->\n\n|")
    assert text.endswith("<!-- end -->\n\nlast words\n")
    # all seeds have the same gains, so the intervals have no width
    assert "| graded IoU | 29.5 | 30.5 | +16.0 (+16.0 to +16.0) | +4.0 (+4.0 to +4.0) | +5.0 (+5.0 to +5.0) |" in text
    write_report(planned.bench.ledger.file, tmp_path)
    assert page.read_text() == text
    assert all((tmp_path / f"{name}.png").stat().st_size > 5000 for name in ("gains", "learning_rates"))
    page.write_text("<!-- table absent -->\n<!-- end -->\n")
    with pytest.raises(ValueError, match=r"expected one of the tables rows few, .* got 'absent'"):
        write_report(planned.bench.ledger.file, tmp_path)
    with pytest.raises(ValueError, match="expected runs of the study"):
        write_report(tmp_path / "none.jsonl", tmp_path)


def test_the_report_of_an_unfinished_study_has_rows_with_all_seeds(planned, tmp_path):
    def there(x):
        return x["scored_on"] == "val" or (x["regime"] == "few" and (x["row"], x["seed"]) != ("energy", 1))

    lines = planned.bench.ledger.file.read_text().splitlines(keepends=True)
    some, page = tmp_path / "some.jsonl", tmp_path / "README.md"
    some.write_text("".join(line for line in lines if there(json.loads(line)["run"])))
    page.write_text("<!-- table rows few -->\n<!-- end -->\n<!-- table rows equal -->\n<!-- end -->\n")
    write_report(some, tmp_path)
    few, equal = page.read_text().split("<!-- end -->")[:2]
    assert "| attention |" in few
    assert "| energy |" not in few
    assert equal.endswith("<!-- table rows equal -->\n\n*Under way.*\n\n")


def test_an_interval_is_that_of_students_t():
    x = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (x.mean, x.half) == pytest.approx((3.0, 2.7764451 * math.sqrt(2.5 / 5)))
    assert (x.low, x.high) == pytest.approx((x.mean - x.half, x.mean + x.half))
    assert math.isnan(interval([1.0]).half)


def test_a_gain_is_paired_by_seed_and_refuses_rows_without_a_common_one():
    run = Run("few", "x", 0, "test", {})
    row = {seed: result(run, score) for seed, score in ((0, 3.0), (1, 7.0), (2, 100.0))}
    other = {seed: result(run, score) for seed, score in ((1, 2.0), (0, 1.0), (3, -50.0))}
    assert gain(row, other).mean == 3.5
    with pytest.raises(ValueError, match="expected a seed that both have"):
        gain({0: row[0]}, {1: other[1]})


def test_the_results_file_is_one_studys_and_names_a_line_that_is_none(tmp_path):
    file = tmp_path / "results.jsonl"
    ledger = Ledger(file)
    with pytest.raises(BlockingIOError, match="another process is writing there"):
        Ledger(file)
    first = result(Run("few", "x", 0, "test", {"lr": 0.1, "zoom": [0.5, 2]}, ("t", "p")), 1.0)
    ledger.add(first)
    ledger.close()
    assert read_results(file) == [first]
    file.write_text("{}\n" + file.read_text())
    with pytest.raises(ValueError, match=r"results.jsonl: line 1 is not a result of the study"):
        Ledger(file)


# ---- maps


@pytest.fixture(scope="module")
def objective():
    torch.manual_seed(0)
    student, teacher = YOLOv3Tiny(num_classes=3, width=0.125), YOLOv3(num_classes=3, width=0.125)
    teacher.train()(torch.rand(8, 3, 64, 64))  # batch norms get statistics
    made = Objective(student, teacher.eval(), info_map="uniform_standardized", prior="none")
    made.distiller.prepare(torch.rand(1, 3, 64, 64))
    made.distiller.calibrate([torch.rand(4, 3, 64, 64)])
    return made


def maps_of(objective, name):
    torch.manual_seed(1)
    images = torch.rand(3, 3, 64, 64)
    targets = torch.tensor([[0, 1, 8, 8, 40, 40], [0, 0, 30, 30, 60, 60], [2, 2, 4, 20, 30, 50.0]])
    objective.prior = prior_name(name)
    return objective.distiller.maps(images, objective.prior_of(images, targets)).information


@pytest.mark.parametrize("name", MAPS)
def test_a_map_moves_weight_within_an_image_only(objective, name):
    for weights in maps_of(objective, name):
        assert weights.isfinite().all()
        assert (weights >= 0).all()
        means = weights.mean((1, 2))
        empty = (weights == 0).all(2).all(1)  # images without a box
        torch.testing.assert_close(means[~empty], torch.ones_like(means[~empty]))


@pytest.mark.parametrize("name", ["self_information", "graded IoU", "confidence"])
def test_a_shuffled_twin_has_the_same_weights_in_other_places(objective, name):
    for own, twin in zip(maps_of(objective, name), maps_of(objective, SHUFFLED + name), strict=True):
        torch.testing.assert_close(own.flatten(1).sort(1).values, twin.flatten(1).sort(1).values)
        if own.numel() > 100:
            assert not torch.equal(own, twin)


def test_the_studys_self_information_is_the_librarys(objective):
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    kept = {}
    distiller = objective.distiller

    def keep(_, sizes):
        kept["features"] = [hook.feature() for _, hook in distiller._matched()]
        return [None] * len(sizes)

    distiller.maps(images, keep)
    library = fastkd.info_map(kept["features"], "self_information", standardize=distiller.criterion.moments())
    objective.prior = prior_name("self_information")
    own = distiller.maps(images, objective.prior_of(images, torch.zeros(0, 6))).information
    torch.testing.assert_close(own, library)


def test_sensitivity_leaves_the_teachers_features_as_they_were(objective):
    images, targets = torch.rand(2, 3, 64, 64), torch.zeros(0, 6)
    distiller, seen = objective.distiller, {}

    def look(outputs, sizes):
        seen["before"] = [hook.feature().clone() for _, hook in distiller._matched()]
        objective.prior = prior_name("sensitivity")
        found = objective.prior_of(images, targets)(outputs, sizes)
        seen["after"] = [hook.feature() for _, hook in distiller._matched()]
        return found

    distiller.maps(images, look)
    torch.testing.assert_close(seen["after"], seen["before"], rtol=0, atol=0)
    assert not any(x.requires_grad for x in seen["after"])


def test_a_teacher_that_remembers_says_the_same_bits_without_running(objective, tmp_path):
    student, distiller = objective.student.eval(), objective.distiller
    teacher = copy.deepcopy(distiller.teacher)
    remember(teacher, tmp_path)
    options = {"prior": "confidence", "logit_weight": 1.0, "distill_weight": 1.0}
    again = LogitObjective(student, teacher, info_map="self_information", **options)
    ran = []
    teacher.get_submodule("block32").register_forward_hook(lambda *_: ran.append(1))
    images, targets = torch.rand(2, 3, 64, 64), torch.tensor([[0, 1, 8, 8, 40, 40.0]])
    again.distiller.prepare(images)
    losses = [again(images, targets) for _ in range(2)]
    assert len(ran) == 1
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=0)
    options["fold_teacher"] = False  # as for a teacher with stored outputs, whose forward was replaced
    plain = LogitObjective(student, copy.deepcopy(distiller.teacher), info_map="self_information", **options)
    plain.distiller.prepare(images)
    plain.distiller.load_state_dict(again.distiller.state_dict())
    torch.testing.assert_close(plain(images, targets)[1], again(images, targets)[1], rtol=0, atol=0)
    again(images.flip(0), targets)
    assert len(ran) == 2
    teacher(images)  # without no_grad, as in sensitivity: a stored feature would have no gradient
    assert len(ran) == 3


# ---- the runs themselves

STUDY = """
import sys
from pathlib import Path
from test_study import TINY, real_runs
from study.runs import Bench, Ledger
from study.scenes import write_scenes

if __name__ == "__main__":
    root = Path(sys.argv[1])
    write_scenes(root, train=TINY.train, val=TINY.val, test=TINY.test, size=96)
    ledger = Ledger(root / "results.jsonl")
    bench = Bench(root, ledger, 1)
    real_runs(root, bench)
    bench.close()
"""


def real_runs(root, bench):
    """Return runs of a teacher and of three students."""
    data = labelled(root, 0, 8) | {"size": 96, "batch": 4, "width": 0.125, "steps": 4}
    (teacher,) = bench.teachers([Run("teachers", "t", 0, "test", data | {"model": "yolov3"})])
    config = data | {"info_map": "uniform_standardized", "prior": prior_name("sensitivity"), "zoom": [0.8, 1.2]}
    config |= {"level_weights": [1, 1, 1, 0, 0], "unlabelled": unlabelled(root, 8, 4)}
    return bench.results([Run("few", "x", seed, "val", config, teacher) for seed in range(3)])


def test_a_killed_or_interrupted_study_keeps_its_results_and_leaves_no_worker(tmp_path):
    script, file = tmp_path / "script.py", tmp_path / "results.jsonl"
    script.write_text(STUDY)
    deadline = time.monotonic() + 240
    process = started(script, tmp_path)
    wait_for(lambda: file.is_file() and file.read_text().count("\n") >= 1, deadline, process)
    workers = children(process.pid)
    process.kill()
    process.wait()
    before = file.read_text().split("\n")[:1]  # the teacher's line
    wait_for(lambda: not any(map(alive, workers)), deadline)
    process = started(script, tmp_path)
    wait_for(lambda: file.read_text().count("\n") >= 2 or process.poll() == 0, deadline)
    process.send_signal(signal.SIGINT)
    process.wait(timeout=60)
    lines = file.read_text().splitlines()
    assert lines[:1] == before
    results = read_results(file)
    assert 2 <= len(lines) == len({x.run.key for x in results}) <= 4
    assert all(0 <= x.mAP <= x.AP50 <= 100 and x.versions["torch"] for x in results)
    assert [x.name for x in (tmp_path / "models").iterdir()] == [f"{results[0].run.key}.pt"]
    assert not {x.name for x in (tmp_path / "runs").iterdir()} & {x.run.key for x in results}
    draw_maps(file, tmp_path, tmp_path / "maps.png")  # with the teacher whose model was kept
    assert cv2.imread(str(tmp_path / "maps.png")).std() > 10


def started(script, root):
    """Start a study in a process of its own, which gets Ctrl-C like a shell's foreground process."""
    return subprocess.Popen(
        [sys.executable, script, root],
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join(map(str, (HERE, HERE.parent / "benchmarks"))), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def wait_for(condition, deadline, process=None):
    while not condition():
        assert time.monotonic() < deadline
        assert process is None or process.poll() is None
        time.sleep(0.05)


def children(parent):
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True).stdout
    return [int(x) for x in found.split()]


def alive(pid):
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and ") Z " not in state.read_text()


def test_the_seeds_scenes_are_the_named_ones(tmp_path):
    write_scenes(tmp_path, train=6, val=1, test=1, size=96)
    paths = labelled(tmp_path, 2, 3)
    images = json.loads((tmp_path / paths["annotations"]).read_text())["images"]
    assert [x["file_name"] for x in images] == ["000003.png", "000004.png", "000005.png"]
    folder = tmp_path / unlabelled(tmp_path, 4, 2)
    assert sorted(x.name for x in folder.iterdir()) == ["000005.png", "000006.png"]
    with pytest.raises(ValueError, match="count: expected scenes of the 6, got 4 to 7"):
        labelled(tmp_path, 4, 4)


def test_another_set_is_studied_with_a_share_of_its_labels(tmp_path):
    source = write_digits(tmp_path / "digits", train=8, val=2, test=3, size=96)
    write_set(source, tmp_path / "mine")
    parts = [part_of_set(tmp_path, "mine", 0.25, seed) for seed in (0, 0, 1)]
    names = [{x["file_name"] for x in json.loads((tmp_path / x["annotations"]).read_text())["images"]} for x in parts]
    assert [len(x) for x in names] == [2, 2, 2]
    assert names[0] == names[1] != names[2]  # they depend on the seed
    images = {x.name for x in (tmp_path / parts[0]["unlabelled"]).iterdir()}
    assert len(images) == 6
    assert not images & names[0]  # images with labels are not among those without
    assert "unlabelled" not in part_of_set(tmp_path, "mine", 1.0, 0)
    usual = {"set": "mine", "size": 64, "batch": 2, "width": 0.125, "steps": 2, "flip": 0.5, "anchors": "default"}
    first, again = (
        _train_and_score(Run("mine: 25 %", "alone", 0, "test", usual | part_of(part)), tmp_path, keep=False)
        for part in parts[:2]
    )
    assert first.mAP == again.mAP
    assert len(first.per_class) == 10
    with pytest.raises(FileNotFoundError, match="set 'train'"):
        write_set(tmp_path / "digits/images", tmp_path / "other")


def part_of(part):
    """The options for a student that trains alone."""
    return {name: part[name] for name in ("annotations", "images")}
