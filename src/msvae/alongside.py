"""Two trainings side by side on a CPU, each on half of the cores.

Operations on a small batch leave cores idle when they are shared out among them; two networks that
have nothing to do with each other do not.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch

LAG = 3  # of the caller's steps that the other training may be behind
Reached = Callable[[int], None]


def alone(steps: int) -> None:
    """The `Reached` of a training with nothing beside it."""
    del steps


@contextmanager
def alongside(step: Callable[[], bool], pace: float, device: torch.device) -> Iterator[Reached]:
    """Lend half of the cores to another training while the caller's own goes on.

    Before each of its steps the caller says how many there will be with it; of the other's there are
    `pace` times as many by then, or a few less. `step` does one of these and tells whether more are
    left; once none is, the caller has all cores. Which step runs on how many cores depends on these
    numbers alone, not on which of the two is faster: how a sum is rounded depends on the threads
    that share it. Where there are no cores to share, nothing is done beside.
    """
    cores = torch.get_num_threads()
    if device.type != "cpu" or cores < 2:
        yield alone
        return
    half = cores // 2
    with ThreadPoolExecutor(1, "alongside", torch.set_num_threads, (half,)) as pool:
        other = _Other(step, pace, pool, cores)
        torch.set_num_threads(cores - half)
        try:
            yield other.reached
            other.catch_up()
        finally:  # after an interruption at once
            other.stopped = True
            torch.set_num_threads(cores)


class _Other:
    """The other training: its steps are given to the pool in shares, one for each of the caller's."""

    def __init__(
        self, step: Callable[[], bool], pace: float, pool: ThreadPoolExecutor, cores: int
    ) -> None:
        self.step, self.pace, self.pool, self.cores = step, pace, pool, cores
        self.waiting: deque[Future[bool]] = deque()
        self.asked = 0  # shares
        self.stopped, self.over = False, False

    def reached(self, steps: int) -> None:
        """Ask for what belongs to these steps of the caller, and wait for what is late."""
        while self.asked < steps and not self.over:
            count = int((self.asked + 1) * self.pace) - int(self.asked * self.pace)
            self.waiting.append(self.pool.submit(self._share, count))
            self.asked += 1
            if len(self.waiting) > LAG:
                self._wait()

    def catch_up(self) -> None:
        """Wait for all that was asked for."""
        while self.waiting:
            self._wait()

    def _wait(self) -> None:
        if not self.waiting.popleft().result():
            self.over = True
            self.waiting.clear()  # they find nothing left to do
            torch.set_num_threads(self.cores)

    def _share(self, count: int) -> bool:
        """Do so many steps; whether any are left."""
        return all(not self.stopped and self.step() for _ in range(count))
