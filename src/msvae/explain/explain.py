"""Why an image was flagged: maps at its own size, Grad-CAM, regions, shares and nearest normals."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from msvae.core.config import Config, Resize
from msvae.core.device import to_batch
from msvae.core.errors import ImageError
from msvae.core.progress import NullProgress, Progress
from msvae.data.images import Pixels, Source, load_image, name_of, open_image, read_bytes
from msvae.evaluation.conformal import Calibration, conformal_p
from msvae.evaluation.table import ScoreTable
from msvae.explain.explanation import Explanation, Nearest, Region, placed
from msvae.explain.gradcam import gradcams
from msvae.explain.nearest import References, nearest
from msvae.explain.shapley import fine_detail, shapley
from msvae.scores.graph import ScoringGraph
from msvae.scores.maps import signed_difference
from msvae.scores.verdict import Verdict
from msvae.viz.overlays import Map
from msvae.viz.text import reading

BATCH = 32
FAMILY_WISE = 0.01  # P(any pixel of a normal image reaches the level)


class GraphHolder(Protocol):
    """Where the torch graph of a detector lies."""

    def torch_graph(self) -> ScoringGraph:
        """The module."""


class Explainable(Protocol):
    """What of a detector is needed to explain its decisions."""

    @property
    def config(self) -> Config:
        """The settings."""

    @property
    def graph(self) -> GraphHolder:
        """The networks and all that is fitted, for gradients."""

    @property
    def verdict(self) -> Verdict:
        """What makes the scores."""

    @property
    def calibration(self) -> Calibration:
        """The scores and map maxima of held-out normal images."""

    @property
    def references(self) -> References | None:
        """What is kept of the training images."""

    def decide(self, names: Sequence[str], scores: dict[str, Any]) -> ScoreTable:
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
    ticks = (progress or NullProgress()).track(sources, "explaining", len(sources))
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
    graph, verdict = detector.graph.torch_graph(), detector.verdict
    device = next(graph.parameters()).device
    x = to_batch(np.stack([small for _, _, small in read]), device)
    with torch.no_grad():
        e = graph.networks(x)
        maps = graph.maps(e)
        numbers = graph.numbers(e, maps).cpu().double().numpy()
        maps["difference"] = signed_difference(e)
    scores = verdict(numbers)
    shares = shapley(verdict, numbers, scores)
    if gradcam:
        maps |= gradcams(graph, verdict, x, e, maps)
    arrays = {k: v.cpu().numpy().astype(np.float32) for k, v in maps.items()}
    recon = (e.recon.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    table = detector.decide([name for name, _, _ in read], scores)
    words = readings(detector.calibration, scores, fine_detail(verdict, numbers))
    whiten = graph.parts.mahalanobis.whiten.cpu().numpy()
    near = nearest(detector.references, e.mu.cpu().numpy(), whiten)
    return [
        _one(detector, table, i, image, recon[i], {k: v[i] for k, v in arrays.items()},
             {k: float(v[i]) for k, v in shares.items()}, near[i], words[i])
        for i, (_, image, _) in enumerate(read)
    ]  # fmt: skip


def _one(
    detector: Explainable,
    table: ScoreTable,
    row: int,
    image: Pixels,
    recon: Pixels,
    maps: dict[str, Map],
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
        reconstruction=recon,
        model_maps=maps,
        level=level,
        level_rate=rate,
        peaks=peaks,
        scales={k: detector.calibration.map_scale(k) for k in detector.calibration.peaks},
        regions=regions(maps["fused"], level, peaks, image, detector.config.model.resize),
        scores={k: float(v[row]) for k, v in table.scores.items()},
        p_values={k: float(v[row]) for k, v in table.p_values.items()},
        flagged=flagged,
        contributions=shares,
        nearest=near,
        readings=words,
        notes=_notes(detector, len(peaks), rate),
    )


def readings(
    calibration: Calibration, scores: Mapping[str, NDArray[np.float64]], detail: NDArray[np.float64]
) -> list[dict[str, str]]:
    """Each score (B,) of each image in words, the most telling first; `detail` are `fine_detail`s."""
    n = calibration.n
    high, low = calibration.p_values(scores), calibration.low_p_values(scores)
    tails: dict[str, NDArray[np.float64]] = {k: np.stack([high[k], low[k]], axis=1) for k in high}
    tails["detail"] = np.stack([1 - detail, detail], axis=1)
    out = []
    for row in range(len(detail)):
        names = sorted(tails, key=lambda k: float(tails[k][row].min()))
        both = {k: (float(tails[k][row, 0]), float(tails[k][row, 1])) for k in names}
        counts = {k: None if k == "detail" else n for k in names}
        out.append({k: reading(k, *both[k], counts[k]) for k in names})
    return out


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
