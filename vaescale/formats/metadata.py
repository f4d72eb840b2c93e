"""What an exported safetensors file says about itself."""

import json
from dataclasses import replace
from importlib import metadata as packages
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from .. import files
from ..config import to_yaml
from ..hub import TOKENIZER
from ..lifecycle.checkpoint import read_state
from ..models import MODELS, PIXELS
from ..settings import Config
from ..trained import run_of

EVALUATION = "evaluation.json"  # in the run directory, of launch/evaluate.py
MARK = "vaescale"  # in the metadata of every exported file


def metadata(place: Path, checkpoint: Path, config: Config, library: str, **more: str) -> dict[str, str]:
    """Returns the metadata of a file of exported weights: texts, as safetensors wants them.

    `format` is always "pt", which libraries ask for. `library` is whose names the tensors have. `vaescale` is the
    version; `step` and `settings` (YAML, see `public`) are those of the run; `data` is the fingerprint of its training
    images. If the run was evaluated at this step, `evaluation` is its evaluation.json, with the protocol.

    place: the run directory or one of its checkpoints; checkpoint: where the weights are from; more: further entries.
    Raises CheckpointError.
    """
    state = read_state(checkpoint)
    found = {
        "format": "pt",
        MARK: _version(),
        "library": library,
        "step": str(state["step"]),
        "settings": to_yaml(public(config)),
        "data": str(state.get("order", {}).get("data", "")),
    }
    if evaluated := evaluation(place, state["step"]):
        found["evaluation"] = json.dumps(evaluated)
    return {**found, **more}


def public(config: Config) -> Config:
    """Returns the settings with names in place of the paths of this machine. A codec that the model is built on is
    named as in a folder of the hub (vaescale/hub.py). Settings for DeepSpeed, which may have paths, are left out."""
    model = config.model
    if (base := MODELS[model.kind].base) and getattr(model, base) != PIXELS:
        model = replace(model, **{base: TOKENIZER})
    if own := getattr(model, "reconstruction", None):
        weights = Path(own.perceptual.weights).name
        model = replace(model, reconstruction=replace(own, perceptual=replace(own.perceptual, weights=weights)))
    data = replace(config.data, root=Path(config.data.root).name, cache=type(config.data)().cache)
    # train=decoder needs some init_from
    run, init_from = Path(config.run).name, Path(config.init_from).name
    return replace(config, model=model, data=data, run=run, init_from=init_from, deepspeed={})


def evaluation(place: Path, step: int) -> dict[str, Any] | None:
    """Returns the evaluation.json of a run if it is of this step, with names in place of its paths. place: as above."""
    try:
        found = files.read_json(run_of(place) / EVALUATION, lenient=True)
    except (OSError, ValueError):
        return None
    if not isinstance(found, dict) or found.get("step") != step:
        return None
    run, data = (Path(str(found.get(name, ""))) for name in ("run", "data"))
    names = {"run": run.name, "data": data.parent.name}
    return found | {name: value for name, value in names.items() if name in found}


def is_export(path: Path) -> bool:
    """Returns whether a file was exported here. path: of safetensors, or a JSON file with the metadata of others."""
    try:
        if path.suffix == ".json":
            return MARK in files.read_json(path)
        with safe_open(path, "pt") as file:
            return MARK in (file.metadata() or {})
    except (OSError, ValueError, TypeError, SafetensorError):
        return False


def _version() -> str:
    try:
        return packages.version("vaescale")
    except packages.PackageNotFoundError:
        return "not installed"
