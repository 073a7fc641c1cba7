"""Why an image was flagged: each number of an explanation against a second way to compute it."""

import copy
import json
import re
from dataclasses import replace
from functools import cache
from itertools import combinations

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage, stats
from scipy.interpolate import interp1d
from torch.nn import functional as F

from msvae import fit, load
from msvae.core.device import to_batch
from msvae.core.errors import ImageError
from msvae.core.evidence import Evidence
from msvae.evaluation.conformal import Calibration
from msvae.explain import explain as module
from msvae.explain.explain import explain_many, regions
from msvae.explain.explanation import figure
from msvae.explain.gradcam import CAM_SCORES, gradcams, verdict_gradient
from msvae.explain.shapley import shapley
from msvae.scores.catalog import FUSED_SCORES, STATISTIC_GROUPS
from msvae.scores.graph import ScoringGraph
from msvae.scores.verdict import statistics_of
from small import CONFIG, SIDE
from tails import tail_of


def smooth_images(n, seed, rows=SIDE, columns=SIDE):
    gen = torch.Generator().manual_seed(seed)
    coarse = 0.3 + 0.4 * torch.rand(n, 3, 4, 4, generator=gen)
    coarse += torch.tensor([0.2, 0.0, -0.2])[:, None, None]
    fine = F.interpolate(coarse, size=(rows, columns), mode="bicubic").clamp(0, 1)
    return list((fine * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy())


def spotted(rows, columns, seed=2):
    """A normal picture with a noisy spot in its middle and a small one beside it."""
    rng = np.random.default_rng(seed)
    image = smooth_images(1, seed, rows, columns)[0].copy()
    middle, unit = rows // 2, min(rows, columns) // 8
    for left, size in ((columns // 2 - unit, 2 * unit), (columns // 2 + 2 * unit, unit)):
        part = image[middle - unit : middle - unit + size, left : left + size]
        part[:] = rng.integers(0, 256, part.shape)
    return image


@pytest.fixture(scope="module")
def detector():
    """A detector with every score, those of the pretext network too; 9 images calibrate it."""
    return fit(smooth_images(60, 0), config=CONFIG)


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    noise = list(rng.integers(0, 256, (3, SIDE, SIDE, 3), dtype=np.uint8))
    return [*smooth_images(6, 1), *noise, spotted(SIDE, SIDE)]


@pytest.fixture(scope="module")
def graph(detector):
    return detector.graph.torch_graph()


@pytest.fixture(scope="module")
def batch(graph, images):
    return to_batch(np.stack(images), next(graph.parameters()).device)


@pytest.fixture(scope="module")
def evidence(graph, batch):
    with torch.no_grad():
        return graph.networks(batch)


@pytest.fixture(scope="module")
def numbers(graph, evidence):
    with torch.no_grad():
        return graph.numbers(evidence, graph.maps(evidence)).cpu().double().numpy()


@pytest.fixture(scope="module")
def explained(detector, images):
    done, refused = explain_many(detector, images)
    assert not refused
    return done


# Shares.


def test_the_shares_add_up_to_the_fused_score(detector, images, explained):
    """Whatever the image, its shares sum to the score that `score` gives it."""
    players = {*STATISTIC_GROUPS, *FUSED_SCORES, "ordinary image"} - {"typicality"}
    fused = detector.score(images).scores["fused"]
    for e, score in zip(explained, fused, strict=True):
        assert set(e.contributions) == players
        total = sum(e.contributions.values())
        assert total == pytest.approx(e.scores["fused"], rel=1e-6, abs=1e-6)
        assert e.scores["fused"] == pytest.approx(score, rel=1e-4, abs=1e-4)


def nats_by_scipy(fusion, row, values):
    """weight · -log P(Z >= corrected quantile) of the score in the row."""
    columns = fusion.quantiles.columns.tolist()
    if row not in columns:
        return np.zeros(len(values))
    at = columns.index(row)
    knots, levels = fusion.quantiles.knots[at], fusion.quantiles.levels[at]
    z = interp1d(knots, levels, fill_value="extrapolate")(values)
    return fusion.weights[row] * tail_of((z - fusion.gap[at]) / fusion.width[at])


def test_shapley_is_the_average_over_all_orders(detector, numbers):
    """Each share is the marginal contribution to the squared score, averaged over all orders of joining.

    Divided by the score and that of the median normal image together.
    """
    verdict, fusion = detector.verdict, detector.verdict.fusion
    values = verdict(numbers)
    found = shapley(verdict, numbers, values)
    z = verdict.typicality.quantiles(statistics_of(numbers))
    columns = verdict.typicality.quantiles.columns
    groups = {"residual bands": (0, 8), "image bands": (8, 16)}
    groups |= {"latent": (16, 20), "latent distance": (20, 21)}

    @cache
    def nats(name, coalition):
        row = FUSED_SCORES.index(name)
        if name != "typicality":
            inside = nats_by_scipy(fusion, row, values[name])
            return inside if name in coalition else np.full(len(z), fusion.weights[row] * np.log(2))
        known = np.zeros_like(z)
        for group in coalition & set(groups):
            low, high = groups[group]
            members = np.flatnonzero((columns >= low) & (columns < high))
            known[:, members] = z[:, members]
        return nats_by_scipy(fusion, row, verdict.typicality.density(known))

    @cache
    def worth(coalition):
        return sum(nats(name, coalition) ** 2 for name in FUSED_SCORES)

    ordinary = np.sqrt(worth(frozenset()))
    both = values["fused"] + ordinary
    players = [*(n for n in FUSED_SCORES if n != "typicality"), *groups]
    for player in players:
        others = [n for n in players if n != player]
        value = 0
        for size in range(len(players)):  # every set of those that came before, as likely as it is
            gains = [
                worth(frozenset((*before, player))) - worth(frozenset(before))
                for before in combinations(others, size)
            ]
            value = value + np.mean(gains, axis=0) / len(players)
        np.testing.assert_allclose(found[player], value / both, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(found["ordinary image"], ordinary, atol=1e-9)


def test_scores_and_decisions_are_those_of_scoring(detector, images, explained):
    """An explanation explains the decision that `score` makes, p-values included."""
    table = detector.score(images)
    assert table.flagged.any()
    for row, e in enumerate(explained):
        assert e.flagged == table.flagged[row]
        assert e.p_values["fused"] == table.p[row]
        for name, p in e.p_values.items():  # another engine: a rank where two scores are equal
            assert p == pytest.approx(table.p_values[name][row], abs=1.01 / 10)


# Grad-CAM.


@pytest.fixture(scope="module")
def cams(detector, graph, batch, evidence):
    return gradcams(graph, detector.verdict, batch, evidence, graph.maps(evidence))


def test_every_score_is_put_into_words(detector, explained):
    """The rarest first; noise is busier than all, a grey picture more blurred than all."""
    assert set(explained[0].readings) == {*explained[0].scores, "detail"}
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    busy = detector.explain(noise, gradcam=False)
    assert busy.readings["detail"].startswith("as busy as the busiest")
    flat = detector.explain(np.full((SIDE, SIDE, 3), 128, np.uint8), gradcam=False)
    assert flat.readings["detail"].startswith("as blurred as the bluntest")
    rare = [not words.startswith("ordinary") for words in busy.readings.values()]
    assert rare == sorted(rare, reverse=True)
    assert rare[0]


def in_double(part):
    """A dataclass of tensors in double precision."""
    values = {k: _double(v) for k, v in vars(part).items()}
    return type(part)(**values)


def _double(value):
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    return in_double(value) if hasattr(value, "__dataclass_fields__") else value


def at_pixels(coarse):
    """An encoder map (n, n) at S x S pixels, linear between the pixels where it looks, by scipy."""
    at = np.minimum(np.arange(SIDE) * len(coarse) / SIDE, len(coarse) - 1)
    grid = np.stack(np.meshgrid(at, at, indexing="ij"))
    return torch.from_numpy(ndimage.map_coordinates(coarse.numpy(), grid, order=1))


@pytest.fixture(scope="module")
def score_of_top(detector, graph, evidence):
    """Every score of the i-th image as a function of its coarsest encoder map, in double precision.

    Forward passes and no gradients; what the map has no part in stays as it is.
    """
    networks = copy.deepcopy(graph.networks).double()
    exact = ScoringGraph(networks, in_double(graph.parts))
    vae, places = networks.vae, exact.parts.places
    features = [f.double() for f in evidence.features]
    known = {
        k: getattr(evidence, k).double() for k in ("x", "embedding", "segmentation", "pretext")
    }
    with torch.no_grad():
        fixed = {k: v.double() for k, v in graph.maps(evidence).items()}

    def again(whole, i, n):
        return whole[i : i + 1].expand(n, *whole.shape[1:])

    @torch.no_grad()
    def scores(i, tops):
        n = len(tops)
        mu, logvar = vae.posterior(tops)
        h = vae.from_latent(mu).unflatten(1, (vae.side, vae.side, -1)).permute(0, 3, 1, 2)
        e = Evidence(
            recon=vae.to_pixels(vae.ups(h)).sigmoid(),
            mu=mu,
            logvar=logvar,
            features=(*(again(f, i, n) for f in features[:-1]), tops),
            **{k: again(v, i, n) for k, v in known.items()},
        )
        drawn = {k: again(v, i, n) for k, v in fixed.items()}
        drawn["residual"] = places.residual(e)
        drawn["spatial"] = places.spatial.drawn(e)
        return detector.verdict(exact.numbers(e, drawn).numpy())

    return scores


def slopes(score_of_top, i, top, name, directions):
    """Derivatives of the score at `top` (C, h, w) along directions (N, C, h, w), by differences."""
    step = 1e-5
    up, down = (score_of_top(i, top + sign * step * directions)[name] for sign in (1, -1))
    return (up - down) / (2 * step)


@pytest.mark.parametrize("name", CAM_SCORES)
def test_gradcam_by_hand(evidence, cams, score_of_top, name):
    """Σ map · mean gradient, which is what the score gains where a whole channel rises."""
    assert evidence.features[-1].shape[-1] == SIDE // 4
    for i in (0, 7, 9):
        top = evidence.features[-1][i].double()
        channels, side = len(top), top.shape[-1]
        rises = torch.eye(channels, dtype=torch.float64)[:, :, None, None].expand(
            -1, -1, side, side
        )
        weights = torch.from_numpy(slopes(score_of_top, i, top, name, rises)) / side**2
        coarse = (weights[:, None, None] * top).sum(dim=0)
        right = at_pixels(coarse)
        found = cams[f"gradcam_{name}"][i].double()
        scale = right.abs().max()
        # Repeated edges of a map that was moved tie: which of them is among the oddest is open.
        torch.testing.assert_close(found / scale, right / scale, atol=0.01, rtol=0)


def test_hirescam_by_hand(evidence, cams, score_of_top):
    """Σ map · gradient at the place itself, at a few places of the picture with a spot."""
    i, top = 9, evidence.features[-1][9].double()
    channels, side = len(top), top.shape[-1]
    coarse = torch.zeros(side, side, dtype=torch.float64)
    for row in range(side):
        here = torch.zeros(channels * side, channels, side, side, dtype=torch.float64)
        for k in range(channels):
            for column in range(side):
                here[k * side + column, k, row, column] = 1
        gradient = slopes(score_of_top, i, top, "fused", here).reshape(channels, side)
        coarse[row] = (torch.from_numpy(gradient) * top[:, row]).sum(dim=0)
    right = at_pixels(coarse)
    found = cams["hirescam_fused"][i].double()
    scale = right.abs().max()
    torch.testing.assert_close(found / scale, right / scale, atol=2e-3, rtol=0)


def test_gradients_of_the_verdict(detector, numbers):
    """Along any direction: what a score of the verdict gains by a small step."""
    verdict, rng = detector.verdict, np.random.default_rng(0)
    sizes = np.abs(numbers) + 1e-6
    for name in ("fused", "typicality", "elbo", "weighted_raw"):
        gradient = verdict_gradient(verdict, numbers, name)
        for _ in range(5):
            along = 1e-7 * sizes * rng.normal(size=numbers.shape)
            up, down = verdict(numbers + along)[name], verdict(numbers - along)[name]
            gained = (gradient * along).sum(axis=1)
            scale = np.abs(gradient * along).sum(axis=1) + 1e-12
            np.testing.assert_allclose((up - down) / 2 / scale, gained / scale, atol=1e-3)


@pytest.mark.parametrize("name", CAM_SCORES)
def test_gradcams_are_signed_maps(cams, images, name):
    """Of every score, at the model's size, finite, above and below 0."""
    cam = cams[f"gradcam_{name}"]
    assert cam.shape == (len(images), SIDE, SIDE)
    assert cam.isfinite().all()
    assert cam.min() < 0 < cam.max()
    assert cam.std(dim=(1, 2)).gt(0).all()


@pytest.mark.parametrize("name", CAM_SCORES)
def test_gradcam_needs_the_learned_weights(detector, graph, batch, cams, name):
    """With random weights the maps are others: they show what was learned, not edges."""
    torch.manual_seed(1)
    networks = copy.deepcopy(graph.networks)
    for part in networks.modules():
        if isinstance(part, torch.nn.Conv2d | torch.nn.ConvTranspose2d | torch.nn.Linear):
            part.reset_parameters()
    random = ScoringGraph(networks, graph.parts)
    with torch.no_grad():
        e = random.networks(batch)
    others = gradcams(random, detector.verdict, batch, e, random.maps(e))[f"gradcam_{name}"]
    agreement = [
        stats.spearmanr(a.flatten().cpu(), b.flatten().cpu()).statistic
        for a, b in zip(cams[f"gradcam_{name}"], others, strict=True)
    ]
    assert np.nanmedian(agreement) < 0.8


def test_gradcam_can_be_left_out(detector, images):
    """Without it the rest is the same; nothing needs gradients then."""
    e = detector.explain(images[0], gradcam=False)
    assert not [k for k in e.model_maps if "cam_" in k]
    assert {"reconstruction", "difference", "residual", "spatial", "fused"} <= set(e.model_maps)


def test_explaining_leaves_the_networks_as_they_were(detector, graph, images, tmp_path):
    """Weights are frozen, in a run that is loaded too, and the scores stay what they were."""
    before = detector.score(images).scores["fused"]
    detector.explain(images[-1])
    np.testing.assert_array_equal(detector.score(images).scores["fused"], before)
    detector.save(tmp_path / "run")
    loaded = load(tmp_path / "run")
    again = loaded.explain(images[-1])
    assert again.scores["fused"] == pytest.approx(before[-1], rel=1e-4)
    for networks in (graph.networks, loaded.graph.torch_graph().networks):
        assert not any(part.training for part in networks.modules())
        assert not any(p.requires_grad for p in networks.parameters())


# Maps at the image's own size.


def test_the_difference_is_signed(explained, images):
    """Brighter than rebuilt is above 0: image minus reconstruction, mean over the colours."""
    for e, image in zip(explained, images, strict=True):
        expected = (image / 255 - e.reconstruction / 255).mean(axis=2)
        np.testing.assert_allclose(e.model_maps["difference"], expected, atol=0.003)


@pytest.mark.parametrize(("rows", "columns"), [(48, 80), (80, 48), (9, 200), (SIDE, SIDE)])
def test_stretched_maps_cover_the_image(detector, rows, columns):
    """Every map has the image's own size and a value at every pixel."""
    e = detector.explain(smooth_images(1, 3, rows, columns)[0])
    for values in e.maps.values():
        assert values.shape == (rows, columns)
        assert np.isfinite(values).all()
    assert e.to_json()["size"] == [columns, rows]


@pytest.mark.parametrize(("rows", "columns"), [(48, 80), (81, 48), (48, 48)])
def test_a_square_model_says_where_it_did_not_look(detector, rows, columns):
    """Numbers in the centre square, NaN beside it; the square is what a crop of it would give."""
    square = replace(detector, config=detector.config.replace(resize="square"))
    image = smooth_images(1, 3, rows, columns)[0]
    side, top, left = min(rows, columns), (rows - 48) // 2, (columns - 48) // 2
    crop = image[top : top + side, left : left + side]
    whole, alone = square.explain(image).maps, detector.explain(crop).maps
    for name, values in whole.items():
        assert values.shape == (rows, columns)
        inside = np.zeros((rows, columns), dtype=bool)
        inside[top : top + side, left : left + side] = True
        np.testing.assert_array_equal(np.isfinite(values), inside)
        found = values[inside].reshape(side, side)
        np.testing.assert_allclose(found, alone[name], rtol=1e-3, atol=1e-4)


def test_pixel_p_is_the_share_of_normal_maxima(detector):
    """(1 + number of normal maxima at or above the pixel) / (n + 1), counted pixel by pixel."""
    square = replace(detector, config=detector.config.replace(resize="square"))
    e = square.explain(spotted(40, 56))
    peaks, fused = detector.calibration.peaks["fused"], e.maps["fused"]
    for row in range(0, 40, 3):
        for column in range(56):
            value = fused[row, column]
            above = sum(p >= value for p in peaks) if np.isfinite(value) else len(peaks)
            expected = (1 + above) / (len(peaks) + 1)
            assert e.pixel_p[row, column] == pytest.approx(expected, rel=1e-6)
    assert e.pixel_p.min() == pytest.approx(1 / 10)


# Regions.


def regions_by_scipy(values, level, peaks):
    """Box, area, peak and p of the 8-connected components at or above the level."""
    labels, _ = ndimage.label(values >= level, structure=np.ones((3, 3)))
    found = set()
    for index, (down, across) in enumerate(ndimage.find_objects(labels), start=1):
        peak = values[labels == index].max()
        p = (1 + sum(v >= peak for v in peaks)) / (len(peaks) + 1)
        box = (across.start, down.start, across.stop, down.stop)
        found.add((box, int((labels == index).sum()), round(peak, 4), round(p, 9)))
    return found


@pytest.mark.parametrize("resize", ["stretch", "square"])
@pytest.mark.parametrize(("rows", "columns"), [(SIDE, SIDE), (48, 80), (90, 64)])
def test_regions_are_the_connected_parts_above_the_level(resize, rows, columns):
    """Boxes, areas, peaks and p-values are those of scipy's components, at the image's own size."""
    rng = np.random.default_rng(0)
    fused = ndimage.gaussian_filter(rng.normal(size=(SIDE, SIDE)), 1.2).astype(np.float32)
    peaks = np.sort(rng.uniform(0.2, fused.max() + 0.1, 40))
    image = np.zeros((rows, columns, 3), dtype=np.uint8)
    across, down = (columns, rows) if resize == "stretch" else (min(rows, columns),) * 2
    values = np.full((rows, columns), -np.inf)
    top, left = (rows - down) // 2, (columns - across) // 2
    drawn = Image.fromarray(fused).resize((across, down), Image.Resampling.BILINEAR)
    values[top : top + down, left : left + across] = np.asarray(drawn)
    found = regions(fused, 0.25, peaks, image, resize)
    told = {(r.box, r.area, round(r.peak, 4), round(r.p, 9)) for r in found}
    assert len(found) > 5
    assert told == regions_by_scipy(values, 0.25, peaks)
    assert [r.peak for r in found] == sorted((r.peak for r in found), reverse=True)


def test_the_regions_of_an_explanation_are_those_of_its_map(detector):
    """Above the calibrated level, on the fused map at the image's own size."""
    e = detector.explain(spotted(96, 120), gradcam=False)
    told = {(r.box, r.area, round(r.peak, 4), round(r.p, 9)) for r in e.regions}
    assert told == regions_by_scipy(e.maps["fused"].astype(np.float64), e.level, e.peaks)
    assert told


def test_an_ordinary_image_has_no_region(detector, explained):
    """Where no pixel reaches the level nothing is outlined, and the panel says so."""
    calm = [e for e in explained if not e.regions]
    assert calm
    for e in calm:
        assert e.model_maps["fused"].max() < e.level
        assert e.to_json()["regions"] == []


def test_few_calibration_images_cannot_keep_one_percent(detector, explained):
    """With 9 the level is that of 1 in 10, above all their maxima, and a note says so."""
    peaks = detector.calibration.peaks["fused"]
    for e in explained:
        assert e.level_rate == pytest.approx(1 / 10)
        assert e.level > peaks.max()
        assert e.level == pytest.approx(peaks.max())
        assert any("9 calibration images" in n and "10.0 %" in n for n in e.notes)
        assert e.to_json()["map_level"]["family_wise_rate"] == e.level_rate


@pytest.mark.parametrize(("n", "rate"), [(98, 1 / 99), (99, 0.01), (250, 0.01)])
def test_the_level_is_one_percent_from_99_images_on(detector, images, n, rate):
    """98 cannot keep it, 99 can; at most that share of the normal maxima reaches the level."""
    peaks = np.random.default_rng(0).normal(size=n)
    many = Calibration(detector.calibration.scores, {"fused": peaks})
    e = replace(detector, calibration=many).explain(images[0], gradcam=False)
    assert e.level_rate == pytest.approx(rate)
    assert (1 + (peaks >= e.level).sum()) / (n + 1) <= rate + 1e-12
    lower = np.sort(peaks)[-int(rate * (n + 1) + 1e-9)]
    assert (1 + (peaks >= lower).sum()) / (n + 1) > rate
    assert bool(e.notes) == (n < 99)


# The nearest normal images.


def test_the_nearest_are_those_of_the_whitened_latents(detector, graph, evidence, explained):
    """Names, order and distances by numpy, over all references."""
    r, whiten = detector.references, graph.parts.mahalanobis.whiten.double().cpu().numpy()
    precision = whiten @ whiten.T
    for e, mu in zip(explained, evidence.mu.double().cpu().numpy(), strict=True):
        gaps = r.latents.astype(np.float64) - mu
        distances = np.sqrt(np.einsum("ij,jk,ik->i", gaps, precision, gaps))
        order = np.argsort(distances)[:4]
        assert [n.name for n in e.nearest] == [r.names[i] for i in order]
        np.testing.assert_allclose([n.distance for n in e.nearest], distances[order], rtol=1e-3)
        for n, i in zip(e.nearest, order, strict=True):
            np.testing.assert_array_equal(n.thumbnail, r.thumbnails[i])


def test_a_training_image_finds_itself(detector):
    """The nearest normal image of a training image is that image, at no distance."""
    name = detector.references.names[5]
    image = smooth_images(60, 0)[int(name.removeprefix("image "))]
    first = detector.explain(image, gradcam=False).nearest[0]
    assert first.name == name
    assert first.distance < 0.02


def test_without_references_the_rest_is_explained(detector, images):
    """No neighbours to show, a note that says so, everything else as before."""
    with_, without = (
        d.explain(images[-1], gradcam=False) for d in (detector, replace(detector, references=None))
    )
    assert without.nearest == ()
    assert any("no references" in note for note in without.notes)
    assert without.scores == with_.scores
    assert without.regions == with_.regions


# Many images.


def test_what_cannot_be_read_is_listed_and_the_rest_explained(detector, images, tmp_path):
    """In order; in memory and from disk alike; a single one raises."""
    (tmp_path / "text.png").write_text("no picture")
    Image.fromarray(images[0]).save(tmp_path / "good.png")
    sources = [tmp_path / "text.png", tmp_path / "good.png", np.full((9, 9), np.nan)]
    done, refused = explain_many(detector, sources, gradcam=False)
    assert [e.name for e in done] == [str(tmp_path / "good.png")]
    assert [r.name for r in refused] == [str(tmp_path / "text.png"), "image 2"]
    with pytest.raises(ImageError, match=r"text\.png: is not an image"):
        detector.explain(tmp_path / "text.png")


def test_batches_do_not_matter(detector, images, explained, monkeypatch):
    """Two at a time or all at once: the same shares and maps, Grad-CAM among them."""
    monkeypatch.setattr(module, "BATCH", 2)
    again, _ = explain_many(detector, images)
    for a, b in zip(explained, again, strict=True):
        assert a.name == b.name
        for name, share in a.contributions.items():
            assert share == pytest.approx(b.contributions[name], rel=1e-3, abs=2e-3)
        for name, values in a.model_maps.items():
            scale = np.abs(values).max() + 1e-12
            np.testing.assert_allclose(values / scale, b.model_maps[name] / scale, atol=2e-3)


# What is handed out.


def numbers_in(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [n for v in value for n in numbers_in(v)]
    return [value] if isinstance(value, int | float) else []


def test_the_json_holds_all_numbers(explained):
    """Strict JSON that comes back equal, every number finite."""
    for e in explained:
        told = e.to_json()
        assert json.loads(json.dumps(told, allow_nan=False)) == told
        assert np.isfinite(numbers_in(told)).all()
        assert told["p"] == e.p_values["fused"]
        assert told["contributions"] == e.contributions
        for name, values in e.model_maps.items():
            assert told["maps"][name]["max"] == values.max()
        assert [n["image"] for n in told["nearest"]] == [n.name for n in e.nearest]


def test_a_console_shows_the_verdict_in_one_line(explained):
    """Not the pixels."""
    assert re.fullmatch(r"<Explanation of .*: (flagged|passed), p = \S+>", repr(explained[0]))


def test_a_notebook_shows_it_without_a_network(detector, images, tmp_path):
    """One piece of HTML: pictures inside, each with a text; odd file names do no harm."""
    path = tmp_path / "<b>&.png"
    Image.fromarray(images[-1]).save(path)
    shown = detector.explain(path)._repr_html_()
    assert "http" not in shown
    assert "<script" not in shown
    assert "<b>&.png" not in shown
    assert "&lt;b&gt;&amp;.png" in shown
    sources = re.findall(r'src="([^"]*)"', shown)
    assert len(sources) == shown.count("<img") >= 7
    assert all(s.startswith("data:image/") for s in sources)
    assert all(re.findall(r'alt="([^"]*)"', shown))
    assert "Fused score" in shown


def test_the_panel_has_every_view(explained):
    """Input, reconstruction, maps and regions, and the verdict in the title."""
    e = explained[-1]
    panel = figure(e)
    titles = [axes.get_title(loc="left") for axes in panel.axes]
    assert {"Input", "Reconstruction", "Regions", "Grad-CAM of the fused score"} <= set(titles)
    assert ("flagged" if e.flagged else "passed") in panel.get_suptitle()
