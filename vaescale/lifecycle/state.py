"""Reads and checks state.json, the part of a checkpoint that is not tensors.

A key that older versions did not write has a default here, so that a run begun with an older version can continue.
"""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ..data.decode import CAUSES
from ..files import printable
from .checkpoint import STATE, CheckpointError, read_state

VERSION = 3  # version 1 did not record its number and has no "since"; version 2 has no "noise"
IMPORTED = "imported"  # key of "order" in a run that was not trained but imported: the library that its weights are of
RENAMED = {"owed": "validation_due"}  # names before version 3
MOST = 2**60  # bound on counts such as steps and images
GUARD = ("count", "mean", "variance", "run", "share")  # the guard's statistics of gradient norms


class Key(NamedTuple):
    sound: Callable[[Any], bool]
    words: str  # what is expected, for the error
    default: Any = ...  # for a state without the key; ...: the key is required


def whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < MOST


def number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < float("inf")


def counts(value: Any) -> bool:
    return isinstance(value, dict) and all(map(whole, value.values()))


def causes(value: Any) -> bool:
    return counts(value) and value.keys() <= set(CAUSES)


def names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def since(value: Any) -> bool:
    return value is None or (counts(value) and value.keys() == {"batch", "step", "images"} and value["batch"] > 0)


def scaler(value: Any) -> bool:
    """{} is valid too: losses are then not scaled."""
    scales = ("scale", "cur_scale", "growth_factor", "backoff_factor")
    return isinstance(value, dict) and all(
        number(part) and (part > 0 or key not in scales) for key, part in value.items()
    )


def norms(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() <= set(GUARD)
        and all(number(part) and (part >= 0 or key == "mean") for key, part in value.items())
    )


def order(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(part, int | str) for part in value.values())


def digest(value: Any) -> bool:
    return value is None or (isinstance(value, str) and re.fullmatch("[0-9a-f]{16}", value) is not None)


KEYS = {
    "version": Key(whole, "a whole number", 1),
    "step": Key(whole, "a whole number, 0 or more"),
    "images": Key(whole, "a whole number, 0 or more"),
    "since": Key(since, "counts of batch, step and images", None),
    "damaged": Key(causes, "counts by cause", {}),
    "alarms": Key(names, "a list of names", []),
    "validation_due": Key(lambda value: isinstance(value, bool), "true or false", False),
    "noise": Key(lambda value: whole(value) and value > 0, "a whole number, 1 or more", 1),
    "latents": Key(digest, "a hash of 16 digits, or null", None),
    "order": Key(order, "numbers and words by name"),
    # Keys of Descent. Those of an engine other than the model's have its name in front, as in critic_scaler.
    "optimizer_steps": Key(whole, "a whole number, 0 or more"),
    # None: the run had no critic.
    "critic_optimizer_steps": Key(lambda value: value is None or whole(value), "a whole number, 0 or more", None),
    "scaler": Key(scaler, "finite numbers by name, scales positive", {}),
    "skipped": Key(counts, "counts by cause", {}),
    "gradient_norms": Key(norms, f"finite numbers by name: {', '.join(GUARD)}", {}),
}


def rule(key: str) -> Key:
    return KEYS[key] if key in KEYS else KEYS[key.partition("_")[2]]


def read_checked(checkpoint: Path, keys: Iterable[str]) -> dict[str, Any]:
    """Returns the values of these keys. Raises CheckpointError, one sentence, if a required key is missing, a value is
    invalid, values contradict each other, or a later version wrote the file."""
    path = checkpoint / STATE
    other = f"use another checkpoint: write its name into {checkpoint.parent / 'latest'}"
    found = read_state(checkpoint)
    version = found.get("version", KEYS["version"].default)
    if whole(version) and version > VERSION:
        raise CheckpointError(
            f"{path} was written by a later version of vaescale (state {version}; this one reads 1 to {VERSION}): "
            f"install that version, or {other}"
        )
    found = {RENAMED.get(key, key): value for key, value in found.items()}
    state = {key: found.get(key, rule(key).default) for key in keys}
    for key, value in state.items():
        if value is ...:
            raise CheckpointError(f"{path} has no {key}: {other}")
        if not rule(key).sound(value):
            shown = printable(value, 60)
            raise CheckpointError(f"{path}: {key} is {shown} instead of {rule(key).words}: {other}")
    if wrong := contradiction(state):
        raise CheckpointError(f"{path}: {wrong}: {other}")
    return state


def contradiction(state: dict[str, Any]) -> str:
    """Returns a clause on values that contradict each other; "" if none do."""
    step, images, begun = (state.get(key) for key in ("step", "images", "since"))
    if step is None or images is None:
        return ""
    if begun:
        wanted = begun["images"] + (step - begun["step"]) * begun["batch"]
        if images != wanted or step < begun["step"]:
            return (
                f"{images} images do not match step {step}: since step {begun['step']}, at {begun['images']} images, "
                f"each step has used {begun['batch']}"
            )
    elif images < step or (images > 0) != (step > 0):
        return f"{images} images do not match step {step}"
    if state.get("optimizer_steps", 0) > step:
        return f"the optimizer cannot have taken {state['optimizer_steps']} steps by step {step}"
    return ""
