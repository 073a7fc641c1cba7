"""A run judged on labelled images: every score, the maps, and whether they explain."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msvae.core import files
from msvae.core.errors import ConfigError, ImageError
from msvae.core.progress import NullProgress, Progress, during
from msvae.core.replacement import check_folder, replacing
from msvae.data.folder import Sample, find_labelled, find_pairs, warn_of
from msvae.data.images import (
    image_size,
    load_image,
)
from msvae.data.masks import load_mask
from msvae.evaluation.evaluation import Evaluation, evaluate_table
from msvae.evaluation.table import ScoreTable, quarantine_table
from msvae.explain.faithfulness import LIMIT, evenly, faithfulness
from msvae.run import schema
from msvae.run.detector import Detector, load
from msvae.run.leakage import check_leakage
from msvae.run.score import Scan
from msvae.scores.ablation import variants
from msvae.viz import curves as figures

Say = Callable[[str], None]


@dataclass(frozen=True)
class Evaluated:
    """An evaluation and what it was computed from."""

    evaluation: Evaluation
    scan: Scan
    masks: NDArray[np.bool_] | None  # (N, H, W)


def evaluate(
    run: str | Path,
    dataset: str | Path | None = None,
    *,
    normal: str | Path | None = None,
    anomalous: str | Path | None = None,
    masks: str | Path | None = None,
    out: str | Path | None = None,
    engine: str | None = None,
    progress: Progress | None = None,
) -> Evaluated:
    """Judge a run on labelled images, and write the figures to `out`, else to RUN/evaluation.

    `dataset` is a tree in the MVTec layout; or name folders of `normal` and of `anomalous` images,
    and of `masks` of these. `engine` computes, as for `msvae.load`.

    Raises `DataError` where an image is one that the run was made with, and `ConfigError` where
    neither a data set nor both folders are named.
    """
    run = Path(run)
    target = run / "evaluation" if out is None else Path(out)
    check_folder(target)
    if dataset is not None:
        samples, name = find_labelled(dataset), Path(dataset).resolve().name
    elif normal is not None and anomalous is not None:
        samples = find_pairs(normal, anomalous, masks)
        name = Path(anomalous).resolve().name
    else:
        raise ConfigError("evaluate needs a DATASET, or both --normal DIR and --anomalous DIR")
    detector = load(run, engine)
    check_leakage(run, samples)
    return evaluate_samples(
        detector,
        samples,
        target,
        name=name,
        progress=progress,
        history=history_of(run),
    )


def evaluate_samples(
    detector: Detector,
    samples: Sequence[Sample],
    out: Path,
    *,
    name: str,
    seconds: dict[str, float] | None = None,
    progress: Progress | None = None,
    history: Sequence[dict[str, Any]] = (),
    tested: int = LIMIT,
) -> Evaluated:
    """Score labelled images; write `metrics.json`, `scores.csv`, `quarantine.csv` and the figures.

    The maps of at most `tested` anomalous images are tested.
    """
    began, verdict = time.perf_counter(), detector.verdict
    progress, masked = progress or NullProgress(), any(s.mask for s in samples)
    scan = detector.scan([s.path for s in samples], with_maps=masked, progress=progress)
    spent = {**(seconds or {}), "score": time.perf_counter() - began}
    by_path = {str(s.path): s for s in samples}
    kept = [by_path[p] for p in scan.table.paths]
    table = replace(
        scan.table,
        labels=np.array([s.label for s in kept], dtype=np.int64),
        kinds=tuple(s.kind for s in kept),
    )
    c = detector.config.model
    masks = masks_of(kept, c.image_size, c.resize, progress)
    evaluation = evaluate_table(
        name,
        table,
        frozen_thresholds=detector.thresholds(),
        n_conformal=detector.calibration.n,
        target_fpr=detector.decision.target_fpr,
        maps=scan.maps if masks is not None else None,
        masks=masks,
        image_size=c.image_size,
        seconds=spent,
        variants=None if verdict.feedback.learned else variants(verdict.fusion, table.scores),
        progress=progress,
    )
    scan = replace(scan, table=table)
    figures_of_maps = tested_maps(detector, kept, masks, tested, progress)
    evaluation = replace(evaluation, explanations=figures_of_maps)
    write_evaluation(out, evaluation.to_json(), scan, history, progress)
    return Evaluated(evaluation, scan, masks)


def tested_maps(
    detector: Detector,
    samples: Sequence[Sample],
    masks: NDArray[np.bool_] | None,
    limit: int,
    progress: Progress,
) -> dict[str, dict[str, float]]:
    """Do the maps explain? On an even choice of at most `limit` anomalous images."""
    c = detector.config.model
    rows = evenly([i for i, s in enumerate(samples) if s.label == 1], limit)
    tracked = progress.track(rows, "reading images", len(rows))
    pixels = np.stack([load_image(samples[i].path, c.image_size, c.resize) for i in tracked])
    held = None if masks is None else masks[rows]
    return faithfulness(
        detector.graph.torch_graph(), detector.verdict, pixels, held, progress=progress
    )


def write_evaluation(
    out: Path,
    metrics_json: dict[str, Any],
    scan: Scan,
    history: Sequence[Any],
    progress: Progress,
) -> None:
    """The files of an evaluation, in `out`, in one step."""
    drawn = during(progress, "drawing figures", lambda: draw_figures(scan.table, history))
    with replacing(out) as new:
        new.write("metrics.json", files.as_json(metrics_json))
        with new.open("scores.csv") as file:
            file.writelines(files.csv_lines(scan.table.lines()))
        new.write("quarantine.csv", files.as_csv(quarantine_table(scan.quarantine)))
        for name, data in drawn.items():
            new.write(name, data)


def draw_figures(table: ScoreTable, history: Sequence[Any]) -> dict[str, bytes]:
    """ROC, precision-recall, score distribution and training curves, as PNG and SVG files."""
    assert table.labels is not None
    drawn = {
        "roc": figures.roc_figure(table.labels, table.scores),
        "precision_recall": figures.precision_recall_figure(table.labels, table.scores),
        "distribution": figures.distribution_figure(table.labels, table.scores["fused"]),
    }
    if history:
        drawn["training"] = figures.training_figure(history)
    kinds = ("png", "svg")
    return {f"{k}.{kind}": figures.as_bytes(v, kind) for k, v in drawn.items() for kind in kinds}


def masks_of(
    samples: Sequence[Sample], size: int, resize: Any, progress: Progress | None = None
) -> NDArray[np.bool_] | None:
    """The masks at the model's resolution, (N, H, W), empty for images without; None if all are."""
    if not any(s.mask for s in samples):
        return None
    spool = files.DiskArray()
    wrong = list[Path]()
    for s in (progress or NullProgress()).track(samples, "reading masks", len(samples)):
        spool.add(_mask(s, size, resize, wrong)[None])
    if wrong:
        what = "cannot be read as a mask of its image's size: it counts for the image figures only"
        warn_of(wrong, what)
    masks = spool.array()
    return masks if masks.any() else None


def _mask(sample: Sample, size: int, resize: Any, wrong: list[Path]) -> NDArray[np.bool_]:
    """The mask, empty where there is none; one that is no good is put among the `wrong`."""
    if sample.mask is not None:
        with suppress(ImageError):
            if image_size(sample.mask) == image_size(sample.path):
                return load_mask(sample.mask, size, resize)
        wrong.append(sample.mask)
    return np.zeros((size, size), dtype=bool)


def history_of(run: Path) -> list[dict[str, float]]:
    """The rows of `history.csv` as numbers."""
    return schema.history(run / "history.csv")
