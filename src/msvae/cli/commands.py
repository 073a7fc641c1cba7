"""What each verb does: a thin call of the library, and what is shown of it."""

import argparse
import math
from pathlib import Path
from typing import Any

from msvae import __version__
from msvae.core import config as settings
from msvae.core.errors import ConfigError

UNREADABLE = 3  # the exit code of --strict


def version(options: argparse.Namespace) -> int:
    """The version; with --verbose what computes on this machine, a line each."""
    print(f"msvae {__version__}")
    if options.verbose:
        for line in _machine():
            print(line)
    return 0


def _machine() -> list[str]:
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as version_of
    from platform import machine, python_version, system

    from msvae.core.processor import cores, has_bfloat16, instruction_set
    from msvae.engine.choose import engine_name

    versions = []
    for name in ("openvino", "torch", "numpy"):
        try:
            versions.append(f"{name} {version_of(name)}")
        except PackageNotFoundError:
            versions.append(f"{name} is not installed")
    low = "bf16 where a run allows it, else f32" if has_bfloat16() else "f32"
    return [
        f"engine: {engine_name()}",
        f"precision: {low}",
        f"instruction set: {instruction_set()}, {cores()} cores",
        f"python {python_version()}, {system()} {machine()}",
        *versions,
    ]


def demo(options: argparse.Namespace) -> int:
    """Fit, evaluate and report on the embedded data set."""
    from msvae.benchmarks.demo import demonstrate

    screen = _screen()
    done = demonstrate(options.out, seed=options.seed, progress=screen.progress, say=screen.say)
    screen.evaluation("the demo", done.evaluated.evaluation.to_json())
    screen.kinds(done.evaluated.scan.table)
    _report(screen, options.out)
    return 0


def fit(options: argparse.Namespace) -> int:
    """Learn from normal images and write a run."""
    from msvae.run.fit import fit as fit_run

    screen = _screen()
    images = options.images[0] if len(options.images) == 1 else options.images
    fit_run(
        images,
        options.out,
        config=_config(options),
        group_by=options.group_by,
        feedback=options.feedback,
        engine=options.engine,
        resume=options.resume,
        overwrite=options.overwrite,
        progress=screen.progress,
        say=screen.say,
    )
    page = _report(screen, options.out)
    screen.say(f"{options.out} is ready; next: msvae score {options.out} IMAGES, or look at {page}")
    return _strict(options, options.out)


def calibrate(options: argparse.Namespace) -> int:
    """New thresholds from more normal images."""
    from msvae.run.calibrate import calibrate as calibrate_run

    screen = _screen()
    rule, threshold = _rule(options.rule)
    detector = calibrate_run(
        options.run,
        options.normals,
        rule=rule,
        threshold=threshold,
        anomalous=options.anomalous or (),
        target_fpr=options.target_fpr,
        feedback=options.feedback,
        engine=options.engine,
        progress=screen.progress,
    )
    decision = screen.decision(detector.decision)
    screen.say(f"{options.run}: {decision}, on {detector.calibration.n} images")
    return _unreadable(screen, options, options.run)


def score(options: argparse.Namespace) -> int:
    """Scores, p-values and decisions of images."""
    from msvae.core.replacement import check_folder, check_output
    from msvae.data.folder import find_images
    from msvae.run.detector import load
    from msvae.run.outputs import write_scores

    screen = _screen()
    if options.out is not None:  # refused before the long work
        check_output(options.out)
    if options.maps is not None:
        check_folder(options.maps)
    listing = find_images(options.images, pngs=False)
    paths = listing.names
    if "passed over" in listing.note:
        screen.say(listing.note)
    detector = load(options.run, options.engine)
    write = None
    if options.maps is not None:
        from msvae.run.outputs import map_writer

        write = map_writer(options.maps, paths, detector)
    scan = detector.scan(
        paths, target_fpr=options.target_fpr, each_map=write, progress=screen.progress
    )
    if options.out is None:
        screen.scores(scan.table)
        for error in scan.quarantine:
            screen.say(f"left out: {error}")
    else:
        quarantine = write_scores(options.out, scan, bom=options.bom)
        screen.scored(scan.table, options.out)
        if quarantine is not None:
            screen.unreadable(len(scan.quarantine), quarantine)
    return UNREADABLE if options.strict and scan.quarantine else 0


def evaluate(options: argparse.Namespace) -> int:
    """Every score on labelled images."""
    from msvae.run.evaluate import evaluate as evaluate_run

    screen = _screen()
    out = options.out or options.run / "evaluation"
    done = evaluate_run(
        options.run,
        options.dataset,
        normal=options.normal,
        anomalous=options.anomalous,
        masks=options.masks,
        out=out,
        engine=options.engine,
        progress=screen.progress,
    )
    result = done.evaluation.to_json()
    screen.evaluation(result["evaluation"], result)
    page = options.run / "report.html" if options.out is None else out / "report.html"
    _report(screen, options.run, out=page, evaluation=out)
    masks, anomalous = result["n"].get("masks", 0), result["n"]["anomalous"]
    screen.say(f"masks: of {masks} of {anomalous} anomalous images")
    if not done.scan.quarantine:  # its file is written in any case
        return 0
    screen.unreadable(len(done.scan.quarantine), out / "quarantine.csv")
    return UNREADABLE if options.strict else 0


def explain(options: argparse.Namespace) -> int:
    """A picture and the numbers of each image."""
    from msvae.run.outputs import explain as explain_images

    screen = _screen()
    written = explain_images(options.run, options.images, options.out, progress=screen.progress)
    screen.say(f"{options.out}: {len(written)} images explained, a .png and a .json each")
    return _unreadable(screen, options, options.out)


def report(options: argparse.Namespace) -> int:
    """One self-contained HTML page."""
    _report(_screen(), options.source, run=options.run, out=options.out)
    return 0


def benchmark(options: argparse.Namespace) -> int:
    """A named benchmark by its protocol."""
    from msvae.benchmarks.flowers_cifar10 import SIDES
    from msvae.benchmarks.registry import ALL, BENCHMARKS, Request, run_benchmark

    if options.name not in (*BENCHMARKS, ALL):
        names = ", ".join([*BENCHMARKS, ALL])
        raise ConfigError(f"no benchmark is called {options.name!r}: choose one of {names}")
    screen = _screen()
    request = Request(
        data_dir=options.data_dir,
        out=options.out,
        config=_config(options),
        sized=options.set_image_size is not None,
        protocols=tuple(SIDES) if options.protocol == "both" else (options.protocol,),
        category=options.category,
        feedback=options.feedback,
        overwrite=options.overwrite,
        progress=screen.progress,
        say=screen.say,
    )

    def each(result: dict[str, Any], out: Path) -> None:
        screen.benchmark(result)
        for folder in [out / name for name in result.get("categories", {})] or [out]:
            if (folder / "metrics.json").is_file():
                _report(screen, folder)

    run_benchmark(options.name, request, each)
    return 0


def _config(options: argparse.Namespace) -> settings.Config:
    chosen = settings.preset(options.preset)
    if options.config is not None:
        chosen = settings.load_toml(options.config, chosen)
    given = {k.removeprefix("set_"): v for k, v in vars(options).items() if k.startswith("set_")}
    return chosen.replace(**{k: v for k, v in given.items() if v is not None})


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


def _screen() -> Any:
    from msvae.cli.console import Screen

    return Screen()


def _report(screen: Any, source: Path, **more: Any) -> Path:
    """Write a page and say where it is."""
    from msvae.report.build import report as write_page

    page = write_page(source, progress=screen.progress, **more)
    screen.say(f"report: {page}")
    return page


def _unreadable(screen: Any, options: argparse.Namespace, folder: Path) -> int:
    """Say where the images are named that could not be read, if any."""
    quarantine = folder / "quarantine.csv"
    if quarantine.is_file():
        from msvae.core.files import read_rows

        screen.unreadable(len(read_rows(quarantine)), quarantine)
    return _strict(options, folder)


def _strict(options: argparse.Namespace, folder: Path) -> int:
    return UNREADABLE if options.strict and (folder / "quarantine.csv").is_file() else 0
