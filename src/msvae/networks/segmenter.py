"""The defect segmenter: x with imagined defects ─► log-odds of a defect at each pixel (B,H,W)."""

from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F

from msvae.networks.blocks import stage
from msvae.ops.filters import resize_bilinear


class DefectSegmenter(nn.Module):
    """Marks defects: a small U-Net (Ronneberger et al. 2015) from half the resolution downwards.

    It never saw a real one: it learns to find those that `transforms.defects` paints on normal images.
    """

    WIDTHS = (32, 64, 96, 128)
    UP_WIDTHS = (32, 64, 96, 96)  # channels on the way back up

    def __init__(self) -> None:
        """For images of any size that is a multiple of 16."""
        super().__init__()
        first = nn.Conv2d(3, self.WIDTHS[0], 4, 2, padding=1, bias=False)
        norm, below = nn.BatchNorm2d(self.WIDTHS[0]), stage(self.WIDTHS[0], self.WIDTHS[0], 1)
        self.downs = nn.ModuleList([nn.Sequential(first, norm, nn.SiLU(), below)])
        for wide, narrow in pairwise(self.WIDTHS):
            self.downs.append(nn.Sequential(stage(wide, narrow, 2), stage(narrow, narrow, 1)))
        widths = zip(self.WIDTHS, self.UP_WIDTHS, strict=True)
        self.across = nn.ModuleList([nn.Conv2d(a, b, 1) for a, b in widths])
        self.merge = nn.ModuleList([nn.Conv2d(b, a, 1) for a, b in pairwise(self.UP_WIDTHS)])
        self.ups = nn.ModuleList([stage(a, a, 1) for a in self.UP_WIDTHS[:-1]])
        self.to_odds = nn.Conv2d(self.UP_WIDTHS[0], 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Log-odds of a defect at each pixel, (B, S, S), of images (B, 3, S, S) in [0, 1]."""
        h, maps = x - 0.5, []
        for down in self.downs:
            h = down(h)
            maps.append(h)
        h = self.across[-1](h)
        for i in reversed(range(len(self.ups))):
            wide = F.interpolate(self.merge[i](h), size=maps[i].shape[-2:], mode="nearest")
            h = self.ups[i](wide + self.across[i](maps[i]))
        odds: Tensor = self.to_odds(h)[:, 0].float()  # of every other pixel
        return resize_bilinear(odds, int(x.shape[-1]))
