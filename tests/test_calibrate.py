"""New thresholds without training: from normal images, by every rule, and with labelled examples."""

import shutil

import numpy as np
import pytest

from folders import holed, read, smooth_images, write
from msvae import calibrate, load
from msvae.core.errors import ConfigError, DataError, RateError
from msvae.evaluation.conformal import Calibration
from msvae.run.calibrate import recalibrate


def test_recalibration_takes_scores_and_peaks_of_the_normals(tree_run):
    """The references are those images' scores and map maxima; the rate is kept or refused."""
    detector, normals = load(tree_run), list(smooth_images(24, 9))
    again, scan = recalibrate(detector, normals, rule="conformal", target_fpr=0.04)
    found, maps = detector.score_pixels([np.stack(normals)], with_maps=True)
    assert isinstance(again.calibration, Calibration)
    for name, values in found.items():
        np.testing.assert_allclose(again.calibration.scores[name], values, rtol=1e-4, atol=1e-5)
    for name, values in maps.items():
        peaks = values.max(axis=(1, 2))
        np.testing.assert_allclose(again.calibration.peaks[name], peaks, rtol=1e-3, atol=1e-3)
    assert len(scan.table) == 24
    assert again.decision.target_fpr == 0.04
    assert detector.calibration.n == 9
    with pytest.raises(RateError, match="needs at least 99 calibration images, got 24"):
        recalibrate(detector, normals, rule="conformal", target_fpr=0.01)
    with pytest.raises(ConfigError, match="--anomalous"):
        recalibrate(detector, normals, rule="f1")


def test_the_f1_rule_separates_what_can_be_separated(tree_run):
    """Strong defects and normals lie apart: all of the one and none of the other are flagged."""
    normals, odd = list(smooth_images(20, 9)), list(holed(10, 11, 80)[0])
    again, _ = recalibrate(load(tree_run), normals, rule="f1", anomalous=odd)
    assert again.score(odd).flagged.all()
    assert not again.score(normals).flagged.any()


@pytest.fixture
def own_run(tree_run, tmp_path):
    """A copy of the run, to be changed."""
    return shutil.copytree(tree_run, tmp_path / "run")


def test_calibrating_keeps_thresholds_in_the_run(own_run, tmp_path):
    """`msvae.calibrate` returns what `msvae.load` gives from then on; no score changes."""
    before, new = load(own_run), smooth_images(30, 4)
    normals = write(tmp_path / "normals", smooth_images(24, 9))
    (normals / "bad.png").write_text("no picture")
    detector = calibrate(own_run, normals, target_fpr=0.04)
    again = load(own_run)
    assert detector.decision == again.decision
    assert (again.decision.rule, again.decision.target_fpr, again.calibration.n) == (
        *("conformal", 0.04),
        24,
    )
    tables = [d.score(list(new)) for d in (before, detector, again)]
    for name, values in tables[0].scores.items():
        np.testing.assert_array_equal(tables[1].scores[name], values)
        np.testing.assert_array_equal(tables[2].scores[name], values)
    np.testing.assert_array_equal(tables[1].p, tables[2].p)
    np.testing.assert_allclose(tables[2].p * 25, np.round(tables[2].p * 25))
    (row,) = read(own_run / "quarantine.csv")
    assert row["path"].endswith("bad.png")
    paths = {row["path"] for row in read(own_run / "calibrated.csv")}
    assert {str(p) for p in normals.iterdir() if p.stem != "bad"} <= paths


def test_calibrating_by_other_rules(own_run, tmp_path):
    """A fixed threshold of the weighted score; the best F1 against labelled defects."""
    normals = write(tmp_path / "normals", smooth_images(20, 9))
    defects = write(tmp_path / "defects", holed(10, 11, 80)[0])
    fixed = calibrate(own_run, normals, rule="fixed", threshold=0.25)
    assert (fixed.decision.score, fixed.decision.threshold) == ("weighted", 0.25)
    assert load(own_run).decision == fixed.decision
    best = calibrate(own_run, normals, rule="f1", anomalous=defects)
    assert load(own_run).score([*sorted(defects.iterdir())]).flagged.all()
    assert not best.score([*sorted(normals.iterdir())]).flagged.any()


def test_labelled_defects_teach_without_other_normals(own_run, tmp_path):
    """The run's own conformal images serve again; the defects score higher, and are remembered."""
    before, odd = load(own_run), holed(20, 13, 12)[0]
    write(tmp_path / "examples" / "anomalous", odd[:6])
    detector = calibrate(own_run, feedback=tmp_path / "examples")
    assert detector.verdict.feedback.learned
    assert not before.verdict.feedback.learned
    assert detector.calibration.n == before.calibration.n
    old, new = (d.score(list(odd[6:])).scores for d in (before, load(own_run)))
    np.testing.assert_array_equal(new["residual"], old["residual"])
    assert (new["fused"] > old["fused"]).mean() > 0.9
    paths = {row["path"] for row in read(own_run / "calibrated.csv")}
    assert {str(p) for p in (tmp_path / "examples" / "anomalous").iterdir()} < paths


def test_what_cannot_calibrate_is_refused(own_run, tree):
    """No images at all, or images that were trained on: the run stays as it was."""
    before = {p.name: p.read_bytes() for p in own_run.iterdir() if p.is_file()}
    with pytest.raises(ConfigError, match="calibrate needs NORMALS"):
        calibrate(own_run)
    with pytest.raises(DataError, match="calibrate with other images"):
        calibrate(own_run, tree / "train" / "good")
    with pytest.raises(RateError, match="needs at least 99 calibration images, got 15"):
        calibrate(own_run, tree / "test" / "good", target_fpr=0.01)
    assert {p.name: p.read_bytes() for p in own_run.iterdir() if p.is_file()} == before
