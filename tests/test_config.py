from pathlib import Path

import pytest

from vaescale.config import ConfigError, to_yaml
from vaescale.training import settings

ROOT = Path(__file__).parent.parent
QUICKSTART = ROOT / "configs" / "quickstart.yaml"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_config_loads_and_builds(path: Path) -> None:
    config = settings.load(path, [])
    settings.check(config, world=1)
    settings.check(config, world=8)


def test_overrides_are_typed_and_frozen() -> None:
    config = settings.load(QUICKSTART, ["steps=7", "optimizer.lr=1", "optimizer.betas=[0.5,0.6]", "deepspeed.a.b=1"])
    assert config.steps == 7
    assert config.optimizer.lr == 1.0
    assert tuple(config.optimizer.betas) == (0.5, 0.6)
    assert config.deepspeed == {"a": {"b": 1}}
    with pytest.raises(AttributeError):
        config.steps = 8
    with pytest.raises(AttributeError):
        config.model.quantizer.codes = 8


def test_the_saved_config_is_the_config(tmp_path: Path) -> None:
    config = settings.load(QUICKSTART, ["model.quantizer.codes=99", "deepspeed.zero_optimization.overlap_comm=true"])
    saved = tmp_path / "config.yaml"
    saved.write_text(to_yaml(config))
    assert settings.load(saved, []) == config


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("model.quantizer.codez=5", "unknown key model.quantizer.codez: did you mean model.quantizer.codes?"),
        ("stepz=5", "unknown key stepz: did you mean steps?"),
        ("zzz=5", "unknown key zzz: known are model, run"),
        ("steps=soon", "steps: Value 'soon'"),
        ("steps=1.5", "steps: Value '1.5'"),
        ("steps=0", "steps=0 must be at least 1"),
        ("zero=3", "zero: Invalid value"),
        ("model.kind=vqva", "model.kind=vqva is none of the models: "),
        ("model.quantizer=5", "model.quantizer is a section, not a value"),
        ("steps", "'steps' is not an override"),
        ("run=${oc.env:HOME}", "run: resolvers such as"),
        ("run=a-${oc.env:HOME}-b", "run: resolvers such as"),
        ("run=${seed}${oc.env:HOME}", "run: resolvers such as"),
        ("model.kind=${oc.env:HOME}", "model.kind: resolvers such as"),
        ("model.kind=${nope}", "model.kind=${nope} is none of the models"),
        ("run=${nope}", "run: Interpolation key 'nope' not found"),
        ("data.workers=-1", "data.workers=-1 must be at least 0"),
        ("ema=1", "ema=1.0 must be below 1"),
        ("optimizer.lr=-1", "optimizer.lr=-1.0 must be positive"),
        ("deepspeed.bf16.enabled=true", "deepspeed.bf16 is set by this trainer: use precision"),
        ("deepspeed.zero_optimization.stage=2", "use zero instead"),
        ("data.root=https://me:hunter2@host/shards", "data.root is the folder of the index, not a URL"),
    ],
)
def test_a_wrong_setting_is_one_sentence(override: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        settings.load(QUICKSTART, [override])
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("model: {kind: vqvae", "not valid YAML"),
        ("[1, 2]", "must be a mapping"),
        ("steps: 3", "model.kind=None is none of the models"),
        ("model: {kind: vqvae, _target_: os.system}", "unknown key model._target_"),
        ("model: !!python/object/apply:os.system ['true']", "not valid YAML"),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        settings.load(path, [])
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_a_batch_that_does_not_divide_names_two_that_do() -> None:
    config = settings.load(QUICKSTART, ["batch=20", "accumulation=3"])
    with pytest.raises(ConfigError, match="take batch=18 or batch=24"):
        settings.check(config, world=2)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("model.downsampling=3", "power of two"),
        ("model.width=1", "model.width=1 must be at least 2"),
        ("model.quantizer.codes=0", "model.quantizer.codes=0 must be at least 2"),
        ("model.quantizer.kind=fsq", "set project=4 and codes=1000"),
        ("model.quantizer.kind=lfq", "must be 2 to the power of the 64 channels"),
        ("data.size=130", "data.size=130 does not fit the model, which would decode 128 px: take data.size=128"),
    ],
)
def test_a_model_that_cannot_work_is_refused_before_training(override: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        settings.check(settings.load(QUICKSTART, [override]), world=1)


@pytest.mark.parametrize(
    "overrides",
    [
        ["kind=simvq", "depth=2"],
        ["kind=fsq", "levels=[8,5,5,5]", "codes=1000", "project=4"],
        ["kind=lfq", "project=9", "gradient=rotation"],
        ["metric=cosine", "project=8", "groups=2", "depth=3", "init=kmeans"],
    ],
    ids=" ".join,
)
def test_every_kind_of_quantizer_passes_the_check(overrides: list[str]) -> None:
    given = [f"model.quantizer.{override}" for override in overrides]
    settings.check(settings.load(QUICKSTART, given), world=1)
