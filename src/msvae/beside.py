"""One image's parts side by side on a CPU: some in the background, each on a core of its own.

Operations on a single image are too small to be shared out among the cores, whole networks are not.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import TypeVar

import torch

T = TypeVar("T")

_background: ContextVar[Executor | None] = ContextVar("background", default=None)


@lru_cache(maxsize=1)
def _pool(process: int, workers: int) -> Executor:
    """Threads that are kept, in this very process: a forked one has none of its parent's."""
    return ThreadPoolExecutor(workers, f"beside-{process}", torch.set_num_threads, (1,))


@contextmanager
def spread(images: int, device: torch.device) -> Iterator[None]:
    """Within it `ahead` computes in the background, if it is about a single image on a CPU."""
    cores = torch.get_num_threads()
    if images > 1 or device.type != "cpu" or cores < 2:
        yield
        return
    token = _background.set(_pool(os.getpid(), cores - 1))
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(cores)
        _background.reset(token)


def ahead(task: Callable[[], T]) -> Callable[[], T]:
    """What gives the task's result: begun within `spread` as soon as a core is free.

    Else, or where none was until it is called, computed then.
    """
    pool = _background.get()
    if pool is None:
        return task
    begun = pool.submit(_same_mode(task))
    return lambda: task() if begun.cancel() else begun.result()


def _same_mode(task: Callable[[], T]) -> Callable[[], T]:
    """The task in the inference mode of this thread: threads have one each."""
    inferring = torch.is_inference_mode_enabled()

    def run() -> T:
        with torch.inference_mode(inferring):
            return task()

    return run
