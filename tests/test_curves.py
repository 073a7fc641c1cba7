"""Figures: the same numbers draw the same picture, and no legend is left to be placed by search."""

import ast
from pathlib import Path

import matplotlib
import numpy as np
import pytest

import msvae
from msvae.viz import curves

SOURCES = sorted(Path(msvae.__file__).parent.rglob("*.py"))


def legends():
    """Every call of a `legend` in the package, with the file it stands in."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "legend":
                yield path.name, node


def test_every_legend_is_placed():
    """Looking for the best place takes as long as there are points, and warns on a busy machine."""
    found = list(legends())
    assert found
    for name, call in found:
        places = [k.value.value for k in call.keywords if k.arg == "loc"]
        assert len(places) == 1, f"{name}:{call.lineno}: a legend without a place"
        assert places[0] not in ("best", 0), f"{name}:{call.lineno}"


@pytest.fixture(scope="module")
def drawn():
    """Every figure of a few scores, and of ten epochs."""
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 50)
    scores = {k: rng.normal(labels + 1.0) for k in ("fused", "kl", "typicality")}
    history = [
        {"epoch": i, "reconstruction": 1 / i, "kl": i, "stop_loss": -i} for i in range(1, 11)
    ]
    return {
        "roc": curves.roc_figure(labels, scores),
        "precision_recall": curves.precision_recall_figure(labels, scores),
        "distribution": curves.distribution_figure(labels, scores["fused"], 1.5),
        "calibration": curves.calibration_figure(rng.random(50), 99),
        "training": curves.training_figure(history),
    }


def test_no_figure_searches_for_a_place(drawn):
    """What matplotlib itself holds of every legend: a place, not its code 0 for `best`."""
    placed = [a.get_legend() for figure in drawn.values() for a in figure.axes if a.get_legend()]
    assert len(placed) == 4
    assert all(legend._loc != 0 for legend in placed)
    assert matplotlib.legend.Legend.codes["best"] == 0


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_the_same_figure_has_the_same_bytes(kind, drawn):
    """So that a run made twice differs in nothing."""
    figure = drawn["roc"]
    first = curves.as_bytes(figure, kind)
    assert first.startswith(b"\x89PNG" if kind == "png" else b"<?xml")
    assert curves.as_bytes(figure, kind) == first
