"""One measurement is a row: a value, what it is held against, their ratio, and whether the bar holds."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch

Once = Callable[[], float]  # does the work once; returns seconds, or whatever is measured


@dataclass(frozen=True)
class Row:
    """As it stands in results.json."""

    name: str
    value: float | None
    unit: str
    against: float | None
    ratio: float | None
    bar: str  # ">= 0.92", "<= 1.5", or "" where nothing is asked
    spread: tuple[float, float] | None  # least and greatest ratio of single rounds
    note: str = ""

    @property
    def holds(self) -> bool | None:
        """Whether the ratio keeps the bar; None without a bar or without a ratio."""
        if not self.bar or self.ratio is None:
            return None
        sign, number = self.bar.split()
        return self.ratio >= float(number) if sign == ">=" else self.ratio <= float(number)

    def to_json(self) -> dict[str, Any]:
        """Numbers rounded to what they are worth."""
        values = {k: _rounded(v) for k, v in asdict(self).items()}
        return {**values, "holds": self.holds}


def _rounded(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_rounded(v) for v in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def interleaved(contestants: Mapping[str, Once], rounds: int) -> dict[str, list[float]]:
    """What each contestant measures in each round, A B C A B C …, after one that does not count.

    Whatever else the machine does so falls on all of them alike.
    """
    measured: dict[str, list[float]] = {name: [] for name in contestants}
    for i in range(rounds + 1):
        for name, once in contestants.items():
            value = once()
            if i:
                measured[name].append(value)
    return measured


def timed(work: Callable[[], object]) -> Once:
    """Seconds that the work takes; a GPU works on behind Python's back and is waited for."""

    def once() -> float:
        began = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - began

    return once


def compared(
    name: str,
    ours: list[float],
    theirs: list[float],
    *,
    unit: str,
    bar: str,
    note: str = "",
) -> Row:
    """Medians of both, and the median and the spread of the ratios round by round."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return Row(
        name,
        median(ours),
        unit,
        median(theirs),
        median(ratios),
        bar,
        (min(ratios), max(ratios)),
        note,
    )


def single(name: str, ours: float, theirs: float, *, unit: str, bar: str, note: str = "") -> Row:
    """A row that was measured once."""
    return compared(name, [ours], [theirs], unit=unit, bar=bar, note=note)


def missing(name: str, *, unit: str, bar: str, note: str) -> Row:
    """A row that could not be measured; the note says why."""
    return Row(name, None, unit, None, None, bar, None, note)


def rates(seconds: list[float], count: int) -> list[float]:
    """Images a second."""
    return [count / s for s in seconds]
