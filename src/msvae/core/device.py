"""Where and how torch computes: the device, the precision, the batch."""

import os

import numpy as np
import torch
from torch import Tensor

from msvae.core.config import TrainConfig
from msvae.core.processor import has_bfloat16

if hasattr(os, "register_at_fork"):  # the threads of torch's OpenMP do not survive a fork
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))

BATCH = 64  # images at a time, at most
WORK = 192 * 64**2  # pixels of such a batch: more takes memory, fewer read wide layers more often
# Images and pixels of a batch on an NVIDIA or AMD GPU, which small ones leave idle.
GPU_BATCH, GPU_WORK = 256, 64 * 256**2


def choose_device() -> torch.device:
    """CUDA (or ROCm) where it is there, then Apple's MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps") if torch.backends.mps.is_available() else torch.device("cpu")


def autocast(config: TrainConfig, device: torch.device) -> torch.autocast:
    """A context, to be entered as often as wanted, in which a network trains in its precision.

    bfloat16 where the device multiplies it faster than float32, unless the settings say otherwise.
    """
    pays = device.type == "cuda" or (device.type == "cpu" and has_bfloat16())
    low = pays if config.precision == "auto" else config.precision == "bf16"
    return torch.autocast(device.type, torch.bfloat16, enabled=low)


def to_batch(pixels: np.ndarray, device: torch.device) -> Tensor:
    """Pixels (B, S, S, 3) as images (B, 3, S, S) in [0, 1], channels last in memory."""
    x = torch.from_numpy(np.array(pixels))
    if device.type == "cuda":  # from other memory a copy waits for all that the GPU has to do
        x = x.pin_memory()
    return x.to(device, non_blocking=True).permute(0, 3, 1, 2).float().div_(255)


def batch_size(side: int, device: torch.device) -> int:
    """How many images of `side` px are looked at together."""
    most, work = (GPU_BATCH, GPU_WORK) if device.type == "cuda" else (BATCH, WORK)
    return max(1, min(most, work // side**2))
