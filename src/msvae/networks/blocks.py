"""Layers that the networks share: convolution, batch norm and SiLU, down and up, and a residual."""

from torch import Tensor, nn


def stage(width_in: int, width: int, stride: int, batch_norm: bool = True) -> nn.Sequential:
    """A 3 x 3 convolution: (B, C, h, w) -> (B, C', h / stride, w / stride)."""
    conv = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=not batch_norm)
    return nn.Sequential(conv, _norm(width, batch_norm), nn.SiLU())


def stage_up(width_in: int, width: int, batch_norm: bool = True) -> nn.Sequential:
    """A transposed 4 x 4 convolution: (B, C, h, w) -> (B, C', 2 h, 2 w)."""
    conv = nn.ConvTranspose2d(width_in, width, 4, 2, padding=1, bias=not batch_norm)
    return nn.Sequential(conv, _norm(width, batch_norm), nn.SiLU())


class Residual(nn.Module):
    """h + f(h) with one convolution: depth where the maps are small and cheap."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = stage(width, width, 1)

    def forward(self, h: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        out: Tensor = h + self.branch(h)
        return out


def _norm(width: int, batch_norm: bool) -> nn.Module:
    return nn.BatchNorm2d(width) if batch_norm else nn.Identity()
