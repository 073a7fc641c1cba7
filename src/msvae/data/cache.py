"""Decode once, train many times: pixels in one memory-mapped file, named by what went into it."""

import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import PIL
from numpy.typing import NDArray

from msvae.core.config import Resize
from msvae.core.errors import DataError, ImageError, OutputError
from msvae.core.files import write_json
from msvae.core.progress import NullProgress, Progress
from msvae.core.replacement import sweep, unfinished
from msvae.data.images import Pixels, Source, digest, load_image, name_of, read_bytes

VERSION = 4
WINDOW = 256  # images decoded ahead at most


class Images(Protocol):
    """Pixels (N, S, S, 3): an array, or images that stay on the disk until they are asked for."""

    def __len__(self) -> int: ...
    def __getitem__(self, at: Any) -> Pixels: ...


@dataclass(frozen=True)
class Selected:
    """Some of many images, (M, S, S, 3), copied batch by batch: the whole stays on the disk."""

    whole: Pixels  # (N, S, S, 3)
    rows: NDArray[np.int64]  # (M,)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, at: slice | NDArray[np.int64]) -> Pixels:
        return np.asarray(self.whole[self.rows[at]])


@dataclass(frozen=True)
class Decoded:
    """The images that could be read, and the reasons of the others."""

    pixels: Pixels  # (N, S, S, 3), possibly a read-only memory map
    digests: tuple[str, ...]  # sha256 of each content
    names: tuple[str, ...]
    kept: NDArray[np.int64]  # (N,) indices into the sources
    quarantine: tuple[ImageError, ...]

    def some(self, rows: Sequence[int]) -> Selected:
        """Those rows of the pixels."""
        return Selected(self.pixels, np.array(rows, dtype=np.int64))


def decode(
    sources: Sequence[Source],
    size: int,
    resize: Resize = "stretch",
    *,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Decoded:
    """Decode the sources in threads, or take them from the cache of an earlier time.

    The cache is found by the contents, so a changed file is a new entry; images in memory are not
    cached. Raises `DataError` when no image at all could be read.
    """
    progress = progress or NullProgress()
    if not len(sources):
        raise DataError("no image was given: name at least one")
    if cache is None or not all(isinstance(s, str | Path) for s in sources):
        return _decode(sources, size, resize, None, progress)
    with ThreadPoolExecutor(decoders()) as pool:
        contents = list(progress.track(pool.map(_content, sources), "reading", len(sources)))
    found = _read(cache / _key(contents, size, resize), len(sources), size)
    if found is None:
        return _decode(sources, size, resize, cache, progress)
    pixels, reasons = found
    refused = {i: ImageError(name_of(sources[i], i), reason) for i, reason in reasons}
    return _assemble(sources, pixels, contents, refused)


def decoders() -> int:
    """How many images are decoded side by side."""
    return min(os.cpu_count() or 1, 16)


def _content(source: Source) -> str:
    try:
        return digest(source)
    except ImageError as error:
        return f"unreadable: {error.reason}"


def _key(contents: Sequence[str], size: int, resize: Resize) -> str:
    """What an entry is called: everything that its pixels depend on."""
    head = f"{VERSION} {PIL.__version__} {size} {resize}\n" + "\n".join(contents)
    return hashlib.sha256(head.encode()).hexdigest()[:32]


def _decode(
    sources: Sequence[Source], size: int, resize: Resize, cache: Path | None, progress: Progress
) -> Decoded:
    store = _Store(cache, (len(sources), size, size, 3))
    contents: list[str] = []
    refused: dict[int, ImageError] = {}
    try:
        loaded = progress.track(_loaded(sources, size, resize), "decoding", len(sources))
        for i, (content, result) in enumerate(loaded):
            contents.append(content)
            if isinstance(result, ImageError):
                refused[i] = result
            else:
                store.pixels[i - len(refused)] = result
        if len(refused) == len(sources):
            raise DataError(f"none of {len(sources)} images could be read; the first: {refused[0]}")
        reasons = [(i, error.reason) for i, error in refused.items()]
        store.keep(_key(contents, size, resize), reasons)
    finally:
        store.sweep()
    return _assemble(sources, store.pixels, contents, refused)


def _assemble(
    sources: Sequence[Source],
    pixels: Pixels,
    contents: Sequence[str],
    refused: dict[int, ImageError],
) -> Decoded:
    kept = [i for i in range(len(sources)) if i not in refused]
    pixels.flags.writeable = False
    return Decoded(
        pixels[: len(kept)],
        tuple(contents[i] for i in kept),
        tuple(name_of(sources[i], i) for i in kept),
        np.array(kept, dtype=np.int64),
        tuple(refused.values()),
    )


def _loaded(
    sources: Sequence[Source], size: int, resize: Resize
) -> Iterator[tuple[str, Pixels | ImageError]]:
    """Content and pixels of each, decoded in threads, in order, a bounded number ahead."""

    def one(index: int) -> tuple[str, Pixels | ImageError]:
        source, name = sources[index], name_of(sources[index], index)
        content = ""
        try:
            if isinstance(source, str | Path):
                data = read_bytes(source)  # once: the digest is of what is decoded
                content = hashlib.sha256(data).hexdigest()
                return content, load_image(source, size, resize, name=name, data=data)
            return digest(source), load_image(source, size, resize, name=name)
        except ImageError as error:
            return content or f"unreadable: {error.reason}", error

    with ThreadPoolExecutor(decoders()) as pool:
        for first in range(0, len(sources), WINDOW):
            yield from pool.map(one, range(first, min(first + WINDOW, len(sources))))


class _Store:
    """Room for the pixels: a file of the cache under a temporary name, or memory without one.

    A cache that cannot be written costs one line of warning and nothing else.
    """

    def __init__(self, cache: Path | None, shape: tuple[int, ...]) -> None:
        self.cache = cache
        self.held = ExitStack()
        self.pixels: Pixels
        if cache is not None:
            try:
                cache.mkdir(parents=True, exist_ok=True)
                sweep(cache)
                self.raw = self.held.enter_context(unfinished(cache, Path.touch))
                _reserve(self.raw, int(np.prod(shape)))
                self.pixels = np.memmap(self.raw, np.uint8, "r+", shape=shape)
                return
            except OSError as error:
                self._warn(error)
                self.sweep()
                self.cache = None
        self.pixels = np.empty(shape, dtype=np.uint8)

    def keep(self, key: str, reasons: Sequence[tuple[int, str]]) -> None:
        """Put the entry in place: pixels first, then the facts that make it valid."""
        if self.cache is None or not isinstance(self.pixels, np.memmap):
            return
        try:
            self.pixels.flush()
            shape = list(self.pixels.shape)
            facts = {"version": VERSION, "shape": shape, "sum": _checksum(self.pixels)}
            self.raw.replace(self.cache / f"{key}.raw")
            write_json(self.cache / f"{key}.json", {**facts, "reasons": reasons})
        except (OSError, OutputError) as error:
            self._warn(error)

    def _warn(self, error: OSError | OutputError) -> None:
        reason = getattr(error.__cause__ or error, "strerror", error)
        warnings.warn(
            f"{self.cache}: cannot hold the decoded images ({reason}): going on without "
            "a cache; set MSVAE_CACHE to a folder with room",
            stacklevel=5,
        )

    def sweep(self) -> None:
        """Remove what is left under a temporary name."""
        self.held.close()


def _reserve(path: Path, count: int) -> None:
    """A file of that many bytes whose room is taken now: a map on a full disk would crash later."""
    with path.open("wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, count)
            return
        for first in range(0, count, 1 << 20):
            file.write(bytes(min(1 << 20, count - first)))


def _checksum(pixels: Pixels) -> str:
    """sha256 of the pixels; read by blocks so that the map stays on the disk."""
    sha = hashlib.sha256()
    for first in range(0, len(pixels), WINDOW):
        sha.update(np.ascontiguousarray(pixels[first : first + WINDOW]).data)
    return sha.hexdigest()


def _read(entry: Path, count: int, size: int) -> tuple[Pixels, list[tuple[int, str]]] | None:
    """The entry if it is whole; None if it is absent, torn, altered or of another version."""
    try:
        facts = json.loads(entry.with_suffix(".json").read_text(encoding="utf-8"))
        if facts["version"] != VERSION or facts["shape"] != [count, size, size, 3]:
            return None
        raw = entry.with_suffix(".raw")
        if raw.stat().st_size != count * size * size * 3:
            return None
        pixels = np.memmap(raw, np.uint8, "r", shape=(count, size, size, 3))
        if _checksum(pixels) != facts["sum"]:
            return None
        return pixels, [(int(i), str(reason)) for i, reason in facts["reasons"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
