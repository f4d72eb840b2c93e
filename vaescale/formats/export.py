"""Writes the averaged weights of a run in the format of another library."""

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from .. import settings, trained
from ..config import ConfigError
from ..files import atomically
from ..lifecycle import checkpoint
from ..settings import Config
from . import ours, write
from .diffusers import CONFIG, WEIGHTS, to_diffusers
from .llamagen import to_llamagen
from .metadata import metadata
from .taming import to_taming

CRITIC = "critic.safetensors"


class Averaged(NamedTuple):
    """The weights of a run."""

    config: Config
    tensors: dict[str, Tensor]  # the state dict of the model
    critic: dict[str, Tensor]  # that of the critic; {}: there is none
    checkpoint: Path


def export_diffusers(run: Path, out: Path) -> list[Path]:
    """Writes a folder that diffusers' `from_pretrained` loads. run: a run directory or a checkpoint. Returns the files.
    Raises ConfigError, CheckpointError, OSError."""
    out = out.resolve()
    write.require_free(out, WEIGHTS, frozenset((CONFIG, WEIGHTS, CRITIC)))
    read = averaged(run)
    tensors, config = to_diffusers(read.config.model, settings.shape(read.config), read.tensors)
    with write.folder(out) as partial:
        (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        write.save(tensors, partial / WEIGHTS, metadata(run, read.checkpoint, read.config, "diffusers"))
        save_critic(read, run, partial / CRITIC)
    return sorted(out.iterdir())


def export_file(run: Path, out: Path, library: str) -> list[Path]:
    """As `export_diffusers`, but writes one file for `library`, taming or llamagen, whose metadata has what builds the
    network as `network`, JSON. A critic is written next to it."""
    if out.suffix != ".safetensors":
        raise ConfigError(f"{out} must end in .safetensors")
    out, critic = out.resolve(), out.resolve().with_suffix(f".{CRITIC}")
    for path in (out, critic):
        write.require_free(path)
    read = averaged(run)
    convert = to_taming if library == "taming" else to_llamagen
    tensors, config = convert(read.config.model, settings.shape(read.config), read.tensors)
    about = metadata(run, read.checkpoint, read.config, library, network=json.dumps(config))
    out.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as both:  # neither file is replaced before both are written
        if read.critic:
            save_critic(read, run, both.enter_context(atomically(critic)))
        write.save(tensors, both.enter_context(atomically(out)), about)
    if not read.critic:
        critic.unlink(missing_ok=True)  # of an earlier export
    return [out, *([critic] if read.critic else [])]


def averaged(run: Path) -> Averaged:
    """Reads the averaged weights of a run, and its critic, if it has one. Raises ConfigError, before anything large is
    read, if other libraries have no such model, and CheckpointError."""
    config = trained.read_config(run, [])
    ours.net_of(config.model, config.data.channels)
    model = settings.build(config, training=False)
    found = checkpoint.load_averaged(model, run)
    assert found.path is not None
    for remark in found.remarks:
        print(remark, file=sys.stderr)
    return Averaged(config, model.state_dict(), critic_of(config, found.path), found.path)


def critic_of(config: Config, place: Path) -> dict[str, Tensor]:
    """Returns the state dict of the critic in a checkpoint; {}: there is none."""
    critic = settings.build_critic(config)
    if critic is None or not (place / CRITIC).exists():
        return {}
    return checkpoint.read_fitting(place, "critic", critic.state_dict())


def save_critic(read: Averaged, run: Path, path: Path) -> None:
    """Writes the critic, if there is one, with our names. The settings in its metadata, `adversarial`, build it."""
    if read.critic:
        write.save(read.critic, path, metadata(run, read.checkpoint, read.config, "vaescale"))
