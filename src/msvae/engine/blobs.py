"""Compiled graphs kept below the user's cache folder, so that a second cold start does not compile.

A blob is named by all that it depends on: the library's version, the graph, the shape, the precision,
the processor. Beside it stand that name, its sha256 and what it gave for a known batch; one that is
broken, renamed, or gives anything else, is made anew. The least used go when all together are too
large.
"""

import hashlib
import io
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from msvae.core.errors import MsvaeError, RunError
from msvae.core.files import cache_dir, write_bytes
from msvae.core.processor import flags

MOST = 2 << 30  # bytes of all blobs together
VERSION = 1


def name_of(facts: Sequence[Any]) -> str:
    """What a blob is called that depends on these facts, the library and the processor."""
    import openvino

    whole = [VERSION, openvino.__version__, sorted(flags()), [str(fact) for fact in facts]]
    return hashlib.sha256(json.dumps(whole).encode()).hexdigest()[:32]


def compile_or_load(
    model: Callable[[], Any], settings: dict[str, Any], shape: tuple[int, ...], key: str | None
) -> Any:
    """The compiled model: the blob `key` where it serves, else what `model` gives, kept under it."""
    import openvino

    core = openvino.Core()
    cache = cache_dir()
    path = None if key is None or cache is None else cache / "engine" / f"{key}.blob"
    if path is not None:
        compiled = _loaded(core, path, settings, shape)
        if compiled is not None:
            return compiled
    try:
        compiled = core.compile_model(model(), "CPU", settings)
    except RuntimeError as error:
        raise RunError(
            "OpenVINO cannot compile the graph of the run: fit it again, or use --engine reference"
        ) from error
    if path is not None:
        _keep(compiled, path, shape)
    return compiled


def _loaded(core: Any, path: Path, settings: dict[str, Any], shape: tuple[int, ...]) -> Any:
    """The blob's compiled model; None where it is absent, broken, or answers otherwise."""
    try:
        facts = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        data = path.read_bytes()
        if (facts["name"], facts["sha256"]) != (path.stem, hashlib.sha256(data).hexdigest()):
            return None
        compiled = core.import_model(io.BytesIO(data), "CPU", settings)
        if not np.allclose(_answer(compiled, shape), facts["answer"], rtol=1e-4, atol=1e-6):
            return None
        os.utime(path)
        return compiled
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):
        return None


def _keep(compiled: Any, path: Path, shape: tuple[int, ...]) -> None:
    """Write the blob; a cache that cannot be written is done without."""
    try:
        data = compiled.export_model().getvalue()
        sha256, answer = hashlib.sha256(data).hexdigest(), _answer(compiled, shape)
        facts = {"name": path.stem, "sha256": sha256, "answer": answer}
        write_bytes(path, data)
        write_bytes(path.with_suffix(".json"), json.dumps(facts).encode())
        _prune(path.parent)
    except (OSError, RuntimeError, MsvaeError):
        return


def _answer(compiled: Any, shape: tuple[int, ...]) -> list[float]:
    """The first output for a known batch."""
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    values: list[float] = compiled.create_infer_request().infer(pixels)[0].ravel().tolist()
    return values


def _prune(folder: Path) -> None:
    """Remove the blobs that were used longest ago until the others are no more than `MOST` bytes."""
    newest = sorted(folder.glob("*.blob"), key=lambda p: p.stat().st_mtime, reverse=True)
    total = 0
    for path in newest:
        total += path.stat().st_size
        if total > MOST and path != newest[0]:
            path.unlink(missing_ok=True)
            path.with_suffix(".json").unlink(missing_ok=True)
