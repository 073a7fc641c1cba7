"""Every benchmark by its name; to add one: a function of a `Request`, and its line in `BENCHMARKS`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from msvae.benchmarks.ablation import write_ablation
from msvae.benchmarks.flowers_cifar10 import SIDES, Protocol, flowers_cifar10
from msvae.benchmarks.industrial import DEFECT_SIDE, magnetic_tile, mvtec, mvtec_all
from msvae.core.config import Config
from msvae.core.errors import ConfigError
from msvae.core.progress import Progress
from msvae.run.fit import check_free

ALL = "all"
ABLATION = "ablation.md"


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a benchmark is run with."""

    data_dir: Path | None
    out: Path
    config: Config
    sized: bool = False  # whether the user chose the size of the images
    protocols: Sequence[Protocol] = tuple(SIDES)
    category: str = "bottle"
    feedback: int = 0
    overwrite: bool = False
    progress: Progress
    say: Callable[[str], None]

    @property
    def common(self) -> dict[str, Any]:
        """What every benchmark takes."""
        return {"overwrite": self.overwrite, "progress": self.progress, "say": self.say}

    def folder(self) -> Path:
        """Where the data lie; `ConfigError` where nobody said."""
        if self.data_dir is None:
            raise ConfigError("this benchmark needs --data-dir: the folder with its images")
        return self.data_dir

    def defect_config(self) -> Config:
        """The settings, with the industrial benchmarks' size unless the user chose one."""
        return self.config if self.sized else self.config.replace(image_size=DEFECT_SIDE)


def _flowers(r: Request) -> dict[str, Any]:
    return flowers_cifar10(
        r.data_dir, r.out, r.config, r.protocols, feedback=r.feedback, **r.common
    )


def _mvtec(r: Request) -> dict[str, Any]:
    if r.category == ALL:
        return mvtec_all(r.folder(), r.out, r.defect_config(), **r.common)
    return mvtec(r.folder(), r.category, r.out, r.defect_config(), **r.common)


def _tiles(r: Request) -> dict[str, Any]:
    return magnetic_tile(r.folder(), r.out, r.defect_config(), **r.common)


BENCHMARKS: dict[str, Callable[[Request], dict[str, Any]]] = {
    "flowers-cifar10": _flowers,
    "mvtec": _mvtec,
    "magnetic-tile": _tiles,
}


def run_benchmark(
    name: str, request: Request, each: Callable[[dict[str, Any], Path], None]
) -> None:
    """Run one benchmark, or all and their ablation; `each` is called with every result and its folder.

    Raises `ConfigError` for settings that the benchmark does not know, before any work.
    """
    if request.feedback and name not in ("flowers-cifar10", ALL):
        raise ConfigError(f"--feedback is of flowers-cifar10, not of {name}: leave it out")
    if name != "flowers-cifar10" and request.data_dir is None:
        raise ConfigError(f"benchmark {name} needs --data-dir: the folder with its images")
    if name != ALL:
        each(BENCHMARKS[name](request), request.out)
        return
    for other in BENCHMARKS:  # some take long: refuse before, not after
        check_free(request.out / other, resume=False, overwrite=request.overwrite)
    results = []
    for other, run in BENCHMARKS.items():
        results.append(run(replace(request, out=request.out / other)))
        each(results[-1], request.out / other)
    write_ablation(results, request.out / ABLATION)
    request.say(f"{request.out / ABLATION}: every score alone, each left out, other fusions")
