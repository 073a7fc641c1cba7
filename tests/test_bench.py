"""The speed benchmark's own arithmetic: rounds, ratios and bars. It is run by `make bench`."""

import io
import json
import sys
from importlib import import_module
from pathlib import Path

import pytest
from bench import memory, results
from bench.before import AS_IT_IS, HELD, Checkout, bar, cases
from bench.material import Material
from bench.peers import Peer
from bench.rows import Row, compared, interleaved, missing, rates, single, timed
from rich.console import Console

from msvae.core.processor import instruction_set

FOLDER = Path(__file__).parents[1] / "bench"
MODULES = sorted(path.stem for path in FOLDER.glob("[!_]*.py"))


def test_contestants_take_turns():
    """A B A B …; the first round warms up and does not count."""
    calls = []

    def contestant(name):
        def once():
            calls.append(name)
            return float(len(calls))

        return once

    measured = interleaved({"a": contestant("a"), "b": contestant("b")}, 2)
    assert calls == ["a", "b"] * 3
    assert measured == {"a": [3.0, 5.0], "b": [4.0, 6.0]}


def test_the_ratio_is_the_median_of_the_rounds():
    """Not the ratio of medians: both of a round saw the same machine."""
    row = compared("x", [10, 30, 20], [10, 10, 40], unit="images/s", bar=">= 0.9")
    assert (row.value, row.against, row.ratio, row.spread) == (20, 10, 1.0, (0.5, 3.0))
    assert row.holds
    assert json.loads(json.dumps(row.to_json()))["spread"] == [0.5, 3.0]


@pytest.mark.parametrize(
    ("ratio", "bar", "holds"),
    [
        (0.92, ">= 0.92", True),
        (0.91, ">= 0.92", False),
        (1.5, "<= 1.5", True),
        (1.51, "<= 1.5", False),
        (3.0, "", None),
        (None, ">= 1", None),
    ],
)
def test_a_bar_holds_or_not(ratio, bar, holds):
    """Both ways round; without a bar nothing is said."""
    assert Row("x", 1.0, "s", 1.0, ratio, bar, (1.0, 1.0)).holds is holds


def test_rates_and_times():
    """Images a second; the work is done once."""
    done = []
    assert timed(lambda: done.append(1))() >= 0
    assert done == [1]
    assert rates([2.0, 4.0], 8) == [4.0, 2.0]


@pytest.mark.parametrize("name", MODULES)
def test_every_module_goes_with_the_code_that_it_measures(name):
    """What the benchmark imports from msvae is there."""
    assert import_module(f"bench.{name}").__doc__


def test_results_tell_the_machine_and_what_could_not_be_measured(tmp_path):
    """A row without figures is written with its reason, and shown with dashes."""
    rows = [
        single("slow", 2.0, 1.0, unit="s", bar="<= 1"),
        missing("absent", unit="images/s", bar=">= 10", note="padim could not be installed"),
    ]
    results.write(tmp_path / "results.json", rows)
    told = json.loads((tmp_path / "results.json").read_text())
    assert told["machine"]["instruction_set"] == instruction_set()
    assert told["machine"]["cores"] >= 1
    assert [row["ratio"] for row in told["rows"]] == [2.0, None]
    assert told["rows"][1]["note"] == "padim could not be installed"
    page = io.StringIO()
    results.show(rows, Console(file=page))
    assert "absent" in page.getvalue()
    assert "1 of 2 rows miss their bar" in page.getvalue()


def test_a_peer_is_a_process_of_its_own(tmp_path):
    """It answers with seconds, sees its own variables, and may print what it likes besides."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        "print('noise')\n"
        "print('bench', os.environ['OWN'], flush=True)\n"
        "for _ in sys.stdin:\n"
        "    print('noise')\n"
        "    print('bench 0.25', flush=True)\n"
    )
    peer = Peer(Path(sys.executable), script, tmp_path / "log.txt", {"OWN": "told"})
    once = peer.start()
    assert (peer.greeting, once(), once()) == ("told", 0.25, 0.25)
    peer.stop()


def test_a_peer_that_fails_says_where_its_reason_stands(tmp_path):
    """Its log is named."""
    script = tmp_path / "script.py"
    script.write_text("raise SystemExit('no such thing')")
    with pytest.raises(RuntimeError, match=r"log\.txt"):
        Peer(Path(sys.executable), script, tmp_path / "log.txt").start()
    assert "no such thing" in (tmp_path / "log.txt").read_text()


def test_another_checkout_must_run_its_own_sources(tmp_path):
    """Else both sides would be the same code."""
    other = Checkout(tmp_path, Path(sys.executable), tmp_path / "work")
    with pytest.raises(RuntimeError, match=r"log\.txt"):
        other.start("score_one", "RUN", "IMAGE")
    assert "install the checkout" in (tmp_path / "work" / "log.txt").read_text()


def test_lines_of_code_and_templates_count(tmp_path):
    """Not what is compiled or binary."""
    package = tmp_path / "src" / "msvae"
    package.mkdir(parents=True)
    (package / "one.py").write_text("a = 1\n\nb = 2\n")
    (package / "page.html.j2").write_text("<p>\n</p>\n")
    (package / "kernels.c").write_text("int x;\n")
    (package / "kernels.so").write_bytes(b"\n\n\n")
    assert Checkout(tmp_path, Path(sys.executable), tmp_path).lines() == 6


def test_growth_is_the_cost_of_one_more_image(monkeypatch, tmp_path):
    """Work that takes a second and a millisecond an image grows evenly, whatever its start costs."""

    def child(name, *arguments):
        count = next(int(str(a).split("-")[1]) for a in arguments if "many" in str(a))
        return {"seconds": 1 + count / 1000, "anonymous": 100.0, "mapped": 10.0}

    monkeypatch.setattr("bench.memory._child", child)
    monkeypatch.setattr(Material, "many", lambda self, count, side: Path(f"many-{count}-{side}"))
    monkeypatch.setattr(Material, "run", lambda self, side: Path("run"))
    rows = list(memory._growth(Material(tmp_path, ())))
    assert [row.value for row in rows] == pytest.approx([1.0, 1.0])
    assert [row.ratio for row in rows] == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize(
    ("machine", "precision", "bars"),
    [
        ("AVX512_CORE_BF16", "f32", (">= 1.3", ">= 1.8", ">= 1.5")),
        ("AVX512_CORE_AMX", "bf16", (">= 0.6", ">= 1.8", ">= 1.5")),
        ("AVX512_CORE_AMX", "f32", (">= 0.33", ">= 1.8", ">= 1.5")),
    ],
)
def test_what_is_asked_depends_on_the_processor(monkeypatch, machine, precision, bars):
    """With AMX less, and once more in float32; held to AVX2 more."""
    monkeypatch.setattr("bench.before.instruction_set", lambda: machine)
    assert (bar(AS_IT_IS, precision, 64), bar(HELD, "f32", 64), bar(HELD, "f32", 128)) == bars
    assert len(cases()) == (3 if machine.endswith("AMX") else 2)
