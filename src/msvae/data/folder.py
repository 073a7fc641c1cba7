"""A tree, a list or a glob of files -> paths and labelled samples; masks paired, or named."""

import glob
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from msvae.core.errors import DataError
from msvae.data.images import is_image
from msvae.data.masks import mask_of, pair, without_masks

NORMAL = ("good", "normal", "ok")  # what a folder of normal images may be called beside others


@dataclass(frozen=True)
class Sample:
    """One labelled image."""

    path: Path
    label: int  # 0 normal, 1 anomalous
    kind: str  # "good", or the name of the defect
    mask: Path | None = None  # a file, or a folder of several that are joined


@dataclass(frozen=True)
class ImageListing:
    """Images that were found, and a note on what was chosen and what passed over."""

    names: tuple[str, ...]  # a `Path` takes four times the memory of its name
    note: str

    @property
    def paths(self) -> tuple[Path, ...]:
        """The same as paths, made anew."""
        return tuple(map(Path, self.names))


def find_images(where: str | Path | Sequence[str | Path], pngs: bool = True) -> ImageListing:
    """The images of a folder, a file, a glob pattern, or a list of these.

    Of a folder with `train/good` exactly that is used; of others everything below but masks: what has
    a mask's name beside its picture, or lies in a folder of masks; with `pngs` a PNG beside another
    image of the same stem, too. The note counts what was passed over. Raises `DataError`.
    """
    if not isinstance(where, str | Path):
        parts = [find_images(w, pngs) for w in where]
        names = tuple(dict.fromkeys(n for part in parts for n in part.names))
        if not names:
            raise DataError("the list of images is empty: name at least one")
        notes = "; ".join(part.note for part in parts if "passed over" in part.note)
        whole = f"{len(names)} images" + (f" ({notes})" if notes else "")
        return parts[0] if len(parts) == 1 else ImageListing(names, whole)
    path = Path(where)
    if path.is_dir():
        return _in_folder(path, pngs)
    if path.is_file():
        return ImageListing((str(path),), str(path))
    matches = (Path(m) for m in glob.iglob(str(where), recursive=True))  # noqa: PTH207 (absolute patterns)
    images = _in_order(str(m) for m in matches if m.is_file() and is_image(m))
    if images:
        return ImageListing(tuple(images), f"{where}: {len(images)} images")
    if any(c in str(where) for c in "*?["):
        raise DataError(f"{where}: matches no image: check the pattern")
    raise DataError(f"{where}: no such file or folder: check the path")


def _in_folder(folder: Path, pngs: bool = True) -> ImageListing:
    good = folder / "train" / "good"
    root = good if good.is_dir() else folder
    images, others = _below(root)
    names = without_masks(images, root, pngs)
    if not names:
        raise DataError(
            f"{root}: holds no images{_counted(others)}: name a folder with image files"
        )
    masks = len(images) - len(names)
    note = f"{root}: {len(names)} images"
    if root is good:
        note += " (train/good, and nothing else of the tree)"
    if masks:
        others = Counter({"masks": masks}) + others
    return ImageListing(tuple(names), note + _counted(others))


def _counted(others: Counter[str]) -> str:
    """What was passed over, with its number."""
    parts = [f"{count} {what}" for what, count in others.items()]
    return f", passed over: {', '.join(parts)}" if parts else ""


def _below(root: Path) -> tuple[list[str], Counter[str]]:
    """Every image below, and how many other files by their ending; nothing hidden.

    Links to folders are followed, each folder once.
    """
    names, others, places = list[str](), Counter[str](), set[str]()
    for folder, below, files in os.walk(root, followlinks=True):
        if os.path.realpath(folder) in places:
            below.clear()
            continue
        places.add(os.path.realpath(folder))
        below[:] = sorted(name for name in below if not name.startswith("."))
        for name in files:
            path = Path(folder, name)
            if is_image(path) and path.is_file():
                names.append(str(path))
            elif not name.startswith("."):
                others[path.suffix.lower() or "without ending"] += 1
    return _in_order(names), others


def _in_order(names: Iterable[str]) -> list[str]:
    """Sorted by the parts of the paths, as `Path`s are."""
    return sorted(names, key=lambda name: name.replace(os.sep, "\0"))


def check_normal(folder: Path) -> None:
    """Raise `DataError` for a folder that holds good images beside others: which are to be learned?"""
    if not folder.is_dir() or (folder / "train" / "good").is_dir():
        return
    below = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    good = [name for name in below if name.lower() in NORMAL]
    if good and len(below) > len(good):
        raise DataError(
            f"{folder}: holds {', '.join(below)}, and a fit learns that all it is given is normal: "
            f"name {folder / good[0]}"
        )


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
    masks = _paired(paths, folder, truth)
    missing = [p for p in paths if masks and p not in masks]
    if missing:
        warn_of(missing, "has no mask, where others have: it counts for the image figures only")
    return [Sample(p, 1, kind, masks.get(p) or mask_of(p)) for p in paths]


def _paired(paths: Sequence[Path], root: Path, truth: Path) -> dict[Path, Path]:
    masks, lonely = pair(paths, root, truth)
    if lonely:
        warn_of(lonely, "is a mask without an image: left out")
    return masks


def warn_of(paths: Sequence[Path], what: str) -> None:
    """One line for one or several files with the same fault, which the rest is not to suffer for."""
    more = f" ({len(paths)} such)" if len(paths) > 1 else ""
    warnings.warn(f"{paths[0]}: {what}{more}", stacklevel=3)


def find_pairs(
    normal: str | Path, anomalous: str | Path, masks: str | Path | None = None
) -> tuple[Sample, ...]:
    """Labelled samples of two folders; masks from a third, or beside the anomalous images.

    Raises `DataError` where an image is in both.
    """
    good, odd = (find_images(where).paths for where in (normal, anomalous))
    both = {p.resolve() for p in good} & {p.resolve() for p in odd}
    if both:
        raise DataError(
            f"{min(both)}: is among the normal and among the anomalous images ({len(both)} such): "
            "name folders of which none holds the other"
        )
    normals = [Sample(p, 0, "good") for p in good]
    if masks is None:
        return (*normals, *[Sample(p, 1, "anomalous", mask_of(p)) for p in odd])
    root = Path(anomalous) if Path(anomalous).is_dir() else Path(os.path.commonpath(odd))
    by_picture = _paired(odd, root, Path(masks))
    if not by_picture and not any(map(is_image, Path(masks).rglob("*"))):
        raise DataError(f"{masks}: holds no masks: name the folder of masks")
    return (*normals, *[Sample(p, 1, "anomalous", by_picture.get(p)) for p in odd])
