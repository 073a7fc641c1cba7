"""The documents say what the program does: commands, settings and scores, and README's commands."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import msvae
from msvae.cli import main as cli
from msvae.engine.choose import ENGINES, VARIABLE
from msvae.run import store
from msvae.scores.catalog import ABOUT
from small import CONFIG, SIDE

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """A run folder, just fitted."""
    run = tmp_path_factory.mktemp("docs") / "run"
    images = np.random.default_rng(0).integers(0, 255, (40, SIDE, SIDE, 3), dtype=np.uint8)
    config = CONFIG.replace(precision="auto")
    msvae.fit(list(images), run, config=config)
    return run


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


def public_names(code):
    """What code takes from msvae: `from msvae import …`, `msvae.…`; a module by its dotted name."""
    for node in ast.walk(ast.parse(code)):
        match node:
            case ast.ImportFrom(module="msvae", names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=str(module)) if module.startswith("msvae."):
                yield module
            case ast.Import(names=names):
                yield from (a.name for a in names if a.name.startswith("msvae."))
            case ast.Attribute(value=ast.Name(id="msvae"), attr=name):
                yield name


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_code_in_the_documents_uses_the_public_face(page):
    """Every Python block takes of the package what `msvae.__all__` names, and nothing else."""
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    for name in (name for block in blocks for name in public_names(block)):
        assert name in msvae.__all__, name


def test_every_command_score_and_engine_is_named():
    """The reference holds each verb, score, engine and error; the README each verb."""
    reference = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for verb in verbs():
        assert f"msvae {verb}" in reference
        assert f"msvae {verb}" in readme
    for name in (*ABOUT, *ENGINES, VARIABLE, "MSVAE_CACHE"):
        assert f"`{name}`" in reference
    for name in (name for name in msvae.__all__ if name.endswith("Error")):
        assert f"`msvae.{name}`" in reference


def test_the_reference_names_every_file_of_a_run(small_run):
    """What `fit` writes stands in the list, and so do the facts of `config.json` and the engine's."""
    reference = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    facts = store.read_facts(small_run)
    engine = json.loads((small_run / "environment.json").read_text(encoding="utf-8"))["engine"]
    files = [path.name for path in small_run.iterdir()]
    for name in (*files, *facts, *facts.get("precision", {}), *engine):
        assert f"`{name}`" in reference, name


def test_the_readme_draws_the_house():
    """Its tree names every room of the package, and no other."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    drawn = re.findall(r"^      (\w+)/ ", readme, re.M)
    rooms = [p.parent.name for p in (ROOT / "src" / "msvae").glob("*/__init__.py")]
    assert sorted(drawn) == sorted(rooms)


def test_links_lead_somewhere():
    """Every relative link of a document is a file of the project, and its anchor a heading there."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for target, anchor in re.findall(r"\]\((?!http)([^)#]+)(?:#([^)]+))?\)", text):
            path = page.parent / target
            assert path.exists(), f"{page.name}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
                assert anchor in [h.lower().replace(" ", "-") for h in headings], anchor
