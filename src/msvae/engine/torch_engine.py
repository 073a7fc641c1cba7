"""The reference: the graph run by torch, on a GPU where there is one."""

from typing import Any

import numpy as np

from msvae.engine.engine import EngineInfo, Graph, Outputs, Pixels


class TorchEngine:
    """Runs the torch module itself, in float32, on the device where it lies."""

    workers = 1  # torch shares a batch out among the cores itself

    def __init__(self, graph: Graph, bfloat16: bool = False) -> None:  # noqa: ARG002
        """Of the graph's torch module; whether bfloat16 is allowed changes nothing here."""
        from msvae.core.device import batch_size

        self.module: Any = graph.torch_graph()
        self.device = next(self.module.parameters()).device
        self.batch = batch_size(graph.side, self.device)

    @property
    def info(self) -> EngineInfo:
        """What computes, and how."""
        import torch

        from msvae.core.processor import instruction_set

        on_gpu = self.device.type == "cuda"
        where = torch.cuda.get_device_name(self.device) if on_gpu else instruction_set()
        library = f"torch {torch.__version__}"
        return EngineInfo("reference", library, "f32", where, torch.get_num_threads())

    def __call__(self, pixels: Pixels, with_maps: bool = False) -> Outputs:
        """Numbers, and maps if asked for, of pixels (B, S, S, 3)."""
        import torch

        numbers, maps = [], []
        with torch.inference_mode():
            for first in range(0, len(pixels), self.batch):
                part = torch.from_numpy(np.array(pixels[first : first + self.batch]))
                some, drawn = self.module(part.to(self.device))
                numbers.append(some.cpu().numpy())
                if with_maps:
                    maps.append(drawn.cpu().numpy())
        return Outputs(np.concatenate(numbers), np.concatenate(maps) if with_maps else None)
