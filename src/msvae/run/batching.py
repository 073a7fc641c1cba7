"""How images are shared out among the threads that decode and score them."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice, pairwise
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")
FILES = 32  # decoded and scored by a thread at a time, at most: more take memory and gain nothing


def batch_ranges(count: int, most: int, workers: int) -> list[range]:
    """`count` images in ranges of `most`, the rest of them evenly, one range for each worker.

    Otherwise the last range keeps one worker busy while the others have nothing left to do.
    """
    full = count - count % (most * workers)
    pieces = min(workers, count - full)
    rest = [full + (count - full) * i // max(pieces, 1) for i in range(pieces + 1)]
    return [range(a, b) for a, b in pairwise([*range(0, full, most), *rest])]


def in_parallel(work: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """`work` of each item, in order, by so many threads; a single item without any."""
    source = iter(items)
    ready = list(islice(source, 2))
    if workers < 2 or len(ready) < 2:
        yield from map(work, ready)
        yield from map(work, source)
        return
    with ThreadPoolExecutor(workers, "scoring") as pool:
        waiting: deque[Future[R]] = deque(pool.submit(work, item) for item in ready)
        for item in source:
            waiting.append(pool.submit(work, item))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
