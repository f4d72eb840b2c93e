"""The settings of a config file. Importing this module loads neither deepspeed nor a process group."""

from collections.abc import Container
from dataclasses import dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_type_hints

import torch
from torch._subclasses import FakeTensorMode

from . import config as mechanics
from . import hub
from .config import ConfigError
from .data import places, stream
from .hints import either, known_keys
from .interfaces import Batch, Codec, Model, Reconstructor, SeparateDecoder, Shape
from .models import MODELS, PIXELS
from .nn import critic
from .ranges import ranged, require
from .renamed import RENAMED, VERSION, rename


@dataclass(frozen=True)
class Optimizer:
    """AdamW, with linear warm-up and cosine decay of the learning rate."""

    lr: float = ranged(3e-4, above=0)
    betas: tuple[float, float] = ranged((0.9, 0.99), least=0, below=1)
    weight_decay: float = ranged(0.0, least=0)
    # whether it includes parameters of one dimension: biases and the scales of norms
    decay_vectors: bool = True
    grad_clip: float = ranged(1.0, least=0)  # largest global gradient norm; 0: no clipping
    warmup_steps: int = ranged(100, least=0)  # steps
    final_lr_ratio: float = ranged(0.05, least=0, most=1)  # learning rate at the last step, as a share of lr
    # A step is skipped if its gradient norm exceeds `spike` times the running geometric mean, and its logarithm exceeds
    # the mean logarithm by six standard deviations; 0: only if it is not finite.
    spike: float = ranged(10.0, least=0)
    # The run stops after this many skipped steps in a row, or if over a quarter of the last hundred were skipped.
    max_skipped_steps: int = ranged(20, least=1)


@dataclass(frozen=True)
class Every:
    """Steps between reports, validations and checkpoints."""

    report: int = ranged(20, least=1)
    validate: int = ranged(500, least=1)
    checkpoint: int = ranged(500, least=1)
    evaluate: int = ranged(0, least=0)  # between validations that also measure what `evaluation` says; 0: never


@dataclass(frozen=True)
class Evaluation:
    """Comparisons of sets of images at every.evaluate, as of launch/evaluate.py."""

    # rfd and gfd are rFID and gFID if the features are those of Inception
    metrics: list[Literal["rfd", "rkid", "rpr", "gfd", "gkid", "gis", "gpr"]] = field(default_factory=lambda: ["rkid"])
    features: Literal["inception", "dinov2", "efficientnet-lite0", "random"] = "inception"  # random: for tests only
    # validation images that are used, evenly spaced, or all if there are fewer; also images that are generated
    count: int = ranged(2000, least=2)


@dataclass(frozen=True)
class Config:
    model: Any  # the Config of the model that model.kind names
    run: str = "runs/run"  # the run directory; running the same command again resumes it
    seed: int = ranged(0, least=0, below=2**44)  # so that seeds derived from it fit into 64 bits
    steps: int = ranged(1000, least=1)
    global_batch: int = ranged(128, least=1)  # images per step, over all ranks and accumulated micro-batches
    accumulation: int = ranged(1, least=1)
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    tf32: bool = False  # on GPUs, fp32 products and convolutions may round their inputs to TF32; not in evaluation
    deterministic: bool = False  # the same bits in every run on the same GPUs; slower
    compile: bool = False  # compile the model by torch.compile, which takes minutes at the start
    channels_last: bool = False  # keep weights of convolutions in memory as images are: [B, H, W, C]; at ZeRO 0
    zero_stage: Literal[0, 1, 2] = 0  # ZeRO stage; 0 is the fastest below about 1B parameters
    # decay of the averaged weights that validation and evaluation use
    ema_decay: float = ranged(0.999, least=0, below=1)
    keep_last: int = ranged(2, least=1)  # newest checkpoints that are kept
    # The run saves and stops this many seconds before the end of its SLURM job.
    stop_before: float = ranged(120.0, least=0)
    # The run ends itself after this many seconds without a step, or after ten times the longest of the last hundred
    # steps if that is more. Validation, saving and the first step have twelve times as long. 0: never.
    hang_timeout: float = ranged(300.0, least=0, most=10**7)
    keep_every: int = ranged(0, least=0)  # also keep the checkpoints of every multiple of this step for ever; 0: none
    # A run directory or a checkpoint whose weights a new run starts from, at step 0 with a fresh optimiser.
    init_from: str = ""
    # decoder: encoder and codebooks stay as they are in init_from, so that its latents keep their meaning
    train: Literal["all", "decoder"] = "all"
    data: stream.Config = field(default_factory=stream.Config)
    optimizer: Optimizer = field(default_factory=Optimizer)
    adversarial: critic.Config = field(default_factory=critic.Config)
    every: Every = field(default_factory=Every)
    evaluation: Evaluation = field(default_factory=Evaluation)
    deepspeed: dict[str, Any] = field(default_factory=dict)  # passed through to deepspeed.initialize
    version: int = ranged(VERSION, least=VERSION, most=VERSION)  # of the names of settings


# DeepSpeed settings that follow from the fields above, and are refused in `deepspeed`.
OWNED = {
    "train_batch_size": "global_batch",
    "train_micro_batch_size_per_gpu": "global_batch and accumulation",
    "gradient_accumulation_steps": "accumulation",
    "gradient_clipping": "optimizer.grad_clip",
    "optimizer": "the section optimizer",
    "scheduler": "optimizer.warmup_steps and optimizer.final_lr_ratio",
    "torch_autocast": "precision",
    "fp16": "precision",
    "bf16": "precision",
}


def load(path: str | Path, overrides: list[str]) -> Config:
    """Reads a config file with overrides. Raises ConfigError for unknown keys and values that cannot work."""
    raw = mechanics.read_yaml(path)
    if "version" in raw:  # a run's config.yaml
        rename(raw)
    mechanics.override(raw, overrides)
    return _checked(raw, path)


def _schema(raw: Any, path: str | Path) -> Config:
    """Returns the defaults of the settings that `raw` may have, which depend on the kinds that it names. Raises
    ConfigError."""
    version = str(raw.get("version"))
    if version.isdigit() and int(version) > VERSION:
        raise ConfigError(
            f"{path} was written by a later version of vaescale (version {version} of the settings; this one reads 1 "
            f"to {VERSION}): install that version"
        )
    kind = mechanics.as_written(raw, "model.kind")
    if kind is None:
        raise ConfigError(f"{path}: model.kind is missing or not a name: set it to one of {', '.join(sorted(MODELS))}")
    if kind not in MODELS:
        raise ConfigError(
            f"{path}: model.kind={kind} is not one of the models: {', '.join(sorted(MODELS))}; one that a plug-in adds "
            f"needs --plugin FILE.py, or in Python that its file is imported"
        )
    model, networks = MODELS[kind].config(), MODELS[kind].networks
    network = mechanics.as_written(raw, "model.network.kind") if networks else None
    if network is None:
        return Config(model=model)
    if network not in networks:
        raise ConfigError(f"{path}: model.network.kind={network} is not one of the networks: {', '.join(networks)}")
    return Config(model=replace(model, network=networks[network].config()))


def _checked(raw: Any, path: str | Path) -> Config:
    schema = _schema(raw, path)
    try:
        config = mechanics.typed(schema, raw, path)
    except mechanics.UnknownKey as error:
        if elsewhere := _elsewhere(RENAMED.get(error.key, error.key), schema.model):
            raise ConfigError(elsewhere) from None
        raise
    _require(config)
    return _located(config)


def _elsewhere(key: str, model: Any) -> str:
    """Returns a sentence if only other kinds of network or model than those of `model` have the setting `key`, else
    ""."""
    networks, families = MODELS[model.kind].networks, MODELS
    choices = {"model.kind": (model.kind, {kind: family.config() for kind, family in families.items()})}
    if networks:
        others = {kind: replace(model, network=network.config()) for kind, network in networks.items()}
        choices = {"model.network.kind": (model.network.kind, others), **choices}
    for setting, (kind, models) in choices.items():
        having = [other for other, one in models.items() if key in known_keys(Config(model=one))]
        if kind in having:
            return ""
        if having:
            return f"{key} is a setting of {setting}={either(having)}, not of {kind}"
    return ""


def load_saved(path: Path, overrides: list[str]) -> tuple[Config, list[str]]:
    """Reads a run's config.yaml with overrides. Returns the config, and the file's keys that this version does not
    know, which are ignored. Renamed keys get their new names, and missing ones their defaults. Raises ConfigError."""
    raw = mechanics.read_yaml(path)
    rename(raw)
    mechanics.override(raw, overrides)
    names = [override.partition("=")[0].strip().split(".") for override in overrides]
    given = {".".join(one[:depth]) for one in names for depth in range(1, len(one) + 1)}
    unknown = _prune(_schema(raw, path), raw, given)
    return _checked(raw, path), unknown


def _prune(schema: Any, raw: dict[str, Any], keep: Container[str], where: str = "") -> list[str]:
    """Removes the keys that `schema` (a dataclass instance) does not have, except those in `keep`. Returns their
    names."""
    unknown: list[str] = []
    for name, given in list(raw.items()):
        key, value = f"{where}{name}", getattr(schema, name, None)
        if name not in get_type_hints(type(schema)):
            if key not in keep:
                unknown.append(key)
                del raw[name]
        elif is_dataclass(value) and isinstance(given, dict):
            unknown += _prune(value, given, keep, f"{key}.")
    return unknown


def build(config: Config, training: bool = True) -> Model:
    """Builds the model that the config names. training: False for a model whose loss is not used; it reads no files.
    The codec of a model that is built on one has no trained weights yet: see trained.read_base.

    Raises ConfigError for a shape that the model cannot have. Configs may be made in code, so it also raises
    ConfigError for a value outside its range or Literal."""
    base = base_of(config)
    codec = [build(base, training=False)] if base else []
    try:
        require(config)
        model = config.model
        if not training and hasattr(model, "reconstruction"):
            model = replace(model, reconstruction=model.reconstruction.without_files())
        built = MODELS[config.model.kind].build(model, shape(config), config.seed, *codec)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if training and config.train == "decoder":
        if not isinstance(built, SeparateDecoder):
            raise ConfigError(
                f"train=decoder cannot be used with model.kind={config.model.kind}, whose decoder cannot be trained "
                f"alone: set train=all"
            )
        built.freeze_encoder()
    return built


def base_run(config: Config) -> Path | None:
    """Returns the run whose codec the model is built on, if it is built on one. Raises ConfigError if it is missing."""
    name = MODELS[config.model.kind].base if config.model.kind in MODELS else ""
    place = getattr(config.model, name, PIXELS)
    if place == PIXELS:
        return None
    if not place or not hub.settings_of(Path(place)).exists():
        what = f"model.{name}={place} is not a run directory" if place else f"model.{name} is missing"
        raise ConfigError(f"{what}: set it to the run= of a training whose latents are to be modelled")
    return Path(place)


def base_of(config: Config) -> Config | None:
    """Returns the settings of the run whose codec the model is built on, if it is built on one. Raises ConfigError if
    there is no such run, or if it was trained on images of another size or with other attributes."""
    run = base_run(config)
    if run is None:
        return None
    base, _ = load_saved(hub.settings_of(run), [])
    for name in ("size", "channels", "attributes"):  # a model may have attributes on a codec without
        ours, its = getattr(config.data, name), getattr(base.data, name)
        if ours and its and ours != its:
            raise ConfigError(
                f"data.{name}={ours} is not that of {run}, whose latents are modelled: set data.{name}={its}"
            )
    return base


def build_critic(config: Config) -> critic.Critic | None:
    """Builds a critic as in the config, for its sizes; None if there is none."""
    given = config.adversarial
    return critic.build(given, config.data.channels, config.seed) if given.weight else None


def shape(config: Config) -> Shape:
    return Shape(config.data.channels, config.data.size, len(config.data.attributes))


def blank(config: Config, count: int) -> Batch:
    """Returns a batch of `count` blank samples of the right shape."""
    label = torch.zeros(count, dtype=torch.int64)
    return Batch(stream.pictures(config.data).blank(count), label, torch.zeros(count, shape(config).attributes), label)


def check(config: Config, world: int) -> None:
    """Raises ConfigError for anything that can be found wrong without a process group or an accelerator."""
    micro_batch(config, world)
    size = config.data.size
    with FakeTensorMode(), torch.no_grad():  # propagates shapes without computing anything
        model = build(config).eval()
        batch = blank(config, 1)
        if config.adversarial.weight:
            _check_adversarial(config, model, batch)
        if getattr(config.model, "net", "") == "uniform":
            raise ConfigError(
                "model.net=uniform has nothing to train: evaluate the tokenizer itself, whose bits/dim are those with "
                "a uniform prior"
            )
        if not isinstance(model, Codec):
            return
        try:
            decoded = model.decode(model.encode(batch), batch.condition).shape[-1]
        except RuntimeError as error:
            raise ConfigError(f"data.size={size} does not fit the model: {str(error).splitlines()[0]}") from None
    if decoded != size:
        raise ConfigError(
            f"data.size={size} does not fit the model, which would decode {decoded} px: set data.size={decoded}"
        )


def _check_adversarial(config: Config, model: Model, batch: Batch) -> None:
    """Raises ConfigError if the model or its images do not fit the adversarial loss."""
    kind, given = config.model.kind, config.adversarial
    with torch.enable_grad():
        reconstruction = model(batch, 0).reconstruction
    # Models with a likelihood compute their reconstructions for people only, without a gradient.
    if MODELS[kind].learner != "descent" or reconstruction is None or not reconstruction.requires_grad:
        raise ConfigError(
            f"adversarial.weight={given.weight} cannot be used with model.kind={kind}, which is not trained on "
            f"reconstructions: set it to 0"
        )
    if given.adaptive and not isinstance(model, Reconstructor):
        raise ConfigError(
            f"adversarial.adaptive=true cannot be used with model.kind={kind}, whose loss has no part for the "
            f"reconstruction alone: set it to false"
        )
    if config.data.size < given.smallest:
        raise ConfigError(
            f"data.size={config.data.size} is too small for a critic with adversarial.layers={given.layers}, which "
            f"needs {given.smallest} px: set fewer layers"
        )


def micro_batch(config: Config, world: int) -> int:
    """Returns the images of one forward pass on one rank. Raises ConfigError if the batch does not divide evenly."""
    parts = config.accumulation * world
    if config.global_batch % parts:
        lower = config.global_batch // parts * parts
        raise ConfigError(
            f"global_batch={config.global_batch} cannot be split into {config.accumulation} micro-batches on {world} "
            f"ranks: use global_batch={lower or parts} or global_batch={lower + parts}"
        )
    return config.global_batch // parts


def without_bound(config: Config) -> str:
    """Returns a sentence if settings replace the likelihood of the model; "" if they do not, or if it never has one."""
    losses = getattr(config.model, "reconstruction", None)
    if losses is None or not losses.configured or not hasattr(config.model, "likelihood"):
        return ""
    return "the run has no bits/dim, because model.reconstruction stands in place of model.likelihood"


def _located(config: Config) -> Config:
    """Expands paths. `data.cache` keeps its `~`, because other users may use the saved config too."""
    run, init_from = mechanics.expanded("run", config.run), mechanics.expanded("init_from", config.init_from)
    root, cache = mechanics.expanded("data.root", config.data.root), mechanics.expanded("data.cache", config.data.cache)
    cache = config.data.cache if config.data.cache.startswith("~") else cache
    model = config.model
    if own := getattr(model, "reconstruction", None):
        weights = mechanics.expanded("model.reconstruction.perceptual.weights", own.perceptual.weights)
        model = replace(model, reconstruction=replace(own, perceptual=replace(own.perceptual, weights=weights)))
    if base := MODELS[model.kind].base:
        model = replace(model, **{base: mechanics.expanded(f"model.{base}", getattr(model, base))})
    data = replace(config.data, root=root, cache=cache)
    return replace(config, run=run, init_from=init_from, model=model, data=data)


def _require(config: Config) -> None:
    if config.keep_every % config.every.checkpoint:
        raise ConfigError(
            f"keep_every={config.keep_every} must be a multiple of every.checkpoint={config.every.checkpoint}: "
            f"only then are there checkpoints to keep"
        )
    if config.optimizer.spike and config.optimizer.spike <= 1:
        raise ConfigError(f"optimizer.spike={config.optimizer.spike} must be above 1, or 0 for no limit")
    if config.train == "decoder" and not config.init_from:
        raise ConfigError("train=decoder needs a trained encoder: set init_from to a run, or set train=all")
    adversarial = config.adversarial
    if adversarial.weight and config.precision == "fp16":
        raise ConfigError(
            "precision=fp16 cannot be used with adversarial.weight, because a critic's gradients are too small for it: "
            "set precision=bf16 or fp32"
        )
    if adversarial.critic_start > adversarial.start:
        raise ConfigError(
            f"adversarial.critic_start={adversarial.critic_start} must not be larger than "
            f"adversarial.start={adversarial.start}: an untrained critic has nothing to teach"
        )
    if config.channels_last and config.zero_stage:
        raise ConfigError(
            f"channels_last=true cannot be used with zero_stage={config.zero_stage}, where all weights are parts of "
            f"one flat tensor: set zero_stage=0 or channels_last=false"
        )
    if places.is_url(config.data.cache):
        raise ConfigError("data.cache is a folder on the node's own disk, not a URL")
    if places.is_url(config.data.root):  # not quoted: the URL may contain a password, which must not reach the log
        raise ConfigError(
            "data.root is the folder of the index, not a URL: make an index of shards behind a URL with "
            "`python launch/shards.py index URL --out DIR/train`, and set data.root=DIR"
        )
    for key in config.deepspeed:
        if key in OWNED:
            raise ConfigError(f"vaescale sets deepspeed.{key} itself: use {OWNED[key]} instead")
    zero = config.deepspeed.get("zero_optimization") or {}
    if "stage" in zero:
        raise ConfigError("vaescale sets deepspeed.zero_optimization.stage itself: use zero_stage instead")
    if zero.get("round_robin_gradients"):  # it reorders the parameters, which checkpoints take from the shards by place
        raise ConfigError(
            "deepspeed.zero_optimization.round_robin_gradients would save weights under wrong names: remove it"
        )
