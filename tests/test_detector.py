"""From normal images to a detector and back from disk: what the user holds keeps its word."""

import csv
import json
import math
import pickletools
import shutil
import struct
import zipfile
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from msvae import fit, load
from msvae.core.config import Config
from msvae.core.errors import ConfigError, DataError, ImageError, RateError, RunError, TrainingError
from msvae.core.progress import NullProgress
from msvae.evaluation.table import ScoreTable
from msvae.scores.catalog import MAP_SCORES, MAPS
from msvae.training.auxiliary import AuxiliaryTrainer
from msvae.training.vae import Trainer
from small import SAME_BITS

CONFIG = Config().replace(
    image_size=32,
    hidden_dims=(8, 12),
    latent_dim=6,
    pretext=False,
    epochs=1,
    min_steps=0,
    segmenter_steps=3,
    batch_size=8,
    target_fpr=0.2,
    precision="fp32",
)
N = 60
HELD = math.ceil(0.15 * N)  # 9 calibrate: rates from 1 in 10


def smooth_images(n, seed, side=32):
    gen = torch.Generator().manual_seed(seed)
    coarse = 0.3 + 0.4 * torch.rand(n, 3, 4, 4, generator=gen)
    coarse += torch.tensor([0.2, 0.0, -0.2])[:, None, None]
    fine = F.interpolate(coarse, size=(side, side), mode="bicubic").clamp(0, 1)
    return list((fine * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy())


NORMAL, NEW = smooth_images(N, 0), smooth_images(30, 1)
NOISE = list(np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fitted") / "run"


@pytest.fixture(scope="module")
def fitted(run_folder):
    """A detector as `fit` returns it, saved as well."""
    return fit(NORMAL, run_folder, config=CONFIG)


@pytest.fixture(scope="module")
def loaded(fitted, run_folder):
    return load(run_folder)


def same(a, b):
    assert a.scores.keys() == b.scores.keys()
    assert a.p_values.keys() == b.p_values.keys()
    for left, right in ((a.scores, b.scores), (a.p_values, b.p_values)):
        for name in left:
            np.testing.assert_array_equal(left[name], right[name])
    np.testing.assert_array_equal(a.p, b.p)
    np.testing.assert_array_equal(a.flagged, b.flagged)


# Saved and loaded.


def test_saved_and_loaded_scores_are_bit_equal(fitted, loaded):
    """Scores, p-values and decisions after loading are those of before."""
    same(fitted.score([*NEW, *NOISE]), loaded.score([*NEW, *NOISE]))


def test_a_copied_run_serves(loaded, run_folder, tmp_path):
    """A run is a folder: wherever it lies, it is the same."""
    shutil.copytree(run_folder, tmp_path / "copy")
    same(loaded.score(NEW[:3]), load(str(tmp_path / "copy")).score(NEW[:3]))


@SAME_BITS
def test_fitting_twice_gives_the_same_detector(fitted):
    """The images and the settings decide everything."""
    same(fitted.score(NEW), fit(NORMAL, config=CONFIG).score(NEW))


def test_a_run_holds_what_it_should(fitted, run_folder):
    """The files of the design; every image in one part; an epoch a row; no checkpoint left."""
    names = {p.name for p in run_folder.iterdir()}
    tensors = {f"{n}.safetensors" for n in ("model", "calibration", "references")}
    graph = {"graph.xml", "graph.bin"}
    others = {"config.json", "environment.json", "history.csv", "split.csv"}
    assert names == tensors | graph | others
    with (run_folder / "split.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len({r["sha256"] for r in rows}) == len(rows) == N
    counts = {p: sum(r["part"] == p for r in rows) for p in ("train", "stop", "conformal")}
    assert counts == {"train": 48, "stop": 3, "conformal": HELD}
    with (run_folder / "history.csv").open(newline="") as file:
        assert [r["epoch"] for r in csv.DictReader(file)] == ["1"]


def is_pickle(data):
    """Whether the bytes are a pickle's instructions to the last one; none of them is run."""
    try:
        *_, (_, _, last) = pickletools.genops(data)
    except ValueError:
        return False
    return last == len(data) - 1


def test_no_file_of_a_run_is_a_pickle(fitted, run_folder):
    """By their bytes: safetensors by its specification, JSON, CSV, XML; neither zip nor pickle.

    Nor is the file of bare numbers that the XML lays out to the last byte.
    """
    for path in run_folder.iterdir():
        data = path.read_bytes()
        assert not zipfile.is_zipfile(path)
        assert not data.startswith((b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"))
        assert not is_pickle(data)
        if path.suffix == ".safetensors":
            (length,) = struct.unpack("<Q", data[:8])
            header = json.loads(data[8 : 8 + length])
            ends = [v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"]
            assert 8 + length + max(ends) == len(data)
        elif path.suffix == ".bin":  # the graph's small constants, as long as its XML says
            layers = ElementTree.parse(path.with_suffix(".xml")).getroot().find("layers")
            spans = [d.attrib for d in layers.iter("data") if "offset" in d.attrib]
            assert max(int(s["offset"]) + int(s["size"]) for s in spans) == len(data)
        else:
            assert path.suffix in (".json", ".csv", ".xml")
            assert data.decode("utf-8").isprintable() or "\n" in data.decode("utf-8")


def test_an_altered_run_is_not_loaded(fitted, run_folder, tmp_path):
    """One changed byte of the weights: the file is named."""
    where = tmp_path / "run"
    shutil.copytree(run_folder, where)
    data = bytearray((where / "model.safetensors").read_bytes())
    data[-3] ^= 4
    (where / "model.safetensors").write_bytes(data)
    with pytest.raises(RunError, match=r"model\.safetensors: differs from its checksum"):
        load(where)


def test_a_finished_run_is_not_overwritten_unasked(fitted, run_folder):
    """Nor resumed; both are told before any work."""
    with pytest.raises(RunError, match="holds a finished run"):
        fit(NORMAL, run_folder, config=CONFIG)
    with pytest.raises(RunError, match="no checkpoint to resume from"):
        fit(NORMAL, run_folder, config=CONFIG, resume=True, overwrite=True)


# Scoring.


def test_every_way_to_give_an_image_is_the_same(loaded, tmp_path):
    """A path, a string, a PIL image, bytes or floats: the same picture, the same scores."""
    pixels = NEW[0]
    path = tmp_path / "new.png"
    Image.fromarray(pixels).save(path)
    ways = [
        path,
        str(path),
        Image.fromarray(pixels),
        pixels,
        pixels / 255,
        np.float32(pixels) / 255,
    ]
    assert loaded.score(ways).paths[:3] == (str(path), str(path), "image 2")
    for way in ways[1:]:  # one by one: a place in a batch may change the last bit
        same(loaded.score([way]), loaded.score([path]))


@pytest.mark.parametrize("kind", ["path", "string", "image", "array"])
def test_one_image_needs_no_list(loaded, tmp_path, kind):
    """A single image gives a table of one row."""
    path = tmp_path / "new.png"
    Image.fromarray(NEW[0]).save(path)
    one = {"path": path, "string": str(path), "image": Image.fromarray(NEW[0]), "array": NEW[0]}[
        kind
    ]
    table = loaded.score(one)
    assert len(table) == 1
    assert table.scores["fused"][0] == pytest.approx(loaded.score([NEW[0]]).scores["fused"][0])


def test_p_values_are_conformal(loaded):
    """In (0, 1], by count of the held-out scores that are at least as high, for every score."""
    table = loaded.score([*NEW, *NOISE])
    assert set(table.p_values) == set(table.scores)
    for name, values in table.scores.items():
        reference = loaded.calibration.scores[name].tolist()
        assert len(reference) == HELD
        counts = [sum(r >= v for r in reference) for v in values.tolist()]
        np.testing.assert_allclose(table.p_values[name], [(1 + c) / (HELD + 1) for c in counts])
        assert (table.p_values[name] > 0).all()
        assert (table.p_values[name] <= 1).all()
    np.testing.assert_array_equal(table.p, table.p_values["fused"])
    np.testing.assert_array_equal(table.flagged, table.p <= 0.2)


def test_the_calibration_is_of_the_held_out_images(fitted, run_folder):
    """The references are the scores of exactly the images of the conformal part."""
    with (run_folder / "split.csv").open(newline="") as file:
        held = [r["path"] for r in csv.DictReader(file) if r["part"] == "conformal"]
    images = [NORMAL[int(name.removeprefix("image "))] for name in held]
    table = fitted.score(images)
    for name, values in fitted.calibration.scores.items():
        np.testing.assert_allclose(values, table.scores[name], rtol=1e-6)


def test_noise_is_flagged(loaded):
    """Gross anomalies get the least p-value that nine images can give."""
    table = loaded.score(NOISE)
    assert table.flagged.all()
    np.testing.assert_allclose(table.p, 1 / (HELD + 1))


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.6, 0.9])
def test_the_rate_decides_what_is_flagged(loaded, rate):
    """p at most the rate that is asked for; the scores are the same; more demand, more flags."""
    table, usual = loaded.score(NEW, target_fpr=rate), loaded.score(NEW)
    np.testing.assert_array_equal(table.flagged, table.p <= rate + 1e-9)
    np.testing.assert_array_equal(table.scores["fused"], usual.scores["fused"])
    if rate > 0.2:
        assert (table.flagged >= usual.flagged).all()


def test_rates_change_flags(loaded):
    """At a rate of 0.9 more images are flagged than at 0.1."""
    few, many = (loaded.score(NEW, target_fpr=r).flagged.sum() for r in (0.1, 0.9))
    assert few < many


@pytest.mark.parametrize("rate, need", [(0.05, 19), (0.099, 10), (0.01, 99)])
def test_a_rate_that_cannot_be_kept_is_refused(loaded, rate, need):
    """With the number of images it would need, both in scoring and before fitting."""
    with pytest.raises(RateError, match=rf"needs at least {need} calibration images, got {HELD}"):
        loaded.score(NEW, target_fpr=rate)
    with pytest.raises(RateError, match=rf"needs at least {need} calibration images, got {HELD}"):
        fit(NORMAL, config=CONFIG.replace(target_fpr=rate))


@pytest.mark.parametrize("rate", [0, 1, -0.1, 2.0, math.nan])
def test_a_rate_that_is_none_is_refused(loaded, rate):
    """Outside of 0…1."""
    with pytest.raises(RateError, match="between 0 and 1"):
        loaded.score(NEW[0], target_fpr=rate)


BAD = {
    "NaN": (np.where(np.eye(32)[:, :, None] > 0, np.nan, 0.5), "not finite"),
    "infinity": (np.full((32, 32, 3), np.inf), "not finite"),
    "floats up to 255": (np.full((32, 32, 3), 255.0), r"floats lie in \[0, 1\]"),
    "channels first": (np.zeros((3, 32, 32), np.uint8), "shape"),
    "a batch": (np.zeros((2, 32, 32, 3), np.uint8), "shape"),
    "a line": (np.zeros(32, np.uint8), "shape"),
    "too small": (np.zeros((4, 32, 3), np.uint8), "at least 8"),
    "integers": (np.zeros((32, 32, 3), np.int64), "type"),
}


@pytest.mark.parametrize("kind", BAD)
def test_arrays_that_are_no_image_are_refused(loaded, kind):
    """Told why, in one line; nothing is scored silently wrong."""
    array, reason = BAD[kind]
    with pytest.raises(ImageError, match=reason) as caught:
        loaded.score([NEW[0], array])
    assert "\n" not in str(caught.value)


def test_unreadable_images_are_listed_and_the_rest_scored(loaded, tmp_path):
    """A scan goes on: a row for each good image, a reason for each bad one, both in order."""
    good, torn, absent = tmp_path / "a.png", tmp_path / "b.png", tmp_path / "c.png"
    Image.fromarray(NEW[0]).save(good)
    torn.write_bytes(good.read_bytes()[:100])
    scan = loaded.scan([torn, good, absent, NEW[1]])
    assert scan.table.paths == (str(good), "image 3")
    assert [q.name for q in scan.quarantine] == [str(torn), str(absent)]
    same(scan.table, loaded.score(NEW[:2]))
    with pytest.raises(ImageError, match=r"b\.png"):
        loaded.score([good, torn, absent])


def test_nothing_to_score_is_an_error(loaded, tmp_path):
    """No image given, or none of them readable."""
    with pytest.raises(DataError, match="no image was given"):
        loaded.score([])
    with pytest.raises(DataError, match=r"none of 2 images could be read, first .*c\.png"):
        loaded.scan([tmp_path / "c.png", tmp_path / "d.png"])


def test_many_images_come_in_order(loaded):
    """Over more than one batch, each row is that of its image."""
    many = [NEW[i % 30] for i in range(150)]
    table, thirty = loaded.score(many), loaded.score(NEW)
    assert len(table) == 150
    for i in (0, 63, 64, 127, 128, 149):
        np.testing.assert_allclose(
            table.scores["reconstruction"][i], thirty.scores["reconstruction"][i % 30], rtol=1e-5
        )


@pytest.mark.parametrize("workers", [1, 3])
def test_images_are_told_apart_however_many_threads_score(loaded, tmp_path, workers, monkeypatch):
    """By one thread or by several: rows, reasons and maps in order, a tick for each image."""
    torn = tmp_path / "torn.png"
    torn.write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    many = [torn if i % 50 < 2 or 64 <= i < 128 else NEW[i % 30] for i in range(150)]
    good = [i for i, image in enumerate(many) if image is not torn]
    ticks, shown = [], []

    class Counting(NullProgress):
        def track(self, items, task, total):
            for item in items:
                yield item
                ticks.append(total)

    monkeypatch.setattr(type(loaded.engine), "workers", workers)
    scan = loaded.scan(many, progress=Counting(), each_map=lambda name, maps: shown.append(name))
    assert scan.table.paths == tuple(shown) == tuple(f"image {i}" for i in good)
    assert [q.name for q in scan.quarantine] == [str(torn)] * (len(many) - len(good))
    assert ticks == [len(many)] * len(many)
    expected = loaded.score(NEW).scores["reconstruction"][[i % 30 for i in good]]
    np.testing.assert_allclose(scan.table.scores["reconstruction"], expected, rtol=1e-5)


@pytest.mark.parametrize("size", [1, 3, 11, 40])
def test_pixels_are_scored_in_batches_of_any_size(loaded, size):
    """Empty ones among them: the scores are those of all at once, in order."""
    pixels = np.stack([*NEW, *NOISE])
    batches = [pixels[i : i + size] for i in range(0, len(pixels), size)]
    found, _ = loaded.score_pixels([pixels[:0], *batches, pixels[:0]])
    for name, values in loaded.score([*NEW, *NOISE]).scores.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-4, atol=1e-4)


def test_maps_come_when_asked_for(loaded):
    """(N, S, S) each, the scores being means of them; otherwise none."""
    scan = loaded.scan(NEW[:5], with_maps=True)
    assert tuple(scan.maps) == MAPS
    for found in scan.maps.values():
        assert found.shape == (5, 32, 32)
        assert np.isfinite(found).all()
    places = round(loaded.graph.torch_graph().shares[MAP_SCORES.index("spatial")] * 32 * 32)
    highest = np.sort(scan.maps["spatial"].reshape(5, -1))[:, -places:]
    np.testing.assert_allclose(highest.mean(axis=1), scan.table.scores["spatial"], rtol=1e-5)
    mean = scan.maps["reconstruction"].mean(axis=(1, 2))
    np.testing.assert_allclose(mean, scan.table.scores["reconstruction"], rtol=1e-4)
    assert loaded.scan(NEW[:5]).maps == {}


def test_the_table_goes_to_disk_and_back(loaded, tmp_path):
    """A CSV of scores is read back to the bit."""
    table = loaded.score([*NEW, *NOISE])
    table.write_csv(tmp_path / "scores.csv")
    back = ScoreTable.read_csv(tmp_path / "scores.csv")
    assert back.paths == table.paths
    same(back, table)


def test_the_references_are_training_images(loaded, run_folder):
    """Names, latents and thumbnails are those of images that were trained on."""
    with (run_folder / "split.csv").open(newline="") as file:
        names = [r["path"] for r in csv.DictReader(file) if r["part"] == "train"]
    r = loaded.references
    assert list(r.names) == names
    for i in (0, 7, 47):
        pixels = NORMAL[int(names[i].removeprefix("image "))]
        np.testing.assert_array_equal(r.thumbnails[i], pixels)
        fused = loaded.score(pixels).scores["fused"][0]
        assert float(r.fused[i]) == pytest.approx(fused, rel=1e-4, abs=1e-3)


# Fitting.


def test_the_fixed_rule_is_the_seeds(run_folder):
    """`weighted` against 0.5, whatever the p-value; another rate makes it conformal."""
    config = CONFIG.replace(rule="fixed", threshold=0.5)
    detector = fit(NORMAL, config=config, engine="reference")
    table = detector.score([*NEW, *NOISE])
    np.testing.assert_array_equal(table.flagged, table.scores["weighted"] >= 0.5)
    asked = detector.score([*NEW, *NOISE], target_fpr=0.3)
    np.testing.assert_array_equal(asked.flagged, asked.p <= 0.3 + 1e-9)


def test_a_rule_that_needs_labels_is_refused_at_fit():
    """With the command that can learn it."""
    with pytest.raises(ConfigError, match="needs labelled images"):
        fit(NORMAL, config=CONFIG.replace(rule="f1"))


def test_too_few_images_are_refused():
    """With how many there must be; copies count once."""
    with pytest.raises(DataError, match="at least 20"):
        fit([*NORMAL[:19], *NORMAL[:19]], config=CONFIG)


def test_unreadable_images_do_not_stop_a_fit(tmp_path, monkeypatch):
    """From a folder: the good are fitted, the bad are listed in the run and told."""
    monkeypatch.setenv("MSVAE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "parts").mkdir()
    for i, pixels in enumerate(NORMAL[:40]):
        Image.fromarray(pixels).save(tmp_path / "parts" / f"{i:02}.png")
    (tmp_path / "parts" / "bad.png").write_text("no picture")
    said = []
    detector = fit(tmp_path / "parts", tmp_path / "run", config=CONFIG, say=said.append)
    with (tmp_path / "run" / "quarantine.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert [r[0] for r in rows] == ["path", str(tmp_path / "parts" / "bad.png")]
    assert any("1 images could not be read" in text for text in said)
    assert detector.calibration.n == 6
    same(detector.score(tmp_path / "parts" / "00.png"), load(tmp_path / "run").score(NORMAL[0]))


class Impatient:
    """A progress that is killed amid the second epoch."""

    def __init__(self, steps):
        self.left = steps

    def track(self, items, task, total):
        """Count down the steps of training."""
        for item in items:
            if task == "training":
                self.left -= 1
                if self.left < 0:
                    raise KeyboardInterrupt
            yield item

    def note(self, text):
        """Nothing."""


@SAME_BITS
def test_a_killed_fit_resumes_bit_equal(tmp_path):
    """After Ctrl-C there is no run, but a checkpoint; resumed, it is as if nothing had happened.

    So too for the pretext network, which is trained after the VAE.
    """
    config, killed = CONFIG.replace(epochs=2, dropout=0.1, crop=0.1), tmp_path / "killed"
    config = config.replace(pretext=True, pretext_epochs=1)
    whole = fit(NORMAL, config=config, engine="reference")
    with pytest.raises(KeyboardInterrupt):
        fit(NORMAL, killed, config=config, progress=Impatient(30))
    with pytest.raises(RunError, match="is not a run"):
        load(killed)
    for other in (config.replace(beta=2.0), config.replace(latent_dim=5)):
        with pytest.raises((RunError, TrainingError), match="resume with the same"):
            fit(NORMAL, killed, config=other, resume=True)
    with pytest.raises(RunError, match="other images or settings"):
        fit(NORMAL[:50], killed, config=config.replace(target_fpr=0.2), resume=True)
    resumed = fit(NORMAL, killed, config=config, engine="reference", resume=True)
    same(whole.score(NEW), resumed.score(NEW))
    kept, expected = load(killed).graph.arrays(), whole.graph.arrays()
    assert kept.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(kept[name], array, err_msg=name)


@SAME_BITS
def test_a_fit_killed_in_the_pretext_loop_keeps_the_vae(tmp_path, monkeypatch):
    """However seldom checkpoints are written: resumed, no epoch of the VAE is trained again."""
    config = CONFIG.replace(pretext=True, pretext_epochs=1, epochs=3, min_steps=0)
    whole = fit(NORMAL, config=config, engine="reference").score(NEW)
    with monkeypatch.context() as patch:
        patch.setattr(AuxiliaryTrainer, "run", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            fit(NORMAL, tmp_path / "killed", config=config)
    monkeypatch.setattr(Trainer, "step", lambda *_: pytest.fail("trained again"))
    killed = tmp_path / "killed"
    resumed = fit(NORMAL, killed, config=config, engine="reference", resume=True)
    same(whole, resumed.score(NEW))


def _interrupted(*_):
    raise KeyboardInterrupt


def test_new_thresholds_without_training(loaded, run_folder, tmp_path):
    """A recalibrated run keeps its scores, has other p-values, and survives saving and loading."""
    where = tmp_path / "run"
    shutil.copytree(run_folder, where)
    table = loaded.score(NEW)
    references = type(loaded.calibration)(table.scores, loaded.calibration.peaks)
    changed = load(where).calibrated(references, loaded.decision.at(0.05))
    changed.save_calibration(where)
    again = load(where)
    assert (again.calibration.n, again.decision.target_fpr) == (30, 0.05)
    same(changed.score(NOISE), again.score(NOISE))
    np.testing.assert_array_equal(again.score(NEW).scores["fused"], table.scores["fused"])
    np.testing.assert_allclose(again.score(NOISE).p, 1 / 31)
