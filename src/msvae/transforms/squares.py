"""Squares painted on images, and where a map answers them: to see whether it lies where it should."""

import torch
from torch import Tensor

SHARE = 16  # of the side
STEP = 0.4  # of intensity, away from what is there
MARGIN = 0.2  # of the side, at every edge


def with_squares(x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (B, 3, S, S) in [0, 1], each with a square painted on it, and their centres (B, 2), px.

    A square is brighter than what it hides, or darker where that is bright. Pixel 0 is centred on 0.
    """
    b, side = len(x), int(x.shape[-1])
    size, edge = max(side // SHARE, 1), int(MARGIN * side)
    corner = torch.randint(edge, side - edge - size + 1, (b, 2), generator=generator).to(x.device)
    passed = torch.arange(side, device=x.device) - corner[:, :, None]
    rows, columns = ((passed >= 0) & (passed < size)).unbind(dim=1)
    square = (rows[:, :, None] & columns[:, None, :])[:, None]
    hidden = (x * square).sum(dim=(1, 2, 3)) / (3 * size**2)
    step = torch.where(hidden > 0.5, -STEP, STEP)[:, None, None, None]
    return (x + step * square).clamp(0, 1), corner + (size - 1) / 2


def centroids(change: Tensor) -> Tensor:
    """Rows and columns (B, 2) about which changes of maps (B, h, w) lie, of at least half the greatest.

    Not a number where nothing grew.
    """
    peak = change.amax(dim=(1, 2), keepdim=True)
    weights = change * (change >= peak / 2) * (peak > 0)
    total = weights.sum(dim=(1, 2))
    axes = (weights.sum(dim=3 - axis) for axis in (1, 2))
    at = [(line * torch.arange(line.shape[1]).to(line)).sum(dim=1) / total for line in axes]
    return torch.stack(at, dim=1)
