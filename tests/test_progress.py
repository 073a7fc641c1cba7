"""When it is worth to say something."""

import pytest

from msvae.core import progress
from msvae.core.progress import Throttle, during


def test_at_once_and_then_seldom(monkeypatch):
    """By a clock that the test turns."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    worth_saying = Throttle(0.5)
    told = []
    for at in (100.0, 100.1, 100.49, 100.5, 100.9, 101.1, 107.0):
        now[0] = at
        told.append(worth_saying())
    assert told == [True, False, False, True, False, True, True]


class Recorder:
    """A `Progress` that writes down what happens."""

    def __init__(self):
        self.events = []

    def track(self, items, task, total):
        """Yield the items; write down when each begins and when all are done."""
        for item in items:
            self.events.append(f"{task} of {total}")
            yield item
        self.events.append(f"{task} done")


def test_work_that_is_one_call_is_shown_while_it_lasts():
    """As one step, which begins before the work and ends after it; its result comes back."""
    shown = Recorder()
    assert during(shown, "making the graph", lambda: shown.events.append("work") or 7) == 7
    assert shown.events == ["making the graph of 1", "work", "making the graph done"]


def test_work_that_fails_is_not_called_done():
    """Its error reaches the caller."""
    shown = Recorder()

    def fails():
        raise ValueError("no graph")

    with pytest.raises(ValueError, match="no graph"):
        during(shown, "making the graph", fails)
    assert shown.events == ["making the graph of 1"]
