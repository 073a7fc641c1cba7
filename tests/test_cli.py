"""The verbs as a user types them: what they write, what they say, and how they end."""

import csv
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score
from torch.nn import functional as F

from msvae import __version__, load
from msvae.benchmarks import demo as demo_module
from msvae.benchmarks import registry
from msvae.benchmarks.industrial import mean_over
from msvae.cli import main as cli
from msvae.cli.console import Screen
from msvae.core import config
from msvae.evaluation.table import ScoreTable
from msvae.run import outputs

VERBS = ("demo", "fit", "calibrate", "score", "evaluate", "explain", "report", "benchmark")
TINY = [
    *["--image-size", "32", "--hidden-dims", "8", "16", "--latent-dim", "8", "--epochs", "1"],
    *["--min-steps", "4", "--batch-size", "8", "--target-fpr", "0.2"],
    *["--no-pretext", "--no-segmenter", "--precision", "fp32"],
]
SCORES = {
    *["reconstruction", "mahalanobis", "weighted", "weighted_raw", "kl", "elbo", "spread"],
    *["bands", "complexity", "spatial", "fused"],
}
FIGURES = {"roc", "precision_recall", "distribution", "training"}


def smooth_images(n, seed, side=32):
    gen = torch.Generator().manual_seed(seed)
    coarse = 0.3 + 0.4 * torch.rand(n, 3, 4, 4, generator=gen)
    fine = F.interpolate(coarse, size=(side, side), mode="bicubic").clamp(0, 1)
    return (fine * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()


def holed(n, seed):
    """Images with a noisy block each, and where it is."""
    rng = np.random.default_rng(seed)
    images, masks = smooth_images(n, seed).copy(), np.zeros((n, 32, 32), np.uint8)
    images[:, 8:20, 10:22] = rng.integers(0, 256, (n, 12, 12, 3))
    masks[:, 8:20, 10:22] = 255
    return images, masks


def write(folder, arrays, name="{:02}.png"):
    folder.mkdir(parents=True, exist_ok=True)
    for i, array in enumerate(arrays):
        Image.fromarray(array).save(folder / name.format(i))
    return folder


def plant(root):
    """A tree in the MVTec layout: 60 to fit on, 12 good and 6 holed to test on."""
    images, masks = holed(6, 2)
    write(root / "train" / "good", smooth_images(60, 0))
    write(root / "test" / "good", smooth_images(12, 1))
    write(root / "test" / "hole", images)
    write(root / "ground_truth" / "hole", masks, "{:02}_mask.png")
    return root


def call(*words):
    """The exit code of a command."""
    with pytest.raises(SystemExit) as ended:
        cli.main([str(w) for w in words])
    return ended.value.code


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def entries(folder):
    """Every file below, by its content."""
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The tree, and the run that `msvae fit` makes of it."""
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("made")
        patch.setenv("MSVAE_CACHE", str(root / "cache"))
        patch.setenv("COLUMNS", "220")
        plant(root / "part")
        assert call("fit", root / "part", "--out", root / "run", *TINY) == 0
        write(root / "normals", smooth_images(30, 3))
        yield root


@pytest.fixture
def run(made, tmp_path):
    """A copy of the run, to change."""
    return Path(shutil.copytree(made / "run", tmp_path / "run"))


@pytest.fixture
def msvae(capsys):
    """The command line: exit code, what it printed, and its lines on stderr."""

    def say(*words):
        capsys.readouterr()
        code = call(*words)
        said = capsys.readouterr()
        return code, said.out, said.err.splitlines()

    return say


@pytest.fixture
def scored(msvae, tmp_path):
    """`msvae score --out`: the table that it wrote."""

    def score(run, *words):
        out = tmp_path / "scored.csv"
        assert msvae("score", run, *words, "--out", out)[0] == 0
        return ScoreTable.read_csv(out)

    return score


# The words themselves.


HEAVY = """
import sys
from msvae.cli import main as cli
for words in ([], *[[verb] for verb in {verbs!r}]):
    try:
        cli.main([*words, "--help"])
    except SystemExit as ended:
        assert ended.code == 0
heavy = {{"torch", "matplotlib", "sklearn", "skimage", "scipy", "openvino", "rich"}}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""


def test_help_loads_nothing_heavy():
    """`--help`, of every verb, is quick: neither torch nor matplotlib nor sklearn is imported."""
    done = subprocess.run(
        [sys.executable, "-c", HEAVY.format(verbs=VERBS)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for verb in VERBS:
        assert re.search(rf"^ +{verb}\s+\w", done.stdout, re.MULTILINE), verb
        assert f"usage: msvae {verb}" in done.stdout


def test_every_setting_is_an_option(msvae):
    """What a TOML file can say, `fit` can say."""
    _, told, _ = msvae("fit", "--help")
    for section in config.to_dict(config.Config()).values():
        for name in section:
            assert f"--{name.replace('_', '-')}" in told


def test_without_words_the_help(msvae):
    """A bare `msvae` is a question: the help answers it, with every verb, and nothing went wrong."""
    code, out, lines = msvae()
    assert (code, lines) == (0, [])
    assert out == msvae("--help")[1]
    for verb in VERBS:
        assert re.search(rf"^ +{verb}\s+\w", out, re.MULTILINE), verb


def test_version(msvae):
    """The version, and nothing else."""
    assert msvae("--version")[:2] == (0, f"msvae {__version__}\n")


@pytest.mark.parametrize("engine", ["openvino", "reference"])
def test_version_says_what_computes(engine, msvae, monkeypatch):
    """With --verbose: engine, precision and instruction set, as for a bug report; no verb needed."""
    monkeypatch.setenv("MSVAE_ENGINE", engine)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
    code, out, _ = msvae("--version", "--verbose")
    first, *lines = out.splitlines()
    facts = dict(line.split(": ") for line in lines if ": " in line)
    assert (code, first) == (0, f"msvae {__version__}")
    assert facts["engine"] == engine
    assert facts["precision"] == "f32"  # SSE4.1 multiplies no bfloat16
    level, cores = facts["instruction set"].removesuffix(" cores").split(", ")
    assert level in ("SSE41", platform.machine())
    if hasattr(os, "sched_getaffinity"):
        assert int(cores) == len(os.sched_getaffinity(0))
    assert f"openvino {version('openvino')}" in lines
    assert f"torch {version('torch')}" in lines


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="Linux says what a processor has")
def test_version_knows_this_processor(msvae, monkeypatch):
    """The instruction set is one that the processor has; bfloat16 only where it multiplies it."""
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    _, out, _ = msvae("--version", "--verbose")
    has = Path("/proc/cpuinfo").read_text().split("flags", 1)[-1].split("\n", 1)[0].split()
    level = re.search(r"instruction set: (\w+)", out)[1]
    assert ("AMX" in level) == ("amx_bf16" in has)
    assert level.startswith("AVX512") == ("avx512vl" in has)
    assert ("precision: bf16" in out) == ("amx_bf16" in has or "avx512_bf16" in has)


@pytest.mark.parametrize("words", [["frobnicate"], ["score"], ["fit"], ["benchmark"]])
def test_words_that_are_none(words, msvae):
    """An unknown or incomplete command ends with 2 and the choices on its last line."""
    code, out, lines = msvae(*words)
    assert (code, out) == (2, "")
    assert re.search("required|choose from", lines[-1])


INSTALLED = """
from importlib.metadata import entry_points
entry_points(group="console_scripts")["msvae"].load()()
"""


def test_the_installed_command(made, tmp_path):
    """As a program of its own: results on stdout, the rest on stderr, an exit code."""
    command = [sys.executable, "-c", INSTALLED]
    image = made / "part" / "test" / "hole" / "00.png"
    bad = tmp_path / "bad.png"
    bad.write_text("no picture")
    words = ["score", made / "run", image, bad, "--strict"]
    done = subprocess.run(
        [*command, *map(str, words)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 3
    assert str(image) in done.stdout
    assert "left out" in done.stderr
    assert str(bad) in done.stderr
    assert "Traceback" not in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["bad.png"]


# fit


def test_fit_writes_a_run(made):
    """The files of the design, a report, all images in a part; `train/good` and nothing else."""
    names = {p.name for p in (made / "run").iterdir()}
    tensors = {f"{n}.safetensors" for n in ("model", "calibration", "references")}
    assert names == tensors | {
        *["config.json", "environment.json", "history.csv", "split.csv", "report.html"],
        *["graph.xml", "graph.bin"],
    }
    paths = {r["path"] for r in read(made / "run" / "split.csv")}
    assert paths == {str(p) for p in (made / "part" / "train" / "good").iterdir()}


def test_fit_obeys_its_options(made):
    """The settings that were typed are those of the run."""
    facts = json.loads((made / "run" / "config.json").read_text())
    model, train = facts["config"]["model"], facts["config"]["train"]
    assert (model["image_size"], model["hidden_dims"], model["latent_dim"]) == (32, [8, 16], 8)
    assert (train["epochs"], train["min_steps"], train["batch_size"]) == (1, 4, 8)
    assert model["pretext"] is False
    assert facts["decision"]["target_fpr"] == 0.2
    assert facts["n"] == {"train": 48, "stop": 3, "conformal": 9}


def test_fit_says_what_it_chose(made, msvae, tmp_path):
    """Which images, how many for what, what was left out, where the report is; a flag beats TOML."""
    toml = tmp_path / "f.toml"
    toml.write_text("[model]\nlatent_dim = 4\n[decide]\ntarget_fpr = 0.25\n")
    tree = Path(shutil.copytree(made / "part", tmp_path / "part"))
    (tree / "train" / "good" / "bad.png").write_text("no picture")
    out = tmp_path / "run"
    tiny = [w for w in TINY if w not in ("--target-fpr", "0.2")]
    code, _, lines = msvae("fit", tree, "--out", out, *tiny, "--config", toml, "--strict")
    said = "\n".join(lines)
    assert code == 3
    assert f"{tree / 'train' / 'good'}: 61 images (train/good, and nothing else" in said
    assert "48 images to train on, 3 to stop on, 9 to calibrate on" in said
    assert f"report: {out / 'report.html'}" in said
    assert f"{out / 'quarantine.csv'} names them" in said
    assert [r["path"] for r in read(out / "quarantine.csv")] == [
        str(tree / "train" / "good" / "bad.png")
    ]
    facts = json.loads((out / "config.json").read_text())
    assert facts["config"]["model"]["latent_dim"] == 8
    assert facts["decision"]["target_fpr"] == 0.25
    (tree / "train" / "good" / "bad.png").unlink()
    code, _, _ = msvae("fit", tree, "--out", out, *TINY, "--strict", "--overwrite")
    assert code == 0
    assert not (out / "quarantine.csv").exists()


def test_fit_groups(made, msvae, tmp_path):
    """Images with the same match stay in the same part; the last digit makes ten groups."""
    out = tmp_path / "run"
    words = ["--group-by", r"(\d)\.png$", "--rule", "fixed"]
    assert msvae("fit", made / "part", "--out", out, *TINY, *words)[0] == 0
    parts = {}
    for row in read(out / "split.csv"):
        parts.setdefault(Path(row["path"]).stem[-1], set()).add(row["part"])
    assert all(len(p) == 1 for p in parts.values())
    assert len(parts) == 10


# score


def test_score_prints_its_decisions(made, msvae):
    """One line an image in a pipe: its name, p, decision and fused score between tabs."""
    odd, good = (made / "part" / "test" / kind / "00.png" for kind in ("hole", "good"))
    code, out, _ = msvae("score", made / "run", odd, good)
    assert code == 0
    table = load(made / "run").score([odd, good])
    head, *lines = [line.split("\t") for line in out.splitlines()]
    assert head == ["path", "p", "flagged", "fused"]
    for row, (path, line) in enumerate(zip((odd, good), lines, strict=True)):
        assert line[0] == str(path)
        assert float(line[1]) == pytest.approx(table.p[row], rel=1e-5)
        assert line[2] == ("yes" if table.flagged[row] else "no")
        assert float(line[3]) == pytest.approx(table.scores["fused"][row], rel=1e-5)
    assert table.flagged[0]


def test_score_writes_a_table_and_not_into_the_run(made, msvae, tmp_path):
    """The columns of the design, one row an image; the run is only read."""
    before, out = entries(made / "run"), tmp_path / "deep" / "F.csv"
    code, _, lines = msvae("score", made / "run", made / "part" / "test", "--out", out)
    assert code == 0
    assert lines[-1].startswith(f"{out}: 18 images, ")
    rows = read(out)
    scores = list(rows[0])[1 : 1 + (len(rows[0]) - 3) // 2]
    assert set(scores) >= SCORES
    assert list(rows[0]) == ["path", *scores, *[f"p_{s}" for s in scores], "p", "flagged"]
    assert len({r["path"] for r in rows}) == 18
    for row in rows:
        assert row["p"] == row["p_fused"]
        assert row["flagged"] == str(int(float(row["p"]) <= 0.2 + 1e-12))
    assert entries(made / "run") == before


def test_score_at_another_rate(made, scored, msvae):
    """p <= the rate that was typed; one that 9 images cannot keep is refused with their number."""
    images = made / "part" / "test"
    for rate in (0.1, 0.5):
        table = scored(made / "run", images, "--target-fpr", rate)
        np.testing.assert_array_equal(table.flagged, table.p <= rate + 1e-12)
        assert table.flagged.any()
        assert not table.flagged.all()
    code, _, lines = msvae("score", made / "run", images, "--target-fpr", "0.01")
    assert code == 2
    assert "needs at least 99 calibration images, got 9" in lines[-1]


def test_score_draws_maps(made, msvae, tmp_path):
    """A picture at the image's size and the floats of the fused map; its peak is on the hole."""
    holes = made / "part" / "test" / "hole"
    wide = tmp_path / "00.png"  # the stem of another: both get a hash of their path
    Image.fromarray(smooth_images(1, 5, 64)[0]).resize((80, 40)).save(wide)
    maps = tmp_path / "maps"
    assert msvae("score", made / "run", holes, wide, "--maps", maps)[0] == 0
    stems = {p.stem for p in maps.iterdir()}
    assert {p.suffix for p in maps.iterdir()} == {".png", ".tiff"}
    named = [
        f"00-{hashlib.sha256(str(p).encode()).hexdigest()[:8]}" for p in (holes / "00.png", wide)
    ]
    assert stems == {*named, "01", "02", "03", "04", "05"}
    with Image.open(maps / f"{named[1]}.png") as picture:
        assert picture.size == (128, 70)  # above its bar of colours
    expected = load(made / "run").scan([str(holes / "01.png")], with_maps=True).maps["fused"][0]
    with Image.open(maps / "01.tiff") as found:
        values = np.asarray(found)
    np.testing.assert_allclose(values, expected, rtol=1e-3, atol=1e-3)
    row, column = np.unravel_index(values.argmax(), values.shape)
    assert 6 <= row <= 21
    assert 8 <= column <= 23


def test_strict_counts_unreadable_images(made, msvae, tmp_path):
    """They are named in the quarantine file either way; the exit code is 3 only with --strict."""
    bad = tmp_path / "bad.png"
    bad.write_text("no picture")
    words = ["score", made / "run", bad, made / "normals" / "00.png", "--out", tmp_path / "F.csv"]
    assert msvae(*words)[0] == 0
    code, _, lines = msvae(*words, "--strict")
    assert code == 3
    assert str(tmp_path / "F.quarantine.csv") in lines[-1]
    (row,) = read(tmp_path / "F.quarantine.csv")
    assert (row["path"], "not an image" in row["reason"]) == (str(bad), True)
    assert msvae("score", made / "run", made / "normals" / "00.png", "--strict")[0] == 0


# calibrate


def test_calibrate_by_new_normals(made, run, msvae, scored):
    """p-values are then counted among the new normals, at the new rate; scores stay."""
    before = scored(run, made / "part" / "test")
    normals = scored(run, made / "normals").scores
    code, _, lines = msvae("calibrate", run, made / "normals", "--target-fpr", "0.1")
    assert code == 0
    assert "rate of 0.1, on 30 images" in lines[-1]
    after = scored(run, made / "part" / "test")
    for name, values in after.scores.items():
        np.testing.assert_array_equal(values, before.scores[name])
        # the same image in another batch may differ in the last digits
        low, high = values * (1 - 1e-4) - 1e-6, values * (1 + 1e-4) + 1e-6
        most = [(1 + (normals[name] >= v).sum()) / 31 for v in np.minimum(low, high)]
        least = [(1 + (normals[name] >= v).sum()) / 31 for v in np.maximum(low, high)]
        assert (after.p_values[name] <= np.array(most) + 1e-12).all()
        assert (after.p_values[name] >= np.array(least) - 1e-12).all()
    np.testing.assert_array_equal(after.flagged, after.p <= 0.1 + 1e-12)
    weights = entries(run)["model.safetensors"], entries(made / "run")["model.safetensors"]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(("rule", "threshold"), [("fixed:0.3", 0.3), ("fixed", 0.5)])
def test_calibrate_by_a_fixed_threshold(made, run, msvae, scored, rule, threshold):
    """Flagged is then what the weighted score says, the seed's rule, whatever the p-value."""
    code, _, lines = msvae("calibrate", run, made / "normals", "--rule", rule)
    assert code == 0
    assert f"weighted score reaches {threshold:g}" in lines[-1]
    table = scored(run, made / "part" / "test")
    np.testing.assert_array_equal(table.flagged, table.scores["weighted"] >= threshold)
    assert table.flagged.sum() > 0


def test_calibrate_by_the_best_f1(made, run, msvae, scored):
    """The threshold has the greatest F1 at equal prevalence that any has on the labelled images."""
    odd = write(run.parent / "odd", holed(10, 6)[0])
    mixed = run.parent / "mixed"  # some anomalies that look normal, so that classes overlap
    write(mixed, [*holed(10, 6)[0], *smooth_images(10, 7)])
    words = ["calibrate", run, made / "normals", "--rule", "f1", "--anomalous", mixed]
    code, _, lines = msvae(*words)
    assert code == 0
    assert "fused score reaches" in lines[-1]
    chosen = load(run).decision.threshold
    normal, anomalous = (scored(run, p).scores["fused"] for p in (made / "normals", mixed))

    def f1(threshold):
        tpr, fpr = (anomalous >= threshold).mean(), (normal >= threshold).mean()
        return 2 * tpr / (1 + tpr + fpr)

    best = max(f1(t) for t in np.concatenate([normal, anomalous]))
    assert f1(chosen) == pytest.approx(best, abs=1e-9)
    table = scored(run, odd)
    np.testing.assert_array_equal(table.flagged, table.scores["fused"] >= chosen)


def test_calibrate_lists_unreadable_normals(made, run, msvae):
    """A normal image that is no image is left out and named in the run's quarantine."""
    normals = Path(shutil.copytree(made / "normals", run.parent / "normals"))
    (normals / "bad.png").write_text("no picture")
    code, _, lines = msvae("calibrate", run, normals, "--strict")
    assert code == 3
    assert str(run / "quarantine.csv") in lines[-1]
    assert [r["path"] for r in read(run / "quarantine.csv")] == [str(normals / "bad.png")]
    assert load(run).calibration.n == 30


# evaluate


def check_judged(folder, normal, anomalous):
    """The figures of an evaluation's metrics.json follow from its scores.csv."""
    judged = json.loads((folder / "metrics.json").read_text())
    table = ScoreTable.read_csv(folder / "scores.csv")
    assert (judged["n"]["normal"], judged["n"]["anomalous"]) == (normal, anomalous)
    for name, values in table.scores.items():
        block = judged["scores"][name]
        assert block["auroc"] == pytest.approx(roc_auc_score(table.labels, values))
        assert block["average_precision"] == pytest.approx(
            average_precision_score(table.labels, values)
        )
    for name in FIGURES:
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (folder / f"{name}.svg").read_text()
    return judged


def test_evaluate_a_tree(made, run, msvae):
    """Every score of a tree in the MVTec layout; files in RUN/evaluation, a new report."""
    (run / "report.html").unlink()
    code, out, lines = msvae("evaluate", run, made / "part")
    assert code == 0
    judged = check_judged(run / "evaluation", 12, 6)
    assert judged["evaluation"] == "part"
    assert judged["n"]["masks"] == 6
    fused = judged["scores"]["fused"]["auroc"]
    assert re.search(rf"fused +│ +{fused:.3f}", out)
    assert "false alarms: " in out
    assert "AUPRO@0.3" in out
    assert read(run / "evaluation" / "quarantine.csv") == []
    assert f"report: {run / 'report.html'}" in lines
    kinds = [r["kind"] for r in read(run / "evaluation" / "scores.csv")]
    assert sorted(kinds) == ["good"] * 12 + ["hole"] * 6


def test_evaluate_folders(made, run, msvae, tmp_path):
    """Normal, anomalous and masks from anywhere; with --out nothing goes into the run."""
    before, test = entries(run), made / "part" / "test"
    bad = tmp_path / "bad"
    shutil.copytree(test / "good", bad)
    (bad / "bad.png").write_text("no picture")
    words = ["evaluate", run, "--normal", bad, "--anomalous", test / "hole"]
    words += ["--masks", made / "part" / "ground_truth" / "hole", "--out", tmp_path / "out"]
    code, _, lines = msvae(*words, "--strict")
    assert code == 3
    judged = check_judged(tmp_path / "out", 12, 6)
    assert set(judged["maps"]) >= {"reconstruction", "spatial", "fused"}
    assert judged["maps"]["fused"]["auroc"] > 0.8
    assert [r["path"] for r in read(tmp_path / "out" / "quarantine.csv")] == [str(bad / "bad.png")]
    assert f"report: {tmp_path / 'out' / 'report.html'}" in lines
    assert entries(run) == before


# explain and report


def test_explain_draws_and_counts(made, msvae, tmp_path):
    """A panel and all numbers of each image; the greatest region lies on the hole."""
    holes, out = made / "part" / "test" / "hole", tmp_path / "out"
    code, _, lines = msvae(
        "explain", made / "run", holes / "00.png", holes / "01.png", "--out", out
    )
    assert code == 0
    assert "2 images explained" in lines[-1]
    assert {p.name for p in out.iterdir()} == {"00.png", "00.json", "01.png", "01.json"}
    with Image.open(out / "00.png") as panel:
        assert min(panel.size) > 300
    told = json.loads((out / "00.json").read_text())
    assert told["image"] == str(holes / "00.png")
    assert sum(told["contributions"].values()) == pytest.approx(told["scores"]["fused"], rel=1e-5)
    left, top, right, bottom = told["regions"][0]["box"]
    assert left < 22
    assert right > 10
    assert top < 20
    assert bottom > 8


def self_contained(page):
    text = page.read_text()
    assert text.lstrip().lower().startswith("<!doctype html>")
    assert not re.search(r"""(src|href|srcset)\s*=\s*["']?(https?:)?//""", text)
    assert not re.search(r"url\(\s*[\"']?(https?:)?//|@import", text)
    assert page.stat().st_size < 15_000_000
    return text


def test_report_of_a_run_and_of_a_table(made, msvae, tmp_path, scored):
    """One page each; that of a table lies beside it, with maps where its run is named."""
    page = made / "run" / "report.html"
    page.unlink()
    assert msvae("report", made / "run")[0] == 0
    assert "48 normal images trained on" in self_contained(page)
    table = scored(made / "run", made / "part" / "test", "--target-fpr", "0.2")
    csv_file = tmp_path / "scored.csv"
    code, _, lines = msvae("report", csv_file)
    assert code == 0
    assert lines[-1] == f"report: {csv_file.with_suffix('.html')}"
    plain = self_contained(csv_file.with_suffix(".html"))
    assert f"{len(table)}" in plain
    assert msvae("report", csv_file, "--run", made / "run")[0] == 0
    drawn = self_contained(csv_file.with_suffix(".html"))
    assert "Grad-CAM of the fused score" in drawn
    assert "Grad-CAM of the fused score" not in plain


# benchmark and demo


def test_benchmark_mvtec(made, msvae, tmp_path):
    """A category by its name: a loadable run, its evaluation, metrics and report."""
    shutil.copytree(made / "part", tmp_path / "mvtec" / "bolt")
    out = tmp_path / "out"
    words = ["benchmark", "mvtec", "--data-dir", tmp_path, "--category", "bolt", "--out", out]
    code, told, _ = msvae(*words, *TINY)
    assert code == 0
    assert "mvtec-bolt" in told
    check_judged(out / "evaluation", 12, 6)
    metrics = json.loads((out / "metrics.json").read_text())
    assert (metrics["benchmark"], metrics["image_size"]) == ("mvtec-bolt", 32)
    assert load(out).facts["n"]["conformal"] == 9
    self_contained(out / "report.html")
    code, _, lines = msvae(*words, *TINY)
    assert code == 2
    assert "--overwrite" in lines[-1]
    code, _, lines = msvae("benchmark", "mvtec", "--out", out)
    assert code == 2
    assert "--data-dir" in lines[-1]


SMALLER = [*TINY, "--image-size", "16", "--min-steps", "1"]


def test_benchmark_every_category(made, msvae, tmp_path):
    """Each category found is a run of its own; one that fails is named, the mean is of the others."""
    shutil.copytree(made / "part", tmp_path / "mvtec" / "bolt")
    broken = tmp_path / "mvtec" / "anvil"
    write(broken / "train" / "good", smooth_images(4, 0))
    shutil.copytree(made / "part" / "test", broken / "test")
    out = tmp_path / "out"
    words = ["benchmark", "mvtec", "--data-dir", tmp_path, "--category", "all", "--out", out]
    code, shown, lines = msvae(*words, *SMALLER)
    assert code == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert list(metrics["categories"]) == ["anvil", "bolt"]
    assert "4 distinct images are too few" in metrics["categories"]["anvil"]["failed"]
    assert any("anvil failed" in line for line in lines)
    assert "4 distinct images are too few" in shown
    assert (metrics["mean"]["of"], metrics["mean"]["categories"]) == (1, 2)
    assert "mean of 1 of 2" in shown
    judged = check_judged(out / "bolt" / "evaluation", 12, 6)
    mean = metrics["mean"]
    assert mean["scores"]["fused"]["auroc"] == pytest.approx(judged["scores"]["fused"]["auroc"])
    assert mean["maps"]["fused"]["aupro"] == pytest.approx(judged["maps"]["fused"]["aupro"])
    assert metrics["categories"]["bolt"]["image_size"] == 16
    assert load(out / "bolt").facts["n"]["conformal"] == 9
    self_contained(out / "bolt" / "report.html")
    assert not (out / "anvil").exists()
    code, _, lines = msvae(*words, *SMALLER)
    assert code == 2
    assert "--overwrite" in lines[-1]


def test_the_mean_over_categories():
    """Unweighted, as the literature has it, of those that were judged."""
    figures = dict.fromkeys(("auroc", "average_precision", "f1_max", "aupro"), 0.5)
    blocks = {
        "a": {"scores": {"fused": figures}, "maps": {"fused": figures}},
        "b": {"scores": {"fused": {**figures, "auroc": 0.9}}},
        "c": {"failed": "too few"},
    }
    mean = mean_over(blocks)
    assert (mean["of"], mean["categories"]) == (2, 3)
    assert mean["scores"]["fused"] == pytest.approx({"auroc": 0.7, "average_precision": 0.5})
    assert mean["maps"]["fused"] == figures


def test_benchmark_magnetic_tile(msvae, tmp_path):
    """Near-copies stay on one side: no group of neighbouring numbers is both fitted and tested."""
    root, out = tmp_path / "magnetic-tile", tmp_path / "out"
    free = root / "MT_Free" / "Imgs"
    free.mkdir(parents=True)
    numbers = [1000 * (i // 3) + 7 * (i % 3) for i in range(90)]
    for number, image in zip(numbers, smooth_images(90, 0), strict=True):
        Image.fromarray(image).save(free / f"exp1_num_{number}.jpg")
    for kind in ("MT_Crack", "MT_Fray"):
        images, masks = holed(3, len(kind))
        masks[2] *= kind == "MT_Fray"  # an empty mask counts for the image figures only
        write(root / kind / "Imgs", images, "{:02}.jpg")
        write(root / kind / "Imgs", masks)
    code, told, _ = msvae("benchmark", "magnetic-tile", "--data-dir", tmp_path, "--out", out, *TINY)
    assert code == 0
    assert "magnetic-tile" in told
    judged = check_judged(out / "evaluation", 18, 6)
    assert judged["n"]["masks"] == 5
    group = {str(free / f"exp1_num_{n}.jpg"): n // 1000 for n in numbers}
    tested = [r["path"] for r in read(out / "evaluation" / "scores.csv") if r["label"] == "0"]
    parts = {"test": {group[p] for p in tested}}
    for row in read(out / "split.csv"):
        parts.setdefault(row["part"], set()).add(group[row["path"]])
    # the first 20 % of the 30 groups by the sha256 of their first name
    first = {
        1000 * g: hashlib.sha256(f"exp1_num_{1000 * g}.jpg".encode()).hexdigest() for g in range(30)
    }
    assert parts["test"] == {n // 1000 for n in sorted(first, key=first.get)[:6]}
    assert sum(map(len, parts.values())) == len(set().union(*parts.values())) == 30


def test_benchmark_all_writes_the_ablation(msvae, tmp_path, monkeypatch):
    """Each benchmark in a folder of its own, their figures side by side, protocols as columns."""
    block = {"auroc": 0.9, "auroc_ci95": [0.85, 0.95]}
    found = {"scores": {"fused": block}, "ablation": {"without order": block}}
    asked = {}

    def run(name, request):
        asked[name] = request.out
        both = {"protocols": {"equalised": found, "native": found}}
        return both if name == "flowers-cifar10" else {"evaluation": name, **found}

    for name in registry.BENCHMARKS:
        monkeypatch.setitem(registry.BENCHMARKS, name, partial(run, name))
    monkeypatch.setattr(Screen, "benchmark", lambda *_: None)
    code, _, lines = msvae("benchmark", "all", "--data-dir", tmp_path, "--out", tmp_path / "out")
    assert code == 0
    assert asked == {n: tmp_path / "out" / n for n in ("flowers-cifar10", "mvtec", "magnetic-tile")}
    assert "ablation.md" in lines[-1]
    table = (tmp_path / "out" / "ablation.md").read_text().splitlines()
    heads = ["flowers-cifar10 equalised", "flowers-cifar10 native", "mvtec", "magnetic-tile"]
    assert table[0] == "| Each score alone | " + " | ".join(heads) + " |"
    assert "| without order |" + 4 * " 0.900 (0.850–0.950) |" in table


def test_benchmarks_refuse_before_the_work(msvae, tmp_path, monkeypatch):
    """Options that mean nothing, data that are not named, results that would be written over."""
    for name in registry.BENCHMARKS:
        monkeypatch.setitem(registry.BENCHMARKS, name, lambda _: pytest.fail("began"))
    out = tmp_path / "out"
    (out / "mvtec").mkdir(parents=True)
    (out / "mvtec" / "config.json").write_text("{}")
    for words, remedy in (
        (["mvtec", "--data-dir", tmp_path, "--feedback", "4"], "leave it out"),
        (["all"], "--data-dir"),
        (["all", "--data-dir", tmp_path], "--overwrite"),
    ):
        code, _, lines = msvae("benchmark", *words, "--out", out)
        assert code == 2
        assert remedy in lines[-1]


def test_demo(made, msvae, tmp_path, monkeypatch):
    """Fits, evaluates and reports into runs/demo without being told anything; here on a tiny tree."""
    small = config.preset("default").replace(
        image_size=32,
        hidden_dims=(8, 16),
        latent_dim=8,
        epochs=1,
        min_steps=4,
        batch_size=8,
        target_fpr=0.2,
        pretext=False,
        segmenter=False,
    )
    monkeypatch.setitem(config.PRESETS, "default", small)
    monkeypatch.setattr(demo_module, "write_demo", lambda out, **_: plant(out))
    monkeypatch.chdir(tmp_path)
    code, out, lines = msvae("demo")
    assert code == 0
    assert "the demo" in out
    assert "flagged: good " in out
    assert "report: runs/demo/report.html" in lines
    for name in ("config.json", "evaluation/metrics.json", "report.html"):
        assert (tmp_path / "runs" / "demo" / name).is_file()
    check_judged(tmp_path / "runs" / "demo" / "evaluation", 12, 6)


# Mistakes.


MISTAKES = {
    "no image": ("fit gone --out out", "gone: no such file or folder: check the path"),
    "engine": ("score run normals --engine nonsense", "choose auto, reference, openvino"),
    "unknown benchmark": (
        "benchmark imagenet --data-dir . --out out",
        "choose one of flowers-cifar10, mvtec, magnetic-tile, all",
    ),
    "no run": ("score gone normals", "gone: is not a run"),
    "preset": ("fit normals --out out --preset big", "choose one of default, seed"),
    "size": ("fit normals --out out --image-size 33", "multiple of"),
    "toml": ("fit normals --out out --config gone.toml", "gone.toml: cannot be read"),
    "key": ("fit normals --out out --config key.toml", "no setting 'colour'"),
    "finished": ("fit normals --out run", "--overwrite"),
    "resume": ("fit normals --out out --resume", "leave out --resume"),
    "rule": ("calibrate run normals --rule best", "choose conformal, fixed"),
    "number": ("calibrate run normals --rule fixed:high", "write fixed:0.5"),
    "trained": ("calibrate run part/train", "calibrate with other images"),
    "dataset": ("evaluate run", "DATASET, or both --normal DIR and --anomalous DIR"),
    "half": ("evaluate run --normal normals", "DATASET, or both"),
    "layout": ("evaluate run normals", "needs test/good"),
    "leak": ("evaluate run --normal part/train --anomalous part/test/hole", "take them out"),
    "report": ("report normals", "neither a run, a benchmark nor a file of scores"),
    "csv": ("report key.toml", "has no column `path`"),
    "benchmark": ("benchmark magnetic-tile --out out", "needs --data-dir"),
    "category": ("benchmark mvtec --category x --data-dir . --out out", "there is part"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(name, made, msvae, monkeypatch):
    """Exit code 2, nothing on stdout, one line on stderr that tells the remedy; nothing is written."""
    monkeypatch.chdir(made)
    (made / "key.toml").write_text("[model]\ncolour = 1\n")
    words, remedy = MISTAKES[name]
    before = entries(made)
    code, out, lines = msvae(*words.split())
    assert (code, out) == (2, "")
    (line,) = lines
    assert line.startswith("msvae: ")
    assert remedy in line
    assert entries(made) == before


def test_mistakes_seen_only_later(made, msvae, tmp_path):
    """After reading the images there are other lines; the mistake is still one, and the last."""
    for words, remedy in (
        (["calibrate", made / "run", made / "normals", "--rule", "f1"], "--anomalous"),
        (["calibrate", made / "run", made / "normals", "--target-fpr", "0.01"], "at least 99"),
        (["fit", made / "normals", "--out", tmp_path / "out"], "got 5"),
    ):
        before = entries(made / "run")
        code, out, lines = msvae(*words)
        assert (code, out) == (2, "")
        (line,) = [li for li in lines if li.startswith("msvae: ")]
        assert line == lines[-1]
        assert remedy in line
        assert entries(made / "run") == before


def test_ctrl_c(made, msvae, monkeypatch):
    """Ends with 130 and one line, without a traceback; the polite kill does what Ctrl-C does."""

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(outputs, "write_explanations", interrupt)
    code, _, lines = msvae("explain", made / "run", made / "normals", "--out", made / "never")
    assert code == 130
    assert len(lines) == 1
    assert "interrupted" in lines[0]
    assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler


def test_warnings_are_one_line(made, msvae, tmp_path, monkeypatch):
    """A cache that cannot be written costs one line that says so, and no source code."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("MSVAE_CACHE", os.fspath(tmp_path / "file" / "cache"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.filters", [])
        patch.setattr("warnings.showwarning", None)
        code, _, lines = msvae("fit", made / "part", "--out", tmp_path / "out", *TINY)
    assert code == 0
    warned = [li for li in lines if li.startswith("msvae: ")]
    assert len(warned) == 1
    assert "MSVAE_CACHE" in warned[0]
