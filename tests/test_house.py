"""The house: which room may know which library, and a word for every score."""

import ast
from pathlib import Path

import numpy as np
import pytest

import msvae
from msvae.scores.catalog import (
    ABOUT,
    EXTREMES,
    FUSED_SCORES,
    GRAPH_SCORES,
    MAP_SCORES,
    MAPS,
    NUMBERS,
    STATISTICS,
    TITLES,
    UNITS,
)
from msvae.scores.density import TwoSided
from msvae.scores.feedback import Feedback
from msvae.scores.fusion import Fusion
from msvae.scores.verdict import Verdict, WeightedSum, group_columns, statistics_of

SOURCE = Path(msvae.__file__).parent
ENGINES = ("openvino", "onnxruntime", "ctypes", "torch.jit", "torch.cpu", "torch.backends")
ROOMS = ("networks", "scores", "ops")
# What EXTREMES lacks says of itself that it is as high as the highest: sums of the seed method.
PLAIN = {"weighted", "weighted_raw"}


def modules_named(tree):
    """Every dotted name that a file imports or reads, such as `torch.backends.mkldnn`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield ast.unparse(node)


def engines_in(text):
    """The engines that a file's text names as a module."""
    names = list(modules_named(ast.parse(text)))
    return {e for e in (*ENGINES, "msvae.engine") for n in names if f"{n}.".startswith(f"{e}.")}


@pytest.mark.parametrize("room", ROOMS)
def test_formulas_know_no_engine(room):
    """Networks, scores and filters are plain torch and numpy: another engine changes none of them."""
    files = [*(SOURCE / room).rglob("*.py")]
    assert len(files) > 1
    assert {f.name: engines_in(f.read_text(encoding="utf-8")) for f in files} == {
        f.name: set() for f in files
    }


@pytest.mark.parametrize(
    "text, engine",
    [
        ("import openvino.runtime", "openvino"),
        ("from ctypes import cdll", "ctypes"),
        ("from torch import jit", "torch.jit"),
        (
            "import torch\ndef f():\n    return torch.backends.mkldnn.is_available()",
            "torch.backends",
        ),
        ("from msvae.engine.choose import choose", "msvae.engine"),
    ],
)
def test_an_engine_in_a_room_would_be_seen(text, engine):
    """However it is imported: the check above can fail."""
    assert engines_in(text) == {engine}


def scores_given():
    """The names of the scores that a verdict gives, of random numbers."""
    numbers = np.random.default_rng(0).normal(size=(60, len(NUMBERS)))
    statistics = statistics_of(numbers)
    two_sided = {
        name: TwoSided.fit(statistics[:, group_columns(group)], components=1)
        for name, group in (("bands", "residual bands"), ("complexity", "image bands"))
    }
    fused = np.random.default_rng(1).normal(size=(60, len(FUSED_SCORES)))
    verdict = Verdict(
        beta=1.0,
        size=3,
        variance=1.0,
        weighted=WeightedSum(0.6, np.zeros(2), np.ones(2)),
        typicality=TwoSided.fit(statistics, components=1),
        fusion=Fusion.fit(fused, np.ones(len(FUSED_SCORES))),
        feedback=Feedback.none(1),
        **two_sided,
    )
    return list(verdict(numbers))


@pytest.mark.parametrize("name", sorted({*GRAPH_SCORES, *FUSED_SCORES, *scores_given()}))
def test_every_score_has_words(name):
    """What it is, and what it says of an image when it is high or low."""
    assert ABOUT[name]
    assert name in PLAIN or all(EXTREMES[name])


def test_there_are_words_for_nothing_else():
    """A score that is gone leaves no word behind; `detail` is told of statistics."""
    given = set(scores_given())
    assert set(ABOUT) == given
    assert set(EXTREMES) == given - PLAIN | {"detail"}


def test_the_graphs_columns_are_named_once():
    """Scores, then statistics, no name twice; what is fused is given, and every map has its words."""
    assert (*GRAPH_SCORES, *STATISTICS) == NUMBERS
    assert len(set(NUMBERS)) == len(NUMBERS)
    assert set(MAP_SCORES) <= set(GRAPH_SCORES)
    assert set(FUSED_SCORES) <= set(scores_given())
    assert set(MAPS) <= set(TITLES)
    assert set(MAPS) <= set(UNITS)
