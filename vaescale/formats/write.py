"""Writing an export completely or not at all, and only over an earlier one."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..config import ConfigError
from ..files import atomically, printable
from .metadata import is_export


def require_free(out: Path, weights: str = "", names: frozenset[str] = frozenset()) -> None:
    """Raises ConfigError if something at `out` would be lost. out: a file, or with `weights`, the name of the file of
    weights in it, a folder, which may only have the files `names`. An earlier export will be overwritten."""
    if not out.exists():
        return
    entries = sorted(path.name for path in out.iterdir()) if weights and out.is_dir() else []
    if strange := [name for name in entries if name not in names]:
        raise ConfigError(f"{out} has {printable(strange[0], 80)}, which is not of an export: give another folder")
    empty = weights and out.is_dir() and not entries
    if not empty and not is_export(out / weights if weights else out):
        raise ConfigError(f"{out} exists and is not an earlier export: give another name")


@contextmanager
def folder(out: Path) -> Iterator[Path]:
    """Yields an empty temporary folder, which becomes `out` at the end. After an error it is removed."""
    partial, former = (out.with_name(f".{out.name}.{name}") for name in ("partial", "former"))
    for left in (partial, former):
        shutil.rmtree(left, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if out.exists():
            out.rename(former)
        try:
            partial.rename(out)
        except BaseException:
            if former.exists():
                former.rename(out)
            raise
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(former, ignore_errors=True)


def save(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file. Raises OSError, and ConfigError for what safetensors raises instead."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with atomically(path) as partial:
            save_file({name: one.detach().contiguous() for name, one in tensors.items()}, partial, dict(metadata))
    except SafetensorError as error:
        raise ConfigError(f"{path} cannot be written ({error}): free space, or give another place") from None
