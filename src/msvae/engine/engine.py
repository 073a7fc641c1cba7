"""What every engine does: run the scoring graph on pixels."""

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from msvae.core.state import Arrays

Pixels = NDArray[np.uint8]  # (B, S, S, 3)


class Outputs(NamedTuple):
    """What the graph tells of B images."""

    numbers: NDArray[np.float32]  # (B, K)
    maps: NDArray[np.float32] | None  # (B, M, S, S), where they were asked for


@dataclass(frozen=True)
class EngineInfo:
    """What computes, and how."""

    name: str  # of `choose.ENGINES`
    library: str  # with its version
    precision: str  # f32, or bf16 for the networks' wide layers
    instruction_set: str  # of the processor, or the device's name
    threads: int

    def to_json(self) -> dict[str, Any]:
        """Plain values, as they stand in `environment.json`."""
        return asdict(self)


class Engine(Protocol):
    """Runs the graph of one run."""

    @property
    def info(self) -> EngineInfo:
        """What computes, and how."""
        ...

    @property
    def workers(self) -> int:
        """How many threads may call it at the same time and gain by it."""
        ...

    def __call__(self, pixels: Pixels, with_maps: bool = False) -> Outputs:
        """Numbers, and maps if asked for, of pixels (B, S, S, 3), B >= 1."""
        ...


class Graph(Protocol):
    """The scoring graph of a run, in memory or in its folder; each form is made when it is asked for."""

    @property
    def side(self) -> int:
        """Of the images, px."""
        ...

    @property
    def key(self) -> str | None:
        """Tells it from every other graph, for the cache of compiled ones; None: not cached."""
        ...

    def torch_graph(self) -> Any:
        """The torch module (`scores.graph.ScoringGraph`), where it lies."""
        ...

    def openvino_model(self) -> Any:
        """An OpenVINO model of its own, in float32."""
        ...

    def arrays(self) -> Arrays:
        """Its tensors by name."""
        ...

    def files(self) -> dict[str, bytes]:
        """Its OpenVINO form as files."""
        ...
