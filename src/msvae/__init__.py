"""Multi-Score VAE: how surprising an image is, at a false-alarm rate that is kept, and why."""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from msvae.core.config import Config
    from msvae.core.errors import (
        ConfigError,
        DataError,
        EngineError,
        ImageError,
        MsvaeError,
        OutputError,
        RateError,
        RunError,
        TrainingError,
    )
    from msvae.evaluation.table import ScoreTable
    from msvae.explain.explanation import Explanation
    from msvae.report.build import report
    from msvae.run.calibrate import calibrate
    from msvae.run.detector import Detector, load
    from msvae.run.evaluate import evaluate
    from msvae.run.examples import Examples
    from msvae.run.fit import fit
    from msvae.run.outputs import explain

# Where each name lives: what needs torch is imported when it is asked for, so that `--help` and
# `score` stay quick.
_HOMES = {
    "fit": "run.fit",
    "load": "run.detector",
    "calibrate": "run.calibrate",
    "evaluate": "run.evaluate",
    "explain": "run.outputs",
    "report": "report.build",
    "Detector": "run.detector",
    "Config": "core.config",
    "ScoreTable": "evaluation.table",
    "Explanation": "explain.explanation",
    "Examples": "run.examples",
    "MsvaeError": "core.errors",
    "ConfigError": "core.errors",
    "DataError": "core.errors",
    "EngineError": "core.errors",
    "ImageError": "core.errors",
    "OutputError": "core.errors",
    "RateError": "core.errors",
    "RunError": "core.errors",
    "TrainingError": "core.errors",
}
__all__ = [
    "Config",
    "ConfigError",
    "DataError",
    "Detector",
    "EngineError",
    "Examples",
    "Explanation",
    "ImageError",
    "MsvaeError",
    "OutputError",
    "RateError",
    "RunError",
    "ScoreTable",
    "TrainingError",
    "calibrate",
    "evaluate",
    "explain",
    "fit",
    "load",
    "report",
]


def __getattr__(name: str) -> Any:
    """A public name, from where it lives."""
    if name not in _HOMES:
        raise AttributeError(f"module 'msvae' has no attribute {name!r}")
    return getattr(import_module(f"msvae.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """The public names, also those that are not imported yet."""
    return [*globals(), *__all__]


class _Package(ModuleType):
    """Keeps `msvae.explain` and `msvae.report` the verbs, though rooms are called so, too."""

    def __setattr__(self, name: str, value: Any) -> None:
        """As ever; but what the import system binds, a room, does not hide the verb of its name."""
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
