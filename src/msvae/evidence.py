"""What one forward pass tells of a batch: the value that flows from the model to every score."""

from typing import NamedTuple, TypedDict

from torch import Tensor


class Evidence(NamedTuple):
    """B images of C channels and H x W pixels, seen by a model of Z latents."""

    x: Tensor  # (B, C, H, W) the images, in [0, 1]
    recon: Tensor  # (B, C, H, W) decoder mean, in (0, 1)
    mu: Tensor  # (B, Z) posterior mean
    logvar: Tensor  # (B, Z) posterior log-variance
    features: tuple[Tensor, ...]  # (B, C_i, H_i, W_i) encoder maps, fine to coarse
    embedding: Tensor  # (B, E) what the nearest-neighbour score compares
    inspection: Tensor  # (B, H, W) log-odds of a defect at each pixel; (B, 0, 0) without inspector
    pretext: Tensor  # (B, 2 T) -log p of T true orders, T true turns, nats; T = 0: no companion


class Verdicts(TypedDict, total=False):
    """What the companion adds to the evidence; nothing where there is none."""

    embedding: Tensor
    pretext: Tensor
