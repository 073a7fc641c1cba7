"""The slider of the report shows exact counts, whatever the scores, few or many."""

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msvae.core.errors import DataError
from msvae.evaluation.conformal import conformal_p
from msvae.report.thresholds import (
    BINS,
    Axis,
    ThresholdData,
    counts_above,
    grid,
    outline_path,
    page_data,
)


def scored(n, seed=0, labelled=True, n_conformal=99, levels=None, **more):
    """Images with conformal p-values; every third is anomalous; ties when `levels` are few."""
    rng = np.random.default_rng(seed)
    labels = (np.arange(n) % 3 == 2).astype(np.int64)
    reference, scores = rng.standard_t(3, n_conformal), rng.standard_t(3, n) + 2 * labels
    if levels:
        reference, scores = np.round(reference * levels), np.round(scores * levels)
    p = conformal_p(scores, reference)
    given = {"p": p, "labels": labels if labelled else None, "n_conformal": n_conformal}
    return ThresholdData(scores=scores, **(given | more))


CASES = {
    "few": scored(50),
    "ties": scored(500, levels=2),
    "unlabelled": scored(80, labelled=False),
    "many": scored(6000, seed=1),
    "small calibration": scored(300, n_conformal=9),
    "another rate": scored(400, target_fpr=0.0333),
    "one image": scored(1),
}
CASES["calibration unknown"] = ThresholdData(scores=CASES["ties"].scores, p=CASES["ties"].p)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(-4, 4)), st.lists(st.integers(-5, 5)))
def test_counts_by_brute_force(scores, thresholds):
    """How many reach each threshold, those upon it too."""
    got = counts_above(np.array(scores, dtype=float), np.array(thresholds, dtype=float))
    assert got.tolist() == [sum(s >= t for s in scores) for t in thresholds]


@pytest.mark.parametrize("case", CASES)
def test_every_count_is_exact(case):
    """At each step of the slider: the images of each group that reach it, none beyond the last."""
    o = CASES[case]
    page, thresholds = page_data(o), grid(o)
    groups = [o.scores] if o.labels is None else [o.scores[o.labels == k] for k in (0, 1)]
    assert page["n"] == [len(g) for g in groups]
    for group, above in zip(groups, page["above"], strict=True):
        assert above == [*(int((group >= t).sum()) for t in thresholds), 0]
    assert page["t"][-1] is None
    np.testing.assert_allclose(page["t"][:-1], thresholds, rtol=1e-5)
    assert (np.diff(thresholds) > 0).all()


@pytest.mark.parametrize("case", CASES)
def test_every_rate_flags_what_its_p_values_flag(case):
    """The counts where a rate lies are those of p <= rate, one by one."""
    o = CASES[case]
    page = page_data(o)
    assert page["rates"] == sorted(set(page["rates"]))
    assert page["rates"]
    for rate, at in zip(page["rates"], page["at"], strict=True):
        flagged = o.p <= rate * (1 + 1e-12)
        groups = [flagged] if o.labels is None else [flagged[o.labels == k] for k in (0, 1)]
        assert [above[at] for above in page["above"]] == [int(g.sum()) for g in groups]


@pytest.mark.parametrize("case", CASES)
def test_the_slider_starts_at_the_rate_asked_for(case):
    """What the run itself flags, or nothing where the calibration cannot keep the rate."""
    o = CASES[case]
    page = page_data(o)
    flagged = int((o.p <= o.target_fpr + 1e-12).sum())
    assert sum(above[page["start"]] for above in page["above"]) == flagged
    assert page["target"] == o.target_fpr


@pytest.mark.parametrize("n", [9, 19, 99, 2000])
def test_only_rates_that_can_be_kept_are_offered(n):
    """Multiples of 1/(n + 1) up to a half, and the rate asked for where n images can keep it."""
    o = scored(60, n_conformal=n)
    offered = np.array(page_data(o)["rates"])
    asked = np.isclose(offered, o.target_fpr, rtol=1e-9)
    assert asked.sum() == (n >= 19)
    steps = offered[~asked] * (n + 1)
    np.testing.assert_allclose(steps, steps.round(), atol=1e-6)
    assert offered.min() == pytest.approx(1 / (n + 1))
    assert 0.45 < offered.max() <= 0.5
    assert len(offered) <= 161


def test_the_page_stays_small():
    """20,000 images take no more room than a few thousand thresholds; plain JSON throughout."""
    text = json.dumps(page_data(scored(20_000)), allow_nan=False)
    assert len(text) < 100_000


def test_without_p_values_the_slider_is_over_the_score():
    """It starts at the threshold of the run; without one, nothing is flagged."""
    scores = np.array([0.1, 0.4, 0.5, 0.9])
    page = page_data(ThresholdData(scores=scores, threshold=0.45))
    assert (page["rates"], page["at"]) == ([], [])
    assert page["above"][0][page["start"]] == 2
    page = page_data(ThresholdData(scores=scores))
    assert page["above"][0][page["start"]] == 0


def test_nothing_to_show():
    """No image: one threshold, nothing flagged, nothing that is no number."""
    page = page_data(ThresholdData(scores=np.empty(0)))
    assert (page["t"], page["above"], page["n"]) == ([None], [[0]], [0])
    page = page_data(ThresholdData(scores=np.ones(3), labels=np.zeros(3, dtype=np.int64)))
    assert page["above"] == [[3, 0], [0, 0]]


def test_what_cannot_be_shown_is_refused():
    """Scores that are no numbers, columns of different length."""
    with pytest.raises(DataError, match="not finite"):
        ThresholdData(scores=np.array([1.0, np.nan]))
    for other in ({"p": np.ones(2)}, {"labels": np.zeros(4, dtype=np.int64)}):
        with pytest.raises(DataError, match="equally many"):
            ThresholdData(scores=np.ones(3), **other)


AXES = {
    "even": np.linspace(-5, 5, 99),
    "one value": np.full(7, 3.0),
    "long tail": np.r_[np.random.default_rng(0).normal(size=300), 1e4, -50],
    "shifted": 1e5 + np.random.default_rng(1).standard_cauchy(300),
    "narrow": 1e-9 * np.arange(20),
}


@pytest.mark.parametrize("name", AXES)
def test_places_keep_the_order(name):
    """All scores lie on the axis, higher ones further right; beyond the ends is cut."""
    scores = np.unique(AXES[name])
    axis = Axis.of(ThresholdData(scores=AXES[name]))
    at = axis.place(scores)
    assert (np.diff(at) > 0).all()
    assert at[0] > 0
    assert at[-1] < 1
    assert axis.place(np.array([-1e12, 1e12])).tolist() == [0, 1]


@pytest.mark.parametrize("name", AXES)
def test_ticks_stand_where_they_say(name):
    """Each tick lies at the place of the number it shows."""
    axis = Axis.of(ThresholdData(scores=AXES[name]))
    ticks = axis.ticks()
    assert ticks
    for at, text in ticks:
        assert at == pytest.approx(axis.place(np.array([float(text.replace(",", ""))]))[0])
    assert len({text for _, text in ticks}) == len(ticks)


def test_a_long_tail_leaves_room_for_the_normals():
    """The middle half of the normals stays wide enough to see, however far the rest is."""
    axis = Axis.of(ThresholdData(scores=AXES["long tail"]))
    assert axis.bent
    low, high = axis.place(np.quantile(AXES["long tail"], [0.25, 0.75]))
    assert high - low > 0.05
    assert not Axis.of(ThresholdData(scores=AXES["even"])).bent


@pytest.mark.parametrize("name", AXES)
def test_the_outline_is_the_histogram(name):
    """Bar by bar the share of the tallest, of the scores in that part of the axis."""
    scores = AXES[name]
    axis = Axis.of(ThresholdData(scores=scores))
    path = outline_path(scores, axis, height=100, width=10 * BINS)
    points = [(float(x), float(y)) for x, y in re.findall(r"L(-?[\d.]+) (-?[\d.]+)", path)]
    bars = [0] * BINS
    for at in axis.place(scores):
        bars[min(BINS - 1, int(at * BINS))] += 1
    assert len(points) == 2 * BINS + 1
    for i, count in enumerate(bars):
        (x0, y0), (x1, y1) = points[2 * i : 2 * i + 2]
        assert (x0, x1, y0) == (10 * i, 10 * i + 10, y1)
        assert 100 - y0 == pytest.approx(100 * count / max(bars), abs=0.051)
    assert path.startswith("M0 100L")
    assert path.endswith(f"L{10 * BINS} 100Z")


def test_the_outline_of_no_scores_is_flat():
    """A group without images draws a line and no error."""
    path = outline_path(np.empty(0), Axis(0, 1, 0, 1, False))
    assert set(re.findall(r" (-?[\d.]+)[LZ]", path)) == {"100", "100.0"}
