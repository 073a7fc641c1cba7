"""Results into one self-contained HTML page: no network access, bounded in size.

The caller fills `Report` from plain arrays and numbers; every part but the title and the summaries
may stay empty. Images are uint8 (H, W, 3), maps float32 (H, W), coloured here.
"""

import base64
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from msvae import operating, pictures
from msvae.errors import DataError
from msvae.files import write_text
from msvae.gallery import Gallery, fit_galleries, readable, signed
from msvae.operating import Operating
from msvae.wording import Interval, Summary, clip, percent, promise, sentence, tail, tiles

FIGURE_BYTES = 1_500_000
ROWS_LIMIT = 200
WIDE = 2.2  # a drawing that is this many times as wide as high has a row of its own


@dataclass(frozen=True, kw_only=True)
class ScoreFigures:
    """One score under one protocol; accuracy and F1 are those at the frozen threshold."""

    auroc: float
    auroc_ci95: Interval | None = None
    average_precision: float | None = None
    fpr_at_95_tpr: float | None = None
    accuracy: float | None = None
    f1: float | None = None

    @classmethod
    def from_metrics(cls, block: Mapping[str, Any]) -> "ScoreFigures":
        """From one entry of `scores` of a metrics.json."""
        frozen, interval = block.get("frozen") or {}, block.get("auroc_ci95")
        return cls(
            auroc=block["auroc"],
            auroc_ci95=tuple(interval) if interval else None,
            average_precision=block.get("average_precision"),
            fpr_at_95_tpr=block.get("fpr_at_95_tpr"),
            accuracy=frozen.get("accuracy"),
            f1=frozen.get("f1"),
        )


@dataclass(frozen=True, kw_only=True)
class Published:
    """Figures that others published for a score: quoted, not comparable."""

    auroc: float | None = None
    accuracy: float | None = None
    f1: float | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Every score under every protocol; the first protocol leads."""

    protocols: Mapping[str, Mapping[str, ScoreFigures]]
    highlight: str = "fused"
    about: Mapping[str, str] = field(default_factory=dict)  # score -> a few words
    published: Mapping[str, Published] = field(default_factory=dict)
    published_by: str = "Quoted"
    notes: tuple[str, ...] = ()

    @classmethod
    def from_metrics(
        cls, protocols: Mapping[str, Mapping[str, Mapping[str, Any]]], **more: Any
    ) -> "Comparison":
        """From the `scores` blocks of a metrics.json, by protocol; `more` are the other fields."""
        read = {
            name: {score: ScoreFigures.from_metrics(block) for score, block in scores.items()}
            for name, scores in protocols.items()
        }
        return cls(protocols=read, **more)

    @property
    def scores(self) -> list[str]:
        """The names of all scores, in order of appearance."""
        return list(dict.fromkeys(s for scores in self.protocols.values() for s in scores))


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of figures; a row is its name and its cells, None where there is no figure."""

    title: str
    columns: tuple[str, ...]
    rows: Mapping[str, Sequence[float | str | None]]
    about: str = ""
    highlight: str = "fused"
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A drawing as SVG text; what it shows in words for those who cannot see it."""

    title: str
    svg: str
    alt: str
    caption: str = ""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything on the page, in the order in which it is shown; the first summary leads."""

    title: str
    summaries: tuple[Summary, ...]
    subtitle: str = ""
    notes: tuple[str, ...] = ()
    thresholds: tuple[Operating, ...] = ()
    comparison: Comparison | None = None
    galleries: tuple[Gallery, ...] = ()
    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()
    unreadable: tuple[tuple[str, str], ...] = ()  # name, reason
    facts: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # group -> name -> value

    def __post_init__(self) -> None:
        if not self.summaries:
            raise DataError("a report needs at least one summary")


MAP_COLUMNS = {
    "auroc": "Pixel AUROC",
    "average_precision": "Pixel AP",
    "f1_max": "F1-max (oracle)",
    "aupro": "AUPRO@0.3",
}
EXPLANATION_COLUMNS = {
    "pointing_game": "Peak in defect",
    "deletion_fused_win_rate": "Fused: further",
    "deletion_fused_median": "by (nats)",
    "deletion_fused_median_moved": "moved: by (nats)",
    "deletion_spatial_win_rate": "Spatial: further",
    "deletion_spatial_median": "by (sd)",
    "deletion_spatial_median_moved": "moved: by (sd)",
    "weight_randomisation": "Random weights",
}
EXPLANATIONS_ABOUT = (
    "Deletion: the tenth of the pixels where a map is highest is replaced by the reconstruction. "
    "How often that makes a score fall further than the same pixels moved to a random place do, "
    "and by how much (median), here and there. Random weights: the rank correlation with "
    "the map of a network that learned nothing, near 0 where a map shows what was learned; "
    "structure reads the picture alone, so its is 1. Where the VAE rebuilds textures too "
    "smoothly, the replaced patch is itself unusual and the fused score rises."
)
MAPS_ABOUT = (
    "How well each map points at the true defects, pixel by pixel: 1 is perfect, and an AUROC of "
    "0.5 is guessing. AUPRO counts small defects as much as large ones. F1-max takes its "
    "threshold from these very images, so nothing in use can exceed it."
)


def maps_table(maps: Mapping[str, Mapping[str, float]], **more: Any) -> Table:
    """The `maps` block of a metrics.json as a table; keys it does not know become columns too."""
    present = dict.fromkeys(key for figures in maps.values() for key in figures)
    keys = [k for k in MAP_COLUMNS if k in present] + [k for k in present if k not in MAP_COLUMNS]
    columns = tuple(MAP_COLUMNS.get(k, k.replace("_", " ").capitalize()) for k in keys)
    rows = {name: tuple(figures.get(k) for k in keys) for name, figures in maps.items()}
    words = {"title": "Where in the picture", "about": MAPS_ABOUT}
    return Table(**{**words, "columns": columns, "rows": rows, **more})


ABLATION_ABOUT = (
    "The frozen fusion with one score silenced, and the same scores joined otherwise. The intervals "
    "are 95 % bootstrap intervals, of the AUROC and of the fused score's minus it."
)


def ablation_table(variants: Mapping[str, Mapping[str, Any]], **more: Any) -> Table:
    """The `ablation` block of a metrics.json as a table."""

    def cells(block: Mapping[str, Any]) -> tuple[float | str | None, ...]:
        area, gain = block["auroc_ci95"], block["fused_minus_ci95"]
        return (
            block["auroc"],
            f"{area[0]:.3f} to {area[1]:.3f}",
            f"{gain[0]:+.3f} to {gain[1]:+.3f}",
        )

    columns = ("AUROC", "95 % interval", "fused minus this")
    rows = {name: cells(block) for name, block in variants.items()}
    words = {"title": "What each part is worth", "about": ABLATION_ABOUT}
    return Table(**{**words, "columns": columns, "rows": rows, **more})


def ablation_markdown(sets: Mapping[str, Mapping[str, Any]]) -> str:
    """The AUROCs of every score, and of every variant, of several sets side by side.

    `sets` are blocks of `metrics.json` by the name of their column.
    """
    lines = []
    for title, key in (("Each score alone", "scores"), ("The fused score changed", "ablation")):
        blocks = {name: block[key] for name, block in sets.items() if key in block}
        rows = list(dict.fromkeys(row for block in blocks.values() for row in block))
        lines += [f"| {title} | " + " | ".join(blocks) + " |", "|---" * (len(blocks) + 1) + "|"]
        lines += [_markdown_row(row, [block.get(row) for block in blocks.values()]) for row in rows]
        lines.append("")
    return "\n".join(lines)


def _markdown_row(name: str, figures: Sequence[Mapping[str, Any] | None]) -> str:
    cells = []
    for found in figures:
        if found is None:
            cells.append("–")
            continue
        low, high = found["auroc_ci95"]
        cells.append(f"{found['auroc']:.3f} ({low:.3f}–{high:.3f})")
    return f"| {name} | " + " | ".join(cells) + " |"


def explanations_table(kinds: Mapping[str, Mapping[str, float]], **more: Any) -> Table:
    """The `explanations` block of a metrics.json as a table."""
    keys = [k for k in EXPLANATION_COLUMNS if any(k in figures for figures in kinds.values())]
    columns = tuple(EXPLANATION_COLUMNS[k] for k in keys)
    rows = {name: tuple(figures.get(k) for k in keys) for name, figures in kinds.items()}
    count = max((int(figures.get("images", 0)) for figures in kinds.values()), default=0)
    words = {
        "title": "Do the maps explain?",
        "about": f"On {count} anomalous images. {EXPLANATIONS_ABOUT}",
    }
    return Table(**{**words, "columns": columns, "rows": rows, **more})


def render(report: Report) -> str:
    """The page."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    here = Path(__file__).parent / "templates"
    env = Environment(
        loader=FileSystemLoader(here),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters |= {"percent": percent, "number": readable, "tail": tail, "clip": clip}
    env.filters |= {"signed": signed, "unbroken": _unbroken}
    script = (here / "report.js").read_text(encoding="utf-8")
    figures, dark = _figures(report.figures)
    return env.get_template("report.html.j2").render(
        report=report,
        summaries=[(s, sentence(s), promise(s), tiles(s)) for s in report.summaries],
        sliders=[_slider(o) for o in report.thresholds],
        galleries=fit_galleries(report.galleries, report.summaries[0].n_conformal),
        figures=figures,
        css=(here / "report.css").read_text(encoding="utf-8") + dark,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        rows_limit=ROWS_LIMIT,
    )


def write_report(path: str | os.PathLike[str], report: Report) -> Path:
    """Write the page whole or not at all; returns its path."""
    target = Path(path)
    write_text(target, render(report))
    return target


def _slider(o: Operating) -> dict[str, Any]:
    axis = operating.Axis.of(o)
    return {
        "name": o.name,
        "data": operating.page_data(o),
        "paths": [operating.outline_path(group, axis) for group in o.groups],
        "ticks": axis.ticks(),
        "bent": axis.bent,
    }


def _unbroken(text: str) -> str:
    """A text in which no line ends between a figure and its per cent sign."""
    return text.replace(" %", "\u00a0%")


def _figures(figures: Sequence[Figure]) -> tuple[list[tuple[Figure, str, bool]], str]:
    """Each figure, its themed SVG (empty: too large), whether it is wide; and the dark colours."""
    out, colours = [], set[str]()
    room = 2 * FIGURE_BYTES
    for k, figure in enumerate(figures):
        svg = ""
        if len(figure.svg) <= min(FIGURE_BYTES, room):
            svg, used = pictures.themed_svg(figure.svg, f"f{k}-")
            colours |= used
            room -= len(svg)
        out.append((figure, svg, _is_wide(svg)))
    lines = "".join(f"--fig-{c[1:]}:{pictures.for_dark(c)};" for c in sorted(colours))
    return out, f"@media screen and (prefers-color-scheme: dark){{:root{{{lines}}}}}\n"


def _is_wide(svg: str) -> bool:
    box = re.search(r'viewBox="[\d.-]+ [\d.-]+ ([\d.]+) ([\d.]+)"', svg)
    return box is not None and float(box[1]) > WIDE * float(box[2])
