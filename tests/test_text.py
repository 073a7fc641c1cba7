"""Figures and decisions read as plain words, right in number and case."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from msvae.evaluation.conformal import conformal_p
from msvae.report.summary import Summary, promise, sentence, tiles
from msvae.scores.catalog import ABOUT, EXTREMES
from msvae.viz.text import clip, in_words, number, percent, plural, reading, tail


def summary(**facts):
    return Summary(**({"images": 0, "flagged": 0, "target_fpr": 0.05} | facts))


LABELLED = {"images": 50, "flagged": 14, "normals": 40, "anomalies": 10}


@pytest.mark.parametrize(
    "value, text",
    [
        (0, "0.000"),
        (0.5, "0.500"),
        (-0.98765, "-0.988"),
        (12.3456, "12.35"),
        (1234.567, "1,235"),
        (99_999.0, "99,999"),
        (123_456, "1.2e+05"),
        (0.001, "0.001"),
        (0.00012345, "0.00012"),
        (None, "–"),
        (float("nan"), "–"),
        (float("-inf"), "–"),
        ("as it is", "as it is"),
    ],
)
def test_figures_of_a_table(value, text):
    """Three decimals, fewer where the figure is large; a dash for none."""
    assert number(value) == text


def test_figures_of_fewer_decimals():
    """As many as asked for."""
    assert (number(0.12345, 1), number(3.14159, 2), number(31.4159, 2)) == ("0.1", "3.14", "31.4")
    assert (number(0.0043, 2), number(-0.0043, 2), number(0.0043, 3)) == (
        "0.0043",
        "-0.0043",
        "0.004",
    )


@given(st.floats(-9e4, 9e4).filter(lambda v: abs(v) > 1e-3))
def test_figures_say_what_they_stand_for(value):
    """Read back, a figure is within half of its last digit."""
    text = number(value).replace(",", "")
    decimals = len(text.partition(".")[2])
    assert float(text) == pytest.approx(value, abs=0.5 * 10.0**-decimals + 1e-9)


@pytest.mark.parametrize(
    "rate, text",
    [
        (0, "0 %"),
        (0.05, "5 %"),
        (0.125, "12.5 %"),
        (0.0333, "3.3 %"),
        (0.001, "0.1 %"),
        (0.00005, "0.005 %"),
        (0.000001, "0.0001 %"),
        (0.1, "10 %"),
        (0.0996, "10 %"),
        (0.999, "99.9 %"),
        (0.9999, "> 99.9 %"),
        (1, "100 %"),
    ],
)
def test_rates_as_percentages(rate, text):
    """Two or three digits; all and nothing are said only when they are."""
    assert percent(rate) == text


@given(st.integers(1, 20_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_percentages_say_what_they_stand_for(counts):
    """Of any counts: within a twentieth of a point, or of the second digit; never a false 0 or 100."""
    k, n = counts
    text = percent(k / n)
    value = float(re.fullmatch(r"(?:> )?([\d.]+) %", text)[1])
    assert value == pytest.approx(100 * k / n, abs=0.0501, rel=0.0501)
    assert (value == 0) == (k == 0)
    assert (value == 100) == (k == n)


def test_nouns_follow_their_number():
    """One image, two images, thousands with a comma."""
    shown = [plural(k, "image", "images") for k in (0, 1, 2, 1234)]
    assert shown == ["0 images", "1 image", "2 images", "1,234 images"]


def test_long_names_lose_their_middle():
    """Beginning and end stay; short ones stay whole."""
    assert clip("short") == "short"
    assert clip("x" * 300) == "x" * 300
    assert clip("abcdefghijkl", 9) == "abc … jkl"
    assert len(clip("x" * 301)) <= 300
    long = clip("a" * 400 + "b" * 400)
    assert long == "a" * 148 + " … " + "b" * 148


@pytest.mark.parametrize(
    "path, end",
    [
        ("/data/parts/good/001.png", "good/001.png"),
        ("001.png", "001.png"),
        ("C:\\parts\\good\\001.png", "good/001.png"),
        ("parts/good/", "parts/good"),
        ("image 3", "image 3"),
    ],
)
def test_the_last_two_parts_of_a_path(path, end):
    """Enough to know an image by, on any system."""
    assert tail(path) == end


def test_a_very_long_file_name_is_cut():
    """It stays on its line."""
    assert len(tail("x/" + "y" * 500 + ".png")) < 70


@pytest.mark.parametrize(
    "facts, text",
    [
        ({}, "Nothing has been scored yet: this page shows what the training left behind."),
        ({"images": 9}, "0 of 9 images are flagged as unusual."),
        ({"images": 9, "flagged": 1}, "1 of 9 images is flagged as unusual."),
        ({"images": 1, "flagged": 1}, "1 of 1 image is flagged as unusual."),
        ({"images": 4321, "flagged": 1234}, "1,234 of 4,321 images are flagged as unusual."),
        (
            LABELLED | {"false_alarms": 3, "found": 9},
            "9 of 10 anomalous images found; 3 of 40 normal images flagged by mistake.",
        ),
        (
            LABELLED | {"false_alarms": 1, "found": 1, "normals": 1, "anomalies": 1},
            "1 of 1 anomalous image found; 1 of 1 normal image flagged by mistake.",
        ),
        (
            LABELLED | {"anomalies": 0, "false_alarms": 2, "found": 0},
            "2 of 40 normal images flagged by mistake.",
        ),
    ],
)
def test_the_decision_in_a_sentence(facts, text):
    """What was found, in plain language, with and without labels."""
    assert sentence(summary(**facts)) == text


ASKED = "Asked for: at most 5 % false alarms"


@pytest.mark.parametrize(
    "facts, text",
    [
        ({}, f"{ASKED}."),
        ({"n_conformal": 1020}, f"{ASKED}, set on 1,020 normal images kept aside."),
        (
            {"images": 30, "expected95": (0, 0.125)},
            f"{ASKED}. Were all of these images normal, between 0 % and 12.5 % would be flagged "
            "by chance.",
        ),
        (
            LABELLED | {"false_alarms": 2, "expected95": (0.025, 0.1), "n_conformal": 99},
            f"{ASKED}, set on 99 normal images kept aside. Realised: 5 %, as expected "
            "(95 % of such sets lie between 2.5 % and 10 %).",
        ),
    ],
)
def test_the_promise_in_words(facts, text):
    """The rate asked for, what it was set on, and what to expect of it."""
    assert promise(summary(**facts)) == text


@pytest.mark.parametrize(
    "alarms, verdict",
    [
        (0, "fewer than expected"),
        (1, "as expected"),
        (4, "as expected"),
        (5, "more than expected"),
        (40, "more than expected"),
    ],
)
def test_the_verdict_on_false_alarms(alarms, verdict):
    """Within the interval, its ends included, is as expected; nothing is made to look better."""
    s = summary(**LABELLED, false_alarms=alarms, expected95=(1 / 40, 4 / 40))
    assert f"Realised: {percent(alarms / 40)}, {verdict} (" in promise(s)


def test_the_tiles_beside_the_sentence():
    """Images, flagged, found and false alarms, and what the caller adds; none that means nothing."""
    s = summary(**LABELLED, false_alarms=5, found=9, unreadable=2, figures=(("a", "b", "c"),))
    assert tiles(s) == [
        ("Images", "50", "2 unreadable"),
        ("Flagged", "14", "28 %"),
        ("Anomalies found", "90 %", "9 / 10"),
        ("False alarms", "12.5 %", "5 / 40, asked 5 %"),
        ("a", "b", "c"),
    ]
    assert tiles(summary(images=2000, flagged=100)) == [
        ("Images", "2,000", ""),
        ("Flagged", "100", "5 %"),
    ]
    assert tiles(summary()) == [("Images", "0", "")]


def test_p_values_in_words():
    """What a newcomer understands, and nothing where there is no p-value."""
    assert in_words(None) == ""
    assert in_words(0.5) == "ordinary: 50 % of normal images reach it"
    assert in_words(0.03, 99) == "only 3 % of normal images reach it"
    assert in_words(0.001, 999) == "higher than all 999 normal images kept aside"


@given(st.lists(st.integers(0, 9), min_size=1, max_size=300), st.integers(-1, 10))
def test_higher_than_all_is_said_when_it_is(reference, score):
    """Exactly when no normal image kept aside scores as high."""
    p = float(conformal_p(np.array([float(score)]), np.array(reference, dtype=float))[0])
    assert ("higher than all" in in_words(p, len(reference))) == (score > max(reference))


def test_a_score_is_read_from_both_tails():
    """The rarer tail speaks; what one in ten normal images does in either is ordinary."""
    assert reading("detail", 0.998, 0.004) == "as blurred as the bluntest 0.4 % of normal images"
    assert reading("detail", 0.004, 0.998) == "as busy as the busiest 0.4 % of normal images"
    assert reading("kl", 0.3, 0.7).startswith("ordinary: 30 %")
    assert reading("of another kind", 0.01, 1.0) == "as high as the highest 1 % of normal images"


def test_beyond_all_that_were_kept_aside_is_said():
    """The least p-value of n images says no more than that none of them reached it."""
    assert reading("fused", 0.01, 1.0, 99).endswith("or beyond: outside all 99 kept aside")
    assert "beyond" not in reading("fused", 0.02, 0.99, 99)


def test_every_score_has_its_own_words():
    """No score of the ablation is read as "high" or "low" only, but the seed's sums."""
    assert set(ABOUT) - set(EXTREMES) == {"weighted", "weighted_raw"}
