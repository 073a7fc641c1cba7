"""Many statistics become one surprise: two-sided, monotone beyond all references, not over-fitted."""

import numpy as np
import pytest
from scipy.special import logsumexp
from scipy.stats import multivariate_normal, norm
from sklearn.metrics import roc_auc_score
from sklearn.mixture import GaussianMixture

from msvae.scores.density import KNOTS, Mixture, QuantileMap, TwoSided
from msvae.scores.fusion import Fusion, surprisal
from tails import tail_of


def normals(seed, n, k):
    return np.random.default_rng(seed).normal(size=(n, k))


def ranks(seed, n, k):
    """Each column is 0 … n - 1 in an order of its own."""
    return normals(seed, n, k).argsort(axis=0).astype(np.float64)


def correlated(seed, n):
    """Skewed and dependent statistics of five kinds, as real ones are."""
    z = normals(seed, n, 5)
    parts = [
        z[:, 0],
        z[:, 0] + 0.3 * z[:, 1],
        np.exp(z[:, 2]),
        z[:, 2] * z[:, 3],
        40 + 1e-3 * z[:, 4],
    ]
    return np.stack(parts, axis=1)


KINDS = {
    "normal": normals(0, 100, 1)[:, 0],
    "lognormal": np.exp(normals(1, 333, 1)[:, 0]),
    "heavy": normals(2, 250, 1)[:, 0] / normals(3, 250, 1)[:, 0],
    "counts": np.round(1.5 * normals(4, 400, 1)[:, 0]),
    "mostly zero": normals(5, 200, 1)[:, 0].clip(0.5),
    "high and narrow": 1e6 + 1e-2 * normals(6, 150, 1)[:, 0],
}


@pytest.mark.parametrize("n", [20, 100, KNOTS])
def test_references_go_to_their_normal_quantiles(n):
    """The i-th smallest of n normals becomes the (i + 1/2)/n quantile of scipy's normal."""
    place = ranks(n, n, 2)
    reference = 7 + 1e-3 * place
    z = QuantileMap.fit(reference)(reference)
    np.testing.assert_allclose(z, norm.ppf((place + 0.5) / n), atol=5e-3)


def test_many_references_are_followed_closely():
    """With more references than knots, those in between are still close to their quantiles."""
    reference = normals(0, 5000, 1)
    z = QuantileMap.fit(reference)(np.sort(reference, axis=0))[:, 0]
    expected = norm.ppf((np.arange(5000) + 0.5) / 5000)
    np.testing.assert_allclose(z[100:-100], expected[100:-100], atol=0.03)
    np.testing.assert_allclose(z[[0, -1]], expected[[0, -1]], atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_map_never_falls_and_never_ends(kind):
    """Beyond the outermost reference it goes on rising; nowhere is it infinite."""
    reference = KINDS[kind]
    low, high, span = reference.min(), reference.max(), np.ptp(reference)
    out = span * np.logspace(-6, 7, 60)
    inside = np.linspace(0, 1, 999) * span + low
    values = np.concatenate([low - out[::-1], inside, high + out])
    z = QuantileMap.fit(reference[:, None])(values[:, None])[:, 0]
    assert np.isfinite(z).all()
    assert (np.diff(z) >= -1e-9 * np.abs(z).max()).all()
    for side in (slice(0, 55), slice(-55, None)):
        assert (np.diff(z[side]) > 0).all(), "gross and mild anomalies tie"


@pytest.mark.parametrize("sign", [1, -1])
def test_the_slope_outside_is_that_of_the_outer_tenth(sign):
    """Ten times as far beyond the outermost reference is ten times as many deviations more."""
    reference = normals(3, 101, 1)
    ordered = np.sort(sign * reference[:, 0])
    level = norm.ppf((np.arange(101) + 0.5) / 101)
    slope = (level[-1] - level[90]) / (ordered[-1] - ordered[90])
    beyond = np.array([0.1, 1.0, 10.0, 100.0])
    values = sign * (ordered[-1] + beyond)[:, None]
    z = sign * QuantileMap.fit(reference)(values)[:, 0]
    np.testing.assert_allclose(z, level[-1] + slope * beyond, rtol=1e-3, atol=2e-3)


def test_constant_statistics_are_dropped_and_named():
    """What does not vary on normals says nothing, at any height; the others keep their place."""
    x = normals(0, 60, 5)
    x[:, 1], x[:, 3] = 0.0, -1e8
    quantiles = QuantileMap.fit(x)
    assert quantiles.columns.tolist() == [0, 2, 4]
    z = quantiles(x)
    assert z.shape == (60, 3)
    np.testing.assert_array_equal(quantiles(x + np.array([0.0, 7, 0, 7, 0])), z)
    np.testing.assert_array_equal(QuantileMap.fit(x[:, [0, 2, 4]])(x[:, [0, 2, 4]]), z)


def scipy_surprise(mixture, z):
    """-log density by scipy, of the mixture's weights, means and covariances."""
    parts = []
    for log_weight, mean, whiten in zip(
        mixture.log_weights, mixture.means, mixture.whiten, strict=True
    ):
        cov = np.linalg.inv(whiten @ whiten.T)
        parts.append(float(log_weight) + multivariate_normal(mean, cov).logpdf(z))
    return -logsumexp(parts, axis=0)


@pytest.mark.parametrize("components", [1, 3])
def test_the_density_is_that_of_scipy(components):
    """Differences in surprise are those of scipy's log densities, far out as well."""
    z = np.concatenate([normals(0, 150, 4), normals(1, 150, 4) * 0.5 + 3, normals(2, 50, 4) - 4])
    mixture = Mixture.fit(z, components)
    assert np.exp(mixture.log_weights).sum() == pytest.approx(1)
    points = np.concatenate([z[::10], normals(3, 20, 4) * 20])
    got, expected = mixture(points), scipy_surprise(mixture, points)
    np.testing.assert_allclose(got - got[0], expected - expected[0], rtol=1e-9, atol=1e-9)


def test_one_component_is_the_gaussian_of_the_images():
    """Mean and covariance of the normals, with a ridge of 0.05, by numpy and scipy."""
    z = normals(0, 200, 3) @ normals(1, 3, 3)
    cov = np.cov(z.T, bias=True) + 0.05 * np.eye(3)
    expected = -multivariate_normal(z.mean(axis=0), cov).logpdf(z)
    got = Mixture.fit(z, 1)(z)
    np.testing.assert_allclose(got - got[0], expected - expected[0], rtol=1e-6, atol=1e-6)


def test_several_components_are_those_of_scikit_learn():
    """Three clear clouds: the surprise ranks and spaces points as scikit-learn's mixture does."""
    z = np.concatenate([normals(k, 200, 2) * 0.4 + 5 * k for k in range(3)])
    theirs = GaussianMixture(3, reg_covar=0.05, random_state=1).fit(z)
    points = np.concatenate([z[::5], normals(9, 40, 2) * 6])
    got, expected = Mixture.fit(z, 3)(points), -theirs.score_samples(points)
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
    surprise = TwoSided.fit(np.concatenate([x, -x]), components=1)
    out = np.array([0.0, 3, 5, 10, 100])[:, None] * np.ones((1, 2))
    high, low = surprise(out), surprise(-out)
    np.testing.assert_allclose(low, high, rtol=1e-2, atol=1e-2)
    assert (np.diff(high) > 0).all()
    assert (np.diff(low) > 0).all()
    assert min(high[2], low[2]) > surprise(x).max()


def test_too_good_to_be_true_is_found():
    """An error far below all normal errors, which a one-sided score would call super-normal."""
    errors = np.exp(0.3 * normals(0, 300, 1))
    surprise = TwoSided.fit(errors)
    assert surprise(np.array([[1e-3]])) > surprise(errors).max()
    assert surprise(np.array([[30.0]])) > surprise(errors).max()


def test_what_is_usual_alone_can_be_surprising_together():
    """Two statistics that go together on normals and part company on an anomaly."""
    z = normals(0, 400, 1)
    x = np.concatenate([z, z + 0.1 * normals(1, 400, 1)], axis=1)
    apart = np.array([[1.5, -1.5]])
    assert TwoSided.fit(x)(apart) > TwoSided.fit(x)(x).max()


def test_fitted_images_do_not_sit_apart_from_fresh_ones():
    """Left out of their own fit, training images are no less surprising than new normals."""
    x, fresh = correlated(0, 600), correlated(1, 2000)
    surprise = TwoSided.fit(x, components=4)
    left_out = surprise.leave_one_out(x)
    assert left_out.shape == (600,)
    labels = np.r_[np.zeros(600), np.ones(2000)]
    auroc = roc_auc_score(labels, np.concatenate([left_out, surprise(fresh)]))
    assert abs(auroc - 0.5) < 0.05


def test_a_few_fitted_images_sit_apart_unless_left_out():
    """40 images and five statistics: their own fit flatters them, and leaving out mends that."""
    x, fresh = correlated(2, 40), correlated(3, 2000)
    surprise = TwoSided.fit(x, components=1)
    labels, new = np.r_[np.zeros(40), np.ones(2000)], surprise(fresh)
    flattered = roc_auc_score(labels, np.concatenate([surprise(x), new]))
    mended = roc_auc_score(labels, np.concatenate([surprise.leave_one_out(x), new]))
    assert flattered > 0.58
    assert abs(mended - 0.5) < flattered - 0.5


def test_no_image_has_a_say_in_its_own_surprise():
    """Moved far away, an image becomes surprising, and the others of its fold stay as they were."""
    x = correlated(0, 100)
    moved = x.copy()
    moved[17] += 1000
    surprise = TwoSided.fit(x, components=1)
    before, after = surprise.leave_one_out(x), surprise.leave_one_out(moved)
    fold = [i for i in range(100) if i % 5 == 17 % 5 and i != 17]
    np.testing.assert_array_equal(before[fold], after[fold])
    assert after[17] > before.max()


def test_surprisal_is_that_of_scipy_and_then_a_line():
    """Nats; what no normal image reached grows with its distance, more than two nats a deviation."""
    z = np.linspace(-12, 60, 200)
    got = surprisal(z)
    np.testing.assert_allclose(got, tail_of(z), rtol=1e-9, atol=1e-15)
    slope = np.diff(got) / np.diff(z)
    assert np.isfinite(got).all()
    assert (slope >= 0).all()
    assert (slope[z[:-1] > 1.7] > 2).all()


WEIGHTS = np.array([1.0, 0.5, 1.0, 0.0])


def nats(x):
    """The surprisal of the i-th of 100, whose quantile is that of (i + 1/2) / 100."""
    return tail_of(norm.ppf((x + 0.5) / 100))


def test_the_surprisals_are_those_of_the_ranks():
    """Each score brings its weight times minus the log of the share of normals that reach it."""
    x = ranks(0, 100, 4)
    got = Fusion.fit(x, WEIGHTS).surprisals(x)
    np.testing.assert_allclose(got, WEIGHTS * nats(x), atol=1e-2)


def test_the_fused_score_is_the_length_of_the_surprisals():
    """The root of the squares of weights times surprisals, added by hand."""
    x = ranks(0, 100, 4)
    fused = Fusion.fit(x, WEIGHTS)(x)
    by_hand = np.sqrt(((nats(x) * WEIGHTS) ** 2).sum(axis=1))
    np.testing.assert_allclose(fused, by_hand, atol=2e-2)


@pytest.mark.parametrize("images, share", [(0, 0), (1, 0.5), (4, 0.8), (10**9, 1)])
def test_places_are_trusted_as_far_as_they_found_what_they_look_for(images, share):
    """What found nothing keeps the square of 1 / (m + 1) of its weight.

    The others lose as much as the best of the places found.
    """
    fusion = Fusion.fit(ranks(0, 100, 4), WEIGHTS)
    weights = fusion.reweighted(np.array([0.0, 0.75]), np.array([0, 1]), images).weights
    rest = (1 - 0.75 * share) * WEIGHTS[2:]
    wanted = [(1 - share) ** 2, 0.5 * (1 - 0.25 * share) ** 2, *rest.tolist()]
    assert weights.tolist() == pytest.approx(wanted, abs=1e-6)


def test_a_constant_score_has_no_part():
    """It takes no place from the others: their weights stay theirs."""
    x = normals(0, 80, 4)
    x[:, 1] = 5.0
    got = Fusion.fit(x, WEIGHTS).surprisals(x + np.array([0.0, 9, 0, 0]))
    assert not got[:, 1].any()
    others = [0, 2, 3]
    alone = Fusion.fit(x[:, others], WEIGHTS[others]).surprisals(x[:, others])
    np.testing.assert_array_equal(got[:, others], alone)


def test_images_that_were_not_trained_on_are_ordinary_after_the_correction():
    """Over-fitted scores: new normals lie two deviations higher and closer; corrected they do not."""
    fusion = Fusion.fit(normals(0, 500, 4), WEIGHTS)
    new = 2 + 0.5 * normals(1, 2000, 4)
    before = np.median(fusion.surprisals(new)[:, :3], axis=0) / WEIGHTS[:3]
    mended = fusion.recentred(2 + 0.5 * normals(2, 200, 4))
    after = np.median(mended.surprisals(new)[:, :3], axis=0) / mended.weights[:3]
    assert (before > 3).all()
    np.testing.assert_allclose(after, np.log(2), atol=0.2)


def test_a_score_weighs_less_the_less_training_tells_of_it():
    """Weights fall with the gap g between trained and new normals as 1 / sqrt(1 + g²)."""
    fusion = Fusion.fit(normals(0, 20_000, 4), WEIGHTS)
    moved = np.array([0.0, 3.0, -3.0, 3.0])
    recentred = fusion.recentred(normals(1, 100_000, 4) + moved)
    wanted = WEIGHTS / np.array([1.0, 10**0.5, 1.0, 10**0.5])
    np.testing.assert_allclose(recentred.weights, wanted, rtol=0.05)


def test_a_far_gap_widens_what_is_ordinary():
    """From two images the scatter is not told: a score whose normals moved is taken to be wide."""
    fusion = Fusion.fit(normals(0, 500, 4), WEIGHTS)
    pair = np.array([[2.0] * 4, [4.0] * 4])
    near = fusion.recentred(pair - 3).width
    assert (fusion.recentred(pair).width > 1.15 * near).all()


def test_few_held_out_images_correct_little():
    """One image moves nothing by more than a sixth of its own distance."""
    recentred = Fusion.fit(normals(0, 500, 4), WEIGHTS).recentred(np.full((1, 4), 3.0))
    assert (np.abs(recentred.gap) < 3.2 / 6 + 0.1).all()


def test_a_higher_score_is_never_less_surprising():
    """Every score goes one way: more of it is more, also far beyond all that was seen."""
    fusion = Fusion.fit(normals(0, 100, 4), WEIGHTS)
    line = np.linspace(-5, 50, 300)[:, None].repeat(4, axis=1)
    assert (np.diff(fusion.surprisals(line), axis=0) >= 0).all()
    assert (np.diff(fusion(line)[100:]) > 0).all()


def test_close_references_keep_their_quantiles():
    """A heavy tail must not blur the references near the middle: log-normal ones go to theirs."""
    x = normals(3, 600, 1)
    mapped = QuantileMap.fit(np.exp(2 * x))(np.exp(2 * x))[:, 0]
    places = x[:, 0].argsort().argsort()
    wanted = norm.ppf((places + 0.5) / 600)
    apart = np.abs(mapped - wanted)
    assert np.median(apart) < 0.01
    assert apart[np.abs(wanted) < 2].max() < 0.1
