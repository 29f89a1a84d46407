"""Information maps: where in a feature map the teacher's knowledge matters.

The one registry of scores, map norms, penalties, divisors and presets. The order of each tuple is the code that the
compiled kernels receive (``csrc/level.h``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastkd.ops.arguments import require_bool, require_known, require_number, require_positive

SCORES = ("uniform", "magnitude", "energy", "entropy")
MAP_NORMS = ("none", "mean", "softmax", "minmax")
PENALTIES = ("l2", "l1", "smooth_l1")
CWD = "cwd"  # a penalty of PyTorch alone: it compares a channel's distributions over all cells
CHANNELS = "channels"  # the divisor N C, which goes with it
OWN_BATCH = "batch"  # of standardize: both features by the moments of their own batch
DIVISORS = ("elements", "map", "batch", "map_all_ranks")
MAX_ENTROPY_TEMPERATURE = 100.0


@dataclass(frozen=True)
class InfoMap:
    """How the weight of a cell p = (n, y, x) follows from the teacher's feature t' (standardised if asked).

    ``w_p = prior_p * norm(score)_p``, all computed from the frozen teacher: no gradient flows into the map.

    Args:
        score: ``"uniform"`` 1; ``"magnitude"`` mean over channels of abs(t'); ``"energy"`` mean of t' squared;
            ``"entropy"`` 1 - H(softmax over channels of t'/T) / log C, which is at least 0.
        map_norm: over the cells of one image: ``"none"``; ``"mean"`` e / mean(e); ``"softmax"`` H W softmax(e / T);
            ``"minmax"`` (e - min) / (max - min + eps).
        temperature: T > 0, of the entropy's softmax over channels and of the softmax over cells. For the entropy at
            most 100: 1 - H / log C falls as 1 / T^2 and becomes rounding. With channels of variance 1 and T = 100,
            float32 has a cell's score to 3 % of the mean score; the variance over channels is by then all it shows.
        divisor: the Z that goes with this map unless the caller names one (see ``distill_loss``).
        standardize: whether this is a map of the teacher standardised per channel, by constants that ``DistillLoss``
            calibrates and ``distill_loss`` is given; ``"batch"``: student and teacher are standardised by the moments
            of their own batch.
        needs_prior: what the prior must be, for maps that mean nothing without one; empty if none is needed.

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
            raise TypeError(f"needs_prior: expected text that says what the prior must be, got {self.needs_prior!r}")
        temperature = require_positive("temperature", self.temperature)
        if self.score == "entropy":
            expected = f"at most {MAX_ENTROPY_TEMPERATURE:g} for the score 'entropy', which is rounding above it"
            require_number("temperature", temperature, expected, most=MAX_ENTROPY_TEMPERATURE)
        object.__setattr__(self, "temperature", temperature)

    @property
    def weights_are_prior(self) -> bool:
        """Whether the weight of a cell is its prior (1 without one), known before any feature is read."""
        return self.score == "uniform" and self.map_norm == "none"


def require_standardize(value: Any) -> bool | str:
    """The value; ``TypeError`` unless it is True, False or ``"batch"``."""
    return OWN_BATCH if isinstance(value, str) and value == OWN_BATCH else require_bool("standardize", value, OWN_BATCH)


PRESETS: dict[str, InfoMap] = {
    # Energy of the standardised teacher is, up to a constant, -log p of the cell under the teacher's own
    # per-channel Gaussian (in nats * 2/C). Li et al. (2022) publish no formula for their map: this is our reading.
    "self_information": InfoMap("energy", "mean", standardize=True),
    # Zagoruyko & Komodakis (2017), the attention map of squares.
    "energy": InfoMap("energy", "mean"),
    # The spatial attention of FGD (Yang et al., 2022, eq. 4-5) and FBKD (Zhang & Ma, 2021).
    "attention": InfoMap("magnitude", "softmax", temperature=0.5),
    # Feature term of FRS (Du et al., 2021), with a Z that divides by C too, as Ultralytics' is.
    "score": InfoMap("uniform", "none", divisor="map", needs_prior="the teacher's score"),
    # FGFI (Wang et al., 2019, eq. 2-3).
    "fgfi": InfoMap("uniform", "none", divisor="map", needs_prior="the IoU mask of anchors and boxes"),
    # Ours: FGFI's region by degrees, of the standardised teacher; what the trainer does by default.
    "graded_iou": InfoMap("uniform", "none", divisor="map", standardize=True, needs_prior="the graded IoU mask"),
    "uniform": InfoMap("uniform", "none"),
    "uniform_standardized": InfoMap("uniform", "none", standardize=True),
    # PKD (Cao et al., 2022) is half of this.
    "pkd": InfoMap("uniform", "none", standardize=OWN_BATCH),
}


def resolve(info: str | InfoMap) -> InfoMap:
    """Look a preset's name up, or pass an ``InfoMap`` through.

    Raises:
        ValueError: unknown name (lists the known ones).
        TypeError: neither a name nor an ``InfoMap``.
    """
    if isinstance(info, InfoMap):
        return info
    if not isinstance(info, str):
        raise TypeError(f"info_map: expected a preset's name or an InfoMap, got {type(info).__name__}")
    require_known("info_map", info, list(PRESETS))
    return PRESETS[info]
