"""The loops of the pretext network and the segmenter: they learn their tasks and nothing else."""

import math

import numpy as np
import pytest
import torch

from msvae.core.config import Config
from msvae.core.device import to_batch
from msvae.core.errors import TrainingError
from msvae.core.progress import NullProgress
from msvae.evaluation.metrics import auroc
from msvae.networks.model import Networks
from msvae.networks.pretext import ORDERS, pretext_loss, transform
from msvae.training import auxiliary
from msvae.training.auxiliary import (
    TrainingResult,
    pretext_trainer,
    segmentation_loss,
    segmenter_steps,
    shows_orientation,
    train_pretext,
    train_segmenter,
)
from msvae.training.vae import train
from test_train import SMALL, STOP, TRAIN, same_weights, smooth_images

WITHOUT = SMALL.replace(pretext=False, segmenter=False)
WITH_PRETEXT = SMALL.replace(pretext=True, pretext_epochs=40, batch_size=8)


def built(config):
    torch.manual_seed(0)
    return Networks(config.model).to(memory_format=torch.channels_last)


def tinted(n, seed):
    """Red above, blue below: orders and turns can both be told."""
    images = smooth_images(n, seed).astype(float)
    ramp = np.linspace(-100, 100, 16)[:, None]
    images += np.stack([-ramp, 0 * ramp, ramp], axis=-1)
    return images.clip(0, 255).astype(np.uint8)


def test_the_pretext_network_learns_its_tasks():
    """On images that it never saw it does far better than by guessing."""
    networks = built(WITH_PRETEXT)
    train_pretext(networks, tinted(24, 1), WITH_PRETEXT)
    assert not networks.pretext.training
    gen = torch.Generator().manual_seed(0)
    x = to_batch(tinted(48, 2), torch.device("cpu"))
    orders, turns = torch.randint(6, (48,), generator=gen), torch.randint(4, (48,), generator=gen)
    with torch.inference_mode():
        loss = float(pretext_loss(networks.pretext, x, orders, turns))
        order, turn = networks.pretext(transform(x, orders, turns))
    by_hand = -order[range(48), orders].mean() - turn[range(48), turns].mean()
    assert loss == pytest.approx(float(by_hand), rel=1e-5)
    assert loss < 0.7 * math.log(6 * 4)


@pytest.mark.parametrize("directed", [True, False])
def test_which_way_up_is_asked_of_the_pretext_network(monkeypatch, directed):
    """Light above and dark below shows, also in new images; noise does not, and is laid on its side."""
    config = WITH_PRETEXT.replace(segmenter=True, segmenter_steps=1)
    noise = np.random.default_rng(0).integers(0, 100, (48, 16, 16, 3))
    light = np.linspace(150, 0, 16)[:, None, None] if directed else 0
    images, others = np.split((noise + light).astype(np.uint8), 2)
    networks = built(config)
    train_pretext(networks, images, config)
    assert shows_orientation(networks.pretext, others) is directed
    seen = []
    real = auxiliary.varied
    monkeypatch.setattr(auxiliary, "varied", lambda x, g, lying: seen.append(lying) or real(x, g))
    train_segmenter(networks, images, others, config)
    assert seen == [not directed]


def test_the_segmenter_learns_to_mark_imagined_defects():
    """In new images it tells the pixels of a defect from the others, and is ready to score."""
    config = WITHOUT.replace(segmenter=True, segmenter_steps=60, image_size=32)
    networks, new = built(config), smooth_images(64, 5, 32)
    train_segmenter(networks, smooth_images(48, 1, 32), smooth_images(4, 2, 32), config)
    assert not networks.segmenter.training
    gen = torch.Generator().manual_seed(3)
    generator = auxiliary.DefectGenerator.prepare(32, True, gen)
    spoilt, mask = generator(to_batch(new, torch.device("cpu")), gen)
    with torch.inference_mode():
        odds = networks.segmenter(spoilt)
    assert auroc(mask.flatten().long().numpy(), odds.flatten().numpy()) > 0.8


def test_the_segmentation_loss_by_hand():
    """Cross-entropy of the pixels, and 0.3 times the share that marks and mask do not overlap."""
    rng = np.random.default_rng(0)
    odds, mask = rng.normal(size=(3, 4, 4)), rng.integers(0, 2, (3, 4, 4)).astype(float)
    p = 1 / (1 + np.exp(-odds))
    entropy = -(mask * np.log(p) + (1 - mask) * np.log(1 - p)).mean()
    dice = (2 * (p * mask).sum() + 1) / (p.sum() + mask.sum() + 1)
    loss = segmentation_loss(torch.from_numpy(odds), torch.from_numpy(mask))
    assert float(loss) == pytest.approx(entropy + 0.3 * (1 - dice))


@pytest.mark.parametrize(
    "side, steps", [(32, 600), (64, 600), (96, 1525), (128, 2955), (1024, 3000)]
)
def test_larger_images_take_more_steps(side, steps):
    """By the power 2.3 of the side beyond 64 px, up to five times as many."""
    assert segmenter_steps(Config().replace(image_size=side)) == steps


def test_nobody_knows_which_way_up_without_a_pretext_network():
    """Then images are turned."""
    assert shows_orientation(None, TRAIN) is False


def test_each_loop_trains_its_own_network():
    """Each leaves the other networks as they were, and gives the same bits again."""
    config = WITH_PRETEXT.replace(pretext_epochs=1, segmenter=True, segmenter_steps=2)
    loops = {
        "pretext": lambda networks: train_pretext(networks, TRAIN, config),
        "segmenter": lambda networks: train_segmenter(networks, TRAIN, STOP, config),
        "vae": lambda networks: train(networks.vae, TRAIN, STOP, config),
    }
    for name, loop in loops.items():
        networks, before = built(config).eval(), built(config).state_dict()
        loop(networks)
        after = networks.state_dict()
        changed = {k.split(".")[0] for k in before if not torch.equal(before[k], after[k])}
        assert changed == {name}
        again = built(config).eval()
        torch.rand(3)
        loop(again)
        assert same_weights(networks, again)


@pytest.mark.parametrize(
    "count, epochs, least, most, steps",
    [(24, 2, 0, 100, 12), (24, 2, 30, 100, 30), (24, 50, 0, 100, 100), (2, 1, 0, 100, 1)],
)
def test_the_pretext_network_passes_over_the_images_so_often(
    monkeypatch, count, epochs, least, most, steps
):
    """So many times, at least `min_steps` steps, and no more than a large folder needs."""
    monkeypatch.setattr(auxiliary, "PRETEXT_STEPS", most)
    ticks = []

    class Watching(NullProgress):
        def track(self, items, task, total):
            ticks.append((task, total))
            return items

    config = WITH_PRETEXT.replace(batch_size=4, pretext_epochs=epochs, min_steps=least)
    result = train_pretext(built(config), TRAIN[:count], config, Watching())
    assert ticks == [("learning orders and turns", steps)]
    assert result.steps == steps


def test_a_network_that_diverges_is_an_error():
    """As of the VAE."""
    config = WITH_PRETEXT.replace(pretext_epochs=1, segmenter=True, segmenter_steps=1)
    networks = built(config)
    with torch.no_grad():
        networks.pretext.head.bias.fill_(torch.nan)
        networks.segmenter.to_odds.bias.fill_(torch.nan)
    with pytest.raises(TrainingError, match="not a finite number"):
        train_pretext(networks, TRAIN, config)
    with pytest.raises(TrainingError, match="not a finite number"):
        train_segmenter(networks, TRAIN, STOP, config)


def test_every_image_comes_before_any_comes_again():
    """Batches of 5 of 12 images: twelve draws after twelve draws hold each image once."""
    rows = auxiliary._endless(12, 5, torch.Generator().manual_seed(0))
    drawn = np.concatenate([next(rows) for _ in range(12)])
    assert (np.sort(drawn.reshape(5, 12), axis=1) == np.arange(12)).all()
    assert len({tuple(turn) for turn in drawn.reshape(5, 12).tolist()}) == 5


@pytest.mark.parametrize("hopeless, steps, gave_up", [(9, 60, False), (0.1, 21, True)])
def test_a_task_that_is_not_learned_is_given_up(monkeypatch, hopeless, steps, gave_up):
    """Looked at once, after 20 steps of 60: above a tenth of a guess's loss, below nine times it."""
    monkeypatch.setattr(auxiliary, "LOOK", 20)
    monkeypatch.setattr(auxiliary, "HOPELESS", hopeless)
    config = WITH_PRETEXT.replace(batch_size=4, pretext_epochs=10)
    result = train_pretext(built(config), TRAIN, config)
    assert (result.steps, result.gave_up) == (steps, gave_up)
    assert 0.1 * math.log(24) < result.loss < 9 * math.log(24)


def test_steps_may_be_taken_one_by_one():
    """The rest of them afterwards: the weights are those of a training in one go."""
    config = WITH_PRETEXT.replace(pretext_epochs=2)
    networks, whole = built(config), built(config)
    trainer = pretext_trainer(networks, TRAIN, config)
    assert [trainer.step() for _ in range(3)] == [True] * 3
    assert trainer.run() == train_pretext(whole, TRAIN, config)
    assert not trainer.step()
    assert same_weights(networks, whole)


def test_without_a_network_there_is_nothing_to_train():
    """No weight changes, and nothing became of it."""
    networks = built(WITHOUT)
    assert pretext_trainer(networks, TRAIN, WITHOUT) is None
    assert train_pretext(networks, TRAIN, WITHOUT) == TrainingResult()
    train_segmenter(networks, TRAIN, STOP, WITHOUT)
    assert same_weights(networks, built(WITHOUT))


def test_transform_by_numpy():
    """Image by image: the k-th channel order, then so many quarter turns."""
    x = torch.rand(24, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    orders, turns = torch.arange(24) % 6, torch.arange(24) // 6
    out = transform(x, orders, turns).numpy()
    for i in range(24):
        shown = np.rot90(x[i].numpy()[list(ORDERS[orders[i]])], int(turns[i]), (1, 2))
        np.testing.assert_array_equal(out[i], shown)
    assert transform(x, orders, turns).is_contiguous(memory_format=torch.channels_last)
