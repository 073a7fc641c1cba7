"""What is kept of the training images: the nearest normal ones to show, and the oddest ones."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from msvae import store


@dataclass(frozen=True)
class References:
    """What is kept of the training images, to name the nearest normal ones."""

    names: tuple[str, ...]
    latents: Tensor  # (M, Z)
    thumbnails: Tensor  # (M, 32, 32, 3) uint8
    fused: Tensor  # (M,) their own fused scores


def to_tensors(r: References) -> dict[str, Tensor]:
    """As they stand in `references.safetensors`."""
    return {
        "names": store.pack(r.names),
        "latents": r.latents,
        "thumbnails": r.thumbnails,
        "fused": r.fused,
    }


def read(folder: Path) -> References | None:
    """Those of a run folder, where it has any."""
    path = folder / "references.safetensors"
    if not path.exists():
        return None
    t = store.read_tensors(path)
    names = tuple(store.unpack(t["names"]))
    return References(names, t["latents"], t["thumbnails"], t["fused"])
