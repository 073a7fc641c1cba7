"""The public face: what `import msvae` gives, and that a command is a thin call of it."""

import argparse
import inspect
import subprocess
import sys

import pytest

import msvae
from msvae.cli.main import build_parser

TWINS = ("fit", "calibrate", "evaluate", "explain", "report")
# What is said to the command line alone: `fit` takes the settings as one `Config`.
OF_COMMANDS = {"help", "strict", "preset", "config"}


def commands():
    """The parser of every verb, by its name."""
    (verbs,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return verbs.choices


@pytest.mark.parametrize("name", msvae.__all__)
def test_every_public_name_is_there(name):
    """It can be had from the package, says what it is, and is still the same when asked for again."""
    value = getattr(msvae, name)
    assert callable(value)
    assert value.__name__ == name
    assert value.__doc__
    assert getattr(msvae, name) is value


def test_the_public_names():
    """What the how-to needs, and every error that a user can meet; `*` gives the same."""
    wanted = {*TWINS, "load", "Detector", "Config", "ScoreTable", "Explanation", "Examples"}
    errors = {name for name in msvae.__all__ if name.endswith("Error")}
    assert set(msvae.__all__) == wanted | errors
    assert all(issubclass(getattr(msvae, name), msvae.MsvaeError) for name in errors)
    module = sys.modules[msvae.MsvaeError.__module__]
    assert errors == {k for k, v in vars(module).items() if inspect.isclass(v)}
    everything = {}
    exec("from msvae import *", everything)
    assert set(everything) - {"__builtins__"} == set(msvae.__all__)


def test_a_name_that_is_not_there():
    """Is an `AttributeError`, as of any module."""
    with pytest.raises(AttributeError, match="no attribute 'frobnicate'"):
        _ = msvae.frobnicate


VERBS_AND_ROOMS = """
import msvae
import msvae.report.page
from msvae.explain import explain as module
import msvae.explain.explanation
for verb in (msvae.explain, msvae.report):
    assert callable(verb), verb
from msvae import explain, report
assert explain is msvae.explain is msvae.run.outputs.explain
assert report is msvae.report is msvae.report and report.__module__ == "msvae.report.build"
assert module.__name__ == "msvae.explain.explain"
"""


def test_verbs_are_not_hidden_by_the_rooms_of_their_names():
    """`msvae.explain(...)` and `msvae.report(...)` go on working whatever was imported before."""
    done = subprocess.run([sys.executable, "-c", VERBS_AND_ROOMS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("verb", TWINS)
def test_a_command_has_a_call_of_its_name(verb):
    """Whatever can be said to the command can be given to the call, under the same name."""
    twin = getattr(msvae, verb)
    words = {action.dest for action in commands()[verb]._actions}
    words = {word for word in words - OF_COMMANDS if not word.startswith("set_")}
    assert words <= set(inspect.signature(twin).parameters)


def test_other_commands_have_their_call_too():
    """`score` is a method of what `load` gives; demo and benchmark only string the others together."""
    assert set(commands()) - set(TWINS) == {"demo", "score", "benchmark"}
    words = {action.dest for action in commands()["score"]._actions} - OF_COMMANDS
    given = (
        inspect.signature(msvae.load).parameters,
        inspect.signature(msvae.Detector.scan).parameters,
    )
    assert words - {"run", "images", "out", "bom", "maps"} <= {
        name for part in given for name in part
    }


@pytest.mark.parametrize(
    "code", ["import msvae", "from msvae.cli.main import main; main(['--help'])"]
)
def test_the_package_and_the_help_import_no_torch(code):
    """They answer at once: neither torch nor openvino nor numpy is loaded for them."""
    heavy = ("torch", "openvino", "numpy", "scipy", "sklearn", "matplotlib", "PIL", "rich")
    ask = f"import sys\ntry:\n    {code}\nexcept SystemExit:\n    pass\n"
    ask += "print('loaded:', *{m.split('.')[0] for m in sys.modules})"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    loaded = done.stdout.splitlines()[-1].split()
    assert loaded[0] == "loaded:"
    assert "msvae" in loaded
    assert not set(heavy) & set(loaded)
