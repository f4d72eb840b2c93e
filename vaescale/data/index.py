"""The index: the shard and the position of each sample. It is made with the shards, or later for existing shards.

An index is a folder with three files. `index.json` holds the location of the shards, the class names, the name,
samples, bytes and xxh3 of each shard, and how the samples were made if they are codes (codes.py). `samples.npy` holds
one fixed-size record per sample, in shard order. `attributes.npy` exists if the samples have attributes. The two arrays
are memory-mapped, and nothing is unpickled. The shards may be in another folder or behind a URL.

An index may come from an untrusted source. `Index` checks each field of index.json when it opens one. `check_files`
compares the arrays with their hashes, and each record with its shard; every command that reads samples calls it first.
"""

import json
import os
import re
import stat
from bisect import bisect
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.lib.format import open_memmap

from .. import distributed
from ..files import atomically, file_hash, is_plain, printable, read_json
from . import DataError, codes, places
from .missing import how_to_index, missing
from .names import by_ending
from .parallel import in_processes
from .places import Shard
from .tar import MOST_BYTES, MOST_HEAD, Entry, Fields, scan

FORMAT = 3
# Of a picture's bytes: offset in the shard, length, bytes of tar header before them, label, checksum.
RECORD = np.dtype([("offset", "<i8"), ("length", "<u4"), ("head", "<u4"), ("label", "<i4"), ("check", "<u4")])
MOST_ATTRIBUTES = 256
MOST_JSON = 1 << 27  # bytes of index.json: two million shards
MOST_SAMPLES = 1 << 40
MOST_SHARD = 1 << 50  # bytes
SIMPLE = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*", re.ASCII)  # shard names that need no further check
CHECKED = 1 << 16  # records checked at once
PARTS = ".parts"  # folder with the entries of each shard, while the index is being made
SHOWN = 5  # shards named in one error
NAMED = 20  # left-out samples that are named


class Place(NamedTuple):
    """The record of a sample: shard number, offset and length of the picture's bytes, bytes of tar header before them,
    label, checksum."""

    shard: int
    offset: int
    length: int
    head: int
    label: int
    check: int


class Index:
    """An open index of S shards and N samples. The list of shards is in memory, the records are memory-mapped.

    sizes: int64 [S], samples per shard. first: int64 [S], the number of each shard's first sample.
    attributes: float32 [N, len(attribute_names)], NaN where a sample has no value; None if there are no attributes.
    classes may be empty.
    """

    def __init__(self, folder: Path) -> None:
        head, self.shards = _read_head(folder)
        self.folder = folder
        self.root: str = head["root"] if places.is_url(head["root"]) else str(folder / head["root"])
        self.classes: list[str] = head["classes"]
        self.attribute_names: list[str] = head["attributes"]
        self.hashes: dict[str, str] = head["hashes"]  # file → xxh3
        self.codes = codes.checked(head["codes"]) if "codes" in head else None  # of images, if the samples are codes
        self.sizes = np.array([shard.samples for shard in self.shards], np.int64)
        total = int(self.sizes.sum())
        self.records = _mapped(folder, "samples.npy", RECORD, (total,))
        self.attributes: np.ndarray[Any, Any] | None = None
        if self.attribute_names:
            self.attributes = _mapped(folder, "attributes.npy", np.dtype("<f4"), (total, len(self.attribute_names)))
        self.first = np.concatenate([[0], np.cumsum(self.sizes)[:-1]])
        self._first: list[int] = self.first.tolist()  # for one sample, bisect is ten times as fast as searchsorted

    def __len__(self) -> int:
        return len(self.records)

    def locate(self, sample: int) -> Place:
        shard = bisect(self._first, sample) - 1
        offset, length, head, label, check = self.records[sample].item()
        return Place(shard, offset, length, head, label, check)

    def fingerprint(self) -> str:
        """Returns a hash that changes whenever the samples, their labels or their order change."""
        return xxhash.xxh3_64_hexdigest(json.dumps([self.shards, self.hashes["samples.npy"]]).encode())

    def check(self) -> None:
        """Compares the arrays with their hashes, and every record with its shard and the classes.

        Swapped labels would otherwise train without an error. The files are read completely, in parts. Raises
        DataError.
        """
        try:
            wrong = places.patiently(self._damage)
        except OSError as error:
            raise places.unreadable(self.folder, error) from None
        if wrong:
            raise DataError(f"the index {self.folder} is damaged ({wrong}): {how_to_index(self.folder)}")

    def _damage(self) -> str:
        """Returns what is wrong with the files, or ""."""
        for name, xxh3 in self.hashes.items():
            if file_hash(self.folder / name) != xxh3:
                return f"{name} does not match its hash in index.json"
        first, sizes = 0, np.array([shard.bytes for shard in self.shards])
        for records in _parts(self.folder / "samples.npy", self.records):
            if wrong := self._wrong(first, records, sizes):
                return wrong
            first += len(records)
        if self.attributes is not None:
            for values in _parts(self.folder / "attributes.npy", self.attributes):
                if np.isinf(values).any():
                    return "attributes.npy contains infinite values"
        return ""

    def _wrong(self, first: int, records: np.ndarray[Any, Any], sizes: np.ndarray[Any, Any]) -> str:
        """Returns what is wrong with the records of the samples from `first` on, or "". sizes: bytes per shard."""
        shard = np.searchsorted(self.first, np.arange(first, first + len(records)), side="right") - 1
        offset, length, head = records["offset"], records["length"].astype(np.int64), records["head"]
        size = sizes[shard]
        label, most = records["label"], len(self.classes) - 1 if self.classes else np.iinfo(np.int32).max
        checks = (
            ("lies outside its shard", (offset < head) | (offset > size - length)),
            (f"has more than {MOST_BYTES} bytes", length > MOST_BYTES),
            (f"has a header of more than {MOST_HEAD} bytes", head > MOST_HEAD),
            (f"has a label outside -1 to {most}", (label < -1) | (label > most)),
        )
        for what, where in checks:
            if where.any():
                sample = int(where.argmax())
                return f"sample {first + sample} of {self.shards[shard[sample]].name} {what}"
        return ""


def check_files(*indexes: Index) -> None:
    """Calls Index.check of each index on one rank of every node. Collective. Raises DataError on all ranks."""
    wrong = ""
    if distributed.place().local_rank == 0:
        try:
            for index in indexes:
                index.check()
        except DataError as error:
            wrong = str(error)
    if ranks := distributed.where(bool(wrong)):
        raise DataError(wrong or f"rank {ranks[0]} found damaged data: see its error")


def build(
    folder: Path,
    root: str,
    names: Sequence[str],
    fields: Fields,
    classes: Sequence[str],
    processes: int,
    header: codes.Header | None = None,
) -> Index:
    """Scans the shards `names` under `root` (a folder or a URL) and writes the index into `folder`, atomically.
    header: how the samples were made, if they are codes.

    The entries of each shard are kept until the index is complete, so a repeated call continues after an interruption.
    Raises DataError with the names of the shards that cannot be read.
    """
    (folder / PARTS).mkdir(parents=True, exist_ok=True)
    jobs = [(root, name, fields, part_of(folder, name)) for name in names]
    faults = [fault for fault in in_processes(describe_shard, jobs, processes, f"index {root}", "shard") if fault]
    if faults:
        more = f"; and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise DataError(f"{len(faults)} of {len(names)} shards cannot be indexed: {'; '.join(faults[:SHOWN])}{more}")
    inside = root if places.is_url(root) else os.path.relpath(Path(root).resolve(), folder.resolve())
    _report(folder, names)
    _merge(folder, inside, names, classes, header)
    for path in (folder / PARTS).iterdir():
        path.unlink()
    (folder / PARTS).rmdir()
    return Index(folder)


def describe_shard(root: str, name: str, fields: Fields, part: Path) -> str | None:
    """Scans one shard and writes its entries to `part`. Returns None, or a sentence on why the shard cannot be read."""
    try:
        current = places.state(root, name)
        state = f"{current} {fields}"
        if current and _is_known(part, state):
            return None
        with places.local(root, name) as path:
            size = path.stat().st_size
            entries: list[Entry] = []
            left_out: list[str] = []
            passed: Counter[str] = Counter()
            keys: set[str] = set()
            for entry in scan(path, fields, passed):
                if entry.fault:
                    left_out.append(f"{printable(entry.key)} in {printable(name)} ({entry.fault})")
                    continue
                entries.append(entry)
                keys.update(entry.attributes)
                if len(keys) > MOST_ATTRIBUTES:
                    return (
                        f"the JSON in {name} has more than {MOST_ATTRIBUTES} different numeric fields: name those to "
                        f"keep with --attributes"
                    )
            digest = file_hash(path)
    except OSError as error:
        return f"{root}/{name} cannot be read ({error.strerror})"
    except DataError as error:
        return str(error)
    names = sorted(keys)
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
            left_out=np.array(left_out, np.str_),
            passed=np.array(list(passed.elements()), np.str_),
        )
    return None


def _report(folder: Path, names: Sequence[str]) -> None:
    """Prints which samples are left out because their picture is damaged, and which members belong to no sample."""
    left_out: list[str] = []
    passed: Counter[str] = Counter()
    for name in names:
        with np.load(part_of(folder, name), allow_pickle=False) as part:
            left_out += part["left_out"].tolist()
            passed.update(part["passed"].tolist())
    for line in left_out[:NAMED]:
        print(f"left out: {line}", flush=True)
    if len(left_out) > NAMED:
        print(f"left out: {len(left_out) - NAMED} more", flush=True)
    if passed:
        print(f"skipped, in samples without an image: {by_ending(passed)}", flush=True)


def _is_known(part: Path, state: str) -> bool:
    with suppress(OSError, ValueError, KeyError), np.load(part, allow_pickle=False) as known:
        return str(known["state"]) == state
    return False


def _merge(folder: Path, root: str, names: Sequence[str], classes: Sequence[str], header: codes.Header | None) -> None:
    """Merges all parts into the index. index.json is written last: the index exists once that file does."""
    shards, attributes = [], set()
    for name in names:
        with np.load(part_of(folder, name), allow_pickle=False) as part:
            shards.append(Shard(name, len(part["records"]), int(part["bytes"]), str(part["xxh3"])))
            label = int(part["records"]["label"].max(initial=-1))
            if classes and label >= len(classes):
                raise DataError(
                    f"{name} has the label {label}, but classes.json names only the classes 0 to {len(classes) - 1}: "
                    f"correct classes.json, or remove it if it belongs to other shards"
                )
            attributes |= set(part["names"].tolist())
    total = sum(shard.samples for shard in shards)
    if not total:
        raise DataError(f"no sample with an image was found in the {len(names)} shards of {root}")
    if len(attributes) > MOST_ATTRIBUTES:
        raise DataError(
            f"the JSON in {root} has {len(attributes)} different numeric fields: name those to keep with --attributes"
        )
    columns = sorted(attributes)
    for name in ("index.json", "samples.npy", "attributes.npy"):  # a run that has them open keeps the old files
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
    hashes = {"samples.npy": file_hash(folder / "samples.npy")}
    if values is not None:
        values.flush()
        hashes["attributes.npy"] = file_hash(folder / "attributes.npy")
    head = {"format": FORMAT, "root": root, "classes": list(classes), "attributes": columns, "hashes": hashes}
    head |= {"codes": header._asdict()} if header else {}
    with atomically(folder / "index.json") as partial:
        partial.write_text(json.dumps({**head, "shards": shards}))


def part_of(folder: Path, name: str) -> Path:
    return folder / PARTS / f"{name.replace('/', '%')}.npz"


def _read_head(folder: Path) -> tuple[dict[str, Any], list[Shard]]:
    path = folder / "index.json"
    try:
        head = places.patiently(lambda: read_json(path, MOST_JSON))
        made_by = head.get("format") if isinstance(head, dict) else None
        if made_by == FORMAT:
            _check_head(head)
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(missing(folder)) from None
    except OSError as error:
        raise places.unreadable(path, error) from None
    except (ValueError, LookupError, TypeError) as error:
        what = str(error) if type(error) is ValueError else "fields are missing or of the wrong type"
        raise DataError(f"{path} is damaged ({what}): {how_to_index(folder)}") from None
    if made_by != FORMAT:
        raise DataError(f"{path} was made by another version of vaescale: {how_to_index(folder)}")
    places.check_place(head["root"])
    return head, list(map(Shard._make, head["shards"]))


def _check_head(head: dict[str, Any]) -> None:
    """Checks every field of index.json that is used as a path, a count or a name.

    Raises ValueError with a phrase, LookupError or TypeError; DataError for the name of a shard.
    """
    files = {"samples.npy", "attributes.npy"} if head["attributes"] else {"samples.npy"}
    _require(
        isinstance(head["root"], str) and head["root"] != "" and is_plain(head["root"]), "root is not a folder or URL"
    )
    for names in ("classes", "attributes"):
        plain = isinstance(head[names], list) and all(isinstance(one, str) and is_plain(one) for one in head[names])
        _require(plain, f"{names} is not a list of printable names")
    attributes = head["attributes"]
    _require(len(set(attributes)) == len(attributes) <= MOST_ATTRIBUTES, "attributes has too many names, or one twice")
    _require(
        isinstance(head["hashes"], dict) and set(head["hashes"]) == files,
        f"hashes must be those of {' and '.join(sorted(files))}",
    )
    _require(all(map(codes.is_hash, head["hashes"].values())), "the hash of a file is not 16 hexadecimal digits")
    if "codes" in head:
        codes.checked(head["codes"])
    _check_shards(*zip(*head["shards"], strict=True))


def _check_shards(names: Sequence[Any], samples: Sequence[Any], sizes: Sequence[Any], hashes: Sequence[Any]) -> None:
    """Checks the shards column by column, because there may be a hundred thousand of them."""
    _require(set(map(type, (*names, *hashes))) == {str}, "a shard's name or hash is not text")
    _require(set(map(type, (*samples, *sizes))) == {int}, "a shard's samples or bytes are not a whole number")
    for name in names:
        if not SIMPLE.fullmatch(name):
            places.check_name(name)
    _require(all(map(codes.HASH.fullmatch, hashes)), "a shard's hash is not 16 hexadecimal digits")
    _require(min(samples) >= 0 < sum(samples) < MOST_SAMPLES, "the number of samples is out of range")
    _require(min(sizes) >= 0 and max(sizes) < MOST_SHARD, "a shard's number of bytes is out of range")
    _require(len(set(names)) == len(names), "two shards have the same name")


def _require(sound: bool, phrase: str) -> None:
    if not sound:
        raise ValueError(phrase)


def _mapped(folder: Path, name: str, kind: np.dtype[Any], shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Memory-maps an .npy file. Raises DataError unless it has this type and shape."""
    path = folder / name
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError("it is not a regular file")
        mapped = places.patiently(lambda: open_memmap(path, mode="r"))  # never unpickles
    except FileNotFoundError:
        raise DataError(f"{path} is missing: {how_to_index(folder)}") from None
    except OSError as error:
        raise places.unreadable(path, error) from None
    except Exception as error:  # numpy parses the header as Python, so a hostile one may raise any exception
        raise DataError(f"{path} is damaged ({type(error).__name__}: {error}): {how_to_index(folder)}") from None
    if mapped.dtype != kind or mapped.shape != shape or not mapped.flags.c_contiguous:
        raise DataError(f"{name} and index.json in {folder} do not match: {how_to_index(folder)}")
    return np.asarray(mapped)  # still mapped, but without memmap's overhead at every access


def _parts(path: Path, mapped: np.ndarray[Any, Any]) -> Iterator[np.ndarray[Any, Any]]:
    """Yields the rows of a mapped file, CHECKED at a time. They are read, because mapped pages would stay in memory."""
    width = int(np.prod(mapped.shape[1:]))
    with path.open("rb") as file:
        file.seek(path.stat().st_size - mapped.nbytes)
        while (rows := np.fromfile(file, mapped.dtype, CHECKED * width)).size:
            yield rows.reshape(-1, *mapped.shape[1:])
