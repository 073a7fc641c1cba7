"""What made the fused score: exact Shapley values of the evidence; numpy."""

from collections.abc import Mapping
from itertools import combinations
from math import factorial

import numpy as np
from numpy.typing import NDArray

from msvae.scores.catalog import FUSED_SCORES, STATISTIC_GROUPS, STATISTICS
from msvae.scores.density import Floats
from msvae.scores.fusion import surprisal
from msvae.scores.verdict import (
    Numbers,
    Scores,
    Verdict,
    fused_columns,
    group_columns,
    statistics_of,
)

TYPICALITY = FUSED_SCORES.index("typicality")
DETAIL = STATISTICS.index("image_fine_luma")  # energy of the finest luma band of the image


def shapley(verdict: Verdict, numbers: Numbers, scores: Mapping[str, Floats]) -> Scores:
    """How much each group of evidence contributed to the fused score, (B,) each, nats.

    `numbers` (B, K) are the graph's, `scores` the verdict's on them.

    Exact Shapley values (Shapley 1953) of the squared score L², divided by L + R, where R is the
    score of the median normal image ("ordinary image"): since (L² - R²) / (L + R) + R = L, they, R
    and what "feedback" changed, where there was any, add up to the score. A group that is left out
    takes the median's value. The square is a sum, in which a score's share is its own squared
    surprisal; only the density of the statistics is a game, of four players.
    """
    fusion, density = verdict.fusion, verdict.typicality
    squares = np.square(fusion.surprisals(fused_columns(scores)))
    at_rest = np.zeros_like(fusion.weights)  # the median normal; constant scores say nothing
    varying = fusion.quantiles.columns
    at_rest[varying] = np.square(fusion.weights[varying] * surprisal(np.zeros(1)))
    z = density.quantiles(statistics_of(numbers))
    members = {
        name: np.isin(density.quantiles.columns, group_columns(name)) for name in STATISTIC_GROUPS
    }
    game = {
        coalition: _typicality_square(
            verdict, scores, density.density(_part(z, coalition, members))
        )
        for coalition in _coalitions(tuple(STATISTIC_GROUPS))
    }
    shares = dict(zip(FUSED_SCORES, (squares - at_rest).T, strict=True))
    del shares["typicality"]
    shares |= {name: _share(name, game) for name in STATISTIC_GROUPS}
    length = np.sqrt(squares.sum(axis=1))
    ordinary = np.sqrt(game[frozenset()] + at_rest.sum() - at_rest[TYPICALITY])
    both = np.maximum(length + ordinary, 1e-12)
    shares = {name: share / both for name, share in shares.items()}
    shares["ordinary image"] = ordinary
    if verdict.feedback.learned:
        shares["feedback"] = scores["fused"] - length
    return shares


def fine_detail(verdict: Verdict, numbers: Numbers) -> Floats:
    """The share of training images with less fine detail (energy of the finest luma band), (B,)."""
    from scipy.special import ndtr

    quantiles = verdict.typicality.quantiles
    at = np.flatnonzero(quantiles.columns == DETAIL)
    if not len(at):
        return np.full(len(numbers), 0.5)
    share = ndtr(quantiles(statistics_of(numbers))[:, at[0]])
    least = 1 / (quantiles.knots.shape[1] + 1)
    return np.asarray(share).clip(least, 1 - least)


def _part(z: Floats, coalition: frozenset[str], members: Mapping[str, NDArray[np.bool_]]) -> Floats:
    """The quantiles of the statistics in the coalition, the median's for the others."""
    out = np.zeros_like(z)
    for name in coalition:
        out[:, members[name]] = z[:, members[name]]
    return out


def _typicality_square(
    verdict: Verdict, scores: Mapping[str, Floats], typicality: Floats
) -> Floats:
    """The squared weighted surprisal (B,) of another typicality, the other scores as they are."""
    columns = fused_columns(scores)
    columns[:, TYPICALITY] = typicality
    return np.square(verdict.fusion.surprisals(columns)[:, TYPICALITY])


def _coalitions(players: tuple[str, ...]) -> list[frozenset[str]]:
    sizes = range(len(players) + 1)
    return [frozenset(c) for size in sizes for c in combinations(players, size)]


def _share(player: str, game: Mapping[frozenset[str], Floats]) -> Floats:
    """A player's Shapley value (B,), from what every coalition is worth."""
    n = max(map(len, game))
    gains = [
        factorial(len(c))
        * factorial(n - len(c) - 1)
        / factorial(n)
        * (game[c | {player}] - game[c])
        for c in game
        if player not in c
    ]
    return np.asarray(np.stack(gains).sum(axis=0))
