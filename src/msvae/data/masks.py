"""Masks: what one marks, and which picture it belongs to.

Anything that is not background (0, or transparent) is defect, at any depth and in any mode. A mask lies
beside its picture under a mask's name, or in a folder of masks at the picture's place.
"""

import glob
import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from msvae.core.config import Resize
from msvae.core.errors import DataError, ImageError
from msvae.data.images import decoded, is_image, open_image, read_bytes, squared

NAMES = ("_mask", "_label", "_gt", ".mask")  # after the stem of a picture: its mask
FOLDERS = ("ground_truth", "masks")
ABOVE = 4  # folders above a picture that may hold a folder of masks
WITH_ALPHA = ("LA", "RGBA", "PA", "La", "RGBa")
PLAIN = ("1", "L", "P", "RGB", "I", "F", "I;16", "I;16L", "I;16B", "I;16N")
LOSSY = 64  # of 255: below it is what JPEG leaves of black
Mask = NDArray[np.bool_]


def load_mask(path: str | Path, size: int, resize: Resize = "stretch") -> Mask:
    """The mask at `size` x `size`: true where at least half of the block is marked.

    A mask that would vanish so keeps its pixels of largest coverage. Of a folder the masks in it are
    joined. One that marks the whole picture is warned of. Raises `ImageError`.
    """
    files = sorted(filter(is_image, Path(path).iterdir())) if Path(path).is_dir() else [Path(path)]
    marks = [squared(Image.fromarray(marked(file)), resize) for file in files]
    if len({mark.size for mark in marks}) > 1:
        raise ImageError(str(path), "holds masks of several sizes: one picture has one")
    mask = np.any([np.asarray(mark) for mark in marks], axis=0)
    if mask.all():
        warnings.warn(f"{path}: marks the whole picture: is it a mask?", stacklevel=2)
    cover = _shares(mask.shape[0], size) @ mask @ _shares(mask.shape[1], size).T
    half: Mask = cover >= 0.5 - 1e-6
    return half if half.any() or not cover.max() else cover >= cover.max() - 1e-6


def marked(path: Path) -> Mask:
    """Which pixels of a mask file are defect, (H, W): by index of a palette, else by any channel.

    Black on transparent ground is defect too, where nothing else is. Raises `ImageError`.
    """
    data, name = read_bytes(path), str(path)
    image = decoded(data, name)
    if image.mode not in (*PLAIN, *WITH_ALPHA):  # inks, and the like
        image = open_image(path, data=data)
    values = np.asarray(image)
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ImageError(name, "is a mask with values that are not finite (NaN or infinity)")
    colours = values[..., :-1] if image.mode in WITH_ALPHA else values
    coloured = colours > (LOSSY if data.startswith(b"\xff\xd8") else 0)
    clear = _transparent(image, values)
    mask: Mask = (coloured.any(axis=2) if coloured.ndim == 3 else coloured) & ~clear
    if mask.any():
        return mask
    if _is_deep(data):
        raise ImageError(name, "has 16 bits a channel, of which 8 are read: save the mask as grey")
    return ~clear if clear.any() else mask


def _transparent(image: Image.Image, values: NDArray[Any]) -> Mask:
    """Which pixels are, (H, W): by the alpha channel, or by a palette's or colour's entry."""
    if image.mode in WITH_ALPHA:
        clear: Mask = values[..., -1] == 0
        return clear
    entry = image.info.get("transparency")
    if isinstance(entry, bytes) and image.mode == "P":
        opacity = np.frombuffer(entry[:256].ljust(256, b"\xff"), np.uint8)
        return opacity[values] == 0
    if isinstance(entry, int | tuple):
        same = values == np.asarray(entry)
        return same.all(axis=2) if same.ndim == 3 else same
    return np.zeros(values.shape[:2], bool)


def _is_deep(data: bytes) -> bool:
    """Whether a PNG has colours of 16 bits a channel: bytes 24 and 25 of its header."""
    return data.startswith(b"\x89PNG") and data[24:25] == b"\x10" and data[25:26] != b"\0"


def _shares(length: int, size: int) -> NDArray[np.float64]:
    """Which share of each of `size` equal blocks each of `length` pixels fills, (size, length)."""
    edges = np.arange(size + 1) * (length / size)
    pixel = np.arange(length)
    first = np.maximum(edges[:-1, None], pixel)
    last = np.minimum(edges[1:, None], pixel + 1)
    shares: NDArray[np.float64] = (last - first).clip(0) / (length / size)
    return shares


def picture_stem(stem: str) -> str | None:
    """The stem of the picture whose mask is called so; None for a name that is no mask's."""
    ending = next((e for e in NAMES if stem.endswith(e) and stem != e), None)
    return None if ending is None else stem.removesuffix(ending)


def without_masks(names: Sequence[str], root: Path, pngs: bool) -> list[str]:
    """The pictures among files below `root`: no masks beside a picture, none in folders of masks.

    `pngs` takes a PNG beside another image of its stem for a mask, too.
    """
    stems = {name.rpartition(".")[0] for name in names}
    others = {n.rpartition(".")[0] for n in names if not n.lower().endswith(".png")}
    pictures = []
    for name in names:
        stem = name.rpartition(".")[0]
        in_masks = any(p in FOLDERS for p in Path(name).relative_to(root).parts[:-1])
        own = picture_stem(stem)
        beside = pngs and name.lower().endswith(".png") and stem in others
        if not (in_masks or (own is not None and own in stems) or beside):
            pictures.append(name)
    return pictures


def pair(pictures: Sequence[Path], root: Path, masks: Path) -> tuple[dict[Path, Path], list[Path]]:
    """The mask of each picture below `root` that has one in the folder `masks`, and masks of none.

    By the same relative path first: a file, or a folder of several that are joined (MVTec LOCO). Else by
    the stem. Raises `DataError` where two masks, or two pictures, would do.
    """
    by_place, by_stem, in_folder = (defaultdict[Any, list[Path]](list) for _ in range(3))
    for file in _files_below(masks):
        stem = picture_stem(file.stem) or file.stem
        by_stem[stem].append(file)
        by_place[file.parent / stem].append(file)
        in_folder[file.parent].append(file)
    same = Counter(picture.stem for picture in pictures)
    pairs, used = dict[Path, Path](), set[Path]()
    for picture in pictures:
        place = masks / picture.relative_to(root).with_suffix("")
        at_place = by_place.get(place, [])
        candidates = at_place or by_stem.get(picture.stem, [])
        if place in in_folder and not at_place:
            pairs[picture] = place
            used |= set(in_folder[place])
            continue
        if len(candidates) > 1:
            raise DataError(
                f"{picture}: {candidates[0]} and {candidates[1]} could be its mask: leave one, or "
                "give it the picture's relative path"
            )
        if candidates and not at_place and same[picture.stem] > 1:
            raise DataError(
                f"{candidates[0]}: {same[picture.stem]} pictures are called so: give the mask its "
                "picture's relative path"
            )
        if candidates:
            pairs[picture] = candidates[0]
            used.add(candidates[0])
    return pairs, [f for files in by_stem.values() for f in files if f not in used]


def _files_below(folder: Path) -> Iterator[Path]:
    for place, _, names in sorted(os.walk(folder)):
        yield from (Path(place, name) for name in sorted(names) if is_image(Path(name)))


def mask_of(path: Path) -> Path | None:
    """The mask of a picture: beside it under a mask's name, as a PNG beside a JPEG, or in a folder.

    A folder of masks may lie up to `ABOVE` folders above the picture, and is asked for the picture's
    place below that, without `test/`.
    """
    beside = _named(path.parent, path.stem, NAMES)
    png = path.with_suffix(".png")
    if beside is None and path.suffix.lower() != ".png" and png.is_file():
        return png
    if beside is not None:
        return beside
    for above in list(path.parents)[:ABOVE]:
        parts = path.relative_to(above).parts
        place = Path(*parts[parts[0] == "test" and len(parts) > 1 :])
        for folder in (above / name / place.parent for name in FOLDERS):
            if (folder / path.stem).is_dir():
                return folder / path.stem
            mask = _named(folder, path.stem, (*NAMES, ""))
            if mask is not None:
                return mask
    return None


def _named(folder: Path, stem: str, endings: Sequence[str]) -> Path | None:
    """The first image file in a folder that is called as a picture's stem with one of the endings."""
    for ending in endings:
        for mask in sorted(folder.glob(f"{glob.escape(stem + ending)}.*")):
            if mask.stem == stem + ending and is_image(mask):
                return mask
    return None
