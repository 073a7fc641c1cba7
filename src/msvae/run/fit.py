"""From a folder of normal images to a run: decode, split, train, learn scores, calibrate, save.

Test images cannot come in here: `Parts` holds train, stop and conformal pixels and nothing else.
"""

import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from msvae.core import config as settings
from msvae.core.config import Config
from msvae.core.device import batch_size, choose_device, to_batch
from msvae.core.errors import DataError, ImageError, RunError
from msvae.core.files import as_csv
from msvae.core.progress import NullProgress, Progress, during
from msvae.core.replacement import check_folder
from msvae.core.state import Arrays
from msvae.data.cache import Images
from msvae.data.images import Pixels, Source
from msvae.engine.choose import choose, engine_name
from msvae.evaluation.conformal import Decision
from msvae.evaluation.table import quarantine_table
from msvae.explain.nearest import References
from msvae.networks.blocks import round_weights
from msvae.networks.model import Networks
from msvae.ops.filters import area_downsample
from msvae.run import store
from msvae.run.calibrate import calibrate_pixels, decision_of
from msvae.run.checkpoint import CheckpointWriter, resumed
from msvae.run.detector import Detector
from msvae.run.examples import (
    Examples,
    LabelledExamples,
    decode_examples,
    examples_of,
    taught,
)
from msvae.run.leakage import check_examples
from msvae.run.parts import GroupBy, Part, Parts, batches, split_images
from msvae.run.precision import is_tried, trial_batches, try_bfloat16
from msvae.scores.catalog import MAPS, NUMBERS
from msvae.scores.fit import Batches, Learned, learn
from msvae.scores.graph import ScoringGraph
from msvae.scores.verdict import Verdict
from msvae.training.auxiliary import TrainingResult, train_pretext, train_segmenter
from msvae.training.vae import State, train

REFERENCES = 1000  # training images whose thumbnails are kept
THUMBNAIL = 32
TOO_ALIKE = "the training images differ too little to learn from: add images that do"
EXAMPLE = 4  # images for which OpenVINO's numbers must be torch's


def fit(
    images: str | Path | Sequence[Source],
    out: str | Path | None = None,
    *,
    preset: str = "default",
    config: Config | None = None,
    settings_changed: Mapping[str, Any] | None = None,
    group_by: GroupBy | None = None,
    feedback: str | Path | Examples | None = None,
    engine: str | None = None,
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
    the two as `Examples`: labelled images that turn the fusion to what they show. `engine` computes
    what is scored, as for `msvae.load`. `resume` continues an interrupted fit of the same images and
    settings. `say` hears what is chosen.

    Raises `DataError`, `ConfigError`, `RateError` or `RunError`, each with the remedy.
    """
    chosen = (config or settings.preset(preset)).replace(**(settings_changed or {}))
    decision_of(chosen)  # refuse before the long work, not after
    engine_name(engine)
    progress = progress or NullProgress()
    folder = None if out is None else Path(out)
    if folder is not None:
        check_free(folder, resume=resume, overwrite=overwrite)
    examples = None if feedback is None else examples_of(feedback)
    parts, refused = split_images(images, chosen, group_by, progress, say)
    labelled = None if examples is None else decode_examples(examples, chosen)
    detector = fit_parts(
        parts,
        chosen,
        folder,
        feedback=labelled,
        engine=engine,
        resume=resume,
        refused=refused,
        progress=progress,
        say=say,
    )
    if folder is not None and refused:
        where = folder / store.QUARANTINE
        say(f"{len(refused)} images could not be read: {where} names them")
    return detector


def check_free(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Raise `RunError` where a finished run would be written over unasked."""
    check_folder(folder)
    if store.is_run(folder) and not overwrite:
        raise RunError(f"{folder}: holds a finished run: choose another --out, or add --overwrite")
    if resume and not (folder / store.CHECKPOINT).is_file():
        raise RunError(f"{folder}: has no checkpoint to resume from: leave out --resume")


def fit_parts(
    parts: Parts,
    config: Config,
    folder: Path | None,
    *,
    feedback: LabelledExamples | None = None,
    engine: str | None = None,
    resume: bool = False,
    refused: Sequence[ImageError] = (),
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Detector:
    """Train, learn the scores, calibrate, and write the run; the `refused` images are named in it.

    Raises `DataError` where an image of the feedback is among the others: it may neither calibrate
    nor be learned twice.
    """
    engine_name(engine)  # an unknown one is refused before the long work
    if feedback is not None:
        check_examples(feedback, [(r["sha256"], r["path"]) for r in parts.rows()])
    progress = progress or NullProgress()
    device = choose_device()
    torch.manual_seed(config.train.seed)
    networks = Networks(config.model).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    sizes = {name: len(getattr(parts, name).names) for name in ("train", "stop", "conformal")}
    say(
        f"{sizes['train']} images to train on, {sizes['stop']} to stop on, "
        f"{sizes['conformal']} to calibrate on; {device.type}, {config.model.image_size} px"
    )
    pixels, stop = parts.train.pixels, parts.stop.pixels
    state = _train_vae(networks, parts, config, folder, resume, progress)
    pretext = train_pretext(networks, pixels, config, progress)
    if pretext.gave_up:
        say(f"orders and turns say little here: gave up learning them after {pretext.steps} steps")
    train_segmenter(networks, pixels, stop, config, progress)
    round_weights(networks.eval().requires_grad_(False))
    held = _images(stop, device, NullProgress(), "")

    def fit_scores() -> Learned:
        return learn(
            networks,
            _images(pixels, device, progress, "learning scores"),
            held,
            count=sizes["train"],
            alpha=config.decide.alpha,
            beta=config.train.beta,
        )

    try:
        graph, verdict = during(progress, "fitting scores", fit_scores)
    except (torch.linalg.LinAlgError, np.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
        raise DataError(TOO_ALIKE) from error
    fitted = FittedGraph(graph, pixels[:EXAMPLE])
    scoring = choose(fitted, engine)
    if scoring.info.name == "openvino":
        during(progress, "making the graph", fitted.openvino_model)
    if feedback is not None:
        verdict = taught(scoring, verdict, stop, feedback)
        counts = f"{len(feedback.normal.names)} normal, {len(feedback.anomalous.names)} anomalous"
        say(f"feedback: {counts}")
    calibration = calibrate_pixels(scoring, verdict, parts.conformal.pixels, progress)
    decision = decision_of(config)
    facts = _facts(config, decision, sizes, pretext)
    if is_tried(scoring, config):
        tried = trial_batches(parts.conformal.pixels)
        facts["precision"] = during(
            progress,
            "trying bfloat16",
            lambda: try_bfloat16(fitted, verdict, calibration, decision, tried),
        )
    detector = Detector(
        config=config,
        graph=fitted,
        verdict=verdict,
        calibration=calibration,
        decision=decision,
        references=_references(graph, verdict, parts.train, device, progress),
        facts=facts,
        engine_name=engine,
    )
    if folder is not None:
        rows = [*parts.rows(), *([] if feedback is None else feedback.rows())]
        tables = {"history.csv": state.history, "split.csv": rows}
        beside = {store.QUARANTINE: as_csv(quarantine_table(refused))} if refused else {}
        detector.save(folder, tables, {"environment.json": environment(detector)}, beside)
    return detector


class FittedGraph:
    """The graph of a detector that was fitted in this process."""

    key = None

    def __init__(self, graph: ScoringGraph, example: Pixels) -> None:
        """`example` are a few normal images (B, S, S, 3)."""
        self.graph, self.example, self.side = graph, example, example.shape[1]

    def torch_graph(self) -> ScoringGraph:
        """The torch module, where it was trained."""
        return self.graph

    def openvino_model(self) -> Any:
        """The OpenVINO model, in float32."""
        from msvae.engine.convert import restore

        return restore(self._files, self.arrays(), "the graph")

    @cached_property
    def _files(self) -> dict[str, bytes]:
        """The model as it will be read again: so it gives the same numbers to the bit."""
        from msvae.engine.convert import convert, dump

        return dump(convert(self.graph, self.example), self.arrays())

    def arrays(self) -> Arrays:
        """Its tensors by name."""
        return self.graph.arrays()

    def files(self) -> dict[str, bytes]:
        """Its OpenVINO form as files."""
        return self._files


def environment(detector: Detector) -> dict[str, Any]:
    """What the run was made with."""
    names = ("multi-score-vae", "torch", "openvino", "numpy", "scikit-learn", "pillow")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": choose_device().type,
        "threads": torch.get_num_threads(),
        "engine": detector.engine.info.to_json(),
        "packages": {name: version(name) for name in (*names, "safetensors")},
    }


def _train_vae(
    networks: Networks,
    parts: Parts,
    config: Config,
    folder: Path | None,
    resume: bool,
    progress: Progress,
) -> State:
    identity = {
        "format": store.FORMAT,  # weights of another one may lie otherwise
        "config": settings.to_dict(config),
        "images": sorted(parts.train.digests),
    }
    state = resumed(folder, identity) if resume and folder is not None else None
    writer = None if folder is None else CheckpointWriter(folder, identity)
    try:
        state = train(
            networks.vae,
            parts.train.pixels,
            parts.stop.pixels,
            config,
            state=state,
            save=writer or (lambda now: None),
            progress=progress,
        )
    finally:  # after an interruption too
        if writer is not None:
            writer.flush()
    return state


def _images(pixels: Images, device: torch.device, progress: Progress, task: str) -> Batches:
    """Each call goes over the pixels once, as images (B, 3, S, S)."""
    size = batch_size(pixels[:1].shape[1], device)

    def over() -> Iterable[Tensor]:
        return (to_batch(batch, device) for batch in batches(pixels, size, progress, task))

    return over


@torch.no_grad()
def _references(
    graph: ScoringGraph, verdict: Verdict, part: Part, device: torch.device, progress: Progress
) -> References:
    """An even selection of training images, for the nearest normal ones and the oddest ones."""
    step = -(-len(part.names) // REFERENCES)
    latents, thumbnails, numbers = [], [], []
    for x in _images(part.pixels[::step], device, progress, "keeping references")():
        e = graph.networks(x)
        latents.append(e.mu.cpu().numpy())
        numbers.append(graph.numbers(e, graph.parts.places(e)).cpu().numpy())
        small = area_downsample(x, THUMBNAIL) if x.shape[-1] > THUMBNAIL else x
        thumbnails.append((small * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy())
    return References(
        tuple(part.names[::step]),
        np.concatenate(latents),
        np.concatenate(thumbnails),
        verdict(np.concatenate(numbers))["fused"],
    )


def _facts(
    config: Config, decision: Decision, sizes: dict[str, int], pretext: TrainingResult
) -> dict[str, Any]:
    return {
        "msvae": version("multi-score-vae"),
        "config": settings.to_dict(config),
        "decision": asdict(decision),
        "n": sizes,
        "n_conformal": sizes["conformal"],
        "pretext": asdict(pretext),
        "graph": {"numbers": list(NUMBERS), "maps": list(MAPS)},
    }
