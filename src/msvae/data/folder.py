"""A tree, a list or a glob of files -> paths and labelled samples; masks paired, or named."""

import glob
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from msvae.core.errors import DataError

IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".jpe", ".bmp", ".tif", ".tiff", ".webp", ".gif"}
    | {".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".tga", ".avif"}
)


@dataclass(frozen=True)
class Sample:
    """One labelled image."""

    path: Path
    label: int  # 0 normal, 1 anomalous
    kind: str  # "good", or the name of the defect
    mask: Path | None = None


@dataclass(frozen=True)
class ImageListing:
    """Images that were found, and a note on what was chosen and what passed over."""

    names: tuple[str, ...]  # a `Path` takes four times the memory of its name
    note: str

    @property
    def paths(self) -> tuple[Path, ...]:
        """The same as paths, made anew."""
        return tuple(map(Path, self.names))


def is_image(path: Path) -> bool:
    """Whether the name is that of an image file; hidden files are not."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def find_images(where: str | Path | Sequence[str | Path]) -> ImageListing:
    """The images of a folder, a file, a glob pattern, or a list of these.

    Of a folder with `train/good` exactly that is used; of others everything below, but a PNG beside
    an image of the same stem is its mask and is passed over. Raises `DataError`.
    """
    if not isinstance(where, str | Path):
        parts = [find_images(w) for w in where]
        names = tuple(dict.fromkeys(n for part in parts for n in part.names))
        if not names:
            raise DataError("the list of images is empty: name at least one")
        return parts[0] if len(parts) == 1 else ImageListing(names, f"{len(names)} images")
    path = Path(where)
    if path.is_dir():
        return _in_folder(path)
    if path.is_file():
        return ImageListing((str(path),), str(path))
    matches = (Path(m) for m in glob.iglob(str(where), recursive=True))  # noqa: PTH207 (absolute patterns)
    images = _in_order(str(m) for m in matches if m.is_file() and is_image(m))
    if images:
        return ImageListing(tuple(images), f"{where}: {len(images)} images")
    if any(c in str(where) for c in "*?["):
        raise DataError(f"{where}: matches no image: check the pattern")
    raise DataError(f"{where}: no such file or folder: check the path")


def _in_folder(folder: Path) -> ImageListing:
    good = folder / "train" / "good"
    root = good if good.is_dir() else folder
    names, masks = _apart(_below(root))
    if not names:
        raise DataError(f"{root}: holds no images: name a folder with image files")
    note = f"{root}: {len(names)} images"
    if root is good:
        note += " (train/good, and nothing else of the tree)"
    return ImageListing(tuple(names), note + (f", {masks} masks skipped" if masks else ""))


def _below(root: Path) -> list[str]:
    """Every image below; nothing hidden."""
    names: list[str] = []
    for folder, below, files in os.walk(root):
        below[:] = [name for name in below if not name.startswith(".")]
        paths = (Path(folder, name) for name in files)
        names += [str(path) for path in paths if is_image(path) and path.is_file()]
    return _in_order(names)


def _in_order(names: Iterable[str]) -> list[str]:
    """Sorted by the parts of the paths, as `Path`s are."""
    return sorted(names, key=lambda name: name.replace(os.sep, "\0"))


def _apart(names: Sequence[str]) -> tuple[list[str], int]:
    """Images, and how many PNG masks were left out that lie beside an image of the same stem."""
    others = {name.rpartition(".")[0] for name in names if not _is_png(name)}
    images = [n for n in names if not _is_png(n) or n.rpartition(".")[0] not in others]
    return images, len(names) - len(images)


def _is_png(name: str) -> bool:
    return name.lower().endswith(".png")


def find_labelled(root: str | Path) -> tuple[Sample, ...]:
    """The samples of an MVTec tree: `test/good`, `test/<defect>`, `ground_truth/<defect>`."""
    root = Path(root)
    if not root.exists():
        raise DataError(f"{root}: no such folder: check the path")
    kinds = sorted(
        p for p in (root / "test").glob("*") if p.is_dir() and not p.name.startswith(".")
    )
    if not any(k.name == "good" for k in kinds) or len(kinds) < 2:
        raise DataError(
            f"{root}: needs test/good and test/<defect> folders: or use --normal and --anomalous"
        )
    return tuple(s for kind in kinds for s in _samples(kind, root / "ground_truth" / kind.name))


def _samples(folder: Path, truth: Path) -> list[Sample]:
    """The samples of one kind, with the masks of `truth` or those beside the images."""
    paths, kind = _in_folder(folder).paths, folder.name
    if kind == "good":
        return [Sample(p, 0, kind) for p in paths]
    masks = _masks_in(truth)
    _tell_lonely(masks, paths)
    missing = [p for p in paths if masks and p.stem not in masks]
    if missing:
        warn_of(missing, "has no mask, where others have: it counts for the image figures only")
    return [Sample(p, 1, kind, masks.get(p.stem) or mask_beside(p)) for p in paths]


def _tell_lonely(masks: dict[str, Path], paths: Sequence[Path]) -> None:
    if lonely := sorted(set(masks) - {p.stem for p in paths}):
        warn_of([masks[k] for k in lonely], "is a mask without an image: left out")


def warn_of(paths: Sequence[Path], what: str) -> None:
    """One line for one or several files with the same fault, which the rest is not to suffer for."""
    more = f" ({len(paths)} such)" if len(paths) > 1 else ""
    warnings.warn(f"{paths[0]}: {what}{more}", stacklevel=3)


def find_pairs(
    normal: str | Path, anomalous: str | Path, masks: str | Path | None = None
) -> tuple[Sample, ...]:
    """Labelled samples of two folders; masks from a third, or beside the anomalous images."""
    good = [Sample(p, 0, "good") for p in find_images(normal).paths]
    found = find_images(anomalous).paths
    if masks is not None:
        by_stem = _masks_in(Path(masks))
        if not by_stem:
            raise DataError(f"{masks}: holds no masks: name the folder of PNG masks")
        _tell_lonely(by_stem, found)
        return (*good, *[Sample(p, 1, "anomalous", by_stem.get(p.stem)) for p in found])
    return (*good, *[Sample(p, 1, "anomalous", mask_beside(p)) for p in found])


def mask_beside(path: Path) -> Path | None:
    """The PNG of the same stem beside an image that is not a PNG itself."""
    mask = path.with_suffix(".png")
    return mask if path.suffix.lower() != ".png" and mask.is_file() else None


def _masks_in(folder: Path) -> dict[str, Path]:
    """Mask files by the stem of their image: `<stem>_mask.png` or `<stem>.png`."""
    files = sorted(p for p in folder.glob("*") if p.is_file() and is_image(p))
    return {p.stem.removesuffix("_mask"): p for p in files}


def mask_of(path: Path) -> Path | None:
    """The mask of an image: in the MVTec tree's `ground_truth`, or beside the image."""
    truth = path.parent.parent.parent / "ground_truth" / path.parent.name
    candidate = truth / f"{path.stem}_mask.png"
    return candidate if candidate.is_file() else mask_beside(path)
