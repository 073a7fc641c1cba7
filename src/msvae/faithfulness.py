"""Does an explanation explain? Figures for each kind of map, over a few dozen images.

Deletion (after Samek et al. 2017): where the map is highest the image is replaced by its
reconstruction; the score must fall further than when the same pixels lie elsewhere. Random weights
(Adebayo et al. 2018): a map that explains what was learned changes when the weights are drawn anew.
Pointing (Zhang et al. 2018): the peak of the map lies inside the defect.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msvae.compute import to_batch
from msvae.data.images import Pixels
from msvae.detector import Detector
from msvae.evidence import Evidence
from msvae.explain import gradcams
from msvae.model import VAE
from msvae.progress import Progress, Silent
from msvae.scorer import PLACES

KINDS = ("reconstruction", *PLACES, "fused", "gradcam_fused", "hirescam_fused")
JUDGED = ("fused", "spatial")  # the scores that have to fall
SHARE = 0.1  # of the pixels is replaced
LIMIT = 100  # images looked at, evenly chosen
PIXELS = 16 * 128 * 128  # at once: Grad-CAM keeps every activation

Rows = dict[str, list[float]]


def faithfulness(
    detector: Detector,
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
    told: dict[str, Rows] = {kind: {} for kind in KINDS}
    fresh = _unlearned(detector, seed)
    moves = torch.Generator().manual_seed(seed)
    size = max(1, PIXELS // pixels[0, ..., 0].size)
    starts = range(0, len(pixels), size)
    for first in (progress or Silent()).track(starts, "testing maps", len(starts)):
        part = slice(first, first + size)
        x = to_batch(pixels[part], detector.device)
        inside = None if masks is None else torch.from_numpy(masks[part])
        for kind, name, values in _batch(detector, fresh, x, inside, moves):
            told[kind].setdefault(name, []).extend(values)
    return {k: {"images": len(pixels)} | _summed(rows) for k, rows in told.items() if rows}


def evenly(rows: Sequence[int], limit: int = LIMIT) -> list[int]:
    """At most `limit` of the rows, evenly spaced."""
    at = np.linspace(0, len(rows) - 1, min(limit, len(rows))).round().astype(int)
    return [int(rows[i]) for i in at]


def _unlearned(detector: Detector, seed: int) -> Detector:
    """The same scores on a network of the same shape with its first random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VAE(detector.config.model)
    return replace(detector, model=model.to(detector.device).eval())


def _batch(
    detector: Detector, fresh: Detector, x: Tensor, inside: Tensor | None, moves: torch.Generator
) -> Iterator[tuple[str, str, list[float]]]:
    """Kind, name of a figure and its value for each image of the batch."""
    e, learned = _maps(detector, x)
    before = _scores(detector, e)
    _, random = _maps(fresh, x)
    side = x.shape[-1]
    by = [(int(a), int(b)) for a, b in torch.randint(1, side, (len(x), 2), generator=moves)]
    for kind in KINDS:
        says = learned[kind].flatten(1).std(dim=1) > 0
        if not says.any():
            continue
        top = highest(learned[kind])
        moved = torch.stack([t.roll(d, dims=(0, 1)) for t, d in zip(top, by, strict=True)])
        after = _scores(detector, _replaced(detector, e, top))
        elsewhere = _scores(detector, _replaced(detector, e, moved))
        for name in JUDGED:
            fall, aside = before[name] - after[name], before[name] - elsewhere[name]
            yield kind, f"deletion_{name}_win_rate", (fall > aside)[says.cpu()].tolist()
            yield kind, f"deletion_{name}_median", fall[says.cpu()].tolist()
            yield kind, f"deletion_{name}_median_moved", aside[says.cpu()].tolist()
        correlation = _rank_correlation(learned[kind][says], random[kind][says])
        yield kind, "weight_randomisation", correlation
        if inside is not None:
            held = inside.flatten(1)
            at = learned[kind].flatten(1).argmax(dim=1).cpu()
            hit = held.gather(1, at[:, None])[:, 0]
            yield kind, "pointing_game", hit[held.any(dim=1) & says.cpu()].tolist()


def _maps(detector: Detector, x: Tensor) -> tuple[Evidence, dict[str, Tensor]]:
    """The evidence of images (B, 3, S, S), and every map of `KINDS` (B, S, S)."""
    with torch.no_grad():
        e = detector.scoring.evidence(x)
        found = detector.scorer.maps(e)
    return e, found | gradcams(detector, x, e, found, names=("fused",))


@torch.no_grad()
def _scores(detector: Detector, e: Evidence) -> dict[str, Tensor]:
    return detector.scorer(e)


def highest(found: Tensor) -> Tensor:
    """The highest tenth of each map (B, S, S), boolean."""
    flat = found.flatten(1)
    at = flat.topk(round(SHARE * flat.shape[1]), dim=1).indices
    return torch.zeros_like(flat, dtype=torch.bool).scatter_(1, at, True).view_as(found)


@torch.no_grad()
def _replaced(detector: Detector, e: Evidence, gone: Tensor) -> Evidence:
    """The evidence of the images whose pixels in `gone` (B, S, S) are their reconstruction's."""
    return detector.scoring.evidence(torch.where(gone[:, None], e.recon.clamp(0, 1), e.x))


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
