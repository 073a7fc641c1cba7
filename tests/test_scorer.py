"""How far the maps are trusted: by how well their scores tell imagined defects from clean images.

And which share of their places makes the score.
"""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from msvae import scorer
from msvae.maps import SHARES, USUAL
from msvae.scorer import PLACES

OFFSETS = torch.tensor([0.1, 0.3, 0.15, 0.0])  # what is painted over the images of a batch of four
CLEAN = torch.tensor([0.5, 0.6, 0.5, 0.7, 0.4])[:, None, None, None].expand(5, 3, 8, 8)


def flat_maps(x):
    """Of the picture's tone, of nothing, of its darkness, and of its tone in steps.

    All values of a map are alike, so that its score is that value, whichever share makes it.
    """
    tone = x.mean(dim=1)
    steps = (4 * tone).round()
    return dict(zip(PLACES, (tone, 0 * tone, -tone, steps), strict=True))


class Network:
    """No network: the evidence is the picture."""

    def inspected(self, x):
        """The picture itself."""
        return x


def paint(monkeypatch, shown=True):
    """Replaces the imagined defects by `OFFSETS`, with a mask of everything or nothing."""
    given = []

    def painted(self, x, generator):
        given.append(x)
        return x + OFFSETS.repeat(5)[: len(x), None, None, None], torch.full_like(x[:, 0], shown)

    monkeypatch.setattr(scorer.Imagination, "__call__", painted)
    return given


def scores_of(images):
    """By hand, (N, 4): the values of flat maps."""
    tone = images[:, 0, 0, 0].double().numpy()
    return np.stack([tone, 0 * tone, -tone, np.round(4 * tone.astype(np.float32))], axis=1)


def told_apart(batches):
    """What the scorer says of clean images in these batches."""
    best, apart = scorer._told_apart(Network(), lambda: iter(batches), flat_maps)
    assert best.tolist() == [USUAL] * 4
    return apart if apart is None else apart.tolist()


def test_trust_is_that_of_scikit_learns_auroc(monkeypatch):
    """2 AUROC - 1, ties counted half, and none for a map that sees it inverted or not at all."""
    paint(monkeypatch)
    spoilt = CLEAN[[0, 1, 2, 3, 4, 4, 4, 4]] + torch.cat([OFFSETS, OFFSETS])[:, None, None, None]
    labels = np.r_[np.zeros(5), np.ones(8)]
    both = np.concatenate([scores_of(CLEAN), scores_of(spoilt)])
    wanted = [max(0, 2 * roc_auc_score(labels, column) - 1) for column in both.T]
    assert told_apart([CLEAN[:4], CLEAN[4:]]) == pytest.approx(wanted, abs=1e-6)
    assert 0 < wanted[3] < wanted[0] < 1


def test_small_batches_are_blurred_in_every_way(monkeypatch):
    """One image is painted as four, so that not all its defects are sharp."""
    given = paint(monkeypatch)
    told_apart([CLEAN[:4], CLEAN[4:]])
    assert {len(x) for x in given} == {4}
    assert (given[1] == CLEAN[4]).all()


@pytest.mark.parametrize("imagined, rounds, taken", [(10, 1, 10), (25, 2, 40), (4, 1, 4)])
def test_many_images_are_drawn_evenly_and_few_again_and_again(monkeypatch, imagined, rounds, taken):
    """Of twenty images in batches of four; with 4 wanted every fifth."""
    monkeypatch.setattr(scorer, "IMAGINED", imagined)
    monkeypatch.setattr(scorer, "FOURS", 1)
    given = paint(monkeypatch)
    images = (torch.arange(20) / 20)[:, None, None, None].expand(20, 3, 8, 8)
    told_apart(list(images.split(4)))
    tones = [round(20 * float(t)) for x in given for t in x[:, 0, 0, 0]]
    assert len(tones) == taken
    assert tones == list(range(0, 20, 20 * rounds // taken)) * rounds


def test_where_no_defect_would_show_nothing_is_told(monkeypatch):
    """Nothing was measured, so nothing can be chosen or taken away by it."""
    paint(monkeypatch, shown=False)
    assert told_apart([CLEAN]) is None


@pytest.mark.parametrize("covered, share", [(1, 0.005), (102, 0.1)])
def test_the_share_is_the_one_that_tells_imagined_defects(monkeypatch, covered, share):
    """The brightest place of a few alone tells a speck from noise; a faint blot is told by many."""
    gen, side = torch.Generator().manual_seed(0), 32

    def places(x):
        noise = torch.rand(len(x), side**2, generator=gen)
        if x.mean() > 1:
            noise[:, :covered] = noise[:, :covered].clamp_min(1.1 if covered == 1 else 0.97)
        return dict.fromkeys(PLACES, noise.view(-1, side, side))

    monkeypatch.setattr(scorer, "_imagined", lambda *_: [2 + torch.zeros(80, 3, side, side)])
    held = [torch.zeros(80, 3, side, side)]
    best, apart = scorer._told_apart(Network(), lambda: held, places)
    assert [SHARES[i] for i in best] == [share] * 4
    assert (apart > 0.9).all()
