"""State → a durable directory and back.

    checkpoints/latest                  the name of the newest one; moves last
    checkpoints/step-00000500/
        model.safetensors               fp32 parameters and buffers, codebooks among them
        ema.safetensors                 averaged parameters and the same buffers: what evaluation loads
        optimizer.safetensors           AdamW's two averages, by parameter
        moments.safetensors             of PCA, instead: sums over the images so far
        state.json                      step, images, and what the order of samples depends on
        manifest.json                   of each file its size and xxh3; written last

One layout at every world size and ZeRO stage. Nothing that is read can run code. Whoever reads takes the checkpoint
that `latest` names; if that one is damaged, or `latest` itself is, the newest that is valid, and says so.
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from .. import distributed
from ..data.places import file_hash

STATE, MANIFEST, LATEST = "state.json", "manifest.json", "latest"
NAMED = 3  # tensors that do not fit, in an error


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used or written; the text says which, why and what to do. The same on all ranks."""

    exit_code = 2


class Unreadable(CheckpointError):
    """For this rank: the others may have read it."""


class Found(NamedTuple):
    path: Path | None  # a valid checkpoint; None where there is none at all
    remarks: list[str]  # what was wrong with others that would have come first, a line each


def save(
    folder: Path,
    step: int,
    tensors: dict[str, dict[str, Tensor]],
    state: dict[str, Any],
    keep: int,
    keep_every: int = 0,
) -> Path:
    """Write `folder`/step-… beside, sync, verify, rename, then move `latest`. Of the older ones the newest `keep`, this
    one among them, stay, and those whose step is a multiple of keep_every.

    tensors: file name without ending → tensors by name. Called on one rank. When it raises before the rename, nothing
    is left of it; the older ones and `latest` are as they were.
    """
    final = folder / f"step-{step:08d}"
    partial = folder / f".partial-{final.name}"
    pointer = folder / f".{LATEST}"
    folder.mkdir(parents=True, exist_ok=True)
    _sync(folder.parent)
    for left in folder.glob(".*-step-*"):  # by a life that was killed
        shutil.rmtree(left)
    try:
        partial.mkdir()
        manifest = {}
        for name, values in tensors.items():
            data = to_bytes({key: value.cpu().contiguous() for key, value in values.items()})
            manifest[f"{name}.safetensors"] = _write(partial / f"{name}.safetensors", data)
        manifest[STATE] = _write(partial / STATE, _json(state))
        _write(partial / MANIFEST, _json(manifest))
        _sync(partial)
        if wrong := verify(partial):
            raise CheckpointError(f"the disk gives back other bytes than were written: {'; '.join(wrong)}")
        _write(pointer, f"{final.name}\n".encode())  # as soon as the others: what follows needs no room
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        pointer.unlink(missing_ok=True)
        raise
    if final.exists():  # left by a life that went on from an older one
        _remove(final)
    partial.rename(final)
    _sync(folder)
    pointer.replace(folder / LATEST)
    _sync(folder)
    until = [path for path in there(folder) if _step(path) <= step]
    for old in until[:-keep]:
        if not (keep_every and _step(old) % keep_every == 0):
            _remove(old)
    return final


def verify(checkpoint: Path) -> list[str]:
    """What is wrong with it, each a phrase that names a file and the cause; [] if it is as it was written."""
    try:
        data = (checkpoint / MANIFEST).read_bytes()
        listed = json.loads(data)
        if _json(listed) != data:  # a byte of no meaning is not what was written, either
            raise ValueError("not as it was written")
        files = [(name, entry["bytes"], entry["xxh3"]) for name, entry in listed.items()]
    except FileNotFoundError:
        return [f"{MANIFEST} is missing"]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        return [f"{MANIFEST} cannot be read ({error})"]
    if STATE not in listed:
        return [f"{MANIFEST} does not list {STATE}"]
    return [wrong for name, size, digest in files if (wrong := _wrong(checkpoint / name, size, digest))]


def _wrong(path: Path, size: int, digest: str) -> str:
    try:
        found = path.stat().st_size
        if found != size:
            return f"{path.name} has {found} bytes instead of {size}"
        if (other := file_hash(path)) != digest:
            return f"{path.name} has changed (xxh3 {other} instead of {digest})"
        if path.suffix == ".json":
            json.loads(path.read_bytes())
        else:
            with safe_open(path, "pt"):
                pass
    except FileNotFoundError:
        return f"{path.name} is missing"
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        return f"{path.name} cannot be read ({error})"
    return ""


def there(folder: Path) -> list[Path]:
    """All checkpoints, valid or not, by step."""
    return sorted((path for path in folder.glob("step-*") if _step(path) >= 0), key=_step)


def newest(folder: Path) -> Found:
    """The checkpoint that `latest` names; if it is not valid, or there is no such, the valid one of the highest step.

    Raises CheckpointError if there are some and none is valid: to begin again in silence would lose the run.
    """
    candidates = there(folder)[::-1]
    pointer = folder / LATEST
    if not candidates and not pointer.exists():
        return Found(None, [])
    try:
        named = pointer.read_bytes().decode(errors="replace").strip()
        wrong = "" if named in [path.name for path in candidates] else f"names {named[:40]!r}, which is not there"
        wrong = wrong if named else "is empty"
    except OSError as error:
        named, wrong = "", "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
    remarks = [f"{pointer} {wrong}: the newest valid checkpoint is looked for"] if wrong else []
    damaged = []
    for path in sorted(candidates, key=lambda path: path.name != named):
        causes = verify(path)
        if not causes:
            return Found(path, remarks)
        damaged.append(f"{path.name} is damaged: {'; '.join(causes)}")
        remarks.append(f"{path} is damaged, and the next one looked for: {'; '.join(causes)}")
    if not candidates:
        raise CheckpointError(f"{pointer} {wrong}, and there are no checkpoints: remove it to begin again")
    raise CheckpointError(
        f"none of the {len(candidates)} checkpoint(s) in {folder} is valid ({', '.join(damaged)}): bring one back, or "
        f"move the folder away to begin again"
    )


def agreed(place: Path) -> Found:
    """What rank 0 finds at `place`, a run directory or a checkpoint: all ranks take the same. Collective."""
    answer: dict[str, Any] = {}
    if distributed.rank() == 0:
        try:
            found = _at(place)
            answer = {"path": str(found.path or ""), "remarks": found.remarks}
        except CheckpointError as error:
            answer = {"error": str(error)}
        answer["print"] = _print(place, answer.get("path", ""))
    answer = distributed.tell(answer)
    if "error" in answer:
        raise CheckpointError(answer["error"])
    path = answer["path"]
    if others := distributed.where(_print(place, path) != answer["print"]):
        what = f"the checkpoint {path}" if path else f"no checkpoint in {place}"
        raise CheckpointError(
            f"rank 0 finds {what}, and rank {', '.join(map(str, others))} {'does not' if path else 'finds some'}: the "
            f"nodes do not see the same files (yet); start again, or put them where all see them"
        )
    return Found(Path(path) if path else None, answer["remarks"])


def _at(place: Path) -> Found:
    if not (place / MANIFEST).exists():
        return newest(place / "checkpoints")
    if wrong := verify(place):
        raise CheckpointError(f"{place} is damaged: {'; '.join(wrong)}")
    return Found(place, [])


def _print(place: Path, path: str) -> str:
    """By which ranks know that they mean the same checkpoint: the hash of its manifest; of none, whether some exist."""
    if not path:
        return str(bool(there(place / "checkpoints")))
    try:
        return file_hash(Path(path) / MANIFEST)
    except OSError:
        return ""


def read_state(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / STATE
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise Unreadable(f"{path} cannot be read ({error})") from None


def read_tensors(checkpoint: Path, name: str) -> dict[str, Tensor]:
    path = checkpoint / f"{name}.safetensors"
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise Unreadable(f"{path} cannot be read ({error})") from None


def read_fitting(checkpoint: Path, name: str, model: torch.nn.Module) -> dict[str, Tensor]:
    """Raises CheckpointError unless they are the model's tensors, by name and shape."""
    given = read_tensors(checkpoint, name)
    wanted = model.state_dict()
    wrong = [f"it has no {key}" for key in wanted if key not in given]
    wrong += [f"the model has no {key}" for key in given if key not in wanted]
    wrong += [
        f"{key} is {_shape(given[key])} instead of {_shape(value)}"
        for key, value in wanted.items()
        if key in given and given[key].shape != value.shape
    ]
    if wrong:
        more = f" and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
        raise CheckpointError(
            f"{checkpoint} is of another model: {', '.join(wrong[:NAMED])}{more}; set model and data as they were, or "
            f"take another run"
        )
    return given


def load_averaged(model: torch.nn.Module, run: Path) -> tuple[dict[str, Any], list[str]]:
    """Load a run's newest averaged weights into `model`; returns the checkpoint's state, and remarks. Collective."""
    found, remarks = agreed(run)
    if found is None:
        raise CheckpointError(f"{run} has no checkpoint: train it first, or give another --run")
    model.load_state_dict(read_fitting(found, "ema", model))
    return read_state(found), remarks


def amount(count: float) -> str:
    """Of bytes, for people."""
    for power, unit in ((3, "GiB"), (2, "MiB")):
        if count >= 1024**power:
            return f"{count / 1024**power:.{power - 1}f} {unit}"
    return f"{count / 1024:.1f} KiB"


def _step(path: Path) -> int:
    """-1: not a checkpoint, but perhaps somebody's copy of one."""
    match = re.fullmatch(r"step-(\d{8,})", path.name)
    return int(match[1]) if match else -1


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _write(path: Path, data: bytes) -> dict[str, Any]:
    """Returns what the manifest says of it, which is of the bytes in memory."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # to be verified as the disk has it
    return {"bytes": len(data), "xxh3": xxhash.xxh3_64_hexdigest(data)}


def _remove(checkpoint: Path) -> None:
    """Killed in the middle, it leaves no half checkpoint behind."""
    gone = checkpoint.with_name(f".gone-{checkpoint.name}")
    checkpoint.rename(gone)
    shutil.rmtree(gone)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _shape(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "a number"
