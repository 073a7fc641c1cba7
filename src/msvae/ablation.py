"""What each part of the fused score is worth: each score left out, and other ways to join them all.

Nothing is fitted anew: the frozen fusion reads the same scores with one of them silenced, or its
surprisals are joined otherwise.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import log

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msvae.fusion import Fusion
from msvae.scorer import EXPERTS, experts_of

WITHOUT = "without {}"  # the fused score, with one score silenced
# Other ways to join weighted surprisals (B, K), nats.
JOINS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum (Fisher)": lambda told: told.sum(dim=1),
    "greatest (least p)": lambda told: told.amax(dim=1),
    "harmonic mean of p": lambda told: told.logsumexp(dim=1) - log(told.shape[1]),
}
STOUFFER = "weighted quantiles (Stouffer)"


def variants(
    fusion: Fusion, scores: Mapping[str, NDArray[np.float64]]
) -> dict[str, NDArray[np.float64]]:
    """Other fused scores (N,) of images, from every one of their `scores` (N,)."""
    experts = experts_of({k: torch.from_numpy(scores[k]) for k in EXPERTS})
    out = {}
    for column, name in enumerate(EXPERTS):
        weights = fusion.weights.clone()
        weights[column] = 0
        out[WITHOUT.format(name)] = replace(fusion, weights=weights)(experts)
    told = fusion.surprisals(experts)
    out |= {name: join(told) for name, join in JOINS.items()}
    kept = fusion.weights[fusion.quantiles.kept]
    out[STOUFFER] = fusion.standing(experts) @ kept / kept.norm().clamp_min(1e-12)
    return {name: value.numpy() for name, value in out.items()}
