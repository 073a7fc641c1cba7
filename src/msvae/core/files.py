"""The forms of files: bytes, text, JSON and CSV, each written whole or not at all."""

import codecs
import csv
import hashlib
import io
import json
import os
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msvae.core.errors import DataError
from msvae.core.replacement import atomic, replacing, reported

FORMULA = ("=", "+", "-", "@", "\t", "\r")  # how a spreadsheet's formula begins
LARGEST_JSON = 1 << 24  # bytes


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically."""
    with atomic(path) as file:
        file.write(data)


def write_all(folder: Path, contents: Mapping[str, bytes], removed: Iterable[str] = ()) -> None:
    """Write several files of a folder, and remove others, in one step."""
    with replacing(folder) as new:
        for name, data in contents.items():
            new.write(name, data)
        for name in removed:
            new.remove(name)


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
    return b"".join(csv_lines(rows))


def csv_lines(rows: Iterable[Sequence[object]], *, bom: bool = False) -> Iterator[bytes]:
    """The lines of `as_csv`, each as it comes: no memory grows with their number.

    `bom` begins them with a byte-order mark, by which Excel knows that they are UTF-8.
    """
    yield codecs.BOM_UTF8 if bom else b""
    yield from map(_csv_line, rows)


def _csv_line(row: Sequence[object]) -> bytes:
    line = io.StringIO()  # a lone \r in a cell is quoted only where the line ends hold one
    csv.writer(line, lineterminator="\r\n").writerow([_no_formula(cell) for cell in row])
    text = line.getvalue().removesuffix("\r\n") + "\n"
    return text.encode("utf-8", "surrogateescape")


def _no_formula(cell: object) -> object:
    """A name that a spreadsheet would take for a formula as the same name in this folder, `./=a.png`."""
    return f"./{cell}" if isinstance(cell, str) and cell.startswith(FORMULA) else cell


def write_table(path: Path, rows: Iterable[Sequence[object]], *, bom: bool = False) -> None:
    """Write rows of cells as CSV, atomically, each as it comes; `bom` as in `csv_lines`."""
    with atomic(path) as file:
        file.writelines(csv_lines(rows, bom=bom))


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows with the same keys as CSV under a line of their names."""
    write_table(path, with_head(rows))


def with_head(rows: Sequence[Mapping[str, Any]]) -> list[list[object]]:
    """The cells of rows with the same keys, under a line of their names."""
    head = list(rows[0]) if rows else []
    return [list(head), *[[row[key] for key in head] for row in rows]]


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file; none where there is no such file. `DataError` where it is no table."""
    if not path.is_file():
        return []
    try:
        with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            reader = csv.DictReader(file, strict=True)
            rows = list(reader)
            head = reader.fieldnames or ()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}): check the path") from error
    except csv.Error as error:
        raise DataError(f"{path}: is no CSV file ({error}): restore it, or remove it") from error
    if len(set(head)) < len(head) or any(None in row or None in row.values() for row in rows):
        raise DataError(
            f"{path}: has rows of other lengths than its head: restore it, or remove it"
        )
    return rows


def read_json(path: Path) -> Any:
    """The content of a JSON file; `DataError` where it is none that can be read, or too large."""
    try:
        if not path.is_file():
            raise DataError(f"{path}: is missing, or is no plain file: check the path")
        if path.stat().st_size > LARGEST_JSON:
            raise DataError(f"{path}: is larger than a file of its kind can be: restore it")
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}): check the path") from error
    except (ValueError, RecursionError) as error:  # the latter where it is nested too deep
        raise DataError(f"{path}: is not JSON ({error}): write it again") from error


def _no_number(name: str) -> None:
    raise ValueError(f"it has a {name}")


class DiskArray:
    """Arrays (B, …) of one shape and type put one after the other on disk, so that no memory grows.

    The file lies in the temporary folder without a name: it is gone with the array.
    """

    def __init__(self) -> None:
        with reported(Path(tempfile.gettempdir()), "set TMPDIR to another place"):
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 - lives until `array`
        weakref.finalize(self, self._file.close)  # also when the work in between fails
        self._count, self._like = 0, np.empty((0,), dtype=np.uint8)

    def add(self, batch: NDArray[Any]) -> None:
        """Put a batch behind the others; `OutputError` when the disk is full."""
        with reported(Path(tempfile.gettempdir()), "set TMPDIR to another place"):
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


def cache_dir() -> Path | None:
    """`MSVAE_CACHE`, else `msvae` in the user's cache folder; None for a user without a home."""
    if given := os.environ.get("MSVAE_CACHE"):
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "msvae"
    except RuntimeError:  # neither HOME nor an entry in passwd
        return None
