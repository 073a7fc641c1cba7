"""Figures of how well maps explain, each against a second way to get it."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from msvae import faithfulness as module
from msvae import fit
from msvae.config import Config
from msvae.faithfulness import KINDS, LIMIT, chosen, faithfulness, highest

SIDE = 32
CONFIG = Config().replace(
    image_size=SIDE,
    hidden_dims=(8, 12, 16),
    latent_dim=6,
    epochs=1,
    min_steps=0,
    inspector_steps=2,
    batch_size=8,
    target_fpr=0.2,
    precision="fp32",
)


def normal_images(n, seed):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(90, 160, (n, 4, 4, 3))
    return coarse.repeat(8, axis=1).repeat(8, axis=2).astype(np.uint8)


@pytest.fixture(scope="module")
def detector():
    """A small detector of coarse squares."""
    return fit(list(normal_images(60, 0)), config=CONFIG)


@pytest.fixture(scope="module")
def spoilt():
    """Images with a noisy corner, and the masks of it."""
    pixels, masks = normal_images(5, 1), np.zeros((5, SIDE, SIDE), dtype=bool)
    pixels[:, 20:28, 20:28] = np.random.default_rng(2).integers(0, 256, (5, 8, 8, 3))
    masks[:, 20:28, 20:28] = True
    masks[4] = False
    return pixels, masks


@pytest.fixture(scope="module")
def figures(detector, spoilt):
    """All figures of the spoilt images."""
    return faithfulness(detector, *spoilt)


def maps_of(detector, pixels):
    scores, found = detector.run([pixels], with_maps=True)
    return scores, found


def test_every_kind_has_its_figures(figures):
    """Rates lie in [0, 1]; correlations in [-1, 1]."""
    assert tuple(figures) == KINDS
    for row in figures.values():
        assert row["images"] == 5
        for name in ("peak_inside", "deletion_fused_win_rate", "deletion_spatial_win_rate"):
            assert 0 <= row[name] <= 1
        assert -1 <= row["random_weights"] <= 1


def test_deletion_by_hand(detector, spoilt, figures):
    """The fall of a score when the highest tenth of a map is replaced, one image at a time."""
    pixels, _ = spoilt
    scores, found = maps_of(detector, pixels)
    falls = []
    for i in range(len(pixels)):
        flat = found["structure"][i].ravel()
        gone = np.zeros(flat.size, dtype=bool)
        gone[np.argsort(-flat, kind="stable")[: round(0.1 * flat.size)]] = True
        x = torch.from_numpy(pixels[i : i + 1]).permute(0, 3, 1, 2).float() / 255
        with torch.inference_mode():
            recon = detector.model(x).recon
            seen = torch.where(torch.from_numpy(gone.reshape(1, 1, SIDE, SIDE)), recon, x)
            after = detector.scorer(detector.model.evidence(seen))["spatial"]
        falls.append(scores["spatial"][i] - float(after))
    found = figures["structure"]["deletion_spatial_median"]
    assert found == pytest.approx(np.median(falls), rel=1e-3, abs=1e-5)


def test_the_peak_is_inside_or_not(detector, spoilt, figures):
    """The share of the images with a mask whose peak lies in it; those without do not count."""
    pixels, masks = spoilt
    _, found = maps_of(detector, pixels)
    for kind in ("reconstruction", "spatial", "structure", "fused"):
        inside = [
            masks[i][np.unravel_index(found[kind][i].argmax(), (SIDE, SIDE))] for i in range(4)
        ]
        assert figures[kind]["peak_inside"] == pytest.approx(np.mean(inside))


def test_a_map_that_ignores_the_network_is_the_same_with_random_weights(figures):
    """So is that of the structure; those that read features change."""
    assert figures["structure"]["random_weights"] == pytest.approx(1)
    for kind in ("spatial", "gradcam_fused", "hirescam_fused"):
        assert figures[kind]["random_weights"] < 0.9


def test_rank_correlation_is_scipys():
    """Ties included; a constant map says nothing."""
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 9, (2, 3, 6, 6)).astype(np.float32)
    b[2] = 1
    found = module._rank_correlation(torch.from_numpy(a), torch.from_numpy(b))
    wanted = [spearmanr(a[i].ravel(), b[i].ravel()).statistic for i in range(2)]
    np.testing.assert_allclose(found, [*wanted, 0])


def test_without_masks_there_is_no_peak(detector, spoilt):
    """The other figures come all the same, and the same again."""
    first = faithfulness(detector, spoilt[0])
    assert all("peak_inside" not in row for row in first.values())
    assert first == faithfulness(detector, spoilt[0])


def test_the_highest_tenth():
    """A tenth of the pixels of each map, and none below those left out."""
    maps = torch.rand(3, 20, 20, generator=torch.Generator().manual_seed(0))
    top = highest(maps)
    assert top.flatten(1).sum(dim=1).tolist() == [40, 40, 40]
    for values, mask in zip(maps, top, strict=True):
        assert values[mask].min() >= values[~mask].max()


def test_anomalous_images_are_chosen_evenly():
    """At most `LIMIT` of them, first and last among them."""
    labels = np.r_[np.zeros(7), np.ones(500)].astype(int)
    rows = chosen(labels)
    assert len(rows) == LIMIT
    assert (rows[0], rows[-1]) == (7, 506)
    assert np.ptp(np.diff(rows)) <= 1
    assert chosen(np.array([0, 1, 0, 1])) == [1, 3]
