"""One contract for every score, and for each formula a second, independent way to compute it."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cosine
from scipy.spatial.distance import mahalanobis as scipy_mahalanobis
from scipy.stats import norm
from sklearn.covariance import LedoitWolf
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

from msvae.core.config import Config
from msvae.core.device import to_batch
from msvae.core.state import flatten
from msvae.networks.model import Networks
from msvae.ops.filters import top_mean
from msvae.scores import fit, formulas, structure
from msvae.scores.catalog import FUSED_SCORES, GRAPH_SCORES, MAP_SCORES, NUMBERS, STATISTICS
from msvae.scores.fit import learn
from msvae.scores.fusion import Fusion
from msvae.scores.latent import Mahalanobis, Neighbours
from msvae.scores.maps import USUAL
from msvae.scores.structure import StructureMap, local_statistics
from msvae.scores.verdict import statistics_of
from msvae.training.auxiliary import train_pretext
from msvae.training.vae import losses, train

CONFIG = Config().replace(
    image_size=32,
    hidden_dims=(8, 16),
    latent_dim=8,
    epochs=4,
    pretext_epochs=4,
    min_steps=0,
    batch_size=8,
    learning_rate=3e-3,
    precision="fp32",
)
ALPHA, BETA = 0.6, 2.0
N_TRAIN, N_HELD = 80, 12
ONE_SIDED = (
    "reconstruction",
    "mahalanobis",
    "elbo",
    "spread",
    "spatial",
    "residual",
    "structure",
    "order",
    "turn",
    "neighbours",
    "weighted",
    "weighted_raw",
    "bands",
    "complexity",
    "typicality",
    "fused",
)
ALL = ("kl", "inspection", *ONE_SIDED)
LEVELS = ("fine", "middle", "coarse", "rest")


def smooth_images(n, seed):
    """Smooth pictures (N, 32, 32, 3) that know red from blue and up from down."""
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.uniform(0.35, 0.65, (n, 3, 4, 4))).float()
    coarse += torch.tensor([0.2, 0.0, -0.2])[:, None, None]
    coarse += torch.linspace(0.12, -0.12, 4)[:, None]
    fine = F.interpolate(coarse, size=(32, 32), mode="bicubic", align_corners=False).clamp(0, 1)
    return (fine * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()


def batch(pixels):
    return to_batch(pixels, torch.device("cpu"))


def learned(networks, pixels, **changes):
    parts = [pixels[i : i + 16] for i in range(0, len(pixels), 16)]
    settings = {"alpha": ALPHA, "beta": BETA, "count": len(pixels)} | changes
    held = smooth_images(8, 9)
    return learn(networks, lambda: (batch(p) for p in parts), lambda: [batch(held)], **settings)


class Setting:
    """Briefly trained networks, what was learned with them, and normal and odd images."""

    def __init__(self):
        torch.manual_seed(0)
        self.networks = Networks(CONFIG.model)
        self.train, self.held = smooth_images(N_TRAIN, 1), smooth_images(N_HELD, 2)
        train(self.networks.vae, self.train, smooth_images(4, 3), CONFIG)
        train_pretext(self.networks, self.train, CONFIG)
        self.networks.eval()  # the segmenter too, which learned nothing
        self.graph, self.verdict = learned(self.networks, self.train)
        rng = np.random.default_rng(4)
        self.odd = {
            "black": np.zeros((2, 32, 32, 3), np.uint8),
            "white": np.full((2, 32, 32, 3), 255, np.uint8),
            "noise": rng.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8),
            "grey noise": rng.integers(0, 256, (3, 32, 32, 1), dtype=np.uint8).repeat(3, axis=3),
        }

    def evidence(self, pixels):
        """What the networks make of the images."""
        with torch.inference_mode():
            return self.networks(batch(pixels))

    def numbers(self, pixels):
        """The graph's numbers of the images."""
        with torch.inference_mode():
            return self.graph.numbers_of(batch(pixels)).numpy()

    def scores(self, pixels):
        """Every score of the images."""
        return self.verdict(self.numbers(pixels))


@pytest.fixture(scope="module")
def setting():
    return Setting()


@pytest.fixture(scope="module")
def scored(setting):
    """The scores of the training, held-out and odd images."""
    parts = {"train": setting.train, "held": setting.held, **setting.odd}
    return {name: setting.scores(pixels) for name, pixels in parts.items()}


@pytest.fixture(scope="module")
def company(setting):
    """Scores of four held-out images: alone, amid odd ones, and in reverse order."""
    four, noise, black = setting.held[:4], setting.odd["noise"], setting.odd["black"]
    alone = [setting.scores(four[i : i + 1]) for i in range(4)]
    among = setting.scores(np.concatenate([noise, four, black]))
    reverse = setting.scores(four[::-1])
    return [
        {k: np.concatenate([one[k] for one in alone]) for k in among},
        {k: v[6:10] for k, v in among.items()},
        {k: v[::-1] for k, v in reverse.items()},
    ]


@pytest.fixture(scope="module")
def e(setting):
    return setting.evidence(setting.held)


def close(ours, theirs, rtol=1e-4, atol=1e-5):
    np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=rtol, atol=atol)


# The contract, of every score.


def test_every_score_is_under_contract(scored):
    """A score that is added comes into this suite; `fused` stands last."""
    assert set(scored["held"]) == set(ALL)
    assert list(scored["held"])[-1] == "fused"


@pytest.mark.parametrize("score", ALL)
def test_one_number_an_image(scored, score):
    """(B,), in double precision."""
    value = scored["held"][score]
    assert value.shape == (N_HELD,)
    assert value.dtype == np.float64


@pytest.mark.parametrize("score", ALL)
def test_finite_on_any_image(scored, score):
    """Black, white and noise have scores too."""
    for scores in scored.values():
        assert np.isfinite(scores[score]).all()


@pytest.mark.parametrize("score", ALL)
def test_normal_images_differ(scored, score):
    """No score is the same number for every image."""
    assert scored["train"][score].std() > 0


@pytest.mark.parametrize("score", ALL)
def test_no_image_changes_another(scored, company, score):
    """A score of an image is the same alone and in company, whatever the company."""
    alone, *others = company
    for other in others:
        close(
            other[score], alone[score], rtol=1e-4, atol=1e-3 * float(scored["train"][score].std())
        )


@pytest.mark.parametrize("score", ONE_SIDED)
def test_gross_anomalies_score_higher(scored, score):
    """Noise lies above every normal image that the model has not seen."""
    assert np.median(scored["noise"][score]) > scored["held"][score].max()


@pytest.mark.parametrize("kind", ["black", "white", "noise", "grey noise"])
def test_fused_knows_every_gross_anomaly(scored, kind):
    """The fused score puts each of them above all normal images, trained on or not."""
    normal = np.concatenate([scored["train"]["fused"], scored["held"]["fused"]])
    assert scored[kind]["fused"].min() > normal.max()


def test_tasks_know_their_anomalies(setting, scored):
    """Swapped colours stand out by the channel order, upside-down images by the turn."""
    swapped = setting.scores(setting.held[..., ::-1])
    turned = setting.scores(np.rot90(setting.held, 2, (1, 2)))
    assert swapped["order"].min() > scored["held"]["order"].max()
    assert turned["turn"].min() > scored["held"]["turn"].max()


def test_learning_is_deterministic(setting):
    """The same networks and images give the same parameters, to the bit."""
    again = learned(setting.networks, setting.train)
    for first, other in (
        (setting.graph.arrays(), again.graph.arrays()),
        (flatten(setting.verdict), flatten(again.verdict)),
    ):
        assert first.keys() == other.keys()
        assert all(np.array_equal(first[k], other[k]) for k in first)


def test_the_fused_score_is_the_fusion_of_its_columns(setting, scored):
    """In the order in which they were fitted; nothing else has a say."""
    columns = np.stack([scored["held"][name] for name in FUSED_SCORES], axis=1)
    close(scored["held"]["fused"], setting.verdict.fusion(columns), rtol=1e-12)


# The formulas, each against another way.


def test_kl_is_that_of_torch_distributions(setting, e, scored):
    """KL(N(mu, sigma) || N(0, I)), in nats."""
    posterior = Normal(e.mu.double(), (0.5 * e.logvar.double()).exp())
    expected = kl_divergence(posterior, Normal(0.0, 1.0)).sum(dim=1)
    close(scored["held"]["kl"], expected)


def test_reconstruction_by_loop(e, scored):
    """The mean of the squared differences, pixel by pixel."""
    for i in range(3):
        pairs = zip(e.x[i].flatten().tolist(), e.recon[i].flatten().tolist(), strict=True)
        squares = [(a - b) ** 2 for a, b in pairs]
        assert scored["held"]["reconstruction"][i] == pytest.approx(sum(squares) / 3072, rel=1e-4)


def test_spread_by_numpy(e, scored):
    """The length of the vector of posterior deviations."""
    expected = np.linalg.norm(np.exp(0.5 * e.logvar.double().numpy()), axis=1)
    close(scored["held"]["spread"], expected)


def test_mahalanobis_by_scipy(setting, e, scored):
    """scipy's distance under scikit-learn's Ledoit-Wolf precision of the training latents."""
    latents = setting.evidence(setting.train).mu.double().numpy()
    precision = LedoitWolf().fit(latents).precision_
    centre = latents.mean(axis=0)
    expected = [scipy_mahalanobis(mu, centre, precision) ** 2 for mu in e.mu.double().numpy()]
    close(scored["held"]["mahalanobis"], expected, rtol=1e-3)


def test_mahalanobis_left_out_is_near_a_refit():
    """The distance of a fitted image equals a fit without each, to a few per cent."""
    gen = torch.Generator().manual_seed(0)
    latents = torch.randn(150, 4, generator=gen) @ torch.randn(4, 4, generator=gen) + 3
    ours = Mahalanobis.fit(latents).distance(latents, leave_out=True)
    for i in range(0, 150, 10):
        rest = torch.cat([latents[:i], latents[i + 1 :]])
        refitted = Mahalanobis.fit(rest).distance(latents[i : i + 1])
        assert float(ours[i]) == pytest.approx(float(refitted), rel=0.05)


def elbo(e, beta, variance=None):
    """The score from what it is made of."""
    error, rate = formulas.reconstruction(e), formulas.kl(e)
    return formulas.elbo(error, rate, e.x[0].numel(), beta, variance)


@pytest.mark.parametrize("variance", [0.01, 2.0])
def test_elbo_is_minus_the_log_likelihood_plus_rate(e, variance):
    """With a decoder variance the distortion is scipy's Gaussian density, summed over pixels."""
    log_density = norm.logpdf(e.x.double(), e.recon.double(), np.sqrt(variance)).sum(axis=(1, 2, 3))
    rate = kl_divergence(Normal(e.mu, (0.5 * e.logvar).exp()), Normal(0.0, 1.0)).sum(dim=1)
    ours = elbo(e, BETA, torch.tensor(variance))
    close(ours, -log_density + BETA * rate.double().numpy(), rtol=1e-3, atol=0.1)


def test_plain_elbo_is_squared_error_plus_rate(e):
    """Without a variance: the squared error summed over pixels + beta * KL, the seed's loss."""
    error = ((e.x - e.recon).double().numpy() ** 2).sum(axis=(1, 2, 3))
    rate = kl_divergence(Normal(e.mu, (0.5 * e.logvar).exp()), Normal(0.0, 1.0)).sum(dim=1)
    close(elbo(e, 3.0), error + 3 * rate.double().numpy())


def test_the_verdict_takes_the_training_error_as_variance(setting, e, scored):
    """The decoder variance is the mean squared error of the training images."""
    seen = setting.evidence(setting.train)
    variance = float((seen.x - seen.recon).double().square().mean())
    assert setting.verdict.variance == pytest.approx(variance, rel=1e-4)
    density = norm.logpdf(e.x.double(), e.recon.double(), np.sqrt(variance)).sum(axis=(1, 2, 3))
    close(scored["held"]["elbo"], -density + BETA * scored["held"]["kl"], rtol=1e-3, atol=0.5)


@pytest.mark.parametrize("sigma_vae", [False, True])
def test_the_loss_is_the_score(sigma_vae):
    """What training minimises is the mean of the ELBO score, a pixel value; nothing else."""
    torch.manual_seed(1)
    config = CONFIG.replace(sigma_vae=sigma_vae, pretext=False, beta=BETA)
    networks = Networks(config.model).eval()
    x = batch(smooth_images(5, 6))
    with torch.inference_mode():
        loss, seen = losses(networks.vae, x, config.train, None), networks(x)
        error = float((seen.x - seen.recon).double().square().mean())
        variance = torch.tensor(error + 1e-6) if sigma_vae else None
        score = elbo(seen, BETA, variance).mean() / (3 * 32 * 32)
    assert float(loss.total) == pytest.approx(float(score), rel=1e-5)
    assert float(loss.reconstruction) == pytest.approx(error, rel=1e-4)
    assert float(loss.kl) == pytest.approx(float(formulas.kl(seen).mean()), rel=1e-5)


def test_weighted_by_hand(scored):
    """alpha and 1 - alpha times both terms, literally and as shares of the training range."""
    seen, held = scored["train"], scored["held"]
    terms = []
    for name in ("reconstruction", "mahalanobis"):
        low, high = float(seen[name].min()), float(seen[name].max())
        terms.append(np.clip((held[name] - low) / (high - low), 0, 1))
    close(held["weighted"], 0.6 * terms[0] + 0.4 * terms[1], atol=1e-4)
    raw = 0.6 * held["reconstruction"] + 0.4 * held["mahalanobis"]
    close(held["weighted_raw"], raw, rtol=1e-9)
    assert all((s["weighted"] >= 0).all() and (s["weighted"] <= 1).all() for s in scored.values())
    assert (scored["white"]["weighted"] == 1).all()


@pytest.mark.parametrize("alpha, name", [(1.0, "reconstruction"), (0.0, "mahalanobis")])
def test_alpha_weighs_the_reconstruction(setting, scored, alpha, name):
    """At the ends of alpha the weighted score is one of its terms."""
    verdict = learned(setting.networks, setting.train, alpha=alpha).verdict
    value = verdict(setting.numbers(setting.held))["weighted_raw"]
    close(value, scored["held"][name], rtol=1e-9)


def test_neighbours_by_brute_force(setting, e, scored):
    """One minus the mean cosine to the five nearest training images, by scipy, one by one."""
    bank = setting.evidence(setting.train).embedding.double().numpy()
    for i in range(4):
        one = e.embedding[i].double().numpy()
        nearest = sorted(cosine(one, other) for other in bank)[:5]
        assert float(scored["held"]["neighbours"][i]) == pytest.approx(np.mean(nearest), abs=2e-6)


def test_neighbours_pass_over_the_image_itself(setting):
    """A training image is not its own neighbour: the next five count."""
    bank = setting.evidence(setting.train).embedding
    ours = Neighbours.fit(F.normalize(bank)).of_training(F.normalize(bank))
    for i in range(4):
        apart = [cosine(bank[i].double(), bank[j].double()) for j in range(len(bank)) if j != i]
        assert float(ours[i]) == pytest.approx(np.mean(sorted(apart)[:5]), abs=2e-6)


def test_few_references_serve_too():
    """With less than five references the mean is over those there are."""
    gen = torch.Generator().manual_seed(0)
    bank, asked = torch.randn(3, 6, generator=gen), torch.randn(2, 6, generator=gen)
    ours = Neighbours.fit(F.normalize(bank)).distances(F.normalize(asked))
    close(ours, [np.mean([cosine(a, b) for b in bank]) for a in asked])


def test_order_and_turn_are_means_of_their_columns(e, scored):
    """Of two ways to show an image: the first half of the columns is of the orders."""
    pretext_scores = e.pretext.double().numpy()
    assert pretext_scores.shape == (N_HELD, 2)
    close(scored["held"]["order"], pretext_scores[:, 0])
    close(scored["held"]["turn"], pretext_scores[:, 1])


def test_map_scores_are_those_of_the_oddest_places(setting, e, scored):
    """The scores of places are the means over the greatest values of their maps."""
    with torch.inference_mode():
        maps = setting.graph.maps(e)
    for name, share in zip(MAP_SCORES, setting.graph.shares, strict=True):
        assert maps[name].shape == (N_HELD, 32, 32)
        highest = np.sort(maps[name].numpy().reshape(N_HELD, -1))[:, -round(share * 32 * 32) :]
        close(scored["held"][name], highest.mean(axis=1), rtol=1e-5)


def test_a_share_is_one_place_at_least():
    """Of 3 x 3 places half a percent is the greatest, and a half is the mean of the upper four."""
    values = torch.tensor([[[3.0, 1, 2], [9, 5, 4], [7, 8, 6]]])
    assert top_mean(values, 0.005).tolist() == [9]
    assert top_mean(values, 0.5).tolist() == [7.5]


def test_maps_that_find_no_defect_lose_weight(monkeypatch, setting):
    """To the square of 1 / 9 for 8 held images; where they find all, the picture's scores to 1 / 9."""
    weights = []
    for ability in (0.0, 1.0):
        tried = torch.full((4,), USUAL), np.full(4, ability)
        monkeypatch.setattr(fit, "_tried", lambda *_, tried=tried: tried)
        fitted = learned(setting.networks, setting.train)
        weights.append(fitted.verdict.fusion.weights)
        close(fitted.graph.parts.weights, weights[-1][:4])  # the fused map's
    close(weights[0][:4], weights[1][:4] / 81)
    close(weights[1][4:], weights[0][4:] / 9)
    assert (weights[1][:3] > 0).all()


def test_pictures_in_which_no_defect_shows_change_no_weight(monkeypatch, setting):
    """Nothing was told: no score is trusted more or less, and a fiftieth of the places has its say."""
    monkeypatch.setattr(fit, "imagined_defects", lambda *_: iter(()))
    monkeypatch.setattr(Fusion, "reweighted", lambda *_: pytest.fail("nothing was told"))
    untried = learned(setting.networks, setting.train)
    assert untried.graph.shares == [0.02] * 4


def log_energies(image):
    """Band energies of one image (3, S, S) by plain numpy: luma, then chroma, fine to coarse."""
    r, g, b = image.astype(np.float64)
    planes, rows = [(r + g + b) / 3, r - g, (r + g) / 2 - b], []
    for _ in range(3):
        even = len(planes[0]) // 2 * 2
        planes = [p[:even, :even] for p in planes]
        coarse = [(p[::2, ::2] + p[1::2, ::2] + p[::2, 1::2] + p[1::2, 1::2]) / 4 for p in planes]
        details = [p - np.kron(c, np.ones((2, 2))) for p, c in zip(planes, coarse, strict=True)]
        rows.append([np.mean(d**2) for d in details])
        planes = coarse
    rows.append([np.mean(p**2) for p in planes])
    return np.log([f for luma, c1, c2 in rows for f in (luma + 1e-8, c1 + c2 + 1e-8)])


def test_bands_by_numpy(e):
    """Energies by Laplacian band, luma and chroma, of the residual and of the image."""
    x, recon = e.x.numpy(), e.recon.numpy()
    residual = formulas.band_energies(e.x - e.recon)
    close(residual, [log_energies(a - b) for a, b in zip(x, recon, strict=True)])
    close(formulas.band_energies(e.x - 0.5), [log_energies(a - 0.5) for a in x], rtol=1e-3)


@pytest.mark.parametrize("side", [8, 10, 20])
def test_bands_of_any_side(side):
    """Halved three times, a side may become odd: its last row and column are left out."""
    x = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(side)) - 0.5
    close(formulas.band_energies(x), [log_energies(a) for a in x.numpy()], rtol=1e-3)


def test_bands_miss_no_energy():
    """Haar bands are orthogonal: the energies of all bands add up to the image's."""
    gen = torch.Generator().manual_seed(0)
    grey = torch.rand(4, 1, 32, 32, generator=gen).expand(4, 3, 32, 32)
    total = formulas.band_energies(grey)[:, ::2].exp().sum(dim=1)
    close(total, grey.square().mean(dim=(1, 2, 3)))


def test_statistics_stand_under_their_names(setting, e, scored):
    """Each column is what its name says, whatever its place in the graph's numbers."""
    numbers = setting.numbers(setting.held)
    assert numbers.shape == (N_HELD, len(NUMBERS))
    table = dict(zip(NUMBERS, numbers.T, strict=True))
    by_name = dict(zip(STATISTICS, statistics_of(numbers).T, strict=True))
    for name in STATISTICS:
        close(by_name[name], table[name], rtol=0, atol=0)
    for name in GRAPH_SCORES:
        close(scored["held"][name], table[name], rtol=0, atol=0)
    bands = [f"{level}_{c}" for level in LEVELS for c in ("luma", "chroma")]
    x, recon = e.x.numpy(), e.recon.numpy()
    for prefix, images in (("residual", x - recon), ("image", x - 0.5)):
        expected = np.array([log_energies(image) for image in images]).T
        close([table[f"{prefix}_{band}"] for band in bands], expected, rtol=1e-3)
    close(table["log_distance"], np.log(table["mahalanobis"] + 1e-8))
    close(table["rate"], table["kl"], rtol=1e-6)
    close(table["log_error"], np.log(table["reconstruction"] + 1e-8))


def test_latent_shape_by_numpy(e, scored):
    """Rate, log spread, log squared length of the mean, log reconstruction error."""
    mu = e.mu.double().numpy()
    expected = np.stack(
        [
            scored["held"]["kl"],
            np.log(scored["held"]["spread"]),
            np.log((mu**2).sum(axis=1) + 1e-8),
            np.log(scored["held"]["reconstruction"] + 1e-8),
        ],
        axis=1,
    )
    close(formulas.latent_shape(e), expected)


def test_without_the_pretext_network_the_tasks_are_silent():
    """Networks that learned no tasks score them 0, and fuse what is left."""
    torch.manual_seed(0)
    networks = Networks(CONFIG.replace(pretext=False).model).eval()
    graph, verdict = learned(networks, smooth_images(40, 7))
    noise = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    with torch.inference_mode():
        normal = verdict(graph.numbers_of(batch(smooth_images(8, 8))).numpy())
        odd = verdict(graph.numbers_of(batch(noise)).numpy())
    for scores in (normal, odd):
        assert not scores["order"].any()
        assert not scores["turn"].any()
        assert all(np.isfinite(v).all() for v in scores.values())
    assert odd["fused"].min() > normal["fused"].max()


def test_of_many_images_an_even_choice_is_compared_with(monkeypatch):
    """The structure map keeps every third of 24 images where it may keep eight, across batches."""
    monkeypatch.setattr(structure, "BANK", 8)
    torch.manual_seed(0)
    networks, pixels = Networks(CONFIG.model).eval(), smooth_images(24, 3)
    kept = learned(networks, pixels).graph.parts.places.structure
    every_third = StructureMap.fit(local_statistics(batch(pixels[::3])))
    assert len(kept.descriptors) == 8
    torch.testing.assert_close(kept.places, every_third.places)
