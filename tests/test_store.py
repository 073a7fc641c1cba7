"""A run folder is whole, or it is refused in one line; no moment and no byte makes it another."""

import ast
import errno
import json
import os
import shutil
import struct
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

import msvae
from kills import every_kill
from msvae import fit, load
from msvae.core.errors import OutputError, RunError
from msvae.core.replacement import UNFINISHED, sweep
from msvae.run import store
from msvae.scores.catalog import MAPS, NUMBERS
from small import CONFIG

NAMES = (
    *("model.safetensors", "calibration.safetensors", "split.csv", "environment.json"),
    *("graph.xml", "graph.bin"),
)
LARGE = 4096  # bytes: so small a constant may lie in the graph as well
GRAPH = {"graph.xml": b"<net>\n</net>", "graph.bin": bytes(range(256))}


def tensors(value=1.0):
    rng = np.random.default_rng(0)
    return {"w": rng.random((4, 3), dtype=np.float32), "v": np.full(2, value, np.float32)}


@pytest.fixture
def folder(tmp_path):
    """A small run with every kind of file."""
    where = tmp_path / "run"
    store.save_run(
        where,
        {"decision": "old", "config": {}, "n": 3},
        {"model.safetensors": tensors(), "calibration.safetensors": tensors()},
        {"split.csv": [{"path": "a.png", "part": "train"}], "history.csv": [{"epoch": 1}]},
        {"environment.json": {"python": "3"}},
        GRAPH,
    )
    return where


def check(where):
    store.check_run(where, store.read_facts(where))


def refused(where, name, words):
    """The run is refused in one line that names the file and ends in the remedy."""
    with pytest.raises(RunError) as caught:
        check(where)
    text = str(caught.value)
    assert str(where / name) in text
    assert words in text
    assert "\n" not in text
    assert "fit" in text


# What is written comes back.


def test_a_run_comes_back(folder):
    """Facts, tensors and bytes are those that were saved, and nothing lies about besides."""
    check(folder)
    facts = store.read_facts(folder)
    assert (facts["decision"], facts["n"], facts["format"]) == ("old", 3, store.FORMAT)
    back = store.read_arrays(folder / "model.safetensors")
    assert all(np.array_equal(v, back[k]) for k, v in tensors().items())
    assert {name: (folder / name).read_bytes() for name in GRAPH} == GRAPH
    assert {p.name for p in folder.iterdir()} == {*NAMES, "history.csv", "config.json"}
    assert store.is_run(folder)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.uint8])
def test_tensors_keep_every_bit(folder, dtype):
    """Whatever the type and the memory layout, the values are the same."""
    value = np.arange(48).astype(dtype).reshape(2, 2, 4, 3).transpose(0, 3, 1, 2)
    number = np.array(7, dtype)  # has no axis: it stays one
    store.update_run(folder, {}, "model.safetensors", {"x": value, "n": number}, {})
    back = store.read_arrays(folder / "model.safetensors")
    for name, expected in (("x", value), ("n", number)):
        assert back[name].dtype == dtype
        assert back[name].shape == expected.shape
        np.testing.assert_array_equal(back[name], expected)


@pytest.mark.parametrize("value", [{"a": [1, 2.5, None]}, ["ü", 'q"'], (), 0.1 + 0.2])
def test_facts_travel_in_a_tensor(value):
    """JSON packed into bytes comes back as JSON."""
    packed = store.pack(value)
    assert packed.dtype == np.uint8
    assert store.unpack(packed) == json.loads(json.dumps(value))


def test_a_checkpoint_comes_back(tmp_path):
    """Tensors and facts in one file."""
    store.write_checkpoint(tmp_path, tensors(), {"epoch": 4})
    back, facts = store.read_checkpoint(tmp_path)
    assert facts == {"epoch": 4}
    assert back.keys() == tensors().keys()
    assert all(np.array_equal(v, back[k]) for k, v in tensors().items())


# What is not whole is refused.


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_a_changed_byte_is_refused(folder, name, where):
    """One flipped bit anywhere, in any file."""
    data = bytearray((folder / name).read_bytes())
    data[{"first": 0, "middle": len(data) // 2, "last": -1}[where]] ^= 1
    (folder / name).write_bytes(data)
    refused(folder, name, "checksum")


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file_is_refused(folder, name):
    """Any of them."""
    (folder / name).unlink()
    refused(folder, name, "missing")


@pytest.mark.parametrize("harm", [b"", b"longer"])
def test_a_file_of_another_length_is_refused(folder, harm):
    """Cut short or grown."""
    data = (folder / NAMES[0]).read_bytes()
    (folder / NAMES[0]).write_bytes(data + harm if harm else data[:-5])
    refused(folder, NAMES[0], "checksum")


def test_the_history_may_grow(folder):
    """The history is not under checksum: a run goes on being one while it is written."""
    (folder / "history.csv").write_text("epoch\n1\n2\n")
    check(folder)


def test_a_newer_format_is_refused(folder):
    """A run of a later msvae: both versions are named, and updating is the remedy."""
    facts = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(facts | {"format": store.FORMAT + 1}))
    with pytest.raises(RunError, match=rf"reads {store.FORMAT}: update msvae") as caught:
        check(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_run_of_before_is_refused(folder):
    """A run of format 5: in one line, with the version that reads it."""
    facts = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(facts | {"format": 5}))
    with pytest.raises(RunError) as caught:
        load(folder)
    text = str(caught.value)
    assert text.startswith(f"{folder}: has run format 5, this msvae reads {store.FORMAT}:")
    assert "msvae 0.1.0 of commit 47b9380 reads it, or fit again" in text
    assert "\n" not in text


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "3", '"x"', "\udcff"])
def test_settings_that_are_none_are_refused(folder, text):
    """Torn, empty or foreign JSON."""
    (folder / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    refused(folder, "config.json", "cannot be read")


def test_a_folder_without_settings_is_no_run(tmp_path):
    """An empty folder, and one that is not there."""
    for where in (tmp_path, tmp_path / "absent"):
        assert not store.is_run(where)
        with pytest.raises(RunError, match="is not a run"):
            store.read_facts(where)


@pytest.mark.parametrize("data", [b"", b"x" * 100, b"PK\x03\x04" + bytes(50), b"\x80\x04K\x01."])
def test_what_is_no_safetensors_file_is_refused(tmp_path, data):
    """Empty, noise, a zip or a pickle: named, never opened any other way."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(RunError) as caught:
        store.read_arrays(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_absent_tensor_file_is_refused(tmp_path):
    """Named as one that cannot be read."""
    with pytest.raises(RunError, match=r"model\.safetensors: cannot be read"):
        store.read_arrays(tmp_path / "model.safetensors")


# No moment leaves a torn run.


def update(folder):
    changes, beside = {"config": {}, "decision": "new"}, {"calibrated.csv": b"path\n"}
    store.update_run(folder, changes, "calibration.safetensors", tensors(2.0), beside)


def save(folder):
    parts = {"model.safetensors": tensors(5.0), "calibration.safetensors": tensors(5.0)}
    tables = {"split.csv": [{"path": "b"}], "history.csv": [{"epoch": 2}]}
    facts = {"config": {}, "decision": "saved"}
    store.save_run(folder, facts, parts, tables, {"environment.json": {}}, GRAPH)


def content(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("change", [update, save])
def test_a_kill_in_a_change_leaves_a_whole_run(folder, tmp_path, change):
    """At each operation: the next that reads finds all of the old or all of the new run."""
    store.write_checkpoint(folder, tensors(), {"epoch": 4})
    (folder / "quarantine.csv").write_text("path,reason\n")
    shutil.copytree(folder, tmp_path / "new")
    change(tmp_path / "new")
    old, new, work = content(folder), content(tmp_path / "new"), tmp_path / "work"
    assert "quarantine.csv" not in new
    assert ("checkpoint.safetensors" in new) == (change is update)

    def prepare():
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(folder, work)

    sides = []
    for _ in every_kill(prepare, lambda: change(work)):
        assert store.is_run(work)
        store.read_run(work)
        left = [name for name in content_names(work) if name.startswith(UNFINISHED)]
        assert len(left) <= 1
        sweep(work)
        assert content(work) in (old, new)
        sides.append(content(work) == new)
    assert len(sides) > 8
    assert sides == sorted(sides)
    assert 0 < sum(sides) < len(sides)


def content_names(folder):
    return [p.name for p in folder.iterdir()]


def test_a_kill_in_a_first_save_leaves_no_run_or_all_of_it(tmp_path):
    """The folder does not pretend to be a run before it is one, and then it is whole."""
    where, sides = tmp_path / "run", []
    for _ in every_kill(lambda: shutil.rmtree(where, ignore_errors=True), lambda: save(where)):
        sides.append(store.is_run(where))
        if sides[-1]:
            store.read_run(where)
    assert sides == sorted(sides)
    assert 0 < sum(sides) < len(sides)


def test_after_an_update_the_old_tensors_are_refused(folder):
    """They do not go with the new settings."""
    old = (folder / "calibration.safetensors").read_bytes()
    update(folder)
    (folder / "calibration.safetensors").write_bytes(old)
    refused(folder, "calibration.safetensors", "checksum")


def test_an_update_leaves_the_rest(folder):
    """Other files and facts are as they were."""
    before = {n: (folder / n).read_bytes() for n in (*NAMES, "history.csv")}
    update(folder)
    changed = {n for n, data in before.items() if (folder / n).read_bytes() != data}
    assert changed == {"calibration.safetensors"}
    assert store.read_facts(folder)["n"] == 3


def test_a_run_that_is_replaced_while_it_is_read_is_read_anew(folder, monkeypatch):
    """Settings of the old run, files of the new one: no reason to refuse it."""
    real, calls = store.check_run, []

    def check_run(where, facts):
        if not calls:
            save(where)
        calls.append(facts)
        real(where, facts)

    monkeypatch.setattr(store, "check_run", check_run)
    assert store.read_run(folder)["decision"] == "saved"
    with pytest.raises(RunError, match="was replaced since the run was loaded: load it again"):
        store.read_checked(folder, "model.safetensors", calls[0])


def test_a_full_disk_leaves_the_old_run_whole(folder, monkeypatch):
    """All of the new run must lie on the disk before the first file of the old one goes."""
    written, settle = [], os.fsync

    def fsync(number):
        written.append(number)
        if len(written) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        settle(number)

    monkeypatch.setattr(os, "fsync", fsync)
    parts = {"model.safetensors": tensors(5.0), "calibration.safetensors": tensors(5.0)}
    with pytest.raises(OutputError, match="No space left"):
        store.save_run(folder, {}, parts, {"split.csv": [{"path": "a"}]}, {}, {})
    check(folder)
    assert store.read_facts(folder)["n"] == 3
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]


def test_a_disk_that_refuses_is_one_line(tmp_path):
    """A file in the way of the folder: the path and the remedy."""
    (tmp_path / "run").write_text("in the way")
    with pytest.raises(OutputError, match=r"cannot be written .*: free some space or choose"):
        store.write_checkpoint(tmp_path / "run", tensors(), {})


# No pickle, ever.


def names_in(tree):
    """Dotted names that are imported or called, and keywords that are given."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield ast.unparse(node)
        elif isinstance(node, ast.keyword) and node.arg:
            yield node.arg


FORBIDDEN = ("pickle", "cPickle", "dill", "joblib", "shelve", "marshal", "cloudpickle")


def test_no_source_reads_or_writes_pickle():
    """No torch.load or save, no pickle and its kin, no allow_pickle anywhere in the package."""
    files = sorted(Path(msvae.__file__).parent.rglob("*.py"))
    assert len(files) > 20
    for path in files:
        for name in names_in(ast.parse(path.read_text(encoding="utf-8"))):
            assert name.split(".")[0] not in FORBIDDEN, f"{path}: {name}"
            assert name not in ("torch.load", "torch.save", "allow_pickle", "np.load", "np.save")


def parsed_by_hand(path):
    """A safetensors file by its specification: header length, JSON header, raw bytes to the end."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    body = data[8 + length :]
    assert max(entry["data_offsets"][1] for entry in header.values()) == len(body)
    return {k: (v, body[slice(*v["data_offsets"])]) for k, v in header.items()}


def test_files_hold_plain_numbers(folder):
    """A safetensors file read by its specification gives the tensors; other files are text."""
    store.write_checkpoint(folder, tensors(), {"epoch": 1})
    for name in ("model.safetensors", "checkpoint.safetensors"):
        parsed = parsed_by_hand(folder / name)
        for key, value in tensors().items():
            entry, raw = parsed[key]
            assert entry["dtype"] == "F32"
            plain = np.frombuffer(raw, "<f4").reshape(entry["shape"])
            np.testing.assert_array_equal(plain, value)
    for path in folder.iterdir():
        if path.suffix not in (".safetensors", ".bin"):
            assert path.suffix in (".csv", ".json", ".xml")
            path.read_text(encoding="utf-8")


# A run that was fitted.


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with every network."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(60, 200, (40, 8, 8, 3)).astype(np.uint8)
    where = tmp_path_factory.mktemp("fitted") / "run"
    fit(list(coarse.repeat(4, axis=1).repeat(4, axis=2)), where, config=CONFIG)
    return where


def copied(run, where, change):
    """A copy of the run whose settings were changed by hand."""
    shutil.copytree(run, where)
    facts = json.loads((where / "config.json").read_text())
    change(facts)
    (where / "config.json").write_text(json.dumps(facts))
    return where


def test_a_run_names_its_numbers_and_maps(run):
    """The columns that the graph gives stand in the settings, in their order."""
    facts = json.loads((run / "config.json").read_text())
    assert facts["graph"] == {"numbers": list(NUMBERS), "maps": list(MAPS)}


def swap(facts):
    names = facts["graph"]["numbers"]
    names[0], names[1] = names[1], names[0]


CHANGES = {
    "another order": swap,
    "one less": lambda facts: facts["graph"]["maps"].pop(),
    "one more": lambda facts: facts["graph"]["numbers"].append("novelty"),
    "renamed": lambda facts: facts["graph"]["maps"].__setitem__(1, "error"),
    "none": lambda facts: facts.pop("graph"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_run_of_other_columns_is_refused(run, tmp_path, kind):
    """Columns go by name: a run of other scores, or in another order, is never read by position."""
    where = copied(run, tmp_path / "run", CHANGES[kind])
    with pytest.raises(RunError) as caught:
        load(where)
    text = str(caught.value)
    assert text == f"{where}: has other scores, statistics or maps than this msvae: fit it again"


def test_a_run_stays_small(run):
    """No tensor lies on the disk twice: the graph names the weights, and keeps what is its own once."""
    arrays = store.read_arrays(run / "model.safetensors")
    data = (run / "graph.bin").read_bytes()
    weights = [a.tobytes() for a in arrays.values() if a.nbytes >= LARGE]
    layers = ElementTree.parse(run / "graph.xml").getroot().find("layers")
    spans = {
        (int(d.attrib["offset"]), int(d.attrib["size"]))
        for d in layers.iter("data")
        if "offset" in d.attrib
    }
    own = [data[start : start + size] for start, size in spans if size >= LARGE]
    assert len(weights) > 20
    assert sum(size for _, size in spans) == len(data)
    assert len(set(own)) == len(own)
    assert not set(own) & set(weights)
    assert len(data) < 0.05 * sum(map(len, weights))
