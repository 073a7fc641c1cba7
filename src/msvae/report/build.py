"""What goes on the page: a run, a benchmark or a scored folder -> Report."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msvae.core import config as settings
from msvae.core.errors import DataError, ImageError
from msvae.core.progress import NullProgress, Progress, during
from msvae.core.replacement import check_output, settle
from msvae.data.datasets import cifar_image
from msvae.data.images import Pixels, Source, open_image, squared
from msvae.data.masks import load_mask, mask_of
from msvae.evaluation import metrics
from msvae.evaluation.table import ScoreTable
from msvae.explain.explain import explain_many
from msvae.explain.explanation import SHOWN, Explanation, signed
from msvae.report.gallery import Gallery, Item, MapView, ScoreLine, choose
from msvae.report.page import Comparison, Figure, Published, Report, write_report
from msvae.report.summary import GALLERIES, TAUGHT, Summary, one_sided_note
from msvae.report.tables import Table, ablation_table, explanations_table, maps_table
from msvae.report.thresholds import ThresholdData
from msvae.run import schema
from msvae.run.detector import Detector, load
from msvae.run.evaluate import history_of
from msvae.run.store import QUARANTINE, is_run
from msvae.scores.catalog import ABOUT, SHORT_UNITS, TITLES
from msvae.viz import curves as figures
from msvae.viz import overlays as pictures

VIEW = 320  # px of a gallery picture at most
UNUSUAL = 12  # training images shown


def report(
    source: str | Path,
    *,
    run: str | Path | None = None,
    evaluation: str | Path | None = None,
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write one self-contained HTML page; returns its path.

    `source` is a run, a benchmark's folder or a CSV file of scores; `run` the run that made that file:
    with it the page shows maps. `evaluation` is the folder of a run's evaluation, where it is not
    RUN/evaluation. `out` is where to write: `report.html` in the folder, or beside the file.

    Raises `DataError` or `RunError`, each with the remedy.
    """
    source = Path(source)
    beside = source.with_suffix(".html") if source.is_file() else source / "report.html"
    page = beside if out is None else Path(out)
    check_output(page)
    paths = [None if path is None else Path(path) for path in (run, evaluation)]

    def write() -> None:
        content = page_of(source, run=paths[0], evaluation=paths[1], progress=progress)
        write_report(page, content)

    during(progress or NullProgress(), "writing report", write)
    return page


def page_of(
    source: Path,
    *,
    run: Path | None = None,
    evaluation: Path | None = None,
    progress: Progress | None = None,
) -> Report:
    """The page of a run folder, of a benchmark's folder, or of a CSV file of scores.

    `run` is the run that made the scores of a CSV file; with it the page shows maps. `evaluation`
    is the folder of a run's evaluation, where it is not RUN/evaluation.
    """
    progress = progress or NullProgress()
    if source.is_file():
        return table_page(source, run, progress)
    if is_run(source):
        return run_page(source, evaluation or source / "evaluation", progress)
    path = source / "metrics.json"
    if not (_document(path, schema.record({})) or {}).get("protocols"):
        raise DataError(f"{source}: is neither a run, a benchmark nor a file of scores: name one")
    result = schema.document(path, schema.BENCHMARK, DataError, "write it again")
    return benchmark_page(source, result, progress)


def run_page(run: Path, evaluation: Path, progress: Progress) -> Report:
    """A run, with its evaluation where there is one."""
    detector = load(run)
    history = history_of(run)
    path = evaluation / "scores.csv"
    table = _scores(path) if path.is_file() else None
    judged = _document(evaluation / "metrics.json", schema.EVALUATION) or {}
    refused = _quarantine(evaluation / "quarantine.csv")
    comparison = (
        Comparison.from_metrics({"test": judged["scores"]}, about=ABOUT) if judged else None
    )
    galleries = [] if table is None else _galleries(table, detector, "", progress)
    return Report(
        title=judged.get("evaluation") or run.resolve().name,
        subtitle=_subtitle(detector),
        summaries=(_summary(table, detector, len(refused)),),
        notes=_decision_notes(detector),
        thresholds=() if table is None else (_threshold_data(table, detector),),
        comparison=comparison,
        galleries=(*galleries, *_unusual(detector, progress)),
        tables=_tables(judged),
        figures=tuple(_figures(table, detector, history)),
        unreadable=tuple(refused),
        facts=_facts(run, detector),
    )


def benchmark_page(out: Path, result: Mapping[str, Any], progress: Progress) -> Report:
    """A benchmark: its protocols side by side, equalised first."""
    protocols = list(result["protocols"])
    summaries, thresholds, galleries, drawn = [], [], [], list[Figure]()
    for name in protocols:
        detector = load(out / name)
        table = _scores(out / name / "evaluation" / "scores.csv")
        summaries.append(replace(_summary(table, detector, 0), name=name))
        thresholds.append(replace(_threshold_data(table, detector), name=name))
        galleries += _galleries(table, detector, f"{name}: ", progress)
        history = history_of(out / name)
        for figure in _figures(table, detector, history):
            drawn.append(replace(figure, title=f"{name}: {figure.title}"))
    data = result["data"]
    notes = [f"{name}: {one_sided_note(result['protocols'][name])}" for name in protocols]
    notes.append(
        "The published figures state neither prevalence nor resizing: quoted, not compared."
    )
    return Report(
        title=result["benchmark"],
        subtitle="Oxford-102 Flowers are normal, CIFAR-10 is anomalous; nothing is chosen on test data",
        summaries=tuple(summaries),
        notes=(
            f"Flowers: {data['normal']['split']}.",
            f"CIFAR-10: {data['anomalous']['path']} (sha256 {data['anomalous']['sha256'][:16]}…)"
            + (f"; {data['anomalous']['stands_in']}" if data["anomalous"]["stands_in"] else "")
            + ".",
        ),
        thresholds=tuple(thresholds),
        comparison=Comparison.from_metrics(
            {name: result["protocols"][name]["scores"] for name in protocols},
            about=ABOUT | TAUGHT,
            published={k: Published(**v) for k, v in result["published"].items()},
            published_by="Seed paper, quoted",
            notes=tuple(notes),
        ),
        galleries=tuple(galleries),
        tables=tuple(
            replace(table, title=f"{name}: {table.title}")
            for name in protocols
            for table in _tables(result["protocols"][name])
        ),
        figures=tuple(drawn),
        facts=_facts(out / protocols[0], load(out / protocols[0])),
    )


def _tables(block: Mapping[str, Any]) -> tuple[Table, ...]:
    """What the parts of the fused score and the maps reach, where it was measured."""
    kinds: dict[str, Callable[[Any], Table]] = {
        "ablation": ablation_table,
        "maps": maps_table,
        "explanations": explanations_table,
    }
    return tuple(draw(block[key]) for key, draw in kinds.items() if block.get(key))


def table_page(path: Path, run: Path | None, progress: Progress) -> Report:
    """A file of scores; galleries show the images that still lie where the file says."""
    table = _scores(path, fused=False)
    detector = None if run is None else load(run)
    refused = _quarantine(path.with_name(f"{path.stem}.quarantine.csv"))
    return Report(
        title=path.stem,
        subtitle=str(path),
        summaries=(_summary(table, detector, len(refused)),),
        thresholds=(_threshold_data(table, detector),) if "fused" in table.scores else (),
        galleries=tuple(_galleries(table, detector, "", progress)),
        figures=tuple(_figures(table, detector, [])),
        unreadable=tuple(refused),
        facts={} if detector is None or run is None else _facts(run, detector),
    )


def _scores(path: Path, fused: bool = True) -> ScoreTable:
    """A table that can be shown: finite scores, p-values in [0, 1], and a fused score if need be."""
    settle(path.parent)
    table = ScoreTable.read_csv(path)
    if fused and "fused" not in table.scores:
        raise DataError(f"{path}: has no column `fused`: evaluate the run again")
    if any("\0" in cell for cell in (*table.paths, *(table.kinds or ()))):
        raise DataError(f"{path}: has a NUL in a name: it is no file of scores")
    columns = {k: (v, -schema.MOST, schema.MOST) for k, v in table.scores.items()}
    tails = {f"p_{k}": v for k, v in table.p_values.items()}
    tails |= {} if table.p is None else {"p": table.p}
    for name, (values, low, high) in (columns | {k: (v, 0, 1) for k, v in tails.items()}).items():
        wrong = np.flatnonzero(~((values >= low) & (values <= high)))  # a NaN too
        if wrong.size:
            raise DataError(
                f"{path}, line {wrong[0] + 2}: {name} is {values[wrong[0]]:g}, not a number from "
                f"{low:g} to {high:g}: leave this image out"
            )
    return table


def _document(path: Path, check: schema.Check) -> dict[str, Any] | None:
    """The content of a JSON file; None where there is none."""
    settle(path.parent)
    return schema.document(path, check, DataError, "write it again") if path.is_file() else None


def _quarantine(path: Path) -> list[tuple[str, str]]:
    return [(row["path"], row["reason"]) for row in schema.table(path, QUARANTINE, DataError)]


def _subtitle(detector: Detector) -> str:
    n, c = detector.facts["n"], detector.config.model
    return (
        f"{n['train']} normal images trained on, {n['stop']} stopped on, "
        f"{detector.calibration.n} calibrated on; {c.image_size} px, {c.latent_dim} latents"
    )


def _decision_notes(detector: Detector) -> tuple[str, ...]:
    d = detector.decision
    if d.rule == "conformal" or d.threshold is None:
        return ()
    how = "as set" if d.rule == "fixed" else "of the best F1 on labelled images"
    return (f"Flagged when the {d.score} score reaches {d.threshold:.4g}, {how}.",)


def _summary(table: ScoreTable | None, detector: Detector | None, unreadable: int) -> Summary:
    rate = 0.05 if detector is None else detector.decision.target_fpr
    n = None if detector is None else detector.calibration.n
    if table is None or table.flagged is None:
        images = 0 if table is None else len(table)
        return Summary(images=images, flagged=0, target_fpr=rate, n_conformal=n)
    counts: dict[str, Any] = {}
    m = len(table)
    if table.labels is not None:
        normal = table.labels == 0
        m = int(normal.sum())
        counts = {
            "normals": m,
            "false_alarms": int(table.flagged[normal].sum()),
            "anomalies": int((~normal).sum()),
            "found": int(table.flagged[~normal].sum()),
        }
    conformal = detector is not None and detector.decision.rule == "conformal"
    expected = metrics.false_alarm_interval(n, m, rate) if conformal and n and m else None
    return Summary(
        images=len(table),
        flagged=int(table.flagged.sum()),
        target_fpr=rate,
        n_conformal=n,
        expected95=expected,
        unreadable=unreadable,
        **counts,
    )


def _threshold_data(table: ScoreTable, detector: Detector | None) -> ThresholdData:
    return ThresholdData(
        scores=table.scores["fused"],
        p=table.p,
        labels=table.labels,
        target_fpr=0.05 if detector is None else detector.decision.target_fpr,
        n_conformal=None if detector is None else detector.calibration.n,
    )


def _figures(
    table: ScoreTable | None, detector: Detector | None, history: Sequence[Any]
) -> list[Figure]:
    drawn = []
    labels = None if table is None else table.labels
    both = labels is not None and len(np.unique(labels)) == 2
    if table is not None and labels is not None and both and "fused" in table.scores:
        best = metrics.auroc(labels, table.scores["fused"])
        roc = figures.roc_figure(labels, table.scores)
        curve = figures.precision_recall_figure(labels, table.scores)
        alt = f"ROC curves of the main scores; the fused score has an AUROC of {best:.3f}"
        drawn.append(_figure("Receiver operating characteristic", roc, alt))
        precision = metrics.average_precision(labels, table.scores["fused"])
        alt = (
            f"Precision-recall curves; the fused score has an average precision of {precision:.3f}"
        )
        drawn.append(_figure("Precision and recall", curve, alt))
        limit = None if detector is None else detector.thresholds().get("fused")
        spread = figures.distribution_figure(labels, table.scores["fused"], limit)
        drawn.append(_figure("Fused score", spread, "Histogram of the fused score by class"))
        if detector is not None and table.p is not None:
            plot = figures.calibration_figure(table.p[labels == 0], detector.calibration.n)
            alt = "Realised against nominal false-alarm rate, with the band that chance allows"
            drawn.append(_figure("False alarms asked for and realised", plot, alt))
    if history:
        plot = figures.training_figure(history)
        alt = "Reconstruction error, KL and stop loss by epoch"
        drawn.append(_figure("Training", plot, alt))
    return drawn


def _figure(title: str, figure: Any, alt: str) -> Figure:
    return Figure(title=title, svg=figures.as_bytes(figure, "svg").decode(), alt=alt)


def _galleries(
    table: ScoreTable, detector: Detector | None, prefix: str, progress: Progress
) -> list[Gallery]:
    """The most anomalous, the borderline, and with labels the false alarms and the misses."""
    if table.flagged is None or "fused" not in table.scores:
        return []
    chosen = choose(table.scores["fused"], table.flagged, table.labels)
    rows = sorted({int(i) for part in chosen.values() for i in part})
    shown = _explained(table, rows, detector, progress)
    items = {row: _item(table, row, *shown[row]) for row in rows if row in shown}
    galleries = []
    for name, part in chosen.items():
        title, about = GALLERIES[name]
        members = tuple(items[int(i)] for i in part if int(i) in items)
        if members:
            galleries.append(Gallery(title=prefix + title, items=members, about=about))
    return galleries


def _explained(
    table: ScoreTable, rows: Sequence[int], detector: Detector | None, progress: Progress
) -> dict[int, tuple[Pixels, Explanation | None]]:
    """Each row's picture, and its explanation where the run is known."""
    sources = {row: _source(table.paths[row]) for row in rows}
    readable = {row: s for row, s in sources.items() if s is not None}
    if detector is None:
        pictures_of = {row: _picture(s) for row, s in readable.items()}
        return {row: (p, None) for row, p in pictures_of.items() if p is not None}
    explained, refused = explain_many(detector, list(readable.values()), progress=progress)
    gone = {error.name for error in refused}
    left = [row for row, s in readable.items() if str(s) not in gone]
    pairs = zip(left, explained, strict=False)
    return {row: (_looked_at(e), e) for row, e in pairs}


def _source(name: str) -> Source | None:
    """The image of a name, where it still is: a path, or `batch.bin#3` of CIFAR-10."""
    if "#" in name and name.rsplit("#", 1)[0].endswith(".bin"):
        return cifar_image(name)
    return name if Path(name).is_file() else None


def _picture(source: Source) -> Pixels | None:
    try:
        return pictures.shrink(np.asarray(open_image(source)), VIEW)
    except ImageError:
        return None


def _looked_at(e: Explanation) -> Pixels:
    """What the model saw of the image, at most `VIEW` px."""
    from PIL import Image

    whole = squared(Image.fromarray(e.image), e.resize)
    return pictures.shrink(np.asarray(whole), VIEW)


def _item(table: ScoreTable, row: int, picture: Pixels, e: Explanation | None) -> Item:
    name = table.paths[row]
    kind = "" if table.kinds is None else table.kinds[row]
    item = Item(
        name=name,
        image=picture,
        score=float(table.scores["fused"][row]),
        p=None if table.p is None else float(table.p[row]),
        flagged=table.flagged is not None and bool(table.flagged[row]),
        label=None if table.labels is None else int(table.labels[row]),
        kind=kind,
        scores=tuple(_score_line(table, k, row) for k in table.scores),
    )
    return item if e is None else _with_maps(replace(item, mask=_mask(name, e, picture)), e)


def _with_maps(item: Item, e: Explanation) -> Item:
    """The item with all that its explanation shows."""
    return replace(
        item,
        reconstruction=e.reconstruction,
        maps=tuple(_map_view(k, e) for k in SHOWN if k in e.model_maps),
        contributions=dict(sorted(e.contributions.items(), key=lambda kv: -abs(kv[1]))),
        notes=(*_region_notes(e), *e.notes),
        scores=tuple(replace(s, words=e.readings.get(s.name, "")) for s in item.scores),
        nearest=tuple((n.name, n.thumbnail) for n in e.nearest),
    )


def _score_line(table: ScoreTable, name: str, row: int) -> ScoreLine:
    p = table.p_values.get(name)
    value = float(table.scores[name][row])
    return ScoreLine(name=name, value=value, p=None if p is None else float(p[row]))


def _map_view(name: str, e: Explanation) -> MapView:
    values = e.model_maps[name]
    return MapView(
        name=TITLES[name],
        values=values,
        scale=e.scale(name),
        signed=signed(name),
        unit=SHORT_UNITS.get(name, ""),
        level=e.level if name == "fused" else None,
    )


def _region_notes(e: Explanation) -> list[str]:
    return [
        f"Region {r.box[0]},{r.box[1]} to {r.box[2]},{r.box[3]} px: peak {r.peak:.1f} "
        f"nats, family-wise p {r.p:.3g}"
        for r in e.regions[:5]
    ]


def _mask(name: str, e: Explanation, picture: Pixels) -> NDArray[np.bool_] | None:
    path = mask_of(Path(name))
    if path is None:
        return None
    side = max(picture.shape[:2])
    try:
        mask = load_mask(path, side, e.resize)
    except ImageError:
        return None
    return pictures.fit_mask(mask, *picture.shape[:2])


def _unusual(detector: Detector, progress: Progress) -> list[Gallery]:
    """The training images that are the least like the others: a good folder may hold a bad part."""
    r = detector.references
    if r is None:
        return []
    order = np.argsort(-r.fused, kind="stable")[:UNUSUAL].tolist()
    sources = {i: s for i in order if (s := _source(r.names[i])) is not None}
    explained, _ = explain_many(detector, list(sources.values()), progress=progress)
    by_name = {e.name: e for e in explained}
    items = []
    for i in order:
        e = by_name.get(str(sources.get(i)))
        small = r.thumbnails[i]
        score = float(r.fused[i])
        p = detector.calibration.p_values({"fused": np.array([score])})["fused"][0]
        item = Item(name=r.names[i], image=small, score=score, p=float(p))
        items.append(item if e is None else _with_maps(replace(item, image=_looked_at(e)), e))
    about = "The training images that the model finds hardest to believe: is each of them normal?"
    if detector.facts["n"]["train"] > len(r.names):
        about += f" (Chosen among {len(r.names):,} references of the training images.)"
    return [Gallery(title="Most unusual training images", items=tuple(items), about=about)]


def _facts(run: Path, detector: Detector) -> dict[str, dict[str, str]]:
    """Settings and surroundings, in groups."""
    groups = {
        section: {k: _plain(v) for k, v in values.items()}
        for section, values in settings.to_dict(detector.config).items()
    }
    surroundings = _document(run / "environment.json", schema.ENVIRONMENT) or {}
    packages, engine = surroundings.pop("packages", {}), surroundings.pop("engine", {})
    engine |= {f"bfloat16: {k}": v for k, v in detector.facts.get("precision", {}).items()}
    made_with = {**surroundings, **packages}
    for title, values in (("engine", engine), ("made with", made_with)):
        groups[title] = {k: _plain(v) for k, v in values.items()}
    return groups


def _plain(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
