"""Whether bfloat16 decides as float32 does: measured where a run is made, and kept with it.

Precision belongs to the run, not to the processor: what was not tried on a run's own images is not
used for them.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from msvae.core.config import Config
from msvae.core.processor import has_bfloat16, instruction_set
from msvae.data.cache import Images
from msvae.data.images import Pixels
from msvae.engine.engine import Engine, Graph
from msvae.engine.openvino_engine import OpenVinoEngine
from msvae.evaluation.conformal import Calibration, Decision
from msvae.run.batching import FILES
from msvae.scores.density import Floats
from msvae.scores.verdict import Scores, Verdict

TRIED = 256  # normal images at most
NOT_TRIED = {"bfloat16": False, "tried_on": None}
AGREE = 0.99  # of the images: their p-values lie within a rank of each other


def is_tried(engine: Engine, config: Config) -> bool:
    """Whether bfloat16 is a question at all: only OpenVINO's, and not where the settings forbid it."""
    return engine.info.name == "openvino" and config.train.precision != "fp32"


def try_bfloat16(
    graph: Graph,
    verdict: Verdict,
    calibration: Calibration,
    decision: Decision,
    batches: Iterable[Pixels],
) -> dict[str, Any]:
    """Facts for the run: whether bfloat16 may be used, and on what that was found.

    `batches` are `trial_batches` (B, S, S, 3) of the images that calibrated. Where the processor does
    not multiply bfloat16 itself nothing is tried, and nothing allowed.
    """
    if not has_bfloat16():
        return NOT_TRIED
    exact, low = (OpenVinoEngine(graph, low) for low in (False, True))
    pairs = [(verdict(exact(b).numbers), verdict(low(b).numbers)) for b in batches]
    tables = [
        {k: np.concatenate([pair[i][k] for pair in pairs]) for k in pairs[0][0]} for i in (0, 1)
    ]
    p = [_p_values(calibration, table) for table in tables]
    flags = [decision.flags(table, own) for table, own in zip(tables, p, strict=True)]
    ranks = np.abs(p[0] - p[1]) * (calibration.n + 1)
    within, flips = float((ranks < 1.5).mean()), int((flags[0] != flags[1]).sum())
    return {
        "bfloat16": within >= AGREE and flips == 0,
        "tried_on": instruction_set(),
        "images": len(ranks),
        "within_a_rank": within,
        "decisions_changed": flips,
    }


def _p_values(calibration: Calibration, scores: Scores) -> Floats:
    """Of the fused score; the images that calibrated come first, each is judged by the others.

    By itself too, every second of them would move a rank by the least change of its score.
    """
    p, n = calibration.p_values(scores)["fused"], calibration.n
    own = calibration.scores["fused"][:TRIED]
    itself = own >= scores["fused"][: len(own)]
    p[: len(own)] = (p[: len(own)] * (n + 1) - itself) / n
    return p


def trial_batches(normals: Images) -> Iterator[Pixels]:
    """Batches of held-out normals (N, S, S, 3), at most `TRIED`, then of imagined defects on them."""
    import torch

    from msvae.core.device import to_batch
    from msvae.scores.fit import imagined_defects

    count = min(len(normals), TRIED)
    batches = [normals[first : min(first + FILES, count)] for first in range(0, count, FILES)]
    yield from batches
    images = [to_batch(batch, torch.device("cpu")) for batch in batches]
    for x in imagined_defects(lambda: images, count):
        yield (x * 255).round().byte().permute(0, 2, 3, 1).numpy()
