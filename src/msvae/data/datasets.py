"""The data sets of the benchmarks: official files, found or fetched, checked before use."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msvae.core.errors import DataError
from msvae.core.files import cache_dir
from msvae.core.progress import NullProgress, Progress
from msvae.data.download import Remote, fetch, unpack
from msvae.data.folder import Sample, find_images
from msvae.data.images import Pixels
from msvae.data.masks import mask_of

_VGG = "https://www.robots.ox.ac.uk/~vgg/data/flowers/102"
FLOWERS_ARCHIVE = Remote(f"{_VGG}/102flowers.tgz", "52808999861908f626f3c1f4e79d11fa")
FLOWERS_LABELS = Remote(f"{_VGG}/imagelabels.mat", "e0620be6f572b9609742df49c70aed4d")
FLOWERS_SPLITS = Remote(f"{_VGG}/setid.mat", "a5357ecc9cb78c4bef273ce3793fc85c")
CIFAR_ARCHIVE = Remote(
    "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530"
)
CIFAR_RECORD = 1 + 3 * 32 * 32  # bytes: the label, then the planes R, G, B
CIFAR_IMAGES = 10_000  # of one batch
Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Flowers:
    """Oxford-102 Flowers (Nilsback & Zisserman 2008) with its official splits."""

    paths: tuple[Path, ...]  # in the order of their numbers
    labels: Indices  # (N,) 0…101
    train: Indices  # rows of `paths`; the official names: train is the small one
    val: Indices
    test: Indices
    source: dict[str, Any]


@dataclass(frozen=True)
class Cifar:
    """One batch of CIFAR-10 (Krizhevsky 2009), lossless."""

    images: Pixels  # (N, 32, 32, 3)
    labels: Indices  # (N,) 0…9
    file: Path
    sha256: str
    stands_in: str | None  # which file stands in for the official test batch, if one does


@dataclass(frozen=True)
class MagneticTile:
    """Magnetic tile surface defects (Huang et al. 2020)."""

    normal: tuple[Path, ...]
    anomalous: tuple[Sample, ...]


def flowers102(
    data_dir: str | Path | None = None, download: bool = True, progress: Progress | None = None
) -> Flowers:
    """The flowers under `data_dir` (or its `flowers-102`), fetched when they are absent.

    Raises `DataError` when they are neither there nor to be had, or are not whole.
    """
    base = _base(data_dir)
    folder = _first(base / "flowers-102", base, having="setid.mat")
    if folder is None or not (folder / "jpg").is_dir() or not _labels_of(folder).is_file():
        if not download:
            raise DataError(f"{base}: holds no flowers-102/jpg with setid.mat: allow the download")
        folder = _fetch_flowers(folder or base / "flowers-102", progress or NullProgress())
    labels = _mat(_labels_of(folder), "labels") - 1
    paths = tuple(folder / "jpg" / f"image_{i + 1:05d}.jpg" for i in range(len(labels)))
    _refuse_missing(paths)
    splits = folder / "setid.mat"
    train, val, test = (_mat(splits, key) - 1 for key in ("trnid", "valid", "tstid"))
    if not np.array_equal(np.sort(np.concatenate([train, val, test])), np.arange(len(labels))):
        raise DataError(f"{splits}: does not part the {len(labels)} flowers: remove it, run again")
    source = {
        "path": folder.as_posix(),
        "sha256": _sha256(splits),
        "file": "setid.mat",
        "labels_sha256": _sha256(_labels_of(folder)),
        "images": len(paths),
    }
    return Flowers(paths, labels, train, val, test, source)


def _labels_of(folder: Path) -> Path:
    return folder / "imagelabels.mat"


def _fetch_flowers(folder: Path, progress: Progress) -> Path:
    for remote in (FLOWERS_LABELS, FLOWERS_SPLITS):
        if not (folder / remote.name).is_file():
            fetch(remote, folder, progress)
    if not (folder / "jpg").is_dir():
        unpack(fetch(FLOWERS_ARCHIVE, folder, progress), "jpg", folder)
    return folder


def cifar10(
    data_dir: str | Path | None = None, download: bool = True, progress: Progress | None = None
) -> Cifar:
    """The official test batch, in the binary format; else `data_batch_5.bin`, which then says so.

    Found in `data_dir` (or its `cifar-10-batches-bin`), fetched when both files are absent.
    """
    base, name, stand_in = _base(data_dir), "test_batch.bin", "data_batch_5.bin"
    places = (base / "cifar-10-batches-bin", base)
    folder = _first(*places, having=name) or _first(*places, having=stand_in)
    if folder is None:
        if not download:
            raise DataError(f"{base}: holds no cifar-10-batches-bin/{name}: allow the download")
        archive = fetch(CIFAR_ARCHIVE, base, progress or NullProgress())
        folder = unpack(archive, "cifar-10-batches-bin", base)
    here = (folder / name).is_file()
    return _cifar_batch(
        folder / (name if here else stand_in), None if here else f"{stand_in} stands in for {name}"
    )


def _cifar_batch(file: Path, stands_in: str | None) -> Cifar:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}): check the file") from error
    if len(data) != CIFAR_IMAGES * CIFAR_RECORD:
        raise DataError(
            f"{file}: has {len(data)} bytes, not {CIFAR_IMAGES * CIFAR_RECORD}: remove it, and "
            "the official one will be fetched"
        )
    records = np.frombuffer(data, np.uint8).reshape(-1, CIFAR_RECORD)
    planes = records[:, 1:].reshape(-1, 3, 32, 32)
    images = np.ascontiguousarray(planes.transpose(0, 2, 3, 1))
    sha256 = hashlib.sha256(data).hexdigest()
    return Cifar(images, records[:, 0].astype(np.int64), file, sha256, stands_in)


def cifar_image(name: str) -> Pixels | None:
    """The image of a name such as `…/test_batch.bin#3`, (32, 32, 3); None where it is not there."""
    path, _, index = name.rpartition("#")
    if not Path(path).is_file() or not index.isdigit():
        return None
    with Path(path).open("rb") as file:
        file.seek(int(index) * CIFAR_RECORD)
        record = np.frombuffer(file.read(CIFAR_RECORD), np.uint8)
    if len(record) < CIFAR_RECORD:
        return None
    return np.ascontiguousarray(record[1:].reshape(3, 32, 32).transpose(1, 2, 0))


def magnetic_tile(data_dir: str | Path) -> MagneticTile:
    """`MT_Free` as normal, the other classes as anomalous with the masks that lie beside them."""
    base = Path(data_dir)
    folder = _first(base / "magnetic-tile", base, having="MT_Free")
    if folder is None:
        raise DataError(
            f"{base}: holds no magnetic-tile/MT_Free: fetch the Magnetic Tile Defects of Huang et "
            "al. (github.com/abin24/Magnetic-tile-defect-datasets.) and name its folder"
        )
    kinds = sorted(p for p in folder.glob("MT_*") if p.is_dir() and p.name != "MT_Free")
    anomalous = tuple(
        Sample(path, 1, kind.name.removeprefix("MT_").lower(), mask_of(path))
        for kind in kinds
        for path in find_images(kind).paths
    )
    if not anomalous:
        raise DataError(f"{folder}: holds no defect classes beside MT_Free: add MT_Crack and such")
    bare = [s.path for s in anomalous if s.mask is None]
    if bare:
        raise DataError(f"{bare[0]}: has no mask (a PNG of the same stem) beside it: add it")
    return MagneticTile(find_images(folder / "MT_Free").paths, anomalous)


def mvtec(data_dir: str | Path, category: str) -> Path:
    """The tree of one MVTec AD category below `data_dir`, or below an `mvtec*` folder in it."""
    trees = mvtec_categories(data_dir)
    if category not in trees:
        raise DataError(
            f"{data_dir}: holds no MVTec category {category!r}: there is {', '.join(trees)} "
            "(MVTec AD is to be had from mvtec.com)"
        )
    return trees[category]


def mvtec_categories(data_dir: str | Path) -> dict[str, Path]:
    """The trees of all MVTec AD categories below `data_dir`, or below an `mvtec*` folder in it.

    In the order of their names; `DataError` where there is none.
    """
    base = Path(data_dir)
    if not base.is_dir():
        raise DataError(f"{base}: no such folder: name the one that holds MVTec AD")
    roots = [base, *sorted(p for p in base.glob("mvtec*") if p.is_dir())]
    trees = {
        p.name: p for r in reversed(roots) for p in r.glob("*") if (p / "train" / "good").is_dir()
    }
    if not trees:
        raise DataError(
            f"{base}: holds no MVTec category: there is none at all (MVTec AD is to be had from "
            "mvtec.com)"
        )
    return dict(sorted(trees.items()))


def _base(data_dir: str | Path | None) -> Path:
    cache = cache_dir()
    if data_dir is None and cache is None:
        raise DataError("there is no home for a cache of data sets: name a folder by --data-dir")
    return cache / "data" if data_dir is None and cache is not None else Path(data_dir or "")


def _first(*folders: Path, having: str) -> Path | None:
    """The first of the folders that has such an entry."""
    return next((f for f in folders if (f / having).exists()), None)


def _refuse_missing(paths: tuple[Path, ...]) -> None:
    missing = [p for p in paths if not p.is_file()]
    if missing:
        raise DataError(
            f"{missing[0]}: {len(missing)} of {len(paths)} flowers are missing: remove "
            f"{missing[0].parent}, and all will be fetched anew"
        )


def _mat(path: Path, key: str) -> Indices:
    """One row of whole numbers of a Matlab file."""
    from scipy.io import loadmat

    try:
        values: Indices = np.asarray(loadmat(path)[key]).ravel().astype(np.int64)
    except Exception as error:  # scipy raises anything on a torn file
        raise DataError(f"{path}: is damaged ({error}): remove it, and run again") from error
    return values


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
