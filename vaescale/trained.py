"""A run that has been trained: its settings and its averaged weights."""

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


def read_config(run: Path, overrides: list[str]) -> Config:
    path = run / FILE
    if not path.exists():
        raise ConfigError(f"{run} is no run directory: it has no {FILE}; give the run= of a training as --run")
    config, unknown = settings.load_saved(path, overrides)
    if unknown and distributed.place().rank == 0:
        print(f"{path} has settings that this version does not know: {printable(', '.join(unknown))}", file=sys.stderr)
    return config


def read_model(run: Path, config: Config, device: torch.device) -> tuple[Model, int]:
    """(the model with the newest averaged weights, ready to encode and decode; their step). Collective."""
    model = settings.build(config)
    path, remarks = checkpoint.load_averaged(model, run)
    assert path is not None
    if distributed.rank() == 0:
        for remark in remarks:
            print(remark, file=sys.stderr)
    return model.to(device).eval(), states.read(path, ["step"])["step"]
