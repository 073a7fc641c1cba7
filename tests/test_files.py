"""A file appears whole or not at all; what stood there before stays until then."""

import errno
import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msvae.core import files
from msvae.core.errors import OutputError
from msvae.core.files import DiskArray


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


WRITERS = {
    "bytes": lambda p: files.write_bytes(p, b"\x00\xffnew"),
    "text": lambda p: files.write_text(p, "nouveau é"),
    "json": lambda p: files.write_json(p, {"new": [1, 2.5, None]}),
    "table": lambda p: files.write_table(p, [["a", "b"], [1, 0.1]]),
    "rows": lambda p: files.write_rows(p, [{"a": 1, "b": 0.1}]),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_files_are_written_whole(tmp_path, writer):
    """New or over an old one, in folders that are made on the way; nothing else is left there."""
    path = tmp_path / "deep" / "er" / "file"
    WRITERS[writer](path)
    first = path.read_bytes()
    path.write_bytes(b"old and much longer " * 99)
    WRITERS[writer](path)
    assert path.read_bytes() == first
    assert list(path.parent.iterdir()) == [path]


def test_what_is_written_is_what_is_read(tmp_path):
    """The bytes themselves, UTF-8, JSON and CSV."""
    path = tmp_path / "f"
    files.write_bytes(path, b"\x00\r\n\xff")
    assert path.read_bytes() == b"\x00\r\n\xff"
    files.write_text(path, "é\r\n☃")
    assert path.read_bytes() == "é\r\n☃".encode()
    files.write_json(path, {"a": [0.1, None, "é"]})
    assert json.loads(path.read_bytes()) == {"a": [0.1, None, "é"]}
    files.write_table(path, [["a", "b"], [0.1, 'x, "y"']])
    assert path.read_text() == 'a,b\n0.1,"x, ""y"""\n'


@pytest.mark.parametrize("step", ["fsync", "replace", "open"])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, writer, step):
    """No room at any moment: one line with the remedy, the old file as it was, no temporary."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    monkeypatch.setattr(*((os, "fsync") if step == "fsync" else (Path, step)), full)
    with pytest.raises(OutputError) as refused:
        WRITERS[writer](path)
    monkeypatch.undo()
    message = str(refused.value)
    assert message.startswith(f"{path}: cannot be written (No space left on device): free some")
    assert len(message.splitlines()) == 1
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_no_new_file(tmp_path, monkeypatch):
    """Where nothing stood before, nothing stands after."""
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError):
        files.write_text(tmp_path / "file", "new")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, OSError(errno.EIO, "I/O error")])
def test_broken_off_in_the_middle(tmp_path, error):
    """Interrupted while writing, the old file stays whole and no half one lies beside it."""
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def broken_off():
        with files.atomic(path) as file:
            file.write(b"half of ")
            raise error

    with pytest.raises(OutputError if isinstance(error, OSError) else error):
        broken_off()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_name_holds_the_old_file_until_the_end(tmp_path):
    """A reader who comes while it is written finds the old content, whole."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with files.atomic(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


def test_the_content_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Synced while the temporary still has its own name, with all bytes in it."""
    path, seen, sync = tmp_path / "file", [], os.fsync

    def watched(number):
        seen.append((os.fstat(number).st_size, path.exists()))
        sync(number)

    monkeypatch.setattr(os, "fsync", watched)
    files.write_bytes(path, b"x" * 100_000)
    assert seen == [(100_000, False)]


def test_a_place_that_cannot_be_is_named(tmp_path):
    """A file where a folder should be, or a folder where the file should be."""
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "below", tmp_path / "folder"):
        with pytest.raises(OutputError, match=f"{path.name}: cannot be written"):
            files.write_text(path, "new")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "folder"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object()])
def test_what_json_does_not_know_is_refused(tmp_path, value):
    """A NaN never reaches a file that others must parse; the old file stays."""
    path = tmp_path / "f.json"
    path.write_text("{}")
    with pytest.raises((ValueError, TypeError)):
        files.write_json(path, {"a": value})
    assert path.read_text() == "{}"


cells = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
names = st.lists(cells.filter(bool), min_size=1, max_size=4, unique=True)


@settings(max_examples=100, deadline=None)
@given(names, st.data())
def test_rows_come_back(tmp_path_factory, head, data):
    """Any text in any cell, line breaks and quotes too; and every float to the bit.

    But for text that a spreadsheet would take for a formula: as a name in this folder.
    """
    path = tmp_path_factory.getbasetemp() / "rows.csv"
    value = st.one_of(cells, st.floats(allow_nan=False), st.integers())
    rows = data.draw(st.lists(st.fixed_dictionaries(dict.fromkeys(head, value)), min_size=1))
    files.write_rows(path, rows)
    back = files.read_rows(path)
    assert back == [{no_formula(k): no_formula(v) for k, v in row.items()} for row in rows]
    for row, read in zip(rows, back, strict=True):
        cells_read = [read[no_formula(k)] for k, v in row.items() if type(v) is float]
        assert [float(x).hex() for x in cells_read] == [
            v.hex() for v in row.values() if type(v) is float
        ]


def no_formula(cell):
    """Text that begins like a formula begins with ./ instead; numbers may be negative."""
    odd = isinstance(cell, str) and cell.startswith(tuple("=+-@\t\r"))
    return f"./{cell}" if odd else str(cell)


def test_no_rows(tmp_path):
    """An absent file has none; neither has one that was written without any."""
    assert files.read_rows(tmp_path / "absent.csv") == []
    files.write_rows(tmp_path / "empty.csv", [])
    assert files.read_rows(tmp_path / "empty.csv") == []


def test_a_disk_array_gives_back_what_was_put_in():
    """Batches come back in order, mapped rather than held; an empty batch changes nothing."""
    rng = np.random.default_rng(0)
    batches = [rng.normal(size=(n, 5, 7)).astype(np.float32) for n in (3, 0, 4)]
    array = DiskArray()
    for batch in batches:
        array.add(batch.swapaxes(1, 2))
    found = array.array()
    assert isinstance(found, np.memmap)
    np.testing.assert_array_equal(found, np.concatenate(batches).swapaxes(1, 2))
    assert DiskArray().array().shape == (0,)


def test_a_disk_array_that_is_given_up_leaves_nothing_open():
    """Where the work between its batches fails, its file goes with it."""
    array = DiskArray()
    array.add(np.zeros((1, 2)))
    file = array._file
    del array
    assert file.closed


def test_a_full_disk_stops_a_disk_array_with_a_remedy(monkeypatch):
    """The temporary folder is named, as is what to do."""
    array = DiskArray()
    array._file.close()
    monkeypatch.setattr(array, "_file", SimpleNamespace(write=full))
    with pytest.raises(OutputError, match="No space left"):
        array.add(np.zeros((1, 2)))
