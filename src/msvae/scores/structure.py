"""The structure map: local statistics of the picture against those of the most alike normal images.

What a place looks like is told by a few numbers: energy by Laplacian band, the structure tensor,
tone, colour and extremes, all within a small window. They are read two-sidedly: too smooth is as
odd as too busy. A place is as odd as its distance to the nearest place of the normal images that
are most like the whole picture (retrieval before comparison as in SPADE, Cohen & Hoshen 2020, on
statistics instead of pretrained features). So one model can hold several materials.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from msvae.ops.filters import bilinear_matrix, blur_matrix, gaussian_blur, opponent
from msvae.ops.nearest import least_squares

BANDS = 3
ALIKE = 10  # normal images that a picture is compared with
BANK = 512  # normal images kept at most
GRID = 16  # places a side at most: 32 cost 16 times the time and see no more (LOG.md)
WINDOW = 1 / 64  # standard deviation of the window, as a share of the side
FLOOR = 1e-5  # squared intensity: below it is the noise of 8 bits
RIDGE = 0.05
SELF = 1e-3  # two pictures that are alike to this are the same one


def local_statistics(x: Tensor) -> Tensor:
    """Statistics of images (B, 3, S, S) in [0, 1] on a grid, (B, D, g, g), g = min(S / 4, 16).

    Log energies of three Laplacian bands, tone, log variance, the log eigenvalues of the structure
    tensor (Förstner & Gülch 1987), two colour differences and their energy, darkest and brightest.
    """
    means = _local_means(x)
    *local, xx, yy, xy = means[:, :8].unbind(dim=1)
    mean = (xx + yy) / 2
    spread = (((xx - yy) / 2).square() + xy.square() + 1e-12).sqrt()
    logs = torch.stack([*local, mean + spread, mean - spread], dim=1).clamp_min(0).add(FLOOR).log()
    *bands, variance, colour, along, across = logs.unbind(dim=1)
    tone, first, second, dark, bright = (4 * means[:, 8:]).unbind(dim=1)
    out = [*bands, tone, variance, along, across, first, second, colour, dark, bright]
    return torch.stack(out, dim=1)


def _grid(side: int) -> int:
    """Places of the grid on either side."""
    return min(max(side // 4, 2), GRID)


def _window(side: int) -> float:
    return max(WINDOW * side, 0.7)


def _band(side: int, k: int) -> float:
    """Standard deviation of the blur that takes the k-th band away, pixels."""
    return max(0.8 * 2**k * side / 64, 0.5)


def _local_means(x: Tensor) -> Tensor:
    """What the statistics of images are made of, (B, 13, g, g).

    Windowed means of the energies of three bands, of luma and of colour about their own windowed
    means, and of the products of the gradients, xx, yy, xy; these means of luma and of two colour
    differences; the least and the greatest luma of 3 x 3.
    """
    side = int(x.shape[-1])
    colours = opponent(x)
    luma, chroma = colours[:, 0].contiguous(), colours[:, 1:]
    centres = bilinear_matrix(side, _grid(side)).to(x)
    blur = blur_matrix(side, _window(side)).to(x)
    here = centres @ blur  # the blur at the places of the grid: what lies between is not wanted
    tone, tints = blur @ (luma @ blur.T), blur @ (chroma @ blur.T)
    energies = torch.stack(
        [
            *(band.square() for band in _bands(luma, side)),
            (luma - tone).square(),
            (chroma - tints).square().sum(dim=1),
            *_gradients(luma),
        ],
        dim=1,
    )
    planes = torch.stack([tone, *tints.unbind(dim=1), _least(luma), -_least(-luma)], dim=1)
    return torch.cat([here @ (energies @ here.T), centres @ (planes @ centres.T)], dim=1)


def _bands(luma: Tensor, side: int) -> list[Tensor]:
    bands, rest = [], luma
    for k in range(BANDS):
        low = gaussian_blur(rest, _band(side, k))
        bands.append(rest - low)
        rest = low
    return bands


def _gradients(luma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The products of the central differences: xx, yy, xy."""
    padded = F.pad(luma[:, None], (1, 1, 1, 1), mode="reflect")[:, 0]
    gx = (padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]) / 2
    gy = (padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]) / 2
    return gx * gx, gy * gy, gx * gy


def _least(luma: Tensor) -> Tensor:
    """The least of the 3 x 3 values around each, mirrored at the edges: rows, then columns."""
    rows = F.pad(luma, (1, 1), mode="reflect")
    rows = torch.minimum(torch.minimum(rows[..., :-2], rows[..., 2:]), luma)
    both = F.pad(rows.transpose(-1, -2), (1, 1), mode="reflect").transpose(-1, -2)
    return torch.minimum(torch.minimum(both[:, :-2], both[:, 2:]), rows)


def descriptor(statistics: Tensor) -> Tensor:
    """What the whole picture is like: mean and deviation of each local statistic, (B, 2 D)."""
    flat = statistics.flatten(2)
    mean = flat.mean(dim=2)
    # `std` would take ten times as long.
    spread = (flat - mean[:, :, None]).square().sum(dim=2) / (int(flat.shape[2]) - 1)
    return torch.cat([mean, spread.sqrt()], dim=1)


def keep_every(count: int) -> int:
    """Every how manieth of `count` images is kept, for at most `BANK`."""
    return -(-count // BANK)


@dataclass(frozen=True)
class StructureMap:
    """Distance of each place's statistics to the nearest among the most alike normal images."""

    mean: Tensor  # (D,)
    whiten: Tensor  # (D, D): W with W Wᵀ = (Σ + ridge)⁻¹
    centre: Tensor  # (2 D,) of the descriptors
    scale: Tensor  # (2 D,)
    descriptors: Tensor  # (M, 2 D) of the normal images kept, standardised
    places: Tensor  # (M, L, D) their whitened local statistics, float16

    @classmethod
    def fit(cls, statistics: Tensor) -> "StructureMap":
        """From `local_statistics` (N, D, g, g) of normal images, evenly thinned to `BANK`."""
        kept = statistics[:: keep_every(len(statistics))]
        flat = kept.permute(0, 2, 3, 1).flatten(0, 2).double()
        mean = flat.mean(dim=0)
        gap = flat - mean
        values, vectors = torch.linalg.eigh(gap.T @ gap / len(gap))
        whiten = (vectors / (values.clamp_min(0) + RIDGE * values.mean() + 1e-9).sqrt()).float()
        descriptors = descriptor(kept)
        centre, scale = descriptors.mean(dim=0), descriptors.std(dim=0) + 1e-6
        places = (kept.flatten(2).transpose(1, 2) - mean.float()) @ whiten
        standardised = (descriptors - centre) / scale
        return cls(mean.float(), whiten, centre, scale, standardised, places.half())

    def __call__(self, x: Tensor, leave_out: bool = False) -> Tensor:
        """Images (B, 3, S, S) in [0, 1] -> (B, g, g), standard deviations.

        `leave_out` compares no image with itself: instead of it the most alike one comes twice.
        """
        return self.distance(local_statistics(x), leave_out)

    def distance(self, statistics: Tensor, leave_out: bool = False) -> Tensor:
        """`local_statistics` (B, D, g, g) -> (B, g, g), standard deviations."""
        places = (statistics.flatten(2).transpose(1, 2) - self.mean) @ self.whiten
        own = (descriptor(statistics) - self.centre) / self.scale
        gaps = (own[:, None] - self.descriptors).square().mean(dim=2)
        if leave_out:
            gaps = gaps.masked_fill(gaps < SELF**2, torch.inf)
        near, alike = gaps.topk(min(ALIKE, gaps.shape[1]), dim=1, largest=False)
        if leave_out:
            alike = torch.where(near.isinf(), alike[:, :1], alike)
        square = least_squares(places, self.places[alike].float())
        return (square.clamp_min(0) + 1e-8).sqrt().unflatten(1, statistics.shape[2:])
