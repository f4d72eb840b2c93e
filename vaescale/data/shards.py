"""Writing plain webdataset shards: `key.jpg` and `key.cls` in tars that `webdataset.WebDataset` reads as they are.

The only importer of webdataset.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import webdataset

from . import DataError
from .index import Index, write_index


class Sample(NamedTuple):
    key: str
    jpg: bytes
    label: int


def write(folder: Path, samples: Iterable[Sample], per_shard: int, classes: list[str]) -> Index:
    """Write `samples` in order, `per_shard` to a tar, then the index. The same samples give the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, part in enumerate(_parts(samples, per_shard)):
        path = folder / f"{number:06d}.tar"
        partial = path.with_suffix(".partial")
        with webdataset.TarWriter(str(partial), mtime=0, user="vaescale", group="vaescale") as tar:
            for sample in part:
                label = str(sample.label).encode()
                tar.write({"__key__": sample.key, "jpg": sample.jpg, "cls": label})
        partial.replace(path)
        paths.append(path)
    return write_index(folder, paths, classes)


def index(folder: Path, shards: Path | None = None, pattern: str = "*.tar") -> Index:
    """Index the tars in `shards` (default: `folder` itself) that match `pattern`; the index goes into `folder`."""
    root = shards or folder
    paths = sorted(root.glob(pattern))
    if not paths:
        raise DataError(f"no file in {root} matches {pattern}: give the folder that holds the tars")
    return write_index(folder, paths, [])


def _parts(samples: Iterable[Sample], per_shard: int) -> Iterator[list[Sample]]:
    part: list[Sample] = []
    for sample in samples:
        part.append(sample)
        if len(part) == per_shard:
            yield part
            part = []
    if part:
        yield part
