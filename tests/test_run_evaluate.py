"""Evaluations: the keys that others read, and figures that follow from files."""

import json

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import average_precision_score, roc_auc_score

from figures import MORE, PLAIN, RATES, SCORES, check_rates, fpr_at_95
from folders import read
from msvae import evaluate, load
from msvae.core.errors import ConfigError, DataError
from msvae.data.folder import Sample, find_labelled
from msvae.run.evaluate import evaluate_samples, masks_of
from msvae.run.leakage import check_leakage, check_not_trained


def test_an_evaluation_writes_its_files(judged):
    """Metrics, scores, what could not be read, and each figure as PNG and SVG; nothing else."""
    figures = ("roc", "precision_recall", "distribution", "training")
    drawn = {f"{name}.{kind}" for name in figures for kind in ("png", "svg")}
    tables = {"metrics.json", "scores.csv", "quarantine.csv"}
    assert {p.name for p in judged.out.iterdir()} == tables | drawn
    (row,) = read(judged.out / "quarantine.csv")
    assert row["path"].endswith("bad.png")
    assert "not an image" in row["reason"]
    assert len(judged.table) == 25


def test_metrics_of_a_folder_have_the_documented_keys(judged):
    """Those of the protocol, and no others."""
    m = judged.metrics
    keys = {"evaluation", "version", "n", "image_size", "scores", "maps", "false_alarm", "seconds"}
    assert set(m) == keys | {"explanations", "ablation"}
    assert (m["evaluation"], m["version"], m["image_size"]) == ("part", 1, 32)
    assert m["n"] == {"normal": 15, "anomalous": 10, "masks": 9}
    assert set(m["seconds"]) == {"fit", "score"}
    assert m["seconds"]["fit"] == 1.5
    assert set(m["scores"]) >= SCORES
    for name, block in m["scores"].items():
        assert set(block) == PLAIN | MORE - ({"fused_minus_ci95"} if name == "fused" else set()) | {
            "frozen"
        }
        assert set(block["frozen"]) == RATES
    assert set(m["maps"]) >= {"reconstruction", "spatial", "fused"}
    for block in m["maps"].values():
        assert set(block) == {"auroc", "average_precision", "f1_max", "aupro"}
    assert set(m["false_alarm"]) == {"target", "realised", "expected95", "ci95"}


def test_figures_follow_from_the_scores(judged):
    """scikit-learn's figures of the columns of scores.csv, for every score."""
    labels = judged.table.labels
    for name, values in judged.table.scores.items():
        block = judged.metrics["scores"][name]
        low, high = block["auroc_ci95"]
        assert block["auroc"] == pytest.approx(roc_auc_score(labels, values))
        assert low <= block["auroc"] <= high
        expected = average_precision_score(labels, values)
        assert block["average_precision"] == pytest.approx(expected)
        assert block["fpr_at_95_tpr"] == pytest.approx(fpr_at_95(labels, values))


def test_frozen_thresholds_come_from_normal_images_only(judged, tree_run):
    """Just above the k-th greatest conformal score, k = rate · (n + 1), whatever the test holds."""
    calibration = load(tree_run).calibration
    assert calibration.n == 9
    for name, values in judged.table.scores.items():
        block = judged.metrics["scores"][name]["frozen"]
        second = np.sort(calibration.scores[name])[-2]
        assert second < block["threshold"] <= np.nextafter(second, np.inf)
        check_rates(block, judged.table.labels, values)


def test_false_alarms_are_counted_and_expected(judged):
    """Realised: normal images with p <= 0.2; expected: the central 95 % of a beta-binomial."""
    found, table = judged.metrics["false_alarm"], judged.table
    normal = table.labels == 0
    assert found["target"] == 0.2
    assert found["realised"] == pytest.approx((table.p[normal] <= 0.2).mean())
    assert found["realised"] == pytest.approx(table.flagged[normal].mean())
    chance = stats.betabinom(15, 2, 8)
    np.testing.assert_allclose(found["expected95"], chance.ppf([0.025, 0.975]) / 15)
    alarms = round(found["realised"] * 15)
    exact = stats.binomtest(alarms, 15).proportion_ci(method="exact")
    np.testing.assert_allclose(found["ci95"], [exact.low, exact.high], atol=1e-9)


def test_pixel_figures_leave_out_the_empty_mask(judged):
    """Pixel AUROC and AP by scikit-learn over all pixels of the images that count."""
    masks, maps = judged.done.masks, judged.done.scan.maps
    assert masks.shape == (25, 32, 32)
    rows = [i for i, m in enumerate(masks) if judged.table.labels[i] == 0 or m.any()]
    assert len(rows) == 24
    for name, values in maps.items():
        pair = masks[rows].ravel(), values[rows].ravel()
        block = judged.metrics["maps"][name]
        assert block["auroc"] == pytest.approx(roc_auc_score(*pair), abs=1e-3)
        assert block["average_precision"] == pytest.approx(average_precision_score(*pair), abs=5e-3)
    assert judged.metrics["maps"]["fused"]["auroc"] > 0.7


def test_an_evaluation_without_masks_has_no_maps(tree, tree_run, tmp_path):
    """Only the image figures; with one class only it is refused."""
    good, strong = tree / "test" / "good", tree / "test" / "strong"
    samples = [Sample(p, 0, "good") for p in sorted(good.iterdir())]
    odd = [Sample(p, 1, "odd") for p in sorted(strong.iterdir())]
    assert masks_of(samples, 32, "stretch") is None
    done = evaluate_samples(load(tree_run), [*samples, *odd], tmp_path / "out", name="x")
    told = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert "maps" not in told
    assert "masks" not in told["n"]
    assert done.masks is None
    assert not (tmp_path / "out" / "training.png").exists()
    with pytest.raises(DataError, match="add the missing kind"):
        evaluate_samples(load(tree_run), samples, tmp_path / "none", name="x")
    assert not (tmp_path / "none").exists()


def test_what_was_fitted_on_is_not_tested_on(tree, tree_run):
    """Every image of the run is refused as a test image, and all but conformal ones for calibration."""
    rows = read(tree_run / "split.csv")
    check_leakage(tree_run, find_labelled(tree))
    for row in rows[::7]:
        with pytest.raises(DataError, match="take them out"):
            check_leakage(tree_run, [Sample(row["path"], 0, "good")])
    conformal = [r["path"] for r in rows if r["part"] == "conformal"]
    check_not_trained(tree_run, conformal)
    for row in [r for r in rows if r["part"] != "conformal"][::7]:
        with pytest.raises(DataError, match="calibrate with other images"):
            check_not_trained(tree_run, [*conformal, row["path"]])


def test_evaluating_a_run_by_name(tree, tree_run, judged, tmp_path):
    """`msvae.evaluate` of the tree gives the same figures; of two folders, and their masks, too."""
    whole = evaluate(tree_run, tree, out=tmp_path / "whole").evaluation
    normal, strong = tree / "test" / "good", tree / "test" / "strong"
    masks = tree / "ground_truth" / "strong"
    pair = evaluate(tree_run, normal=normal, anomalous=strong, masks=masks, out=tmp_path / "pair")
    assert (whole.name, pair.evaluation.name) == ("part", "strong")
    assert pair.evaluation.n == {"normal": 15, "anomalous": 5, "masks": 5}
    for name, block in judged.metrics["scores"].items():
        assert whole.scores[name]["auroc"] == pytest.approx(block["auroc"])
    for folder in ("whole", "pair"):
        told = json.loads((tmp_path / folder / "metrics.json").read_text())
        assert told["scores"]["fused"]["auroc"] > 0.5
    with pytest.raises(ConfigError, match="evaluate needs a DATASET"):
        evaluate(tree_run, normal=normal)
