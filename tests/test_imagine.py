"""Imagined defects: visible, where the mask says, and never a give-away by colour or sharpness."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch.nn import functional as F

from msvae.imagine import CLEAN, VISIBLE, Imagination, varied


def images(n, seed, grey=False, side=32):
    gen = torch.Generator().manual_seed(seed)
    x = 0.3 + 0.4 * torch.rand(n, 1 if grey else 3, 8, 8, generator=gen)
    x = F.interpolate(x, size=(side, side), mode="bicubic").clamp(0, 1)
    return x.expand(n, 3, side, side).contiguous()


@pytest.fixture(scope="module")
def imagination():
    return Imagination.prepare(32, True, torch.Generator().manual_seed(0))


def test_the_mask_is_where_the_picture_changed(imagination):
    """Recomputed with scipy: a visible change of the smoothed picture under the painted mask."""
    x = images(64, 1)
    spoilt, mask = imagination(x, torch.Generator().manual_seed(2))
    change = (spoilt - x).abs().mean(dim=1).numpy()
    smoothed = np.stack([gaussian_filter(c, 0.5, mode="mirror", truncate=4) for c in change])
    inside = mask.numpy() > 0
    assert (smoothed[inside] > 0.8 * VISIBLE).all()
    assert inside.any(axis=(1, 2)).mean() > 0.5


def test_some_images_stay_clean(imagination):
    """About the share that is asked for keeps every pixel, and then has an empty mask."""
    x = images(400, 3)
    spoilt, mask = imagination(x, torch.Generator().manual_seed(4))
    same = (spoilt == x).flatten(1).all(dim=1)
    assert abs(same.float().mean() - CLEAN) < 0.08
    assert not mask[same].any()


def test_grey_images_get_grey_defects():
    """Colour on grey parts would be learned instead of the defect."""
    grey = Imagination.prepare(32, False, torch.Generator().manual_seed(0))
    spoilt, _ = grey(images(64, 5, grey=True), torch.Generator().manual_seed(6))
    assert (spoilt.amax(dim=1) - spoilt.amin(dim=1)).max() < 1e-5


def test_the_same_generator_gives_the_same_defects(imagination):
    """Bit for bit, values in [0, 1]; another seed gives others."""
    x = images(16, 7)
    one, two, three = (imagination(x, torch.Generator().manual_seed(s))[0] for s in (1, 1, 2))
    assert one.equal(two)
    assert not one.equal(three)
    assert one.min() >= 0
    assert one.max() <= 1


def test_varied_images_keep_size_and_range():
    """Mirrored, turned, cropped: the same size, values in [0, 1], and not the same picture."""
    x = images(12, 8)
    out = varied(x, torch.Generator().manual_seed(9))
    assert out.shape == x.shape
    assert out.min() >= 0
    assert out.max() <= 1
    assert not out.equal(x)
