"""Writes what is made of a data set as shards, on any number of ranks: the same files on each.

Shard i is made of the samples [i · per_shard, (i + 1) · per_shard) of the source, in batches that begin at its first
one. Rank r makes shards r, r + W, …, and rank 0 the index. Shards that exist are kept, so an interrupted export
continues; a file next to them says what they are made of.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import distributed
from ..data import DataError, shards
from ..data.codes import Header
from ..data.index import PARTS, Index, build, describe_shard, part_of
from ..data.missing import EXPORT as PLAN
from ..data.parallel import alone, progress
from ..data.tar import Fields
from ..data.workers import Loader
from ..files import atomically, read_json
from ..interfaces import Batch
from .parts import Part, Parts

AT_ONCE = 32  # images in a batch, as in an evaluation
SHOWN = 10  # damaged samples that a rank names


class Job(NamedTuple):
    """The shards of one folder."""

    out: Path
    parts: Parts
    views: int  # V, of each sample
    per_shard: int  # samples
    compute: Callable[[Batch], Tensor]  # batch on the device → result on the CPU, [B, …]
    files: Callable[[Tensor], list[bytes]]  # result of one sample, [V, …] → files, each one a sample of the new shards
    extension: str  # of the files
    header: Header | None  # of the new index
    plan: dict[str, Any]  # everything that determines the shards

    @property
    def source(self) -> Index:
        return self.parts.slices.samples.index

    @property
    def fields(self) -> Fields:
        return Fields((self.extension,), attributes=tuple(self.source.attribute_names))

    @property
    def names(self) -> list[str]:
        return [shards.name(number) for number in range(math.ceil(len(self.source) / self.per_shard))]

    def ranges(self, shard: int) -> list[range]:
        """Returns the samples of the source in each batch of a shard."""
        end = min((shard + 1) * self.per_shard, len(self.source))
        step = max(1, AT_ONCE // self.views)
        return [range(first, min(first + step, end)) for first in range(shard * self.per_shard, end, step)]


class Written(NamedTuple):
    samples: int
    damaged: int  # samples of the source that were left out


def write(job: Job, device: torch.device) -> Written:
    """Writes the shards that are missing, then the index. Collective. Raises DataError on all ranks, for example if
    the folder holds other shards, or if too many samples are damaged."""
    with ExitStack() as stack:
        if not on_rank_0(lambda: _begin(job, stack)):
            _write_shards(job, device)
            on_rank_0(lambda: _finish(job))
        samples = on_rank_0(lambda: sum(shard.samples for shard in Index(job.out).shards))
    per_sample = 1 if job.header else job.views
    return Written(samples, len(job.source) - samples // per_sample)


def on_rank_0(work: Callable[[], Any]) -> Any:
    """Does the work on rank 0, and returns its result on all ranks. It is sent as JSON. Collective. Raises the
    DataError of rank 0 on all ranks."""
    result, wrong = None, ""
    if distributed.rank() == 0:
        try:
            result = work()
        except (DataError, OSError) as error:
            wrong = _said(error)
    result, wrong = distributed.tell([result, wrong])
    if wrong:
        raise DataError(wrong)
    return result


def _begin(job: Job, stack: ExitStack) -> bool:
    """Locks the folder until the stack ends, and returns whether all is there already. Raises DataError if it holds
    other shards."""
    stack.enter_context(alone(job.out))
    _refuse_others(job)
    with atomically(job.out / PLAN) as partial:
        partial.write_text(json.dumps(job.plan, indent=1))
    with suppress(DataError, OSError):
        made = Index(job.out)
        sizes = [(job.out / shard.name).stat().st_size for shard in made.shards]
        if made.codes == job.header and sizes == [shard.bytes for shard in made.shards]:
            return True
    (job.out / PARTS).mkdir(exist_ok=True)
    return False


def _refuse_others(job: Job) -> None:
    """Raises DataError if the folder holds shards of another export, or other shards."""
    out = job.out
    if not (out / PLAN).exists() and not any(out.glob("*.tar")):
        return
    try:
        before = dict(read_json(out / PLAN))
    except (FileNotFoundError, ValueError, TypeError):
        raise DataError(f"{out} already contains shards that no export made: give an empty --out") from None
    now = json.loads(json.dumps(job.plan))  # as it would be read from a file
    if other := [key for key in {**now, **before} if before.get(key) != now.get(key)]:
        raise DataError(
            f"{out} already contains shards of another export ({other[0]} was {before.get(other[0])} and is now "
            f"{now.get(other[0])}): give an empty --out, or the same run and options to continue"
        )


def _write_shards(job: Job, device: torch.device) -> None:
    rank, world = distributed.rank(), distributed.world()
    names = job.names
    mine = range(rank, len(names), world)
    # A shard without its entries is scanned again, which also finds one that cannot be read.
    there = {number for number in mine if (job.out / names[number]).exists() and not _fault(job, names[number])}
    ranges = [part for number in mine if number not in there for part in job.ranges(number)]
    data = job.parts.slices.config
    loader: Iterable[Part] = Loader(job.parts, ranges, data.workers, data.prefetch, device.type == "cuda")
    if rank == 0:
        loader = progress(loader, f"export {job.out}", "batch", len(ranges))
    made = _made(loader, job, device)
    damaged, allowed = 0, data.damaged_allowance + data.max_damaged_ratio * len(job.source)
    for turn in range(math.ceil(len(names) / world)):
        number, lost, wrong = turn * world + rank, 0, ""
        try:
            if number in mine:
                if number not in there:
                    _write_shard(job, names[number], islice(made, len(job.ranges(number))))
                lost = sum(map(len, job.ranges(number))) - _held(job, names[number])
        except (DataError, OSError) as error:
            wrong = _said(error)
        # After each shard, so that no rank waits for another for longer than a shard takes.
        found = distributed.gather(torch.tensor([lost, bool(wrong)]))
        damaged += int(found[:, 0].sum())
        if ranks := found[:, 1].nonzero().flatten().tolist():
            raise DataError(wrong or f"rank {ranks[0]} cannot write its shard: see its error")
        if damaged > allowed:
            raise DataError(
                f"{damaged} samples of {job.source.folder} are damaged, more than data.max_damaged_ratio="
                f"{data.max_damaged_ratio:g} allows: replace the shards named above, or raise it"
            )


def _write_shard(job: Job, name: str, made: Iterable[tuple[Part, Tensor]]) -> None:
    """Raises DataError and OSError."""
    shards.write_shard(job.out / name, _samples(job, made))
    if fault := _fault(job, name):
        raise DataError(fault)


def _fault(job: Job, name: str) -> str | None:
    """Describes a shard for the index, unless that is done. Returns why it cannot be read."""
    return describe_shard(str(job.out), name, job.fields, part_of(job.out, name))


def _held(job: Job, name: str) -> int:
    """Returns how many samples of the source a shard holds."""
    with np.load(part_of(job.out, name), allow_pickle=False) as part:
        return len(part["records"]) // (1 if job.header else job.views)


def _made(parts: Iterable[Part], job: Job, device: torch.device) -> Iterator[tuple[Part, Tensor]]:
    """Yields each part and what is computed of it, in a thread: meanwhile the part before it is written."""
    begin = (torch.cuda.set_device, (device,)) if device.type == "cuda" else (None, ())  # each thread has its own
    with ThreadPoolExecutor(1, "export", *begin) as pool:
        before = None
        for part in parts:
            coming = pool.submit(_result, job, part.batch.to(device))
            if before:
                yield before[0], before[1].result()
            before = part, coming
        if before:
            yield before[0], before[1].result()


def _result(job: Job, batch: Batch) -> Tensor:
    return job.compute(batch) if len(batch.x) else batch.x  # nothing, if all samples are damaged


def _samples(job: Job, made: Iterable[tuple[Part, Tensor]]) -> Iterator[shards.Sample]:
    index, keys, shown = job.source, set[str](), 0
    for part, results in made:
        for one in part.damage:
            shown += 1
            if shown <= SHOWN:
                print(f"left out ({one.cause}): {one.key} in {one.shard}", flush=True)
        numbers = part.batch.sample[:: job.views].tolist()
        each = results.split(job.views) if part.keys else ()
        for key, number, result in zip(part.keys, numbers, each, strict=True):
            folder, slash, last = key.rpartition("/")
            key = folder + slash + last.replace(".", "_")  # webdataset's keys end at the first dot
            if key in keys:  # of another shard of the source
                key = f"{key}-{number}"
            keys.add(key)
            label, attributes = int(index.records["label"][number]), _attributes(index, number)
            files = job.files(result)
            for view, data in enumerate(files):
                name = f"{key}-{view}" if len(files) > 1 else key
                yield shards.Sample(name, data, label, job.extension, attributes)
    if shown > SHOWN:
        print(f"left out: {shown - SHOWN} more", flush=True)


def _attributes(index: Index, number: int) -> dict[str, float] | None:
    """Returns the attributes that a sample has, as exact as the index holds them; None without any."""
    if index.attributes is None:
        return None
    values = zip(index.attribute_names, index.attributes[number].tolist(), strict=True)
    return {name: value for name, value in values if not math.isnan(value)}


def _finish(job: Job) -> None:
    shards.write_classes(job.out, job.source.classes)
    build(job.out, str(job.out), job.names, job.fields, job.source.classes, 1, job.header)


def _said(error: DataError | OSError) -> str:
    if isinstance(error, DataError):
        return str(error)
    return f"{error.filename or 'a shard'} cannot be written or read ({error.strerror})"
