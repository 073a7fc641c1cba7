"""What a few labelled examples teach: a direction in the statistics, on top of the fused score.

A logistic regression whose offset is the unsupervised score and whose weights have a normal prior:
without examples it changes nothing, with few it changes little (maximum a posteriori).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

CLIP = 6.0  # standard deviations: one statistic far out must not outvote all others
OFFSET = (-5.0, 10.0)
BOUNDARY = 2.0  # deviations of log score above the normal median where an image is as likely either
FLOOR = 1e-9
TRUST = 10.0  # the prior holds the faster, the fewer ordinary images speak against the examples


@dataclass(frozen=True)
class Feedback:
    """score · exp(w·φ), φ the standardised statistics of an image."""

    centre: Tensor  # (F,)
    scale: Tensor  # (F,)
    weights: Tensor  # (F,) w; zeros: nothing was learned

    @classmethod
    def none(cls, features: int) -> "Feedback":
        """The score as it is."""
        zeros = torch.zeros(features, dtype=torch.float64)
        return cls(zeros, torch.ones_like(zeros), zeros.clone())

    @classmethod
    def fit(
        cls,
        ordinary: tuple[Tensor, Tensor],
        normal: tuple[Tensor, Tensor],
        anomalous: tuple[Tensor, Tensor],
    ) -> "Feedback":
        """From features (N, F) and unsupervised scores (N,) > 0 of three kinds of images.

        `ordinary` are normal images that nobody had to label, together as heavy as the examples;
        `normal` and `anomalous` are the examples, false alarms and defects, of either none or more.
        """
        features, scores = ordinary
        m = len(scores)  # few ordinary images are drawn to the deviations that the features are in
        centre = m / (m + 5) * features.mean(dim=0)
        scale = ((m * features.var(dim=0, correction=0) + 10) / (m + 10)).sqrt()
        logs = (scores + FLOOR).log()
        level = logs.median()
        spread = (logs.quantile(0.84) - logs.quantile(0.16)).clamp_min(1e-3) / 2
        blank = cls(centre, scale, torch.zeros_like(centre))
        parts = [ordinary, normal, anomalous]
        x = torch.cat([blank.standardised(f) for f, _ in parts])
        offset = torch.cat([((s + FLOOR).log() - level) / spread for _, s in parts])
        counts = [len(s) for _, s in parts]
        target = torch.cat([torch.full((n,), float(k == 2)) for k, n in enumerate(counts)])
        share = (counts[1] + counts[2]) / m
        heft = torch.cat([torch.full((n,), 1.0 if k else share) for k, n in enumerate(counts)])
        prior = 1 + TRUST * share
        logit = offset.clamp(*OFFSET) - BOUNDARY
        weights = _most_likely(x, logit, target.to(x), heft.to(x), prior)
        return cls(centre, scale, weights * spread)

    @property
    def learned(self) -> bool:
        """Whether any example has taught anything."""
        return bool(self.weights.any())

    def standardised(self, features: Tensor) -> Tensor:
        """φ of features (B, F)."""
        return ((features - self.centre) / self.scale).clamp(-CLIP, CLIP)

    def __call__(self, features: Tensor, scores: Tensor) -> Tensor:
        """(B, F), (B,) -> (B,), in the scores' unit."""
        return scores * (self.standardised(features) @ self.weights).exp()


def _most_likely(x: Tensor, offset: Tensor, target: Tensor, heft: Tensor, prior: float) -> Tensor:
    """The weights (F,) of the logistic regression under a normal prior of this precision."""
    with torch.enable_grad():
        weights = torch.zeros(x.shape[1], dtype=x.dtype, requires_grad=True)
        search = torch.optim.LBFGS([weights], max_iter=300, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            search.zero_grad()
            logit = offset + x @ weights
            wrong = F.binary_cross_entropy_with_logits(logit, target, weight=heft, reduction="sum")
            total = wrong + 0.5 * prior * weights.square().sum()
            total.backward()
            return total

        search.step(loss)
    return weights.detach()
