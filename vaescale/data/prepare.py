"""Pictures as they are published → shuffled shards. Nothing is extracted to disk.

Three layouts are read: a tree of class folders; the ILSVRC2012 training tar, which holds one tar a class; and the flat
ILSVRC2012 validation set, a folder or a tar, with a file of labels. Labels are places in the sorted list of WordNet
ids (or class folders), 0 … 999 for ImageNet.
"""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from . import DataError, decode, shards
from .index import PARTS, Index, build, describe, part_of
from .order import permutation
from .parallel import alone, atomically, each, progress
from .tar import BLOCK, PICTURES, Fields, files

SAMPLED = 64  # pictures re-encoded to know how many fill a shard
SYNSETS = "meta.mat"
MOST_CLASSES = 1_000_000
SPLITS = {"train", "val", "valid", "validation", "test"}


@dataclass(frozen=True)
class Settings:
    short_side: int = 0  # pixels; 0: the original bytes
    quality: int = 95  # of re-encoded JPEGs
    shard_mib: float = 128.0
    seed: int = 0


class Picture(NamedTuple):
    """One picture of the source: `length` bytes of `path` from `offset` on."""

    key: str
    extension: str
    path: str
    offset: int
    length: int
    label: int


def prepare(
    source: Path, out: Path, labels: Path | None, classes: Sequence[str], settings: Settings, processes: int
) -> Index:
    """Write `source` as shuffled shards into `out`. Interrupted, the same call goes on with the first missing shard.

    `classes`: names in the order of their labels; empty: those of the source, sorted.
    """
    pictures, names = listing(source, labels, classes)
    order = permutation(len(pictures), settings.seed)
    pictures = [pictures[i] for i in order]
    per_shard, size = _shard_size(pictures, settings)
    parts = [pictures[first : first + per_shard] for first in range(0, len(pictures), per_shard)]
    jobs = [(out, number, part, settings) for number, part in enumerate(parts)]
    with alone(out):
        _begin(out, pictures, settings, per_shard)
        if not _finished(out, len(parts)):
            _require_space(out, len(pictures) * size - sum(path.stat().st_size for path in out.glob("*.tar")))
            shards.write_classes(out, names)
            for damaged in each(_write, jobs, processes, f"prepare {out}", "shard"):
                for line in damaged:
                    print(f"left out: {line}", flush=True)
            build(out, str(out), [shards.name(number) for number in range(len(parts))], Fields(), names, processes)
    return Index(out)


def listing(source: Path, labels: Path | None, classes: Sequence[str]) -> tuple[list[Picture], list[str]]:
    """(all pictures in the order of their names, class names). Raises DataError for what it cannot read."""
    if not source.exists():
        raise DataError(f"{source} does not exist: give a tree of class folders or an ILSVRC2012 tar")
    named = list(_in_folder(source) if source.is_dir() else _in_tar(source))
    if not named:
        raise DataError(
            f"{source} holds no pictures ({', '.join(PICTURES)}): give a tree of class folders, the ILSVRC2012 "
            f"training tar, or the flat validation set with --labels"
        )
    named.sort(key=lambda one: one[1].key)
    for _, picture in named:
        if not picture.key.isprintable():
            raise DataError(f"{source}: {picture.key!a} is no name that a sample may have: rename it")
    given = _read_labels(labels, [one.key for _, one in named]) if labels else [name for name, _ in named]
    if not all(given):
        raise DataError(f"{source} has no class folders: give the file that holds its labels with --labels")
    numbered = labels is not None and all(name.isdecimal() for name in given)
    known = list(classes) or _class_names(given, numbered)
    # A number in a file of labels is the label itself, not a name.
    place = {str(label) if numbered else name: label for label, name in enumerate(known)}
    if unknown := sorted(set(given) - set(place)):
        raise DataError(f"{source} has the class {unknown[0]}, which is none of the {len(known)} given by --classes")
    pictures = [picture._replace(label=place[name]) for name, (_, picture) in zip(given, named, strict=True)]
    for one, two in pairwise(pictures):
        if one.key == two.key:
            raise DataError(f"{source}: two pictures would have the key {one.key}: rename one of them")
    return pictures, known


def _class_names(given: Sequence[str], numbered: bool) -> list[str]:
    if numbered:
        if (last := max(map(int, given))) >= MOST_CLASSES:
            raise DataError(f"the labels hold the class number {last}, which is more than {MOST_CLASSES} classes")
        return [str(label) for label in range(last + 1)]
    numbers = all(name.isdecimal() for name in given)
    return sorted(set(given), key=lambda name: (int(name), name) if numbers else (0, name))


def _in_folder(source: Path) -> Iterator[tuple[str, Picture]]:
    """(class folder or "", picture) of a tree, however deep. Raises DataError for a class folder without pictures."""
    empty = {path.name for path in source.iterdir() if path.is_dir()}
    if empty and empty <= SPLITS:
        raise DataError(f"{source} holds the splits {', '.join(sorted(empty))}: prepare one at a time")
    for folder, _, names in progress(os.walk(source, True, _unreadable, True), f"list {source}", "folder"):
        inside = Path(folder).relative_to(source).as_posix()
        name = "" if inside == "." else inside.split("/")[0]
        for file in names:
            path = Path(folder, file)
            # A dot begins what macOS and editors leave beside pictures.
            if _is_picture(file) and not file.startswith(".") and path.is_file():
                empty.discard(name)
                yield name, _picture(name, file, path, 0, path.stat().st_size)
    if empty:
        raise DataError(
            f"{source / min(empty)} holds no pictures, and the classes after it would be numbered otherwise: "
            f"fill or remove it"
        )


def _unreadable(error: OSError) -> None:
    raise DataError(f"{error.filename} cannot be read ({error.strerror})")


def _in_tar(source: Path) -> Iterator[tuple[str, Picture]]:
    """(WordNet id or "", picture) of the training tar of tars, or of a flat tar."""
    with source.open("rb") as outer, source.open("rb") as within:
        for member in progress(files(outer, source), f"list {source}", "member"):
            if member.name.endswith(".tar"):
                name = Path(member.name).stem
                for inner in files(within, source, member.offset_data):
                    if _is_picture(inner.name):
                        yield name, _picture(name, inner.name, source, inner.offset_data, inner.size)
            elif _is_picture(member.name):
                yield "", _picture("", member.name, source, member.offset_data, member.size)


def _is_picture(file: str) -> bool:
    return Path(file).suffix[1:].lower() in PICTURES


def _picture(name: str, file: str, path: Path, offset: int, length: int) -> Picture:
    """Keys are class/stem; a dot would end webdataset's key."""
    stem, _, extension = Path(file).name.rpartition(".")
    extension = "jpg" if extension.lower() == "jpeg" else extension.lower()
    key = f"{name}/{stem}".lstrip("/").replace(".", "_")
    return Picture(key, extension, str(path), offset, length, 0)


def _read_labels(path: Path, keys: Sequence[str]) -> list[str]:
    """The class name of each key, from any of the forms in circulation (one line a picture, in the order of names):
    a WordNet id; `file id`; Kaggle's `file,id …` with a heading; the development kit's numbers, which `meta.mat` beside
    them explains. Numbers after a file name (Caffe's val.txt) stay numbers.
    """
    try:
        text = path.read_text(encoding="utf-8-sig").replace(",", " ").replace('"', " ")
        lines = [line.split() for line in text.splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError):
        raise DataError(f"the labels {path} cannot be read as text") from None
    if lines and lines[0][0] == "ImageId":
        del lines[0]
    if all(len(line) >= 2 for line in lines):
        given = {line[0].rpartition("/")[2].partition(".")[0].replace(".", "_"): line[1] for line in lines}
        if len(given) < len(lines):
            raise DataError(f"the labels {path} name a picture twice")
        if missing := [key for key in keys if key not in given]:
            raise DataError(f"the labels {path} do not name {missing[0]}")
        return [given[key] for key in keys]
    if len(lines) != len(keys):
        raise DataError(f"the labels {path} have {len(lines)} lines, but there are {len(keys)} pictures")
    names = [line[0] for line in lines]
    return _synsets(path, names) if all(name.isdecimal() for name in names) else names


def _synsets(path: Path, numbers: Sequence[str]) -> list[str]:
    """The WordNet ids of the development kit's numbers 1 … 1000, which are in no sorted order."""
    try:
        from scipy.io import loadmat

        rows = loadmat(path.parent / SYNSETS, squeeze_me=True)["synsets"]
    except ImportError:
        raise DataError(f"{path.parent / SYNSETS} needs a package: pip install scipy") from None
    except (OSError, ValueError, KeyError):
        raise DataError(f"the labels {path} are numbers: put the development kit's {SYNSETS} beside them") from None
    names = {str(int(row["ILSVRC2012_ID"])): str(row["WNID"]) for row in rows}
    if unknown := set(numbers) - set(names):
        raise DataError(f"{path} holds the number {min(unknown)}, which {SYNSETS} does not explain")
    return [names[number] for number in numbers]


def _shard_size(pictures: Sequence[Picture], settings: Settings) -> tuple[int, float]:
    """(samples a shard, bytes a sample with its headers); re-encoded sizes are estimated from the first pictures."""
    if settings.short_side:
        sizes = [len(data) for data in (_bytes_of(one, settings) for one in pictures[:SAMPLED]) if data]
    else:
        sizes = [one.length for one in pictures]
    mean = float(np.mean(sizes or [0])) + 3.5 * BLOCK  # two headers, the label's block, half a block of padding
    return max(1, round(settings.shard_mib * 2**20 / mean)), mean


def _begin(out: Path, pictures: Sequence[Picture], settings: Settings, per_shard: int) -> None:
    """Write down what is being made; refuse to mix it with something else."""
    listed = xxhash.xxh3_64()
    for one in pictures:
        listed.update(f"{one.key} {one.length} {one.label}\n".encode())
    plan = {**asdict(settings), "per_shard": per_shard, "pictures": len(pictures), "listing": listed.hexdigest()}
    path = out / "prepared.json"
    if path.exists() or any(out.glob("*.tar")):
        try:
            before = dict(json.loads(path.read_text()))
        except (FileNotFoundError, ValueError, TypeError):
            raise DataError(f"{out} already holds shards that were not made by prepare: give an empty --out") from None
        if before != plan:
            other = next((key for key in plan if before.get(key) != plan[key]), "")
            raise DataError(
                f"{out} already holds other shards ({other} was {before.get(other)}, is now {plan[other]}): give an "
                f"empty --out, or the same settings and source to go on"
            )
    with atomically(path) as partial:
        partial.write_text(json.dumps(plan, indent=1))


def _finished(out: Path, parts: int) -> bool:
    """Whether the index and every shard in it are there."""
    with suppress(DataError, OSError):
        made = Index(out).shards
        return len(made) == parts and all((out / shard.name).stat().st_size == shard.bytes for shard in made)
    return False


def _require_space(out: Path, need: float) -> None:
    free = shutil.disk_usage(out).free
    if need > free:
        raise DataError(
            f"{out} needs {need / 2**30:.1f} GiB and its disk has {free / 2**30:.1f} left: "
            f"free some, or give another --out"
        )


def _write(out: Path, number: int, pictures: Sequence[Picture], settings: Settings) -> list[str]:
    """One shard and what the index needs of it, unless it is there; returns the pictures that had to be left out."""
    path = out / shards.name(number)
    damaged: list[str] = []
    (out / PARTS).mkdir(exist_ok=True)
    if path.exists() and not describe(str(out), path.name, Fields(), part_of(out, path.name)):
        return damaged
    shards.write_shard(path, _samples(pictures, settings, damaged))
    # Now, while the file is still in memory.
    if fault := describe(str(out), path.name, Fields(), part_of(out, path.name)):
        raise DataError(fault)
    return damaged


def _samples(pictures: Sequence[Picture], settings: Settings, damaged: list[str]) -> Iterator[shards.Sample]:
    for one in pictures:
        data = _bytes_of(one, settings)
        if data is None:
            damaged.append(f"{one.key} {'cannot be decoded' if one.length else 'is empty'}")
        else:
            yield shards.Sample(one.key, data, one.label, "jpg" if settings.short_side else one.extension)


def _bytes_of(picture: Picture, settings: Settings) -> bytes | None:
    """The bytes to be written; None if there are none, or they would have to be decoded and cannot be."""
    with Path(picture.path).open("rb") as file:
        file.seek(picture.offset)
        data = file.read(picture.length)
    if len(data) < picture.length:
        raise DataError(f"{picture.path} has become shorter since it was listed: run the same command again")
    if not settings.short_side:
        return data or None
    try:
        return decode.prepared(data, settings.short_side, settings.quality)
    except decode.Damaged:
        return None
