"""How far the maps are trusted: by how well their scores tell imagined defects from clean images."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from msvae import scorer
from msvae.scorer import PLACES

OFFSETS = torch.tensor([0.1, 0.3, 0.15, 0.0])  # what is painted over the images of a batch of four
CLEAN = torch.tensor([0.5, 0.6, 0.5, 0.7, 0.4])[:, None, None, None].expand(5, 3, 8, 8)


class Eyes:
    """Flat maps: of the picture's tone, of nothing, of its darkness, and of its tone in steps."""

    def places(self, x):
        """All values of a map are alike, so that its score is that value."""
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
    clean = torch.from_numpy(scores_of(torch.cat(batches)))
    return scorer._told_apart(Network(), Eyes(), lambda: iter(batches), clean).tolist()


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


def test_where_no_defect_would_show_the_maps_keep_their_weight(monkeypatch):
    """Nothing was measured, so nothing is taken away."""
    paint(monkeypatch, shown=False)
    assert told_apart([CLEAN]) == [1, 1, 1, 1]
