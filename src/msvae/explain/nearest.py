"""The normal training images that lie nearest in the latent space."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from msvae.data.images import Pixels
from msvae.explain.explanation import Nearest

NEAREST = 4


@dataclass(frozen=True)
class References:
    """What is kept of M training images, to show the nearest normal ones and the oddest."""

    names: tuple[str, ...]
    latents: NDArray[np.float32]  # (M, Z)
    thumbnails: Pixels  # (M, 32, 32, 3)
    fused: NDArray[np.float64]  # (M,) their own fused scores


def nearest(
    references: References | None, latents: NDArray[np.float32], whiten: NDArray[np.float32]
) -> list[tuple[Nearest, ...]]:
    """The references nearest in the whitened latent space, for each of the latents (B, Z).

    `whiten` (Z, Z) is the Mahalanobis score's.
    """
    if references is None:
        return [()] * len(latents)
    own, others = latents @ whiten, references.latents @ whiten
    gaps = np.sqrt(np.square(own[:, None] - others).sum(axis=2))
    order = np.argsort(gaps, axis=1)[:, :NEAREST]
    return [
        tuple(Nearest(references.names[i], float(gap[i]), references.thumbnails[i]) for i in rows)
        for rows, gap in zip(order, gaps, strict=True)
    ]
