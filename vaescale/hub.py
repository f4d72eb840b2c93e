"""The files of a folder that `launch/export.py hub` has written, which is a checkpoint with its settings beside it.

config.json             the settings
model.safetensors       the averaged weights, with our names; a run's checkpoint has them in ema.safetensors
critic.safetensors      a critic's, if there is one
state.json, manifest.json       as in every checkpoint
README.md               the model card
tokenizer/              of a prior or a diffusion over latents: such a folder of the model that it is built on
"""

from pathlib import Path

from .config import FILE

CONFIG, TOKENIZER = "config.json", "tokenizer"


def settings_of(place: Path) -> Path:
    """Returns the file of the settings in a run directory or in such a folder, which may not exist."""
    return place / CONFIG if (place / CONFIG).exists() and not (place / FILE).exists() else place / FILE


def tensors_of(checkpoint: Path, name: str) -> Path:
    """Returns the file of a checkpoint's tensors `name`. Such a folder has averaged weights only, "ema"."""
    averaged = name == "ema" and (checkpoint / CONFIG).exists()
    return checkpoint / f"{'model' if averaged else name}.safetensors"
