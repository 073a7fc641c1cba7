"""How far the maps are trusted: by how well their scores tell imagined defects from clean images.

And which share of their places makes the score.
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from msvae.scores import fit
from msvae.scores.catalog import MAP_SCORES
from msvae.scores.maps import SHARES, USUAL

OFFSETS = torch.tensor([0.1, 0.3, 0.15, 0.0])  # what is painted over the images of a batch of four
CLEAN = torch.tensor([0.5, 0.6, 0.5, 0.7, 0.4])[:, None, None, None].expand(5, 3, 8, 8)


def flat_maps(x):
    """Of the picture's tone, of nothing, of its darkness, and of its tone in steps.

    All values of a map are alike, so that its score is that value, whichever share makes it.
    """
    tone = x.mean(dim=1)
    steps = (4 * tone).round()
    return dict(zip(MAP_SCORES, (tone, 0 * tone, -tone, steps), strict=True))


class Network:
    """No network: the evidence is the picture."""

    def with_segmentation(self, x):
        """The picture itself."""
        return x


def paint(monkeypatch, shown=True):
    """Replaces the imagined defects by `OFFSETS`, with a mask of everything or nothing."""
    given = []

    def painted(self, x, generator):
        given.append(x)
        return x + OFFSETS.repeat(5)[: len(x), None, None, None], torch.full_like(x[:, 0], shown)

    monkeypatch.setattr(fit.DefectGenerator, "__call__", painted)
    return given


def scores_of(images):
    """By hand, (N, 4): the values of flat maps."""
    tone = images[:, 0, 0, 0].double().numpy()
    return np.stack([tone, 0 * tone, -tone, np.round(4 * tone.astype(np.float32))], axis=1)


def abilities(batches):
    """How well the flat maps find what is painted over the clean images of these batches."""
    best, ability = fit._tried(Network(), lambda: iter(batches), flat_maps)
    assert best.tolist() == [USUAL] * 4
    return ability if ability is None else ability.tolist()


def test_trust_is_that_of_scikit_learns_auroc(monkeypatch):
    """2 AUROC - 1, ties counted half, and none for a map that sees it inverted or not at all."""
    paint(monkeypatch)
    spoilt = CLEAN[[0, 1, 2, 3, 4, 4, 4, 4]] + torch.cat([OFFSETS, OFFSETS])[:, None, None, None]
    labels = np.r_[np.zeros(5), np.ones(8)]
    both = np.concatenate([scores_of(CLEAN), scores_of(spoilt)])
    wanted = [max(0, 2 * roc_auc_score(labels, column) - 1) for column in both.T]
    assert abilities([CLEAN[:4], CLEAN[4:]]) == pytest.approx(wanted, abs=1e-6)
    assert 0 < wanted[3] < wanted[0] < 1


def test_small_batches_are_blurred_in_every_way(monkeypatch):
    """One image is painted as four, so that not all its defects are sharp."""
    given = paint(monkeypatch)
    abilities([CLEAN[:4], CLEAN[4:]])
    assert {len(x) for x in given} == {4}
    assert (given[1] == CLEAN[4]).all()


@pytest.mark.parametrize("imagined, rounds, taken", [(10, 1, 10), (25, 2, 40), (4, 1, 4)])
def test_many_images_are_drawn_evenly_and_few_again_and_again(monkeypatch, imagined, rounds, taken):
    """Of twenty images in batches of four; with 4 wanted every fifth."""
    monkeypatch.setattr(fit, "IMAGINED", imagined)
    monkeypatch.setattr(fit, "FOURS", 1)
    given = paint(monkeypatch)
    images = (torch.arange(20) / 20)[:, None, None, None].expand(20, 3, 8, 8)
    abilities(list(images.split(4)))
    tones = [round(20 * float(t)) for x in given for t in x[:, 0, 0, 0]]
    assert len(tones) == taken
    assert tones == list(range(0, 20, 20 * rounds // taken)) * rounds


def test_where_no_defect_would_show_nothing_is_told(monkeypatch):
    """Nothing was measured, so nothing can be chosen or taken away by it."""
    paint(monkeypatch, shown=False)
    assert abilities([CLEAN]) is None


@pytest.mark.parametrize("covered, share", [(1, 0.005), (102, 0.1)])
def test_the_share_is_the_one_that_tells_imagined_defects(monkeypatch, covered, share):
    """The brightest place of a few alone tells a speck from noise; a faint blot is told by many."""
    gen, side = torch.Generator().manual_seed(0), 32

    def places(x):
        noise = torch.rand(len(x), side**2, generator=gen)
        if x.mean() > 1:
            noise[:, :covered] = noise[:, :covered].clamp_min(1.1 if covered == 1 else 0.97)
        return dict.fromkeys(MAP_SCORES, noise.view(-1, side, side))

    spoilt = 2 + torch.zeros(80, 3, side, side)
    monkeypatch.setattr(fit, "imagined_defects", lambda *_: iter([spoilt]))
    held = [torch.zeros(80, 3, side, side)]
    best, ability = fit._tried(Network(), lambda: held, places)
    assert [SHARES[i] for i in best] == [share] * 4
    assert (ability > 0.9).all()


@dataclass(frozen=True)
class Displaced:
    """A map of how far the tone is from the middle, a place of 4 px each, drawn where it is told to."""

    down: int
    right: int
    too_low: float = 0.0
    too_right: float = 0.0

    def __call__(self, x):
        """(B, 3, S, S) -> (B, S / 4, S / 4)."""
        coarse = torch.nn.functional.avg_pool2d((x - 0.5).abs().mean(dim=1), 4)
        return coarse.roll((self.down, self.right), dims=(1, 2))


@pytest.mark.parametrize(("down", "right"), [(0, 0), (1, 0), (0, -1), (1, 1)])
def test_where_the_spatial_map_lies_is_measured(down, right):
    """By how many places squares show too low and too far right, from few images and from many."""
    network = Network()
    network.forward_mean = lambda x: x
    images = torch.full((20, 3, 64, 64), 0.5)
    map_ = fit.aligned(network, Displaced(down, right), lambda: iter([images[:8], images[8:]]))
    assert map_.too_low == pytest.approx(down, abs=0.06)
    assert map_.too_right == pytest.approx(right, abs=0.06)


def test_a_map_that_sees_no_square_stays_where_it_is():
    """Nothing is moved by nothing."""
    network = Network()
    network.forward_mean = torch.zeros_like
    blind = fit.aligned(network, Displaced(1, 1), lambda: iter([torch.zeros(8, 3, 32, 32)]))
    assert (blind.too_low, blind.too_right) == (0, 0)
