"""Scoring: against what the machine allows, against other programs, one image, from a cold start."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from bench.material import SIDES, Material
from bench.peers import Peer
from bench.rows import Row, compared, interleaved, rates, timed
from msvae.compute import batch_of, compute_type, to_batch
from msvae.data.images import load_image
from msvae.detector import Detector

ROUNDS = 5
WARMING = 6  # rounds, after which all shapes of batches are graphs; each takes 0.2 s to make
WARM = 30  # single images a round
STARTS = 7
HELP_ALLOWANCE = 0.15  # seconds beyond an empty interpreter


def rows(material: Material, peers: dict[str, Peer]) -> Iterator[Row]:
    """Every row about scoring."""
    for side in SIDES:
        detector = material.detector(side)
        yield against_ideal(material, detector, side)
        yield from _against_peers(material, detector, side, peers)
        yield _one_image(material, detector, side)
    yield _cold(material)
    yield _help()


def against_ideal(material: Material, detector: Detector, side: int) -> Row:
    """Scoring files against decoding on every core and then computing on every core."""
    paths, cores = list(material.photographs), torch.get_num_threads()
    decoded = [load_image(path, side) for path in paths]
    size = batch_of(side, detector.device)
    batches = [np.stack(decoded[i : i + size]) for i in range(0, len(decoded), size)]
    for _ in range(WARMING):
        detector.scan(paths)
        detector.run(batches)
    told = interleaved(
        {
            "files": timed(lambda: detector.scan(paths)),
            "decode": timed(lambda: [load_image(path, side) for path in paths]),
            "compute": timed(lambda: detector.run(batches)),
        },
        ROUNDS,
    )
    pairs = zip(told["decode"], told["compute"], strict=True)
    ideal = [decode / cores + compute for decode, compute in pairs]
    return compared(
        f"score {side} px, files against decode / cores + compute",
        rates(told["files"], len(paths)),
        rates(ideal, len(paths)),
        unit="images/s",
        bar=">= 0.85",
        note="all scores; JPEG photographs of about 500 x 667 px",
    )


def _against_peers(
    material: Material, detector: Detector, side: int, peers: dict[str, Peer]
) -> Iterator[Row]:
    folder = material.photographs[0].parent
    paths = list(material.photographs)
    notes = {
        "padim": (">= 10", "Engine.predict, untrained ResNet-18 at 128 px, no visualisation"),
        "pyod": (">= 1", "decision_function of its VAE; Pillow reads the files, one by one"),
    }
    for name, (bar, note) in notes.items():
        if name not in peers:
            continue
        peer = peers[name]
        arguments = (
            (str(folder), str(material.work)) if name == "padim" else (str(folder), str(side))
        )
        theirs = peer.start(*arguments)
        told = interleaved({"ours": timed(lambda: detector.scan(paths)), name: theirs}, 3)
        peer.stop()
        yield compared(
            f"score {side} px, files against {name}",
            rates(told["ours"], len(paths)),
            rates(told[name], len(paths)),
            unit="images/s",
            bar=bar,
            note=note,
        )


def _one_image(material: Material, detector: Detector, side: int) -> Row:
    """One warm image file through `Detector.score` against the networks alone on a ready tensor.

    These are called as modules, as anybody calls a model: not as the graphs that the detector makes
    of them.
    """
    path = material.photographs[0]
    x = to_batch(load_image(path, side)[None].copy(), detector.device)
    model = detector.model.frozen(compute_type(detector.config.train, detector.device), tiles=False)
    model.graphs = None

    @torch.inference_mode()
    def forward() -> None:
        model.evidence(x)

    told = interleaved(
        {
            "score": timed(lambda: [detector.score(path) for _ in range(WARM)]),
            "forward": timed(lambda: [forward() for _ in range(WARM)]),
        },
        ROUNDS,
    )
    return compared(
        f"one image {side} px, Detector.score against the forward pass",
        [1000 * s / WARM for s in told["score"]],
        [1000 * s / WARM for s in told["forward"]],
        unit="ms",
        bar="<= 1.5",
        note="a JPEG file, decoded; the forward pass is that of all networks, as modules",
    )


def _process(*arguments: str) -> float:
    began = time.perf_counter()
    subprocess.run(arguments, check=True, capture_output=True)  # noqa: S603
    return time.perf_counter() - began


def _cold(material: Material) -> Row:
    python = sys.executable
    msvae = str(Path(python).with_name("msvae"))
    run, image = str(material.run(SIDES[0])), str(material.photographs[0])
    told = interleaved(
        {
            "score": lambda: _process(msvae, "score", run, image),
            "import": lambda: _process(python, "-c", "import torch"),
        },
        STARTS,
    )
    return compared(
        "cold msvae score RUN one.jpg against import torch",
        told["score"],
        told["import"],
        unit="s",
        bar="<= 1.5",
    )


def _help() -> Row:
    python = sys.executable
    msvae = str(Path(python).with_name("msvae"))
    told = interleaved(
        {
            "help": lambda: _process(msvae, "--help"),
            "pass": lambda: _process(python, "-c", "pass") + HELP_ALLOWANCE,
        },
        STARTS,
    )
    return compared(
        "msvae --help against python -c pass + 0.15 s",
        told["help"],
        told["pass"],
        unit="s",
        bar="<= 1",
    )
