"""What a threshold does: exact counts over a grid of thresholds, small however many the images.

The page of the report moves through these counts without the scores themselves.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from msvae.core.errors import DataError

Numbers = NDArray[np.float64]
GRID = 1000
RATES = 160
BINS = 56


@dataclass(frozen=True, kw_only=True)
class ThresholdData:
    """The fused scores of all images, for the threshold slider.

    `p` are their p-values (None: the slider is over the score alone), `labels` 0 normal and
    1 anomalous or None. `threshold` is where the slider starts without p-values.
    """

    scores: Numbers
    p: Numbers | None = None
    labels: NDArray[np.int64] | None = None
    target_fpr: float = 0.05
    n_conformal: int | None = None
    threshold: float | None = None
    name: str = ""

    def __post_init__(self) -> None:
        if not np.isfinite(self.scores).all():
            raise DataError("some scores are not finite numbers: leave these images out")
        for other in (self.p, self.labels):
            if other is not None and len(other) != len(self.scores):
                raise DataError("scores, p-values and labels must be equally many")

    @property
    def groups(self) -> list[Numbers]:
        """The scores of normal and anomalous images apart, or all of them."""
        if self.labels is None:
            return [self.scores]
        return [self.scores[self.labels == k] for k in (0, 1)]


@dataclass(frozen=True)
class Axis:
    """The score axis of the plot: linear, or of equal asinh steps when the tails are long."""

    low: float
    high: float
    centre: float
    width: float
    bent: bool

    @classmethod
    def of(cls, o: ThresholdData) -> "Axis":
        """The axis that holds all scores, most open where the normal ones lie."""
        scores, normals = o.scores, o.groups[0] if o.groups[0].size else o.scores
        if scores.size == 0:
            return cls(0, 1, 0, 1, False)
        low, high = float(scores.min()), float(scores.max())
        quarter, centre, three = (float(q) for q in np.quantile(normals, [0.25, 0.5, 0.75]))
        width = three - quarter or float(normals.std()) or 1.0
        room = 0 if high > low else max(1.0, abs(low) / 10)
        return cls(low - room, high + room, centre, width, high - low > 12 * width)

    def bend(self, scores: Numbers) -> Numbers:
        """Score to plot unit."""
        bent: Numbers = np.arcsinh((scores - self.centre) / self.width)
        return bent if self.bent else scores

    def place(self, scores: Numbers) -> Numbers:
        """Score to position, 0 at the left end and 1 at the right; beyond it is cut."""
        ends = self.bend(np.array([self.low, self.high]))
        margin = 0.02 * (ends[1] - ends[0])
        at: Numbers = (self.bend(scores) - ends[0] + margin) / (ends[1] - ends[0] + 2 * margin)
        return at.clip(0, 1)

    def ticks(self, count: int = 6) -> list[tuple[float, str]]:
        """Round scores with their positions."""
        ends = self.bend(np.array([self.low, self.high]))
        even = np.linspace(ends[0], ends[1], count)
        if not self.bent:
            values = _round_steps(self.low, self.high, count)
        else:
            values = self.centre + self.width * np.sinh(even)
        step = float(np.diff(values).min()) if len(values) > 1 else 0.0
        labels = {_plain(v, step): v for v in values.tolist()}
        at = {text: float(text.replace(",", "")) for text in labels}
        inside = {text: v for text, v in at.items() if self.low <= v <= self.high}
        return list(zip(self.place(np.array(list(inside.values()))).tolist(), inside, strict=True))


def _round_steps(low: float, high: float, count: int) -> Numbers:
    rough = (high - low) / count
    power = 10.0 ** np.floor(np.log10(rough))
    step = power * min((1, 2, 5, 10), key=lambda m: abs(m * power - rough))
    steps: Numbers = np.arange(np.ceil(low / step), np.floor(high / step) + 1) * step
    return steps


def _plain(value: float, step: float) -> str:
    """As many digits as tell neighbouring ticks apart, without an exponent where that stays short."""
    if value == 0:
        return "0"
    digits = max(2, 1 + int(np.floor(np.log10(abs(value) / step)))) if step else 2
    rounded = float(f"{value:.{digits}g}")
    whole = rounded == round(rounded) and 10 <= abs(rounded) < 1e7
    return f"{rounded:,.0f}" if whole else f"{rounded:.{digits}g}"


def grid(o: ThresholdData) -> Numbers:
    """Ascending thresholds, scores of the images; every one of them where they are few."""
    values = np.unique(o.scores)
    if values.size <= GRID:
        return values
    even = np.linspace(0, 1, GRID // 3)
    parts = [np.quantile(g, even, method="higher") for g in o.groups if g.size]
    places = Axis.of(o).place(values)
    at = np.searchsorted(places, np.linspace(0, 1, GRID // 3)).clip(0, values.size - 1)
    asked = rate_thresholds(o)[1]
    return np.unique(np.concatenate([*parts, values[at], asked[np.isfinite(asked)], values[-1:]]))


def rates(o: ThresholdData) -> Numbers:
    """False-alarm rates that the slider offers, ascending: what the calibration can keep."""
    if o.p is None or o.p.size == 0:
        return np.empty(0)
    steps = o.n_conformal + 1 if o.n_conformal else None
    every = np.arange(1, steps) / steps if steps else np.unique(o.p)
    every = every[every <= 0.5] if (every <= 0.5).any() else every[:1]
    if every.size > RATES:
        index = np.geomspace(1, every.size, RATES).round().astype(int) - 1
        every = every[np.unique(index)]
    if steps is None or o.target_fpr >= 1 / steps:  # an asked rate that can be kept
        near = np.isclose(every, o.target_fpr, rtol=1e-9, atol=0)
        every = np.append(every[~near], o.target_fpr)
    return np.unique(every)


def rate_thresholds(o: ThresholdData) -> tuple[Numbers, Numbers]:
    """The offered rates and the smallest score with p <= rate (infinite where there is none)."""
    offered = rates(o)
    if o.p is None:
        return offered, np.empty(0)
    order = np.argsort(o.p, kind="stable")
    lowest = np.minimum.accumulate(o.scores[order])
    count = np.searchsorted(o.p[order], offered * (1 + 1e-12), side="right")
    return offered, np.append(np.inf, lowest)[count]


def counts_above(scores: Numbers, thresholds: Numbers) -> NDArray[np.int64]:
    """How many scores are at or above each threshold."""
    return len(scores) - np.searchsorted(np.sort(scores), thresholds, side="left")


def outline_path(scores: Numbers, axis: Axis, height: float = 100, width: float = 1000) -> str:
    """The histogram of one group as a filled SVG path, its tallest bar `height`."""
    at = axis.place(scores)
    counts, _ = np.histogram(at, bins=BINS, range=(0, 1))
    tall = counts / max(1, counts.max()) * height
    edges = np.linspace(0, width, BINS + 1)
    steps = "".join(
        f"L{a:.0f} {height - h:.1f}L{b:.0f} {height - h:.1f}"
        for a, b, h in zip(edges[:-1], edges[1:], tall, strict=True)
    )
    return f"M0 {height:g}{steps}L{width:g} {height:g}Z"


def page_data(o: ThresholdData) -> dict[str, object]:
    """What the page's script reads: thresholds, their places, counts, and where each rate lies.

    The last entry of every list is the threshold above all scores: nothing is flagged.
    """
    thresholds = grid(o)
    axis = Axis.of(o)
    alpha, at_rate = rate_thresholds(o)
    index = np.searchsorted(thresholds, at_rate)
    return {
        "t": [*(float(f"{t:.6g}") for t in thresholds), None],
        "x": [*axis.place(thresholds).round(5).tolist(), 1],
        "above": [[*counts_above(g, thresholds).tolist(), 0] for g in o.groups],
        "n": [len(g) for g in o.groups],
        "rates": alpha.tolist(),
        "at": index.tolist(),
        "target": o.target_fpr,
        "start": _start(o, thresholds, alpha, index),
    }


def _start(o: ThresholdData, thresholds: Numbers, alpha: Numbers, index: NDArray[np.int64]) -> int:
    if o.p is None or alpha.size == 0:
        threshold = np.inf if o.threshold is None else o.threshold
        return int(np.searchsorted(thresholds, threshold))
    keep = alpha <= o.target_fpr * (1 + 1e-12)
    return int(index[keep][-1]) if keep.any() else len(thresholds)
