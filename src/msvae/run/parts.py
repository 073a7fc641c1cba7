"""The images of a fit by their purpose: what is trained, stopped and calibrated on never mixes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from msvae.core.config import Config
from msvae.core.errors import ImageError
from msvae.core.files import cache_dir
from msvae.core.progress import Progress
from msvae.data.cache import Images, decode
from msvae.data.folder import find_images
from msvae.data.images import Pixels, Source
from msvae.data.split import group_names, split_by_content
from msvae.evaluation.conformal import rank

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
    if config.decide.rule == "conformal":  # refuse before the long work, not after
        rank(config.decide.target_fpr, len(split.conformal))

    def part(rows: Sequence[int]) -> Part:
        names = tuple(decoded.names[i] for i in rows)
        return Part(decoded.some(rows), names, tuple(decoded.digests[i] for i in rows))

    return Parts(part(split.train), part(split.stop), part(split.conformal)), decoded.quarantine


def batches(pixels: Images, size: int, progress: Progress, task: str) -> Iterator[Pixels]:
    """The pixels, `size` at a time, with progress."""
    starts = range(0, len(pixels), size)
    for first in progress.track(starts, task, len(starts)):
        yield pixels[first : first + size]
