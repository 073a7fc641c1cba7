"""How long work reports itself without printing: the caller hands in a `Progress`."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

T = TypeVar("T")


class Progress(Protocol):
    """Watches over an iteration; `cli` gives one that draws bars, the library's own is silent."""

    def track(self, items: Iterable[T], task: str, total: int) -> Iterator[T]:
        """Yield the items one by one; `total` of them make the `task`."""
        ...

    def note(self, text: str) -> None:
        """Show a few words (the current loss, say) beside the running task."""
        ...


class Throttle:
    """Whether it is time to say something: at once, and whenever `seconds` have gone since.

    What is said of a training has to be asked of a GPU, which then works on nothing.
    """

    def __init__(self, seconds: float = 0.5) -> None:
        self.seconds, self.due = seconds, -math.inf

    def __call__(self) -> bool:
        """True if it is."""
        now = time.monotonic()
        if now < self.due:
            return False
        self.due = now + self.seconds
        return True


class NullProgress:
    """The `Progress` that shows nothing."""

    def track(self, items: Iterable[T], task: str, total: int) -> Iterator[T]:
        """Yield the items."""
        del task, total
        yield from items

    def note(self, text: str) -> None:
        """Say nothing."""


def during(progress: Progress, task: str, work: Callable[[], T]) -> T:
    """What `work` gives; while it lasts the task is shown as one step."""
    step = iter(progress.track([None], task, 1))
    next(step)
    result = work()
    next(step, None)
    return result
