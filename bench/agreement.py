"""`python -m bench.agreement RUN=FOLDER …`: one answer by every engine and instruction set.

Each run scores its folder by torch, the reference, and by OpenVINO held to every instruction set that
this processor has; where the run allows bfloat16 and the set has it, in bfloat16.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.console import Console

from bench import results
from bench.rows import Row, single
from msvae.core.processor import LEVELS, LIMIT, flags
from msvae.evaluation.table import ScoreTable
from msvae.run.detector import load

LEAST = "AVX2"  # what OpenVINO is held to at the least


def rows(run: Path, folder: Path, work: Path) -> Iterator[Row]:
    """Two for every instruction set: p-values within a rank, and decisions changed."""
    detector = load(run)
    n, rate = detector.calibration.n, detector.decision.target_fpr
    exact = scored(run, folder, "reference", None, work)
    for level in levels():
        table = scored(run, folder, "openvino", level, work)
        if table.paths != exact.paths:
            raise SystemExit(f"{run}: {level} scored other images than torch")
        ranks = np.abs(_p(table) - _p(exact)) * (n + 1)
        near = np.abs(_p(exact) - rate) <= 1 / (n + 1)
        changed = float(((_flagged(table) != _flagged(exact)) & ~near).sum())
        name = f"{run.name}, {len(table)} images, {n} calibrated on, {level} against torch"
        within = float((ranks < 1.5).mean())
        yield single(f"{name}: p within a rank", within, 1.0, unit="share", bar=">= 0.99")
        yield Row(f"{name}: decisions changed", changed, "images", None, changed, "<= 0", None)


def levels() -> list[str]:
    """The instruction sets of this processor from `LEAST` on."""
    names = list(LEVELS)
    return [name for name in names[names.index(LEAST) :] if LEVELS[name] in flags()]


def scored(run: Path, folder: Path, engine: str, level: str | None, work: Path) -> ScoreTable:
    """The scores of the folder, by a process of its own."""
    out, held = work / "scores.csv", {} if level is None else {LIMIT: level}
    msvae = Path(sys.executable).with_name("msvae")
    command = [msvae, "score", run, folder, "--out", out, "--engine", engine]
    environment = {**os.environ, **held}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)  # noqa: S603
    return ScoreTable.read_csv(out)


def _p(table: ScoreTable) -> np.ndarray:
    return np.asarray(table.p)


def _flagged(table: ScoreTable) -> np.ndarray:
    return np.asarray(table.flagged)


def main() -> None:
    """Score, compare, print."""
    parser = argparse.ArgumentParser(prog="python -m bench.agreement", description=__doc__)
    parser.add_argument("pairs", nargs="+", metavar="RUN=FOLDER")
    parser.add_argument("--out", type=Path, metavar="F.json", help="write the rows here")
    options, console = parser.parse_args(), Console(stderr=True)
    measured = list[Row]()
    with tempfile.TemporaryDirectory() as work:
        for pair in options.pairs:
            run, _, folder = pair.partition("=")
            measured += rows(Path(run), Path(folder), Path(work))
    if options.out is not None:
        results.write(options.out, measured)
    results.show(measured, console)


if __name__ == "__main__":
    main()
