"""Writes a folder for the Hugging Face Hub. `vaescale.load` and the commands read it like a run (vaescale/hub.py)."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import files, settings, trained
from ..config import ConfigError
from ..hub import CONFIG, TOKENIZER
from ..interfaces import Model, OnCodec
from ..lifecycle import checkpoint
from ..lifecycle import state as states
from ..settings import Config
from . import write
from .card import NEEDED, card
from .export import CRITIC, critic_of
from .metadata import evaluation, metadata, public

WEIGHTS, CARD = "model.safetensors", "README.md"
FILES = (CONFIG, WEIGHTS, CRITIC, checkpoint.STATE, checkpoint.MANIFEST)  # read by vaescale
NAMES = frozenset((*FILES, CARD, TOKENIZER))


def export_hub(run: Path, out: Path, licence: str) -> list[Path]:
    """Writes the averaged weights of a run, its settings and a model card; for a prior or a diffusion over latents
    those of its codec, too. run: a run directory or a checkpoint. Returns the files. Raises ConfigError,
    CheckpointError, OSError."""
    out = out.resolve()
    write.require_free(out, WEIGHTS, NAMES)
    place = checkpoint.agreed(run).path or run  # a training may go on meanwhile
    config = trained.read_config(place, [])
    model, step = trained.read_model(place, config, torch.device("cpu"))
    base = settings.base_run(config)
    with write.folder(out) as partial:
        _write(partial, place, config, model)
        if base:
            assert isinstance(model, OnCodec)
            assert isinstance(model.codec, Model)
            (partial / TOKENIZER).mkdir()
            tokenizer = checkpoint.agreed(base).path or base
            _write(partial / TOKENIZER, tokenizer, trained.read_config(tokenizer, []), model.codec)
        found = _evaluation(place, step)
        (partial / CARD).write_text(card(config, trained.codec_of(model), step, licence, found))
    return sorted(path for path in out.rglob("*") if path.is_file())


def push(out: Path, repository: str) -> str:
    """Uploads the folder to the Hub, as a model that is public unless it exists as a private one. Returns its address.
    Raises ConfigError."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        api = HfApi()
        api.create_repo(repository, exist_ok=True)
        return str(api.upload_folder(folder_path=out, repo_id=repository, commit_message="Upload from vaescale"))
    except (HfHubHTTPError, HFValidationError) as error:
        reason = files.printable((str(error).strip().splitlines() or [type(error).__name__])[0], 200)
        raise ConfigError(
            f"{out} is written, but cannot be uploaded to {repository} ({reason}): log in with `hf auth login`, and "
            f"run the command again"
        ) from None
    except OSError:
        raise ConfigError(
            f"{out} is written, but the Hub cannot be reached: run the command again when there is a network"
        ) from None


def require_push() -> None:
    """Raises ConfigError without what `push` needs."""
    try:
        import huggingface_hub  # noqa: F401
    except ImportError:
        raise ConfigError("--push needs huggingface-hub: pip install 'vaescale[hf]'") from None


def _write(folder: Path, place: Path, config: Config, model: nn.Module) -> None:
    """Writes all but the card. place: the checkpoint."""
    about = metadata(place, place, config, "vaescale")
    write.save(model.state_dict(), folder / WEIGHTS, about)
    if critic := critic_of(config, place):
        write.save(critic, folder / CRITIC, about)
    state = states.read_checked(place, ["step", "noise", "order", "latents"])
    _write_json(folder / checkpoint.STATE, {"version": states.VERSION, **state})
    _write_json(folder / CONFIG, asdict(public(config)))
    written = [folder / name for name in FILES if (folder / name).exists()]
    sizes = {file.name: {"bytes": file.stat().st_size, "xxh3": files.file_hash(file)} for file in written}
    _write_json(folder / checkpoint.MANIFEST, sizes)


def _evaluation(place: Path, step: int) -> dict[str, Any] | None:
    """Returns the content of evaluation.json if it has all that a card says."""
    found = evaluation(place, step)
    return found if found and found.keys() >= NEEDED else None


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")
