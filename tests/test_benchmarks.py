"""The flowers benchmark, on a few fakes in the official form: every key, every purpose, every figure."""

import hashlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from scipy import stats
from scipy.io import savemat
from sklearn.metrics import roc_auc_score

from figures import MORE, PLAIN, RATES, SCORES, check_rates, fpr_at_95
from folders import PLAIN as CONFIG
from folders import read, smooth_images
from msvae import __version__, load
from msvae.benchmarks import flowers_cifar10 as benchmark
from msvae.benchmarks.industrial import groups_for_test
from msvae.core.errors import ConfigError, RunError
from msvae.core.progress import NullProgress
from msvae.data import datasets
from msvae.evaluation.table import ScoreTable
from msvae.report.build import page_of
from msvae.report.summary import one_sided_note
from msvae.run.calibrate import recalibrate
from msvae.run.examples import Examples
from pages import written

TRAIN, VAL, TEST = 12, 20, 40  # the official names; it is trained on TEST
BATCH, CHOOSING, FROM = 40, 10, 20
TAUGHT = 4  # labelled anomalies of the feedback


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """72 flowers with official splits, and a CIFAR batch of 40 noisy images that stands in."""
    root = tmp_path_factory.mktemp("sets")
    rng = np.random.default_rng(0)
    count = TRAIN + VAL + TEST
    jpg = root / "flowers-102" / "jpg"
    jpg.mkdir(parents=True)
    for i, image in enumerate(smooth_images(count, 0, 64)):
        sized = Image.fromarray(image).resize((70 + i % 5, 66))
        sized.save(jpg / f"image_{i + 1:05d}.jpg", quality=95)
    order = rng.permutation(count) + 1
    parts = np.split(order, [TRAIN, TRAIN + VAL])
    savemat(
        root / "flowers-102" / "setid.mat",
        {k: p[None] for k, p in zip(("trnid", "valid", "tstid"), parts, strict=True)},
    )
    savemat(root / "flowers-102" / "imagelabels.mat", {"labels": np.ones((1, count))})
    noisy = smooth_images(BATCH, 5).astype(float) + rng.normal(0, 12, (BATCH, 32, 32, 3))
    planes = noisy.clip(0, 255).astype(np.uint8).transpose(0, 3, 1, 2).reshape(BATCH, -1)
    records = np.hstack([np.zeros((BATCH, 1), np.uint8), planes])
    (root / "data_batch_5.bin").write_bytes(records.tobytes())
    return SimpleNamespace(root=root, parts=parts)


@pytest.fixture(scope="module")
def bench(sets):
    """The benchmark under both protocols: what it returned, and what it said."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "CIFAR_IMAGES", BATCH)
        patch.setattr(benchmark, "VALIDATION", CHOOSING)
        patch.setattr(benchmark, "TESTED_FROM", FROM)
        out, said = sets.root / "out", []
        chosen = CONFIG.replace(target_fpr=0.05, hidden_dims=(8, 12, 12))
        result = benchmark.flowers_cifar10(
            sets.root,
            out,
            chosen,
            ("equalised", "native"),
            feedback=TAUGHT,
            overwrite=False,
            progress=NullProgress(),
            say=said.append,
        )
    metrics = json.loads((out / "metrics.json").read_text())
    return SimpleNamespace(out=out, said=said, metrics=metrics, result=result, config=chosen)


PROTOCOLS = {"equalised": 32, "native": 64}


def test_the_benchmark_has_the_documented_keys(bench):
    """Those of the protocol, equalised first, and the published figures as a quotation."""
    m = bench.metrics
    keys = {"benchmark", "version", "msvae", "seed", "data", "protocols", "feedback"}
    assert set(m) == keys | {"published"}
    head = (m["benchmark"], m["version"], m["msvae"], m["seed"])
    assert head == ("flowers-cifar10", 1, __version__, 0)
    assert list(m["protocols"]) == list(PROTOCOLS)
    assert json.loads(json.dumps(bench.result)) == m
    for name, block in m["protocols"].items():
        assert set(block) == {
            *["n", "image_size", "seconds", "images_per_second", "false_alarm", "scores"],
            *["explanations", "ablation"],
        }
        assert block["image_size"] == PROTOCOLS[name]
        for key in ("seconds", "images_per_second"):
            assert set(block[key]) == {"fit", "score"}
            assert min(block[key].values()) > 0
        assert set(block["false_alarm"]) == {"target", "realised", "expected95", "ci95"}
        assert set(block["scores"]) >= SCORES
        scores = dict(block["scores"])
        taught = set(scores.pop("fused_feedback"))
        assert taught == set(scores["kl"]) | {"auroc_of_draws"}
        for score, figures in scores.items():
            more = MORE - ({"fused_minus_ci95"} if score == "fused" else set())
            assert set(figures) == PLAIN | more | {"frozen", "best_f1"}
            assert set(figures["frozen"]) == set(figures["best_f1"]) == RATES


def test_the_benchmark_names_its_data(bench, sets):
    """Both sets with path and sha256; which file stood in for the official batch is said."""
    data = bench.metrics["data"]
    for name, file in (("normal", "flowers-102/setid.mat"), ("anomalous", "data_batch_5.bin")):
        sha256 = hashlib.sha256((sets.root / file).read_bytes()).hexdigest()
        assert data[name]["sha256"] == sha256
    assert data["normal"]["path"] == str(sets.root / "flowers-102")
    assert data["anomalous"]["path"] == str(sets.root / "data_batch_5.bin")
    assert data["anomalous"]["stands_in"] == "data_batch_5.bin stands in for test_batch.bin"
    assert data["anomalous"]["stands_in"] in bench.said
    assert "test split" in data["normal"]["split"]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_image_has_one_purpose(bench, sets, protocol):
    """Trained on official test, calibrated on val, tested on train and on CIFAR's later images."""

    def flowers(part):
        return {f"image_{i:05d}.jpg" for i in sets.parts[part]}

    found = {}
    for row in read(bench.out / protocol / "split.csv"):
        found.setdefault(row["part"], set()).add(row["path"].rsplit("/", 1)[1])
    assert found["conformal"] == flowers(1)
    assert found["train"] | found["stop"] == flowers(2)
    assert not found["train"] & found["stop"]
    rows = read(bench.out / protocol / "evaluation" / "scores.csv")
    assert {r["path"].rsplit("/", 1)[1] for r in rows if r["label"] == "0"} == flowers(0)
    tested = [r["path"].rsplit("/", 1)[1] for r in rows if r["label"] == "1"]
    assert tested == [f"data_batch_5.bin#{i}" for i in range(FROM, BATCH)]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_counts(bench, protocol):
    """`train` counts the stop part, which is the first 5 % by sha256."""
    n = bench.metrics["protocols"][protocol]["n"]
    expected = {"train": TEST, "conformal": VAL, "test_normal": TRAIN}
    assert n == {**expected, "test_anomalous": BATCH - FROM}
    rows = [r for r in read(bench.out / protocol / "split.csv") if r["part"] != "conformal"]
    first = sorted(rows, key=lambda r: r["sha256"])[:2]
    assert [r["part"] for r in first] == ["stop", "stop"]
    assert sum(r["part"] == "stop" for r in rows) == 2


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_figures_at_both_thresholds_follow_from_the_rates(bench, protocol):
    """AUROC, rates, accuracy and F1 of every score, recomputed from scores.csv."""
    block = bench.metrics["protocols"][protocol]
    table = ScoreTable.read_csv(bench.out / protocol / "evaluation" / "scores.csv")
    conformal = load(bench.out / protocol).calibration.scores
    for name, values in table.scores.items():
        figures = block["scores"][name]
        assert figures["auroc"] == pytest.approx(roc_auc_score(table.labels, values))
        assert figures["fpr_at_95_tpr"] == pytest.approx(fpr_at_95(table.labels, values))
        for rule in ("frozen", "best_f1"):
            check_rates(figures[rule], table.labels, values)
        greatest = conformal[name].max()  # 20 images at 0.05: one may be flagged
        assert greatest < figures["frozen"]["threshold"] <= np.nextafter(greatest, np.inf)
    alarms = block["false_alarm"]
    assert alarms["realised"] == pytest.approx((table.p[table.labels == 0] <= 0.05).mean())
    chance = stats.betabinom(TRAIN, 1, VAL).ppf([0.025, 0.975]) / TRAIN
    np.testing.assert_allclose(alarms["expected95"], chance)


def test_the_best_f1_threshold_is_chosen_without_test_images(bench, sets):
    """It is the best on the stop part and on the first CIFAR images, of all thresholds there are."""
    protocol = "equalised"
    detector = load(bench.out / protocol)
    stop = [r["path"] for r in read(bench.out / protocol / "split.csv") if r["part"] == "stop"]
    content = np.frombuffer((sets.root / "data_batch_5.bin").read_bytes(), np.uint8)
    planes = content.reshape(BATCH, -1)[:CHOOSING, 1:].reshape(-1, 3, 32, 32)
    normal = detector.score(stop).scores
    odd = detector.score(list(planes.transpose(0, 2, 3, 1))).scores
    for name in SCORES:
        figures = bench.metrics["protocols"][protocol]["scores"][name]["best_f1"]

        def f1(t, name=name):
            tpr, fpr = (odd[name] >= t).mean(), (normal[name] >= t).mean()
            return 2 * tpr / (1 + tpr + fpr)

        best = max(f1(t) for t in np.concatenate([normal[name], odd[name]]))
        slack = 1e-4 * abs(figures["threshold"]) + 1e-6  # other batches, other last digits
        near = [f1(figures["threshold"] + shift) for shift in (-slack, 0, slack)]
        assert max(near) == pytest.approx(best), name


def test_feedback_is_the_mean_of_five_draws(bench, sets):
    """Each draw taught anew through the detector itself: examples, threshold and test never mix."""
    told = bench.metrics["protocols"]["equalised"]["scores"]["fused_feedback"]
    run = bench.out / "equalised"
    detector, rows = load(run), read(run / "split.csv")
    flowers = {
        part: [r["path"] for r in rows if r["part"] == part] for part in ("stop", "conformal")
    }
    content = np.frombuffer((sets.root / "data_batch_5.bin").read_bytes(), np.uint8)
    cifar = content.reshape(BATCH, -1)[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    table = ScoreTable.read_csv(run / "evaluation" / "scores.csv")
    normal = [p for p, label in zip(table.paths, table.labels, strict=True) if label == 0]
    areas, alarms, thresholds = [], [], []
    for seed in range(5):
        drawn = np.random.default_rng(seed).choice(FROM - CHOOSING, TAUGHT, replace=False)
        shown = Examples((), list(cifar[CHOOSING + drawn]))
        given = {"rule": "conformal", "feedback": shown, "ordinary": flowers["stop"]}
        taught, _ = recalibrate(detector, flowers["conformal"], **given)
        judged = taught.score([*normal, *cifar[FROM:]])
        areas.append(roc_auc_score(table.labels, judged.scores["fused"]))
        alarms.append(judged.flagged[: len(normal)].mean())
        thresholds.append(taught.thresholds()["fused"])
    assert told["auroc_of_draws"] == pytest.approx(areas, abs=5e-3)  # other batches, other digits
    assert told["auroc"] == pytest.approx(np.mean(told["auroc_of_draws"]))
    assert told["frozen"]["fpr"] == pytest.approx(np.mean(alarms), abs=1e-6)
    assert len({round(t, 6) for t in thresholds}) == 5  # each draw teaches something else
    assert told["frozen"]["threshold"] == pytest.approx(np.mean(thresholds), rel=1e-2)
    for rule in ("frozen", "best_f1"):
        tpr, fpr = told[rule]["tpr"], told[rule]["fpr"]
        assert told[rule]["f1"] == pytest.approx(2 * tpr / (1 + tpr + fpr))


@pytest.mark.parametrize("count", [-1, 11])
def test_more_feedback_than_there_is_is_refused(bench, sets, monkeypatch, tmp_path, count):
    """Before any work, with the numbers that can be had."""
    monkeypatch.setattr(benchmark, "VALIDATION", CHOOSING)
    monkeypatch.setattr(benchmark, "TESTED_FROM", FROM)
    with pytest.raises(ConfigError, match="choose 0 to 10 examples"):
        benchmark.flowers_cifar10(
            sets.root,
            tmp_path / "out",
            bench.config,
            ("native",),
            feedback=count,
            overwrite=False,
            progress=NullProgress(),
            say=lambda _: None,
        )


def test_both_protocols_see_lossless_squares(bench, sets):
    """What the model saw of a CIFAR image at 32 px are its very pixels, and Pillow's at 64 px."""
    content = np.frombuffer((sets.root / "data_batch_5.bin").read_bytes(), np.uint8)
    planes = content.reshape(BATCH, -1)[FROM:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    for protocol, side in PROTOCOLS.items():
        table = ScoreTable.read_csv(bench.out / protocol / "evaluation" / "scores.csv")
        filter_ = Image.Resampling.BICUBIC
        pixels = [np.asarray(Image.fromarray(p).resize((side, side), filter_)) for p in planes]
        expected, _ = load(bench.out / protocol).score_pixels([np.stack(pixels)])
        found = table.scores["complexity"][table.labels == 1]
        np.testing.assert_allclose(found, expected["complexity"], rtol=1e-3, atol=1e-3)


def test_a_finished_benchmark_is_not_written_over(bench, sets, monkeypatch):
    """Told before any work, with what to add."""
    monkeypatch.setattr(benchmark, "fit_parts", lambda *_, **__: pytest.fail("fitted again"))
    with pytest.raises(RunError, match="--overwrite"):
        benchmark.flowers_cifar10(
            sets.root,
            bench.out,
            bench.config,
            ("native",),
            overwrite=False,
            progress=NullProgress(),
            say=lambda _: None,
        )


def test_the_one_sided_scores_are_explained(bench):
    """The remark on the seed's scores quotes the figures of the protocol."""
    for block in bench.metrics["protocols"].values():
        assert f"{block['scores']['weighted']['auroc']:.3f}" in one_sided_note(block)


def test_the_tiles_that_are_tested_are_a_fifth_of_the_groups():
    """The first by the sha256 of their names, at least one, each group once."""
    groups = [f"g{i % 12}.jpg" for i in range(60)]
    order = sorted(set(groups), key=lambda g: hashlib.sha256(g.encode()).hexdigest())
    assert groups_for_test(groups) == order[:3]
    assert groups_for_test(["a", "a"]) == ["a"]


def test_the_page_of_a_benchmark(bench, tmp_path):
    """Both protocols, every score, the quoted figures and what stood in."""
    text = written(page_of(bench.out), tmp_path / "report.html")
    for name in [*bench.metrics["protocols"]["native"]["scores"], *PROTOCOLS]:
        assert name in text
    assert text.index("equalised") < text.index("native")
    assert "stands in for test_batch.bin" in text
    assert "quoted" in text
    assert "cifar-10" in text
