"""What each part of the fused score is worth: each score left out, and other ways to join them all.

Nothing is fitted anew: the frozen fusion reads the same scores with one of them silenced, or its
surprisals are joined otherwise.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import log

import numpy as np

from msvae.scores.catalog import FUSED_SCORES
from msvae.scores.density import Floats
from msvae.scores.fusion import Fusion
from msvae.scores.verdict import fused_columns

WITHOUT = "without {}"  # the fused score, with one score silenced
# Other ways to join weighted surprisals (B, K), nats.
JOINS: dict[str, Callable[[Floats], Floats]] = {
    "sum (Fisher)": lambda nats: nats.sum(axis=1),
    "greatest (least p)": lambda nats: nats.max(axis=1),
    "harmonic mean of p": lambda nats: np.logaddexp.reduce(nats, axis=1) - log(nats.shape[1]),
}
STOUFFER = "weighted quantiles (Stouffer)"


def variants(fusion: Fusion, scores: Mapping[str, Floats]) -> dict[str, Floats]:
    """Other fused scores (N,) of images, from every one of their `scores` (N,)."""
    columns, out = fused_columns(scores), {}
    for column, name in enumerate(FUSED_SCORES):
        weights = fusion.weights.copy()
        weights[column] = 0
        out[WITHOUT.format(name)] = replace(fusion, weights=weights)(columns)
    nats = fusion.surprisals(columns)
    out |= {name: join(nats) for name, join in JOINS.items()}
    weights = fusion.weights[fusion.quantiles.columns]
    length = max(float(np.sqrt(np.square(weights).sum())), 1e-12)
    out[STOUFFER] = fusion.standardised(columns) @ weights / length
    return out
