"""New thresholds from normal images, and what labelled examples teach; the networks stay."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from msvae.core import files
from msvae.core.config import Config
from msvae.core.errors import ConfigError, DataError
from msvae.core.progress import NullProgress, Progress, during
from msvae.data.cache import Images
from msvae.data.folder import find_images
from msvae.data.images import digest, load_image, name_of
from msvae.engine.engine import Engine
from msvae.evaluation import metrics
from msvae.evaluation.conformal import Calibration, Decision, rank
from msvae.evaluation.table import quarantine_table
from msvae.run import schema
from msvae.run.batching import FILES
from msvae.run.detector import Detector, load
from msvae.run.examples import Examples, LabelledExamples, decode_examples, examples_of, taught
from msvae.run.leakage import check_examples, check_not_trained, digests_of
from msvae.run.parts import batches
from msvae.run.precision import NOT_TRIED, TRIED, is_tried, trial_batches, try_bfloat16
from msvae.run.score import Maps, Scan, score_batches
from msvae.run.store import CALIBRATED, QUARANTINE
from msvae.scores.verdict import Verdict


def decision_of(config: Config) -> Decision:
    """The decision that the settings ask for, before anything was learned for it."""
    d = config.decide
    if d.rule == "f1":
        raise ConfigError(
            "decide.rule = f1 needs labelled images: fit first, then msvae calibrate --rule f1"
        )
    if d.rule == "fixed":
        return Decision("fixed", "weighted", d.target_fpr, d.threshold)
    return Decision("conformal", "fused", d.target_fpr)


def calibrate_pixels(
    engine: Engine, verdict: Verdict, pixels: Images, progress: Progress
) -> Calibration:
    """Scores and map maxima of held-out normal images (N, S, S, 3)."""
    peaks: dict[str, list[Any]] = {}

    def keep(maps: Maps) -> None:
        for name, values in maps.items():
            peaks.setdefault(name, []).append(values.max(axis=(1, 2)).astype(np.float64))

    given = batches(pixels, FILES, progress, "calibrating")
    scores, _ = score_batches(engine, verdict, given, each=keep)
    return Calibration(scores, {k: np.concatenate(v) for k, v in peaks.items()})


def calibrated_csv(normals: Sequence[Path], examples: Examples | None = None) -> bytes:
    """Which images a run was calibrated on, and taught by, so that none is tested on."""
    shown = [] if examples is None else [Path(p) for kind in examples for p in kind]  # type: ignore[arg-type]
    known = {**digests_of(normals), **digests_of(shown)}
    return files.as_csv([["path", "sha256"], *known.items()])


def calibrate(
    run: str | Path,
    normals: str | Path | Sequence[str | Path] = (),
    *,
    rule: str = "conformal",
    threshold: float | None = None,
    anomalous: str | Path | Sequence[str | Path] = (),
    target_fpr: float | None = None,
    feedback: str | Path | Examples | None = None,
    engine: str | None = None,
    progress: Progress | None = None,
) -> Detector:
    """New thresholds for a run from normal images that were not trained on; nothing is trained.

    `normals` are folders, files or globs; with `feedback` (labelled examples, as for `msvae.fit`) they
    may be left out, and the run's own conformal images serve again. `rule` is `conformal`; `fixed`, by
    the weighted score and `threshold`; or `f1`, the threshold that is best against labelled
    `anomalous` images. Images that cannot be read are named in RUN/quarantine.csv.

    Raises `ConfigError`, `DataError` or `RateError`, each with the remedy.
    """
    run = Path(run)
    detector = load(run, engine)
    if not normals and feedback is None:
        raise ConfigError("calibrate needs NORMALS: normal images that were not trained on")
    paths: Sequence[Path] = find_images(normals).paths if normals else part_of(run, "conformal")
    check_not_trained(run, paths)
    examples = None if feedback is None else examples_of(feedback)
    exact = {k: v for k, v in detector.facts.items() if k != "precision"}
    detector, scan = recalibrate(
        replace(detector, facts=exact),  # in float32, the reference
        paths,
        rule=rule,
        threshold=threshold,
        anomalous=find_images(anomalous).paths if anomalous else (),
        target_fpr=target_fpr,
        feedback=examples,
        ordinary=part_of(run, "stop") if examples else (),
        progress=progress,
    )
    detector = _with_precision(detector, scan.table.paths, progress or NullProgress())
    beside = {CALIBRATED: calibrated_csv(paths, examples)}
    if scan.quarantine:
        beside[QUARANTINE] = files.as_csv(quarantine_table(scan.quarantine))
    detector.save_calibration(run, beside)
    return detector


def _with_precision(detector: Detector, names: Sequence[str], progress: Progress) -> Detector:
    """The detector, allowed bfloat16 or not anew, by the images that it was calibrated on."""
    c = detector.config.model
    if not is_tried(detector.engine, detector.config):
        return replace(detector, facts={**detector.facts, "precision": NOT_TRIED})

    def measured() -> dict[str, Any]:
        pixels = np.stack([load_image(n, c.image_size, c.resize) for n in names[:TRIED]])
        return try_bfloat16(
            detector.graph,
            detector.verdict,
            detector.calibration,
            detector.decision,
            trial_batches(pixels),
        )

    facts = {**detector.facts, "precision": during(progress, "trying bfloat16", measured)}
    return replace(detector, facts=facts)


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
        examples = decode_examples(examples_of(feedback), detector.config)
        check_examples(examples, [(digest(s), name_of(s, i)) for i, s in enumerate(normals)])
        detector = teach(detector, ordinary, examples)
    peaks: dict[str, list[float]] = {}

    def keep(_: str, maps: Maps) -> None:
        for name, values in maps.items():
            peaks.setdefault(name, []).append(float(values.max()))

    scan = detector.scan(normals, each_map=keep, progress=progress)
    rank(rate, len(scan.table))
    held = {k: np.array(v, dtype=np.float64) for k, v in peaks.items()}
    calibration = Calibration(dict(scan.table.scores), held)
    if rule == "f1":
        odd = detector.scan(anomalous, progress=progress).table.scores["fused"]
        best = metrics.best_f1_threshold(scan.table.scores["fused"], odd)
        decision = Decision("f1", "fused", rate, best)
    elif rule == "fixed":
        value = detector.config.decide.threshold if threshold is None else threshold
        decision = Decision("fixed", "weighted", rate, value)
    else:
        decision = Decision("conformal", "fused", rate)
    return detector.calibrated(calibration, decision), scan


def teach(detector: Detector, ordinary: Sequence[Any], examples: LabelledExamples) -> Detector:
    """The detector with its fusion turned to what the examples show; its thresholds are void."""
    if not len(ordinary):
        raise DataError("feedback needs ordinary images to tell the examples from: name some")
    c = detector.config.model
    pixels = np.stack([load_image(s, c.image_size, c.resize) for s in ordinary])
    return replace(detector, verdict=taught(detector.engine, detector.verdict, pixels, examples))


def part_of(run: Path, part: str) -> list[Path]:
    """The images of a part of the run, where they still lie; `DataError` where one is gone."""
    paths = [Path(r["path"]) for r in schema.table(run / "split.csv") if r["part"] == part]
    gone = [p for p in paths if not p.is_file()]
    if gone or not paths:
        raise DataError(
            f"{gone[0] if gone else run}: the {part} part of the run is not there any more "
            f"({len(gone)} images): put it back, or fit again with --feedback"
        )
    return paths
