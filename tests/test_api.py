"""Bad input raises an error that names the argument, what was expected, what came, and what to do."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import nn

import fastkd
from fastkd.ops import backends, levels
from fastkd.ops.levels import _warn_nothing_learns


def arguments(**changes: Any) -> dict[str, Any]:
    sample = {
        "student_feats": [torch.randn(2, 4, 3, 3, requires_grad=True), torch.randn(2, 8, 2, 2, requires_grad=True)],
        "teacher_feats": [torch.randn(2, 4, 3, 3), torch.randn(2, 8, 2, 2)],
    }
    return {**sample, **changes}


def s(*shape: int, **options: Any) -> torch.Tensor:
    return torch.randn(*shape, **options)


GOOD = arguments()
STUDENT, TEACHER = GOOD["student_feats"], GOOD["teacher_feats"]

BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "unequal lengths": ({"teacher_feats": TEACHER[:1]}, ValueError, "one entry per level in both, got 2 and 1.*stride"),
    "no level": ({"student_feats": [], "teacher_feats": []}, ValueError, "student_feats: .*at least one level"),
    "a bare tensor": ({"student_feats": STUDENT[0]}, TypeError, r"student_feats: .*list.*shape \(2, 4, 3, 3\)"),
    "not a tensor": ({"teacher_feats": [TEACHER[0], "x"]}, TypeError, r"teacher_feats\[1\]: .*tensor, got a str"),
    "not 4-D": (
        {"student_feats": [STUDENT[0][0], STUDENT[1]]},
        ValueError,
        r"student_feats\[0\]: .*N, C, H, W.*\(4, 3, 3\)",
    ),
    "channels": (
        {"teacher_feats": [TEACHER[0], s(2, 9, 2, 2)]},
        ValueError,
        r"level 1: student_feats \(2, 8, 2, 2\) and teacher_feats \(2, 9, 2, 2\).*channels.*DistillLoss.*adapters",
    ),
    "size": (
        {"teacher_feats": [s(2, 4, 6, 6), TEACHER[1]]},
        ValueError,
        r"level 0: student_feats \(2, 4, 3, 3\) and teacher_feats \(2, 4, 6, 6\).*height or width.*Distiller.*stride",
    ),
    "batch": ({"teacher_feats": [s(1, 4, 3, 3), TEACHER[1]]}, ValueError, "level 0: .*batch size"),
    "integers": (
        {"teacher_feats": [TEACHER[0].long(), TEACHER[1]]},
        TypeError,
        r"teacher_feats\[0\]: .*torch.int64.*float",
    ),
    "teacher with grad": (
        {"teacher_feats": [TEACHER[0], s(2, 8, 2, 2, requires_grad=True)]},
        ValueError,
        r"teacher_feats\[1\]: .*requires grad.*no_grad.*detach",
    ),
    "prior's length": ({"prior": [None]}, ValueError, "prior: expected 2 entries.*got 1"),
    "prior's shape": (
        {"prior": [s(2, 3, 4), None]},
        ValueError,
        r"prior\[0\]: expected shape \(2, 3, 3\), got \(2, 3, 4\)",
    ),
    "prior's dtype": ({"prior": [torch.ones(2, 3, 3, dtype=torch.int64), None]}, TypeError, r"prior\[0\]: .*int64"),
    "negative prior": ({"prior": [None, torch.full((2, 2, 2), -1.0)]}, ValueError, r"prior\[1\]: .*>= 0, got .*-1"),
    "prior with grad": (
        {"prior": [torch.rand(2, 3, 3, requires_grad=True), None]},
        ValueError,
        r"prior\[0\]: .*requires grad.*detach",
    ),
    "prior is a tensor": ({"prior": torch.rand(2, 3, 3)}, TypeError, "prior: expected a list"),
    "moments' shape": (
        {"standardize": [None, (torch.zeros(4), torch.ones(4))]},
        ValueError,
        r"standardize\[1\]\[0\]: expected shape \(8,\), got \(4,\)",
    ),
    "not a pair": ({"standardize": [torch.zeros(4), None]}, TypeError, r"standardize\[0\]: .*pair \(mean, rstd\)"),
    "one number for all levels": (
        {"weights": 2.0},
        TypeError,
        "weights: expected a list of numbers, one per level, got a float; wrap it",
    ),
    "a generator": (
        {"student_feats": (x for x in STUDENT)},
        TypeError,
        r"student_feats: .*got a generator; pass list\(student_feats\)",
    ),
    "a dictionary": (
        {"student_feats": dict(enumerate(STUDENT))},
        TypeError,
        r"student_feats: .*got a dict; pass list\(student_feats.values\(\)\)",
    ),
    "weights' length": ({"weights": [1.0]}, ValueError, "weights: expected 2 entries"),
    "infinite weight": (
        {"weights": [1.0, float("inf")]},
        ValueError,
        r"weights\[1\]: expected a finite number.*, got inf",
    ),
    "weight that float32 cannot hold": ({"weights": [1.0, 1e39]}, ValueError, r"weights\[1\]: .*float32 can hold"),
    "weight is NaN": ({"weights": [float("nan"), 1]}, ValueError, r"weights\[0\]"),
    "unknown map": ({"info_map": "energi"}, ValueError, "info_map: .*'self_information'.*'uniform'.*; got 'energi'"),
    "not a map": ({"info_map": 3}, TypeError, "info_map: .*name of a preset or an InfoMap, got int"),
    "unknown penalty": ({"penalty": "huber"}, ValueError, "penalty: .*'l2', 'l1', 'smooth_l1', 'cwd'; got 'huber'"),
    "unknown Z": ({"divisor": "mean"}, ValueError, "divisor: .*'elements'.*got 'mean'"),
    "unknown reduction": ({"reduction": "mean"}, ValueError, "reduction: .*'sum', 'none'; got 'mean'"),
    "unknown backend": ({"backend": "cuda"}, ValueError, "backend: .*'cpp'.*'triton'.*'reference'.*got 'cuda'"),
    "beta": ({"penalty": "smooth_l1", "beta": 0}, ValueError, "beta: .*> 0.*, got 0"),
    "beta that float32 rounds to 0": ({"beta": 1e-46}, ValueError, "beta: .*float32 can hold, got 1e-46"),
    "beta is text": ({"beta": "1"}, ValueError, "beta: expected a finite number > 0"),
    "beta beyond float32": ({"beta": 1e39}, ValueError, "beta: .*float32 can hold, got 1e"),
    "beta beyond float64": ({"beta": 10**400}, ValueError, "beta: .*float32 can hold, got 1000"),
    "beta is True": ({"beta": True}, ValueError, "beta: .*got True"),
    "weight beyond float64": ({"weights": [1, -(10**400)]}, ValueError, r"weights\[1\]: .*float32 can hold"),
    "penalty is a list": ({"penalty": ["l2"]}, ValueError, r"penalty: .*got \['l2'\]"),
    "beta is NaN": ({"beta": float("nan")}, ValueError, "beta"),
    "map without its prior": ({"info_map": "fgfi"}, ValueError, "prior: expected the IoU mask .*got None"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_a_clear_error(case: str) -> None:
    changes, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        fastkd.distill_loss(**arguments(**changes))


def test_the_good_input_that_the_cases_change_is_accepted() -> None:
    assert fastkd.distill_loss(**arguments()).isfinite()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("temperature", 0.0, "temperature: .*> 0.*, got 0"),
        ("temperature", -1.0, "temperature"),
        ("temperature", float("inf"), "temperature"),
        ("temperature", 1e-46, "temperature: .*float32 can hold"),
        *(("temperature", x, "temperature: .*float32 can hold, got") for x in (1e39, 10**400, True, "1", None)),
        ("score", "energie", "score: .*'magnitude'.*got 'energie'"),
        ("map_norm", "l2", "map_norm: .*'minmax'.*got 'l2'"),
        ("divisor", "none", "divisor"),
    ],
)
def test_a_bad_info_map_is_a_clear_error(field: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fastkd.InfoMap(**{field: value})


def test_a_map_that_is_rounding_or_of_another_type_is_a_clear_error() -> None:
    with pytest.raises(ValueError, match=r"temperature: expected at most 100 for the score 'entropy'.*, got 101"):
        fastkd.InfoMap("entropy", temperature=101)
    text: Any = "False"
    with pytest.raises(TypeError, match="standardize: expected True, False or 'batch', got 'False'"):
        fastkd.InfoMap(standardize=text)
    with pytest.raises(TypeError, match=r"needs_prior: expected a text .*, got True"):
        fastkd.InfoMap(needs_prior=True)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"student": "yolov3.pt"}, "student: expected a module, got a str"),
        ({"teacher": [nn.Identity()]}, "teacher: expected a module, got a list"),
        ({"backbone": 3}, "backbone: expected a list of levels, got a int"),
        ({"prior": "fgfi"}, "prior: expected a function, got a str"),
        ({"preprocess": 255}, "preprocess: expected a function, got a int"),
        ({"last_forward": "False"}, "last_forward: expected True or False, got 'False'"),
        ({"criterion": nn.MSELoss()}, "criterion: expected a DistillLoss, got a MSELoss"),
        ({"standardize": "no"}, "standardize: expected True, False or 'batch', got 'no'"),
    ],
)
def test_arguments_of_a_distiller_of_another_type_are_a_clear_error(bad: dict[str, Any], message: str) -> None:
    good = {"student": nn.Sequential(nn.Conv2d(3, 4, 1)), "teacher": nn.Sequential(nn.Conv2d(3, 4, 1))}
    with pytest.raises(TypeError, match=message):
        fastkd.Distiller(**{**good, "backbone": [("0", "0")], **bad})


def test_weights_of_levels_that_are_matched_later_are_checked_at_once() -> None:
    models = nn.Sequential(nn.Conv2d(3, 4, 1)), nn.Sequential(nn.Conv2d(3, 4, 1))
    with pytest.raises(ValueError, match=r"weights\[0\]: expected a finite number.*got 1e"):
        fastkd.Distiller(*models, backbone=(["0"], ["0"]), weights=[1e39])


STRANGE: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "sparse": (lambda x: x.to_sparse(), "dense tensor, got layout torch.sparse_coo.*to_dense"),
    "mkldnn": (lambda x: x.to_mkldnn(), "dense tensor, got layout torch._mkldnn.*to_dense"),
    "quantised": (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.quint8), "quantised tensor.*dequantize"),
    "nested": (lambda x: torch.nested.nested_tensor(list(x)), "dense tensor, got a nested tensor"),
    "jagged": (lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged), "dense tensor, got a nested tensor"),
    "meta": (lambda x: x.to("meta"), "tensor with values, got one on the meta device"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # PyTorch warns that some of these are prototypes
@pytest.mark.parametrize("kind", STRANGE)
def test_tensors_of_another_layout_are_refused_also_once_the_shapes_are_known(kind: str) -> None:
    change, message = STRANGE[kind]
    good = arguments(prior=[torch.rand(2, 3, 3), None], standardize=[(torch.zeros(4), torch.ones(4)), None])
    for _ in range(2):
        fastkd.distill_loss(**good)
        for name in ("student_feats", "teacher_feats", "prior"):
            first, second = good[name]
            with pytest.raises(TypeError, match=rf"{name}\[0\]: expected a .*{message}"):
                fastkd.distill_loss(**{**good, name: [change(first.detach()), second]})
        if kind not in ("nested", "jagged"):  # for these, a tensor of numbers alone is not enough
            strange = [(change(torch.zeros(4)), torch.ones(4)), None]
            with pytest.raises((TypeError, ValueError), match=rf"standardize\[0\]\[0\]: expected a .*{message}"):
                fastkd.distill_loss(**{**good, "standardize": strange})


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", STRANGE)
def test_tensors_of_another_layout_are_refused_by_the_module_and_the_map(kind: str) -> None:
    change, message = STRANGE[kind]
    known, s, t = fastkd.DistillLoss([4], [4]), torch.randn(2, 4, 3, 3, requires_grad=True), torch.randn(2, 4, 3, 3)
    known([s], [t])
    for criterion in (known, fastkd.DistillLoss(levels=1)):
        for name in ("student_feats", "teacher_feats"):
            strange = {"student_feats": [s], "teacher_feats": [t], name: [change(t)]}
            for use in (criterion, criterion.prepare):
                with pytest.raises(TypeError, match=rf"{name}\[0\]: expected a .*{message}"):
                    use(**strange)
        with pytest.raises(TypeError, match=rf"prior\[0\]: expected a .*{message}"):
            criterion([s], [t], prior=[change(torch.rand(2, 3, 3))])
    for use in (fastkd.DistillLoss(levels=1).calibrate, fastkd.info_map):
        with pytest.raises(TypeError, match=rf"teacher_feats\[0\]: expected a .*{message}"):
            use([change(t)])


def test_what_changes_between_two_calls_of_the_same_shapes_is_still_checked() -> None:
    good = arguments(prior=[torch.rand(2, 3, 3), None], standardize=[(torch.zeros(4), torch.ones(4)), None])
    for _ in range(2):
        fastkd.distill_loss(**good)
        for case in ("teacher with grad", "negative prior", "prior with grad"):
            changes, kind, message = BAD[case]
            with pytest.raises(kind, match=message):
                fastkd.distill_loss(**{**good, **changes})
        learning = [(torch.zeros(4), torch.ones(4, requires_grad=True)), None]
        with pytest.raises(ValueError, match=r"standardize\[0\]\[1\]: expected a constant"):
            fastkd.distill_loss(**{**good, "standardize": learning})


def test_a_backend_that_is_not_built_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastkd._C", None)
    monkeypatch.delattr(fastkd, "_C", raising=False)
    monkeypatch.setitem(backends._unavailable, "cpp", backends._load_cpp())
    monkeypatch.setattr(levels, "_plans", {})  # plans, in which the backend is already chosen
    with pytest.raises(RuntimeError, match=r"backend='cpp': .*not built.*pip install"):
        fastkd.distill_loss(**arguments(backend="cpp"))
    default = fastkd.distill_loss(**GOOD)
    torch.testing.assert_close(default, fastkd.distill_loss(**GOOD, backend="reference"), rtol=0, atol=0)


def test_cpp_says_that_it_has_no_kernels_for_another_device() -> None:
    refused = fastkd.backends("meta")
    assert "CPU and CUDA tensors, got meta" in str(refused["cpp"])
    assert refused["reference"] is None


def test_a_student_that_cannot_learn_is_warned_about_once() -> None:
    frozen = arguments(student_feats=[x.detach() for x in STUDENT])
    _warn_nothing_learns.cache_clear()
    with pytest.warns(UserWarning, match="none requires grad.*no_grad"):
        fastkd.distill_loss(**frozen)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastkd.distill_loss(**frozen)
        _warn_nothing_learns.cache_clear()
        with torch.no_grad():
            fastkd.distill_loss(**frozen)
        fastkd.distill_loss(**arguments())


def test_weights_may_be_any_real_numbers() -> None:
    loss = fastkd.distill_loss(**GOOD, weights=[Fraction(1, 2), 2])
    torch.testing.assert_close(loss, fastkd.distill_loss(**GOOD, weights=[0.5, 2.0]))


def test_the_names_that_the_documentation_uses_exist() -> None:
    assert fastkd.PRESETS["self_information"].standardize
    assert fastkd.priors.confidence
    assert fastkd.viz.overlay_maps


def test_importing_fastkd_needs_torch_alone() -> None:
    """Importing any package of the extras raises an error in this process."""
    code = """
import sys
for name in ("numpy", "cv2", "pycocotools", "sklearn", "matplotlib", "accelerate", "tensorboard", "tqdm", "triton"):
    sys.modules[name] = None
import torch, fastkd
s = [torch.randn(2, 4, 3, 3, requires_grad=True)]
fastkd.distill_loss(s, [torch.randn(2, 4, 3, 3)]).backward()
assert s[0].grad.abs().sum() > 0
assert fastkd.Distiller
assert "torch._dynamo" not in sys.modules, "it takes as long to import as torch"
"""
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_every_public_name_has_a_docstring() -> None:
    for name in fastkd.__all__:
        assert name in ("__version__", "PRESETS") or re.search(r"\w", getattr(fastkd, name).__doc__ or ""), name


def test_a_call_that_was_right_does_not_let_wrong_containers_pass() -> None:
    s, t = [torch.randn(1, 4, 3, 3) for _ in range(2)], [torch.randn(1, 4, 3, 3) for _ in range(2)]
    q, moments = [torch.rand(1, 3, 3) for _ in range(2)], [(torch.zeros(4), torch.ones(4))] * 2
    with torch.no_grad():
        fastkd.distill_loss(s, t, info_map="fgfi", prior=q, standardize=moments, weights=(1.0, 1.0))
        for wrong in (
            {"prior": (x for x in q)},
            {"prior": torch.rand(2, 1, 3, 3)},
            {"standardize": iter(moments)},
            {"standardize": moments[:1] * 3},
            {"standardize": [(None, *moments[0]), moments[1]]},
            {"weights": (True, 1.0)},
        ):
            arguments = {"prior": q, "standardize": moments, "weights": (1.0, 1.0), **wrong}
            with pytest.raises((TypeError, ValueError), match=r"prior|standardize|weights"):
                fastkd.distill_loss(s, t, info_map="fgfi", **arguments)


def test_a_scaled_loss_of_levels_without_elements_has_a_gradient_without_elements() -> None:
    x = torch.randn(0, 4, 5, 5, requires_grad=True)
    (fastkd.distill_loss([x], [torch.randn(0, 4, 5, 5)]) / 2).backward()
    assert x.grad is not None
