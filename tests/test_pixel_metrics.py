"""Pixel figures agree with scikit-learn, and AUPRO with a slow walk over all thresholds."""

import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
import sklearn.metrics
from skimage.measure import label

from msvae.evaluation.pixel_metrics import BINS, SAMPLE, pixel_metrics


def scene(seed, shapes, levels=None):
    """Maps that are higher on defects, ties when `levels` are few; good images and blobs."""
    rng = np.random.default_rng(seed)
    maps, masks = [], []
    for i, shape in enumerate(shapes):
        mask = np.zeros(shape, dtype=bool)
        for _ in range(0 if i % 3 == 0 else 3):
            y, x = rng.integers(0, shape[0] - 2), rng.integers(0, shape[1] - 2)
            h, w = rng.integers(1, 1 + shape[0] // 3), rng.integers(1, 1 + shape[1] // 3)
            mask[y : y + h, x : x + w] = True
        values = rng.normal(size=shape) + 1.2 * mask * rng.random()
        if levels is not None:
            values = np.round(values * levels) / levels
        maps.append(values.astype(np.float32))
        masks.append(mask)
    return maps, masks


SMALL = [(12, 10), (9, 14), (11, 11), (8, 8), (13, 9)]


def flat(arrays):
    return np.concatenate([a.ravel() for a in arrays])


def best_f1(truth, values):
    precision, recall, _ = sklearn.metrics.precision_recall_curve(truth, values)
    return (2 * precision * recall / np.maximum(precision + recall, 1e-12)).max()


def regions(masks):
    """Every 8-connected region as (image, pixels)."""
    out = []
    for i, mask in enumerate(masks):
        parts = label(mask, connectivity=2)
        out += [(i, parts == k) for k in range(1, parts.max() + 1)]
    return out


def slow_aupro(maps, masks, limit):
    """Threshold by threshold over all distinct values: overlap of the regions against FPR."""
    found, curve = regions(masks), [(0.0, 0.0)]
    normal = flat([m[~g] for m, g in zip(maps, masks, strict=True)])
    for t in sorted(set(flat(maps).tolist()), reverse=True):
        overlap = np.mean([(maps[i][pixels] >= t).mean() for i, pixels in found])
        curve.append(((normal >= t).mean(), overlap))
    area = 0.0
    for (x0, y0), (x1, y1) in pairwise(curve):
        if x0 < x1 and x0 < limit:
            end = min(x1, limit)
            height = y0 + (y1 - y0) * (end - x0) / (x1 - x0)
            area += (end - x0) * (y0 + height) / 2
    return area / limit


@pytest.mark.parametrize("levels", [1, 3, None])
@pytest.mark.parametrize("seed", range(4))
def test_pixel_figures_are_those_of_scikit_learn(seed, levels):
    """Over all pixels of all images, good ones too; exact, ties included."""
    maps, masks = scene(seed, SMALL, levels)
    truth, values = flat(masks), flat(maps)
    got = pixel_metrics(maps, masks)
    assert got.auroc == pytest.approx(sklearn.metrics.roc_auc_score(truth, values), abs=1e-9)
    expected = sklearn.metrics.average_precision_score(truth, values)
    assert got.average_precision == pytest.approx(expected, abs=1e-9)
    assert got.f1_max == pytest.approx(best_f1(truth, values), abs=1e-9)


@pytest.mark.parametrize("limit", [0.3, 0.05, 1.0])
@pytest.mark.parametrize("levels", [1, 3, None])
@pytest.mark.parametrize("seed", range(3))
def test_aupro_is_that_of_the_slow_walk(seed, levels, limit):
    """The mean overlap of the regions up to a false-positive rate, exact, ties included."""
    maps, masks = scene(seed, SMALL, levels)
    got = pixel_metrics(maps, masks, max_fpr=limit).aupro
    assert got == pytest.approx(slow_aupro(maps, masks, limit), abs=1e-9)


def test_aupro_goes_to_a_rate_of_0_3():
    """Without a word about it, the limit is that of the benchmark."""
    maps, masks = scene(7, SMALL)
    assert pixel_metrics(maps, masks).aupro == pytest.approx(slow_aupro(maps, masks, 0.3))


def test_pixels_that_touch_at_a_corner_are_one_region():
    """Two of two found at the corner, none of the lone one: half, not two thirds."""
    mask = np.zeros((8, 8), dtype=bool)
    mask[1, 1] = mask[2, 2] = mask[6, 6] = True
    values = np.zeros((8, 8), dtype=np.float32)
    values[1, 1] = values[2, 2] = 2
    values[6, 6] = -1
    assert pixel_metrics([values], [mask], max_fpr=0.5).aupro == pytest.approx(0.5)


def test_a_small_region_counts_as_much_as_a_large_one():
    """Finding 1 pixel of 1 and missing 20 of 20 is an overlap of a half."""
    mask = np.zeros((8, 8), dtype=bool)
    mask[0, 0], mask[3:7, 0:5] = True, True
    values = np.zeros((8, 8), dtype=np.float32)
    values[0, 0], values[3:7, 0:5] = 1, -1
    got = pixel_metrics([values], [mask])
    assert got.aupro == pytest.approx(0.5)
    assert got.f1_max == pytest.approx(2 * 21 / (64 + 21))


def test_a_perfect_map_and_its_opposite():
    """1 everywhere for the mask itself; the opposite finds nothing."""
    _, masks = scene(3, SMALL)
    perfect = pixel_metrics([m.astype(np.float32) for m in masks], masks)
    assert perfect.to_json() == pytest.approx(
        {"auroc": 1, "average_precision": 1, "f1_max": 1, "aupro": 1}
    )
    opposite = pixel_metrics([-m.astype(np.float32) for m in masks], masks)
    assert (opposite.auroc, opposite.aupro) == pytest.approx((0, 0))


def fast_aupro(maps, masks, limit):
    """The same walk pixel by pixel in order of value; right where no two values are equal."""
    weights = [np.zeros(m.shape) for m in masks]
    found = regions(masks)
    for i, pixels in found:
        weights[i][pixels] = 1 / pixels.sum() / len(found)
    order = np.argsort(-flat(maps))
    normal = ~flat(masks)[order]
    fpr = np.r_[0, np.cumsum(normal) / normal.sum()]
    overlap = np.r_[0, np.cumsum(flat(weights)[order])]
    inside = fpr <= limit
    return np.trapezoid(overlap[inside], fpr[inside]) / limit


@pytest.mark.parametrize("side", [50, 210])
def test_many_pixels_differ_by_less_than_a_thousandth(side):
    """More values than levels, and more pixels than set the levels: still right to 1e-3."""
    maps, masks = scene(side, [(side, side)] * 5)
    truth, values = flat(masks), flat(maps)
    assert len(np.unique(values)) > BINS
    assert (values.size > SAMPLE) == (side == 210)
    got = pixel_metrics(maps, masks)
    assert got.auroc == pytest.approx(sklearn.metrics.roc_auc_score(truth, values), abs=1e-3)
    expected = sklearn.metrics.average_precision_score(truth, values)
    assert got.average_precision == pytest.approx(expected, abs=1e-3)
    assert got.f1_max == pytest.approx(best_f1(truth, values), abs=1e-3)
    assert got.aupro == pytest.approx(fast_aupro(maps, masks, 0.3), abs=1e-3)


class Endless:
    """Maps or masks that are made when asked for: 400 of 256 x 256, 26 megapixels."""

    def __init__(self, masks):
        self.masks = masks

    def __len__(self):
        return 400

    def __getitem__(self, i):
        if i >= len(self):
            raise IndexError
        rng = np.random.default_rng(i)
        mask = np.zeros((256, 256), dtype=bool)
        mask[40:60, 80:100] = i % 2
        return mask if self.masks else (rng.random((256, 256)) + mask).astype(np.float32)


def test_memory_does_not_grow_with_the_maps():
    """What is held at once is a few maps, not the 100 megabytes of all of them."""
    tracemalloc.start()
    found = pixel_metrics(Endless(masks=False), Endless(masks=True))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.auroc > 0.999
    assert peak < 30e6
