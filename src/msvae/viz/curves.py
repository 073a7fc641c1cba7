"""Figures from numbers, with matplotlib's object interface: no global state, no window."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from msvae.evaluation import metrics
from msvae.evaluation.metrics import Floats, Ints

# Okabe & Ito 2008: told apart by colour-blind eyes too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C8C8C")
SHOWN = (
    "fused",
    "typicality",
    "neighbours",
    "order",
    "spatial",
    "structure",
    "inspection",
    "weighted",
    "reconstruction",
    "mahalanobis",
)


def _figure(width: float = 5.2, height: float = 4.0) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _quiet(axes: Any, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)


def roc_figure(labels: Ints, scores: Mapping[str, Floats]) -> Any:
    """ROC curves of the main scores; `fused` drawn strongest."""
    figure, axes = _figure()
    axes.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=0.8)
    for name, colour in _shown(scores):
        fpr, tpr, _ = metrics.roc_curve(labels, scores[name])
        area = metrics.auroc(labels, scores[name])
        axes.plot(fpr, tpr, color=colour, label=f"{name} {area:.3f}", **_weight(name))
    _quiet(axes, "false-alarm rate", "share of anomalies found")
    axes.legend(loc="lower right", frameon=False, fontsize=8, title="AUROC", title_fontsize=8)
    return figure


def precision_recall_figure(labels: Ints, scores: Mapping[str, Floats]) -> Any:
    """Precision-recall curves of the main scores."""
    figure, axes = _figure()
    for name, colour in _shown(scores):
        precision, recall = metrics.precision_recall_curve(labels, scores[name])
        area = metrics.average_precision(labels, scores[name])
        axes.plot(recall, precision, color=colour, label=f"{name} {area:.3f}", **_weight(name))
    axes.set_ylim(0, 1.02)
    _quiet(axes, "share of anomalies found", "share of alarms that are right")
    axes.legend(
        loc="lower left", frameon=False, fontsize=8, title="average precision", title_fontsize=8
    )
    return figure


def distribution_figure(labels: Ints, scores: Floats, threshold: float | None = None) -> Any:
    """Histograms of one score on normal and anomalous images, on a symmetric-log axis."""
    figure, axes = _figure()
    low, high = np.quantile(scores, [0, 1])
    knee = max(float(np.quantile(np.abs(scores[labels == 0]), 0.95)), 1e-9)

    def forward(value: Any) -> Any:
        return np.arcsinh(value / knee)

    def back(bent: Any) -> Any:
        return np.sinh(bent) * knee

    edges = back(np.linspace(forward(low), forward(high), 60))
    for value, name, colour in ((0, "normal", COLOURS[0]), (1, "anomalous", COLOURS[1])):
        part = scores[labels == value]
        share = np.full(len(part), 1 / max(len(part), 1))
        axes.hist(
            part, edges, weights=share, color=colour, alpha=0.55, label=f"{name} ({len(part)})"
        )
    axes.set_xscale("function", functions=(forward, back))
    ticks = _ticks(knee, low, high)
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    if threshold is not None:
        axes.axvline(threshold, color="#333333", linewidth=1.2, linestyle="--", label="threshold")
    _quiet(axes, "fused score (nats)", "share of the images")
    axes.legend(loc="upper right", frameon=False, fontsize=8)
    return figure


def _ticks(knee: float, low: float, high: float) -> list[float]:
    """Round scores between the ends, at least a tenth of the axis apart."""
    step = 10 ** np.floor(np.log10(knee))
    round_ones = [float(m * step * 10.0**k) for k in range(-1, 8) for m in (1, 2, 5)]
    inside = [t for t in (0.0, *round_ones) if low <= t <= high]
    least = 0.1 * (np.arcsinh(high / knee) - np.arcsinh(low / knee))
    chosen: list[float] = []
    for tick in inside:
        if not chosen or np.arcsinh(tick / knee) - np.arcsinh(chosen[-1] / knee) >= least:
            chosen.append(tick)
    return chosen


def training_figure(history: Sequence[Mapping[str, float]]) -> Any:
    """Reconstruction error and KL by epoch, each on its own axis, and the loss on the stop part."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 2.8), layout="constrained")
    panels = {
        "reconstruction": "squared error a pixel value",
        "kl": "KL (nats an image)",
        "stop_loss": "loss on the stop part",
    }
    epochs = [row["epoch"] for row in history]
    for axes, (key, label), colour in zip(
        figure.subplots(1, 3), panels.items(), COLOURS, strict=False
    ):
        axes.plot(epochs, [row[key] for row in history], color=colour, linewidth=1.6, marker=".")
        _quiet(axes, "epoch", label)
        axes.margins(x=0.03)
    return figure


def calibration_figure(p_normal: Floats, n_conformal: int) -> Any:
    """Realised against nominal false-alarm rate, with the band that chance allows."""
    figure, axes = _figure()
    rates = np.arange(1, 51) / 100
    rates = rates[rates >= 1 / (n_conformal + 1)]
    bands = [metrics.false_alarm_interval(n_conformal, len(p_normal), r) for r in rates]
    low, high = np.array(bands).T
    axes.fill_between(
        rates, low, high, color=COLOURS[0], alpha=0.18, linewidth=0, label="expected 95 %"
    )
    axes.plot(rates, rates, color="#bbbbbb", linewidth=0.8)
    realised = [(p_normal <= r + 1e-12).mean() for r in rates]
    axes.plot(rates, realised, color=COLOURS[0], linewidth=1.8, label="realised")
    _quiet(axes, "false-alarm rate asked for", "false-alarm rate on test normals")
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    return figure


def _shown(scores: Mapping[str, Floats]) -> list[tuple[str, str]]:
    names = [n for n in SHOWN if n in scores] or list(scores)[: len(COLOURS)]
    return list(zip(names, COLOURS, strict=False))


def _weight(name: str) -> dict[str, float]:
    strong = name == "fused"
    return {"linewidth": 2.4 if strong else 1.1, "zorder": 3.0 if strong else 2.0}


def as_bytes(figure: Any, kind: str) -> bytes:
    """The figure as `png` or `svg`; the same figure gives the same bytes."""
    import matplotlib as mpl

    stream = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "msvae", "svg.fonttype": "none"}):
        metadata = {"Date": None} if kind == "svg" else None
        figure.savefig(stream, format=kind, dpi=160, metadata=metadata)
    return stream.getvalue()
