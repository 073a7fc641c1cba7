"""One explained image: all its numbers, and its pictures for files, pages and notebooks."""

from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from msvae.core.config import Resize
from msvae.evaluation.conformal import conformal_p
from msvae.scores.catalog import SHORT_UNITS, TITLES, UNITS
from msvae.viz import overlays as pictures
from msvae.viz.overlays import Map, Pixels
from msvae.viz.text import Interval, in_words, number, percent, tail

SIDE = 360  # px of one view at most
SHOWN = (
    "residual",
    "spatial",
    "structure",
    "inspection",
    "fused",
    "gradcam_fused",
    "hirescam_fused",
)
CAMS = ("gradcam", "hirescam")
NAMES = {TITLES[name]: name for name in SHOWN}


@dataclass(frozen=True)
class Region:
    """A connected part of the picture where the fused map reaches the family-wise level."""

    box: tuple[int, int, int, int]  # left, top, right, bottom; px of the image, right/bottom beyond
    area: int  # px of the image
    peak: float  # of the fused map, nats
    p: float  # family-wise p-value of the peak


@dataclass(frozen=True)
class Nearest:
    """A normal training image that lies near in the latent space."""

    name: str
    distance: float  # Mahalanobis, standard deviations
    thumbnail: Pixels


@dataclass(frozen=True, repr=False)
class Explanation:
    """All that speaks for the decision on one image; shows itself in a notebook."""

    name: str
    image: Pixels  # (H, W, 3) at the image's own size
    resize: Resize
    reconstruction: Pixels  # (S, S, 3) at the model's resolution
    model_maps: dict[str, Map]  # (S, S) each
    level: float  # of the fused map: normal images reach it at `level_rate`
    level_rate: float
    peaks: NDArray[np.float64]  # maxima of the fused maps of the conformal images
    scales: dict[str, Interval]  # where the colours of each map begin and end, by those images
    regions: tuple[Region, ...]
    scores: dict[str, float]
    p_values: dict[str, float]
    flagged: bool
    contributions: dict[str, float]  # nats; they add up to the fused score
    nearest: tuple[Nearest, ...]
    readings: dict[str, str]  # each score in words, the most telling first
    notes: tuple[str, ...] = ()

    @property
    def maps(self) -> dict[str, Map]:
        """Every map at the image's own size, (H, W); NaN where the model did not look."""
        rows, columns = self.image.shape[:2]
        return {k: placed(v, rows, columns, self.resize) for k, v in self.model_maps.items()}

    @property
    def pixel_p(self) -> Map:
        """Family-wise p-values of the pixels of the fused map, (H, W)."""
        fused = self.maps["fused"]
        known = np.nan_to_num(fused, nan=-np.inf).astype(np.float64)
        return conformal_p(known.ravel(), self.peaks).reshape(fused.shape).astype(np.float32)

    def scale(self, name: str) -> Interval:
        """Where a map's colours begin and end: by the calibration images, of a CAM by its own reach.

        A CAM has no unit, and its sign alone means something.
        """
        if name in self.scales:
            return self.scales[name]
        reach = float(np.abs(self.model_maps[name]).max()) or 1.0
        return -reach, reach

    def to_json(self) -> dict[str, Any]:
        """All numbers, without the pictures."""
        return {
            "image": self.name,
            "size": [self.image.shape[1], self.image.shape[0]],
            "flagged": self.flagged,
            "p": self.p_values["fused"],
            "scores": self.scores,
            "p_values": self.p_values,
            "in_words": self.readings,
            "contributions": self.contributions,
            "map_level": {
                "map": "fused",
                "value": self.level,
                "family_wise_rate": self.level_rate,
                "n": len(self.peaks),
            },
            "maps": {k: _extremes(v, UNITS.get(k, "")) for k, v in self.model_maps.items()},
            "regions": [
                {"box": list(r.box), "area": r.area, "peak": r.peak, "p": r.p} for r in self.regions
            ],
            "nearest": [{"image": n.name, "distance": n.distance} for n in self.nearest],
            "notes": list(self.notes),
        }

    def __repr__(self) -> str:
        return f"<Explanation of {tail(self.name)}: {verdict(self)}>"

    def _repr_html_(self) -> str:
        return html(self)


def _extremes(values: Map, unit: str) -> dict[str, Any]:
    return {"min": float(values.min()), "max": float(values.max()), "unit": unit}


def placed(values: Map, rows: int, columns: int, resize: Resize) -> Map:
    """A map of the model's square, (S, S), where it belongs in an image of (rows, columns)."""
    if resize == "stretch":
        return _resized(values, rows, columns)
    side = min(rows, columns)
    top, left = (rows - side) // 2, (columns - side) // 2
    out = np.full((rows, columns), np.nan, dtype=np.float32)
    out[top : top + side, left : left + side] = _resized(values, side, side)
    return out


def _resized(values: Map, rows: int, columns: int) -> Map:
    image = Image.fromarray(values.astype(np.float32))
    return np.asarray(image.resize((columns, rows), Image.Resampling.BILINEAR))


def signed(name: str) -> bool:
    """Whether a map's sign means something, so that its colours diverge about 0."""
    return name == "difference" or name.startswith(CAMS)


def views(e: Explanation) -> dict[str, Pixels]:
    """Input, reconstruction, each map over the image, and the regions, by title."""
    image = pictures.shrink(e.image, SIDE)
    rows, columns = image.shape[:2]
    drawn = {"Input": image, "Reconstruction": e.reconstruction}
    whole = e.maps
    for name in SHOWN:
        if name in whole:
            drawn[TITLES[name]] = pictures.overlay(image, whole[name], *e.scale(name), signed(name))
    fused = pictures.fit_map(np.nan_to_num(whole["fused"], nan=-1e9), rows, columns)
    drawn["Regions"] = (
        pictures.outline(image, fused.astype(np.float64) >= e.level) if e.regions else image
    )
    return drawn


def figure(e: Explanation) -> Any:
    """The panel: what went in, what the model expected, where it was surprised, and the verdict."""
    from matplotlib.figure import Figure

    drawn = views(e)
    columns = 4
    rows = -(-len(drawn) // columns) + 1
    panel = Figure(figsize=(3.1 * columns, 3.25 * (rows - 1) + 2.1), layout="constrained")
    heights = [3.0] * (rows - 1) + [1.7]
    grid = panel.add_gridspec(rows, columns, height_ratios=heights)
    for i, (title, pixels) in enumerate(drawn.items()):
        axes = panel.add_subplot(grid[i // columns, i % columns])
        axes.imshow(
            pixels, interpolation="nearest" if min(pixels.shape[:2]) < 96 else "antialiased"
        )
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_axis_off()
        if title in NAMES:
            _bar(axes, e, NAMES[title])
    _shares(panel.add_subplot(grid[-1, :2]), e)
    _words(panel.add_subplot(grid[-1, 2:]), e)
    panel.suptitle(f"{tail(e.name)}: {verdict(e)}", fontsize=12, x=0.01, ha="left")
    return panel


def _bar(axes: Any, e: Explanation, name: str) -> None:
    """The colours of a map below it, with its unit."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    colours = ScalarMappable(Normalize(*e.scale(name)), pictures.palette_name(signed(name)))
    bar = axes.figure.colorbar(
        colours, ax=axes, orientation="horizontal", fraction=0.05, pad=0.02, aspect=30
    )
    bar.ax.tick_params(labelsize=7)
    bar.set_label(UNITS.get(name, "its own scale"), fontsize=7)


def verdict(e: Explanation) -> str:
    """The decision in a few words."""
    p = e.p_values["fused"]
    return f"{'flagged' if e.flagged else 'passed'}, p = {number(p, 4)}"


def _shares(axes: Any, e: Explanation) -> None:
    names = [k for k, v in sorted(e.contributions.items(), key=lambda kv: kv[1]) if abs(v) > 1e-6]
    values = [e.contributions[k] for k in names]
    colours = ["#D55E00" if v > 0 else "#0072B2" for v in values]
    axes.barh(names, values, color=colours, height=0.7)
    axes.axvline(0, color="#888888", linewidth=0.8)
    axes.set_title("What made the fused score (nats)", fontsize=10, loc="left")
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _words(axes: Any, e: Explanation) -> None:
    lines = [f"{in_words(e.p_values['fused'], len(e.peaks))}."]
    told = [words for name, words in e.readings.items() if name != "fused"]
    lines += [words for words in told[:3] if not words.startswith("ordinary")]
    for r in e.regions[:4]:
        left, top, right, bottom = r.box
        lines.append(
            f"region {left},{top}–{right},{bottom}: peak {r.peak:.1f} nats, p {number(r.p, 4)}"
        )
    if len(e.regions) > 4:
        lines.append(f"and {len(e.regions) - 4} smaller regions")
    if not e.regions:
        lines.append(f"no region reaches the level of {percent(e.level_rate)} of normal images")
    lines += list(e.notes)
    axes.text(0, 0.98, "\n".join(lines), va="top", fontsize=9, wrap=True, transform=axes.transAxes)
    axes.set_axis_off()


def _range(e: Explanation, title: str) -> str:
    """The colours of a map with the values at their ends, as HTML; nothing for a picture."""
    if title not in NAMES:
        return ""
    name = NAMES[title]
    low, high = (number(value, 2) for value in e.scale(name))
    return (
        f'<br><small>{low} <span style="display:inline-block;width:50px;height:6px;background:'
        f'{pictures.gradient(signed(name))}"></span> {high} {SHORT_UNITS.get(name, "")}</small>'
    )


def html(e: Explanation) -> str:
    """The panel's views beside each other, self-contained."""
    cells = "".join(
        f'<figure style="margin:0"><img alt="{escape(title)}" style="width:150px" '
        f'src="{pictures.data_uri(pixels, SIDE)}"><figcaption>{escape(title)}{_range(e, title)}'
        "</figcaption></figure>"
        for title, pixels in views(e).items()
    )
    shares = ", ".join(
        f"{escape(k)} {v:+.2f}" for k, v in sorted(e.contributions.items(), key=lambda kv: -kv[1])
    )
    words = escape(in_words(e.p_values["fused"], len(e.peaks)))
    return (
        f"<div><p><b>{escape(tail(e.name))}</b>: {escape(verdict(e))}; {words}.</p>"
        f'<div style="display:flex;flex-wrap:wrap;gap:8px">{cells}</div>'
        f"<p>Fused score {e.scores['fused']:.2f} nats = {shares}</p></div>"
    )
