"""A run is a folder of safetensors, JSON and CSV: versioned, checksummed, written atomically.

`config.json` is written last and holds the sha256 of every other file (but the history, which
grows while training): a folder with a `config.json` is whole, one without is not a run.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as dump_tensors
from torch import Tensor

from msvae.errors import RunError
from msvae.files import as_csv, as_json, with_head, write_all, write_bytes, write_json

FORMAT = 5
CONFIG = "config.json"
CHECKPOINT = "checkpoint.safetensors"
REMEDY = "restore the folder from a copy, or fit it again"


def is_run(folder: Path) -> bool:
    """Whether the folder holds a finished run."""
    return (folder / CONFIG).is_file()


def save_run(
    folder: Path,
    facts: Mapping[str, Any],
    tensors: Mapping[str, Mapping[str, Tensor]],
    tables: Mapping[str, Sequence[Mapping[str, Any]]],
    documents: Mapping[str, Any],
) -> None:
    """Write a run: tensor files, tables and documents by name, then `config.json` with `facts`.

    A run that stood there before stays whole until all of the new one lies on the disk.
    """
    contents = {name: _dump(content) for name, content in tensors.items()}
    contents |= {name: as_csv(with_head(rows)) for name, rows in tables.items()}
    contents |= {name: as_json(document) for name, document in documents.items()}
    sums = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    sums.pop("history.csv", None)  # it grows while training
    contents[CONFIG] = as_json({"format": FORMAT, **facts, "checksums": sums})
    write_all(folder, contents)


def update_run(
    folder: Path, changes: Mapping[str, Any], name: str, tensors: Mapping[str, Tensor]
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
        raise RunError(
            f"{folder}: has run format {version}, this msvae reads {FORMAT}: update msvae, or fit again"
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


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file (a format that cannot carry code)."""
    try:
        return load_tensors(path.read_bytes())
    except (OSError, ValueError, RuntimeError) as error:
        raise RunError(f"{path}: cannot be read: {REMEDY}") from error
    except Exception as error:  # safetensors raises its own class straight from Exception
        raise RunError(f"{path}: is not a safetensors file: {REMEDY}") from error


def write_checkpoint(folder: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Tensors and facts in one file, so that they cannot disagree."""
    write_bytes(folder / CHECKPOINT, _dump({**tensors, "facts": pack(facts)}))


def read_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_checkpoint` wrote."""
    tensors = read_tensors(folder / CHECKPOINT)
    return tensors, unpack(tensors.pop("facts"))


def pack(value: Any) -> Tensor:
    """JSON text as a tensor of bytes, to travel in a safetensors file."""
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def unpack(packed: Tensor) -> Any:
    """The value that `pack` packed."""
    return json.loads(bytes(packed.numpy()))


def _dump(tensors: Mapping[str, Tensor]) -> bytes:
    return dump_tensors({k: v.detach().cpu().contiguous() for k, v in tensors.items()})


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
