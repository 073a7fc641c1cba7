"""The verbs of the command line: the only place that prints and exits.

torch, matplotlib and rich are imported by the verb that needs them, so that `--help` is quick.
"""

import argparse
import dataclasses
import math
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from msvae import __version__
from msvae import config as settings
from msvae.errors import ConfigError, MsvaeError

UNREADABLE = 3  # the exit code of --strict
ABLATION = "ablation.md"  # of benchmark all
DESCRIPTION = """\
Multi-Score VAE learns what normal images look like from normal images alone, and says of each new
image how surprising it is, at a false-alarm rate that it keeps, and why."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; exits with 0, with 2 for a mistake that the user can mend, or as the verb says."""
    warnings.showwarning = _show_warning
    options = build_parser().parse_args(arguments)
    try:
        code = options.verb(options)
    except MsvaeError as error:
        print(f"msvae: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("msvae: interrupted; finished epochs are kept: fit --resume goes on", file=sys.stderr)
        sys.exit(130)
    sys.exit(code or 0)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"msvae: {message}", file=sys.stderr)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every other mistake is said."""

    def error(self, message: str) -> NoReturn:
        print(f"msvae: {message}: see {self.prog} --help", file=sys.stderr)
        sys.exit(2)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = _Parser("msvae", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"msvae {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for add in (
        _add_demo,
        _add_fit,
        _add_calibrate,
        _add_score,
        _add_evaluate,
        _add_explain,
        _add_report,
        _add_benchmark,
    ):
        add(verbs)
    return parser


def _verb(verbs: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(name, help=text, description=text)
    parser.set_defaults(verb=run)
    return parser


def _add_settings(parser: argparse.ArgumentParser) -> None:
    """One option for every setting of the configuration."""
    parser.add_argument("--preset", default="default", help=" or ".join(settings.PRESETS))
    parser.add_argument("--config", type=Path, metavar="F.toml", help="settings, over the preset's")
    for section, cls in settings.SECTIONS.items():
        group = parser.add_argument_group(f"settings of [{section}]")
        hints = get_type_hints(cls)
        for f in dataclasses.fields(cls):
            flag = "--" + f.name.replace("_", "-")
            group.add_argument(flag, dest=f"set_{f.name}", default=None, **_argument(hints[f.name]))


def _argument(hint: Any) -> dict[str, Any]:
    if get_origin(hint) is Literal:
        return {"choices": get_args(hint)}
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(hint) is tuple:
        return {"type": int, "nargs": "+", "metavar": "N"}
    return {"type": hint, "metavar": hint.__name__.upper()}


def _config(options: argparse.Namespace) -> settings.Config:
    chosen = settings.preset(options.preset)
    if options.config is not None:
        chosen = settings.load_toml(options.config, chosen)
    given = {k.removeprefix("set_"): v for k, v in vars(options).items() if k.startswith("set_")}
    return chosen.replace(**{k: v for k, v in given.items() if v is not None})


def _add_demo(verbs: Any) -> None:
    text = (
        "fit, evaluate and report on embedded texture photographs, offline, in a minute and a half"
    )
    p = _verb(verbs, "demo", _demo, text)
    p.add_argument("--out", type=Path, default=Path("runs/demo"), help="default: %(default)s")
    p.add_argument("--seed", type=int, default=0)


def _demo(options: argparse.Namespace) -> int:
    from msvae.workflow import demonstrate

    screen = _screen()
    done = demonstrate(options.out, seed=options.seed, progress=screen.progress, say=screen.say)
    result = done.evaluated.evaluation.to_json()
    screen.folder_table("What each score achieves on the demo", result)
    screen.maps_table(result)
    screen.false_alarms(result["false_alarm"])
    screen.kinds(done.evaluated.scan.table)
    _write_page(screen, options.out, options.out / "report.html")
    return 0


def _add_fit(verbs: Any) -> None:
    p = _verb(verbs, "fit", _fit, "learn from normal images and write a run")
    p.add_argument(
        "images", nargs="+", metavar="IMAGES", help="folders, files or globs of normal images"
    )
    p.add_argument("--out", type=Path, required=True, metavar="RUN", help="the run folder to write")
    p.add_argument("--group-by", metavar="REGEX", help="images with the same match stay together")
    _add_feedback(p)
    p.add_argument("--resume", action="store_true", help="continue an interrupted fit")
    p.add_argument("--overwrite", action="store_true", help="replace a finished run")
    _add_strict(p)
    _add_settings(p)


def _fit(options: argparse.Namespace) -> int:
    from msvae.fitting import fit

    screen = _screen()
    images = options.images[0] if len(options.images) == 1 else options.images
    fit(
        images,
        options.out,
        config=_config(options),
        group_by=options.group_by,
        feedback=options.feedback,
        resume=options.resume,
        overwrite=options.overwrite,
        progress=screen.progress,
        say=screen.say,
    )
    page = _write_page(screen, options.out, options.out / "report.html")
    screen.say(f"{options.out} is ready; next: msvae score {options.out} IMAGES, or look at {page}")
    unreadable = (options.out / "quarantine.csv").is_file()
    return UNREADABLE if options.strict and unreadable else 0


def _add_calibrate(verbs: Any) -> None:
    text = "new thresholds from more normal images, without training"
    p = _verb(verbs, "calibrate", _calibrate, text)
    p.add_argument("run", type=Path, metavar="RUN")
    p.add_argument(
        "normals",
        nargs="*",
        metavar="NORMALS",
        help="normal images, none trained on; with --feedback the run's own may serve again",
    )
    _add_feedback(p)
    p.add_argument(
        "--anomalous", nargs="+", metavar="DIR", help="labelled anomalies, for --rule f1"
    )
    p.add_argument(
        "--rule",
        default="conformal",
        metavar="RULE",
        help="conformal (default), fixed, fixed:0.5 on the weighted score, or f1 on labelled images",
    )
    p.add_argument("--target-fpr", type=float, default=None, help="false-alarm rate to keep")
    _add_strict(p)


def _calibrate(options: argparse.Namespace) -> int:
    from msvae.data.folder import find_images
    from msvae.detector import load
    from msvae.fitting import examples_of
    from msvae.workflow import part_of, recalibrate, refuse_trained, write_calibrated

    screen = _screen()
    rule, threshold = _rule(options.rule)
    detector = load(options.run)
    if not options.normals and options.feedback is None:
        raise ConfigError("calibrate needs NORMALS: normal images that were not trained on")
    if options.normals:
        normals: Sequence[Path] = find_images(options.normals).paths
    else:
        normals = part_of(options.run, "conformal")
    refuse_trained(options.run, normals)
    examples = None if options.feedback is None else examples_of(options.feedback)
    detector, scan = recalibrate(
        detector,
        normals,
        rule=rule,
        threshold=threshold,
        anomalous=find_images(options.anomalous).paths if options.anomalous else (),
        target_fpr=options.target_fpr,
        feedback=examples,
        ordinary=part_of(options.run, "stop") if examples else (),
        progress=screen.progress,
    )
    detector.save_calibration(options.run)
    write_calibrated(options.run, normals, examples)
    screen.say(
        f"{options.run}: {screen.decision(detector.decision)}, on {detector.calibration.n} images"
    )
    return _unreadable(screen, scan.quarantine, options.run / "quarantine.csv", options.strict)


def _rule(text: str) -> tuple[str, float | None]:
    """`fixed:0.5` -> ("fixed", 0.5)."""
    name, _, value = text.partition(":")
    try:
        number = float(value) if value else None
    except ValueError as error:
        raise ConfigError(f"--rule {text}: {value!r} is no number: write fixed:0.5") from error
    finite = number is None or math.isfinite(number)
    if name not in ("conformal", "fixed", "f1") or (number is not None and name != "fixed"):
        raise ConfigError(f"--rule {text}: choose conformal, fixed, fixed:0.5 or f1")
    if not finite:
        raise ConfigError(
            f"--rule {text}: the threshold must be a finite number, such as fixed:0.5"
        )
    return name, number


def _add_score(verbs: Any) -> None:
    p = _verb(verbs, "score", _score, "scores, p-values and decisions of images")
    p.add_argument("run", type=Path, metavar="RUN")
    p.add_argument("images", nargs="+", metavar="PATH", help="images, folders or globs")
    p.add_argument("--out", type=Path, metavar="F.csv", help="write the table here")
    p.add_argument(
        "--maps", type=Path, metavar="DIR", help="write each image's fused map: .png, .tiff"
    )
    p.add_argument(
        "--target-fpr", type=float, default=None, help="decide at another false-alarm rate"
    )
    _add_strict(p)


def _score(options: argparse.Namespace) -> int:
    from msvae.data.folder import find_images
    from msvae.detector import load

    screen = _screen()
    paths = find_images(options.images).names
    detector = load(options.run)
    write = None
    if options.maps is not None:
        from msvae.workflow import map_writer

        write = map_writer(options.maps, paths, detector)
    scan = detector.scan(
        paths, target_fpr=options.target_fpr, each_map=write, progress=screen.progress
    )
    if options.out is None:
        screen.scores(scan.table)
    else:
        scan.table.write_csv(options.out)
        screen.scored(scan.table, options.out)
    beside = Path("quarantine.csv") if options.out is None else options.out
    quarantine = beside.with_name(f"{beside.stem}.quarantine.csv") if options.out else None
    return _unreadable(screen, scan.quarantine, quarantine, options.strict)


def _add_evaluate(verbs: Any) -> None:
    text = "every score on labelled images, with intervals, figures and a report"
    p = _verb(verbs, "evaluate", _evaluate, text)
    p.add_argument("run", type=Path, metavar="RUN")
    p.add_argument(
        "dataset", nargs="?", type=Path, metavar="DATASET", help="a tree in the MVTec layout"
    )
    p.add_argument("--normal", type=Path, metavar="DIR")
    p.add_argument("--anomalous", type=Path, metavar="DIR")
    p.add_argument("--masks", type=Path, metavar="DIR", help="masks of the anomalous images")
    p.add_argument("--out", type=Path, metavar="DIR", help="default: RUN/evaluation")
    _add_strict(p)


def _evaluate(options: argparse.Namespace) -> int:
    from msvae.data.folder import find_labelled, find_pairs
    from msvae.detector import load
    from msvae.workflow import evaluate_samples, history_of, refuse_leak

    screen = _screen()
    if options.dataset is not None:
        samples, name = find_labelled(options.dataset), options.dataset.resolve().name
    elif options.normal is not None and options.anomalous is not None:
        samples = find_pairs(options.normal, options.anomalous, options.masks)
        name = options.anomalous.resolve().name
    else:
        raise ConfigError("evaluate needs a DATASET, or both --normal DIR and --anomalous DIR")
    detector = load(options.run)
    refuse_leak(options.run, samples)
    out = options.out or options.run / "evaluation"
    done = evaluate_samples(
        detector, samples, out, name=name, progress=screen.progress, history=history_of(options.run)
    )
    result = done.evaluation.to_json()
    screen.folder_table(f"What each score achieves on {name}", result)
    screen.maps_table(result)
    screen.false_alarms(result["false_alarm"])
    page = options.run / "report.html" if options.out is None else out / "report.html"
    _write_page(screen, options.run, page, evaluation=out)
    refused = done.scan.quarantine  # its file is written in any case
    return _unreadable(screen, refused, out / "quarantine.csv", options.strict) if refused else 0


def _add_explain(verbs: Any) -> None:
    p = _verb(verbs, "explain", _explain, "why: a picture and the numbers of each image")
    p.add_argument("run", type=Path, metavar="RUN")
    p.add_argument("images", nargs="+", metavar="IMAGE")
    p.add_argument("--out", type=Path, required=True, metavar="DIR")
    _add_strict(p)


def _explain(options: argparse.Namespace) -> int:
    from msvae.data.folder import find_images
    from msvae.detector import load
    from msvae.workflow import write_explanations

    screen = _screen()
    paths = find_images(options.images).names
    written, refused = write_explanations(load(options.run), paths, options.out, screen.progress)
    screen.say(f"{options.out}: {len(written)} images explained, a .png and a .json each")
    return _unreadable(screen, refused, options.out / "quarantine.csv", options.strict)


def _add_report(verbs: Any) -> None:
    text = "one self-contained HTML page of a run, a benchmark or a file of scores"
    p = _verb(verbs, "report", _report, text)
    p.add_argument("source", type=Path, metavar="RUN|F.csv")
    p.add_argument("--run", type=Path, help="the run that made F.csv: its maps are shown then")


def _report(options: argparse.Namespace) -> int:
    source = options.source
    page = source.with_suffix(".html") if source.is_file() else source / "report.html"
    _write_page(_screen(), source, page, run=options.run)
    return 0


def _add_benchmark(verbs: Any) -> None:
    p = _verb(verbs, "benchmark", _benchmark, "a named benchmark by its protocol")
    p.add_argument("name", choices=("flowers-cifar10", "mvtec", "magnetic-tile", "all"))
    p.add_argument("--data-dir", type=Path, default=None, help="where the data sets are")
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--protocol", choices=("native", "equalised", "both"), default="both")
    p.add_argument("--category", default="bottle", help="of mvtec; default: %(default)s")
    p.add_argument("--overwrite", action="store_true", help="replace finished runs")
    p.add_argument(
        "--feedback",
        type=int,
        default=0,
        metavar="N",
        help="of flowers-cifar10: measure fused_feedback too, taught by N labelled anomalies",
    )
    _add_settings(p)


def _benchmark(options: argparse.Namespace) -> int:
    from msvae.benchmark import write_ablation
    from msvae.fitting import check_free

    names = ("flowers-cifar10", "mvtec", "magnetic-tile")
    if options.feedback and options.name not in ("flowers-cifar10", "all"):
        raise ConfigError(f"--feedback is of flowers-cifar10, not of {options.name}: leave it out")
    if options.name != "flowers-cifar10" and options.data_dir is None:
        raise ConfigError(f"benchmark {options.name} needs --data-dir: the folder with its images")
    if options.name != "all":
        _run_benchmark(options.name, options, options.out)
        return 0
    for name in names[1:]:  # the flowers take long: refuse before, not after
        check_free(options.out / name, resume=False, overwrite=options.overwrite)
    results = [_run_benchmark(name, options, options.out / name) for name in names]
    write_ablation(results, options.out / ABLATION)
    _screen().say(f"{options.out / ABLATION}: every score alone, each left out, other fusions")
    return 0


def _run_benchmark(name: str, options: argparse.Namespace, out: Path) -> dict[str, Any]:
    from msvae import benchmark

    screen, chosen = _screen(), _config(options)
    common = {"overwrite": options.overwrite, "progress": screen.progress, "say": screen.say}
    if name == "flowers-cifar10":
        both = options.protocol == "both"
        protocols: Any = ("equalised", "native") if both else (options.protocol,)
        result = benchmark.flowers_cifar10(
            options.data_dir, out, chosen, protocols, feedback=options.feedback, **common
        )
        screen.benchmark_table(result)
    else:
        if options.set_image_size is None:
            chosen = chosen.replace(image_size=benchmark.DEFECT_SIDE)
        if name == "mvtec":
            result = benchmark.mvtec(options.data_dir, options.category, out, chosen, **common)
        else:
            result = benchmark.magnetic_tile(options.data_dir, out, chosen, **common)
        screen.folder_table(f"What each score achieves on {result['evaluation']}", result)
        screen.maps_table(result)
        screen.false_alarms(result["false_alarm"])
    _write_page(screen, out, out / "report.html")
    return result


def _add_feedback(parser: argparse.ArgumentParser) -> None:
    text = "labelled examples in DIR/normal (false alarms) and DIR/anomalous, either or both"
    parser.add_argument("--feedback", type=Path, metavar="DIR", help=text)


def _add_strict(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--strict", action="store_true", help="exit with 3 if an image was unreadable"
    )


def _screen() -> Any:
    from msvae.console import Screen

    return Screen()


def _write_page(
    screen: Any,
    source: Path,
    page: Path,
    *,
    run: Path | None = None,
    evaluation: Path | None = None,
) -> Path:
    from msvae.pages import page_of
    from msvae.report import write_report

    report = page_of(source, run=run, evaluation=evaluation, progress=screen.progress)
    write_report(page, report)
    screen.say(f"report: {page}")
    return page


def _unreadable(screen: Any, refused: Sequence[Any], path: Path | None, strict: bool) -> int:
    """Name the images that could not be read, in a file where there is a place for it."""
    if not refused:
        if path is not None:
            path.unlink(missing_ok=True)  # an earlier command's
        return 0
    from msvae.table import write_quarantine

    if path is None:
        for error in refused:
            screen.say(f"left out: {error}")
    else:
        write_quarantine(path, refused)
        screen.say(f"{len(refused)} images could not be read: {path} names them")
    return UNREADABLE if strict else 0
