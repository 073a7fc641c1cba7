"""Where and how torch computes: the device, the precision, the batch, the threads."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice, pairwise
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from msvae.config import TrainConfig
from msvae.data.cache import decoders
from msvae.data.images import Pixels
from msvae.precision import low_pays

T = TypeVar("T")
R = TypeVar("R")

BATCH = 64  # images scored at a time, at most
WORKERS = 4  # batches scored side by side, at most: Python itself runs on one core at a time
WORK = 192 * 64**2  # pixels of such a batch: more takes memory, fewer read wide layers more often
SCANNED = 48  # files scored at a time on a CPU, at most: 64 take 30 MB more, for 4 % (LOG.md)
# Images and pixels of a batch on an NVIDIA or AMD GPU, which small ones leave idle.
GPU_BATCH, GPU_WORK = 256, 64 * 256**2


def choose_device() -> torch.device:
    """CUDA (or ROCm) where it is there, then Apple's MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps") if torch.backends.mps.is_available() else torch.device("cpu")


def compute_type(config: TrainConfig, device: torch.device) -> torch.dtype:
    """bfloat16 where it pays, unless the settings say otherwise."""
    low = low_pays(device) if config.precision == "auto" else config.precision == "bf16"
    return torch.bfloat16 if low else torch.float32


def autocast(config: TrainConfig, device: torch.device) -> torch.autocast:
    """A context, to be entered as often as wanted, in which a network trains in its precision."""
    low = compute_type(config, device) is torch.bfloat16
    return torch.autocast(device.type, torch.bfloat16, enabled=low)


def lowers(config: TrainConfig, device: torch.device) -> bool:
    """Whether weights are to have copies in bfloat16 while they train."""
    return device.type == "cpu" and compute_type(config, device) is torch.bfloat16


def to_batch(pixels: Pixels, device: torch.device) -> Tensor:
    """Pixels (B, S, S, 3) as images (B, 3, S, S) in [0, 1], channels last in memory."""
    x = torch.from_numpy(np.ascontiguousarray(pixels))
    if device.type == "cuda":  # from other memory a copy waits for all that the GPU has to do
        x = x.pin_memory()
    x = x.to(device, non_blocking=True)
    return x.permute(0, 3, 1, 2).float().div_(255)


def batch_of(side: int, device: torch.device) -> int:
    """How many images of `side` px are scored at a time."""
    most, work = (GPU_BATCH, GPU_WORK) if device.type == "cuda" else (BATCH, WORK)
    return max(1, min(most, work // side**2))


def scanned(side: int, device: torch.device) -> int:
    """How many files of images are scored at a time."""
    size = batch_of(side, device)
    return min(size, SCANNED) if device.type == "cpu" else size


def workers_on(device: torch.device) -> int:
    """How many batches are scored side by side: on a CPU as many as there are cores, a few.

    A GPU is given the next one while the CPU makes decisions of the last.
    """
    most = {"cpu": WORKERS, "cuda": 2}.get(device.type, 1)
    return min(torch.get_num_threads(), most)


@contextmanager
def decoding(device: torch.device) -> Iterator[Callable[..., Iterator[Any]]]:
    """A `map` for files: by a pool that decodes ahead, for a GPU or where a batch has several cores.

    Else each thread that scores decodes its own images: more threads than cores would push each
    other's maps out of the caches.
    """
    if device.type == "cpu" and torch.get_num_threads() <= workers_on(device):
        yield map
        return
    with ThreadPoolExecutor(decoders(), "decoding") as pool:
        yield pool.map


def shares(count: int, most: int, workers: int) -> list[range]:
    """`count` images in ranges of `most`, the rest of them evenly, one range for each worker.

    Otherwise the last range keeps one worker busy while the others have nothing left to do. All of
    one size but those: batches that differ by one image would leave the memory in pieces.
    """
    full = count - count % (most * workers)
    pieces = min(workers, count - full)
    rest = [full + (count - full) * i // max(pieces, 1) for i in range(pieces + 1)]
    return [range(a, b) for a, b in pairwise([*range(0, full, most), *rest])]


def in_parallel(
    work: Callable[[T], R], items: Iterable[T], device: torch.device, workers: int | None = None
) -> Iterator[R]:
    """`work` of each item, in order; several items at a time, each with its share of cores.

    Threads that each do a batch of their own need not wait for each other after every layer: 1.1 to
    1.3 times as fast as all of them on one batch (LOG.md). A single item has all threads.
    """
    cores = torch.get_num_threads()
    workers = workers_on(device) if workers is None else workers
    source = iter(items)
    ready = list(islice(source, 2))
    if workers < 2 or len(ready) < 2:
        yield from map(work, ready)
        yield from map(work, source)
        return
    each = max(cores // workers, 1)
    try:
        with ThreadPoolExecutor(workers, "scoring", torch.set_num_threads, (each,)) as pool:
            waiting: deque[Future[R]] = deque(pool.submit(work, item) for item in ready)
            for item in source:
                waiting.append(pool.submit(work, item))
                if len(waiting) > workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    finally:
        torch.set_num_threads(cores)  # threads made later take what was set last
