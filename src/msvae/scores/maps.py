"""Where in the picture: pure functions Evidence -> (B, H, W), and the two maps that are fitted.

Higher is more anomalous. `reconstruction_map` is in squared intensity, `inspection` in log-odds;
the fitted maps are distances from what normal images show at the same place.
"""

from dataclasses import dataclass
from math import log

import torch
from torch import Tensor
from torch.nn import functional as F

from msvae.core.evidence import Evidence
from msvae.ops.filters import gaussian_blur, place_means, resize_bilinear
from msvae.scores.moments import (
    Moments,
    cross_entropy,
    leave_one_out,
    shrunk_covariance,
    whitener,
)

SPATIAL_CHANNELS = 64
SHRINKAGES = (0.02, 0.1, 0.3, 0.6, 0.95)
FLOOR = 1e-8
RARITY_KNOTS = 65
RARITY_STEP = log(1000) / (RARITY_KNOTS - 1)  # nats from knot to knot: the last is 1 place in 1000
RARITY_TABLE = 2048
RARITY_BEND = round(log(50) / RARITY_STEP)  # the knot that 1 place in 50 reaches
SHARES = (0.005, 0.02, 0.05, 0.1)  # of the places: the mean over one of them is a map's score
USUAL = SHARES.index(0.02)  # where nothing tells which is best


def reconstruction_map(e: Evidence) -> Tensor:
    """Mean over the channels of (x - x̂)², (B, H, W), squared intensity: the seed method's heatmap."""
    return (e.x - e.recon).square().mean(dim=1)


def signed_difference(e: Evidence) -> Tensor:
    """x - x̂ in luma, (B, H, W), intensity: above 0 where the image is brighter than expected."""
    return (e.x - e.recon).mean(dim=1)


def inspection(e: Evidence) -> Tensor:
    """The segmenter's log-odds of a defect, smoothed, (B, H, W); zeros without a segmenter."""
    if e.segmentation.shape[-1] == 0:
        return torch.zeros_like(e.x[:, 0])
    return gaussian_blur(e.segmentation, max(int(e.x.shape[-1]) / 64, 0.5))


def at_size(coarse: Tensor, side: int, shift: tuple[float, float] = (0, 0)) -> Tensor:
    """A coarse map (B, h, w) at S x S pixels, smoothed by a 32nd of the side (as PaDiM).

    It is drawn `shift` places further up and left.
    """
    return gaussian_blur(resize_bilinear(coarse, side, shift), side / 32)


@dataclass(frozen=True)
class Rarity:
    """How rare a value is among the places of the training images: -log of the share reaching it.

    In nats, so that maps of different units can be added; nominal, since new normal images are not
    the training images: what the sum means is left to the conformal part. Linear between knots,
    and beyond the last of them with the slope of the upper 2 % (an exponential tail).
    """

    lowest: Tensor  # (K,) of K maps: the first knot
    highest: Tensor  # (K,) the last
    slope: Tensor  # (K,) nats a unit beyond it
    table: Tensor  # (K, T): the rarity of T values evenly spaced from the first knot to the last

    @classmethod
    def fit(cls, values: Tensor) -> "Rarity":
        """From values (N, K) of maps at places of normal images.

        The knots are the values that a share exp(-j `RARITY_STEP`) of them reaches. To look a value
        up in a table is twenty times as fast as to search for it among the knots.
        """
        reached = torch.arange(RARITY_KNOTS, dtype=torch.float64).mul(-RARITY_STEP).exp()
        ordered = values.double().sort(dim=0).values
        at = ((1 - reached) * (len(ordered) - 1)).round().long()
        knots = ordered[at].T.float().contiguous()
        lowest, highest, bend = knots[:, 0], knots[:, -1], knots[:, RARITY_BEND]
        share = torch.linspace(0, 1, RARITY_TABLE)
        evenly = lowest[:, None] + (highest - lowest)[:, None] * share
        run = torch.maximum(highest - bend, 0.01 * (highest - lowest)).clamp_min(1e-12)
        varies = (highest > lowest).float()
        slope = (RARITY_KNOTS - 1 - RARITY_BEND) * RARITY_STEP / run
        table = _interpolated(knots, evenly.contiguous()) * varies[:, None]
        return cls(lowest, highest, slope * varies, table)

    def __call__(self, maps: Tensor) -> Tensor:
        """(B, K, H, W) -> (B, K, H, W); 0 for a map that is constant on normal images."""
        shape, count = (1, -1, 1, 1), self.table.shape[1]
        lowest, highest, slope = (t.view(shape) for t in (self.lowest, self.highest, self.slope))
        scale = (count - 1) / (highest - lowest).clamp_min(1e-12)
        place = ((maps - lowest) * scale).clamp(0, count - 1.001)
        # One index into all tables, one behind the other.
        first = torch.arange(len(self.table), device=maps.device).view(shape) * count
        at = place.floor()
        cell = at.long() + first
        below, above = self.table.flatten()[cell], self.table.flatten()[cell + 1]
        inside = below + (place - at) * (above - below)
        return inside + (maps - highest).clamp_min(0) * slope


def _interpolated(knots: Tensor, values: Tensor) -> Tensor:
    """The rarity (K, N) of values between the knots (K, Q); for equal knots the last of them."""
    at = torch.searchsorted(knots, values).clamp(1, knots.shape[1] - 1)
    low, high = knots.gather(1, at - 1), knots.gather(1, at)
    return (at - 1 + ((values - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)) * RARITY_STEP


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
        return (
            gaussian_blur(reconstruction_map(e), max(0.8, int(e.x.shape[-1]) / 64)) + FLOOR
        ).sqrt()

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
        return (self.raw(e) - self.mean) / self.std


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
    # Places by which the distances lie too far down and right: a stage of stride 2 learns to which
    # of its pixels it looks most, so that where they lie is measured.
    too_low: float = 0.0
    too_right: float = 0.0

    @staticmethod
    def projection(channels: int, seed: int = 0) -> Tensor:
        """(C, min(C, 64)), orthonormal columns, the same for the same seed."""
        gen = torch.Generator().manual_seed(seed)
        square = torch.randn(channels, channels, generator=gen, dtype=torch.float64)
        return torch.linalg.qr(square)[0][:, :SPATIAL_CHANNELS].float().contiguous()

    @staticmethod
    def local(e: Evidence, mix: Tensor) -> Tensor:
        """Local feature vectors (B, L, D) at L = h·w places, h a quarter of the side.

        The means of the three finest maps over each place, beside each other, mixed by `mix`; as
        both are linear, each is mixed by itself, and all are added up.
        """
        pixels, features = int(e.x.shape[-1]), e.features[:3]
        side, parts = max(pixels // 4, 2), mix.split([int(f.shape[1]) for f in features])
        placed = [_placed(f, part, side, pixels) for f, part in zip(features, parts, strict=True)]
        return sum(placed[1:], placed[0]).flatten(2).transpose(1, 2)

    @classmethod
    def fit(cls, halves: tuple[Moments, Moments], mix: Tensor) -> "SpatialMap":
        """From the moments of `local` vectors of the two halves of the training images."""
        best = min(SHRINKAGES, key=lambda s: cross_entropy(halves, s))
        whole = halves[0] + halves[1]
        whiten = whitener(shrunk_covariance(whole.covariance(), best))
        return cls(whole.mean().float(), whiten.float(), mix.cpu(), whole.n, best)

    def __call__(self, e: Evidence, leave_out: bool = False) -> Tensor:
        """Root mean squared distance, (B, h, w), in standard deviations of a feature.

        `leave_out` corrects the distances of the training images themselves.
        """
        v = self.local(e, self.mix)
        whitened = (v - self.mean).transpose(0, 1) @ self.whiten
        square, width = whitened.square().mean(dim=2).transpose(0, 1), int(v.shape[2])
        if leave_out:
            square = leave_one_out(square * width, self.n, 1 - self.shrinkage) / width
        side = round(int(v.shape[1]) ** 0.5)
        return (square + FLOOR).sqrt().unflatten(1, (side, side))

    def drawn(self, e: Evidence, leave_out: bool = False) -> Tensor:
        """The distances where they belong in the picture, (B, H, W), as `at_size` draws them."""
        shift = (self.too_low, self.too_right)
        return at_size(self(e, leave_out), int(e.x.shape[-1]), shift)


def _placed(maps: Tensor, mix: Tensor, side: int, pixels: int) -> Tensor:
    """Encoder maps (B, C, h, w) of `pixels` a side, mixed by (C, D), at places (B, D, S, S)."""
    kernel, means = mix.T[:, :, None, None].to(maps), place_means(int(maps.shape[-1]), pixels, side)
    every, beyond = divmod(int(maps.shape[-1]), side)
    if beyond == 0:  # a strided convolution takes the means and mixes at once
        taps = means[0, : every + 1].to(maps)
        padded = F.pad(maps, (0, 1, 0, 1), mode="replicate")
        return F.conv2d(padded, kernel * (taps[:, None] * taps), stride=every)
    return means.to(maps) @ (F.conv2d(maps, kernel) @ means.T.to(maps))
