"""Labels and numbers in, figures of merit out. Raw scores, any scale; higher is more anomalous.

Labels are 0 (normal) and 1 (anomalous). Ties count half in the AUROC, as in scikit-learn.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Interval = tuple[float, float]
RESAMPLES = 2000
CHUNK = 100  # resamples at a time, so that memory stays bounded


def auroc(labels: Ints, scores: Floats) -> float:
    """Area under the ROC curve: P(anomalous > normal) + P(equal) / 2."""
    _, inverse = np.unique(scores, return_inverse=True)
    positive = np.bincount(inverse, weights=labels)
    negative = np.bincount(inverse, weights=1 - labels)
    below = np.cumsum(negative) - negative
    return float((positive * (below + negative / 2)).sum() / (positive.sum() * negative.sum()))


def average_precision(labels: Ints, scores: Floats) -> float:
    """Σ (recall step) · precision over the distinct thresholds (scikit-learn's definition)."""
    precision, recall = _precision_recall(labels, scores)
    return float((np.diff(recall, prepend=0.0) * precision).sum())


def f1_max(labels: Ints, scores: Floats) -> float:
    """The greatest F1 over all thresholds: an oracle, since it is chosen on these very labels."""
    precision, recall = _precision_recall(labels, scores)
    return float((2 * precision * recall / np.maximum(precision + recall, 1e-12)).max())


def fpr_at_tpr(labels: Ints, scores: Floats, tpr: float = 0.95) -> float:
    """The least false-positive rate at which at least `tpr` of the anomalies are found."""
    fpr, found, _ = roc_curve(labels, scores)
    return float(fpr[found >= tpr - 1e-12].min())


def roc_curve(labels: Ints, scores: Floats) -> tuple[Floats, Floats, Floats]:
    """False- and true-positive rates at every distinct threshold, from strict to lenient."""
    thresholds, true, false = _cumulated(labels, scores)
    fpr, tpr = np.r_[0, false / max(false[-1], 1)], np.r_[0, true / max(true[-1], 1)]
    return fpr, tpr, np.r_[np.inf, thresholds]


def precision_recall_curve(labels: Ints, scores: Floats) -> tuple[Floats, Floats]:
    """Precision and recall at every distinct threshold, from strict to lenient."""
    return _precision_recall(labels, scores)


def _cumulated(labels: Ints, scores: Floats) -> tuple[Floats, Any, Any]:
    """Distinct scores from high to low, with the anomalies and normals at or above each."""
    values, inverse = np.unique(-scores, return_inverse=True)
    true = np.cumsum(np.bincount(inverse, weights=labels))
    false = np.cumsum(np.bincount(inverse, weights=1 - labels))
    return -values, true, false


def _precision_recall(labels: Ints, scores: Floats) -> tuple[Floats, Floats]:
    _, true, false = _cumulated(labels, scores)
    return true / (true + false), true / max(true[-1], 1)


def bootstrap_auroc(labels: Ints, scores: Floats, seed: int = 0) -> Interval:
    """95 % interval of the AUROC over 2,000 resamples, stratified by class."""
    return _interval(np.concatenate(list(_resampled(labels, [scores], seed)))[:, 0])


def bootstrap_auroc_difference(labels: Ints, a: Floats, b: Floats, seed: int = 0) -> Interval:
    """95 % interval of AUROC(a) - AUROC(b) over the same resamples of the same images."""
    both = np.concatenate(list(_resampled(labels, [a, b], seed)))
    return _interval(both[:, 0] - both[:, 1])


def resample_counts(n: int, resamples: int, generator: np.random.Generator) -> Floats:
    """How often each of n images is drawn, (resamples, n), each row adding up to n."""
    return generator.multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)


def _resampled(labels: Ints, columns: list[Floats], seed: int) -> Iterator[Floats]:
    """AUROC of each column on each resample, (chunk, columns) at a time.

    Sorting once is enough: a resample only changes how often each image counts.
    """
    generator = np.random.default_rng(seed)
    normal, anomalous = labels == 0, labels == 1
    n, m = int(normal.sum()), int(anomalous.sum())
    ranked = [_places(c[normal], c[anomalous]) for c in columns]
    for _ in range(0, RESAMPLES, CHUNK):
        w0, w1 = resample_counts(n, CHUNK, generator), resample_counts(m, CHUNK, generator)
        yield np.stack([_weighted_auroc(w0, w1, *r) for r in ranked], axis=1)


def _places(normal: Floats, anomalous: Floats) -> tuple[Ints, Ints, Ints]:
    """Order of the normals, and how many lie below and not above each anomaly."""
    order = np.argsort(normal, kind="stable")
    ordered = normal[order]
    low = np.searchsorted(ordered, anomalous, side="left")
    high = np.searchsorted(ordered, anomalous, side="right")
    return order, low, high


def _weighted_auroc(w0: Floats, w1: Floats, order: Ints, low: Ints, high: Ints) -> Floats:
    sums = np.concatenate([np.zeros((len(w0), 1)), np.cumsum(w0[:, order], axis=1)], axis=1)
    below = 0.5 * (sums[:, low] + sums[:, high])
    area: Floats = (w1 * below).sum(axis=1) / (w0.sum(axis=1) * w1.sum(axis=1))
    return area


def _interval(values: Floats) -> Interval:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def rates_at(labels: Ints, scores: Floats, threshold: float) -> tuple[float, float]:
    """True- and false-positive rate when a score at or above the threshold is flagged."""
    flagged = scores >= threshold
    return float(flagged[labels == 1].mean()), float(flagged[labels == 0].mean())


def balanced_accuracy_f1(tpr: float, fpr: float) -> tuple[float, float]:
    """Accuracy and F1 at equal prevalence, from the rates."""
    return (tpr + 1 - fpr) / 2, 2 * tpr / (1 + tpr + fpr)


def best_f1_threshold(normal: Floats, anomalous: Floats) -> float:
    """The threshold of the best F1 at equal prevalence: midway between neighbouring scores."""
    values = np.unique(np.concatenate([normal, anomalous]))
    cuts = np.r_[values[0], (values[1:] + values[:-1]) / 2]
    tpr = 1 - np.searchsorted(np.sort(anomalous), cuts, side="left") / len(anomalous)
    fpr = 1 - np.searchsorted(np.sort(normal), cuts, side="left") / len(normal)
    return float(cuts[np.argmax(2 * tpr / (1 + tpr + fpr))])


def false_alarm_interval(n: int, m: int, rate: float) -> Interval:
    """Central 95 % of the realised rate among m test normals with n calibration images.

    The false alarms follow BetaBinomial(m, k, n + 1 - k) with k = ⌊rate (n + 1)⌋.
    """
    from scipy.stats import betabinom

    k = int(np.floor(rate * (n + 1) + 1e-9))
    if k == 0:
        return 0.0, 0.0
    low, high = betabinom(m, k, n + 1 - k).ppf([0.025, 0.975])
    return float(low) / m, float(high) / m


def clopper_pearson(k: int, m: int) -> Interval:
    """Exact 95 % interval of a rate of which k of m were seen."""
    from scipy.stats import beta

    low = 0.0 if k == 0 else float(beta.ppf(0.025, k, m - k + 1))
    high = 1.0 if k == m else float(beta.ppf(0.975, k + 1, m - k))
    return low, high
