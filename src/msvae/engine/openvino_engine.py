"""The graph run by OpenVINO on CPUs: compiled for one image and for a few, padded between.

Results do not depend on company: every image of a batch goes through the same instructions. The
precision is always said: left alone, OpenVINO takes bfloat16 where the processor has it.
"""

import os
import threading
from typing import Any

import numpy as np

from msvae.core.errors import EngineError
from msvae.core.processor import cores, has_bfloat16, instruction_set
from msvae.engine import blobs
from msvae.engine.engine import EngineInfo, Graph, Outputs, Pixels
from msvae.engine.lower import lower

BATCH = 8  # images at a time: larger batches gain nothing, their maps leave the processor's caches
FEW = 3  # images that go one by one: a padded batch takes as long as four of them
_used_in: list[int] = []  # the process that first used OpenVINO


class OpenVinoEngine:
    """Runs a graph on the CPU."""

    def __init__(self, graph: Graph, bfloat16: bool = False) -> None:
        """`bfloat16` where it is allowed and the processor has it. Nothing is compiled yet."""
        self.graph, self.threads = graph, cores()
        self.low = bfloat16 and has_bfloat16()
        self.compiled: dict[tuple[int, bool], Any] = {}
        self.lock, self.local = threading.Lock(), threading.local()

    @property
    def workers(self) -> int:
        """One for each core."""
        return self.threads

    @property
    def info(self) -> EngineInfo:
        """What computes, and how."""
        import openvino

        precision = "bf16" if self.low else "f32"
        library = f"openvino {openvino.__version__.split('-')[0]}"
        return EngineInfo("openvino", library, precision, instruction_set(), self.threads)

    def __call__(self, pixels: Pixels, with_maps: bool = False) -> Outputs:
        """Numbers, and maps if asked for, of pixels (B, S, S, 3)."""
        size = 1 if len(pixels) <= FEW else BATCH
        request = self._request(size, with_maps)
        numbers, maps = [], []
        for first in range(0, len(pixels), size):
            part = np.ascontiguousarray(pixels[first : first + size])
            count = len(part)
            if count < size:
                part = np.concatenate([part, np.repeat(part[-1:], size - count, axis=0)])
            request.infer(part)
            numbers.append(request.get_output_tensor(0).data[:count].copy())
            if with_maps:
                maps.append(request.get_output_tensor(1).data[:count].copy())
        return Outputs(np.concatenate(numbers), np.concatenate(maps) if with_maps else None)

    def _request(self, size: int, with_maps: bool) -> Any:
        """The request of the calling thread: two threads may not share one."""
        _check_process()
        requests = self.local.__dict__.setdefault("requests", {})
        if (size, with_maps) not in requests:
            with self.lock:
                if (size, with_maps) not in self.compiled:
                    self.compiled[size, with_maps] = self._compile(size, with_maps)
            requests[size, with_maps] = self.compiled[size, with_maps].create_infer_request()
        return requests[size, with_maps]

    def _compile(self, size: int, with_maps: bool) -> Any:
        shape = (size, self.graph.side, self.graph.side, 3)
        settings = {
            "INFERENCE_PRECISION_HINT": "f32",  # what is lowered says so itself
            "INFERENCE_NUM_THREADS": self.threads,
            "NUM_STREAMS": 1 if size == 1 else self.threads,
            "ENABLE_CPU_PINNING": False,  # the machine may be another's too
        }

        def made() -> Any:
            import openvino

            model = self.graph.openvino_model()
            if not with_maps:
                model = openvino.Model([model.get_results()[0]], model.get_parameters())
            model.reshape(list(shape))
            return lower(model) if self.low else model

        key = None
        if self.graph.key is not None:
            facts = (self.graph.key, size, with_maps, *self.info.to_json().values())
            key = blobs.name_of(facts)
        return blobs.compile_or_load(made, settings, shape, key)


def _check_process() -> None:
    """Raise `EngineError` in a forked child of a process that used OpenVINO: it would wait forever."""
    if not _used_in:
        _used_in.append(os.getpid())
    if _used_in[0] != os.getpid():
        raise EngineError(
            "this process was forked from one that has scored already, and OpenVINO's threads do not "
            'survive that: start it with multiprocessing.get_context("spawn"), or set '
            "MSVAE_ENGINE=reference"
        )
