"""The images of a fit by their purpose: what is trained, stopped and calibrated on never mixes."""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from msvae.core.config import Config
from msvae.core.errors import DataError, ImageError, RateError
from msvae.core.files import cache_dir
from msvae.core.progress import Progress
from msvae.data.cache import Images, decode
from msvae.data.folder import check_normal, find_images
from msvae.data.images import Pixels, Source
from msvae.data.split import CONFORMAL, group_names, split_by_content
from msvae.evaluation.conformal import needed, rank

DISTINCT = 10  # training images that differ, at least
DECODED = 16  # images compared at a time
GroupBy = str | Callable[[Sequence[str]], list[str]]


@dataclass(frozen=True)
class Part:
    """Decoded images of one purpose."""

    pixels: Images  # (N, S, S, 3)
    names: tuple[str, ...]
    digests: tuple[str, ...]

    def rows(self, part: str) -> list[dict[str, str]]:
        """One row an image, as in `split.csv`, for the purpose `part`."""
        pairs = zip(self.names, self.digests, strict=True)
        return [{"path": name, "part": part, "sha256": digest} for name, digest in pairs]


@dataclass(frozen=True)
class Parts:
    """The normal images of a fit; what is trained on, stopped on and calibrated on never mixes."""

    train: Part
    stop: Part
    conformal: Part

    def rows(self) -> list[dict[str, str]]:
        """One row an image, as in `split.csv`."""
        kinds = ("train", "stop", "conformal")
        return [row for kind in kinds for row in getattr(self, kind).rows(kind)]


def split_images(
    images: str | Path | Sequence[Source],
    config: Config,
    group_by: GroupBy | None,
    progress: Progress,
    say: Callable[[str], None],
) -> tuple[Parts, tuple[ImageError, ...]]:
    """Decode the images and part them by content or by group; unreadable ones come beside."""
    sources: Sequence[Source] = images  # type: ignore[assignment]
    if isinstance(images, str | Path) or all(isinstance(i, str | Path) for i in images):
        for folder in [images] if isinstance(images, str | Path) else images:
            check_normal(Path(folder))  # type: ignore[arg-type]
        listing = find_images(images)  # type: ignore[arg-type]
        say(listing.note)
        sources = listing.names
    model = config.model
    decoded = decode(sources, model.image_size, model.resize, cache=cache_dir(), progress=progress)
    groups = None
    if group_by is not None:
        groups = (
            group_names(decoded.names, group_by)
            if isinstance(group_by, str)
            else group_by(decoded.names)
        )
    split = split_by_content(decoded.digests, groups)
    # Refuse before the long work, not after.
    check_distinct(decoded.some(split.train))
    if config.decide.rule == "conformal":
        check_rate(config.decide.target_fpr, len(split.conformal))

    def part(rows: Sequence[int]) -> Part:
        names = tuple(decoded.names[i] for i in rows)
        return Part(decoded.some(rows), names, tuple(decoded.digests[i] for i in rows))

    return Parts(part(split.train), part(split.stop), part(split.conformal)), decoded.quarantine


def check_distinct(pixels: Images) -> None:
    """Raise `DataError` where decoded images (N, S, S, 3) are too few that differ to learn from."""
    distinct = set[bytes]()
    for first in range(0, len(pixels), DECODED):
        some = pixels[first : first + DECODED]
        distinct |= {hashlib.sha256(image.tobytes()).digest() for image in some}
        if len(distinct) >= DISTINCT:
            return
    raise DataError(
        f"of {len(pixels)} images to train on only {len(distinct)} differ once they are decoded: "
        f"at least {DISTINCT} are needed; are they black, transparent or copies?"
    )


def check_rate(rate: float, n: int) -> None:
    """Raise `RateError` where the n calibration images of a folder cannot keep a false-alarm rate.

    The message names how many images in all would keep it, and the rate that these can keep.
    """
    if not 0 < rate < 1 or n >= needed(rate):
        rank(rate, n)
        return
    total = math.floor(round((needed(rate) - 1) / CONFORMAL, 9)) + 1
    lowest = math.ceil(round(1000 / (n + 1), 9)) / 1000
    raise RateError(
        f"a false-alarm rate of {rate:g} needs at least {needed(rate)} calibration images, got {n}: "
        f"add images until there are {total} in all, or ask for --target-fpr {lowest:g}, which "
        "these can keep"
    )


def batches(pixels: Images, size: int, progress: Progress, task: str) -> Iterator[Pixels]:
    """The pixels, `size` at a time, with progress."""
    starts = range(0, len(pixels), size)
    for first in progress.track(starts, task, len(starts)):
        yield pixels[first : first + size]
