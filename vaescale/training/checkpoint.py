"""State → a durable directory and back.

    checkpoints/latest                  the name of the newest one; moves last
    checkpoints/step-00000500/
        model.safetensors               fp32 parameters and buffers, codebooks among them
        ema.safetensors                 averaged parameters and the same buffers: what evaluation loads
        optimizer.safetensors           AdamW's two averages, by parameter
        moments.safetensors             of PCA, instead: sums over the images so far
        state.json                      step, images, and what the order of samples depends on

One layout at every world size and ZeRO stage. Nothing that is read can run code.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor


class CheckpointError(RuntimeError):
    """A checkpoint that is there cannot be used; the text says which, why and what to do."""


def save(folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], keep: int) -> Path:
    """Write `folder`/step-… beside, sync, rename, then move `latest`; older ones beyond `keep` go last.

    tensors: file name without ending → tensors by name. Called on one rank.
    """
    final = folder / f"step-{step:08d}"
    partial = folder / f".partial-{final.name}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, values in tensors.items():
        save_file({key: value.cpu().contiguous() for key, value in values.items()}, partial / f"{name}.safetensors")
    (partial / "state.json").write_text(json.dumps(state, indent=1) + "\n")
    for path in [*partial.iterdir(), partial]:
        _sync(path)
    if final.exists():  # left by a life that went on from an older one
        shutil.rmtree(final)
    partial.rename(final)
    _sync(folder)
    latest = folder / ".latest"
    latest.write_text(final.name + "\n")
    _sync(latest)
    latest.replace(folder / "latest")
    _sync(folder)
    for old in sorted(folder.glob("step-*"))[:-keep]:
        if old != final:
            shutil.rmtree(old)
    return final


def newest(folder: Path) -> Path | None:
    """The checkpoint that `latest` names; without a `latest`, the one of the highest step; None if there is none.

    Raises CheckpointError if `latest` names one that is gone: to begin again in silence would lose the run.
    """
    there = sorted(folder.glob("step-*"))
    pointer = folder / "latest"
    if not pointer.exists():
        return there[-1] if there else None
    named = folder / pointer.read_text().strip()
    if named in there:
        return named
    raise CheckpointError(
        f"{pointer} names {named.name}, which is not there: remove the file to take the newest of {len(there)} others"
    )


def read_state(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / "state.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(unreadable(path, error)) from None


def read_tensors(checkpoint: Path, name: str) -> dict[str, Tensor]:
    path = checkpoint / f"{name}.safetensors"
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(unreadable(path, error)) from None


def unreadable(path: Path, error: Exception) -> str:
    folder = path.parent.parent
    return f"{path} cannot be read ({error}): remove {path.parent} and {folder / 'latest'} to take the one before"


def load_averaged(model: torch.nn.Module, run: Path) -> dict[str, Any]:
    """Load a run's newest averaged weights into `model`; returns the checkpoint's state."""
    checkpoint = newest(run / "checkpoints")
    if checkpoint is None:
        raise CheckpointError(f"{run} has no checkpoint: train it first, or give another --run")
    model.load_state_dict(read_tensors(checkpoint, "ema"))
    return read_state(checkpoint)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
