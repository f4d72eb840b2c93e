"""Makes a run directory of weights that others have trained. All commands work with it as with a run of one's own."""

import shutil
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from .. import config as mechanics
from .. import settings
from ..config import ConfigError
from ..files import file_hash, printable, read_json
from ..interfaces import Calibrated, Model, Tensors, calibrated
from ..lifecycle import checkpoint
from ..lifecycle import state as states
from ..nn.noise import VERSION
from . import diffusers, llamagen, taming
from .read import read

SIZE = 256  # pixels a side of the images that most public tokenizers were trained on
FIRST_STAGE, LOSS, AVERAGE = "first_stage_model.", "loss.", "model_ema."  # beginnings of names in ldm
COUNTERS = ("decay", "num_updates")  # of ldm's averages
NAMED = 3  # tensors that an error names
# of a codebook: learned as in these libraries, and in a batch that is small for it, unused codes are no dead ones
CODEBOOK = {"learning": "gradient", "reset_every": 0}


Measure = Callable[[Any, settings.Config], None]  # model, settings


class Found(NamedTuple):
    """What a file holds."""

    file: Path
    model: dict[str, Any]  # the section of our settings
    weights: Tensors  # by our names
    size: int  # pixels a side of the images
    remarks: list[str]  # sentences: what of the file was used


def import_run(
    library: str, source: Path, run: Path, overrides: Sequence[str] = (), measure: Measure | None = None
) -> list[str]:
    """Makes the run directory of a file, or of a folder of diffusers. library: a key of LIBRARIES; overrides: settings,
    `key=value`; measure: sets the statistics that the file lacks. Returns remarks, one sentence each: what was left out
    of the file, and what the run lacks.

    The run has one checkpoint, of step 0, in which the weights are both the model's and their averages. Raises
    ConfigError, CheckpointError and OSError, and what `measure` raises; there is no run directory then.
    """
    if own := [one for one in overrides if one.partition("=")[0].strip() in ("run", "init_from", "train")]:
        raise ConfigError(f"{own[0]} is not a setting of an import, which trains nothing: give the run by --run")
    if run.exists():
        raise ConfigError(f"{run} exists: give a --run that does not")
    found = LIBRARIES[library](source)
    partial = run.with_name(f".{run.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        config = _settings(found, run, partial / mechanics.FILE, overrides)
        model = _model(found.weights, config)
        lacking = [] if not isinstance(model, Calibrated) or calibrated(model) else list(model.calibration())
        if lacking and measure:
            measure(model, config)
        _save(
            model, partial, {states.IMPORTED: library, "file": found.file.name, "sha256": file_hash(found.file, sha256)}
        )
        partial.rename(run)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if not lacking or measure:
        return found.remarks
    when = f"when a training with init_from={run} ends, or by --measure"
    return [*found.remarks, f"what the file lacks ({', '.join(lacking)}) is measured {when}"]


def _settings(found: Found, run: Path, file: Path, overrides: Sequence[str]) -> settings.Config:
    """Writes and returns the settings. Raises ConfigError if they do not fit together."""
    first = next(tensor for name, tensor in found.weights.items() if name.endswith("encoder.first.weight"))
    data = {"size": found.size, "channels": first.shape[1]}
    model = dict(found.model)
    if "quantizer" in model:
        model["quantizer"] = {**model["quantizer"], **CODEBOOK}
    file.write_text(yaml.safe_dump({"model": model, "run": str(run), "data": data}))
    config = settings.load(file, list(overrides))
    settings.check(config, 1)
    mechanics.save(config, file)
    return config


def _model(weights: Tensors, config: settings.Config) -> Model:
    """Returns the model with these weights. Raises ConfigError if settings of the model do not fit them."""
    model = settings.build(config, training=False).eval()
    tensors = model.state_dict()
    wrong = [name for name in weights if name not in tensors or tensors[name].shape != weights[name].shape]
    given = (*weights, "likelihood.")
    wrong += [name for name, _ in model.named_parameters() if not name.startswith(given)]
    if wrong:
        raise ConfigError(f"the settings of model do not fit {wrong[0]}: leave out those that follow from the weights")
    tensors |= weights
    if "quantizer.codebook" in tensors:  # the codes are in use: a training must not initialise or soon reset them
        tensors["quantizer.tally.age"] = torch.zeros_like(tensors["quantizer.tally.age"])
        if "quantizer.learner.sums" in tensors:
            tensors["quantizer.learner.sums"] = weights["quantizer.codebook"].clone()
    model.load_state_dict(tensors)
    return model


def _save(model: Model, run: Path, origin: dict[str, str]) -> None:
    averages = model.state_dict()
    tensors = {  # statistics are those of the averages: of a training that goes on from here they are not known
        name: torch.full_like(tensor, torch.inf) if name in checkpoint.LATER else tensor
        for name, tensor in averages.items()
    }
    state = {"version": states.VERSION, "step": 0, "images": 0, "noise": VERSION, "order": origin, "optimizer_steps": 0}
    checkpoint.save(run / "checkpoints", 0, {"model": tensors, "ema": averages}, state, keep=1)


def _diffusers(source: Path) -> Found:
    folder = source if source.is_dir() else source.parent
    file = source
    if source.is_dir():
        names = (diffusers.WEIGHTS, Path(diffusers.WEIGHTS).with_suffix(".bin").name)
        file = next((folder / name for name in names if (folder / name).exists()), folder / names[0])
    path = folder / diffusers.CONFIG
    config, remarks = {}, []
    if path.exists():
        try:
            config = read_json(path, lenient=True)
            if not isinstance(config, dict):
                raise ValueError("it is not an object")
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read ({error}): restore it") from None
    elif source.is_dir():
        raise ConfigError(f"{source} has no {diffusers.CONFIG}: give the folder of one VQModel or AutoencoderKL")
    else:
        remarks = [f"there is no {path.name} beside the file"]
    tensors, _ = read(file)
    model, weights = diffusers.from_diffusers(tensors, config or {"scaling_factor": 1.0})  # 1: not known
    size = config.get("sample_size")
    return Found(file, model, weights, size if isinstance(size, int) else SIZE, remarks)


def _taming(source: Path) -> Found:
    tensors, remarks = read(source)
    if stage := {name: tensor for name, tensor in tensors.items() if name.startswith(FIRST_STAGE)}:
        remarks.append(f"{len(tensors) - len(stage)} tensors of a diffusion model were left out")
        tensors = {name.removeprefix(FIRST_STAGE): tensor for name, tensor in stage.items()}
    averages = {name.removeprefix(AVERAGE): one for name, one in tensors.items() if name.startswith(AVERAGE)}
    if averages:
        remarks.append(f"the weights are the averages ({AVERAGE}*)")
        tensors = _averaged({name: one for name, one in tensors.items() if not name.startswith(AVERAGE)}, averages)
    own = {name: tensor for name, tensor in tensors.items() if not name.startswith(LOSS)}
    if len(own) < len(tensors):
        remarks.append(
            f"{len(tensors) - len(own)} tensors of the losses ({LOSS}*) were left out: no critic here has such layers"
        )
    return Found(source, *taming.from_taming(own), SIZE, remarks)


def _averaged(tensors: Tensors, averages: Tensors) -> Tensors:
    """Puts the averages, whose names have no dots, in place of the weights. Raises ConfigError if any are left."""
    names = {name.replace(".", ""): name for name in tensors}
    averages = {name: tensor for name, tensor in averages.items() if name not in COUNTERS}
    if strange := [name for name in averages if name not in names]:
        listed = ", ".join(printable(f"{AVERAGE}{name}", 80) for name in strange[:NAMED])
        raise ConfigError(f"no weights have the averages {listed}: give the whole state dict of one network")
    return tensors | {names[name]: tensor for name, tensor in averages.items()}


def _llamagen(source: Path) -> Found:
    tensors, remarks = read(source)
    return Found(source, *llamagen.from_llamagen(tensors), SIZE, remarks)


LIBRARIES: dict[str, Callable[[Path], Found]] = {
    "diffusers": _diffusers,
    "taming": _taming,
    "ldm": _taming,
    "llamagen": _llamagen,
}
