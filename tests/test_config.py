"""Settings check themselves; what does not exist is refused by name; nothing heavy is imported."""

import dataclasses
import json
import subprocess
import sys

import pytest

from msvae.core.config import (
    PRESETS,
    SECTIONS,
    AugmentConfig,
    Config,
    DecideConfig,
    ModelConfig,
    TrainConfig,
    from_dict,
    load_toml,
    preset,
    to_dict,
)
from msvae.core.errors import ConfigError


def toml(config):
    """The settings as a TOML file; its scalars and lists are written as in JSON."""
    lines = []
    for section, values in to_dict(config).items():
        lines.append(f"[{section}]")
        lines += [f"{name} = {json.dumps(value)}" for name, value in values.items()]
    return "\n".join(lines)


OTHER = Config(
    model=ModelConfig(
        image_size=96, resize="square", latent_dim=7, hidden_dims=(3, 5), dropout=0.5
    ),
    train=TrainConfig(learning_rate=1e-5, schedule="cosine", beta=0.0, seed=-3, precision="fp32"),
    augment=AugmentConfig(flip_vertical=True, crop=0.5),
    decide=DecideConfig(rule="f1", target_fpr=1e-3, threshold=-2.0),
)


def test_the_seed_preset_is_the_seed_method():
    """Each of the seed's settings, to the letter."""
    c = preset("seed")
    assert c.model.image_size == 224
    assert c.model.latent_dim == 128
    assert c.model.hidden_dims == (512, 256, 128)
    assert c.model.dropout > 0
    assert c.model.batch_norm is True
    assert c.model.sigma_vae is False
    assert c.train.beta == 1
    assert c.train.batch_size == 64
    assert c.train.learning_rate == 1e-3
    assert c.train.weight_decay == 1e-4
    assert c.train.epochs == 100
    assert c.train.patience > 0, "no early stopping"
    assert c.decide.rule == "fixed"
    assert c.decide.alpha == 0.6
    assert c.decide.threshold == 0.5


def test_presets_by_name():
    """`default` is what one gets without a word; another name is answered with those there are."""
    assert preset("default") == Config()
    with pytest.raises(ConfigError, match=r"'sead': choose one of default, seed"):
        preset("sead")


@pytest.mark.parametrize("config", [*PRESETS.values(), OTHER], ids=[*PRESETS, "other"])
def test_settings_come_back_from_toml_and_json(tmp_path, config):
    """Every setting with its value and its type, whatever the base."""
    path = tmp_path / "c.toml"
    path.write_text(toml(config), encoding="utf-8")
    for base in (None, *PRESETS.values()):
        back = load_toml(path, base)
        assert back == config
        assert repr(back) == repr(config)
        assert from_dict(json.loads(json.dumps(to_dict(config))), base) == config


def test_a_file_changes_only_what_it_names(tmp_path):
    """The rest is that of the base; whole numbers serve where fractions are meant."""
    path = tmp_path / "c.toml"
    path.write_text("[train]\nepochs = 3\nbeta = 2\n")
    changed = load_toml(path, PRESETS["seed"])
    train = dataclasses.replace(PRESETS["seed"].train, epochs=3, beta=2.0)
    assert changed == dataclasses.replace(PRESETS["seed"], train=train)
    assert type(changed.train.beta) is float
    path.write_text("")
    assert load_toml(path) == Config()


UNKNOWN = {
    "[train]\nepoch = 3": r"\[train\] has no setting 'epoch': known are epochs, ",
    "[model]\nepochs = 3": r"\[model\] has no setting 'epochs': known are image_size, ",
    "[trian]\nepochs = 3": r"no section is called \[trian\]: known are model, train, ",
    "epochs = 3": r"no section is called \[epochs\]",
    "train = 3": r"\[train\] must be a section of settings, not 3",
}


@pytest.mark.parametrize("text", UNKNOWN)
def test_unknown_settings_are_refused_by_name(tmp_path, text):
    """A misspelt section or key is told, with the known ones; never ignored."""
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=UNKNOWN[text]):
        load_toml(path)


WRONG_TYPES = [
    ("train", "epochs", 3.0, "int"),
    ("train", "epochs", "3", "int"),
    ("train", "epochs", True, "int"),
    ("train", "beta", "1", "float"),
    ("model", "batch_norm", 1, "bool"),
    ("model", "hidden_dims", 32, "list of whole numbers"),
    ("model", "hidden_dims", [32, 64.0], "list of whole numbers"),
    ("model", "resize", "crop", "one of stretch, square, not 'crop'"),
    ("model", "resize", ["stretch"], "one of stretch, square"),
    ("decide", "rule", "best", "one of conformal, fixed, f1"),
]


@pytest.mark.parametrize("section, name, value, told", WRONG_TYPES)
def test_wrong_types_are_refused(section, name, value, told):
    """The setting, what it must be and what it was."""
    with pytest.raises(ConfigError, match=rf"{section}\.{name} must be .*{told}"):
        from_dict({section: {name: value}})


WRONG_VALUES = [
    ("model", "image_size", [7, 1025, 65]),
    ("model", "latent_dim", [1]),
    ("model", "hidden_dims", [[], [0], [-1, 2], [8] * 7]),
    ("model", "dropout", [-0.1, 1.0, float("nan")]),
    ("train", "epochs", [0]),
    ("train", "min_steps", [-1]),
    ("train", "batch_size", [1]),
    ("train", "learning_rate", [0.0, 1.0, float("nan")]),
    ("train", "weight_decay", [-1e-9, float("nan")]),
    ("train", "beta", [-1.0, float("nan")]),
    ("train", "patience", [-1]),
    ("augment", "crop", [-0.1, 0.6]),
    ("augment", "jitter", [-0.1, 1.0]),
    ("decide", "target_fpr", [0.0, 1.0, float("nan")]),
    ("decide", "alpha", [-0.1, 1.1]),
    ("decide", "threshold", [float("inf"), float("nan")]),
]


@pytest.mark.parametrize(
    "section, name, value", [(s, n, v) for s, n, values in WRONG_VALUES for v in values]
)
def test_values_out_of_range_are_refused(section, name, value):
    """Whichever way they come: from a file, by name, or built by hand."""
    given = tuple(value) if isinstance(value, list) else value
    told = rf"^{section}\.{name} must "
    with pytest.raises(ConfigError, match=told):
        from_dict({section: {name: value}})
    with pytest.raises(ConfigError, match=told):
        Config().replace(**{name: value})
    with pytest.raises(ConfigError, match=told):
        SECTIONS[section](**{name: given})


@pytest.mark.parametrize("size", [8, 16, 30, 32, 34, 36, 48, 224, 1000, 1024])
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_sizes_that_the_stages_cannot_halve_are_refused(size, stages):
    """Every stage halves, but the first of several keeps the resolution up to 32 px."""
    halvings = stages - 1 if size <= 32 and stages > 1 else stages
    if size % 2**halvings == 0:
        model = ModelConfig(image_size=size, hidden_dims=(4,) * stages)
        assert model.keeps_resolution is (halvings < stages)
        assert model.sides[-1] == size // 2**halvings
        assert len(model.sides) == stages
    else:
        with pytest.raises(ConfigError, match=f"multiple of {2**halvings} for {stages} stages"):
            ModelConfig(image_size=size, hidden_dims=(4,) * stages)


def test_settings_are_replaced_by_name():
    """Settings of several sections at once; the original stays; unknown names are told."""
    before = Config()
    after = before.replace(image_size=32, epochs=5, alpha=1, hidden_dims=[8, 16])
    assert (after.model.image_size, after.model.hidden_dims) == (32, (8, 16))
    assert (after.train.epochs, after.decide.alpha) == (5, 1.0)
    assert after.model.latent_dim == before.model.latent_dim
    assert before == Config()
    with pytest.raises(ConfigError, match="'imagesize': known are image_size, "):
        before.replace(imagesize=32)


def test_no_two_sections_share_a_name():
    """So that a setting can be called by its name alone."""
    names = [f.name for cls in SECTIONS.values() for f in dataclasses.fields(cls)]
    assert len(names) == len(set(names))
    assert list(SECTIONS) == [f.name for f in dataclasses.fields(Config)]


@pytest.mark.parametrize("part", [Config(), *(cls() for cls in SECTIONS.values())])
def test_settings_are_frozen(part):
    """Nobody changes a setting on the way, and none is given by place."""
    name = dataclasses.fields(part)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(part, name, 1)
    with pytest.raises(TypeError):
        type(part)(getattr(part, name))


def test_files_that_are_no_toml_are_told(tmp_path):
    """Absent, a folder, not TOML, not text: the path and the reason in one line."""
    (tmp_path / "bad.toml").write_text("[train\nepochs = 3")
    (tmp_path / "raw.toml").write_bytes(b"\xff\xfe")
    for name, reason in (
        ("absent.toml", "No such file"),
        ("", "cannot be read"),
        ("bad.toml", "is not TOML"),
        ("raw.toml", "is not TOML"),
    ):
        with pytest.raises(ConfigError, match=reason) as refused:
            load_toml(tmp_path / name)
        assert str(refused.value).startswith(str(tmp_path / name))
        assert len(str(refused.value).splitlines()) == 1


HEAVY = ("torch", "numpy", "scipy", "sklearn", "skimage", "matplotlib", "PIL", "captum")


def test_settings_load_without_torch():
    """`msvae` and its settings come without torch or any other heavy library: help is quick."""
    code = "import sys, msvae, msvae.core.config; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(shown.stdout.split())
    assert "msvae" in loaded
    assert not loaded & set(HEAVY)
