"""Figures of an evaluation computed a second time, and the keys that they go by."""

import pytest
from sklearn.metrics import roc_curve

SCORES = {
    *["reconstruction", "mahalanobis", "weighted", "weighted_raw", "kl", "elbo", "spread"],
    *["bands", "complexity", "spatial", "fused"],
}
RATES = {"threshold", "accuracy", "f1", "tpr", "fpr"}
PLAIN = {"auroc", "auroc_ci95", "average_precision", "fpr_at_95_tpr"}
MORE = {"f1_max", "fused_minus_ci95"}  # beyond the keys of the protocol: an oracle, an interval


def fpr_at_95(labels, values):
    fpr, tpr, _ = roc_curve(labels, values, drop_intermediate=False)
    return fpr[tpr >= 0.95].min()


def check_rates(block, labels, values):
    """Accuracy and F1 at equal prevalence are those of the rates at the threshold."""
    flagged = values >= block["threshold"]
    tpr, fpr = flagged[labels == 1].mean(), flagged[labels == 0].mean()
    assert block["tpr"] == pytest.approx(tpr)
    assert block["fpr"] == pytest.approx(fpr)
    assert block["accuracy"] == pytest.approx((tpr + 1 - fpr) / 2)
    assert block["f1"] == pytest.approx(2 * tpr / (1 + tpr + fpr))
