"""When it is worth to say something."""

from msvae import progress
from msvae.progress import Seldom


def test_at_once_and_then_seldom(monkeypatch):
    """By a clock that the test turns."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    worth_saying = Seldom(0.5)
    told = []
    for at in (100.0, 100.1, 100.49, 100.5, 100.9, 101.1, 107.0):
        now[0] = at
        told.append(worth_saying())
    assert told == [True, False, False, True, False, True, True]
