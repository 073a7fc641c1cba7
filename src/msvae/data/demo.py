"""The embedded demo: tiles of three real photographs, and defects painted into some, with masks.

The photographs (gravel, grass, brick; 512 x 512, grey) ship inside scikit-image, so nothing is
fetched. Each is cut into a grid of 32 px tiles that do not overlap, and a seeded draw gives every
tile to one part only: no two images of the demo share a pixel, whichever way they are split
later, and training and test tiles are exchangeable. Defects are painted at the photograph's own
scale, before a tile is enlarged, so that sharpness does not betray them.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from msvae.core.errors import DataError
from msvae.core.progress import NullProgress, Progress
from msvae.core.replacement import replacing_tree
from msvae.data.images import Pixels

TILE = 32  # px of the photograph
TEST_GOOD = 64
EACH = 20  # anomalies of each kind
PARTED = 0.45  # cover from which a pixel of the picture counts as defect
MARK = "demo.json"  # tells a folder that this module wrote from any other
Grey = NDArray[np.float64]
Defect = Callable[[Grey, Grey, np.random.Generator], tuple[Grey, Grey]]


@dataclass(frozen=True)
class Tile:
    """One square of a photograph."""

    name: str  # "gravel_r03_c07"
    grey: Grey  # (32, 32) in [0, 1]


def scratch(tile: Grey, _: Grey, rng: np.random.Generator) -> tuple[Grey, Grey]:
    """A thin curved line with soft edges, bright or dark, fading towards its ends."""
    length, bend = rng.uniform(20, 28), rng.uniform(-5, 5)
    angle, centre = rng.uniform(0, np.pi), rng.uniform(12, 20, 2)
    along, across = _axes(angle, centre)
    way = (2 * along / length).clip(-1, 1)
    distance = np.hypot(along - way * length / 2, across - bend * (1 - way**2))
    width = rng.uniform(1.0, 1.5) * (1 - 0.4 * way**2)
    cover = _soft(distance, width, 0.6)
    tone = 0.98 if tile[cover > 0.5].mean() < rng.uniform(0.3, 0.6) else 0.02
    return _laid(tile, np.full_like(tile, tone), 0.9 * cover), cover


def stain(tile: Grey, _: Grey, rng: np.random.Generator) -> tuple[Grey, Grey]:
    """A soft-edged blot that darkens what lies under it; the texture shows through."""
    cover = _blob(rng, radius=rng.uniform(5.0, 6.4), rough=0.25, edge=1.0)
    return tile * (1 - rng.uniform(0.62, 0.75) * cover), cover


def pit(tile: Grey, _: Grey, rng: np.random.Generator) -> tuple[Grey, Grey]:
    """A hole: dark inside, deeper away from the light, with a lit rim on the far side."""
    radius, light = rng.uniform(3.8, 5.2), rng.uniform(0, 2 * np.pi)
    centre = rng.uniform(9, 23, 2)
    along, across = _axes(light, centre)
    distance = np.hypot(along, across * rng.uniform(1.0, 1.3))
    hole = _soft(distance, radius, 0.5)
    slope = 0.07 + 0.09 * (along / radius).clip(-1, 1)
    rim = np.exp(-(((distance - radius - 0.7) / 0.7) ** 2)) * (0.4 + 0.6 * (along > 0))
    lit = _laid(tile, np.full_like(tile, 0.95), 0.65 * rim)
    return _laid(lit, slope.clip(0, 1), 0.95 * hole), _soft(distance, radius + 0.8, 0.5)


def patch(tile: Grey, other: Grey, rng: np.random.Generator) -> tuple[Grey, Grey]:
    """A piece of another material, cut to an uneven outline and let in with a soft border."""
    cover = _blob(rng, radius=rng.uniform(5.6, 6.8), rough=0.3, edge=0.6)
    inside = cover > 0.5
    piece = other - other[inside].mean()
    tone = tile[inside].mean()
    step = 0.28 if tone < 0.5 else -0.28
    edge = np.exp(-(((cover - 0.5) / 0.3) ** 2)) * (cover > 0.02) * 0.35
    shadowed = tile * (1 - edge)
    return _laid(shadowed, (1.3 * piece + tone + step).clip(0, 1), cover), cover


def wear(tile: Grey, _: Grey, rng: np.random.Generator) -> tuple[Grey, Grey]:
    """A rubbed spot: the relief is gone and the surface is paler."""
    from scipy.ndimage import gaussian_filter

    cover = _blob(rng, radius=rng.uniform(5.8, 7.0), rough=0.2, edge=1.0)
    smooth = gaussian_filter(tile, 3.0)
    pale = smooth + rng.uniform(0.55, 0.7) * (0.95 - smooth)
    return _laid(tile, pale, 0.95 * cover), cover


DEFECTS: dict[str, Defect] = {
    "patch": patch,
    "pit": pit,
    "scratch": scratch,
    "stain": stain,
    "wear": wear,
}


def _axes(angle: float, centre: NDArray[np.float64]) -> tuple[Grey, Grey]:
    """Coordinates of the pixel centres along and across a direction, from a centre, in px."""
    y, x = np.mgrid[:TILE, :TILE] + 0.5
    y, x = y - centre[0], x - centre[1]
    return x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)


def _soft(distance: Grey, radius: float | Grey, edge: float) -> Grey:
    """1 within the radius, 0 beyond, by a smooth step `edge` px wide on either side."""
    t = ((radius + edge - distance) / (2 * edge)).clip(0, 1)
    step: Grey = t * t * (3 - 2 * t)
    return step


def _blob(rng: np.random.Generator, radius: float, rough: float, edge: float) -> Grey:
    """An uneven round outline: a circle with three random harmonics."""
    x, y = _axes(0.0, rng.uniform(9, 23, 2))
    angle = np.arctan2(y, x)
    waves = [rng.normal() / k * np.cos(k * angle + rng.uniform(0, 2 * np.pi)) for k in (2, 3, 5)]
    outline = radius * (1 + rough * np.sum(waves, axis=0).clip(-1.2, 1.2))
    return _soft(np.hypot(x, y), outline, edge)


def _laid(below: Grey, above: Grey, cover: Grey) -> Grey:
    return below * (1 - cover) + above * cover


def write_demo(
    out: str | Path, *, size: int = 64, seed: int = 0, progress: Progress | None = None
) -> Path:
    """An MVTec tree of lossless grey PNGs in `out`; the same for the same seed, byte for byte.

    A folder that an earlier demo wrote is replaced; `DataError` if anything else lies there.
    """
    out = Path(out)
    if out.exists() and not (out / MARK).is_file() and (out.is_file() or any(out.iterdir())):
        raise DataError(f"{out}: holds something else than a demo: choose another folder")
    try:
        with replacing_tree(out) as room:
            _write_tree(room, size, np.random.default_rng(seed), progress or NullProgress())
            facts = {"tile": TILE, "size": size, "seed": seed}
            (room / MARK).write_text(json.dumps(facts), encoding="utf-8")
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error.strerror}): choose another") from error
    return out


def _write_tree(root: Path, size: int, rng: np.random.Generator, progress: Progress) -> None:
    tiles = [t for name in ("brick", "grass", "gravel") for t in _tiles(name)]
    drawn = [tiles[i] for i in rng.permutation(len(tiles))]
    spoilt, rest = drawn[: EACH * len(DEFECTS)], drawn[EACH * len(DEFECTS) :]
    good = [("test/good", t) for t in rest[:TEST_GOOD]]
    good += [("train/good", t) for t in rest[TEST_GOOD:]]
    for part, tile in progress.track(good, "writing demo images", len(good)):
        _save(root / part / f"{tile.name}.png", _enlarged(tile.grey, size))
    for i, tile in enumerate(spoilt):
        kind = list(DEFECTS)[i % len(DEFECTS)]
        picture, mask = _spoil(kind, tile, spoilt, size, rng)
        _save(root / "test" / kind / f"{tile.name}.png", picture)
        _save(root / "ground_truth" / kind / f"{tile.name}_mask.png", mask)


def _spoil(
    kind: str, tile: Tile, pool: list[Tile], size: int, rng: np.random.Generator
) -> tuple[Pixels, Pixels]:
    """The tile with a defect, and its mask; foreign matter comes from spoilt tiles only."""
    others = [t for t in pool if t.name.split("_")[0] != tile.name.split("_")[0]]
    other = others[int(rng.integers(len(others)))]
    grey, cover = DEFECTS[kind](tile.grey, other.grey, rng)
    wide = _enlarged(cover.clip(0, 1), size, Image.Resampling.BILINEAR)
    return _enlarged(grey, size), ((wide > PARTED * 255) * 255).astype(np.uint8)


def _tiles(name: str) -> Iterator[Tile]:
    """The photograph, cut into its grid."""
    import skimage.data

    photo = np.asarray(getattr(skimage.data, name)(), dtype=np.float64) / 255
    for row in range(photo.shape[0] // TILE):
        for column in range(photo.shape[1] // TILE):
            top, left = row * TILE, column * TILE
            grey = photo[top : top + TILE, left : left + TILE]
            yield Tile(f"{name}_r{row:02d}_c{column:02d}", grey)


def _enlarged(grey: Grey, size: int, by: Image.Resampling = Image.Resampling.BICUBIC) -> Pixels:
    image = Image.fromarray((grey.clip(0, 1) * 255).round().astype(np.uint8))
    return np.asarray(image.resize((size, size), by))


def _save(path: Path, pixels: Pixels) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
