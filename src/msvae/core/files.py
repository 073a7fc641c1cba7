"""Files that appear under their name whole or not at all: bytes, text, JSON and CSV."""

import codecs
import csv
import hashlib
import io
import json
import os
import secrets
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msvae.core.errors import OutputError

FORMULA = ("=", "+", "-", "@", "\t", "\r")  # how a spreadsheet's formula begins


@contextmanager
def atomic(path: Path) -> Iterator[io.BufferedWriter]:
    """A file to write into, renamed to `path` at the end; `OutputError` when the disk refuses."""
    temporary = path.with_name(f".{secrets.token_hex(8)}")
    with _told(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                yield file
                _settled(file)
            temporary.replace(path)
        finally:
            _forget(temporary)


@contextmanager
def _told(path: Path, otherwise: str = "choose another place") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written ({error.strerror}): free some space or {otherwise}"
        ) from error


def _settled(file: io.BufferedWriter) -> None:
    file.flush()
    os.fsync(file.fileno())


def _forget(temporary: Path) -> None:
    try:
        temporary.unlink(missing_ok=True)
    except OSError:  # the folder itself cannot be reached; the error under way says so
        return


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically."""
    with atomic(path) as file:
        file.write(data)


def write_all(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write several files: all lie on the disk before the first takes its place, in their order."""
    token = secrets.token_hex(8)
    waiting = {folder / name: folder / f".{token}.{i}" for i, name in enumerate(contents)}
    try:
        for path, temporary in waiting.items():
            with _told(path):
                folder.mkdir(parents=True, exist_ok=True)
                with temporary.open("wb") as file:
                    file.write(contents[path.name])
                    _settled(file)
        for path, temporary in waiting.items():
            with _told(path):
                temporary.replace(path)
    finally:
        for temporary in waiting.values():
            _forget(temporary)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically; the odd bytes of a file name go back as they came."""
    write_bytes(path, text.encode("utf-8", "surrogateescape"))


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    write_bytes(path, as_json(value))


def as_json(value: Any) -> bytes:
    """JSON as it stands in a file; a NaN is refused, since JSON has none."""
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def as_csv(rows: Iterable[Sequence[object]]) -> bytes:
    """Rows of cells as CSV; floats come back to the bit, odd bytes of file names too."""
    return b"".join(map(_csv_line, rows))


def _csv_line(row: Sequence[object]) -> bytes:
    line = io.StringIO()  # a lone \r in a cell is quoted only where the line ends hold one
    csv.writer(line, lineterminator="\r\n").writerow([_no_formula(cell) for cell in row])
    text = line.getvalue().removesuffix("\r\n") + "\n"
    return text.encode("utf-8", "surrogateescape")


def _no_formula(cell: object) -> object:
    """A name that a spreadsheet would take for a formula as the same name in this folder, `./=a.png`."""
    return f"./{cell}" if isinstance(cell, str) and cell.startswith(FORMULA) else cell


def write_table(path: Path, rows: Iterable[Sequence[object]], *, bom: bool = False) -> None:
    """Write rows of cells as CSV, atomically, each as it comes: no memory grows with their number.

    `bom` begins the file with a byte-order mark.
    """
    with atomic(path) as file:
        file.write(codecs.BOM_UTF8 if bom else b"")
        file.writelines(map(_csv_line, rows))


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows with the same keys as CSV under a line of their names."""
    write_table(path, with_head(rows))


def with_head(rows: Sequence[Mapping[str, Any]]) -> list[list[object]]:
    """The cells of rows with the same keys, under a line of their names."""
    head = list(rows[0]) if rows else []
    return [list(head), *[[row[key] for key in head] for row in rows]]


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file; none where there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


class DiskArray:
    """Arrays (B, …) of one shape and type put one after the other on disk, so that no memory grows.

    The file lies in the temporary folder without a name: it is gone with the array.
    """

    def __init__(self) -> None:
        with _told(Path(tempfile.gettempdir()), "set TMPDIR to another place"):
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 - lives until `array`
        weakref.finalize(self, self._file.close)  # also when the work in between fails
        self._count, self._like = 0, np.empty((0,), dtype=np.uint8)

    def add(self, batch: NDArray[Any]) -> None:
        """Put a batch behind the others; `OutputError` when the disk is full."""
        with _told(Path(tempfile.gettempdir()), "set TMPDIR to another place"):
            self._file.write(np.ascontiguousarray(batch).data)
            self._file.flush()
        self._count, self._like = self._count + len(batch), batch[:0]

    def array(self) -> NDArray[Any]:
        """All of them, (N, …), memory-mapped; nothing can be added afterwards."""
        with self._file as file:
            shape = (self._count, *self._like.shape[1:])
            if 0 in shape:
                return np.zeros(shape, self._like.dtype)
            return np.memmap(file, dtype=self._like.dtype, mode="r+", shape=shape)


def unique_stems(paths: Sequence[str]) -> dict[str, str]:
    """A file name for each path: its stem, with a hash of the whole path where stems collide."""
    stems = {path: Path(path).stem for path in paths}
    count = Counter(stems.values())
    return {
        path: stem
        if count[stem] == 1
        else f"{stem}-{hashlib.sha256(path.encode()).hexdigest()[:8]}"
        for path, stem in stems.items()
    }


def cache_dir() -> Path:
    """`MSVAE_CACHE`, else `msvae` in the user's cache folder."""
    if given := os.environ.get("MSVAE_CACHE"):
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "msvae"
