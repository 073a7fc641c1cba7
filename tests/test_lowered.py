"""Gradients by products of matrices against torch's own in double precision."""

import pytest
import torch
from torch.nn import functional as F

from msvae import lowered
from msvae.compute import autocast
from msvae.config import Config
from msvae.model import VAE
from msvae.teach import pretext_loss
from msvae.train import losses

CPU = torch.device("cpu")


@pytest.fixture
def called(monkeypatch):
    """A list that grows with each gradient that is taken by products."""
    calls, windows = [], lowered.windows
    monkeypatch.setattr(lowered, "windows", lambda *a: calls.append(a) or windows(*a))
    return calls


def both(layer, x, layout):
    """Output and gradients, of the layer in bfloat16 and of torch's function in double precision."""
    convolve = F.conv_transpose2d if isinstance(layer, torch.nn.ConvTranspose2d) else F.conv2d
    mine, exact = x.bfloat16(), x.bfloat16().double()
    weight = layer.weight.detach().bfloat16().double()
    for tensor in (mine, exact, weight):
        tensor.requires_grad_()
    ours = layer(mine)
    wanted = convolve(exact, weight, None, layer.stride, layer.padding)
    pull = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    ours.backward(pull.to(memory_format=layout))
    wanted.backward(pull.double())
    return [(ours, wanted), (mine.grad, exact.grad), (layer.weight.grad, weight.grad)]


LAYERS = [
    (lambda: lowered.Conv2d(128, 96, 3, 2, 1, bias=False), 9),
    (lambda: lowered.Conv2d(64, 128, 3, 2, 1, bias=False), 8),
    (lambda: lowered.Conv2d(96, 128, 3, 1, 1, bias=False), 5),
    (lambda: lowered.ConvTranspose2d(128, 96, 4, 2, 1, bias=False), 5),
]


@pytest.mark.parametrize(("make", "side"), LAYERS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_gradients_are_torchs(make, side, layout, called):
    """To the rounding of bfloat16: odd and even sides, strides 1 and 2, up and down."""
    torch.manual_seed(0)
    layer = make().to(memory_format=torch.channels_last)
    x = torch.randn(3, layer.in_channels, side, side).to(memory_format=layout)
    pairs = both(layer, x, layout)
    assert len(called) == 1
    for got, wanted in pairs:
        assert got.shape == wanted.shape
        gap = got.detach().double() - wanted.detach()
        assert float(gap.norm() / wanted.detach().norm()) < 4e-3
    assert layer.weight.grad.stride() == layer.weight.stride()  # else it would be copied about


WIDE = lowered.Conv2d(128, 64, 3, 2, 1, bias=False).bfloat16()
UP = lowered.ConvTranspose2d(64, 128, 4, 2, 1, bias=False).bfloat16()


def maps(channels, side, **kind):
    """32 maps as a layer in the middle of a network has them."""
    return torch.zeros(
        32, channels, side, side, **{"dtype": torch.bfloat16, **kind}
    ).requires_grad_()


@pytest.mark.parametrize(
    ("layer", "x", "taken"),
    [
        (WIDE, maps(128, 16), True),  # 2,048 places
        (WIDE, maps(128, 18), False),
        (UP, maps(64, 8), True),
        (UP, maps(64, 9), False),
        (lowered.Conv2d(64, 96, 3, 2, 1, bias=False).bfloat16(), maps(64, 8), False),
        (lowered.Conv2d(128, 64, 3, 2, 1, bias=True).bfloat16(), maps(128, 8), False),
        (lowered.Conv2d(128, 64, 3, 2, 1, bias=False).double(), maps(128, 8).double(), False),
        (WIDE, maps(128, 8).detach(), False),
    ],
)
def test_wide_layers_at_few_places_are_taken(layer, x, taken, monkeypatch):
    """Not those with few channels, many places, a bias, in another precision, or without gradient."""
    calls, by_products = [], lowered._by_products
    monkeypatch.setattr(
        lowered, "_by_products", lambda *a, **k: calls.append(a) or by_products(*a, **k)
    )
    layer(x)
    assert bool(calls) is taken
    calls.clear()
    with torch.no_grad():
        layer(x)
    assert not calls


def test_a_size_of_the_output_is_kept_to():
    """torch's own argument: of 4 x 4 places come 9 x 9 where stride 2 allows either."""
    assert UP(maps(64, 4), output_size=[9, 9]).shape[-2:] == (9, 9)


def test_the_default_networks_use_it(called):
    """The widest layers of all three, there and back; in bfloat16 only."""
    config = Config().replace(image_size=64)
    torch.manual_seed(0)
    model = VAE(config.model).to(memory_format=torch.channels_last).train()
    x, zeros = torch.rand(32, 3, 64, 64), torch.zeros(32, dtype=torch.long)
    for precision, used in (("bf16", [4, 4, 4]), ("fp32", [0, 0, 0])):
        with autocast(config.replace(precision=precision).train, CPU):
            vae = losses(model, x, 1.0, torch.zeros(32, 128)).total
            told = pretext_loss(model.companion, x, zeros, zeros)
            odds = model.inspector(x).float().mean()
        counts = []
        for loss in (vae, told, odds):
            called.clear()
            loss.backward()
            counts.append(len(called))
        assert counts == used
