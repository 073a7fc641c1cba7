"""Folders of small pictures, ordinary and spoilt, and the smallest settings that a run of them takes."""

import csv

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from msvae.core.config import Config

# The VAE alone: no pretext network, no segmenter.
PLAIN = Config().replace(
    image_size=32,
    hidden_dims=(8, 12),
    latent_dim=6,
    pretext=False,
    segmenter=False,
    epochs=1,
    min_steps=0,
    batch_size=8,
    target_fpr=0.2,
    precision="fp32",
)


def smooth_images(n, seed, side=32):
    """Ordinary pictures (n, side, side, 3): a few soft spots of colour, reddish."""
    gen = torch.Generator().manual_seed(seed)
    coarse = 0.3 + 0.4 * torch.rand(n, 3, 4, 4, generator=gen)
    coarse += torch.tensor([0.2, 0.0, -0.2])[:, None, None]
    fine = F.interpolate(coarse, size=(side, side), mode="bicubic").clamp(0, 1)
    return (fine * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()


def holed(n, seed, level):
    """Images with a noisy block each, of some strength, and where it is."""
    rng = np.random.default_rng(seed)
    images, masks = smooth_images(n, seed).astype(float), np.zeros((n, 32, 32), np.uint8)
    images[:, 8:20, 10:22] += level * rng.normal(size=(n, 12, 12, 3))
    masks[:, 8:20, 10:22] = 255
    return images.clip(0, 255).astype(np.uint8), masks


def write(folder, arrays, name="{:02}.png"):
    """Put the pictures into the folder, numbered."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, array in enumerate(arrays):
        Image.fromarray(array).save(folder / name.format(i))
    return folder


def read(path):
    """The rows of a CSV file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
