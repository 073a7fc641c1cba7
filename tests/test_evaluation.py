"""A labelled table is judged as scikit-learn and scipy would, in the form of the contract."""

import json

import numpy as np
import pytest
import sklearn.metrics
from scipy.stats import betabinom, binomtest

from msvae.core.errors import DataError
from msvae.evaluation.evaluation import at_threshold, evaluate_table, score_metrics
from msvae.evaluation.table import ScoreTable


def table(n=30, m=20, seed=0, levels=40):
    """A labelled table with a good, a middling and a useless score, with ties."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat([0, 1], [n, m]))
    scores = {
        name: np.round(levels * (rng.normal(size=n + m) + lift * labels)) / levels
        for name, lift in (("fused", 2.0), ("kl", 0.8), ("spread", 0.0))
    }
    p = rng.integers(1, 41, n + m) / 40
    return ScoreTable(tuple(map(str, range(n + m))), scores, p=p, labels=labels)


def judged(t, **more):
    given = {
        "frozen_thresholds": {"fused": 1.0, "kl": 0.5, "spread": 0.5},
        "n_conformal": 39,
        "target_fpr": 0.1,
        "image_size": 64,
        "seconds": {"fit": 2.0, "score": 1.0},
    }
    return evaluate_table("parts", t, **(given | more))


def test_every_score_is_judged_as_scikit_learn_does():
    """AUROC, average precision, FPR at 95 % TPR and F1-max of each, on all images."""
    t = table()
    for name, block in judged(t).scores.items():
        values = t.scores[name]
        fpr, tpr, _ = sklearn.metrics.roc_curve(t.labels, values, drop_intermediate=False)
        f1 = [sklearn.metrics.f1_score(t.labels, values >= v) for v in values]
        expected = {
            "auroc": sklearn.metrics.roc_auc_score(t.labels, values),
            "average_precision": sklearn.metrics.average_precision_score(t.labels, values),
            "fpr_at_95_tpr": fpr[tpr >= 0.95].min(),
            "f1_max": max(f1),
        }
        assert {k: block[k] for k in expected} == pytest.approx(expected)
        low, high = block["auroc_ci95"]
        assert low < block["auroc"] < high or low == block["auroc"] == high == 1


def test_a_judgement_does_not_depend_on_the_scale():
    """Raw scores count by their order alone, far outside [0, 1] too."""
    t = table()
    plain, stretched = (
        score_metrics(t.labels, t.scores["kl"]),
        score_metrics(t.labels, 1e6 * t.scores["kl"] - 1e9),
    )
    for key, value in plain.items():
        assert stretched[key] == pytest.approx(value)


def test_figures_at_a_threshold():
    """3 of 4 anomalies found, 1 false alarm of 2; a score on the threshold is flagged."""
    labels, scores = np.array([0, 0, 1, 1, 1, 1]), np.array([0.1, 0.5, 0.5, 0.6, 0.7, 0.2])
    got = at_threshold(labels, scores, 0.5)
    accuracy, f1 = (0.75 + 0.5) / 2, 2 * 0.75 / (1 + 0.75 + 0.5)
    expected = {"threshold": 0.5, "accuracy": accuracy, "f1": f1, "tpr": 0.75, "fpr": 0.5}
    assert got == pytest.approx(expected)


def test_thresholds_that_were_fixed_before_are_the_ones_used():
    """Frozen and best-F1, each at its own value, for the scores that have one."""
    t = table()
    frozen, best = {"fused": 1.5, "kl": -0.25}, {"kl": 0.75}
    scores = judged(t, frozen_thresholds=frozen, best_f1_thresholds=best).scores
    rules = {"frozen", "best_f1"}
    assert {k: rules & set(v) for k, v in scores.items()} == {
        "fused": {"frozen"},
        "kl": rules,
        "spread": set(),
    }
    for rule, thresholds in (("frozen", frozen), ("best_f1", best)):
        for name, threshold in thresholds.items():
            block, flagged = scores[name][rule], t.scores[name] >= threshold
            assert block["threshold"] == threshold
            assert block["tpr"] == pytest.approx(flagged[t.labels == 1].mean())
            assert block["fpr"] == pytest.approx(flagged[t.labels == 0].mean())
            weight = 1 / np.bincount(t.labels)[t.labels]
            accuracy = sklearn.metrics.accuracy_score(t.labels, flagged, sample_weight=weight)
            assert block["accuracy"] == pytest.approx(accuracy)


def test_the_fused_score_is_compared_with_each_other():
    """Above 0 where fused is surely better, 0 against its equal; none against itself."""
    t = table(60, 60)
    t.scores["copy"] = t.scores["fused"].copy()
    scores = judged(t).scores
    assert "fused_minus_ci95" not in scores["fused"]
    assert scores["copy"]["fused_minus_ci95"] == (0, 0)
    low, high = scores["spread"]["fused_minus_ci95"]
    gap = scores["fused"]["auroc"] - scores["spread"]["auroc"]
    assert 0 < low < gap < high < 1
    del t.scores["fused"]
    assert not any("fused_minus_ci95" in block for block in judged(t).scores.values())


@pytest.mark.parametrize("seed", range(3))
def test_false_alarms_are_counted_on_normal_images(seed):
    """The realised share with p within the rate, beside what chance allows (scipy)."""
    t = table(seed=seed)
    alarms = sum(p <= 0.1 + 1e-12 for p, y in zip(t.p, t.labels, strict=True) if y == 0)
    got = judged(t).false_alarm
    assert (got["target"], got["realised"]) == (0.1, alarms / 30)
    expected = betabinom(30, 4, 36).ppf([0.025, 0.975]) / 30  # k = ⌊0.1 · 40⌋ of 39 images
    assert got["expected95"] == pytest.approx(tuple(expected))
    exact = binomtest(int(alarms), 30).proportion_ci(method="exact")
    assert got["ci95"] == pytest.approx((exact.low, exact.high))


@pytest.mark.parametrize("label", [0, 1, None])
def test_one_kind_alone_cannot_be_judged(label):
    """Without normal or without anomalous images there is no figure; the remedy is told."""
    t = table()
    bare = ScoreTable(t.paths, t.scores, p=t.p)
    t = bare if label is None else t.select(t.labels == label)
    with pytest.raises(DataError, match="needs normal and anomalous images: add"):
        judged(t)


def pictures(t, side=8):
    """A map for each image, and a mask for each anomalous one but the first."""
    rng = np.random.default_rng(1)
    masks = np.zeros((len(t), side, side), dtype=bool)
    for i in np.flatnonzero(t.labels)[1:]:
        masks[i, 2:5, 3:6] = True
    return (rng.normal(size=masks.shape) + masks).astype(np.float32), masks


def test_maps_are_judged_where_the_defect_is_known():
    """Normal images and those with a mask; an anomaly with an empty mask has no say in the maps."""
    t = table(8, 6)
    found, masks = pictures(t)
    unknown = np.flatnonzero(t.labels)[0]
    found[unknown] = 1e6
    got = judged(t, maps={"fused": found, "inverse": -found}, masks=list(masks))
    assert got.n == {"normal": 8, "anomalous": 6, "masks": 5}
    kept = np.arange(14) != unknown
    truth, values = masks[kept].ravel(), found[kept].ravel()
    expected = sklearn.metrics.roc_auc_score(truth, values)
    assert got.maps["fused"]["auroc"] == pytest.approx(expected)
    assert got.maps["inverse"]["auroc"] == pytest.approx(1 - expected)
    expected = sklearn.metrics.average_precision_score(truth, values)
    assert got.maps["fused"]["average_precision"] == pytest.approx(expected)
    assert set(got.maps["fused"]) == {"auroc", "average_precision", "f1_max", "aupro"}


def test_the_file_has_the_keys_of_the_contract():
    """`metrics.json`: what others read, by its names, without NaN; maps only where there are some."""
    t = table(8, 6)
    found, masks = pictures(t)
    plain, mapped = judged(t), judged(t, maps={"fused": found}, masks=list(masks))
    keys = ["evaluation", "version", "n", "image_size", "scores", "false_alarm", "seconds"]
    assert list(plain.to_json()) == keys
    assert list(mapped.to_json()) == [*keys, "maps"]
    assert list(plain.block()) == keys[2:]
    written = json.loads(json.dumps(mapped.to_json(), allow_nan=False))
    assert (written["evaluation"], written["version"]) == ("parts", 1)
    assert (written["image_size"], written["seconds"]) == (64, {"fit": 2.0, "score": 1.0})
    assert written["n"] == {"normal": 8, "anomalous": 6, "masks": 5}
    assert set(written["scores"]) == {"fused", "kl", "spread"}
    assert set(written["scores"]["fused"]["frozen"]) == {
        "threshold",
        "accuracy",
        "f1",
        "tpr",
        "fpr",
    }
    assert set(written["false_alarm"]) == {"target", "realised", "expected95", "ci95"}


def test_a_long_evaluation_shows_where_it_is():
    """Thousands of images take minutes: each score, map and other fusion is a step that is shown."""
    steps = []

    class Shown:
        def track(self, items, task, total):
            for item in items:
                yield item
                steps.append((task, total))

    t, rng = table(), np.random.default_rng(0)
    masks = [np.zeros((8, 8), bool) for _ in t.paths]
    for mask, label in zip(masks, t.labels, strict=True):
        mask[2:4, 2:4] = label
    maps = {"fused": [rng.random((8, 8)) for _ in t.paths]}
    judged(t, maps=maps, masks=masks, variants={"maximum": t.scores["kl"]}, progress=Shown())
    assert steps == [*[("judging scores", 3)] * 3, ("judging maps", 1), ("judging fusions", 1)]
