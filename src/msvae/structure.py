"""The structure map: local statistics of the picture against those of the most alike normal images.

What a place looks like is told by a few numbers: energy by Laplacian band, the structure tensor,
tone, colour and extremes, all within a small window. They are read two-sidedly: too smooth is as
odd as too busy. A place is as odd as its distance to the nearest place of the normal images that
are most like the whole picture (retrieval before comparison as in SPADE, Cohen & Hoshen 2020, on
statistics instead of pretrained features). So one model can hold several materials.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from msvae import native
from msvae.maps import blurring, gaussian, opponent, smooth
from msvae.precision import low_pays

BANDS = 3
ALIKE = 10  # normal images that a picture is compared with
BANK = 512  # normal images kept at most
GRID = 32  # places a side at most
WINDOW = 1 / 64  # standard deviation of the window, as a share of the side
FLOOR = 1e-5  # squared intensity: below it is the noise of 8 bits
RIDGE = 0.05
BLOCK = 1 << 19  # distances computed at a time
GPU_BLOCK = 1 << 28  # on a GPU
MANY = 512  # places: with fewer of them bfloat16 gains nothing on a CPU
TILE = 16  # columns that are multiplied at a time
SELF = 1e-3  # two pictures that are alike to this are the same one


def _plainly(work: Callable[..., Tensor], *given: Tensor) -> Tensor:
    return work(*given)


def local_statistics(x: Tensor, by: Callable[..., Tensor] = _plainly) -> Tensor:
    """Statistics of images (B, 3, S, S) in [0, 1] on a grid, (B, D, g, g), g = min(S / 4, 32).

    Log energies of three Laplacian bands, tone, log variance, the log eigenvalues of the structure
    tensor (Förstner & Gülch 1987), two colour differences and their energy, darkest and brightest.
    `by` calls functions of tensors, by graphs perhaps.
    """
    means = _native_means(x) if native.suits(x) else by(_local_means, x)
    return by(_statistics, means)


def _statistics(means: Tensor) -> Tensor:
    """Of `_local_means` (B, 13, g, g)."""
    *local, xx, yy, xy = means[:, :8].unbind(dim=1)
    mean = (xx + yy) / 2
    spread = (((xx - yy) / 2).square() + xy.square() + 1e-12).sqrt()
    logs = torch.stack([*local, mean + spread, mean - spread], dim=1).clamp_min(0).add(FLOOR).log()
    *bands, variance, colour, along, across = logs.unbind(dim=1)
    tone, first, second, dark, bright = (4 * means[:, 8:]).unbind(dim=1)
    out = [*bands, tone, variance, along, across, first, second, colour, dark, bright]
    return torch.stack(out, dim=1)


def _grid(side: int) -> Tensor:
    """The places (g,) of the grid on either side."""
    count = min(max(side // 4, 2), GRID)
    return ((torch.arange(count) + 0.5) * side / count).long()


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
    side = int(x.shape[-1])  # a number, also where a graph is made of this
    colours = opponent(x)
    luma, chroma = colours[:, 0].contiguous(), colours[:, 1:]
    at = _grid(side).to(x.device)
    blur = blurring(side, _window(side), x.device).to(x)
    here = blur[at]  # the blur at the places of the grid: what lies between is not wanted
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
    return torch.cat([here @ (energies @ here.T), planes[:, :, at][..., at]], dim=1)


def _native_means(x: Tensor) -> Tensor:
    """The same by the compiled loops."""
    return native.local_means(x, *_blurs(x.shape[-1]))


@lru_cache(maxsize=8)
def _blurs(side: int) -> tuple[Tensor, Tensor, Tensor]:
    """The kernels of the window and of the bands, their radii, the places of the grid."""
    sigmas = [_window(side), *[_band(side, k) for k in range(BANDS)]]
    kernels = [gaussian(side, sigma) for sigma in sigmas]
    radii = torch.tensor([len(kernel) // 2 for kernel in kernels])
    return torch.cat(kernels), radii, _grid(side)


def _bands(luma: Tensor, side: int) -> list[Tensor]:
    bands, rest = [], luma
    for k in range(BANDS):
        low = smooth(rest, _band(side, k))
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
    both = F.pad(rows.mT, (1, 1), mode="reflect").mT
    return torch.minimum(torch.minimum(both[:, :-2], both[:, 2:]), rows)


def descriptor(statistics: Tensor) -> Tensor:
    """What the whole picture is like: mean and deviation of each local statistic, (B, 2 D)."""
    flat = statistics.flatten(2)
    mean = flat.mean(dim=2)
    # `std` would take ten times as long.
    spread = (flat - mean[:, :, None]).square().sum(dim=2) / (flat.shape[2] - 1)
    return torch.cat([mean, spread.sqrt()], dim=1)


def thinning(count: int) -> int:
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
        kept = statistics[:: thinning(len(statistics))]
        flat = kept.permute(0, 2, 3, 1).flatten(0, 2).double()
        mean = flat.mean(dim=0)
        gap = flat - mean
        values, vectors = torch.linalg.eigh(gap.T @ gap / len(gap))
        whiten = (vectors / (values.clamp_min(0) + RIDGE * values.mean() + 1e-9).sqrt()).float()
        told = descriptor(kept)
        centre, scale = told.mean(dim=0), told.std(dim=0) + 1e-6
        places = (kept.flatten(2).transpose(1, 2) - mean.float()) @ whiten
        return cls(mean.float(), whiten, centre, scale, (told - centre) / scale, places.half())

    def __call__(self, x: Tensor, leave_out: bool = False) -> Tensor:
        """(B, g, g), standard deviations; `leave_out` compares no image with itself."""
        return self.distance(local_statistics(x), leave_out)

    def distance(self, statistics: Tensor, leave_out: bool = False) -> Tensor:
        """The same from `local_statistics` (B, D, g, g)."""
        queries = self.whiten.T @ (statistics.flatten(2) - self.mean[:, None])  # (B, D, L)
        told = (descriptor(statistics) - self.centre) / self.scale
        gaps = torch.cdist(told, self.descriptors)
        if leave_out:
            gaps = gaps.masked_fill(gaps < SELF * told.shape[1] ** 0.5, torch.inf)
        near, alike = gaps.topk(min(ALIKE, gaps.shape[1]), dim=1, largest=False)
        # Instead of one that is left out the most alike one comes twice.
        alike = torch.where(near.isinf(), alike[:, :1], alike)
        square = self._least_squares(queries, alike).unflatten(1, statistics.shape[2:])
        return (square.clamp_min(0) + 1e-8).sqrt()

    def _least_squares(self, planes: Tensor, alike: Tensor) -> Tensor:
        """Of whitened places (B, D, L) to the nearest of the images `alike` (B, A), (B, L)."""
        if native.suits(planes) and native.fits(*planes.shape[1:]):
            return native.least_distances(planes, self.tiles, alike)
        queries, device = planes.transpose(1, 2).contiguous(), planes.device
        if device.type != "cpu" and low_pays(device):
            return _least_products(_low(queries, queries=True), self.low, alike)
        if self.places.shape[1] >= MANY and low_pays(device):
            asked = _low(queries, queries=True)
            # One image of the bank after the other as it lies there: copied together they would
            # take a fifth longer.
            banks = ([self.low[i] for i in a.tolist()] for a in alike)
            rows = [_least_product(q, b) for q, b in zip(asked, banks, strict=True)]
        else:
            rows = [_nearest(q, self.high[a]) for q, a in zip(queries, alike, strict=True)]
        return torch.stack(rows)

    @cached_property
    @torch.inference_mode(mode=False)
    def high(self) -> Tensor:
        """The places b as rows (M, L, D + 1), (-2 b, |b|²), for `_nearest`."""
        places = self.places.float()
        return torch.cat([-2 * places, places.square().sum(dim=2, keepdim=True)], dim=2)

    @cached_property
    @torch.inference_mode(mode=False)
    def low(self) -> Tensor:
        """The places as rows (M, L, K) in bfloat16 whose products with `_low` queries are |q - b|²."""
        return _low(self.places.float(), queries=False)

    @cached_property
    @torch.inference_mode(mode=False)
    def tiles(self) -> Tensor:
        """The places as the processor's tiles take them, (M, L, 32)."""
        return native.packed_places(self.places)


def _low(places: Tensor, queries: bool) -> Tensor:
    """Places (..., L, D), queries or those they are compared with, as rows (..., L, K) in bfloat16.

    |q - b|² = (q, q', q, q', 1, |q|²) · (-2 b, -2 b, -2 b', -2 b', |b|², 1), where q' and b' are what
    bfloat16 leaves over of q and b, and each square is a sum of three. The products are added up in
    float32, so that only the distance itself is rounded, by 0.2 %.
    """
    high, rest = native.halves(places)
    square = native.parts(places.square().sum(dim=-1))
    one = torch.ones_like(square)
    if queries:
        rows = torch.cat([high, rest, high, rest, one, square], dim=-1)
    else:
        rows = torch.cat([-2 * high, -2 * high, -2 * rest, -2 * rest, square, one], dim=-1)
    return F.pad(rows, (0, -rows.shape[-1] % TILE))


def _nearest(queries: Tensor, places: Tensor) -> Tensor:
    """Squared distances (L,) of queries (L, D) to the nearest of places (A, L, D + 1), `high` ones.

    |q - b|² = |q|² + (q, 1)·(-2 b, |b|²).
    """
    asked = F.pad(queries, (0, 1), value=1.0)
    return _least_product(asked, [places.flatten(0, 1)]) + queries.square().sum(dim=1)


def _least_product(queries: Tensor, banks: Sequence[Tensor]) -> Tensor:
    """The least product of each of the queries (L, K) with a row of the banks (N, K), (L,), float32.

    Block by block: a block stays in the processor's cache, and one piece of memory serves them all.
    """
    size = max(BLOCK // len(queries), 1)
    blocks = [block for bank in banks for block in bank.split(size)]
    products = queries.new_empty(len(queries), max(map(len, blocks)))
    least = []
    for block in blocks:
        found = torch.mm(queries, block.T, out=products[:, : len(block)])
        if found.dtype == torch.bfloat16:
            found = found.view(torch.int16)  # in the same order from 0 upwards, and far faster
        least.append(found.amin(dim=1))
    return torch.stack(least).amin(dim=0).view(queries.dtype).float()


def _least_products(queries: Tensor, bank: Tensor, alike: Tensor) -> Tensor:
    """The same for many images (B, L, K) at once, each with the images `alike` (B, A) of the bank
    (M, L', K), (B, L), float32: a GPU wants a few large products, not many small ones.
    """
    distances = queries.shape[1] * alike.shape[1] * bank.shape[1]
    size = max(GPU_BLOCK // distances, 1)
    return torch.cat(
        [
            torch.bmm(q, bank[a].flatten(1, 2).mT).amin(dim=2).float()
            for q, a in zip(queries.split(size), alike.split(size), strict=True)
        ]
    )
