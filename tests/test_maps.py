"""Maps and their moments, against numpy, scipy, scikit-image and honest refits."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter, map_coordinates
from scipy.stats import multivariate_normal, norm
from skimage.transform import resize
from torch.nn import functional as F

from msvae.core.evidence import Evidence
from msvae.ops.filters import blur_matrix, gaussian_blur, resize_bilinear
from msvae.scores import maps
from msvae.scores.maps import SHRINKAGES, Rarity, ResidualMap, SpatialMap, at_size
from msvae.scores.moments import Moments, leave_one_out
from msvae.transforms.squares import centroids, with_squares


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def evidence(n=6, side=16, channels=(5, 4, 3), seed=0):
    """Random evidence with encoder maps that halve from stage to stage."""
    sides = [max(side >> i, 1) for i in range(len(channels))]
    features = tuple(
        randn(n, c, s, s, seed=seed + 10 + i)
        for i, (c, s) in enumerate(zip(channels, sides, strict=True))
    )
    x, recon = rand(n, 3, side, side, seed=seed), rand(n, 3, side, side, seed=seed + 1)
    blank = torch.zeros(n, 0)
    return Evidence(x, recon, blank, blank, features, blank, blank[:, :, None], blank)


def close(ours, theirs, rtol=1e-4, atol=1e-5):
    np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=rtol, atol=atol)


def moments_of(vectors, cuts=(), origin=None):
    """Moments of vectors (N, L, D) that come in batches."""
    out = Moments(vectors.mean(dim=0) if origin is None else origin)
    for part in torch.tensor_split(vectors, list(cuts)):
        out.add(part)
    return out


def fitted(vectors, mix=None):
    """A spatial map of vectors (N, L, D), every second image in each half."""
    mix = torch.eye(vectors.shape[2]) if mix is None else mix
    origin = vectors.mean(dim=0)
    halves = moments_of(vectors[::2], origin=origin), moments_of(vectors[1::2], origin=origin)
    return SpatialMap.fit(halves, mix)


# Plain maps.


def test_reconstruction_map_by_numpy():
    """The mean over the colours of the squared difference, (B, H, W)."""
    e = evidence()
    expected = ((e.x.double().numpy() - e.recon.double().numpy()) ** 2).mean(axis=1)
    close(maps.reconstruction_map(e), expected)


def test_signed_difference_shows_brighter_as_positive():
    """Brighter than expected is above 0, darker below."""
    e = evidence()
    e = e._replace(x=e.recon + torch.tensor([0.1, 0.2, 0.3])[:, None, None])
    close(maps.signed_difference(e), np.full((6, 16, 16), 0.2))
    close(maps.signed_difference(e._replace(x=e.recon - 0.3)), np.full((6, 16, 16), -0.3))


@pytest.mark.parametrize("sigma", [0.8, 1.0, 2.3, 4.0])
@pytest.mark.parametrize("shape", [(32, 32), (24, 40)])
def test_gaussian_blur_is_scipys(sigma, shape):
    """The same blur as scipy's, cut at three sigma, edges mirrored; each map by itself."""
    given_ = rand(3, *shape)
    expected = [gaussian_filter(m, sigma, mode="mirror", truncate=3) for m in given_.numpy()]
    close(gaussian_blur(given_, sigma), expected)


@pytest.mark.parametrize("side", [2, 3, 8])
def test_gaussian_blur_serves_tiny_maps(side):
    """A blur wider than the map is cut to fit, and an even map stays as it is."""
    close(gaussian_blur(torch.full((2, side, side), 0.7), 5.0), np.full((2, side, side), 0.7))
    assert gaussian_blur(rand(2, side, side), 5.0).shape == (2, side, side)


def test_resize_is_bilinear():
    """As scikit-image resizes: pixel centres aligned, not corners."""
    given_ = rand(2, 4, 4)
    expected = [
        resize(m, (16, 16), order=1, mode="edge", anti_aliasing=False) for m in given_.numpy()
    ]
    close(resize_bilinear(given_, 16), expected)


# Moments.


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 30), max_size=4), st.integers(0, 99))
def test_moments_do_not_depend_on_the_batches(cuts, seed):
    """However the images are cut into batches: numpy's mean and covariance at every place."""
    vectors = randn(30, 4, 3, seed=seed) * torch.tensor([0.1, 1.0, 5.0]) + 2
    moments = moments_of(vectors, sorted(cuts), origin=vectors[0])
    v = vectors.double().numpy()
    assert moments.n == 30
    close(moments.mean(), v.mean(axis=0))
    close(moments.covariance(), [np.cov(v[:, i].T, ddof=0) for i in range(4)], atol=1e-4)


def test_moments_add_up():
    """Two halves together are the moments of all."""
    v = randn(20, 3, 2)
    whole = moments_of(v[:7], origin=v[0]) + moments_of(v[7:], origin=v[0])
    assert whole.n == 20
    close(whole.mean(), v.mean(dim=0))
    close(whole.covariance(), [np.cov(v[:, i].T, ddof=0) for i in range(3)])


def test_moments_keep_small_variances_far_from_zero():
    """Values about 1000 with a deviation of 0.1 keep their variance."""
    v = 1000 + 0.1 * randn(200, 2, 2)
    exact = v.double().numpy()
    expected = [np.cov(exact[:, i].T, ddof=0) for i in range(2)]
    close(moments_of(v, (50, 90)).covariance(), expected, rtol=1e-2, atol=1e-5)


# Left out.


@pytest.mark.parametrize("n, dim", [(60, 2), (120, 6), (40, 8)])
def test_left_out_is_near_a_refit_without_the_image(n, dim):
    """The correction gives what a fit to all the other images would, to a few per cent."""
    points = randn(n, dim).double().numpy() @ randn(dim, dim, seed=1).double().numpy() + 5

    def distance(at, fit_to):
        gap = at - fit_to.mean(axis=0)
        return gap @ np.linalg.solve(np.cov(fit_to.T, ddof=0), gap)

    plain = np.array([distance(p, points) for p in points])
    refitted = [distance(p, np.delete(points, i, axis=0)) for i, p in enumerate(points)]
    ours = leave_one_out(torch.from_numpy(plain), n).numpy()
    close(ours, refitted, rtol=0.05)
    assert (ours > plain).all()


def test_left_out_stays_finite_and_in_order():
    """An image that is nearly all of its own direction does not divide by zero."""
    d = torch.linspace(0, 40, 81)
    corrected = leave_one_out(d, 30)
    assert torch.isfinite(corrected).all()
    assert (corrected.diff() > 0).all()


# The residual map.


def test_residual_map_by_numpy():
    """The blurred root error in deviations from the training images', half of them pooled."""
    seen, new = evidence(n=20, side=16), evidence(n=3, side=16, seed=50)

    def raw(e):
        error = ((e.x - e.recon).double().numpy() ** 2).mean(axis=1)
        blurred = [gaussian_filter(m, 0.8, mode="mirror", truncate=3) for m in error]
        return np.sqrt(np.array(blurred) + 1e-8)

    ours = ResidualMap.fit(moments_of(ResidualMap.raw(seen).flatten(1)[:, :, None], (5, 11)))
    mean, variance = raw(seen).mean(axis=0), raw(seen).var(axis=0)
    deviation = np.sqrt(0.5 * variance + 0.5 * variance.mean())
    close(ours(new), (raw(new) - mean) / deviation, rtol=1e-3, atol=1e-3)


def test_residual_map_of_its_own_images_is_centred():
    """On the images it was fitted to the map is 0 on average at every pixel."""
    e = evidence(n=15)
    ours = ResidualMap.fit(moments_of(ResidualMap.raw(e).flatten(1)[:, :, None]))
    close(ours(e).mean(dim=0), np.zeros((16, 16)), atol=1e-4)


# The spatial map.


def covariances(vectors):
    v = vectors.double().numpy()
    return np.array([np.cov(v[:, i].T, ddof=0) for i in range(v.shape[1])])


def shrunk(covariance, shrinkage):
    pooled = covariance.mean(axis=0)
    ridge = 1e-3 * np.trace(pooled) / len(pooled) * np.eye(len(pooled))
    return (1 - shrinkage) * covariance + shrinkage * pooled + ridge


def test_spatial_map_by_numpy():
    """Root mean squared Mahalanobis distance at each place, by numpy's inverse."""
    seen, new = evidence(n=40), evidence(n=4, seed=70)
    mix = SpatialMap.projection(12)
    vectors = SpatialMap.local(seen, mix)
    ours = fitted(vectors, mix)
    precision = np.linalg.inv(shrunk(covariances(vectors), ours.shrinkage))
    gap = (SpatialMap.local(new, mix) - vectors.mean(dim=0)).double().numpy()
    squared = np.einsum("bld,lde,ble->bl", gap, precision, gap)
    assert ours(new).shape == (4, 4, 4)
    close(ours(new).flatten(1), np.sqrt(squared / 12), rtol=1e-3)


def test_spatial_map_is_one_on_average():
    """On normal images the root mean squared distance is about one deviation of a feature."""
    seen, new = evidence(n=400), evidence(n=100, seed=70)
    mix = SpatialMap.projection(12)
    ours = fitted(SpatialMap.local(seen, mix), mix)
    assert float(ours(new).square().mean()) == pytest.approx(1, rel=0.1)


def test_spatial_map_finds_the_place():
    """A feature that is off at one place shows there, and nowhere else."""
    seen, new = evidence(n=60), evidence(n=1, seed=70)
    mix = SpatialMap.projection(12)
    ours = fitted(SpatialMap.local(seen, mix), mix)
    odd = new.features[0].clone()
    odd[:, :, 4:8, 8:12] += 9  # the place (1, 2) of 4 x 4
    before, after = ours(new)[0], ours(new._replace(features=(odd, *new.features[1:])))[0]
    change = (after - before).abs()
    assert divmod(int(change.argmax()), 4) == (1, 2)
    assert int((change > 1e-4).sum()) == 1


def test_local_features_are_stacked_at_a_quarter_of_the_side():
    """The mean over a place's pixels of the maps, linear between the pixels where they look."""
    e = evidence(n=2, side=32, channels=(2, 3, 4, 5))  # maps of 32, 16, 8 and 4 px
    stacked = SpatialMap.local(e, torch.eye(9)).mT.unflatten(2, (8, 8)).numpy()
    assert stacked.shape == (2, 9, 8, 8)  # the fourth is left out
    close(stacked, np.concatenate([over_places(f.numpy(), 32) for f in e.features[:3]], axis=1))
    few = evidence(n=1, side=32, channels=(2,))
    coarse = few._replace(features=(rand(1, 2, 4, 4),))
    wanted = over_places(coarse.features[0].numpy(), 32)
    close(SpatialMap.local(coarse, torch.eye(2)).mT.unflatten(2, (8, 8)), wanted)


def over_places(features, side):
    """Maps (B, C, n, n) that look at every (side / n)th pixel, at a quarter of the side, by scipy."""
    n = features.shape[-1]
    at = np.minimum(np.arange(side) * n / side, n - 1)
    grid = np.stack(np.meshgrid(at, at, indexing="ij"))
    pixels = [[map_coordinates(f, grid, order=1) for f in image] for image in features]
    return np.reshape(pixels, (*features.shape[:2], side // 4, 4, side // 4, 4)).mean(axis=(3, 5))


@pytest.mark.parametrize("channels, kept", [(3, 3), (64, 64), (100, 64)])
def test_projection_is_orthonormal_and_always_the_same(channels, kept):
    """At most 64 directions; distances in them are those of the features."""
    mix = SpatialMap.projection(channels)
    assert mix.shape == (channels, kept)
    close(mix.T @ mix, np.eye(kept))
    assert torch.equal(mix, SpatialMap.projection(channels))
    assert not torch.equal(mix, SpatialMap.projection(channels, seed=1))


@pytest.mark.parametrize("loose", [True, False])
def test_shrinkage_is_the_likeliest_for_left_out_images(loose):
    """As scipy's densities of each half under the other's fit choose it, by brute force."""
    vectors = randn(60, 6, 3)
    if not loose:  # each place varies in its own way
        vectors = vectors * torch.tensor([0.1, 1.0, 10.0]).repeat(6).view(6, 3).roll(1, 1)
        vectors = vectors * torch.linspace(0.05, 20, 6)[:, None]
    halves = vectors[::2], vectors[1::2]

    def likelihood(shrinkage):
        total = 0.0
        for fit_to, held in (halves, halves[::-1]):
            means = fit_to.mean(dim=0).double().numpy()
            for i, cov in enumerate(shrunk(covariances(fit_to), shrinkage)):
                total += multivariate_normal(means[i], cov).logpdf(held[:, i].double()).sum()
        return total

    chosen = fitted(vectors).shrinkage
    assert chosen == max(SHRINKAGES, key=likelihood)
    assert (chosen > 0.5) == loose


def test_spatial_left_out_is_near_a_refit():
    """What the fitted images are told is near what a fit without each tells of it."""
    n, grid = 50, randn(50, 3, 2, 2) * torch.tensor([0.5, 1.0, 2.0]).view(3, 1, 1)
    blank = [torch.zeros(0)] * 3
    seen = Evidence(torch.zeros(n, 3, 8, 8), *blank, (grid,), *blank)
    vectors = SpatialMap.local(seen, torch.eye(3))
    whole = fitted(vectors)
    plain, ours = whole(seen), whole(seen, leave_out=True)
    for i in range(0, n, 7):
        rest = torch.cat([vectors[:i], vectors[i + 1 :]])
        covariance = shrunk(covariances(rest), whole.shrinkage)
        gap = (vectors[i] - rest.mean(dim=0)).double().numpy()
        squared = np.einsum("ld,lde,le->l", gap, np.linalg.inv(covariance), gap)
        close(ours[i].flatten(), np.sqrt(squared / 3), rtol=0.05)
        assert (ours[i] > plain[i]).all()


def test_spatial_map_at_the_size_of_the_image():
    """Bilinear to S x S, then a Gaussian of a 32nd of the side."""
    coarse = rand(2, 8, 8)
    expected = [
        gaussian_filter(
            resize(m, (64, 64), order=1, mode="edge", anti_aliasing=False),
            2,
            mode="mirror",
            truncate=3,
        )
        for m in coarse.numpy()
    ]
    close(at_size(coarse, 64), expected)


def test_maps_are_differentiable():
    """Gradients reach the image's features: what explains a score may ask for them."""
    seen = evidence(n=30)
    mix = SpatialMap.projection(12)
    ours = fitted(SpatialMap.local(seen, mix), mix)
    feature = seen.features[0].clone().requires_grad_()
    ours(seen._replace(features=(feature, *seen.features[1:]))).sum().backward()
    assert F.l1_loss(feature.grad, torch.zeros_like(feature)) > 0


def test_rarity_is_minus_the_log_of_the_share_that_reaches_a_value():
    """Between the knots as scipy says; beyond the last the tail goes on in a straight line."""
    gen = torch.Generator().manual_seed(0)
    values = torch.stack([torch.randn(200_000, generator=gen), torch.rand(200_000, generator=gen)])
    rarity = Rarity.fit(values.T)
    line = torch.linspace(-3, 3, 61)
    nats = rarity(torch.stack([line, line.sigmoid()])[None, :, None])[0, :, 0]
    np.testing.assert_allclose(nats[0], -norm.logsf(line.numpy()), atol=0.12)
    np.testing.assert_allclose(nats[1], -np.log1p(-line.sigmoid().numpy()), atol=0.05)
    far = rarity(torch.tensor([[4.0, 6.0, 8.0, 80.0]] * 2)[None, :, None])[0, 0, 0]
    assert (far.diff() > 1).all()
    assert far[2] - far[1] == pytest.approx(float(far[1] - far[0]), rel=1e-3)


def test_a_constant_map_is_never_rare():
    """A map without its network is zero everywhere and says nothing, whatever comes later."""
    values = torch.zeros(500, 2)
    values[:, 1] = torch.arange(500)
    nats = Rarity.fit(values)(torch.full((3, 2, 2, 2), 400.0))
    assert not nats[:, 0].any()
    np.testing.assert_allclose(nats[:, 1], -np.log(0.2), atol=0.02)


def test_what_scoring_keeps_serves_gradients_too():
    """Scored first, explained afterwards: neither the blur nor the table stands in the way."""
    blur_matrix.cache_clear()
    rarity = Rarity.fit(torch.rand(500, 1, generator=torch.Generator().manual_seed(0)))
    x = torch.rand(2, 1, 8, 8)
    with torch.inference_mode():
        rarity(x), gaussian_blur(x, 1.0)
    x.requires_grad_()
    (rarity(x).sum() + gaussian_blur(x, 1.0).sum()).backward()
    assert x.grad.isfinite().all()


# Where a map lies.


def test_a_shifted_map_is_read_further_on():
    """By a whole place: the next row and column; by part of one: linear in between."""
    ramp = torch.arange(8.0).expand(1, 8, 8)
    moved = resize_bilinear(ramp, 8, (1, 1))[0, 0]
    close(moved, [1, 2, 3, 4, 5, 6, 7, 7])
    close(resize_bilinear(ramp, 8, (0, 0.25))[0, 0, :7], np.arange(7) + 0.25)


def test_centroids_lie_where_squares_were_painted():
    """Of the change of luma; a map that nothing changed has none."""
    x = 0.45 + 0.1 * rand(64, 3, 32, 32)
    painted, centres = with_squares(x, torch.Generator().manual_seed(0))
    change = (painted - x).abs().mean(dim=1)
    close(centroids((change > 0.3).float()), centres)
    assert (change.flatten(1) > 0).sum(dim=1).unique().tolist() == [4]
    assert centroids(torch.zeros(1, 8, 8)).isnan().all()
    assert painted.min() >= 0
    assert painted.max() <= 1
