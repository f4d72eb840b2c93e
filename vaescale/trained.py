"""Reads a trained run: its settings and its averaged weights."""

import sys
from pathlib import Path

import torch

from . import distributed, settings
from .config import FILE, ConfigError
from .files import printable
from .interfaces import Codec, Model, Prior, Sampling
from .lifecycle import checkpoint
from .lifecycle import state as states
from .models.generative import generative
from .nn.frozen import weights_hash
from .settings import Config


def run_of(place: Path) -> Path:
    """Returns the run directory of `place`, which is a run directory or a checkpoint of one, RUN/checkpoints/step-….
    Raises ConfigError for anything else."""
    if (place / FILE).exists():
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
    """Returns the settings of a run, with overrides. place: a run directory or a checkpoint of one. Raises
    ConfigError."""
    path = run_of(place) / FILE
    config, unknown = settings.load_saved(path, overrides)
    if unknown and distributed.place().rank == 0:
        print(f"{path} has settings that this version does not know: {printable(', '.join(unknown))}", file=sys.stderr)
    return config


def read_model(place: Path, config: Config, device: torch.device) -> tuple[Model, int]:
    """Returns the model with averaged weights, in eval mode on `device`, and the step of the weights. place: a
    checkpoint, or a run directory, whose newest one is read. Raises CheckpointError. Collective."""
    model = settings.build(config, training=False)
    step = _read_averaged(model, place)
    read_base(model, config)
    return model.to(device).eval(), step


def read_base(model: Model, config: Config) -> str | None:
    """Reads the averaged weights of the codec that the model is built on, if it is built on one. Returns their hash, or
    None. Raises ConfigError, CheckpointError. Collective."""
    run = settings.base_run(config)
    if run is None:
        return None
    assert isinstance(model, Prior)
    codec = model.codec
    assert isinstance(codec, Model)
    _read_averaged(codec, run)
    return weights_hash(codec)


def codec_of(model: Model, sampling: Sampling = Sampling()) -> Codec:
    """Returns what encodes and decodes images: the model itself, or if it is a prior, its codec with it."""
    codec = generative(model, sampling) if isinstance(model, Prior) else model
    assert isinstance(codec, Codec)
    return codec


def _read_averaged(model: Model, place: Path) -> int:
    """Reads the averaged weights. Returns their step."""
    path, remarks = checkpoint.load_averaged(model, place)
    assert path is not None
    if distributed.rank() == 0:
        for remark in remarks:
            print(remark, file=sys.stderr)
    state = states.read_checked(path, ["step", "noise"])
    model.noise_version = state["noise"]
    return int(state["step"])
