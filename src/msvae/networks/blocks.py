"""Layers that the networks share: convolution, batch norm and SiLU, down and up, and a residual."""

from itertools import pairwise
from typing import Any

import torch
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


@torch.no_grad()
def round_weights(networks: nn.Module) -> None:
    """Make every convolution's weights numbers that bfloat16 holds, batch norms folded in; in place.

    Of trained networks, which are evaluated from then on. What bfloat16 then still rounds are the
    maps: p-values move half as much, and float32 loses nothing, as all scores are fitted afterwards.
    """
    for layers in networks.modules():
        if isinstance(layers, nn.Sequential):
            for conv, norm in pairwise(layers):
                if isinstance(norm, nn.BatchNorm2d):
                    _fold(conv, norm)
    for layer in networks.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            for values in layer.parameters():
                values.copy_(values.bfloat16())


def _fold(conv: Any, norm: nn.BatchNorm2d) -> None:
    """Move the norm's scale into the convolution's weights; it then adds its shift and no more."""
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    scale = norm.weight / (variance + norm.eps).sqrt()
    shape = (1, -1, 1, 1) if isinstance(conv, nn.ConvTranspose2d) else (-1, 1, 1, 1)
    conv.weight.mul_(scale.view(shape))
    norm.bias.sub_(mean * scale).copy_(norm.bias.bfloat16())
    norm.weight.fill_(1)
    mean.zero_()
    variance.fill_(1 - norm.eps)


def _norm(width: int, batch_norm: bool) -> nn.Module:
    return nn.BatchNorm2d(width) if batch_norm else nn.Identity()
