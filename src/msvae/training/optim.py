"""Down the gradient: one step of AdamW."""

import torch
from torch import Tensor, nn


def adamw(network: nn.Module, rate: float, weight_decay: float) -> torch.optim.AdamW:
    """The optimiser of all of a network's weights (Loshchilov & Hutter 2019)."""
    return torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=weight_decay, fused=True)


def descend(optimiser: torch.optim.Optimizer, loss: Tensor, rate: float, most: float) -> None:
    """One step down the gradient of the loss, whose norm is cut off at `most`."""
    group = optimiser.param_groups[0]
    group["lr"] = rate
    optimiser.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(group["params"], most, foreach=True)
    optimiser.step()
