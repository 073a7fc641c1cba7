"""Labelled examples that turn the fusion to what they show."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from msvae.core.config import Config
from msvae.core.errors import DataError
from msvae.core.progress import NullProgress
from msvae.data.cache import Images
from msvae.data.folder import find_images
from msvae.data.images import Source, digest, load_image, name_of
from msvae.engine.engine import Engine
from msvae.run.batching import FILES, in_parallel
from msvae.run.parts import Part, batches
from msvae.scores.feedback import FeedbackInputs
from msvae.scores.verdict import Verdict

FEEDBACK = "feedback"  # the part of labelled examples


class Examples(NamedTuple):
    """Labelled images, of either kind none or more."""

    normal: Sequence[Source]
    anomalous: Sequence[Source]


@dataclass(frozen=True)
class LabelledExamples:
    """Decoded examples."""

    normal: Part
    anomalous: Part

    def rows(self) -> list[dict[str, str]]:
        """One row an image, as in `split.csv`."""
        return [*self.normal.rows(FEEDBACK), *self.anomalous.rows(FEEDBACK)]


def examples_of(feedback: str | Path | Examples) -> Examples:
    """The examples of a folder with `normal/`, `anomalous/` or both."""
    if not isinstance(feedback, str | Path):
        return feedback
    kinds = [Path(feedback) / name for name in Examples._fields]
    if not any(kind.is_dir() for kind in kinds):
        raise DataError(f"{feedback}: needs a folder normal or anomalous, or both: make one")
    return Examples(*(find_images(k).paths if k.is_dir() else () for k in kinds))


def decode_examples(examples: Examples, config: Config) -> LabelledExamples:
    """The examples decoded; raises `ImageError` for one that cannot be read."""
    return LabelledExamples(*(_part(sources, config) for sources in examples))


def _part(sources: Sequence[Source], config: Config) -> Part:
    side, names = config.model.image_size, [name_of(s, i) for i, s in enumerate(sources)]
    pixels = [load_image(s, side, config.model.resize) for s in sources]
    whole = np.stack(pixels) if pixels else np.zeros((0, side, side, 3), dtype=np.uint8)
    return Part(whole, tuple(names), tuple(digest(s) for s in sources))


def taught(
    engine: Engine, verdict: Verdict, ordinary: Images, examples: LabelledExamples
) -> Verdict:
    """The verdict with what the examples teach, against normal images that were not trained on."""
    kinds = (ordinary, examples.normal.pixels, examples.anomalous.pixels)
    return verdict.taught(*(feedback_inputs(engine, verdict, pixels) for pixels in kinds))


def feedback_inputs(engine: Engine, verdict: Verdict, pixels: Images) -> FeedbackInputs:
    """What feedback learns from, and is applied to, of pixels (N, S, S, 3)."""
    if not len(pixels):
        return FeedbackInputs(np.zeros((0, len(verdict.feedback.centre))), np.zeros(0))
    parts = in_parallel(engine, batches(pixels, FILES, NullProgress(), ""), engine.workers)
    return verdict.feedback_inputs(np.concatenate([part.numbers for part in parts]))
