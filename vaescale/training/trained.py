"""A run that has been trained: its settings and its averaged weights."""

from pathlib import Path

import torch

from ..config import ConfigError
from ..interfaces import Model
from . import checkpoint, settings
from .settings import Config


def read_config(run: Path, overrides: list[str]) -> Config:
    if not (run / "config.yaml").exists():
        raise ConfigError(f"{run} is no run directory: it has no config.yaml; give the run= of a training as --run")
    return settings.load(run / "config.yaml", overrides)


def read_model(run: Path, config: Config, device: torch.device) -> tuple[Model, int]:
    """(the model with the newest averaged weights, ready to encode and decode; their step)."""
    model = settings.build(config)
    state = checkpoint.load_averaged(model, run)
    return model.to(device).eval(), state["step"]
