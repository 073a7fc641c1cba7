"""Files that appear under their name whole or not at all: bytes, text, JSON and CSV."""

import csv
import hashlib
import io
import json
import os
import secrets
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from msvae.errors import OutputError


@contextmanager
def atomic(path: Path) -> Iterator[io.BufferedWriter]:
    """A file to write into, renamed to `path` at the end; `OutputError` when the disk refuses."""
    temporary = path.with_name(f".{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written ({error.strerror}): free some space or choose another place"
        ) from error
    finally:
        _forget(temporary)


def _forget(temporary: Path) -> None:
    try:
        temporary.unlink(missing_ok=True)
    except OSError:  # the folder itself cannot be reached; the error under way says so
        return


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically."""
    with atomic(path) as file:
        file.write(data)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically; the odd bytes of a file name go back as they came."""
    write_bytes(path, text.encode("utf-8", "surrogateescape"))


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically; a NaN is refused, since JSON has none."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_table(path: Path, rows: Sequence[Sequence[object]]) -> None:
    """Write rows of cells as CSV, atomically; floats come back to the bit."""
    text = io.StringIO()
    for row in rows:  # a lone \r in a cell is quoted only where the line ends hold one
        line = io.StringIO()
        csv.writer(line, lineterminator="\r\n").writerow(row)
        text.write(line.getvalue().removesuffix("\r\n") + "\n")
    write_text(path, text.getvalue())


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows with the same keys as CSV under a line of their names."""
    head = list(rows[0]) if rows else []
    write_table(path, [head, *[[row[key] for key in head] for row in rows]])


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file; none where there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


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
