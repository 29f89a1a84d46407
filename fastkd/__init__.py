"""fastkd: fused losses that distil an object detector's feature maps."""

from fastkd import priors, viz
from fastkd.distiller import Distiller
from fastkd.health import fingerprint
from fastkd.level_maps import info_map
from fastkd.loss import DistillLoss, distill_loss
from fastkd.ops.backends import backends
from fastkd.ops.presets import PRESETS, InfoMap

__version__ = "0.1.0"
__all__ = [
    "PRESETS",
    "DistillLoss",
    "Distiller",
    "InfoMap",
    "__version__",
    "backends",
    "distill_loss",
    "fingerprint",
    "info_map",
    "priors",
    "viz",
]
