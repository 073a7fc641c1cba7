"""Why an image was flagged: maps at its own size, Grad-CAM, regions, shares and nearest normals."""

from collections.abc import Callable, Sequence
from itertools import combinations
from math import factorial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from msvae import maps, scores
from msvae.calibration import Calibration, conformal_p
from msvae.compute import to_batch
from msvae.config import Config, Resize
from msvae.data.images import Pixels, Source, load_image, name_of, open_image, read_bytes
from msvae.errors import ImageError
from msvae.evidence import Evidence
from msvae.explanation import Explanation, Nearest, Region, placed
from msvae.fusion import surprisal
from msvae.model import VAE
from msvae.pictures import Map
from msvae.progress import Progress, Silent
from msvae.references import References
from msvae.scorer import EXPERTS, Scorer, at_size, experts_of
from msvae.table import ScoreTable
from msvae.wording import reading

BATCH = 32
FAMILY_WISE = 0.01  # P(any pixel of a normal image reaches the level)
CAM_SCORES = ("mahalanobis", "reconstruction", "kl", "fused")
NEAREST = 4


class Explainable(Protocol):
    """What of a detector is needed to explain its decisions."""

    @property
    def config(self) -> Config:
        """The settings."""

    @property
    def model(self) -> VAE:
        """The network, for gradients."""

    @property
    def scoring(self) -> VAE:
        """The network as it scores."""

    @property
    def scorer(self) -> Scorer:
        """What the scores need besides the evidence."""

    @property
    def calibration(self) -> Calibration:
        """The scores and map maxima of held-out normal images."""

    @property
    def references(self) -> References | None:
        """What is kept of the training images."""

    @property
    def device(self) -> torch.device:
        """Where the model lives."""

    def table(self, names: Sequence[str], scores: dict[str, Any]) -> ScoreTable:
        """Scores with their p-values and the decision."""


def explain(detector: Explainable, image: Source, *, gradcam: bool = True) -> Explanation:
    """One image explained; raises `ImageError` when it cannot be used."""
    done, refused = explain_many(detector, [image], gradcam=gradcam)
    if refused:
        raise refused[0]
    return done[0]


def explain_many(
    detector: Explainable,
    sources: Sequence[Source],
    *,
    gradcam: bool = True,
    progress: Progress | None = None,
) -> tuple[list[Explanation], list[ImageError]]:
    """Every image that can be read explained, in order; the reasons of the others."""
    c, refused = detector.config.model, list[ImageError]()
    read: list[tuple[str, Pixels, Pixels]] = []
    done: list[Explanation] = []
    ticks = (progress or Silent()).track(sources, "explaining", len(sources))
    for i, source in enumerate(ticks):
        try:
            name = name_of(source, i)
            data = read_bytes(source) if isinstance(source, str | Path) else None
            whole = np.asarray(open_image(source, name, data))
            small = load_image(source, c.image_size, c.resize, name=name, data=data)
            read.append((name, whole, small))
        except ImageError as error:
            refused.append(error)
        if len(read) == BATCH or i == len(sources) - 1:
            done += _explain_batch(detector, read, gradcam) if read else []
            read = []
    return done, refused


def _explain_batch(
    detector: Explainable, read: Sequence[tuple[str, Pixels, Pixels]], gradcam: bool
) -> list[Explanation]:
    x = to_batch(np.stack([small for _, _, small in read]), detector.device)
    with torch.no_grad():
        e = detector.scoring.evidence(x)
        found = detector.scorer.maps(e)
        told = detector.scorer(e, found)
        values = {k: v.numpy() for k, v in told.items()}
        found["difference"] = maps.signed_difference(e)
        shares = shapley(detector.scorer, e, told)
        detail = fine_detail(detector.scorer, e, told)
    if gradcam:
        found |= gradcams(detector, x, e, found)
    arrays = {k: v.cpu().numpy().astype(np.float32) for k, v in found.items()}
    drawn = (e.recon.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    table = detector.table([name for name, _, _ in read], values)
    words = readings(detector, values, detail)
    near = nearest(detector, e)
    return [
        _one(detector, table, i, image, drawn[i], {k: v[i] for k, v in arrays.items()},
             {k: float(v[i]) for k, v in shares.items()}, near[i], words[i])
        for i, (_, image, _) in enumerate(read)
    ]  # fmt: skip


def _one(
    detector: Explainable,
    table: ScoreTable,
    row: int,
    image: Pixels,
    drawn: Pixels,
    found: dict[str, Map],
    shares: dict[str, float],
    near: tuple[Nearest, ...],
    words: dict[str, str],
) -> Explanation:
    peaks = detector.calibration.peaks["fused"]
    level, rate = detector.calibration.map_level(FAMILY_WISE)
    flagged = False if table.flagged is None else bool(table.flagged[row])
    return Explanation(
        name=table.paths[row],
        image=image,
        resize=detector.config.model.resize,
        reconstruction=drawn,
        model_maps=found,
        level=level,
        level_rate=rate,
        peaks=peaks,
        regions=regions(found["fused"], level, peaks, image, detector.config.model.resize),
        scores={k: float(v[row]) for k, v in table.scores.items()},
        p_values={k: float(v[row]) for k, v in table.p_values.items()},
        flagged=flagged,
        contributions=shares,
        nearest=near,
        readings=words,
        notes=_notes(detector, len(peaks), rate),
    )


def readings(
    detector: Explainable, values: dict[str, NDArray[np.float64]], detail: NDArray[np.float64]
) -> list[dict[str, str]]:
    """Each score of each image in words, the most telling first; `detail` are `fine_detail`s."""
    n = detector.calibration.n
    high, low = detector.calibration.p_values(values), detector.calibration.low_p_values(values)
    tails: dict[str, NDArray[np.float64]] = {k: np.stack([high[k], low[k]], axis=1) for k in high}
    tails["detail"] = np.stack([1 - detail, detail], axis=1)
    out = []
    for row in range(len(detail)):
        names = sorted(tails, key=lambda k: float(tails[k][row].min()))
        told = {k: (float(tails[k][row, 0]), float(tails[k][row, 1])) for k in names}
        counts = {k: None if k == "detail" else n for k in names}
        out.append({k: reading(k, *told[k], counts[k]) for k in names})
    return out


def fine_detail(scorer: Scorer, e: Evidence, values: dict[str, Tensor]) -> NDArray[np.float64]:
    """The share of training images with less fine detail (energy of the finest luma band), (B,).

    `values` are the evidence's scores.
    """
    quantiles = scorer.typicality.quantiles
    column = GROUPS["image bands"][0]
    if column not in quantiles.kept.tolist():
        return np.full(len(e.x), 0.5)
    z = quantiles(scorer.statistics(e, values["mahalanobis"]))
    share = torch.special.ndtr(z[:, quantiles.kept.tolist().index(column)])
    least = 1 / (len(quantiles.knots[0]) + 1)
    return share.clamp(least, 1 - least).numpy()


def _notes(detector: Explainable, n: int, rate: float) -> tuple[str, ...]:
    notes = []
    if rate > FAMILY_WISE:
        notes.append(
            f"{n} calibration images cannot keep a 1 % level: regions are drawn at "
            f"1/{n + 1} = {100 * rate:.1f} % of normal images instead"
        )
    if detector.references is None:
        notes.append("the run holds no references: the nearest normal images cannot be shown")
    return tuple(notes)


def regions(
    fused: Map, level: float, peaks: NDArray[np.float64], image: Pixels, resize: Resize
) -> tuple[Region, ...]:
    """The 8-connected regions of the fused map (S, S) at or above `level`, highest peak first."""
    from skimage.measure import label, regionprops

    rows, columns = image.shape[:2]
    if not (fused.astype(np.float64) >= level).any():
        return ()
    values = placed(fused, rows, columns, resize).astype(np.float64)
    inside = np.nan_to_num(values, nan=-np.inf) >= level
    if not inside.any():  # a shrunken image may lose a peak of one pixel
        return ()
    found = []
    for part in regionprops(label(inside, connectivity=2), intensity_image=values):
        top, left, bottom, right = part.bbox
        peak = float(part.intensity_max)
        p = float(conformal_p(np.array([peak]), peaks)[0])
        box = (int(left), int(top), int(right), int(bottom))
        found.append(Region(box, int(part.area), peak, p))
    return tuple(sorted(found, key=lambda r: -r.peak))


def gradcams(
    detector: Explainable,
    x: Tensor,
    e: Evidence,
    found: dict[str, Tensor],
    names: Sequence[str] = CAM_SCORES,
) -> dict[str, Tensor]:
    """Grad-CAM of each of the scores `names` for images (B, 3, S, S), (B, S, S) each, signed.

    Σ_k w_k A_k of the coarsest encoder map of at least a quarter of the side, w_k the mean
    gradient of the *score* by the channel (Selvaraju et al. 2017, eq. 1 and 2, without the
    rectifier): above 0 where the evidence raises the score. `hirescam_fused` has the gradient at
    the place itself in place of w_k (HiResCAM, Draelos & Carin 2020): what a place does, not what
    its channels do on average. The companion and the inspector have encoders of their own, and the
    structure map reads the picture: what they say, `e` and the maps `found`, is held fixed.
    """
    from captum.attr import LayerGradCam, LayerGradientXActivation

    scorer, model = detector.scorer, detector.model
    stage = max(1, sum(f.shape[-1] >= x.shape[-1] // 4 for f in e.features)) - 1
    out = {}
    for name in names:
        told = _differentiable(scorer, name, e, found)

        def score(inputs: Tensor, told: Callable[[Evidence], Tensor] = told) -> Tensor:
            return told(model(inputs))

        # captum forwards the whole batch; a score of an image depends on that image alone
        cam = LayerGradCam(score, model.stages[stage])
        out[f"gradcam_{name}"] = _only(cam.attribute(x.detach(), relu_attributions=False))
        if name == "fused":
            each = LayerGradientXActivation(score, model.stages[stage])
            out["hirescam_fused"] = _only(each.attribute(x.detach())).sum(dim=1, keepdim=True)
    size = (x.shape[-1], x.shape[-1])
    return {
        k: F.interpolate(v.detach(), size, mode="bilinear", align_corners=False)[:, 0]
        for k, v in out.items()
    }


def _only(given: Tensor | tuple[Tensor, ...]) -> Tensor:
    return given[0] if isinstance(given, tuple) else given


def _differentiable(
    scorer: Scorer, name: str, known: Evidence, found: dict[str, Tensor]
) -> Callable[[Evidence], Tensor]:
    """The score as a function of the VAE's evidence, (B,); the companion's part is the known one."""

    def whole(e: Evidence) -> Tensor:
        joined = e._replace(pretext=known.pretext, inspection=known.inspection)
        if known.pretext.shape[1]:  # otherwise the embedding is the VAE's own
            joined = joined._replace(embedding=known.embedding)
        seen = {
            "residual": scorer.residual(e),
            "spatial": at_size(scorer.spatial(e), e.x.shape[-1]),
        }
        return scorer(joined, {**found, **seen})[name].float()

    direct: dict[str, Callable[[Evidence], Tensor]] = {
        "mahalanobis": scorer.mahalanobis,
        "reconstruction": scores.reconstruction,
        "kl": scores.kl,
    }
    return direct.get(name, whole)


GROUPS = {  # columns of `Scorer.statistics`
    "residual bands": (0, 8),
    "image bands": (8, 16),
    "latent": (16, 20),
    "latent distance": (20, 21),
}
TYPICALITY = EXPERTS.index("typicality")


def shapley(scorer: Scorer, e: Evidence, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """How much each group of evidence contributed to the fused score, (B,) each, nats.

    `values` are the evidence's scores.

    Exact Shapley values (Shapley 1953) of the squared score L², divided by L + R, where R is the
    score of the median normal image ("ordinary image"): since (L² - R²) / (L + R) + R = L, they, R
    and what "feedback" changed, where there was any, add up to the score. A group that is left out
    takes the median's value. The square is a sum, in which a score's share is its own squared
    surprisal; only the density of the statistics is a game, of four players.
    """
    fusion, density = scorer.fusion, scorer.typicality
    told = fusion.surprisals(experts_of(values)).square()
    at_rest = torch.zeros_like(fusion.weights)  # the median normal; constant scores say nothing
    counted = fusion.quantiles.kept
    resting = fusion.weights[counted] * surprisal(torch.zeros((), dtype=told.dtype))
    at_rest[counted] = resting.square()
    z = density.quantiles(scorer.statistics(e, values["mahalanobis"]))
    kept = density.quantiles.kept.tolist()
    columns = {n: [i for i, k in enumerate(kept) if k in range(*s)] for n, s in GROUPS.items()}
    game = {
        c: _typicality_told(scorer, values, density.density(_seen(z, c, columns)))
        for c in _coalitions(tuple(GROUPS))
    }
    shares = dict(zip(EXPERTS, (told - at_rest).T, strict=True))
    del shares["typicality"]
    shares |= {name: _share(name, game) for name in GROUPS}
    length = told.sum(dim=1).sqrt()
    ordinary = (game[frozenset()] + at_rest.sum() - at_rest[TYPICALITY]).sqrt()
    both = (length + ordinary).clamp_min(1e-12)
    shares = {name: share / both for name, share in shares.items()}
    shares["ordinary image"] = ordinary
    if scorer.feedback.learned:
        shares["feedback"] = values["fused"] - length
    return shares


def _seen(z: Tensor, coalition: frozenset[str], columns: dict[str, list[int]]) -> Tensor:
    """The quantiles of the statistics in the coalition, the median's for the others."""
    out = torch.zeros_like(z)
    for name in coalition:
        out[:, columns[name]] = z[:, columns[name]]
    return out


def _typicality_told(scorer: Scorer, values: dict[str, Tensor], typicality: Tensor) -> Tensor:
    """The squared weighted surprisal (B,) of another typicality, the other scores as they are."""
    experts = experts_of(values)
    experts[:, TYPICALITY] = typicality
    return scorer.fusion.surprisals(experts)[:, TYPICALITY].square()


def _coalitions(players: tuple[str, ...]) -> list[frozenset[str]]:
    sizes = range(len(players) + 1)
    return [frozenset(c) for size in sizes for c in combinations(players, size)]


def _share(player: str, game: dict[frozenset[str], Tensor]) -> Tensor:
    """A player's Shapley value (B,), from what every coalition is worth."""
    n = max(map(len, game))
    gains = [
        factorial(len(c))
        * factorial(n - len(c) - 1)
        / factorial(n)
        * (game[c | {player}] - game[c])
        for c in game
        if player not in c
    ]
    return torch.stack(gains).sum(dim=0)


def nearest(detector: Explainable, e: Evidence) -> list[tuple[Nearest, ...]]:
    """The reference images nearest in the whitened latent space, for each image of the batch."""
    references = detector.references
    if references is None:
        return [()] * len(e.mu)
    whiten = detector.scorer.mahalanobis.whiten.cpu()
    gaps = torch.cdist(e.mu.cpu() @ whiten, references.latents @ whiten)
    found = gaps.topk(min(NEAREST, len(references.names)), dim=1, largest=False)
    return [
        tuple(_reference(references, i, d) for i, d in zip(rows, distances, strict=True))
        for rows, distances in zip(found.indices.tolist(), found.values.tolist(), strict=True)
    ]


def _reference(references: References, row: int, distance: float) -> Nearest:
    return Nearest(references.names[row], distance, references.thumbnails[row].numpy())
