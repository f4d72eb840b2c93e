"""Records the settings of a run and their changes.

config.yaml holds the settings of the last process that took a step. config_history.jsonl has one line per change, with
the step after which it took effect: {"step": 8, "changes": {"optimizer.lr": [0.01, 0.001]}}.
"""

import json
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from .. import config as mechanics
from .. import settings
from ..config import ConfigError
from ..files import printable
from ..settings import Config

FILE = "config_history.jsonl"
# The meaning of the weights depends on them; of `train`, which weights change and have an optimiser state.
FIXED = ("model", "data.size", "data.channels", "data.attributes", "train")
CRITIC = ("adversarial.width", "adversarial.layers")  # the same, if there was a critic
# Not these: where a file or a tokenizer lies, whose weights are compared by their hash, and how memory is saved.
FREE = (
    "model.reconstruction.perceptual.weights",
    "model.tokenizer",
    "model.over",
    "model.checkpointing",
    "model.sampler",
    "model.sample_steps",
    "model.levels",
)
NAMED = 4  # changed settings that an error names
# What else a change means for the run.
REMARKS = {"evaluation.count": "Fréchet distances before and after cannot be compared"}

Values = dict[str, Any]
Changes = dict[str, tuple[Any, Any]]  # setting → (before, now)


def saved_settings(run: Path) -> Values | None:
    """Returns the settings in config.yaml, with defaults for missing ones; None if the file is missing or invalid."""
    path = run / mechanics.FILE
    if not path.exists():
        return None
    try:
        config, _ = settings.load_saved(path, [])
    except ConfigError as error:
        print(f"{path} cannot be compared with the current settings: {error}", flush=True)
        return None
    return flat(config)


def flat(config: Any, where: str = "") -> Values:
    """Returns "section.key" → value; a list or a free-form dictionary is one value."""
    values: Values = {}
    for key in (field.name for field in fields(config)):
        value = getattr(config, key)
        if is_dataclass(value):
            values |= flat(value, f"{where}{key}.")
        else:
            values[f"{where}{key}"] = list(value) if isinstance(value, tuple) else value
    return values


def changes(before: Values | None, config: Config) -> Changes:
    """Returns the settings that differ, except `run`; only the kind of model or network, if it differs."""
    now = flat(config)
    if before is None:
        return {}
    for kind in ("model.kind", "model.network.kind"):
        if before.get(kind) != now.get(kind):
            return {kind: (before[kind], now[kind])}
    keys = [key for key in now if key != "run"]
    return {key: (before[key], now[key]) for key in keys if before[key] != now[key]}


def check_changes(run: Path, before: Values | None, changed: Changes) -> None:
    """Raises ConfigError if a setting has changed that the meaning of the weights depends on."""
    parts = (*FIXED, *CRITIC) if before and before["adversarial.weight"] else FIXED
    fixed = {key: pair for key, pair in changed.items() if any(f"{key}.".startswith(f"{part}.") for part in parts)}
    for key in FREE:
        fixed.pop(key, None)
    if fixed:
        names = ", ".join(f"{key}={pair[0]}" for key, pair in list(fixed.items())[:NAMED])
        more = f" and {len(fixed) - NAMED} more" if len(fixed) > NAMED else ""
        raise ConfigError(
            printable(
                f"{run} has been trained with other settings ({described(fixed)}), which its weights depend on: set "
                f"{names}{more} again, or give another run=… (with init_from={run} if these weights fit it)"
            )
        )


def described(changed: Changes) -> str:
    """Returns the changes in words, with what else they mean."""
    shown = {key: f"{key} {_shown(before)} → {_shown(now)}" for key, (before, now) in changed.items()}
    return ", ".join(f"{text} ({REMARKS[key]})" if key in REMARKS else text for key, text in shown.items())


def write(config: Config, step: int, changed: Changes) -> None:
    """Writes both files. Called on rank 0 after the first step with these settings. step: steps before it. Raises
    OSError."""
    run = Path(config.run)
    if changed:
        with (run / FILE).open("a") as file:
            file.write(json.dumps({"step": step, "changes": changed}) + "\n")
    mechanics.save(config, run / mechanics.FILE)


def _shown(value: Any) -> str:
    return "''" if value == "" else printable(value, 60)
