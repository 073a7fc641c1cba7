"""Scores, Evidence -> (B,), and statistics, Evidence -> (B, K), as plain formulas.

A score is higher the more anomalous the image is; `elbo` joins two of them. A statistic has no
direction: the fusion reads it two-sidedly. What needs normal images first is a frozen dataclass with
`fit`, in `latent` and `maps`. To add a score: write the function, its line in `graph.NUMBERS`, and
its words in `catalog`.
"""

from math import log, pi

import torch
from torch import Tensor
from torch.nn import functional as F

from msvae.core.evidence import Evidence
from msvae.ops.filters import opponent
from msvae.scores.catalog import BANDS

FLOOR = 1e-8


def reconstruction(e: Evidence) -> Tensor:
    """||x - x̂||², mean over pixels and channels, (B,), squared intensity (the seed method)."""
    return (e.x - e.recon).square().mean(dim=(1, 2, 3))


def kl(e: Evidence) -> Tensor:
    """KL(q(z|x) || N(0, I)), (B,), nats (Kingma & Welling 2014, app. B)."""
    return gaussian_kl(e.mu, e.logvar)


def gaussian_kl(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mu, exp(logvar)) || N(0, I)) of (B, Z) each, (B,), nats (Kingma & Welling 2014, app. B)."""
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(dim=1)


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
    return (0.5 * e.logvar).exp().square().sum(dim=1).sqrt()


def order(e: Evidence) -> Tensor:
    """Mean of -log p(true channel order) over the views of an image, (B,), nats; else 0."""
    return _pretext_mean(e, 0)


def turn(e: Evidence) -> Tensor:
    """Mean of -log p(true quarter turn) over the views of an image, (B,), nats; else 0."""
    return _pretext_mean(e, 1)


def _pretext_mean(e: Evidence, half: int) -> Tensor:
    if e.pretext.shape[1] == 0:
        return torch.zeros_like(e.mu[:, 0])
    return e.pretext.chunk(2, dim=1)[half].mean(dim=1)


def direction(e: Evidence) -> Tensor:
    """The embedding at unit length, (B, E)."""
    return F.normalize(e.embedding, dim=1)


def band_energies(image: Tensor) -> Tensor:
    """Log energies by band, fine to coarse, luma and chroma of each, (B, 2 * (BANDS + 1)).

    A band is what the means of 2 x 2 leave over: three differences for each (Haar 1910). Of an odd
    number of rows or columns the last is left out.
    """
    rest, energies = opponent(image), []
    for _ in range(BANDS):
        even = 2 * (int(rest.shape[-1]) // 2)
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


def latent_shape(e: Evidence) -> Tensor:
    """Rate, log spread, log length of the latent mean, and log reconstruction error, (B, 4)."""
    length = e.mu.square().sum(dim=1)
    parts = [kl(e), spread(e).log(), (length + FLOOR).log(), (reconstruction(e) + FLOOR).log()]
    return torch.stack(parts, dim=1)


def statistics(e: Evidence, distance: Tensor) -> Tensor:
    """The statistics of `catalog.STATISTICS` beside each other, (B, 21), in that order.

    Band energies of x - x̂ and of x, what the posterior is like, and the log of the squared
    Mahalanobis `distance` (B,).
    """
    residual, image = band_energies(e.x - e.recon), band_energies(e.x - 0.5)
    far = (distance[:, None] + FLOOR).log()
    return torch.cat([residual, image, latent_shape(e), far], dim=1)
