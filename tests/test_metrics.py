"""The figures of merit agree with scikit-learn, scipy, brute force and simulation, ties and all."""

from math import comb

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, binomtest

from msvae.evaluation import metrics

quick = settings(max_examples=80, deadline=None)


@st.composite
def labelled(draw):
    """Labels with both classes and scores with many ties, at any scale and height."""
    labels = draw(st.lists(st.integers(0, 1), min_size=2, max_size=40))
    labels[:2] = draw(st.permutations([0, 1]))
    places = st.integers(0, draw(st.sampled_from([0, 2, 9, 1000])))
    raw = draw(st.lists(places, min_size=len(labels), max_size=len(labels)))
    scale, height = draw(st.sampled_from([(1.0, 0.0), (1e-9, 0.0), (0.1, -37.0), (1e12, 5.0)]))
    return np.array(labels), np.array(raw) * scale + height


def pairwise_auroc(normal, anomalous):
    """The definition: P(anomalous > normal) + P(equal) / 2."""
    gap = anomalous[:, None] - normal
    return (gap > 0).mean() + (gap == 0).mean() / 2


@quick
@given(labelled())
def test_areas_are_those_of_scikit_learn(data):
    """AUROC and average precision, ties included."""
    assert metrics.auroc(*data) == pytest.approx(sklearn.metrics.roc_auc_score(*data), abs=1e-12)
    expected = sklearn.metrics.average_precision_score(*data)
    assert metrics.average_precision(*data) == pytest.approx(expected, abs=1e-12)


@quick
@given(labelled())
def test_curves_are_those_of_scikit_learn(data):
    """Every distinct threshold is a point of the ROC and of the precision-recall curve."""
    for ours, theirs in zip(
        metrics.roc_curve(*data),
        sklearn.metrics.roc_curve(*data, drop_intermediate=False),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-12)
    precision, recall = metrics.precision_recall_curve(*data)
    p, r, _ = sklearn.metrics.precision_recall_curve(*data)
    np.testing.assert_allclose(precision, p[-2::-1], atol=1e-12)
    np.testing.assert_allclose(recall, r[-2::-1], atol=1e-12)


@quick
@given(labelled())
def test_f1_max_by_brute_force(data):
    """The best F1 of all ways to flag the scores from some value on."""
    labels, scores = data
    every = [sklearn.metrics.f1_score(labels, scores >= t) for t in np.unique(scores)]
    assert metrics.f1_max(labels, scores) == pytest.approx(max(every), abs=1e-12)


@quick
@given(labelled(), st.sampled_from([0, 50, 80, 95, 100]))
def test_fpr_at_tpr_by_brute_force(data, percent):
    """The fewest false alarms among the thresholds that find the demanded share."""
    labels, scores = data
    rates = []
    for t in [*np.unique(scores), np.inf]:
        found = int(((scores >= t) & (labels == 1)).sum())
        if 100 * found >= percent * int((labels == 1).sum()):
            rates.append((scores[labels == 0] >= t).mean())
    assert metrics.fpr_at_tpr(labels, scores, percent / 100) == pytest.approx(min(rates))


@quick
@given(labelled(), st.integers(0, 39))
def test_accuracy_and_f1_at_equal_prevalence(data, at):
    """As scikit-learn has them when each class weighs the same in all."""
    labels, scores = data
    threshold = scores[at % len(scores)]
    weight = 1 / np.bincount(labels)[labels]
    flagged = (scores >= threshold).astype(int)
    accuracy, f1 = metrics.balanced_accuracy_f1(*metrics.rates_at(labels, scores, threshold))
    expected = sklearn.metrics.accuracy_score(labels, flagged, sample_weight=weight)
    assert accuracy == pytest.approx(expected)
    expected = sklearn.metrics.f1_score(labels, flagged, sample_weight=weight, zero_division=0)
    assert f1 == pytest.approx(expected)


@quick
@given(labelled())
def test_best_f1_threshold_by_brute_force(data):
    """No threshold has a better F1, and the one chosen lies between scores, not on one."""
    labels, scores = data
    normal, anomalous = scores[labels == 0], scores[labels == 1]

    def f1(threshold):
        tpr, fpr = (anomalous >= threshold).mean(), (normal >= threshold).mean()
        return 2 * tpr / (1 + tpr + fpr)

    chosen = metrics.best_f1_threshold(normal, anomalous)
    assert f1(chosen) == pytest.approx(max(f1(t) for t in scores), abs=1e-12)
    assert chosen not in scores or chosen == scores.min()


def slow_bootstrap(labels, columns, seed):
    """Resample, copy the images out, compare all pairs: (RESAMPLES, columns)."""
    generator = np.random.default_rng(seed)
    groups, draws = [np.flatnonzero(labels == k) for k in (0, 1)], []
    for _ in range(metrics.RESAMPLES // metrics.CHUNK):
        counts = [
            metrics.resample_counts(len(g), metrics.CHUNK, generator).astype(int) for g in groups
        ]
        for each in zip(*counts, strict=True):
            normal, anomalous = (np.repeat(g, c) for g, c in zip(groups, each, strict=True))
            draws.append([pairwise_auroc(c[normal], c[anomalous]) for c in columns])
    return np.array(draws)


@pytest.mark.parametrize("levels", [4, 10_000])
def test_bootstrap_intervals_are_those_of_the_plain_way(levels):
    """The fast form gives the very interval that copying the resampled images out gives."""
    rng = np.random.default_rng(1)
    labels = rng.permutation(np.repeat([0, 1], [17, 23]))
    a, b = rng.integers(0, levels, (2, 40)) + labels * levels / 4
    draws = slow_bootstrap(labels, [a, b], seed=5)
    expected = np.quantile(draws[:, 0], [0.025, 0.975])
    np.testing.assert_allclose(metrics.bootstrap_auroc(labels, a, seed=5), expected, atol=1e-12)
    expected = np.quantile(draws[:, 0] - draws[:, 1], [0.025, 0.975])
    got = metrics.bootstrap_auroc_difference(labels, a, b, seed=5)
    np.testing.assert_allclose(got, expected, atol=1e-12)


def test_resamples_are_drawn_with_replacement():
    """As many images as there are; each is drawn once on average, with the binomial's variance."""
    counts = metrics.resample_counts(12, 20_000, np.random.default_rng(0))
    assert counts.shape == (20_000, 12)
    assert (counts.sum(axis=1) == 12).all()
    np.testing.assert_allclose(counts.mean(axis=0), 1, atol=0.03)
    np.testing.assert_allclose(counts.var(axis=0), 1 - 1 / 12, atol=0.05)


def delong_deviation(normal, anomalous):
    """The standard error of the AUROC (DeLong et al. 1988)."""
    gap = anomalous[:, None] - normal
    wins = (gap > 0) + (gap == 0) / 2
    parts = wins.mean(axis=1).var(ddof=1) / len(anomalous), wins.mean(axis=0).var(ddof=1)
    return np.sqrt(parts[0] + parts[1] / len(normal))


def test_bootstrap_interval_is_as_wide_as_theory_says():
    """On many images it is the normal interval of DeLong's standard error, within its noise."""
    rng = np.random.default_rng(2)
    normal, anomalous = rng.normal(size=300), rng.normal(1, 1.5, 200)
    labels = np.repeat([0, 1], [300, 200])
    low, high = metrics.bootstrap_auroc(labels, np.r_[normal, anomalous])
    middle, deviation = pairwise_auroc(normal, anomalous), delong_deviation(normal, anomalous)
    assert low == pytest.approx(middle - 1.96 * deviation, abs=0.2 * deviation)
    assert high == pytest.approx(middle + 1.96 * deviation, abs=0.2 * deviation)


@pytest.mark.parametrize("n, m, rate", [(19, 40, 0.05), (39, 30, 0.05), (60, 50, 0.1)])
def test_false_alarm_interval_by_simulation(n, m, rate):
    """Of 8,000 simulated calibrations and tests, 2.5 % fall below the interval, 2.5 % above."""
    rng = np.random.default_rng(n)
    alarms = np.empty(8000)
    for i in range(len(alarms)):
        reference, scores = rng.normal(size=n), rng.normal(size=m)
        p = (1 + (reference >= scores[:, None]).sum(axis=1)) / (n + 1)
        alarms[i] = (p <= rate + 1e-12).sum()
    low, high = np.array(metrics.false_alarm_interval(n, m, rate)) * m
    noise = 4 * np.sqrt(0.025 * 0.975 / len(alarms))
    for end, share in ((low, 0.025), (high, 0.975)):
        assert end == pytest.approx(round(end))
        assert (alarms <= end + 0.5).mean() >= share - noise
        assert (alarms <= end - 0.5).mean() <= share + noise


@quick
@given(st.integers(1, 120), st.integers(1, 300), st.data())
def test_false_alarm_interval_by_counting_orders(n, m, data):
    """Every order of the n + m normals is equally likely: j alarms in so many of them."""
    k = data.draw(st.integers(1, n))
    # j of the m lie above the k-th largest of the n: place k - 1 among them, n - k below it.
    orders = [comb(j + k - 1, j) * comb(m - j + n - k, m - j) for j in range(m + 1)]
    assert sum(orders) == comb(n + m, n)
    low, high = np.array(metrics.false_alarm_interval(n, m, k / (n + 1))) * m
    for end, share in ((round(low), 0.025), (round(high), 0.975)):
        assert sum(orders[: end + 1]) / comb(n + m, n) >= share - 1e-9
        assert sum(orders[:end]) / comb(n + m, n) <= share + 1e-9


@quick
@given(st.integers(1, 300), st.floats(0, 1))
def test_clopper_pearson_solves_the_binomial_tails(m, share):
    """At either end of the interval what was seen, or more extreme, has a chance of 2.5 %."""
    k = round(share * m)
    low, high = metrics.clopper_pearson(k, m)
    assert (low == 0) if k == 0 else binom.sf(k - 1, m, low) == pytest.approx(0.025, rel=1e-6)
    assert (high == 1) if k == m else binom.cdf(k, m, high) == pytest.approx(0.025, rel=1e-6)
    theirs = binomtest(k, m).proportion_ci(method="exact")
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=1e-9)


def test_clopper_pearson_covers():
    """Whatever the true rate, the interval holds it in at least 95 % of the cases."""
    ends = np.array([metrics.clopper_pearson(k, 20) for k in range(21)])
    for rate in np.linspace(0.001, 0.999, 333):
        inside = (ends[:, 0] <= rate) & (rate <= ends[:, 1])
        assert binom.pmf(np.arange(21), 20, rate)[inside].sum() >= 0.95
