"""Killed at any operation, the old or the new is whole; what is no file is never replaced."""

import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from kills import every_kill
from msvae.core import files, replacement
from msvae.core.errors import OutputError
from msvae.core.replacement import (
    READY,
    UNFINISHED,
    replacing,
    settle,
    sweep,
    temporary_folder,
    unfinished,
)

OLD = {"a": b"old a", "b": b"old b", "gone": b"old"}
NEW = {"a": b"new a", "b": b"new b", "c": b"new c"}


def put(folder, contents):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, data in contents.items():
        (folder / name).write_bytes(data)


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def left_over(folder):
    return [p.name for p in folder.iterdir() if p.name.startswith(UNFINISHED)]


# Kills.


def test_a_kill_at_any_operation_leaves_the_old_or_the_new_files(tmp_path):
    """Once the next process has looked, all files are the old or all are the new ones."""
    folder, sides = tmp_path / "f", []
    kills = every_kill(
        lambda: put(folder, OLD), lambda: files.write_all(folder, NEW, removed=["gone"])
    )
    for _ in kills:
        settle(folder)
        sweep(folder)
        assert contents(folder) in (OLD, NEW)
        sides.append(contents(folder) == NEW)
    assert len(sides) > 12
    assert sides == sorted(sides)  # from one operation on it is the new ones
    assert 0 < sum(sides) < len(sides)


def test_a_kill_while_another_finishes_changes_nothing(tmp_path):
    """Who finishes the replacement of a killed process may be killed too, again and again."""
    folder = tmp_path / "f"

    def cut_off():
        put(folder, OLD)
        (folder / READY).mkdir()
        for name, data in NEW.items():
            (folder / READY / name).write_bytes(data)
        (folder / READY / replacement.REMOVED).write_text("gone")

    for _ in every_kill(cut_off, lambda: settle(folder)):
        settle(folder)
        assert contents(folder) == NEW


def test_a_kill_at_any_operation_leaves_the_old_or_the_new_file(tmp_path):
    """One file by itself; what was left unfinished goes with the next one that is written."""
    path, whole = tmp_path / "f" / "file", []
    for _ in every_kill(
        lambda: put(path.parent, {"file": b"old"}), lambda: files.write_bytes(path, b"new")
    ):
        whole.append(path.read_bytes())
        replacement._swept.clear()  # as in a new process
        files.write_bytes(path.with_name("other"), b"")
        assert not left_over(path.parent)
    assert set(whole) == {b"old", b"new"}


def test_a_process_that_dies_leaves_what_the_next_one_removes(tmp_path):
    """Killed for good in the middle of a file and of several; the living are left in peace."""
    script = (
        "import os, sys; from pathlib import Path; from msvae.core import files\n"
        "os.fsync = lambda n: os._exit(9)\n"
        "files.write_bytes(Path(sys.argv[1]) / 'x', b'half') if sys.argv[2] == 'one' else "
        "files.write_all(Path(sys.argv[1]), {'x': b'half', 'y': b''})"
    )
    for kind in ("one", "all"):
        done = subprocess.run([sys.executable, "-c", script, tmp_path, kind], check=False)
        assert done.returncode == 9
        assert len(left_over(tmp_path)) == 1  # the second removes what the first left
    with unfinished(tmp_path, Path.touch) as living:
        with replacing(tmp_path) as new:
            new.write("y", b"whole")
            assert living.exists()
            assert len(left_over(tmp_path)) == 2  # the living one's and its own
        assert left_over(tmp_path) == [living.name]
    assert contents(tmp_path) == {"y": b"whole"}


def test_a_temporary_folder_goes(tmp_path, monkeypatch):
    """At its end, and what a killed process left of its own with the next one."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / f"{UNFINISHED}old").mkdir()
    (tmp_path / f"{UNFINISHED}old" / "graph.bin").touch()
    with temporary_folder() as folder:
        (folder / "x").touch()
        assert list(tmp_path.iterdir()) == [folder]
    assert not list(tmp_path.iterdir())


def test_the_last_of_two_replacements_counts(tmp_path):
    """Two that write at the same time do not mix."""
    with replacing(tmp_path) as one, replacing(tmp_path) as other:
        for new, data in ((one, b"1"), (other, b"2")):
            new.write("a", data)
            new.write("b", data)
    assert contents(tmp_path) == {"a": b"1", "b": b"1"}


def test_a_failure_leaves_the_old_files(tmp_path):
    """Broken off by an error, nothing has changed and nothing lies about."""
    put(tmp_path / "f", OLD)

    def broken_off():
        with replacing(tmp_path / "f") as new:
            new.write("a", b"new")
            raise KeyError

    with pytest.raises(KeyError):
        broken_off()
    assert contents(tmp_path / "f") == OLD


@pytest.mark.parametrize("name", ["../b", "/etc/x", "x/../../b"])
def test_a_crafted_list_removes_nothing_outside(tmp_path, name):
    """Only plain names are removed; a link in the place of the folder is not followed."""
    put(tmp_path, {"b": b"mine"})
    (tmp_path / "f" / READY).mkdir(parents=True)
    (tmp_path / "f" / READY / replacement.REMOVED).write_text(name)
    settle(tmp_path / "f")
    assert (tmp_path / "b").read_bytes() == b"mine"
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / READY).symlink_to(tmp_path)
    settle(tmp_path / "g")
    assert (tmp_path / "b").exists()


# What stands at the place.


WRITERS = {
    "one": lambda p: files.write_bytes(p, b"new"),
    "all": lambda p: files.write_all(p.parent, {p.name: b"new"}),
}
writers = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)


@writers
def test_a_symlink_is_followed(tmp_path, write):
    """The file that it names is replaced, through several links, also where it is not there yet."""
    (tmp_path / "far").mkdir()
    (tmp_path / "near").mkdir()
    link, second, target = tmp_path / "near" / "l", tmp_path / "m", tmp_path / "far" / "file"
    link.symlink_to(second)
    second.symlink_to(target)
    for _ in range(2):
        write(link)
        assert link.is_symlink()
        assert second.is_symlink()
        assert target.read_bytes() == b"new"
        target.write_bytes(b"old")
    assert [p.name for p in (*target.parent.iterdir(), *link.parent.iterdir())] == ["file", "l"]


@writers
@pytest.mark.parametrize("kind", ["folder", "socket", "loop", "folder behind a link"])
def test_what_is_no_file_is_refused(tmp_path, monkeypatch, write, kind):
    """A folder, a socket, a loop of links: one line, and all is as it was."""
    monkeypatch.chdir(tmp_path)  # the name of a socket has to be short
    path = Path("x")
    if kind == "socket":
        listening = socket.socket(socket.AF_UNIX)
        listening.bind("x")
        listening.close()
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("x" if kind == "loop" else ".")
    before = path.lstat()
    with pytest.raises(OutputError, match="x: cannot be written") as refused:
        write(path)
    assert len(str(refused.value).splitlines()) == 1
    assert os.path.samestat(path.lstat(), before)
    assert list(Path().iterdir()) == [path]


def test_a_device_is_written_into(tmp_path):
    """A terminal stays one, by its own name and by a link; among several files it is refused."""
    master, slave = os.openpty()
    try:
        link = tmp_path / "link"
        link.symlink_to(os.ttyname(slave))
        for path in (Path(os.ttyname(slave)), link):
            files.write_bytes(path, b"new\n")
            assert os.read(master, 9) == b"new\r\n"
            assert stat.S_ISCHR(path.stat().st_mode)
        with pytest.raises(OutputError, match="it is a device or a FIFO"):
            files.write_all(tmp_path, {"link": b"new"})
        assert stat.S_ISCHR(link.stat().st_mode)
    finally:
        os.close(master)
        os.close(slave)


def test_a_fifo_is_written_into(tmp_path):
    """By whoever reads it; where nobody does it is refused, and neither is it waited for."""
    fifo, expected, text = tmp_path / "fifo", b"new" * 100_000, b""
    os.mkfifo(fifo)
    with pytest.raises(OutputError, match="fifo: cannot be written"):
        files.write_bytes(fifo, b"new")
    number = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    thread = threading.Thread(target=files.write_bytes, args=(fifo, expected))
    thread.start()
    while len(text) < len(expected):
        with suppress(BlockingIOError):
            text += os.read(number, 1 << 16)
    thread.join()
    os.close(number)
    assert text == expected
    assert stat.S_ISFIFO(fifo.stat().st_mode)
    assert list(tmp_path.iterdir()) == [fifo]
