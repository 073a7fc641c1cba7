"""Held-out normal scores -> p-values and thresholds; numbers only.

Split-conformal prediction (Vovk et al. 2005; Bates et al. 2023): for exchangeable normal images,
P(p <= rate) <= rate, whatever the score and however few the images.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from msvae.core.errors import RateError

Floats = NDArray[np.float64]


def conformal_p(scores: Floats, reference: Floats) -> Floats:
    """(1 + #{reference >= score}) / (n + 1) of each score, (N,), in (0, 1]."""
    if len(scores) == 1:  # sorted for one score, the references would take longer than all else
        above = np.count_nonzero(reference >= scores, keepdims=True)
    else:
        ordered = np.sort(reference)
        above = len(ordered) - np.searchsorted(ordered, scores, side="left")
    return np.asarray((1.0 + above) / (len(reference) + 1.0), dtype=np.float64)


def needed(rate: float) -> int:
    """The least number of calibration images that can keep a false-alarm rate: ⌈1/rate⌉ - 1."""
    return math.ceil(1 / rate - 1e-9) - 1


def rank(rate: float, n: int) -> int:
    """k = ⌊rate (n + 1)⌋: an image is flagged when its score exceeds the k-th largest reference.

    Raises `RateError` when n images cannot keep the rate.
    """
    if not 0 < rate < 1:
        raise RateError(f"a false-alarm rate lies between 0 and 1, not {rate:g}: try 0.05")
    if n < needed(rate):
        raise RateError(
            f"a false-alarm rate of {rate:g} needs at least {needed(rate)} calibration images, "
            f"got {n}: lower the demand or add images"
        )
    return math.floor(rate * (n + 1) + 1e-9)


def threshold(reference: Floats, rate: float) -> float:
    """The least score that is flagged at the rate: p(score) <= rate exactly when score >= this."""
    kth = np.sort(reference)[-rank(rate, len(reference))]
    return float(np.nextafter(kth, np.inf))


@dataclass(frozen=True)
class Decision:
    """The rule by which a run flags images.

    `conformal`: p of `score` <= `target_fpr`; otherwise `score` >= `threshold`.
    """

    rule: Literal["conformal", "fixed", "f1"]
    score: str
    target_fpr: float
    threshold: float | None = None

    def flags(self, scores: Mapping[str, Floats], p: Floats) -> NDArray[np.bool_]:
        """Which images are flagged, (N,)."""
        if self.rule == "conformal":
            return p <= self.target_fpr + 1e-12
        assert self.threshold is not None
        return scores[self.score] >= self.threshold

    def at(self, target_fpr: float | None) -> "Decision":
        """The conformal decision at another rate; itself without one."""
        if target_fpr is None:
            return self
        return Decision("conformal", "fused", target_fpr)


@dataclass(frozen=True)
class Calibration:
    """The scores of the conformal part, and the greatest value of each of its maps."""

    scores: dict[str, Floats]  # each (n,)
    peaks: dict[str, Floats]  # each (n,)

    @property
    def n(self) -> int:
        """How many images."""
        return len(self.scores["fused"])

    def p_values(self, scores: Mapping[str, Floats]) -> dict[str, Floats]:
        """The conformal p-value of every score, upper tail."""
        return {k: conformal_p(v, self.scores[k]) for k, v in scores.items() if k in self.scores}

    def low_p_values(self, scores: Mapping[str, Floats]) -> dict[str, Floats]:
        """The same for the lower tail: how few normal images score as low."""
        return {k: conformal_p(-v, -self.scores[k]) for k, v in scores.items() if k in self.scores}

    def map_level(self, rate: float = 0.01) -> tuple[float, float]:
        """The value of the fused map that is reached anywhere in a share of normal images.

        Also that share: `rate`, or 1 in n + 1 where n images cannot keep the rate.
        """
        peaks = self.peaks["fused"]
        kept = max(rate, 1 / (len(peaks) + 1))
        return threshold(peaks, kept), kept

    def map_scale(self, name: str, rate: float = 0.01) -> tuple[float, float]:
        """Where the colours of a map begin and end, the same for every image of a run.

        They begin at what every calibration image reaches somewhere; half-way lies what a share `rate`
        of them reaches (of few images: the greatest of all), so that an ordinary map stays dark.
        """
        peaks = self.peaks[name]
        low, level = float(peaks.min()), threshold(peaks, max(rate, 1 / (len(peaks) + 1)))
        return low, low + 2 * max(level - low, 1e-6)

    def thresholds(self, rate: float) -> dict[str, float]:
        """For every score the least value that is flagged at the rate."""
        return {name: threshold(reference, rate) for name, reference in self.scores.items()}
