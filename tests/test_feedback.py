"""A few labelled examples turn the fused score; none leave it as it is."""

import csv

import numpy as np
import pytest
from PIL import Image
from scipy.optimize import minimize

from msvae import Examples, fit, load
from msvae.cli.main import main
from msvae.core.errors import DataError
from msvae.evaluation.metrics import auroc
from msvae.run.calibrate import recalibrate
from msvae.scores.feedback import BOUNDARY, Feedback, FeedbackInputs
from small import CONFIG

FLAGS = "--image-size 32 --hidden-dims 8 12 16 --latent-dim 6 --epochs 1 --min-steps 0"
FLAGS += " --pretext-epochs 2 --segmenter-steps 2 --batch-size 8 --target-fpr 0.2"
FLAGS = [*FLAGS.split(), "--precision", "fp32"]


def part(seed, n, shift=0.0, level=1.0):
    """Features (n, 5), the first moved by `shift`, and scores around `level`."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n, 5))
    features[:, 0] += shift
    return FeedbackInputs(features, level * np.exp(0.3 * rng.normal(size=n)))


NOTHING = FeedbackInputs(np.zeros((0, 5)), np.zeros(0))


def test_no_examples_change_nothing():
    """To the bit."""
    new = part(1, 50)
    taught = Feedback.fit(part(0, 200), NOTHING, NOTHING)
    assert not taught.learned
    np.testing.assert_array_equal(Feedback.none(5)(new), new.fused)
    np.testing.assert_array_equal(taught(new), new.fused)


def test_it_is_the_most_likely_direction():
    """The weights are the minimum that scipy finds of the penalised loss."""
    ordinary, normal, anomalous = part(0, 300), part(1, 3, -2, 8), part(2, 6, 2)
    found = Feedback.fit(ordinary, normal, anomalous)
    logs = np.log(np.concatenate([s for _, s in (ordinary, normal, anomalous)]))
    own = np.log(ordinary.fused)
    spread = (np.quantile(own, 0.84) - np.quantile(own, 0.16)) / 2
    x = np.concatenate([f for f, _ in (ordinary, normal, anomalous)])
    centre = 300 / 305 * ordinary.features.mean(0)
    scale = np.sqrt((300 * ordinary.features.var(0) + 10) / 310)
    x = ((x - centre) / scale).clip(-6, 6)
    offset = ((logs - np.sort(own)[149]) / spread).clip(-5, 10) - BOUNDARY
    sign = np.r_[-np.ones(303), np.ones(6)]
    heft = np.r_[np.full(300, 9 / 300), np.ones(9)]

    def loss(w):
        return (heft * np.logaddexp(0, -sign * (offset + x @ w))).sum() + 0.5 * (
            1 + 10 * 9 / 300
        ) * (w**2).sum()

    best = minimize(loss, np.zeros(5)).x
    np.testing.assert_allclose(found.weights, best * spread, atol=2e-3)


def test_more_examples_teach_more():
    """What differs in the first feature only is told ever better, from one example on."""
    ordinary, new, odd = part(0, 300), part(5, 500), part(6, 500, 2)
    labels = np.repeat([0, 1], 500)
    areas = []
    for n in (0, 1, 4, 32):
        examples = FeedbackInputs(*(values[:n] for values in part(2, 32, 2)))
        taught = Feedback.fit(ordinary, NOTHING, examples)
        areas.append(auroc(labels, np.concatenate([taught(new), taught(odd)])))
    assert areas[0] == pytest.approx(0.5, abs=0.05)
    assert areas == sorted(areas)
    assert areas[-1] > 0.85


def test_false_alarms_are_called_back():
    """Normal examples with a high score bring their like down, the others stay where they were."""
    ordinary, alarms = part(0, 300), part(2, 8, 4, 30)
    taught = Feedback.fit(ordinary, alarms, NOTHING)
    alike, others = part(7, 200, 4, 30), part(8, 200)
    assert np.median(taught(alike) / alike.fused) < 0.7
    assert 0.8 < np.median(taught(others) / others.fused) < 1.25


def test_one_statistic_far_out_does_not_outvote_all_others():
    """Beyond six deviations a feature changes the score no further."""
    taught = Feedback.fit(part(0, 300), NOTHING, part(2, 8, 2))
    far, farther = (FeedbackInputs(np.full((1, 5), x), np.ones(1)) for x in (20.0, 1e6))
    assert taught.learned
    np.testing.assert_array_equal(taught(far), taught(farther))


# The whole way.


def coarse(n, seed):
    rng = np.random.default_rng(seed)
    squares = rng.integers(90, 160, (n, 4, 4, 3))
    return list(squares.repeat(8, axis=1).repeat(8, axis=2).astype(np.uint8))


def tinted(n, seed):
    """Ordinary but for a weak tint."""
    return [
        (x * np.array([1.04, 1.0, 0.96])).clip(0, 255).astype(np.uint8) for x in coarse(n, seed)
    ]


def test_fit_learns_from_examples_and_still_keeps_its_rate():
    """Tinted images are found better; p-values are those of the taught score."""
    plain = fit(coarse(300, 0), config=CONFIG)
    taught = fit(coarse(300, 0), config=CONFIG, feedback=Examples((), tinted(100, 1)))
    labels, images = np.repeat([0, 1], 200), [*coarse(200, 2), *tinted(200, 3)]
    before, after = (auroc(labels, d.score(images).scores["fused"]) for d in (plain, taught))
    assert after > before + 0.05
    assert taught.score(coarse(60, 2)).flagged.mean() < 0.4
    e = taught.explain(images[-1], gradcam=False)
    assert e.contributions["feedback"] != 0
    assert sum(e.contributions.values()) == pytest.approx(e.scores["fused"], rel=1e-6)


def test_an_example_that_calibrates_is_refused():
    """An image teaches or calibrates, not both."""
    images = coarse(60, 0)
    with pytest.raises(DataError, match="may teach or calibrate, not both"):
        fit(images, config=CONFIG, feedback=Examples(images[5:6], ()))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Normal images, two kinds of examples, and a run without feedback."""
    root = tmp_path_factory.mktemp("feedback")
    kinds = {
        "good": coarse(120, 0),
        "shown/anomalous": tinted(8, 1),
        "shown/normal": coarse(3, 9),
        "new": tinted(10, 3),
    }
    for name, images in kinds.items():
        (root / name).mkdir(parents=True)
        for i, image in enumerate(images):
            Image.fromarray(image).save(root / name / f"{i:03d}.png")
    run(["fit", root / "good", "--out", root / "run", *FLAGS])
    return root


def run(words):
    with pytest.raises(SystemExit) as stop:
        main([str(w) for w in words])
    return stop.value.code


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_finished_run_is_taught_without_training(folders):
    """The same as a fit with the same examples; the network stays, its own images calibrate again."""
    before = load(folders / "run")
    assert not run(["calibrate", folders / "run", "--feedback", folders / "shown"])
    assert not run(
        ["fit", folders / "good", "--feedback", folders / "shown", "--out", folders / "two", *FLAGS]
    )
    after, fitted = load(folders / "run"), load(folders / "two")
    kept, arrays = before.graph.arrays(), after.graph.arrays()
    assert kept.keys() == arrays.keys()
    assert all(np.array_equal(kept[name], arrays[name]) for name in kept)
    paths = sorted(str(p) for p in (folders / "new").iterdir())
    taught, same = after.score(paths), fitted.score(paths)
    np.testing.assert_allclose(taught.scores["fused"], same.scores["fused"], rtol=1e-6)
    np.testing.assert_allclose(taught.p, same.p)
    assert after.calibration.n == before.calibration.n
    assert (taught.scores["fused"] != before.score(paths).scores["fused"]).all()
    parts = [r["part"] for r in rows(folders / "two" / "split.csv")]
    assert parts.count("feedback") == 11
    assert len(rows(folders / "run" / "calibrated.csv")) == after.calibration.n + 11


def test_what_taught_is_not_tested_on(folders, capsys):
    """An evaluation with an image of the feedback is refused."""
    if not (folders / "two").exists():
        run(
            [
                "fit",
                folders / "good",
                "--feedback",
                folders / "shown",
                "--out",
                folders / "two",
                *FLAGS,
            ]
        )
    words = ["--normal", folders / "new", "--anomalous", folders / "shown" / "anomalous"]
    assert run(["evaluate", folders / "two", *words]) == 2
    assert "fitted on" in capsys.readouterr().err


def test_feedback_needs_its_folders_and_the_runs_images(folders, tmp_path, capsys):
    """Each mistake in one line with its remedy; the run stays as it was."""
    before = (folders / "run" / "calibration.safetensors").read_bytes()
    assert run(["calibrate", folders / "run", "--feedback", folders / "new"]) == 2
    assert "needs a folder normal or anomalous" in capsys.readouterr().err
    assert run(["calibrate", folders / "run"]) == 2
    assert "calibrate needs NORMALS" in capsys.readouterr().err
    moved = folders / "elsewhere"
    (folders / "good").rename(moved)
    try:
        assert run(["calibrate", folders / "run", "--feedback", folders / "shown"]) == 2
        assert "is not there any more" in capsys.readouterr().err
    finally:
        moved.rename(folders / "good")
    assert (folders / "run" / "calibration.safetensors").read_bytes() == before


def test_arrays_teach_and_calibrate_a_detector_in_memory():
    """The twin of the command, without a file; an array that does both is refused."""
    detector = fit(coarse(120, 0), config=CONFIG)
    shown, ordinary, normals = Examples((), tinted(8, 1)), coarse(20, 5), coarse(30, 6)
    given = {"rule": "conformal", "feedback": shown, "ordinary": ordinary}
    after, _ = recalibrate(detector, normals, **given)
    assert after.verdict.feedback.learned
    assert after.calibration.n == 30
    with pytest.raises(DataError, match="may teach or calibrate"):
        recalibrate(detector, [*normals, shown.anomalous[0]], **given)
    with pytest.raises(DataError, match="ordinary images"):
        recalibrate(detector, normals, rule="conformal", feedback=shown)
