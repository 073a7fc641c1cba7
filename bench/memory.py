"""Memory and growth: what 50,000 images cost beside 1,000, and time as the work grows.

Each measurement is a process of its own (`bench.footprint`). Mapped pages of files, which the system
may take back at any time, are reported apart.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from statistics import median

from bench.footprint import Measures
from bench.material import Material
from bench.rows import Row, compared, single

FEW, MANY = 1_000, 50_000
GROWTH = (1_000, 4_000, 16_000)
MAP_COUNTS = (64, 256)  # images at 256 px
ROUNDS = 3


def _child(name: str, *arguments: object) -> Measures:
    command = [sys.executable, "-m", "bench.footprint", name, *map(str, arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603
    measures: Measures = json.loads(done.stdout.splitlines()[-1])
    return measures


def rows(material: Material) -> Iterator[Row]:
    """Every row about memory and growth."""
    yield _scoring(material)
    fitted = _child("fit_folder", material.many(MANY, 64), material.work / "fitted")
    yield single(
        f"train memory, {MANY} images of 64 px, against 1.5 GB",
        fitted["anonymous"],
        1500.0,
        unit="MB",
        bar="<= 1",
        note=f"peak anonymous memory of a whole fit; mapped pages {fitted['mapped']:.0f} MB",
    )
    yield from _growth(material)
    yield from _large_maps()


def _scoring(material: Material) -> Row:
    run, out = material.run(64), material.work / "scores.csv"
    peaks: dict[int, list[Measures]] = {FEW: [], MANY: []}
    for _ in range(ROUNDS):  # a peak is what two batches happen to need at the same moment
        for n, measures in peaks.items():
            measures.append(_child("score_folder", run, material.many(n, 64), out))
    mapped = [max(p["mapped"] for p in peaks[n]) for n in (MANY, FEW)]
    return compared(
        f"score memory, {MANY} images against {FEW}",
        [p["anonymous"] for p in peaks[MANY]],
        [p["anonymous"] for p in peaks[FEW]],
        unit="MB",
        bar="<= 1.1",
        note=f"peak anonymous memory; mapped pages {mapped[0]:.0f} and {mapped[1]:.0f} MB",
    )


def _growth(material: Material) -> Iterator[Row]:
    """The cost of one more image, between 4,000 and 16,000 against between 1,000 and 4,000."""
    seconds: dict[str, list[float]] = {"fit": [], "score": []}
    for n in GROWTH:
        folder = material.many(n, 64)
        rounds = ROUNDS if n == GROWTH[0] else 1  # of the fits, which take minutes
        fits = [_child("fit_folder", folder, material.work / "fitted") for _ in range(rounds)]
        scores = [
            _child("score_folder", material.run(64), folder, material.work / "scores.csv")
            for _ in range(ROUNDS)
        ]
        for name, measures in (("fit", fits), ("score", scores)):
            seconds[name].append(median(m["seconds"] for m in measures))
    for name, (one, four, sixteen) in seconds.items():
        early = (four - one) / (GROWTH[1] - GROWTH[0])
        late = (sixteen - four) / (GROWTH[2] - GROWTH[1])
        yield single(
            f"{name}, cost of one more image at 4k to 16k against 1k to 4k",
            1000 * late,
            1000 * early,
            unit="ms/image",
            bar="<= 1.1",
            note=f"{one:.1f}, {four:.1f} and {sixteen:.1f} s for 1k, 4k and 16k images",
        )


def _large_maps() -> Iterator[Row]:
    """The cost of learning and calibrating maps of 256 px, of many images against few."""
    small, large = (_child("calibrate_large", n) for n in MAP_COUNTS)
    few, many = MAP_COUNTS
    yield single(
        f"calibrate maps of 256 px, seconds an image, {many} images against {few}",
        large["seconds"] / many,
        small["seconds"] / few,
        unit="s/image",
        bar="<= 1.1",
        note="learning all scores and every map's peaks included; not making the graph",
    )
    yield single(
        f"calibrate maps of 256 px, memory, {many} images against {few}",
        large["anonymous"],
        small["anonymous"],
        unit="MB",
        bar="<= 1.1",
        note="peak anonymous memory",
    )
