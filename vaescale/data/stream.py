"""The training stream and the validation pass: batches of samples, each determined by its number g alone."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info
from tqdm import tqdm

from .. import distributed
from ..interfaces import Batch
from ..ranges import ranged, require
from . import DataError, decode
from .codes import Codes
from .index import Index
from .order import VERSIONS, Order, mix
from .reader import Pictures, Reader
from .store import Store
from .tar import checksum, key_in
from .workers import Loader

SHOWN = 8  # validation images in a logged image
IN_A_ROW = 100  # damaged samples in a row after which the data set counts as damaged


@dataclass(frozen=True)
class Config:
    root: str = "data/photos"  # contains train/ and val/, each with an index; the shards may be elsewhere
    size: int = ranged(128, least=1, most=decode.LONGEST_SIDE)  # pixels a side
    channels: Literal[1, 3] = 3  # 1: grey
    attributes: list[str] = field(default_factory=list)  # attributes of the index that the model gets, in this order
    # random-resized-crop: smallest share of a picture's area; 1: the centred square, no random crop
    min_crop_area: float = ranged(0.25, above=0, most=1)
    flip: bool = True
    augment: bool = True  # false: training images are made like validation images, without random crop or flip
    columns: int = ranged(256, least=1, most=2**40)  # columns of the order (see order.py); fixed for a whole run
    workers: int = ranged(2, least=0, most=1024)  # decoding processes per rank; 0 decodes in the training process
    prefetch: int = ranged(4, least=1, most=2**20)  # batches that each worker decodes ahead
    decoder: decode.Decoder = "pillow"  # turbo gives the same pixels faster: pip install 'vaescale[turbo]'
    cache: str = "~/.cache/vaescale"  # local folder for shards fetched from a URL
    cache_gib: float = ranged(100.0, least=0, below=2**30)  # limit of the cache, for all processes of a node
    # Larger pictures count as damaged, since a few bytes may claim any size.
    max_megapixels: int = ranged(decode.MAX_MEGAPIXELS, least=1, most=2**32)
    max_damaged_ratio: float = ranged(0.001, least=0, most=1)  # of the samples seen; a larger share stops the run
    damaged_allowance: int = ranged(10, least=0)  # this many are always allowed, so that one does not stop a short run


def pictures(config: Config) -> Reader:
    """Returns the reader for the pictures that the config describes."""
    return Pictures(
        config.size,
        config.channels,
        config.min_crop_area,
        config.flip,
        config.augment,
        config.decoder,
        config.max_megapixels,
    )


def reader_of(index: Index, config: Config) -> Reader:
    """Returns the reader for the samples of an index: codes, if it says so, else pictures."""
    return Codes(index.codes) if index.codes else pictures(config)


def _require(config: Config) -> None:
    """Checks a config, which may be made in code: a swapped number would silently train on something else."""
    try:
        require(config, "data")
    except ValueError as error:
        raise DataError(str(error)) from None


class Damage(NamedTuple):
    g: int
    shard: str
    key: str
    cause: str


class Decoded(NamedTuple):
    batch: Batch
    damage: list[Damage]


class Samples:
    """An index and its store: finds the bytes of a sample by its number."""

    def __init__(self, folder: Path, cache: str = Config.cache, cache_gib: float = Config.cache_gib) -> None:
        self.index = Index(folder)
        self.store = Store(self.index.root, self.index.shards, cache, cache_gib)

    def read(self, sample: int) -> tuple[bytes, int]:
        """Returns (the sample's bytes, its label). Raises Damaged if the bytes are not those that were indexed."""
        shard, offset, length, _, label, check = self.index.locate(sample)
        data = self.store.read(shard, offset, length)
        if checksum(data) == check:
            return data, label
        if self.store.remote:
            self.store.refetch(shard)
            data = self.store.read(shard, offset, length)
            if checksum(data) == check:
                return data, label
        raise decode.Damaged("changed since it was indexed")

    def name(self, sample: int) -> tuple[str, str]:
        """Returns (shard, key), for messages."""
        place = self.index.locate(sample)
        head = self.store.read(place.shard, place.offset - place.head, place.head)
        return self.index.shards[place.shard].name, key_in(head) or f"sample {sample} (its header is damaged)"


class Attributes:
    """Standardised attributes by sample number: (value − mean) / standard deviation, both of the training set."""

    def __init__(self, index: Index, training: Index, names: list[str]) -> None:
        self._columns = _columns(index, names)
        self._values = index.attributes
        if names:
            known = training.attributes[:, _columns(training, names)]  # type: ignore[index]
            if empty := np.flatnonzero(np.isnan(known).all(axis=0)).tolist():
                raise DataError(f"data.attributes: no sample in {training.folder} has a value for {names[empty[0]]}")
            self._mean = np.nanmean(known, axis=0, dtype=np.float64)
            self._deviation = np.maximum(np.nanstd(known, axis=0, dtype=np.float64), 1e-6)

    def __call__(self, samples: list[int]) -> Tensor:
        """Returns fp32 [B, A], NaN where a sample has no value."""
        if not self._columns:
            return torch.zeros(len(samples), 0)
        assert self._values is not None
        values = self._values[np.ix_(samples, self._columns)]
        return torch.from_numpy(((values - self._mean) / self._deviation).astype(np.float32))


def _columns(index: Index, names: list[str]) -> list[int]:
    for name in names:
        if name not in index.attribute_names:
            known = ", ".join(index.attribute_names) or "none"
            raise DataError(f"data.attributes: the samples in {index.folder} have no {name} (available: {known})")
    return [index.attribute_names.index(name) for name in names]


class TrainSlices(Dataset[Decoded]):
    """`slices[range of g]` → the decoded samples of that range."""

    def __init__(self, config: Config, seed: int, reader: Reader | None = None) -> None:
        """reader: None: the one for pictures, or for codes if the index holds codes."""
        _require(config)
        self.config = config
        self.seed = seed
        self.samples = Samples(Path(config.root) / "train", config.cache, config.cache_gib)
        self.reader = reader or reader_of(self.samples.index, config)
        self.reader.require()
        # Shards are prefetched this many samples ahead: a quarter of a shard in every column. It is a whole number of
        # rows, so the samples ahead of a row form a row, too, and cover all columns.
        self._ahead = config.columns * max(1, len(self.samples.index) // len(self.samples.index.shards) // 4)
        self.order = Order(self.samples.index.sizes, config.columns, seed)
        self.attributes = Attributes(self.samples.index, self.samples.index, config.attributes)

    def follow(self, version: int) -> None:
        """Uses this version of the order, the one that the run began with. Call it before a loader is made.

        Raises DataError for a version that is not in VERSIONS.
        """
        if version not in VERSIONS:
            raise DataError(
                f"this run uses version {version!r} of the sample order, but this version of vaescale knows only "
                f"{', '.join(map(str, VERSIONS))}: continue with the version of vaescale that started the run"
            )
        self.order = Order(self.samples.index.sizes, self.config.columns, self.seed, version)

    def advice(self) -> str:
        """Returns what to change if the cache cannot hold the shards that a batch reads at once; "" if it can."""
        shards, config = self.samples.index.shards, self.config
        walked = min(config.columns, len(shards))
        need = walked * max(shard.bytes for shard in shards) / 2**30
        if not self.samples.store.remote or need <= config.cache_gib:
            return ""
        return (
            f"data.cache_gib={config.cache_gib:g} is less than the {walked} shards that a batch reads from "
            f"({need:.3g} GiB), so each may be fetched many times: raise it, or lower data.columns"
        )

    def __getitem__(self, gs: range) -> Decoded:
        places = np.arange(gs.start, gs.stop)
        samples = self.order(places)
        if self.samples.store.remote:
            self.samples.store.prefetch(self.order.shards(places + self._ahead).tolist())
        read, labels, shown, damage = [], [], [], []
        for g, sample in zip(gs, samples.tolist(), strict=True):
            one, label, sample, found = self._one(g, sample)
            read.append(one)
            labels.append(label)
            shown.append(sample)
            damage += found
        return Decoded(_batch(self.reader.stack(read), labels, self.attributes(shown), list(gs)), damage)

    def _one(self, g: int, sample: int) -> tuple[Any, int, int, list[Damage]]:
        """Returns (sample, label, sample number, damage).

        A damaged sample is replaced by one drawn from (seed, g, attempt), which is the same at any world size.
        """
        damage: list[Damage] = []
        for attempt in range(IN_A_ROW):
            try:
                data, label = self.samples.read(sample)
                return self.reader.training(data, self.seed, g), label, sample, damage
            except decode.Damaged as error:
                damage.append(Damage(g, *self.samples.name(sample), str(error)))
                sample = int(mix(self.seed, g, attempt)) % len(self.samples.index)
        raise DataError(
            f"{IN_A_ROW} samples in a row are damaged, the last one {damage[-1].key} in {damage[-1].shard} "
            f"({damage[-1].cause}): `python launch/shards.py verify {self.samples.index.folder}` lists the shards"
        )


class ValidationSlices(Dataset[Decoded]):
    """`slices[range of samples]` → those samples of the validation index."""

    split = "val"

    def __init__(self, config: Config, reader: Reader | None = None) -> None:
        """reader: None: the one for pictures, or for codes if the index holds codes."""
        _require(config)
        self.config = config
        self.samples = Samples(Path(config.root) / self.split, config.cache, config.cache_gib)
        self.reader = reader or reader_of(self.samples.index, config)
        training = Index(Path(config.root) / "train") if config.attributes else self.samples.index
        self.indexes = {self.samples.index, training}  # whose files are read
        self.attributes = Attributes(self.samples.index, training, config.attributes)

    def prefetch(self, numbers: range) -> None:
        """Begins to fetch the shard after that of the last of these samples."""
        if get_worker_info():  # in the training process the prefetching thread could be running during the next fork
            following = self.samples.index.locate(numbers[-1]).shard + 1
            self.samples.store.prefetch(range(following, min(following + 1, len(self.samples.index.shards))))

    def __getitem__(self, numbers: range) -> Decoded:
        self.prefetch(numbers)
        read, labels, shown, damage = [], [], [], []
        for number in numbers:
            try:
                data, label = self.samples.read(number)
                read.append(self.reader.validation(data))
            except decode.Damaged as error:
                damage.append(self._damaged(number, str(error)))
                continue
            labels.append(label)
            shown.append(number)
        x = self.reader.stack(read) if read else self.reader.blank(0)
        return Decoded(_batch(x, labels, self.attributes(shown), shown), damage)

    def _damaged(self, number: int, cause: str) -> Damage:
        """Raises DataError: a result over fewer samples than stated would not be comparable with others."""
        shard, key = self.samples.name(number)
        larger = ": raise data.max_megapixels" if cause == decode.TOO_LARGE else ""
        raise DataError(f"validation sample {key} in {shard} is damaged: {cause}{larger}") from None


class TrainingOnce(ValidationSlices):
    """`slices[range of samples]` → those samples of the training index, each as validation would see it. Damaged ones
    are left out."""

    split = "train"

    def _damaged(self, number: int, cause: str) -> Damage:
        return Damage(number, *self.samples.name(number), cause)


SPLITS = {TrainingOnce.split: TrainingOnce, ValidationSlices.split: ValidationSlices}


def train_loader(
    slices: TrainSlices, images: int, batch: int, accumulation: int, rank: int, world: int, pin: bool
) -> Iterator[Decoded]:
    """Returns an endless iterator over the micro-batches of this rank, `accumulation` per step.

    The first step takes g in [images, images + batch), the next one the following `batch` numbers. Rank r of W takes
    the r-th of W equal parts.
    """
    config = slices.config
    return iter(_loader(slices, train_ranges(images, batch, accumulation, rank, world), config, pin))


def train_ranges(images: int, batch: int, accumulation: int, rank: int, world: int) -> Iterator[range]:
    micro = batch // (accumulation * world)
    while True:
        for k in range(rank * accumulation, (rank + 1) * accumulation):
            yield range(images + k * micro, images + (k + 1) * micro)
        images += batch


def schedule(
    samples: Samples,
    seed: int,
    columns: int,
    batch: int,
    accumulation: int,
    world: int,
    workers: int,
    first: int,
    steps: int,
    version: int = VERSIONS[-1],
) -> Iterator[tuple[int, int, int, str]]:
    """Yields (step, rank, worker, key) of every sample that a run, resumed at step `first`, reads in `steps` steps.

    The samples come in the order in which each rank gets them. The run replaces damaged samples; this does not. Raises
    DataError if the batch cannot be split evenly.
    """
    if batch % (accumulation * world):
        raise DataError(f"a batch of {batch} cannot be split into {accumulation} micro-batches on {world} ranks")
    order = Order(samples.index.sizes, columns, seed, version)
    ranges = [train_ranges(first * batch, batch, accumulation, rank, world) for rank in range(world)]
    for step in range(first, first + steps):
        for rank in range(world):
            for micro in range(accumulation):
                # The loader assigns its items to the workers in turn, beginning at the first step after a start.
                worker = ((step - first) * accumulation + micro) % max(1, workers)
                gs = next(ranges[rank])
                for sample in order(np.arange(gs.start, gs.stop)).tolist():
                    yield step, rank, worker, samples.name(sample)[1]


def validation_loader(
    slices: TrainSlices | ValidationSlices, micro: int, rank: int, world: int, pin: bool, total: int | None = None
) -> Iterable[Decoded]:
    """Returns batches with each sample exactly once over all ranks, or only the first `total` samples. The last batch
    of a rank may be shorter."""
    total = len(slices.samples.index) if total is None else total
    first, last = rank * total // world, (rank + 1) * total // world
    ranges = [range(start, min(start + micro, last)) for start in range(first, last, micro)]
    return _loader(slices, ranges, slices.config, pin)


def once(
    slices: TrainSlices | ValidationSlices,
    micro: int,
    device: torch.device,
    title: str,
    watched: bool,
    leave: bool = True,
    total: int | None = None,
) -> Iterator[Decoded | None]:
    """Yields this rank's batches on the device, with each sample exactly once over all ranks. Yields None where other
    ranks have one more batch, so that all ranks take equally many turns. micro: samples at a time; watched: whether to
    show a progress bar of this title; leave: whether the bar stays; total: only the first so many samples, for training
    those of the endless sequence."""
    rank, world = distributed.rank(), distributed.world()
    total = len(slices.samples.index) if total is None else total
    batches = validation_loader(slices, micro, rank, world, device.type == "cuda", total)
    turns = range(-(-total // (micro * world)))  # of the rank with the most samples
    pairs = zip_longest(turns, batches)
    for _, decoded in tqdm(pairs, title, len(turns), unit="batch", leave=leave, disable=not watched):
        yield decoded and decoded._replace(batch=decoded.batch.to(device))


def blank(slices: TrainSlices | ValidationSlices) -> Batch:
    """Returns a batch of one empty sample without a label, for the shapes of results where a rank has no samples."""
    none = torch.full((1,), -1)
    return Batch(slices.reader.blank(1), none, slices.attributes([0]), none)


def fixed_images(slices: ValidationSlices) -> Batch:
    """Returns up to SHOWN validation images, always the same ones.

    They are the first images of SHOWN classes spread over all classes. With fewer classes than SHOWN they are spread
    over the samples.
    """
    labels, first = np.unique(slices.samples.index.records["label"], return_index=True)
    if len(labels) < SHOWN:
        first = np.arange(len(slices.samples.index))
    chosen = first[np.linspace(0, len(first) - 1, min(SHOWN, len(first))).astype(int)]
    return chosen_images(slices, chosen.tolist())


def chosen_images(slices: ValidationSlices, numbers: list[int]) -> Batch:
    """Returns the validation images of these numbers, in this order."""
    batches = [slices[range(number, number + 1)].batch for number in numbers]
    return Batch(*(torch.cat(tensors) for tensors in zip(*batches, strict=True)))


def in_flight(config: Config, batch: int) -> int:
    """Returns the most bytes that the workers of a rank decode ahead. batch: bytes of one micro-batch."""
    return config.workers * config.prefetch * batch


def _loader(slices: Dataset[Decoded], ranges: Iterable[range], config: Config, pin: bool) -> Iterable[Decoded]:
    return Loader(slices, ranges, config.workers, config.prefetch, pin)


def _batch(x: Tensor, labels: list[int], attributes: Tensor, numbers: list[int]) -> Batch:
    return Batch(x, torch.tensor(labels), attributes, torch.tensor(numbers))
