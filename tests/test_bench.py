"""The speed benchmark's own arithmetic: rounds, ratios and bars. It is run by `make bench`."""

import json

import pytest
from bench.rows import Row, compared, interleaved, rates, timed


def test_contestants_take_turns():
    """A B A B …; the first round warms up and does not count."""
    calls = []

    def contestant(name):
        def once():
            calls.append(name)
            return float(len(calls))

        return once

    told = interleaved({"a": contestant("a"), "b": contestant("b")}, 2)
    assert calls == ["a", "b"] * 3
    assert told == {"a": [3.0, 5.0], "b": [4.0, 6.0]}


def test_the_ratio_is_the_median_of_the_rounds():
    """Not the ratio of medians: both of a round saw the same machine."""
    row = compared("x", [10, 30, 20], [10, 10, 40], unit="images/s", bar=">= 0.9")
    assert (row.value, row.against, row.ratio, row.spread) == (20, 10, 1.0, (0.5, 3.0))
    assert row.holds
    assert json.loads(json.dumps(row.to_json()))["spread"] == [0.5, 3.0]


@pytest.mark.parametrize(
    ("ratio", "bar", "holds"),
    [
        (0.92, ">= 0.92", True),
        (0.91, ">= 0.92", False),
        (1.5, "<= 1.5", True),
        (1.51, "<= 1.5", False),
        (3.0, "", None),
        (None, ">= 1", None),
    ],
)
def test_a_bar_holds_or_not(ratio, bar, holds):
    """Both ways round; without a bar nothing is said."""
    assert Row("x", 1.0, "s", 1.0, ratio, bar, (1.0, 1.0)).holds is holds


def test_rates_and_times():
    """Images a second; the work is done once."""
    done = []
    assert timed(lambda: done.append(1))() >= 0
    assert done == [1]
    assert rates([2.0, 4.0], 8) == [4.0, 2.0]
