"""The scoring graph: what one pass tells of a batch is what its parts tell, by whichever engine."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch.nn import functional as F

from msvae.core.config import Config
from msvae.engine.choose import ENGINES
from msvae.networks.model import Networks
from msvae.run.fit import FittedGraph
from msvae.scores import formulas, maps
from msvae.scores.catalog import FUSED_SCORES, GRAPH_SCORES, MAP_SCORES, MAPS, NUMBERS, STATISTICS
from msvae.scores.fit import learn
from msvae.scores.graph import ScoringGraph, to_images
from msvae.scores.maps import at_size

SIDE = 32
CONFIG = Config().replace(image_size=SIDE, hidden_dims=(8, 12, 16), latent_dim=6)


def smooth_images(n, seed):
    """Smooth coloured pictures, (N, 32, 32, 3) uint8."""
    gen = torch.Generator().manual_seed(seed)
    coarse = 0.2 + 0.6 * torch.rand(n, 3, 4, 4, generator=gen)
    fine = F.interpolate(coarse, size=(SIDE, SIDE), mode="bicubic").clamp(0, 1)
    return (fine * 255).round().byte().permute(0, 2, 3, 1).contiguous()


def close(ours, theirs, rtol=1e-4, atol=1e-5):
    np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=rtol, atol=atol)


@pytest.fixture(scope="module")
def learned():
    """The graph and the verdict of networks that learned nothing."""
    torch.manual_seed(0)
    networks = Networks(CONFIG.model).eval().requires_grad_(False)
    train, held = to_images(smooth_images(40, 1)), to_images(smooth_images(8, 2))
    return learn(networks, lambda: train.split(16), lambda: [held], count=40, alpha=0.6, beta=1.0)


@pytest.fixture(scope="module")
def graph(learned):
    return learned.graph


@pytest.fixture(scope="module")
def pixels():
    """Four smooth images and two of noise: maps far beyond the normal ones too."""
    noise = np.random.default_rng(0).integers(0, 256, (2, SIDE, SIDE, 3), dtype=np.uint8)
    return torch.cat([smooth_images(4, 3), torch.from_numpy(noise)])


@pytest.fixture(scope="module")
def outputs(graph, pixels):
    """Numbers and maps by name."""
    with torch.inference_mode():
        numbers, drawn = graph(pixels)
    assert numbers.shape == (6, len(NUMBERS))
    assert drawn.shape == (6, len(MAPS), SIDE, SIDE)
    named = dict(zip(NUMBERS, numbers.T, strict=True))
    return named, dict(zip(MAPS, drawn.unbind(dim=1), strict=True))


@pytest.fixture(scope="module")
def e(graph, pixels):
    """The evidence of the pixels, scaled and turned by numpy."""
    x = torch.from_numpy(np.moveaxis(pixels.numpy() / np.float32(255), 3, 1))
    with torch.inference_mode():
        return graph.networks(x.contiguous())


def test_pixels_become_images_between_0_and_1(pixels):
    """(B, S, S, 3) bytes are (B, 3, S, S) floats, pixel for pixel."""
    x = to_images(pixels)
    close(x, np.moveaxis(pixels.numpy(), 3, 1) / 255, atol=1e-7)
    assert x.dtype == torch.float32


def test_every_number_is_that_of_its_part(graph, e, outputs):
    """Under its own name: the scores by formula or fitted part, then the statistics."""
    parts, numbers = graph.parts, outputs[0]
    expected = {
        "reconstruction": formulas.reconstruction(e),
        "mahalanobis": parts.mahalanobis(e),
        "kl": formulas.kl(e),
        "spread": formulas.spread(e),
        "order": formulas.order(e),
        "turn": formulas.turn(e),
        "neighbours": parts.neighbours(e),
    }
    assert set(expected) | set(MAP_SCORES) == set(GRAPH_SCORES)
    for name, values in expected.items():
        close(numbers[name], values)
    statistics = formulas.statistics(e, expected["mahalanobis"])
    for name, values in zip(STATISTICS, statistics.T, strict=True):
        close(numbers[name], values, atol=1e-4)


def test_every_map_is_that_of_its_part(graph, e, outputs):
    """Coarse ones brought to the size of the image, each under its own name."""
    places, drawn = graph.parts.places, outputs[1]
    expected = {
        "reconstruction": maps.reconstruction_map(e),
        "residual": places.residual(e),
        "spatial": places.spatial.drawn(e),
        "structure": at_size(places.structure(e.x), SIDE),
        "inspection": maps.inspection(e),
    }
    assert {*expected, "fused"} == set(MAPS)
    for name, values in expected.items():
        close(drawn[name], values, rtol=1e-3, atol=1e-4)


def test_a_maps_score_is_the_mean_of_its_greatest_places(graph, outputs):
    """As many as its own share of the places says, by numpy's sort."""
    numbers, drawn = outputs
    for name, share in zip(MAP_SCORES, graph.shares, strict=True):
        highest = np.sort(drawn[name].numpy().reshape(6, -1))[:, -round(share * SIDE**2) :]
        close(numbers[name], highest.mean(axis=1))


def test_the_fused_map_by_numpy(graph, learned, outputs):
    """Weights of the fusion times each map's rarity, looked up by `np.interp`, blurred by scipy."""
    drawn, rarity, total = outputs[1], graph.parts.rarity, 0
    for i, name in enumerate(MAP_SCORES):
        values = drawn[name].double().numpy()
        lowest, highest, slope = (
            float(t[i]) for t in (rarity.lowest, rarity.highest, rarity.slope)
        )
        knots = np.linspace(lowest, highest, rarity.table.shape[1])
        nats = np.interp(values, knots, rarity.table[i].double().numpy())
        nats += slope * (values - highest).clip(0)
        assert (values > highest).any(), "no place lies beyond the normal ones"
        total = total + learned.verdict.fusion.weights[FUSED_SCORES.index(name)] * nats
    wanted = [gaussian_filter(m, 0.5, mode="mirror", radius=2) for m in total]
    close(drawn["fused"], wanted, rtol=1e-3, atol=1e-3 * np.std(wanted))


def test_rarity_counts_the_places_of_the_training_images(graph):
    """A map's last knot is reached by one place in a thousand, its first by all: ln 1000 and 0 nats."""
    rarity = graph.parts.rarity
    edges = torch.stack([rarity.lowest, rarity.highest], dim=1)[None, :, None]
    with torch.inference_mode():
        nats = rarity(edges)[0, :, 0]
    close(nats[:, 0], np.zeros(len(MAP_SCORES)), atol=1e-4)
    # Edges are repeated where the spatial map is moved: of equal values the first is meant.
    close(nats[:, 1], np.full(len(MAP_SCORES), np.log(1000)), rtol=0.05)


def test_numbers_alone_are_those_beside_the_maps(graph, pixels, outputs):
    """Whoever wants no maps gets the same numbers."""
    with torch.inference_mode():
        numbers = graph.numbers_of(to_images(pixels))
    close(numbers, torch.stack([*outputs[0].values()], dim=1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_image_is_the_same_alone_and_in_company(learned, pixels, outputs, engine):
    """Its numbers and its maps, whoever stands beside it, by either engine; and they are torch's."""
    run, images = ENGINES[engine](FittedGraph(learned.graph, pixels[:4].numpy())), pixels.numpy()
    whole = run(images, with_maps=True)
    alone = [run(image[None], with_maps=True) for image in images]
    reverse = run(images[::-1], with_maps=True)
    deviations = whole.numbers.std(axis=0)
    expected = torch.stack([*outputs[0].values()], dim=1).numpy()
    for numbers in (
        np.concatenate([one.numbers for one in alone]),
        reverse.numbers[::-1],
        expected,
    ):
        assert (np.abs(whole.numbers - numbers) < 1e-3 * deviations + 1e-5).all()
    room = 1e-3 * whole.maps.std(axis=(0, 2, 3), keepdims=True) + 1e-5
    expected = torch.stack([*outputs[1].values()], dim=1).numpy()
    for drawn in (np.concatenate([one.maps for one in alone]), reverse.maps[::-1], expected):
        assert (np.abs(whole.maps - drawn) < room).all()


@pytest.mark.parametrize("engine", ENGINES)
def test_maps_are_given_where_they_are_asked_for(learned, pixels, engine):
    """Without them the numbers are the same."""
    run, images = ENGINES[engine](FittedGraph(learned.graph, pixels[:4].numpy())), pixels.numpy()
    plain, drawn = run(images), run(images, with_maps=True)
    assert plain.maps is None
    assert drawn.maps.shape == (6, len(MAPS), SIDE, SIDE)
    close(plain.numbers, drawn.numbers)


def test_arrays_name_every_weight_and_part(graph, e):
    """What a run keeps: the networks' weights and the parts' tensors, all of them, under their names."""
    arrays = graph.arrays()
    weights = {k for k in arrays if k.startswith("networks.")}
    assert weights == {f"networks.{k}" for k in graph.networks.state_dict()}
    assert {k.split(".")[1] for k in set(arrays) - weights} == {
        "mahalanobis",
        "neighbours",
        "places",
        "rarity",
        "shares",
        "weights",
    }


def test_unlearned_networks_have_the_shape_and_nothing_else(graph, e):
    """The same first weights of the same seed; the random stream is left alone."""
    torch.manual_seed(3)
    drawn = torch.rand(2)
    torch.manual_seed(3)
    one, same, other = (graph.unlearned(seed) for seed in (5, 5, 6))
    assert torch.equal(drawn, torch.rand(2))
    assert isinstance(one, ScoringGraph)
    assert one.parts.rarity.table.equal(graph.parts.rarity.table)
    weights = [g.networks.vae.to_mu.weight for g in (one, same, other, graph)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], weights[3])
    assert {w.shape for w in weights} == {weights[0].shape}
