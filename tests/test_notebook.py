"""The notebook runs from top to bottom, and is committed with what it shows."""

import copy
import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import msvae
from test_docs import public_names

PATH = Path(__file__).parents[1] / "notebooks" / "Multi_Score_VAE_Anomaly_Detection.ipynb"
SECTIONS = (
    "Installation",
    "Configuration",
    "Data loading and preprocessing",
    "VAE architecture",
    "Multi-score system",
    "Training loop",
    "Evaluation and threshold optimisation",
    "Explainability: heatmaps and Grad-CAM",
    "Results visualisation, with anomaly examples",
    "Export of results",
)
NAMES = "LATENT_DIM BETA HIDDEN_DIMS BATCH_SIZE LEARNING_RATE EPOCHS WEIGHT_DECAY ALPHA THRESHOLD"


@pytest.fixture(scope="module")
def notebook():
    """As committed."""
    return nbformat.read(PATH, 4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def text(cell):
    """What a cell printed or showed."""
    parts = [o.get("text", "") or o.get("data", {}).get("text/plain", "") for o in cell.outputs]
    return "".join(parts)


def test_the_sections_are_the_seeds_in_their_order(notebook):
    """Ten numbered headings."""
    found = re.findall(
        r"^## \d+\. (.*)$",
        "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown"),
        re.MULTILINE,
    )
    assert tuple(found) == SECTIONS


def test_one_cell_holds_the_seeds_names(notebook):
    """All of them, and the switch to the real data sets."""
    (cell,) = (c for c in code(notebook) if "LATENT_DIM =" in c.source)
    for name in (*NAMES.split(), "FLOWERS"):
        assert re.search(rf"^{name} = ", cell.source, re.MULTILINE)


def test_it_uses_the_public_face(notebook):
    """It takes of the package what `msvae.__all__` names, and nothing else."""
    taken = {name for cell in code(notebook) for name in public_names(cell.source)}
    assert taken - {"__version__"} <= set(msvae.__all__)
    assert {"fit", "load", "calibrate", "evaluate", "explain", "report"} <= taken


def test_it_is_committed_with_its_outputs(notebook):
    """Every cell has run, in order, none failed, and pictures are there to look at."""
    assert [c.execution_count for c in code(notebook)] == list(range(1, len(code(notebook)) + 1))
    outputs = [o for c in code(notebook) for o in c.outputs]
    assert not [o for o in outputs if o.output_type == "error"]
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 6
    assert any("Grad-CAM" in o.get("data", {}).get("text/html", "") for o in outputs)
    assert PATH.stat().st_size < 5e6


def test_it_runs_from_top_to_bottom(notebook, tmp_path, monkeypatch):
    """As a reader would run it; it detects, and what it exports loads again."""
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # one core: other tests run beside it
        monkeypatch.setenv(variable, os.environ.get(variable, "1"))
    client = NotebookClient(
        copy.deepcopy(notebook), timeout=600, resources={"metadata": {"path": str(tmp_path)}}
    )
    done = client.execute()
    printed = "\n".join(text(cell) for cell in code(done))
    fused = re.search(r"^fused +(\d\.\d+)", printed, re.MULTILINE)
    assert fused is not None
    assert float(fused[1]) > 0.85
    assert "the same scores to the bit: True" in printed
    assert (tmp_path / "runs" / "notebook" / "scores.csv").is_file()
