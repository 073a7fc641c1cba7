"""The documents say what the program does: commands, settings and scores, and README's commands."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from msvae import cli
from msvae.wording import ABOUT

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def verbs():
    parser = cli.build_parser()
    return next(a.choices for a in parser._actions if a.dest == "==SUPPRESS==" or a.choices)


def test_the_reference_is_up_to_date():
    """`make docs` has been run since the last change of a command or a setting."""
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "generate.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_in_the_documents_parse(page):
    """Every `msvae …` line of a document is one that the command line understands."""
    text = page.read_text(encoding="utf-8")
    lines = [
        m.strip() for m in re.findall(r"^ {4}(msvae .*)$|`(msvae [^`]*)`", text, re.M) for m in m
    ]
    for line in filter(None, lines):
        words = [w.strip("'\"") for w in line.split("#")[0].split()[1:]]
        known = [w for w in words if w not in ("…", "...") and not w.startswith("[")]
        if known and known[0] in verbs():
            flags = {f for a in verbs()[known[0]]._actions for f in a.option_strings}
            assert {w for w in known if w.startswith("--")} <= flags, line
        else:
            assert not known or known[0].startswith(("-", "flowers", "fit,")), line


def test_every_command_and_score_is_named():
    """The reference holds each verb and each score; the README each verb."""
    reference = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for verb in verbs():
        assert f"msvae {verb}" in reference
        assert f"msvae {verb}" in readme
    for score in ABOUT:
        assert f"`{score}`" in reference


def test_links_lead_somewhere():
    """Every relative link of a document is a file of the project."""
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
