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


def resize_bilinear(maps: Tensor, side: int, shift: tuple[float, float] = (0, 0)) -> Tensor:
    """Maps (..., h, w) at S x S pixels, bilinear, half-pixel centres; edges repeated.

    Read `shift` values further down and to the right, so that what they show moves up and left.
    """
    sizes = zip(maps.shape[-2:], shift, strict=True)
    down, across = (bilinear_matrix(int(n), side, by).to(maps) for n, by in sizes)
    return down @ (maps @ across.T)


def area_downsample(x: Tensor, side: int) -> Tensor:
    """Images (..., H, W) at s x s pixels, each the mean of what it covers."""
    down, across = (area_matrix(int(n), side).to(x) for n in x.shape[-2:])
    return down @ (x @ across.T)


@lru_cache(maxsize=64)
@torch.inference_mode(mode=False)
def bilinear_matrix(n: int, m: int, shift: float = 0) -> Tensor:
    """The matrix (m, n) that reads n values at the centres of m even parts, `shift` further on."""
    return _reading((torch.arange(m) + 0.5) * (n / m) - 0.5 + shift, n)


@lru_cache(maxsize=64)
@torch.inference_mode(mode=False)
def place_means(n: int, pixels: int, m: int) -> Tensor:
    """The matrix (m, n) of the means of an encoder's n values over m even parts of its pixels."""
    return area_matrix(pixels, m) @ feature_matrix(n, pixels)


def feature_matrix(n: int, pixels: int) -> Tensor:
    """The matrix (`pixels`, n) that reads an encoder's n values at every pixel, linear in between.

    A stage of stride 2 looks at 3 pixels around every second one: value j is centred on pixel
    j · `pixels` / n, half a stride before the middle of the pixels that share it.
    """
    return _reading(torch.arange(pixels) * (n / pixels), n)


def enlarged_features(maps: Tensor, side: int) -> Tensor:
    """Maps (..., n, n) of an encoder at S x S pixels, each value where it looks."""
    matrix = feature_matrix(int(maps.shape[-1]), side).to(maps)
    return matrix @ (maps @ matrix.T)


def _reading(at: Tensor, n: int) -> Tensor:
    """The matrix (m, n) that reads n values at the places (m,), linear in between; edges repeated."""
    at = at.clamp(0, n - 1)
    below = at.floor().long()
    share, values = (at - below)[:, None], torch.eye(n)
    return (1 - share) * values[below] + share * values[(below + 1).clamp_max(n - 1)]


@lru_cache(maxsize=64)
@torch.inference_mode(mode=False)
def area_matrix(n: int, m: int) -> Tensor:
    """The matrix (m, n) of the means of m even parts of n values, n >= m."""
    return F.interpolate(torch.eye(n)[:, None], size=m, mode="area")[:, 0].T.contiguous()
