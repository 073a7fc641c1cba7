"""The one switch: which engine runs a graph."""

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from msvae.core.errors import ConfigError
from msvae.engine.engine import Engine, Graph
from msvae.engine.openvino_engine import OpenVinoEngine
from msvae.engine.torch_engine import TorchEngine

ENGINES: dict[str, Callable[[Graph, bool], Engine]] = {
    "reference": TorchEngine,
    "openvino": OpenVinoEngine,
}
LIBRARIES = {"reference": "torch", "openvino": "openvino"}
AUTO = "auto"
VARIABLE = "MSVAE_ENGINE"


def engine_name(name: str | None = None) -> str:
    """The engine that is asked for: by name, else by `MSVAE_ENGINE`, else what suits this machine.

    Raises `ConfigError` for one that is unknown or whose library is absent.
    """
    asked = name or os.environ.get(VARIABLE) or AUTO
    if asked == AUTO:
        asked = "reference" if has_gpu() else "openvino"
    if asked not in ENGINES:
        raise ConfigError(
            f"no engine is called {asked!r}: choose {', '.join([AUTO, *ENGINES])} "
            f"(--engine, or {VARIABLE})"
        )
    library = LIBRARIES[asked]
    if find_spec(library) is None:
        other = next(e for e in ENGINES if e != asked)
        raise ConfigError(
            f"the engine {asked} needs {library}, which is not installed: "
            f"pip install {library}, or choose --engine {other}"
        )
    return asked


def choose(graph: Graph, name: str | None = None, bfloat16: bool = False) -> Engine:
    """The engine that runs a graph; see `engine_name`. `bfloat16` may be used where it is fast."""
    return ENGINES[engine_name(name)](graph, bfloat16)


def has_gpu() -> bool:
    """Whether torch finds a GPU; torch is not imported where the system shows no driver of one."""
    if not any(Path(p).exists() for p in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")):
        return False
    import torch

    return torch.cuda.is_available()
