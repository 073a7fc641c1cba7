"""A run is a folder of safetensors, JSON and CSV: versioned, checksummed, replaced in one step.

`config.json` holds the sha256 of every other file but those that change without it: the history,
which grows while training, and what a calibration leaves beside the run.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as dump_arrays

from msvae.core.errors import DataError, RunError
from msvae.core.files import as_csv, as_json, read_json, with_head, write_all, write_bytes
from msvae.core.replacement import settle
from msvae.core.state import Arrays, as_array

FORMAT = 7
OLDER = {
    5: "msvae 0.1.0 of commit 47b9380 reads it",
    6: "msvae 0.1.0 of commit d661e48 reads it",
}
CONFIG = "config.json"
CHECKPOINT = "checkpoint.safetensors"
REMEDY = "restore the folder from a copy, or fit it again"
QUARANTINE = "quarantine.csv"
CALIBRATED = "calibrated.csv"  # the images of the last calibration
UNCHECKED = ("history.csv", QUARANTINE, CALIBRATED)  # they change without config.json
PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
LARGEST = 1 << 32  # bytes of a file of a run


def is_run(folder: Path) -> bool:
    """Whether the folder holds a finished run."""
    settle(folder)
    return (folder / CONFIG).is_file()


def save_run(
    folder: Path,
    facts: Mapping[str, Any],
    tensors: Mapping[str, Mapping[str, NDArray[Any]]],
    tables: Mapping[str, Sequence[Mapping[str, Any]]],
    documents: Mapping[str, Any],
    blobs: Mapping[str, bytes],
) -> None:
    """Write a run: tensor files, tables, documents and blobs by name, and `config.json` with `facts`.

    A run that stood there before stays whole until this one is; its checkpoint goes with it.
    """
    contents = {name: _dump(content) for name, content in tensors.items()} | dict(blobs)
    contents |= {name: as_csv(with_head(rows)) for name, rows in tables.items()}
    contents |= {name: as_json(document) for name, document in documents.items()}
    sums = {name: _sum(data) for name, data in contents.items() if name not in UNCHECKED}
    contents[CONFIG] = as_json({"format": FORMAT, **facts, "checksums": sums})
    write_all(folder, contents, {CHECKPOINT, *UNCHECKED} - contents.keys())


def update_run(
    folder: Path,
    changes: Mapping[str, Any],
    name: str,
    tensors: Mapping[str, NDArray[Any]],
    beside: Mapping[str, bytes],
) -> None:
    """Replace a tensor file of a run, some facts of its `config.json`, and what a calibration leaves.

    The latter are the files `beside`; an earlier calibration's go.
    """
    facts, data = read_facts(folder), _dump(tensors)
    sums = {**facts["checksums"], name: _sum(data)}
    settings = as_json({**facts, **changes, "checksums": sums})
    contents = {**beside, name: data, CONFIG: settings}
    write_all(folder, contents, {QUARANTINE, CALIBRATED} - contents.keys())


def read_run(folder: Path) -> dict[str, Any]:
    """The facts of a run whose files are those that it names; `RunError` where one is not.

    A run that is replaced in the meantime is read anew.
    """
    while True:
        facts = read_facts(folder)
        try:
            check_run(folder, facts)
        except RunError:
            if read_facts(folder) == facts:
                raise
        else:
            return facts


def read_facts(folder: Path) -> dict[str, Any]:
    """The content of `config.json`, its format and its file names checked."""
    settle(folder)
    path = folder / CONFIG
    try:
        if not path.is_file():
            raise RunError(f"{folder}: is not a run (no {CONFIG}): name the folder that fit wrote")
        facts = read_json(path)
        version = facts["format"]
        if version == FORMAT:
            _ = facts["config"], facts["decision"]
            _check_names(path, facts["checksums"])
    except OSError as error:
        raise RunError(
            f"{path}: cannot be read ({error.strerror}): check its permissions"
        ) from error
    except (DataError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path}: cannot be read as a run's settings: {REMEDY}") from error
    if version != FORMAT:
        older = isinstance(version, int) and version < FORMAT
        reader = OLDER.get(version, "the msvae that made it reads it") if older else "update msvae"
        raise RunError(
            f"{folder}: has run format {_short(version)}, this msvae reads {FORMAT}: {reader}, "
            "or fit again"
        )
    return dict(facts)


def check_run(folder: Path, facts: Mapping[str, Any]) -> None:
    """Raise `RunError` naming the first file that is missing or differs from its checksum."""
    for name, expected in facts["checksums"].items():
        path = folder / name
        if not path.is_file():
            raise RunError(f"{path}: is missing, or no plain file: {REMEDY}")
        if path.stat().st_size > LARGEST:
            raise RunError(f"{path}: is larger than a file of a run can be: {REMEDY}")
        if _sha256(path) != expected:
            raise RunError(f"{path}: differs from its checksum: {REMEDY}")


def read_checked(folder: Path, name: str, facts: Mapping[str, Any]) -> bytes:
    """A file of a run, as it was when its facts were read."""
    try:
        data = (folder / name).read_bytes()
    except OSError as error:
        raise RunError(f"{folder / name}: cannot be read: {REMEDY}") from error
    if _sum(data) != facts["checksums"].get(name):
        raise RunError(f"{folder / name}: was replaced since the run was loaded: load it again")
    return data


def read_arrays(path: Path) -> Arrays:
    """The arrays of a safetensors file (a format that cannot carry code)."""
    try:
        return arrays_of(path.read_bytes(), path)
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {REMEDY}") from error


def arrays_of(data: bytes, path: Path) -> Arrays:
    """The arrays of the content of a safetensors file; the path is for the message."""
    try:
        return load_arrays(data)
    except Exception as error:  # safetensors raises its own class straight from Exception
        raise RunError(f"{path}: is not a safetensors file: {REMEDY}") from error


def _check_names(path: Path, sums: Mapping[Any, Any]) -> None:
    for name, value in sums.items():
        if not PLAIN_NAME.fullmatch(name) or name == CONFIG:
            raise RunError(f"{path}: names {_short(name)}, no plain file of a run: {REMEDY}")
        if not isinstance(value, str):
            raise RunError(f"{path}: has no checksum of {name}: {REMEDY}")


def _short(value: Any) -> str:
    """A value in a message: on one line, and not for ever."""
    return text if len(text := repr(value)) <= 40 else f"{text[:39]}…"


def _sum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def write_checkpoint(
    folder: Path, tensors: Mapping[str, NDArray[Any]], facts: Mapping[str, Any]
) -> None:
    """Tensors and facts in one file, so that they cannot disagree."""
    write_bytes(folder / CHECKPOINT, _dump({**tensors, "facts": pack(facts)}))


def read_checkpoint(folder: Path) -> tuple[Arrays, dict[str, Any]]:
    """What `write_checkpoint` wrote; `RunError` where the file is another."""
    tensors = read_arrays(folder / CHECKPOINT)
    try:
        return tensors, dict(unpack(tensors.pop("facts")))
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise RunError(
            f"{folder / CHECKPOINT}: is no checkpoint: remove it, and fit without --resume"
        ) from error


def pack(value: Any) -> NDArray[np.uint8]:
    """JSON text as an array of bytes, to travel in a safetensors file."""
    return np.frombuffer(json.dumps(value).encode(), dtype=np.uint8)


def unpack(packed: NDArray[np.uint8]) -> Any:
    """The value that `pack` packed."""
    return json.loads(packed.tobytes())


def _dump(tensors: Mapping[str, NDArray[Any]]) -> bytes:
    return dump_arrays({k: as_array(v) for k, v in tensors.items()})


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror}): {REMEDY}") from error
