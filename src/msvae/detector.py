"""Model, scores, fusion and calibration, frozen: images -> ScoreTable.

The one object that users hold. It chooses the device, shares decoding and computing out among the
cores, and leaves printing and files to others.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from msvae import explain, heap, references, store
from msvae.beside import spread
from msvae.calibration import Calibration, Decision, needed, rank
from msvae.compute import (
    choose_device,
    compute_type,
    decoding,
    in_parallel,
    scanned,
    shares,
    to_batch,
    workers_on,
)
from msvae.config import Config, Resize, from_dict
from msvae.data.images import Pixels, Source, load_image, name_of
from msvae.errors import DataError, ImageError, RunError
from msvae.explanation import Explanation
from msvae.files import Spool
from msvae.model import VAE
from msvae.progress import Progress, Silent
from msvae.references import References
from msvae.scorer import Scorer
from msvae.table import ScoreTable
from msvae.tensors import flatten, unflatten

Maps = dict[str, NDArray[np.float32]]
FEW = 4096  # images for whose scores there is room where nobody says how many there are
GIVEN_BACK = 1024  # images after which free memory is given back to the system
EachMap = Callable[[str, Maps], None]  # the image's name, its maps (H, W)


@dataclass(frozen=True)
class Scan:
    """The outcome of scoring many images: a row for each that was read, a reason for the others."""

    table: ScoreTable
    quarantine: tuple[ImageError, ...]
    maps: Maps = field(default_factory=dict)  # each (N, H, W), model's resolution, memory-mapped


@dataclass(frozen=True)
class Detector:
    """A fitted detector; make one with `msvae.fit` or `msvae.load`."""

    config: Config
    model: VAE
    scorer: Scorer
    calibration: Calibration
    decision: Decision
    references: References | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return next(self.model.parameters()).device

    @cached_property
    def scoring(self) -> VAE:
        """The model as it scores: frozen, in the precision that pays on this device."""
        return self.model.frozen(compute_type(self.config.train, self.device))

    def score(
        self, images: Source | Sequence[Source], *, target_fpr: float | None = None
    ) -> ScoreTable:
        """Scores, p-values and decisions of images: paths, PIL images, uint8 or float HWC arrays.

        Raises `ImageError` for the first image that cannot be used; `scan` goes on instead.
        """
        several: list[Any] = [images] if _is_one(images) else list(images)  # type: ignore[arg-type]
        scan = self.scan(several, target_fpr=target_fpr)
        if scan.quarantine:
            raise scan.quarantine[0]
        return scan.table

    def explain(self, image: Source, *, gradcam: bool = True) -> Explanation:
        """Why this image: its maps, regions, shares and nearest normals; shows itself in a notebook.

        Raises `ImageError` when the image cannot be used.
        """
        return explain.explain(self, image, gradcam=gradcam)

    def scan(
        self,
        sources: Sequence[Source],
        *,
        target_fpr: float | None = None,
        with_maps: bool = False,
        each_map: EachMap | None = None,
        progress: Progress | None = None,
    ) -> Scan:
        """Score many images; those that cannot be used are listed with the reason.

        `with_maps` keeps every map on disk; `each_map` is called with each name and its maps, and
        keeps none.
        """
        if target_fpr is not None:
            rank(target_fpr, self.calibration.n)
        if not len(sources):
            raise DataError("no image was given: name at least one")
        c, count = self.config.model, len(sources)
        reading = _Reading(sources, c.image_size, c.resize, progress or Silent())
        shown = reading.names()

        def hand_out(maps: Maps) -> None:
            for i in range(len(maps["fused"])):
                if each_map is not None:
                    each_map(next(shown), {k: v[i] for k, v in maps.items()})

        chunks = shares(count, scanned(c.image_size, self.device), workers_on(self.device))
        with decoding(self.device) as spread:
            scores, maps = run(
                self.scoring,
                self.scorer,
                (reading.begun(chunk, spread if count > 1 else map) for chunk in chunks),
                with_maps=with_maps,
                each=None if each_map is None else hand_out,
                count=count,
            )
        names, refused = list(reading.names()), reading.refused()
        if not names:
            raise DataError(f"none of {len(sources)} images could be read, first {refused[0]}")
        return Scan(self.table(names, scores, target_fpr=target_fpr), tuple(refused), maps)

    def table(
        self, names: Sequence[str], scores: dict[str, Any], *, target_fpr: float | None = None
    ) -> ScoreTable:
        """Scores with their p-values and the decision."""
        p_values = self.calibration.p_values(scores)
        decision = self.decision.at(target_fpr)
        return ScoreTable(
            paths=tuple(names),
            scores=scores,
            p_values=p_values,
            p=p_values["fused"],
            flagged=decision.flags(scores, p_values["fused"]),
        )

    def run(
        self, batches: Iterable[Pixels], *, with_maps: bool = False
    ) -> tuple[dict[str, NDArray[np.float64]], Maps]:
        """Every score, and every map if asked for, of batches of pixels (B, S, S, 3)."""
        return run(self.scoring, self.scorer, batches, with_maps=with_maps)

    def thresholds(self) -> dict[str, float]:
        """For every score the value flagged at the run's rate; none where it cannot be kept."""
        rate = self.decision.target_fpr
        return self.calibration.thresholds(rate) if self.calibration.n >= needed(rate) else {}

    def recalibrated(self, calibration: Calibration, decision: Decision) -> "Detector":
        """The same model and scores with other thresholds."""
        facts = {**self.facts, "decision": asdict(decision), "n_conformal": calibration.n}
        return replace(self, calibration=calibration, decision=decision, facts=facts)

    def save_calibration(self, folder: Path) -> None:
        """Put this detector's calibration and decision into its run folder."""
        changes = {k: self.facts[k] for k in ("decision", "n_conformal")}
        store.update_run(folder, changes, "calibration.safetensors", self._calibration_tensors())

    def _calibration_tensors(self) -> dict[str, Tensor]:
        c = self.calibration
        return {
            **flatten(self.scorer, "scorer."),
            **{f"conformal.{k}": torch.from_numpy(v) for k, v in c.scores.items()},
            **{f"peaks.{k}": torch.from_numpy(v) for k, v in c.peaks.items()},
        }

    def save(self, folder: Path, tables: dict[str, Any], documents: dict[str, Any]) -> None:
        """Write the run folder (DESIGN: a run is a folder)."""
        tensors: dict[str, dict[str, Tensor]] = {
            "model.safetensors": self.model.state_dict(),
            "calibration.safetensors": self._calibration_tensors(),
        }
        if self.references is not None:
            tensors["references.safetensors"] = references.to_tensors(self.references)
        store.save_run(folder, self.facts, tensors, tables, documents)


def load(folder: str | Path, device: torch.device | None = None) -> Detector:
    """The detector of a run folder; `RunError` says what is wrong with one that cannot serve."""
    folder = Path(folder)
    facts = store.read_facts(folder)
    store.check_run(folder, facts)
    device = device or choose_device()
    config = from_dict(facts["config"])
    model = VAE(config.model)
    _load_weights(model, folder)
    model = model.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    tensors = store.read_tensors(folder / "calibration.safetensors")
    scorer = unflatten(Scorer, tensors, "scorer.")
    return Detector(
        config=config,
        model=model,
        scorer=scorer.on(device),
        calibration=_calibration_of(tensors),
        decision=Decision(**facts["decision"]),
        references=references.read(folder)
        if "references.safetensors" in facts["checksums"]
        else None,
        facts=facts,
    )


def run(
    model: VAE,
    scorer: Scorer,
    batches: Iterable[Pixels | Callable[[], Pixels]],
    *,
    with_maps: bool = False,
    each: Callable[[Maps], None] | None = None,
    count: int = FEW,
) -> tuple[dict[str, NDArray[np.float64]], Maps]:
    """Every score (N,), and every map (N, H, W) if asked for, of batches of pixels (B, S, S, 3).

    Or of what gives them, which is called in the thread that scores them; a batch may be empty.
    `model` is a frozen one (`Detector.scoring`). The maps lie on disk, memory-mapped. `each` is
    called with the maps of each batch. `count` is how many images there are, about.
    """
    device = next(model.parameters()).device
    scores = _Scores(count)
    maps: dict[str, Spool] = {}

    drawing = with_maps or each is not None

    @torch.inference_mode()
    def work(given: Pixels | Callable[[], Pixels]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        pixels = given() if callable(given) else given
        if not len(pixels):
            return {}, {}
        with spread(len(pixels), device):
            seen = scorer.seen(model, to_batch(pixels, device), drawing)
            return scorer(*seen), seen.found if drawing else {}

    for told, found in in_parallel(work, batches, device):
        if not told:
            continue
        before = scores.filled
        scores.add(told)
        if scores.filled // GIVEN_BACK > before // GIVEN_BACK:
            heap.give_back()
        if not drawing:
            continue
        arrays = {name: value.cpu().numpy() for name, value in found.items()}
        if each is not None:
            each(arrays)
        if with_maps:
            maps = maps or {name: Spool() for name in arrays}
            for name, drawn in arrays.items():
                maps[name].add(drawn)
    return scores.columns(), {name: spool.array() for name, spool in maps.items()}


class _Reading:
    """Images that are decoded batch by batch: their names, or the reasons why they cannot be used."""

    def __init__(
        self, sources: Sequence[Source], size: int, resize: Resize, progress: Progress
    ) -> None:
        self.sources, self.size, self.resize = sources, size, resize
        self.told: list[str | ImageError] = [""] * len(sources)
        self.lock = Lock()
        self.ticks = iter(progress.track(range(len(sources)), "scoring", len(sources)))

    def begun(self, chunk: range, spread: Callable[..., Iterator[Any]]) -> Callable[[], Pixels]:
        """What gives the pixels (B, S, S, 3) of those of a range that can be used.

        They are decoded by `spread`: ahead by threads of a pool, or when they are asked for.
        """
        decoded = spread(self._decoded, chunk)

        def gathered() -> Pixels:
            good = [pixels for pixels in decoded if pixels is not None]
            return np.stack(good) if good else np.empty((0, self.size, self.size, 3), np.uint8)

        return gathered

    def _decoded(self, index: int) -> Pixels | None:
        pixels = None
        try:
            name = name_of(self.sources[index], index)
            pixels = load_image(self.sources[index], self.size, self.resize, name=name)
            self.told[index] = name
        except ImageError as error:
            self.told[index] = error
        with self.lock:
            next(self.ticks, None)
        return pixels

    def names(self) -> Iterator[str]:
        """Of those that can be used, in order, as far as they have been decoded."""
        return (told for told in self.told if isinstance(told, str))

    def refused(self) -> list[ImageError]:
        """Why others cannot, in order; nothing is left to be decoded."""
        with self.lock:
            next(self.ticks, None)
        return [told for told in self.told if isinstance(told, ImageError)]


class _Scores:
    """The scores of all images in one piece of memory, which is laid out at once where it can be.

    Small pieces kept between a batch's large ones would split the memory up.
    """

    def __init__(self, count: int) -> None:
        self.names: tuple[str, ...] = ()
        self.values = np.empty((0, count))
        self.filled = 0

    def add(self, told: dict[str, Tensor]) -> None:
        """Those of the next batch, (B,) each."""
        if not self.names:
            self.names = tuple(told)
            self.values = np.empty((len(told), self.values.shape[1]))
        upto = self.filled + len(next(iter(told.values())))
        if upto > self.values.shape[1]:
            room = np.empty((len(told), upto))
            self.values = np.concatenate([self.values[:, : self.filled], room], axis=1)
        for row, value in zip(self.values, told.values(), strict=True):
            row[self.filled : upto] = value.numpy()
        self.filled = upto

    def columns(self) -> dict[str, NDArray[np.float64]]:
        """All of every score, (N,)."""
        return dict(zip(self.names, self.values[:, : self.filled], strict=True))


def _is_one(images: Source | Sequence[Source]) -> bool:
    return isinstance(images, str | Path | np.ndarray) or hasattr(images, "convert")


def _load_weights(model: VAE, folder: Path) -> None:
    try:
        model.load_state_dict(store.read_tensors(folder / "model.safetensors"))
    except RuntimeError as error:
        raise RunError(f"{folder}: weights and settings disagree: fit it again") from error


def _calibration_of(tensors: dict[str, Tensor]) -> Calibration:
    def under(prefix: str) -> dict[str, NDArray[np.float64]]:
        return {
            k.removeprefix(prefix): v.numpy() for k, v in tensors.items() if k.startswith(prefix)
        }

    return Calibration(under("conformal."), under("peaks."))
