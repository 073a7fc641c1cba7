"""What the command line shows: progress bars, tables and one-line messages, by rich."""

import csv
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.table import Table

from msvae.evaluation.conformal import Decision
from msvae.evaluation.table import ScoreTable
from msvae.viz.text import clip

T = TypeVar("T")
LONG = 2.0  # seconds: of what takes longer the end is said, too


class LineProgress:
    """A `Progress` for where no terminal is: a line now and then, no bars."""

    def __init__(self, console: Console, seconds: float = 10.0) -> None:
        """`seconds` lie between two lines at least; short tasks say nothing."""
        self.console, self.seconds, self.remark = console, seconds, ""

    def track(self, items: Iterable[T], task: str, total: int) -> Iterator[T]:
        """Yield the items; say now and then how many are done."""
        began = said = time.monotonic()
        done, self.remark = 0, ""  # not an earlier task's
        for item in items:
            yield item
            done, now = done + 1, time.monotonic()
            if now - said >= self.seconds:
                said = now
                self._say(f"{task}: {done:,} of {total:,}, {now - began:.0f} s", self.remark)
        if time.monotonic() - began >= LONG:
            self._say(f"{task}: done, {done:,} in {time.monotonic() - began:.0f} s")

    def note(self, text: str) -> None:
        """Words for the next line."""
        self.remark = text

    def _say(self, *parts: str) -> None:
        text = "; ".join(part for part in parts if part)
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


class BarProgress:
    """A `Progress` that draws one bar a task on stderr."""

    def __init__(self, console: Console) -> None:
        columns: list[ProgressColumn] = [
            TextColumn("{task.description:<16}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[note]}"),
        ]
        self._bars = Bars(*columns, console=console, refresh_per_second=5)
        self._running = 0
        self._task: Any = None

    def track(self, items: Iterable[T], task: str, total: int) -> Iterator[T]:
        """Yield the items one by one while the bar grows."""
        if not self._running:
            self._bars.start()
        self._running += 1
        mine = self._task = self._bars.add_task(task, total=total, note="")
        try:
            for item in items:
                yield item
                self._bars.advance(mine)
        finally:
            self._running -= 1
            if not self._running:
                self._bars.stop()
                for finished in self._bars.task_ids:
                    self._bars.remove_task(finished)

    def note(self, text: str) -> None:
        """Show a few words beside the newest bar."""
        if self._task is not None and self._task in self._bars.task_ids:
            self._bars.update(self._task, note=escape(text))


def score_table(title: str, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> Table:
    """A table of the rows; `columns` maps a key to its heading. Numbers get three decimals."""
    table = Table(title=escape(title), title_justify="left", header_style="bold")
    for i, heading in enumerate(columns.values()):
        table.add_column(heading, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        style = "bold" if row.get("emphasis") else None
        table.add_row(*[_cell(row.get(key)) for key in columns], style=style)
    return table


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else escape(str(value))


class Screen:
    """The terminal: bars and remarks go to stderr, results to stdout."""

    def __init__(self) -> None:
        self.out, self.err = Console(), Console(stderr=True)
        terminal = self.err.is_terminal
        self.progress = BarProgress(self.err) if terminal else LineProgress(self.err)

    def say(self, text: str) -> None:
        """One line on stderr."""
        self.err.print(text, markup=False, highlight=False, soft_wrap=True)

    def unreadable(self, count: int, path: Path) -> None:
        """Where the images are named that could not be read."""
        self.say(f"{count} images could not be read: {path} names them")

    def evaluation(self, name: str, result: Mapping[str, Any]) -> None:
        """What every score, and every map, achieves on labelled images."""
        self.folder_table(f"What each score achieves on {name}", result)
        self.maps_table(result)
        self.false_alarms(result["false_alarm"])

    def benchmark(self, result: Mapping[str, Any]) -> None:
        """The tables of a benchmark's result, whatever its form."""
        if "protocols" in result:
            self.benchmark_table(result)
        elif "categories" in result:
            self.categories_table(result)
        else:
            self.evaluation(result["evaluation"], result)

    def categories_table(self, result: Mapping[str, Any]) -> None:
        """The fused score and map of every category, and their mean."""
        columns = {
            "category": "category",
            "auroc": "image AUROC",
            "average_precision": "image AP",
            "pixel": "pixel AUROC",
            "aupro": "AUPRO@0.3",
        }
        rows = [_category_row(name, block) for name, block in result["categories"].items()]
        mean = result["mean"]
        title = f"mean of {mean['of']} of {mean['categories']}"
        rows.append({**_category_row(title, mean), "emphasis": True})
        self.out.print(score_table(result["benchmark"], rows, columns))
        for name, block in result["categories"].items():
            if "failed" in block:
                self.out.print(f"{name}: {block['failed']}", highlight=False, markup=False)

    def folder_table(self, title: str, result: Mapping[str, Any]) -> None:
        """The scores of a folder evaluation."""
        rows = [_score_row(name, block) for name, block in result["scores"].items()]
        self.out.print(score_table(title, rows, {"score": "score", **HEADINGS}))

    def benchmark_table(self, result: Mapping[str, Any]) -> None:
        """Every score under every protocol, the published figures beside them, and what they mean."""
        from msvae.report.summary import one_sided_note

        protocols = result["protocols"]
        columns = {"score": "score"}
        for name in protocols:
            columns |= {f"{name} {key}": f"{name[:6]}. {text}" for key, text in HEADINGS.items()}
            del columns[f"{name} average_precision"]
        columns["published"] = "seed, quoted"
        rows = []
        for score in next(iter(protocols.values()))["scores"]:
            row: dict[str, Any] = {"score": score, "emphasis": score == "fused"}
            for name, block in protocols.items():
                cells = _score_row(score, block["scores"][score])
                row |= {f"{name} {key}": cells[key] for key in HEADINGS}
            row["published"] = _quoted(result["published"].get(score))
            rows.append(row)
        self.out.print(score_table(result["benchmark"], rows, columns))
        for name, block in protocols.items():
            self.out.print(f"[bold]{name}[/bold]", end=": ")
            self.false_alarms(block["false_alarm"])
            self.out.print(f"[bold]{name}[/bold]: {one_sided_note(block)}", highlight=False)
        stands_in = result["data"]["anomalous"]["stands_in"]
        if stands_in:
            sha256 = result["data"]["anomalous"]["sha256"]
            self.out.print(f"CIFAR-10: {stands_in} (sha256 {sha256[:16]}…)", highlight=False)

    def maps_table(self, result: Mapping[str, Any]) -> None:
        """The figures of the maps, where there were masks."""
        if not result.get("maps"):
            return
        columns = {
            "map": "map",
            "auroc": "pixel AUROC",
            "average_precision": "pixel AP",
            "f1_max": "F1-max (oracle)",
            "aupro": "AUPRO@0.3",
        }
        rows = [{"map": k, "emphasis": k == "fused", **v} for k, v in result["maps"].items()]
        self.out.print(score_table("Where in the picture", rows, columns))

    def false_alarms(self, rates: Mapping[str, Any]) -> None:
        """The rate that was asked for and the one that came."""
        low, high = rates["expected95"]
        self.out.print(
            f"false alarms: {rates['realised']:.3f} realised, {rates['target']:g} asked for "
            f"(95 % of such sets lie between {low:.3f} and {high:.3f})",
            highlight=False,
        )

    def kinds(self, table: ScoreTable) -> None:
        """How many images of each kind were flagged."""
        if table.kinds is None or table.flagged is None:
            return
        kinds = list(dict.fromkeys(table.kinds))
        hits = {
            kind: [bool(f) for f, k in zip(table.flagged, table.kinds, strict=True) if k == kind]
            for kind in kinds
        }
        parts = [f"{kind} {sum(hit)} of {len(hit)}" for kind, hit in hits.items()]
        self.out.print("flagged: " + ", ".join(parts), highlight=False)

    def scores(self, table: ScoreTable) -> None:
        """The decision on each image: a table on a terminal, else lines of cells between tabs.

        Name, p and decision always show: the fused score where there is room, and of a name that is
        too long the middle is left out.
        """
        flagged = np.zeros(len(table), bool) if table.flagged is None else table.flagged
        rows: list[dict[str, Any]] = [
            {"path": path, "p": float(p), "flagged": "yes" if flag else "no", "fused": float(fused)}
            for path, p, flag, fused in zip(
                table.paths, table.p_values["fused"], flagged, table.scores["fused"], strict=True
            )
        ]
        if not self.out.is_terminal:
            lines = csv.writer(sys.stdout, delimiter="\t", lineterminator="\n")
            lines.writerow(SCORE_COLUMNS)
            lines.writerows([row["path"], *_digits(row)] for row in rows)
            return
        longest = max((cell_len(row["path"]) for row in rows), default=0)
        columns = dict(SCORE_COLUMNS)
        room = self.out.width - _width(columns)
        if longest > room:
            del columns["fused"]
            room = self.out.width - _width(columns)
        for row in rows:
            row["path"] = clip(row["path"], max(room, SHORTEST))
        self.out.print(score_table("", rows, columns), soft_wrap=True)

    def scored(self, table: ScoreTable, path: Path) -> None:
        """Where the table was written, and what it says."""
        flagged = 0 if table.flagged is None else int(table.flagged.sum())
        self.say(f"{path}: {len(table)} images, {flagged} flagged")

    def decision(self, decision: Decision) -> str:
        """The rule in words."""
        if decision.rule == "conformal":
            return f"flags at a false-alarm rate of {decision.target_fpr:g}"
        return f"flags when the {decision.score} score reaches {decision.threshold:.4g}"


SCORE_COLUMNS = {"path": "image", "p": "p", "flagged": "flagged", "fused": "fused score"}
SHORTEST = 12  # characters of a name at least
NUMBER = 7  # characters of a number at most: 999.999


def _digits(row: Mapping[str, Any]) -> list[str]:
    return [f"{row['p']:.6g}", row["flagged"], f"{row['fused']:.6g}"]


def _width(columns: Mapping[str, str]) -> int:
    """Of a table of these columns, but for the cells of the first."""
    others = list(columns.values())[1:]
    return sum(max(len(heading), NUMBER) + 3 for heading in others) + 4


HEADINGS = {
    "auroc": "AUROC",
    "interval": "95 %",
    "average_precision": "AP",
    "fpr_at_95_tpr": "FPR@95",
    "accuracy": "acc.",
    "f1": "F1",
}


def _score_row(name: str, block: Mapping[str, Any]) -> dict[str, Any]:
    frozen = block.get("frozen") or {}
    low, high = block["auroc_ci95"]
    return {
        "score": name,
        "emphasis": name == "fused",
        "auroc": block["auroc"],
        "interval": f"{low:.3f}–{high:.3f}",
        "average_precision": block["average_precision"],
        "fpr_at_95_tpr": block["fpr_at_95_tpr"],
        "accuracy": frozen.get("accuracy"),
        "f1": frozen.get("f1"),
    }


def _category_row(name: str, block: Mapping[str, Any]) -> dict[str, Any]:
    image = block.get("scores", {}).get("fused", {})
    pixel = block.get("maps", {}).get("fused", {})
    return {
        "category": name,
        "auroc": image.get("auroc"),
        "average_precision": image.get("average_precision"),
        "pixel": pixel.get("auroc"),
        "aupro": pixel.get("aupro"),
    }


def _quoted(figures: Mapping[str, float] | None) -> str | None:
    if figures is None:
        return None
    accuracy = f", acc. {figures['accuracy']:.3f}" if "accuracy" in figures else ""
    return f"AUROC {figures['auroc']:.2f}, F1 {figures['f1']:.2f}{accuracy}"
