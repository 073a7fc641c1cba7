"""Networks as graphs: what they say is what the networks say, and they are made for what comes often."""

import inspect
import threading
import warnings

import pytest
import torch
from torch import nn

from msvae import graphs, native, structure
from msvae.config import ModelConfig
from msvae.graphs import IN_ALL, MOST, OFTEN, OFTEN_MANY, Graphs
from msvae.model import VAE
from msvae.packed import can_pack
from msvae.scores import image_statistics

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def none_made_before(monkeypatch):
    """Those of other tests do not count."""
    monkeypatch.setattr(Graphs, "in_all", 0)


class Counting(nn.Module):
    """Doubles, and counts how often Python is asked."""

    def __init__(self):
        super().__init__()
        self.asked = 0

    def forward(self, x):
        """Twice the images."""
        self.asked += 1
        return 2 * x


def told(run, part, x, times):
    with torch.inference_mode():
        return [run(part.forward, x) for _ in range(times)]


@pytest.mark.parametrize(("images", "often"), [(1, OFTEN), (4, OFTEN_MANY)])
def test_python_is_asked_no_more_once_a_shape_came_often(images, often):
    """Until then at each call; then once more, for the tracing."""
    run, part, x = Graphs(), Counting(), torch.rand(images, 3, 8, 8)
    assert all(torch.equal(y, 2 * x) for y in told(run, part, x, often - 1))
    assert part.asked == often - 1
    told(run, part, x, 1)
    asked = part.asked
    y = torch.rand(images, 3, 8, 8)
    assert all(torch.equal(z, 2 * y) for z in told(run, part, y, 5))
    assert part.asked == asked
    told(run, part, torch.rand(images, 3, 16, 16), 1)
    assert part.asked == asked + 1


def test_with_gradients_there_is_no_graph():
    """Networks that learn are asked layer by layer."""
    run, part, x = Graphs(), Counting(), torch.rand(1, 3, 8, 8, requires_grad=True)
    for _ in range(2 * OFTEN):
        assert run(part.forward, x).requires_grad
    assert not run.made


def test_a_process_makes_no_more_than_so_many(monkeypatch):
    """torch never lets go of them."""
    monkeypatch.setattr(Graphs, "in_all", IN_ALL - 1)
    run, part = Graphs(), Counting()
    for side in (8, 16, 32):
        told(run, part, torch.rand(1, 3, side, side), 2 * OFTEN)
    assert len(run.made) == 1
    assert Graphs.in_all == IN_ALL


class Moody(nn.Module):
    """Says something else each time."""

    def forward(self, x):
        """The images, brighter."""
        return x + torch.rand(())


class Untraceable(nn.Module):
    """Returns what no graph can."""

    def forward(self, x):
        """A mixture."""
        return (x, {"size": x.shape[0]}, object())


@pytest.mark.parametrize("part", [Moody(), Untraceable()])
def test_a_graph_that_fails_or_says_otherwise_is_not_used(part):
    """The network itself is asked, without a word."""
    run = Graphs()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        told(run, part, torch.rand(1, 3, 8, 8), 2 * OFTEN)
    assert [*run.made.values()] == [part.forward]


def test_graphs_are_not_kept_without_end():
    """Of many shapes of batches only the first ones that came often have one; single images have."""
    run, part = Graphs(), Counting()
    for images in range(2, MOST + 6):
        told(run, part, torch.rand(images, 3, 8, 8), OFTEN_MANY)
    assert len(run.made) == MOST
    told(run, part, torch.rand(1, 3, 8, 8), OFTEN)
    assert len(run.made) == MOST + 1


def test_while_one_thread_traces_the_others_go_on(monkeypatch):
    """torch traces in one thread at a time."""
    run, part, x = Graphs(), Counting(), torch.rand(1, 3, 8, 8)
    inside, go_on = threading.Event(), threading.Event()

    def slow(*_):
        inside.set()
        assert go_on.wait(20)

    monkeypatch.setattr(graphs, "_graph", slow)
    told(run, part, x, OFTEN - 1)
    other = threading.Thread(target=told, args=(run, part, x, 1))
    other.start()
    assert inside.wait(20)
    assert torch.equal(told(run, part, x, 1)[0], 2 * x)
    go_on.set()
    other.join()


@pytest.mark.parametrize("side", [32, 64, 128])
def test_statistics_become_graphs_too(side, monkeypatch):
    """What a score needs beside the networks and has no compiled loops for, to the bit."""
    monkeypatch.setattr(native, "suits", lambda values: False)
    x, recon = torch.rand(2, 1, 3, side, side)
    mu, logvar = torch.rand(2, 1, 6)
    run = Graphs()
    works = [
        (structure._local_means, (x,)),
        (structure._statistics, (torch.rand(1, 13, 16, 16),)),
        (image_statistics, (x, recon, mu, logvar)),
    ]
    for work, given in works:
        with torch.inference_mode():
            plain = work(*given)
            for _ in range(OFTEN):
                run(work, *given)
            graph = run.made[(work, *(t.shape for t in given))]
            assert graph is not work
            assert torch.equal(run(work, *given), plain)


@pytest.mark.skipif(not can_pack(CPU), reason="needs oneDNN's operations")
@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_networks_become_graphs_that_say_the_same(dtype, images):
    """Evidence to the bit, with packed convolutions, both precisions."""
    torch.manual_seed(0)
    config = ModelConfig(image_size=64, latent_dim=8, hidden_dims=(8, 16, 16))
    model = VAE(config).eval().frozen(dtype, tiles=False)
    run = model.graphs
    x = torch.rand(images, 3, 64, 64)
    with torch.no_grad():
        model.graphs = None
        plain = model.evidence(x)
        model.graphs = run
        for _ in range(OFTEN_MANY + 2):
            e = model.evidence(x)
    assert len(run.made) == 3
    assert not any(inspect.ismethod(graph) for graph in run.made.values())
    for name, a, b in zip(e._fields, e, plain, strict=True):
        same = [torch.equal(*pair) for pair in zip(a, b, strict=True)]
        assert all(same), name
