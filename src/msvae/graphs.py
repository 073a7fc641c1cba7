"""What scores images as graphs, which C++ runs without asking Python for each operation.

Python runs on one core at a time. To ask for a layer of a single image takes as long as the layer,
and two threads that both ask wait for each other: as graphs the networks of one image take half the
time (LOG.md).
"""

import inspect
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from msvae.quiet import quiet

# How often a shape has come when a graph is made for it, which takes 0.1 to 0.2 s: of single images it
# saves a third of the time, of large batches a twentieth.
OFTEN, OFTEN_MANY = 3, 16
MOST = 16  # graphs of batches for one network; single images are of one shape
IN_ALL = 128  # graphs made by a process: torch keeps 1 to 2 MB of each, even of those that are gone
RUNS = 3  # torch changes a graph after its first runs: as many must say the same
_TRACING = threading.Lock()  # torch traces in one thread of the process at a time

Work = Callable[..., Any]


class Graphs:
    """A graph for each function of tensors, and each shape of these, that comes often.

    The function is one of a Python module, or a method of a frozen network. A graph gives the same bits
    as its function, or is not used. Nor is any where gradients are wanted, or where this torch makes
    none.
    """

    in_all: ClassVar[int] = 0

    def __init__(self) -> None:
        self.seen = Counter[Any]()
        self.made: dict[Any, Work] = {}

    def __call__(self, work: Work, *given: Tensor) -> Any:
        """What the function gives for tensors (B, ...)."""
        if torch.is_grad_enabled():
            return work(*given)
        key = (work, *(x.shape for x in given))
        if key in self.made:
            return self.made[key](*given)
        told = work(*given)
        self.seen[key] += 1
        if self._due(key, len(given[0])) and _TRACING.acquire(blocking=False):
            try:
                if key not in self.made:  # by another thread meanwhile
                    self.made[key] = _graph(work, given, told) or work
                    Graphs.in_all += 1
            finally:
                _TRACING.release()
        return told

    def _due(self, key: Any, images: int) -> bool:
        if Graphs.in_all >= IN_ALL:
            return False
        if images == 1:
            return self.seen[key] >= OFTEN
        return self.seen[key] >= OFTEN_MANY and len(self.made) < MOST


SHARED = Graphs()  # of functions, which are the same for all networks


def _graph(work: Work, given: tuple[Tensor, ...], told: Any) -> Work | None:
    """The function traced on these tensors; None where that fails or gives anything but `told`."""
    try:
        with quiet():  # torch.jit is deprecated; nothing else in torch runs without Python
            graph = _traced(work, given)
        return graph if all(_same(graph(*given), told) for _ in range(RUNS)) else None
    except Exception:  # whatever torch.jit cannot do is done without it
        return None


def _traced(work: Work, given: tuple[Tensor, ...]) -> Work:
    jit: Any = torch.jit
    if not inspect.ismethod(work):
        traced: Work = jit.trace(work, given, check_trace=False, strict=False)
        return traced
    name = work.__name__
    whole = jit.trace_module(work.__self__, {name: given}, check_trace=False, strict=False)
    method: Work = getattr(whole, name)
    return method


def _same(one: Any, other: Any) -> bool:
    """Whether all tensors of both, each a tensor, tuple or dict, have the same bits."""
    pairs = zip(_tensors(one), _tensors(other), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def _tensors(told: Any) -> Iterator[Tensor]:
    if isinstance(told, Tensor):
        yield told
        return
    for part in told.values() if isinstance(told, dict) else told:
        yield from _tensors(part)
