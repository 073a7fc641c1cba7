"""Memory and growth: what 50,000 images cost beside 1,000, and time as the work grows.

Each measurement is a process of its own, which samples the anonymous memory of /proc (Linux). Mapped
pages of files, which the system may take back at any time, are reported apart.
"""

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bench.material import Material
from bench.rows import Row, compared

FEW, MANY = 1_000, 50_000
GROWTH = (1_000, 4_000, 16_000)
PLACES = (64, 256)  # images at 256 px
ROUNDS = 3
INTERVAL = 0.02  # seconds between two samples


class Peak(threading.Thread):
    """The greatest anonymous and file-mapped memory of this process, MB."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.anonymous = self.mapped = 0.0
        self.over = threading.Event()
        self.start()

    def run(self) -> None:
        """Sample until it is over."""
        while not self.over.wait(INTERVAL):
            status = Path("/proc/self/status").read_text()
            told = dict(line.split(":", 1) for line in status.splitlines())
            self.anonymous = max(self.anonymous, int(told["RssAnon"].split()[0]) / 1024)
            self.mapped = max(self.mapped, int(told["RssFile"].split()[0]) / 1024)


def measured(work: Callable[[], object]) -> dict[str, float]:
    """Seconds and peaks of the work."""
    peak, began = Peak(), time.perf_counter()
    work()
    seconds = time.perf_counter() - began
    peak.over.set()
    peak.join()
    return {"seconds": seconds, "anonymous": peak.anonymous, "mapped": peak.mapped}


def score_folder(run: str, folder: str, out: str) -> dict[str, float]:
    """The command, in this process."""
    from msvae.cli import main

    def work() -> None:
        with contextlib.suppress(SystemExit):  # the command ends so
            main(["score", run, folder, "--out", out])

    return measured(work)


def fit_folder(folder: str, out: str) -> dict[str, float]:
    """One epoch, and all that follows the training."""
    from msvae.config import Config
    from msvae.fitting import fit

    config = Config().replace(epochs=1, companion_epochs=1, min_steps=0, inspector_steps=50)
    return measured(lambda: fit(folder, out, config=config, overwrite=True))


def calibrate_large(count: str) -> dict[str, float]:
    """Learn `spatial` and the maps, and calibrate them, on so many images of 256 px."""
    import torch

    from msvae.compute import choose_device, compute_type, to_batch
    from msvae.config import Config
    from msvae.fitting import batches, calibrate_pixels
    from msvae.model import VAE
    from msvae.progress import Silent
    from msvae.scorer import learn

    n, device, config = int(count), choose_device(), Config().replace(image_size=256)
    pixels = np.random.default_rng(0).integers(0, 256, (32, 256, 256, 3), dtype=np.uint8)

    class Repeated:
        """So many images, made when they are asked for."""

        def __len__(self) -> int:
            return n

        def __getitem__(self, at: slice) -> np.ndarray:
            rows = np.arange(*at.indices(n))
            return np.roll(pixels[rows % 32], int(rows[0]) if len(rows) else 0, axis=1)

    images: Any = Repeated()
    model = VAE(config.model).to(device).frozen(compute_type(config.train, device))

    def given() -> Iterator[torch.Tensor]:
        return (to_batch(b, device) for b in batches(images, device, Silent(), ""))

    def work() -> None:
        with torch.no_grad():
            scorer = learn(
                model, given, lambda: [to_batch(pixels[:8], device)], count=n, alpha=0.6, beta=1.0
            )
        calibrate_pixels(model, scorer, images, Silent())

    return measured(work)


def _child(name: str, *arguments: object) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.memory", name, *map(str, arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603
    told: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return told


def rows(material: Material) -> Iterator[Row]:
    """Every row about memory and growth."""
    run, out = material.run(64), material.work / "scores.csv"
    told: dict[int, list[dict[str, float]]] = {FEW: [], MANY: []}
    for _ in range(ROUNDS):  # a peak is what two batches happen to need at the same moment
        for n, peaks in told.items():
            peaks.append(_child("score_folder", run, material.many(n, 64), out))
    mapped = [max(t["mapped"] for t in told[n]) for n in (MANY, FEW)]
    yield compared(
        f"score memory, {MANY} images against {FEW}",
        [t["anonymous"] for t in told[MANY]],
        [t["anonymous"] for t in told[FEW]],
        unit="MB",
        bar="<= 1.1",
        note=f"peak anonymous memory; mapped pages {mapped[0]:.0f} and {mapped[1]:.0f} MB",
    )
    fitted = _child("fit_folder", material.many(MANY, 64), material.work / "fitted")
    yield _row(
        f"train memory, {MANY} images of 64 px",
        (fitted["anonymous"], 1500.0),
        "MB",
        "<= 1",
        f"peak anonymous memory of a whole fit against 1.5 GB; mapped pages {fitted['mapped']:.0f} MB",
    )
    yield from _growth(material)
    small, large = (_child("calibrate_large", n) for n in PLACES)
    yield _row(
        f"calibrate maps of 256 px, seconds an image, {PLACES[1]} images against {PLACES[0]}",
        (large["seconds"] / PLACES[1], small["seconds"] / PLACES[0]),
        "s/image",
        "<= 1.1",
        "learning spatial, structure and every map's peaks included",
    )
    yield _row(
        f"calibrate maps of 256 px, memory, {PLACES[1]} images against {PLACES[0]}",
        (large["anonymous"], small["anonymous"]),
        "MB",
        "<= 1.1",
        "peak anonymous memory",
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
        for name, told in (("fit", fits), ("score", scores)):
            seconds[name].append(sorted(t["seconds"] for t in told)[len(told) // 2])
    for name, (one, four, sixteen) in seconds.items():
        early = (four - one) / (GROWTH[1] - GROWTH[0])
        late = (sixteen - four) / (GROWTH[2] - GROWTH[1])
        yield _row(
            f"{name}, cost of one more image at 4k to 16k against 1k to 4k",
            (1000 * late, 1000 * early),
            "ms/image",
            "<= 1.1",
            f"{one:.1f}, {four:.1f} and {sixteen:.1f} s for 1k, 4k and 16k images",
        )


def _row(name: str, pair: tuple[float, float], unit: str, bar: str, note: str) -> Row:
    ours, theirs = pair
    ratio = ours / theirs
    return Row(name, ours, unit, theirs, ratio, bar, (ratio, ratio), note)


if __name__ == "__main__":
    work = {
        "score_folder": score_folder,
        "fit_folder": fit_folder,
        "calibrate_large": calibrate_large,
    }
    print(json.dumps(work[sys.argv[1]](*sys.argv[2:])))
