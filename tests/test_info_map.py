"""Maps against hand-computed values and published formulas; in edge cases they are finite, never NaN."""

from __future__ import annotations

import itertools
import math
from contextlib import nullcontext

import pytest
import torch
from samples import (
    INFO_MAPS,
    TARGETS,
    interpreted,
    levels,
    loss_and_gradients,
    on_every_target,
    shapes_for,
    step,
    widened,
)

import fastkd
from fastkd import InfoMap, distill_loss
from fastkd.ops.arguments import SMALLEST
from fastkd.ops.presets import DIVISORS, MAP_NORMS, MAX_ENTROPY_TEMPERATURE, PENALTIES, PRESETS, SCORES


def features(n: int = 2, c: int = 6, h: int = 4, w: int = 5) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    torch.manual_seed(0)
    return [torch.randn(n, c, h, w).requires_grad_()], [torch.randn(n, c, h, w)]


@pytest.mark.parametrize("backend", [*TARGETS, "reference-cpu"], indirect=True)
class TestPublishedFormulas:
    """Losses of other methods, written from their papers in plain PyTorch."""

    def test_attention_is_the_spatial_attention_of_fgd(self, backend: str) -> None:
        (s,), (t,) = features()
        magnitude = t.abs().mean(1)
        attention = 20 * torch.softmax(magnitude.flatten(1) / 0.5, 1).view_as(magnitude)
        expected = (attention[:, None] * (s - t) ** 2).sum() / 2
        loss = distill_loss([s], [t], info_map="attention", divisor="batch", backend=backend)
        torch.testing.assert_close(loss, expected)

    def test_energy_is_the_attention_transfer_map(self, backend: str) -> None:
        (s,), (t,) = features()
        energy = (t**2).sum(1)
        energy = energy / energy.mean((1, 2), keepdim=True)
        expected = (energy[:, None] * (s - t) ** 2).mean()
        torch.testing.assert_close(distill_loss([s], [t], info_map="energy", backend=backend), expected)
        torch.testing.assert_close(distill_loss([s], [t], backend=backend), expected)

    def test_score_is_the_feature_term_of_frs_over_channels(self, backend: str) -> None:
        (s,), (t,) = features()
        confidence = torch.rand(2, 4, 5)
        expected = (confidence[:, None] * (s - t) ** 2).sum() / (6 * confidence.sum())
        loss = distill_loss([s], [t], info_map="score", prior=[confidence], backend=backend)
        torch.testing.assert_close(loss, expected)

    def test_fgfi_is_half_its_published_loss_over_channels(self, backend: str) -> None:
        (s,), (t,) = features()
        mask = (torch.rand(2, 4, 5) > 0.7).float()
        published = (mask[:, None] * (s - t) ** 2).sum() / (2 * mask.sum())
        loss = distill_loss([s], [t], info_map="fgfi", prior=[mask], backend=backend)
        torch.testing.assert_close(loss, 2 * published / 6)

    def test_self_information_is_minus_log_p_of_the_teachers_gaussian(self, backend: str) -> None:
        _, (t,) = features()
        mean, std = t.mean((0, 2, 3)), t.std((0, 2, 3))
        nats = -torch.distributions.Normal(mean.view(-1, 1, 1), std.view(-1, 1, 1)).log_prob(t).sum(1)
        constant = (std.log() + 0.5 * math.log(2 * math.pi)).sum()
        (score,) = fastkd.info_map([t], InfoMap("energy", "none"), standardize=[(mean, 1 / std)])
        torch.testing.assert_close(score, (nats - constant) * 2 / 6)


@pytest.mark.parametrize("name", PRESETS)
def test_maps_of_the_standardised_teacher_need_its_moments_and_no_others(name: str) -> None:
    (s,), (t,) = features()
    needs = name in ("self_information", "graded_iou", "uniform_standardized")
    refused = pytest.raises(ValueError, match=r"standardize: expected \(mean, rstd\)") if needs else nullcontext()
    with refused:
        assert distill_loss([s], [t], info_map=name, prior=[torch.ones(2, 4, 5)]) > 0
    assert fastkd.DistillLoss(levels=1, info_map=name).calibrated is not needs


@pytest.mark.parametrize("backend", [*TARGETS, "reference-cpu"], indirect=True)
@pytest.mark.parametrize("name", ["score", "fgfi", "graded_iou"])
def test_a_mask_of_boxes_or_scores_is_divided_by_its_mass(backend: str, name: str) -> None:
    (s,), (t,) = features()
    mask, moments = torch.rand(2, 4, 5), [(torch.zeros(6), torch.ones(6))]
    loss, of_thousandth = (
        distill_loss([s], [t], info_map=name, prior=[q], standardize=moments, backend=backend)
        for q in (mask, 1e-3 * mask)
    )
    torch.testing.assert_close(loss, of_thousandth)


def test_maps_have_the_scale_that_their_normaliser_promises() -> None:
    _, (t,) = features()
    (mean,) = fastkd.info_map([t], InfoMap("energy", "mean"))
    (softmax,) = fastkd.info_map([t], InfoMap("magnitude", "softmax", 0.1))
    (minmax,) = fastkd.info_map([t], InfoMap("entropy", "minmax"))
    for w in (mean, softmax):
        torch.testing.assert_close(w.mean((1, 2)), torch.ones(2))
    (by_default,) = fastkd.info_map([t], InfoMap("magnitude", "softmax"))
    torch.testing.assert_close(by_default, 20 * t.abs().mean(1).flatten(1).softmax(1).view(2, 4, 5))  # T = 1
    assert minmax.amin() == 0
    assert 0.99 < minmax.amax() <= 1
    assert mean.shape == (2, 4, 5)
    assert mean.dtype == torch.float32


def test_a_temperature_at_which_the_entropy_is_rounding_is_refused() -> None:
    assert InfoMap("entropy", temperature=100).temperature == 100
    with pytest.raises(ValueError, match="temperature: expected at most 100 for the score 'entropy'"):
        InfoMap("entropy", temperature=100.5)


def test_entropy_is_one_for_a_single_active_channel_and_zero_for_equal_ones() -> None:
    peaked, flat = torch.zeros(1, 8, 1, 1), torch.full((1, 8, 1, 1), 3.0)
    peaked[:, 2] = 100
    (w,) = fastkd.info_map([torch.cat([peaked, flat], 3)], InfoMap("entropy", "none"))
    torch.testing.assert_close(w, torch.tensor([[[1.0, 0.0]]]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", [*TARGETS, "reference-cpu"], indirect=True)
@pytest.mark.parametrize("one_pass", [True, False], ids=["one pass", "two passes"])
def test_entropy_in_float32_up_to_the_highest_temperature(backend: str, one_pass: bool) -> None:
    """Channels of variance 1 are within 3e-6 T^2 of the mean score; rounding never gives a weight below 0."""
    torch.manual_seed(0)
    for channels in (2, 257) if interpreted(backend) else (2, 16, 257, 1024):
        for layout in (torch.contiguous_format, torch.channels_last):
            t = torch.randn(1, channels, 6, 6).to(memory_format=layout)
            for temperature in (0.1, 1.0, 10.0, MAX_ENTROPY_TEMPERATURE):
                got, exact = (weights_of(x, temperature, "none", backend, one_pass) for x in (t, t.double()))
                assert (got - exact).abs().amax() <= (1e-5 + 3e-6 * temperature**2) * exact.mean()
            rounding = weights_of(1e-5 * t, temperature, "mean", backend, one_pass)
            assert (rounding >= 0).all()
            assert rounding.sum() <= 36 * (1 + 1e-5)


def weights_of(t: torch.Tensor, temperature: float, norm: str, backend: str, one_pass: bool) -> torch.Tensor:
    """Return the entropy's weight of each cell: the gradient of abs(s - t) for s > t; for float64, of the reference."""
    sample = {"student_feats": [(t + 1).requires_grad_()], "teacher_feats": [t]}
    info, backend = InfoMap("entropy", norm, temperature), "reference" if t.dtype == torch.float64 else backend
    gradient = step(sample, info_map=info, penalty="l1", divisor="batch", backend=backend, one_pass=one_pass)[1]
    assert torch.equal(gradient, gradient[:, :1].expand_as(gradient))
    return gradient[0, 0].double()


@on_every_target
def test_equal_channels_have_no_weight_to_the_last_bit(backend: str) -> None:
    """Otherwise the mean of rounding errors would make a map of them."""
    s, t = ([torch.randn(1, c, 2, 2) for c in (3, 5, 7, 11, 40)] for _ in range(2))
    t = [x[:, :1].expand_as(x) for x in t]
    for norm in ("none", "mean"):
        assert not distill_loss(s, t, info_map=InfoMap("entropy", norm), reduction="none", backend=backend).any()


def test_the_map_shown_is_the_map_used() -> None:
    (s,), (t,) = features()
    prior = [torch.rand(2, 4, 5)]
    for name in PRESETS:
        options = {"prior": prior, "standardize": False}
        (w,) = fastkd.info_map([t], name, **options)
        expected = (w[:, None] * (s - t) ** 2).mean()
        torch.testing.assert_close(distill_loss([s], [t], info_map=name, divisor="elements", **options), expected)


@pytest.mark.parametrize("name", ["self_information", "graded_iou", "uniform_standardized"])
def test_a_map_of_the_standardised_teacher_needs_its_moments(name: str) -> None:
    """A name has the same meaning in the function and in the module."""
    (s,), (t,) = features()
    options = {"info_map": name, "prior": [torch.rand(2, 4, 5)]}
    for call in (lambda: distill_loss([s], [t], **options), lambda: fastkd.info_map([t], **options)):
        with pytest.raises(ValueError, match=r"standardize: expected \(mean, rstd\) per level"):
            call()
    module = fastkd.DistillLoss(adapters=[torch.nn.Identity()], info_map=name, calibration_batches=1)
    loss = module([s], [t], options["prior"])
    torch.testing.assert_close(loss, distill_loss([s], [t], standardize=module.moments(), **options))


@pytest.mark.parametrize("backend", [*TARGETS, "reference-cpu"], indirect=True)
@pytest.mark.parametrize("info", INFO_MAPS, ids=lambda m: f"{m.score}-{m.map_norm}")
class TestEdges:
    @pytest.fixture(autouse=True)
    def read_options(self, request: pytest.FixtureRequest) -> None:
        self.full = request.config.getoption("--full")

    def every_option(self, info: InfoMap, backend: str, s: torch.Tensor, t: torch.Tensor, **options: object) -> None:
        s = s.detach().requires_grad_()
        pairs, ways = list(itertools.product(PENALTIES, DIVISORS)), [True, False]
        if backend == "triton":  # Triton compiles each pair; three pairs have every penalty
            pairs = pairs[::5]
        if interpreted(backend) and not self.full:  # over the maps, each edge meets each penalty, and both ways
            number = len(MAP_NORMS) * SCORES.index(info.score) + MAP_NORMS.index(info.map_norm)
            pairs, ways = [pairs[number % 3]], [number // 3 % 2 == 0]
        for penalty, divisor in pairs:
            for one_pass in ways:
                sample = {"student_feats": [s], "teacher_feats": [t], **options}
                chosen = {"info_map": info, "penalty": penalty, "divisor": divisor, "one_pass": one_pass}
                for found in step(sample, **chosen, backend=backend):
                    assert found.isfinite().all(), (penalty, divisor, one_pass)

    def test_constant_teacher(self, info: InfoMap, backend: str) -> None:
        for value in (0.0, 3.0):
            self.every_option(info, backend, torch.randn(2, 4, 3, 3), torch.full((2, 4, 3, 3), value))

    def test_student_equal_to_teacher(self, info: InfoMap, backend: str) -> None:
        t = torch.randn(2, 4, 3, 3)
        self.every_option(info, backend, t.clone(), t)

    def test_one_cell_and_one_channel(self, info: InfoMap, backend: str) -> None:
        for shape in ((2, 4, 1, 1), (2, 1, 3, 3), (1, 1, 1, 1)):
            self.every_option(info, backend, torch.randn(shape), torch.randn(shape))

    def test_one_channel_standardised_is_as_the_reference_has_it(self, info: InfoMap, backend: str) -> None:
        s, t = torch.randn(2, 1, 3, 3, requires_grad=True), torch.randn(2, 1, 3, 3)
        options = {"info_map": info, "standardize": [(torch.tensor([0.1]), torch.tensor([0.7]))]}
        for ours, reference in zip(
            loss_and_gradients(distill_loss([s], [t], **options, backend=backend), [s]),
            loss_and_gradients(distill_loss([s], [t], **options, backend="reference"), [s]),
            strict=True,
        ):
            torch.testing.assert_close(ours, reference)

    def test_empty_batch_and_empty_level(self, info: InfoMap, backend: str) -> None:
        for shape in ((0, 4, 3, 3), (2, 4, 0, 3), (2, 0, 3, 3)):
            self.every_option(info, backend, torch.randn(shape), torch.randn(shape))

    def test_all_zero_prior_gives_zero(self, info: InfoMap, backend: str) -> None:
        s, t = torch.randn(2, 4, 3, 3, requires_grad=True), torch.randn(2, 4, 3, 3)
        self.every_option(info, backend, s, t, prior=[torch.zeros(2, 3, 3)])
        loss = distill_loss([s], [t], info_map=info, divisor="map", prior=[torch.zeros(2, 3, 3)], backend=backend)
        (gradient,) = torch.autograd.grad(loss, s)
        assert loss == 0
        assert not gradient.any()

    def test_temperature_near_zero(self, info: InfoMap, backend: str) -> None:
        sharp = InfoMap(info.score, info.map_norm, temperature=SMALLEST)
        self.every_option(sharp, backend, torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3))

    def test_large_float16_values(self, info: InfoMap, backend: str) -> None:
        t = (torch.randn(2, 4, 3, 3) * 1e4).half()
        s = (torch.randn(2, 4, 3, 3) * 1e4).half().requires_grad_()
        assert distill_loss([s], [t], info_map=info, backend=backend).isfinite()

    def test_nan_spoils_the_gradients_that_it_spoils_in_the_reference(self, info: InfoMap, backend: str) -> None:
        for penalty, channels in zip(PENALTIES, (4, 4, 1), strict=True):
            s, t = torch.randn(2, channels, 3, 3), torch.randn(2, channels, 3, 3)
            s[0, channels // 4, 1, 1] = t[1, channels // 2, 1, 1] = math.nan
            s.requires_grad_()
            sample = {"student_feats": [s], "teacher_feats": [t]}
            _, reference = step(sample, info_map=info, penalty=penalty, backend="reference")
            for one_pass in (penalty == "l1",) if interpreted(backend) else (True, False):
                _, ours = step(sample, info_map=info, penalty=penalty, backend=backend, one_pass=one_pass)
                assert torch.equal(ours.isnan(), reference.isnan()), (penalty, one_pass)

    def test_nan_and_inf_go_through_to_the_loss(self, info: InfoMap, backend: str) -> None:
        for value in (math.nan, math.inf, -math.inf):
            for where in ("student", "teacher"):
                s, t = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
                {"student": s, "teacher": t}[where][1, 2, 1, 1] = value
                loss = distill_loss([s.requires_grad_()], [t], info_map=info, backend=backend)
                assert not loss.isfinite(), (value, where)


@on_every_target
def test_student_and_teacher_may_differ_in_dtype_and_layout(backend: str) -> None:
    sample = levels(torch.bfloat16, "student_channels_last")
    sample["teacher_feats"] = [t.float() for t in sample["teacher_feats"]]
    loss = distill_loss(**sample, reduction="none", backend=backend)
    assert loss.dtype == torch.float32
    gradients = loss_and_gradients(loss, sample["student_feats"])
    for s, gradient in zip(sample["student_feats"], gradients[1:], strict=True):
        assert gradient.dtype == torch.bfloat16
        assert gradient.shape[2] == 1 or gradient.stride() == s.stride()
    wide = widened(sample)
    exact = loss_and_gradients(distill_loss(**wide, reduction="none", backend="reference"), wide["student_feats"])
    for x, y in zip(gradients, exact, strict=True):
        tolerance = 2**-8 if x.dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(x.double(), y, rtol=tolerance, atol=1e-9)


@on_every_target
def test_reduction_none_sums_to_reduction_sum_and_weights_scale_levels(backend: str) -> None:
    sample = levels(shapes=shapes_for(backend))
    each = distill_loss(**sample, reduction="none", backend=backend)
    torch.testing.assert_close(each.sum(), distill_loss(**sample, backend=backend))
    unweighted = distill_loss(**{**sample, "weights": None}, reduction="none", backend=backend)
    torch.testing.assert_close(each, unweighted * torch.tensor(sample["weights"]))


def test_bad_features_are_named_as_the_teachers() -> None:
    for bad, message in (
        ([torch.randn(2, 3, 4)], r"teacher_feats\[0\]: expected 4 dimensions"),
        ([3], r"teacher_feats\[0\]: expected a tensor, got a int"),
        (torch.randn(1, 2, 3, 4), r"teacher_feats: expected a list of tensors.*wrap it: \[x\]"),
        ([], "teacher_feats: expected at least one level"),
        (None, "teacher_feats: expected a list of tensors, one per level, got None$"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            fastkd.info_map(bad)
