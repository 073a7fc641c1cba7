"""Write docs/reference.md from the code: commands, settings, scores, engines, files of a run.

`python docs/generate.py --check` says whether the file is up to date, and exits with 1 if not.
"""

import argparse
import dataclasses
import os
import sys
from pathlib import Path

os.environ["COLUMNS"] = "100"  # argparse folds its help to the terminal

from msvae.cli import main as cli
from msvae.core import config, errors, files
from msvae.engine import choose
from msvae.engine.convert import BIN, XML
from msvae.run import store
from msvae.run.detector import CALIBRATION, MODEL, REFERENCES
from msvae.scores.catalog import ABOUT, MAPS, TITLES, UNITS

TARGET = Path(__file__).with_name("reference.md")
HEAD = "# Reference\n\nWritten by `make docs`; do not edit.\n"


def commands() -> str:
    """The help of every verb; the settings of fit and benchmark stand in their own table."""
    parser = cli.build_parser()
    verbs = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    parts = [
        "## Commands\n",
        "`msvae --version` says the version, `msvae --version --verbose` what computes on this machine, "
        "too: engine, precision, instruction set, libraries. Exit codes: 0; 2 for a mistake that the "
        "user can mend, in one line; 3 with `--strict` where an image was unreadable; 130 when "
        "interrupted.\n",
    ]
    for name, verb in verbs.choices.items():
        text = verb.format_help().split("\nsettings of [")[0].rstrip()
        if "usage:" in text and "--preset" in text:
            text = text[text.index("\n\n") :].strip()
            text = f"usage: msvae {name} … [settings]\n\n{text}"
        parts.append(f"### msvae {name}\n\n```\n{text}\n```\n")
    return "\n".join(parts)


def settings() -> str:
    """A table for each section, with the default's and the seed's values."""
    default, seed = config.PRESETS["default"], config.PRESETS["seed"]
    parts = ["## Settings\n\nIn a TOML file by section, on the command line as `--name-of-it`.\n"]
    for section, cls in config.SECTIONS.items():
        rows = [f"### [{section}]\n", "| setting | default | seed |", "|---|---|---|"]
        for f in dataclasses.fields(cls):
            values = (getattr(getattr(p, section), f.name) for p in (default, seed))
            rows.append(f"| `{f.name}` | {' | '.join(str(v) for v in values)} |")
        parts.append("\n".join(rows) + "\n")
        parts.append(" ".join((cls.__doc__ or "").split()) + "\n")
    return "\n".join(parts)


def scores() -> str:
    """A line for every score, and for every map."""
    text = "Higher is more anomalous, always."
    maps = {name: f"{TITLES[name]} | {UNITS[name]}" for name in MAPS}
    return "\n".join(
        [
            section("Scores", text, ("score", "what it is"), ABOUT),
            section("Maps", "At the model's resolution.", ("map", "what it is", "unit"), maps),
        ]
    )


ENGINE_WORDS = {
    "reference": "torch, in float32, on the GPU where it finds one",
    "openvino": "OpenVINO on CPUs, in float32, or in bfloat16 where processor and run allow it",
}


def engines() -> str:
    """What computes, and the variables that choose it."""
    text = (
        f"`--engine` names one, else `{choose.VARIABLE}`, else `{choose.AUTO}`: `reference` where torch "
        "finds a CUDA or ROCm GPU, `openvino` otherwise. One that is unknown, or whose library is "
        "absent, is refused. [How to choose](how-to.md#choose-what-computes)."
    )
    words = {name: f"{ENGINE_WORDS[name]} | {choose.LIBRARIES[name]}" for name in choose.ENGINES}
    return section("Engines", text, ("engine", "what it is", "library"), words)


def variables() -> str:
    """The environment variables that are read."""
    words = {
        choose.VARIABLE: "the engine, where `--engine` does not say",
        "MSVAE_CACHE": "the folder of decoded images, of downloaded data sets (`data`) and of compiled "
        "graphs (`engine`, 2 GB at most); default: `msvae` in the user's cache folder. It may be "
        "deleted at any time",
        "ONEDNN_MAX_CPU_ISA": "OpenVINO's own: holds it to a lower instruction set, such as `AVX2`",
        "MSVAE_DATA": "the real data sets, for the tests and `make bench`",
    }
    return section("Environment", "Variables that are read.", ("variable", "what it says"), words)


def run_files() -> str:
    """The files of a run, and the facts in two of them."""
    text = (
        f"A run is a folder, format {store.FORMAT}; one of another format is refused, naming what reads "
        f"it. All its files take their places in one step: killed at any moment, `fit --overwrite` and "
        "`calibrate` leave the old run or the new one, whole, and the next command tidies up. "
        f"`{store.CONFIG}` holds the sha256 of every file that `fit` writes, but the history; one that "
        "differs is refused by its name, and so is one that does not hold what its kind must: types, "
        "ranges, shapes, finite numbers. No pickle is written or read."
    )
    words = {
        store.CONFIG: "`format`; `msvae`, the version; `config`, every setting; `decision`; `n`, images "
        "of each part, and `n_conformal`; `pretext`, steps and loss of the pretext network and whether "
        "it gave up; `graph`, the names of the columns (`numbers`) and `maps`, which must be those of "
        "the msvae that loads it; `precision`; `checksums`",
        MODEL: "weights of the networks (`networks.…`) and the fitted parts of the graph (`parts.…`)",
        f"{XML}`, `{BIN}": f"the graph, as OpenVINO reads it. Large constants are those of `{MODEL}`, "
        "by name, and stored there only",
        CALIBRATION: "the verdict (`verdict.…`), the scores of the images to calibrate on "
        "(`conformal.…`) and the maxima of their maps (`peaks.…`)",
        REFERENCES: "latents, thumbnails, names and fused scores of up to 1,000 training images",
        "environment.json": "python, platform, device, packages, and `engine`: `name`, `library` with "
        "its version, `precision` (`f32` or `bf16`), `instruction_set`, `threads`",
        "history.csv": "losses of each epoch",
        "split.csv": "each image with its part (train, stop, conformal, feedback) and sha256",
        "quarantine.csv": "images that could not be read, with the reason, where there are any",
        "calibrated.csv": "images of the last `calibrate`, where there was one",
        store.CHECKPOINT: "while training only: what `--resume` goes on from",
        "evaluation/": "`metrics.json`, `scores.csv`, `quarantine.csv` and figures of `evaluate`",
        "report.html": "the page",
    }
    precision = (
        "`precision` in `config.json`: `bfloat16`, whether it may be used; `tried_on`, the instruction "
        "set on which that was found, none where it has no bfloat16; `images`, how many were scored in "
        "both; `within_a_rank`, the share whose p-values agree; `decisions_changed`. A run that was "
        "made by the engine `reference`, or with the setting `precision` `fp32`, has none, and is "
        "scored in float32.\n"
    )
    return section("Files of a run", text, ("file", "what it holds"), words) + "\n" + precision


def mistakes() -> str:
    """The public errors."""
    known = {k: v for k, v in vars(errors).items() if isinstance(v, type)}
    words = {f"msvae.{k}": " ".join((v.__doc__ or "").split()) for k, v in known.items()}
    return section(
        "Errors", "From Python; each message names the remedy.", ("error", "when"), words
    )


def section(title: str, text: str, head: tuple[str, ...], words: dict[str, str]) -> str:
    """A heading, a paragraph, and a table with a line for each of the words."""
    rows = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    rows += [f"| `{name}` | {line} |" for name, line in words.items()]
    return f"## {title}\n\n{text}\n\n" + "\n".join(rows) + "\n"


def main() -> None:
    """Write the file, or check it."""
    parts = [commands(), settings(), scores(), engines(), variables(), run_files(), mistakes()]
    text = "\n".join([HEAD, *parts])
    if "--check" in sys.argv:
        sys.exit(TARGET.read_text(encoding="utf-8") != text and "run make docs: it is out of date")
    files.write_text(TARGET, text)


if __name__ == "__main__":
    main()
