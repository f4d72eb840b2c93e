"""Writing, indexing and verifying webdataset shards: tars of `key.jpg` and `key.cls` that webdataset.WebDataset reads.

This is the only module that imports webdataset.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import webdataset
from numpy.typing import NDArray

from ..files import atomically, file_hash, is_plain, read_json
from . import DataError, codes, decode, places
from .index import Index, build
from .parallel import alone, in_processes
from .tar import Fields, checksum, scan


class Sample(NamedTuple):
    key: str
    image: bytes
    label: int
    extension: str = "jpg"
    attributes: dict[str, float] | None = None  # written as key.json


class Finding(NamedTuple):
    """What is wrong with one shard."""

    shard: str
    lost: int  # samples whose picture is missing or differs from what was indexed
    samples: int
    cause: str


def write(folder: Path, samples: Iterable[Sample], per_shard: int, classes: Sequence[str]) -> Index:
    """Writes `samples` in order, `per_shard` per tar, then the index. The same samples give the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for number, part in enumerate(_parts(samples, per_shard)):
        names.append(name(number))
        write_shard(folder / names[-1], part)
    write_classes(folder, classes)
    return build(folder, str(folder), names, Fields(), classes, processes=1)


def name(number: int) -> str:
    return f"{number:06d}.tar"


def write_shard(path: Path, samples: Iterable[Sample]) -> None:
    """Writes one tar atomically."""
    with (
        atomically(path) as partial,
        webdataset.TarWriter(str(partial), mtime=0, user="vaescale", group="vaescale") as tar,
    ):
        for sample in samples:
            record = {"json": json.dumps(sample.attributes).encode()} if sample.attributes else {}
            label = str(sample.label).encode()
            tar.write({"__key__": sample.key, sample.extension: sample.image, "cls": label, **record})


def write_classes(folder: Path, classes: Sequence[str]) -> None:
    """Writes classes.json: the names of class 0, class 1, … Raises DataError for a name with control characters."""
    for name in classes:
        if not is_plain(name):
            raise DataError(f"{name!r:.80} is not a valid class name: remove its control characters")
    with atomically(folder / "classes.json") as partial:
        partial.write_text(json.dumps(list(classes), indent=0))


def read_classes(path: Path) -> list[str]:
    try:
        classes = read_json(path)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise places.unreadable(path, error) from None
    except ValueError as error:
        raise DataError(f"{path} is not a list of class names ({error}): fix or remove it") from None
    if not isinstance(classes, list) or not all(isinstance(one, str) and is_plain(one) for one in classes):
        raise DataError(f"{path} is not a list of class names: fix or remove it")
    return classes


def index(source: str, folder: Path, pattern: str, fields: Fields, processes: int) -> Index:
    """Indexes the shards in `source` (a folder or a URL) that match `pattern`, and writes the index into `folder`."""
    names = places.names_in(source, pattern)
    classes = [] if places.is_url(source) else read_classes(Path(source) / "classes.json")
    with alone(folder):
        return build(folder, source, names, fields, classes, processes)


def verify(
    folder: Path, decoding: bool, processes: int, max_megapixels: int = decode.MAX_MEGAPIXELS
) -> Iterator[Finding]:
    """Reads every shard of an index and, with `decoding`, decodes every picture, or checks every code. Returns an
    iterator over the faults.

    Raises DataError if the index itself is damaged.
    """
    index = Index(folder)
    index.check()
    jobs = [(folder, number, max_megapixels if decoding else 0) for number in range(len(index.shards))]
    return (finding for finding in in_processes(examine, jobs, processes, f"verify {folder}", "shard") if finding)


def examine(folder: Path, number: int, max_megapixels: int) -> Finding | None:
    """Returns what is wrong with one shard, or None. max_megapixels: the limit for pictures; 0: do not decode them."""
    index = _opened(folder)
    shard = index.shards[number]
    try:
        with places.local(index.root, shard.name) as path:
            intact = path.stat().st_size == shard.bytes and file_hash(path) == shard.xxh3
            if intact and not max_megapixels:
                return None
            first = int(index.first[number])
            lost = _lost(path, index.records[first : first + shard.samples], max_megapixels, index.codes)
            if intact:
                what = "codes are not those of the tokenizer" if index.codes else "images do not decode"
                return Finding(shard.name, lost, shard.samples, what) if lost else None
            return Finding(shard.name, lost, shard.samples, _cause(path, shard))
    except (OSError, DataError) as error:
        cause = (error.strerror or "it cannot be read") if isinstance(error, OSError) else str(error)
        return Finding(shard.name, shard.samples, shard.samples, cause)


@lru_cache(1)
def _opened(folder: Path) -> Index:
    """Opens an index once per process, not once per shard."""
    return Index(folder)


def _lost(path: Path, records: NDArray[np.void], max_megapixels: int, header: codes.Header | None) -> int:
    lost = 0
    with path.open("rb") as file:
        for offset, length, _, _, check in records.tolist():
            data = os.pread(file.fileno(), length, offset)
            lost += checksum(data) != check or (max_megapixels > 0 and not _decodes(data, max_megapixels, header))
    return lost


def _decodes(data: bytes, max_megapixels: int, header: codes.Header | None) -> bool:
    try:
        if header:
            codes.Codes(header).views(data)
        else:
            decode.check(data, max_megapixels, pixels=True)
    except decode.Damaged:
        return False
    return True


def _cause(path: Path, shard: places.Shard) -> str:
    """Returns what happened to the file, and where a reader without an index would stop."""
    size = path.stat().st_size
    changed = f"{size} bytes instead of {shard.bytes}" if size != shard.bytes else "changed bytes"
    try:
        for _ in scan(path, Fields(unlabelled=True, attributes=())):
            pass
    except DataError as error:
        return f"{changed}; {error}"
    return changed


def _parts(samples: Iterable[Sample], per_shard: int) -> Iterator[list[Sample]]:
    part: list[Sample] = []
    for sample in samples:
        part.append(sample)
        if len(part) == per_shard:
            yield part
            part = []
    if part:
        yield part
