"""The training stream and the validation pass: uint8 batches in an order that is a function of g alone."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..interfaces import Batch
from . import DataError, decode
from .index import Index, how_to_index, key_of
from .order import Order, mix

OPEN_SHARDS = 64  # file descriptors a worker keeps
SHOWN = 8  # validation images in a picture
REPLACEMENTS = 8  # samples tried in place of a damaged one; all damaged means the data are, not the sample


@dataclass(frozen=True)
class Config:
    root: str = "data/photos"  # holds train/ and val/, each with an index
    size: int = 128  # pixels a side
    least_area: float = 0.25  # random-resized-crop: smallest part of a picture
    flip: bool = True
    columns: int = 256  # places that one batch mixes; fixed for the life of a run
    workers: int = 2  # decoding processes a rank; 0 decodes in the training process
    prefetch: int = 4  # batches a worker decodes ahead
    damaged_share: float = 0.001  # of the samples seen; more damaged ones stop the run
    damaged_free: int = 10  # this many are always forgiven, so that one bad sample in a short run is


class Damage(NamedTuple):
    g: int
    shard: str
    key: str
    cause: str


class Decoded(NamedTuple):
    batch: Batch
    damage: list[Damage]


class Samples:
    """One index, its files opened on demand, and the way from a sample number to its bytes."""

    def __init__(self, folder: Path) -> None:
        self.index = Index(folder)
        self._files: dict[Path, int] = {}
        self._sizes = {shard.name: shard.bytes for shard in self.index.shards}

    def read(self, sample: int) -> tuple[bytes, int]:
        """(the image's bytes, its label)."""
        path, offset, length, label = self.index.locate(sample)
        data = os.pread(self._open(path), length, offset)
        if len(data) < length:
            raise decode.Damaged("the shard ends inside this sample")
        return data, label

    def name(self, sample: int) -> tuple[str, str]:
        """(shard, key), for people."""
        path, offset, _, _ = self.index.locate(sample)
        return path.name, key_of(path, offset)

    def _open(self, path: Path) -> int:
        if path not in self._files:
            if len(self._files) >= OPEN_SHARDS:
                os.close(self._files.pop(next(iter(self._files))))
            try:
                file = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise DataError(f"the shard {path} of the index cannot be read ({error.strerror})") from None
            self._files[path] = file
            if os.fstat(file).st_size != self._sizes[path.name]:
                raise DataError(f"the shard {path} has changed since it was indexed: {how_to_index(self.index.folder)}")
        return self._files[path]


class TrainSlices(Dataset[Decoded]):
    """`slices[range of g]` → the decoded samples of that range."""

    def __init__(self, config: Config, seed: int) -> None:
        self.config = config
        self.seed = seed
        self.samples = Samples(Path(config.root) / "train")
        self.order = Order(self.samples.index.sizes, config.columns, seed)

    def __getitem__(self, gs: range) -> Decoded:
        samples = self.order(np.arange(gs.start, gs.stop))
        images, labels, damage = [], [], []
        for g, sample in zip(gs, samples.tolist(), strict=True):
            image, label, found = self._one(g, sample)
            images.append(image)
            labels.append(label)
            damage += found
        return Decoded(_batch(images, labels, list(gs)), damage)

    def _one(self, g: int, sample: int) -> tuple[decode.Pixels, int, list[Damage]]:
        """A damaged sample is replaced by one that only (seed, g) and the try decide, at any world size."""
        config = self.config
        damage: list[Damage] = []
        for attempt in range(REPLACEMENTS):
            try:
                data, label = self.samples.read(sample)
                image = decode.train_image(data, config.size, config.least_area, config.flip, self.seed, g)
                return image, label, damage
            except decode.Damaged as error:
                damage.append(Damage(g, *self.samples.name(sample), str(error)))
                sample = int(mix(self.seed, g, attempt)) % len(self.samples.index)
        raise DataError(f"{REPLACEMENTS} samples in a row are damaged, the last one {damage[-1]}")


class ValidationSlices(Dataset[Decoded]):
    """`slices[range of samples]` → those samples of the validation index."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.samples = Samples(Path(config.root) / "val")

    def __getitem__(self, numbers: range) -> Decoded:
        images, labels = [], []
        for number in numbers:
            try:
                data, label = self.samples.read(number)
                images.append(decode.validation_image(data, self.config.size))
            except decode.Damaged as error:
                shard, key = self.samples.name(number)
                # A validation number over fewer samples than it says would not compare with anybody's.
                raise DataError(f"validation sample {key} in {shard} is damaged: {error}") from None
            labels.append(label)
        return Decoded(_batch(images, labels, list(numbers)), [])


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


def validation_loader(slices: ValidationSlices, micro: int, rank: int, world: int, pin: bool) -> Iterable[Decoded]:
    """Each sample exactly once over all ranks; the last batch of a rank is as short as it must be."""
    total = len(slices.samples.index)
    first, last = rank * total // world, (rank + 1) * total // world
    ranges = [range(start, min(start + micro, last)) for start in range(first, last, micro)]
    return _loader(slices, ranges, slices.config, pin)


def fixed_images(slices: ValidationSlices) -> Batch:
    """The same few validation images whenever it is asked: the first of each of as many classes, spread over them."""
    labels, first = np.unique(slices.samples.index.records["label"], return_index=True)
    chosen = first[np.linspace(0, len(labels) - 1, min(SHOWN, len(labels))).astype(int)]
    batches = [slices[range(number, number + 1)].batch for number in chosen.tolist()]
    return Batch(*(torch.cat(tensors) for tensors in zip(*batches, strict=True)))


def _loader(slices: Dataset[Decoded], ranges: Iterable[range], config: Config, pin: bool) -> Iterable[Decoded]:
    return DataLoader(
        slices,
        sampler=ranges,  # any iterable serves, an endless one too
        batch_size=None,
        num_workers=config.workers,
        prefetch_factor=config.prefetch if config.workers else None,
        collate_fn=_as_is,  # type: ignore[arg-type]  # without a batch size it is given one item, not a list
        pin_memory=pin,
        worker_init_fn=_quiet_worker,
    )


def _as_is(item: Decoded) -> Decoded:
    return item


def _quiet_worker(_: int) -> None:
    torch.set_num_threads(1)


def _batch(images: list[decode.Pixels], labels: list[int], numbers: list[int]) -> Batch:
    # [B, H, W, 3] seen as [B, 3, H, W]: the very bytes of channels_last, which convolutions like best.
    x: Tensor = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return Batch(x, torch.tensor(labels), torch.tensor(numbers))
