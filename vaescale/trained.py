"""Reads a trained run: its settings and its averaged weights."""

import sys
from pathlib import Path

import torch

from . import distributed, settings
from .config import FILE, ConfigError
from .files import printable
from .interfaces import Model
from .lifecycle import checkpoint
from .lifecycle import state as states
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
    path, remarks = checkpoint.load_averaged(model, place)
    assert path is not None
    if distributed.rank() == 0:
        for remark in remarks:
            print(remark, file=sys.stderr)
    state = states.read_checked(path, ["step", "noise"])
    model.noise_version = state["noise"]
    return model.to(device).eval(), state["step"]
