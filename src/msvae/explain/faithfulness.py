"""Does an explanation explain? Figures for each kind of map, over a few dozen images.

Deletion (after Samek et al. 2017): where the map is highest the image is replaced by its
reconstruction; the score must fall further than when the same pixels lie elsewhere. Random weights
(Adebayo et al. 2018): a map that explains what was learned changes when the weights are drawn anew.
Pointing (Zhang et al. 2018): the peak of the map lies inside the defect.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msvae.core.device import to_batch
from msvae.core.evidence import Evidence
from msvae.core.progress import NullProgress, Progress
from msvae.data.images import Pixels
from msvae.explain.gradcam import gradcams
from msvae.scores.catalog import MAP_SCORES
from msvae.scores.graph import Maps, ScoringGraph
from msvae.scores.verdict import Scores, Verdict

KINDS = ("reconstruction", *MAP_SCORES, "fused", "gradcam_fused", "hirescam_fused")
JUDGED = ("fused", "spatial")  # the scores that have to fall
SHARE = 0.1  # of the pixels is replaced
LIMIT = 100  # images looked at, evenly chosen
PIXELS = 16 * 128 * 128  # at once: Grad-CAM keeps every activation
Rows = dict[str, list[float]]


def faithfulness(
    graph: ScoringGraph,
    verdict: Verdict,
    pixels: Pixels,
    masks: NDArray[np.bool_] | None = None,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, dict[str, float]]:
    """Figures for each of `KINDS` from anomalous images (N, S, S, 3), with masks (N, S, S) if any.

    `deletion_<score>_win_rate`: in how many images the score falls further by the map than by the
    same mask moved to a random place; `…_median` and `…_median_moved`: by how much.
    `weight_randomisation`: median rank correlation of the map with that of a network that learned
    nothing, 1 for a map that does not depend on it. `pointing_game`: share of the masks that hold
    the map's peak. A map that is constant has no figures.
    """
    figures: dict[str, Rows] = {kind: {} for kind in KINDS}
    judge, fresh = _Judge(graph, verdict), _Judge(graph.unlearned(seed), verdict)
    device = next(graph.parameters()).device
    moves = torch.Generator().manual_seed(seed)
    size = max(1, PIXELS // pixels[0, ..., 0].size)
    starts = range(0, len(pixels), size)
    for first in (progress or NullProgress()).track(starts, "testing maps", len(starts)):
        part = slice(first, first + size)
        x = to_batch(pixels[part], device)
        inside = None if masks is None else torch.from_numpy(masks[part])
        for kind, name, values in _batch(judge, fresh, x, inside, moves):
            figures[kind].setdefault(name, []).extend(values)
    return {k: {"images": len(pixels)} | _summed(rows) for k, rows in figures.items() if rows}


def evenly(rows: Sequence[int], limit: int = LIMIT) -> list[int]:
    """At most `limit` of the rows, evenly spaced."""
    at = np.linspace(0, len(rows) - 1, min(limit, len(rows))).round().astype(int)
    return [int(rows[i]) for i in at]


class _Judge:
    """The graph and the verdict together, on images (B, 3, S, S)."""

    def __init__(self, graph: ScoringGraph, verdict: Verdict) -> None:
        self.graph, self.verdict = graph, verdict

    def maps(self, x: Tensor) -> tuple[Evidence, Maps]:
        """The evidence, and every map of `KINDS` (B, S, S)."""
        with torch.no_grad():
            e = self.graph.networks(x)
            maps = self.graph.maps(e)
        return e, maps | gradcams(self.graph, self.verdict, x, e, maps, names=("fused",))

    @torch.no_grad()
    def scores(self, x: Tensor) -> Scores:
        """Every score (B,)."""
        return self.verdict(self.graph.numbers_of(x).cpu().double().numpy())


def _batch(
    judge: _Judge, fresh: _Judge, x: Tensor, inside: Tensor | None, moves: torch.Generator
) -> Iterator[tuple[str, str, list[float]]]:
    """Kind, name of a figure and its value for each image of the batch."""
    e, learned = judge.maps(x)
    before = judge.scores(x)
    _, random = fresh.maps(x)
    side = x.shape[-1]
    by = [(int(a), int(b)) for a, b in torch.randint(1, side, (len(x), 2), generator=moves)]
    for kind in KINDS:
        says = learned[kind].flatten(1).std(dim=1) > 0
        varied = says.cpu().numpy()
        if not varied.any():
            continue
        top = highest(learned[kind])
        moved = torch.stack([t.roll(d, dims=(0, 1)) for t, d in zip(top, by, strict=True)])
        after = judge.scores(_replaced(e, top))
        elsewhere = judge.scores(_replaced(e, moved))
        for name in JUDGED:
            fall, aside = before[name] - after[name], before[name] - elsewhere[name]
            yield kind, f"deletion_{name}_win_rate", (fall > aside)[varied].tolist()
            yield kind, f"deletion_{name}_median", fall[varied].tolist()
            yield kind, f"deletion_{name}_median_moved", aside[varied].tolist()
        correlation = _rank_correlation(learned[kind][says], random[kind][says])
        yield kind, "weight_randomisation", correlation
        if inside is not None:
            held = inside.flatten(1)
            at = learned[kind].flatten(1).argmax(dim=1).cpu()
            hit = held.gather(1, at[:, None])[:, 0]
            yield kind, "pointing_game", hit[held.any(dim=1) & says.cpu()].tolist()


def highest(maps: Tensor) -> Tensor:
    """The highest tenth of each map (B, S, S), boolean."""
    flat = maps.flatten(1)
    at = flat.topk(round(SHARE * flat.shape[1]), dim=1).indices
    return torch.zeros_like(flat, dtype=torch.bool).scatter_(1, at, True).view_as(maps)


def _replaced(e: Evidence, gone: Tensor) -> Tensor:
    """The images, in `gone` (B, S, S) with the pixels of their reconstruction."""
    return torch.where(gone[:, None], e.recon.clamp(0, 1), e.x)


def _rank_correlation(a: Tensor, b: Tensor) -> list[float]:
    """Spearman's of each pair of maps (B, S, S); pairs in which one is constant are left out."""
    from scipy.stats import rankdata

    pairs = zip(a.flatten(1).cpu().numpy(), b.flatten(1).cpu().numpy(), strict=True)
    ranks = [(rankdata(p), rankdata(q)) for p, q in pairs]
    return [float(np.corrcoef(p, q)[0, 1]) for p, q in ranks if min(np.ptp(p), np.ptp(q)) > 0]


def _summed(rows: dict[str, Any]) -> dict[str, float]:
    """Rates as means, the rest as medians."""
    mean = ("pointing_game", *(f"deletion_{name}_win_rate" for name in JUDGED))
    return {
        name: float(np.mean(values) if name in mean else np.median(values))
        for name, values in rows.items()
        if values
    }
