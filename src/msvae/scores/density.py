"""Two-sided densities: each statistic to a normal quantile, a mixture over the vector, minus its log.

Unusually low is as unusual as unusually high (DoSE, Morningstar et al. 2021). numpy, double precision.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
KNOTS = 129
TAIL = 0.1  # the outer tenth of the references sets the slope beyond the outermost one
FAR = 1e3  # the outermost knots lie so many times the outer tenth away
COMPONENTS = (1, 2, 4, 8, 16)
PER_COMPONENT = 150  # images needed for each component of the mixture


@dataclass(frozen=True)
class QuantileMap:
    """Monotone maps of K statistics to standard-normal quantiles.

    Piecewise linear between reference quantiles, and linear beyond the outermost ones with the
    slope of the outer tenth, so that gross and mild anomalies do not tie and gradients live.
    """

    knots: Floats  # (K, Q) increasing
    levels: Floats  # (K, Q) the normal quantile of each knot
    columns: Ints  # (K,) of the statistics that vary on normal images; the others say nothing

    @classmethod
    def fit(cls, reference: Floats) -> "QuantileMap":
        """From the statistics (N, K') of N normal images; constant columns are dropped."""
        from scipy.special import ndtri

        span = np.ptp(reference, axis=0)
        columns = np.flatnonzero(span > 1e-9 * np.abs(reference).max(axis=0))
        n = len(reference)
        ranks = np.round(np.linspace(0, n - 1, min(n, KNOTS))).astype(np.int64)
        ordered = np.sort(reference[:, columns], axis=0)[ranks].T
        level = np.broadcast_to(ndtri((ranks + 0.5) / n), ordered.shape)
        (low, low_level), (high, high_level) = (_outer(ordered, level, edge) for edge in (0, -1))
        knots = np.concatenate([low, ordered, high], axis=1)
        levels = np.concatenate([low_level, level, high_level], axis=1)
        # Equal knots (ties) would divide by zero: a hair apart they take the later level.
        hair = 1e-9 * (ordered[:, -1:] - ordered[:, :1] + 1e-12)
        return cls(knots + hair * np.arange(knots.shape[1]), levels, columns)

    def __call__(self, statistics: Floats) -> Floats:
        """(B, K') -> (B, K), standard deviations of a normal."""
        values, last = statistics[:, self.columns], self.knots.shape[1] - 1
        out = np.empty_like(values, dtype=np.float64)
        for k, (knots, levels) in enumerate(zip(self.knots, self.levels, strict=True)):
            at = np.searchsorted(knots, values[:, k]).clip(1, last)
            x0, x1, y0, y1 = knots[at - 1], knots[at], levels[at - 1], levels[at]
            out[:, k] = y0 + (values[:, k] - x0) * (y1 - y0) / (x1 - x0)
        return out


def _outer(ordered: Floats, level: Floats, edge: int) -> tuple[Floats, Floats]:
    """One far knot on the line through the outermost reference with the outer tenth's slope."""
    last = ordered.shape[1] - 1
    inner, sign = (round(TAIL * last), -1.0) if edge == 0 else (round((1 - TAIL) * last), 1.0)
    rise = np.abs(level[:, edge] - level[:, inner])
    run = np.abs(ordered[:, edge] - ordered[:, inner])
    run = np.maximum(run, 1e-3 * np.maximum(ordered[:, -1] - ordered[:, 0], 1e-12))
    knot, height = ordered[:, edge] + sign * FAR * run, level[:, edge] + sign * FAR * rise
    return knot[:, None], height[:, None]


def _gmm(components: int, seed: int) -> Any:
    """scikit-learn's mixture; the ridge keeps narrow components from swallowing single images."""
    from sklearn.mixture import GaussianMixture

    return GaussianMixture(
        components,
        reg_covar=0.05,
        random_state=seed,
        max_iter=60,
        tol=1e-2,
        init_params="k-means++",
    )


@dataclass(frozen=True)
class Mixture:
    """A Gaussian mixture over normal quantiles (B, K); minus its log is a two-sided surprise."""

    log_weights: Floats  # (M,)
    means: Floats  # (M, K)
    whiten: Floats  # (M, K, K): W with W Wᵀ = Σ⁻¹

    @classmethod
    def fit(cls, z: Floats, components: int, seed: int = 0) -> "Mixture":
        """From quantiles (N, K) of normal images."""
        mixture = _gmm(components, seed).fit(z)
        return cls(np.log(mixture.weights_), mixture.means_, mixture.precisions_cholesky_)

    @staticmethod
    def choose(z: Floats, seed: int = 0) -> int:
        """The number of components under which a held-out fifth of (N, K) is likeliest."""
        held = np.arange(len(z)) % 5 == 0
        allowed = [m for m in COMPONENTS if m == 1 or m * PER_COMPONENT <= len(z)]
        return max(allowed, key=lambda m: float(_gmm(m, seed).fit(z[~held]).score(z[held])))

    def __call__(self, z: Floats) -> Floats:
        """-log density of quantiles (B, K) up to the constant K/2 log 2π, (B,), nats."""
        gap = z[:, None] - self.means  # (B, M, K)
        square = np.square(np.einsum("bmk,mkj->bmj", gap, self.whiten)).sum(axis=2)
        volume = np.log(np.diagonal(self.whiten, axis1=1, axis2=2)).sum(axis=1)
        joint = self.log_weights + volume - 0.5 * square
        most = joint.max(axis=1)
        density: Floats = -(most + np.log(np.exp(joint - most[:, None]).sum(axis=1)))
        return density


@dataclass(frozen=True)
class TwoSided:
    """Minus the log density of a vector of statistics, each first mapped to a normal quantile."""

    quantiles: QuantileMap
    density: Mixture

    @classmethod
    def fit(cls, statistics: Floats, components: int | None = None) -> "TwoSided":
        """From the statistics (N, K) of normal images; `components` of the density, or the best."""
        quantiles = QuantileMap.fit(statistics)
        z = quantiles(statistics)
        return cls(quantiles, Mixture.fit(z, components or Mixture.choose(z)))

    def __call__(self, statistics: Floats) -> Floats:
        """(B, K) -> (B,), nats."""
        return self.density(self.quantiles(statistics))

    def leave_one_out(self, statistics: Floats, folds: int = 5) -> Floats:
        """The surprise (N,) of the fitted images, each under a fit of the same size without it."""
        fold = np.arange(len(statistics)) % folds
        out = np.empty(len(statistics))
        for k in range(folds):
            other = TwoSided.fit(statistics[fold != k], len(self.density.log_weights))
            out[fold == k] = other(statistics[fold == k])
        return out
