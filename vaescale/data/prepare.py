"""Writing published pictures (folders, tars) as shuffled shards. Nothing is extracted to disk."""

import json
import shutil
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from ..files import atomically, read_json
from . import DataError, decode, names, shards
from .index import PARTS, Index, build, describe_shard, part_of
from .listing import EXAMPLES, Picture, listing
from .order import permutation
from .parallel import alone, in_processes
from .tar import BLOCK, Fields

PLAN = "prepared.json"  # records what the shards of a folder are made from
RENAMED = {"most_megapixels": "max_megapixels"}  # its keys before version 0.2
SAMPLED = 64  # pictures re-encoded to estimate how many fill a shard


@dataclass(frozen=True)
class Settings:
    short_side: int = 0  # pixels; 0: keep the original bytes
    quality: int = 95  # of re-encoded JPEGs
    shard_mib: float = 128.0
    seed: int = 0
    max_megapixels: int = decode.MAX_MEGAPIXELS  # larger pictures are left out
    check: bool = False  # decode every picture, not only its header
    convert: bool = False  # accept TIFF, BMP, GIF and HEIF, too
    val: float = 0.0  # share of the pictures in the validation split; 0: no splits


class Job(NamedTuple):
    """The shards of one folder."""

    out: Path
    parts: list[list[Picture]]  # the pictures of each shard, shuffled
    size: float  # estimated bytes per sample
    settings: Settings
    plan: dict[str, object]  # everything that determines the shards


class Report(NamedTuple):
    """What is reported to the user about one shard."""

    left_out: list[str]  # keys, each with the reason
    dark: list[str]  # keys of 16-bit pictures that use less than a quarter of their range


def prepare(
    source: Path,
    out: Path,
    labels: Path | None,
    classes: Sequence[str],
    settings: Settings,
    processes: int,
    unlabelled: bool = False,
) -> list[Index]:
    """Write `source` as shuffled shards into `out`, or into `out`/train and `out`/val if settings.val is above 0.

    Returns the index of each. After an interruption, the same call continues with the first missing shard.
    labels, classes, unlabelled: see `listing`. Raises DataError.
    """
    pictures, known, notes = listing(source, labels, classes, unlabelled, out, settings.convert)
    print(*notes, sep="\n", flush=True)
    if not settings.val:
        return _make([_job(out, pictures, settings)], known, processes)
    training, validation = split(pictures, settings.val, settings.seed)
    _check_split(source, training, validation, settings, known)
    # One damaged validation picture would stop a training run, so all of them are decoded here.
    checked = replace(settings, check=True)
    return _make([_job(out / "train", training, settings), _job(out / "val", validation, checked)], known, processes)


def split(pictures: Sequence[Picture], val: float, seed: int) -> tuple[list[Picture], list[Picture]]:
    """Returns (training, validation), with a share of about `val` of the pictures in the latter.

    A hash of the seed and the picture's key decides, so a picture keeps its split when others are added or removed.
    Files that differ only in their endings stay together, since they probably show the same. Keys are hashed in NFC,
    because file systems write accented letters in two ways.
    """
    parts: tuple[list[Picture], list[Picture]] = ([], [])
    for one in pictures:
        key = unicodedata.normalize("NFC", one.plain_key)
        parts[xxhash.xxh3_64_intdigest(key.encode(), seed) < val * 2**64].append(one)
    return parts


def _check_split(
    source: Path,
    training: Sequence[Picture],
    validation: Sequence[Picture],
    settings: Settings,
    classes: Sequence[str],
) -> None:
    """Raises DataError if a split is empty. Prints which classes have no training picture."""
    if not training or not validation:
        empty, way = ("validation", "raise") if not validation else ("training", "lower")
        found = names.counted(len(training) + len(validation), "image")
        raise DataError(
            f"--val {settings.val:g} assigns none of the {found} in {source} to {empty}: {way} it, or use another "
            f"--seed"
        )
    present = {one.label for one in training}
    if absent := sorted({one.label for one in validation} - present):
        shown = ", ".join(classes[label] for label in absent[:EXAMPLES])
        print(
            f"{len(absent)} of {len(classes)} classes have images in val only ({shown}"
            f"{', …' if len(absent) > EXAMPLES else ''}): another --seed gives another split",
            flush=True,
        )


def _job(out: Path, pictures: Sequence[Picture], settings: Settings) -> Job:
    shuffled = [pictures[i] for i in permutation(len(pictures), settings.seed)]
    per_shard, size = _shard_size(shuffled, settings)
    parts = [shuffled[first : first + per_shard] for first in range(0, len(shuffled), per_shard)]
    listed = xxhash.xxh3_64()
    for one in shuffled:
        listed.update(f"{one.key} {one.length} {one.label}\n".encode())
    plan = {
        **asdict(settings),
        "per_shard": per_shard,
        "pictures": len(shuffled),
        "listing": listed.hexdigest(),
    }
    return Job(out, parts, size, settings, plan)


def _make(jobs: Sequence[Job], classes: Sequence[str], processes: int) -> list[Index]:
    """Check all jobs, then write the shards of each."""
    with ExitStack() as stack:
        for job in jobs:
            stack.enter_context(alone(job.out))
            _refuse_others(job)
        for job in jobs:
            with atomically(job.out / PLAN) as partial:
                partial.write_text(json.dumps(job.plan, indent=1))
        open_ = [job for job in jobs if not _finished(job)]
        _require_space(open_)
        for job in open_:
            _make_one(job, classes, processes)
    return [Index(job.out) for job in jobs]


def _make_one(job: Job, classes: Sequence[str], processes: int) -> None:
    out = job.out
    shards.write_classes(out, classes)
    calls = [(out, number, part, job.settings) for number, part in enumerate(job.parts)]
    lost = _say(in_processes(_write, calls, processes, f"prepare {out}", "shard"))
    if lost == sum(map(len, job.parts)):
        raise DataError(f"{out} would be empty: none of the {names.counted(lost, 'image')} can be read")
    fields = Fields(max_megapixels=job.settings.max_megapixels)
    build(out, str(out), [shards.name(number) for number in range(len(calls))], fields, classes, processes)


def sibling_classes(out: Path) -> Path | None:
    """Returns the classes.json in the folder `train` next to `out`, if `out` is named as a validation or test split.

    Returns None if there is no such file or it names no classes.
    """
    path = out.absolute().parent / "train" / "classes.json"
    held_out = out.absolute().name in names.SPLITS - {"train", "training"}
    return path if held_out and path.is_file() and shards.read_classes(path) else None


def _say(reports: Iterator[Report]) -> int:
    """Print the reports, and return the number of pictures left out."""
    dark: list[str] = []
    left_out = 0
    for report in reports:
        dark += report.dark
        left_out += len(report.left_out)
        for line in report.left_out:
            print(f"left out: {line}", flush=True)
    if dark:
        print(
            f"{names.counted(len(dark), '16-bit image')} will be dark, using less than a quarter of the range "
            f"({', '.join(dark[:EXAMPLES])}{', …' if len(dark) > EXAMPLES else ''}): multiply the values of 12-bit "
            f"cameras by 16, or add an sBIT chunk to the files",
            flush=True,
        )
    return left_out


def _shard_size(pictures: Sequence[Picture], settings: Settings) -> tuple[int, float]:
    """Returns (samples per shard, bytes per sample with headers). Re-encoded sizes are estimated from SAMPLED ones."""
    if settings.short_side or settings.convert:
        sizes = [len(data) for data, _ in (_bytes_of(one, settings) for one in pictures[:SAMPLED]) if data]
    else:
        sizes = [one.length for one in pictures]
    mean = float(np.mean(sizes or [0])) + 3.5 * BLOCK  # two headers, one block of label, half a block of padding
    return max(1, round(settings.shard_mib * 2**20 / mean)), mean


def _refuse_others(job: Job) -> None:
    """Raises DataError if the folder holds shards of another source or with other settings."""
    out, plan = job.out, job.plan
    if not (out / PLAN).exists() and not _written(out):
        return
    try:
        read = {RENAMED.get(key, key): value for key, value in read_json(out / PLAN).items()}
        before = {**asdict(Settings()), **read}  # older versions had fewer settings
    except (FileNotFoundError, ValueError, TypeError, AttributeError):
        raise DataError(f"{out} already contains shards that were not made by prepare: give an empty --out") from None
    if before != plan:
        other = next(key for key in {**plan, **before} if before.get(key) != plan.get(key))
        raise DataError(
            f"{out} already contains shards of another source or other settings ({other} was {before.get(other)} and "
            f"is now {plan.get(other)}): give an empty --out, or the same source and settings to continue"
        )


def _written(out: Path) -> list[Path]:
    return [path for path in out.glob("*.tar") if not names.is_hidden(path.name)]


def _finished(job: Job) -> bool:
    """Returns whether the index and every shard in it exist, with the indexed sizes."""
    with suppress(DataError, OSError):
        made = Index(job.out).shards
        return len(made) == len(job.parts) and all((job.out / one.name).stat().st_size == one.bytes for one in made)
    return False


def _require_space(jobs: Sequence[Job]) -> None:
    """Raises DataError if the disk is too small. The folders of all jobs are on one disk."""
    if not jobs:
        return
    out = jobs[0].out
    need = sum(sum(map(len, job.parts)) * job.size for job in jobs)
    need -= sum(path.stat().st_size for job in jobs for path in _written(job.out))
    free = shutil.disk_usage(out).free
    if need > free:
        raise DataError(
            f"{out} needs {need / 2**30:.1f} GiB, but its disk has only {free / 2**30:.1f} GiB left: "
            f"free space, or give another --out"
        )


def _write(out: Path, number: int, pictures: Sequence[Picture], settings: Settings) -> Report:
    """Write one shard and its entries for the index, unless the shard exists and is readable."""
    path = out / shards.name(number)
    report = Report([], [])
    fields = Fields(max_megapixels=settings.max_megapixels)
    (out / PARTS).mkdir(exist_ok=True)
    if path.exists() and not describe_shard(str(out), path.name, fields, part_of(out, path.name)):
        return report
    shards.write_shard(path, _samples(pictures, settings, report))
    # Scan the shard now, while it is in the page cache.
    if fault := describe_shard(str(out), path.name, fields, part_of(out, path.name)):
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
    """Returns (the bytes to write, "") or (b"", why the picture is left out)."""
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
    most = settings.max_megapixels
    try:
        if settings.convert:
            data = decode.converted(data, 0 if settings.short_side else settings.quality, most)
        decode.check(data, most, settings.check)
        if dark is not None and decode.is_dark(data, most):
            dark.append(picture.key)
        if settings.short_side:
            data = decode.prepared(data, settings.short_side, settings.quality, most)
    except decode.Damaged as error:
        larger = f", more than the {most} megapixels of --max-megapixels" if str(error) == decode.TOO_LARGE else ""
        return b"", f"{error}{larger}"
    return data, ""
