"""The index: where in which shard each sample lies. Made when shards are written, or from shards others made.

A folder holds `index.json` (where the shards are; of each its name, samples, bytes and xxh3; the class names),
`samples.npy`, one fixed record a sample in shard order, and `attributes.npy` if the samples have any. Both are mapped
and never read whole; nothing is unpickled. The shards may lie elsewhere, on a disk or behind a URL.
"""

import json
import os
from bisect import bisect
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.lib.format import open_memmap

from . import DataError, places
from .parallel import atomically, each
from .places import Shard
from .tar import Fields, scan

FORMAT = 3
# Of the picture's bytes: where they begin, how many, the bytes of tar header before them, their checksum.
RECORD = np.dtype([("offset", "<i8"), ("length", "<u4"), ("head", "<u4"), ("label", "<i4"), ("check", "<u4")])
MOST_ATTRIBUTES = 256
PARTS = ".parts"  # what is known of each shard while the index is being made
SHOWN = 5  # shards named in one error


class Place(NamedTuple):
    """Where a sample is: shard number, offset and length of its picture, bytes of header before it."""

    shard: int
    offset: int
    length: int
    head: int
    label: int
    check: int


class Index:
    """An opened index; its list of shards in memory, its records mapped.

    sizes: int64 [S] samples per shard; first: int64 [S] the number of each shard's first sample;
    attributes: float32 [N, len(attribute_names)], NaN where a sample has none, or None; classes may be empty.
    """

    def __init__(self, folder: Path) -> None:
        head, self.shards = _read_head(folder)
        self.folder = folder
        self.root: str = head["root"] if places.is_url(head["root"]) else str(folder / head["root"])
        self.classes: list[str] = head["classes"]
        self.attribute_names: list[str] = head["attributes"]
        self.hashes: dict[str, str] = head["hashes"]  # file → xxh3
        self.records = _mapped(folder, "samples.npy")
        self.attributes = _mapped(folder, "attributes.npy") if self.attribute_names else None
        self.sizes = np.array([shard.samples for shard in self.shards], np.int64)
        self.first = np.concatenate([[0], np.cumsum(self.sizes)[:-1]])
        self._first: list[int] = self.first.tolist()  # for one sample, bisect takes a tenth of searchsorted's time
        if self.records.dtype != RECORD or not len(self.records) == self.sizes.sum() > 0:
            raise DataError(f"{folder}: samples.npy and index.json do not belong together: {how_to_index(folder)}")

    def __len__(self) -> int:
        return len(self.records)

    def locate(self, sample: int) -> Place:
        shard = bisect(self._first, sample) - 1
        offset, length, head, label, check = self.records[sample].item()
        return Place(shard, offset, length, head, label, check)

    def fingerprint(self) -> str:
        """Changes whenever the samples, their labels or their order change."""
        return xxhash.xxh3_64_hexdigest(json.dumps([self.shards, self.hashes["samples.npy"]]).encode())

    def damage(self) -> str:
        """Which of its own files is not what was written; "" if none. Reads them whole."""
        return ", ".join(name for name, xxh3 in self.hashes.items() if places.file_hash(self.folder / name) != xxh3)


def build(
    folder: Path, root: str, names: Sequence[str], fields: Fields, classes: Sequence[str], processes: int
) -> Index:
    """Scan the shards `names` under `root` (a folder or a URL) and write the index into `folder`, whole or not at all.

    What is known of a shard is kept until the index is whole, so that an interrupted call goes on where it stopped.
    Raises DataError that names the shards that cannot be read.
    """
    (folder / PARTS).mkdir(parents=True, exist_ok=True)
    jobs = [(root, name, fields, part_of(folder, name)) for name in names]
    faults = [fault for fault in each(describe, jobs, processes, f"index {root}", "shard") if fault]
    if faults:
        more = f"; and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise DataError(f"{len(faults)} of {len(names)} shards cannot be indexed: {'; '.join(faults[:SHOWN])}{more}")
    inside = root if places.is_url(root) else os.path.relpath(Path(root).resolve(), folder.resolve())
    _merge(folder, inside, names, classes)
    for path in (folder / PARTS).iterdir():
        path.unlink()
    (folder / PARTS).rmdir()
    return Index(folder)


def describe(root: str, name: str, fields: Fields, part: Path) -> str | None:
    """Scan one shard and write what is known of it to `part`; returns the sentence that says why it cannot be read."""
    try:
        told = places.state(root, name)
        state = f"{told} {fields}"
        if told and _is_known(part, state):
            return None
        with places.local(root, name) as path:
            size = path.stat().st_size
            entries = list(scan(path, fields))
            digest = places.file_hash(path)
    except OSError as error:
        return f"{root}/{name} cannot be read ({error.strerror})"
    except DataError as error:
        return str(error)
    names = sorted({key for entry in entries for key in entry.attributes})
    if len(names) > MOST_ATTRIBUTES:
        return f"{name} has {len(names)} different numbers in its JSON: name those to keep with --attributes"
    values = np.array([[entry.attributes.get(key, np.nan) for key in names] for entry in entries], np.float32)
    records = [(entry.offset, entry.length, entry.head, entry.label, entry.check) for entry in entries]
    with atomically(part) as partial, partial.open("wb") as file:
        np.savez(
            file,
            state=np.array(state),
            bytes=np.array(size),
            records=np.array(records, RECORD),
            names=np.array(names, np.str_),
            values=values.reshape(len(entries), len(names)),
            xxh3=np.array(digest),
        )
    return None


def _is_known(part: Path, state: str) -> bool:
    with suppress(OSError, ValueError, KeyError), np.load(part, allow_pickle=False) as known:
        return str(known["state"]) == state
    return False


def how_to_index(folder: Path) -> str:
    place = str(folder) if any(folder.glob("*.tar")) else f"SHARDS --out {folder}"
    return f"`python launch/shards.py index {place}` makes it"


def _merge(folder: Path, root: str, names: Sequence[str], classes: Sequence[str]) -> None:
    """All parts → the index. index.json last: with it the index exists, without it there is none."""
    shards, attributes = [], set()
    for name in names:
        with np.load(part_of(folder, name), allow_pickle=False) as part:
            shards.append(Shard(name, len(part["records"]), int(part["bytes"]), str(part["xxh3"])))
            attributes |= set(part["names"].tolist())
    total = sum(shard.samples for shard in shards)
    if not total:
        raise DataError(f"{root}: no sample with a picture was found in {len(names)} shards")
    if len(attributes) > MOST_ATTRIBUTES:
        raise DataError(
            f"{root}: {len(attributes)} different numbers in the JSON: name those to keep with --attributes"
        )
    columns = sorted(attributes)
    for name in ("index.json", "samples.npy", "attributes.npy"):  # a run that has them open keeps what it has
        (folder / name).unlink(missing_ok=True)
    records = open_memmap(folder / "samples.npy", "w+", RECORD, (total,))
    values = open_memmap(folder / "attributes.npy", "w+", np.float32, (total, len(columns))) if columns else None
    first = 0
    for shard in shards:
        rows = slice(first, first + shard.samples)
        with np.load(part_of(folder, shard.name), allow_pickle=False) as part:
            records[rows] = part["records"]
            if values is not None:
                values[rows] = np.nan
                values[rows, np.searchsorted(columns, part["names"])] = part["values"]
        first += shard.samples
    records.flush()
    hashes = {"samples.npy": places.file_hash(folder / "samples.npy")}
    if values is not None:
        values.flush()
        hashes["attributes.npy"] = places.file_hash(folder / "attributes.npy")
    head = {"format": FORMAT, "root": root, "classes": list(classes), "attributes": columns, "hashes": hashes}
    with atomically(folder / "index.json") as partial:
        partial.write_text(json.dumps({**head, "shards": shards}))


def part_of(folder: Path, name: str) -> Path:
    return folder / PARTS / f"{name.replace('/', '%')}.npz"


def _read_head(folder: Path) -> tuple[dict[str, Any], list[Shard]]:
    path = folder / "index.json"
    try:
        head = json.loads(path.read_text())
        made_by = head.get("format")
        if made_by == FORMAT:
            shards = [
                Shard(str(name), int(samples), int(size), str(xxh3)) for name, samples, size, xxh3 in head["shards"]
            ]
            sound = min(min(shard.samples, shard.bytes) for shard in shards) >= 0
            sound &= sum(shard.samples for shard in shards) < 2**40
            sound &= {"classes", "attributes"} < set(head) and "samples.npy" in head["hashes"]
            sound &= isinstance(head["root"], str)
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(_missing(folder)) from None
    except (ValueError, AttributeError, TypeError, LookupError, RecursionError):
        made_by, sound = FORMAT, False
    if made_by != FORMAT:
        raise DataError(f"{path} was made by another version of vaescale: {how_to_index(folder)} anew")
    if not sound:
        raise DataError(f"{path} is damaged: {how_to_index(folder)}")
    places.check_place(head["root"])
    for shard in shards:
        places.check_name(shard.name)
    return head, shards


def _missing(folder: Path) -> str:
    if any(folder.glob("*.tar")):
        return f"{folder} holds shards but no index: {how_to_index(folder)}"
    return (
        f"there are no shards in {folder}: `python launch/shards.py demo data/photos` writes the demo photographs, "
        f"or set data.root to a folder with your own (README, 'Your own ImageNet')"
    )


def _mapped(folder: Path, name: str) -> np.ndarray[Any, Any]:
    try:
        mapped = np.load(folder / name, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / name} cannot be read ({error}): {how_to_index(folder)}") from None
    return np.asarray(mapped)  # still mapped, without memmap's cost at every access
