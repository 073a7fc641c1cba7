"""A tree, a list or a glob of files -> paths and labelled samples; masks paired, or named."""

import glob
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from msvae.errors import DataError

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
class Found:
    """Images that were found, and a note on what was chosen and what passed over."""

    paths: tuple[Path, ...]
    note: str


def is_image(path: Path) -> bool:
    """Whether the name is that of an image file; hidden files are not."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def find_images(where: str | Path | Sequence[str | Path]) -> Found:
    """The images of a folder, a file, a glob pattern, or a list of these.

    Of a folder with `train/good` exactly that is used; of others everything below, but a PNG beside
    an image of the same stem is its mask and is passed over. Raises `DataError`.
    """
    if not isinstance(where, str | Path):
        parts = [find_images(w) for w in where]
        paths = tuple(dict.fromkeys(p for part in parts for p in part.paths))
        if not paths:
            raise DataError("the list of images is empty: name at least one")
        return parts[0] if len(parts) == 1 else Found(paths, f"{len(paths)} images")
    path = Path(where)
    if path.is_dir():
        return _in_folder(path)
    if path.is_file():
        return Found((path,), str(path))
    matches = sorted(Path(m) for m in glob.glob(str(where), recursive=True))  # noqa: PTH207 (absolute patterns)
    images = tuple(m for m in matches if m.is_file() and is_image(m))
    if images:
        return Found(images, f"{where}: {len(images)} images")
    if any(c in str(where) for c in "*?["):
        raise DataError(f"{where}: matches no image: check the pattern")
    raise DataError(f"{where}: no such file or folder: check the path")


def _in_folder(folder: Path) -> Found:
    good = folder / "train" / "good"
    root = good if good.is_dir() else folder
    paths, masks = _apart(_below(root))
    if not paths:
        raise DataError(f"{root}: holds no images: name a folder with image files")
    note = f"{root}: {len(paths)} images"
    if root is good:
        note += " (train/good, and nothing else of the tree)"
    return Found(tuple(paths), note + (f", {len(masks)} masks skipped" if masks else ""))


def _below(root: Path) -> list[Path]:
    """Every image below, sorted; nothing hidden, nor in hidden folders."""
    return sorted(
        p
        for p in root.rglob("*")
        if is_image(p)
        and p.is_file()
        and not any(part.startswith(".") for part in p.relative_to(root).parts)
    )


def _apart(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Images, and the PNG masks that lie beside an image of the same stem."""
    others = {p.with_suffix("") for p in paths if p.suffix.lower() != ".png"}
    masks = [p for p in paths if p.suffix.lower() == ".png" and p.with_suffix("") in others]
    taken = set(masks)
    return [p for p in paths if p not in taken], masks


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
