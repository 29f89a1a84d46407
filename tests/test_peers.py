"""Losses of other methods: the call that reproduces each of them, compared with its formula in plain PyTorch.

The formulas are those of the papers and of the published implementations, written again here; docs/coming_from.md has
the calls.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastkd
from fastkd import priors
from fastkd.priors import box_balance, iou_mask

N, C, H, W = 3, 8, 6, 7
SIZE, IMAGE = [(H, W)], (48, 56)
ANCHORS = [torch.tensor([[10.0, 13.0], [24.0, 24.0], [33.0, 20.0]])]
BOXES = torch.tensor([[0, 4.0, 5, 21, 30], [0, 18.0, 2, 50, 20], [2, 11.0, 20, 30, 41]])  # image, x1, y1, x2, y2


def features(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    s, t = (3 * torch.randn(N, C, H, W, generator=generator) + 1 for _ in range(2))
    return s.requires_grad_(), t


def assert_same(ours: Tensor, theirs: Tensor, s: Tensor, tolerance: float = 1e-5) -> None:
    """Check the value and the gradient, with an upstream gradient that is not 1."""
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=0)
    (a,), (b,) = (torch.autograd.grad(1.7 * x, s) for x in (ours, theirs))
    assert (a - b).abs().amax() <= tolerance * b.abs().amax()


def cells_of(mask: Tensor) -> Tensor:
    return mask[:, None]  # (N, 1, H, W)


def test_fgfi() -> None:
    """Wang et al. (2019), eq. 3: 1 / (2 N_p) sum_p I_p sum_c (s - t)^2; its boxes are one pixel larger."""
    s, t = features()
    larger = BOXES + torch.tensor([0.0, 0, 0, 1, 1])
    prior = iou_mask(larger, ANCHORS, SIZE, IMAGE, N)
    ours = fastkd.distill_loss([s], [t], info_map="fgfi", prior=prior, weights=[C / 2])
    theirs = (cells_of(prior[0]) * (s - t) ** 2).sum() / (2 * prior[0].sum())
    assert_same(ours, theirs, s)


def test_frs() -> None:
    """Du et al. (2021): per level mu sum_p w_p sum_c (s - t)^2 / sum_p w_p, w the best class score of any anchor."""
    s, t = features()
    logits = torch.randn(N, 2, 4, H, W)
    w = logits.sigmoid().flatten(1, 2).amax(1)
    ours = fastkd.distill_loss([s], [t], info_map="score", prior=priors.score([logits], SIZE), weights=[0.005 * C])
    assert_same(ours, 0.005 * (cells_of(w) * (s - t) ** 2).sum() / w.sum(), s)


def test_ultralytics() -> None:
    """Ultralytics: dis * N * sum_p w_p sum_c (s - t)^2 / (C sum_p w_p), w the best class score."""
    s, t = features()
    logits = torch.randn(N, 4, H, W)
    w = logits.sigmoid().amax(1)
    prior = priors.score([logits[:, None]], SIZE)
    ours = fastkd.distill_loss([s], [t], info_map="score", prior=prior, weights=[6.0 * N])
    assert_same(ours, 6.0 * N * (cells_of(w) * (s - t) ** 2).sum() / (C * w.sum()), s)


def test_fgd_without_its_channel_weights() -> None:
    """Yang et al. (2022), eq. 3 to 8: 1 / N sum_p (alpha M_fg + beta M_bg)_p A_p sum_c (s - t)^2, beta = alpha / 2.

    A = H W softmax over cells of mean_c abs(t) / 0.5; M is computed from the boxes as in the published code. FGD also
    weights channels, which a fused loss over cells does not.
    """
    s, t = features()
    attention = H * W * (t.abs().mean(1).flatten(1) / 0.5).softmax(1).view(N, H, W)
    foreground, background = torch.zeros(N, H, W), torch.ones(N, H, W)
    for image, *corners in BOXES.tolist():
        x1, y1, x2, y2 = (v / 8 for v in corners)
        x1, y1, x2, y2 = int(x1), int(y1), -int(-x2 // 1), -int(-y2 // 1)
        cells = foreground[int(image), y1 : y2 + 1, x1 : x2 + 1]
        torch.maximum(cells, torch.tensor(1.0 / ((y2 + 1 - y1) * (x2 + 1 - x1))), out=cells)
        background[int(image), y1 : y2 + 1, x1 : x2 + 1] = 0
    background /= background.sum((1, 2), keepdim=True)
    alpha = 1e-3
    prior = box_balance(BOXES, SIZE, IMAGE, N, background=0.5, inclusive=True)
    ours = fastkd.distill_loss(
        [s], [t], info_map="attention", prior=prior, divisor="batch", weights=[alpha]
    )  # fmt: skip
    theirs = alpha * (cells_of((foreground + background / 2) * attention) * (s - t) ** 2).sum() / N
    assert_same(ours, theirs, s)


def test_fbkd() -> None:
    """Zhang and Ma (2021): 7e-5 sqrt(sum_p M_p sum_c (s - t)^2), M the mean of student's and teacher's attention."""
    s, t = features()
    masks = [H * W * (x.abs().mean(1).flatten(1) / 0.5).softmax(1).view(N, H, W) for x in (s.detach(), t)]
    mean = (masks[0] + masks[1]) / 2
    prior = [sum(fastkd.info_map([x], "attention")[0] for x in (s, t)) / 2]
    plain = fastkd.InfoMap("uniform", "none")
    ours = 7e-5 * (N * fastkd.distill_loss([s], [t], info_map=plain, prior=prior, divisor="batch")).sqrt()
    assert_same(ours, 7e-5 * (cells_of(mean) * (s - t) ** 2).sum().sqrt(), s)


def of_pkd(s: Tensor, t: Tensor) -> Tensor:
    """Cao et al. (2022): half the mean squared difference of features standardised per channel over their batch."""

    def standardised(x: Tensor) -> Tensor:
        cells = x.movedim(1, 0).flatten(1)
        cells = (cells - cells.mean(1, keepdim=True)) / (cells.std(1, keepdim=True) + 1e-6)
        return cells.view(x.shape[1], x.shape[0], *x.shape[2:]).movedim(0, 1)

    return F.mse_loss(standardised(s), standardised(t)) / 2


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("scale", [1.0, 0.1])
def test_pkd(layout: torch.memory_format, scale: float) -> None:
    s, t = (scale * x.detach().to(memory_format=layout) for x in features())
    s.requires_grad_()
    assert_same(fastkd.distill_loss([s], [t], info_map="pkd", weights=[0.5]), of_pkd(s, t), s)
    criterion = fastkd.DistillLoss(adapters=[nn.Identity()], info_map="pkd", weight=0.5)
    assert_same(criterion([s], [t]), of_pkd(s, t), s)
    assert_same(0.5 * fastkd.distill_loss([s], [t], info_map="uniform", standardize="batch"), of_pkd(s, t), s)


def test_pkd_of_two_cells() -> None:
    s, t = torch.randn(2, 1, 5, 1, 2)
    torch.testing.assert_close(fastkd.distill_loss([s], [t], info_map="pkd", weights=[0.5]), of_pkd(s, t))


def test_pkd_is_one_minus_the_correlation() -> None:
    s, t = features()
    pairs = [torch.stack([a.flatten(), b.flatten()]) for a, b in zip(s.movedim(1, 0), t.movedim(1, 0), strict=True)]
    correlation = torch.stack([x.detach().corrcoef()[0, 1] for x in pairs]).mean()
    ours = fastkd.distill_loss([s], [t], info_map="pkd", weights=[0.5]).detach()
    torch.testing.assert_close(ours, (1 - correlation) * (N * H * W - 1) / (N * H * W), rtol=1e-5, atol=0)


def test_pkd_of_a_module_has_adapters_without_bias_and_needs_no_calibration() -> None:
    criterion = fastkd.DistillLoss([4], [C], info_map="pkd")
    assert criterion.calibrated
    assert [name for name, _ in criterion.named_parameters()] == ["adapters.0.weight"]
    s, t = torch.randn(N, 4, H, W), features()[1]
    loss = criterion([s], [t])
    loss.backward()
    assert criterion.adapters[0].weight.grad.abs().sum() > 0
    torch.testing.assert_close(loss, 2 * of_pkd(criterion.adapters[0](s), t), rtol=1e-5, atol=0)
    assert criterion.eval()([s], [t]) == loss  # always of its own batch


def test_pkd_of_constant_channels_and_single_cells_is_finite() -> None:
    for shape in ((2, 3, 4, 4), (1, 3, 1, 1), (0, 3, 4, 4)):
        s, t = torch.full(shape, 5.0, requires_grad=True), torch.full(shape, 2.0)
        loss = fastkd.distill_loss([s], [t], info_map="pkd")
        (gradient,) = torch.autograd.grad(loss, s)
        assert loss.isfinite()
        assert gradient.isfinite().all()


def of_cwd(s: Tensor, t: Tensor, temperature: float) -> Tensor:
    """Shu et al. (2021): T^2 / (N C) sum over channels of KL(softmax over cells of t / T || that of s / T)."""
    p, log_p = ((t.view(-1, H * W) / temperature).softmax(1), (t.view(-1, H * W) / temperature).log_softmax(1))
    log_q = (s.view(-1, H * W) / temperature).log_softmax(1)
    return temperature**2 * (p * (log_p - log_q)).sum() / (N * C)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_cwd(temperature: float) -> None:
    s, t = features()
    options = {"info_map": "uniform", "penalty": "cwd", "beta": temperature}
    assert_same(fastkd.distill_loss([s], [t], **options), of_cwd(s, t, temperature), s)
    criterion = fastkd.DistillLoss(adapters=[nn.Identity()], weight=10.0, **options)
    assert_same(criterion([s], [t]), 10 * of_cwd(s, t, temperature), s)


def test_gradients_of_pkd_and_cwd_are_those_of_float64() -> None:
    s, t = (x.detach().double() for x in features())
    s.requires_grad_()
    for options in ({"info_map": "pkd"}, {"info_map": "uniform", "penalty": "cwd", "beta": 2.0}):
        assert torch.autograd.gradcheck(lambda x, options=options: fastkd.distill_loss([x], [t], **options), s)


def test_a_distiller_learns_with_pkd_and_cwd_and_shows_where_it_differs() -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 3, 16, 16)
    for options in ({"info_map": "pkd"}, {"info_map": "uniform", "penalty": "cwd"}):
        student, teacher = nn.Sequential(nn.Conv2d(3, 4, 3)), nn.Sequential(nn.Conv2d(3, C, 3))
        distiller = fastkd.Distiller(student, teacher, backbone=[("0", "0")], weight="auto", **options)
        distiller.prepare(images)
        student(images)
        loss = distiller.loss(images, task_loss=2.0)
        loss.backward()
        torch.testing.assert_close(loss.detach(), torch.tensor(2.0))
        (level,) = distiller.maps(images).levels
        assert level.difference.amin() >= 0
        assert level.loss == pytest.approx(float(distiller.criterion.level_losses[0]), rel=1e-4)


def test_what_cwd_does_not_have_is_refused() -> None:
    s, t = features()
    for name, value in (("divisor", "map"), ("backend", "cpp")):
        with pytest.raises(ValueError, match=f"{name}: expected None with penalty='cwd'"):
            fastkd.distill_loss([s], [t], info_map="uniform", penalty="cwd", **{name: value})


def test_score_is_of_the_levels_own_head_and_has_no_floor() -> None:
    objectness, classes = (
        [torch.randn(2, 3, 4, 4), torch.randn(2, 3, 2, 2)],
        [
            torch.randn(2, 3, 5, 4, 4),
            torch.randn(2, 3, 5, 2, 2),
        ],
    )
    found = priors.score(classes, [(4, 4), (4, 4)], objectness=objectness)
    for q, o, k in zip(found, objectness, classes, strict=True):
        best = (o[:, :, None].sigmoid() * k.sigmoid()).flatten(1, 2).amax(1)
        expected = F.interpolate(best[:, None], (4, 4), mode="bilinear", align_corners=False)[:, 0]
        torch.testing.assert_close(q, expected)
    with pytest.raises(ValueError, match="sizes: expected one per head, as each level has its own, 2; got 1"):
        priors.score(classes, [(4, 4)])
    with pytest.raises(TypeError, match=r"objectness\[1\]: expected a tensor of shape \(N, A, H, W\), got None"):
        priors.score(classes, [(4, 4), (2, 2)], objectness=[objectness[0], None])
    assert priors.score([torch.full((1, 1, 2, 3, 3), -30.0)], [(3, 3)])[0].amax() < 1e-12
