"""Saves state to a durable directory and loads it.

    checkpoints/latest                  the name of the newest checkpoint; updated last
    checkpoints/step-00000500/
        model.safetensors               fp32 parameters and buffers, codebooks among them
        ema.safetensors                 averaged parameters and the same buffers, but for statistics of latents, which
                                        only these have: what evaluation loads
        optimizer.safetensors           AdamW's two moments, by parameter
        moments.safetensors             for PCA, instead: sums over the images so far
        state.json                      step, images, and what the order of samples depends on
        manifest.json                   size and xxh3 of each file; written last

The layout is the same at every world size and ZeRO stage. Loading a checkpoint never runs code. Readers use the
checkpoint that `latest` names; if it or `latest` itself is damaged, they use the newest valid one and report it.
"""

import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from .. import distributed, hub
from ..files import file_hash, parse_json, printable, read_bytes, read_json
from ..interfaces import Tensors

# (file name without ending, expected tensors) → the file's tensors, which must have the same names, shapes and types.
Read = Callable[[str, Tensors], Tensors]

STATE, MANIFEST, LATEST = "state.json", "manifest.json", "latest"
CRITIC = "adversarial.width and adversarial.layers"  # the settings that decide the shapes of a critic
NAMED = 3  # tensors that an error names
FILE = re.compile(r"[a-z_]+\.(json|safetensors)")  # file names that a checkpoint may contain
LEFTOVER = re.compile(r"\.(partial|gone)-step-\d{8,}")  # folders that an interrupted save may leave behind
FORMER = ("levels", "radix")  # buffers that older versions saved, although they follow from the settings
LATER = ("latent_mean", "latent_std", "error_std")  # that older versions did not save: their first values are used
DTYPES = {  # as safetensors names them, in the order in which it stores them
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used or written; the text says which, why and what to do. Raised on all ranks alike.

    The text may quote an untrusted checkpoint, so it is made printable here.
    """

    exit_code = 2

    def __init__(self, text: str) -> None:
        super().__init__(printable(text))


class Unreadable(CheckpointError):
    """This rank cannot read the checkpoint; other ranks may have."""


class Found(NamedTuple):
    path: Path | None  # a valid checkpoint; None if there are no checkpoints at all
    remarks: list[str]  # one line for `latest` and for each checkpoint that was tried first, if damaged


def save(
    folder: Path,
    step: int,
    tensors: dict[str, dict[str, Tensor]],
    state: dict[str, Any],
    keep: int,
    keep_every: int = 0,
) -> Path:
    """Write a temporary folder, sync, verify, rename it to `folder`/step-…, then update `latest`. Returns the new path.

    tensors: file name without ending → tensors by name. Afterwards the newest `keep` checkpoints up to this step are
    kept, this one included, and those whose step is a multiple of keep_every. Called on one rank. If it raises before
    the rename, it leaves nothing behind, and older checkpoints and `latest` are unchanged.
    """
    final = folder / f"step-{step:08d}"
    partial = folder / f".partial-{final.name}"
    pointer = folder / f".{LATEST}"
    folder.mkdir(parents=True, exist_ok=True)
    _sync(folder.parent)
    for left in folder.iterdir():
        if LEFTOVER.fullmatch(left.name):
            _delete(left)
    try:
        partial.mkdir()
        manifest = {}
        for name, values in tensors.items():
            manifest[f"{name}.safetensors"] = _write(partial / f"{name}.safetensors", serialised(values))
        manifest[STATE] = _write(partial / STATE, [_json(state)])
        _write(partial / MANIFEST, [_json(manifest)])
        _sync(partial)
        if wrong := verify(partial):
            raise CheckpointError(f"the disk returned other bytes than were written: {'; '.join(wrong)}")
        _write(pointer, [f"{final.name}\n".encode()])  # now, because the remaining operations need no disk space
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):  # the original error is reported, not this one
            pointer.unlink(missing_ok=True)
        raise
    # The run has reached this step again from an older checkpoint, or has finished what a stop had cut short.
    former = _set_aside(final) if final.exists() else None
    partial.rename(final)
    _sync(folder)
    pointer.replace(folder / LATEST)
    _sync(folder)
    if former:
        with suppress(OSError):  # see below
            _delete(former)
    until = [path for path in there(folder) if _step(path) <= step]
    for old in until[:-keep]:
        if not (keep_every and _step(old) % keep_every == 0):
            with suppress(OSError):  # the save itself has succeeded; the next one tries to remove it again
                _remove(old)
    return final


def verify(checkpoint: Path) -> list[str]:
    """Returns what is wrong with a checkpoint, phrases that name a file and the cause; [] if it is as written."""
    try:
        data = read_bytes(_regular(checkpoint / MANIFEST))
        listed = parse_json(data)
        if _json(listed) != data:  # even a changed byte without meaning, such as a space, counts as damage
            raise ValueError("its bytes have changed")
        files = [(name, entry["bytes"], entry["xxh3"]) for name, entry in listed.items()]
    except FileNotFoundError:
        return [f"{MANIFEST} is missing"]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return [f"{MANIFEST} cannot be read ({error})"]
    if strange := [name for name in listed if not FILE.fullmatch(name) or name == MANIFEST]:
        return [f"{MANIFEST} lists {printable(strange[0], 60)!r}, which is not a checkpoint file"]
    if STATE not in listed:
        return [f"{MANIFEST} does not list {STATE}"]
    return [printable(wrong) for name, size, digest in files if (wrong := _wrong(checkpoint / name, size, digest))]


def _regular(path: Path) -> Path:
    """Returns the path. Raises ValueError for a link, folder, pipe or device: reading could leave the checkpoint or
    never end."""
    if not stat.S_ISREG(path.lstat().st_mode):
        raise ValueError("it is not a regular file")
    return path


def _wrong(path: Path, size: int, digest: str) -> str:
    try:
        found = _regular(path).stat().st_size
        if found != size:
            return f"{path.name} has {found} bytes instead of {size}"
        if (other := file_hash(path)) != digest:
            return f"{path.name} has changed (xxh3 {other} instead of {digest})"
        if path.suffix == ".json":
            read_json(path)
        else:
            with safe_open(path, "pt"):
                pass
    except FileNotFoundError:
        return f"{path.name} is missing"
    except (OSError, ValueError, SafetensorError) as error:
        return f"{path.name} cannot be read ({error})"
    return ""


def there(folder: Path) -> list[Path]:
    """Returns all checkpoints in the folder, valid or not, sorted by step."""
    return sorted((path for path in folder.glob("step-*") if _step(path) >= 0), key=_step)


def newest(folder: Path) -> Found:
    """Returns the checkpoint that `latest` names; if that is missing or damaged, the valid one with the highest step.

    Raises CheckpointError if checkpoints exist but none is valid: silently starting from scratch would lose the run.
    """
    candidates = there(folder)[::-1]
    pointer = folder / LATEST
    if not candidates and not pointer.exists():
        return Found(None, [])
    try:
        named = read_bytes(pointer).decode(errors="replace").strip()
        wrong = "" if named in [path.name for path in candidates] else f"names {named[:40]!r}, which does not exist"
        wrong = wrong if named else "is empty"
    except (OSError, ValueError) as error:
        named, wrong = "", "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
    remarks = [f"{pointer} {wrong}: using the newest valid checkpoint"] if wrong else []
    damaged = []
    for path in sorted(candidates, key=lambda path: path.name != named):
        causes = verify(path)
        if not causes:
            return Found(path, remarks)
        damaged.append(f"{path.name} is damaged: {'; '.join(causes)}")
        remarks.append(f"{path} is damaged, trying the next one: {'; '.join(causes)}")
    if not candidates:
        raise CheckpointError(f"{pointer} {wrong}, and there are no checkpoints: remove it to start from scratch")
    raise CheckpointError(
        f"none of the {len(candidates)} checkpoint(s) in {folder} is valid ({', '.join(damaged)}): restore one, or "
        f"move the folder away to start from scratch"
    )


def agreed(place: Path) -> Found:
    """Returns, on all ranks, the checkpoint that rank 0 finds at `place`, a run directory or a checkpoint. Collective.

    Raises CheckpointError if rank 0 finds only damaged ones, or if another rank does not see the same checkpoint.
    """
    answer: dict[str, Any] = {}
    if distributed.rank() == 0:
        try:
            found = _at(place)
            answer = {"path": str(found.path or ""), "remarks": found.remarks}
        except CheckpointError as error:
            answer = {"error": str(error)}
        except OSError as error:
            answer = {"error": f"the checkpoints of {place} cannot be read ({error})"}
        answer["fingerprint"] = _fingerprint(place, answer.get("path", ""))
    answer = distributed.tell(answer)
    if "error" in answer:
        raise CheckpointError(answer["error"])
    path = answer["path"]
    if others := distributed.where(_fingerprint(place, path) != answer["fingerprint"]):
        what = f"the checkpoint {path}" if path else f"no checkpoint in {place}"
        raise CheckpointError(
            f"rank 0 finds {what}, but rank {', '.join(map(str, others))} {'does not' if path else 'finds some'}: the "
            f"nodes do not see the same files (yet): start again, or use a folder that all nodes share"
        )
    return Found(Path(path) if path else None, answer["remarks"])


def _at(place: Path) -> Found:
    if not (place / MANIFEST).exists():
        return newest(place / "checkpoints")
    if wrong := verify(place):
        raise CheckpointError(f"{place} is damaged: {'; '.join(wrong)}")
    return Found(place, [])


def _fingerprint(place: Path, path: str) -> str:
    """Returns a fingerprint by which ranks compare what they see: the hash of the manifest, or without a path whether
    any checkpoints exist."""
    try:
        if not path:
            return str(bool(there(place / "checkpoints")))
        return file_hash(Path(path) / MANIFEST)
    except OSError:
        return ""


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Returns state.json without checking its values, which is done in state.py. Raises Unreadable."""
    path = checkpoint / STATE
    try:
        found = read_json(path)
        if not isinstance(found, dict):
            raise ValueError("it is not an object")
    except (OSError, ValueError) as error:
        raise Unreadable(f"{path} cannot be read ({error})") from None
    return found


def read_tensors(checkpoint: Path, name: str) -> dict[str, Tensor]:
    path = hub.tensors_of(checkpoint, name)
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise Unreadable(f"{path} cannot be read ({error})") from None


def read_fitting(checkpoint: Path, name: str, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors of file `name`. Raises CheckpointError, before reading data, unless names, shapes and types
    are those of `wanted`, whose values those of LATER keep if the file does not have them."""
    path = hub.tensors_of(checkpoint, name)
    owner, decisive = ("critic", CRITIC) if name.startswith("critic") else ("model", "the settings of model and data")
    try:
        with safe_open(path, "pt") as file:
            parts = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (it is no dict)
            given = {key: (tuple(part.get_shape()), part.get_dtype()) for key, part in parts.items()}
    except (OSError, SafetensorError) as error:
        raise Unreadable(f"{path} cannot be read ({error})") from None
    given = {key: value for key, value in given.items() if key in wanted or key.rpartition(".")[2] not in FORMER}
    needed = {key: (tuple(value.shape), DTYPES[value.dtype]) for key, value in wanted.items()}
    missing = [key for key in needed if key not in given and key.rpartition(".")[2] not in LATER]
    wrong = [f"it has no {key}" for key in missing]
    wrong += [f"the {owner} has no {printable(key, 60)}" for key in given if key not in needed]
    wrong += [
        f"{key} is {_described(*given[key])} instead of {_described(*value)}"
        for key, value in needed.items()
        if key in given and given[key] != value
    ]
    if wrong:
        more = f" and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
        weights = name in ("model", "ema")
        whose = f"{checkpoint} belongs to another model" if weights else f"{path} does not fit the {owner}"
        raise CheckpointError(f"{whose}: {', '.join(wrong[:NAMED])}{more}; restore {decisive}, or use another run")
    tensors = read_tensors(checkpoint, name)
    return {key: tensors.get(key, value) for key, value in wanted.items()}


def load_averaged(model: torch.nn.Module, place: Path) -> Found:
    """Loads the averaged weights of `place`, a checkpoint or a run directory, into `model`. Returns the checkpoint that
    was used. Raises CheckpointError. Collective."""
    found = agreed(place)
    if found.path is None:
        raise CheckpointError(f"{place} has no checkpoint: train it first, or give another --run")
    model.load_state_dict(read_fitting(found.path, "ema", model.state_dict()))
    return found


def _step(path: Path) -> int:
    """Returns the step in a checkpoint's name; -1 for other names, such as those of manual copies."""
    match = re.fullmatch(r"step-(\d{8,})", path.name)
    return int(match[1]) if match else -1


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def serialised(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """Yield the parts of a safetensors file with these tensors, byte for byte as the library writes it.

    The library's `save` holds the interpreter's lock for seconds, in which training stands still, and copies all
    tensors once more; its `save_file` gives no bytes to compute the manifest's hash from.
    """
    kinds = list(DTYPES)
    ordered = sorted(tensors.items(), key=lambda pair: (kinds.index(pair[1].dtype), pair[0]))
    head, end = {}, 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.nbytes
        head[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(head, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for _, tensor in ordered:
        yield tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _write(path: Path, parts: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Write and sync a file. Returns its manifest entry, computed from the bytes in memory."""
    digest, size = xxhash.xxh3_64(), 0
    with path.open("wb") as file:
        for part in parts:
            file.write(part)
            digest.update(part)
            size += len(part)
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # so that `verify` reads from the disk
    return {"bytes": size, "xxh3": digest.hexdigest()}


def _remove(checkpoint: Path) -> None:
    """Renames a checkpoint, then deletes it: a process killed in between leaves no partial checkpoint behind."""
    _delete(_set_aside(checkpoint))


def _set_aside(checkpoint: Path) -> Path:
    """Renames a checkpoint so that nothing reads it and the next save removes it. Returns its new path."""
    return checkpoint.rename(checkpoint.with_name(f".gone-{checkpoint.name}"))


def _delete(path: Path) -> None:
    """Deletes a file, a folder, or a link (not its target)."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _described(shape: tuple[int, ...], dtype: str) -> str:
    size = "×".join(map(str, shape)) or "a number"
    return size if dtype == "F32" else f"{size} ({dtype})"
