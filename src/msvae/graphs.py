"""Networks that score as graphs, which C++ runs without asking Python for each layer.

Python runs on one core at a time. To ask for a layer of a single image takes as long as the layer,
and two threads that both ask wait for each other: as graphs the networks of one image take half the
time (LOG.md).
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from msvae.quiet import quiet

# How often a shape has come when a graph is made for it, which takes 0.2 s: of single images it saves
# a third of the time, of large batches a twentieth.
OFTEN, OFTEN_MANY = 3, 32
MOST = 16  # graphs kept

Work = Callable[[Tensor], Any]


class Graphs:
    """A graph for each method of a frozen network and each shape of images that comes often.

    What a graph says is what the method says, to the bit: one that does not is not used. Nor is any
    where gradients are wanted, or where this torch makes none.
    """

    def __init__(self) -> None:
        self.seen = Counter[Any]()
        self.made: dict[Any, Work] = {}
        self.making = threading.Lock()

    def __call__(self, part: nn.Module, method: str, x: Tensor) -> Any:
        """What the method of the network says of images (B, 3, S, S)."""
        work: Work = getattr(part, method)
        if torch.is_grad_enabled():
            return work(x)
        key = (id(part), method, *x.shape)
        if key in self.made:
            return self.made[key](x)
        self.seen[key] += 1
        often = OFTEN if len(x) == 1 else OFTEN_MANY
        due = self.seen[key] >= often and len(self.made) < MOST
        if not due or not self.making.acquire(blocking=False):  # one thread at a time may trace
            return work(x)
        try:
            told = work(x)
            self.made[key] = _graph(part, method, x, told) or work
        finally:
            self.making.release()
        return told


def _graph(part: nn.Module, method: str, x: Tensor, told: Any) -> Work | None:
    """The method traced on these images; None where that fails or says anything but `told`."""
    try:
        with quiet():  # torch.jit is deprecated; nothing else in torch runs without Python
            traced: Any = torch.jit.trace_module(
                part, {method: (x,)}, check_trace=False, strict=False
            )
        graph: Work = getattr(traced, method)
        pairs = zip(_tensors(graph(x)), _tensors(told), strict=True)
        return graph if all(torch.equal(a, b) for a, b in pairs) else None
    except Exception:  # whatever torch.jit cannot do is done without it
        return None


def _tensors(told: Any) -> Iterator[Tensor]:
    """All tensors of a tensor, tuple or dict."""
    if isinstance(told, Tensor):
        yield told
        return
    for part in told.values() if isinstance(told, dict) else told:
        yield from _tensors(part)
