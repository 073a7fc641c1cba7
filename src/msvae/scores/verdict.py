"""Numbers of the graph -> every score of an image, and what is fused of them. numpy, double.

Right of the graph: no torch, no files.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import log, pi
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msvae.scores.catalog import FUSED_SCORES, GRAPH_SCORES, NUMBERS, STATISTIC_GROUPS, STATISTICS
from msvae.scores.density import Floats, Ints, TwoSided
from msvae.scores.feedback import Feedback, FeedbackInputs
from msvae.scores.fusion import Fusion

DEVIATIONS = 8.0  # of a score or statistic, at most, where feedback weighs it
Scores = dict[str, Floats]  # each (B,)
Numbers = NDArray[np.floating[Any]]  # (B, K), columns `catalog.NUMBERS`


@dataclass(frozen=True)
class WeightedSum:
    """The seed method's sum of reconstruction and Mahalanobis distance."""

    alpha: float  # weight of the reconstruction
    lowest: Floats  # (2,) reconstruction and mahalanobis on the training images
    highest: Floats  # (2,)

    def __call__(self, reconstruction: Floats, mahalanobis: Floats) -> Scores:
        """`weighted`, of min-max normalised terms, and `weighted_raw`, as literally written; (B,)."""
        pair = np.stack([reconstruction, mahalanobis], axis=1)
        unit = (pair - self.lowest) / np.maximum(self.highest - self.lowest, 1e-12)
        share = np.array([self.alpha, 1 - self.alpha])
        return {"weighted": unit.clip(0, 1) @ share, "weighted_raw": pair @ share}


@dataclass(frozen=True)
class Verdict:
    """All that makes the scores of the graph's numbers; frozen after `fit.learn`."""

    beta: float
    size: int  # values of an image, S · S · 3
    variance: float  # of the decoder: the mean squared error of the training images
    weighted: WeightedSum
    bands: TwoSided
    complexity: TwoSided
    typicality: TwoSided
    fusion: Fusion
    feedback: Feedback  # what labelled examples taught; nothing where there were none

    def __call__(self, numbers: Numbers) -> Scores:
        """Every score (B,) of the graph's numbers (B, K), columns `catalog.NUMBERS`; `fused` last."""
        scores = self.without_feedback(numbers)
        if self.feedback.learned:
            scores["fused"] = self.feedback(self.feedback_inputs(numbers, scores))
        return scores

    def without_feedback(self, numbers: Numbers) -> Scores:
        """Every score (B,) of the graph's numbers (B, K) as if nothing had been taught."""
        scores = dict(zip(GRAPH_SCORES, numbers.T.astype(np.float64), strict=False))
        statistics = statistics_of(numbers)
        error, rate = scores["reconstruction"], scores["kl"]
        distortion = 0.5 * self.size * (error / self.variance + log(2 * pi * self.variance))
        scores["elbo"] = distortion + self.beta * rate
        scores |= self.weighted(error, scores["mahalanobis"])
        scores["bands"] = self.bands(statistics[:, group_columns("residual bands")])
        scores["complexity"] = self.complexity(statistics[:, group_columns("image bands")])
        scores["typicality"] = self.typicality(statistics)
        scores["fused"] = self.fusion(fused_columns(scores))
        return scores

    def feedback_inputs(self, numbers: Numbers, scores: Scores | None = None) -> FeedbackInputs:
        """What feedback reads of the graph's numbers (B, K): deviations and the fused score.

        `scores` are those `without_feedback`, where the caller has them already.
        """
        scores = self.without_feedback(numbers) if scores is None else scores
        deviations = [
            self.fusion.standardised(fused_columns(scores)),
            self.typicality.quantiles(statistics_of(numbers)),
        ]
        features = np.concatenate(deviations, axis=1).clip(-DEVIATIONS, DEVIATIONS)
        return FeedbackInputs(features, scores["fused"])

    def taught(
        self, ordinary: FeedbackInputs, normal: FeedbackInputs, anomalous: FeedbackInputs
    ) -> "Verdict":
        """The verdict with what examples teach; see `Feedback.fit`."""
        return replace(self, feedback=Feedback.fit(ordinary, normal, anomalous))


def statistics_of(numbers: Numbers) -> Floats:
    """The columns `catalog.STATISTICS` of numbers (B, K), (B, 21)."""
    return numbers[:, [NUMBERS.index(name) for name in STATISTICS]].astype(np.float64)


def group_columns(group: str) -> Ints:
    """The columns of the statistics that belong to a group of `catalog.STATISTIC_GROUPS`."""
    return np.array([STATISTICS.index(name) for name in STATISTIC_GROUPS[group]], dtype=np.int64)


def fused_columns(scores: Mapping[str, Floats]) -> Floats:
    """The scores that are fused beside each other, (B, K), in the order of `catalog.FUSED_SCORES`."""
    return np.stack([scores[name] for name in FUSED_SCORES], axis=1)
