"""Figures and decisions in plain words."""

import math

from msvae.scores.catalog import EXTREMES, OTHERWISE

Interval = tuple[float, float]
NAME_LENGTH = 300


def clip(text: str, length: int = NAME_LENGTH) -> str:
    """A text with its middle left out where it is longer than the page can bear."""
    half = (length - 3) // 2
    return text if len(text) <= length else f"{text[:half]} … {text[-half:]}"


def tail(name: str) -> str:
    """The last two parts of a path."""
    return clip("/".join(name.replace("\\", "/").rstrip("/").split("/")[-2:]), 60)


def number(value: float | str | None, digits: int = 3) -> str:
    """A figure for a table: `digits` decimals, fewer where it is large, two digits where they show none.

    A dash for none.
    """
    if isinstance(value, str):
        return value
    if value is None or not math.isfinite(value):
        return "–"
    if value and not 10.0**-digits <= abs(value) < 1e5:
        return f"{value:.2g}"
    rounded = f"{abs(value):.{digits}f}"  # before the digits are counted: 999.96 has four of them
    large = len(rounded.split(".")[0]) - 1
    return f"{value:,.{max(0, digits - large)}f}"


def percent(rate: float) -> str:
    """A rate as a percentage of two or three digits."""
    value = 100 * rate
    text = f"{value:.1f}" if value >= 9.95 else f"{value:.2g}"
    if text == "100.0" and rate < 1:
        return "> 99.9 %"
    return (text.removesuffix(".0") if "e" not in text else f"{value:.5f}") + " %"


def plural(count: int, one: str, many: str) -> str:
    """The count with its noun."""
    return f"{count:,} {one if count == 1 else many}"


def in_words(p: float | None, n_conformal: int | None = None) -> str:
    """A p-value as a sentence a newcomer understands."""
    if p is None:
        return ""
    if n_conformal and p * (n_conformal + 1) < 1.5:
        return f"higher than all {n_conformal:,} normal images kept aside"
    if p > 0.2:
        return f"ordinary: {percent(p)} of normal images reach it"
    return f"only {percent(p)} of normal images reach it"


def reading(name: str, p_high: float, p_low: float, n_conformal: int | None = None) -> str:
    """What a score says of an image, by its two tails: "as blurred as the bluntest 0.4 % of …"."""
    high, low = EXTREMES.get(name, OTHERWISE)
    p = min(p_high, p_low)
    if 2 * p > 0.2:
        return f"ordinary: {percent(p_high)} of normal images reach it"
    beyond = n_conformal and p * (n_conformal + 1) < 1.5
    told = f"{high if p_high <= p_low else low} {percent(p)} of normal images"
    return f"{told}, or beyond: outside all {n_conformal:,} kept aside" if beyond else told
