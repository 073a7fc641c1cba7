"""From a folder of normal images to a run: decode, split, train, learn scores, calibrate, save.

Test images cannot come in here: `Parts` holds train, stop and conformal pixels and nothing else.
"""

import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from msvae import config as settings
from msvae import files, heap, store
from msvae.alongside import Reached
from msvae.calibration import Calibration, Decision, rank
from msvae.compute import batch_of, choose_device, compute_type, to_batch
from msvae.config import Config
from msvae.data.cache import Images, decode, default_cache_dir
from msvae.data.folder import find_images
from msvae.data.images import Pixels, Source, digest, load_image, name_of
from msvae.data.split import group_names, split_by_content
from msvae.detector import Detector, Maps, run
from msvae.errors import ConfigError, DataError, ImageError, RunError
from msvae.model import VAE
from msvae.progress import Progress, Silent
from msvae.references import References
from msvae.scorer import Scorer, Told, learn
from msvae.table import write_quarantine
from msvae.teach import Taught, teach_both, train_inspector
from msvae.train import State, train

REFERENCES = 1000  # training images whose thumbnails are kept
THUMBNAIL = 32
CHECKPOINT_SHARE = 0.02  # of the training time goes into checkpoints
FIRST_CHECKPOINT = 30.0  # seconds: what a killed process may lose that had no time to write
FEEDBACK = "feedback"  # the part of labelled examples


class Examples(NamedTuple):
    """Labelled images, of either kind none or more."""

    normal: Sequence[Source]
    anomalous: Sequence[Source]


GroupBy = str | Callable[[Sequence[str]], list[str]]


@dataclass(frozen=True)
class Part:
    """Decoded images of one purpose."""

    pixels: Images  # (N, S, S, 3)
    names: tuple[str, ...]
    digests: tuple[str, ...]

    def rows(self, part: str) -> list[dict[str, str]]:
        """One row an image, as in `split.csv`, for the purpose `part`."""
        pairs = zip(self.names, self.digests, strict=True)
        return [{"path": name, "part": part, "sha256": digest} for name, digest in pairs]


@dataclass(frozen=True)
class Parts:
    """The normal images of a fit; what is trained on, stopped on and calibrated on never mixes."""

    train: Part
    stop: Part
    conformal: Part

    def rows(self) -> list[dict[str, str]]:
        """One row an image, as in `split.csv`."""
        kinds = ("train", "stop", "conformal")
        return [row for kind in kinds for row in getattr(self, kind).rows(kind)]


@dataclass(frozen=True)
class Shown:
    """Decoded examples."""

    normal: Part
    anomalous: Part

    def rows(self) -> list[dict[str, str]]:
        """One row an image, as in `split.csv`."""
        return [*self.normal.rows(FEEDBACK), *self.anomalous.rows(FEEDBACK)]


def fit(
    images: str | Path | Sequence[Source],
    out: str | Path | None = None,
    *,
    preset: str = "default",
    config: Config | None = None,
    settings_changed: Mapping[str, Any] | None = None,
    group_by: GroupBy | None = None,
    feedback: str | Path | Examples | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Detector:
    """Learn from a folder, list or glob of normal images, or from arrays and PIL images.

    `out` is the run folder to write; without it the detector lives in memory only. `config` (or the
    named `preset`), with single `settings_changed` by name, decides the rest. `group_by` is a
    regular expression on the path (images with the same match stay in the same part), or a function
    from all names to their groups. `feedback` is a folder with `normal/`, `anomalous/` or both, or
    the two as `Examples`: labelled images that turn the fusion to what they show. `resume` continues
    an interrupted fit of the same images and settings. `say` hears what is chosen.

    Raises `DataError`, `ConfigError`, `RateError` or `RunError`, each with the remedy.
    """
    chosen = (config or settings.preset(preset)).replace(**(settings_changed or {}))
    decision_of(chosen)  # refuse before the long work, not after
    progress = progress or Silent()
    folder = None if out is None else Path(out)
    if folder is not None:
        check_free(folder, resume=resume, overwrite=overwrite)
    examples = None if feedback is None else examples_of(feedback)
    parts, refused = split_images(images, chosen, group_by, progress, say)
    shown = None if examples is None else shown_examples(examples, chosen)
    detector = fit_parts(
        parts, chosen, folder, feedback=shown, resume=resume, progress=progress, say=say
    )
    if folder is not None:
        (folder / "quarantine.csv").unlink(missing_ok=True)
    if folder is not None and refused:
        write_quarantine(folder / "quarantine.csv", refused)
        say(f"{len(refused)} images could not be read: {folder / 'quarantine.csv'} names them")
    return detector


def check_free(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Raise `RunError` where a finished run would be written over unasked."""
    if store.is_run(folder) and not overwrite:
        raise RunError(f"{folder}: holds a finished run: choose another --out, or add --overwrite")
    if resume and not (folder / store.CHECKPOINT).is_file():
        raise RunError(f"{folder}: has no checkpoint to resume from: leave out --resume")


def split_images(
    images: str | Path | Sequence[Source],
    config: Config,
    group_by: GroupBy | None,
    progress: Progress,
    say: Callable[[str], None],
) -> tuple[Parts, tuple[ImageError, ...]]:
    """Decode the images and part them by content or by group; unreadable ones come beside."""
    sources: Sequence[Source] = images  # type: ignore[assignment]
    if isinstance(images, str | Path) or all(isinstance(i, str | Path) for i in images):
        found = find_images(images)  # type: ignore[arg-type]
        say(found.note)
        sources = found.names
    model = config.model
    decoded = decode(
        sources, model.image_size, model.resize, cache=default_cache_dir(), progress=progress
    )
    groups = None
    if group_by is not None:
        groups = (
            group_names(decoded.names, group_by)
            if isinstance(group_by, str)
            else group_by(decoded.names)
        )
    split = split_by_content(decoded.digests, groups)
    if config.decide.rule == "conformal":  # refuse before the long work, not after
        rank(config.decide.target_fpr, len(split.conformal))

    def part(rows: Sequence[int]) -> Part:
        names = tuple(decoded.names[i] for i in rows)
        return Part(decoded.some(rows), names, tuple(decoded.digests[i] for i in rows))

    return Parts(part(split.train), part(split.stop), part(split.conformal)), decoded.quarantine


def fit_parts(
    parts: Parts,
    config: Config,
    folder: Path | None,
    *,
    feedback: Shown | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Detector:
    """Train, learn the scores, calibrate, and write the run.

    Raises `DataError` where an image of the feedback is among the others: it may neither calibrate
    nor be learned twice.
    """
    if feedback is not None:
        refuse_shown(feedback, [(r["sha256"], r["path"]) for r in parts.rows()])
    progress = progress or Silent()
    device = choose_device()
    torch.manual_seed(config.train.seed)
    model = VAE(config.model).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    sizes = {name: len(getattr(parts, name).names) for name in ("train", "stop", "conformal")}
    say(
        f"{sizes['train']} images to train on, {sizes['stop']} to stop on, "
        f"{sizes['conformal']} to calibrate on; {device.type}, {config.model.image_size} px"
    )

    def train_vae(reached: Reached) -> State:
        return _train(model, parts, config, folder, resume, reached, progress)

    pixels = parts.train.pixels
    with heap.kept():
        state, learned = teach_both(model, pixels, config, train_vae, progress)
        train_inspector(model, pixels, parts.stop.pixels, config, progress)
    if learned.gave_up:
        say(f"orders and turns say little here: the companion gave up after {learned.steps} steps")
    scoring = model.frozen(compute_type(config.train, device))
    scorer = _learn(scoring, parts, config, progress)
    if feedback is not None:
        scorer = taught(scoring, scorer, parts.stop.pixels, feedback)
        say(
            f"feedback: {len(feedback.normal.names)} normal, {len(feedback.anomalous.names)} anomalous"
        )
    calibration = calibrate_pixels(scoring, scorer, parts.conformal.pixels, progress)
    decision = decision_of(config)
    detector = Detector(
        config=config,
        model=model,
        scorer=scorer,
        calibration=calibration,
        decision=decision,
        references=_references(scoring, scorer, parts.train),
        facts=_facts(config, decision, sizes, learned),
    )
    if folder is not None:
        rows = [*parts.rows(), *([] if feedback is None else feedback.rows())]
        tables = {"history.csv": state.history, "split.csv": rows}
        detector.save(folder, tables, {"environment.json": environment(device)})
        (folder / store.CHECKPOINT).unlink(missing_ok=True)
    return detector


def examples_of(feedback: str | Path | Examples) -> Examples:
    """The examples of a folder with `normal/`, `anomalous/` or both."""
    if not isinstance(feedback, str | Path):
        return feedback
    kinds = [Path(feedback) / name for name in Examples._fields]
    if not any(kind.is_dir() for kind in kinds):
        raise DataError(f"{feedback}: needs a folder normal or anomalous, or both: make one")
    return Examples(*(find_images(k).paths if k.is_dir() else () for k in kinds))


def shown_examples(examples: Examples, config: Config) -> Shown:
    """The examples decoded; raises `ImageError` for one that cannot be read."""
    return Shown(*(_shown(sources, config) for sources in examples))


def _shown(sources: Sequence[Source], config: Config) -> Part:
    side, names = config.model.image_size, [name_of(s, i) for i, s in enumerate(sources)]
    pixels = [load_image(s, side, config.model.resize) for s in sources]
    whole = np.stack(pixels) if pixels else np.zeros((0, side, side, 3), dtype=np.uint8)
    return Part(whole, tuple(names), tuple(digest(s) for s in sources))


def refuse_shown(shown: Shown, known: Sequence[tuple[str, str]]) -> None:
    """Raise `DataError` where an example has the content of an image, (sha256, name), of the run."""
    names = dict(known)
    for row in shown.rows():
        if row["sha256"] in names:
            raise DataError(
                f"{row['path']}: has the content of {names[row['sha256']]}: an image may teach or "
                "calibrate, not both: take it out of one side"
            )


def taught(model: VAE, scorer: Scorer, ordinary: Images, shown: Shown) -> Scorer:
    """The scorer with what the examples teach, against normal images that were not trained on."""
    kinds = (ordinary, shown.normal.pixels, shown.anomalous.pixels)
    return scorer.taught(*(told(model, scorer, pixels) for pixels in kinds))


@torch.no_grad()
def told(
    model: VAE, scorer: Scorer, pixels: Images, progress: Progress | None = None, task: str = ""
) -> Told:
    """What feedback learns from, and is applied to: features (N, F) and fused scores (N,)."""
    device = next(model.parameters()).device
    given = batches(pixels, device, progress or Silent(), task)
    return scorer.told(model.evidence(to_batch(batch, device)) for batch in given)


def decision_of(config: Config) -> Decision:
    """The decision that the settings ask for, before anything was learned for it."""
    d = config.decide
    if d.rule == "f1":
        raise ConfigError(
            "decide.rule = f1 needs labelled images: fit first, then msvae calibrate --rule f1"
        )
    if d.rule == "fixed":
        return Decision("fixed", "weighted", d.target_fpr, d.threshold)
    return Decision("conformal", "fused", d.target_fpr)


def calibrate_pixels(model: VAE, scorer: Any, pixels: Images, progress: Progress) -> Calibration:
    """Scores and map maxima of held-out normal images."""
    peaks: dict[str, list[Any]] = {}

    def keep(found: Maps) -> None:
        for name, drawn in found.items():
            peaks.setdefault(name, []).append(drawn.max(axis=(1, 2)).astype(np.float64))

    device = next(model.parameters()).device
    given = batches(pixels, device, progress, "calibrating")
    scores, _ = run(model, scorer, given, each=keep, count=len(pixels))
    return Calibration(scores, {k: np.concatenate(v) for k, v in peaks.items()})


def batches(
    pixels: Images, device: torch.device, progress: Progress, task: str
) -> Iterator[Pixels]:
    """The pixels, as many at a time as are scored together on the device, with progress."""
    size = batch_of(pixels[:1].shape[1], device)
    starts = range(0, len(pixels), size)
    for first in progress.track(starts, task, len(starts)):
        yield pixels[first : first + size]


def environment(device: torch.device) -> dict[str, Any]:
    """What the run was made with."""
    packages = ("multi-score-vae", "torch", "numpy", "scikit-learn", "pillow", "safetensors")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "packages": {name: version(name) for name in packages},
    }


def _train(
    model: VAE,
    parts: Parts,
    config: Config,
    folder: Path | None,
    resume: bool,
    reached: Reached,
    progress: Progress,
) -> State:
    identity = {
        "format": store.FORMAT,  # weights of another one may lie otherwise
        "config": settings.to_dict(config),
        "images": sorted(parts.train.digests),
    }
    state = None
    if resume and folder is not None:
        state = _resumed(folder, identity)
    keeper = None if folder is None else Keeper(folder, identity)
    try:
        state = train(
            model,
            parts.train.pixels,
            parts.stop.pixels,
            config,
            state=state,
            save=keeper or (lambda now: None),
            reached=reached,
            progress=progress,
        )
    finally:  # after an interruption too
        if keeper is not None:
            keeper.flush()
    return state


class Keeper:
    """Writes the checkpoint of a training: often enough, and no more often than it can afford.

    What is written holds all weights three times; after every short epoch it would take as long as
    the training. An interrupted training writes the last epoch on its way out.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder, self.identity = folder, identity
        self.due = time.monotonic() + FIRST_CHECKPOINT
        self.latest, self.written = State(), 0

    def __call__(self, now: State) -> None:
        """Take the state after an epoch."""
        self.latest = replace(now, history=list(now.history))
        if not store.is_run(self.folder):  # one that is being replaced stays whole until the end
            files.write_rows(self.folder / "history.csv", now.history)
        if time.monotonic() >= self.due:
            began = time.monotonic()
            self.flush()
            self.due = time.monotonic() + (time.monotonic() - began) / CHECKPOINT_SHARE

    def flush(self) -> None:
        """Write the latest state, unless that was done."""
        if self.latest.epoch > self.written:
            numbers = {k: v for k, v in vars(self.latest).items() if k != "tensors"}
            facts = {"identity": self.identity, "state": numbers}
            store.write_checkpoint(self.folder, self.latest.tensors, facts)
            self.written = self.latest.epoch


def _resumed(folder: Path, identity: dict[str, Any]) -> State:
    tensors, facts = store.read_checkpoint(folder)
    if facts["identity"] != _plain(identity):
        raise RunError(
            f"{folder}: was begun with other images or settings: resume with the same ones"
        )
    return State(**facts["state"], tensors=tensors)


def _plain(value: Any) -> Any:
    """As JSON gives it back: tuples become lists."""
    return store.unpack(store.pack(value))


def _learn(model: VAE, parts: Parts, config: Config, progress: Progress) -> Any:
    device = next(model.parameters()).device
    with torch.no_grad():
        return learn(
            model,
            lambda: (
                to_batch(b, device)
                for b in batches(parts.train.pixels, device, progress, "learning scores")
            ),
            lambda: (to_batch(b, device) for b in batches(parts.stop.pixels, device, Silent(), "")),
            count=len(parts.train.names),
            alpha=config.decide.alpha,
            beta=config.train.beta,
        )


def _references(model: VAE, scorer: Any, part: Part) -> References:
    """An even selection of training images, for the nearest normal ones and the oddest ones."""
    step = -(-len(part.names) // REFERENCES)
    pixels, names = part.pixels[::step], part.names[::step]
    device = next(model.parameters()).device
    latents, thumbs, fused = [], [], []
    with torch.no_grad():
        for batch in batches(pixels, device, Silent(), "references"):
            x = to_batch(batch, device)
            e = model.evidence(x)
            latents.append(e.mu.cpu())
            fused.append(scorer(e)["fused"])
            small = F.interpolate(x, size=(THUMBNAIL, THUMBNAIL), mode="area")
            thumbs.append((small * 255).round().byte().permute(0, 2, 3, 1).cpu().contiguous())
    joined = (torch.cat(latents), torch.cat(thumbs), torch.cat(fused))
    return References(tuple(names), *joined)


def _facts(
    config: Config, decision: Decision, sizes: dict[str, int], companion: Taught
) -> dict[str, Any]:
    return {
        "msvae": version("multi-score-vae"),
        "config": settings.to_dict(config),
        "decision": asdict(decision),
        "n": sizes,
        "n_conformal": sizes["conformal"],
        "companion": asdict(companion),
    }
