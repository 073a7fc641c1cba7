"""Imagined defects: marks painted on normal images, with their masks, to learn from.

After CutPaste (Li et al. 2021) and DRAEM (Zavrtanik et al. 2021): blots and thin curved lines, filled
with another tone, another texture or noise. Every change is of a visible size and blurred as edges
in photographs are: sharper ones would be told by their sharpness alone. Every draw comes from the
generator that is given.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from msvae.ops.filters import gaussian_blur

LINES, BLOTS = 384, 640  # masks drawn once; a batch takes them mirrored and turned at random
NOISES = 128  # of at most 128 px; of larger ones fewer, for the memory they take
FINEST = 128  # px a side at which masks are drawn at most
SEEN = (0.0004, 0.35)  # share of the picture that a mask covers, least and most
CLEAN = 0.2  # share of images left as they are
SEGMENTS = 23  # of a curved line
VISIBLE = 0.05  # mean change of intensity from which a pixel counts as defect
COLOURED = 2.0  # mean deviation between the channels, of 255, from which images have colour


@dataclass(frozen=True)
class DefectGenerator:
    """Masks (M, 1, s, s), s <= S, and noise textures (N, 1, S, S) for images of one size S."""

    masks: Tensor
    noises: Tensor
    colour: float  # 1 where the normal images have colour, else 0: tints would betray the defects

    @classmethod
    def prepare(
        cls,
        side: int,
        coloured: bool,
        generator: torch.Generator,
        device: torch.device | None = None,
    ) -> "DefectGenerator":
        """Draw the masks, to lie on `device`; those that would hardly be seen are left out."""
        drawn = min(side, FINEST)
        masks = torch.cat([_lines(LINES, drawn, generator), _blots(BLOTS, drawn, generator)])
        share = masks.mean(dim=(1, 2))
        masks = masks[(share > SEEN[0]) & (share < SEEN[1])][:, None]
        count = min(NOISES, max(NOISES * FINEST**2 // side**2, 8))
        grain = torch.randn(count, 1, side, side, generator=generator)
        coarse = _field(count, side, max(side // 4, 2), generator)[:, None]
        noises = grain.mul_(0.4).add_(coarse.mul_(0.7))
        return cls(masks.to(device), noises.to(device), float(coloured))

    def __call__(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Spoilt copies of images (B, 3, S, S) in [0, 1], and where they were changed, (B, S, S)."""
        b, side = len(x), x.shape[-1]
        mask = _taken(self.masks, b, generator)
        if mask.shape[-1] != side:
            mask = F.interpolate(mask, size=(side, side), mode="bilinear", align_corners=False)
        filled = self._fill(x, mask, generator)
        kept = (_uniform(b, generator) >= CLEAN).to(x.device)
        opacity = (0.6 + 0.4 * _uniform(b, generator)).to(x.device)
        delta = _blurred((filled - x) * mask * kept * opacity, generator)
        spoilt = (x + delta).clamp(0, 1)
        change = gaussian_blur((spoilt - x).abs().mean(dim=1), max(side / 64, 0.5))
        return spoilt, ((change > VISIBLE) & (mask[:, 0] > 0.3)).float()

    def _fill(self, x: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
        """What stands under the mask: a step of tone with no texture, another's, noise, or its own."""
        b = len(x)
        area = mask.sum(dim=(2, 3), keepdim=True) + 1e-6
        mean = (x * mask).sum(dim=(2, 3), keepdim=True) / area
        other = _another(x, generator)
        other_mean = (other * mask).sum(dim=(2, 3), keepdim=True) / area
        brighter, size = (_uniform(b, generator).to(x.device) for _ in range(2))
        grey = mean.mean(dim=1, keepdim=True)
        room = torch.where(brighter < 0.5, 1 - grey, -grey)
        tint = torch.rand(b, 3, 1, 1, generator=generator) - 0.5
        tint = tint * (_uniform(b, generator) < 0.5) * 0.5 * self.colour
        noise = _taken(self.noises, b, generator) * 0.25 * _uniform(b, generator).to(x.device)
        own = (x - mean) * _uniform(b, generator).to(x.device)
        kind = torch.randint(6, (b, 1, 1, 1), generator=generator).to(x.device)
        texture = torch.where(kind == 2, other - other_mean, torch.zeros_like(x))
        texture = torch.where(kind == 3, noise, texture)
        texture = torch.where(kind == 4, own, texture)
        painted = mean + texture + (0.25 + 0.75 * size) * room + tint.to(x.device)
        return torch.where(kind == 5, other, painted.clamp(0, 1))


def has_colour(batches: Iterable[Tensor]) -> bool:
    """Whether images (B, 3, S, S) in [0, 1] have colour, on average over the batches."""
    deviations = [float(x.std(dim=1, correction=0).mean()) for x in batches]
    return 255 * sum(deviations) > COLOURED * len(deviations)


def varied(x: Tensor, generator: torch.Generator, lying: bool = True) -> Tensor:
    """Images (B, 3, S, S) mirrored, cropped and brightened: none is learned by heart.

    With `lying` half of them are laid on their side too.
    """
    parts = [_varied_alike(c, generator, lying) for c in x.chunk(4)]
    gain = 1 + 0.2 * (_uniform(len(x), generator).to(x.device) - 0.5)
    return (torch.cat(parts) * gain).clamp(0, 1)


def _varied_alike(x: Tensor, generator: torch.Generator, lying: bool) -> Tensor:
    side = x.shape[-1]
    zoom, *coins = torch.rand(4, generator=generator).tolist()
    size = max(int(side * (1 - 0.3 * zoom)), 4)
    top, left = torch.randint(side - size + 1, (2,), generator=generator).tolist()
    x = x[:, :, top : top + size, left : left + size]
    x = x.flip(3) if coins[0] < 0.5 else x
    x = x.flip(2) if coins[1] < 0.5 else x
    x = x.transpose(2, 3) if lying and coins[2] < 0.5 else x
    return F.interpolate(x, size=(side, side), mode="bilinear", align_corners=False)


def _uniform(b: int, generator: torch.Generator) -> Tensor:
    return torch.rand(b, 1, 1, 1, generator=generator)


def _taken(pool: Tensor, b: int, generator: torch.Generator) -> Tensor:
    """b of the pool's pictures, all mirrored or turned in the same random way."""
    taken = pool[torch.randint(len(pool), (b,), generator=generator)]
    coins = torch.rand(3, generator=generator).tolist()
    taken = taken.flip(3) if coins[0] < 0.5 else taken
    taken = taken.flip(2) if coins[1] < 0.5 else taken
    return taken.transpose(2, 3) if coins[2] < 0.5 else taken


def _another(x: Tensor, generator: torch.Generator) -> Tensor:
    """The neighbour in the batch, shifted by a random amount and mirrored or turned."""
    shift = torch.randint(x.shape[-1], (2,), generator=generator).tolist()
    other = x.roll(1, dims=0).roll(shift, dims=(2, 3))
    return other.flip(3) if torch.rand(1, generator=generator) < 0.5 else other.transpose(2, 3)


def _blurred(delta: Tensor, generator: torch.Generator) -> Tensor:
    """A quarter of the changes as sharp as drawn, the others blurred by three amounts."""
    side, parts = delta.shape[-1], []
    factor = (0.7 + 0.6 * torch.rand(4, generator=generator)).tolist()
    for part, sigma, f in zip(delta.tensor_split(4), (0.0, 0.6, 1.0, 1.6), factor, strict=True):
        if sigma and len(part):
            width = max(sigma * f * side / 64, 0.3)
            part = gaussian_blur(part.flatten(0, 1), width).view_as(part)
        parts.append(part)
    return torch.cat(parts)


def _field(b: int, side: int, cells: int, generator: torch.Generator) -> Tensor:
    """Smooth noise (b, S, S) of about `cells` bumps a side."""
    coarse = torch.randn(b, 1, cells, cells, generator=generator)
    return F.interpolate(coarse, size=(side, side), mode="bicubic", align_corners=False)[:, 0]


def _plane(side: int) -> tuple[Tensor, Tensor]:
    at = (torch.arange(side) + 0.5) / side
    return at[:, None].expand(side, side), at[None].expand(side, side)


def _between(low: float, high: float, share: Tensor) -> Tensor:
    """Log-uniform from a uniform share."""
    return (math.log(low) + share * math.log(high / low)).exp()


def _blots(b: int, side: int, generator: torch.Generator) -> Tensor:
    """Uneven round spots (b, S, S), 1.5 to 35 % of the side in radius."""
    y, x = _plane(side)
    cy, cx, size, long, turn, rough, fine, soft = torch.rand(8, b, 1, 1, generator=generator)
    radius = _between(0.015, 0.35, size)
    stretch, angle = ((long - 0.5) * 1.6).exp(), turn * math.pi
    along = ((x - cx) * angle.cos() + (y - cy) * angle.sin()) * stretch
    across = ((y - cy) * angle.cos() - (x - cx) * angle.sin()) / stretch
    inside = 1 - (along.square() + across.square()).sqrt() / radius
    uneven = 0.35 * rough * _field(b, side, 8, generator)
    uneven = uneven + 0.25 * fine * _field(b, side, 16, generator)
    uneven = uneven * (radius / 0.05).clamp(max=1)  # the smallest would fall to pieces
    edge = 0.75 / side / radius * (1.2 * soft).exp()
    return ((inside + uneven) / edge * 0.5 + 0.5).clamp(0, 1)


def _lines(b: int, side: int, generator: torch.Generator) -> Tensor:
    """Thin curved lines (b, S, S), 20 to 90 % of the side long."""
    y, x = _plane(side)
    cx, cy, turn, size, bow, thick = torch.rand(6, b, 1, generator=generator)
    cx, cy, turn = 0.1 + 0.8 * cx, 0.1 + 0.8 * cy, turn * math.pi
    half = _between(0.1, 0.45, size)
    t = torch.linspace(-1, 1, SEGMENTS + 1)
    bend = (bow - 0.5) * 0.5 * half * (1 - t.square())
    px = cx + half * t * turn.cos() - bend * turn.sin()
    py = cy + half * t * turn.sin() + bend * turn.cos()
    least = torch.full((b, side, side), torch.inf)
    for k in range(SEGMENTS):
        ex, ey = ((p[:, k + 1] - p[:, k])[:, None, None] for p in (px, py))
        wx, wy = x - px[:, k, None, None], y - py[:, k, None, None]
        s = ((wx * ex + wy * ey) / (ex.square() + ey.square() + 1e-9)).clamp(0, 1)
        least = torch.minimum(least, (wx - s * ex).square() + (wy - s * ey).square())
    width = 0.5 / side + _between(0.004, 0.035, thick)[:, :, None]
    return ((width - least.sqrt()) * side / 1.2 + 0.5).clamp(0, 1)
