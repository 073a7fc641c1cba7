"""Imagined defects: visible, where the mask says, and never a give-away by colour or sharpness."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch.nn import functional as F

from msvae.transforms.defects import CLEAN, SEEN, VISIBLE, DefectGenerator, has_colour, varied


def images(n, seed, grey=False, side=32):
    gen = torch.Generator().manual_seed(seed)
    x = 0.3 + 0.4 * torch.rand(n, 1 if grey else 3, 8, 8, generator=gen)
    x = F.interpolate(x, size=(side, side), mode="bicubic").clamp(0, 1)
    return x.expand(n, 3, side, side).contiguous()


@pytest.fixture(scope="module")
def defects():
    return DefectGenerator.prepare(32, True, torch.Generator().manual_seed(0))


def test_the_mask_is_where_the_picture_changed(defects):
    """Recomputed with scipy: a visible change of the smoothed picture under the painted mask."""
    x = images(64, 1)
    spoilt, mask = defects(x, torch.Generator().manual_seed(2))
    change = (spoilt - x).abs().mean(dim=1).numpy()
    smoothed = np.stack([gaussian_filter(c, 0.5, mode="mirror", truncate=4) for c in change])
    inside = mask.numpy() > 0
    assert (smoothed[inside] > 0.8 * VISIBLE).all()
    assert inside.any(axis=(1, 2)).mean() > 0.5


@pytest.mark.parametrize("side", [8, 32, 160])
def test_defects_of_every_size_at_every_size(side):
    """Masks cover what is asked for, drawn at 128 px at most; some are spots under 2 %."""
    drawn = DefectGenerator.prepare(side, True, torch.Generator().manual_seed(0))
    share = drawn.masks.mean(dim=(1, 2, 3))
    assert drawn.masks.shape[2:] == (min(side, 128), min(side, 128))
    assert ((share > SEEN[0]) & (share < SEEN[1])).all()
    assert (share < 0.02).any()
    assert (share > 0.2).any()
    spoilt, mask = drawn(images(8, 9, side=side), torch.Generator().manual_seed(1))
    assert (spoilt.shape, mask.shape) == ((8, 3, side, side), (8, side, side))
    assert mask.any()


def test_colour_is_an_average_over_all_batches():
    """Grey has none; one tinted batch among grey ones is enough if it is tinted enough."""
    grey, tinted = images(4, 1, grey=True), images(4, 1)
    assert not has_colour([grey, grey])
    assert has_colour([tinted])
    assert has_colour([grey, tinted])


def test_some_images_stay_clean(defects):
    """About the share that is asked for keeps every pixel, and then has an empty mask."""
    x = images(400, 3)
    spoilt, mask = defects(x, torch.Generator().manual_seed(4))
    same = (spoilt == x).flatten(1).all(dim=1)
    assert abs(same.float().mean() - CLEAN) < 0.08
    assert not mask[same].any()


def test_grey_images_get_grey_defects():
    """Colour on grey parts would be learned instead of the defect."""
    grey = DefectGenerator.prepare(32, False, torch.Generator().manual_seed(0))
    spoilt, _ = grey(images(64, 5, grey=True), torch.Generator().manual_seed(6))
    assert (spoilt.amax(dim=1) - spoilt.amin(dim=1)).max() < 1e-5


def test_the_same_generator_gives_the_same_defects(defects):
    """Bit for bit, values in [0, 1]; another seed gives others."""
    x = images(16, 7)
    one, two, three = (defects(x, torch.Generator().manual_seed(s))[0] for s in (1, 1, 2))
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


@pytest.mark.parametrize("lying", [True, False])
def test_images_are_laid_on_their_side_where_that_is_asked_for(lying):
    """Upright stripes stay upright in every one of 40 draws, or some lie."""
    stripes = (torch.arange(16) % 4 < 2).float().expand(8, 3, 16, 16)
    gen = torch.Generator().manual_seed(0)
    drawn = torch.cat([varied(stripes, gen, lying) for _ in range(10)])
    lies = drawn.std(dim=2).mean(dim=(1, 2)) > 0.01
    assert bool(lies.any()) is lying
    assert not lies.all()
