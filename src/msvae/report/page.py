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

from msvae.core.errors import DataError
from msvae.core.files import write_text
from msvae.report import thresholds
from msvae.report.gallery import Gallery, fit_galleries, readable, signed
from msvae.report.summary import Summary, promise, sentence, tiles
from msvae.report.tables import Table
from msvae.report.thresholds import ThresholdData
from msvae.viz import overlays as pictures
from msvae.viz.text import Interval, clip, percent, tail

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
    thresholds: tuple[ThresholdData, ...] = ()
    comparison: Comparison | None = None
    galleries: tuple[Gallery, ...] = ()
    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()
    unreadable: tuple[tuple[str, str], ...] = ()  # name, reason
    facts: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # group -> name -> value

    def __post_init__(self) -> None:
        if not self.summaries:
            raise DataError("a report needs at least one summary")


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


def _slider(o: ThresholdData) -> dict[str, Any]:
    axis = thresholds.Axis.of(o)
    return {
        "name": o.name,
        "data": thresholds.page_data(o),
        "paths": [thresholds.outline_path(group, axis) for group in o.groups],
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
