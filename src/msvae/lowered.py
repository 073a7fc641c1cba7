"""Convolutions for training in bfloat16 on a CPU: gradients of wide ones as matrix products.

Where there are many channels and few places, oneDNN spends most of the gradient of the weights on
laying it out. A product with the windows beneath the kernel (im2col; Chellapilla et al. 2006) takes
a fifth to three quarters of the time.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Pairs of channels at least, and places of the coarser map at most, for which the windows cost less
# than they spare (LOG.md).
WIDE, PLACES = 8192, 2048


class Conv2d(nn.Conv2d):
    """torch's with a square kernel, with faster gradients where it is wide."""

    def __init__(
        self, width_in: int, width: int, size: int, stride: int, padding: int, bias: bool
    ) -> None:
        super().__init__(width_in, width, size, stride, padding, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C', h', w')."""
        if _pays(self, x, self.stride[0] ** 2):
            return _by_products(self, x, up=False)
        return super().forward(x)


class ConvTranspose2d(nn.ConvTranspose2d):
    """The same for the transposed one."""

    def __init__(
        self, width_in: int, width: int, size: int, stride: int, padding: int, bias: bool
    ) -> None:
        super().__init__(width_in, width, size, stride, padding, bias=bias)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(B, C, h, w) -> (B, C', h', w')."""
        if output_size is None and _pays(self, x, 1):
            return _by_products(self, x, up=True)
        return super().forward(x, output_size)


def _pays(conv: Conv2d | ConvTranspose2d, x: Tensor, smaller: int) -> bool:
    """Whether products are faster; the coarser map has so many times fewer places than x, about."""
    if x.dtype != torch.bfloat16 or x.device.type != "cpu" or conv.bias is not None:
        return False
    wide = conv.in_channels * conv.out_channels >= WIDE
    few = x.numel() // (x.shape[1] * smaller) <= PLACES
    return wide and few and torch.is_grad_enabled() and x.requires_grad


def _by_products(conv: Conv2d | ConvTranspose2d, x: Tensor, up: bool) -> Tensor:
    weight, apply = conv.weight.to(x.dtype), cast("Any", _ByProducts.apply)
    out: Tensor = apply(x, weight, conv.stride[0], conv.padding[0], up)
    return out


class _ByProducts(torch.autograd.Function):
    """A convolution (`up`: a transposed one) of maps (B, C, h, w), without bias.

    The weights (C', C, k, k) lead from the finer map's C channels to the coarser's C', or back up.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int, padding: int, up: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding, ctx.up = stride, padding, up
        convolve = F.conv_transpose2d if up else F.conv2d
        return convolve(x, weight, None, stride, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        coarse, fine = (x, gradient) if ctx.up else (gradient, x)
        coarse_width, fine_width, size = weight.shape[:3]
        columns = windows(fine, size, ctx.stride, ctx.padding)
        rows = coarse.permute(0, 2, 3, 1).reshape(-1, coarse_width)
        # Copied first: a product with a transposed matrix of 2,000 rows takes twice as long.
        to_weight = (rows.T.contiguous() @ columns).view(coarse_width, size, size, fine_width)
        if ctx.up:
            flat = columns @ weight.permute(0, 2, 3, 1).reshape(coarse_width, -1).T
            to_x = flat.view(len(x), *x.shape[2:], coarse_width).permute(0, 3, 1, 2)
        else:
            pairs = ([n, n] for n in (ctx.stride, ctx.padding, 1, 0))
            stride, padding, dilation, output_padding = pairs
            to_x = torch.ops.aten.convolution_backward(
                *(gradient, x, weight, None, stride, padding, dilation, False, output_padding, 1),
                [True, False, False],
            )[0]
        return to_x, to_weight.permute(0, 3, 1, 2), None, None, None


def windows(maps: Tensor, size: int, stride: int, padding: int) -> Tensor:
    """What of maps (B, C, h, w) lies beneath a kernel, place by place, (B h' w', size size C)."""
    padded = F.pad(maps.permute(0, 2, 3, 1), (0, 0, *[padding] * 4)).contiguous()
    b, high, wide, c = padded.shape
    places = [(side - size) // stride + 1 for side in (high, wide)]
    line = wide * c  # a row of a window lies in one piece
    steps = (high * line, stride * line, stride * c, line, 1)
    return padded.as_strided((b, *places, size, size * c), steps).reshape(-1, size * size * c)
