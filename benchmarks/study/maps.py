"""The maps that the study tries beyond the library's own: priors of the trainer, by name, that only the study knows.

Each gives (N, H, W) a level. All but ``shuffled`` are scaled to a mean of 1 in each image, so that a map moves weight
within an image and between no images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastkd import priors
from fastkd.ops import reference
from fastkd.yolov3.boxes import likely_boxes
from fastkd.yolov3.train.objective import PRIORS, PriorContext

TINY = torch.finfo(torch.float32).tiny
SHARP_STEPS = 640
FOUND = 30  # of the teacher's boxes, at most
Map = Callable[[PriorContext], list[Tensor]]


def mean_one(weights: Tensor) -> Tensor:
    """(N, H, W), divided by each image's mean."""
    return weights / weights.mean((1, 2), keepdim=True).clamp_min(TINY)


# ---- what they are made from


def teacher_features(context: PriorContext) -> list[Tensor]:
    """Each level's, standardised, float32."""
    features = [tap.feature().float() for _, tap in context.distiller._matched()]
    moments = zip(features, _moments(context), strict=True)
    return [x if m is None else reference.standardize(x, *m) for x, m in moments]


def student_features(context: PriorContext) -> list[Tensor]:
    """Each level's, adapted to the teacher's width, float32, without gradient."""
    features = [tap.feature().detach() for tap, _ in context.distiller._matched()]
    return [x.float() for x in context.distiller.criterion.adapted(features)]


def _moments(context: PriorContext) -> Sequence[tuple[Tensor, Tensor] | None]:
    return context.distiller.criterion.moments() or [None] * len(context.sizes)


# ---- from the features


def self_information(context: PriorContext) -> list[Tensor]:
    """The energy of the standardised teacher: the library's own map, here to be combined with others."""
    return [mean_one(t.square().mean(1)) for t in teacher_features(context)]


def whitened(context: PriorContext) -> list[Tensor]:
    """Self-information under a Gaussian with all covariances, of this batch: the squared Mahalanobis distance."""
    return [mean_one(_mahalanobis(t)) for t in teacher_features(context)]


def _mahalanobis(feature: Tensor) -> Tensor:
    n, c, h, w = feature.shape
    cells = feature.movedim(1, -1).reshape(-1, c)
    centred = cells - cells.mean(0)
    covariance = centred.T @ centred / len(cells)
    # a batch has fewer cells than a deep level has channels: shrunk to its diagonal, which is near 1, to be invertible
    covariance = 0.9 * covariance + 0.1 * torch.diag(covariance.diagonal().clamp_min(1e-3))
    whitened: Tensor = torch.linalg.solve(covariance, centred.T).T
    return (centred * whitened).mean(1).view(n, h, w)


def disagreement(context: PriorContext) -> list[Tensor]:
    """Where the student errs now: its squared error on the cell."""
    pairs = zip(student_features(context), teacher_features(context), strict=True)
    return [mean_one((s - t).square().mean(1)) for s, t in pairs]


# ---- from what the teacher says


def sensitivity(context: PriorContext) -> list[Tensor]:
    """What the teacher's decision rests on: the root of its outputs' mean squared gradient at the cell.

    The outputs are projected at random by the root of their Fisher information (of a Bernoulli for objectness and
    classes; of a unit Gaussian for boxes; boxes and classes as far as there is an object), so that the expected square
    of the gradient is the diagonal of the feature's Fisher information. Needs the teacher's backward.
    """
    return [mean_one(g.square().mean(1).sqrt()) for g in _decision_gradients(context)]


def _decision_gradients(context: PriorContext) -> list[Tensor]:
    taps = [teacher for _, teacher in context.distiller._matched()]
    caught = [(tap.output, tap.calls, tap.version) for tap in taps]
    with torch.enable_grad(), context.distiller._teacher.as_given():
        outputs = context.teacher(context.images.detach().requires_grad_())
        features = [tap.feature() for tap in taps]
        total = torch.stack([_projected(x, context.teacher.anchors.shape[1]) for x in outputs]).sum()
        gradients = torch.autograd.grad(total, features)
    for tap, (output, calls, version) in zip(taps, caught, strict=True):
        tap.output, tap.calls, tap.version = output, calls, version
    # of the standardised feature: by the chain rule divided by what that multiplies with
    return [g if m is None else g / m[1].view(-1, 1, 1) for g, m in zip(gradients, _moments(context), strict=True)]


def _projected(output: Tensor, anchors: int) -> Tensor:
    cells = output.view(len(output), anchors, -1, *output.shape[2:])
    p = cells.detach().sigmoid()
    seen, spread = p[:, :, 4:5], p * (1 - p)
    fisher = torch.cat([seen.expand(-1, -1, 4, -1, -1), spread[:, :, 4:5], seen * spread[:, :, 5:]], 2)
    return (torch.randn_like(cells) * fisher.sqrt() * cells).sum()


def confidence(context: PriorContext) -> list[Tensor]:
    return [mean_one(q) for q in PRIORS["confidence"](context) if q is not None]


def doubt(context: PriorContext) -> list[Tensor]:
    """Where the teacher is unsure: the largest entropy of its objectness over anchors and heads."""
    anchors = context.teacher.anchors.shape[1]
    heads = []
    for x in context.outputs:
        objectness = x.view(len(x), anchors, -1, *x.shape[2:])[:, :, 4].float()
        p = objectness.sigmoid()
        entropy = -p * F.logsigmoid(objectness) - (1 - p) * F.logsigmoid(-objectness)
        heads.append(entropy.amax(1, keepdim=True))
    return [mean_one(0.1 + 0.9 * priors.at_size(heads, size)) for size in context.sizes]


# ---- from the boxes


def graded_iou(context: PriorContext) -> list[Tensor]:
    return [mean_one(q) for q in PRIORS["graded_iou"](context) if q is not None]


def predicted_iou(context: PriorContext) -> list[Tensor]:
    """The graded IoU of the boxes that the teacher finds: no label is needed, so images without any have it too."""
    boxes, batch = likely_boxes(context.outputs, context.teacher, most=FOUND), len(context.images)
    masks = priors.iou_mask(boxes, context.anchors, context.sizes, context.image_size, batch, graded=True)
    return [mean_one(q) for q in masks]


def object_scale(context: PriorContext) -> list[Tensor]:
    """Every object has the same mass, whatever its area, and the background of an image that of one."""
    return [mean_one(q) for q in PRIORS["box_balance"](context) if q is not None]


# ---- from other maps


def product(*maps: Map) -> Map:
    def multiplied(context: PriorContext) -> list[Tensor]:
        return [mean_one(torch.stack(weights).prod(0)) for weights in zip(*(m(context) for m in maps), strict=True)]

    return multiplied


def root(base: Map) -> Map:
    """Flatter: the square root."""
    return lambda context: [mean_one(weights.sqrt()) for weights in base(context)]


def sharpening(base: Map) -> Map:
    """Uniform weights at first, which sharpen to the map's square over the first ``SHARP_STEPS`` steps."""

    def powered(context: PriorContext) -> list[Tensor]:
        progress = (context.distiller.criterion.loss_weight.step / SHARP_STEPS).clamp(max=1)
        return [mean_one(weights.clamp_min(1e-6) ** (2 * progress)) for weights in base(context)]

    return powered


def shuffled(base: Map) -> Map:
    """The twin of a map: in each image and level its values change places at random, so that only places differ."""

    def permuted(context: PriorContext) -> list[Tensor]:
        return [_permute_cells(weights) for weights in base(context)]

    return permuted


def _permute_cells(weights: Tensor) -> Tensor:
    flat = weights.flatten(1)
    return flat.gather(1, torch.rand_like(flat).argsort(1)).view_as(weights)


MAPS: dict[str, Map] = {
    "self_information": self_information,
    "whitened self_information": whitened,
    "disagreement": disagreement,
    "sensitivity": sensitivity,
    "confidence": confidence,
    "doubt": doubt,
    "graded IoU": graded_iou,
    "root of graded IoU": root(graded_iou),
    "predicted IoU": predicted_iou,
    "object scale": object_scale,
    "graded IoU x confidence": product(graded_iou, confidence),
    "graded IoU x self_information": product(graded_iou, self_information),
    "sharpening self_information": sharpening(self_information),
    "confidence x self_information": product(confidence, self_information),
}
SHUFFLED = "shuffled "  # before a map's name: its twin


def prior_name(name: str) -> str:
    """What ``TrainConfig.prior`` is for one of ``MAPS``, or for its shuffled twin."""
    return f"study: {name}"


for _name, _map in MAPS.items():
    PRIORS[prior_name(_name)] = _map
    PRIORS[prior_name(SHUFFLED + _name)] = shuffled(_map)
