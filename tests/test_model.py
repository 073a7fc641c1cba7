"""The network: shapes, ranges, where chance comes in, and what the companion is asked."""

from itertools import product

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from msvae.config import PRESETS, Config, preset
from msvae.model import LOGVAR_RANGE, ORDERS, SHOWN, TURNS, VAE, Companion
from msvae.packed import Packed, can_pack
from msvae.teach import inspection_loss, pretext_loss
from msvae.train import losses

SMALL = Config().replace(image_size=32, hidden_dims=(8, 16), latent_dim=8)


def images(n=4, side=32, seed=0):
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


def built(seed=0, **changes):
    torch.manual_seed(seed)
    return VAE(SMALL.replace(**changes).model).eval()


@pytest.fixture(scope="module")
def model():
    return built()


# Shapes and ranges.


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds(name):
    """Its images go in and come out in their size; no memory is spent on finding out."""
    config = preset(name).model
    with torch.device("meta"):
        model = VAE(config).eval()
        e = model.evidence(torch.zeros(2, 3, config.image_size, config.image_size))
    assert e.recon.shape == e.x.shape == (2, 3, config.image_size, config.image_size)
    assert e.mu.shape == e.logvar.shape == (2, config.latent_dim)
    assert [f.shape[1] for f in e.features] == list(config.hidden_dims)
    assert e.pretext.shape == (2, 2 * len(SHOWN) if config.companion else 0)


def test_the_seed_preset_is_the_seed_method():
    """224 px, widths 512, 256, 128, 128 latents, dropout, batch norm, the plain loss, alpha 0.6."""
    c = preset("seed")
    assert (c.model.image_size, c.model.latent_dim) == (224, 128)
    assert c.model.hidden_dims == (512, 256, 128)
    assert c.model.dropout > 0
    assert c.model.batch_norm
    assert not c.model.sigma_vae
    assert not c.model.companion
    assert (c.decide.rule, c.decide.alpha, c.decide.threshold) == ("fixed", 0.6, 0.5)


@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize(
    "side, widths, sides",
    [
        (8, (4,), (4,)),
        (8, (4, 5, 6, 7), (8, 4, 2, 1)),
        (32, (4, 6), (32, 16)),
        (36, (4, 6), (18, 9)),
        (64, (4, 6, 8), (32, 16, 8)),
    ],
)
def test_shapes_of_every_architecture(side, widths, sides, batch_norm):
    """Each stage halves, the first keeps small images whole; the picture comes back in its size."""
    model = built(image_size=side, hidden_dims=widths, batch_norm=batch_norm, companion=False)
    with torch.inference_mode():
        e = model(images(2, side))
    assert [tuple(f.shape) for f in e.features] == [
        (2, w, s, s) for w, s in zip(widths, sides, strict=True)
    ]
    assert e.recon.shape == (2, 3, side, side)
    assert 0 < e.recon.min() < e.recon.max() < 1
    assert e.pretext.shape == (2, 0)
    torch.testing.assert_close(e.embedding, e.features[-1].mean(dim=(2, 3)))


def test_the_posterior_stays_in_range(model):
    """However odd the picture, the variance is finite and above zero."""
    with torch.inference_mode():
        wild = model.posterior(1e6 * torch.randn(20, 16, 16, 16))[1]
        assert tuple(wild.aminmax()) == LOGVAR_RANGE
        assert torch.isfinite(wild.exp()).all()


def test_every_weight_learns():
    """No layer is cut off from the loss."""
    model = built().train()
    draw = torch.arange(4)
    losses(model, images(), 1.0, torch.randn(4, 8)).total.backward()
    pretext_loss(model.companion, images(), draw, draw).backward()
    odds = model.inspector(images())
    inspection_loss(odds, torch.ones_like(odds)).backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


# Chance.


def test_the_mean_is_deterministic(model):
    """Without noise the same image gives the same bits, whatever the global generator holds."""
    with torch.inference_mode():
        torch.manual_seed(1)
        first = model.evidence(images())
        torch.manual_seed(2)
        again = model.evidence(images())
    for a, b in zip(first, again, strict=True):
        for x, y in zip(*((v,) if torch.is_tensor(v) else v for v in (a, b)), strict=True):
            assert torch.equal(x, y)


def test_noise_is_an_argument(model):
    """What is decoded is mu + noise * sigma; zero noise is the mean; the posterior is the same."""
    noise = torch.randn(4, 8, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        mean, zero, drawn = model(images()), model(images(), torch.zeros(4, 8)), None
        drawn = model(images(), noise)
        sigma = np.exp(0.5 * drawn.logvar.numpy())
        z = torch.from_numpy(drawn.mu.numpy() + noise.numpy() * sigma)
        expected = model.painted(model.drawn(z))
    assert torch.equal(mean.recon, zero.recon)
    assert torch.equal(mean.mu, drawn.mu)
    assert torch.equal(mean.logvar, drawn.logvar)
    torch.testing.assert_close(drawn.recon, expected)
    assert not torch.allclose(drawn.recon, mean.recon)


def test_dropout_is_for_training_only():
    """It draws while training; in scoring it is not there."""
    model = built(dropout=0.5)
    with torch.inference_mode():
        assert torch.equal(model(images()).mu, model(images()).mu)
        model.train()
        assert not torch.equal(model(images()).mu, model(images()).mu)


# Beta.


def trained(beta, sigma_vae):
    model = built(sigma_vae=sigma_vae, companion=False).train()
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    gen = torch.Generator().manual_seed(0)
    for _ in range(40):
        noise = torch.randn(16, 8, generator=gen)
        loss = losses(model, images(16), beta, noise).total
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.eval()
    with torch.inference_mode():
        return model(images(16))


@pytest.mark.parametrize("sigma_vae", [True, False])
def test_beta_moves_both_terms_of_the_rate(sigma_vae):
    """With beta the posterior means come to 0 and the log-variances too; without, neither does."""
    free, bound = trained(0.0, sigma_vae), trained(300.0, sigma_vae)
    length = [float(e.mu.double().square().sum(dim=1).mean()) for e in (free, bound)]
    excess = [
        float((e.logvar.double().exp() - 1 - e.logvar.double()).sum(dim=1).mean())
        for e in (free, bound)
    ]
    assert length[1] < 0.3 * length[0]
    assert excess[1] < 0.3 * excess[0]


# The companion.


def test_orders_and_turns_begin_with_the_untouched():
    """Six different channel orders, the first as it is; four quarter turns, the first none."""
    assert set(ORDERS) == {(a, b, 3 - a - b) for a in range(3) for b in range(3) if a != b}
    assert len(ORDERS) == 6
    assert ORDERS[0] == (0, 1, 2)
    assert TURNS == (0, 1, 2, 3)


def test_verdicts_of_the_untouched_image(model):
    """Columns 0 and 2 are minus the log-probabilities that it is shown as it is."""
    with torch.inference_mode():
        pretext = model.evidence(images()).pretext.double().numpy()
        logits = model.companion.head(model.companion.embed(images())).double().numpy()
    order, turn = np.exp(logits[:, :6]), np.exp(logits[:, 6:])
    np.testing.assert_allclose(pretext[:, 0], -np.log(order[:, 0] / order.sum(axis=1)), rtol=1e-4)
    np.testing.assert_allclose(pretext[:, 2], -np.log(turn[:, 0] / turn.sum(axis=1)), rtol=1e-4)


@pytest.mark.parametrize("side", [16, 32, 64, 96, 100])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_companion_sees_means_over_areas(side, layout):
    """Of whole blocks of pixels and of parts of them; a small image as it is."""
    x = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    small = min(side, Companion.SIDE)
    got = Companion(64).reduced(x.contiguous(memory_format=layout)).numpy()
    edges = [(i * side // small, -(-(i + 1) * side // small)) for i in range(small)]
    for (i, (top, bottom)), (j, (left, right)) in product(enumerate(edges), repeat=2):
        wanted = x.numpy()[:, :, top:bottom, left:right].astype(float).mean(axis=(2, 3))
        np.testing.assert_allclose(got[:, :, i, j], wanted, rtol=1e-5)


def test_the_untouched_image_is_shown_first():
    """Its embedding is what `neighbours` compares; no order and no turn is shown twice."""
    assert SHOWN[0] == (0, 0)
    assert all(0 <= order < len(ORDERS) and turn in TURNS for order, turn in SHOWN)
    assert len({o for o, _ in SHOWN}) == len({t for _, t in SHOWN}) == len(SHOWN)


def test_verdicts_of_the_changed_images(model):
    """Columns k and 2 + k are asked of the image in the k-th shown order and turn."""
    x = images()
    with torch.inference_mode():
        pretext = model.evidence(x).pretext
        for column, (k, t) in enumerate(SHOWN):
            pixels = np.rot90(x.numpy()[:, list(ORDERS[k])], t, (2, 3))
            order, turn = model.companion(torch.from_numpy(np.ascontiguousarray(pixels)))
            torch.testing.assert_close(pretext[:, column], -order[:, k])
            torch.testing.assert_close(pretext[:, 2 + column], -turn[:, t])


@pytest.mark.parametrize("side", [32, 64])
def test_the_frozen_model_computes_the_same(side):
    """Batch norms folded in float32: the same evidence up to rounding; the model stays as it was."""
    model = built(image_size=side)
    with torch.no_grad():
        for norm in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
            norm.running_mean.uniform_(-0.2, 0.2)
            norm.running_var.uniform_(0.5, 2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    frozen = model.frozen(torch.float32)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in frozen.modules())
    assert not any(p.requires_grad for p in frozen.parameters())
    x = images(3, side)
    with torch.inference_mode():
        ours, theirs = frozen.evidence(x), model.evidence(x)
    for name, value in ours._asdict().items():
        for a, b in zip(value, getattr(theirs, name), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)
    assert all(v.equal(before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_convolutions_compute_what_they_were_made_of(dtype, batch_norm, monkeypatch):
    """Where oneDNN has no operations for it they stay as they are: the same within rounding."""
    if not can_pack(torch.device("cpu")):
        pytest.skip("this torch has no oneDNN")
    model, x = built(image_size=32, batch_norm=batch_norm), images(3, 32)
    packed = model.frozen(dtype, tiles=False)
    monkeypatch.setattr("msvae.model.can_pack", lambda device: False)
    plain = model.frozen(dtype)
    count = {m: sum(isinstance(p, Packed) for p in m.modules()) for m in (packed, plain)}
    assert count[packed] == sum(isinstance(m, torch.nn.SiLU) for m in model.modules())
    assert count[plain] == 0
    with torch.inference_mode():
        ours, theirs = packed.evidence(x), plain.evidence(x)
    room = 1e-4 if dtype == torch.float32 else 0.02
    for name in ("recon", "mu", "logvar", "embedding", "inspection", "pretext"):
        a, b = getattr(ours, name), getattr(theirs, name)
        assert (a - b).abs().max() <= room * (b.abs().max() + b.std()), name


def test_the_frozen_model_in_bfloat16_is_near():
    """Its evidence comes in float32, the maps excepted, within the precision of bfloat16."""
    model = built(image_size=32)
    x = images(3, 32)
    with torch.inference_mode():
        low, full = model.frozen(torch.bfloat16).evidence(x), model.evidence(x)
    for name in ("recon", "mu", "logvar", "embedding", "inspection", "pretext"):
        a, b = getattr(low, name), getattr(full, name)
        assert a.dtype == torch.float32
        assert (a - b).abs().max() < 0.03 * (b.abs().max() + b.std()), name


def test_the_companion_gives_probabilities(model):
    """Of the orders and of the turns, each adding to one."""
    with torch.inference_mode():
        for log_p, count in zip(model.companion(images()), (6, 4), strict=True):
            assert log_p.shape == (4, count)
            torch.testing.assert_close(log_p.exp().sum(dim=1), torch.ones(4))


def test_the_companion_looks_at_32_pixels(model):
    """A larger image is averaged down to 32 px, block by block."""
    x = images(2, 128)
    blocks = x.numpy().reshape(2, 3, 32, 4, 32, 4).mean(axis=(3, 5))
    with torch.inference_mode():
        torch.testing.assert_close(
            model.companion.embed(x), model.companion.embed(torch.from_numpy(blocks))
        )


def test_the_companion_is_what_neighbours_compare(model):
    """The embedding of the evidence is the companion's."""
    with torch.inference_mode():
        e = model.evidence(images())
        torch.testing.assert_close(e.embedding, model.companion.embed(images()))
        assert F.normalize(e.embedding).shape == (4, 256)
