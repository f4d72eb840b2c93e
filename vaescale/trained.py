"""Reads a trained run: its settings and its averaged weights."""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from . import distributed, hub, settings
from .config import FILE, ConfigError
from .data import stream
from .data.index import Index
from .files import printable
from .interfaces import (
    Calibrated,
    Codebooks,
    Codec,
    Diffused,
    LatentStatistics,
    Model,
    OnCodec,
    PixelLikelihood,
    Prior,
    Sampling,
    calibrated,
)
from .lifecycle import checkpoint
from .lifecycle import state as states
from .matching import check_codec
from .models import MODELS
from .models.code_prior import uniform
from .models.generative import generative
from .nn.frozen import base_hash, statistics_hash, weights_hash
from .settings import Config


def run_of(place: Path) -> Path:
    """Returns the run directory of `place`, which is a run directory or a checkpoint of one, RUN/checkpoints/step-…. A
    folder of the hub (hub.py) stands for both. Raises ConfigError for anything else."""
    if (place / FILE).exists() or ((place / hub.CONFIG).exists() and (place / checkpoint.MANIFEST).exists()):
        return place
    folder = place.resolve().parent
    if folder.name != "checkpoints" or not (folder.parent / FILE).exists():
        raise ConfigError(
            f"{place} is not a run directory: it has no {FILE}; give the run= of a training, or one of its "
            f"checkpoints, RUN/checkpoints/step-…"
        )
    if not (place / checkpoint.MANIFEST).exists():
        valid = [path.name for path in checkpoint.there(folder) if (path / checkpoint.MANIFEST).exists()]
        raise ConfigError(f"{place} is not a checkpoint: {folder} has {', '.join(valid) or 'none'}")
    return folder.parent


def read_config(place: Path, overrides: list[str]) -> Config:
    """Returns the settings of a run, with overrides. place: as in `run_of`. Raises ConfigError."""
    path = hub.settings_of(run_of(place))
    config, unknown = settings.load_saved(path, overrides)
    base = MODELS[config.model.kind].base
    if path.name == hub.CONFIG and base and getattr(config.model, base) == hub.TOKENIZER:
        config = replace(config, model=replace(config.model, **{base: str(path.parent / hub.TOKENIZER)}))
    if unknown and distributed.place().rank == 0:
        print(f"{path} has settings that this version does not know: {printable(', '.join(unknown))}", file=sys.stderr)
    return config


def read_model(place: Path, config: Config, device: torch.device) -> tuple[Model, int]:
    """Returns the model with averaged weights, in eval mode on `device`, and the step of the weights. place: a
    checkpoint, or a run directory, whose newest one is read. Raises CheckpointError. Collective."""
    model = settings.build(config, training=False)
    path, step = _read_averaged(model, place)
    if codec := read_base(model, config):
        begun = states.read_checked(path, ["order"])["order"].get("codec")
        check_codec(run_of(place), str(begun), codec)
    return model.to(device).eval(), step


def read_base(model: Model, config: Config) -> str | None:
    """Reads the averaged weights of the codec that the model is built on, if it is built on one. Returns its
    frozen.base_hash, or None. Raises ConfigError, CheckpointError. Collective."""
    run = settings.base_run(config)
    if run is None:
        return None
    assert isinstance(model, OnCodec)
    codec = model.codec
    assert isinstance(codec, Model)
    _read_averaged(codec, run)
    if isinstance(codec, LatentStatistics) and isinstance(codec, Calibrated) and not calibrated(codec):
        raise ConfigError(
            f"the latents of {run} have not been measured: run its training command again, which measures them at its "
            f"end, also if it has finished; if its weights were imported, import them with --measure"
        )
    return base_hash(codec)


def codec_of(model: Model, sampling: Sampling = Sampling()) -> Codec:
    """Returns what encodes and decodes images: the model itself, or if it is a prior, its codec with it."""
    if isinstance(model, Diffused):
        try:
            return model.with_sampling(sampling)
        except ValueError as error:
            raise ConfigError(str(error)) from None
    codec = generative(model, sampling) if isinstance(model, Prior) else model
    assert isinstance(codec, Codec)
    return codec


def measured_codec(model: Model, config: Config, sampling: Sampling = Sampling()) -> Codec:
    """As `codec_of`, but a calibrated tokenizer has the uniform prior that it was trained with, so that its bits per
    dimension can be measured."""
    tokenizer = isinstance(model, Codebooks) and isinstance(model, PixelLikelihood)
    if tokenizer and isinstance(model, Calibrated) and calibrated(model):
        return generative(uniform(model, settings.shape(config)), sampling)
    return codec_of(model, sampling)


def pictures_of(config: Config) -> stream.Config:
    """Returns the data with pictures: those of the run, or if it was trained on codes, those of its tokenizer, which
    the codes were made from. Raises ConfigError, DataError."""
    codes = Index(Path(config.data.root) / "val").codes
    if codes is None:
        return config.data
    give = "give data.root=… with the pictures that they were made from"
    base = settings.base_of(config)
    if base is None:
        raise ConfigError(f"data.root={config.data.root} holds codes: {give}")
    if Index(Path(base.data.root) / "val").fingerprint() != codes.source:
        raise ConfigError(f"the codes in {config.data.root} were not made from {base.data.root}: {give}")
    return replace(config.data, root=base.data.root)


def weights_of(model: Model) -> str:
    """Returns the hash of the model's weights, and if it is built on a codec, those of its weights and statistics."""
    hashes = [weights_hash(model)]
    if isinstance(model, OnCodec) and isinstance(codec := model.codec, Model):
        hashes += [weights_hash(codec), *statistics_hash(codec)]
    return " ".join(hashes)


def _read_averaged(model: Model, place: Path) -> tuple[Path, int]:
    """Reads the averaged weights. Returns their checkpoint and step."""
    path, remarks = checkpoint.load_averaged(model, place)
    assert path is not None
    if distributed.rank() == 0:
        for remark in remarks:
            print(remark, file=sys.stderr)
    state = states.read_checked(path, ["step", "noise", "latents"])
    model.noise_version, model.latents_of = state["noise"], state["latents"]
    return path, int(state["step"])
