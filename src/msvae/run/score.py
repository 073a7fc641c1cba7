"""Images -> scores and maps: decoding, the engine and the verdict, batch by batch; no torch."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msvae.core.config import Resize
from msvae.core.errors import DataError, ImageError, RunError
from msvae.core.files import DiskArray
from msvae.core.progress import NullProgress, Progress
from msvae.data.images import Pixels, Source, load_image, name_of
from msvae.engine.engine import Engine
from msvae.evaluation.table import ScoreTable
from msvae.run.batching import FILES, batch_ranges, in_parallel
from msvae.scores.catalog import MAPS, NUMBERS
from msvae.scores.verdict import Scores, Verdict

Maps = dict[str, NDArray[np.float32]]  # each (B, S, S), or (S, S) of one image
EachMap = Callable[[str, Maps], None]  # the image's name, its maps (S, S)
Batch = Pixels | Callable[[], Pixels]  # (B, S, S, 3), or what gives them to the thread that scores


@dataclass(frozen=True)
class Scan:
    """The outcome of scoring many images: a row for each that was read, a reason for the others."""

    table: ScoreTable
    quarantine: tuple[ImageError, ...]
    maps: Maps = field(default_factory=dict)  # each (N, S, S), model's resolution, memory-mapped


def scan_sources(
    engine: Engine,
    verdict: Verdict,
    sources: Sequence[Source],
    size: int,
    resize: Resize,
    *,
    with_maps: bool = False,
    each_map: EachMap | None = None,
    progress: Progress | None = None,
) -> tuple[list[str], Scores, Maps, list[ImageError]]:
    """Names, scores and maps of the images that can be used, and the reasons of the others.

    Raises `DataError` where none can.
    """
    if not len(sources):
        raise DataError("no image was given: name at least one")
    reading = ImageReader(sources, size, resize, progress or NullProgress())
    names = reading.names()

    def hand_out(maps: Maps) -> None:
        for i in range(len(maps["fused"])):
            if each_map is not None:
                each_map(next(names), {k: v[i] for k, v in maps.items()})

    scores, maps = score_batches(
        engine,
        verdict,
        map(reading.batch, batch_ranges(len(sources), FILES, engine.workers)),
        with_maps=with_maps,
        each=None if each_map is None else hand_out,
    )
    refused = reading.refused()
    if not scores:
        raise DataError(f"none of {len(sources)} images could be read, first {refused[0]}")
    return list(reading.names()), scores, maps, refused


def score_batches(
    engine: Engine,
    verdict: Verdict,
    batches: Iterable[Batch],
    *,
    with_maps: bool = False,
    each: Callable[[Maps], None] | None = None,
) -> tuple[Scores, Maps]:
    """Every score (N,), and every map (N, S, S) if asked for, of batches that may be empty.

    The maps lie on disk, memory-mapped; `each` is called with those of each batch, in order.
    """
    drawing = with_maps or each is not None
    columns: dict[str, list[NDArray[np.float64]]] = {}
    arrays: dict[str, DiskArray] = {}

    def work(batch: Batch) -> tuple[Scores, Maps]:
        pixels = batch() if callable(batch) else batch
        if not len(pixels):
            return {}, {}
        numbers, maps = engine(pixels, drawing)
        drawn = {} if maps is None else dict(zip(MAPS, maps.transpose(1, 0, 2, 3), strict=True))
        if numbers.shape != (len(pixels), len(NUMBERS)):
            raise RunError("the graph of the run gives other numbers than its scores: fit it again")
        check_finite(numbers, *drawn.values())
        with np.errstate(all="ignore"):  # what a broken run makes of them is refused
            scores = verdict(numbers)
        check_finite(*scores.values())
        return scores, drawn

    for scores, maps in in_parallel(work, batches, engine.workers):
        for name, column in scores.items():
            columns.setdefault(name, []).append(column)
        if each is not None and maps:
            each(maps)
        if with_maps:
            for name, values in maps.items():
                arrays.setdefault(name, DiskArray()).add(values)
    joined = {name: np.concatenate(parts) for name, parts in columns.items()}
    return joined, {name: array.array() for name, array in arrays.items()}


def check_finite(*arrays: NDArray[np.floating[Any]]) -> None:
    """Raise `RunError` where a run gives anything that is no finite number: none may be served."""
    if not all(np.isfinite(array).all() for array in arrays):
        raise RunError("the run gives scores that are no finite numbers: fit it again")


class ImageReader:
    """Images that are decoded batch by batch: their names, or the reasons why they cannot be used."""

    def __init__(
        self, sources: Sequence[Source], size: int, resize: Resize, progress: Progress
    ) -> None:
        """Nothing is decoded before a batch is asked for."""
        self.sources, self.size, self.resize = sources, size, resize
        self.results: list[str | ImageError] = [""] * len(sources)
        self.lock = Lock()
        self.ticks = iter(progress.track(range(len(sources)), "scoring", len(sources)))

    def batch(self, chunk: range) -> Callable[[], Pixels]:
        """What gives the pixels (B, S, S, 3) of those of a range that can be used."""

        def pixels() -> Pixels:
            usable = [image for image in map(self._decoded, chunk) if image is not None]
            empty = np.empty((0, self.size, self.size, 3), np.uint8)
            return np.stack(usable) if usable else empty

        return pixels

    def _decoded(self, index: int) -> Pixels | None:
        pixels = None
        try:
            name = name_of(self.sources[index], index)
            pixels = load_image(self.sources[index], self.size, self.resize, name=name)
            self.results[index] = name
        except ImageError as error:
            self.results[index] = error
        with self.lock:
            next(self.ticks, None)
        return pixels

    def names(self) -> Iterator[str]:
        """Of those that can be used, in order, as far as they have been decoded."""
        return (result for result in self.results if isinstance(result, str))

    def refused(self) -> list[ImageError]:
        """Why others cannot, in order; nothing is left to be decoded."""
        with self.lock:
            next(self.ticks, None)
        return [result for result in self.results if isinstance(result, ImageError)]
