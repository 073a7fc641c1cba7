"""The `seed` preset at its own size: 224 px, widths 512, 256 and 128, on as few images as can be."""

import shutil

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from msvae import load
from msvae.core.config import preset
from msvae.run.fit import fit_parts
from msvae.run.parts import Part, Parts
from msvae.scores import fit as learning
from msvae.training import vae as training


def smooth_images(n, seed):
    gen = torch.Generator().manual_seed(seed)
    coarse = 0.3 + 0.4 * torch.rand(n, 3, 4, 4, generator=gen)
    fine = F.interpolate(coarse, size=(224, 224), mode="bicubic").clamp(0, 1)
    return (fine * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()


def part(n, seed):
    names = tuple(f"{seed}-{i}" for i in range(n))
    return Part(smooth_images(n, seed), names, names)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A seed detector after two steps of four images; its run folder goes afterwards."""
    folder = tmp_path_factory.mktemp("seed") / "run"
    config = preset("seed").replace(batch_size=4, epochs=1, min_steps=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "SHORTEST_EPOCH", 2)
        patch.setattr(learning, "IMAGINED", 4)
        detector = fit_parts(Parts(part(8, 0), part(4, 1), part(2, 2)), config, folder)
    yield detector, folder
    shutil.rmtree(folder)


def test_the_seed_preset_fits_saves_loads_and_scores(fitted):
    """Nothing is shrunk but the training; loaded, it scores bit-equal, noise highest."""
    detector, folder = fitted
    noise = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    images = [smooth_images(1, 3)[0], noise]
    table, again = detector.score(images), load(folder).score(images)
    for name, values in table.scores.items():
        assert np.isfinite(values).all()
        np.testing.assert_array_equal(values, again.scores[name])
    np.testing.assert_array_equal(table.p, again.p)
    assert table.scores["fused"][1] > table.scores["fused"][0]
    np.testing.assert_array_equal(table.flagged, table.scores["weighted"] >= 0.5)
    assert table.flagged[1]


def test_the_seed_preset_has_its_shape(fitted):
    """The stages, the bottleneck and the number of weights of the seed's network."""
    networks = fitted[0].graph.torch_graph().networks
    model = networks.vae
    assert [s[0].weight.shape[0] for s in model.stages] == [512, 256, 128]
    assert model.to_mu.weight.shape == model.to_logvar.weight.shape == (128, 128 * 28 * 28)
    assert networks.pretext is None
    assert networks.segmenter is None
    assert model.dropout.p == 0.1


def test_two_steps_were_trained(fitted):
    """The history says so, with finite losses."""
    rows = (fitted[1] / "history.csv").read_text().splitlines()
    assert len(rows) == 2
    losses = dict(zip(rows[0].split(","), rows[1].split(","), strict=True))
    assert all(np.isfinite(float(v)) for v in losses.values())
    assert float(losses["kl"]) > 0
