"""Convolutions for scoring on a CPU: one operation with their SiLU, weights laid out for it once.

torch lays the weights of a convolution out anew at each call, which for a single image takes longer
than the arithmetic. oneDNN takes them ready, and the SiLU with them.
"""

from typing import Any

import torch
from torch import Tensor, nn

Convolution = nn.Conv2d | nn.ConvTranspose2d


def can_pack(device: torch.device) -> bool:
    """Whether this torch has oneDNN's operations for convolutions on the device."""
    ops = torch.ops.mkldnn
    names = ("_reorder_convolution_weight", "_reorder_convolution_transpose_weight")
    ready = torch.backends.mkldnn.is_available() and all(hasattr(ops, name) for name in names)
    return device.type == "cpu" and ready


class Packed(nn.Module):
    """A convolution without gradients, maps (B, C, h, w) channels last in memory, with its SiLU."""

    def __init__(self, conv: Convolution) -> None:
        super().__init__()
        ops: Any = torch.ops.mkldnn
        up = isinstance(conv, nn.ConvTranspose2d)
        kind = "convolution_transpose" if up else "convolution"
        spatial: list[Any] = [list(map(int, conv.padding))]
        spatial += [[*conv.output_padding]] if up else []
        spatial += [[*conv.stride], [*conv.dilation], conv.groups]
        self.bias = conv.bias  # stays a parameter, which tells others the type and the device
        self.weight = getattr(ops, f"_reorder_{kind}_weight")(conv.weight, *spatial)
        self.operation = getattr(ops, f"_{kind}_pointwise")
        self.spatial = spatial

    def forward(self, h: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C', h', w')."""
        out: Tensor = self.operation(h, self.weight, self.bias, *self.spatial, "swish", [], "")
        return out


def pack(block: nn.Sequential) -> None:
    """Replace convolutions that a (folded) batch norm and a SiLU follow, each together with these.

    Those of 1 x 1 stay as they are: some are slower with their weights laid out.
    """
    for i in range(len(block) - 2):
        conv, folded = block[i], isinstance(block[i + 1], nn.Identity)
        if isinstance(conv, Convolution) and folded and isinstance(block[i + 2], nn.SiLU):
            block[i], block[i + 2] = Packed(conv), nn.Identity()
