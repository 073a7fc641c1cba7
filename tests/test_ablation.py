"""The variants of the fused score against the fused score itself, and against their definitions."""

import numpy as np
import pytest
from scipy import stats

from msvae.benchmarks.ablation import ablation_markdown
from msvae.scores.ablation import STOUFFER, WITHOUT, variants
from msvae.scores.catalog import FUSED_SCORES
from msvae.scores.fusion import Fusion


@pytest.fixture
def fitted():
    """A fusion of 400 training images, and the scores of 50 others as columns of a table."""
    rng = np.random.default_rng(0)
    training = rng.normal(size=(400, len(FUSED_SCORES)))
    weights = np.linspace(0.3, 1, len(FUSED_SCORES))
    others = 1.5 * rng.normal(size=(50, len(FUSED_SCORES)))
    fusion = Fusion.fit(training, weights)
    return fusion, training, weights, others


def columns(scores):
    return {name: scores[:, i] for i, name in enumerate(FUSED_SCORES)}


@pytest.mark.parametrize("left_out", range(len(FUSED_SCORES)))
def test_a_score_left_out_is_one_that_never_was(fitted, left_out):
    """The same as a fusion of training images on which that score was constant."""
    _, training, weights, others = fitted
    silent = training.copy()
    silent[:, left_out] = 0
    never = Fusion.fit(silent, weights)(others)
    found = variants(fitted[0], columns(others))[WITHOUT.format(FUSED_SCORES[left_out])]
    np.testing.assert_allclose(found, never, rtol=1e-9)


def test_the_other_joins_are_those_of_the_p_values(fitted):
    """Tippett's, the harmonic mean's, Stouffer's and Fisher's, by scipy where all weigh one."""
    _, training, _, others = fitted
    fusion = Fusion.fit(training, np.ones(len(FUSED_SCORES)))
    found = variants(fusion, columns(others))
    p = np.exp(-fusion.surprisals(others))
    fisher = [stats.combine_pvalues(row, "fisher").statistic / 2 for row in p]
    np.testing.assert_allclose(found["sum (Fisher)"], fisher)
    np.testing.assert_allclose(found["greatest (least p)"], -np.log(p.min(axis=1)))
    np.testing.assert_allclose(found["harmonic mean of p"], -np.log(stats.hmean(p, axis=1)))
    gaussian = stats.norm.sf(fusion.standardised(others))
    stouffer = [stats.combine_pvalues(row, "stouffer").statistic for row in gaussian]
    np.testing.assert_allclose(found[STOUFFER], stouffer, atol=1e-6)


def test_the_table_names_every_score_once_and_what_is_missing():
    """Sets side by side; a score that a set lacks is a dash."""
    block = {"auroc": 0.9, "auroc_ci95": (0.85, 0.95)}
    one = {"scores": {"fused": block, "order": block}, "ablation": {"without order": block}}
    two = {"scores": {"fused": block}, "ablation": {}}
    lines = ablation_markdown({"flowers": one, "bottle": two}).splitlines()
    assert "| order | 0.900 (0.850–0.950) | – |" in lines
    assert "| fused | 0.900 (0.850–0.950) | 0.900 (0.850–0.950) |" in lines
    assert "| without order | 0.900 (0.850–0.950) | – |" in lines
    assert {line.count("|") for line in lines if line} == {4}
