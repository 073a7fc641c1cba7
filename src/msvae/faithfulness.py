"""Does an explanation explain? Figures for each kind of map, over a few dozen images.

Deletion (after Samek et al. 2017): where the map is highest the image is replaced by its
reconstruction; the score must fall further than when the same pixels lie elsewhere. Random weights
(Adebayo et al. 2018): a map that explains what was learned changes when the weights are drawn anew.
Pointing (Zhang et al. 2018): the peak of the map lies inside the defect.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msvae.detector import Detector, Pixels
from msvae.explain import gradcams
from msvae.model import VAE
from msvae.progress import Progress, Silent
from msvae.scorer import PLACES
from msvae.train import to_batch

KINDS = ("reconstruction", *PLACES, "fused", "gradcam_fused", "hirescam_fused")
JUDGED = ("fused", "spatial")  # the scores that have to fall
SHARE = 0.1  # of the pixels is replaced
LIMIT = 48  # images looked at, evenly chosen
BATCH = 16

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
    `random_weights`: median rank correlation of the map with that of a network that learned
    nothing, 1 for a map that does not depend on it. `peak_inside`: share of the masks that hold the
    map's peak.
    """
    told: dict[str, Rows] = {kind: {} for kind in KINDS}
    fresh = _unlearned(detector, seed)
    moves = torch.Generator().manual_seed(seed)
    starts = range(0, len(pixels), BATCH)
    for first in (progress or Silent()).track(starts, "testing maps", len(starts)):
        part = slice(first, first + BATCH)
        x = to_batch(pixels[part], detector.device)
        inside = None if masks is None else torch.from_numpy(masks[part])
        for kind, name, values in _batch(detector, fresh, x, inside, moves):
            told[kind].setdefault(name, []).extend(values)
    return {kind: {"images": len(pixels)} | _summed(rows) for kind, rows in told.items()}


def chosen(labels: NDArray[np.int64]) -> list[int]:
    """At most `LIMIT` rows of anomalous images, evenly spaced."""
    rows = np.flatnonzero(labels == 1)
    at = np.linspace(0, len(rows) - 1, min(LIMIT, len(rows))).round().astype(int)
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
    learned, recon, before = _maps(detector, x)
    random, _, _ = _maps(fresh, x)
    side = x.shape[-1]
    by = [(int(a), int(b)) for a, b in torch.randint(1, side, (len(x), 2), generator=moves)]
    for kind in KINDS:
        top = highest(learned[kind])
        moved = torch.stack([t.roll(d, dims=(0, 1)) for t, d in zip(top, by, strict=True)])
        after, elsewhere = _without(detector, x, recon, top), _without(detector, x, recon, moved)
        for name in JUDGED:
            won = (after[name] < elsewhere[name]).double()
            yield kind, f"deletion_{name}_win_rate", won.tolist()
            yield kind, f"deletion_{name}_median", (before[name] - after[name]).tolist()
            fall = before[name] - elsewhere[name]
            yield kind, f"deletion_{name}_median_moved", fall.tolist()
        yield kind, "random_weights", _rank_correlation(learned[kind], random[kind])
        if inside is not None:
            held = inside.flatten(1)
            at = learned[kind].flatten(1).argmax(dim=1).cpu()
            hit = held.gather(1, at[:, None])[:, 0].double()
            yield kind, "peak_inside", hit[held.any(dim=1)].tolist()


def _maps(detector: Detector, x: Tensor) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
    """Every map of `KINDS` (B, S, S), the reconstruction (B, 3, S, S), and the scores (B,)."""
    with torch.no_grad():
        e = detector.model.evidence(x)
        found = detector.scorer.maps(e)
        scores = detector.scorer(e, found)
    return found | gradcams(detector, x, e), e.recon, scores


def highest(found: Tensor) -> Tensor:
    """The highest tenth of each map (B, S, S), boolean."""
    flat = found.flatten(1)
    at = flat.topk(round(SHARE * flat.shape[1]), dim=1).indices
    return torch.zeros_like(flat, dtype=torch.bool).scatter_(1, at, True).view_as(found)


@torch.no_grad()
def _without(detector: Detector, x: Tensor, recon: Tensor, gone: Tensor) -> dict[str, Tensor]:
    """The scores (B,) of images whose pixels in `gone` are replaced by the reconstruction."""
    seen = torch.where(gone[:, None], recon.clamp(0, 1), x)
    return detector.scorer(detector.model.evidence(seen))


def _rank_correlation(a: Tensor, b: Tensor) -> list[float]:
    """Spearman's of each pair of maps (B, S, S); 0 where one of them is constant."""
    from scipy.stats import rankdata

    pairs = zip(a.flatten(1).cpu().numpy(), b.flatten(1).cpu().numpy(), strict=True)
    ranks = [(rankdata(p), rankdata(q)) for p, q in pairs]
    varied = [min(np.ptp(p), np.ptp(q)) > 0 for p, q in ranks]
    return [
        float(np.corrcoef(p, q)[0, 1]) if v else 0.0
        for (p, q), v in zip(ranks, varied, strict=True)
    ]


def _summed(rows: dict[str, Any]) -> dict[str, float]:
    """Rates as means, the rest as medians."""
    mean = ("peak_inside", *(f"deletion_{name}_win_rate" for name in JUDGED))
    return {
        name: float(np.mean(values) if name in mean else np.median(values))
        for name, values in rows.items()
        if values
    }
