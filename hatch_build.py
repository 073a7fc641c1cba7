"""Builds kernels.c into the package, where there is a compiler for it."""

import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path
from tempfile import TemporaryDirectory
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
        reason = _compiled(package / "kernels.c", built)
        if reason:
            built.unlink(missing_ok=True)  # one of older sources
            self.app.display_warning(f"msvae goes without its compiled loops: {reason}")
            return
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_')}"
        build_data["artifacts"].append(f"/{PACKAGE}/kernels.so")


def _compiled(source: Path, built: Path) -> str:
    """Why there is no library; nothing where there is one."""
    if not sys.platform.startswith("linux"):
        return "they are for Linux"
    compiler = shlex.split(os.environ.get("CC") or "cc")
    flags = [*FLAGS.split(), *[f"-m{name}" for name in PROCESSOR.split()]]
    with TemporaryDirectory(dir=built.parent) as folder:
        made, linked = Path(folder) / "kernels.o", Path(folder) / "kernels.so"
        try:
            for order in ([*flags, "-c", source, "-o", made], ["-shared", made, "-o", linked]):
                command = [*compiler, *order]
                subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603
        except OSError as error:
            return f"no C compiler ({error})"
        except subprocess.CalledProcessError as error:
            return error.stderr.strip() or f"{compiler[0]} failed"
        linked.replace(built)
    return ""
