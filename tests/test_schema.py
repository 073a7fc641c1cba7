"""Whatever a run says, checksums right: it is refused in one line, or it serves finite numbers."""

import hashlib
import json
import os
import random
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as dump_arrays

from msvae import load
from msvae.core.errors import DataError, MsvaeError, RunError
from msvae.engine.engine import Outputs
from msvae.evaluation.table import ScoreTable
from msvae.report.build import _tables, page_of
from msvae.report.page import Comparison
from msvae.run import schema, store
from msvae.run.checkpoint import resumed
from msvae.run.score import score_batches

NONSENSE = (
    *(None, True, -1, 0, 0.5, 5, 10**12, 10**400, 1e308, float("nan"), float("inf"), "", "x"),
    *("\0", "../../etc/passwd", "é\n" * 9999, [], [1], ["x"] * 3, {}, {"a": 1}, {"": {"": []}}),
)
DEEP = "[" * 100_000
ARRAYS = ("calibration.safetensors", "model.safetensors", "references.safetensors")


@pytest.fixture(scope="module")
def crafted(tree_run, tmp_path_factory):
    """A copy of a run, the content of its files, and what its graph gives for three images."""
    folder = shutil.copytree(tree_run, tmp_path_factory.mktemp("crafted") / "run")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    numbers = load(folder, "reference").engine(pixels).numbers
    contents = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    return SimpleNamespace(folder=folder, contents=contents, numbers=numbers, pixels=pixels)


@pytest.fixture
def attempt(crafted):
    """Loads the run with some of its files crafted, checksums right; whether it was refused.

    One that is not refused serves finite scores and p-values, or is refused then.
    """

    def tried(changes, settings=None):
        facts = json.loads(crafted.contents["config.json"])
        for name, data in changes.items():
            (crafted.folder / name).write_bytes(data)
            if name in facts["checksums"]:
                facts["checksums"][name] = hashlib.sha256(data).hexdigest()
        if settings is not None:
            facts = settings(facts)
        if not isinstance(facts, bytes):
            facts = json.dumps(facts).encode("utf-8", "surrogatepass")
        (crafted.folder / "config.json").write_bytes(facts)

        def work():
            detector = load(crafted.folder, "reference")
            serve(detector, crafted)
            if "model.safetensors" in changes:
                detector.graph.torch_graph()

        return refusal(RunError, work)

    yield tried
    for name, data in crafted.contents.items():
        (crafted.folder / name).write_bytes(data)


def refusal(kind, work):
    """The one line in which the work refuses; None where it is done."""
    text = None
    try:
        work()
    except kind as error:
        text = str(error)
    assert text is None or len(text.splitlines()) == 1
    assert text is None or len(text) < 600
    return text


def serve(detector, crafted):
    """Scores and p-values of the images are finite, or refused; the engine gives what it gave."""

    def engine(pixels, with_maps):
        return Outputs(crafted.numbers, None)

    engine.workers = 1
    scores, _ = score_batches(engine, detector.verdict, [crafted.pixels])
    table = detector.decide(["a", "b", "c"], scores)
    assert all(np.isfinite(v).all() for v in table.scores.values())
    assert all(((v > 0) & (v <= 1)).all() for v in table.p_values.values())


def places(value, at=()):
    """Every place in a JSON value."""
    yield at
    pairs = value.items() if isinstance(value, dict) else ()
    for key, entry in enumerate(value) if isinstance(value, list) else pairs:
        yield from places(entry, (*at, key))


def replaced(value, at, new):
    """The value with another at a place; none there where it is the type `DELETED`."""
    copy = dict(value) if isinstance(value, dict) else list(value)
    if new is DELETED and len(at) == 1:
        del copy[at[0]]
    else:
        copy[at[0]] = replaced(value[at[0]], at[1:], new) if len(at) > 1 else new
    return copy


DELETED = object()


def test_the_run_as_it_is_serves(attempt):
    """Nothing crafted, nothing refused."""
    assert not attempt({})


def test_crafted_settings(attempt, crafted):
    """A nonsensical value, or none, at 200 places of config.json."""
    rng, facts = random.Random(0), json.loads(crafted.contents["config.json"])
    every = [at for at in places(facts) if at and at[0] != "graph"]
    refusals = 0
    for _ in range(200):
        at, new = rng.choice(every), rng.choice([*NONSENSE, DELETED])
        if new is DELETED and not at:
            continue
        refusals += attempt({}, lambda f, at=at, new=new: replaced(f, at, new)) is not None
    assert refusals > 150


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"3", b"nul", b"\xff\xfe", DEEP.encode()])
def test_settings_that_are_none(attempt, text):
    """Torn, foreign or deep JSON in the place of config.json."""
    assert attempt({}, lambda facts: text)


def spoilt(rng, array):
    """The array with a number, a shape or a type that it cannot have."""
    flat = array.copy().reshape(-1)
    kind = rng.choice(["number", "type", "shape", "none", "longer"])
    if kind == "number" and array.dtype.kind == "f" and array.size:
        values = (np.nan, np.inf, -np.inf, np.finfo(array.dtype).max, np.finfo(array.dtype).min)
        flat[rng.randrange(len(flat))] = rng.choice(values)
        return flat.reshape(array.shape)
    if kind == "number" and array.size:
        flat[rng.randrange(len(flat))] = np.iinfo(array.dtype).max
        return flat.reshape(array.shape)
    if kind == "type":
        return array.astype(np.int32)
    if kind == "shape":
        return flat if array.ndim != 1 else flat[:, None]
    return np.concatenate([flat, flat]) if kind == "longer" else flat[:0]


@pytest.mark.parametrize("name", ARRAYS)
def test_crafted_arrays(attempt, crafted, name):
    """Numbers that are none, other shapes, types and names, in 60 arrays of each file."""
    rng, arrays = random.Random(name), load_arrays(crafted.contents[name])
    refusals = 0
    for _ in range(60):
        key = rng.choice(sorted(arrays))
        others = {k: v for k, v in arrays.items() if k != key}
        new = rng.choice([{key: spoilt(rng, arrays[key])}, {}, {"x" + key: arrays[key]}])
        refusals += attempt({name: dump_arrays(others | new)}) is not None
    assert refusals > 50


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("data", [b"", b"\xff" * 64, (1 << 40).to_bytes(8, "little") + b"{}"])
def test_what_are_no_arrays(attempt, name, data):
    """Nothing, noise, and a header longer than the file."""
    assert attempt({name: data})


CRAFTED = {
    "weights that are all NaN": {"model.safetensors": lambda a: {**a, **every_nan(a)}},
    "no calibration scores": {
        "calibration.safetensors": lambda a: {k: v for k, v in a.items() if "conformal" not in k}
    },
    "none of them": {
        "calibration.safetensors": lambda a: {
            k: v[:0] if k.startswith(("conformal", "peaks")) else v for k, v in a.items()
        }
    },
    "knots that fall": {
        "calibration.safetensors": lambda a: {
            k: np.ascontiguousarray(v[:, ::-1]) if k.endswith("knots") else v for k, v in a.items()
        }
    },
}


def every_nan(arrays):
    return {
        k: np.full_like(v, np.nan) for k, v in arrays.items() if k.startswith("networks.vae.to")
    }


@pytest.mark.parametrize("kind", CRAFTED)
def test_arrays_that_would_serve_nonsense(attempt, crafted, kind):
    """Each is refused."""
    ((name, change),) = CRAFTED[kind].items()
    assert attempt({name: dump_arrays(change(load_arrays(crafted.contents[name])))})


@pytest.mark.parametrize("rate", [float("nan"), -1, 0, 1, 5, 1e-9, "0.05", None, True])
def test_a_false_alarm_rate_that_is_none(attempt, rate):
    """Outside (0, 1), or lower than the calibration can keep."""
    assert attempt({}, lambda f: replaced(f, ("decision", "target_fpr"), rate))


@pytest.mark.parametrize(
    "at, new",
    [
        (("config", "model", "image_size"), 64),
        (("config", "model", "image_size"), 10**9),
        (("config", "model", "latent_dim"), 10**9),
        (("config", "model", "hidden_dims"), [10**9] * 6),
        (("config", "model", "segmenter"), True),
        (("config", "model"), []),
        (("config",), 3),
        (("decision", "rule"), "best"),
        (("decision", "score"), "novelty"),
        (("decision", "rule"), "fixed"),
        (("n_conformal",), 10),
        (("checksums", "../x"), "0" * 64),
        (("checksums", "a/b"), "0" * 64),
        (("checksums", "config.json"), "0" * 64),
        (("checksums", "split.csv"), ["0" * 64]),
        (("checksums", "graph.xml"), DELETED),
    ],
)
def test_settings_that_would_do_harm(attempt, at, new):
    """Sizes beyond the tensors, rules and scores that there are not, files outside of the run."""
    assert (
        attempt({}, lambda f: replaced(f, at, new)) or at[-1] == "segmenter"
    )  # that is told when the networks are made


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "split.csv"])
def test_a_device_in_the_place_of_a_file(crafted, tmp_path, name):
    """What never ends is not read."""
    folder = shutil.copytree(crafted.folder, tmp_path / "run")
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    assert refusal(RunError, lambda: load(folder))


def test_a_fifo_in_the_place_of_a_file_is_not_waited_for(crafted, tmp_path):
    """Neither is one that nobody writes into."""
    folder = shutil.copytree(crafted.folder, tmp_path / "run")
    (folder / "history.csv").unlink()
    os.mkfifo(folder / "history.csv")
    assert schema.history(folder / "history.csv") == []


GRAPHS = {
    "torn": lambda xml: xml[: len(xml) // 2],
    "noise": lambda xml: b"\xff" * 99,
    "another operation": lambda xml: xml.replace(b'type="Sigmoid"', b'type="Sigmund"'),
    "other tensors": lambda xml: xml.replace(b"networks.", b"netwerks."),
}


@pytest.mark.parametrize("kind", GRAPHS)
def test_a_crafted_graph(attempt, crafted, kind):
    """What OpenVINO cannot read or compile, or does not go with the run, is refused when it scores."""
    data = GRAPHS[kind](crafted.contents["graph.xml"])
    assert data != crafted.contents["graph.xml"]
    attempt({"graph.xml": data})
    detector = load(crafted.folder, "openvino")
    assert refusal(RunError, lambda: detector.score(list(crafted.pixels)))


def test_a_crafted_checkpoint(tmp_path):
    """State, identity or both are none, or the file holds neither: one line."""
    state = {"epoch": 1, "best_epoch": 1, "best_loss": 0.5, "history": []}
    for facts in ({}, {"identity": 3}, {"identity": {}, "state": {**state, "epoch": "x"}}, [3]):
        store.write_checkpoint(tmp_path, {"best.w": np.zeros(2)}, facts)
        assert refusal(RunError, lambda: resumed(tmp_path, {}))
    (tmp_path / store.CHECKPOINT).write_bytes(dump_arrays({"facts": np.zeros(3, np.uint8)}))
    assert refusal(RunError, lambda: resumed(tmp_path, {}))
    store.write_checkpoint(tmp_path, {"best.w": np.zeros(2)}, {"identity": {}, "state": state})
    assert resumed(tmp_path, {}).best_loss == 0.5


TABLES = {
    "split.csv": ["", "path,part\na,train\n", "path,part,sha256\na,test," + "0" * 64 + "\n"],
    "calibrated.csv": ["path\na\n", "path,sha256\na,0\n", "path,sha256\na\n", "path,path\na,b\n"],
    "quarantine.csv": [
        "reason\na\n",
        'path,reason\n"a',
        "path,reason\na,b,c\n",
        "path,reason\n\0,b",
    ],
    "history.csv": [
        "epoch\n1\n",
        "epoch,kl,reconstruction,stop_loss\n1,x,1,1\n",
        "a\n" + "x" * 200_000,
    ],
}


@pytest.mark.parametrize(
    "name, text", [(name, text) for name, texts in TABLES.items() for text in texts if text]
)
def test_crafted_tables(tmp_path, name, text):
    """Columns that lack, rows of other lengths, cells of another kind: one line, and no traceback."""
    path = tmp_path / name
    path.write_text(text)
    reader = schema.history if name == "history.csv" else schema.table
    assert str(path) in refusal(RunError, lambda: reader(path))


def test_a_fitted_run_holds_what_the_schema_names(tree_run):
    """Whoever adds an array says here what it has to be."""
    config = load(tree_run).config.model
    wanted = {
        "calibration": schema.calibration_schema(config),
        "references": schema.references_schema(config),
        "model": schema.model_schema(config),
    }
    for name, arrays in wanted.items():
        stored = store.read_arrays(tree_run / f"{name}.safetensors")
        assert {k for k in stored if not k.startswith("networks.")} == {
            k for k in arrays if not k.startswith("networks.")
        }


# Evaluations and files of scores.


def test_a_crafted_evaluation(judged, tree_run, tmp_path):
    """A nonsensical value at 300 places of metrics.json: refused in one line, or shown."""
    folder = shutil.copytree(judged.out, tmp_path / "evaluation")
    rng, every = random.Random(0), [at for at in places(judged.metrics) if at]
    path = folder / "metrics.json"

    def read():
        schema.document(path, schema.EVALUATION, DataError, "write it again")

    for _ in range(300):
        new = replaced(judged.metrics, rng.choice(every), rng.choice([*NONSENSE, DELETED]))
        path.write_text(json.dumps(new))
        if refusal(DataError, read):
            continue
        Comparison.from_metrics({"test": new["scores"]})  # what a page makes of it
        _tables(new)
    path.write_text(DEEP)
    with pytest.raises(DataError, match="is not JSON"):
        page_of(tree_run, evaluation=folder)


COLUMNS = ("fused", "p", "flagged", "label", "p_fused")


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("cell", ["nan", "inf", "-7", "1e300", "x", "", "\0"])
def test_a_crafted_file_of_scores(judged, tmp_path, column, cell):
    """A cell that is no score, no p-value, no label: one line, or a page without it."""
    table = judged.table
    cells = [list(row) for row in table.lines()]
    cells[2][cells[0].index(column)] = cell
    path = tmp_path / "f.csv"
    path.write_text("\n".join(",".join(map(str, row)) for row in cells))
    assert refusal(MsvaeError, lambda: page_of(path)) or (column, cell) == ("fused", "-7")


@pytest.mark.parametrize("column", ["fused", "p", "flagged", "label"])
def test_a_file_of_scores_without_a_column(judged, tmp_path, column):
    """The page shows the rest."""
    cells = [list(row) for row in judged.table.lines()]
    at = cells[0].index(column)
    path = tmp_path / "f.csv"
    path.write_text("\n".join(",".join(map(str, row[:at] + row[at + 1 :])) for row in cells))
    assert len(ScoreTable.read_csv(path)) == len(judged.table)
    assert page_of(path).title == "f"
