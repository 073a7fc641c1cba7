"""Many statistics become one surprise: two-sided, monotone beyond all references, not over-fitted."""

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import multivariate_normal, norm
from sklearn.metrics import roc_auc_score
from sklearn.mixture import GaussianMixture

from msvae.fusion import KNOTS, Fusion, Mixture, QuantileMap, TwoSided, surprisal
from tails import tail_of


def normals(seed, n, k, **more):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ranks(seed, n, k):
    """Each column is 0 … n - 1 in an order of its own."""
    return normals(seed, n, k).argsort(dim=0).double()


def correlated(seed, n):
    """Skewed and dependent statistics of five kinds, as real ones are."""
    z = normals(seed, n, 5)
    parts = [
        z[:, 0],
        z[:, 0] + 0.3 * z[:, 1],
        z[:, 2].exp(),
        z[:, 2] * z[:, 3],
        40 + 1e-3 * z[:, 4],
    ]
    return torch.stack(parts, dim=1)


KINDS = {
    "normal": normals(0, 100, 1)[:, 0],
    "lognormal": normals(1, 333, 1)[:, 0].exp(),
    "heavy": normals(2, 250, 1)[:, 0] / normals(3, 250, 1)[:, 0],
    "counts": normals(4, 400, 1)[:, 0].mul(1.5).round(),
    "mostly zero": normals(5, 200, 1)[:, 0].clamp_min(0.5),
    "high and narrow": 1e6 + 1e-2 * normals(6, 150, 1)[:, 0],
}


@pytest.mark.parametrize("n", [20, 100, KNOTS])
def test_references_go_to_their_normal_quantiles(n):
    """The i-th smallest of n normals becomes the (i + 1/2)/n quantile of scipy's normal."""
    place = ranks(n, n, 2)
    reference = 7 + 1e-3 * place
    z = QuantileMap.fit(reference)(reference)
    np.testing.assert_allclose(z, norm.ppf((place.numpy() + 0.5) / n), atol=5e-3)


def test_many_references_are_followed_closely():
    """With more references than knots, those in between are still close to their quantiles."""
    reference = normals(0, 5000, 1)
    z = QuantileMap.fit(reference)(reference.sort(dim=0).values)[:, 0]
    expected = norm.ppf((np.arange(5000) + 0.5) / 5000)
    np.testing.assert_allclose(z[100:-100], expected[100:-100], atol=0.03)
    np.testing.assert_allclose(z[[0, -1]], expected[[0, -1]], atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_map_never_falls_and_never_ends(kind):
    """Beyond the outermost reference it rises in a straight line, with finite gradients."""
    reference = KINDS[kind]
    low, high, span = reference.min(), reference.max(), reference.max() - reference.min()
    out = span * torch.logspace(-6, 7, 60, dtype=torch.float64)
    inside = torch.linspace(0, 1, 999, dtype=torch.float64) * span + low
    values = torch.cat([low - out.flip(0), inside, high + out]).requires_grad_()
    z = QuantileMap.fit(reference[:, None])(values[:, None])[:, 0]
    (slope,) = torch.autograd.grad(z.sum(), values)
    assert z.isfinite().all()
    assert slope.isfinite().all()
    assert (z.diff() >= -1e-9 * z.abs().max()).all()
    for side in (slice(0, 55), slice(-55, None)):
        assert (z[side].diff() > 0).all(), "gross and mild anomalies tie"
        assert slope[side].min() > 0


@pytest.mark.parametrize("sign", [1, -1])
def test_the_slope_outside_is_that_of_the_outer_tenth(sign):
    """Ten times as far beyond the outermost reference is ten times as many deviations more."""
    reference = normals(3, 101, 1)
    ordered = np.sort(sign * reference[:, 0].numpy())
    level = norm.ppf((np.arange(101) + 0.5) / 101)
    slope = (level[-1] - level[90]) / (ordered[-1] - ordered[90])
    beyond = np.array([0.1, 1.0, 10.0, 100.0])
    values = torch.from_numpy(sign * (ordered[-1] + beyond))[:, None]
    z = sign * QuantileMap.fit(reference)(values)[:, 0].numpy()
    np.testing.assert_allclose(z, level[-1] + slope * beyond, rtol=1e-3, atol=2e-3)


def test_constant_statistics_are_dropped_and_named():
    """What does not vary on normals says nothing, at any height; the others keep their place."""
    x = normals(0, 60, 5)
    x[:, 1], x[:, 3] = 0.0, -1e8
    quantiles = QuantileMap.fit(x)
    assert quantiles.kept.tolist() == [0, 2, 4]
    z = quantiles(x)
    assert z.shape == (60, 3)
    assert quantiles(x + torch.tensor([0.0, 7, 0, 7, 0])).equal(z)
    assert QuantileMap.fit(x[:, [0, 2, 4]])(x[:, [0, 2, 4]]).equal(z)


def scipy_surprise(mixture, z):
    """-log density by scipy, of the mixture's weights, means and covariances."""
    parts = []
    for log_weight, mean, whiten in zip(
        mixture.log_weights, mixture.means, mixture.whiten, strict=True
    ):
        cov = np.linalg.inv((whiten @ whiten.T).numpy())
        parts.append(float(log_weight) + multivariate_normal(mean.numpy(), cov).logpdf(z.numpy()))
    return -logsumexp(parts, axis=0)


@pytest.mark.parametrize("components", [1, 3])
def test_the_density_is_that_of_scipy(components):
    """Differences in surprise are those of scipy's log densities, far out as well."""
    z = torch.cat([normals(0, 150, 4), normals(1, 150, 4) * 0.5 + 3, normals(2, 50, 4) - 4])
    mixture = Mixture.fit(z, components)
    assert mixture.log_weights.exp().sum() == pytest.approx(1)
    points = torch.cat([z[::10], normals(3, 20, 4) * 20])
    got, expected = mixture(points).numpy(), scipy_surprise(mixture, points)
    np.testing.assert_allclose(got - got[0], expected - expected[0], rtol=1e-9, atol=1e-9)


def test_one_component_is_the_gaussian_of_the_images():
    """Mean and covariance of the normals, with a ridge of 0.05, by numpy and scipy."""
    z = normals(0, 200, 3) @ normals(1, 3, 3)
    cov = np.cov(z.numpy().T, bias=True) + 0.05 * np.eye(3)
    expected = -multivariate_normal(z.numpy().mean(axis=0), cov).logpdf(z.numpy())
    got = Mixture.fit(z, 1)(z).numpy()
    np.testing.assert_allclose(got - got[0], expected - expected[0], rtol=1e-6, atol=1e-6)


def test_several_components_are_those_of_scikit_learn():
    """Three clear clouds: the surprise ranks and spaces points as scikit-learn's mixture does."""
    z = torch.cat([normals(k, 200, 2) * 0.4 + 5 * k for k in range(3)])
    theirs = GaussianMixture(3, reg_covar=0.05, random_state=1).fit(z.numpy())
    points = torch.cat([z[::5], normals(9, 40, 2) * 6])
    got, expected = Mixture.fit(z, 3)(points).numpy(), -theirs.score_samples(points.numpy())
    np.testing.assert_allclose(got - got[0], expected - expected[0], rtol=1e-2, atol=1e-2)


def test_as_many_components_as_the_images_bear_out():
    """Two clouds apart need two components at least; few images are never cut up."""
    two = normals(1, 400, 2)
    two[::2] += 8
    assert Mixture.choose(two) >= 2
    assert Mixture.choose(two[:299]) == 1
    assert Mixture.fit(two, Mixture.choose(two))(two).mean() < Mixture.fit(two, 1)(two).mean()


def test_unusually_low_is_as_surprising_as_unusually_high():
    """On symmetric normals, a value and its mirror image surprise the same, and ever more."""
    x = normals(0, 200, 2)
    surprise = TwoSided.fit(torch.cat([x, -x]), components=1)
    out = torch.tensor([0.0, 3, 5, 10, 100], dtype=torch.float64)[:, None] * torch.ones(1, 2)
    high, low = surprise(out), surprise(-out)
    np.testing.assert_allclose(low, high, rtol=1e-2, atol=1e-2)
    assert (high.diff() > 0).all()
    assert (low.diff() > 0).all()
    assert min(high[2], low[2]) > surprise(x).max()


def test_too_good_to_be_true_is_found():
    """An error far below all normal errors, which a one-sided score would call super-normal."""
    errors = normals(0, 300, 1).mul(0.3).exp()
    surprise = TwoSided.fit(errors)
    assert surprise(torch.tensor([[1e-3]]).double()) > surprise(errors).max()
    assert surprise(torch.tensor([[30.0]]).double()) > surprise(errors).max()


def test_what_is_usual_alone_can_be_surprising_together():
    """Two statistics that go together on normals and part company on an anomaly."""
    z = normals(0, 400, 1)
    x = torch.cat([z, z + 0.1 * normals(1, 400, 1)], dim=1)
    apart = torch.tensor([[1.5, -1.5]], dtype=torch.float64)
    assert TwoSided.fit(x)(apart) > TwoSided.fit(x)(x).max()


def test_fitted_images_do_not_sit_apart_from_fresh_ones():
    """Left out of their own fit, training images are no less surprising than new normals."""
    x, fresh = correlated(0, 600), correlated(1, 2000)
    surprise = TwoSided.fit(x, components=4)
    left_out = surprise.left_out(x)
    assert left_out.shape == (600,)
    labels = np.r_[np.zeros(600), np.ones(2000)]
    auroc = roc_auc_score(labels, torch.cat([left_out, surprise(fresh)]).numpy())
    assert abs(auroc - 0.5) < 0.05


def test_a_few_fitted_images_sit_apart_unless_left_out():
    """40 images and five statistics: their own fit flatters them, and leaving out mends that."""
    x, fresh = correlated(2, 40), correlated(3, 2000)
    surprise = TwoSided.fit(x, components=1)
    labels, new = np.r_[np.zeros(40), np.ones(2000)], surprise(fresh)
    flattered = roc_auc_score(labels, torch.cat([surprise(x), new]).numpy())
    mended = roc_auc_score(labels, torch.cat([surprise.left_out(x), new]).numpy())
    assert flattered > 0.58
    assert abs(mended - 0.5) < flattered - 0.5


def test_no_image_has_a_say_in_its_own_surprise():
    """Moved far away, an image becomes surprising, and the others of its fold stay as they were."""
    x = correlated(0, 100)
    moved = x.clone()
    moved[17] += 1000
    surprise = TwoSided.fit(x, components=1)
    before, after = surprise.left_out(x), surprise.left_out(moved)
    fold = [i for i in range(100) if i % 5 == 17 % 5 and i != 17]
    assert before[fold].equal(after[fold])
    assert after[17] > before.max()


def test_surprisal_is_that_of_scipy_and_then_a_line():
    """Nats; what no normal image reached grows with its distance, and its slope never vanishes."""
    z = torch.linspace(-12, 60, 200, dtype=torch.float64, requires_grad=True)
    got = surprisal(z)
    np.testing.assert_allclose(got.detach(), tail_of(z.detach()), rtol=1e-9)
    (slope,) = torch.autograd.grad(got.sum(), z)
    assert slope.isfinite().all()
    assert (slope >= 0).all()
    assert (slope[z > 1.7] > 2).all()


WEIGHTS = torch.tensor([1.0, 0.5, 1.0, 0.0], dtype=torch.float64)


def nats(x):
    """The surprisal of the i-th of 100, whose quantile is that of (i + 1/2) / 100."""
    return tail_of(norm.ppf((x.numpy() + 0.5) / 100))


def test_the_surprisals_are_those_of_the_ranks():
    """Each score brings its weight times minus the log of the share of normals that reach it."""
    x = ranks(0, 100, 4)
    told = Fusion.fit(x, WEIGHTS).surprisals(x)
    np.testing.assert_allclose(told, WEIGHTS.numpy() * nats(x), atol=1e-2)


def test_the_fused_score_is_the_length_of_the_surprisals():
    """The root of the squares of weights times surprisals, added by hand."""
    x = ranks(0, 100, 4)
    fused = Fusion.fit(x, WEIGHTS)(x)
    by_hand = np.sqrt(((nats(x) * WEIGHTS.numpy()) ** 2).sum(axis=1))
    np.testing.assert_allclose(fused, by_hand, atol=2e-2)


@pytest.mark.parametrize("images, share", [(0, 0), (1, 0.5), (4, 0.8), (10**9, 1)])
def test_places_are_trusted_as_far_as_they_found_what_they_look_for(images, share):
    """What found nothing keeps the square of 1 / (m + 1) of its weight.

    The others lose as much as the best of the places found.
    """
    fusion = Fusion.fit(ranks(0, 100, 4), WEIGHTS)
    weights = fusion.trusting(torch.tensor([0.0, 0.75]), images).weights
    rest = (1 - 0.75 * share) * WEIGHTS[2:]
    wanted = [(1 - share) ** 2, 0.5 * (1 - 0.25 * share) ** 2, *rest.tolist()]
    assert weights.tolist() == pytest.approx(wanted, abs=1e-6)


def test_a_constant_score_has_no_part():
    """It takes no place from the others: their weights stay theirs."""
    x = normals(0, 80, 4)
    x[:, 1] = 5.0
    told = Fusion.fit(x, WEIGHTS).surprisals(x + torch.tensor([0.0, 9, 0, 0]))
    assert not told[:, 1].any()
    others = [0, 2, 3]
    alone = Fusion.fit(x[:, others], WEIGHTS[others]).surprisals(x[:, others])
    assert told[:, others].equal(alone)


def test_images_that_were_not_trained_on_are_ordinary_after_the_correction():
    """Over-fitted scores: new normals lie two deviations higher and closer; corrected they do not."""
    fusion = Fusion.fit(normals(0, 500, 4), WEIGHTS)
    new = 2 + 0.5 * normals(1, 2000, 4)
    before = fusion.surprisals(new).median(dim=0).values / WEIGHTS
    mended = fusion.corrected(2 + 0.5 * normals(2, 200, 4))
    after = mended.surprisals(new).median(dim=0).values / mended.weights
    assert (before[:3] > 3).all()
    np.testing.assert_allclose(after[:3], np.log(2), atol=0.2)


def test_a_score_weighs_less_the_less_training_tells_of_it():
    """Weights fall with the gap g between trained and new normals as 1 / sqrt(1 + g²)."""
    fusion = Fusion.fit(normals(0, 500, 4), WEIGHTS)
    moved = torch.tensor([0.0, 3.0, -3.0, 3.0])
    corrected = fusion.corrected(normals(1, 100_000, 4) + moved)
    wanted = WEIGHTS / torch.tensor([1.0, 10**0.5, 1.0, 10**0.5])
    np.testing.assert_allclose(corrected.weights, wanted, rtol=0.05)


def test_a_far_gap_widens_what_is_ordinary():
    """From two images the scatter is not told: a score whose normals moved is taken to be wide."""
    fusion = Fusion.fit(normals(0, 500, 4), WEIGHTS)
    pair = torch.tensor([[2.0] * 4, [4.0] * 4]).double()
    near = fusion.corrected(pair - 3).width
    assert (fusion.corrected(pair).width > 1.15 * near).all()


def test_few_held_out_images_correct_little():
    """One image moves nothing by more than a sixth of its own distance."""
    corrected = Fusion.fit(normals(0, 500, 4), WEIGHTS).corrected(torch.full((1, 4), 3.0).double())
    assert (corrected.gap.abs() < 3.2 / 6 + 0.1).all()


def test_a_higher_score_is_never_less_surprising():
    """Every score goes one way: more of it is more, also far beyond all that was seen."""
    fusion = Fusion.fit(normals(0, 100, 4), WEIGHTS)
    line = torch.linspace(-5, 50, 300, dtype=torch.float64)[:, None].expand(300, 4)
    assert (fusion.surprisals(line).diff(dim=0) >= 0).all()
    assert (fusion(line)[100:].diff() > 0).all()


def test_close_references_keep_their_quantiles():
    """A heavy tail must not blur the references near the middle: log-normal ones go to theirs."""
    x = torch.randn(600, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    mapped = QuantileMap.fit((2 * x).exp())((2 * x).exp())[:, 0]
    ranks = x[:, 0].argsort().argsort()
    wanted = torch.from_numpy(norm.ppf((ranks.numpy() + 0.5) / 600))
    assert (mapped - wanted).abs().median() < 0.01
    assert (mapped - wanted).abs()[wanted.abs() < 2].max() < 0.1
