"""Means and covariances without keeping the vectors, and what is made of them."""

import torch
from torch import Tensor


def leave_one_out(distance: Tensor, n: int, share: float = 1.0) -> Tensor:
    """What squared Mahalanobis distances of the n fitted images would be, had each been left out.

    By Sherman-Morrison, where the images make up the `share` of the covariance and the rest is a
    fixed shrinkage target: without the image the mean moves by d / (n - 1), and the covariance
    loses its outer product. Without it the images that were fitted look far more normal than new
    ones when there are few of them.
    """
    if share == 1:
        return n * distance / (n - 1 - distance).clamp_min(0.05 * n)
    moved = (n / (n - 1)) ** 2 * distance
    return moved / (1 - share * distance * n / (n - 1) ** 2).clamp_min(0.05)


class Moments:
    """Streaming sums of vectors (B, L, D) at L places: mean and covariance without keeping them.

    Everything is measured from `origin` (L, D), any typical vector: sums of squares far from zero
    would lose the small variances of places that hardly vary.
    """

    def __init__(self, origin: Tensor) -> None:
        self.origin, self.n = origin, 0
        self.first = torch.zeros_like(origin, dtype=torch.float64, device="cpu")
        self.second = self.first[:, :, None] * self.first[:, None, :]

    def add(self, vectors: Tensor) -> None:
        """Take in a batch (B, L, D)."""
        v = (vectors - self.origin).transpose(0, 1)
        self.n += vectors.shape[0]
        self.first += v.sum(dim=1).cpu()
        self.second += (v.transpose(1, 2) @ v).cpu()

    def __add__(self, other: "Moments") -> "Moments":
        both = Moments(self.origin)
        both.n = self.n + other.n
        both.first, both.second = self.first + other.first, self.second + other.second
        return both

    def mean(self) -> Tensor:
        """(L, D)."""
        return self.origin.cpu() + self.first / self.n

    def covariance(self) -> Tensor:
        """(L, D, D), divided by n."""
        shift = self.first / self.n
        return self.second / self.n - shift[:, :, None] * shift[:, None, :]


def shrunk_covariance(cov: Tensor, shrinkage: float) -> Tensor:
    """Covariances (L, D, D), each drawn to the one pooled over all places by the share `shrinkage`."""
    pooled = cov.mean(dim=0)
    ridge = 1e-3 * pooled.diagonal().mean() * torch.eye(pooled.shape[0], dtype=cov.dtype)
    return (1 - shrinkage) * cov + shrinkage * pooled + ridge


def whitener(cov: Tensor) -> Tensor:
    """(L, D, D) matrices W with W Wᵀ = Σ⁻¹, by triangular solves."""
    lower = torch.linalg.cholesky(cov)
    eye = torch.eye(cov.shape[-1], dtype=cov.dtype).expand_as(cov)
    return torch.linalg.solve_triangular(lower, eye, upper=False).transpose(1, 2).contiguous()


def cross_entropy(halves: tuple[Moments, Moments], shrinkage: float) -> float:
    """Twice the Gaussian cross-entropy of one half under the other's fit, both ways, summed."""
    total = 0.0
    for fitted, held in (halves, halves[::-1]):
        whiten = whitener(shrunk_covariance(fitted.covariance(), shrinkage))
        gap = held.mean() - fitted.mean()
        spread = held.covariance() + gap[:, :, None] * gap[:, None, :]
        trace = (whiten * (spread @ whiten)).sum()
        total += float(trace - 2 * whiten.diagonal(dim1=1, dim2=2).log().sum())
    return total
