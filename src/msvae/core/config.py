"""Every setting, in frozen dataclasses that check themselves; presets and TOML; no torch.

`Config` has four parts, the sections of a TOML file: `[model]`, `[train]`, `[augment]`, `[decide]`.
"""

import dataclasses
import math
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from msvae.core.errors import ConfigError

Resize = Literal["stretch", "square"]
Schedule = Literal["onecycle", "cosine", "constant"]
Precision = Literal["auto", "fp32", "bf16"]


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network: one convolutional stage for each entry of `hidden_dims`.

    Each stage halves the resolution; of two or more, the first keeps it for images of at most
    32 px. `sigma_vae` sets the decoder variance to its optimum (Rybkin et al. 2021); without it the
    loss is the plain squared error + `beta` * KL of the seed method. `pretext` adds the network
    that learns which channel order and which quarter turn an image is shown in; `segmenter` the one
    that learns to mark imagined defects.
    """

    image_size: int = 64
    resize: Resize = "stretch"
    latent_dim: int = 128
    hidden_dims: tuple[int, ...] = (32, 64, 128, 256)
    dropout: float = 0.0
    batch_norm: bool = True
    sigma_vae: bool = True
    pretext: bool = True
    segmenter: bool = True

    def __post_init__(self) -> None:
        _require(8 <= self.image_size <= 1024, "model.image_size must lie in 8…1024 px")
        _require(self.latent_dim >= 2, "model.latent_dim must be at least 2")
        _require(
            1 <= len(self.hidden_dims) <= 6 and min(self.hidden_dims) >= 1,
            "model.hidden_dims must hold one to six positive widths, such as [32, 64, 128]",
        )
        _require(0 <= self.dropout < 1, "model.dropout must lie in [0, 1)")
        multiple = 2 ** (len(self.hidden_dims) - self.keeps_resolution)
        _require(
            self.image_size % multiple == 0,
            f"model.image_size must be a multiple of {multiple} for {len(self.hidden_dims)} stages",
        )

    @property
    def keeps_resolution(self) -> bool:
        """Whether the first stage has stride 1."""
        return self.image_size <= 32 and len(self.hidden_dims) > 1

    @property
    def sides(self) -> tuple[int, ...]:
        """Of the maps of every stage, px."""
        first = 0 if self.keeps_resolution else 1
        return tuple(self.image_size // 2 ** (first + i) for i in range(len(self.hidden_dims)))


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training: Adam with decoupled weight decay, a learning-rate schedule, early stopping.

    A small folder is passed over more often than `epochs`, until `min_steps` steps are done. The
    pretext network sees every image up to `pretext_epochs` times, at its own small size, in at most
    12,000 steps. The segmenter takes `segmenter_steps`, and more of images beyond 64 px: 4.9 times as
    many at 128 px, at most five times.
    `patience` counts epochs without a better loss on the stop part; 0 never stops early.
    """

    epochs: int = 12
    min_steps: int = 240
    pretext_epochs: int = 60
    segmenter_steps: int = 600
    batch_size: int = 32
    learning_rate: float = 1.5e-3
    schedule: Schedule = "onecycle"
    weight_decay: float = 1e-4
    beta: float = 1.0
    patience: int = 0
    seed: int = 0
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        _require(self.epochs >= 1, "train.epochs must be at least 1")
        _require(self.min_steps >= 0, "train.min_steps must not be negative")
        _require(self.pretext_epochs >= 1, "train.pretext_epochs must be at least 1")
        _require(self.segmenter_steps >= 1, "train.segmenter_steps must be at least 1")
        _require(self.batch_size >= 2, "train.batch_size must be at least 2")
        _require(0 < self.learning_rate < 1, "train.learning_rate must lie in (0, 1)")
        _require(
            0 <= self.weight_decay < math.inf, "train.weight_decay must be 0 or more, and finite"
        )
        _require(0 <= self.beta < math.inf, "train.beta must be 0 or more, and finite")
        _require(self.patience >= 0, "train.patience must not be negative")


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Random changes of the training images that leave a normal image normal.

    `crop` is the largest shift as a fraction of the side (edges mirrored); `jitter` the largest
    relative change of brightness, contrast and saturation.
    """

    flip_horizontal: bool = False
    flip_vertical: bool = False
    crop: float = 0.0
    jitter: float = 0.0

    def __post_init__(self) -> None:
        _require(0 <= self.crop <= 0.5, "augment.crop must lie in [0, 0.5]")
        _require(0 <= self.jitter < 1, "augment.jitter must lie in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class DecideConfig:
    """How a score becomes a decision.

    `rule` is `conformal` (flag when p <= `target_fpr`), or `fixed` (flag when the `weighted` score
    reaches `threshold`: the seed method), or `f1` (a threshold learned from labelled images).
    `alpha` is the weight of the reconstruction in `weighted` (seed method, 0.6).
    """

    rule: Literal["conformal", "fixed", "f1"] = "conformal"
    target_fpr: float = 0.05
    alpha: float = 0.6
    threshold: float = 0.5

    def __post_init__(self) -> None:
        _require(0 < self.target_fpr < 1, "decide.target_fpr must lie in (0, 1)")
        _require(0 <= self.alpha <= 1, "decide.alpha must lie in [0, 1]")
        _require(math.isfinite(self.threshold), "decide.threshold must be a finite number")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides a run, apart from the images."""

    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    decide: DecideConfig = field(default_factory=DecideConfig)

    def replace(self, **changes: Any) -> "Config":
        """A copy with single settings changed by name: `config.replace(image_size=64, epochs=5)`."""
        tree: dict[str, dict[str, Any]] = {}
        for name, value in changes.items():
            section = _SECTION_OF.get(name)
            if section is None:
                raise ConfigError(
                    f"no setting is called {name!r}: known are {', '.join(_SECTION_OF)}"
                )
            tree.setdefault(section, {})[name] = value
        return from_dict(tree, base=self)


SECTIONS = {
    "model": ModelConfig,
    "train": TrainConfig,
    "augment": AugmentConfig,
    "decide": DecideConfig,
}
_SECTION_OF = {f.name: s for s, cls in SECTIONS.items() for f in dataclasses.fields(cls)}
PRESETS = {
    "default": Config(),
    "seed": Config(
        model=ModelConfig(
            image_size=224,
            latent_dim=128,
            hidden_dims=(512, 256, 128),
            dropout=0.1,
            sigma_vae=False,
            pretext=False,
            segmenter=False,
        ),
        train=TrainConfig(
            epochs=100,
            min_steps=0,
            batch_size=64,
            learning_rate=1e-3,
            schedule="cosine",
            weight_decay=1e-4,
            beta=1.0,
            patience=10,
        ),
        augment=AugmentConfig(flip_horizontal=True, crop=0.1, jitter=0.1),
        decide=DecideConfig(rule="fixed", alpha=0.6, threshold=0.5),
    ),
}


def preset(name: str) -> Config:
    """The named preset; `ConfigError` lists the names there are."""
    if name not in PRESETS:
        raise ConfigError(f"no preset is called {name!r}: choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """The settings as plain nested dicts, as they stand in `config.json`."""
    return dataclasses.asdict(config)


def from_dict(tree: dict[str, Any], base: Config | None = None) -> Config:
    """The config that `tree` describes, over `base`; unknown sections and keys are refused by name."""
    base = base or Config()
    parts: dict[str, Any] = {}
    for section, values in tree.items():
        if section not in SECTIONS:
            raise ConfigError(f"no section is called [{section}]: known are {', '.join(SECTIONS)}")
        if not isinstance(values, dict):
            raise ConfigError(f"[{section}] must be a section of settings, not {values!r}")
        parts[section] = _replace_section(section, getattr(base, section), values)
    return dataclasses.replace(base, **parts)


def load_toml(path: Path, base: Config | None = None) -> Config:
    """The settings of a TOML file over those of `base`."""
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}): check the path") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not TOML ({error})") from error
    return from_dict(tree, base)


def _replace_section(section: str, old: Any, values: dict[str, Any]) -> Any:
    hints = get_type_hints(type(old))
    for name in values:
        if name not in hints:
            raise ConfigError(f"[{section}] has no setting {name!r}: known are {', '.join(hints)}")
    checked = {name: _coerce(f"{section}.{name}", hints[name], v) for name, v in values.items()}
    return dataclasses.replace(old, **checked)


def _coerce(name: str, hint: Any, value: Any) -> Any:
    """`value` as the type that the field wants; JSON and TOML know lists but no tuples."""
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        _require(value in choices, f"{name} must be one of {', '.join(choices)}, not {value!r}")
        return value
    if get_origin(hint) is tuple:
        good = isinstance(value, list | tuple) and all(type(v) is int for v in value)
        _require(good, f"{name} must be a list of whole numbers, not {value!r}")
        return tuple(value)
    if hint is float and type(value) is int:
        _require(abs(value) < 2**63, f"{name} must be a number of a sensible size, not {value!r}")
        return float(value)
    _require(type(value) is hint, f"{name} must be of type {hint.__name__}, not {value!r}")
    return value
