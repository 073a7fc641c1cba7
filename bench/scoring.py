"""Scoring: against what the machine allows, against other programs, one image, from a cold start."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from bench.material import SIDES, Material
from bench.peers import Peers
from bench.rows import Once, Row, compared, interleaved, missing, rates, timed
from msvae.core.processor import cores
from msvae.data.images import Pixels, load_image
from msvae.run.batching import FILES
from msvae.run.detector import Detector

ROUNDS, PEER_ROUNDS = 5, 3
ONE = 30  # single images a round
STARTS = 7
HELP_ALLOWANCE = 0.15  # seconds beyond an empty interpreter
# Of each peer: the bar by the side of our images, px, and what it does.
PEER_BARS = {
    "padim": {64: ">= 10", 128: ">= 5"},
    "pyod": {64: ">= 1", 128: ">= 1"},
}
PEER_NOTES = {
    "padim": "Engine.predict, untrained ResNet-18 at 128 px, no visualisation",
    "pyod": "decision_function of its VAE; Pillow reads the files, one by one",
}


def rows(material: Material, peers: Peers) -> Iterator[Row]:
    """Every row about scoring."""
    for side in SIDES:
        detector = material.detector(side)
        yield against_ideal(material, detector)
        for name in PEER_BARS:
            if name in peers:
                yield _against_peer(material, detector, peers, name)
        yield _one_image(material, detector)
    for side in SIDES:
        yield _cold(material, side)
    yield _help()


def against_ideal(material: Material, detector: Detector) -> Row:
    """Scoring files against decoding on every core and then the engine alone on every core."""
    paths, side = list(material.photographs), detector.config.model.image_size
    decoded = [load_image(path, side) for path in paths]
    batches = [np.stack(decoded[i : i + FILES]) for i in range(0, len(decoded), FILES)]
    seconds = interleaved(
        {
            "files": timed(lambda: detector.scan(paths)),
            "decode": timed(lambda: [load_image(path, side) for path in paths]),
            "engine": timed(bare_engine(detector, batches)),
        },
        ROUNDS,
    )
    pairs = zip(seconds["decode"], seconds["engine"], strict=True)
    ideal = [decode / cores() + engine for decode, engine in pairs]
    return compared(
        f"score {side} px, files against decode / cores + bare engine",
        rates(seconds["files"], len(paths)),
        rates(ideal, len(paths)),
        unit="images/s",
        bar=">= 0.85",
        note=f"all scores; JPEG photographs of about 500 x 667 px; {engine_of(detector)}",
    )


def bare_engine(detector: Detector, batches: list[Pixels]) -> Callable[[], object]:
    """The engine on decoded pixels by as many threads as it gains by; no verdict, no table."""

    def work() -> None:
        with ThreadPoolExecutor(detector.engine.workers) as pool:
            list(pool.map(detector.engine, batches))

    return work


def engine_of(detector: Detector) -> str:
    """What computes, in a few words."""
    info = detector.engine.info
    return f"{info.library}, {info.precision}, {info.instruction_set}, {info.threads} threads"


def _against_peer(material: Material, detector: Detector, peers: Peers, name: str) -> Row:
    """Scoring files against another program."""
    paths, side = list(material.photographs), detector.config.model.image_size
    row = f"score {side} px, files against {name}"
    bar, peer = PEER_BARS[name][side], peers[name]
    if peer is None:
        return missing(row, unit="images/s", bar=bar, note=f"{name} could not be installed")
    second = material.work if name == "padim" else side
    theirs = peer.start(str(paths[0].parent), str(second))
    contestants: dict[str, Once] = {"ours": timed(lambda: detector.scan(paths)), name: theirs}
    seconds = interleaved(contestants, PEER_ROUNDS)
    peer.stop()
    return compared(
        row,
        rates(seconds["ours"], len(paths)),
        rates(seconds[name], len(paths)),
        unit="images/s",
        bar=bar,
        note=PEER_NOTES[name],
    )


def _one_image(material: Material, detector: Detector) -> Row:
    """One warm image file through `Detector.score` against decoding it and the engine alone."""
    path, side = material.photographs[0], detector.config.model.image_size

    def bare() -> None:
        detector.engine(load_image(path, side)[None])

    seconds = interleaved(
        {
            "score": timed(lambda: [detector.score(path) for _ in range(ONE)]),
            "bare": timed(lambda: [bare() for _ in range(ONE)]),
        },
        ROUNDS,
    )
    return compared(
        f"one image {side} px, Detector.score against decode + bare engine",
        [1000 * s / ONE for s in seconds["score"]],
        [1000 * s / ONE for s in seconds["bare"]],
        unit="ms",
        bar="<= 1.5",
        note=f"a JPEG photograph of about 500 x 667 px; {engine_of(detector)}",
    )


def _process(*arguments: str) -> Once:
    """Seconds of a process from its start to its end."""

    def once() -> float:
        began = time.perf_counter()
        subprocess.run(arguments, check=True, capture_output=True)  # noqa: S603
        return time.perf_counter() - began

    return once


def _msvae() -> str:
    return str(Path(sys.executable).with_name("msvae"))


def _cold(material: Material, side: int) -> Row:
    """The command on one image; the first call, which compiles the graph, does not count."""
    run, image = str(material.run(side)), str(material.photographs[0])
    contestants = {
        "score": _process(_msvae(), "score", run, image),
        "import": _process(sys.executable, "-c", "import torch"),
    }
    seconds = interleaved(contestants, STARTS)
    return compared(
        f"cold msvae score RUN one.jpg at {side} px, second call, against python -c 'import torch'",
        seconds["score"],
        seconds["import"],
        unit="s",
        bar="<= 0.8",
    )


def _help() -> Row:
    empty = _process(sys.executable, "-c", "pass")
    contestants: dict[str, Once] = {
        "help": _process(_msvae(), "--help"),
        "pass": lambda: empty() + HELP_ALLOWANCE,
    }
    seconds = interleaved(contestants, STARTS)
    return compared(
        "msvae --help against python -c pass + 0.15 s",
        seconds["help"],
        seconds["pass"],
        unit="s",
        bar="<= 1",
    )
