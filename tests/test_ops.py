"""Filters and nearest vectors, each against another way to compute it."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from torch.nn import functional as F

from msvae.ops.filters import area_downsample, opponent, resize_bilinear
from msvae.ops.nearest import least_squares


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def close(ours, theirs, rtol=1e-5, atol=1e-5):
    np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=rtol, atol=atol)


def test_opponent_colours_by_hand():
    """Luma, red minus green, yellow minus blue; whatever the layout in memory."""
    x = rand(2, 3, 5, 7)
    r, g, b = x.numpy().transpose(1, 0, 2, 3)
    expected = np.stack([(r + g + b) / 3, r - g, (r + g) / 2 - b], axis=1)
    close(opponent(x), expected)
    close(opponent(x.contiguous(memory_format=torch.channels_last)), expected)


@pytest.mark.parametrize("side, small", [(32, 32), (64, 16), (100, 32), (37, 5)])
def test_area_downsampling_is_torchs(side, small):
    """Each pixel the mean of what it covers, as in adaptive pooling."""
    x = rand(2, 3, side, side)
    close(area_downsample(x, small), F.adaptive_avg_pool2d(x, small))


@pytest.mark.parametrize("side, large", [(4, 4), (4, 16), (5, 32)])
def test_resizing_is_torchs(side, large):
    """Bilinear, half-pixel centres, edges repeated."""
    x = rand(2, 3, side, side)
    close(resize_bilinear(x, large), F.interpolate(x, size=(large, large), mode="bilinear"))


@pytest.mark.parametrize("banks", [1, 3])
def test_least_squares_by_scipy(banks):
    """Each query's squared distance to the nearest vector of its own banks, and of no other's."""
    queries, rows = rand(4, 6, 5, seed=1), rand(4, banks, 9, 5, seed=2)
    expected = [
        cdist(q, b.reshape(-1, 5), "sqeuclidean").min(axis=1)
        for q, b in zip(queries.numpy(), rows.numpy(), strict=True)
    ]
    close(least_squares(queries, rows), expected)


def test_a_vector_of_the_bank_is_at_no_distance():
    """Within rounding, also far from zero."""
    rows = 10 + rand(1, 2, 8, 6)
    close(least_squares(rows[:, 1], rows), np.zeros((1, 8)), atol=1e-3)
