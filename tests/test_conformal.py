"""The false-alarm rate that is asked for is kept, or refused with what it would need."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msvae.core.errors import RateError
from msvae.evaluation.conformal import Calibration, Decision, conformal_p, needed, rank, threshold

quick = settings(max_examples=100, deadline=None)
tied = st.lists(st.integers(-3, 8).map(lambda v: v / 4), min_size=1, max_size=60).map(np.array)
rates = st.integers(1, 999).map(lambda k: Fraction(k, 1000))


def slow_p(score, reference):
    return (1 + sum(r >= score for r in reference)) / (len(reference) + 1)


@quick
@given(tied, tied)
def test_p_by_brute_force(scores, reference):
    """(1 + how many normals score at least as high) / (n + 1), ties against the image."""
    expected = [slow_p(s, reference) for s in scores]
    np.testing.assert_allclose(conformal_p(scores, reference), expected, rtol=1e-14)


@quick
@given(tied, tied)
def test_low_p_by_brute_force(values, reference):
    """The lower tail counts the normals that score at most as high; scores unknown are left out."""
    expected = [(1 + sum(r <= v for r in reference)) / (len(reference) + 1) for v in values]
    found = Calibration({"kl": reference}, {}).low_p_values({"kl": values, "new": values})
    assert set(found) == {"kl"}
    np.testing.assert_allclose(found["kl"], expected, rtol=1e-14)


def drawn_p(draw, n, times=6000):
    """The p-value of one new normal image against n others, over and over."""
    rng = np.random.default_rng(n)
    values = draw(rng, (times, n + 1))
    return np.array([conformal_p(row[:1], row[1:])[0] for row in values])


TIES = {
    "two values": lambda rng, size: rng.integers(0, 2, size).astype(float),
    "nine values": lambda rng, size: rng.binomial(8, 0.3, size).astype(float),
    "none": lambda rng, size: rng.standard_cauchy(size),
}


@pytest.mark.parametrize("ties", TIES)
@pytest.mark.parametrize("n", [9, 19, 50])
def test_false_alarms_never_exceed_the_rate(ties, n):
    """P(p <= a) <= a for every a over thousands of draws; equal to it at k/(n+1) without ties."""
    p = drawn_p(TIES[ties], n)
    for a in np.r_[0.013, 0.05, 0.2, np.arange(1, n + 2) / (n + 1)]:
        realised, noise = (p <= a + 1e-12).mean(), 4 * np.sqrt(a * (1 - a) / len(p))
        assert realised <= a + noise
        if ties == "none" and abs(a * (n + 1) - round(a * (n + 1))) < 1e-9:
            assert realised >= a - noise


@quick
@given(rates, st.integers(1, 3000))
def test_rank_and_need_by_exact_fractions(rate, n):
    """k is the greatest with k/(n+1) <= rate; where there is none, the message says what n is."""
    k = (n + 1) * rate.numerator // rate.denominator
    least = next(m for m in range(1, 2000) if Fraction(1, m + 1) <= rate) if rate < 1 / 2 else 1
    if rate <= Fraction(1, 2):
        assert needed(float(rate)) == least
    if k >= 1:
        assert rank(float(rate), n) == k
    else:
        with pytest.raises(RateError, match=f"at least {least} calibration images, got {n}:"):
            rank(float(rate), n)


def test_rounding_costs_no_rank():
    """k of n + 1 is rank k in floating point too, as is a rate that was computed: 1 - 0.9."""
    for n in range(1, 300):
        assert [rank(k / (n + 1), n) for k in range(1, n + 1)] == list(range(1, n + 1))
    for percent in range(1, 100):
        assert rank(percent / 100, 99) == rank(1 - (100 - percent) / 100, 99) == percent
    assert needed(1 - 0.9) == 9
    assert Decision("conformal", "fused", 1 - 0.9).flags({}, np.array([1 / 10])).all()


@pytest.mark.parametrize("rate, least", [(0.05, 19), (0.01, 99), (0.001, 999), (1 / 3, 2)])
def test_a_rate_is_refused_with_the_number_it_needs(rate, least):
    """One image fewer than needed is refused, with the remedy; the number itself serves."""
    with pytest.raises(RateError) as refused:
        threshold(np.arange(least - 1.0), rate)
    assert str(refused.value) == (
        f"a false-alarm rate of {rate:g} needs at least {least} calibration images, "
        f"got {least - 1}: lower the demand or add images"
    )
    assert threshold(np.arange(float(least)), rate) > least - 1


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_what_is_no_rate_is_refused(rate):
    """0, 1 and beyond are no rates."""
    with pytest.raises(RateError, match=r"between 0 and 1, .* try 0\.05"):
        rank(rate, 1000)


@quick
@given(tied, rates, st.floats(-2, 3))
def test_threshold_and_p_say_the_same(reference, rate, height):
    """A score reaches the threshold exactly when its p-value is within the rate."""
    rate = float(rate)
    if len(reference) < 1 / rate - 1 - 1e-9:
        return
    least = threshold(reference, rate)
    near = [np.nextafter(least, -np.inf), least, np.nextafter(least, np.inf)]
    for score in [*reference, *near, height, -1e300, 1e300]:
        assert (slow_p(score, reference) <= rate + 1e-12) == (score >= least)


def calibration():
    rng = np.random.default_rng(0)
    scores = {"fused": rng.normal(size=39), "kl": rng.integers(0, 9, 39).astype(float)}
    return Calibration(scores, {})


def test_every_score_has_its_p_values_and_threshold():
    """By name; a score without references has no p-value."""
    c = calibration()
    new = {"fused": np.array([0.3, 9.0]), "kl": np.array([8.0, -1.0]), "other": np.zeros(2)}
    assert c.n == 39
    got = c.p_values(new)
    assert set(got) == {"fused", "kl"}
    for name, p in got.items():
        np.testing.assert_allclose(p, [slow_p(s, c.scores[name]) for s in new[name]])
    for name, least in c.thresholds(0.05).items():
        ordered = sorted(c.scores[name])
        assert ordered[-2] < least < ordered[-2] + 1e-9
    with pytest.raises(RateError, match="at least 99"):
        c.thresholds(0.01)


def test_the_conformal_decision_keeps_the_boundary():
    """An image is flagged at p = rate exactly, in floating point too, whatever its score."""
    for n in range(1, 400):
        p = conformal_p(np.array([1.5, 0.5]), np.r_[2.0, np.zeros(n - 1)])
        decision = Decision("conformal", "fused", 2 / (n + 1))
        assert decision.flags({}, p).tolist() == [True, True]
        decision = Decision("conformal", "fused", 1.99 / (n + 1))
        assert decision.flags({}, p).tolist() == [False, False]


@pytest.mark.parametrize("rule", ["fixed", "f1"])
def test_a_fixed_decision_reads_its_own_score(rule):
    """Flagged from the threshold on, whatever p says; at another rate it becomes conformal."""
    decision = Decision(rule, "weighted", 0.05, threshold=0.5)
    scores = {"weighted": np.array([0.49, 0.5, 0.7]), "fused": np.array([9.0, 9.0, 0.0])}
    p = np.array([0.001, 0.5, 1.0])
    assert decision.flags(scores, p).tolist() == [False, True, True]
    assert decision.at(None) is decision
    other = decision.at(0.5)
    assert (other.rule, other.score, other.target_fpr) == ("conformal", "fused", 0.5)
    assert other.flags(scores, p).tolist() == [True, True, False]


@pytest.mark.parametrize(("n", "level"), [(99, 99), (199, 198), (20, 20)])
def test_colours_of_a_map_are_those_of_the_calibration_images(n, level):
    """They begin at the least of the maxima; half-way is what one normal image in 100 reaches."""
    peaks = np.random.default_rng(0).permutation(np.arange(1.0, n + 1))
    calibration = Calibration({"fused": peaks}, {"fused": peaks, "flat": np.full(n, 3.0)})
    low, high = calibration.map_scale("fused")
    assert low == 1
    assert (low + high) / 2 == pytest.approx(level)
    low, high = calibration.map_scale("flat")
    assert low == 3 < high
