"""Many statistics, one score: each to a normal quantile, a density over the vector, minus its log.

Two-sided by nature: unusually low is as unusual as unusually high (DoSE, Morningstar et al. 2021).
Scores with a direction come in one-sidedly and are joined as surprisals.
"""

from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

KNOTS = 129
TAIL = 0.1  # the outer tenth of the references sets the slope beyond the outermost one
COMPONENTS = (1, 2, 4, 8, 16)
RARE = 1 / 20  # of normal images: beyond them they tell little
OUTER = NormalDist().inv_cdf(1 - RARE)  # standard deviations
STEEPNESS = NormalDist().pdf(OUTER) / RARE  # nats a deviation: the slope of -log P(Z >= z) there
PER_COMPONENT = 150  # images needed for each component of the mixture


@dataclass(frozen=True)
class QuantileMap:
    """Monotone maps of K statistics to standard-normal quantiles.

    Piecewise linear between reference quantiles, and linear beyond the outermost ones with the
    slope of the outer tenth, so that gross and mild anomalies do not tie and gradients live.
    """

    knots: Tensor  # (K, Q) increasing
    levels: Tensor  # (K, Q) the normal quantile of each knot
    kept: Tensor  # (K,) columns that vary on normal images; the others say nothing

    @classmethod
    def fit(cls, reference: Tensor) -> "QuantileMap":
        """From the statistics (N, K') of N normal images; constant columns are dropped."""
        span = reference.max(dim=0).values - reference.min(dim=0).values
        kept = (span > 1e-9 * reference.abs().amax(dim=0)).nonzero()[:, 0]
        reference = reference[:, kept]
        n = len(reference)
        ranks = torch.linspace(0, n - 1, min(n, KNOTS), dtype=torch.float64).round().long()
        ordered = reference.double().sort(dim=0).values[ranks].T.contiguous()
        level = torch.special.ndtri((ranks + 0.5) / n).expand_as(ordered).contiguous()
        low, high = _outer(ordered, level, reversed_=False), _outer(ordered, level, reversed_=True)
        knots = torch.cat([low[0], ordered, high[0]], dim=1)
        levels = torch.cat([low[1], level, high[1]], dim=1)
        # Equal knots (ties) would divide by zero: a hair apart they take the later level.
        span = ordered[:, -1:] - ordered[:, :1] + 1e-12
        steps = torch.arange(knots.shape[1]).double() * 1e-9 * span
        return cls(knots + steps, levels, kept)

    def __call__(self, statistics: Tensor) -> Tensor:
        """(B, K') -> (B, K), standard deviations of a normal."""
        values = statistics[:, self.kept].double().T.contiguous()
        at = torch.searchsorted(self.knots, values.detach()).clamp(1, self.knots.shape[1] - 1)
        x0, x1 = self.knots.gather(1, at - 1), self.knots.gather(1, at)
        y0, y1 = self.levels.gather(1, at - 1), self.levels.gather(1, at)
        return (y0 + (values - x0) * (y1 - y0) / (x1 - x0)).T


def _outer(ordered: Tensor, level: Tensor, *, reversed_: bool) -> tuple[Tensor, Tensor]:
    """One far knot on the line through the outermost reference with the outer tenth's slope."""
    edge, sign = (-1, 1.0) if reversed_ else (0, -1.0)
    inner = (
        round((1 - TAIL) * (ordered.shape[1] - 1))
        if reversed_
        else round(TAIL * (ordered.shape[1] - 1))
    )
    rise = (level[:, edge] - level[:, inner]).abs()
    run = (ordered[:, edge] - ordered[:, inner]).abs()
    span = (ordered[:, -1] - ordered[:, 0]).clamp_min(1e-12)
    run = torch.maximum(run, 1e-3 * span)
    far = 1e3
    return (
        (ordered[:, edge] + sign * far * run)[:, None],
        (level[:, edge] + sign * far * rise)[:, None],
    )


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

    log_weights: Tensor  # (M,)
    means: Tensor  # (M, K)
    whiten: Tensor  # (M, K, K): W with W Wᵀ = Σ⁻¹

    @classmethod
    def fit(cls, z: Tensor, components: int, seed: int = 0) -> "Mixture":
        """From quantiles (N, K) of normal images."""
        mixture = _gmm(components, seed).fit(z.numpy())
        whiten = torch.from_numpy(mixture.precisions_cholesky_)
        return cls(
            torch.from_numpy(mixture.weights_).log(), torch.from_numpy(mixture.means_), whiten
        )

    @staticmethod
    def choose(z: Tensor, seed: int = 0) -> int:
        """The number of components under which a held-out fifth of (N, K) is likeliest."""
        held = torch.arange(len(z)).remainder(5).eq(0)
        fitted, left = z[~held].numpy(), z[held].numpy()
        allowed = [m for m in COMPONENTS if m == 1 or m * PER_COMPONENT <= len(z)]
        return max(allowed, key=lambda m: float(_gmm(m, seed).fit(fitted).score(left)))

    def __call__(self, z: Tensor) -> Tensor:
        """-log density of quantiles (B, K) up to the constant K/2 log 2π, (B,), nats."""
        gap = (z[:, None] - self.means).transpose(0, 1)  # (M, B, K)
        square = torch.bmm(gap, self.whiten).square().sum(dim=2).T
        volume = self.whiten.diagonal(dim1=1, dim2=2).log().sum(dim=1)
        return -torch.logsumexp(self.log_weights + volume - 0.5 * square, dim=1)


@dataclass(frozen=True)
class TwoSided:
    """Minus the log density of a vector of statistics, each first mapped to a normal quantile."""

    quantiles: QuantileMap
    density: Mixture

    @classmethod
    def fit(cls, statistics: Tensor, components: int | None = None) -> "TwoSided":
        """From the statistics (N, K) of normal images; `components` of the density, or the best."""
        quantiles = QuantileMap.fit(statistics)
        z = quantiles(statistics)
        return cls(quantiles, Mixture.fit(z, components or Mixture.choose(z)))

    def __call__(self, statistics: Tensor) -> Tensor:
        """(B, K) -> (B,), nats."""
        return self.density(self.quantiles(statistics))

    def left_out(self, statistics: Tensor, folds: int = 5) -> Tensor:
        """The surprise (N,) of the fitted images, each under a fit of the same size without it."""
        fold = torch.arange(len(statistics)).remainder(folds)
        out = torch.empty(len(statistics), dtype=torch.float64)
        for k in range(folds):
            other = TwoSided.fit(statistics[fold != k], len(self.density.log_weights))
            out[fold == k] = other(statistics[fold == k])
        return out


@dataclass(frozen=True)
class Fusion:
    """Several scores with a direction into one: the length of the vector of weighted surprisals, nats.

    Between Fisher's sum (1932), which many small surprises move, and the greatest of them (Tippett
    1931), which takes one score's word for all. The scores need not be independent: the conformal
    p-value of the length is right all the same.
    """

    quantiles: QuantileMap  # of the scores
    gap: Tensor  # (K',) where normal images lie that were not trained on, in quantiles
    width: Tensor  # (K',) and how far they scatter
    weights: Tensor  # (K,)

    @classmethod
    def fit(cls, experts: Tensor, weights: Tensor) -> "Fusion":
        """From the scores (N, K) of the training images; a constant one is left out."""
        quantiles = QuantileMap.fit(experts)
        kept = len(quantiles.kept)
        gap, width = torch.zeros(kept).double(), torch.ones(kept).double()
        return cls(quantiles, gap, width, weights)

    def corrected(self, held: Tensor) -> "Fusion":
        """The same for images that were not trained on, from the scores (M, K) of a few of them.

        A network knows its training images: new normal images score higher in everything it
        learned. The further apart the two lie, the less the training images tell of how a score
        scatters, so the wider it is taken to be and the less it weighs. Shrunk to no correction
        where there are few images.
        """
        z, m = self.quantiles(held), len(held)
        centre = z.median(dim=0).values
        gap = m / (m + 5) * centre
        apart = gap.clamp_min(0)
        robust = (z - centre).abs().median(dim=0).values / 0.6745
        seen = torch.maximum(robust, z.std(dim=0)) if m > 1 else robust
        share = m / (m + 10)
        log_width = share * seen.clamp(0.1, 10).log() + (1 - share) * (1 + apart / 2).log()
        weights = self.weights.clone()
        weights[self.quantiles.kept] /= (1 + apart.square()).sqrt()
        return replace(self, gap=gap, width=log_width.exp(), weights=weights)

    def trusting(self, found: Tensor, m: int) -> "Fusion":
        """The same with the first scores weighted by how well they find what they look for, squared.

        `found` (k,) of the first k scores, in [0, 1], measured on m images. The others were not tried
        on it: they weigh the less, the better the best of the first does. One image counts half,
        m images m / (m + 1).
        """
        weights, share = self.weights.clone(), m / (m + 1)
        weights[: len(found)] *= (1 - share * (1 - found.to(weights))).square()
        weights[len(found) :] *= 1 - share * float(found.max())
        return replace(self, weights=weights)

    def standing(self, experts: Tensor) -> Tensor:
        """Scores (B, K) in deviations from new normal images, (B, K'), without the constant ones."""
        return (self.quantiles(experts) - self.gap) / self.width

    def surprisals(self, experts: Tensor) -> Tensor:
        """Weighted surprisals (B, K) of scores (B, K), nats; 0 where a score was constant."""
        told = surprisal(self.standing(experts))
        return _spread(told, self.quantiles.kept, experts.shape[1]) * self.weights

    def __call__(self, experts: Tensor) -> Tensor:
        """(B, K) -> (B,), nats."""
        return self.surprisals(experts).norm(dim=1)


def _spread(values: Tensor, kept: Tensor, columns: int) -> Tensor:
    """Values of the kept columns among zeros for the others, (B, columns)."""
    return values.new_zeros(len(values), columns).index_copy(1, kept, values)


def surprisal(z: Tensor) -> Tensor:
    """-log P(Z >= z) of standard-normal quantiles, nats; beyond `OUTER` on a straight line.

    The few normal images out there do not tell how the tail goes on. A Gaussian's would make a
    certainty of what no image could vouch for; an exponential one (a generalised Pareto tail of shape
    0, Pickands 1975) grows with the distance and no faster.
    """
    inner = -torch.special.log_ndtr(-z.clamp_max(OUTER))
    return inner + STEEPNESS * (z - OUTER).clamp_min(0)
