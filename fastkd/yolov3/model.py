"""YOLOv3 and YOLOv3-tiny (Redmon & Farhadi, 2018, arXiv:1804.02767), layer by layer as in their .cfg files.

Modules are registered in the order of the .cfg files, because that is the order of a ``.weights`` file
(``darknet.py``). The number at the end of a module's name is the stride of its output.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

AnchorSizes = Tensor | Sequence[Sequence[float]] | Sequence[Sequence[Sequence[float]]]

_COARSEST_STRIDE = 32
_OBJECT_PRIOR = 0.01  # objectness that an untrained head predicts (focal loss, arXiv:1708.02002, section 4.1)


def conv_block(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """Return a convolution without bias, batch norm and leaky ReLU 0.1: all layers except the last of each head.

    Batch norm divides by sqrt(variance + 1e-5), as Darknet does on a GPU; on a CPU Darknet divides by
    sqrt(variance) + 1e-6.
    """
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False)
    norm = nn.BatchNorm2d(out_channels, eps=1e-5, momentum=0.03)
    return nn.Sequential(OrderedDict(conv=conv, norm=norm, act=nn.LeakyReLU(0.1, inplace=True)))


class Residual(nn.Module):
    """x + conv3x3(conv1x1(x)), with half the channels in between."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = scale_channels(channels, 0.5)
        self.reduce = conv_block(channels, half, 1)
        self.expand = conv_block(half, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.expand(self.reduce(x))
        return out


class Darknet53(nn.Module):
    """The backbone of YOLOv3: (N, 3, H, W) to the features at strides 8, 16 and 32."""

    def __init__(self, width: float = 1.0) -> None:
        super().__init__()
        c = [scale_channels(channels, width) for channels in (32, 64, 128, 256, 512, 1024)]
        self.stem = conv_block(3, c[0], 3)
        self.stage2 = _stage(c[0], c[1], 1)
        self.stage4 = _stage(c[1], c[2], 2)
        self.stage8 = _stage(c[2], c[3], 8)
        self.stage16 = _stage(c[3], c[4], 8)
        self.stage32 = _stage(c[4], c[5], 4)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        c8 = self.stage8(self.stage4(self.stage2(self.stem(images))))
        c16 = self.stage16(c8)
        return c8, c16, self.stage32(c16)


class _Detector(nn.Module):
    """Base of the two networks: arguments and their checks, heads, initial weights."""

    strides: ClassVar[tuple[int, ...]]
    backbone_levels: ClassVar[tuple[str, ...]]
    neck_levels: ClassVar[tuple[str, ...]]
    default_anchors: ClassVar[tuple[tuple[int, int], ...]]
    anchors: Tensor

    def __init__(self, num_classes: int, width: float, anchors: AnchorSizes | None) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes: expected at least 1, got {num_classes}")
        if not 0 < width < math.inf:
            raise ValueError(f"width: expected a finite multiplier > 0, got {width}")
        self.num_classes = num_classes
        self.width = width
        self.register_buffer(
            "anchors", _anchors_per_head(self.default_anchors if anchors is None else anchors, len(self.strides))
        )

    def _head(self, in_channels: int) -> nn.Conv2d:
        return nn.Conv2d(in_channels, self.anchors.shape[1] * (5 + self.num_classes), 1)

    def _initialize(self) -> None:
        """Initialise the weights as He et al. do; heads predict an objectness of 0.01 and 1 / K for each class."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.bias is None:
                nn.init.kaiming_normal_(module.weight, a=0.1, nonlinearity="leaky_relu")
            elif isinstance(module, nn.Conv2d) and module.bias is not None:
                nn.init.normal_(module.weight, std=0.01)
                bias = torch.zeros(self.anchors.shape[1], 5 + self.num_classes)
                bias[:, 4] = math.log(_OBJECT_PRIOR / (1 - _OBJECT_PRIOR))
                bias[:, 5:] = -math.log(max(self.num_classes - 1, 1))
                with torch.no_grad():
                    module.bias.copy_(bias.flatten())

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, width={self.width}, strides={self.strides}"


class YOLOv3(_Detector):
    """YOLOv3: Darknet-53 and three heads; 61,949,149 parameters with 80 classes and width 1.

    Args:
        num_classes: K, at least 1.
        width: multiplies every number of channels except the heads' outputs; products are rounded to a multiple of 8
            (at least 8).
        anchors: box sizes (w, h) in pixels of the network's input, (3, A, 2) or (3A, 2) with the smallest first;
            None: those of yolov3.cfg, for COCO at 416 pixels. ``dataset_anchors`` chooses them for a data set.

    Attributes:
        strides: strides of the heads, (8, 16, 32).
        anchors: buffer (3, A, 2), pixels; saved in ``state_dict``.
        backbone_levels, neck_levels: names of the modules whose outputs are distilled, strides 8, 16, 32; the
            outputs of the neck's modules are the inputs of the heads' last 1x1 convolutions.

    Raises:
        ValueError: num_classes, width or anchors are not as above.
    """

    strides = (8, 16, 32)
    backbone_levels = ("backbone.stage8", "backbone.stage16", "backbone.stage32")
    neck_levels = ("neck8", "neck16", "neck32")
    default_anchors = (
        *((10, 13), (16, 30), (33, 23)),
        *((30, 61), (62, 45), (59, 119)),
        *((116, 90), (156, 198), (373, 326)),
    )

    def __init__(self, num_classes: int = 80, width: float = 1.0, anchors: AnchorSizes | None = None) -> None:
        super().__init__(num_classes, width, anchors)
        c128, c256, c512, c1024 = (scale_channels(c, width) for c in (128, 256, 512, 1024))
        self.backbone = Darknet53(width)
        self.block32 = _five_convs(c1024, c512)
        self.neck32 = conv_block(c512, c1024, 3)
        self.head32 = self._head(c1024)
        self.lateral16 = conv_block(c512, c256, 1)
        self.block16 = _five_convs(c256 + c512, c256)
        self.neck16 = conv_block(c256, c512, 3)
        self.head16 = self._head(c512)
        self.lateral8 = conv_block(c256, c128, 1)
        self.block8 = _five_convs(c128 + c256, c128)
        self.neck8 = conv_block(c128, c256, 3)
        self.head8 = self._head(c256)
        self._initialize()

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the raw head maps of RGB images.

        Args:
            images: (N, 3, H, W) floating point, 0..1, H and W multiples of 32.

        Returns:
            One map per stride, ascending, (N, A * (5 + K), H / stride, W / stride). Channels of each anchor: tx, ty,
            tw, th, objectness logit, K class logits; ``decode`` turns them into boxes.

        Raises:
            ValueError: images have another shape.
        """
        _check_images(images)
        c8, c16, c32 = self.backbone(images)
        p32 = self.block32(c32)
        p16 = self.block16(torch.cat([_upsample(self.lateral16(p32)), c16], 1))
        p8 = self.block8(torch.cat([_upsample(self.lateral8(p16)), c8], 1))
        n8, n16, n32 = self.neck8(p8), self.neck16(p16), self.neck32(p32)  # a teacher may end here
        return [self.head8(n8), self.head16(n16), self.head32(n32)]


class YOLOv3Tiny(_Detector):
    """YOLOv3-tiny: seven convolutions and two heads; 8,852,366 parameters with 80 classes and width 1.

    Arguments, attributes, output and errors are those of ``YOLOv3``, with two heads at strides (16, 32) and anchors
    (2, A, 2); ``backbone_levels`` still has strides 8, 16 and 32. The published yolov3-tiny.weights were trained with
    a mistake in their .cfg file, ``mask = 1,2,3``, and need ``anchors=YOLOv3Tiny.published_anchors``.
    """

    strides = (16, 32)
    backbone_levels = ("conv8", "conv16", "conv32")
    neck_levels = ("neck16", "neck32")
    default_anchors = ((10, 14), (23, 27), (37, 58), (81, 82), (135, 169), (344, 319))
    published_anchors: ClassVar = (*default_anchors[1:4], *default_anchors[3:])

    def __init__(self, num_classes: int = 80, width: float = 1.0, anchors: AnchorSizes | None = None) -> None:
        super().__init__(num_classes, width, anchors)
        c16, c32, c64, c128, c256, c512, c1024 = (scale_channels(2**i, width) for i in range(4, 11))
        self.conv1 = conv_block(3, c16, 3)
        self.conv2 = conv_block(c16, c32, 3)
        self.conv4 = conv_block(c32, c64, 3)
        self.conv8 = conv_block(c64, c128, 3)
        self.conv16 = conv_block(c128, c256, 3)
        self.conv32 = conv_block(c256, c512, 3)
        self.top32 = conv_block(c512, c1024, 3)
        self.block32 = conv_block(c1024, c256, 1)
        self.neck32 = conv_block(c256, c512, 3)
        self.head32 = self._head(c512)
        self.lateral16 = conv_block(c256, c128, 1)
        self.neck16 = conv_block(c128 + c256, c256, 3)
        self.head16 = self._head(c256)
        self._initialize()

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the raw head maps at strides 16 and 32; see ``YOLOv3.forward``."""
        _check_images(images)
        x = images
        for conv in (self.conv1, self.conv2, self.conv4, self.conv8):
            x = F.max_pool2d(conv(x), 2)
        f16 = self.conv16(x)
        f32 = self.conv32(F.max_pool2d(f16, 2))
        # Darknet's 2x2 pooling with stride 1 keeps the size: cells beyond the right and bottom edges count as -inf.
        pooled = F.max_pool2d(F.pad(f32, (0, 1, 0, 1), value=-math.inf), 2, stride=1)
        p32 = self.block32(self.top32(pooled))
        p16 = torch.cat([_upsample(self.lateral16(p32)), f16], 1)
        n16, n32 = self.neck16(p16), self.neck32(p32)  # a teacher may end here
        return [self.head16(n16), self.head32(n32)]


Detector: TypeAlias = YOLOv3 | YOLOv3Tiny
MODELS: dict[str, type[YOLOv3] | type[YOLOv3Tiny]] = {"yolov3": YOLOv3, "yolov3-tiny": YOLOv3Tiny}


def build_detector(
    name: str, num_classes: int = 80, width: float = 1.0, anchors: AnchorSizes | None = None
) -> Detector:
    """Return a detector with initial weights, chosen by name.

    Raises:
        ValueError: the name is unknown (the message lists the known ones), or what the model itself raises.
    """
    if name not in MODELS:
        raise ValueError(f"model: expected one of {', '.join(MODELS)}; got {name!r}")
    return MODELS[name](num_classes, width, anchors)


def name_of(model: Detector) -> str:
    """Return the detector's name, as ``build_detector`` takes it."""
    return next(name for name, kind in MODELS.items() if type(model) is kind)


def scale_channels(channels: int, width: float) -> int:
    """Return ``channels * width``, rounded to the nearest multiple of 8, at least 8."""
    return max(8, round(channels * width / 8) * 8)


def _stage(in_channels: int, out_channels: int, blocks: int) -> nn.Sequential:
    residuals = (Residual(out_channels) for _ in range(blocks))
    return nn.Sequential(conv_block(in_channels, out_channels, 3, stride=2), *residuals)


def _five_convs(in_channels: int, channels: int) -> nn.Sequential:
    return nn.Sequential(
        conv_block(in_channels, channels, 1),
        conv_block(channels, 2 * channels, 3),
        conv_block(2 * channels, channels, 1),
        conv_block(channels, 2 * channels, 3),
        conv_block(2 * channels, channels, 1),
    )


def _upsample(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def _anchors_per_head(anchors: AnchorSizes, heads: int) -> Tensor:
    sizes = torch.as_tensor(anchors, dtype=torch.float32, device="cpu").detach()
    per_head = sizes.ndim == 3 and sizes.shape[0] == heads
    flat = sizes.ndim == 2 and sizes.shape[0] % heads == 0
    if not (per_head or flat) or sizes.shape[-1] != 2 or sizes.numel() == 0:
        raise ValueError(
            f"anchors: expected sizes (w, h) for {heads} heads, shape ({heads}, A, 2) or ({heads} * A, 2); "
            f"got shape {tuple(sizes.shape)}; dataset_anchors() chooses them for these strides"
        )
    if not bool((sizes.isfinite() & (sizes > 0)).all()):
        raise ValueError("anchors: expected finite widths and heights > 0, in pixels")
    return sizes.reshape(heads, -1, 2).clone()


def _check_images(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or any(side % _COARSEST_STRIDE for side in images.shape[2:]):
        raise ValueError(
            f"images: expected (N, 3, H, W) with H and W multiples of {_COARSEST_STRIDE}, got {tuple(images.shape)}; "
            "letterbox the images to such a size"
        )
