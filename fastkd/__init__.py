"""fastkd: feature-map knowledge distillation for object detectors, with fused losses."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastkd import priors, viz
    from fastkd.distiller import Distiller
    from fastkd.health import fingerprint
    from fastkd.level_finder import FoundLevels, find_levels
    from fastkd.level_maps import info_map
    from fastkd.loss import DistillLoss, distill_loss
    from fastkd.ops.backends import backends
    from fastkd.ops.presets import PRESETS, InfoMap

__version__ = "0.1.0"
__all__ = [
    "PRESETS",
    "DistillLoss",
    "Distiller",
    "FoundLevels",
    "InfoMap",
    "__version__",
    "backends",
    "distill_loss",
    "find_levels",
    "fingerprint",
    "info_map",
    "priors",
    "viz",
]

_MODULES = {
    "PRESETS": "ops.presets",
    "DistillLoss": "loss",
    "Distiller": "distiller",
    "FoundLevels": "level_finder",
    "InfoMap": "ops.presets",
    "backends": "ops.backends",
    "distill_loss": "loss",
    "find_levels": "level_finder",
    "fingerprint": "health",
    "info_map": "level_maps",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, because the command must set OpenMP's variables before torch is loaded."""
    try:
        value = import_module(f"fastkd.{_MODULES.get(name, name)}")
    except ModuleNotFoundError as error:
        if name in _MODULES or error.name != f"fastkd.{name}":
            raise
        raise AttributeError(f"module 'fastkd' has no attribute {name!r}") from None
    value = getattr(value, name) if name in _MODULES else value
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
