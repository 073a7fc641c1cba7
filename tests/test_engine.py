"""The graph run by either engine: the same answer on every machine, quickly the second time."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import openvino
import pytest
import torch
from openvino import Type

from folders import write
from msvae import calibrate, fit, load
from msvae.core import processor
from msvae.core.errors import ConfigError, RunError
from msvae.core.state import as_tensor
from msvae.engine import blobs, choose, openvino_engine
from msvae.engine.engine import Outputs
from msvae.engine.lower import lower
from msvae.engine.openvino_engine import OpenVinoEngine
from msvae.engine.torch_engine import TorchEngine
from msvae.evaluation.conformal import Calibration, Decision
from msvae.run import calibrate as calibrating
from msvae.run import fit as fitting
from msvae.run import precision
from msvae.scores.catalog import MAPS, NUMBERS
from small import CONFIG, SIDE

HERE = Path(__file__).parent


def smooth_images(n, seed):
    """Coarse colours with a little noise."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(70, 180, (n, 4, 4, 3)).repeat(8, axis=1).repeat(8, axis=2)
    return (coarse + rng.normal(0, 6, coarse.shape)).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def pixels():
    """60 new images: ordinary ones, ones with a noisy corner of any strength, and noise."""
    images, rng = smooth_images(60, 1), np.random.default_rng(2)
    for i in range(30, 55):
        spot = images[i, 4:14, 6:16].astype(float)
        images[i, 4:14, 6:16] = (spot + (i - 29) * rng.normal(size=spot.shape)).clip(0, 255)
    images[55:] = rng.integers(0, 256, (5, SIDE, SIDE, 3))
    return images


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with every network; 18 images calibrate it."""
    where = tmp_path_factory.mktemp("fitted") / "run"
    fit(list(smooth_images(120, 0)), where, config=CONFIG)
    return where


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A run of the same settings and other images, found to decide alike in bfloat16."""
    where = tmp_path_factory.mktemp("fitted") / "other"
    seen = {}

    def tried(graph, verdict, calibration, decision, batches):
        seen.update(calibration=calibration, batches=[*batches])
        return {"bfloat16": True, "tried_on": "a test"}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "try_bfloat16", tried)
        detector = fit(list(smooth_images(40, 5)), where, config=CONFIG.replace(precision="auto"))
    return SimpleNamespace(folder=where, detector=detector, seen=seen)


@pytest.fixture(scope="module")
def engine(run):
    """OpenVINO's engine of the run."""
    return load(run, "openvino").engine


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder."""
    monkeypatch.setenv("MSVAE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "engine"


@pytest.fixture(scope="module")
def scored(run, pixels, tmp_path_factory):
    """The scores of one image after a cold start, and the cache that is left of it."""
    where = tmp_path_factory.mktemp("scored")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MSVAE_CACHE", str(where))
        table = load(run, "openvino").score(pixels[0])
    (blob,) = (where / "engine").glob("*.blob")
    return SimpleNamespace(table=table, cache=where, name=blob.name)


@pytest.fixture
def blob(scored, cache):
    """The compiled graph of one image, in a cache of its own."""
    shutil.copytree(scored.cache, cache.parent)
    return cache / scored.name


@pytest.fixture
def compiled(monkeypatch):
    """Every graph that is compiled, by the batch it is compiled for."""
    shapes, compile_model = [], openvino.Core.compile_model

    def counted(self, model, *args, **kwargs):
        shapes.append(tuple(model.inputs[0].shape))
        return compile_model(self, model, *args, **kwargs)

    monkeypatch.setattr(openvino.Core, "compile_model", counted)
    return shapes


def one_line(caught, *parts):
    text = str(caught.value)
    assert "\n" not in text
    for part in parts:
        assert part in text


def files_of(folder):
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(folder.rglob("*"))}


def same_scores(a, b):
    for name, values in a.scores.items():
        np.testing.assert_array_equal(values, b.scores[name])
    np.testing.assert_array_equal(a.p, b.p)


# One graph, two engines.


def test_engines_agree(run, pixels):
    """Numbers and maps to 1e-4 of their size or spread, and the p-values: torch's and OpenVINO's.

    A cosine distance is a difference of numbers about 1: it is right to a millionth.
    """
    torchs, openvinos = load(run, "reference"), load(run, "openvino")
    exact, fast = (d.engine(pixels, with_maps=True) for d in (torchs, openvinos))
    assert exact.numbers.shape == fast.numbers.shape == (60, len(NUMBERS))
    assert exact.maps.shape == fast.maps.shape == (60, len(MAPS), SIDE, SIDE)
    for column, name in enumerate(NUMBERS):
        a, b = exact.numbers[:, column], fast.numbers[:, column]
        slack = 1e-6 if name == "neighbours" else 1e-4 * a.std()
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=slack, err_msg=name)
    for row, name in enumerate(MAPS):
        a, b = exact.maps[:, row], fast.maps[:, row]
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-4 * a.std(), err_msg=name)
    told, found = (d.score(list(pixels)) for d in (torchs, openvinos))
    assert 0 < told.flagged.sum() < 60
    np.testing.assert_array_equal(found.p, told.p)
    np.testing.assert_array_equal(found.flagged, told.flagged)
    moved = [np.abs(found.p_values[name] - p) * 19 for name, p in told.p_values.items()]
    assert np.max(moved) < 1.5  # ranks
    assert np.mean(np.array(moved) > 0.5) < 0.01


def test_the_reference_is_the_graph_itself(run, pixels):
    """What the reference engine gives is what a forward pass of the torch module gives."""
    detector = load(run, "reference")
    with torch.no_grad():
        numbers, maps = detector.graph.torch_graph()(as_tensor(pixels))
    found = detector.engine(pixels, with_maps=True)
    np.testing.assert_allclose(found.numbers, numbers.cpu(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.maps, maps.cpu(), rtol=1e-5, atol=1e-5)
    assert detector.engine(pixels).maps is None


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8, 9, 60])
def test_an_image_is_scored_the_same_in_any_company(engine, pixels, count):
    """However many come together: padding and batches change nothing but the last digits."""
    alone = np.concatenate([engine(pixels[i : i + 1]).numbers for i in range(count)])
    found = engine(pixels[:count], with_maps=True)
    assert len(found.numbers) == len(found.maps) == count
    np.testing.assert_allclose(found.numbers, alone, rtol=1e-4, atol=1e-4)


def test_threads_share_an_engine(engine, pixels):
    """Several threads at once get what one gets, to the bit."""
    parts = np.split(pixels, 15)
    expected = [engine(part).numbers for part in parts]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda part: engine(part).numbers, parts))
    np.testing.assert_array_equal(found, expected)


def test_the_run_says_what_computed(run):
    """environment.json names engine, library, precision, instruction set and threads."""
    told = json.loads((run / "environment.json").read_text())["engine"]
    assert told == load(run).engine.info.to_json()
    assert set(told) == {"name", "library", "precision", "instruction_set", "threads"}
    assert told["name"] == choose.engine_name()
    if told["name"] == "openvino":
        assert told["library"] == f"openvino {openvino.__version__.split('-')[0]}"
        assert told["instruction_set"] == processor.instruction_set()
    assert told["precision"] == "f32"


# No torch.


def python(code, *arguments, seconds=120, **environment):
    """What a new Python prints that runs the code."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *map(str, arguments)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


SCORE = """
import sys
import numpy as np
import msvae
pixels = np.load(sys.argv[2])
detector = msvae.load(sys.argv[1], "openvino")
table = detector.score(pixels[0])
table = detector.score(list(pixels))
detector.scan(list(pixels[:2]), each_map=lambda name, maps: None)
assert "torch" not in sys.modules
print(table.scores["fused"].tolist())
"""


def test_scoring_imports_no_torch(run, pixels, cache, tmp_path):
    """From a cold start neither a first scoring, which compiles, nor a second one imports torch."""
    np.save(tmp_path / "pixels.npy", pixels[:9])
    first, second = (python(SCORE, run, tmp_path / "pixels.npy") for _ in range(2))
    assert first == second
    assert len(list(cache.glob("*.blob"))) == 3  # alone, together, with maps
    expected = load(run, "openvino").score(list(pixels[:9])).scores["fused"]
    np.testing.assert_allclose(json.loads(first), expected, rtol=1e-6)


def test_importing_what_scores_imports_no_torch():
    """`msvae.run.score` and `msvae.load` alone are quick."""
    code = "import sys, msvae.run.score; from msvae import load; assert 'torch' not in sys.modules"
    python(code)


# Compiled graphs are kept.


def test_a_second_start_compiles_nothing(run, pixels, cache, compiled):
    """What was compiled is read again from below MSVAE_CACHE: to the bit the same scores."""
    first = load(run, "openvino")
    expected = first.score(list(pixels)), first.score(pixels[0])
    assert compiled == [(8, SIDE, SIDE, 3), (1, SIDE, SIDE, 3)]
    assert len(list(cache.glob("*.blob"))) == len(list(cache.glob("*.json"))) == 2
    again = load(run, "openvino")
    same_scores(again.score(list(pixels)), expected[0])
    same_scores(again.score(pixels[0]), expected[1])
    assert len(compiled) == 2


def test_scoring_writes_nothing_into_a_run(run, pixels, cache):
    """Not a byte, whatever is asked of it: the folder may be another's, or read-only."""
    before = files_of(run)
    detector = load(run, "openvino")
    detector.score(list(pixels[:9]))
    detector.scan(list(pixels[:5]), with_maps=True)
    load(run, "reference").score(pixels[0])
    assert files_of(run) == before


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)


HARMS = {
    "cut short": lambda p: p.write_bytes(p.read_bytes()[:-1000]),
    "empty": lambda p: p.write_bytes(b""),
    "a flipped byte": flip,
    "noise": lambda p: p.write_bytes(os.urandom(5000)),
    "gone": lambda p: p.unlink(),
    "no facts": lambda p: p.with_suffix(".json").unlink(),
    "torn facts": lambda p: p.with_suffix(".json").write_text("{"),
    "foreign facts": lambda p: p.with_suffix(".json").write_text("[1, 2]"),
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_broken_blob_is_made_anew(run, pixels, scored, blob, compiled, harm):
    """Noticed before it is used: the same scores, and the next start is quick again."""
    HARMS[harm](blob)
    for _ in range(2):
        same_scores(load(run, "openvino").score(pixels[0]), scored.table)
        assert len(compiled) == 1


def test_a_blob_that_answers_otherwise_is_made_anew(run, pixels, scored, blob, compiled):
    """One whose known answer is another, as on a processor that computes it wrongly."""
    path = blob.with_suffix(".json")
    facts = json.loads(path.read_text())
    facts["answer"][0] *= 1.01
    path.write_text(json.dumps(facts))
    same_scores(load(run, "openvino").score(pixels[0]), scored.table)
    assert len(compiled) == 1


def test_a_blob_of_another_run_is_made_anew(run, other, pixels, scored, blob, compiled):
    """Renamed, with the facts beside it or without: never another run's scores."""
    load(other.folder, "openvino").score(pixels[0])
    (foreign,) = set(blob.parent.glob("*.blob")) - {blob}
    for suffixes in ((".blob",), (".blob", ".json")):
        for suffix in suffixes:
            shutil.copy(foreign.with_suffix(suffix), blob.with_suffix(suffix))
        before = len(compiled)
        same_scores(load(run, "openvino").score(pixels[0]), scored.table)
        assert len(compiled) == before + 1


STALE = {
    "another version": lambda patch: patch.setattr(openvino, "__version__", "2020.1.0"),
    "another processor": lambda patch: patch.setattr(blobs, "flags", lambda: frozenset({"sve"})),
    "another instruction set": lambda patch: patch.setenv(processor.LIMIT, "SSE41"),
    "another number of cores": lambda patch: patch.setattr(openvino_engine, "cores", lambda: 3),
}


@pytest.mark.parametrize("kind", STALE)
def test_a_stale_blob_is_left_alone(run, pixels, scored, blob, compiled, kind, monkeypatch):
    """What another version compiled, or for another processor, is not read: it has another name."""
    before = files_of(blob.parent)
    STALE[kind](monkeypatch)
    found = load(run, "openvino").score(pixels[0])
    np.testing.assert_allclose(found.scores["fused"], scored.table.scores["fused"], rtol=1e-3)
    assert len(compiled) == 1
    after = files_of(blob.parent)
    assert len(after) == len(before) + 2
    assert {path: after[path] for path in before} == before


def test_a_cache_that_cannot_be_written_is_done_without(run, pixels, scored, tmp_path, monkeypatch):
    """A file in its way: scores all the same."""
    (tmp_path / "cache").write_text("in the way")
    monkeypatch.setenv("MSVAE_CACHE", str(tmp_path / "cache"))
    same_scores(load(run, "openvino").score(pixels[0]), scored.table)


def test_the_least_used_blobs_go(run, pixels, blob, monkeypatch):
    """Together they stay below a limit; the one just written stays whatever its size."""
    os.utime(blob, (1, 1))
    monkeypatch.setattr(blobs, "MOST", blob.stat().st_size + 1000)
    load(run, "openvino").score(list(pixels))
    (left,) = blob.parent.glob("*.blob")
    assert left != blob
    assert [p.stem for p in blob.parent.glob("*.json")] == [left.stem]


# What cannot serve is said in one line.


def test_an_unknown_engine_is_refused(run, monkeypatch, tmp_path):
    """By name or by MSVAE_ENGINE, before any work, with those there are."""
    known = ("'tpu'", "auto, reference, openvino", "--engine", "MSVAE_ENGINE")
    with pytest.raises(ConfigError) as caught:
        load(run, "tpu")
    one_line(caught, *known)
    monkeypatch.setattr(fitting, "split_images", lambda *_, **__: pytest.fail("worked"))
    with pytest.raises(ConfigError) as caught:
        fit(list(smooth_images(40, 0)), config=CONFIG, engine="tpu")
    one_line(caught, *known)
    monkeypatch.setenv("MSVAE_ENGINE", "tpu")
    with pytest.raises(ConfigError) as caught:
        load(run).score(np.zeros((SIDE, SIDE, 3), np.uint8))
    one_line(caught, *known)
    with pytest.raises(ConfigError) as caught:
        fit(list(smooth_images(40, 0)), tmp_path / "run", config=CONFIG)
    one_line(caught, *known)
    assert load(run, "openvino").engine.info.name == "openvino"  # the name wins


@pytest.mark.parametrize(
    "name, library, remedy",
    [("openvino", "openvino", "reference"), ("reference", "torch", "openvino")],
)
def test_an_engine_without_its_library_is_refused(run, monkeypatch, name, library, remedy):
    """What to install, and which engine would serve without it."""
    find = choose.find_spec
    monkeypatch.setattr(choose, "find_spec", lambda n: None if n == library else find(n))
    with pytest.raises(ConfigError) as caught:
        load(run, name)
    one_line(caught, f"needs {library}", f"pip install {library}", f"--engine {remedy}")


@pytest.mark.parametrize("gpu", [False, True])
def test_what_suits_the_machine_is_chosen(monkeypatch, gpu):
    """torch where it has a GPU, OpenVINO on CPUs; `auto` says so too."""
    monkeypatch.setattr(choose, "has_gpu", lambda: gpu)
    monkeypatch.delenv("MSVAE_ENGINE", raising=False)
    expected = "reference" if gpu else "openvino"
    assert choose.engine_name() == choose.engine_name("auto") == expected
    monkeypatch.setenv("MSVAE_ENGINE", "auto")
    assert choose.engine_name() == expected
    monkeypatch.setenv("MSVAE_ENGINE", "reference")
    assert choose.engine_name() == "reference"


def test_the_variable_chooses(run, monkeypatch):
    """MSVAE_ENGINE=reference scores by torch."""
    monkeypatch.setenv("MSVAE_ENGINE", "reference")
    assert isinstance(load(run).engine, TorchEngine)
    monkeypatch.setenv("MSVAE_ENGINE", "openvino")
    assert isinstance(load(run).engine, OpenVinoEngine)


def doctored(run, where, files):
    """A copy of the run with other files, whose checksums were put right by hand."""
    shutil.copytree(run, where)
    facts = json.loads((where / "config.json").read_text())
    for name, data in files.items():
        (where / name).write_bytes(data)
        facts["checksums"][name] = hashlib.sha256(data).hexdigest()
    (where / "config.json").write_text(json.dumps(facts))
    return where


def reshaped(xml):
    """The graph with another shape of a tensor that is the run's."""
    found = re.search(rb'name="(networks[^"]*)" type="Parameter".*?shape="(\d+),', xml, re.DOTALL)
    start, end = found.span(2)
    return xml[:start] + str(int(found[2]) + 1).encode() + xml[end:]


FOREIGN = {
    "graph of another run": lambda run, other: {
        name: (other / name).read_bytes() for name in ("graph.xml", "graph.bin")
    },
    "weights of another run": lambda run, other: {
        "model.safetensors": (other / "model.safetensors").read_bytes()
    },
    "another shape": lambda run, other: {"graph.xml": reshaped((run / "graph.xml").read_bytes())},
    "cut short": lambda run, other: {"graph.xml": (run / "graph.xml").read_bytes()[:5000]},
    "no constants": lambda run, other: {"graph.bin": b""},
    "noise": lambda run, other: {"graph.xml": os.urandom(500)},
    "another model": lambda run, other: {
        "graph.xml": b'<net name="x" version="11"><layers/><edges/></net>'
    },
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_graph_that_does_not_match_its_run_is_refused(run, other, pixels, tmp_path, kind):
    """Never a wrong number, even where the checksums were put right."""
    where = doctored(run, tmp_path / "run", FOREIGN[kind](run, other.folder))
    with pytest.raises(RunError) as caught:
        load(where, "openvino").score(pixels[0])
    one_line(caught, f"{where / 'graph.xml'}: ", "fit it again")


def test_an_altered_graph_is_not_loaded(run, tmp_path):
    """By its checksum."""
    shutil.copytree(run, tmp_path / "run")
    for name in ("graph.bin", "graph.xml"):
        flip(tmp_path / "run" / name)
        with pytest.raises(RunError) as caught:
            load(tmp_path / "run")
        one_line(caught, str(tmp_path / "run" / "graph"), "differs from its checksum")


FORK = """
import os, sys
import numpy as np
import msvae
pixels = np.load(sys.argv[2])
detector = msvae.load(sys.argv[1], "openvino")
if sys.argv[3] == "after":
    detector.score(pixels[0])
sys.stdout.flush()
child = os.fork()
if not child:
    try:
        print(float(detector.score(pixels[0]).scores["fused"][0]), flush=True)
    except msvae.EngineError as error:
        print(error, flush=True)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork processes")
def test_a_forked_child_is_told_not_left_waiting(run, pixels, tmp_path):
    """After its parent has scored: one line with the remedies; before, it scores like any other."""
    np.save(tmp_path / "pixels.npy", pixels[:1])
    told = python(FORK, run, tmp_path / "pixels.npy", "after", PYTHONWARNINGS="default")
    assert told.count("\n") == 1
    assert 'get_context("spawn")' in told
    assert "MSVAE_ENGINE=reference" in told
    found = python(FORK, run, tmp_path / "pixels.npy", "before", PYTHONWARNINGS="default")
    expected = load(run, "openvino").score(pixels[0]).scores["fused"][0]
    assert float(found) == pytest.approx(expected, rel=1e-6)


# One answer on every processor.


JUDGE = """
import json, sys
import numpy as np
import msvae
detector = msvae.load(sys.argv[1], "openvino")
table = detector.score(list(np.load(sys.argv[2])))
told = {"p": table.p.tolist(), "flagged": table.flagged.tolist()}
print(json.dumps(told | detector.engine.info.to_json()))
"""


@pytest.mark.parametrize("limit", ["AVX2", "AVX512_CORE"])
def test_instruction_sets_decide_alike(run, pixels, tmp_path, limit):
    """Held to a lower set, p-values move by a rank at most in 99 %; only flags on the edge change."""
    if processor.LEVELS[limit] not in processor.flags():
        pytest.skip(f"this processor has no {limit}")
    detector = load(run, "openvino")
    best, n = detector.score(list(pixels)), detector.calibration.n
    np.save(tmp_path / "pixels.npy", pixels)
    told = json.loads(python(JUDGE, run, tmp_path / "pixels.npy", ONEDNN_MAX_CPU_ISA=limit))
    assert (told["instruction_set"], told["precision"]) == (limit, "f32")
    ranks = np.abs(np.array(told["p"]) - best.p) * (n + 1)
    assert (ranks < 1.5).mean() >= 0.99
    changed = np.array(told["flagged"]) != best.flagged
    assert (np.abs(best.p[changed] - detector.decision.target_fpr) <= 1 / (n + 1) + 1e-9).all()


LIMITS = {
    "": "AVX512_CORE_AMX",
    "ALL": "AVX512_CORE_AMX",
    "sse41": "SSE41",
    "AVX": "AVX",
    "AVX2": "AVX2",
    "AVX2_VNNI": "AVX2",
    "AVX512_CORE": "AVX512_CORE",
    "AVX512_CORE_VNNI": "AVX512_CORE",
    "AVX512_CORE_BF16": "AVX512_CORE_BF16",
    "AVX512_CORE_AMX": "AVX512_CORE_AMX",
}


@pytest.mark.parametrize("limit", LIMITS)
def test_the_instruction_set_is_the_best_that_is_allowed(monkeypatch, limit):
    """What the environment forbids is neither named nor used, in oneDNN's names."""
    monkeypatch.setattr(processor, "flags", lambda: frozenset(processor.LEVELS.values()))
    monkeypatch.setenv(processor.LIMIT, limit)
    assert processor.instruction_set() == LIMITS[limit]
    assert processor.has_bfloat16() == (LIMITS[limit] in ("AVX512_CORE_BF16", "AVX512_CORE_AMX"))
    monkeypatch.setattr(processor, "flags", lambda: frozenset({"sse4_1", "avx", "avx2"}))
    names = list(processor.LEVELS)
    lower_one = min(LIMITS[limit], "AVX2", key=names.index)
    assert processor.instruction_set() == lower_one


# bfloat16 belongs to the run.


def silu_convolutions(module):
    """How many convolutions of wide maps a SiLU follows, by torch's own hooks."""
    order = []
    kinds = (torch.nn.Conv2d, torch.nn.ConvTranspose2d, torch.nn.SiLU)
    hooks = [
        m.register_forward_hook(
            lambda m, i, o: order.append("picture" if i[0].shape[1] == 3 else type(m))
        )
        for m in module.modules()
        if isinstance(m, kinds)
    ]
    with torch.no_grad():
        module(torch.zeros(1, SIDE, SIDE, 3, dtype=torch.uint8))
    for hook in hooks:
        hook.remove()
    return sum(a in kinds[:2] and b == torch.nn.SiLU for a, b in pairwise(order))


def test_only_convolutions_of_wide_maps_are_lowered(run):
    """As many as the networks have; what reads or becomes a picture or a number stays float32."""
    graph = load(run).graph
    model = lower(graph.openvino_model())
    everything = model.get_ordered_ops()
    low = [n for n in everything if n.outputs() and n.get_output_element_type(0) == Type.bf16]
    kinds = [n.get_type_name() for n in low]
    assert set(kinds) <= {
        *("Convolution", "ConvolutionBackpropData", "Add", "Swish", "Convert", "Constant")
    }
    expected = silu_convolutions(graph.torch_graph())
    convolutions = [k for k in kinds if k.startswith("Convolution")]
    assert len(convolutions) == kinds.count("Swish") == expected > 10
    assert sum(n.get_type_name().startswith("Convolution") for n in everything) > expected
    assert all(output.get_element_type() == Type.f32 for output in model.outputs)


def test_numbers_stay_close_in_bfloat16(run, pixels):
    """To a hundredth of their size or a twentieth of their spread; of the picture alone, exactly."""
    if not processor.has_bfloat16():
        pytest.skip("this processor does not multiply bfloat16")
    graph = load(run).graph
    exact, low = (OpenVinoEngine(graph, low) for low in (False, True))
    assert (exact.info.precision, low.info.precision) == ("f32", "bf16")
    a, b = exact(pixels, with_maps=True), low(pixels, with_maps=True)
    for column, name in enumerate(NUMBERS):
        exactly, nearly = a.numbers[:, column], b.numbers[:, column]
        if name.startswith(("image_", "structure")):
            np.testing.assert_array_equal(nearly, exactly)
        else:
            slack = 1e-3 if name == "neighbours" else 0.05 * exactly.std()
            np.testing.assert_allclose(nearly, exactly, rtol=0.01, atol=slack, err_msg=name)
            assert (nearly != exactly).any()
    for row, name in enumerate(MAPS):
        apart = np.abs(a.maps[:, row] - b.maps[:, row])
        assert apart.mean() <= 0.02 * a.maps[:, row].std(), name


@pytest.mark.parametrize("able", [False, True])
def test_precision_belongs_to_the_run(run, other, monkeypatch, able):
    """bfloat16 where the run allows it and the processor has it; float32 in every other case."""
    monkeypatch.setattr(openvino_engine, "has_bfloat16", lambda: able)
    assert load(run, "openvino").engine.info.precision == "f32"
    assert load(other.folder, "openvino").engine.info.precision == ("bf16" if able else "f32")


def test_a_processor_without_bfloat16_scores_in_float32(other, pixels, monkeypatch):
    """What the run allows changes no bit there."""
    monkeypatch.setattr(openvino_engine, "has_bfloat16", lambda: False)
    allowed = load(other.folder, "openvino")
    exact = OpenVinoEngine(allowed.graph)
    np.testing.assert_array_equal(allowed.engine(pixels).numbers, exact(pixels).numbers)


def test_a_fit_tries_bfloat16_on_what_it_held_out(other):
    """On the conformal images and on imagined defects; what was found stands in the run."""
    if choose.engine_name() != "openvino":
        pytest.skip("bfloat16 is tried for OpenVINO")
    facts = json.loads((other.folder / "config.json").read_text())
    assert facts["precision"] == {"bfloat16": True, "tried_on": "a test"}
    assert other.detector.allows_bfloat16
    assert load(other.folder).allows_bfloat16
    batches = other.seen["batches"]
    assert all(b.dtype == np.uint8 and b.shape[1:] == (SIDE, SIDE, 3) for b in batches)
    held = other.seen["calibration"].n
    assert sum(map(len, batches)) > held
    numbers = OpenVinoEngine(other.detector.graph)(np.concatenate(batches)[:held]).numbers
    fused = other.detector.verdict(numbers)["fused"]
    np.testing.assert_allclose(fused, other.seen["calibration"].scores["fused"], rtol=1e-4)


def test_calibrating_tries_bfloat16_anew(other, tmp_path, monkeypatch):
    """By the new thresholds and the images that set them; what was found before is forgotten."""
    where, seen = shutil.copytree(other.folder, tmp_path / "run"), {}

    def tried(graph, verdict, calibration, decision, batches):
        seen.update(n=calibration.n, images=sum(map(len, batches)))
        return {"bfloat16": False, "tried_on": "another test"}

    monkeypatch.setattr(calibrating, "try_bfloat16", tried)
    monkeypatch.setenv("MSVAE_ENGINE", "openvino")
    normals = write(tmp_path / "normals", smooth_images(12, 8))
    calibrate(where, normals)
    assert seen["n"] == 12
    assert seen["images"] > 12  # imagined defects too
    assert load(where).facts["precision"] == {"bfloat16": False, "tried_on": "another test"}
    assert not load(where).allows_bfloat16


def test_a_run_in_single_precision_is_not_tried(run):
    """precision = fp32: nothing is tried, nothing allowed."""
    assert CONFIG.train.precision == "fp32"
    assert "precision" not in json.loads((run / "config.json").read_text())
    assert not load(run).allows_bfloat16


class Fake:
    """An engine whose bfloat16 moves some scores."""

    moved = ()

    def __init__(self, graph, low):
        self.low = low

    def __call__(self, batch):
        """The first channel of the first pixel, some of them moved."""
        numbers = batch[:, 0, 0, :1].astype(np.float64)
        for i, by in self.moved if self.low else ():
            numbers[i] += by
        return Outputs(numbers, None)


N = 99
CASES = {
    "nothing moves": ((), True, 1.0, 0),
    "one in a hundred, by a rank": (((3, 1.5),), True, 1.0, 0),
    "one in a hundred, by far": (((3, 9.0),), True, 0.99, 0),
    "two in a hundred, by far": (((3, 9.0), (4, 9.0)), False, 0.98, 0),
    "one decision": (((94, 1.5),), False, 1.0, 1),
    "all that calibrated, by less than a rank": (tuple((i, 0.1) for i in range(N)), True, 1.0, 0),
}


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_is_allowed_where_it_decides_alike(monkeypatch, case):
    """p-values within a rank in 99 of 100, and no decision changed; else not, with the figures.

    The first 99 are the images that calibrated: each is judged by the others.
    """
    moved, allowed, within, flips = CASES[case]
    monkeypatch.setattr(precision, "has_bfloat16", lambda: True)
    monkeypatch.setattr(precision, "OpenVinoEngine", type("Moved", (Fake,), {"moved": moved}))
    batch = np.zeros((100, 1, 1, 3), np.uint8)
    batch[:, 0, 0, 0] = np.arange(100)
    scores = {"fused": np.arange(float(N))}
    calibration, decision = Calibration(scores, scores), Decision("conformal", "fused", 0.05)
    found = precision.try_bfloat16(
        None, lambda numbers: {"fused": numbers[:, 0]}, calibration, decision, [batch]
    )
    assert found["bfloat16"] == allowed
    assert found["images"] == 100
    assert found["within_a_rank"] == pytest.approx(within)
    assert found["decisions_changed"] == flips


def test_without_bfloat16_nothing_is_tried(monkeypatch):
    """Nor allowed: what was not measured is not used."""
    monkeypatch.setattr(precision, "has_bfloat16", lambda: False)
    monkeypatch.setattr(precision, "OpenVinoEngine", lambda *_: pytest.fail("tried"))
    found = precision.try_bfloat16(None, None, None, None, [])
    assert found == {"bfloat16": False, "tried_on": None}
