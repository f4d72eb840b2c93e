import re
import runpy
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from vaescale import settings
from vaescale.config import ConfigError, save, to_yaml
from vaescale.data import DataError, stream
from vaescale.hints import known_keys
from vaescale.models import MODELS, PIXELS
from vaescale.nn import conv
from vaescale.ranges import KEY, Range, require
from vaescale.renamed import RENAMED

ROOT = Path(__file__).parent.parent
QUICKSTART = ROOT / "configs" / "quickstart.yaml"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_config_loads_and_builds(path: Path, tmp_path: Path) -> None:
    """A model that is built on a run finds it: the run of the config of that name."""
    config = settings.load(path, [])
    base = MODELS[config.model.kind].base
    if base and getattr(config.model, base) != PIXELS:
        run = Path(getattr(config.model, base))
        tokenizer = settings.load(path.with_name(f"{run.name}.yaml"), [])
        assert tokenizer.run == str(run)
        (tmp_path / run.name).mkdir()
        save(tokenizer, tmp_path / run.name / "config.yaml")
        config = settings.load(path, [f"model.{base}={tmp_path / run.name}"])
    settings.check(config, world=1)
    settings.micro_batch(config, world=8)


def test_overrides_are_typed_and_frozen() -> None:
    config = settings.load(QUICKSTART, ["steps=7", "optimizer.lr=1", "optimizer.betas=[0.5,0.6]", "deepspeed.a.b=1"])
    assert config.steps == 7
    assert config.optimizer.lr == 1.0
    assert tuple(config.optimizer.betas) == (0.5, 0.6)
    assert config.deepspeed == {"a": {"b": 1}}
    with pytest.raises(AttributeError):
        config.steps = 8
    with pytest.raises(AttributeError):
        config.model.quantizer.codebook_size = 8


def test_the_saved_config_is_the_config(tmp_path: Path) -> None:
    config = settings.load(
        QUICKSTART, ["model.quantizer.codebook_size=99", "deepspeed.zero_optimization.overlap_comm=true"]
    )
    saved = tmp_path / "config.yaml"
    saved.write_text(to_yaml(config))
    assert settings.load(saved, []) == config


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("model.quantizer.codez=5", "unknown key model.quantizer.codez: did you mean model.quantizer.codebook_size?"),
        ("stepz=5", "unknown key stepz: did you mean steps?"),
        ("zzz=5", "unknown key zzz: known keys are model, run"),
        ("lr=1e-3", "unknown key lr: did you mean optimizer.lr?"),
        ("workers=4", "unknown key workers: did you mean data.workers?"),
        ("model.codes=512", "unknown key model.codes: did you mean model.quantizer.codebook_size?"),
        ("optimiser.lr=1", "unknown key optimiser.lr: did you mean optimizer.lr?"),
        ("data.batch=4", "unknown key data.batch: did you mean global_batch?"),
        ("batchsize=4", "unknown key batchsize: did you mean global_batch?"),
        ("kind=vae", "unknown key kind: did you mean model.kind, model.network.kind or model.q"),
        (
            "model.latents=8",
            "model.latent_dim is a setting of model.kind=pca, autoencoder, vae, hvae, vdvae or kl, not of vqvae",
        ),
        ("model.beta=1", "model.beta is a setting of model.kind=vae, hvae, vdvae or kl, not of vqvae"),
        ("--steps=10", "--steps is not an option: write steps=10"),
        ("--lr=1e-3", "--lr is not an option: write optimizer.lr=1e-3"),
        ("--data.root=a b", "--data.root is not an option: write data.root='a b'"),
        ("--data.flip=", "--data.flip is not an option: write data.flip=…"),
        ("--stpes=10", "--stpes is not an option: did you mean steps=10? -h lists the options"),
        ("--zzz=10", "--zzz is not an option: -h lists the options, and settings are written key=value: model, run"),
        ("steps=soon", "steps=soon must be a whole number"),
        ("steps=1.5", "steps=1.5 must be a whole number"),
        ("steps=0", "steps=0 must be at least 1"),
        ("zero_stage=3", "zero_stage=3 must be one of 0, 1, 2"),
        ("model.kind=vqva", "model.kind=vqva is not one of the models: "),
        ("model.quantizer=5", "model.quantizer is a section, not a value"),
        ("steps", "'steps' is not an override"),
        ("run=${oc.env:HOME}", "run: resolvers such as"),
        ("run=a-${oc.env:HOME}-b", "run: resolvers such as"),
        ("run=${seed}${oc.env:HOME}", "run: resolvers such as"),
        ("model.kind=${oc.env:HOME}", "model.kind: resolvers such as"),
        ("model.kind=${nope}", "model.kind=${nope} is not one of the models"),
        ("run=${nope}", "run: Interpolation key 'nope' not found"),
        ("data.workers=-1", "data.workers=-1 must be at least 0"),
        ("ema_decay=1", "ema_decay=1.0 must be below 1"),
        ("optimizer.lr=-1", "optimizer.lr=-1.0 must be above 0"),
        ("deepspeed.bf16.enabled=true", "vaescale sets deepspeed.bf16 itself: use precision"),
        ("deepspeed.zero_optimization.stage=2", "use zero_stage instead"),
        ("deepspeed.zero_optimization.round_robin_gradients=true", "wrong names: remove it"),
        ("data.root=https://me:hunter2@host/shards", "data.root is the folder of the index, not a URL"),
    ],
)
def test_a_wrong_setting_is_one_sentence(override: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        settings.load(QUICKSTART, [override])
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("zero", [1, 2])
def test_weights_in_one_flat_tensor_have_no_layout(zero: int) -> None:
    assert settings.load(QUICKSTART, ["channels_last=true"]).channels_last
    with pytest.raises(ConfigError, match=f"with zero_stage={zero}, .*: set zero_stage=0 or channels_last=false$"):
        settings.load(QUICKSTART, ["channels_last=true", f"zero_stage={zero}"])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("model: {kind: vqvae", "not valid YAML"),
        ("[1, 2]", "must be a mapping"),
        ("steps: 3", "model.kind is missing or not a name: set it to one of autoencoder, code_prior, diffusion, hvae"),
        ("model: {kind: vqvae, _target_: os.system}", "unknown key model._target_"),
        ("model: !!python/object/apply:os.system ['true']", "line 1: tags such as !!python/object/apply:os.system"),
        ("model: {kind: vqvae}\nsteps: !!int 010", "line 2: tags such as !!int are not supported"),
        ("model: {kind: vqvae}\nsteps: 3\nsteps: 4", "line 3: steps is given twice"),
        ("model: {kind: vqvae, kind: vae}", "line 1: kind is given twice"),
        ("model: {kind: vqvae}\nseed: &a 3\nsteps: *a", "line 3: aliases such as *a are not supported"),
        ("model: {kind: vqvae}\n<<: {steps: 3}", "unknown key <<"),
        ("model: {kind: vqvae}\n? [steps]\n: 3", "line 2: the name of a setting must be a word"),
        ("model: {kind: [vqvae]}", "model.kind is missing or not a name: set it to one of "),
        ("model: {kind: vqvae}\nrun: [x]", "run must be one value, not a list"),
        ("model: {kind: vqvae}\nsteps: {x: 3}", "steps must be one value, not a section"),
        ("model: {kind: vqvae}\nrun: ''", "run= has no value"),
        ("model: {kind: vqvae}\nsteps:", "steps= has no value: give it one, or leave it out"),
        ("model: {kind: vqvae}\nsteps: null", "steps=null has no value"),
        ('model: {kind: vqvae}\nrun: "a\\0b"', "run=a\\x00b holds control characters"),
        ("model: {kind: vqvae}\ndata: 5", "data is a section, not a value"),
        ("model: {kind: vqvae}\ndeepspeed: 5", "deepspeed is a section, not a value"),
        ("--- {model: {kind: vqvae}}\n--- {}", "not valid YAML"),
        ("model: {kind: vqvae}\noptimiser:\n  lr: 1e-3", "unknown key optimiser.lr: did you mean optimizer.lr?"),
        ("model: {kind: vqvae}\noptimiser: {lr: 1, clip: 1}", "unknown key optimiser: did you mean optimizer?"),
        ("model: {kind: vqvae, codes: 9}", "unknown key model.codes: did you mean model.quantizer.codebook_size?"),
        (
            "model: {kind: vdvae, encoder: [{blockz: 1}]}",
            "unknown key model.encoder.blockz: did you mean model.encoder.b",
        ),
        ("", "must be a mapping"),
        ("[" * 100_000, "line 1: there are more than 32 levels"),
    ],
    ids=lambda value: value[:40],
)
def test_a_wrong_file_is_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        settings.load(path, [])
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_a_key_of_another_version_is_left_out_and_a_wrong_override_is_not(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("model: {kind: vqvae}\noptimizer: {old: 1}\nelder: {a: {b: 1}}")
    config, unknown = settings.load_saved(path, ["steps=3"])
    assert (config.steps, unknown) == (3, ["optimizer.old", "elder"])
    for override in ("optimiser.lr=1", "--optimizer.lr=1", "lr=1", "optimizer.old=2", "elder.a=1", " elder.a.c =1"):
        with pytest.raises(ConfigError, match=re.escape(override.partition("=")[0].split(".")[0].strip())):
            settings.load_saved(path, [override])


# The config.yaml of a run that was begun before the settings were renamed, at commit aee78a1.
EARLIER = """
model:
  kind: vqvae
  downsampling: 8
  quantizer: {codes: 24, dim: 4, project: 2, entropy: 0.1, temperature: 2.0, decay: 0.9}
run: runs/earlier
batch: 12
zero: 1
ema: 0.9
keep: 3
data: {root: pictures, least_area: 0.5, most_megapixels: 7, damaged_share: 0.1, damaged_free: 4}
optimizer: {clip: 2.0, warmup: 3, final: 0.2, patience: 5}
"""
EARLIER_VAE = """
model: {kind: hvae, latents: 6, top_latents: 3, warmup: 9, classes: 2, embedding: 5, likelihood: {learned: false}}
"""


def test_a_run_begun_with_old_names_is_read_with_the_new_ones(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(EARLIER)
    config, unknown = settings.load_saved(path, ["steps=7"])
    assert (unknown, config.version, config.steps) == ([], 3, 7)
    assert (config.global_batch, config.zero_stage, config.ema_decay, config.keep_last) == (12, 1, 0.9, 3)
    quantizer, data, optimizer = config.model.quantizer, config.data, config.optimizer
    assert (config.model.network.downsample_factor, quantizer.codebook_size, quantizer.codebook_dim) == (8, 24, 2)
    assert (quantizer.entropy_weight, quantizer.entropy_temperature, quantizer.ema_decay) == (0.1, 2.0, 0.9)
    assert (data.min_crop_area, data.max_megapixels, data.max_damaged_ratio, data.damaged_allowance) == (0.5, 7, 0.1, 4)
    assert (optimizer.grad_clip, optimizer.warmup_steps) == (2.0, 3)
    assert (optimizer.final_lr_ratio, optimizer.max_skipped_steps) == (0.2, 5)

    path.write_text(EARLIER_VAE)
    config, unknown = settings.load_saved(path, [])
    model = config.model
    assert (unknown, model.latent_dim, model.top_latent_dim, model.beta_warmup_steps) == ([], 6, 3, 9)
    assert (model.embedding_dim, model.likelihood.learned_variance) == (5, False)

    save(config, path)  # a second reading finds the new names
    assert settings.load_saved(path, []) == (config, [])


def test_settings_of_version_2_are_read_with_their_new_places(tmp_path: Path) -> None:
    """Those of the VQ-VAE's networks moved to a section of their own; other models have settings of the same names."""
    path = tmp_path / "config.yaml"
    path.write_text("model: {kind: vqvae, downsample_factor: 8, width: 6, residual_width: 5}\nversion: 2")
    for config in (settings.load(path, []), settings.load_saved(path, [])[0]):
        assert config.model.network == conv.Config(downsample_factor=8, width=6, residual_width=5)
        assert config.version == 3
    path.write_text("model: {kind: vdvae, width: 6}\nversion: 2")
    assert settings.load_saved(path, [])[0].model.width == 6


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["model.network.kind=cnn"], "model.network.kind=cnn is not one of the networks: conv, vqgan, vit"),
        (["model.network.blocks=3"], "model.network.blocks is a setting of model.network.kind=vqgan, not of conv"),
        (["model.network.kind=vqgan"], "is a setting of model.network.kind=conv, not of vqgan"),
        (["model.network.halvings=2"], "model.network.halvings is a setting of model.kind=autoencoder, vae or hvae"),
        (["model.network.widht=2"], "unknown key model.network.widht: did you mean model.network.width?"),
        (["model.network=conv"], "model.network is a section, not a value"),
    ],
)
def test_a_wrong_network_is_one_sentence(overrides: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        settings.load(QUICKSTART, overrides)
    assert sentence in str(error.value)


def test_settings_of_a_later_version_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("model: {kind: vqvae}\nversion: 4")
    for read in (settings.load, settings.load_saved):
        with pytest.raises(
            ConfigError, match=r"by a later version of vaescale \(version 4 of the settings; this one reads"
        ):
            read(path, [])


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_an_old_name_is_refused_with_the_new_one(tmp_path: Path, old: str, new: str) -> None:
    kinds = [kind for kind, family in MODELS.items() if new in known_keys(settings.Config(model=family.config()))]
    path = tmp_path / "mine.yaml"
    path.write_text(f"model: {{kind: {kinds[0]}}}")
    for read in (settings.load, settings.load_saved):
        with pytest.raises(ConfigError, match=f"^{re.escape(f'{old} is called {new} now')}$"):
            read(path, [f"{old}=1"])
    with pytest.raises(ConfigError, match=f"^{re.escape(f'--{old} is not an option: write {new}=1')}$"):
        settings.load(path, [f"--{old}=1"])
    assert all(old not in known_keys(settings.Config(model=MODELS[kind].config())) for kind in kinds)


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("quickstart", "configs/quickstart.yaml"),
        ("quickstart.yaml", "configs/quickstart.yaml"),
        ("config/quickstart.yml", "configs/quickstart.yaml"),
        ("configs/quickstrat.yaml", "configs/quickstart.yaml"),
        ("configs/vqvae", "configs/vqvae_digits.yaml"),
        ("mine/first", "mine/first.yml"),
        ("mine/frist.yml", "mine/first.yml"),
        ("runs/a", "runs/a/config.yaml"),
        ("configs/else.yaml", ""),
        ("nowhere/else", ""),
        ("configs", ""),
    ],
)
def test_a_missing_file_names_the_nearest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, meant: str
) -> None:
    for other in ("configs/quickstart.yaml", "configs/vqvae_digits.yaml", "mine/first.yml", "runs/a/config.yaml"):
        (tmp_path / other).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / other).touch()
    monkeypatch.chdir(tmp_path)
    hint = f"did you mean {meant}?" if meant else "the ready ones are in configs/"
    with pytest.raises(ConfigError) as error:
        settings.load(path, [])
    assert str(error.value) == f"there is no config file {path}: {hint}"


def given(overrides: list[str]) -> settings.Config:
    return settings.load(QUICKSTART, overrides)


NAMES = ["007", "1e5", "12e4567", "on", "no", "null", "true", "2026-11-25", "1:30", "0x10", ".5", "1_000", "[x]", "{x}"]
NAMES += ["a: b", "a#b", "#1", "@x", "*x", "!x", "%x", "- a", "|", "a=b", "[x", "'", "müll", "a\u00a0b", " x", "x.y"]


@pytest.mark.parametrize("name", NAMES)
def test_names_are_kept_as_they_are_typed(tmp_path: Path, name: str) -> None:
    config = given([f"run={name}", f"data.attributes=['{name.replace(chr(39), chr(39) * 2)}']"])
    assert (config.run, config.data.attributes) == (name, [name])
    saved = tmp_path / "config.yaml"
    saved.write_text(to_yaml(config))
    assert settings.load(saved, []) == config


@pytest.mark.parametrize("name", [name for name in NAMES if re.fullmatch(r"[\w.:-]+", name)])
def test_names_in_a_file_are_kept_as_they_are_written(tmp_path: Path, name: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"model: {{kind: vqvae}}\nrun: {name}\ndata: {{root: '{name}', attributes: [{name}, b]}}")
    config = settings.load(path, [])
    assert (config.run, config.data.root, config.data.attributes) == (name, name, [name, "b"])


def test_quotes_of_an_override_are_left_out() -> None:
    assert given(["run='007'", 'data.root="a b"']).run == "007"
    assert given(['data.root="a b"']).data.root == "a b"


WHOLE = {"010": 10, "+7": 7, "1e5": 100_000, "1E+2": 100, "128.0": 128, "5.": 5, "2.5e1": 25, " 12 ": 12, "'12'": 12}
NUMBERS = {"010": 10.0, ".5": 0.5, "5.": 5.0, "1e-3": 0.001, "1e3": 1000.0, "1.E2": 100.0, "3": 3.0, "'.5'": 0.5}
NONE = ["0x10", "0o17", "0b11", "1_000", "1,000", "1:30", "190:20:30", "nan", ".nan", "NaN", "inf", "-.inf", "1e", "e5"]
NONE += [
    "12e4567",
    "1e999999999",
    "9" * 5000,
    "１２",
    "−1",
    "1 2",
    "true",
    "[1]",
    "{}",
    "0.1.2",
    "--1",
    "",
    "~",
    "null",
]


@pytest.mark.parametrize("way", ["override", "file"])
def test_numbers_are_decimal(tmp_path: Path, way: str) -> None:
    def read(key: str, text: str) -> settings.Config:
        if way == "override":
            return given([f"{key}={text}"])
        path = tmp_path / "c.yaml"
        section, _, name = key.rpartition(".")
        line = f"{section}: {{{name}: {text}}}" if section else f"{name}: {text}"
        path.write_text(f"model: {{kind: vqvae}}\n{line}\n")
        return settings.load(path, [])

    for text, value in WHOLE.items():
        found = read("steps", text).steps
        assert (found, type(found)) == (value, int), text
    for text, value in NUMBERS.items():
        assert read("hang_timeout", text).hang_timeout == value, text
    for key in ("steps", "hang_timeout"):
        for text in NONE:
            with pytest.raises(ConfigError) as error:
                read(key, text)
            assert str(error.value).startswith(f"{key}") or f": {key}" in str(error.value), (key, text)
            assert len(str(error.value)) < 300
    assert given(["zero_stage=1.0", "data.channels=01"]).zero_stage == 1
    for text in ("1.5", "true", "x", ""):
        expected = f"zero_stage={text} must be one of 0, 1, 2$" if text else "zero_stage= has no value: "
        with pytest.raises(ConfigError, match=expected):
            read("zero_stage", text)


def test_what_is_true_and_what_is_false() -> None:
    for text, value in {"true": True, "False": False, "ON": True, "no": False, "0": False}.items():
        assert given([f"data.flip={text}"]).data.flip is value
    for text in ("2", "maybe", "", "null", "[true]"):
        with pytest.raises(ConfigError, match=r"data\.flip"):
            given([f"data.flip={text}"])


def test_nothing_is_an_empty_section_or_no_name(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("model: {kind: vqvae, quantizer:}\ndata:\noptimizer: null\ndeepspeed:\ninit_from: null\nsteps: 9\n")
    expected = settings.load(path, ["data={}", "deepspeed={}", "init_from="])
    assert settings.load(path, []) == expected
    assert (expected.init_from, expected.steps, expected.deepspeed) == ("", 9, {})
    assert settings.load(path, ["data.size=64", "init_from=~"]).data.size == 64
    assert given(["data=", "init_from=null"]) == given([])
    assert given(["data={size: 64, columns: 8}", "data.size=32"]).data.columns == 8


def test_what_is_passed_on_has_the_types_of_json() -> None:
    said = ["deepspeed.a=5e8", "deepspeed.b=[1, auto, null, 0.5]", "deepspeed.c={d: true, e: 'true'}", "deepspeed.f=on"]
    assert given(said).deepspeed == {
        "a": 5e8,
        "b": [1, "auto", None, 0.5],
        "c": {"d": True, "e": "true"},
        "f": "on",
    }


def schemas() -> dict[str, Any]:
    """Returns key → an instance, for every Config and the dataclasses in it; `model` once for each kind."""
    found: dict[str, Any] = {}

    def walk(config: Any, where: str) -> None:
        found[where] = config
        for one in fields(config):
            value, hint = getattr(config, one.name), get_type_hints(type(config))[one.name]
            if is_dataclass(value):
                walk(value, f"{where}.{one.name}" if where else one.name)
            for inner in get_args(hint):
                if is_dataclass(inner):
                    walk(inner(1, 1), f"{where}.{one.name}")

    for kind, family in MODELS.items():
        walk(family.config(), f"{kind}: model")
        for name, network in family.networks.items():
            walk(network.config(), f"{name}: model.network")
    walk(settings.Config(model=None), "")
    return found


SCHEMAS = schemas()


def numbers() -> list[tuple[str, Any, str, Range]]:
    """Returns (key, the config, the field's name, its range) of every number."""
    found = []
    for where, config in SCHEMAS.items():
        for one in fields(config):
            hint = get_type_hints(type(config))[one.name]
            if {hint, *get_args(hint)} & {int, float}:
                found.append((where, config, one.name, one.metadata.get(KEY)))
    return found


def test_every_number_has_a_range() -> None:
    """Every number must be declared with `ranged` and a lower bound; no setting may be negative so far."""
    assert len(SCHEMAS) > 15
    assert len(numbers()) > 60
    for where, _, name, within in numbers():
        assert within is not None, f"{where}.{name} states no range"
        assert within.least is not None or within.above is not None, f"{where}.{name} has no lower bound"


def test_every_bound_holds() -> None:
    """In code: NaN, infinities, text, true and the next number outside each bound are refused; bounds are valid."""
    for _, config, name, within in numbers():
        value = getattr(config, name)
        several = isinstance(value, list | tuple)
        whole = isinstance(value[0] if several else value, int)
        step = 1 if whole else 1e-9
        wrong: list[Any] = [float("nan"), float("inf"), -float("inf"), "1", True, None, 10**19 if whole else 10**400]
        right: list[Any] = []
        for bound, side, closed in (
            (within.least, -1, True),
            (within.above, -1, False),
            (within.most, 1, True),
            (within.below, 1, False),
        ):
            if bound is not None:
                bound = bound if whole else float(bound)
                wrong.append(bound + side * max(step, abs(bound) * step) if closed else bound)
                right.append(bound if closed else bound - side * max(step, abs(bound) * step))
        for one in wrong + right:
            made = replace(config, **{name: type(value)([one] * len(value)) if several else one})
            if any(one is other for other in right):
                require(made, "x")
                continue
            with pytest.raises(ValueError, match=rf"x\.{name}=.* must be "):
                require(made, "x")


@pytest.mark.parametrize(
    "override",
    [
        *(
            "optimizer.lr=nan",
            "optimizer.lr=0",
            "optimizer.grad_clip=inf",
            "optimizer.betas=[0.9,1.5]",
            "ema_decay=-0.1",
        ),
        *("optimizer.betas=[0.9]", "optimizer.betas=0.9", "optimizer.betas=[0.9,nan]", "optimizer.final_lr_ratio=-1"),
        *(
            "optimizer.weight_decay=-1",
            "data.min_crop_area=0",
            "data.min_crop_area=2",
            "data.max_damaged_ratio=2",
            "seed=-1",
        ),
        *("seed=99999999999999999999999", "seed=17592186044416", "model.quantizer.beta=-1", "model.variance=0"),
        *(
            "model.network.residual_blocks=-1",
            "model.network.residual_width=0",
            "model.quantizer.ema_decay=1",
            "stop_before=-1",
        ),
        *(
            "keep_every=-500",
            "steps=9223372036854775808",
            "data.damaged_allowance=-1",
            "data.channels=2",
            "precision=fp8",
        ),
        *("hang_timeout=1e300", "model.quantizer.levels=[8,0]", "model.quantizer.levels=8", "data.cache_gib=-1"),
    ],
)
def test_a_number_out_of_its_range_is_one_sentence(override: str) -> None:
    key = override.partition("=")[0]
    with pytest.raises(ConfigError, match=rf"^{re.escape(key)}=") as error:
        given([override])
    assert "\n" not in str(error.value)


def test_a_config_made_in_code_is_refused_in_code() -> None:
    config = given([])
    data, optimizer = config.data, config.optimizer
    wrongs: list[tuple[Any, str]] = [
        (replace(config, precision="fp8"), "precision=fp8 must be one of fp32, bf16, fp16"),
        (replace(config, data=replace(data, channels=0.25)), "data.channels=0.25 must be one of 1, 3"),
        (replace(config, data=replace(data, channels=True)), "data.channels=True must be one of 1, 3"),
        (replace(config, data=replace(data, size="64")), "data.size=64 must be a whole number"),
        (replace(config, model=replace(config.model, quantizer=None)), "model.quantizer=None must be a section"),
        (replace(config, optimizer=replace(optimizer, betas=(0.9,))), "must be a list of 2 values"),
        (replace(config, run=7), "run=7 must be text"),
    ]
    for wrong, sentence in wrongs:
        with pytest.raises(ConfigError, match=re.escape(sentence)):
            settings.build(wrong)
    for slices in (lambda data: stream.TrainSlices(data, 0), stream.ValidationSlices):
        with pytest.raises(DataError, match=re.escape("data.channels=0.25 must be one of 1, 3")):
            slices(stream.Config("data/photos", 64, 0.25))


def test_paths_are_those_of_a_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`~` and a leading variable for a folder, which no shell expands in a file or after `data.root=`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SCRATCH", str(tmp_path))
    monkeypatch.setenv("USER", "me")
    monkeypatch.setenv("SECRET", "s3cret")
    monkeypatch.setenv("RELATIVE", ".")
    monkeypatch.delenv("UNSET", raising=False)
    home = str(tmp_path)
    config = given(["run=~/r", "data.root=$HOME/d", "init_from=$SCRATCH", "data.cache=$SCRATCH/$USER/c"])
    assert (config.run, config.data.root, config.init_from) == (f"{home}/r", f"{home}/d", home)
    assert config.data.cache == f"{home}/me/c"
    assert given(["run=~"]).run == home
    assert given([]).data.cache == "~/.cache/vaescale"  # the saved config serves other users, too
    for kept in ("a~", "r/~", "5$", "$5", "a$", "$"):
        assert given([f"run={kept}"]).run == kept
    for wrong in ("$UNSET/x", "$SECRET", "$RELATIVE/x", "x/$HOME", "x-$SECRET", "~nobody-of-this-name/x", "$USERS/x"):
        for key in ("run", "data.root", "data.cache", "init_from"):
            with pytest.raises(ConfigError, match=f"^{key}=.*[:,] (or )?write .* out$") as error:
                given([f"{key}={wrong}"])
            assert "s3cret" not in str(error.value)
    monkeypatch.delenv("USER")
    with pytest.raises(ConfigError, match="the variable USER is not set"):
        given(["run=/scratch/$USER/r"])
    with pytest.raises(ConfigError) as error:
        given(["model.kind=\x1b[31m"])
    assert str(error.value).isprintable()
    assert given(["data.attributes=[~/x, $HOME]"]).data.attributes == ["~/x", "$HOME"]


def test_the_launcher_means_the_same_run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_directory = runpy.run_path(str(ROOT / "launch/run.py"))["run_directory"]
    monkeypatch.setenv("HOME", str(tmp_path))
    for override in ("run=~/r", "run=007", "run=on", "run=r-${seed}", "run='a b'", "run=$HOME/x"):
        command = ["deepspeed", "launch/train.py", "--config", str(QUICKSTART), "steps=010", override]
        assert str(run_directory(command)) == given([override]).run
    command = ["torchrun", "launch/train.py", f"--config={QUICKSTART}", "--take-over", "--local_rank=0", "run=x"]
    assert str(run_directory(command)) == "x"
    with pytest.raises(ConfigError, match="--steps is not an option: write steps=10"):
        run_directory([*command, "--steps", "10"])


def test_a_batch_that_does_not_divide_names_two_that_do() -> None:
    config = settings.load(QUICKSTART, ["global_batch=20", "accumulation=3"])
    with pytest.raises(ConfigError, match="use global_batch=18 or global_batch=24"):
        settings.check(config, world=2)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("model.network.downsample_factor=3", "power of two"),
        ("model.network.width=1", "model.network.width=1 must be at least 2"),
        ("model.quantizer.codebook_size=0", "model.quantizer.codebook_size=0 must be at least 2"),
        ("model.quantizer.kind=fsq", "set codebook_dim=4 and codebook_size=1000"),
        ("model.quantizer.kind=lfq", "must be 2 to the power of the 64 channels: set codebook_dim=9"),
        ("data.size=130", "data.size=130 does not fit the model, which would decode 128 px: set data.size=128"),
    ],
)
def test_a_model_that_cannot_work_is_refused_before_training(override: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        settings.check(settings.load(QUICKSTART, [override]), world=1)


@pytest.mark.parametrize(
    "overrides",
    [
        ["kind=simvq", "depth=2"],
        ["kind=fsq", "levels=[8,5,5,5]", "codebook_size=1000", "codebook_dim=4"],
        ["kind=lfq", "codebook_dim=9", "gradient=rotation"],
        ["metric=cosine", "codebook_dim=8", "groups=2", "depth=3", "init=kmeans"],
    ],
    ids=" ".join,
)
def test_every_kind_of_quantizer_passes_the_check(overrides: list[str]) -> None:
    given = [f"model.quantizer.{override}" for override in overrides]
    settings.check(settings.load(QUICKSTART, given), world=1)
