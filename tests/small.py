"""The smallest settings under which every part of a detector exists: a fit takes a second."""

import pytest
import torch

from msvae.core.config import Config

SIDE = 32
CONFIG = Config().replace(
    image_size=SIDE,
    hidden_dims=(8, 12, 16),
    latent_dim=6,
    epochs=1,
    min_steps=0,
    pretext_epochs=2,
    segmenter_steps=2,
    batch_size=8,
    target_fpr=0.2,
    precision="fp32",
)

SAME_BITS = pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="a GPU adds up in another order, each time and in each size of batch",
)
