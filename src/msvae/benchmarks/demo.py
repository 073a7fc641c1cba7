"""The demo: the embedded data set painted, learned and judged, offline."""

import time
from dataclasses import dataclass
from pathlib import Path

from msvae.core import config as settings
from msvae.core.progress import Progress
from msvae.data.demo import write_demo
from msvae.data.folder import find_labelled
from msvae.run.detector import Detector
from msvae.run.evaluate import Evaluated, Say, evaluate_samples, history_of
from msvae.run.fit import fit

DEMO_TESTED = 24  # images whose maps the demo tests: it has to be quick


@dataclass(frozen=True)
class Demonstration:
    """What the demo made."""

    detector: Detector
    evaluated: Evaluated
    images: Path


def demonstrate(out: Path, *, seed: int, progress: Progress, say: Say) -> Demonstration:
    """Write the embedded data set below `out`, fit on its normal part, evaluate on its test part."""
    images = write_demo(out / "images", seed=seed, progress=progress)
    chosen = settings.preset("default").replace(seed=seed)
    began = time.perf_counter()
    detector = fit(images, out, config=chosen, overwrite=True, progress=progress, say=say)
    seconds = {"fit": time.perf_counter() - began}
    evaluated = evaluate_samples(
        detector,
        find_labelled(images),
        out / "evaluation",
        name="demo",
        seconds=seconds,
        progress=progress,
        history=history_of(out),
        tested=DEMO_TESTED,
    )
    return Demonstration(detector, evaluated, images)
