"""Writes pictures as they are published as shuffled shards. Nothing is extracted to disk."""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from ..files import atomically, read_json
from . import DataError, decode, names, shards
from .index import PARTS, Index, build, describe, part_of
from .listing import EXAMPLES, SPLITS, Picture, listing
from .order import permutation
from .parallel import alone, each
from .tar import BLOCK, Fields

SAMPLED = 64  # pictures re-encoded to know how many fill a shard


@dataclass(frozen=True)
class Settings:
    short_side: int = 0  # pixels; 0: the original bytes
    quality: int = 95  # of re-encoded JPEGs
    shard_mib: float = 128.0
    seed: int = 0
    most_megapixels: int = decode.MOST_MEGAPIXELS  # larger pictures are left out
    check: bool = False  # decode every picture, not only its header


class Report(NamedTuple):
    """What the user is told of one shard."""

    left_out: list[str]  # keys, each with the reason
    dark: list[str]  # keys of 16-bit pictures that use only a small part of their range


def prepare(
    source: Path,
    out: Path,
    labels: Path | None,
    classes: Sequence[str],
    settings: Settings,
    processes: int,
    unlabelled: bool = False,
) -> Index:
    """Write `source` as shuffled shards into `out`. Interrupted, the same call goes on with the first missing shard.

    `labels`, `classes` and `unlabelled` are those of `listing`.
    """
    pictures, known, notes = listing(source, labels, classes, unlabelled, out)
    print(*notes, sep="\n", flush=True)
    order = permutation(len(pictures), settings.seed)
    pictures = [pictures[i] for i in order]
    per_shard, size = _shard_size(pictures, settings)
    parts = [pictures[first : first + per_shard] for first in range(0, len(pictures), per_shard)]
    jobs = [(out, number, part, settings) for number, part in enumerate(parts)]
    with alone(out):
        _begin(out, pictures, settings, per_shard)
        if not _finished(out, len(parts)):
            _require_space(out, len(pictures) * size - sum(path.stat().st_size for path in _written(out)))
            shards.write_classes(out, known)
            _say(each(_write, jobs, processes, f"prepare {out}", "shard"))
            fields = Fields(most_megapixels=settings.most_megapixels)
            build(out, str(out), [shards.name(number) for number in range(len(parts))], fields, known, processes)
    return Index(out)


def sibling_classes(out: Path) -> Path | None:
    """The classes.json of the training shards that stand next to the validation or test shards `out`."""
    path = out.absolute().parent / "train" / "classes.json"
    held_out = out.absolute().name in SPLITS - {"train", "training"}
    return path if held_out and path.is_file() and shards.read_classes(path) else None


def _say(reports: Iterator[Report]) -> None:
    dark: list[str] = []
    for report in reports:
        dark += report.dark
        for line in report.left_out:
            print(f"left out: {line}", flush=True)
    if dark:
        print(
            f"{names.counted(len(dark), 'picture')} of 16 bits use less than a quarter of their range and will be dark "
            f"({', '.join(dark[:EXAMPLES])}{', …' if len(dark) > EXAMPLES else ''}): multiply the values of 12-bit "
            f"cameras by 16, or give the files an sBIT chunk",
            flush=True,
        )


def _shard_size(pictures: Sequence[Picture], settings: Settings) -> tuple[int, float]:
    """(samples a shard, bytes a sample with its headers); re-encoded sizes are estimated from the first pictures."""
    if settings.short_side:
        sizes = [len(data) for data, _ in (_bytes_of(one, settings) for one in pictures[:SAMPLED]) if data]
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
    if path.exists() or _written(out):
        try:
            before = {**asdict(Settings()), **read_json(path)}  # older versions had fewer settings
        except (FileNotFoundError, ValueError, TypeError):
            raise DataError(f"{out} already holds shards that were not made by prepare: give an empty --out") from None
        if before != plan:
            other = next(key for key in {**plan, **before} if before.get(key) != plan.get(key))
            raise DataError(
                f"{out} already holds other shards ({other} was {before.get(other)}, is now {plan.get(other)}): give "
                f"an empty --out, or the same settings and source to go on"
            )
    with atomically(path) as partial:
        partial.write_text(json.dumps(plan, indent=1))


def _written(out: Path) -> list[Path]:
    return [path for path in out.glob("*.tar") if not names.is_hidden(path.name)]


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


def _write(out: Path, number: int, pictures: Sequence[Picture], settings: Settings) -> Report:
    """One shard and what the index needs of it, unless it is there."""
    path = out / shards.name(number)
    report = Report([], [])
    fields = Fields(most_megapixels=settings.most_megapixels)
    (out / PARTS).mkdir(exist_ok=True)
    if path.exists() and not describe(str(out), path.name, fields, part_of(out, path.name)):
        return report
    shards.write_shard(path, _samples(pictures, settings, report))
    # Now, while the file is still in memory.
    if fault := describe(str(out), path.name, fields, part_of(out, path.name)):
        raise DataError(fault)
    return report


def _samples(pictures: Sequence[Picture], settings: Settings, report: Report) -> Iterator[shards.Sample]:
    for one in pictures:
        data, cause = _bytes_of(one, settings, report.dark)
        if cause:
            report.left_out.append(f"{one.key} ({cause})")
        else:
            yield shards.Sample(one.key, data, one.label, "jpg" if settings.short_side else one.extension)


def _bytes_of(picture: Picture, settings: Settings, dark: list[str] | None = None) -> tuple[bytes, str]:
    """(the bytes to be written, why the picture is left out or "")."""
    try:
        with Path(picture.path).open("rb") as file:
            file.seek(picture.offset)
            data = file.read(picture.length)
    except PermissionError:
        return b"", "permission denied"
    if len(data) < picture.length:
        raise DataError(f"{picture.path} has become shorter since it was listed: run the same command again")
    if not data:
        return b"", "empty"
    most = settings.most_megapixels
    try:
        decode.check(data, most, settings.check)
        if dark is not None and decode.is_dark(data, most):
            dark.append(picture.key)
        if settings.short_side:
            data = decode.prepared(data, settings.short_side, settings.quality, most)
    except decode.Damaged as error:
        larger = f", more than the {most} megapixels of --most-megapixels" if str(error) == decode.TOO_LARGE else ""
        return b"", f"{error}{larger}"
    return data, ""
