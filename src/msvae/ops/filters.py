"""Linear filters of images and maps, and the mean of the greatest values; pure functions.

Sides are taken as plain numbers, here and wherever the graph passes: in what is traced the batch alone
stays open.
"""

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

OPPONENT = ((1 / 3, 1 / 3, 1 / 3), (1.0, -1.0, 0.0), (0.5, 0.5, -1.0))


def opponent(x: Tensor) -> Tensor:
    """Luma, red - green, yellow - blue of images (B, 3, H, W): the same shape, planes in memory."""
    return (x.new_tensor(OPPONENT) @ x.flatten(2)).view(x.shape)


def top_mean(maps: Tensor, share: float) -> Tensor:
    """Mean over the greatest `share` of the values of maps (B, H, W), one at least, (B,).

    The maximum is the noise of one place; the more places, the less is seen of small defects.
    """
    flat = maps.flatten(1)
    count = max(1, round(share * int(flat.shape[1])))
    return flat.topk(count, dim=1).values.mean(dim=1)


def gaussian_blur(maps: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of maps (..., H, W), edges mirrored; `sigma` in pixels of the map.

    A product with a matrix on either side: on a CPU several times faster than convolutions of one
    channel.
    """
    down, across = (blur_matrix(int(n), sigma).to(maps) for n in maps.shape[-2:])
    return down @ (maps @ across.T)


@lru_cache(maxsize=64)
@torch.inference_mode(mode=False)  # what is cached serves gradients too
def blur_matrix(n: int, sigma: float) -> Tensor:
    """The matrix (n, n) of a Gaussian blur of n values, mirrored at both ends."""
    radius = min(max(1, round(3 * sigma)), n - 1)
    at = torch.arange(-radius, radius + 1)
    kernel = (-0.5 * (at.double() / sigma).square()).exp()
    mirrored = n - 1 - (n - 1 - (torch.arange(n)[:, None] + at).abs()).abs()
    weights = (kernel / kernel.sum()).float().expand(n, -1)
    return torch.zeros(n, n).scatter_add_(1, mirrored, weights)


def resize_bilinear(maps: Tensor, side: int) -> Tensor:
    """Maps (..., h, w) at S x S pixels, bilinear, half-pixel centres; edges repeated."""
    down, across = (bilinear_matrix(int(n), side).to(maps) for n in maps.shape[-2:])
    return down @ (maps @ across.T)


def area_downsample(x: Tensor, side: int) -> Tensor:
    """Images (..., H, W) at s x s pixels, each the mean of what it covers."""
    down, across = (area_matrix(int(n), side).to(x) for n in x.shape[-2:])
    return down @ (x @ across.T)


@lru_cache(maxsize=64)
@torch.inference_mode(mode=False)
def bilinear_matrix(n: int, m: int) -> Tensor:
    """The matrix (m, n) that enlarges n values to m, m >= n."""
    values = torch.eye(n)[:, None]
    return F.interpolate(values, size=m, mode="linear", align_corners=False)[:, 0].T.contiguous()


@lru_cache(maxsize=64)
@torch.inference_mode(mode=False)
def area_matrix(n: int, m: int) -> Tensor:
    """The matrix (m, n) of the means of m even parts of n values, n >= m."""
    return F.interpolate(torch.eye(n)[:, None], size=m, mode="area")[:, 0].T.contiguous()
