"""The C library's memory during a training: what a step frees, the next one takes again."""

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
    libc: Any = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not (hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim")):
        yield
        return
    libc.mallopt(MMAP, LARGEST)
    libc.mallopt(TRIM, 2**31 - 1)
    try:
        yield
    finally:
        libc.mallopt(TRIM, USUAL)
        libc.malloc_trim(0)
