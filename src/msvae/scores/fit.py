"""Every fitted part of the scores, learned from the training images.

Two passes over them: the first gathers moments and statistics, the second measures what the fitted
maps make of the very images they were fitted to (each left out of its own fit).
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from math import log
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msvae.core.state import to_device
from msvae.evaluation.metrics import auroc
from msvae.networks.model import Networks
from msvae.networks.pretext import ORDERS, TURNS
from msvae.ops.filters import top_mean
from msvae.scores import formulas, maps
from msvae.scores.catalog import FUSED_SCORES, MAP_SCORES
from msvae.scores.density import Floats, TwoSided
from msvae.scores.feedback import Feedback
from msvae.scores.fusion import Fusion
from msvae.scores.graph import GraphParts, PlaceMaps, ScoringGraph
from msvae.scores.latent import Mahalanobis, Neighbours
from msvae.scores.maps import Rarity, ResidualMap, SpatialMap
from msvae.scores.moments import Moments
from msvae.scores.structure import StructureMap, keep_every, local_statistics
from msvae.scores.verdict import Verdict, WeightedSum, fused_columns, group_columns
from msvae.transforms.defects import DefectGenerator, has_colour
from msvae.transforms.squares import centroids, with_squares

Batches = Callable[[], Iterable[Tensor]]  # each call goes over the same images once more
IMAGINED = 160  # normal images on which defects are imagined to try the maps, at least
FOURS = 4  # images of a batch are blurred in four ways
FAR = 2  # places from a painted square at most
SAMPLED = 128  # places of each training image that tell what values its maps have, at most
SAMPLE = 1 << 20  # places of all of them together, at most


class Learned(NamedTuple):
    """What was learned: the graph, and the verdict on its numbers."""

    graph: ScoringGraph
    verdict: Verdict


class MapMeasures(NamedTuple):
    """What the fitted maps make of the training images, and how well they find imagined defects."""

    scores: Tensor  # (N, 4, S) of the training images, by every one of `maps.SHARES`
    rarity: Rarity
    best: Tensor  # (4,) index of the share by which a map tells imagined defects best
    ability: Floats | None  # (4,) how well by it, 2 AUROC - 1; None: no defect would show


@torch.no_grad()
def learn(
    networks: Networks, batches: Batches, held: Batches, *, count: int, alpha: float, beta: float
) -> Learned:
    """Learn every score's parameters from `count` training images, in two passes over `batches`.

    What is kept of each image is a few hundred numbers. `held` are the normal images of the stop
    part: they tell how much higher those score that were not trained on, and, with imagined defects
    painted on them, which share of its places makes a map's score and how far it is to be trusted.
    """
    gathered = gather(networks, batches, count)
    places = fit_places(gathered, next(networks.parameters()).device)
    places = replace(places, spatial=aligned(networks, places.spatial, held))
    measured = measure_maps(networks, batches, held, count, places)
    return fit_fusion(networks, gathered, places, measured, held, alpha=alpha, beta=beta)


class Gathered:
    """What the first pass over the training images keeps of each, and of every place."""

    def __init__(self, first: Tensor, networks: Networks, count: int) -> None:
        """`first` is the first batch (B, 3, S, S) of `count` images."""
        e = networks.forward_mean(first)
        self.step = keep_every(count)
        self.rows = defaultdict(partial(Rows, count), structure=Rows(-(-count // self.step)))
        self.mix = SpatialMap.projection(sum(f.shape[1] for f in e.features[:3])).to(first.device)
        middle = SpatialMap.local(e, self.mix).mean(dim=0)
        self.residual = Moments(ResidualMap.raw(e).flatten(1)[:, :, None].mean(dim=0))
        self.local = (Moments(middle), Moments(middle))
        self.images = self.batches = 0

    def add(self, networks: Networks, x: Tensor) -> None:
        """Take in the next images (B, 3, S, S)."""
        e = networks(x)
        own = {
            "mu": e.mu,
            "direction": formulas.direction(e),
            "reconstruction": formulas.reconstruction(e),
            "statistics": formulas.statistics(e, torch.zeros_like(e.mu[:, 0])),
            "order": formulas.order(e),
            "turn": formulas.turn(e),
        }
        for name, values in own.items():
            self.rows[name].add(values)
        self.rows["structure"].add(local_statistics(x[-self.images % self.step :: self.step]))
        self.residual.add(ResidualMap.raw(e).flatten(1)[:, :, None])
        local, half = SpatialMap.local(e, self.mix), self.batches % 2
        self.local[half].add(local[::2])
        self.local[1 - half].add(local[1::2])
        self.images, self.batches = self.images + len(x), self.batches + 1

    def __getitem__(self, name: str) -> Tensor:
        return self.rows[name].all


class Rows:
    """`count` rows on the CPU, filled in batch by batch.

    All of them are laid out at the first: small tensors, kept while large ones come and go beside
    them, would split the memory up.
    """

    def __init__(self, count: int) -> None:
        self.count, self.filled = count, 0
        self.all = torch.empty(0)

    def add(self, rows: Tensor) -> None:
        """The next rows (B, ...)."""
        if not self.filled:
            self.all = torch.empty((self.count, *rows.shape[1:]), dtype=rows.dtype)
        self.all[self.filled : self.filled + len(rows)] = rows
        self.filled += len(rows)


def gather(networks: Networks, batches: Batches, count: int) -> Gathered:
    """The first pass."""
    gathered = None
    for x in batches():
        gathered = gathered or Gathered(x, networks, count)
        gathered.add(networks, x)
    assert gathered is not None
    return gathered


def fit_places(gathered: Gathered, device: torch.device) -> PlaceMaps:
    """The maps that are fitted to the training images, on `device`."""
    places = PlaceMaps(
        ResidualMap.fit(gathered.residual),
        SpatialMap.fit(gathered.local, gathered.mix),
        StructureMap.fit(gathered["structure"]),
    )
    return to_device(places, device)


def aligned(networks: Networks, spatial: SpatialMap, held: Batches) -> SpatialMap:
    """The spatial map, drawn where squares lie that are painted on the held images."""
    gen, gaps, count = torch.Generator().manual_seed(0), list[Tensor](), 0
    while count < IMAGINED:
        for x in held():
            painted, centres = with_squares(x, gen)
            before, after = (spatial(networks.forward_mean(images)) for images in (x, painted))
            gaps.append(centroids(after - before) - (centres + 0.5) * before.shape[1] / x.shape[2])
            count += len(x)
    gap = torch.cat(gaps) + 0.5  # places are counted from the middle of the first, as pixels are
    near = gap[(gap.abs() < FAR).all(dim=1)]  # not what a square changed elsewhere, or nothing
    too_low, too_right = near.mean(dim=0).tolist() if len(near) else (0.0, 0.0)
    return replace(spatial, too_low=too_low, too_right=too_right)


def measure_maps(
    networks: Networks, batches: Batches, held: Batches, count: int, places: PlaceMaps
) -> MapMeasures:
    """The second pass: the maps on their own training images, and on imagined defects."""
    gen = torch.Generator().manual_seed(0)
    sampled = max(1, min(SAMPLED, SAMPLE // count))
    scores, values = Rows(count), Rows(count * sampled)
    for x in batches():
        drawn = places(networks.with_segmentation(x), leave_out=True)
        scores.add(_top_means(drawn))
        flat = torch.stack([drawn[k].flatten(1) for k in MAP_SCORES])
        at = torch.randint(0, flat.shape[2], (len(x), sampled), generator=gen).to(x.device)
        values.add(flat.gather(2, at.expand(len(MAP_SCORES), -1, -1)).flatten(1).T)
    best, ability = _tried(networks, held, places)
    return MapMeasures(scores.all, Rarity.fit(values.all), best, ability)


def _top_means(drawn: dict[str, Tensor]) -> Tensor:
    """The scores of the maps `MAP_SCORES` by every one of `maps.SHARES`, (B, 4, S), on the CPU."""
    each = [
        torch.stack([top_mean(drawn[k], share) for share in maps.SHARES], dim=1) for k in MAP_SCORES
    ]
    return torch.stack(each, dim=1).cpu()


def _tried(networks: Networks, held: Batches, places: PlaceMaps) -> tuple[Tensor, Floats | None]:
    """By which of `maps.SHARES` each map tells imagined defects from clean images best, and how well.

    (4,) indices, and 2 AUROC - 1 from 0 to 1: a map that is blind to defects would only add its
    noise to the others. Nothing is told by pictures in which no defect would show.
    """

    def scored(x: Tensor) -> Tensor:
        return _top_means(places(networks.with_segmentation(x)))

    clean = torch.cat([scored(x) for x in held()])
    spoilt = [scored(x) for x in imagined_defects(held, len(clean))]
    if not spoilt:
        return torch.full((len(MAP_SCORES),), maps.USUAL), None
    both = torch.cat([clean, *spoilt]).double()
    labels = (np.arange(len(both)) >= len(clean)).astype(np.int64)
    columns = both.flatten(1).T.numpy()
    apart = np.array([max(0.0, 2 * auroc(labels, c) - 1) for c in columns])
    table = apart.reshape(len(MAP_SCORES), -1)
    ability = table.max(axis=1)
    best = np.where(table[:, maps.USUAL] < ability, table.argmax(axis=1), maps.USUAL)
    return torch.from_numpy(best), ability


def imagined_defects(held: Batches, count: int) -> Iterator[Tensor]:
    """Copies with imagined defects of the `count` held images, again and again if they are few.

    Evenly drawn if they are many; batches (B, 3, S, S).
    """
    gen, generator, step = torch.Generator().manual_seed(0), None, max(1, count // IMAGINED)
    coloured = has_colour(held())
    for _ in range(-(-IMAGINED // count)):
        passed = 0
        for x in held():
            passed, x = passed + len(x), x[-passed % step :: step]
            if not len(x):
                continue
            if len(x) < FOURS:
                x = x.repeat(FOURS, 1, 1, 1)
            if generator is None:
                generator = DefectGenerator.prepare(x.shape[-1], coloured, gen, x.device)
            spoilt, mask = generator(x, gen)
            visible = mask.flatten(1).any(dim=1)
            if visible.any():
                yield spoilt[visible]


def fit_fusion(
    networks: Networks,
    gathered: Gathered,
    places: PlaceMaps,
    measured: MapMeasures,
    held: Batches,
    *,
    alpha: float,
    beta: float,
) -> Learned:
    """The last step: densities, the fusion of all scores, and the graph that gives their numbers."""
    mahalanobis = Mahalanobis.fit(gathered["mu"])
    neighbours = Neighbours.fit(gathered["direction"])
    distance = mahalanobis.distance(gathered["mu"], leave_out=True)
    statistics = _numpy(gathered["statistics"])
    statistics[:, group_columns("latent distance")] = np.log(_numpy(distance) + formulas.FLOOR)[
        :, None
    ]
    pair = torch.stack([gathered["reconstruction"], mahalanobis.distance(gathered["mu"])], dim=1)
    typicality = TwoSided.fit(statistics)
    scores = {
        "typicality": typicality.leave_one_out(statistics),
        "order": _numpy(gathered["order"]),
        "turn": _numpy(gathered["turn"]),
        "neighbours": _numpy(neighbours.of_training(gathered["direction"])),
    }
    for i, name in enumerate(MAP_SCORES):
        scores[name] = _numpy(measured.scores[:, i, int(measured.best[i])])
    fusion = Fusion.fit(fused_columns(scores), _weights(scores))
    side = networks.config.image_size
    verdict = Verdict(
        beta=beta,
        size=3 * side**2,
        variance=float(gathered["reconstruction"].mean()),
        weighted=WeightedSum(alpha, _numpy(pair.amin(dim=0)), _numpy(pair.amax(dim=0))),
        bands=TwoSided.fit(statistics[:, group_columns("residual bands")], components=1),
        complexity=TwoSided.fit(statistics[:, group_columns("image bands")], components=1),
        typicality=typicality,
        fusion=fusion,
        feedback=Feedback.none(len(fusion.quantiles.columns) + len(typicality.quantiles.columns)),
    )
    shares = torch.tensor(maps.SHARES, dtype=torch.float64)[measured.best]
    none = torch.zeros(len(MAP_SCORES))
    parts = GraphParts(mahalanobis, neighbours, places, shares, measured.rarity, none)
    fusion = _recentred(ScoringGraph(networks, parts), verdict, held, measured.ability)
    columns = [FUSED_SCORES.index(name) for name in MAP_SCORES]
    weights = torch.from_numpy(fusion.weights[columns]).float()
    graph = ScoringGraph(networks, replace(parts, weights=weights))
    return Learned(graph, replace(verdict, fusion=fusion))


def _recentred(
    graph: ScoringGraph, verdict: Verdict, held: Batches, ability: Floats | None
) -> Fusion:
    """The fusion for images that were not trained on, its maps trusted as far as they find defects."""
    numbers = [graph.numbers_of(x).cpu().numpy() for x in held()]
    scores = fused_columns(verdict.without_feedback(np.concatenate(numbers)))
    fusion = verdict.fusion.recentred(scores)
    if ability is None:
        return fusion
    tried = np.array([FUSED_SCORES.index(name) for name in MAP_SCORES])
    return fusion.reweighted(ability, tried, len(scores))


def _weights(scores: dict[str, Floats]) -> Floats:
    """What each of the `FUSED_SCORES` weighs by what the pretext network learned.

    A task's score weighs as much as was learned of the task: 1 for certainty, 0 for a guess (a task
    that cannot be learned says nothing), and so do the features that were learned.
    """
    weights = dict.fromkeys(FUSED_SCORES, 1.0)
    for name, chance in (("order", len(ORDERS)), ("turn", len(TURNS))):
        weights[name] = max(0.0, 1 - float(scores[name].mean()) / log(chance))
    if scores["order"].any():  # without a pretext network the features are the encoder's own
        weights["neighbours"] = max(weights["order"], weights["turn"])
    return np.array([weights[name] for name in FUSED_SCORES])


def _numpy(tensor: Tensor) -> NDArray[np.float64]:
    return tensor.double().cpu().numpy()
