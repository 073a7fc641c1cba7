"""The C library's memory: kept during a training, given back now and then during long scoring."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

TRIM, MMAP = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of mallopt(3)
LARGEST = 32 << 20  # bytes up to which memory comes from the heap: the most that all versions take
USUAL = 64 << 20  # free bytes that glibc keeps, where it has seen memory of that size


@contextmanager
def kept() -> Iterator[None]:
    """Within it glibc gives no memory back to the system, and gives all of it back at the end.

    Otherwise each step of a training at 128 px asks for thousands of pages anew, 3 to 5 % of its
    time. Does nothing where there is no glibc.
    """
    libc = _glibc()
    if libc is None:
        yield
        return
    libc.mallopt(MMAP, LARGEST)
    libc.mallopt(TRIM, 2**31 - 1)
    try:
        yield
    finally:
        libc.mallopt(TRIM, USUAL)
        libc.malloc_trim(0)


def give_back() -> None:
    """Give the system what lies free between pieces in use.

    Threads that each take and free the maps of a batch leave their memory in pieces, which adds up
    to an eighth of it in the first ten thousand images. Does nothing where there is no glibc.
    """
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def _glibc() -> Any:
    """The C library, where it is one with these calls."""
    libc: Any = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
