"""The campaign: short in `make test`, whole by `make campaign`; the seeds are fixed."""

import os
import sys
import warnings
from collections.abc import Callable, Iterator

import pytest


@pytest.fixture
def tries() -> Callable[[int, int], int]:
    """How many, in the whole campaign and in the short one."""
    whole = os.environ.get("MSVAE_CAMPAIGN") == "whole"
    return lambda all_of_them, few: all_of_them if whole else few


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Print a line past pytest; stdout is how its workers talk."""

    def told(text: str) -> None:
        with capsys.disabled():
            print(f"\n{text}", file=sys.stderr)

    return told


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    """What damaged files warn of is not what is asked here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
