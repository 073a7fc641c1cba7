"""The companion's loop: it learns its tasks and nothing else, as often as asked, or gives up."""

import math

import numpy as np
import pytest
import torch

from msvae import teach
from msvae.compute import to_batch
from msvae.config import Config
from msvae.errors import TrainingError
from msvae.model import ORDERS
from msvae.progress import Silent
from msvae.teach import (
    Taught,
    companion_lesson,
    inspector_steps,
    pretext_loss,
    teach_both,
    train_inspector,
    transform,
    upright,
)
from msvae.train import train
from test_train import SMALL, STOP, TRAIN, built, same_weights, smooth_images

WITH_COMPANION = SMALL.replace(companion=True, companion_epochs=40, batch_size=8)


def tinted(n, seed):
    """Red above, blue below: orders and turns can both be told."""
    images = smooth_images(n, seed).astype(float)
    ramp = np.linspace(-100, 100, 16)[:, None]
    images += np.stack([-ramp, 0 * ramp, ramp], axis=-1)
    return images.clip(0, 255).astype(np.uint8)


def test_the_companion_learns_its_tasks():
    """On images that it never saw it does far better than by guessing."""
    model = built(WITH_COMPANION)
    companion_lesson(model, tinted(24, 1), WITH_COMPANION).rest()
    assert not model.companion.training
    gen = torch.Generator().manual_seed(0)
    x = to_batch(tinted(48, 2), torch.device("cpu"))
    orders, turns = torch.randint(6, (48,), generator=gen), torch.randint(4, (48,), generator=gen)
    with torch.inference_mode():
        loss = float(pretext_loss(model.companion, x, orders, turns))
        order, turn = model.companion(transform(x, orders, turns))
    by_hand = -order[range(48), orders].mean() - turn[range(48), turns].mean()
    assert loss == pytest.approx(float(by_hand), rel=1e-5)
    assert loss < 0.7 * math.log(6 * 4)


@pytest.mark.parametrize("directed", [True, False])
def test_which_way_up_is_asked_of_the_companion(monkeypatch, directed):
    """Light above and dark below shows, also in new images; noise does not, and is laid on its side."""
    config = WITH_COMPANION.replace(inspector=True, inspector_steps=1)
    noise = np.random.default_rng(0).integers(0, 100, (48, 16, 16, 3))
    light = np.linspace(150, 0, 16)[:, None, None] if directed else 0
    images, others = np.split((noise + light).astype(np.uint8), 2)
    model = built(config)
    companion_lesson(model, images, config).rest()
    assert upright(model, others) is directed
    seen = []
    real = teach.varied
    monkeypatch.setattr(teach, "varied", lambda x, g, lying: seen.append(lying) or real(x, g))
    train_inspector(model, images, others, config)
    assert seen == [not directed]


@pytest.mark.parametrize(
    "side, steps", [(32, 600), (64, 600), (96, 1525), (128, 2955), (1024, 3000)]
)
def test_larger_images_take_more_steps(side, steps):
    """By the power 2.3 of the side beyond 64 px, up to five times as many."""
    assert inspector_steps(Config().replace(image_size=side)) == steps


def test_nobody_knows_which_way_up_without_a_companion():
    """Then images are turned."""
    assert upright(built(SMALL), TRAIN) is False


def test_each_loop_teaches_its_own_network():
    """The companion's leaves the VAE as it was, and the other way round; each to the bit again."""
    config = WITH_COMPANION.replace(companion_epochs=1)
    model, before = built(config), built(config).state_dict()
    companion_lesson(model, TRAIN, config).rest()
    after = model.state_dict()
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"companion"}
    again = built(config)
    torch.rand(3)
    companion_lesson(again, TRAIN, config).rest()
    assert same_weights(model, again)
    train(model, TRAIN, STOP, config)
    kept = model.companion.state_dict()
    assert all(torch.equal(kept[k], v) for k, v in again.companion.state_dict().items())


@pytest.mark.parametrize(
    "count, epochs, least, most, steps",
    [(24, 2, 0, 100, 12), (24, 2, 30, 100, 30), (24, 50, 0, 100, 100), (2, 1, 0, 100, 1)],
)
def test_the_companion_passes_over_the_images_so_often(
    monkeypatch, count, epochs, least, most, steps
):
    """So many times, at least `min_steps` steps, and no more than a large folder needs."""
    monkeypatch.setattr(teach, "COMPANION_STEPS", most)
    ticks = []

    class Watching(Silent):
        def track(self, items, task, total):
            ticks.append(total)
            return items

    config = WITH_COMPANION.replace(batch_size=4, companion_epochs=epochs, min_steps=least)
    companion_lesson(built(config), TRAIN[:count], config).rest(Watching())
    assert ticks == [steps]


def test_a_companion_that_diverges_is_an_error():
    """As of the VAE."""
    model = built(WITH_COMPANION)
    with torch.no_grad():
        model.companion.head.bias.fill_(torch.nan)
    with pytest.raises(TrainingError, match="not a finite number"):
        companion_lesson(model, TRAIN, WITH_COMPANION.replace(companion_epochs=1)).rest()


def test_every_image_comes_before_any_comes_again():
    """Batches of 5 of 12 images: twelve draws after twelve draws hold each image once."""
    rows = teach._endless(12, 5, torch.Generator().manual_seed(0))
    drawn = np.concatenate([next(rows) for _ in range(12)])
    assert (np.sort(drawn.reshape(5, 12), axis=1) == np.arange(12)).all()
    assert len({tuple(turn) for turn in drawn.reshape(5, 12).tolist()}) == 5


@pytest.mark.parametrize("hopeless, steps, gave_up", [(9, 60, False), (0.1, 21, True)])
def test_a_task_that_is_not_learned_is_given_up(monkeypatch, hopeless, steps, gave_up):
    """Looked at once, after 20 steps of 60: above a tenth of a guess's loss, below nine times it."""
    monkeypatch.setattr(teach, "LOOK", 20)
    monkeypatch.setattr(teach, "HOPELESS", hopeless)
    config = WITH_COMPANION.replace(batch_size=4, companion_epochs=10)
    told = companion_lesson(built(config), TRAIN, config).rest()
    assert (told.steps, told.gave_up) == (steps, gave_up)
    assert 0.1 * math.log(24) < told.loss < 9 * math.log(24)


def test_a_model_without_a_companion_is_left_alone():
    """There is nothing to teach."""
    assert companion_lesson(built(SMALL), TRAIN, SMALL) is None


@pytest.mark.parametrize("asked", [3, 1000])
def test_both_are_taught_whoever_ends_first(asked):
    """The companion takes all its steps, beside the VAE or afterwards."""
    model = built(WITH_COMPANION)

    def train_vae(reached):
        for step in range(1, asked + 1):
            reached(step)
        return "done"

    done, learned = teach_both(model, tinted(24, 1), WITH_COMPANION, train_vae)
    alone = companion_lesson(built(WITH_COMPANION), tinted(24, 1), WITH_COMPANION).rest()
    assert done == "done"
    assert learned.steps == alone.steps == 120
    assert not model.companion.training


def test_the_vae_is_taught_without_a_companion():
    """Nothing became of the one that is not there."""
    assert teach_both(built(SMALL), TRAIN, SMALL, lambda reached: reached(1)) == (None, Taught())


def test_transform_by_numpy():
    """Image by image: the k-th channel order, then so many quarter turns."""
    x = torch.rand(24, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    orders, turns = torch.arange(24) % 6, torch.arange(24) // 6
    out = transform(x, orders, turns).numpy()
    for i in range(24):
        shown = np.rot90(x[i].numpy()[list(ORDERS[orders[i]])], int(turns[i]), (1, 2))
        np.testing.assert_array_equal(out[i], shown)
    assert transform(x, orders, turns).is_contiguous(memory_format=torch.channels_last)
