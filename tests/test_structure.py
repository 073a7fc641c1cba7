"""The structure map: its statistics, its distances and its retrieval, by numpy and scipy."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from msvae.scores.structure import (
    ALIKE,
    BANK,
    FLOOR,
    RIDGE,
    WINDOW,
    StructureMap,
    descriptor,
    local_statistics,
)

SIDE = 64
NAMES = [
    *["band 0", "band 1", "band 2", "tone", "variance", "ridge", "corner"],
    *["red", "blue", "chroma", "darkest", "brightest"],
]


def textures(n, seed, side=SIDE):
    """Grainy grey pictures with a tint, (N, 3, S, S) in [0, 1]."""
    rng = np.random.default_rng(seed)
    grain = ndimage.gaussian_filter(rng.normal(size=(n, side, side)), (0, 1.5, 1.5))
    tint = rng.normal(0, 0.01, (n, 3, 1, 1))
    x = 0.5 + 0.12 * (grain / grain.std())[:, None] + tint
    return torch.from_numpy(x.clip(0, 1)).float()


def blurred(image, sigma):
    """scipy's Gaussian with the window's radius, edges mirrored."""
    radius = max(1, round(3 * sigma))
    return ndimage.gaussian_filter(image, sigma, mode="mirror", radius=radius)


def at_centres(image):
    """What lies at the middles of 16 x 16 places of 4 px: the mean of the 2 x 2 pixels around each."""
    rows = (image[1::4] + image[2::4]) / 2
    return (rows[:, 1::4] + rows[:, 2::4]) / 2


def windowed(image):
    """Means within the window about the middles of the places."""
    return at_centres(blurred(image, WINDOW * SIDE))


def statistics_by_scipy(x):
    """The twelve statistics of one image (3, S, S) at every place, by name."""
    luma = x.mean(axis=0)
    tints = x[0] - x[1], (x[0] + x[1]) / 2 - x[2]
    window = WINDOW * SIDE
    out, rest = {}, luma
    for k in range(3):
        low = blurred(rest, max(0.8 * 2**k, 0.5))
        out[f"band {k}"] = np.log(windowed((rest - low) ** 2) + FLOOR)
        rest = low
    tone = blurred(luma, window)
    out["tone"] = 4 * at_centres(tone)
    out["variance"] = np.log(windowed((luma - tone) ** 2) + FLOOR)
    padded = np.pad(luma, 1, mode="reflect")
    gx = (padded[1:-1, 2:] - padded[1:-1, :-2]) / 2
    gy = (padded[2:, 1:-1] - padded[:-2, 1:-1]) / 2
    xx, yy, xy = (windowed(p) for p in (gx * gx, gy * gy, gx * gy))
    tensor = np.moveaxis(np.array([[xx, xy], [xy, yy]]), (0, 1), (2, 3))
    small, great = np.moveaxis(np.linalg.eigvalsh(tensor), 2, 0)
    out["ridge"], out["corner"] = np.log(great + FLOOR), np.log(small.clip(0) + FLOOR)
    means = [blurred(t, window) for t in tints]
    out["red"], out["blue"] = (4 * at_centres(m) for m in means)
    gaps = sum((t - m) ** 2 for t, m in zip(tints, means, strict=True))
    out["chroma"] = np.log(windowed(gaps) + FLOOR)
    out["darkest"] = 4 * at_centres(ndimage.minimum_filter(luma, 3, mode="mirror"))
    out["brightest"] = 4 * at_centres(ndimage.maximum_filter(luma, 3, mode="mirror"))
    return out


@pytest.mark.parametrize("name", NAMES)
def test_statistics_agree_with_scipy(name):
    """Each statistic of a coloured, grainy picture is the one that scipy's filters give."""
    rng = np.random.default_rng(0)
    x = (textures(1, 1)[0].numpy() + rng.normal(0, 0.02, (3, SIDE, SIDE))).clip(0, 1)
    expected = statistics_by_scipy(x.astype(np.float64))[name]
    found = local_statistics(torch.from_numpy(x[None]).float())[0, NAMES.index(name)]
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-3)


@pytest.mark.parametrize(("side", "grid"), [(8, 2), (32, 8), (64, 16), (160, 16)])
def test_the_grid_is_a_quarter_of_the_side(side, grid):
    """Twelve statistics at a quarter of the side, at most 16 places; finite on a flat picture."""
    flat = local_statistics(torch.full((2, 3, side, side), 0.5))
    assert flat.shape == (2, len(NAMES), grid, grid)
    assert flat.isfinite().all()
    assert (flat - flat[:1, :, :1, :1]).abs().max() < 1e-5


def test_an_image_is_the_same_in_company():
    """Neither the statistics nor the distances of an image depend on its neighbours in the batch."""
    fitted = StructureMap.fit(local_statistics(textures(16, 0)))
    x = textures(5, 3)
    torch.testing.assert_close(local_statistics(x)[3:4], local_statistics(x[3:4]))
    torch.testing.assert_close(fitted(x)[3:4], fitted(x[3:4]), rtol=1e-4, atol=1e-4)


def told(statistics):
    """Mean and (unbiased) deviation of each statistic of each picture, (N, 2 D)."""
    flat = statistics.reshape(*statistics.shape[:2], -1)
    return np.concatenate([flat.mean(axis=2), flat.std(axis=2, ddof=1)], axis=1)


def places(statistics):
    """(N, D, g, g) -> (N, L, D)."""
    return statistics.reshape(*statistics.shape[:2], -1).transpose(0, 2, 1)


def distances_by_loops(bank, queries, skip_self=False):
    """The map by loops over pictures, places and places, in double precision."""
    vectors = places(bank).reshape(-1, bank.shape[1])
    cov = np.cov(vectors.T, bias=True)
    precision = np.linalg.inv(cov + RIDGE * np.trace(cov) / len(cov) * np.eye(len(cov)))
    scale = told(bank).std(axis=0, ddof=1) + 1e-6
    out = np.empty((len(queries), places(queries).shape[1]))
    for i, query in enumerate(queries):
        gaps = np.linalg.norm((told(bank) - told(query[None])) / scale, axis=1)
        if skip_self:
            gaps[i] = np.inf
        alike = np.argsort(gaps, kind="stable")[:ALIKE]
        near = places(bank)[alike].reshape(-1, bank.shape[1])
        for j, place in enumerate(places(query[None])[0]):
            d = near - place
            out[i, j] = np.sqrt(np.einsum("ij,jk,ik->i", d, precision, d).min())
    return out


@pytest.mark.parametrize("leave_out", [False, True])
def test_distances_are_those_of_the_nearest_place_of_an_alike_image(leave_out):
    """By brute force: the ten most alike images, all their places, the nearest of them."""
    bank = local_statistics(textures(24, 0, 32)).double()
    queries = bank if leave_out else local_statistics(textures(4, 9, 32)).double()
    expected = distances_by_loops(bank.numpy(), queries.numpy(), skip_self=leave_out)
    fitted = StructureMap.fit(bank.float())
    found = fitted.distance(queries.float(), leave_out=leave_out).flatten(1).numpy()
    np.testing.assert_allclose(found, expected, rtol=0.01, atol=0.02)  # the bank is float16


def test_left_out_an_image_is_not_its_own_neighbour():
    """A fitted image is at no distance from itself, and as far as a new one when left out."""
    x = textures(24, 0)
    fitted = StructureMap.fit(local_statistics(x))
    itself, left_out, new = fitted(x), fitted(x, leave_out=True), fitted(textures(24, 5))
    assert itself.max() < 0.05
    assert left_out.min() > itself.max()
    assert 0.8 < float(left_out.median() / new.median()) < 1.25


def test_copies_are_left_out_together():
    """The copy of a fitted image does not stand in for the image that was left out."""
    x = textures(24, 0)
    alone = StructureMap.fit(local_statistics(x))(x, leave_out=True)
    twice = StructureMap.fit(local_statistics(torch.cat([x, x])))(x, leave_out=True)
    assert float(twice.median() / alone.median()) > 0.9


@pytest.mark.parametrize("kind", ["flat", "busy", "tinted"])
def test_too_smooth_and_too_busy_both_show(kind):
    """In a texture a flat patch, a noisy one and a coloured one all peak inside the patch."""
    fitted = StructureMap.fit(local_statistics(textures(32, 0)))
    x = textures(6, 7)
    normal_peaks = fitted(x).amax(dim=(1, 2))
    patch = x[:, :, 24:40, 24:40]
    patch.copy_(
        {
            "flat": patch.mean(dim=(2, 3), keepdim=True).expand_as(patch),
            "busy": 0.5 + 0.3 * torch.sign(torch.randn(patch.shape, generator=torch.Generator())),
            "tinted": patch * torch.tensor([1.2, 1.0, 0.7])[:, None, None],
        }[kind]
    )
    found = fitted(x)
    at = found.flatten(1).argmax(dim=1)
    rows, columns = at // 16, at % 16
    assert ((rows >= 5) & (rows <= 10) & (columns >= 5) & (columns <= 10)).all()
    assert (found.amax(dim=(1, 2)) > 1.3 * normal_peaks).all()


def test_several_materials_are_told_apart():
    """Fine on one material, a patch of another is odd: the picture is compared with its like."""
    light = textures(20, 0)
    dark = 1 - textures(20, 1).repeat_interleave(4, dim=3)[..., :SIDE]
    fitted = StructureMap.fit(local_statistics(torch.cat([light, dark])))
    x = textures(4, 8)
    normal = fitted(x).amax(dim=(1, 2))
    x[:, :, 20:40, 20:40] = dark[:4, :, 20:40, 20:40]
    found = fitted(x)
    assert (found.amax(dim=(1, 2)) > normal).all()
    inside = found[:, 5:10, 5:10].mean(dim=(1, 2))
    assert (inside > 1.2 * found[:, :3].mean(dim=(1, 2))).all()


def test_descriptors_are_means_and_deviations():
    """What a picture is like: mean and deviation of each statistic over its places."""
    statistics = local_statistics(textures(3, 2))
    np.testing.assert_allclose(
        descriptor(statistics).numpy(), told(statistics.double().numpy()), rtol=1e-4, atol=1e-4
    )


def test_a_large_folder_keeps_a_bounded_bank():
    """Of more than 512 images an even selection is kept, of which each is its own neighbour."""
    gen = torch.Generator().manual_seed(0)
    statistics = torch.randn(2 * BANK + 10, 3, 2, 2, generator=gen)
    fitted = StructureMap.fit(statistics)
    assert BANK // 2 < len(fitted.places) <= BANK
    step = -(-len(statistics) // BANK)
    kept = fitted.distance(statistics[::step])
    others = fitted.distance(statistics[1::step])
    assert kept.max() < 0.05 < others.median()
