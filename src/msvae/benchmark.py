"""A named benchmark = data + protocol + evaluation. The protocols stand in docs/benchmarks.md.

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

from msvae import __version__, files, metrics
from msvae.ablation import variants
from msvae.calibration import threshold
from msvae.config import Config
from msvae.data import datasets
from msvae.data.cache import Decoded, Images, decode, default_cache_dir
from msvae.data.folder import Sample, find_labelled
from msvae.data.images import Pixels
from msvae.data.split import number_gap_groups, text_sha256
from msvae.detector import Detector, Scan
from msvae.errors import ConfigError, DataError
from msvae.evaluate import Evaluation, at_threshold, evaluate, judge
from msvae.faithfulness import evenly, faithfulness
from msvae.feedback import Feedback
from msvae.fitting import Part, Parts, batches, check_free, fit, fit_parts, told
from msvae.progress import Progress
from msvae.report import ablation_markdown
from msvae.scorer import Told
from msvae.table import ScoreTable
from msvae.workflow import Evaluated, evaluate_samples, history_of, write_evaluation

Protocol = Literal["native", "equalised"]
SIDES: dict[Protocol, int] = {"equalised": 32, "native": 64}
VALIDATION = 1020  # CIFAR images 0…1019 choose the best-F1 threshold, those after them are feedback
TESTED_FROM = 2000  # images before these never enter the test part
DRAWS = 5  # of the labelled anomalies that are feedback
STOP_SHARE = 0.05
TEST_GROUPS = 0.2  # of the magnetic tiles' groups
DEFECT_SIDE = 128  # px of the industrial benchmarks, unless said

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
        history = history_of(out / protocol)
        judged = out / protocol / "evaluation"
        write_evaluation(judged, evaluation.to_json(), scan, history)
        rows = np.array(evenly(range(len(data.test_anomalous.pixels))))
        tested = faithfulness(detector, data.test_anomalous.pixels[rows], progress=progress)
        evaluation = replace(evaluation, explanations=tested)
        files.write_json(judged / "metrics.json", evaluation.to_json())
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
    decoded = decode(flowers.paths, side, "square", cache=default_cache_dir(), progress=progress)
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
        return detector.run(batches(pixels, detector.device, progress, task))[0]

    began = time.perf_counter()
    normal = scored(data.test_normal.pixels, "scoring normals")
    anomalous = scored(data.test_anomalous.pixels, "scoring anomalies")
    seconds = {"fit": fit_seconds, "score": time.perf_counter() - began}
    validation = scored(data.validation, "scoring validation")
    stop = scored(data.parts.stop.pixels, "scoring stop part")
    table = _labelled(detector, (data.test_normal, normal), (data.test_anomalous, anomalous))
    rate = detector.decision.target_fpr
    evaluation = evaluate(
        "flowers-cifar10",
        table,
        frozen_thresholds=detector.thresholds(),
        best_f1_thresholds={k: metrics.best_f1_threshold(stop[k], validation[k]) for k in stop},
        n_conformal=detector.calibration.n,
        target_fpr=rate,
        image_size=detector.config.model.image_size,
        seconds=seconds,
        variants=variants(detector.scorer.fusion, table.scores),
    )
    return evaluation, Scan(table, ())


def with_feedback(
    detector: Detector, data: FlowersCifar, count: int, progress: Progress
) -> dict[str, Any]:
    """The fused score's figures after `count` labelled anomalies: the mean of five draws.

    Of each draw the threshold is set anew on the conformal part, which no example enters. Accuracy
    and F1 follow from the mean rates.
    """

    def read(pixels: Images, task: str) -> Told:
        return told(detector.scoring, detector.scorer, pixels, progress, task)

    stop = read(data.parts.stop.pixels, "feedback: stop part")
    pool = read(data.feedback, "feedback: examples")
    validation = read(data.validation, "feedback: validation")
    conformal = read(data.parts.conformal.pixels, "feedback: conformal part")
    normal = read(data.test_normal.pixels, "feedback: normals")
    anomalous = read(data.test_anomalous.pixels, "feedback: anomalies")
    fused = np.concatenate([normal[1].numpy(), anomalous[1].numpy()])
    labels = np.repeat([0, 1], [len(normal[1]), len(anomalous[1])]).astype(np.int64)
    drawn = []
    for seed in range(DRAWS):
        rows = np.random.default_rng(seed).choice(len(data.feedback), count, replace=False)
        shown = (pool[0][rows], pool[1][rows])
        taught = Feedback.fit(stop, (pool[0][:0], pool[1][:0]), shown)
        scores = np.concatenate([taught(*normal).numpy(), taught(*anomalous).numpy()])
        frozen = threshold(taught(*conformal).numpy(), detector.decision.target_fpr)
        best = metrics.best_f1_threshold(taught(*stop).numpy(), taught(*validation).numpy())
        rules = {"frozen": frozen, "best_f1": best}
        rates = {rule: at_threshold(labels, scores, value) for rule, value in rules.items()}
        drawn.append(judge(labels, scores, fused) | rates)
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
        detector.table([*good.names, *bad.names], joined),
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


def one_sided_note(block: dict[str, Any]) -> str:
    """What became of the seed's own weighted score, in a sentence."""
    area = block["scores"]["weighted"]["auroc"]
    if area >= 0.5:
        return f"The seed's weighted score, one-sided as it is defined, reaches {area:.3f} here."
    return (
        f"The seed's weighted score reaches {area:.3f}, worse than guessing: these anomalies are "
        "smoother than flowers, so they are rebuilt with less error than normal images, and a "
        "one-sided error calls them more normal still. Read two-sidedly, the same numbers tell "
        f"them apart (typicality {block['scores']['typicality']['auroc']:.3f})."
    )


def mvtec(
    data_dir: Path,
    category: str,
    out: Path,
    config: Config,
    *,
    overwrite: bool,
    progress: Progress,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """One MVTec AD category: fit on train/good, judge on test; `out` becomes a loadable run."""
    root = datasets.mvtec(data_dir, category)
    began = time.perf_counter()
    detector = fit(
        root, out, config=config, overwrite=overwrite, progress=progress, say=say
    )  # train/good only
    seconds = {"fit": time.perf_counter() - began}
    return _judged(f"mvtec-{category}", detector, find_labelled(root), out, seconds, progress)


def magnetic_tile(
    data_dir: Path,
    out: Path,
    config: Config,
    *,
    overwrite: bool,
    progress: Progress,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Magnetic Tile Defects, split by groups of neighbouring numbers; `out` becomes a run."""
    tiles = datasets.magnetic_tile(data_dir)
    names = [str(p) for p in tiles.normal]
    groups = number_gap_groups(names)
    held = set(groups_for_test(groups))
    train = [p for p, group in zip(tiles.normal, groups, strict=True) if group not in held]
    normal = [p for p, group in zip(tiles.normal, groups, strict=True) if group in held]
    say(f"{len(set(groups))} groups of neighbouring tiles, {len(held)} of them for the test")
    began = time.perf_counter()
    detector = fit(
        train,
        out,
        config=config,
        group_by=number_gap_groups,
        overwrite=overwrite,
        progress=progress,
        say=say,
    )
    seconds = {"fit": time.perf_counter() - began}
    samples = [*[Sample(p, 0, "good") for p in normal], *tiles.anomalous]
    return _judged("magnetic-tile", detector, samples, out, seconds, progress)


def groups_for_test(groups: Sequence[str]) -> list[str]:
    """The first fifth of the groups, by the sha256 of their names."""
    ordered = sorted(set(groups), key=text_sha256)
    return ordered[: -(-len(ordered) // round(1 / TEST_GROUPS))]


def _judged(
    name: str,
    detector: Detector,
    samples: Sequence[Sample],
    out: Path,
    seconds: dict[str, float],
    progress: Progress,
) -> dict[str, Any]:
    judged: Evaluated = evaluate_samples(
        detector,
        samples,
        out / "evaluation",
        name=name,
        seconds=seconds,
        progress=progress,
        history=history_of(out),
    )
    result = judged.evaluation.to_json()
    files.write_json(out / "metrics.json", {"benchmark": name, "msvae": __version__, **result})
    return result


def write_ablation(results: Sequence[dict[str, Any]], path: Path) -> None:
    """The ablation of several benchmarks' results side by side, as a Markdown table."""
    sets = dict[str, Any]()
    for result in results:
        if "protocols" in result:
            sets |= {f"flowers-cifar10 {k}": block for k, block in result["protocols"].items()}
        else:
            sets[result["evaluation"]] = result
    files.write_text(path, ablation_markdown(sets))
