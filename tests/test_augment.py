"""Augmentation: drawn from the generator alone, and a normal image stays a normal image."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from msvae.core.config import AugmentConfig
from msvae.transforms.augment import augment

ALL = AugmentConfig(flip_horizontal=True, flip_vertical=True, crop=0.2, jitter=0.5)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def images(n=40, side=10, seed=0):
    return torch.rand(n, 3, side, side, generator=seeded(seed))


def same(a, b):
    return np.array_equal(a.numpy(), np.asarray(b))


@settings(max_examples=30, deadline=None)
@given(st.booleans(), st.booleans(), st.floats(0, 0.5), st.floats(0, 0.99), st.integers(0, 2**32))
def test_same_generator_same_bits(horizontal, vertical, crop, jitter, seed):
    """The draws come from the generator and nowhere else; shape and range stay."""
    config = AugmentConfig(
        flip_horizontal=horizontal, flip_vertical=vertical, crop=crop, jitter=jitter
    )
    x = images(5)
    before = x.clone()
    torch.manual_seed(0)
    first = augment(x, config, seeded(seed))
    torch.manual_seed(1)
    assert torch.equal(first, augment(x, config, seeded(seed)))
    assert first.shape == x.shape
    assert 0 <= first.min() <= first.max() <= 1
    assert torch.equal(x, before)  # the caller's images are not touched


def test_another_seed_gives_another_draw():
    """Every epoch sees other copies."""
    assert not torch.equal(augment(images(), ALL, seeded(0)), augment(images(), ALL, seeded(1)))


def test_the_global_generator_is_left_alone():
    """Augmentation takes nothing from the stream that dropout draws from."""
    torch.manual_seed(5)
    augment(images(), ALL, seeded(0))
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))


def test_nothing_asked_nothing_done():
    """Without a setting the images come back to the bit."""
    assert torch.equal(augment(images(), AugmentConfig(), seeded(0)), images())


@pytest.mark.parametrize("axis, name", [(2, "flip_horizontal"), (1, "flip_vertical")])
def test_flips_are_flips(axis, name):
    """Each image is itself or its mirror image, and both occur."""
    x = images()
    out = augment(x, AugmentConfig(**{name: True}), seeded(0))
    mirrored = [same(o, np.flip(i.numpy(), axis)) for o, i in zip(out, x, strict=True)]
    kept = [same(o, i) for o, i in zip(out, x, strict=True)]
    assert all(a != b for a, b in zip(mirrored, kept, strict=True))
    assert 8 < sum(mirrored) < 32


def test_crop_is_a_shift_with_mirrored_edges():
    """Every copy is a window of the image padded by its mirror image, at most a fifth away."""
    x = images()
    out = augment(x, AugmentConfig(crop=0.2), seeded(0))
    places = set()
    for image, copy in zip(x.numpy(), out, strict=True):
        padded = np.pad(image, ((0, 0), (2, 2), (2, 2)), mode="reflect")
        windows = {(i, j): padded[:, i : i + 10, j : j + 10] for i in range(5) for j in range(5)}
        found = [at for at, window in windows.items() if same(copy, window)]
        assert found
        places.update(found)
    assert len(places) > 12


def test_jitter_by_numpy():
    """Three factors within 1 ± strength: brightness, contrast about the mean, saturation."""
    x = 0.4 + 0.2 * images(6)
    out = augment(x, AugmentConfig(jitter=0.2), seeded(3)).numpy()
    factors = 1 + 0.2 * (2 * torch.rand(3, 6, 1, 1, 1, generator=seeded(3)).double().numpy() - 1)
    brightness, contrast, saturation = factors
    y = x.double().numpy() * brightness
    centre = y.mean(axis=(1, 2, 3), keepdims=True)
    y = centre + contrast * (y - centre)
    grey = y.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(out, (grey + saturation * (y - grey)).clip(0, 1), atol=1e-5)


def test_jitter_keeps_grey_grey():
    """A grey image takes on no colour."""
    out = augment(images()[:, :1].expand(-1, 3, -1, -1), AugmentConfig(jitter=0.5), seeded(0))
    torch.testing.assert_close(out[:, 0], out[:, 1], rtol=0, atol=1e-6)
    torch.testing.assert_close(out[:, 1], out[:, 2], rtol=0, atol=1e-6)


def test_channels_last_is_the_same_picture():
    """The memory layout of a batch changes no bit of it."""
    x = images()
    last = x.contiguous(memory_format=torch.channels_last)
    moved = AugmentConfig(flip_horizontal=True, flip_vertical=True, crop=0.2)
    assert torch.equal(augment(x, moved, seeded(0)), augment(last, moved, seeded(0)))
