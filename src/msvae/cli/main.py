"""The verbs of the command line: the only place that prints and exits.

torch, matplotlib and rich are imported by the verb that needs them, so that `--help` is quick.
"""

import argparse
import dataclasses
import io
import signal
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from msvae.cli import commands
from msvae.core import config as settings
from msvae.core.errors import MsvaeError

DESCRIPTION = """\
Multi-Score VAE learns what normal images look like from normal images alone, and says of each new
image how surprising it is, at a false-alarm rate that it keeps, and why."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; exits with 0, with 2 for a mistake that the user can mend, or as the verb says."""
    warnings.showwarning = _show_warning
    _print_anything()
    with suppress(ValueError):  # only the main thread may say what a signal does
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    parser = build_parser()
    options = parser.parse_args(arguments)
    try:
        if options.version:
            code = commands.version(options)
        elif "verb" in options:
            code = options.verb(options)
        else:
            parser.print_help()
            code = 0
    except MsvaeError as error:
        print(f"msvae: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("msvae: interrupted; finished epochs are kept: fit --resume goes on", file=sys.stderr)
        sys.exit(130)
    sys.exit(code or 0)


def _print_anything() -> None:
    """Let every name be printed: odd bytes as they came, what a console has no letter for as `?`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            unicode = stream.encoding.lower().startswith("utf")
            stream.reconfigure(errors="surrogateescape" if unicode else "replace")


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
    parser.add_argument("--version", action="store_true", help="the version of msvae")
    parser.add_argument(
        "--verbose", action="store_true", help="with --version: what computes on this machine, too"
    )
    verbs = parser.add_subparsers(metavar="VERB")
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


def _add_demo(verbs: Any) -> None:
    text = (
        "fit, evaluate and report on embedded texture photographs, offline, in a minute and a half"
    )
    p = _verb(verbs, "demo", commands.demo, text)
    p.add_argument("--out", type=Path, default=Path("runs/demo"), help="default: %(default)s")
    p.add_argument("--seed", type=int, default=0)


def _add_fit(verbs: Any) -> None:
    p = _verb(verbs, "fit", commands.fit, "learn from normal images and write a run")
    p.add_argument(
        "images", nargs="+", metavar="IMAGES", help="folders, files or globs of normal images"
    )
    p.add_argument("--out", type=Path, required=True, metavar="RUN", help="the run folder to write")
    p.add_argument("--group-by", metavar="REGEX", help="images with the same match stay together")
    _add_feedback(p)
    p.add_argument("--resume", action="store_true", help="continue an interrupted fit")
    p.add_argument("--overwrite", action="store_true", help="replace a finished run")
    _add_engine(p)
    _add_strict(p)
    _add_settings(p)


def _add_calibrate(verbs: Any) -> None:
    text = "new thresholds from more normal images, without training"
    p = _verb(verbs, "calibrate", commands.calibrate, text)
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
    _add_engine(p)
    _add_strict(p)


def _add_score(verbs: Any) -> None:
    p = _verb(verbs, "score", commands.score, "scores, p-values and decisions of images")
    p.add_argument("run", type=Path, metavar="RUN")
    p.add_argument("images", nargs="+", metavar="PATH", help="images, folders or globs")
    p.add_argument("--out", type=Path, metavar="F.csv", help="write the table here")
    p.add_argument(
        "--bom", action="store_true", help="begin F.csv with a byte-order mark, as Excel wants it"
    )
    p.add_argument(
        "--maps", type=Path, metavar="DIR", help="write each image's fused map: .png, .tiff"
    )
    p.add_argument(
        "--target-fpr", type=float, default=None, help="decide at another false-alarm rate"
    )
    _add_engine(p)
    _add_strict(p)


def _add_evaluate(verbs: Any) -> None:
    text = "every score on labelled images, with intervals, figures and a report"
    p = _verb(verbs, "evaluate", commands.evaluate, text)
    p.add_argument("run", type=Path, metavar="RUN")
    p.add_argument(
        "dataset", nargs="?", type=Path, metavar="DATASET", help="a tree in the MVTec layout"
    )
    p.add_argument("--normal", type=Path, metavar="DIR")
    p.add_argument("--anomalous", type=Path, metavar="DIR")
    p.add_argument("--masks", type=Path, metavar="DIR", help="masks of the anomalous images")
    p.add_argument("--out", type=Path, metavar="DIR", help="default: RUN/evaluation")
    _add_engine(p)
    _add_strict(p)


def _add_explain(verbs: Any) -> None:
    p = _verb(verbs, "explain", commands.explain, "why: a picture and the numbers of each image")
    p.add_argument("run", type=Path, metavar="RUN")
    p.add_argument("images", nargs="+", metavar="IMAGE")
    p.add_argument("--out", type=Path, required=True, metavar="DIR")
    _add_strict(p)


def _add_report(verbs: Any) -> None:
    text = "one self-contained HTML page of a run, a benchmark or a file of scores"
    p = _verb(verbs, "report", commands.report, text)
    p.add_argument("source", type=Path, metavar="RUN|F.csv")
    p.add_argument("--run", type=Path, help="the run that made F.csv: its maps are shown then")
    p.add_argument(
        "--out", type=Path, metavar="F.html", help="default: report.html there, or beside F.csv"
    )


def _add_benchmark(verbs: Any) -> None:
    p = _verb(verbs, "benchmark", commands.benchmark, "a named benchmark by its protocol")
    p.add_argument("name", help="flowers-cifar10, mvtec, magnetic-tile or all", metavar="NAME")
    p.add_argument("--data-dir", type=Path, default=None, help="where the data sets are")
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--protocol", choices=("native", "equalised", "both"), default="both")
    p.add_argument(
        "--category", default="bottle", help="of mvtec, or all that are found; default: %(default)s"
    )
    p.add_argument("--overwrite", action="store_true", help="replace finished runs")
    p.add_argument(
        "--feedback",
        type=int,
        default=0,
        metavar="N",
        help="of flowers-cifar10: measure fused_feedback too, taught by N labelled anomalies",
    )
    _add_settings(p)


def _add_feedback(parser: argparse.ArgumentParser) -> None:
    text = "labelled examples in DIR/normal (false alarms) and DIR/anomalous, either or both"
    parser.add_argument("--feedback", type=Path, metavar="DIR", help=text)


def _add_engine(parser: argparse.ArgumentParser) -> None:
    text = "what computes: auto (default; or MSVAE_ENGINE), reference (torch) or openvino"
    parser.add_argument("--engine", metavar="NAME", help=text)


def _add_strict(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--strict", action="store_true", help="exit with 3 if an image was unreadable"
    )
