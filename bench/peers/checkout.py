"""msvae of any checkout by what is public in all of them, run by the python of its environment.

`checkout.py ROOT TASK ARGUMENTS`. Nothing of `bench` is imported, since that imports msvae of this
checkout; the answers are those of `bench.peers.serve`.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msvae

Work = Callable[[], object]
WARMING = 6  # rounds after which nothing is made or compiled any more
ONE = 30  # single images a round
# A short training; its settings have other names in older checkouts, which refuse unknown ones at once.
FEW = {"epochs": 1, "min_steps": 30}
FEW_NOW = {"pretext_epochs": 1, "segmenter_steps": 20}
FEW_BEFORE = {"companion_epochs": 1, "inspector_steps": 20}


def check_origin(root: Path) -> None:
    """End where the environment runs msvae of another place."""
    place = Path(msvae.__file__).resolve()
    if not place.is_relative_to(root.resolve()):
        sys.exit(f"{sys.executable} runs {place}: install the checkout {root} there, editable")


def fit_few(folder: str, run: str, side: str, precision: str) -> tuple[Work, dict[str, Any]]:
    """Fit a run quickly: what scoring costs does not depend on the training."""
    few = {**FEW, "image_size": int(side), "precision": precision}

    def work() -> None:
        try:
            _fit(folder, run, {**few, **FEW_NOW})
        except Exception as error:
            if "no setting is called" not in str(error):
                raise
            _fit(folder, run, {**few, **FEW_BEFORE})

    return work, {}


def fit_whole(folder: str, run: str, side: str) -> tuple[Work, dict[str, Any]]:
    """Fit a run by the default settings."""
    return lambda: _fit(folder, run, {"image_size": int(side)}), {}


def _fit(folder: str, run: str, settings: dict[str, Any]) -> None:
    msvae.fit(folder, run, settings_changed=settings, overwrite=True)


def score_photographs(run: str, folder: str) -> tuple[Work, dict[str, Any]]:
    """Score every file of the folder."""
    detector = msvae.load(run)
    paths = sorted(Path(folder).iterdir())
    return warmed(lambda: detector.scan(paths)), engine_of(detector)


def score_one(run: str, image: str) -> tuple[Work, dict[str, Any]]:
    """Score one file again and again."""
    detector = msvae.load(run)
    return warmed(lambda: [detector.score(image) for _ in range(ONE)]), engine_of(detector)


def warmed(work: Work) -> Work:
    """The work, done a few times before it is timed."""
    for _ in range(WARMING):
        work()
    return work


def engine_of(detector: Any) -> dict[str, Any]:
    """What computes, where the checkout has engines."""
    engine = getattr(detector, "engine", None)
    return {} if engine is None else engine.info.to_json()


TASKS = {
    "fit_few": fit_few,
    "fit_whole": fit_whole,
    "score_photographs": score_photographs,
    "score_one": score_one,
}


def main(root: str, task: str, *arguments: str) -> None:
    """Set the task up, then do its work for each "go"."""
    check_origin(Path(root))
    work, facts = TASKS[task](*arguments)
    print(f"bench {json.dumps(facts)}", flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        work()
        print(f"bench {time.perf_counter() - began}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
