"""How well maps find the defects, pixel by pixel and region by region; memory does not grow.

Maps pass by twice: once for the range of their values, once into fine histograms. Metrics are those
of maps rounded to levels by rank: half of them from a sample of all pixels, half from those of the
defects, which changes a figure by less than 1e-3.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from msvae.core.errors import DataError

Map = NDArray[np.float32]
Mask = NDArray[np.bool_]
BINS = 4096
SAMPLE = 200_000  # pixels that set the levels


@dataclass(frozen=True)
class PixelMetrics:
    """Figures of one kind of map over all test images."""

    auroc: float
    average_precision: float
    f1_max: float  # an oracle: the threshold is chosen on these very pixels
    aupro: float  # mean overlap of the regions, FPR <= 0.3

    def to_json(self) -> dict[str, float]:
        """As in `metrics.json`."""
        return {
            "auroc": self.auroc,
            "average_precision": self.average_precision,
            "f1_max": self.f1_max,
            "aupro": self.aupro,
        }


def pixel_metrics(maps: Sequence[Map], masks: Sequence[Mask], max_fpr: float = 0.3) -> PixelMetrics:
    """Metrics of maps (H, W) against masks (H, W) of the same images, good ones with empty masks.

    AUPRO after Bergmann et al. 2020: the mean share of each 8-connected region that is found, over
    the false-positive rate on all pixels outside defects, up to `max_fpr`, divided by it.
    """
    from scipy.ndimage import label

    if not any(mask.any() for mask in masks):
        raise DataError("no mask has a single pixel of defect: give the masks of the defects")
    edges = _levels(maps, masks)
    normal, defect, overlap = (np.zeros(len(edges) + 1) for _ in range(3))
    regions = 0
    for values, mask in zip(maps, masks, strict=True):
        level = np.searchsorted(edges, values, side="right")
        normal += np.bincount(level[~mask], minlength=len(edges) + 1)
        if not mask.any():
            continue
        defect += np.bincount(level[mask], minlength=len(edges) + 1)
        parts, count = label(mask, structure=np.ones((3, 3)))
        regions += count
        sizes = np.bincount(parts[mask], minlength=count + 1)
        overlap += np.bincount(
            level[mask], weights=1 / sizes[parts[mask]], minlength=len(edges) + 1
        )
    return _from_histograms(normal, defect, overlap / max(regions, 1), max_fpr)


def _levels(maps: Sequence[Map], masks: Sequence[Mask]) -> NDArray[np.float32]:
    """Level boundaries: all distinct values where they are few, otherwise quantiles, more on top."""
    step = max(1, sum(m.size for m in maps) // SAMPLE)
    # copies: a view would keep its whole map
    sample = np.concatenate([m.ravel()[i % step :: step].copy() for i, m in enumerate(maps)])
    peaks = np.array([m.max() for m in maps], dtype=sample.dtype)
    ordered = np.unique(np.concatenate([sample, peaks]))
    if step == 1 and len(ordered) <= BINS:
        return ordered
    every = max(1, sum(int(m.sum()) for m in masks) // SAMPLE)
    found = np.concatenate([v[m][::every].copy() for v, m in zip(maps, masks, strict=True)])
    return np.unique(
        np.concatenate([_spaced(ordered, BINS // 2), _spaced(np.unique(found), BINS // 2)])
    )


def _spaced(ordered: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    """About `count` of the values: half of them even by rank, half ever denser towards the top."""
    if len(ordered) <= count:
        return ordered
    even = np.linspace(0, len(ordered) - 1, count // 2)
    top = len(ordered) - np.geomspace(1, len(ordered), count // 2)
    at = np.unique(np.concatenate([even, top]).round().astype(np.int64).clip(0, len(ordered) - 1))
    return ordered[at]


def _from_histograms(
    normal: NDArray[np.float64],
    defect: NDArray[np.float64],
    overlap: NDArray[np.float64],
    max_fpr: float,
) -> PixelMetrics:
    false, true = np.cumsum(normal[::-1]), np.cumsum(defect[::-1])
    fpr = np.r_[0, false / max(false[-1], 1)]
    tpr = np.r_[0, true / max(true[-1], 1)]
    seen = true + false > 0
    precision = np.where(seen, true / np.maximum(true + false, 1), 1.0)
    recall = tpr[1:]
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    return PixelMetrics(
        auroc=float(np.trapezoid(tpr, fpr)),
        average_precision=float((np.diff(tpr) * precision).sum()),
        f1_max=float(f1.max()),
        aupro=_area(fpr, np.r_[0, np.cumsum(overlap[::-1])], max_fpr),
    )


def _area(fpr: NDArray[np.float64], pro: NDArray[np.float64], max_fpr: float) -> float:
    """Area under the curve up to `max_fpr`, cut by interpolation, divided by `max_fpr`."""
    inside = fpr <= max_fpr
    end = float(np.interp(max_fpr, fpr, pro))
    x, y = np.r_[fpr[inside], max_fpr], np.r_[pro[inside], end]
    return float(np.trapezoid(y, x) / max_fpr)
