"""What is shown while something takes long: lines in a log, bars in a terminal."""

import io
import re
import sys

import numpy as np
import pytest
from rich.console import Console

from msvae.cli import console
from msvae.cli import main as main_module
from msvae.cli.console import BarProgress, LineProgress, Screen
from msvae.core.progress import during
from msvae.evaluation.table import ScoreTable

BARS = "━╸╺█▏▎▍▌▋▊▉\r\x1b"


class Clock:
    """A clock that the test turns."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        """The time."""
        return self.now

    def over(self, items, seconds):
        """The items, each of which takes so many seconds before the next is asked for."""
        for item in items:
            yield item
            self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    turned = Clock()
    monkeypatch.setattr(console, "time", turned)
    return turned


@pytest.fixture
def log():
    """A log file of 40 columns: too narrow for the lines, none of which may be broken."""
    return io.StringIO()


def lines_of(log):
    text = log.getvalue()
    assert not set(text) & set(BARS)
    return text.splitlines()


def spend(progress, clock, count, seconds, task="training"):
    """A loop of so many steps that take so many seconds each; what it went over."""
    done = []
    for i in progress.track(range(count), task, count):
        done.append(i)
        clock.now += seconds
    return done


def test_a_log_gets_a_line_now_and_then_and_the_end(clock, log):
    """Every ten seconds how far it is, then that it is done; no bars, nothing between."""
    progress = LineProgress(Console(file=log, width=40))
    assert spend(progress, clock, 9, 4) == list(range(9))
    assert lines_of(log) == [
        "training: 3 of 9, 12 s",
        "training: 6 of 9, 24 s",
        "training: 9 of 9, 36 s",
        "training: done, 9 in 36 s",
    ]


def test_a_log_is_spared_what_is_short(clock, log):
    """Below two seconds nothing; from then on at least the end."""
    progress = LineProgress(Console(file=log, width=40))
    spend(progress, clock, 19, 0.1, "short")
    spend(progress, clock, 10, 0.2, "long")
    assert lines_of(log) == ["long: done, 10 in 2 s"]


def test_a_log_says_every_step_if_asked(clock, log):
    """With 0 seconds between two lines each step is one, with its loop's words; 1,200 has a comma."""
    progress = LineProgress(Console(file=log, width=40), seconds=0)
    for _ in progress.track(range(2), "training", 2):
        progress.note("loss 0.5 [bold]")
        clock.now += 1
    assert lines_of(log)[:2] == [
        "training: 1 of 2, 1 s; loss 0.5 [bold]",
        "training: 2 of 2, 2 s; loss 0.5 [bold]",
    ]
    spend(progress, clock, 1200, 0, "many")
    assert "many: 1,199 of 1,200, 0 s" in lines_of(log)  # what another loop said is not its own


def test_a_single_long_step_is_said(clock, log):
    """What is one call, such as making the graph, is no silence in a log either."""

    def work():
        clock.now += 5
        return "made"

    assert during(LineProgress(Console(file=log)), "making the graph", work) == "made"
    assert lines_of(log) == ["making the graph: done, 1 in 5 s"]


def test_tasks_within_tasks(clock, log):
    """Each has its own count and its own end."""
    progress = LineProgress(Console(file=log), seconds=3)
    during(progress, "fitting scores", lambda: spend(progress, clock, 2, 4, "learning scores"))
    assert lines_of(log) == [
        "learning scores: 1 of 2, 4 s",
        "learning scores: 2 of 2, 8 s",
        "learning scores: done, 2 in 8 s",
        "fitting scores: 1 of 1, 8 s",
        "fitting scores: done, 1 in 8 s",
    ]


def test_bars_move_in_a_terminal():
    """The bar of a task is there while it lasts, with its count and the latest words."""
    file = io.StringIO()
    terminal = Console(file=file, force_terminal=True, width=120, legacy_windows=False)
    progress = BarProgress(terminal)
    for i in progress.track(range(3), "training", 3):
        progress.note(f"loss [{i}]")
        progress._bars.refresh()
    text = file.getvalue()
    assert "training" in text
    for i in range(3):
        assert f"{i}/3" in text
        assert f"loss [{i}]" in text
    assert not progress._bars.task_ids


def test_a_terminal_gets_bars_and_a_file_lines(monkeypatch):
    """By what stderr is."""
    monkeypatch.setenv("TTY_COMPATIBLE", "0")
    assert isinstance(Screen().progress, LineProgress)
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    assert isinstance(Screen().progress, BarProgress)


# The decisions of `score`.


def decided(*names):
    """A table of images, every second flagged."""
    n = len(names)
    fused, p = np.linspace(1, 1234.5, n), np.linspace(0.01, 1, n)
    flagged = np.arange(n) % 2 == 1
    return ScoreTable(names, {"fused": fused}, {"fused": p}, p, flagged)


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252"])
@pytest.mark.parametrize("width", [80, 60, 40])
def test_name_p_and_decision_always_show(width, encoding):
    """On a narrow terminal the name loses its middle, and the fused score goes first."""
    names = ["/data/" + "very/" * 30 + f"picture-{i}.png" for i in range(3)]
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    screen = Screen()
    screen.out = Console(file=file, width=width, force_terminal=True)
    screen.scores(decided(*names))
    file.seek(0)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", file.read()).splitlines()
    assert max(map(len, lines)) <= width
    for i, p, flag in ((0, "0.010", "no"), (1, "0.505", "yes"), (2, "1.000", "no")):
        (line,) = [line for line in lines if f"{i}.png" in line]
        assert p in line
        assert flag in line
    assert "fused score" not in "".join(lines)


def test_short_names_leave_room_for_the_fused_score():
    """All four columns, no name cut."""
    screen, file = Screen(), io.StringIO()
    screen.out = Console(file=file, width=60, force_terminal=True)
    screen.scores(decided("a.png", "b.png"))
    assert "fused score" in file.getvalue()
    assert "1234.500" in file.getvalue()


def test_a_console_without_the_letters_gets_question_marks(monkeypatch):
    """Under cp1252 a name in another script is printed all the same; odd bytes go out as they came."""
    for encoding, name, wanted in (
        ("cp1252", "日本.png", b"??.png"),
        ("utf-8", "\udcff.png", b"\xff.png"),
    ):
        raw = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
        main_module._print_anything()
        print(name, flush=True)
        assert raw.getvalue().strip() == wanted
