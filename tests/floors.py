"""Prints the lowest versions that pyproject.toml promises, as pip constraints: `make test-lowest`."""

import re
import sys
import tomllib
from pathlib import Path

PROJECT = Path(__file__).parent.parent / "pyproject.toml"


def floors() -> list[str]:
    """`name==version` of every requirement, extras too, that has a lowest version."""
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    requirements = [*project["dependencies"], *[r for extra in extras for r in extra]]
    matches = [re.match(r"([\w.-]+)>=([\w.]+)", r) for r in requirements]
    return [f"{m[1]}=={m[2]}" for m in matches if m]


if __name__ == "__main__":
    sys.stdout.write("\n".join(floors()) + "\n")
