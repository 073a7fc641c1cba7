"""Oxford-102 Flowers against CIFAR-10, native and equalised; the protocol stands in docs/benchmarks.md.

Nothing is chosen on test data: the parts of the data have a type of their own, and the test part
first appears after the run is frozen.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from msvae import __version__
from msvae.core import files
from msvae.core.config import Config
from msvae.core.errors import ConfigError, DataError
from msvae.core.files import cache_dir
from msvae.core.progress import Progress
from msvae.data import datasets
from msvae.data.cache import Decoded, Images, decode
from msvae.data.images import Pixels
from msvae.evaluation import metrics
from msvae.evaluation.conformal import threshold
from msvae.evaluation.evaluation import Evaluation, at_threshold, evaluate_table, score_metrics
from msvae.evaluation.table import ScoreTable
from msvae.explain.faithfulness import evenly, faithfulness
from msvae.run.batching import FILES
from msvae.run.detector import Detector
from msvae.run.evaluate import history_of, write_evaluation
from msvae.run.examples import feedback_inputs
from msvae.run.fit import check_free, fit_parts
from msvae.run.parts import Part, Parts, batches
from msvae.run.score import Scan
from msvae.scores.ablation import variants
from msvae.scores.feedback import Feedback, FeedbackInputs

Protocol = Literal["native", "equalised"]
SIDES: dict[Protocol, int] = {"equalised": 32, "native": 64}
VALIDATION = 1020  # CIFAR images 0…1019 choose the best-F1 threshold, those after them are feedback
TESTED_FROM = 2000  # images before these never enter the test part
DRAWS = 5  # of the labelled anomalies that are feedback
STOP_SHARE = 0.05
# What the seed paper reports; its prevalence and resizing are not stated, so: quoted, not compared.
PUBLISHED = {
    "weighted": {"auroc": 0.81, "f1": 0.79, "accuracy": 0.847},
    "reconstruction": {"auroc": 0.76, "f1": 0.72},
    "mahalanobis": {"auroc": 0.78, "f1": 0.75},
}
SPLIT_NOTE = (
    "trained on the official test split (the large one), calibrated on val, tested on train"
)


@dataclass(frozen=True)
class FlowersCifar:
    """Both sets of one protocol, decoded to the same size."""

    parts: Parts
    test_normal: Part
    validation: Pixels  # anomalous, for the best-F1 threshold only
    feedback: Pixels  # anomalous, for feedback only
    test_anomalous: Part
    sources: dict[str, Any]


def flowers_cifar10(
    data_dir: Path | None,
    out: Path,
    config: Config,
    protocols: Sequence[Protocol],
    *,
    feedback: int = 0,
    overwrite: bool,
    progress: Progress,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Train, freeze and measure a model for each protocol; returns what `metrics.json` holds.

    With `feedback` the fused score is measured once more, taught by so many labelled anomalies.
    """
    if not 0 <= feedback <= TESTED_FROM - VALIDATION:
        raise ConfigError(f"--feedback {feedback}: choose 0 to {TESTED_FROM - VALIDATION} examples")
    for protocol in protocols:
        check_free(out / protocol, resume=False, overwrite=overwrite)
    result: dict[str, Any] = {
        "benchmark": "flowers-cifar10",
        "version": 1,
        "msvae": __version__,
        "seed": config.train.seed,
        **({"feedback": feedback} if feedback else {}),
    }
    blocks: dict[str, Any] = {}
    for protocol in protocols:
        say(f"protocol {protocol}: both sets at {SIDES[protocol]} px")
        data = load_flowers_cifar(data_dir, protocol, progress, say)
        chosen = config.replace(image_size=SIDES[protocol], resize="square")
        began = time.perf_counter()
        detector = fit_parts(data.parts, chosen, out / protocol, progress=progress, say=say)
        fitted = time.perf_counter() - began
        evaluation, scan = measure(detector, data, fitted, progress)
        if feedback:
            taught = {"fused_feedback": with_feedback(detector, data, feedback, progress)}
            evaluation = replace(evaluation, scores=evaluation.scores | taught)
        rows = np.array(evenly(range(len(data.test_anomalous.pixels))))
        tested = faithfulness(
            detector.graph.torch_graph(),
            detector.verdict,
            data.test_anomalous.pixels[rows],
            progress=progress,
        )
        evaluation = replace(evaluation, explanations=tested)
        history, judged = history_of(out / protocol), out / protocol / "evaluation"
        write_evaluation(judged, evaluation.to_json(), scan, history, progress)
        blocks[protocol] = protocol_block(evaluation, detector)
        result |= {"data": data.sources, "published": PUBLISHED, "protocols": dict(blocks)}
        files.write_json(out / "metrics.json", result)
    return result


def load_flowers_cifar(
    data_dir: Path | None, protocol: Protocol, progress: Progress, say: Callable[[str], None]
) -> FlowersCifar:
    """Trained on the official `test` split, calibrated on `val`, tested on `train`."""
    side = SIDES[protocol]
    flowers = datasets.flowers102(data_dir, progress=progress)
    cifar = datasets.cifar10(data_dir, progress=progress)
    if cifar.stands_in:
        say(cifar.stands_in)
    decoded = decode(flowers.paths, side, "square", cache=cache_dir(), progress=progress)
    if decoded.quarantine:
        raise DataError(f"flowers: {decoded.quarantine[0]}: the data set must be whole")
    order = sorted(flowers.test.tolist(), key=lambda i: decoded.digests[i])
    stop = order[: -(-len(order) // round(1 / STOP_SHARE))]
    train = sorted(set(order) - set(stop))
    ood = np.stack([_resized(image, side) for image in cifar.images])
    names = tuple(f"{cifar.file}#{i}" for i in range(TESTED_FROM, len(ood)))
    parts = Parts(_part(decoded, train), _part(decoded, stop), _part(decoded, flowers.val.tolist()))
    normal = {**flowers.source, "split": SPLIT_NOTE}
    anomalous = {"path": str(cifar.file), "sha256": cifar.sha256, "stands_in": cifar.stands_in}
    return FlowersCifar(
        parts,
        _part(decoded, flowers.train.tolist()),
        ood[:VALIDATION],
        ood[VALIDATION:TESTED_FROM],
        Part(ood[TESTED_FROM:], names, ()),
        {"normal": normal, "anomalous": anomalous},
    )


def _part(decoded: Decoded, rows: Sequence[int]) -> Part:
    names = tuple(decoded.names[i] for i in rows)
    return Part(decoded.some(rows), names, tuple(decoded.digests[i] for i in rows))


def _resized(image: Pixels, side: int) -> Pixels:
    if image.shape[0] == side:
        return image
    resized = Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(resized)


def measure(
    detector: Detector, data: FlowersCifar, fit_seconds: float, progress: Progress
) -> tuple[Evaluation, Scan]:
    """One protocol judged: the first look at the test part, after the run is frozen."""

    def scored(pixels: Images, task: str) -> dict[str, Any]:
        return detector.score_pixels(batches(pixels, FILES, progress, task))[0]

    began = time.perf_counter()
    normal = scored(data.test_normal.pixels, "scoring normals")
    anomalous = scored(data.test_anomalous.pixels, "scoring anomalies")
    seconds = {"fit": fit_seconds, "score": time.perf_counter() - began}
    validation = scored(data.validation, "scoring validation")
    stop = scored(data.parts.stop.pixels, "scoring stop part")
    table = _labelled(detector, (data.test_normal, normal), (data.test_anomalous, anomalous))
    rate = detector.decision.target_fpr
    evaluation = evaluate_table(
        "flowers-cifar10",
        table,
        frozen_thresholds=detector.thresholds(),
        best_f1_thresholds={k: metrics.best_f1_threshold(stop[k], validation[k]) for k in stop},
        n_conformal=detector.calibration.n,
        target_fpr=rate,
        image_size=detector.config.model.image_size,
        seconds=seconds,
        variants=variants(detector.verdict.fusion, table.scores),
        progress=progress,
    )
    return evaluation, Scan(table, ())


def with_feedback(
    detector: Detector, data: FlowersCifar, count: int, progress: Progress
) -> dict[str, Any]:
    """The fused score's figures after `count` labelled anomalies: the mean of five draws.

    Of each draw the threshold is set anew on the conformal part, which no example enters. Accuracy
    and F1 follow from the mean rates.
    """

    def inputs(pixels: Images) -> FeedbackInputs:
        return feedback_inputs(detector.engine, detector.verdict, pixels)

    parts = {
        "stop": data.parts.stop.pixels,
        "pool": data.feedback,
        "validation": data.validation,
        "conformal": data.parts.conformal.pixels,
        "normal": data.test_normal.pixels,
        "anomalous": data.test_anomalous.pixels,
    }
    tracked = progress.track(parts.items(), "feedback", len(parts))
    read = {name: inputs(pixels) for name, pixels in tracked}
    both = (read["normal"], read["anomalous"])
    fused = np.concatenate([part.fused for part in both])
    labels = np.repeat([0, 1], [len(part.fused) for part in both]).astype(np.int64)
    drawn = []
    for seed in range(DRAWS):
        rows = np.random.default_rng(seed).choice(len(data.feedback), count, replace=False)
        pool = read["pool"]
        shown = FeedbackInputs(pool.features[rows], pool.fused[rows])
        none = FeedbackInputs(pool.features[:0], pool.fused[:0])
        taught = Feedback.fit(read["stop"], none, shown)
        scores = np.concatenate([taught(part) for part in both])
        frozen = threshold(taught(read["conformal"]), detector.decision.target_fpr)
        best = metrics.best_f1_threshold(taught(read["stop"]), taught(read["validation"]))
        rules = {"frozen": frozen, "best_f1": best}
        rates = {rule: at_threshold(labels, scores, value) for rule, value in rules.items()}
        drawn.append(score_metrics(labels, scores, fused) | rates)
    out = {**mean_of(drawn), "auroc_of_draws": [block["auroc"] for block in drawn]}
    for rule in ("frozen", "best_f1"):
        accuracy, f1 = metrics.balanced_accuracy_f1(out[rule]["tpr"], out[rule]["fpr"])
        out[rule] |= {"accuracy": accuracy, "f1": f1}
    return out


def mean_of(blocks: Sequence[Any]) -> Any:
    """The mean of each number in blocks of the same form."""
    first = blocks[0]
    if isinstance(first, dict):
        return {key: mean_of([block[key] for block in blocks]) for key in first}
    if isinstance(first, tuple):
        return tuple(mean_of(values) for values in zip(*blocks, strict=True))
    return sum(blocks) / len(blocks)


def _labelled(
    detector: Detector,
    normal: tuple[Part, dict[str, Any]],
    anomalous: tuple[Part, dict[str, Any]],
) -> ScoreTable:
    """One table of both classes."""
    (good, good_scores), (bad, bad_scores) = normal, anomalous
    joined = {k: np.concatenate([good_scores[k], bad_scores[k]]) for k in good_scores}
    counts = (len(good.names), len(bad.names))
    return replace(
        detector.decide([*good.names, *bad.names], joined),
        labels=np.repeat([0, 1], counts).astype(np.int64),
        kinds=("flower",) * counts[0] + ("cifar-10",) * counts[1],
    )


def protocol_block(evaluation: Evaluation, detector: Detector) -> dict[str, Any]:
    """One protocol's entry in `metrics.json`; the rate of the fit is of whole images, not of passes."""
    block = evaluation.block()
    sizes, n = detector.facts["n"], evaluation.n
    seconds = evaluation.seconds
    return {
        **block,
        "n": {
            "train": sizes["train"] + sizes["stop"],
            "conformal": sizes["conformal"],
            "test_normal": n["normal"],
            "test_anomalous": n["anomalous"],
        },
        "images_per_second": {
            "fit": sizes["train"] / seconds["fit"],
            "score": (n["normal"] + n["anomalous"]) / seconds["score"],
        },
    }
