"""A table with labels -> an Evaluation: every score side by side, with intervals."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from msvae.core.errors import DataError
from msvae.core.progress import NullProgress, Progress
from msvae.evaluation import metrics
from msvae.evaluation.metrics import Floats, Ints
from msvae.evaluation.pixel_metrics import pixel_metrics
from msvae.evaluation.table import ScoreTable

VERSION = 1


@dataclass(frozen=True)
class Evaluation:
    """What `metrics.json` says of one table."""

    name: str
    n: dict[str, int]
    image_size: int
    scores: dict[str, dict[str, Any]]
    false_alarm: dict[str, Any]
    seconds: dict[str, float]
    maps: dict[str, dict[str, float]] | None = None
    explanations: dict[str, dict[str, float]] | None = None
    ablation: dict[str, dict[str, Any]] | None = None

    def to_json(self) -> dict[str, Any]:
        """The form of a folder evaluation."""
        head: dict[str, Any] = {"evaluation": self.name, "version": VERSION}
        return head | self.block()

    def block(self) -> dict[str, Any]:
        """The form of one protocol of a benchmark."""
        out: dict[str, Any] = {
            "n": self.n,
            "image_size": self.image_size,
            "scores": self.scores,
            "false_alarm": self.false_alarm,
            "seconds": self.seconds,
        }
        more = {
            "maps": self.maps,
            "explanations": self.explanations,
            "ablation": self.ablation,
        }
        return out | {key: block for key, block in more.items() if block is not None}


def evaluate_table(
    name: str,
    table: ScoreTable,
    *,
    frozen_thresholds: Mapping[str, float],
    n_conformal: int,
    target_fpr: float,
    image_size: int,
    seconds: Mapping[str, float],
    best_f1_thresholds: Mapping[str, float] | None = None,
    maps: Mapping[str, Any] | None = None,
    masks: Any = None,
    variants: Mapping[str, Floats] | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Judge every score of a labelled table at thresholds that were fixed before.

    `maps` and `masks` are one (H, W) array an image, in the order of the table. An anomalous image
    with an empty mask counts for the image figures only. `variants` are other fused scores. Raises
    `DataError` without both classes.
    """
    labels = table.labels
    if labels is None or len(np.unique(labels)) < 2:
        raise DataError("an evaluation needs normal and anomalous images: add the missing kind")
    fused, track = table.scores.get("fused"), (progress or NullProgress()).track
    scores = {}
    for key, values in track(table.scores.items(), "judging scores", len(table.scores)):
        beside = None if key == "fused" else fused
        scores[key] = score_metrics(labels, values, beside)
        for rule, thresholds in (("frozen", frozen_thresholds), ("best_f1", best_f1_thresholds)):
            if thresholds and key in thresholds:
                scores[key][rule] = at_threshold(labels, values, thresholds[key])
    n = {"normal": int((labels == 0).sum()), "anomalous": int((labels == 1).sum())}
    judged = None
    if maps is not None and masks is not None:
        n["masks"] = sum(bool(m.any()) for m in masks)
        rows = [i for i, m in enumerate(masks) if labels[i] == 0 or m.any()]
        kept = [masks[i] for i in rows]
        judged = {
            k: pixel_metrics([v[i] for i in rows], kept).to_json()
            for k, v in track(maps.items(), "judging maps", len(maps))
        }
    alarms = false_alarm(table, n_conformal, target_fpr)
    others = track((variants or {}).items(), "judging fusions", len(variants or {}))
    ablation = {k: auroc_block(labels, v, fused) for k, v in others}
    return Evaluation(
        name, n, image_size, scores, alarms, dict(seconds), judged, ablation=ablation or None
    )


def auroc_block(labels: Ints, scores: Floats, fused: Floats | None = None) -> dict[str, Any]:
    """The AUROC of one score with its interval, and the interval of the `fused` one's minus it."""
    out: dict[str, Any] = {
        "auroc": metrics.auroc(labels, scores),
        "auroc_ci95": metrics.bootstrap_auroc(labels, scores),
    }
    if fused is not None:
        out["fused_minus_ci95"] = metrics.bootstrap_auroc_difference(labels, fused, scores)
    return out


def score_metrics(labels: Ints, scores: Floats, fused: Floats | None = None) -> dict[str, Any]:
    """The figures of one score that need no threshold; `f1_max` is an oracle."""
    return {
        **auroc_block(labels, scores, fused),
        "average_precision": metrics.average_precision(labels, scores),
        "fpr_at_95_tpr": metrics.fpr_at_tpr(labels, scores),
        "f1_max": metrics.f1_max(labels, scores),
    }


def at_threshold(labels: Ints, scores: Floats, threshold: float) -> dict[str, float]:
    """Accuracy and F1 at equal prevalence, and the rates they come from."""
    tpr, fpr = metrics.rates_at(labels, scores, threshold)
    accuracy, f1 = metrics.balanced_accuracy_f1(tpr, fpr)
    return {"threshold": threshold, "accuracy": accuracy, "f1": f1, "tpr": tpr, "fpr": fpr}


def false_alarm(table: ScoreTable, n_conformal: int, target: float) -> dict[str, Any]:
    """The rate that was asked for, the one that came, and what chance allows."""
    if table.labels is None or table.p is None:
        raise DataError("false alarms need labels and p-values: score the images with msvae")
    normal = table.p[table.labels == 0]
    alarms, m = int((normal <= target + 1e-12).sum()), len(normal)
    return {
        "target": target,
        "realised": alarms / m,
        "expected95": metrics.false_alarm_interval(n_conformal, m, target),
        "ci95": metrics.clopper_pearson(alarms, m),
    }
