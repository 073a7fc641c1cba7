"""Random changes of a batch that leave a normal image normal; every draw from the generator given."""

import torch
from torch import Tensor
from torch.nn import functional as F

from msvae.core.config import AugmentConfig


def augment(x: Tensor, config: AugmentConfig, generator: torch.Generator) -> Tensor:
    """Shifted, mirrored and colour-jittered copies of images (B, 3, S, S) in [0, 1]."""
    if config.crop or config.flip_horizontal or config.flip_vertical:
        x = _move(x, config, generator)
    return _jitter(x, config.jitter, generator) if config.jitter else x


def _coin(b: int, enabled: bool, generator: torch.Generator) -> Tensor:
    return (torch.rand(b, 1, generator=generator) < 0.5) & enabled


def _move(x: Tensor, config: AugmentConfig, generator: torch.Generator) -> Tensor:
    """One gather does shift and mirror at once; a loop over the images would cost more than conv."""
    b, _, _, side = x.shape
    pad = min(round(config.crop * side), side - 1)
    start = torch.randint(0, 2 * pad + 1, (2, b, 1), generator=generator)
    down = _coin(b, config.flip_vertical, generator)
    across = _coin(b, config.flip_horizontal, generator)
    # A few numbers for each image: a copy of more would wait for all that a GPU has to do.
    start, down, across = (t.to(x.device) for t in (start, down, across))
    at, each = (torch.arange(n, device=x.device) for n in (side, b))
    rows = torch.where(down, side - 1 - at, at) + start[0]
    cols = torch.where(across, side - 1 - at, at) + start[1]
    padded = F.pad(x, (pad, pad, pad, pad), mode="reflect") if pad else x
    wide = side + 2 * pad
    places = (each[:, None, None] * wide + rows[:, :, None]) * wide + cols[:, None, :]
    # Whole pixels by one index: a third of the time of three indices.
    pixels = padded.permute(0, 2, 3, 1).reshape(-1, x.shape[1]).index_select(0, places.flatten())
    return pixels.view(b, side, side, x.shape[1]).permute(0, 3, 1, 2)


def _jitter(x: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Brightness, contrast and saturation, each scaled by a factor in 1 ± strength."""
    factors = 1 + strength * (2 * torch.rand(3, len(x), 1, 1, 1, generator=generator) - 1)
    brightness, contrast, saturation = factors.to(x.device)
    x = x * brightness
    x = (x - x.mean(dim=(1, 2, 3), keepdim=True)) * contrast + x.mean(dim=(1, 2, 3), keepdim=True)
    grey = x.mean(dim=1, keepdim=True)
    return ((x - grey) * saturation + grey).clamp(0, 1)
