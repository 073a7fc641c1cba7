"""A run is a folder of safetensors, JSON and CSV: versioned, checksummed, written atomically.

`config.json` is written last and holds the sha256 of every other file (but the history, which
grows while training): a folder with a `config.json` is whole, one without is not a run.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as dump_arrays

from msvae.core.errors import RunError
from msvae.core.files import as_csv, as_json, with_head, write_all, write_bytes, write_json
from msvae.core.state import Arrays, as_array

FORMAT = 7
OLDER = {
    5: "msvae 0.1.0 of commit 47b9380 reads it",
    6: "msvae 0.1.0 of commit d661e48 reads it",
}
CONFIG = "config.json"
CHECKPOINT = "checkpoint.safetensors"
REMEDY = "restore the folder from a copy, or fit it again"


def is_run(folder: Path) -> bool:
    """Whether the folder holds a finished run."""
    return (folder / CONFIG).is_file()


def save_run(
    folder: Path,
    facts: Mapping[str, Any],
    tensors: Mapping[str, Mapping[str, NDArray[Any]]],
    tables: Mapping[str, Sequence[Mapping[str, Any]]],
    documents: Mapping[str, Any],
    blobs: Mapping[str, bytes],
) -> None:
    """Write a run: tensor files, tables, documents and blobs by name, then `config.json` with `facts`.

    A run that stood there before stays whole until all of the new one lies on the disk.
    """
    contents = {name: _dump(content) for name, content in tensors.items()} | dict(blobs)
    contents |= {name: as_csv(with_head(rows)) for name, rows in tables.items()}
    contents |= {name: as_json(document) for name, document in documents.items()}
    sums = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    sums.pop("history.csv", None)  # it grows while training
    contents[CONFIG] = as_json({"format": FORMAT, **facts, "checksums": sums})
    write_all(folder, contents)


def update_run(
    folder: Path, changes: Mapping[str, Any], name: str, tensors: Mapping[str, NDArray[Any]]
) -> None:
    """Replace one tensor file of a run and some facts of its `config.json`.

    In between both the old and the new checksum are valid, so that no moment leaves a torn run.
    """
    facts = read_facts(folder)
    data = _dump(tensors)
    new = hashlib.sha256(data).hexdigest()
    old = _sha256(folder / name)  # what lies there, even after an update that was cut off
    write_json(folder / CONFIG, {**facts, "checksums": {**facts["checksums"], name: [old, new]}})
    write_bytes(folder / name, data)
    write_json(
        folder / CONFIG, {**facts, **changes, "checksums": {**facts["checksums"], name: new}}
    )


def read_facts(folder: Path) -> dict[str, Any]:
    """The content of `config.json`, its format checked."""
    path = folder / CONFIG
    if not path.is_file():
        raise RunError(f"{folder}: is not a run (no {CONFIG}): name the folder that fit wrote")
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        version = facts["format"]
        if version == FORMAT:
            _ = facts["checksums"].items(), facts["config"], facts["decision"]
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise RunError(f"{path}: cannot be read as a run's settings: {REMEDY}") from error
    if version != FORMAT:
        older = isinstance(version, int) and version < FORMAT
        reader = OLDER.get(version, "the msvae that made it reads it" if older else "update msvae")
        raise RunError(
            f"{folder}: has run format {version}, this msvae reads {FORMAT}: {reader}, or fit again"
        )
    return dict(facts)


def check_run(folder: Path, facts: Mapping[str, Any]) -> None:
    """Raise `RunError` naming the first file that is missing or differs from its checksum."""
    for name, expected in facts["checksums"].items():
        path = folder / name
        if not path.is_file():
            raise RunError(f"{path}: is missing: {REMEDY}")
        if _sha256(path) not in ([expected] if isinstance(expected, str) else expected):
            raise RunError(f"{path}: differs from its checksum: {REMEDY}")


def read_arrays(path: Path) -> Arrays:
    """The arrays of a safetensors file (a format that cannot carry code)."""
    try:
        return load_arrays(path.read_bytes())
    except (OSError, ValueError, RuntimeError) as error:
        raise RunError(f"{path}: cannot be read: {REMEDY}") from error
    except Exception as error:  # safetensors raises its own class straight from Exception
        raise RunError(f"{path}: is not a safetensors file: {REMEDY}") from error


def write_checkpoint(
    folder: Path, tensors: Mapping[str, NDArray[Any]], facts: Mapping[str, Any]
) -> None:
    """Tensors and facts in one file, so that they cannot disagree."""
    write_bytes(folder / CHECKPOINT, _dump({**tensors, "facts": pack(facts)}))


def read_checkpoint(folder: Path) -> tuple[Arrays, dict[str, Any]]:
    """What `write_checkpoint` wrote."""
    tensors = read_arrays(folder / CHECKPOINT)
    return tensors, unpack(tensors.pop("facts"))


def pack(value: Any) -> NDArray[np.uint8]:
    """JSON text as an array of bytes, to travel in a safetensors file."""
    return np.frombuffer(json.dumps(value).encode(), dtype=np.uint8)


def unpack(packed: NDArray[np.uint8]) -> Any:
    """The value that `pack` packed."""
    return json.loads(packed.tobytes())


def _dump(tensors: Mapping[str, NDArray[Any]]) -> bytes:
    return dump_arrays({k: as_array(v) for k, v in tensors.items()})


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
