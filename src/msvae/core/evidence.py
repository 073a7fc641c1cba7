"""What one forward pass tells of a batch: the value that flows from the networks to every score."""

from typing import NamedTuple

from torch import Tensor


class Evidence(NamedTuple):
    """B images of C channels and H x W pixels, seen by networks of Z latents."""

    x: Tensor  # (B, C, H, W) the images, in [0, 1]
    recon: Tensor  # (B, C, H, W) decoder mean, in (0, 1)
    mu: Tensor  # (B, Z) posterior mean
    logvar: Tensor  # (B, Z) posterior log-variance
    features: tuple[Tensor, ...]  # (B, C_i, H_i, W_i) encoder maps, fine to coarse
    embedding: Tensor  # (B, E) what the nearest-neighbour score compares
    segmentation: Tensor  # (B, H, W) log-odds of a defect; (B, 0, 0) without a segmenter
    pretext: Tensor  # (B, 2) -log p of the true order and turn, nats; (B, 0) without the network
