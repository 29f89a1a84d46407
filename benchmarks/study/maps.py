"""Information maps that only the study has, registered by name as priors of the trainer.

Each returns one (N, H, W) tensor per level. All except ``shuffled`` scale it to a mean of 1 in each image, so that a
map moves weight within an image, but not between images.
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
FOUND = 30  # maximum number of the teacher's boxes per image
Map = Callable[[PriorContext], list[Tensor]]


def mean_one(weights: Tensor) -> Tensor:
    """Return (N, H, W) weights divided by the mean of each image."""
    return weights / weights.mean((1, 2), keepdim=True).clamp_min(TINY)


# ---- features


def teacher_features(context: PriorContext) -> list[Tensor]:
    """Return the teacher's features of each level, standardised, float32."""
    features = [hook.feature().float() for _, hook in context.distiller._matched()]
    moments = zip(features, _moments(context), strict=True)
    return [x if m is None else reference.standardize(x, *m) for x, m in moments]


def student_features(context: PriorContext) -> list[Tensor]:
    """Return the student's features of each level, adapted to the teacher's width, float32, without gradient."""
    features = [hook.feature().detach() for hook, _ in context.distiller._matched()]
    return [x.float() for x in context.distiller.criterion.adapted(features)]


def _moments(context: PriorContext) -> Sequence[tuple[Tensor, Tensor] | None]:
    return context.distiller.criterion.moments() or [None] * len(context.sizes)


# ---- maps of the features


def self_information(context: PriorContext) -> list[Tensor]:
    """The energy of the standardised teacher: the library's own map, for combination with others."""
    return [mean_one(t.square().mean(1)) for t in teacher_features(context)]


def whitened(context: PriorContext) -> list[Tensor]:
    """Self-information under a Gaussian with this batch's full covariance: the squared Mahalanobis distance."""
    return [mean_one(_mahalanobis(t)) for t in teacher_features(context)]


def _mahalanobis(feature: Tensor) -> Tensor:
    n, c, h, w = feature.shape
    cells = feature.movedim(1, -1).reshape(-1, c)
    centred = cells - cells.mean(0)
    covariance = centred.T @ centred / len(cells)
    # a batch may have fewer cells than a deep level has channels, so shrink to the diagonal to make it invertible
    covariance = 0.9 * covariance + 0.1 * torch.diag(covariance.diagonal().clamp_min(1e-3))
    whitened: Tensor = torch.linalg.solve(covariance, centred.T).T
    return (centred * whitened).mean(1).view(n, h, w)


def disagreement(context: PriorContext) -> list[Tensor]:
    """The current squared error of the student at each cell."""
    pairs = zip(student_features(context), teacher_features(context), strict=True)
    return [mean_one((s - t).square().mean(1)) for s, t in pairs]


# ---- maps of the teacher's outputs


def sensitivity(context: PriorContext) -> list[Tensor]:
    """How much the teacher's outputs depend on the cell: the root of their mean squared gradient.

    The outputs are multiplied with random vectors and the root of their Fisher information, so that the expected square
    of the gradient is the diagonal of the feature's Fisher information. Objectness and classes are Bernoulli variables,
    boxes have a unit Gaussian, and boxes and classes are weighted by objectness. This needs the teacher's backward.
    """
    return [mean_one(g.square().mean(1).sqrt()) for g in _decision_gradients(context)]


def _decision_gradients(context: PriorContext) -> list[Tensor]:
    hooks = [teacher for _, teacher in context.distiller._matched()]
    caught = [(hook.output, hook.calls, hook.version) for hook in hooks]
    with torch.enable_grad(), context.distiller._teacher.as_given():
        outputs = context.teacher(context.images.detach().requires_grad_())
        features = [hook.feature() for hook in hooks]
        total = torch.stack([_projected(x, context.teacher.anchors.shape[1]) for x in outputs]).sum()
        gradients = torch.autograd.grad(total, features)
    for hook, (output, calls, version) in zip(hooks, caught, strict=True):  # as before this forward
        hook.output, hook.calls, hook.version = output, calls, version
    # gradient of the standardised feature, by the chain rule
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
    """The teacher's uncertainty: the largest entropy of its objectness over anchors and heads."""
    anchors = context.teacher.anchors.shape[1]
    heads = []
    for x in context.outputs:
        objectness = x.view(len(x), anchors, -1, *x.shape[2:])[:, :, 4].float()
        p = objectness.sigmoid()
        entropy = -p * F.logsigmoid(objectness) - (1 - p) * F.logsigmoid(-objectness)
        heads.append(entropy.amax(1, keepdim=True))
    return [mean_one(0.1 + 0.9 * priors.at_size(heads, size)) for size in context.sizes]


# ---- maps of boxes


def graded_iou(context: PriorContext) -> list[Tensor]:
    return [mean_one(q) for q in PRIORS["graded_iou"](context) if q is not None]


def predicted_iou(context: PriorContext) -> list[Tensor]:
    """The graded IoU of the boxes that the teacher detects, which needs no labels."""
    boxes, batch = likely_boxes(context.outputs, context.teacher, most=FOUND), len(context.images)
    masks = priors.iou_mask(boxes, context.anchors, context.sizes, context.image_size, batch, graded=True)
    return [mean_one(q) for q in masks]


def object_scale(context: PriorContext) -> list[Tensor]:
    """Every object has the same total weight, independent of its area, and so has the background of an image."""
    return [mean_one(q) for q in PRIORS["box_balance"](context) if q is not None]


# ---- maps of other maps


def product(*maps: Map) -> Map:
    def multiplied(context: PriorContext) -> list[Tensor]:
        return [mean_one(torch.stack(weights).prod(0)) for weights in zip(*(m(context) for m in maps), strict=True)]

    return multiplied


def root(base: Map) -> Map:
    """Return the square root of a map, which is flatter."""
    return lambda context: [mean_one(weights.sqrt()) for weights in base(context)]


def sharpening(base: Map) -> Map:
    """Return a map that is uniform at first, and changes to the map's square in the first ``SHARP_STEPS`` steps."""

    def powered(context: PriorContext) -> list[Tensor]:
        progress = (context.distiller.criterion.loss_weight.step / SHARP_STEPS).clamp(max=1)
        return [mean_one(weights.clamp_min(1e-6) ** (2 * progress)) for weights in base(context)]

    return powered


def shuffled(base: Map) -> Map:
    """Return a map's shuffled twin: its values in each image and level, at random places."""

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
SHUFFLED = "shuffled "  # prefix of the name of a map's shuffled twin


def prior_name(name: str) -> str:
    """Return the value of ``TrainConfig.prior`` for one of ``MAPS``, or for its shuffled twin."""
    return f"study: {name}"


for _name, _map in MAPS.items():
    PRIORS[prior_name(_name)] = _map
    PRIORS[prior_name(SHUFFLED + _name)] = shuffled(_map)
