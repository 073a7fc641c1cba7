"""Every score of a model, learned from its training images: Evidence -> {name: (B,)}.

Two passes over the training images: the first gathers moments and statistics, the second measures
what the fitted maps make of the very images they were fitted to (each left out of its own fit).
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import log
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from msvae import maps, native, scores
from msvae.beside import ahead
from msvae.evidence import Evidence
from msvae.feedback import Feedback
from msvae.fusion import Fusion, TwoSided
from msvae.imagine import Imagination, coloured
from msvae.maps import Moments, Rarity, ResidualMap, SpatialMap
from msvae.metrics import auroc
from msvae.model import ORDERS, TURNS, VAE
from msvae.scores import Mahalanobis, Neighbours
from msvae.structure import StructureMap, local_statistics, thinning
from msvae.tensors import to_device

Batches = Callable[[], Iterable[Tensor]]  # each call goes over the training images once more
Work = Callable[..., Tensor]
Places = Callable[..., dict[str, Tensor]]  # the maps of an image's evidence
Told = tuple[Tensor, Tensor]

PLACES = ("residual", "spatial", "structure", "inspection")  # maps: their oddest places
DEVIATIONS = 8.0  # of a score or statistic, at most, where feedback weighs it
IMAGINED = 160  # normal images on which defects are imagined to try the maps, at least
FOURS = 4  # images of a batch are blurred in four ways
SAMPLED = 128  # places of each training image that tell what values its maps have, at most
SAMPLE = 1 << 20  # places of all of them together, at most
# What the fusion joins: scores with a direction, and a two-sided density of the VAE's statistics.
EXPERTS = (*PLACES, "typicality", "order", "turn", "neighbours")


class Read(NamedTuple):
    """What is read from the statistics of B images, on the CPU in double precision."""

    distance: Tensor  # (B,) of the latent means, where the model lives, in its precision
    statistics: Tensor  # (B, 21)
    bands: Tensor  # (B,), as the others
    complexity: Tensor
    typicality: Tensor


class Seen(NamedTuple):
    """All that the scores of a batch need."""

    evidence: Evidence
    found: dict[str, Tensor]  # maps (B, S, S)
    read: Read


@dataclass(frozen=True)
class Scorer:
    """All that the scores need besides the evidence; frozen after `learn`."""

    alpha: float  # weight of the reconstruction in the weighted scores
    beta: float
    variance: Tensor  # () decoder variance: the mean squared error of the training images
    ranges: Tensor  # (2, 2) least and greatest reconstruction and mahalanobis on them
    mahalanobis: Mahalanobis
    neighbours: Neighbours
    residual: ResidualMap
    spatial: SpatialMap
    structure: StructureMap
    shares: Tensor  # (4,) of the places that make the score of each of `PLACES`
    rarity: Rarity  # of the values of each of them
    bands: TwoSided
    complexity: TwoSided
    typicality: TwoSided
    fusion: Fusion
    feedback: Feedback  # what labelled examples taught; nothing where there were none

    def on(self, device: torch.device) -> "Scorer":
        """A copy whose image-sized parts live on `device`; the fusion stays on the CPU, in double."""
        parts = ("mahalanobis", "neighbours", "residual", "spatial", "structure", "rarity")
        moved = {name: to_device(getattr(self, name), device) for name in parts}
        return replace(self, **moved, variance=self.variance.to(device))

    def statistics(
        self, e: Evidence, distance: Tensor, read: Work = scores.image_statistics
    ) -> Tensor:
        """All statistics beside each other, (B, 21), on the CPU in double precision.

        `read` gives the `image_statistics`, by a graph perhaps.
        """
        found = read(e.x, e.recon, e.mu, e.logvar)
        far = (distance.to(found)[:, None] + scores.FLOOR).log()
        return torch.cat([found, far], dim=1).cpu().double()

    def maps(self, e: Evidence) -> dict[str, Tensor]:
        """Every map at the model's resolution, (B, H, W)."""
        return self._drawn(e, self.places(e))

    def _drawn(self, e: Evidence, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """`places` with the maps that are only looked at."""
        fused = self.fused_map(torch.stack([found[k] for k in PLACES]))
        return {"reconstruction": maps.reconstruction_map(e), **found, "fused": fused}

    def places(self, e: Evidence) -> dict[str, Tensor]:
        """The maps that are fused, (B, H, W) each."""
        return _places(e, self.residual, self.spatial, self.structure)

    def seen(self, model: VAE, x: Tensor, drawing: bool) -> Seen:
        """All that the scores of images read; their `places`, or all `maps` for `drawing`.

        What does not wait for anything else is computed `ahead`.
        """
        verdicts = ahead(partial(model.verdicts, x))
        structure = ahead(lambda: self.structure.distance(local_statistics(x, model.by_graph)))
        own = model.reconstructed(x)
        spatial = ahead(partial(self.spatial, own))
        of_images: Work = scores.image_statistics
        if not native.suits(x):
            of_images = partial(model.by_graph, of_images)
        statistics = ahead(partial(self._read_statistics, own, of_images))
        e = own._replace(inspection=model.inspection(x))
        found = _places(e, self.residual, lambda *_: spatial(), lambda *_: structure())
        e = e._replace(**verdicts())
        # Last: decisions are made on the CPU, which waits for a GPU here.
        return Seen(e, self._drawn(e, found) if drawing else found, statistics())

    def fused_map(self, found: Tensor) -> Tensor:
        """Σ w r of the maps (4, B, S, S), r how rare their values are, (B, S, S), nats.

        w as in the fusion: little where the training images do not tell what is ordinary, or where
        imagined defects are not found.
        """
        weights = self.fusion.weights[: len(PLACES)].to(found)
        told = (self.rarity(found) * weights[:, None, None, None]).sum(dim=0)
        return maps.smooth(told, max(found.shape[-1] / 64, 0.5))

    def __call__(
        self, e: Evidence, found: dict[str, Tensor] | None = None, read: Read | None = None
    ) -> dict[str, Tensor]:
        """Every score, (B,) each, on the CPU in double precision; `fused` last.

        `found` are the evidence's `places`, or all its `maps`, and `read` what was read from its
        statistics, where the caller has them already.
        """
        out, statistics = self._read(e, found, read)
        if self.feedback.learned:  # otherwise its features would be read for nothing
            features = self.features(experts_of(out), statistics)
            out["fused"] = self.feedback(features, out["fused"])
        return out

    def _read_statistics(self, e: Evidence, read: Work = scores.image_statistics) -> Read:
        """The statistics of images, and the scores that are read from them."""
        distance = self.mahalanobis(e)
        found = self.statistics(e, distance, read)
        bands, complexity = self.bands(found[:, RESIDUAL]), self.complexity(found[:, INPUT])
        return Read(distance, found, bands, complexity, self.typicality(found))

    def _read(
        self, e: Evidence, found: dict[str, Tensor] | None = None, read: Read | None = None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Every score as if nothing had been taught, and the statistics (B, 21)."""
        found = self.places(e) if found is None else found
        read = self._read_statistics(e) if read is None else read
        shares = zip(PLACES, self.shares.tolist(), strict=True)
        error, rate = scores.reconstruction(e), scores.kl(e)
        plain = {
            "reconstruction": error,
            "mahalanobis": read.distance,
            "kl": rate,
            "elbo": scores.elbo(error, rate, e.x[0].numel(), self.beta, self.variance),
            "spread": scores.spread(e),
            **{name: maps.oddest(found[name], share) for name, share in shares},
            "order": scores.order(e),
            "turn": scores.turn(e),
            "neighbours": self.neighbours(e),
        }
        # Together: every copy from a GPU waits for it.
        together = torch.stack([*plain.values()], dim=1).cpu().double()
        out = dict(zip(plain, together.unbind(dim=1), strict=True))
        out |= self._weighted(out["reconstruction"], out["mahalanobis"])
        out |= {k: getattr(read, k) for k in ("bands", "complexity", "typicality")}
        out["fused"] = self.fusion(experts_of(out))
        return out, read.statistics

    def features(self, experts: Tensor, statistics: Tensor) -> Tensor:
        """What feedback weighs, (B, F): experts (B, 8) and statistics (B, 21) as deviations."""
        told = [self.fusion.standing(experts), self.typicality.quantiles(statistics)]
        return torch.cat(told, dim=1).clamp(-DEVIATIONS, DEVIATIONS)

    def taught(self, ordinary: Told, normal: Told, anomalous: Told) -> "Scorer":
        """The same with what examples teach; each is what `told` says of images of that kind."""
        return replace(self, feedback=Feedback.fit(ordinary, normal, anomalous))

    def told(self, evidence: Iterable[Evidence]) -> Told:
        """Features (N, F) and fused scores (N,) without feedback, of batches of images."""
        features, fused = [], []
        for e in evidence:
            found, statistics = self._read(e)
            features.append(self.features(experts_of(found), statistics))
            fused.append(found["fused"])
        if not features:
            return self.feedback.centre.new_zeros(0, len(self.feedback.centre)), torch.zeros(0)
        return torch.cat(features), torch.cat(fused)

    def _weighted(self, reconstruction: Tensor, mahalanobis: Tensor) -> dict[str, Tensor]:
        """The seed method's sum, of min-max normalised terms and as literally written."""
        low, high = self.ranges.double().cpu()
        pair = torch.stack([reconstruction, mahalanobis], dim=1)
        unit = ((pair - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
        share = torch.tensor([self.alpha, 1 - self.alpha], dtype=torch.float64)
        return {"weighted": unit @ share, "weighted_raw": pair @ share}


RESIDUAL, INPUT = slice(0, 8), slice(8, 16)  # columns of `Scorer.statistics`


def experts_of(scores: Mapping[str, Tensor]) -> Tensor:
    """The scores that are fused beside each other, (B, K)."""
    return torch.stack([scores[k] for k in EXPERTS], dim=1)


def learn(
    model: VAE, batches: Batches, held: Batches, *, count: int, alpha: float, beta: float
) -> Scorer:
    """Learn every score's parameters from `count` training images, in two passes over `batches`.

    What is kept of each image is a few hundred numbers. `held` are the normal images of the stop
    part: they tell how much higher those score that were not trained on, and, with imagined defects
    painted on them, which share of its places makes a map's score and how far it is to be trusted.
    """
    device = next(model.parameters()).device
    first = _Gathered(model, batches, count)
    mahalanobis = Mahalanobis.fit(first["mu"])
    distance = mahalanobis.distance(first["mu"], leave_out=True)
    log_distance = (distance[:, None] + scores.FLOOR).log()
    statistics = torch.cat([first["statistics"], log_distance], dim=1).double()
    pair = torch.stack([first["reconstruction"], mahalanobis.distance(first["mu"])], dim=1)
    neighbours = Neighbours.fit(first["direction"])
    residual = to_device(ResidualMap.fit(first.residual), device)
    spatial = to_device(SpatialMap.fit(first.local, first.mix), device)
    structure = to_device(StructureMap.fit(first["structure"]), device)
    places = partial(_places, residual=residual, spatial=spatial, structure=structure)
    oddest, rarity = _measure_maps(model, batches, count, places)
    best, apart = _told_apart(model, held, places)
    typicality = TwoSided.fit(statistics)
    experts = {
        "typicality": typicality.left_out(statistics),
        "order": first["order"],
        "turn": first["turn"],
        "neighbours": neighbours.to(first["direction"], skip=1),
        **{name: oddest[:, i, best[i]] for i, name in enumerate(PLACES)},
    }
    fusion = _fuse({k: v.double() for k, v in experts.items()})
    count = len(fusion.quantiles.kept) + len(typicality.quantiles.kept)
    scorer = Scorer(
        alpha=alpha,
        beta=beta,
        variance=first["reconstruction"].mean(),
        ranges=torch.stack([pair.min(dim=0).values, pair.max(dim=0).values]),
        mahalanobis=mahalanobis,
        neighbours=neighbours,
        residual=residual,
        spatial=spatial,
        structure=structure,
        shares=torch.tensor(maps.SHARES, dtype=torch.float64)[best],
        rarity=rarity,
        bands=TwoSided.fit(statistics[:, RESIDUAL], components=1),
        complexity=TwoSided.fit(statistics[:, INPUT], components=1),
        typicality=typicality,
        fusion=fusion,
        feedback=Feedback.none(count),
    ).on(device)
    others = torch.cat([experts_of(scorer(model.evidence(x))) for x in held()])
    fusion = scorer.fusion.corrected(others)
    if apart is not None:
        fusion = fusion.trusting(apart, len(others))
    return replace(scorer, fusion=fusion)


def _told_apart(model: VAE, held: Batches, places: Places) -> tuple[Tensor, Tensor | None]:
    """By which of `maps.SHARES` each of `PLACES` tells imagined defects from clean images best.

    (4,) indices; and how well by it, (4,), 2 AUROC - 1 from 0 to 1: a map that is blind to defects
    would only add its noise to the others. Nothing is told by pictures in which no defect would show.
    """

    def told(x: Tensor) -> Tensor:
        return _oddest(places(model.inspected(x)))

    clean = torch.cat([told(x) for x in held()])
    spoilt = [told(x) for x in _imagined(held, len(clean))]
    if not spoilt:
        return torch.full((len(PLACES),), maps.USUAL), None
    both = torch.cat([clean, *spoilt]).double()
    labels = (np.arange(len(both)) >= len(clean)).astype(np.int64)
    columns = both.flatten(1).T.numpy()
    apart = torch.tensor([max(0.0, 2 * auroc(labels, c) - 1) for c in columns])
    table = apart.view(len(PLACES), -1)
    found, best = table.max(dim=1)
    usual = torch.full_like(best, maps.USUAL)  # unless another is better
    return torch.where(table[:, maps.USUAL] < found, best, usual), found


def _imagined(held: Batches, count: int) -> Iterator[Tensor]:
    """Copies with imagined defects of the `count` held images, again and again if they are few.

    Evenly drawn if they are many.
    """
    gen, imagination, step = torch.Generator().manual_seed(0), None, max(1, count // IMAGINED)
    with_colour = coloured(held())
    for _ in range(-(-IMAGINED // count)):
        seen = 0
        for x in held():
            seen, x = seen + len(x), x[-seen % step :: step]
            if not len(x):
                continue
            if len(x) < FOURS:
                x = x.repeat(FOURS, 1, 1, 1)
            if imagination is None:
                imagination = Imagination.prepare(x.shape[-1], with_colour, gen, x.device)
            spoilt, mask = imagination(x, gen)
            shown = mask.flatten(1).any(dim=1)
            if shown.any():
                yield spoilt[shown]


def _places(
    e: Evidence,
    residual: ResidualMap,
    spatial: Callable[[Evidence, bool], Tensor],
    structure: Callable[[Tensor, bool], Tensor],
    leave_out: bool = False,
) -> dict[str, Tensor]:
    """The maps `PLACES`, (B, S, S) each; `leave_out` for the images that they were fitted to."""
    side = e.x.shape[-1]
    return {
        "residual": residual(e),
        "spatial": at_size(spatial(e, leave_out), side),
        "inspection": maps.inspection(e),
        "structure": at_size(structure(e.x, leave_out), side),
    }


def _oddest(found: Mapping[str, Tensor]) -> Tensor:
    """The scores of the maps `PLACES` by every one of `maps.SHARES`, (B, 4, S), on the CPU."""
    told = [torch.stack([maps.oddest(found[k], s) for s in maps.SHARES], dim=1) for k in PLACES]
    return torch.stack(told, dim=1).cpu()


def _fuse(experts: dict[str, Tensor]) -> Fusion:
    """The fusion of the training images' scores.

    A task's score weighs as much as the companion learned of the task: 1 for certainty, 0 for a
    guess (a task that cannot be learned says nothing), and so do the features that it learned.
    """
    weights = dict.fromkeys(EXPERTS, 1.0)
    for name, chance in (("order", len(ORDERS)), ("turn", len(TURNS))):
        weights[name] = max(0.0, 1 - float(experts[name].mean()) / log(chance))
    if experts["order"].any():  # without a companion the features are the encoder's own
        weights["neighbours"] = max(weights["order"], weights["turn"])
    return Fusion.fit(
        experts_of(experts),
        torch.tensor([weights[k] for k in EXPERTS], dtype=torch.float64),
    )


class _Gathered:
    """What the first pass over the training images keeps of each, and of every place."""

    def __init__(self, model: VAE, batches: Batches, count: int) -> None:
        step = thinning(count)
        rows = defaultdict(partial(_Rows, count), structure=_Rows(-(-count // step)))
        seen = 0
        for i, x in enumerate(batches()):
            e = model.evidence(x)
            for name, value in self._of(e).items():
                rows[name].add(value)
            kept = x[-seen % step :: step]
            rows["structure"].add(local_statistics(kept))
            seen += len(x)
            raw = ResidualMap.raw(e).flatten(1)[:, :, None]
            if i == 0:
                self.mix = SpatialMap.projection(sum(f.shape[1] for f in e.features[:3])).to(
                    x.device
                )
                self.residual = Moments(raw.mean(dim=0))
                middle = SpatialMap.local(e, self.mix).mean(dim=0)
                self.local = (Moments(middle), Moments(middle))
            local = SpatialMap.local(e, self.mix)
            self.local[i % 2].add(local[::2])
            self.local[1 - i % 2].add(local[1::2])
            self.residual.add(raw)
        self.rows = {name: each.all for name, each in rows.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self.rows[name]

    @staticmethod
    def _of(e: Evidence) -> dict[str, Tensor]:
        return {
            "mu": e.mu,
            "direction": scores.direction(e),
            "reconstruction": scores.reconstruction(e),
            "statistics": scores.image_statistics(e.x, e.recon, e.mu, e.logvar),
            "order": scores.order(e),
            "turn": scores.turn(e),
        }


class _Rows:
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


def _measure_maps(
    model: VAE, batches: Batches, count: int, places: Places
) -> tuple[Tensor, Rarity]:
    """Scores (N, 4, S) of the fitted maps on the training images, and how rare their values are."""
    gen = torch.Generator().manual_seed(0)
    sampled = max(1, min(SAMPLED, SAMPLE // count))
    told, values = _Rows(count), _Rows(count * sampled)
    for x in batches():
        side = x.shape[-1]
        found = places(model.inspected(x), leave_out=True)
        together = torch.stack([found[k] for k in PLACES])
        told.add(_oddest(found))
        at = torch.randint(0, side * side, (len(x), sampled), generator=gen).to(x.device)
        drawn = together.flatten(2).gather(2, at.expand(len(PLACES), -1, -1))
        values.add(drawn.flatten(1).T)
    return told.all, Rarity.fit(values.all)


def at_size(coarse: Tensor, side: int) -> Tensor:
    """A coarse map at S x S pixels, smoothed by a Gaussian of a 32nd of the side (as PaDiM)."""
    return maps.smooth(maps.enlarge(coarse, side), side / 32)
