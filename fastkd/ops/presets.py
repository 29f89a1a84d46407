"""Information maps, which weight the cells of a feature map: the registry of scores, map norms and presets.

Penalties and divisors are registered here too. The index in each tuple is the code that the compiled kernels get
(``csrc/level.h``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastkd.ops.arguments import require_bool, require_known, require_number, require_positive

SCORES = ("uniform", "magnitude", "energy", "entropy")
MAP_NORMS = ("none", "mean", "softmax", "minmax")
PENALTIES = ("l2", "l1", "smooth_l1")
CWD = "cwd"  # a penalty without kernel: it compares the distributions of a channel over all cells
CHANNELS = "channels"  # the divisor N C, of CWD alone
OWN_BATCH = "batch"  # value of standardize: each feature by the moments of its own batch
DIVISORS = ("elements", "map", "batch", "map_all_ranks")
MAX_ENTROPY_TEMPERATURE = 100.0


@dataclass(frozen=True)
class InfoMap:
    """The definition of the weight w_p of a cell p = (n, y, x), from the teacher's feature t' (standardised if asked).

    ``w_p = prior_p * map_norm(e)_p`` with the score ``e_p = score(t'_p)``. No gradient flows into the map.

    Args:
        score: ``"uniform"`` 1; ``"magnitude"`` mean over channels of abs(t'); ``"energy"`` mean over channels of t'^2;
            ``"entropy"`` 1 - H(softmax over channels of t' / T) / log C, which is at least 0.
        map_norm: normalisation over the cells of one image: ``"none"``; ``"mean"`` e / mean(e); ``"softmax"``
            H W softmax(e / T); ``"minmax"`` (e - min) / (max - min + 1e-9).
        temperature: T > 0, of the entropy's softmax over channels and of the softmax over cells. For the entropy at
            most 100, because 1 - H / log C falls as 1 / T^2 until only rounding errors are left. For channels of
            variance 1 and T = 100, a cell's score in float32 is accurate to 3 % of the mean score, and is
            proportional to the variance over channels.
        divisor: the default Z of this map (see ``distill_loss``).
        standardize: whether t' is the teacher standardised per channel, by constants that ``DistillLoss`` calibrates
            or the caller of ``distill_loss`` passes; ``"batch"``: student and teacher are each standardised by the
            moments of their own batch.
        needs_prior: a description of the prior that the map is meaningless without; empty if no prior is needed.

    Raises:
        ValueError: unknown score, map_norm or divisor; temperature not a positive finite number, or too high.
        TypeError: standardize not True, False or "batch"; needs_prior not text.
    """

    score: str = "energy"
    map_norm: str = "mean"
    temperature: float = 1.0
    divisor: str = "elements"
    standardize: bool | str = False
    needs_prior: str = ""

    def __post_init__(self) -> None:
        require_known("score", self.score, SCORES)
        require_known("map_norm", self.map_norm, MAP_NORMS)
        require_known("divisor", self.divisor, DIVISORS)
        require_standardize(self.standardize)
        if not isinstance(self.needs_prior, str):
            raise TypeError(f"needs_prior: expected a text that describes the prior, got {self.needs_prior!r}")
        temperature = require_positive("temperature", self.temperature)
        if self.score == "entropy":
            expected = f"at most {MAX_ENTROPY_TEMPERATURE:g} for the score 'entropy', which rounding dominates above it"
            require_number("temperature", temperature, expected, most=MAX_ENTROPY_TEMPERATURE)
        object.__setattr__(self, "temperature", temperature)

    @property
    def weights_are_prior(self) -> bool:
        """Whether the weight of a cell is its prior (1 without prior), and so known before any feature is read."""
        return self.score == "uniform" and self.map_norm == "none"


def require_standardize(value: Any) -> bool | str:
    """Return the value; raise ``TypeError`` unless it is True, False or ``"batch"``."""
    return OWN_BATCH if isinstance(value, str) and value == OWN_BATCH else require_bool("standardize", value, OWN_BATCH)


PRESETS: dict[str, InfoMap] = {
    # The energy of the standardised teacher equals, up to a constant, -log p of the cell under a Gaussian per channel
    # (in nats * 2 / C). Li et al. (2022) publish no formula for their map; this is our reading of it.
    "self_information": InfoMap("energy", "mean", standardize=True),
    # Zagoruyko & Komodakis (2017), the attention map of squares.
    "energy": InfoMap("energy", "mean"),
    # The spatial attention of FGD (Yang et al., 2022, eq. 4-5) and FBKD (Zhang & Ma, 2021).
    "attention": InfoMap("magnitude", "softmax", temperature=0.5),
    # The feature term of FRS (Du et al., 2021), with a Z that also divides by C, as in Ultralytics.
    "score": InfoMap("uniform", "none", divisor="map", needs_prior="the teacher's score"),
    # FGFI (Wang et al., 2019, eq. 2-3).
    "fgfi": InfoMap("uniform", "none", divisor="map", needs_prior="the IoU mask of anchors and boxes"),
    # Ours: a graded version of FGFI's region, for the standardised teacher; the default of the YOLOv3 trainer.
    "graded_iou": InfoMap("uniform", "none", divisor="map", standardize=True, needs_prior="the graded IoU mask"),
    "uniform": InfoMap("uniform", "none"),
    "uniform_standardized": InfoMap("uniform", "none", standardize=True),
    # Twice the loss of PKD (Cao et al., 2022).
    "pkd": InfoMap("uniform", "none", standardize=OWN_BATCH),
}


def resolve(info: str | InfoMap) -> InfoMap:
    """Return the ``InfoMap`` of a preset's name; an ``InfoMap`` is returned unchanged.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
        TypeError: neither a name nor an ``InfoMap``.
    """
    if isinstance(info, InfoMap):
        return info
    if not isinstance(info, str):
        raise TypeError(f"info_map: expected the name of a preset or an InfoMap, got {type(info).__name__}")
    require_known("info_map", info, list(PRESETS))
    return PRESETS[info]
