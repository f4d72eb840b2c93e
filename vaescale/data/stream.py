"""The training stream and the validation pass: batches in an order that is a function of g alone."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from ..interfaces import Batch
from ..ranges import ranged, require
from . import DataError, decode
from .index import Index
from .order import VERSIONS, Order, mix
from .reader import Pictures, Reader
from .store import Store
from .tar import checksum, key_in
from .workers import Loader

SHOWN = 8  # validation images in a picture
IN_A_ROW = 100  # damaged samples drawn one after the other: the data are damaged, not the sample


@dataclass(frozen=True)
class Config:
    root: str = "data/photos"  # holds train/ and val/, each with an index; the shards may be elsewhere
    size: int = ranged(128, least=1, most=decode.LONGEST_SIDE)  # pixels a side
    channels: Literal[1, 3] = 3  # 1: grey
    attributes: list[str] = field(default_factory=list)  # of the index's, those that a model is given, in this order
    # random-resized-crop: smallest part of a picture; 1: the centred square, no crop
    least_area: float = ranged(0.25, above=0, most=1)
    flip: bool = True
    augment: bool = True  # false: training images are made as validation images are, neither cropped nor flipped
    columns: int = ranged(256, least=1, most=2**40)  # places that one batch mixes; fixed for the life of a run
    workers: int = ranged(2, least=0, most=1024)  # decoding processes a rank; 0 decodes in the training process
    prefetch: int = ranged(4, least=1, most=2**20)  # batches a worker decodes ahead
    decoder: decode.Decoder = "pillow"  # turbo gives the same pixels sooner: pip install 'vaescale[turbo]'
    cache: str = "~/.cache/vaescale"  # where shards behind a URL are kept, on the node's own disk
    cache_gib: float = ranged(100.0, least=0, below=2**30)  # never more than this, over all processes of a node
    # megapixels: a larger picture counts as damaged, since a few bytes may claim any size
    most_megapixels: int = ranged(decode.MOST_MEGAPIXELS, least=1, most=2**32)
    damaged_share: float = ranged(0.001, least=0, most=1)  # of the samples seen; more damaged ones stop the run
    damaged_free: int = ranged(10, least=0)  # this many are always forgiven, so that one bad sample in a short run is


def pictures(config: Config) -> Reader:
    """What reads the pictures that the config describes."""
    return Pictures(
        config.size,
        config.channels,
        config.least_area,
        config.flip,
        config.augment,
        config.decoder,
        config.most_megapixels,
    )


def _require(config: Config) -> None:
    """A config may be made in code: a number in another's place would train on something else in silence."""
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
    """One index and the way from a sample number to its bytes."""

    def __init__(self, folder: Path, cache: str = Config.cache, cache_gib: float = Config.cache_gib) -> None:
        self.index = Index(folder)
        self.store = Store(self.index.root, self.index.shards, cache, cache_gib)

    def read(self, sample: int) -> tuple[bytes, int]:
        """(the picture's bytes, its label), the very bytes that were indexed; raises Damaged if they no longer are."""
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
        """(shard, key), for people."""
        place = self.index.locate(sample)
        head = self.store.read(place.shard, place.offset - place.head, place.head)
        return self.index.shards[place.shard].name, key_in(head) or f"sample {sample}, its header is damaged"


class Attributes:
    """Attributes by sample number, standardised: (value − mean) / standard deviation over the training set."""

    def __init__(self, index: Index, training: Index, names: list[str]) -> None:
        self._columns = _columns(index, names)
        self._values = index.attributes
        if names:
            known = training.attributes[:, _columns(training, names)]  # type: ignore[index]
            if empty := np.flatnonzero(np.isnan(known).all(axis=0)).tolist():
                raise DataError(f"data.attributes: no sample of {training.folder} has a value of {names[empty[0]]}")
            self._mean = np.nanmean(known, axis=0, dtype=np.float64)
            self._deviation = np.maximum(np.nanstd(known, axis=0, dtype=np.float64), 1e-6)

    def __call__(self, samples: list[int]) -> Tensor:
        """→ fp32 [B, A]; NaN where a sample has none."""
        if not self._columns:
            return torch.zeros(len(samples), 0)
        assert self._values is not None
        values = self._values[np.ix_(samples, self._columns)]
        return torch.from_numpy(((values - self._mean) / self._deviation).astype(np.float32))


def _columns(index: Index, names: list[str]) -> list[int]:
    for name in names:
        if name not in index.attribute_names:
            known = ", ".join(index.attribute_names) or "none"
            raise DataError(f"data.attributes: the samples of {index.folder} have no {name}; they have {known}")
    return [index.attribute_names.index(name) for name in names]


class TrainSlices(Dataset[Decoded]):
    """`slices[range of g]` → the decoded samples of that range."""

    def __init__(self, config: Config, seed: int, reader: Reader | None = None) -> None:
        """reader: that of pictures, unless another one is given."""
        _require(config)
        self.reader = reader or pictures(config)
        self.reader.require()
        self.config = config
        self.seed = seed
        self.samples = Samples(Path(config.root) / "train", config.cache, config.cache_gib)
        # So far ahead, a quarter of a shard in every column, begins the way of the next shards into the cache. It is
        # a whole number of rows, so the places ahead of a row are a row, too, and visit all columns.
        self._ahead = config.columns * max(1, len(self.samples.index) // len(self.samples.index.shards) // 4)
        self.order = Order(self.samples.index.sizes, config.columns, seed)
        self.attributes = Attributes(self.samples.index, self.samples.index, config.attributes)

    def follow(self, version: int) -> None:
        """Read in this version of the order, as a run does that was begun with it; before a loader is made.

        Raises DataError for a version that is none of VERSIONS.
        """
        if version not in VERSIONS:
            raise DataError(
                f"this run reads its samples in version {version!r} of the order, and the versions known here are "
                f"{', '.join(map(str, VERSIONS))}: go on with the vaescale that began it"
            )
        self.order = Order(self.samples.index.sizes, self.config.columns, self.seed, version)

    def advice(self) -> str:
        """What to change if the cache cannot hold the shards that a batch walks at once; "" if it can."""
        shards, config = self.samples.index.shards, self.config
        walked = min(config.columns, len(shards))
        need = walked * max(shard.bytes for shard in shards) / 2**30
        if not self.samples.store.remote or need <= config.cache_gib:
            return ""
        return (
            f"data.cache_gib={config.cache_gib:g} is less than the {walked} shards that a batch walks at once "
            f"({need:.3g} GiB): each might be fetched many times; raise it, or lower data.columns"
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
        """A damaged sample is replaced by one that only (seed, g) and the try decide, at any world size."""
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
            f"({damage[-1].cause}): `python launch/shards.py verify {self.samples.index.folder}` names the shards"
        )


class ValidationSlices(Dataset[Decoded]):
    """`slices[range of samples]` → those samples of the validation index."""

    def __init__(self, config: Config, reader: Reader | None = None) -> None:
        """reader: that of pictures, unless another one is given."""
        _require(config)
        self.reader = reader or pictures(config)
        self.config = config
        self.samples = Samples(Path(config.root) / "val", config.cache, config.cache_gib)
        training = Index(Path(config.root) / "train") if config.attributes else self.samples.index
        self.indexes = {self.samples.index, training}  # whose files are read
        self.attributes = Attributes(self.samples.index, training, config.attributes)

    def __getitem__(self, numbers: range) -> Decoded:
        if get_worker_info():  # a thread of the training process would be forked with the next workers
            following = self.samples.index.locate(numbers[-1]).shard + 1
            self.samples.store.prefetch(range(following, min(following + 1, len(self.samples.index.shards))))
        read, labels = [], []
        for number in numbers:
            try:
                data, label = self.samples.read(number)
                read.append(self.reader.validation(data))
            except decode.Damaged as error:
                shard, key = self.samples.name(number)
                # A validation number over fewer samples than it says would not compare with anybody's.
                larger = ": raise data.most_megapixels" if str(error) == decode.TOO_LARGE else ""
                raise DataError(f"validation sample {key} in {shard} is damaged: {error}{larger}") from None
            labels.append(label)
        return Decoded(_batch(self.reader.stack(read), labels, self.attributes(list(numbers)), list(numbers)), [])


def train_loader(
    slices: TrainSlices, images: int, batch: int, accumulation: int, rank: int, world: int, pin: bool
) -> Iterator[Decoded]:
    """Endless micro-batches of this rank, `accumulation` of them a step, from position `images` on.

    Step s of a run takes g in [images, images + batch); rank r of W takes the r-th of W equal parts.
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
    """(step, rank, worker, key) of every sample that a run reads in `steps` steps, resumed at step `first`, in
    the order in which each rank gets them. A sample that turns out to be damaged is replaced in the run, not here.
    """
    if batch % (accumulation * world):
        raise DataError(f"a batch of {batch} cannot be split into {accumulation} micro-batches on {world} ranks")
    order = Order(samples.index.sizes, columns, seed, version)
    ranges = [train_ranges(first * batch, batch, accumulation, rank, world) for rank in range(world)]
    for step in range(first, first + steps):
        for rank in range(world):
            for micro in range(accumulation):
                # The loader deals its items out in turn, from a run's first or resumed step on.
                worker = ((step - first) * accumulation + micro) % max(1, workers)
                gs = next(ranges[rank])
                for sample in order(np.arange(gs.start, gs.stop)).tolist():
                    yield step, rank, worker, samples.name(sample)[1]


def validation_loader(slices: ValidationSlices, micro: int, rank: int, world: int, pin: bool) -> Iterable[Decoded]:
    """Each sample exactly once over all ranks; the last batch of a rank is as short as it must be."""
    total = len(slices.samples.index)
    first, last = rank * total // world, (rank + 1) * total // world
    ranges = [range(start, min(start + micro, last)) for start in range(first, last, micro)]
    return _loader(slices, ranges, slices.config, pin)


def fixed_images(slices: ValidationSlices) -> Batch:
    """The same few validation images whenever it is asked: the first of each of as many classes, spread over them; or
    spread over the samples, where there are fewer classes."""
    labels, first = np.unique(slices.samples.index.records["label"], return_index=True)
    if len(labels) < SHOWN:
        first = np.arange(len(slices.samples.index))
    chosen = first[np.linspace(0, len(first) - 1, min(SHOWN, len(first))).astype(int)]
    return chosen_images(slices, chosen.tolist())


def chosen_images(slices: ValidationSlices, numbers: list[int]) -> Batch:
    """These validation images, in this order."""
    batches = [slices[range(number, number + 1)].batch for number in numbers]
    return Batch(*(torch.cat(tensors) for tensors in zip(*batches, strict=True)))


def in_flight(config: Config, batch: int) -> int:
    """Bytes of batches that the workers of a rank have decoded ahead, at most. batch: bytes of one of them."""
    return config.workers * config.prefetch * batch


def _loader(slices: Dataset[Decoded], ranges: Iterable[range], config: Config, pin: bool) -> Iterable[Decoded]:
    return Loader(slices, ranges, config.workers, config.prefetch, pin)


def _batch(x: Tensor, labels: list[int], attributes: Tensor, numbers: list[int]) -> Batch:
    return Batch(x, torch.tensor(labels), attributes, torch.tensor(numbers))
