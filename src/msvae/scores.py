"""Scores, Evidence -> (B,), and statistics, Evidence -> (B, K).

A score is higher the more anomalous the image is; `elbo` joins two of them. A statistic has no
direction: the fusion reads it two-sidedly. A score that needs normal images first is a frozen
dataclass with `fit`; the others are plain functions. To add one: write the function, its line in
`Scorer._read`, and its words in `wording.ABOUT` and `wording.EXTREMES`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import log, pi

import torch
from torch import Tensor
from torch.nn import functional as F

from msvae import native
from msvae.evidence import Evidence
from msvae.maps import left_out, opponent, reconstruction_map

FLOOR = 1e-8
BANDS = 3
NEIGHBOURS = 5
BANK = 8192  # references kept for the nearest-neighbour score at most
QUERIES = 1024  # images compared with all of them at a time


def reconstruction(e: Evidence) -> Tensor:
    """||x - x̂||², mean over pixels and channels, (B,), squared intensity (the seed method)."""
    if native.suits(e.x) and native.suits(e.recon):
        return native.mean_squares(e.x, e.recon)
    return reconstruction_map(e).mean(dim=(1, 2))


def kl(e: Evidence) -> Tensor:
    """KL(q(z|x) || N(0, I)), (B,), nats (Kingma & Welling 2014, app. B)."""
    return 0.5 * (e.mu.square() + e.logvar.exp() - 1 - e.logvar).sum(dim=1)


def elbo(
    error: Tensor, rate: Tensor, size: int, beta: float, variance: Tensor | None = None
) -> Tensor:
    """Negative evidence lower bound: distortion + β·rate, nats.

    `error` is the mean squared error of the `size` values of an image, `rate` its `kl`: of images
    (B,), or the means of a batch (). The distortion is the error summed over the values, which is
    -log p(x|z) up to a constant; with `variance` it is that of a Gaussian decoder of this variance
    (σ-VAE, Rybkin et al. 2021).
    """
    total = error * size
    if variance is not None:
        total = 0.5 * (total / variance + size * (variance.log() + log(2 * pi)))
    return total + beta * rate


def spread(e: Evidence) -> Tensor:
    """||σ(x)|| of the posterior, (B,) (LPath: Huang et al. 2024): an unsure encoder."""
    return (0.5 * e.logvar).exp().norm(dim=1)


def order(e: Evidence) -> Tensor:
    """Mean of -log p(true channel order) over the ways an image is shown, (B,), nats."""
    return (
        e.pretext.chunk(2, dim=1)[0].mean(dim=1)
        if e.pretext.shape[1]
        else e.mu.new_zeros(len(e.mu))
    )


def turn(e: Evidence) -> Tensor:
    """Mean of -log p(true quarter turn) over the ways an image is shown, (B,), nats."""
    return (
        e.pretext.chunk(2, dim=1)[1].mean(dim=1)
        if e.pretext.shape[1]
        else e.mu.new_zeros(len(e.mu))
    )


def direction(e: Evidence) -> Tensor:
    """The embedding at unit length, (B, E)."""
    return F.normalize(e.embedding, dim=1)


def _bands(image: Tensor) -> Tensor:
    """Log energies of luma and chroma by band, fine to coarse, (B, 2 * (BANDS + 1)).

    A band is what the means of 2 x 2 leave over: three differences for each (Haar 1910). Of an odd
    number of rows or columns the last is left out.
    """
    rest, energies = opponent(image), []
    for _ in range(BANDS):
        even = 2 * (int(rest.shape[-1]) // 2)  # a number, also where a graph is made of this
        rest = rest[..., :even, :even]
        top, bottom = rest[:, :, ::2], rest[:, :, 1::2]
        total, gap = top + bottom, top - bottom
        (left, right), (a, b) = ((t[..., ::2], t[..., 1::2]) for t in (total, gap))
        fine = (left - right).square() + 2 * (a.square() + b.square())
        energies.append(fine.mean(dim=(2, 3)) / 16)
        rest = (left + right) / 4
    energies.append(rest.square().mean(dim=(2, 3)))
    each = torch.stack(energies, dim=1)  # (B, BANDS + 1, 3)
    both = torch.stack([each[..., 0], each[..., 1] + each[..., 2]], dim=2)
    return (both.flatten(1) + FLOOR).log()


def band_energies(e: Evidence) -> Tensor:
    """Log energies by band, luma and chroma: of x - x̂, then of x itself, (B, 8 + 8).

    What the model left over, and how busy the image is.
    """
    if native.suits(e.x) and native.suits(e.recon) and e.x.shape[-1] >= 2**BANDS:
        return (native.band_energies(e.x, e.recon).flatten(1) + FLOOR).log()
    both = _bands(torch.cat([e.x - e.recon, e.x - 0.5]))
    return torch.cat(both.chunk(2), dim=1)


def latent_shape(e: Evidence) -> Tensor:
    """Rate, spread, length of the latent mean, and log reconstruction error, (B, 4)."""
    length = e.mu.square().sum(dim=1)
    parts = [kl(e), spread(e).log(), (length + FLOOR).log(), (reconstruction(e) + FLOOR).log()]
    return torch.stack(parts, dim=1)


@dataclass(frozen=True)
class Mahalanobis:
    """(μ(x) - m)ᵀ Σ⁻¹ (μ(x) - m), (B,), Σ by Ledoit-Wolf shrinkage of the training latents.

    The seed method; Lee et al. 2018; Ledoit & Wolf 2004.
    """

    mean: Tensor  # (Z,)
    whiten: Tensor  # (Z, Z): W with W Wᵀ = Σ⁻¹
    n: int
    shrinkage: float  # share of the identity in Σ

    @classmethod
    def fit(cls, latents: Tensor) -> "Mahalanobis":
        """From the latent means (N, Z) of the training images."""
        from sklearn.covariance import ledoit_wolf

        cov, shrinkage = ledoit_wolf(latents.double().numpy())
        ridge = 1e-6 * torch.eye(latents.shape[1], dtype=torch.float64)
        lower = torch.linalg.cholesky(torch.from_numpy(cov) + ridge)
        whiten = torch.linalg.solve_triangular(lower, torch.eye(len(cov)).double(), upper=False).T
        return cls(latents.mean(dim=0), whiten.float().contiguous(), len(latents), float(shrinkage))

    def distance(self, mu: Tensor, leave_out: bool = False) -> Tensor:
        """Squared distances (B,) of latents (B, Z); `leave_out` corrects the fitted ones."""
        d = ((mu - self.mean) @ self.whiten).square().sum(dim=1)
        return left_out(d, self.n, 1 - self.shrinkage) if leave_out else d

    def __call__(self, e: Evidence) -> Tensor:
        """(B,), squared standard deviations."""
        return self.distance(e.mu)


@dataclass(frozen=True)
class Neighbours:
    """1 - mean cosine to the 5 nearest training images in the embedding, (B,).

    After Sun et al. 2022 (deep nearest neighbours).
    """

    bank: Tensor  # (M, E), unit length

    @classmethod
    def fit(cls, features: Tensor) -> "Neighbours":
        """From the `direction`s (N, E) of the training images, evenly thinned to `BANK`."""
        step = -(-len(features) // BANK)
        return cls(features[::step].contiguous())

    def to(self, features: Tensor, skip: int = 0) -> Tensor:
        """Distances (B,) of directions (B, E); `skip=1` passes over the image itself in the bank."""
        k = min(NEIGHBOURS + skip, len(self.bank))
        out = features.new_empty(len(features))  # small parts kept would split the memory up
        for at in range(0, len(features), QUERIES):
            some = slice(at, at + QUERIES)
            near = (features[some] @ self.bank.T).topk(k, dim=1).values
            out[some] = 1 - near[:, min(skip, k - 1) :].mean(dim=1)
        return out

    def __call__(self, e: Evidence) -> Tensor:
        """(B,), in [0, 2]."""
        return self.to(direction(e))


# Each reads the images, their reconstructions and the posterior, nothing else of the evidence.
STATISTICS: dict[str, Callable[[Evidence], Tensor]] = {
    "bands": band_energies,
    "latent": latent_shape,
}


def image_statistics(x: Tensor, recon: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """All `STATISTICS` beside each other, (B, 20), of the parts of the evidence that they read.

    A graph can be made of a function of tensors.
    """
    none = x.new_empty(0)
    e = Evidence(x, recon, mu, logvar, (), none, none, none)
    return torch.cat([f(e) for f in STATISTICS.values()], dim=1)
