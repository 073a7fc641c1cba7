"""What several test files share."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from folders import PLAIN, holed, smooth_images, write
from msvae import fit, load
from msvae.data.folder import Sample, find_labelled
from msvae.evaluation.table import ScoreTable
from msvae.run.evaluate import evaluate_samples, history_of


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data sets; the test is skipped where there is none."""
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("MSVAE_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"needs the real data sets: {folder} is absent, set MSVAE_DATA")
    return folder


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is left in the cache of whoever runs the tests, nor taken from it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MSVAE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tests run side by side, one a core: more threads on tiny tensors only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """As on a machine of two cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """One, then two."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MVTec tree: weak and strong defects, one of them without a mask's pixels."""
    root = tmp_path_factory.mktemp("tree") / "part"
    write(root / "train" / "good", smooth_images(60, 0))
    write(root / "test" / "good", smooth_images(15, 1))
    for kind, seed, level in (("weak", 2, 6), ("strong", 3, 60)):
        images, masks = holed(5, seed, level)
        masks[4] = 0 if kind == "weak" else masks[4]
        write(root / "test" / kind, images)
        write(root / "ground_truth" / kind, masks, "{:02}_mask.png")
    return root


@pytest.fixture(scope="session")
def tree_run(tree: Path) -> Path:
    """A run of the tree; copy it before you change it."""
    out = tree.parent / "run"
    fit(tree, out, config=PLAIN)
    return out


@pytest.fixture(scope="session")
def judged(tree: Path, tree_run: Path) -> SimpleNamespace:
    """The run, evaluated on the tree and one file that cannot be read."""
    (tree.parent / "bad.png").write_text("no picture")
    samples = [Sample(tree.parent / "bad.png", 0, "good"), *find_labelled(tree)]
    out = tree_run / "evaluation"
    done = evaluate_samples(
        load(tree_run),
        samples,
        out,
        name="part",
        seconds={"fit": 1.5},
        history=history_of(tree_run),
    )
    metrics = json.loads((out / "metrics.json").read_text())
    table = ScoreTable.read_csv(out / "scores.csv")
    return SimpleNamespace(done=done, out=out, metrics=metrics, table=table)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The notebook takes longest: it begins first, so that nobody waits for it at the end."""
    items.sort(key=lambda item: item.path.name != "test_notebook.py")
