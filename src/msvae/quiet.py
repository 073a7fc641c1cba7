"""Warnings that are no news to anybody."""

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_FILTERS = threading.Lock()  # they belong to the process: one thread at a time changes them


@contextmanager
def quiet() -> Iterator[None]:
    """Within it no warning is shown; what else the filters should do may be added."""
    with _FILTERS, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
