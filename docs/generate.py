"""Write docs/reference.md from the code: the commands, the settings, the scores.

`python docs/generate.py --check` says whether the file is up to date, and exits with 1 if not.
"""

import argparse
import dataclasses
import os
import sys
from pathlib import Path

os.environ["COLUMNS"] = "100"  # argparse folds its help to the terminal

from msvae import cli, config, files
from msvae.wording import ABOUT

TARGET = Path(__file__).with_name("reference.md")
HEAD = "# Reference\n\nWritten by `make docs`; do not edit.\n"


def commands() -> str:
    """The help of every verb; the settings of fit and benchmark stand in their own table."""
    parser = cli.build_parser()
    verbs = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    parts = ["## Commands\n"]
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
    """A line for every score."""
    rows = [f"| `{name}` | {text} |" for name, text in ABOUT.items()]
    return (
        "## Scores\n\nHigher is more anomalous, always.\n\n| score | what it is |\n|---|---|\n"
        + ("\n".join(rows) + "\n")
    )


def main() -> None:
    """Write the file, or check it."""
    text = "\n".join([HEAD, commands(), settings(), scores()])
    if "--check" in sys.argv:
        sys.exit(TARGET.read_text(encoding="utf-8") != text and "run make docs: it is out of date")
    files.write_text(TARGET, text)


if __name__ == "__main__":
    main()
