"""Figures of how well maps explain, each against a second way to get it."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from msvae import fit
from msvae.core.device import to_batch
from msvae.explain import faithfulness as module
from msvae.explain.faithfulness import KINDS, LIMIT, evenly, faithfulness, highest
from msvae.explain.gradcam import _differentiable
from small import CONFIG, SAME_BITS, SIDE


def normal_images(n, seed):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(90, 160, (n, 4, 4, 3))
    return coarse.repeat(8, axis=1).repeat(8, axis=2).astype(np.uint8)


@pytest.fixture(scope="module")
def detector():
    """A small detector of coarse squares."""
    return fit(list(normal_images(60, 0)), config=CONFIG, engine="reference")


def figures_of(detector, pixels, masks=None):
    return faithfulness(detector.graph.torch_graph(), detector.verdict, pixels, masks)


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
    return figures_of(detector, *spoilt)


def maps_of(detector, pixels):
    return detector.score_pixels([pixels], with_maps=True)


def test_every_kind_has_its_figures(figures):
    """Rates lie in [0, 1]; correlations in [-1, 1]."""
    assert tuple(figures) == KINDS
    for row in figures.values():
        assert row["images"] == 5
        for name in ("pointing_game", "deletion_fused_win_rate", "deletion_spatial_win_rate"):
            assert 0 <= row[name] <= 1
        assert -1 <= row["weight_randomisation"] <= 1


@SAME_BITS
def test_deletion_by_hand(detector, spoilt, figures):
    """Falls of a score when the highest tenth of a map is replaced, there and moved, one by one."""
    pixels, _ = spoilt
    scores, found = maps_of(detector, pixels)
    gen = torch.Generator().manual_seed(0)
    moves = torch.randint(1, SIDE, (len(pixels), 2), generator=gen).tolist()

    graph = detector.graph.torch_graph()

    def fall(i, gone, name):
        x = to_batch(pixels[i : i + 1], next(graph.parameters()).device)
        with torch.inference_mode():
            there = torch.from_numpy(gone).to(x.device)
            replaced = torch.where(there, graph.networks(x).recon, x)
            after = detector.verdict(graph.numbers_of(replaced).cpu().numpy())[name]
        return scores[name][i] - float(after[0])

    for kind, name in (("structure", "spatial"), ("fused", "fused"), ("spatial", "spatial")):
        here, there = [], []
        for i, by in enumerate(moves):
            flat = found[kind][i].ravel()
            gone = np.zeros(flat.size, dtype=bool)
            gone[np.argsort(-flat, kind="stable")[: round(0.1 * flat.size)]] = True
            gone = gone.reshape(SIDE, SIDE)
            here.append(fall(i, gone, name))
            there.append(fall(i, np.roll(gone, by, axis=(0, 1)), name))
        row, near = figures[kind], {"rel": 1e-3, "abs": 1e-4}
        assert row[f"deletion_{name}_median"] == pytest.approx(np.median(here), **near)
        assert row[f"deletion_{name}_median_moved"] == pytest.approx(np.median(there), **near)
        wins = np.mean(np.array(here) > np.array(there))
        assert row[f"deletion_{name}_win_rate"] == pytest.approx(wins)


def test_the_peak_is_inside_or_not(detector, spoilt, figures):
    """The share of the images with a mask whose peak lies in it; those without do not count."""
    pixels, masks = spoilt
    _, found = maps_of(detector, pixels)
    for kind in ("reconstruction", "spatial", "structure", "fused"):
        inside = [
            masks[i][np.unravel_index(found[kind][i].argmax(), (SIDE, SIDE))] for i in range(4)
        ]
        assert figures[kind]["pointing_game"] == pytest.approx(np.mean(inside))


def test_a_map_that_ignores_the_network_is_the_same_with_random_weights(figures):
    """So is that of the structure; those that read features change."""
    assert figures["structure"]["weight_randomisation"] == pytest.approx(1)
    for kind in ("spatial", "gradcam_fused", "hirescam_fused"):
        assert figures[kind]["weight_randomisation"] < 0.9


def test_rank_correlation_is_scipys():
    """Ties included; a pair with a constant map is left out."""
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 9, (2, 3, 6, 6)).astype(np.float32)
    b[2] = 1
    found = module._rank_correlation(torch.from_numpy(a), torch.from_numpy(b))
    wanted = [spearmanr(a[i].ravel(), b[i].ravel()).statistic for i in range(2)]
    np.testing.assert_allclose(found, wanted)


def test_without_masks_there_is_no_peak(detector, spoilt):
    """The other figures come all the same, and the same again."""
    first = figures_of(detector, spoilt[0])
    assert all("pointing_game" not in row for row in first.values())
    assert first == figures_of(detector, spoilt[0])


def test_the_highest_tenth():
    """A tenth of the pixels of each map, and none below those left out."""
    maps = torch.rand(3, 20, 20, generator=torch.Generator().manual_seed(0))
    top = highest(maps)
    assert top.flatten(1).sum(dim=1).tolist() == [40, 40, 40]
    for values, mask in zip(maps, top, strict=True):
        assert values[mask].min() >= values[~mask].max()


def test_images_are_chosen_evenly():
    """At most `LIMIT` of them, first and last among them."""
    rows = evenly(range(7, 507))
    assert len(rows) == LIMIT
    assert (rows[0], rows[-1]) == (7, 506)
    assert np.ptp(np.diff(rows)) <= 1
    assert evenly([1, 3]) == [1, 3]


@pytest.fixture(scope="module")
def plain():
    """A detector of the VAE alone, as the seed preset's: no pretext network, no segmenter."""
    config = CONFIG.replace(pretext=False, segmenter=False)
    return fit(list(normal_images(60, 0)), config=config, engine="reference")


def test_a_constant_map_has_no_figures(plain, spoilt):
    """Nothing is marked without a segmenter; its map is not judged."""
    found = figures_of(plain, *spoilt)
    assert set(found) == set(KINDS) - {"inspection"}


def test_what_is_not_there_has_no_share(plain, spoilt):
    """Scores that are constant on normal images neither raise nor lower the fused score."""
    for image in spoilt[0]:
        e = plain.explain(image, gradcam=False)
        assert [e.contributions[k] for k in ("order", "turn", "inspection")] == [0, 0, 0]
        assert sum(e.contributions.values()) == pytest.approx(e.scores["fused"], rel=1e-6)


def test_only_the_vaes_own_embedding_has_gradients(plain, detector, spoilt):
    """Without a pretext network neighbours are those of the encoder's features: the CAM sees them."""
    for d, own in ((plain, True), (detector, False)):
        graph = d.graph.torch_graph()
        with torch.no_grad():
            e = graph.networks(to_batch(spoilt[0], next(graph.parameters()).device))
            maps = graph.maps(e)
        leaf = e.embedding.clone().requires_grad_()
        score = _differentiable(graph, d.verdict, "fused", e, maps)
        total = score(e._replace(embedding=leaf)).sum()
        assert total.requires_grad == own
        if own:
            assert torch.autograd.grad(total, leaf)[0].any()
