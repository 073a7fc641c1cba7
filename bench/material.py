"""The images and models that are timed: real photographs where they are at hand, else the demo's."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from msvae.core.config import Config
from msvae.data.cache import Decoded, decode
from msvae.data.folder import find_images
from msvae.run.detector import Detector, load
from msvae.run.fit import fit

SIDES = (64, 128)
ORIGINALS = "flowers-102-original-sample"  # photographs of about 500 x 667 px
WIDE, HIGH = 667, 500
FITTED = 1200  # images behind the models that are timed: the structure map's bank is full


@dataclass(frozen=True)
class Material:
    """Where everything lies."""

    work: Path  # a folder of this run's own
    photographs: tuple[Path, ...]  # JPEG, about 500 x 667 px

    def many(self, count: int, side: int) -> Path:
        """A folder of `count` different JPEGs of `side` px: random crops of the photographs."""
        folder = self.work / f"many-{count}-{side}"
        if not folder.is_dir():
            partial = folder.with_suffix(".partial")
            partial.mkdir(parents=True)
            _crops(self.photographs, count, side, partial)
            partial.rename(folder)
        return folder

    def run(self, side: int) -> Path:
        """A run at `side` px, hardly trained: what scoring costs does not depend on that."""
        folder = self.work / f"run-{side}"
        if not (folder / "config.json").is_file():
            few = Config().replace(
                image_size=side, epochs=1, pretext_epochs=1, min_steps=30, segmenter_steps=20
            )
            fit(self.many(FITTED, side), folder, config=few, overwrite=True)
        return folder

    def detector(self, side: int) -> Detector:
        """The detector of that run."""
        return load(self.run(side))

    def decoded(self, count: int, side: int) -> Decoded:
        """`count` images from the cache on the disk."""
        paths = find_images(self.many(count, side)).paths
        return decode(paths, side, cache=self.work / "cache")


def prepare(work: Path, data_dir: Path | None) -> Material:
    """Photographs of the data folder, or enlargements of the demo's textures where it is absent.

    What msvae caches goes to the work folder from then on.
    """
    os.environ["MSVAE_CACHE"] = str(work / "cache")
    folder = None if data_dir is None else data_dir / ORIGINALS
    if folder is not None and folder.is_dir():
        return Material(work, find_images(folder).paths)
    made = work / "photographs"
    if not made.is_dir():
        made.mkdir(parents=True)
        _enlarged(made)
    return Material(work, find_images(made).paths)


def _crops(photographs: Sequence[Path], count: int, side: int, folder: Path) -> None:
    gen = np.random.default_rng(0)
    each = -(-count // len(photographs))
    for i, path in enumerate(photographs):
        with Image.open(path) as opened:
            image = opened.convert("RGB")
        for k in range(each):
            if i * each + k >= count:
                return
            size = int(gen.integers(side, min(image.size) + 1))
            left, top = (int(gen.integers(0, n - size + 1)) for n in image.size)
            crop = image.crop((left, top, left + size, top + size)).reduce(
                max(size // side // 2, 1)
            )
            crop.resize((side, side)).save(folder / f"{i:04d}-{k:04d}.jpg", quality=90)


def _enlarged(folder: Path) -> None:
    from msvae.data.demo import write_demo

    tiles = write_demo(folder.with_name("textures"))
    for i, path in enumerate(find_images(tiles / "train" / "good").paths[:240]):
        with Image.open(path) as opened:
            opened.convert("RGB").resize((WIDE, HIGH)).save(folder / f"{i:04d}.jpg", quality=85)
