"""What every file of a run has to hold: types, ranges, sizes, shapes, finite numbers.

A run comes from anywhere, and a right checksum vouches for nothing but the bytes. What is checked
here is read without a second thought everywhere else. No torch.
"""

import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from msvae.core import config as settings
from msvae.core.config import Config, ModelConfig
from msvae.core.errors import ConfigError, DataError, MsvaeError, RunError
from msvae.core.files import read_json, read_rows
from msvae.evaluation.conformal import Calibration, Decision, needed
from msvae.scores.catalog import (
    ABOUT,
    FUSED_SCORES,
    MAP_SCORES,
    MAPS,
    NUMBERS,
    STATISTIC_GROUPS,
    STATISTICS,
)

Check = Callable[[Any, str], None]  # a value and where it stands; raises `Mismatch`
MOST = 1e30  # of any number: what lies beyond would overflow where it is squared
COUNT = 2**53  # of anything, at most
REMEDY = "restore the folder from a copy, or fit it again"


class Mismatch(ValueError):  # noqa: N818 - it becomes the error of the file that it is found in
    """A value that is not what it has to be; the message says where, and what it should be."""


# Values of JSON documents.


def whole(low: int, high: int = COUNT) -> Check:
    """A whole number in [low, high]."""
    return _is(lambda v: type(v) is int and low <= v <= high, f"a whole number from {low}")


def number(low: float = -MOST, high: float = MOST, *, inside: bool = False) -> Check:
    """A finite number in [low, high], or between the two."""

    def holds(value: Any) -> bool:
        if type(value) not in (int, float) or not low <= value <= high:
            return False
        return not inside or low < value < high

    return _is(holds, f"a number from {low:g} to {high:g}")


def text(pattern: str = r"[^\0]*", most: int = 4096) -> Check:
    """A text of at most so many characters that fits a regular expression."""
    fits = re.compile(pattern, re.DOTALL).fullmatch
    return _is(lambda v: isinstance(v, str) and len(v) <= most and bool(fits(v)), "a fitting text")


def choice(*values: Any) -> Check:
    """One of these values."""
    names = ", ".join(map(str, values))
    return _is(lambda v: type(v) in map(type, values) and v in values, f"one of {names}")


def optional(check: Check) -> Check:
    """None, or what the check wants."""

    def checked(value: Any, where: str) -> None:
        if value is not None:
            check(value, where)

    return checked


def listing(check: Check, least: int = 0, most: int = COUNT) -> Check:
    """A list whose entries fit the check."""
    is_list = _is(lambda v: isinstance(v, list) and least <= len(v) <= most, "a fitting list")

    def checked(value: Any, where: str) -> None:
        is_list(value, where)
        for entry in value:
            check(entry, f"an entry of {where}")

    return checked


def mapping(check: Check, name: Check | None = None) -> Check:
    """A mapping whose values fit the check; `name` is what its keys have to fit."""

    def checked(value: Any, where: str) -> None:
        _is_mapping(value, where)
        for key, entry in value.items():
            (name or text(most=200))(key, f"a name in {where}")
            check(entry, f"{where}.{key}")

    return checked


def record(
    required: Mapping[str, Check], more: Mapping[str, Check] | None = None, others: bool = True
) -> Check:
    """A mapping with these keys; `more` may be there, and `others` that nobody reads."""

    def checked(value: Any, where: str) -> None:
        _is_mapping(value, where)
        for key, check in required.items():
            if key not in value:
                raise Mismatch(f"{where} lacks {key}")
            check(value[key], f"{where}.{key}")
        for key, check in (more or {}).items():
            if key in value:
                check(value[key], f"{where}.{key}")
        beyond = value.keys() - required.keys() - (more or {}).keys()
        if beyond and not others:
            raise Mismatch(f"{where} has an unknown {_short(min(beyond))}")

    return checked


def _is(holds: Callable[[Any], bool], what: str) -> Check:
    def check(value: Any, where: str) -> None:
        if not holds(value):
            raise Mismatch(f"{where} is {_short(value)}, not {what}")

    return check


_is_mapping = _is(lambda v: isinstance(v, dict), "a mapping")


def _short(value: Any) -> str:
    """A value in a message: on one line, and not for ever."""
    if isinstance(value, dict | list):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, int) and abs(value) > COUNT:
        return "an absurd number"
    return shown if len(shown := repr(value)) <= 60 else f"{shown[:59]}…"


flag = choice(True, False)
share = number(0, 1)
scalar = _is(lambda v: v is None or isinstance(v, str | int | float), "a plain value")
digest = text(r"[0-9a-f]{64}")

FACTS = record(
    {
        "checksums": mapping(digest),
        "config": mapping(mapping(lambda *_: None)),  # its settings check themselves
        "decision": record(
            {
                "rule": choice("conformal", "fixed", "f1"),
                "score": choice(*ABOUT),
                "target_fpr": number(0, 1, inside=True),
                "threshold": optional(number()),
            },
            others=False,
        ),
        "msvae": text(most=100),
        "n": record(dict.fromkeys(("train", "stop", "conformal"), whole(1))),
        "n_conformal": whole(1),
    },
    {
        "pretext": record({"steps": whole(0), "loss": number(), "gave_up": flag}),
        "precision": record({"bfloat16": flag}, {"tried_on": optional(text(most=200))}),
    },
)
ENVIRONMENT = record(
    {},
    {"packages": mapping(optional(text())), "engine": mapping(scalar), "python": text()},
)
STATE = record(
    {
        "epoch": whole(0),
        "best_epoch": whole(0),
        "best_loss": _is(lambda v: type(v) is float and not math.isnan(v), "a loss"),
        "history": listing(mapping(number())),
    },
    others=False,
)
_FIGURES = mapping(mapping(optional(number())))  # of each map, by name
_INTERVAL = listing(number(), 2, 2)
_AUROC = {"auroc": share, "auroc_ci95": _INTERVAL}
_JUDGED: tuple[dict[str, Check], dict[str, Check]] = (  # one protocol, or a folder
    {
        "scores": mapping(
            record(
                {"auroc": share},
                {
                    **_AUROC,
                    **dict.fromkeys(("average_precision", "fpr_at_95_tpr"), optional(share)),
                    "frozen": optional(mapping(number())),
                },
            )
        )
    },
    {
        "maps": _FIGURES,
        "explanations": _FIGURES,
        "ablation": mapping(record({**_AUROC, "fused_minus_ci95": _INTERVAL})),
        "n": mapping(whole(0)),
    },
)
EVALUATION = record({"evaluation": text(), **_JUDGED[0]}, _JUDGED[1])
BENCHMARK = record(
    {
        "benchmark": text(),
        "protocols": mapping(record(*_JUDGED), choice("native", "equalised")),
        "data": record(
            {
                "normal": record({"split": text()}),
                "anomalous": record({"path": text(), "sha256": text(), "stands_in": scalar}),
            }
        ),
        "published": mapping(
            record({}, dict.fromkeys(("auroc", "accuracy", "f1"), optional(share)), others=False)
        ),
    }
)

TABLES: dict[str, dict[str, Check]] = {
    "split.csv": {
        "path": text(),
        "part": choice("train", "stop", "conformal", "feedback"),
        "sha256": digest,
    },
    "calibrated.csv": {"path": text(), "sha256": digest},
    "quarantine.csv": {"path": text(), "reason": text()},
    "history.csv": {},
}


def check_facts(folder: Path, facts: Mapping[str, Any]) -> Config:
    """The settings of a run whose `config.json` holds what it has to; `RunError` where it does not."""
    path = folder / "config.json"
    _fits(FACTS, facts, path, "it")
    if facts.get("graph") != {"numbers": list(NUMBERS), "maps": list(MAPS)}:
        raise RunError(
            f"{folder}: has other scores, statistics or maps than this msvae: fit it again"
        )
    try:
        return settings.from_dict(facts["config"])
    except ConfigError as error:
        raise RunError(f"{path}: {str(error)[:200]}: {REMEDY}") from error


def check_decision(folder: Path, decision: Decision, calibration: Calibration, n: int) -> None:
    """Raise `RunError` where a decision cannot be made by the calibration, or n is not its number."""
    if calibration.n != n:
        raise RunError(f"{folder}: its calibration is not of {n} images: {REMEDY}")
    if decision.rule == "conformal":
        if n < needed(decision.target_fpr) or decision.score != "fused":
            raise RunError(
                f"{folder}: {n} calibration images cannot keep its false-alarm rate of "
                f"{decision.target_fpr:g}: calibrate it again"
            )
    elif decision.threshold is None:
        raise RunError(f"{folder}: its decision has no threshold: calibrate it again")


def check_state(path: Path, state: Any) -> None:
    """Raise `RunError` where a checkpoint does not hold the state of a training."""
    _fits(STATE, state, path, "its state", remedy="remove it, and fit without --resume")


def document(path: Path, check: Check, error: type[MsvaeError], remedy: str) -> dict[str, Any]:
    """The content of a JSON file that fits the check; `error` with the remedy where it does not."""
    try:
        content = read_json(path)
    except DataError as unreadable:
        raise error(str(unreadable)) from unreadable
    _fits(check, content, path, "it", error, remedy)
    return dict(content)


def table(
    path: Path, kind: str | None = None, error: type[MsvaeError] = RunError
) -> list[dict[str, str]]:
    """The rows of one of `TABLES`, by its name unless `kind` says which; none without a file."""
    try:
        rows = read_rows(path)
    except DataError as unreadable:
        raise error(str(unreadable)) from unreadable
    row = record(TABLES[kind or path.name])
    for at, cells in enumerate(rows, start=2):
        _fits(row, cells, path, f"line {at}", error, "restore it, or remove it")
    return rows


def history(path: Path) -> list[dict[str, float]]:
    """The rows of a training's `history.csv` as numbers."""
    check = record(dict.fromkeys(("epoch", "reconstruction", "kl", "stop_loss"), number()))
    rows = []
    for at, cells in enumerate(table(path), start=2):
        try:
            row = {name: float(cell) for name, cell in cells.items()}
        except ValueError as error:
            raise RunError(f"{path}: line {at} has a cell that is no number: {REMEDY}") from error
        _fits(check, row, path, f"line {at}")
        rows.append(row)
    return rows


def _fits(
    check: Check,
    value: Any,
    path: Path,
    where: str,
    error: type[MsvaeError] = RunError,
    remedy: str = REMEDY,
) -> None:
    try:
        check(value, where)
    except (Mismatch, RecursionError) as mismatch:
        raise error(f"{path}: {mismatch}: {remedy}") from mismatch


# Arrays.


@dataclass(frozen=True)
class Array:
    """What one array has to be. A dimension is a number, or a name: the same name, the same size."""

    shape: tuple[int | str, ...]
    dtype: str = "float64"
    low: float = -MOST
    high: float = MOST

    def check(self, array: NDArray[Any], where: str, sizes: dict[str, int]) -> None:
        """Raise `Mismatch` where it is not; `sizes` learns the named dimensions."""
        if array.dtype != self.dtype:
            raise Mismatch(f"{where} is of type {array.dtype}, not {self.dtype}")
        if array.ndim != len(self.shape):
            raise Mismatch(f"{where} has {array.ndim} dimensions, not {len(self.shape)}")
        for size, wanted in zip(array.shape, self.shape, strict=True):
            known = sizes.setdefault(wanted, size) if isinstance(wanted, str) else wanted
            if size != known:
                raise Mismatch(f"{where} has the shape {array.shape}, not {self.shape}")
        check_values(array, where, self.low, self.high)


Arrays = Mapping[str, NDArray[Any]]
Schema = Mapping[str, Array]
ABOVE = 1e-30  # of what is divided by


def check_values(array: NDArray[Any], where: str, low: float = -MOST, high: float = MOST) -> None:
    """Raise `Mismatch` where a value is not finite, or not in [low, high]."""
    if not _is_finite(array):
        raise Mismatch(f"{where} holds values that are no finite numbers")
    if (low, high) == (-MOST, MOST) or not array.size:
        return
    if float(array.min()) < low or float(array.max()) > high:
        raise Mismatch(f"{where} holds values that are not from {low:g} to {high:g}")


def _is_finite(array: NDArray[Any]) -> bool:
    """Whether no value is infinite, a NaN or so large that its square is: the sum of all squares is.

    That takes a third of the time of looking at each; halves have an exponent for what is not finite.
    """
    values = array.reshape(-1)
    if array.dtype == "float16":
        return not ((values.view(np.uint16) & 0x7C00) == 0x7C00).any()
    if array.dtype.kind != "f":
        return True
    with np.errstate(all="ignore"):
        return bool(np.isfinite(np.dot(values, values)))


def float32(*shape: int | str, low: float = -MOST) -> Array:
    """An array of single precision."""
    return Array(shape, "float32", low)


def _under(prefix: str, schema: Schema) -> dict[str, Array]:
    return {f"{prefix}.{name}": array for name, array in schema.items()}


def _quantiles(name: str, of: int) -> dict[str, Array]:
    """A `density.QuantileMap` of so many statistics."""
    return {
        "knots": Array((f"{name} columns", f"{name} knots")),
        "levels": Array((f"{name} columns", f"{name} knots")),
        "columns": Array((f"{name} columns",), "int64", 0, of - 1),
    }


def _two_sided(name: str, of: int) -> dict[str, Array]:
    """A `density.TwoSided` of so many statistics."""
    columns, parts = f"{name} columns", f"{name} components"
    mixture = {
        "log_weights": Array((parts,)),
        "means": Array((parts, columns)),
        "whiten": Array((parts, columns, columns)),
    }
    return _under("quantiles", _quantiles(name, of)) | _under("density", mixture)


def _verdict(values: int) -> dict[str, Array]:
    """A `verdict.Verdict` of images of so many values."""
    weight, fused = Array((), low=0, high=1), len(FUSED_SCORES)
    bands, image = (len(STATISTIC_GROUPS[k]) for k in ("residual bands", "image bands"))
    return {
        "beta": Array((), low=0),
        "size": Array((), low=values, high=values),
        "variance": Array((), low=ABOVE),
        **_under("weighted", {"alpha": weight, "lowest": Array((2,)), "highest": Array((2,))}),
        **_under("bands", _two_sided("bands", bands)),
        **_under("complexity", _two_sided("complexity", image)),
        **_under("typicality", _two_sided("typicality", len(STATISTICS))),
        **_under("fusion.quantiles", _quantiles("fusion", fused)),
        "fusion.gap": Array(("fusion columns",)),
        "fusion.width": Array(("fusion columns",), low=ABOVE),
        "fusion.weights": Array((fused,), low=0),
        "feedback.centre": Array(("features",)),
        "feedback.scale": Array(("features",), low=ABOVE),
        "feedback.weights": Array(("features",)),
    }


def calibration_schema(config: ModelConfig) -> dict[str, Array]:
    """The arrays of `calibration.safetensors`."""
    return {
        **_under("verdict", _verdict(3 * config.image_size**2)),
        **_under("conformal", dict.fromkeys(ABOUT, Array(("images",)))),
        **_under("peaks", dict.fromkeys(MAPS, Array(("peaks",)))),
    }


def references_schema(config: ModelConfig) -> dict[str, Array]:
    """The arrays of `references.safetensors`."""
    return {
        "names": Array(("bytes",), "uint8", 0, 255),
        "latents": float32("images", config.latent_dim),
        "thumbnails": Array(("images", "side", "side", 3), "uint8", 0, 255),
        "fused": Array(("images",)),
    }


def model_schema(config: ModelConfig) -> dict[str, Array]:
    """The fitted parts in `model.safetensors`, and the weights that tell the networks' size.

    Every other weight is checked against the networks themselves where these are made.
    """
    side, latent, maps = config.image_size, config.latent_dim, len(MAP_SCORES)
    widths, places = (3, *config.hidden_dims), max(side // 4, 2) ** 2
    channels = sum(config.hidden_dims[:3])
    stages = {
        f"networks.vae.stages.{i}.0.weight": float32(width, width_in, 3, 3)
        for i, (width_in, width) in enumerate(pairwise(widths))
    }
    flat = widths[-1] * config.sides[-1] ** 2
    parts = {
        "mahalanobis.mean": float32(latent),
        "mahalanobis.whiten": float32(latent, latent),
        "mahalanobis.n": Array((), low=1),
        "mahalanobis.shrinkage": Array((), low=0, high=1),
        "neighbours.bank": float32("bank", "embedding"),
        "places.residual.mean": float32(side, side),
        "places.residual.std": float32(side, side, low=ABOVE),
        "places.spatial.mean": float32(places, "features"),
        "places.spatial.whiten": float32(places, "features", "features"),
        "places.spatial.mix": float32(channels, "features"),
        "places.spatial.n": Array((), low=1),
        "places.spatial.shrinkage": Array((), low=0, high=1),
        "places.spatial.too_low": Array((), low=-2, high=2),
        "places.spatial.too_right": Array((), low=-2, high=2),
        "places.structure.mean": float32("structure"),
        "places.structure.whiten": float32("structure", "structure"),
        "places.structure.centre": float32("descriptor"),
        "places.structure.scale": float32("descriptor", low=ABOVE),
        "places.structure.descriptors": float32("kept", "descriptor"),
        "places.structure.places": Array(("kept", "grid", "structure"), "float16"),
        "shares": Array((maps,), low=1e-6, high=1),
        "rarity.lowest": float32(maps),
        "rarity.highest": float32(maps),
        "rarity.slope": float32(maps, low=0),
        "rarity.table": float32(maps, "table"),
        "weights": float32(maps, low=0),
    }
    ends = {"to_mu.weight": float32(latent, flat), "from_latent.weight": float32(flat, latent)}
    return {**stages, **_under("networks.vae", ends), **_under("parts", parts)}


def check_arrays(path: Path, schema: Schema, others: str | None = None) -> None:
    """Raise `RunError` where a safetensors file does not hold the arrays of a schema, and no more.

    Arrays below the prefix `others` may be there besides: finite numbers of any shape. One array
    after the other is read.
    """
    try:
        with safe_open(path, framework="np") as file:
            _check_names(set(file.keys()), schema, others)
            _check_each(((k, file.get_tensor(k)) for k in sorted(file.keys())), schema)
    except Mismatch as error:
        raise RunError(f"{path}: {error}: {REMEDY}") from error
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise RunError(f"{path}: is not a safetensors file of a run: {REMEDY}") from error


def _check_each(arrays: Iterable[tuple[str, NDArray[Any]]], schema: Schema) -> None:
    sizes: dict[str, int] = {}
    for name, array in arrays:
        if name in schema:
            schema[name].check(array, name, sizes)
        elif array.dtype not in ("float32", "int64"):
            raise Mismatch(f"{name} is of type {array.dtype}")
        else:
            check_values(array, name)
    for name, size in sizes.items():
        if size < _least(name):
            raise Mismatch(f"it has {size} {name}")


def _least(dimension: str) -> int:
    """How long a named dimension is at least: a constant statistic has no column."""
    return 2 if dimension.endswith(("knots", "table")) else 1 - dimension.endswith("columns")


def _check_names(names: Collection[str], schema: Schema, others: str | None) -> None:
    missing = schema.keys() - names
    unknown = [n for n in names if n not in schema and not (others and n.startswith(others))]
    if missing:
        raise Mismatch(f"it lacks {min(missing)}")
    if unknown:
        raise Mismatch(f"it has an unknown {_short(min(unknown))}")


def check_verdict(path: Path, arrays: Arrays) -> None:
    """Raise `RunError` where the knots of a quantile map do not rise, or a mixture has no volume."""
    for name, array in arrays.items():
        if name.endswith(".knots") and not (np.diff(array, axis=1) > 0).all():
            raise RunError(f"{path}: {name} does not rise: {REMEDY}")
        if (
            name.endswith("density.whiten")
            and not (np.diagonal(array, axis1=1, axis2=2) > ABOVE).all()
        ):
            raise RunError(f"{path}: {name} is no root of a precision: {REMEDY}")
    wanted = sum(len(arrays[f"verdict.{k}.quantiles.columns"]) for k in ("fusion", "typicality"))
    if len(arrays["verdict.feedback.centre"]) != wanted:
        raise RunError(f"{path}: its feedback is not of {wanted} features: {REMEDY}")


def reference_names(path: Path, packed: NDArray[np.uint8], count: int) -> tuple[str, ...]:
    """The names of the references, as many as there are, from their JSON text in an array."""
    try:
        names = json.loads(packed.tobytes())
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path}: its names are not JSON: {REMEDY}") from error
    _fits(listing(text(), count, count), names, path, "the list of names")
    return tuple(names)
