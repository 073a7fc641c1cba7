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
from msvae.ops.filters import OPPONENT
from msvae.scores.catalog import BANDS

FLOOR = 1e-8
HAAR = ((1, 1, 1, 1), (1, -1, 1, -1), (1, 1, -1, -1), (1, -1, -1, 1))  # of four pixels, by rows


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
    """-log p(true channel order) of an image as it is, (B,), nats; 0 without a pretext network."""
    return e.pretext[:, 0] if e.pretext.shape[1] else torch.zeros_like(e.mu[:, 0])


def turn(e: Evidence) -> Tensor:
    """-log p(true quarter turn) of an image as it is, (B,), nats; 0 without a pretext network."""
    return e.pretext[:, 1] if e.pretext.shape[1] else torch.zeros_like(e.mu[:, 0])


def direction(e: Evidence) -> Tensor:
    """The embedding at unit length, (B, E)."""
    return F.normalize(e.embedding, dim=1)


def band_energies(image: Tensor) -> Tensor:
    """Log energies by band, fine to coarse, luma and chroma of each, (B, 2 * (BANDS + 1)).

    A band is what the means of 2 x 2 leave over: three differences for each (Haar 1910). Of an odd
    number of rows or columns the last is left out. Means and differences are one convolution.
    """
    rest, colours, energies = image, image.new_tensor(OPPONENT), []
    haar = image.new_tensor(HAAR).view(4, 1, 1, 2, 2) / 4
    for _ in range(BANDS):
        kernel = (haar * colours[:, :, None, None]).flatten(0, 1)
        steps = F.conv2d(rest, kernel, stride=2).unflatten(1, (4, 3))
        energies.append(steps[:, 1:].square().mean(dim=(3, 4)).sum(dim=1))
        rest, colours = steps[:, 0], torch.eye(3).to(image)
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
    both = band_energies(torch.cat([e.x - e.recon, e.x - 0.5])).unflatten(0, (2, -1))
    far = (distance[:, None] + FLOOR).log()
    return torch.cat([both[0], both[1], latent_shape(e), far], dim=1)
