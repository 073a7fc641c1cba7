"""Scores with a direction into one: the length of the vector of their surprisals. numpy, double."""

from dataclasses import dataclass, replace
from math import erfc, sqrt
from statistics import NormalDist

import numpy as np

from msvae.scores.density import Floats, Ints, QuantileMap

RARE = 1 / 20  # of normal images: beyond them they tell little
OUTER = NormalDist().inv_cdf(1 - RARE)  # standard deviations
STEEPNESS = NormalDist().pdf(OUTER) / RARE  # nats a deviation: the slope of -log P(Z >= z) there

_ERFC = np.frompyfunc(erfc, 1, 1)


@dataclass(frozen=True)
class Fusion:
    """Several scores with a direction into one: the length of the vector of weighted surprisals, nats.

    Between Fisher's sum (1932), which many small surprises move, and the greatest of them (Tippett
    1931), which takes one score's word for all. The scores need not be independent: the conformal
    p-value of the length is right all the same.
    """

    quantiles: QuantileMap  # of the scores
    gap: Floats  # (K',) where normal images lie that were not trained on, in quantiles
    width: Floats  # (K',) and how far they scatter
    weights: Floats  # (K,)

    @classmethod
    def fit(cls, scores: Floats, weights: Floats) -> "Fusion":
        """From the scores (N, K) of the training images; a constant one is left out."""
        quantiles = QuantileMap.fit(scores)
        count = len(quantiles.columns)
        return cls(quantiles, np.zeros(count), np.ones(count), weights)

    def recentred(self, held: Floats) -> "Fusion":
        """The fusion for images that were not trained on, from the scores (M, K) of a few of them.

        A network knows its training images: new normal images score higher in everything it
        learned. The further apart the two lie, the less the training images tell of how a score
        scatters, so the wider it is taken to be and the less it weighs. Shrunk to no correction
        where there are few images.
        """
        z, m = self.quantiles(held), len(held)
        centre = _lower_median(z)
        gap = m / (m + 5) * centre
        apart = gap.clip(min=0)
        scatter = _lower_median(np.abs(z - centre)) / 0.6745
        if m > 1:
            scatter = np.maximum(scatter, z.std(axis=0, ddof=1))
        share = m / (m + 10)
        log_width = share * np.log(scatter.clip(0.1, 10)) + (1 - share) * np.log(1 + apart / 2)
        weights = self.weights.copy()
        weights[self.quantiles.columns] /= np.sqrt(1 + np.square(apart))
        return replace(self, gap=gap, width=np.exp(log_width), weights=weights)

    def reweighted(self, ability: Floats, tried: Ints, m: int) -> "Fusion":
        """The fusion with scores weighted by how well they find what they look for, squared.

        `ability` in [0, 1] of the scores in the columns `tried`, measured on m images. The others
        were not tried on it: they weigh the less, the better the best of the tried does. One image
        counts half, m images m / (m + 1).
        """
        share, weights = m / (m + 1), self.weights.copy()
        others = np.setdiff1d(np.arange(len(weights)), tried)
        weights[tried] *= np.square(1 - share * (1 - ability))
        weights[others] *= 1 - share * float(ability.max())
        return replace(self, weights=weights)

    def standardised(self, scores: Floats) -> Floats:
        """Scores (B, K) in deviations from new normal images, (B, K'), without the constant ones."""
        return (self.quantiles(scores) - self.gap) / self.width

    def surprisals(self, scores: Floats) -> Floats:
        """Weighted surprisals (B, K) of scores (B, K), nats; 0 where a score was constant."""
        nats = np.zeros(scores.shape)
        nats[:, self.quantiles.columns] = surprisal(self.standardised(scores))
        return nats * self.weights

    def __call__(self, scores: Floats) -> Floats:
        """(B, K) -> (B,), nats."""
        return np.sqrt(np.square(self.surprisals(scores)).sum(axis=1))


def surprisal(z: Floats) -> Floats:
    """-log P(Z >= z) of standard-normal quantiles, nats; beyond `OUTER` on a straight line.

    The few normal images out there do not tell how the tail goes on. A Gaussian's would make a
    certainty of what no image could vouch for; an exponential one (a generalised Pareto tail of shape
    0, Pickands 1975) grows with the distance and no faster.
    """
    # math's erfc: to import scipy would take a third of a cold start.
    reached = np.asarray(_ERFC(np.minimum(z, OUTER) / sqrt(2)), dtype=np.float64) / 2
    return np.asarray(-np.log(reached) + STEEPNESS * np.maximum(z - OUTER, 0))


def _lower_median(values: Floats) -> Floats:
    """Of each column (M, K), (K,): the lower of the two middle values of an even number."""
    return np.sort(values, axis=0)[(len(values) - 1) // 2]
