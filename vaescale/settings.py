"""Everything a config file may say. Importing this file loads neither deepspeed nor a process group."""

from collections.abc import Container
from dataclasses import dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_type_hints

import numpy as np
import torch
from torch._subclasses import FakeTensorMode

from . import config as mechanics
from .config import ConfigError
from .data import places, stream
from .data.index import Index
from .hints import either, known_keys
from .interfaces import Batch, Codec, Model, Shape
from .models import MODELS
from .ranges import ranged, require


@dataclass(frozen=True)
class Optimizer:
    """AdamW, and a learning rate that rises linearly and falls along a cosine."""

    lr: float = ranged(3e-4, above=0)
    betas: tuple[float, float] = ranged((0.9, 0.99), least=0, below=1)
    weight_decay: float = ranged(0.0, least=0)
    clip: float = ranged(1.0, least=0)  # global gradient norm; 0: no clipping
    warmup: int = ranged(100, least=0)  # steps
    final: float = ranged(0.05, least=0, most=1)  # share of lr at the last step
    # A step is skipped if its gradient norm is so many times the running geometric mean and six standard deviations of
    # its logarithm above; 0: only if it is not finite.
    spike: float = ranged(10.0, least=0)
    # so many skipped steps in a row stop the run, and a quarter of the last hundred do
    patience: int = ranged(20, least=1)


@dataclass(frozen=True)
class Every:
    """Steps between …"""

    report: int = ranged(20, least=1)
    validate: int = ranged(500, least=1)
    checkpoint: int = ranged(500, least=1)


@dataclass(frozen=True)
class Config:
    model: Any  # the Config of the class that model.kind names
    run: str = "runs/run"  # the run directory; running the same command again resumes it
    seed: int = ranged(0, least=0, below=2**44)  # what is drawn from it must fit into 64 bits
    steps: int = ranged(1000, least=1)
    batch: int = ranged(128, least=1)  # images a step, over all ranks and all accumulated micro-batches
    accumulation: int = ranged(1, least=1)
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    zero: Literal[0, 1, 2] = 0  # ZeRO stage; 0 is the fastest below about 1B parameters
    ema: float = ranged(0.999, least=0, below=1)  # decay of the averaged weights that validation and evaluation use
    keep: int = ranged(2, least=1)  # checkpoints
    # seconds before the end of its SLURM job at which a run saves and stops
    stop_before: float = ranged(120.0, least=0)
    # Seconds without a step after which the run ends itself, if ten times the longest of late is not more; twelve times
    # as long for validation, saving and the first step. 0: never.
    hang_timeout: float = ranged(300.0, least=0, most=10**7)
    keep_every: int = ranged(0, least=0)  # and those of every such step, for ever; 0: none
    # A run directory or a checkpoint: a new run begins with its weights, at step 0, the optimiser knowing nothing.
    init_from: str = ""
    data: stream.Config = field(default_factory=stream.Config)
    optimizer: Optimizer = field(default_factory=Optimizer)
    every: Every = field(default_factory=Every)
    deepspeed: dict[str, Any] = field(default_factory=dict)  # passed through to deepspeed.initialize


SHOWN = 5  # classes named in one line


# What DeepSpeed is told from the fields above; to say it twice is to contradict oneself.
OWNED = {
    "train_batch_size": "batch",
    "train_micro_batch_size_per_gpu": "batch and accumulation",
    "gradient_accumulation_steps": "accumulation",
    "gradient_clipping": "optimizer.clip",
    "optimizer": "optimizer",
    "scheduler": "optimizer.warmup and optimizer.final",
    "torch_autocast": "precision",
    "fp16": "precision",
    "bf16": "precision",
}


def load(path: str | Path, overrides: list[str]) -> Config:
    """Raises ConfigError, one sentence, for anything that is not a setting or cannot work."""
    return _checked(mechanics.read(path, overrides), path)


def _checked(raw: Any, path: str | Path) -> Config:
    kind = mechanics.as_written(raw, "model", "kind")
    if kind not in MODELS:
        raise ConfigError(f"{path}: model.kind={kind} is none of the models: {', '.join(sorted(MODELS))}")
    try:
        config = mechanics.check(Config(model=MODELS[kind].config()), raw, path)
    except mechanics.UnknownKey as error:
        others = [other for other, family in MODELS.items() if error.key in known_keys(Config(model=family.config()))]
        if not others:
            raise
        raise ConfigError(f"{error.key} is a setting of model.kind={either(others)}, not of {kind}") from None
    _require(config)
    return _located(config)


def load_saved(path: Path, overrides: list[str]) -> tuple[Config, list[str]]:
    """(the settings in a run's config.yaml, with overrides; the keys that are left out because this version no longer
    has them). Keys of later versions have their defaults. Raises ConfigError."""
    raw = mechanics.read(path, overrides)
    kind = mechanics.as_written(raw, "model", "kind")
    names = [override.partition("=")[0].strip().split(".") for override in overrides]
    given = {".".join(one[:depth]) for one in names for depth in range(1, len(one) + 1)}
    unknown = _prune(Config(model=MODELS[kind].config()), raw, given) if kind in MODELS else []
    return _checked(raw, path), unknown


def _prune(schema: Any, raw: dict[str, Any], keep: Container[str], where: str = "") -> list[str]:
    """Remove the keys that `schema` (a dataclass instance) does not have, and return their names; but not `keep`."""
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


def build(config: Config) -> Model:
    """The model that the config names. Raises ConfigError for a shape that it cannot have, and, since a config may also
    be made in code, for a value outside its range or its Literal."""
    try:
        require(config)
        return MODELS[config.model.kind].build(config.model, shape(config), config.seed)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def shape(config: Config) -> Shape:
    return Shape(config.data.channels, config.data.size, len(config.data.attributes))


def blank(config: Config, count: int) -> Batch:
    """So many samples of the right shape that show nothing."""
    label = torch.zeros(count, dtype=torch.int64)
    return Batch(stream.pictures(config.data).blank(count), label, torch.zeros(count, shape(config).attributes), label)


def check(config: Config, world: int) -> None:
    """Everything that can be known to be wrong before a process group or an accelerator is touched."""
    micro_batch(config, world)
    size = config.data.size
    with FakeTensorMode(), torch.no_grad():  # shapes only: nothing is computed
        model = build(config).eval()
        batch = blank(config, 1)
        if not isinstance(model, Codec):
            return
        try:
            decoded = model.decode(model.encode(batch), batch.condition).shape[-1]
        except RuntimeError as error:
            raise ConfigError(f"data.size={size} does not fit the model: {str(error).splitlines()[0]}") from None
    if decoded != size:
        raise ConfigError(
            f"data.size={size} does not fit the model, which would decode {decoded} px: take data.size={decoded}"
        )


def micro_batch(config: Config, world: int) -> int:
    """Images of one forward pass on one rank. Raises ConfigError unless they divide the batch evenly."""
    parts = config.accumulation * world
    if config.batch % parts:
        lower = config.batch // parts * parts
        raise ConfigError(
            f"batch={config.batch} cannot be split into {config.accumulation} micro-batches on {world} ranks: "
            f"take batch={lower or parts} or batch={lower + parts}"
        )
    return config.batch // parts


def check_labels(config: Config, index: Index) -> None:
    """Raises ConfigError for a label that the model was not built for: on a device it would be an obscure crash."""
    classes = getattr(config.model, "classes", 0)
    labels = index.records["label"]
    wrong = np.flatnonzero(labels >= classes)
    if classes and len(wrong):
        sample = int(wrong[0])
        raise ConfigError(
            f"model.classes={classes} knows the labels 0 to {classes - 1}, and sample {sample} of {index.folder} (in "
            f"{index.shards[index.locate(sample).shard].name}) has {labels[sample]}: take "
            f"model.classes={labels.max() + 1} or more, or other data"
        )


def check_classes(config: Config, training: Index, validation: Index) -> None:
    """Raises ConfigError if the model is conditioned on labels that name other classes in validation than in training.

    Indices without class names, and labels that only one of the two has, are not compared.
    """
    if not getattr(config.model, "classes", 0):
        return
    for label, (name, other) in enumerate(zip(training.classes, validation.classes, strict=False)):
        if name != other:
            raise ConfigError(
                f"label {label} is the class {name} in {training.folder} and {other} in "
                f"{validation.folder}: prepare the validation pictures again, into an empty folder, with "
                f"--classes {training.folder / 'classes.json'}"
            )


def absent_classes(config: Config, training: Index, validation: Index) -> str:
    """Says which classes no validation sample has, where the model is conditioned on them; "" if there are none."""
    if not getattr(config.model, "classes", 0) or not validation.classes:
        return ""
    present = set(np.unique(validation.records["label"]).tolist())
    absent = [name for label, name in enumerate(training.classes) if label not in present]
    if not absent:
        return ""
    more = ", …" if len(absent) > SHOWN else ""
    return (
        f"{len(absent)} of {len(training.classes)} classes are not in the validation data: "
        f"{', '.join(absent[:SHOWN])}{more}"
    )


def _located(config: Config) -> Config:
    """The paths as the file system knows them. `data.cache` keeps its `~`: the saved config serves other users, too."""
    run, init_from = mechanics.expanded("run", config.run), mechanics.expanded("init_from", config.init_from)
    root, cache = mechanics.expanded("data.root", config.data.root), mechanics.expanded("data.cache", config.data.cache)
    cache = config.data.cache if config.data.cache.startswith("~") else cache
    return replace(config, run=run, init_from=init_from, data=replace(config.data, root=root, cache=cache))


def _require(config: Config) -> None:
    if config.keep_every % config.every.checkpoint:
        raise ConfigError(
            f"keep_every={config.keep_every} must be a multiple of every.checkpoint={config.every.checkpoint}: "
            f"only then are there checkpoints to keep"
        )
    if config.optimizer.spike and config.optimizer.spike <= 1:
        raise ConfigError(f"optimizer.spike={config.optimizer.spike} must be above 1, or 0 for no limit")
    if places.is_url(config.data.cache):
        raise ConfigError("data.cache is a folder on the node's own disk, not a URL")
    if places.is_url(config.data.root):  # not repeated: it may carry a password, and the log is no place for it
        raise ConfigError(
            "data.root is the folder of the index, not a URL: make an index of shards behind a URL with "
            "`python launch/shards.py index URL --out DIR/train`, and set data.root=DIR"
        )
    for key in config.deepspeed:
        if key in OWNED:
            raise ConfigError(f"deepspeed.{key} is set by this trainer: use {OWNED[key]} instead")
    if "stage" in (config.deepspeed.get("zero_optimization") or {}):
        raise ConfigError("deepspeed.zero_optimization.stage is set by this trainer: use zero instead")
