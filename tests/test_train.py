"""The loop: it learns, says what it learned, stops, keeps the best, and resumes to the bit."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from msvae.core.config import AugmentConfig, Config, TrainConfig
from msvae.core.device import to_batch
from msvae.core.errors import TrainingError
from msvae.networks.vae import VAE
from msvae.run.checkpoint import CheckpointWriter, resumed
from msvae.training.vae import Trainer, learning_rate, train

SMALL = Config().replace(
    image_size=16,
    hidden_dims=(6, 8),
    latent_dim=4,
    pretext=False,
    epochs=3,
    min_steps=0,
    batch_size=4,
    learning_rate=3e-3,
    precision="fp32",
)


def smooth_images(n, seed=0, side=16):
    gen = torch.Generator().manual_seed(seed)
    coarse = 0.2 + 0.6 * torch.rand(n, 3, 3, 3, generator=gen)
    fine = F.interpolate(coarse, size=(side, side), mode="bicubic").clamp(0, 1)
    return (fine * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()


TRAIN, STOP = smooth_images(24, 1), smooth_images(4, 2)


def built(config):
    torch.manual_seed(0)
    return VAE(config.model).to(memory_format=torch.channels_last)


def trained(config, **options):
    model = built(config)
    return model, train(model, TRAIN, STOP, config, **options)


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# Learning.


@pytest.fixture(scope="module")
def run():
    config = SMALL.replace(epochs=6, image_size=32)
    model = built(config)
    return model, train(model, smooth_images(24, 1, 32), smooth_images(4, 2, 32), config)


def test_training_reduces_the_loss(run):
    """On images it trains on, epoch by epoch, and on those it stops on."""
    first, *_, last = run[1].history
    assert last["total"] < first["total"] - 0.1
    config = SMALL.replace(epochs=6, image_size=32)
    untrained = Trainer(built(config), config, 24).stop_loss(smooth_images(4, 2, 32))
    assert last["stop_loss"] < untrained


def test_every_term_is_logged_and_moves(run):
    """Reconstruction and rate stand apart in the history, and neither stays where it was."""
    history = run[1].history
    assert [row["epoch"] for row in history] == [1, 2, 3, 4, 5, 6]
    for term in ("reconstruction", "kl"):
        values = [row[term] for row in history]
        assert all(math.isfinite(v) and v > 0 for v in values)
        assert len(set(values)) == 6
    assert history[-1]["reconstruction"] < 0.8 * history[0]["reconstruction"]
    assert max(r["kl"] for r in history) > 1.2 * min(r["kl"] for r in history)


def test_the_total_is_the_sum_of_its_terms():
    """Without the analytic variance: pixel error + beta * rate a pixel value, as logged."""
    _, state = trained(SMALL.replace(sigma_vae=False, beta=2.0))
    for row in state.history:
        expected = row["reconstruction"] + 2.0 * row["kl"] / (3 * 16 * 16)
        assert row["total"] == pytest.approx(expected, rel=1e-5)


def test_the_model_is_left_ready_to_score(run):
    """In evaluation mode, gradients possible, every number finite."""
    model = run[0]
    assert not model.training
    assert all(p.requires_grad and torch.isfinite(p).all() for p in model.parameters())


def test_same_seed_same_bits_another_seed_others():
    """A run is repeatable, whatever was drawn before it."""
    augmented = SMALL.replace(epochs=1, crop=0.2, flip_horizontal=True, jitter=0.1, dropout=0.2)
    first, _ = trained(augmented)
    torch.rand(7)
    assert same_weights(first, trained(augmented)[0])
    assert not same_weights(first, trained(augmented.replace(seed=1))[0])


# Stopping, and the best weights.


def stop_losses(monkeypatch, values):
    """Let the stop part tell these losses, one an epoch."""
    losses = iter(values)
    monkeypatch.setattr(Trainer, "stop_loss", lambda self, pixels: next(losses))


@pytest.mark.parametrize(
    "patience, epochs, best", [(1, 3, 2), (2, 4, 2), (3, 5, 2), (4, 7, 6), (0, 7, 6)]
)
def test_patience_counts_epochs_without_a_better_loss(monkeypatch, patience, epochs, best):
    """It stops when so many epochs brought nothing, a tie being nothing; 0 never stops."""
    stop_losses(monkeypatch, [5.0, 4.0, 4.5, 4.0, 4.1, 3.0, 3.5])
    _, state = trained(SMALL.replace(epochs=7, patience=patience))
    assert (state.epoch, len(state.history), state.best_epoch) == (epochs, epochs, best)
    assert state.best_loss == min([5.0, 4.0, 4.5, 4.0, 4.1, 3.0, 3.5][:epochs])


@pytest.mark.parametrize("best", [1, 2, 3])
def test_the_best_weights_are_kept(monkeypatch, best):
    """The model is left with the weights of the epoch that was best on the stop part."""
    stop_losses(monkeypatch, [1.0 if epoch == best else 2.0 for epoch in (1, 2, 3)])
    after = {}

    def save(state):
        now = {k: v for k, v in state.tensors.items() if k.startswith("now.")}
        after[state.epoch] = {k.removeprefix("now."): v.clone() for k, v in now.items()}

    model, _ = trained(SMALL, save=save)
    weights = model.state_dict()
    for epoch, kept in after.items():
        assert all(torch.equal(weights[k], v) for k, v in kept.items()) == (epoch == best)


def test_the_stop_loss_is_the_loss_of_the_mean():
    """No noise, no augmentation, no batch statistics: computed here by hand."""
    config = SMALL.replace(sigma_vae=False, crop=0.3, dropout=0.5)
    model = built(config)
    loss = Trainer(model, config, 24).stop_loss(STOP)
    model.eval()
    with torch.inference_mode():
        x = to_batch(STOP, torch.device("cpu"))
        x, recon, mu, logvar = (t.double().numpy() for t in (x, *model(x)[:3]))
    error = ((x - recon) ** 2).sum(axis=(1, 2, 3))
    rate = 0.5 * (mu**2 + np.exp(logvar) - 1 - logvar).sum(axis=1)
    assert loss == pytest.approx((error + rate).mean() / (3 * 16 * 16), rel=1e-5)


# Killed and resumed.


class KilledError(Exception):
    """The process ends here."""


HARD = {
    "dropout": 0.2,
    "batch_norm": True,
    "crop": 0.1,
    "flip_horizontal": True,
    "jitter": 0.1,
}


@pytest.mark.parametrize("epoch, precision", [(1, "fp32"), (2, "fp32"), (1, "bf16")])
def test_killed_and_resumed_is_bit_equal(tmp_path, epoch, precision):
    """With dropout, batch norm, augmentation and channels last: as if nothing had happened."""
    config = SMALL.replace(**HARD, precision=precision)
    whole, uninterrupted = trained(config)

    writer = CheckpointWriter(tmp_path, {"images": ["a"]})

    def save(state):
        writer(state)
        if state.epoch == epoch:
            writer.flush()
            raise KilledError

    with pytest.raises(KilledError):
        trained(config, save=save)
    model, state = trained(config, state=resumed(tmp_path, {"images": ["a"]}))
    assert same_weights(whole, model)
    assert state.best_epoch == uninterrupted.best_epoch

    def plain(history):
        return [{k: v for k, v in row.items() if k != "seconds"} for row in history]

    assert plain(state.history) == plain(uninterrupted.history)


def test_resuming_a_finished_training_does_nothing_more():
    """The weights are the best of before, and no epoch is added."""
    model, state = trained(SMALL)
    again, after = trained(SMALL, state=state)
    assert same_weights(model, again)
    assert len(after.history) == 3


def test_a_checkpoint_of_another_model_is_refused():
    """Told in one line, with the remedy."""
    _, state = trained(SMALL.replace(epochs=1))
    with pytest.raises(TrainingError, match=r"another model: resume with the settings"):
        trained(SMALL.replace(latent_dim=6), state=state)


# What goes wrong.


def test_a_loss_that_is_not_finite_is_an_error():
    """Training does not go on in NaN, nor is such an epoch saved: the rate is named."""
    model, saved = built(SMALL), []
    with torch.no_grad():
        model.to_mu.bias.fill_(torch.nan)
    with pytest.raises(TrainingError, match=r"not a finite number: lower train\.learning_rate"):
        train(model, TRAIN, STOP, SMALL, save=saved.append)
    assert saved == []


# The plan of a training.


@pytest.mark.parametrize(
    "count, batch_size, epochs, min_steps",
    [(24, 4, 3, 0), (24, 4, 3, 200), (1000, 8, 2, 0), (5, 16, 1, 0), (64, 64, 1, 30)],
)
def test_small_folders_are_passed_over_more_often(count, batch_size, epochs, min_steps):
    """At least `min_steps` steps and `epochs` epochs, an epoch being at least about 25 steps."""
    config = SMALL.replace(batch_size=batch_size, epochs=epochs, min_steps=min_steps)
    plan = Trainer(built(config), config, count)
    assert plan.epochs >= epochs
    assert plan.epochs * plan.steps >= min_steps
    assert (plan.epochs - 1) * plan.steps < max(min_steps, epochs * plan.steps)
    assert plan.steps >= min(count // batch_size, 16) >= 0
    if count > 40 * batch_size:
        assert plan.steps == count // batch_size  # each image once


def test_steps_are_counted_by_the_progress():
    """Whoever watches sees every step of every epoch, and the losses as words."""
    ticks, notes = [], []

    class Watching:
        def track(self, items, task, total):
            for item in items:
                ticks.append((task, total))
                yield item

        def note(self, text):
            notes.append(text)

    config = SMALL.replace(epochs=2)
    trained(config, progress=Watching())
    steps = 2 * Trainer(built(config), config, len(TRAIN)).steps
    assert ticks == [("training", steps)] * steps
    assert "reconstruction" in notes[0]
    assert "kl" in notes[0]


@pytest.mark.parametrize("schedule", ["onecycle", "cosine", "constant"])
def test_learning_rates_by_numpy(schedule):
    """Constant; half a cosine wave to 1/500; or the same after a linear rise over a tenth."""
    config = TrainConfig(schedule=schedule, learning_rate=0.01)
    at = np.arange(200) / 200
    expected = {
        "constant": np.ones(200),
        "cosine": 0.002 + 0.998 * np.cos(np.pi * at / 2) ** 2,
        "onecycle": np.where(
            at < 0.1,
            np.interp(at, [0, 0.1], [0.05, 1]),
            0.002 + 0.998 * np.cos(np.pi * (at - 0.1) / 1.8) ** 2,
        ),
    }[schedule]
    rates = [learning_rate(step / 200, config) for step in range(200)]
    np.testing.assert_allclose(rates, 0.01 * expected, rtol=1e-9)
    assert max(rates) == pytest.approx(0.01)


def test_the_schedule_is_over_the_whole_training():
    """The last rate of each epoch, as logged, is that of its last step."""
    config = SMALL.replace(schedule="cosine")
    _, state = trained(config)
    steps = Trainer(built(config), config, len(TRAIN)).steps
    for row in state.history:
        at = (row["epoch"] * steps - 1) / (3 * steps)
        expected = 3e-3 * (0.002 + 0.998 * math.cos(math.pi * at / 2) ** 2)
        assert row["learning_rate"] == pytest.approx(expected, rel=1e-9)


# Small parts.


def test_pixels_become_images_between_0_and_1():
    """(B, S, S, 3) bytes are (B, 3, S, S) floats, pixel for pixel."""
    x = to_batch(TRAIN[:3], torch.device("cpu"))
    np.testing.assert_allclose(x.numpy(), TRAIN[:3].transpose(0, 3, 1, 2) / 255, rtol=1e-6)
    assert x.dtype == torch.float32
    flipped = to_batch(TRAIN[:3, ::-1], torch.device("cpu"))
    assert torch.equal(flipped, x.flip(2))


def test_augmentation_reaches_the_training():
    """Asked for, it changes what is learned."""
    one = SMALL.replace(epochs=1)
    plain, _ = trained(one)
    moved = Config(model=one.model, train=one.train, augment=AugmentConfig(crop=0.3))
    assert not same_weights(plain, trained(moved)[0])
