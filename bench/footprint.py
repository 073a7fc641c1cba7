"""Seconds and memory of one piece of work, in a process of its own that does nothing else.

`python -m bench.footprint NAME ARGUMENTS` prints them as JSON. Nothing is imported that the work does
not need, and the anonymous memory of /proc (Linux) is sampled.
"""

import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")
Measures = dict[str, float]  # seconds; peaks of anonymous and mapped memory, MB
INTERVAL = 0.02  # seconds between two samples
LARGE = 256  # px


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
            sizes = dict(line.split(":", 1) for line in status.splitlines())
            self.anonymous = max(self.anonymous, int(sizes["RssAnon"].split()[0]) / 1024)
            self.mapped = max(self.mapped, int(sizes["RssFile"].split()[0]) / 1024)


def measured(work: Callable[[], T]) -> tuple[T, Measures]:
    """What the work gives, its seconds and its peaks."""
    peak, began = Peak(), time.perf_counter()
    result = work()
    seconds = time.perf_counter() - began
    peak.over.set()
    peak.join()
    return result, {"seconds": seconds, "anonymous": peak.anonymous, "mapped": peak.mapped}


def score_folder(run: str, folder: str, out: str) -> Measures:
    """The command, in this process."""
    from msvae.cli.main import main

    def work() -> None:
        with contextlib.suppress(SystemExit):  # the command ends so
            main(["score", run, folder, "--out", out])

    return measured(work)[1]


def fit_folder(folder: str, out: str) -> Measures:
    """One epoch, and all that follows the training."""
    from msvae.core.config import Config
    from msvae.run.fit import fit

    config = Config().replace(epochs=1, pretext_epochs=1, min_steps=0, segmenter_steps=50)
    return measured(lambda: fit(folder, out, config=config, overwrite=True))[1]


class Repeated:
    """So many images of 256 px, made when they are asked for."""

    def __init__(self, count: int) -> None:
        self.count = count
        gen = np.random.default_rng(0)
        self.pixels = gen.integers(0, 256, (32, LARGE, LARGE, 3), dtype=np.uint8)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, at: slice) -> np.ndarray:
        rows = np.arange(*at.indices(self.count))
        return np.roll(self.pixels[rows % 32], int(rows[0]) if len(rows) else 0, axis=1)


def calibrate_large(count: str) -> Measures:
    """Learn all scores and maps, and calibrate them, on so many images of 256 px.

    Making the graph, which takes as long for any number of images, is not part of the seconds.
    """
    from msvae.core.progress import NullProgress
    from msvae.engine.choose import choose
    from msvae.run.calibrate import calibrate_pixels
    from msvae.run.fit import FittedGraph

    images: Any = Repeated(int(count))
    (graph, verdict), learning = measured(lambda: _learned(images))
    engine = choose(FittedGraph(graph, images[:4]))
    engine(images[:8], with_maps=True)
    _, calibrating = measured(lambda: calibrate_pixels(engine, verdict, images, NullProgress()))
    seconds = learning["seconds"] + calibrating["seconds"]
    peaks = {k: max(learning[k], calibrating[k]) for k in ("anonymous", "mapped")}
    return {"seconds": seconds, **peaks}


def _learned(images: Any) -> Any:
    """The graph and the verdict of networks with random weights."""
    from msvae.core.config import Config
    from msvae.core.device import batch_size, choose_device, to_batch
    from msvae.core.progress import NullProgress
    from msvae.networks.model import Networks
    from msvae.run.parts import batches
    from msvae.scores.fit import Batches, learn

    device = choose_device()
    networks = Networks(Config().replace(image_size=LARGE).model).to(device)
    networks.eval().requires_grad_(False)

    def over(pixels: Any) -> Batches:
        size = batch_size(LARGE, device)
        return lambda: (to_batch(b, device) for b in batches(pixels, size, NullProgress(), ""))

    held = over(images[:8])
    return learn(networks, over(images), held, count=len(images), alpha=0.6, beta=1.0)


WORK: dict[str, Callable[..., Measures]] = {
    "score_folder": score_folder,
    "fit_folder": fit_folder,
    "calibrate_large": calibrate_large,
}

if __name__ == "__main__":
    print(json.dumps(WORK[sys.argv[1]](*sys.argv[2:])))
