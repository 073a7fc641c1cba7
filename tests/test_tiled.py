"""Layers by the processor's tiles against torch in double precision, on the same bfloat16 numbers."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from msvae import native
from msvae.config import Config
from msvae.model import VAE
from msvae.tiled import Linear, Network, fits, paints, tells

LAST = torch.channels_last
pytestmark = pytest.mark.skipif(not native.has_tiles(), reason="the processor has no AMX")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def rounded(values):
    return values.detach().bfloat16().double()


def exactly(conv, h, silu=True):
    """The layer in double precision, of numbers in bfloat16."""
    bias = None if conv.bias is None else conv.bias.detach().double()
    work = F.conv_transpose2d if isinstance(conv, nn.ConvTranspose2d) else F.conv2d
    u = work(rounded(h), rounded(conv.weight), bias, conv.stride, conv.padding)
    return F.silu(u) if silu else u


def near(found, expected):
    """To half a step of bfloat16, and what float32 sums and the quick sigmoid add."""
    assert found.shape == expected.shape
    room = expected.abs() * 2**-8 * 1.15 + 2e-5
    assert ((found.double() - expected).abs() <= room).all()


def images(count, side):
    return torch.rand(count, 3, side, side).contiguous(memory_format=LAST)


def maps(count, width, side):
    return torch.randn(count, width, side, side).bfloat16().contiguous(memory_format=LAST)


@pytest.mark.parametrize("side", [64, 48, 40, 24, 12, 9, 5])
@pytest.mark.parametrize("together", [1, 3])
def test_a_chain_of_layers_is_that_of_torch(side, together, threads):
    """Down, across, up and down again; what is added, as large and half as large."""
    down, first = nn.Conv2d(3, 32, 4, 2, padding=1), nn.Conv2d(3, 32, 3, 1, padding=1, bias=False)
    second, same = nn.Conv2d(32, 96, 3, 2, padding=1), nn.Conv2d(96, 96, 3, padding=1)
    up, across = nn.ConvTranspose2d(96, 64, 4, 2, padding=1), nn.Conv2d(32, 64, 1)
    net = Network(side, together=together)
    net.conv(0, down, kept=True, last=True)
    a = net.conv(0, first, parted=True, kept=True)
    b = net.conv(a, second, kept=True)
    c = net.conv(b, same, added=b, kept=True)
    d = net.conv(c, up, kept=True)
    again = net.conv(0, first)
    if side % 2 == 0:  # else what went down and up again is larger
        net.conv(again, across, silu=False, added=d, kept=True, last=True)
    x = images(5, side)
    found = net(x)
    for _ in range(2):  # the planes are used again
        assert all(map(torch.equal, found, net(x)))
    half, whole, small, branch, wide, *rest = found
    near(half, exactly(down, x - 0.5))
    near(whole, exactly(first, x - 0.5))
    near(small, exactly(second, whole))
    near(branch, exactly(same, small) + small.double())
    near(wide, exactly(up, branch))
    if rest:
        near(rest[0], exactly(across, whole, silu=False) + wide.double())


def test_half_as_large_maps_are_added_by_repetition(threads):
    fine, coarse = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 64, 3, 2, padding=1)
    across = nn.Conv2d(32, 64, 1)
    for side in (32, 14, 6):
        net = Network(side)
        a = net.conv(0, fine, kept=True)
        b = net.conv(a, coarse, kept=True)
        net.conv(a, across, silu=False, added=b, kept=True, last=True)
        whole, small, both = net(images(2, side))
        wide = F.interpolate(small.double(), scale_factor=2, mode="nearest")
        near(both, exactly(across, whole, silu=False) + wide)


@pytest.mark.parametrize("side", [16, 8, 4])
def test_maps_are_taken_as_they_are_given(side, threads):
    conv, x = nn.Conv2d(256, 32, 3, padding=1), maps(3, 256, side)
    net = Network(side, 256)
    net.conv(0, conv, kept=True, last=True)
    near(net(x)[0], exactly(conv, x))


@pytest.mark.parametrize("side", [32, 9])
def test_one_channel_is_told_of_the_maps_before_they_are_rounded(side, threads):
    conv, tell = nn.Conv2d(64, 32, 3, padding=1), nn.Conv2d(32, 1, 1)
    x, net = maps(3, 64, side), Network(side, 64)
    net.conv(0, conv, told=tell, last=True)
    (found,) = net(x)
    assert found.dtype == torch.float32
    expected = tell.double()(exactly(conv, x))
    assert (found - expected).abs().max() < 1e-3 * expected.abs().max()


@pytest.mark.parametrize("side", [16, 40, 72, 80])
def test_pixels_are_those_of_the_float32_convolution(side, threads):
    """Widths of one tile, of two and a half, of four and a half and of five."""
    conv, x, net = nn.Conv2d(32, 12, 3, padding=1), maps(3, 32, side), Network(side, 32)
    net.paint(0, conv)
    (found,) = net(x)
    exact = F.pixel_shuffle(conv.double()(x.double()), 2).sigmoid()
    assert (found.double() - exact).abs().max() < 2e-5


@pytest.mark.parametrize("count", [1, 7, 40, 64])
@pytest.mark.parametrize("size", [32, 544, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_layers_keep_the_weights_to_16_bits(count, size, dtype, threads):
    """And those in bfloat16 as they are."""
    one, two = nn.Linear(size, 64, dtype=dtype), nn.Linear(size, 32, dtype=dtype)
    rows = torch.randn(count, size).bfloat16()
    found = Linear(one, two)(rows)
    for told, layer in zip(found, (one, two), strict=True):
        expected = layer.double()(rows.double())
        assert (told.double() - expected).abs().max() < 3e-5


@pytest.mark.parametrize("count", [1, 2, 5])
def test_an_image_is_the_same_in_any_company(count, threads):
    """To the bit: whichever images go with it, and how many together."""
    model, x = VAE(Config().replace(image_size=64).model), images(5, 64)
    with torch.inference_mode():
        frozen = model.frozen(torch.bfloat16)
        together, alone = frozen.evidence(x), frozen.evidence(x[:count])
    for name in ("recon", "mu", "logvar", "inspection"):
        assert torch.equal(getattr(together, name)[:count], getattr(alone, name)), name


def test_tiles_are_left_as_they_were_found():
    """oneDNN's products in bfloat16 use them too, before and after."""
    a, b = maps(64, 96, 1).flatten(1), maps(64, 96, 1).flatten(1)
    net, x = Network(16), images(1, 16)
    net.conv(0, nn.Conv2d(3, 32, 3, padding=1), kept=True, last=True)
    linear = Linear(nn.Linear(96, 32))
    before = a @ b.T
    for _ in range(3):
        net(x)
        linear(a)
        assert torch.equal(a @ b.T, before)


def test_copies_of_a_frozen_model_share_its_layers():
    """They point into tensors that a copy would not have."""
    frozen = VAE(Config().replace(image_size=32).model).frozen(torch.bfloat16)
    copied, x = deepcopy(frozen), images(2, 32)
    assert copied.tiles.encoder is frozen.tiles.encoder
    with torch.inference_mode():
        expected = frozen.evidence(x).recon
        del frozen
        assert torch.equal(copied.evidence(x).recon, expected)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(32, 48, 3, padding=1),
        nn.Conv2d(8, 32, 3, padding=1),
        nn.Conv2d(32, 32, 3, padding=1, groups=2),
        nn.Conv2d(32, 32, 3, padding=2, dilation=2),
        nn.Conv2d(32, 32, (3, 1), padding=(1, 0)),
        nn.Conv2d(3, 32, 11, padding=1),
        nn.ConvTranspose2d(32, 32, 3, 2, padding=1),
        nn.ConvTranspose2d(32, 32, 4, 2, padding=1, output_padding=1),
    ],
)
def test_other_convolutions_are_left_to_torch(conv):
    assert not fits(conv)
    assert fits(nn.Conv2d(32, 32, 3, padding=1))
    assert not tells(nn.Conv2d(64, 1, 1))
    assert not paints(nn.Conv2d(32, 12, 3, padding=1), 8)
    assert not Linear.fits(nn.Linear(32, 24))


@pytest.mark.parametrize("changes", [{}, {"image_size": 48}, {"hidden_dims": (32, 48, 64)}])
def test_a_frozen_model_is_as_near_by_tiles_as_by_packed_layers(changes):
    """To the model in float32; where its layers do not fit, all is packed."""
    config = Config().replace(**{"image_size": 64} | changes).model
    model, x = VAE(config).eval(), images(8, config.image_size)
    with torch.inference_mode():
        exact = model.evidence(x)
        ours = model.frozen(torch.bfloat16)
        theirs = model.frozen(torch.bfloat16, tiles=False)
        assert bool(ours.tiles) == ("hidden_dims" not in changes)
        assert theirs.tiles is None
        told, other = ours.evidence(x), theirs.evidence(x)
    for name in ("recon", "mu", "logvar", "embedding", "inspection", "pretext"):
        value = getattr(exact, name)
        gaps = [(getattr(e, name) - value).square().mean().sqrt() for e in (told, other)]
        assert gaps[0] <= 1.5 * gaps[1] + 1e-6, name
