"""What a verb does beyond one call of the library: evaluate a run, recalibrate it, demonstrate it."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msvae import config as settings
from msvae import explanation, figures, files, metrics, pictures
from msvae.ablation import variants
from msvae.calibration import Calibration, Decision, rank
from msvae.data.folder import Sample, find_labelled, warn_of
from msvae.data.images import (
    digest,
    image_size,
    load_image,
    load_mask,
    name_of,
    open_image,
    squared,
)
from msvae.data.split import check_disjoint
from msvae.data.textures import write_demo
from msvae.detector import Detector, EachMap, Maps, Scan
from msvae.errors import ConfigError, DataError, ImageError
from msvae.evaluate import Evaluation, evaluate
from msvae.faithfulness import LIMIT, evenly, faithfulness
from msvae.fitting import (
    Examples,
    Shown,
    examples_of,
    fit,
    refuse_shown,
    shown_examples,
    taught,
)
from msvae.progress import Progress, Silent
from msvae.table import ScoreTable, write_quarantine

Say = Callable[[str], None]
CALIBRATED = "calibrated.csv"  # in a run: the images of its last calibration
DEMO_TESTED = 24  # images whose maps the demo tests: it has to be quick
MAP_SIDE = 512  # px of a map's picture at most


@dataclass(frozen=True)
class Evaluated:
    """An evaluation and what it was computed from."""

    evaluation: Evaluation
    scan: Scan
    masks: NDArray[np.bool_] | None  # (N, H, W)


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
    began, scorer = time.perf_counter(), detector.scorer
    progress, masked = progress or Silent(), any(s.mask for s in samples)
    scan = detector.scan([s.path for s in samples], with_maps=masked, progress=progress)
    spent = {**(seconds or {}), "score": time.perf_counter() - began}
    by_path = {str(s.path): s for s in samples}
    kept = [by_path[p] for p in scan.table.paths]
    table = replace(
        scan.table,
        labels=np.array([s.label for s in kept], dtype=np.int64),
        kinds=tuple(s.kind for s in kept),
    )
    masks = masks_of(kept, detector.config.model.image_size, detector.config.model.resize)
    evaluation = evaluate(
        name,
        table,
        frozen_thresholds=detector.thresholds(),
        n_conformal=detector.calibration.n,
        target_fpr=detector.decision.target_fpr,
        maps=scan.maps if masks is not None else None,
        masks=masks,
        image_size=detector.config.model.image_size,
        seconds=spent,
        variants=None if scorer.feedback.learned else variants(scorer.fusion, table.scores),
    )
    scan = replace(scan, table=table)
    write_evaluation(out, evaluation.to_json(), scan, history)
    figures_of_maps = tested_maps(detector, kept, masks, tested, progress)
    evaluation = replace(evaluation, explanations=figures_of_maps)
    files.write_json(out / "metrics.json", evaluation.to_json())
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
    pixels = np.stack([load_image(samples[i].path, c.image_size, c.resize) for i in rows])
    held = None if masks is None else masks[rows]
    return faithfulness(detector, pixels, held, progress=progress)


def write_evaluation(
    out: Path, metrics_json: dict[str, Any], scan: Scan, history: Sequence[Any]
) -> None:
    """The files of an evaluation, in `out`."""
    files.write_json(out / "metrics.json", metrics_json)
    scan.table.write_csv(out / "scores.csv")
    write_quarantine(out / "quarantine.csv", scan.quarantine)
    draw_figures(out, scan.table, history)


def draw_figures(out: Path, table: ScoreTable, history: Sequence[Any]) -> None:
    """ROC, precision-recall, score distribution and training curves, as PNG and SVG."""
    assert table.labels is not None
    drawn = {
        "roc": figures.roc_figure(table.labels, table.scores),
        "precision_recall": figures.precision_recall_figure(table.labels, table.scores),
        "distribution": figures.distribution_figure(table.labels, table.scores["fused"]),
    }
    if history:
        drawn["training"] = figures.training_figure(history)
    for name, figure in drawn.items():
        figures.save(figure, out / name)


def masks_of(samples: Sequence[Sample], size: int, resize: Any) -> NDArray[np.bool_] | None:
    """The masks at the model's resolution, (N, H, W), empty for images without; None if all are."""
    if not any(s.mask for s in samples):
        return None
    spool = files.Spool()
    wrong = list[Path]()
    for s in samples:
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


def refuse_leak(run: Path, samples: Sequence[Sample]) -> None:
    """Raise `DataError` when a test image has the content of one the run was fitted on."""
    rows = [*files.read_rows(run / "split.csv"), *files.read_rows(run / CALIBRATED)]
    known = digests_of([s.path for s in samples])
    check_disjoint([row["sha256"] for row in rows], list(known.values()), list(known))


def digests_of(paths: Sequence[Path]) -> dict[str, str]:
    """The sha256 of each file by its path; one that cannot be read is left to the scan to list."""
    found = {}
    for path in paths:
        with suppress(ImageError):
            found[str(path)] = digest(path)
    return found


def write_calibrated(run: Path, normals: Sequence[Path], examples: Examples | None = None) -> None:
    """Keep which images the run was calibrated on, and taught by, so that none is tested on."""
    shown = [] if examples is None else [Path(p) for kind in examples for p in kind]  # type: ignore[arg-type]
    known = {**digests_of(normals), **digests_of(shown)}
    files.write_rows(run / CALIBRATED, [{"path": k, "sha256": v} for k, v in known.items()])


def history_of(run: Path) -> list[dict[str, float]]:
    """The rows of `history.csv` as numbers."""
    rows = files.read_rows(run / "history.csv")
    return [{k: float(v) for k, v in row.items()} for row in rows]


def recalibrate(
    detector: Detector,
    normals: Sequence[Any],
    *,
    rule: str,
    anomalous: Sequence[Any] = (),
    threshold: float | None = None,  # of the weighted score
    target_fpr: float | None = None,
    feedback: str | Path | Examples | None = None,
    ordinary: Sequence[Any] = (),
    progress: Progress | None = None,
) -> tuple[Detector, Scan]:
    """New thresholds from normal images that were not trained on; the model stays as it is.

    `feedback` are labelled examples, as for `msvae.fit`, that turn the fusion against `ordinary`
    images: normal ones that are neither trained on nor among `normals`, such as the stop part.

    `rule` "f1" chooses the fused threshold that is best on these normals and labelled `anomalous`
    images at equal prevalence; "fixed" flags by the weighted score.
    """
    rate = detector.decision.target_fpr if target_fpr is None else target_fpr
    rank(rate, len(normals))
    if rule == "f1" and not anomalous:
        raise ConfigError("--rule f1 needs labelled anomalies: name them with --anomalous")
    if feedback is not None:
        shown = shown_examples(examples_of(feedback), detector.config)
        refuse_shown(shown, [(digest(s), name_of(s, i)) for i, s in enumerate(normals)])
        detector = teach(detector, ordinary, shown)
    peaks: dict[str, list[float]] = {}

    def keep(_: str, found: Maps) -> None:
        for name, drawn in found.items():
            peaks.setdefault(name, []).append(float(drawn.max()))

    scan = detector.scan(normals, each_map=keep, progress=progress)
    rank(rate, len(scan.table))
    held = {k: np.array(v, dtype=np.float64) for k, v in peaks.items()}
    calibration = Calibration(dict(scan.table.scores), held)
    if rule == "f1":
        found = detector.scan(anomalous, progress=progress).table.scores["fused"]
        best = metrics.best_f1_threshold(scan.table.scores["fused"], found)
        decision = Decision("f1", "fused", rate, best)
    elif rule == "fixed":
        value = detector.config.decide.threshold if threshold is None else threshold
        decision = Decision("fixed", "weighted", rate, value)
    else:
        decision = Decision("conformal", "fused", rate)
    return detector.recalibrated(calibration, decision), scan


def teach(detector: Detector, ordinary: Sequence[Any], shown: Shown) -> Detector:
    """The detector with its fusion turned to what the examples show; its thresholds are void."""
    if not len(ordinary):
        raise DataError("feedback needs ordinary images to tell the examples from: name some")
    c = detector.config.model
    pixels = np.stack([load_image(s, c.image_size, c.resize) for s in ordinary])
    return replace(detector, scorer=taught(detector.scoring, detector.scorer, pixels, shown))


def part_of(run: Path, part: str) -> list[Path]:
    """The images of a part of the run, where they still lie; `DataError` where one is gone."""
    paths = [Path(r["path"]) for r in files.read_rows(run / "split.csv") if r["part"] == part]
    gone = [p for p in paths if not p.is_file()]
    if gone or not paths:
        raise DataError(
            f"{gone[0] if gone else run}: the {part} part of the run is not there any more "
            f"({len(gone)} images): put it back, or fit again with --feedback"
        )
    return paths


def refuse_trained(run: Path, normals: Sequence[Path]) -> None:
    """Raise `DataError` when calibration would use images that the run was trained on."""
    rows = files.read_rows(run / "split.csv")
    trained = {row["sha256"]: row["path"] for row in rows if row["part"] != "conformal"}
    for path, content in digests_of(normals).items():
        if content in trained:
            raise DataError(
                f"{path}: has the content of {trained[content]}, which the run was trained on: "
                "calibrate with other images"
            )


@dataclass(frozen=True)
class Demonstration:
    """What the demo made."""

    detector: Detector
    evaluated: Evaluated
    images: Path


def demonstrate(out: Path, *, seed: int, progress: Progress, say: Say) -> Demonstration:
    """Write the embedded data set below `out`, fit on its normal part, evaluate on its test part."""
    images = write_demo(out / "images", seed=seed, progress=progress)
    chosen = settings.preset("default").replace(seed=seed)
    began = time.perf_counter()
    detector = fit(images, out, config=chosen, overwrite=True, progress=progress, say=say)
    seconds = {"fit": time.perf_counter() - began}
    evaluated = evaluate_samples(
        detector,
        find_labelled(images),
        out / "evaluation",
        name="demo",
        seconds=seconds,
        progress=progress,
        history=history_of(out),
        tested=DEMO_TESTED,
    )
    return Demonstration(detector, evaluated, images)


def map_writer(out: Path, paths: Sequence[str], detector: Detector) -> EachMap:
    """Writes the fused map of each image it is given: `<stem>.png` to look at, `<stem>.tiff` floats.

    The picture is at most 512 px a side; the TIFF holds the values at the model's resolution.
    """
    stems = files.unique_stems(paths)
    c = detector.config.model
    level, _ = detector.calibration.map_level()

    def write(name: str, found: Maps) -> None:
        fused = found["fused"]
        whole = squared(open_image(name), c.resize)
        image = pictures.shrink(np.asarray(whole), MAP_SIDE)
        low = float(np.median(fused))
        drawn = pictures.overlay(image, fused, low, max(level, float(fused.max()), low + 1e-6))
        files.write_bytes(out / f"{stems[name]}.png", pictures.as_bytes(drawn, "PNG"))
        files.write_bytes(out / f"{stems[name]}.tiff", pictures.as_bytes(fused, "TIFF"))

    return write


def write_explanations(
    detector: Detector, paths: Sequence[str], out: Path, progress: Progress
) -> tuple[list[Path], list[ImageError]]:
    """`<stem>.png` and `<stem>.json` of each image; a path hash in the stem where stems collide.

    Raises `DataError` when none of them can be read.
    """
    stems = files.unique_stems(paths)
    written: list[Path] = []
    refused: list[ImageError] = []
    for path in progress.track(paths, "explaining", len(paths)):
        try:
            explained = detector.explain(path)
        except ImageError as error:
            refused.append(error)
            continue
        target = out / f"{stems[path]}.png"
        files.write_bytes(target, figures.as_bytes(explanation.figure(explained), "png"))
        files.write_json(target.with_suffix(".json"), explained.to_json())
        written.append(target)
    if not written:
        raise DataError(f"none of {len(paths)} images could be read, first {refused[0]}")
    return written, refused
