"""Where in the picture: pure functions Evidence -> (B, H, W), and the two maps that are fitted.

Higher is more anomalous. `reconstruction_map` is in squared intensity, `inspection` in log-odds;
the fitted maps are distances from what normal images show at the same place.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import log

import torch
from torch import Tensor
from torch.nn import functional as F

from msvae import native
from msvae.evidence import Evidence

SPATIAL_CHANNELS = 64
SHRINKAGES = (0.02, 0.1, 0.3, 0.6, 0.95)
FLOOR = 1e-8
RARITY_KNOTS = 65
RARITY_STEP = log(1000) / (RARITY_KNOTS - 1)  # nats from knot to knot: the last is 1 place in 1000
RARITY_TABLE = 2048
RARITY_BEND = round(log(50) / RARITY_STEP)  # the knot that 1 place in 50 reaches
SHARES = (0.005, 0.02, 0.05, 0.1)  # of the places: the mean over one of them is a map's score
USUAL = SHARES.index(0.02)  # where nothing tells which is best
OPPONENT = ((1 / 3, 1 / 3, 1 / 3), (1.0, -1.0, 0.0), (0.5, 0.5, -1.0))


def opponent(x: Tensor) -> Tensor:
    """Luma, red - green, yellow - blue of images (B, 3, H, W): the same shape, planes in memory."""
    return (x.new_tensor(OPPONENT) @ x.flatten(2)).view(x.shape)


def reconstruction_map(e: Evidence) -> Tensor:
    """Mean over the channels of (x - x̂)², (B, H, W), squared intensity: the seed method's heatmap."""
    if native.suits(e.x) and native.suits(e.recon):
        return native.squared_error(e.x, e.recon)
    return (e.x - e.recon).square().mean(dim=1)


def signed_difference(e: Evidence) -> Tensor:
    """x - x̂ in luma, (B, H, W), intensity: above 0 where the image is brighter than expected."""
    return (e.x - e.recon).mean(dim=1)


def inspection(e: Evidence) -> Tensor:
    """The inspector's log-odds of a defect, smoothed, (B, H, W); zeros without an inspector."""
    if e.inspection.shape[-1] == 0:
        return torch.zeros_like(e.x[:, 0])
    return smooth(e.inspection, max(e.x.shape[-1] / 64, 0.5))


def oddest(maps: Tensor, share: float) -> Tensor:
    """Mean over the most anomalous `share` of the places of maps (B, H, W), one at least, (B,).

    The maximum is the noise of one place; the more places, the less is seen of small defects.
    """
    flat = maps.flatten(1)
    count = max(1, round(share * flat.shape[1]))
    if native.suits(flat):
        return native.greatest_means(flat, count)
    return flat.topk(count, dim=1, sorted=False).values.mean(dim=1)


def smooth(maps: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of maps (B, H, W), edges mirrored; `sigma` in pixels of the map.

    A product with a matrix on either side: on a CPU several times faster than convolutions of one
    channel.
    """
    high, wide = map(int, maps.shape[-2:])  # numbers, also where a graph is made of this
    if high == wide and native.suits(maps):
        return native.blur(maps, gaussian(high, sigma))
    down, across = (blurring(n, sigma, maps.device).to(maps) for n in (high, wide))
    return down @ (maps @ across.T)


@lru_cache(maxsize=64)
@torch.inference_mode(mode=False)  # what is kept serves gradients too
def gaussian(n: int, sigma: float) -> Tensor:
    """The weights (2 r + 1,) of a Gaussian for n values, r at most n - 1."""
    radius = min(max(1, round(3 * sigma)), n - 1)
    kernel = (-0.5 * (torch.arange(-radius, radius + 1).double() / sigma).square()).exp()
    return (kernel / kernel.sum()).float()


@lru_cache(maxsize=64)
@torch.inference_mode(mode=False)  # what is kept serves gradients too
def blurring(n: int, sigma: float, device: torch.device) -> Tensor:
    """The matrix (n, n) of a Gaussian blur of n values, mirrored at both ends."""
    kernel = gaussian(n, sigma).expand(n, -1)
    radius = kernel.shape[1] // 2
    at = torch.arange(-radius, radius + 1)
    mirrored = n - 1 - (n - 1 - (torch.arange(n)[:, None] + at).abs()).abs()
    return torch.zeros(n, n).scatter_add_(1, mirrored, kernel).to(device)


def enlarge(maps: Tensor, side: int) -> Tensor:
    """Maps (B, h, w) at S x S pixels, bilinear."""
    if maps.shape[1] == maps.shape[2] <= side and native.suits(maps):
        return native.enlarged(maps, side)
    size = (side, side)
    return F.interpolate(maps[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]


@dataclass(frozen=True)
class Rarity:
    """How rare a value is among the places of the training images: -log of the share reaching it.

    In nats, so that maps of different units can be added; nominal, since new normal images are not
    the training images: what the sum means is left to the conformal part. Linear between knots,
    and beyond the last of them with the slope of the upper 2 % (an exponential tail).
    """

    knots: Tensor  # (K, Q) of K maps: the values that a share exp(-j `RARITY_STEP`) reaches

    @classmethod
    def fit(cls, values: Tensor) -> "Rarity":
        """From values (N, K) of maps at places of normal images."""
        reached = torch.arange(RARITY_KNOTS, dtype=torch.float64).mul(-RARITY_STEP).exp()
        ordered = values.double().sort(dim=0).values
        at = ((1 - reached) * (len(ordered) - 1)).round().long()
        return cls(ordered[at].T.float().contiguous())

    @cached_property
    @torch.inference_mode(mode=False)
    def table(self) -> Tensor:
        """(K, T): the rarity of T values evenly spaced from the first knot to the last.

        To look a value up is twenty times as fast as to search for it among the knots.
        """
        share = torch.linspace(0, 1, RARITY_TABLE, device=self.knots.device)
        low, top = self.knots[:, :1], self.knots[:, -1:]
        return self._between((low + (top - low) * share).contiguous())

    def _between(self, values: Tensor) -> Tensor:
        """(K, N) -> (K, N) for values between the knots; for equal knots the last of them."""
        at = torch.searchsorted(self.knots, values).clamp(1, self.knots.shape[1] - 1)
        low, high = self.knots.gather(1, at - 1), self.knots.gather(1, at)
        return (at - 1 + ((values - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)) * RARITY_STEP

    def __call__(self, found: Tensor) -> Tensor:
        """(K, B, H, W) -> the same; 0 for a map that is constant on normal images."""
        knots, last = self.knots, self.knots.shape[1] - 1
        flat = found.flatten(1)
        low, top, bend = knots[:, :1], knots[:, -1:], knots[:, RARITY_BEND][:, None]
        span = (top - low).clamp_min(1e-12)
        place = ((flat - low) * ((RARITY_TABLE - 1) / span)).clamp(0, RARITY_TABLE - 1.001)
        at = place.long()
        least, steps = self.table[:, :-1], self.table.diff(dim=1)
        told = least.gather(1, at) + (place - at) * steps.gather(1, at)
        run = torch.maximum(top - bend, 0.01 * (top - low)).clamp_min(1e-12)
        told += (flat - top).clamp_min(0) * ((last - RARITY_BEND) * RARITY_STEP / run)
        varies = (top > low).to(told.dtype)
        return (told * varies).view_as(found)


def left_out(distance: Tensor, n: int, share: float = 1.0) -> Tensor:
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


@dataclass(frozen=True)
class ResidualMap:
    """Reconstruction difference in units of what normal images leave behind at that pixel.

    (root of the smoothed (x - x̂)² - mean) / deviation, both of the training images at that pixel,
    each drawn half-way to the whole picture's.
    """

    mean: Tensor  # (H, W)
    std: Tensor  # (H, W)

    @staticmethod
    def raw(e: Evidence) -> Tensor:
        """The root of the smoothed reconstruction map, (B, H, W), intensity."""
        return (ResidualMap._smoothed(e) + FLOOR).sqrt()

    @staticmethod
    def _smoothed(e: Evidence) -> Tensor:
        return smooth(reconstruction_map(e), max(0.8, e.x.shape[-1] / 64))

    @classmethod
    def fit(cls, moments: Moments) -> "ResidualMap":
        """From the moments of `raw` maps flattened to (B, H·W, 1)."""
        side = round(moments.mean().shape[0] ** 0.5)
        mean = moments.mean()[:, 0].view(side, side)
        variance = moments.covariance()[:, 0, 0].clamp_min(0).view(side, side)
        pooled = variance.mean() + 1e-8
        return cls(mean.float(), (0.5 * variance + 0.5 * pooled).sqrt().float())

    def __call__(self, e: Evidence) -> Tensor:
        """(B, H, W), standard deviations."""
        smoothed = self._smoothed(e)
        if native.suits(smoothed):
            return native.root_deviations(smoothed, FLOOR, self.mean, self.std)
        return ((smoothed + FLOOR).sqrt() - self.mean) / self.std


@dataclass(frozen=True)
class SpatialMap:
    """Mahalanobis distance of local encoder features from the normal ones at the same place.

    PaDiM (Defard et al. 2020) on the VAE's own encoder. The covariance at a place is drawn to the
    one pooled over all places, by the `shrinkage` under which left-out training images are
    likeliest: aligned parts keep their place-wise one, textures and loose parts the pooled one.
    """

    mean: Tensor  # (L, D)
    whiten: Tensor  # (L, D, D): rows W with W Wᵀ = Σ⁻¹
    mix: Tensor  # (C, D) fixed random orthonormal projection of the stacked channels
    n: int
    shrinkage: float

    @staticmethod
    def projection(channels: int, seed: int = 0) -> Tensor:
        """(C, min(C, 64)), orthonormal columns, the same for the same seed."""
        gen = torch.Generator().manual_seed(seed)
        square = torch.randn(channels, channels, generator=gen, dtype=torch.float64)
        return torch.linalg.qr(square)[0][:, :SPATIAL_CHANNELS].float().contiguous()

    @staticmethod
    def local(e: Evidence, mix: Tensor) -> Tensor:
        """Local feature vectors (B, L, D) at L = h·w places, h a quarter of the side.

        The three finest maps beside each other at that size, mixed by `mix`. Mixing and resizing
        are both linear: what comes first changes nothing, and so it is what makes less of them.
        """
        side, found, parts = max(e.x.shape[-1] // 4, 2), e.features[:3], []
        widths = [f.shape[1] for f in found]
        if native.mixes(found, mix, side):
            return native.local_vectors(found, _packed(mix, *widths), side)
        for f, part in zip(found, mix.split(widths), strict=True):
            small = F.adaptive_avg_pool2d(f, side) if f.shape[-1] > side else f
            mixed = small.permute(0, 2, 3, 1).to(mix.dtype) @ part
            if mixed.shape[1] < side:
                mixed = _wide(mixed, side)
            parts.append(mixed)
        out = parts[0]
        for part in parts[1:]:
            out += part  # no more memory
        return out.flatten(1, 2)

    @classmethod
    def fit(cls, halves: tuple[Moments, Moments], mix: Tensor) -> "SpatialMap":
        """From the moments of `local` vectors of the two halves of the training images."""
        best = min(SHRINKAGES, key=lambda s: _cross_entropy(halves, s))
        whole = halves[0] + halves[1]
        whiten = _whitener(_shrunk(whole.covariance(), best))
        return cls(whole.mean().float(), whiten.float(), mix.cpu(), whole.n, best)

    def __call__(self, e: Evidence, leave_out: bool = False) -> Tensor:
        """Root mean squared distance, (B, h, w), in standard deviations of a feature.

        `leave_out` corrects the distances of the training images themselves.
        """
        v = self.local(e, self.mix)
        if v.shape[2] == native.DIMENSIONS and native.suits(v):
            d = native.place_distances(v, self.mean, self.packed)
        else:
            d = torch.bmm((v - self.mean).transpose(0, 1), self.whiten).square().sum(dim=2).T
        if leave_out:
            d = left_out(d, self.n, 1 - self.shrinkage)
        side = round(d.shape[1] ** 0.5)
        return (d / v.shape[2] + FLOOR).sqrt().unflatten(1, (side, side))

    @cached_property
    @torch.inference_mode(mode=False)
    def packed(self) -> Tensor:
        """The rows of `whiten`, which is upper triangular, as the compiled loops take them."""
        return native.packed_triangles(self.whiten)


@lru_cache(maxsize=4)
@torch.inference_mode(mode=False)
def _packed(mix: Tensor, *widths: int) -> list[Tensor]:
    """The parts (C, D) of a mix for maps of so many channels, as the compiled loops take them."""
    return [native.packed_mix(part) for part in mix.split(widths)]


def _wide(vectors: Tensor, side: int) -> Tensor:
    """Vectors (B, h, w, D) at S x S places, bilinear."""
    planes = vectors.permute(0, 3, 1, 2)
    wide = F.interpolate(planes, size=(side, side), mode="bilinear", align_corners=False)
    return wide.permute(0, 2, 3, 1)


def _shrunk(cov: Tensor, shrinkage: float) -> Tensor:
    pooled = cov.mean(dim=0)
    ridge = 1e-3 * pooled.diagonal().mean() * torch.eye(pooled.shape[0], dtype=cov.dtype)
    return (1 - shrinkage) * cov + shrinkage * pooled + ridge


def _whitener(cov: Tensor) -> Tensor:
    """(L, D, D) matrices W with W Wᵀ = Σ⁻¹, by triangular solves."""
    lower = torch.linalg.cholesky(cov)
    eye = torch.eye(cov.shape[-1], dtype=cov.dtype).expand_as(cov)
    return torch.linalg.solve_triangular(lower, eye, upper=False).transpose(1, 2).contiguous()


def _cross_entropy(halves: tuple[Moments, Moments], shrinkage: float) -> float:
    """Twice the Gaussian cross-entropy of one half under the other's fit, both ways, summed."""
    total = 0.0
    for fitted, held in (halves, halves[::-1]):
        whiten = _whitener(_shrunk(fitted.covariance(), shrinkage))
        gap = held.mean() - fitted.mean()
        spread = held.covariance() + gap[:, :, None] * gap[:, None, :]
        trace = (whiten * (spread @ whiten)).sum()
        total += float(trace - 2 * whiten.diagonal(dim1=1, dim2=2).log().sum())
    return total
