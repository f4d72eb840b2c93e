"""The index: where in which shard each sample lies. Made when shards are written, or from shards others made.

A folder holds `index.json` (the shards: name, samples, bytes, xxh3; the class names) and `samples.npy`, one fixed
record a sample in shard order, mapped and never read whole. Nothing in it is unpickled.
"""

import json
import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import xxhash
from tqdm import tqdm

from . import DataError

IMAGES = ("jpg", "jpeg", "png", "webp")
BLOCK = 512  # bytes of a tar header
RECORD = np.dtype([("offset", "<i8"), ("length", "<i4"), ("label", "<i4")])  # of the image's bytes


@dataclass(frozen=True)
class Shard:
    name: str  # relative to `Index.shard_root`
    samples: int
    bytes: int
    xxh3: str


class Index:
    """An opened index; a few kilobytes in memory plus the mapped records.

    sizes: int64 [S] samples per shard; first: int64 [S] the number of each shard's first sample.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / "index.json"
        try:
            head = json.loads(path.read_text())
        except FileNotFoundError:
            raise DataError(missing(folder)) from None
        except ValueError:
            raise DataError(f"{path} is damaged: {how_to_index(folder)}") from None
        self.folder = folder
        self.shard_root = folder / head["shard_root"]
        self.shards = [Shard(**shard) for shard in head["shards"]]
        self.classes: list[str] = head["classes"]
        try:
            self.records = np.load(folder / "samples.npy", mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise DataError(f"{folder / 'samples.npy'} cannot be read ({error}): {how_to_index(folder)}") from None
        self.sizes = np.array([shard.samples for shard in self.shards], np.int64)
        self.first = np.concatenate([[0], np.cumsum(self.sizes)[:-1]])
        if len(self.records) != self.sizes.sum() or not len(self.records):
            raise DataError(f"{folder}: samples.npy and index.json do not belong together: {how_to_index(folder)}")

    def __len__(self) -> int:
        return len(self.records)

    def locate(self, sample: int) -> tuple[Path, int, int, int]:
        """(shard file, offset, length, label) of one sample."""
        shard = int(np.searchsorted(self.first, sample, side="right")) - 1
        record = self.records[sample]
        path = self.shard_root / self.shards[shard].name
        return path, int(record["offset"]), int(record["length"]), int(record["label"])

    def fingerprint(self) -> str:
        """Changes whenever the samples or their order change."""
        text = json.dumps([asdict(shard) for shard in self.shards])
        return xxhash.xxh3_64_hexdigest(text.encode())


def missing(folder: Path) -> str:
    if any(folder.glob("*.tar")):
        return f"{folder} holds shards but no index: {how_to_index(folder)}"
    return (
        f"there are no shards in {folder}: `python launch/shards.py demo data/photos` writes the demo photographs, "
        f"or set data.root to a folder with your own (README, 'Your own ImageNet')"
    )


def how_to_index(folder: Path) -> str:
    return f"`python launch/shards.py index {folder}` makes it"


def write_index(folder: Path, shards: Iterable[Path], classes: list[str]) -> Index:
    """Scan `shards` and write the index into `folder`, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = list(shards)
    root = paths[0].parent
    described, records = [], []
    for path in tqdm(paths, desc=f"index {root}", unit="shard", disable=None):  # None: only where somebody watches
        entries = list(scan(path))
        records.append(np.array([entry[1:] for entry in entries], RECORD))
        with path.open("rb") as file:
            digest = xxhash.xxh3_64()
            while chunk := file.read(1 << 22):
                digest.update(chunk)
        described.append(Shard(path.name, len(entries), path.stat().st_size, digest.hexdigest()))
    samples = np.concatenate(records)
    if not len(samples):
        raise DataError(f"{root}: no sample with an image ({', '.join(IMAGES)}) was found in {len(paths)} shards")
    count = int(samples["label"].max()) + 1
    head = {
        "shard_root": os.path.relpath(root.resolve(), folder.resolve()),
        "classes": classes or [str(label) for label in range(count)],
        "shards": [asdict(shard) for shard in described],
    }
    # index.json last: with it the index exists, without it there is none.
    partial = folder / ".samples.npy"
    with partial.open("wb") as file:
        np.save(file, samples, allow_pickle=False)
    partial.replace(folder / "samples.npy")
    partial = folder / ".index.json"
    partial.write_text(json.dumps(head, indent=1))
    partial.replace(folder / "index.json")
    return Index(folder)


def scan(path: Path) -> Iterator[tuple[str, int, int, int]]:
    """(key, offset, length, label) of each sample of one tar, in order; webdataset's rule: key = name up to the
    first dot of its last part, consecutive members with one key are one sample.

    Raises DataError if the tar ends early: at a damaged header the library mostly stops without an error.
    """
    end = 0
    key, image, label = "", None, None
    with _open(path) as tar:
        for member in _members(tar, path):
            end = member.offset_data + (member.size + BLOCK - 1) // BLOCK * BLOCK
            if not member.isfile():
                continue
            here, extension = split_name(member.name)
            if here != key:
                if image is not None:
                    yield key, *image, _given(label, path, key)
                key, image, label = here, None, None
            if extension.lower() in IMAGES:
                image = (member.offset_data, member.size)
            elif extension == "cls":
                label = _label(tar, member, path)
        if image is not None:
            yield key, *image, _given(label, path, key)
    with path.open("rb") as file:
        file.seek(end)
        tail = file.read(2 * BLOCK)
    # A whole tar ends in zeros; anything else after the last member that could be read means lost samples.
    if len(tail) < BLOCK or tail.strip(b"\0"):
        raise DataError(damaged(path, end))


def split_name(name: str) -> tuple[str, str]:
    """A member's (key, extension)."""
    folder, slash, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    return folder + slash + stem, extension


def damaged(path: Path, place: int) -> str:
    return f"{path} is damaged or cut at byte {place}: fetch or write this shard again"


def _open(path: Path) -> tarfile.TarFile:
    try:
        return tarfile.open(path, "r:")
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"{path} is no plain tar file ({error}): only uncompressed shards can be indexed") from None


def _given(label: int | None, path: Path, key: str) -> int:
    if label is None:
        raise DataError(f"{path}: the sample {key} has a picture but no class (no {key}.cls)")
    return label


def _members(tar: tarfile.TarFile, path: Path) -> Iterator[tarfile.TarInfo]:
    try:
        yield from tar
    except tarfile.TarError:
        raise DataError(damaged(path, tar.offset)) from None


def _label(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> int:
    file = tar.extractfile(member)
    assert file is not None
    text = file.read(32)
    try:
        return int(text)
    except ValueError:
        raise DataError(f"{path}: {member.name} holds {text!r}, not a class number") from None


def key_of(path: Path, offset: int) -> str:
    """The key of the sample whose image begins at `offset`: the tar header stands in the block before it."""
    with path.open("rb") as file:
        file.seek(offset - BLOCK)
        header = file.read(BLOCK)
    return split_name(tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name)[0]
