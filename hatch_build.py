"""Builds kernels.c into the package, where there is a compiler for it."""

import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PACKAGE = Path("src/msvae")
FLAGS = "-O3 -std=c11 -fPIC -fopenmp -ffp-contract=fast -fno-math-errno"
PROCESSOR = "avx512f avx512bw avx512vl avx512dq avx512bf16 fma amx-tile amx-bf16"


class KernelsHook(BuildHookInterface[Any]):
    """Compiles, and links without OpenMP: its names are to be those of the process, torch's."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called before a wheel is made, or an editable installation."""
        del version
        package = Path(self.root) / PACKAGE
        built = package / "kernels.so"
        if not sys.platform.startswith("linux") or not _compiled(package / "kernels.c", built):
            self.app.display_warning("msvae goes without its compiled loops: training takes longer")
            return
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_')}"
        build_data["artifacts"].append(f"/{PACKAGE}/kernels.so")


def _compiled(source: Path, built: Path) -> bool:
    compiler = shlex.split(os.environ.get("CC") or "cc")
    made, partial = built.with_suffix(".o"), built.with_suffix(".partial")
    flags = [*FLAGS.split(), *[f"-m{name}" for name in PROCESSOR.split()]]
    try:
        for order in ([*flags, "-c", source, "-o", made], ["-shared", made, "-o", partial]):
            subprocess.run([*compiler, *order], check=True, capture_output=True)  # noqa: S603
        partial.replace(built)
    except (OSError, subprocess.CalledProcessError):
        return False
    finally:
        made.unlink(missing_ok=True)
    return True
