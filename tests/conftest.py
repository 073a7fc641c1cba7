"""What several test files share."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data sets; the test is skipped where there is none."""
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("MSVAE_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"needs the real data sets: {folder} is absent, set MSVAE_DATA")
    return folder


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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The notebook takes longest: it begins first, so that nobody waits for it at the end."""
    items.sort(key=lambda item: item.path.name != "test_notebook.py")
