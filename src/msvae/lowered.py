"""Layers for training in bfloat16 on a CPU, where time goes into moving numbers about.

Gradients of wide convolutions are matrix products: where there are many channels and few places,
oneDNN spends most of the gradient of the weights on laying it out. A product with the windows
beneath the kernel (im2col; Chellapilla et al. 2006) takes a fifth to three quarters of the time.
Weights may have a `low` copy in bfloat16, which the optimiser keeps. And where there are `native`
loops, batch norm and SiLU are one operation.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from msvae import native

# Pairs of channels at least, and places of the coarser map at most, for which the windows cost less
# than they spare (LOG.md).
WIDE, PLACES = 8192, 2048


class Lowered:
    """A layer whose weight may have a copy in bfloat16 that stands for it while it trains."""

    weight: Tensor
    low: Tensor | None = None

    def trained(self) -> Tensor:
        """The copy, where there is one and gradients are wanted, else the weight itself."""
        return self.low if self.low is not None and torch.is_grad_enabled() else self.weight


class Linear(Lowered, nn.Linear):
    """torch's."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, N) -> (B, M)."""
        return F.linear(x, self.trained(), self.bias)


class Conv2d(Lowered, nn.Conv2d):
    """torch's with a square kernel, with faster gradients where it is wide."""

    def __init__(
        self, width_in: int, width: int, size: int, stride: int, padding: int, bias: bool
    ) -> None:
        super().__init__(width_in, width, size, stride, padding, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C', h', w')."""
        if _pays(self, x, self.stride[0] ** 2):
            return _by_products(self, x, up=False)
        return self._conv_forward(x, self.trained(), self.bias)


class ConvTranspose2d(Lowered, nn.ConvTranspose2d):
    """The same for the transposed one."""

    def __init__(
        self, width_in: int, width: int, size: int, stride: int, padding: int, bias: bool
    ) -> None:
        super().__init__(width_in, width, size, stride, padding, bias=bias)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(B, C, h, w) -> (B, C', h', w')."""
        if output_size is None and _pays(self, x, 1):
            return _by_products(self, x, up=True)
        if output_size is None:
            weight, padding = self.trained(), cast("tuple[int, ...]", self.padding)
            return F.conv_transpose2d(x, weight, self.bias, self.stride, padding)
        return super().forward(x, output_size)


def _pays(conv: Conv2d | ConvTranspose2d, x: Tensor, smaller: int) -> bool:
    """Whether products are faster; the coarser map has so many times fewer places than x, about."""
    if x.dtype != torch.bfloat16 or x.device.type != "cpu" or conv.bias is not None:
        return False
    wide = conv.in_channels * conv.out_channels >= WIDE
    few = x.numel() // (x.shape[1] * smaller) <= PLACES
    return wide and few and torch.is_grad_enabled() and x.requires_grad


def _by_products(conv: Conv2d | ConvTranspose2d, x: Tensor, up: bool) -> Tensor:
    weight, apply = conv.trained().to(x.dtype), cast("Any", _ByProducts.apply)
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
    if native.suits(maps, torch.bfloat16):
        return native.windows(maps, size, stride, padding)
    padded = F.pad(maps.permute(0, 2, 3, 1), (0, 0, *[padding] * 4)).contiguous()
    b, high, wide, c = padded.shape
    places = [(side - size) // stride + 1 for side in (high, wide)]
    line = wide * c  # a row of a window lies in one piece
    steps = (high * line, stride * line, stride * c, line, 1)
    return padded.as_strided((b, *places, size, size * c), steps).reshape(-1, size * size * c)


class Stage(nn.Sequential):
    """Layers one after the other, a batch norm and the SiLU behind it as one where that is faster."""

    def forward(self, h: Tensor) -> Tensor:
        """(B, C, h, w) -> what the last layer gives."""
        layers = [*self]
        while layers:
            layer = layers.pop(0)
            if layers and isinstance(layers[0], nn.SiLU) and _joins(layer, h):
                layers.pop(0)
                h = cast("Any", _NormSiLU.apply)(h, layer.weight, layer.bias, layer)
            else:
                h = layer(h)
        return h


def _joins(norm: nn.Module, h: Tensor) -> bool:
    """Whether a layer is a batch norm that can be computed with its SiLU, of maps h."""
    if not isinstance(norm, nn.BatchNorm2d) or native.loops() is None:
        return False
    fits = norm.num_features % native.LINE == 0 and norm.weight.dtype == torch.float32
    learns = norm.training and norm.momentum is not None and torch.is_grad_enabled()
    here = h.dtype == torch.bfloat16 and h.device.type == "cpu" and h.numel() > h.shape[1]
    return fits and learns and here and h.is_contiguous(memory_format=torch.channels_last)


class _NormSiLU(torch.autograd.Function):
    """SiLU of the batch norm (Ioffe & Szegedy 2015) of maps (B, C, h, w) in bfloat16, channels last.

    With u = a x + b, what comes from above is d = g σ(u) (1 + u (1 - σ(u))), and what goes below
    a (d - mean(d) - x̂ mean(d x̂)), x̂ the normalised maps. Of the maps only x is kept for it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, norm: nn.BatchNorm2d) -> Tensor:
        mean, variance, seen = norm.running_mean, norm.running_var, norm.num_batches_tracked
        assert mean is not None
        assert variance is not None
        assert seen is not None
        assert norm.momentum is not None
        running = mean, variance
        out, ctx.told = native.norm_silu(x, (weight, bias), running, norm.momentum, norm.eps)
        seen.add_(1)
        ctx.save_for_backward(x)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        above = gradient.contiguous(memory_format=torch.channels_last)
        return *native.norm_silu_gradient(x, above, ctx.told), None


def painted_error(colours: Tensor, x: Tensor) -> Tensor:
    """Mean of (sigmoid(pixel shuffle of the colours) - x)², ().

    Of maps (B, 12, h, w) and images (B, 3, 2 h, 2 w).
    """
    fits = colours.dtype == torch.bfloat16 and colours.shape[1] == 12 and x.shape[1] == 3
    if fits and native.suits(x) and colours.is_contiguous(memory_format=torch.channels_last):
        error: Tensor = cast("Any", _PaintedError.apply)(colours, x)
        return error
    return F.mse_loss(F.pixel_shuffle(colours, 2).float().sigmoid(), x)


class _PaintedError(torch.autograd.Function):
    """The same in one pass over what would be five maps."""

    @staticmethod
    def forward(ctx: Any, colours: Tensor, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        ctx.save_for_backward(colours, x)
        return native.painted_error(colours, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        colours, x = ctx.saved_tensors
        return native.painted_error_gradient(colours, x, float(gradient)), None
