"""What bad input gets: one clear line with the remedy, or a line in the quarantine; nothing lost."""

import csv
import errno
import hashlib
import importlib.util
import json
import os
import re
import shutil
import stat
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from torch.nn import functional as F

from msvae import fit, load
from msvae.cli import main as cli
from msvae.core.config import Config
from msvae.core.errors import DataError, ImageError, OutputError, RateError, RunError
from msvae.data import cache
from msvae.data.split import split_by_content, text_sha256
from msvae.engine import choose
from msvae.evaluation.table import ScoreTable
from msvae.run import checkpoint, evaluate, store
from msvae.run.detector import Detector
from msvae.run.parts import check_rate
from msvae.training.vae import Trainer

SETTINGS = {
    "image_size": 32,
    "hidden_dims": (8, 12),
    "latent_dim": 6,
    "pretext": False,
    "segmenter": False,
    "epochs": 1,
    "min_steps": 0,
    "batch_size": 8,
    "target_fpr": 0.2,
    "precision": "fp32",
}
CONFIG = Config().replace(**SETTINGS)
N = 60


def smooth_images(n, seed, side=32):
    gen = torch.Generator().manual_seed(seed)
    coarse = 0.3 + 0.4 * torch.rand(n, 3, 4, 4, generator=gen)
    fine = F.interpolate(coarse, size=(side, side), mode="bicubic").clamp(0, 1)
    return list((fine * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy())


def write(folder, arrays, prefix=""):
    folder.mkdir(parents=True, exist_ok=True)
    for i, array in enumerate(arrays):
        Image.fromarray(array).save(folder / f"{prefix}{i:02}.png")
    return folder


def bomb(path):
    """A PNG of a few bytes whose header promises 3.6 gigapixels."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(1000)))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + pixels + chunk(b"IEND", b""))


def truncated(path):
    """The first half of a JPEG."""
    Image.fromarray(smooth_images(1, 8, 64)[0]).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def tiny(path):
    """7 pixels wide."""
    Image.new("RGB", (7, 40)).save(path)


BAD = {
    "text.png": (lambda path: path.write_text("no picture"), "not an image"),
    "half.jpg": (truncated, "damaged"),
    "empty.png": (lambda path: path.touch(), "0 bytes"),
    "bomb.png": (bomb, "decompression bomb"),
    "small.png": (tiny, "7×40 px: at least 8"),
}


def entries(folder):
    """Every file below, by its content."""
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """60 good files and one of every bad kind; a run that was fitted on all of them."""
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("made")
        patch.setenv("MSVAE_CACHE", str(root / "cache"))
        write(root / "good", smooth_images(N, 0))
        for name, (make, _) in BAD.items():
            make(root / "good" / name)
        write(root / "new", smooth_images(20, 1))
        fit(root / "good", root / "run", config=CONFIG)
        yield root


@pytest.fixture
def run(made, tmp_path):
    """A copy of the run, to do harm to."""
    return Path(shutil.copytree(made / "run", tmp_path / "run"))


@pytest.fixture
def msvae(capsys, made, monkeypatch):
    """The command line: gives the exit code and what it said on stderr, line by line."""
    monkeypatch.setenv("MSVAE_CACHE", str(made / "cache"))  # each compiled graph once
    monkeypatch.setenv("COLUMNS", "200")

    def call(*words):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main([str(w) for w in words])
        return ended.value.code, capsys.readouterr().err.splitlines()

    return call


def flags():
    """The settings as words of the command line."""
    words = []
    for name, value in SETTINGS.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            words += [f"--{option}", *map(str, value if isinstance(value, tuple) else [value])]
    return words


def refused(answer, *texts):
    """Exit code 2 and one single line of error, which says all the texts."""
    code, lines = answer
    assert code == 2
    (line,) = [li for li in lines if li.startswith("msvae: ")]
    assert line == lines[-1]
    for text in texts:
        assert text in line


# Folders and files.


@pytest.mark.parametrize("verb", ["fit", "score", "calibrate", "explain"])
def test_an_empty_folder(verb, msvae, made, tmp_path):
    """Is told by its name, with what to name instead; nothing is written."""
    empty, out = tmp_path / "empty", tmp_path / "out"
    empty.mkdir()
    words = [empty, "--out", out] if verb == "fit" else [made / "run", empty]
    words += ["--out", out] if verb == "explain" else []
    refused(msvae(verb, *words), str(empty), "holds no images")
    assert not out.exists()


@pytest.mark.parametrize("verb", ["fit", "score", "calibrate", "explain"])
def test_a_path_that_is_not_there(verb, msvae, made, tmp_path):
    """Is told by its name: a folder, a file or a pattern alike."""
    out = ["--out", tmp_path / "out"] if verb in ("fit", "explain") else []
    for gone, remedy in ((tmp_path / "gone", "check the path"), ("gone*.png", "check the pattern")):
        words = [gone, *out] if verb == "fit" else [made / "run", gone, *out]
        refused(msvae(verb, *words), str(gone), remedy)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["score", "calibrate", "explain", "evaluate"])
def test_a_run_that_is_not_there(verb, msvae, made, tmp_path):
    """Is told by its name, with what a run is."""
    words = {
        "explain": [made / "new", "--out", tmp_path / "out"],
        "evaluate": ["--normal", made / "new", "--anomalous", made / "good"],
    }.get(verb, [made / "new"])
    refused(msvae(verb, tmp_path / "gone", *words), str(tmp_path / "gone"), "not a run")


@pytest.mark.parametrize("name", BAD)
def test_a_bad_image_among_those_of_a_fit(name, made):
    """Stands in the run's quarantine with file and reason; the good ones are all fitted."""
    rows = read(made / "run" / "quarantine.csv")
    (reason,) = [r["reason"] for r in rows if r["path"] == str(made / "good" / name)]
    assert BAD[name][1] in reason
    assert "\n" not in reason
    assert len(rows) == len(BAD)
    assert len(read(made / "run" / "split.csv")) == N


@pytest.mark.parametrize("name", BAD)
def test_a_bad_image_among_those_to_score(name, made, msvae, tmp_path):
    """Stands in the quarantine beside the scores; the good ones have theirs, as if alone."""
    BAD[name][0](tmp_path / name)
    good = made / "new" / "00.png"
    out = tmp_path / "F.csv"
    code, lines = msvae("score", made / "run", tmp_path / name, good, "--out", out)
    assert code == 0
    assert "1 images could not be read" in lines[-1]
    (row,) = read(tmp_path / "F.quarantine.csv")
    assert row["path"] == str(tmp_path / name)
    assert BAD[name][1] in row["reason"]
    table = ScoreTable.read_csv(out)
    assert table.paths == (str(good),)
    alone = load(made / "run").score(good)
    np.testing.assert_array_equal(table.scores["fused"], alone.scores["fused"])


@pytest.mark.parametrize("name", BAD)
def test_a_bad_image_alone(name, made, msvae, tmp_path):
    """With nothing else to score the reason is the error; the library raises it."""
    BAD[name][0](tmp_path / name)
    answer = msvae("score", made / "run", tmp_path / name)
    refused(answer, str(tmp_path / name), BAD[name][1])
    detector = load(made / "run")
    with pytest.raises(DataError, match=name):
        detector.score(tmp_path / name)
    with pytest.raises(ImageError, match=name):
        detector.score([made / "new" / "00.png", tmp_path / name])


def test_an_image_that_cannot_be_explained(made, msvae, tmp_path):
    """Is listed with its reason; the others are explained all the same."""
    bad = write(tmp_path / "in", smooth_images(1, 3))
    for name, (make, _) in BAD.items():
        make(bad / name)
    out = tmp_path / "out"
    code, _ = msvae("explain", made / "run", bad, "--out", out)
    assert code == 0
    rows = read(out / "quarantine.csv")
    assert {Path(r["path"]).name for r in rows} == set(BAD)
    assert {p.name for p in out.iterdir()} == {"00.png", "00.json", "quarantine.csv"}


def test_too_few_images(made, msvae, tmp_path):
    """19 cannot be split; 30 can, but cannot keep the rate: each with the number needed."""
    few = write(tmp_path / "few", smooth_images(19, 5))
    answer = msvae("fit", few, "--out", tmp_path / "out")
    refused(answer, "19 distinct images are too few", "at least 20")
    some = write(tmp_path / "some", smooth_images(30, 5))
    answer = msvae("fit", some, "--out", tmp_path / "out", "--target-fpr", "0.05")
    needs = (
        "0.05 needs at least 19 calibration images, got 5: add images until there are 121 in all"
    )
    refused(answer, needs, "or ask for --target-fpr 0.167, which these can keep")
    answer = msvae("calibrate", made / "run", few, "--target-fpr", "0.01")
    refused(answer, "0.01 needs at least 99 calibration images, got 19")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rate, n", [(0.05, 18), (0.01, 3), (0.2, 3), (1 / 7, 5)])
def test_too_few_for_a_rate_names_what_would_do(rate, n):
    """With so many images in all the rate is kept, with one less it is not; the other rate is."""
    with pytest.raises(RateError) as caught:
        check_rate(rate, n)
    total, other = re.search(r"are (\d+) in all.*--target-fpr ([\d.]+)", str(caught.value)).groups()
    held = [
        len(split_by_content([text_sha256(str(i)) for i in range(int(total) - less)]).conformal)
        for less in (0, 1)
    ]
    check_rate(rate, held[0])
    check_rate(float(other), n)
    with pytest.raises(RateError):
        check_rate(rate, held[1])


@pytest.mark.parametrize("kind", ["black", "transparent", "all but one black"])
def test_images_that_are_equal_once_decoded(tmp_path, msvae, monkeypatch, kind):
    """Their files differ, what is seen does not: refused before anything is trained."""
    monkeypatch.setattr(Trainer, "epoch", lambda *_: pytest.fail("trained"))
    (tmp_path / "in").mkdir()
    rng = np.random.default_rng(0)
    for i in range(40):
        pixels = np.zeros((32, 32, 4), dtype=np.uint8)
        if kind == "transparent":
            pixels[..., :3] = rng.integers(0, 256, (32, 32, 3))
        else:
            pixels[..., 3] = 255
        pixels[..., :3] = 99 if kind.startswith("all") and i == 0 else pixels[..., :3]
        words = PngImagePlugin.PngInfo()
        words.add_text("number", str(i))
        Image.fromarray(pixels).save(tmp_path / "in" / f"{i:02}.png", pnginfo=words)
    answer = msvae("fit", tmp_path / "in", "--out", tmp_path / "out", "--target-fpr", "0.2")
    refused(answer, "images to train on only", "differ once they are decoded: at least 10")
    assert not (tmp_path / "out").exists()


# What stands where something is to be written.


def at_a_folder(path):
    path.mkdir()


def at_a_fifo(path):
    os.mkfifo(path)


def at_a_socket(path):
    os.mknod(path, stat.S_IFSOCK | 0o600)


WORDS = {  # the verb's words, and what it writes by this name
    "fit": lambda made, run, out: ["fit", made / "new", "--out", out],
    "evaluate": lambda made, run, out: ["evaluate", run, made / "new", "--out", out],
    "explain": lambda made, run, out: ["explain", run, made / "new" / "00.png", "--out", out],
    "maps": lambda made, run, out: ["score", run, made / "new", "--maps", out],
    "table": lambda made, run, out: ["score", run, made / "new", "--out", out],
}


@pytest.mark.parametrize(
    "verb, put",
    [
        *[(verb, put) for verb in ("fit", "evaluate", "maps") for put in (at_a_fifo, at_a_socket)],
        *[("explain", at_a_fifo), ("table", at_a_folder), ("table", at_a_socket)],
    ],
)
def test_an_output_that_cannot_be_is_refused_before_the_work(
    verb, put, made, msvae, tmp_path, monkeypatch
):
    """A FIFO in the place of a folder, a folder in the place of a file: nothing is replaced."""
    for owner, name in ((Trainer, "epoch"), (Detector, "scan"), (Detector, "explain")):
        monkeypatch.setattr(owner, name, lambda *_, **__: pytest.fail("worked"))
    path = tmp_path / "out"
    put(path)
    before = path.lstat()
    refused(msvae(*WORDS[verb](made, made / "run", path)), f"{path}: cannot be written (it is")
    assert os.path.samestat(path.lstat(), before)


def test_a_table_into_a_fifo(made, msvae, tmp_path):
    """Whoever reads it gets the table; the FIFO stays one, and nothing is put beside it."""
    path = tmp_path / "fifo"
    os.mkfifo(path)
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    assert msvae("score", made / "run", made / "new", "--out", path)[0] == 0
    table = os.read(number, 1 << 16)
    os.close(number)
    assert table.startswith(b"path,")
    assert stat.S_ISFIFO(path.stat().st_mode)
    assert list(tmp_path.iterdir()) == [path]


ARRAYS = {
    "shape": (np.zeros((32, 32, 2), np.uint8), r"shape \(32, 32, 2\)"),
    "planes first": (np.zeros((3, 32, 32), np.uint8), r"shape \(3, 32, 32\)"),
    "batch": (np.zeros((2, 32, 32, 3), np.uint8), r"shape \(2, 32, 32, 3\)"),
    "nan": (np.full((32, 32, 3), np.nan), "not finite"),
    "infinite": (np.full((32, 32), np.inf), "not finite"),
    "range": (np.full((32, 32, 3), 255.0), r"lie in \[0, 1\]"),
    "type": (np.zeros((32, 32, 3), np.int64), "type int64"),
    "nothing": (np.zeros((0, 32, 3), np.uint8), "no pixels"),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_an_array_that_is_no_image(kind, made):
    """Is refused by its place in the list and the reason; the others are scored."""
    array, reason = ARRAYS[kind]
    detector = load(made / "run")
    good = smooth_images(1, 4)[0]
    scan = detector.scan([good, array])
    assert scan.table.paths == ("image 0",)
    (error,) = scan.quarantine
    assert error.name == "image 1"
    for call in (lambda: detector.score([good, array]), lambda: detector.explain(array)):
        with pytest.raises(ImageError, match=reason):
            call()
    with pytest.raises(DataError, match=f"none of 20 images .* image 0: .*{reason}"):
        fit([array] * 20, config=CONFIG)


def test_a_group_expression_that_matches_nothing(made, msvae, tmp_path):
    """Is told with the path that it does not match; so is one that is no expression."""
    out = tmp_path / "out"
    answer = msvae("fit", made / "new", "--out", out, "--group-by", r"part(\d+)")
    refused(answer, "matches nothing in", "00.png", "widen the expression")
    refused(msvae("fit", made / "new", "--out", out, "--group-by", "("), "regular expression")
    assert not out.exists()


def test_the_same_content_in_training_and_test(made, msvae, tmp_path):
    """A renamed copy of any fitted image is found by its bytes: no flattered figures."""
    normal = write(tmp_path / "normal", smooth_images(6, 6))
    odd = write(tmp_path / "odd", smooth_images(6, 7))
    before = entries(made / "run")
    for row in (r for p in ("train", "stop", "conformal") for r in _part(made, p)[:1]):
        for folder in (normal, odd):
            shutil.copy(row["path"], folder / "copy.png")
            answer = msvae(
                "evaluate", made / "run", "--normal", normal, "--anomalous", odd, "--out", tmp_path
            )
            refused(answer, str(folder / "copy.png"), "fitted on", "take them out")
            (folder / "copy.png").unlink()
    assert not (tmp_path / "metrics.json").exists()
    assert entries(made / "run") == before


def _part(made, part):
    return [r for r in read(made / "run" / "split.csv") if r["part"] == part]


def test_calibrating_with_images_that_were_trained_on(made, run, msvae, tmp_path):
    """Is refused, since they look too normal; the run keeps its calibration."""
    copied = write(tmp_path / "more", smooth_images(20, 9))
    row = _part(made, "train")[0]
    shutil.copy(row["path"], copied / "copy.png")
    before = entries(run)
    refused(msvae("calibrate", run, copied), "copy.png", row["path"], "trained on")
    assert entries(run) == before


# Runs.


CHECKED = [
    *["model.safetensors", "calibration.safetensors", "references.safetensors"],
    *["graph.xml", "graph.bin", "split.csv", "environment.json"],
]


@pytest.mark.parametrize("name", CHECKED)
def test_a_run_with_a_changed_byte(name, run, made, msvae):
    """One bit in the middle of any file: refused, naming it."""
    data = bytearray((run / name).read_bytes())
    data[len(data) // 2] ^= 1
    (run / name).write_bytes(data)
    answer = msvae("score", run, made / "new" / "00.png")
    refused(answer, str(run / name), "differs from its checksum", "fit it again")
    with pytest.raises(RunError, match=name):
        load(run)


@pytest.mark.parametrize("name", CHECKED)
def test_a_run_with_a_missing_file(name, run, made, msvae):
    """Refused, naming it; a lost config.json leaves no run at all."""
    (run / name).unlink()
    refused(msvae("score", run, made / "new" / "00.png"), str(run / name), "is missing")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "not a run"),
        ("", "cannot be read as a run's settings"),
        ('{"format": 7', "cannot be read as a run's settings"),
        ("[]", "cannot be read as a run's settings"),
        ('{"format": 7}', "cannot be read as a run's settings"),
    ],
)
def test_a_run_with_torn_settings(text, reason, run, made, msvae):
    """A config.json that is absent, cut off or something else is told in one line."""
    (run / "config.json").unlink()
    if text is not None:
        (run / "config.json").write_text(text)
    refused(msvae("score", run, made / "new" / "00.png"), str(run), reason)


def test_a_run_of_a_newer_format(run, made, msvae):
    """Refused with both versions, though its content may be of any form."""
    (run / "config.json").write_text(json.dumps({"format": store.FORMAT + 1, "other": "things"}))
    answer = msvae("score", run, made / "new" / "00.png")
    refused(answer, f"format {store.FORMAT + 1}", f"reads {store.FORMAT}", "update msvae")


def test_a_run_of_the_format_before(run, made, msvae):
    """Refused, naming the version that reads it."""
    facts = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**facts, "format": 5}))
    answer = msvae("score", run, made / "new" / "00.png")
    refused(answer, "format 5", f"reads {store.FORMAT}", "msvae 0.1.0 of commit 47b9380 reads it")


# Engines.


ENGINE_VERBS = {
    "fit": ["new", "--out", "out", *flags(), "--rule", "fixed"],
    "score": ["run", "new"],
    "calibrate": ["run", "new"],
    "evaluate": ["run", "--normal", "new", "--anomalous", "odd", "--out", "out"],
}


@pytest.mark.parametrize("by", ["option", "variable"])
@pytest.mark.parametrize("verb", ENGINE_VERBS)
def test_an_engine_that_is_none(verb, by, made, msvae, tmp_path, monkeypatch):
    """Is told by its name with those that there are, before any work; nothing is written."""
    monkeypatch.setattr(Trainer, "step", lambda *_: pytest.fail("trained before it refused"))
    words = [made / w if w in ("run", "new") else w for w in ENGINE_VERBS[verb]]
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "odd", smooth_images(3, 7))
    before = entries(made / "run"), set(tmp_path.iterdir())
    if by == "option":
        words += ["--engine", "nonsense"]
    else:
        monkeypatch.setenv("MSVAE_ENGINE", "nonsense")
    answer = msvae(verb, *words)
    refused(answer, "no engine is called 'nonsense'", "auto, reference, openvino", "MSVAE_ENGINE")
    assert (entries(made / "run"), set(tmp_path.iterdir())) == before


@pytest.mark.parametrize(("engine", "library"), [("openvino", "openvino"), ("reference", "torch")])
def test_an_engine_whose_library_is_not_there(engine, library, made, msvae, monkeypatch):
    """Is told with what to install, and with the engine that goes without."""
    absent = importlib.util.find_spec
    monkeypatch.setattr(choose, "find_spec", lambda name: None if name == library else absent(name))
    answer = msvae("score", made / "run", made / "new", "--engine", engine)
    other = {"openvino": "reference", "reference": "openvino"}[engine]
    refused(answer, f"pip install {library}", f"--engine {other}")


def _with_file(run, name, data):
    """Put another file into a run, under its right checksum."""
    (run / name).write_bytes(data)
    facts = json.loads((run / "config.json").read_text())
    facts["checksums"][name] = hashlib.sha256(data).hexdigest()
    (run / "config.json").write_text(json.dumps(facts))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda xml: xml.replace(b'name="networks.', b'name="netwurks.'), "does not match its run"),
        (lambda xml: xml[: len(xml) // 2], "is not a graph that OpenVINO reads"),
    ],
)
def test_a_graph_of_another_run(change, reason, run, made, msvae):
    """A graph file that names tensors that the run lacks, or is none, is refused: no wrong number."""
    data = (run / "graph.xml").read_bytes()
    assert change(data) != data
    _with_file(run, "graph.xml", change(data))
    answer = msvae("score", run, made / "new" / "00.png", "--engine", "openvino")
    refused(answer, str(run / "graph.xml"), reason, "fit it again")


def test_a_broken_cache_of_compiled_graphs(made, msvae, tmp_path, monkeypatch):
    """What is kept to start quickly and is torn, foreign or out of date is made anew, silently."""
    monkeypatch.setenv("MSVAE_CACHE", str(tmp_path / "own"))
    words = ["score", made / "run", made / "new" / "00.png", "--engine", "openvino", "--out"]
    assert msvae(*words, tmp_path / "first.csv")[0] == 0
    kept = sorted((tmp_path / "own").rglob("*.blob"))
    assert kept
    for i, harm in enumerate((b"", b"no graph", kept[0].read_bytes()[:-100])):
        for path in kept:
            path.write_bytes(harm)
        code, lines = msvae(*words, tmp_path / f"{i}.csv")
        assert code == 0
        assert not [line for line in lines if line.startswith("msvae: ")]
        assert (tmp_path / f"{i}.csv").read_bytes() == (tmp_path / "first.csv").read_bytes()
        assert all(path.read_bytes() != harm for path in kept)


# The disk.


@pytest.fixture
def full_disk(monkeypatch):
    """From the n-th write on the disk is full."""

    def after(n):
        left = iter(range(n))

        def full(*_):
            if next(left, None) is None:
                raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)

    return after


@pytest.mark.parametrize("verb", ["score", "maps", "evaluate", "explain", "report"])
def test_a_full_disk_leaves_what_was_there(verb, run, made, msvae, tmp_path, full_disk):
    """One line, and every file of before is as it was, with no half file beside it."""
    image, out = made / "new" / "00.png", tmp_path / "out"
    odd = write(tmp_path / "odd", smooth_images(3, 7))
    words = {
        "score": ["score", run, image, "--out", out / "F.csv"],
        "maps": ["score", run, image, "--maps", out],
        "evaluate": ["evaluate", run, "--normal", made / "new", "--anomalous", odd],
        "explain": ["explain", run, image, "--out", out],
        "report": ["report", run],
    }[verb]
    for file in (out / "F.csv", out / "00.png", run / "report.html", run / "evaluation" / "x"):
        file.parent.mkdir(exist_ok=True)
        file.write_text("what was there")
    before = entries(run), entries(out)
    full_disk(0)
    refused(msvae(*words), "No space left on device", "free some space")
    assert (entries(run), entries(out)) == before


@pytest.mark.parametrize("writes", [0, 1])
def test_a_full_disk_while_calibrating(writes, run, made, msvae, full_disk):
    """The old thresholds hold, and the run loads, wherever it breaks off before the change."""
    normals = load(made / "run").score([str(p) for p in sorted((made / "new").iterdir())])
    full_disk(writes)
    refused(msvae("calibrate", run, made / "new"), "No space left on device")
    again = load(run).score(list(normals.paths))
    np.testing.assert_array_equal(again.p, normals.p)
    np.testing.assert_array_equal(again.flagged, normals.flagged)


def test_a_full_disk_after_training_loses_no_epoch(made, tmp_path, full_disk, monkeypatch):
    """The weights are in the checkpoint: with room again, --resume only has to write the run."""
    full_disk(3)  # checkpoint, history, weights
    out = tmp_path / "out"
    with pytest.raises(OutputError, match="No space left"):
        fit(made / "good", out, config=CONFIG)
    assert not (out / "config.json").exists()
    monkeypatch.undo()
    monkeypatch.setattr(Trainer, "epoch", lambda *_: pytest.fail("trained again"))
    fit(made / "good", out, config=CONFIG, resume=True)
    for name in ("model.safetensors", "calibration.safetensors", "references.safetensors"):
        assert (out / name).read_bytes() == (made / "run" / name).read_bytes()


def test_a_full_disk_costs_the_cache_only(made, tmp_path, monkeypatch):
    """No room to keep decoded images: a warning, and the fit is the same as with it."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setenv("MSVAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache.os, "posix_fallocate", full, raising=False)
    with pytest.warns(UserWarning, match="No space left"):
        detector = fit(made / "good", config=CONFIG)
    expected = load(made / "run").graph.arrays()
    assert len(expected) > 20
    for name, values in detector.graph.arrays().items():
        np.testing.assert_array_equal(values, expected[name])
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


def test_a_place_that_cannot_be_written_to(made, msvae, tmp_path):
    """A file where a folder should be is told in one line."""
    (tmp_path / "file").touch()
    answer = msvae(
        "score", made / "run", made / "new" / "00.png", "--out", tmp_path / "file" / "F.csv"
    )
    refused(answer, "cannot be written", "choose another place")


# Interrupted.


def interrupt_at(monkeypatch, step):
    """Ctrl-C before the given step of the training, counted over all epochs."""
    whole, steps = Trainer.step, iter(range(step))

    def impatient(self, *words):
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return whole(self, *words)

    monkeypatch.setattr(Trainer, "step", impatient)


def test_ctrl_c_in_mid_epoch(made, msvae, tmp_path, monkeypatch):
    """Exit code 130 and how to go on; resumed, every weight is what it would have been."""
    words = ["fit", made / "new", "--rule", "fixed", *flags(), "--epochs", 4]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert msvae(*words, "--out", whole)[0] == 0
    done = len(read(whole / "history.csv"))
    with monkeypatch.context() as patch:
        interrupt_at(patch, 60)
        code, lines = msvae(*words, "--out", broken)
    assert code == 130
    assert "--resume goes on" in lines[-1]
    assert 0 < len(read(broken / "history.csv")) < done
    assert not (broken / "config.json").exists()
    refused(msvae("score", broken, made / "new"), "not a run")
    assert msvae(*words, "--out", broken, "--resume")[0] == 0
    assert (broken / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert len(read(broken / "history.csv")) == done
    ours, theirs = (ScoreTable.read_csv(_scored(msvae, made, p)) for p in (whole, broken))
    for name, values in ours.scores.items():
        np.testing.assert_array_equal(values, theirs.scores[name])


def _scored(msvae, made, run):
    out = run.with_suffix(".csv")
    assert msvae("score", run, made / "new", "--out", out)[0] == 0
    return out


@pytest.mark.parametrize("change", ["settings", "images"])
def test_resuming_something_else(change, made, msvae, tmp_path, monkeypatch):
    """A checkpoint of other settings or images is refused, and kept."""
    out = tmp_path / "out"
    words = ["--rule", "fixed", *flags()]
    with monkeypatch.context() as patch:
        interrupt_at(patch, 30)
        code, _ = msvae("fit", made / "new", "--out", out, *words, "--epochs", 3)
    assert code == 130
    before = entries(out)
    other = write(tmp_path / "other", smooth_images(20, 10))
    images, beta = (other, "1.0") if change == "images" else (made / "new", "2.0")
    answer = msvae("fit", images, "--out", out, *words, "--epochs", 3, "--beta", beta, "--resume")
    refused(answer, "other images or settings", "resume with the same")
    assert entries(out) == before
    refused(msvae("fit", made / "new", "--out", tmp_path / "none", "--resume"), "no checkpoint")


def test_a_finished_run_is_not_written_over(made, run, msvae):
    """Unasked, nothing of a run changes."""
    before = entries(run)
    refused(msvae("fit", made / "new", "--out", run, *flags()), "finished run", "--overwrite")
    assert entries(run) == before


# Masks and explanations.


@pytest.fixture
def labelled(tmp_path, monkeypatch):
    """Normal and anomalous images, and masks of the latter; no figures, which take longest."""
    monkeypatch.setattr(evaluate, "draw_figures", lambda *_: {})
    rng = np.random.default_rng(0)
    write(tmp_path / "normal", smooth_images(4, 6))
    odd = rng.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    write(tmp_path / "odd", list(odd))
    mask = np.zeros((32, 32), dtype=np.uint8)
    mask[8:20, 8:20] = 255
    write(tmp_path / "masks", [mask] * 3)
    return tmp_path


def evaluate_words(run, labelled):
    return [
        *["evaluate", run, "--normal", labelled / "normal", "--anomalous", labelled / "odd"],
        *["--masks", labelled / "masks", "--out", labelled / "out"],
    ]


def told(answer, *texts):
    """The command went through, and said all the texts in one line of its own."""
    code, lines = answer
    assert code == 0
    assert [li for li in lines if li.startswith("msvae: ") and all(t in li for t in texts)]


def masked(labelled):
    """How many masks the evaluation counted."""
    return json.loads((labelled / "out" / "metrics.json").read_text())["n"]["masks"]


@pytest.mark.filterwarnings("default")
def test_a_mask_without_an_image(made, msvae, labelled):
    """Is told by its name and left out; the rest is evaluated."""
    shutil.copy(labelled / "masks" / "00.png", labelled / "masks" / "99.png")
    answer = msvae(*evaluate_words(made / "run", labelled))
    told(answer, str(labelled / "masks" / "99.png"), "a mask without an image")
    assert masked(labelled) == 3


@pytest.mark.filterwarnings("default")
def test_a_mask_that_cannot_be_read(made, msvae, labelled):
    """Is told by its name; its image counts for the image figures, the rest for all."""
    (labelled / "masks" / "01.png").write_text("no picture")
    answer = msvae(*evaluate_words(made / "run", labelled))
    told(answer, str(labelled / "masks" / "01.png"), "cannot be read as a mask")
    assert masked(labelled) == 2


@pytest.mark.filterwarnings("default")
def test_no_mask_that_serves(made, msvae, labelled):
    """The images are evaluated all the same, as without masks."""
    for path in (labelled / "masks").iterdir():
        Image.new("L", (31, 32), 255).save(path)
    told(msvae(*evaluate_words(made / "run", labelled)), "of its image's size", "(3 such)")
    metrics = json.loads((labelled / "out" / "metrics.json").read_text())
    assert "maps" not in metrics
    assert metrics["scores"]["fused"]


@pytest.mark.filterwarnings("default")
def test_a_mask_of_another_size(made, msvae, labelled):
    """The same: where it belongs in the image is not known."""
    Image.new("L", (31, 32), 255).save(labelled / "masks" / "02.png")
    answer = msvae(*evaluate_words(made / "run", labelled))
    told(answer, str(labelled / "masks" / "02.png"), "of its image's size")
    assert masked(labelled) == 2


def test_a_folder_without_masks(made, msvae, labelled):
    """Naming a folder of masks that holds none is a mistake, not an evaluation without."""
    shutil.rmtree(labelled / "masks")
    refused(msvae(*evaluate_words(made / "run", labelled)), "holds no masks")


def pictures():
    """The same picture at another size and in other modes."""
    picture = Image.fromarray(smooth_images(1, 11, 90)[0]).resize((90, 70))
    alpha = picture.convert("RGBA")
    alpha.putalpha(200)
    modes = {m: picture.convert(m) for m in ("L", "P", "CMYK", "LA", "1")}
    return {"RGB": picture, "RGBA": alpha, **modes, "tiny": picture.resize((8, 9))}


@pytest.mark.parametrize("mode", pictures())
def test_explaining_an_image_of_another_size_or_mode(mode, made):
    """Whatever Pillow opens is explained, with maps at the image's own size."""
    image = pictures()[mode]
    e = load(made / "run").explain(image)
    for values in e.maps.values():
        assert values.shape == (image.height, image.width)
        assert np.isfinite(values).all()
    json.dumps(e.to_json(), allow_nan=False)


def test_explaining_nothing_that_can_be_read(made, msvae, tmp_path):
    """One line of error, as for scoring; nothing is written."""
    bad = tmp_path / "bad.png"
    bad.write_text("no picture")
    answer = msvae("explain", made / "run", bad, "--out", tmp_path / "out")
    refused(answer, str(bad), "none of 1 images could be read")
    assert not (tmp_path / "out").exists()


def test_explaining_by_a_run_without_references(run, made, msvae, tmp_path):
    """The rest is explained, and a note says what is missing; the report is made, too."""
    facts = json.loads((run / "config.json").read_text())
    del facts["checksums"]["references.safetensors"]
    (run / "config.json").write_text(json.dumps(facts))
    (run / "references.safetensors").unlink()
    out = tmp_path / "out"
    assert msvae("explain", run, made / "new" / "00.png", "--out", out)[0] == 0
    told = json.loads((out / "00.json").read_text())
    assert told["nearest"] == []
    assert any("holds no references" in note for note in told["notes"])
    assert told["contributions"]
    assert msvae("report", run)[0] == 0


@pytest.mark.parametrize("first", [0.0, 3600.0])
def test_checkpoints_are_written_as_often_as_they_can_be_afforded(
    made, msvae, tmp_path, monkeypatch, first
):
    """The first epoch after a while, and the last on the way out: not every one of a short fit."""
    written = []
    whole = store.write_checkpoint

    def counted(folder, tensors, facts):
        written.append(facts["state"]["epoch"])
        whole(folder, tensors, facts)

    monkeypatch.setattr(store, "write_checkpoint", counted)
    monkeypatch.setattr(checkpoint, "CHECKPOINT_SHARE", 1e-9)
    monkeypatch.setattr(checkpoint, "FIRST_CHECKPOINT", first)
    out = tmp_path / "out"
    interrupt_at(monkeypatch, 100)
    words = ["fit", made / "new", "--rule", "fixed", *flags(), "--epochs", 9, "--out", out]
    assert msvae(*words)[0] == 130
    last = len(read(out / "history.csv"))
    assert written == ([last] if first else [1, last])
    assert last > 2
