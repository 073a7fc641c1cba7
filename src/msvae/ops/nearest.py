"""Distances of many vectors to the nearest of many others; pure functions."""

import torch
from torch import Tensor


def least_squares(queries: Tensor, banks: Tensor) -> Tensor:
    """Squared distance of each query (B, L, D) to the nearest vector of its banks (B, A, M, D), (B, L).

    |q - b|² = |q|² + (q, 1) · (-2 b, |b|²), one bank after the other: the table of all products at
    once would not stay in the processor's cache.
    """
    asked = torch.cat([queries, torch.ones_like(queries[..., :1])], dim=2)
    square = banks.square().sum(dim=3, keepdim=True)
    rows = torch.cat([-2 * banks, square], dim=3)
    least = [(asked @ bank.transpose(-1, -2)).amin(dim=2) for bank in rows.unbind(dim=1)]
    return torch.stack(least).amin(dim=0) + queries.square().sum(dim=2)
