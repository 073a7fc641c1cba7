"""The galleries of the report: which images are shown, and what of each, within a size."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from msvae.core.errors import DataError
from msvae.viz import overlays as pictures
from msvae.viz.overlays import Map, Pixels
from msvae.viz.text import Interval, in_words, number, tail

GALLERY_LIMIT = 24
GALLERIES_LIMIT = 12
PICTURE_BYTES = 10_000_000
NEAREST_LIMIT = 6
PIXELATED_SIDE = 96
OUTLINE_CHARS = 8000
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


class Level(NamedTuple):
    """How finely the pictures are kept, and how many items of a gallery."""

    side: int  # of the dialog's pictures
    thumb: int
    quality: int
    items: int


LEVELS = (  # tried in order until the pictures fit
    Level(320, 176, 80, GALLERY_LIMIT),
    Level(256, 144, 74, GALLERY_LIMIT),
    Level(192, 128, 68, GALLERY_LIMIT),
    Level(128, 96, 60, GALLERY_LIMIT),
    Level(128, 96, 60, GALLERY_LIMIT // 2),
    Level(96, 72, 50, GALLERY_LIMIT // 4),
    Level(64, 64, 40, 2),
)


@dataclass(frozen=True, kw_only=True)
class MapView:
    """A map of one image. `scale` is where the colours begin and end.

    A signed map diverges about 0. Pixels above `level` are outlined.
    """

    name: str
    values: Map
    scale: Interval
    signed: bool = False
    unit: str = ""
    level: float | None = None


@dataclass(frozen=True)
class ScoreLine:
    """One score of one image; `words` replace the standard reading of its p-value."""

    name: str
    value: float
    p: float | None = None
    words: str = ""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One image of a gallery, with what is shown when it is opened."""

    name: str
    image: Pixels
    score: float | None = None
    p: float | None = None
    flagged: bool = False
    label: int | None = None  # 0 normal, 1 anomalous
    kind: str = ""  # "broken_large"
    reconstruction: Pixels | None = None
    maps: tuple[MapView, ...] = ()
    mask: NDArray[np.bool_] | None = None  # the true defect
    scores: tuple[ScoreLine, ...] = ()
    contributions: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # regions, for example
    nearest: tuple[tuple[str, Pixels], ...] = ()  # normal training images: name, picture

    def __post_init__(self) -> None:
        shown = [self.image, *(picture for _, picture in self.nearest)]
        shown += [] if self.reconstruction is None else [self.reconstruction]
        if not all(_is_picture(picture) for picture in shown):
            raise DataError(f"{self.name}: the report needs uint8 pictures of shape (H, W, 3)")


def _is_picture(pixels: Pixels) -> bool:
    return (
        pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.size > 0
    )


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """A row of images that belong together; of more than 24 the first 24 are shown."""

    title: str
    items: tuple[Item, ...]
    about: str = ""


def choose(
    scores: NDArray[np.float64],
    flagged: NDArray[np.bool_],
    labels: NDArray[np.int64] | None = None,
    limit: int = GALLERY_LIMIT,
) -> dict[str, NDArray[np.int64]]:
    """The indices of the images that each gallery shows.

    `anomalous` (highest scores first), `borderline` (half of `limit`, nearest to where flagging
    begins) and, with labels, `false_alarms` (highest first) and `misses` (lowest first).
    """
    order = np.argsort(-scores, kind="stable")
    distance = np.abs(np.arange(len(order)) - int(flagged.sum()) + 0.5)
    near = np.sort(np.argsort(distance, kind="stable")[: limit // 2])
    chosen = {"anomalous": order[:limit], "borderline": order[near]}
    if labels is not None:
        false_alarm, missed = (labels == 0) & flagged, (labels == 1) & ~flagged
        rising = order[::-1]
        chosen["false_alarms"] = order[false_alarm[order]][:limit]
        chosen["misses"] = rising[missed[rising]][:limit]
    return chosen


def fit_galleries(
    galleries: Sequence[Gallery], n_conformal: int | None = None
) -> list[dict[str, Any]]:
    """The galleries with their pictures encoded, as finely as the page's size allows."""
    shown = [g for g in galleries if g.items][:GALLERIES_LIMIT]
    encoded: list[dict[str, Any]] = []
    for level in LEVELS:
        if _estimate(shown, level) > PICTURE_BYTES and level != LEVELS[-1]:
            continue
        encoded = _encode(shown, n_conformal, level)
        if len(encoded) == len(shown):
            break
    return encoded


def _estimate(galleries: Sequence[Gallery], level: Level) -> int:
    """The bytes of all pictures, if those of a gallery are like its first."""
    counts = [min(len(g.items), level.items) for g in galleries]
    firsts = [_item(g.items[0], None, level)["bytes"] for g in galleries]
    return sum(count * first for count, first in zip(counts, firsts, strict=True))


def _encode(galleries: Sequence[Gallery], n: int | None, level: Level) -> list[dict[str, Any]]:
    """The galleries in order, up to the first for which there is no more room."""
    encoded: list[dict[str, Any]] = []
    room = PICTURE_BYTES
    for gallery in galleries:
        views = [_item(item, n, level) for item in gallery.items[: level.items]]
        room -= sum(view["bytes"] for view in views)
        if room < 0:
            break
        encoded.append({"gallery": gallery, "items": views})
    return encoded


def _item(item: Item, n: int | None, level: Level) -> dict[str, Any]:
    largest = max((abs(v) for v in item.contributions.values()), default=0) or 1
    small = max(item.image.shape[:2]) <= level.thumb  # the thumbnail serves for the input
    folder, _, base = tail(item.name).rpartition("/")
    view = {
        "item": item,
        "base": base,
        "folder": "" if folder == item.kind else folder,  # the badge tells it already
        "thumb": pictures.data_uri(item.image, level.thumb, level.quality),
        "views": _views(item, level, with_input=not small),
        "truth": None if item.mask is None else _truth(item.mask, level),
        "maps": [_map_view(item, m, level) for m in item.maps],
        "nearest": [
            (name, pictures.data_uri(picture, level.thumb, level.quality))
            for name, picture in item.nearest[:NEAREST_LIMIT]
        ],
        "scores": [(s, s.words or in_words(s.p, n)) for s in item.scores],
        "contributions": [(k, v, 100 * abs(v) / largest) for k, v in item.contributions.items()],
        "words": in_words(item.p, n),
        "pixelated": max(item.image.shape[:2]) <= PIXELATED_SIDE,
    }
    return view | {"bytes": _size(view)}


def _size(view: dict[str, Any]) -> int:
    """About how many bytes an item takes up in the page."""
    sources = [view["thumb"], *(uri for _, uri in view["views"] + view["nearest"])]
    drawn = [view["truth"], *(m["outline"] for m in view["maps"])]
    lines = len(view["scores"]) + len(view["contributions"]) + len(view["item"].notes)
    return (
        sum(len(u) for u in sources)
        + sum(len(m["src"]) for m in view["maps"])
        + sum(len(outline["path"]) for outline in drawn if outline)
        + 2000
        + 300 * lines
    )


def _views(item: Item, level: Level, with_input: bool) -> list[tuple[str, str]]:
    """Input and reconstruction; the input's source stays empty if not wanted."""
    source = pictures.data_uri(item.image, level.side, level.quality) if with_input else ""
    views = [("Input", source)]
    if item.reconstruction is not None:
        drawn = pictures.data_uri(item.reconstruction, level.side, level.quality)
        views.append(("Reconstruction", drawn))
    return views


def _truth(mask: NDArray[np.bool_], level: Level) -> dict[str, str] | None:
    size = _bounded(mask.shape, level.side)
    return contour(pictures.fit_mask(mask, *size).astype(np.float32), 0.5)


def _bounded(shape: tuple[int, ...], side: int) -> tuple[int, int]:
    scale = min(1, side / max(shape))
    return max(1, round(shape[0] * scale)), max(1, round(shape[1] * scale))


def _map_view(item: Item, m: MapView, level: Level) -> dict[str, Any]:
    image = pictures.shrink(item.image, level.side)
    drawn = pictures.overlay(image, m.values, *m.scale, m.signed)
    clean = np.nan_to_num(m.values)
    outline = None
    if m.level is not None:
        outline = contour(pictures.fit_map(clean, *_bounded(clean.shape, level.side)), m.level)
    peak = clean.flat[np.abs(clean).argmax()] if m.signed else clean.max()
    return {
        "name": m.name,
        "src": pictures.data_uri(drawn, level.side, level.quality),
        "gradient": pictures.gradient(m.signed),
        "low": readable(m.scale[0], 2),
        "high": readable(m.scale[1], 2),
        "peak": f"peak {readable(float(peak), 2)} {m.unit}".strip(),
        "outline": outline,
        "level": readable(m.level, 2) if outline else "",
    }


def contour(values: Map, level: float) -> dict[str, str] | None:
    """The lines round where a map reaches `level`, as an SVG path over the picture; None without.

    Of very many lines the longest are kept.
    """
    from skimage.measure import approximate_polygon, find_contours

    if min(values.shape) < 2 or not values.min() < level <= values.max():
        return None
    path = ""
    for line in sorted(find_contours(values, level), key=len, reverse=True):
        corners = approximate_polygon(line, 0.35) + 0.5  # pixel centres lie at halves
        closed = len(corners) > 2 and bool((corners[0] == corners[-1]).all())
        steps = "L".join(f"{x:.1f} {y:.1f}" for y, x in corners[: -1 if closed else None])
        path += f"M{steps}{'Z' if closed else ''}"
        if len(path) > OUTLINE_CHARS:
            break
    rows, columns = values.shape
    return {"path": path, "box": f"0 0 {columns} {rows}"}


def readable(value: float | str | None, digits: int = 3) -> str:
    """A figure as the page shows it: with a true minus, and powers of ten in place of `e+06`."""
    text = number(value, digits)
    if isinstance(value, str):
        return text
    mantissa, _, power = text.partition("e")
    exponent = f" × 10{str(int(power)).translate(SUPERSCRIPT)}" if power else ""
    return mantissa.replace("-", "−") + exponent


def signed(value: float) -> str:
    """A share of the fused score with its sign; what is less than half a hundredth is none."""
    text = readable(round(value, 2) or 0.0, 2)
    return text if text.startswith("−") else f"+{text}"
