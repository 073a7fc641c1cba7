"""The networks: shapes, ranges, where chance comes in, and what the pretext network is asked."""

from copy import deepcopy
from itertools import product

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from msvae.core.config import PRESETS, Config, preset
from msvae.networks.blocks import round_weights
from msvae.networks.model import Networks
from msvae.networks.pretext import ORDERS, TURNS, PretextNet, pretext_loss
from msvae.networks.vae import LOGVAR_RANGE
from msvae.training.auxiliary import segmentation_loss
from msvae.training.vae import losses

SMALL = Config().replace(image_size=32, hidden_dims=(8, 16), latent_dim=8)


def images(n=4, side=32, seed=0):
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


def built(seed=0, **changes):
    torch.manual_seed(seed)
    return Networks(SMALL.replace(**changes).model).eval()


@pytest.fixture(scope="module")
def networks():
    return built()


# Shapes and ranges.


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds(name):
    """Its images go in and come out in their size; no memory is spent on finding out."""
    config = preset(name).model
    with torch.device("meta"):
        networks = Networks(config).eval()
    e = networks(torch.zeros(2, 3, config.image_size, config.image_size, device="meta"))
    assert e.recon.shape == e.x.shape == (2, 3, config.image_size, config.image_size)
    assert e.mu.shape == e.logvar.shape == (2, config.latent_dim)
    assert [f.shape[1] for f in e.features] == list(config.hidden_dims)
    assert e.pretext.shape == (2, 2 if config.pretext else 0)
    assert e.segmentation.shape == (2, *(2 * [config.image_size if config.segmenter else 0]))


def test_the_seed_preset_is_the_seed_method():
    """224 px, widths 512, 256, 128, 128 latents, dropout, batch norm, the plain loss, alpha 0.6."""
    c = preset("seed")
    assert (c.model.image_size, c.model.latent_dim) == (224, 128)
    assert c.model.hidden_dims == (512, 256, 128)
    assert c.model.dropout > 0
    assert c.model.batch_norm
    assert not c.model.sigma_vae
    assert not c.model.pretext
    assert not c.model.segmenter
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
    networks = built(image_size=side, hidden_dims=widths, batch_norm=batch_norm, pretext=False)
    with torch.inference_mode():
        e = networks.forward_mean(images(2, side))
    assert [tuple(f.shape) for f in e.features] == [
        (2, w, s, s) for w, s in zip(widths, sides, strict=True)
    ]
    assert e.recon.shape == (2, 3, side, side)
    assert 0 < e.recon.min() < e.recon.max() < 1
    assert e.pretext.shape == (2, 0)
    assert e.segmentation.shape == (2, 0, 0)
    torch.testing.assert_close(e.embedding, e.features[-1].mean(dim=(2, 3)))


def test_the_posterior_stays_in_range(networks):
    """However odd the picture, the variance is finite and above zero."""
    with torch.inference_mode():
        wild = networks.vae.posterior(1e6 * torch.randn(20, 16, 16, 16))[1]
        assert tuple(wild.aminmax()) == LOGVAR_RANGE
        assert torch.isfinite(wild.exp()).all()


def test_every_weight_learns():
    """No layer is cut off from the loss."""
    networks = built().train()
    draw = torch.arange(4)
    losses(networks.vae, images(), SMALL.train, torch.randn(4, 8)).total.backward()
    pretext_loss(networks.pretext, images(), draw, draw).backward()
    odds = networks.segmenter(images())
    segmentation_loss(odds, torch.ones_like(odds)).backward()
    silent = [n for n, p in networks.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


# Chance.


def test_the_mean_is_deterministic(networks):
    """Without noise the same image gives the same bits, whatever the global generator holds."""
    with torch.inference_mode():
        torch.manual_seed(1)
        first = networks(images())
        torch.manual_seed(2)
        again = networks(images())
    for a, b in zip(first, again, strict=True):
        for x, y in zip(*((v,) if torch.is_tensor(v) else v for v in (a, b)), strict=True):
            assert torch.equal(x, y)


def test_noise_is_an_argument(networks):
    """What is decoded is mu + noise * sigma; zero noise is the mean; the posterior is the same."""
    noise = torch.randn(4, 8, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        vae = networks.vae
        mean, zero, drawn = (vae(images(), n) for n in (None, torch.zeros(4, 8), noise))
        sigma = np.exp(0.5 * drawn.logvar.numpy())
        z = torch.from_numpy(drawn.mu.numpy() + noise.numpy() * sigma)
        expected = vae.decode(z)
    assert torch.equal(mean.recon, zero.recon)
    assert torch.equal(mean.mu, drawn.mu)
    assert torch.equal(mean.logvar, drawn.logvar)
    torch.testing.assert_close(drawn.recon, expected)
    assert not torch.allclose(drawn.recon, mean.recon)


def test_dropout_is_for_training_only():
    """It draws while training; in scoring it is not there."""
    vae = built(dropout=0.5).vae
    with torch.inference_mode():
        assert torch.equal(vae(images()).mu, vae(images()).mu)
        vae.train()
        assert not torch.equal(vae(images()).mu, vae(images()).mu)


# Beta.


def trained(beta, sigma_vae):
    vae, config = built(sigma_vae=sigma_vae).vae.train(), SMALL.replace(beta=beta).train
    optimiser = torch.optim.Adam(vae.parameters(), lr=3e-3)
    gen = torch.Generator().manual_seed(0)
    for _ in range(40):
        noise = torch.randn(16, 8, generator=gen)
        loss = losses(vae, images(16), config, noise).total
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    vae.eval()
    with torch.inference_mode():
        return vae(images(16))


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


# The pretext network.


def test_orders_and_turns_begin_with_the_untouched():
    """Six different channel orders, the first as it is; four quarter turns, the first none."""
    assert set(ORDERS) == {(a, b, 3 - a - b) for a in range(3) for b in range(3) if a != b}
    assert len(ORDERS) == 6
    assert ORDERS[0] == (0, 1, 2)
    assert TURNS == (0, 1, 2, 3)


def test_pretext_scores_of_the_untouched_image(networks):
    """The columns are minus the log-probabilities that it is shown as it is."""
    with torch.inference_mode():
        pretext = networks(images()).pretext.double().numpy()
        logits = networks.pretext.head(networks.pretext.embed(images())).double().numpy()
    order, turn = np.exp(logits[:, :6]), np.exp(logits[:, 6:])
    np.testing.assert_allclose(pretext[:, 0], -np.log(order[:, 0] / order.sum(axis=1)), rtol=1e-4)
    np.testing.assert_allclose(pretext[:, 1], -np.log(turn[:, 0] / turn.sum(axis=1)), rtol=1e-4)


@pytest.mark.parametrize("side", [16, 32, 64, 96, 100])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_pretext_network_sees_means_over_areas(side, layout):
    """Of whole blocks of pixels and of parts of them; a small image as it is."""
    x = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    small = min(side, PretextNet.SIDE)
    got = PretextNet().downsample(x.contiguous(memory_format=layout)).numpy()
    edges = [(i * side // small, -(-(i + 1) * side // small)) for i in range(small)]
    for (i, (top, bottom)), (j, (left, right)) in product(enumerate(edges), repeat=2):
        wanted = x.numpy()[:, :, top:bottom, left:right].astype(float).mean(axis=(2, 3))
        np.testing.assert_allclose(got[:, :, i, j], wanted, rtol=1e-5)


def test_the_pretext_network_gives_probabilities(networks):
    """Of the orders and of the turns, each adding to one."""
    with torch.inference_mode():
        for log_p, count in zip(networks.pretext(images()), (6, 4), strict=True):
            assert log_p.shape == (4, count)
            torch.testing.assert_close(log_p.exp().sum(dim=1), torch.ones(4))


def test_the_pretext_network_looks_at_32_pixels(networks):
    """A larger image is averaged down to 32 px, block by block."""
    x = images(2, 128)
    blocks = x.numpy().reshape(2, 3, 32, 4, 32, 4).mean(axis=(3, 5))
    with torch.inference_mode():
        torch.testing.assert_close(
            networks.pretext.embed(x), networks.pretext.embed(torch.from_numpy(blocks))
        )


def test_neighbours_compare_what_the_pretext_network_sees(networks):
    """The embedding of the evidence is that of the image as it is."""
    with torch.inference_mode():
        e = networks(images())
        torch.testing.assert_close(e.embedding, networks.pretext.embed(images()))
        assert F.normalize(e.embedding).shape == (4, 256)


# All of them together.


def test_what_is_not_asked_is_not_there(networks):
    """Each pass adds to the one before and changes nothing of it; an absent network adds nothing."""
    x = images()
    with torch.inference_mode():
        mean, marked, whole = (
            f(x) for f in (networks.forward_mean, networks.with_segmentation, networks)
        )
        without = built(pretext=False, segmenter=False)(x)
    assert (mean.segmentation.numel(), mean.pretext.numel(), marked.pretext.numel()) == (0, 0, 0)
    assert torch.equal(whole.segmentation, marked.segmentation)
    for name in ("recon", "mu", "logvar"):
        assert torch.equal(getattr(whole, name), getattr(mean, name))
    assert (without.segmentation.numel(), without.pretext.numel()) == (0, 0)


@pytest.mark.parametrize("side", [16, 32, 48])
def test_the_segmenter_marks_every_pixel(side):
    """One number a pixel, and it looks at the picture: another picture gets other marks."""
    segmenter = built(image_size=side).segmenter
    with torch.inference_mode():
        odds = segmenter(images(2, side))
    assert odds.shape == (2, side, side)
    assert odds.isfinite().all()
    assert not torch.allclose(odds[0], odds[1])


@pytest.mark.parametrize("batch_norm", [True, False])
def test_rounded_weights_are_those_of_the_folded_layers(batch_norm):
    """As torch's own fusion of convolution and batch norm gives them, to bfloat16; maps stay close."""
    networks = built(batch_norm=batch_norm, hidden_dims=(8, 16, 16))
    for module in networks.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for values in (*module.parameters(), module.running_mean, module.running_var):
                torch.nn.init.uniform_(values, 0.5, 1.5)
    before, x = deepcopy(networks), images()
    round_weights(networks)
    for kind, transposed in ((networks.vae.stages[1], False), (networks.vae.ups[0], True)):
        conv, norm = kind[:2]
        name = "vae.ups.0" if transposed else "vae.stages.1"
        old, old_norm = before.get_submodule(name)[:2]
        fused = fuse_conv_bn_eval(old, old_norm, transposed) if batch_norm else old
        torch.testing.assert_close(conv.weight, fused.weight.bfloat16().float())
        bias = norm.bias if batch_norm else conv.bias
        torch.testing.assert_close(bias, fused.bias.bfloat16().float(), rtol=0.01, atol=1e-6)
    convolutions = [m for m in networks.modules() if isinstance(m, torch.nn.Conv2d)]
    assert all(torch.equal(m.weight, m.weight.bfloat16().float()) for m in convolutions)
    with torch.no_grad():
        for now, then in zip(networks.vae(x)[:3], before.vae(x)[:3], strict=True):
            assert (now - then).abs().max() <= 0.05 * then.abs().max()
