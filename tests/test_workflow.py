"""Evaluations, benchmarks and pages: the keys that others read, and figures that follow from files."""

import csv
import hashlib
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from scipy.io import savemat
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
from torch.nn import functional as F

from msvae import __version__, benchmark, fit, load
from msvae.benchmark import groups_for_test, one_sided_note
from msvae.calibration import Calibration
from msvae.config import Config
from msvae.data import datasets
from msvae.data.folder import Sample, find_labelled
from msvae.errors import ConfigError, DataError, RateError, RunError
from msvae.fitting import Examples
from msvae.pages import page_of
from msvae.progress import Silent
from msvae.report import write_report
from msvae.table import ScoreTable
from msvae.workflow import (
    evaluate_samples,
    history_of,
    map_writer,
    masks_of,
    recalibrate,
    refuse_leak,
    refuse_trained,
    write_explanations,
)

CONFIG = Config().replace(
    image_size=32,
    hidden_dims=(8, 12),
    latent_dim=6,
    companion=False,
    inspector=False,
    epochs=1,
    min_steps=0,
    batch_size=8,
    target_fpr=0.2,
    precision="fp32",
)
SCORES = {
    *["reconstruction", "mahalanobis", "weighted", "weighted_raw", "kl", "elbo", "spread"],
    *["bands", "complexity", "spatial", "fused"],
}
RATES = {"threshold", "accuracy", "f1", "tpr", "fpr"}
PLAIN = {"auroc", "auroc_ci95", "average_precision", "fpr_at_95_tpr"}
MORE = {"f1_max", "fused_minus_ci95"}  # beyond the keys of the protocol: an oracle, an interval


def smooth_images(n, seed, side=32):
    gen = torch.Generator().manual_seed(seed)
    coarse = 0.3 + 0.4 * torch.rand(n, 3, 4, 4, generator=gen)
    coarse += torch.tensor([0.2, 0.0, -0.2])[:, None, None]
    fine = F.interpolate(coarse, size=(side, side), mode="bicubic").clamp(0, 1)
    return (fine * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()


def holed(n, seed, level):
    """Images with a noisy block each, of some strength, and where it is."""
    rng = np.random.default_rng(seed)
    images, masks = smooth_images(n, seed).astype(float), np.zeros((n, 32, 32), np.uint8)
    images[:, 8:20, 10:22] += level * rng.normal(size=(n, 12, 12, 3))
    masks[:, 8:20, 10:22] = 255
    return images.clip(0, 255).astype(np.uint8), masks


def write(folder, arrays, name="{:02}.png"):
    folder.mkdir(parents=True, exist_ok=True)
    for i, array in enumerate(arrays):
        Image.fromarray(array).save(folder / name.format(i))
    return folder


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MSVAE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


# An evaluation of a folder.


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """An MVTec tree: weak and strong defects, one of them without a mask's pixels; a bad file."""
    root = tmp_path_factory.mktemp("tree") / "part"
    write(root / "train" / "good", smooth_images(60, 0))
    write(root / "test" / "good", smooth_images(15, 1))
    for kind, seed, level in (("weak", 2, 6), ("strong", 3, 60)):
        images, masks = holed(5, seed, level)
        masks[4] = 0 if kind == "weak" else masks[4]
        write(root / "test" / kind, images)
        write(root / "ground_truth" / kind, masks, "{:02}_mask.png")
    return root


@pytest.fixture(scope="module")
def run(tree):
    out = tree.parent / "run"
    fit(tree, out, config=CONFIG)
    return out


@pytest.fixture(scope="module")
def judged(tree, run):
    """The run, evaluated on the tree and one file that cannot be read."""
    (run.parent / "bad.png").write_text("no picture")
    bad = Sample(run.parent / "bad.png", 0, "good")
    samples = [bad, *find_labelled(tree)]
    out = run / "evaluation"
    seconds = {"fit": 1.5}
    done = evaluate_samples(
        load(run), samples, out, name="part", seconds=seconds, history=history_of(run)
    )
    metrics = json.loads((out / "metrics.json").read_text())
    table = ScoreTable.read_csv(out / "scores.csv")
    return SimpleNamespace(done=done, out=out, metrics=metrics, table=table)


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


def fpr_at_95(labels, values):
    fpr, tpr, _ = roc_curve(labels, values, drop_intermediate=False)
    return fpr[tpr >= 0.95].min()


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


def check_rates(block, labels, values):
    """Accuracy and F1 at equal prevalence are those of the rates at the threshold."""
    flagged = values >= block["threshold"]
    tpr, fpr = flagged[labels == 1].mean(), flagged[labels == 0].mean()
    assert block["tpr"] == pytest.approx(tpr)
    assert block["fpr"] == pytest.approx(fpr)
    assert block["accuracy"] == pytest.approx((tpr + 1 - fpr) / 2)
    assert block["f1"] == pytest.approx(2 * tpr / (1 + tpr + fpr))


def test_frozen_thresholds_come_from_normal_images_only(judged, run):
    """Just above the k-th greatest conformal score, k = rate · (n + 1), whatever the test holds."""
    calibration = load(run).calibration
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


def test_an_evaluation_without_masks_has_no_maps(tree, run, tmp_path):
    """Only the image figures; with one class only it is refused."""
    good, strong = tree / "test" / "good", tree / "test" / "strong"
    samples = [Sample(p, 0, "good") for p in sorted(good.iterdir())]
    odd = [Sample(p, 1, "odd") for p in sorted(strong.iterdir())]
    assert masks_of(samples, 32, "stretch") is None
    done = evaluate_samples(load(run), [*samples, *odd], tmp_path / "out", name="x")
    told = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert "maps" not in told
    assert "masks" not in told["n"]
    assert done.masks is None
    assert not (tmp_path / "out" / "training.png").exists()
    with pytest.raises(DataError, match="add the missing kind"):
        evaluate_samples(load(run), samples, tmp_path / "none", name="x")
    assert not (tmp_path / "none").exists()


def test_what_was_fitted_on_is_not_tested_on(tree, run):
    """Every image of the run is refused as a test image, and all but conformal ones for calibration."""
    rows = read(run / "split.csv")
    refuse_leak(run, find_labelled(tree))
    for row in rows[::7]:
        with pytest.raises(DataError, match="take them out"):
            refuse_leak(run, [Sample(row["path"], 0, "good")])
    conformal = [r["path"] for r in rows if r["part"] == "conformal"]
    refuse_trained(run, conformal)
    for row in [r for r in rows if r["part"] != "conformal"][::7]:
        with pytest.raises(DataError, match="calibrate with other images"):
            refuse_trained(run, [*conformal, row["path"]])


# New thresholds.


def test_recalibration_takes_scores_and_peaks_of_the_normals(run):
    """The references are those images' scores and map maxima; the rate is kept or refused."""
    detector, normals = load(run), list(smooth_images(24, 9))
    again, scan = recalibrate(detector, normals, rule="conformal", target_fpr=0.04)
    found, maps = detector.run([np.stack(normals)], with_maps=True)
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


def test_the_f1_rule_separates_what_can_be_separated(run):
    """Strong defects and normals lie apart: all of the one and none of the other are flagged."""
    normals, odd = list(smooth_images(20, 9)), list(holed(10, 11, 80)[0])
    again, _ = recalibrate(load(run), normals, rule="f1", anomalous=odd)
    assert again.score(odd).flagged.all()
    assert not again.score(normals).flagged.any()


# Maps and explanations as files.


def test_maps_are_written_one_by_one(run, tmp_path):
    """A picture of at most 512 px and the floats, for each image that could be read."""
    large = Image.fromarray(smooth_images(1, 4)[0]).resize((900, 600))
    large.save(tmp_path / "large.png")
    (tmp_path / "bad.png").write_text("no picture")
    detector = load(run)
    paths = [str(tmp_path / "bad.png"), str(tmp_path / "large.png")]
    detector.scan(paths, each_map=map_writer(tmp_path / "maps", paths, detector))
    assert {p.name for p in (tmp_path / "maps").iterdir()} == {"large.png", "large.tiff"}
    with Image.open(tmp_path / "maps" / "large.png") as picture:
        assert picture.size == (512, 341)
    with Image.open(tmp_path / "maps" / "large.tiff") as floats:
        assert (floats.mode, floats.size) == ("F", (32, 32))


def test_explanations_of_equal_stems_do_not_collide(run, tmp_path):
    """Two files of the same name get a hash of their path; both are there."""
    paths = []
    for folder in ("a", "b"):
        write(tmp_path / folder, smooth_images(1, 4))
        paths.append(str(tmp_path / folder / "00.png"))
    written, refused = write_explanations(load(run), paths, tmp_path / "out", Silent())
    assert refused == []
    names = [f"00-{hashlib.sha256(p.encode()).hexdigest()[:8]}" for p in paths]
    assert [p.stem for p in written] == names
    for path, name in zip(paths, names, strict=True):
        assert json.loads((tmp_path / "out" / f"{name}.json").read_text())["image"] == path


# The flowers benchmark, on a few fakes in the official form.


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
def bench(sets, cache):
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
            progress=Silent(),
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
            progress=Silent(),
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
        expected, _ = load(bench.out / protocol).run([np.stack(pixels)])
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
            progress=Silent(),
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


# Pages.


def written(report, path):
    """The page's text, after checks that it needs nothing from outside."""
    write_report(path, report)
    text = path.read_text()
    assert path.stat().st_size < 15_000_000
    assert text.lstrip().lower().startswith("<!doctype html>")
    assert text.count("<html") == 1
    for address in re.findall(r"""\b(?:src|srcset|href|action|data)\s*=\s*["']([^"']*)""", text):
        assert address.startswith(("data:", "#")) or address == "", address
    assert not re.search(r"url\(\s*[\"']?(?!#|data:)", text)
    assert not re.search(r"@import|<iframe|<base|fetch\(|XMLHttpRequest|import\(", text)
    return text


def test_the_page_of_a_run(judged, run, tmp_path):
    """Every score, the maps, the galleries, and the file that could not be read."""
    text = written(page_of(run), tmp_path / "report.html")
    for name in judged.table.scores:
        assert name in text
    for heading in ("Most anomalous", "Borderline", "Most unusual training images"):
        assert heading in text
    assert "Where in the picture" in text
    assert "What each part is worth" in text
    assert "without structure" in text
    assert "bad.png" in text
    assert "not an image" in text


def test_the_page_of_a_run_that_was_not_evaluated(run, tmp_path):
    """Its training and its most unusual images, without figures that nobody measured."""
    copy = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("evaluation"))
    text = written(page_of(copy), tmp_path / "report.html")
    assert "Most unusual training images" in text
    assert "Most anomalous" not in text


def test_the_most_unusual_training_images_come_first(run):
    """Those with the highest fused score among the references, highest first."""
    (gallery,) = [g for g in page_of(run).galleries if "unusual" in g.title]
    r = load(run).references
    order = np.argsort(-r.fused.numpy(), kind="stable")[: len(gallery.items)]
    assert [i.name for i in gallery.items] == [r.names[k] for k in order]


def test_the_page_of_a_benchmark(bench, tmp_path):
    """Both protocols, every score, the quoted figures and what stood in."""
    text = written(page_of(bench.out), tmp_path / "report.html")
    for name in [*bench.metrics["protocols"]["native"]["scores"], *PROTOCOLS]:
        assert name in text
    assert text.index("equalised") < text.index("native")
    assert "stands in for test_batch.bin" in text
    assert "quoted" in text
    assert "cifar-10" in text


def test_the_page_of_a_table(judged, run, tmp_path):
    """Of any scores.csv; with its run the maps are shown; images that are gone are left out."""
    path = tmp_path / "mine.csv"
    judged.table.write_csv(path)
    plain = written(page_of(path), tmp_path / "plain.html")
    drawn = written(page_of(path, run=run), tmp_path / "drawn.html")
    for name in judged.table.scores:
        assert name in plain
    assert "Unusual features" in drawn
    assert "Unusual features" not in plain
    text = path.read_text().replace(f"{run.parent}", "/gone")
    (tmp_path / "gone.csv").write_text(text)
    empty = written(page_of(tmp_path / "gone.csv"), tmp_path / "gone.html")
    assert "data:image/webp" not in empty


def test_a_page_of_a_foreign_table(tmp_path):
    """Another program's scores: a path and some numbers are enough."""
    (tmp_path / "x.csv").write_text("path,label,fused,mine\na,0,0.1,3\nb,1,0.9,2\nc,0,0.2,1\n")
    text = written(page_of(tmp_path / "x.csv"), tmp_path / "x.html")
    assert "x.csv" in text


def test_no_page_of_nothing(tmp_path):
    """A folder that is neither run nor benchmark, or a path that is not there."""
    for source in (tmp_path, tmp_path / "gone"):
        with pytest.raises(DataError, match="neither a run, a benchmark nor a file of scores"):
            page_of(source)
    (tmp_path / "metrics.json").write_text("{")
    with pytest.raises(DataError, match="is not JSON"):
        page_of(tmp_path)
