"""Scores that compare an image's latent or embedding with those of the training images."""

from dataclasses import dataclass

import torch
from torch import Tensor

from msvae.core.evidence import Evidence
from msvae.scores.formulas import direction
from msvae.scores.moments import leave_one_out

NEIGHBOURS = 5
BANK = 8192  # references of the nearest-neighbour score at most
QUERIES = 1024  # images compared with all of them at a time


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
        return leave_one_out(d, self.n, 1 - self.shrinkage) if leave_out else d

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

    def distances(self, features: Tensor, skip: int = 0) -> Tensor:
        """Of directions (B, E), (B,); `skip=1` passes over the image itself in the bank."""
        k = min(NEIGHBOURS + skip, len(self.bank))
        near = (features @ self.bank.T).topk(k, dim=1).values
        return 1 - near[:, min(skip, k - 1) :].mean(dim=1)

    def of_training(self, features: Tensor) -> Tensor:
        """Distances (N,) of the images of the bank, each to the others; a few at a time."""
        parts = [self.distances(some, skip=1) for some in features.split(QUERIES)]
        return torch.cat(parts)

    def __call__(self, e: Evidence) -> Tensor:
        """(B,), in [0, 2]."""
        return self.distances(direction(e))
