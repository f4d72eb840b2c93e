"""Parts of a data set, read in several views of each sample, for instance in several crops."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from ..data.decode import Damaged, Pixels, validation_image
from ..data.order import mix
from ..data.reader import Reader
from ..data.stream import Config, Damage, ValidationSlices
from ..interfaces import Batch

LARGER = 1.1  # side of the square that the ten crops are cut from, in sides of a crop, as of LlamaGen (Sun et al. 2024)

Views = Callable[[bytes, int], list[Any]]  # bytes of a sample, its number → what Reader.stack takes, for each view


class Part(NamedTuple):
    """Some consecutive samples, without damaged ones."""

    batch: Batch  # each sample V times in a row, once for each view
    keys: list[str]
    damage: list[Damage]


class Parts(Dataset[Part]):
    """`parts[range of samples]` → these samples."""

    def __init__(self, slices: ValidationSlices, views: Views) -> None:
        self.slices, self.views = slices, views

    def __getitem__(self, numbers: range) -> Part:
        samples = self.slices.samples
        self.slices.prefetch(numbers)
        read, keys, shown, damage = [], [], [], []
        for number in numbers:
            try:
                data, _ = samples.read(number)
                views = self.views(data, number)
            except Damaged as error:
                damage.append(Damage(number, *samples.name(number), str(error)))
                continue
            keys.append(samples.name(number)[1])
            read.append(views)
            shown.append(number)
        reader, count = self.slices.reader, len(read[0]) if read else 1
        x = reader.stack([view for views in read for view in views]) if read else reader.blank(0)
        sample = torch.tensor(shown, dtype=torch.int64)
        label = torch.from_numpy(samples.index.records["label"][shown].astype(np.int64))
        each = (label, self.slices.attributes(shown), sample)
        return Part(Batch(x, *(one.repeat_interleave(count, 0) for one in each)), keys, damage)


def centre(reader: Reader) -> Views:
    """Each sample as validation sees it."""
    return lambda data, sample: [reader.validation(data)]


def draws(reader: Reader, count: int, seed: int) -> Views:
    """Each sample as training sees it, `count` times: view v of sample n depends only on (seed, n, v)."""

    def views(data: bytes, sample: int) -> list[Any]:
        own = int(mix(seed, sample))
        return [reader.training(data, own, view) for view in range(count)]

    return views


def ten(config: Config) -> Views:
    """Ten crops of each image (Krizhevsky et al. 2012, section 4.1): from the largest centred square, resized to LARGER
    sides of a crop, the centre, the four corners, and these five flipped horizontally."""
    size = config.size
    margin = max(1, int(size * LARGER) - size)
    half = round(margin / 2)

    def views(data: bytes, sample: int) -> list[Pixels]:
        square = validation_image(data, size + margin, config.max_megapixels)
        corners = [(y, x) for y in (0, margin) for x in (0, margin)]
        crops = [square[y : y + size, x : x + size] for y, x in [(half, half), *corners]]
        return [*crops, *(crop[:, ::-1] for crop in crops)]

    return views
