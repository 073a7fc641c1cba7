"""`python -m bench.before --before DIR`: this checkout against one of another commit, side by side.

DIR holds its own virtual environment in DIR/.venv, with that checkout installed editable. Each side
scores by a run that it fitted itself, quickly; contestants take turns, each a process of its own.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from bench import results
from bench.material import FITTED, SIDES, Material, prepare
from bench.peers import HERE, Peer
from bench.peers.checkout import ONE
from bench.rows import Row, compared, interleaved, rates, single
from msvae.core.processor import LIMIT, instruction_set

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 5
BOTTLE = Path("mvtec-256/bottle/train/good")
BOTTLE_SIDE = 128  # px
CODE = {".py", ".c", ".css", ".js", ".j2", ".html"}
AMX = "AVX512_CORE_AMX"
BARS = {64: ">= 1.3", 128: ">= 1.3"}  # by the side of the images, px
BARS_AVX2 = {64: ">= 1.8", 128: ">= 1.5"}
BARS_AMX = {"bf16": ">= 0.6", "f32": ">= 0.33"}  # by the precision that ran here


class Case(NamedTuple):
    """What the sides are held to."""

    words: str  # in the row's name
    ours: dict[str, str]  # environment variables
    theirs: dict[str, str]
    precision: str  # of the runs' settings


@dataclass(frozen=True)
class Checkout:
    """One side: its sources, its python, and a folder for its runs and its cache."""

    root: Path
    python: Path
    work: Path
    peers: list[Peer] = field(default_factory=list)

    def start(self, *arguments: object, variables: dict[str, str] | None = None) -> Peer:
        """A process of this side that has set its task up, with environment variables of its own."""
        own = {"MSVAE_CACHE": str(self.work / "cache"), "PYTHONPATH": "", **(variables or {})}
        self.work.mkdir(parents=True, exist_ok=True)
        peer = Peer(self.python, HERE / "checkout.py", self.work / "log.txt", own)
        self.peers.append(peer)
        peer.start(str(self.root), *map(str, arguments))
        return peer

    def run(self, material: Material, size: int, precision: str) -> Path:
        """Its run at `size` px, fitted quickly."""
        run = self.work / f"run-{size}-{precision}"
        if not (run / "config.json").is_file():
            self.seconds("fit_few", material.many(FITTED, size), run, size, precision)
        return run

    def seconds(self, *arguments: object) -> float:
        """Of a task that is done once, in a process of its own."""
        peer = self.start(*arguments)
        try:
            return peer.once()
        finally:
            peer.stop()

    def stop(self) -> None:
        """End all that was started."""
        while self.peers:
            self.peers.pop().stop()

    def lines(self) -> int:
        """Of code and templates in src/."""
        files = (p for p in (self.root / "src").rglob("*") if p.suffix in CODE)
        return sum(len(p.read_text(encoding="utf-8").splitlines()) for p in files)


class Sides(NamedTuple):
    """Here, and the other checkout."""

    now: Checkout
    before: Checkout

    def measured(
        self, task: str, material: Material, size: int, subject: Path, case: Case
    ) -> "Measured":
        """Rounds of a task on both sides, each by its own run at `size` px."""
        run, other = (side.run(material, size, case.precision) for side in self)
        try:
            now = self.now.start(task, run, subject, variables=case.ours)
            before = self.before.start(task, other, subject, variables=case.theirs)
            seconds = interleaved({"now": now.once, "before": before.once}, ROUNDS)
        finally:
            self.stop()
        info = json.loads(now.greeting)
        return Measured(seconds["now"], seconds["before"], info["precision"], _note(info, run))

    def stop(self) -> None:
        """End all that was started."""
        for side in self:
            side.stop()


class Measured(NamedTuple):
    """Seconds of each round, and what computed here."""

    now: list[float]
    before: list[float]
    precision: str
    note: str


def _note(info: dict[str, Any], run: Path) -> str:
    """What computed, and whether the run allows bfloat16."""
    facts = json.loads((run / "config.json").read_text(encoding="utf-8"))
    allowed = facts.get("precision", {}).get("bfloat16", False)
    words = "allows bfloat16" if allowed else "does not allow bfloat16"
    return f"{info['library']}, {info['precision']}, {info['instruction_set']}; the run {words}"


AS_IT_IS = Case("", {}, {}, "auto")
# In float32: older checkouts ask the processor alone whether it has bfloat16, and then fail.
HELD = Case(", both held to AVX2", {LIMIT: "AVX2"}, {LIMIT: "AVX2"}, "fp32")
EXACT = Case(", this side in float32", {LIMIT: "AVX512_CORE"}, {}, "auto")


def cases() -> tuple[Case, ...]:
    """The machine as it is, both sides held to AVX2, and with AMX this side in float32."""
    return (AS_IT_IS, HELD, *([EXACT] if instruction_set() == AMX else []))


def bar(case: Case, precision: str, size: int) -> str:
    """What is asked of images a second against before, by the precision that ran here."""
    if case is HELD:
        return BARS_AVX2[size]
    return BARS_AMX[precision] if instruction_set() == AMX else BARS[size]


def rows(sides: Sides, material: Material, bottle: Path | None) -> Iterator[Row]:
    """Every row against the other checkout; the fit only where a folder is given."""
    yield _lines(sides)
    for size in SIDES:
        yield _one_image(sides, material, size)
        for case in cases():
            yield _photographs(sides, material, size, case)
    if bottle is not None:
        yield _fit(sides, bottle)


def _photographs(sides: Sides, material: Material, size: int, case: Case) -> Row:
    """Scoring files, images a second."""
    folder, count = material.photographs[0].parent, len(material.photographs)
    measured = sides.measured("score_photographs", material, size, folder, case)
    return compared(
        f"score photographs {size} px{case.words}, against before",
        rates(measured.now, count),
        rates(measured.before, count),
        unit="images/s",
        bar=bar(case, measured.precision, size),
        note=measured.note,
    )


def _one_image(sides: Sides, material: Material, size: int) -> Row:
    """One warm image, milliseconds."""
    path = material.photographs[0]
    measured = sides.measured("score_one", material, size, path, AS_IT_IS)
    return compared(
        f"one image {size} px, Detector.score, against before",
        [1000 * s / ONE for s in measured.now],
        [1000 * s / ONE for s in measured.before],
        unit="ms",
        bar="<= 0.6",
        note=measured.note,
    )


def _fit(sides: Sides, bottle: Path) -> Row:
    """One whole fit on each side."""
    ours, theirs = (
        side.seconds("fit_whole", bottle, side.work / "bottle", BOTTLE_SIDE) for side in sides
    )
    name = f"fit of bottle at {BOTTLE_SIDE} px, whole, against before"
    return single(name, ours, theirs, unit="s", bar="<= 1.35", note="one run each")


def _lines(sides: Sides) -> Row:
    ours, theirs = (float(side.lines()) for side in sides)
    name = "lines in src/, code and templates, against before"
    return single(name, ours, theirs, unit="lines", bar="<= 0.82")


def parse() -> argparse.Namespace:
    """The options of the command line, checked."""
    parser = argparse.ArgumentParser(prog="python -m bench.before", description=__doc__)
    parser.add_argument("--before", type=Path, required=True, metavar="DIR")
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("MSVAE_DATA"))
    parser.add_argument("--fit", action="store_true", help="time a whole fit of bottle too")
    parser.add_argument("--work", type=Path, help="keep images and runs here")
    parser.add_argument("--out", type=Path, metavar="F.json", help="write the rows here")
    options = parser.parse_args()
    options.bottle = None
    if not (options.before / ".venv/bin/python").is_file():
        parser.error(f"{options.before} has no .venv/bin/python: install that checkout there")
    if options.fit:
        options.bottle = (Path(options.data_dir or ".") / BOTTLE).resolve()
        if not options.bottle.is_dir():
            parser.error(f"--fit needs DATA_DIR/{BOTTLE}: name the folder with --data-dir")
    return options


def compare(sides: Sides, material: Material, options: argparse.Namespace) -> None:
    """Measure, print, write."""
    console, measured = Console(stderr=True), list[Row]()
    for row in rows(sides, material, options.bottle):
        measured.append(row)
        text = f"{row.name}: {results.number(row.ratio, 3)} ({row.note or row.unit})"
        console.print(text, soft_wrap=True)
        if options.out is not None:
            results.write(options.out, measured)
    results.show(measured, console)


def main() -> None:
    """Set both sides up, and compare them."""
    options = parse()
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.work or Path(temporary)).resolve()
        data = None if options.data_dir is None else Path(options.data_dir).resolve()
        root = options.before.resolve()
        sides = Sides(
            Checkout(ROOT, Path(sys.executable), work / "now"),
            Checkout(root, root / ".venv/bin/python", work / "before"),
        )
        try:
            compare(sides, prepare(work, data), options)
        finally:
            sides.stop()


if __name__ == "__main__":
    main()
