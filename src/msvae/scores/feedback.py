"""What a few labelled examples teach: a direction in the statistics, on top of the fused score.

A logistic regression whose offset is the unsupervised score and whose weights have a normal prior:
without examples it changes nothing, with few it changes little (maximum a posteriori). numpy, double.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from msvae.scores.density import Floats

CLIP = 6.0  # standard deviations: one statistic far out must not outvote all others
OFFSET = (-5.0, 10.0)
BOUNDARY = 2.0  # deviations of log score above the normal median where an image is as likely either
FLOOR = 1e-9
TRUST = 10.0  # the prior holds the faster, the fewer ordinary images speak against the examples


class FeedbackInputs(NamedTuple):
    """What feedback learns from, and is applied to."""

    features: Floats  # (N, F) deviations
    fused: Floats  # (N,) scores without feedback, > 0


@dataclass(frozen=True)
class Feedback:
    """score · exp(w·φ), φ the standardised features of an image."""

    centre: Floats  # (F,)
    scale: Floats  # (F,)
    weights: Floats  # (F,) w; zeros: nothing was learned

    @classmethod
    def none(cls, features: int) -> "Feedback":
        """The score as it is."""
        return cls(np.zeros(features), np.ones(features), np.zeros(features))

    @classmethod
    def fit(
        cls, ordinary: FeedbackInputs, normal: FeedbackInputs, anomalous: FeedbackInputs
    ) -> "Feedback":
        """From three kinds of images.

        `ordinary` are normal images that nobody had to label, together as heavy as the examples;
        `normal` and `anomalous` are the examples, false alarms and defects, of either none or more.
        """
        m = len(ordinary.fused)  # few ordinary images: drawn to the deviations the features are in
        centre = m / (m + 5) * ordinary.features.mean(axis=0)
        scale = np.sqrt((m * ordinary.features.var(axis=0) + 10) / (m + 10))
        logs = np.log(ordinary.fused + FLOOR)
        level = np.sort(logs)[(m - 1) // 2]
        spread = max(float(np.quantile(logs, 0.84) - np.quantile(logs, 0.16)), 1e-3) / 2
        blank = cls(centre, scale, np.zeros_like(centre))
        parts = (ordinary, normal, anomalous)
        x = np.concatenate([blank.standardised(part.features) for part in parts])
        fused = np.concatenate([part.fused for part in parts])
        offset = (np.log(fused + FLOOR) - level) / spread
        counts = [len(part.fused) for part in parts]
        share = (counts[1] + counts[2]) / m
        target = np.repeat([0.0, 0.0, 1.0], counts)
        heft = np.repeat([share, 1.0, 1.0], counts)
        weights = _most_likely(x, offset.clip(*OFFSET) - BOUNDARY, target, heft, 1 + TRUST * share)
        return cls(centre, scale, weights * spread)

    @property
    def learned(self) -> bool:
        """Whether any example has taught anything."""
        return bool(self.weights.any())

    def standardised(self, features: Floats) -> Floats:
        """φ of features (B, F)."""
        return ((features - self.centre) / self.scale).clip(-CLIP, CLIP)

    def __call__(self, inputs: FeedbackInputs) -> Floats:
        """(B,), in the scores' unit."""
        return inputs.fused * np.exp(self.standardised(inputs.features) @ self.weights)


def _most_likely(x: Floats, offset: Floats, target: Floats, heft: Floats, prior: float) -> Floats:
    """The weights (F,) of the logistic regression under a normal prior of this precision."""
    from scipy.optimize import minimize
    from scipy.special import expit

    def loss(weights: Floats) -> tuple[float, Floats]:
        logit = offset + x @ weights
        wrong = heft * (np.logaddexp(0, logit) - target * logit)
        total = wrong.sum() + 0.5 * prior * np.square(weights).sum()
        return float(total), x.T @ (heft * (expit(logit) - target)) + prior * weights

    start = np.zeros(x.shape[1])
    options = {"maxiter": 300, "ftol": 1e-14, "gtol": 1e-9}
    return np.asarray(minimize(loss, start, jac=True, method="L-BFGS-B", options=options).x)
