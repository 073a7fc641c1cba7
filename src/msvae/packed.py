"""Convolutions for scoring on a CPU: one operation with their SiLU, weights laid out for it once.

torch lays the weights of a convolution out anew at each call, which for a single image takes longer
than the arithmetic. oneDNN takes them ready, and the SiLU with them.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

Convolution = nn.Conv2d | nn.ConvTranspose2d
# oneDNN's operations with a SiLU, for `torch.jit.trace`: it cannot record their empty list of numbers.
SCRIPT = """
def convolution(
    h: Tensor, weight: Tensor, bias: Optional[Tensor], padding: List[int], stride: List[int],
    dilation: List[int], groups: int
) -> Tensor:
    return torch.ops.mkldnn._convolution_pointwise(
        h, weight, bias, padding, stride, dilation, groups, "swish", [], ""
    )

def convolution_transpose(
    h: Tensor, weight: Tensor, bias: Optional[Tensor], padding: List[int], output_padding: List[int],
    stride: List[int], dilation: List[int], groups: int
) -> Tensor:
    return torch.ops.mkldnn._convolution_transpose_pointwise(
        h, weight, bias, padding, output_padding, stride, dilation, groups, "swish", [], ""
    )
"""


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
        self.kind = kind = "convolution_transpose" if up else "convolution"
        spatial: list[Any] = [list(map(int, conv.padding))]
        spatial += [[*conv.output_padding]] if up else []
        spatial += [[*conv.stride], [*conv.dilation], conv.groups]
        self.bias = conv.bias  # stays a parameter, which tells others the type and the device
        weight = getattr(ops, f"_reorder_{kind}_weight")(conv.weight, *spatial)
        self.register_buffer("weight", weight, persistent=False)  # as an attribute it is not traced
        self.operation = getattr(ops, f"_{kind}_pointwise")
        self.spatial = spatial

    def forward(self, h: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C', h', w')."""
        given = (h, self.weight, self.bias, *self.spatial)
        jit: Any = torch.jit
        out: Tensor = (
            getattr(_scripted(), self.kind)(*given)
            if jit.is_tracing()
            else self.operation(*given, "swish", [], "")
        )
        return out


@lru_cache(maxsize=1)
def _scripted() -> Any:
    return torch.jit.CompilationUnit(SCRIPT)


def pack(block: nn.Sequential) -> None:
    """Replace convolutions that a (folded) batch norm and a SiLU follow, each together with these.

    Those of 1 x 1 stay as they are: some are slower with their weights laid out.
    """
    for i in range(len(block) - 2):
        conv, folded = block[i], isinstance(block[i + 1], nn.Identity)
        if isinstance(conv, Convolution) and folded and isinstance(block[i + 2], nn.SiLU):
            block[i], block[i + 2] = Packed(conv), nn.Identity()
