"""Reads weights that others have saved: tensors by name, and nothing in the file can run code."""

import json
import re
import shlex
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..config import ConfigError
from ..files import printable
from ..interfaces import Tensors

PICKLED = (".ckpt", ".pt", ".pth", ".bin")
INSIDE = ("ema", "model", "state_dict")  # where a file of a training holds the weights; the first that it has is used
FOREIGN = re.compile(r"GLOBAL (\S+) (?:was not|whose module)")  # in torch's error: the object that is not a tensor


def read(path: Path) -> tuple[Tensors, list[str]]:
    """Returns the weights, in fp32 if they are floats, and remarks: a sentence on which part of the file they are, if
    it has others.

    Reads safetensors, and what torch.save has written, which is a pickle: only of tensors, so that it cannot run code.
    Raises ConfigError.
    """
    if path.suffix == ".safetensors":
        return _floats(_safetensors(path), path), []
    if path.suffix not in PICKLED:
        raise ConfigError(f"{path} does not end in .safetensors or {', '.join(PICKLED)}: give a file of weights")
    found = _unpickled(path)
    for name in INSIDE:
        if isinstance(found, dict) and isinstance(found.get(name), dict):
            others = f", without {', '.join(str(key) for key in found if key != name)}" if len(found) > 1 else ""
            return _floats(found[name], path), [printable(f"the weights are those of {name} in the file{others}", 200)]
    return _floats(found, path), []


def _safetensors(path: Path) -> Tensors:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): give a file of weights") from None


def _unpickled(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # before torch refuses TorchScript, it advises to run it
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror or error}): give a file of weights") from None
    except Exception as error:  # a damaged or hostile pickle can raise anything
        if foreign := FOREIGN.search(str(error)):
            raise ConfigError(_stripping(path, foreign[1])) from None
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(f"{path} is not a file of weights ({reason}): give one that torch.save has written") from None


def _stripping(path: Path, foreign: str) -> str:
    new = path.with_suffix(".pt") if path.suffix != ".pt" else path.with_name(f"{path.stem}_weights.pt")
    old, out, inside = (json.dumps(one) for one in (str(path), str(new), INSIDE))  # as Python writes them, too
    code = (
        f'import torch; f = torch.load({old}, "cpu", weights_only=False); '
        f"f = next((f[k] for k in {inside} if isinstance(f.get(k), dict)), f); "
        f"torch.save({{k: v for k, v in f.items() if isinstance(v, torch.Tensor)}}, {out})"
    )
    return (
        f"{path} holds {foreign} besides tensors, which could run code here: if you trust the file, run `python -c "
        f"{shlex.quote(code)}` where it was made, and give {new}"
    )


def _floats(found: Any, path: Path) -> Tensors:
    """Returns the tensors in fp32. Raises ConfigError if there is anything else."""
    if not isinstance(found, Mapping) or not found:
        raise ConfigError(f"{path} holds no state dict: give a file with tensors by name")
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ConfigError(
                f"{path} holds {type(value).__name__} {name} among its weights: give a file with tensors by name"
            )
    return {name: value.float() if value.is_floating_point() else value for name, value in found.items()}
