"""Multi-Score VAE: how surprising an image is, at a false-alarm rate that is kept, and why."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Detector", "fit", "load"]

if TYPE_CHECKING:
    from msvae.detector import Detector, load
    from msvae.fitting import fit


def __getattr__(name: str) -> Any:
    """Bring torch in only when something that needs it is asked for; `--help` stays quick."""
    if name == "fit":
        from msvae.fitting import fit

        return fit
    if name in ("Detector", "load"):
        from msvae import detector

        return getattr(detector, name)
    raise AttributeError(f"module 'msvae' has no attribute {name!r}")
