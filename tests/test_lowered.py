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


def both(layer, x):
    """Output and gradients, of the layer in bfloat16 and of torch's function in double precision."""
    convolve = F.conv_transpose2d if isinstance(layer, torch.nn.ConvTranspose2d) else F.conv2d
    mine, exact = x.bfloat16(), x.bfloat16().double()
    weight = layer.weight.detach().bfloat16().double()
    for tensor in (mine, exact, weight):
        tensor.requires_grad_()
    ours = layer(mine)
    wanted = convolve(exact, weight, None, layer.stride, layer.padding)
    pull = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    ours.backward(pull)
    wanted.backward(pull.double())
    return [(ours, wanted), (mine.grad, exact.grad), (layer.weight.grad, weight.grad)]


LAYERS = [
    (lambda: lowered.Conv2d(128, 96, 3, 2, padding=1, bias=False), 9),
    (lambda: lowered.Conv2d(64, 128, 3, 2, padding=1, bias=False), 8),
    (lambda: lowered.Conv2d(96, 128, 3, 1, padding=1, bias=False), 5),
    (lambda: lowered.ConvTranspose2d(128, 96, 4, 2, padding=1, bias=False), 5),
]


@pytest.mark.parametrize(("make", "side"), LAYERS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_gradients_are_torchs(make, side, layout, called):
    """To the rounding of bfloat16: odd and even sides, strides 1 and 2, up and down."""
    torch.manual_seed(0)
    layer = make().to(memory_format=torch.channels_last)
    x = torch.randn(3, layer.in_channels, side, side).to(memory_format=layout)
    pairs = both(layer.train(), x)
    assert len(called) == 1
    for got, wanted in pairs:
        assert got.shape == wanted.shape
        gap = got.detach().double() - wanted.detach()
        assert float(gap.norm() / wanted.detach().norm()) < 4e-3
    assert layer.weight.grad.stride() == layer.weight.stride()  # else it would be copied about


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (lowered.Conv2d(64, 64, 3, 2, padding=1, bias=False), torch.zeros(2, 64, 8, 8)),
        (lowered.Conv2d(128, 96, 3, 2, padding=1), torch.zeros(2, 128, 8, 8)),
        (lowered.Conv2d(128, 96, 3, 2, padding=1, bias=False), torch.zeros(2, 128, 66, 66)),
        (lowered.ConvTranspose2d(128, 96, 4, 2, 1, bias=False), torch.zeros(2, 128, 33, 33)),
    ],
)
def test_where_it_does_not_pay_torch_takes_them(layer, x, called):
    """Few channels, a bias, or many places; double precision; no gradient asked for."""
    layer.bfloat16()(x.bfloat16().requires_grad_()).float().sum().backward()
    with torch.no_grad():
        layer(x[..., :8, :8].bfloat16())
    layer.double()(x[..., :8, :8].double().requires_grad_()).sum().backward()
    assert not called


def test_the_default_networks_use_it(called):
    """The VAE's widest stages, there and back, and the companion's; in bfloat16 only."""
    config = Config().replace(image_size=64)
    torch.manual_seed(0)
    model = VAE(config.model).to(memory_format=torch.channels_last).train()
    x, zeros = torch.rand(2, 3, 64, 64), torch.zeros(2, dtype=torch.long)
    for precision, used in (("bf16", (4, 4)), ("fp32", (0, 0))):
        with autocast(config.replace(precision=precision).train, CPU):
            vae = losses(model, x, 1.0, torch.zeros(2, 128)).total
            told = pretext_loss(model.companion, x, zeros, zeros)
        counts = []
        for loss in (vae, told):
            called.clear()
            loss.backward()
            counts.append(len(called))
        assert tuple(counts) == used
