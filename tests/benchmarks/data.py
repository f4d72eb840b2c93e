"""Measures CPU time from shard to batch against webdataset and plain Pillow.

Command: `python tests/benchmarks/data.py [--rounds N]`. This process starts both sides in turns, each on one thread. A
ratio is the median over rounds of theirs ÷ ours in CPU time, workers included, so that other processes on the machine
do not change it. Loaders run without workers, which measures decoding alone, and with two workers, which pass batches
to the main process as users would: floats with webdataset, bytes with vaescale. Both then read the same number of whole
epochs. The files are in the page cache.
"""

import argparse
import io
import random
import resource
import statistics
import tempfile
from collections.abc import Iterable, Iterator
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import webdataset
from paired import Work, paired
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from vaescale.data import decode, stream
from vaescale.data.demo import find_photographs
from vaescale.data.order import uniforms
from vaescale.data.shards import Sample, write

COUNT = 300  # pictures
PER_SHARD = 100
SIZE = 128
BATCH = 50
MIN_CROP_AREA = 0.25
SHAPES = ((500, 375), (500, 333), (375, 500), (500, 400))  # the usual ones of ImageNet
SHORT_SIDE = 160  # of the prepared shards
QUALITY = 95
DAMAGED = 100  # one picture in so many
WORKERS = 2
DECODERS: tuple[decode.Decoder, ...] = ("pillow", "turbo") if find_spec("simplejpeg") else ("pillow",)
BICUBIC, BILINEAR = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR


class Row(NamedTuple):
    what: str
    theirs: float  # CPU milliseconds an item
    ours: float
    ratio: float  # theirs ÷ ours
    target: str
    psnr: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        pictures = list(imagenet_like())
        write(root / "plain/train", pictures, PER_SHARD, [])
        small = [Sample(key, decode.prepared(jpg, SHORT_SIDE, QUALITY), label) for key, jpg, label, _ in pictures]
        write(root / "prepared/train", small, PER_SHARD, [])
        broken = [
            Sample(key, jpg if i % DAMAGED else jpg[: len(jpg) // 2], n) for i, (key, jpg, n, _) in enumerate(pictures)
        ]
        write(root / "damaged/train", broken, PER_SHARD, [])
        rows = [
            reading(root, rounds),
            *decoding([one.image for one in pictures], rounds),
            *loading(root, rounds),
            *preparation(root, rounds),
            damage(root, rounds),
        ]
    sizes = [statistics.mean(len(sample.image) for sample in part) / 1000 for part in (pictures, small)]
    print(f"{COUNT} JPEGs of {sizes[0]:.0f} kB on average; prepared, short side {SHORT_SIDE}, {sizes[1]:.0f} kB.")
    print(
        f"Pillow {Image.__version__}, torch {torch.__version__}, webdataset {webdataset.__version__}; {rounds} rounds\n"
    )
    print("| CPU time an image | theirs, ms | ours, ms | theirs ÷ ours | target | PSNR, dB |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        print(f"| {row.what} | {row.theirs:.3f} | {row.ours:.3f} | {row.ratio:.2f} | {row.target} | {row.psnr} |")


def imagenet_like() -> Iterator[Sample]:
    """Yields parts of the demo photographs, half of their size or more, in the shapes of ImageNet's images."""
    rng = random.Random(0)
    photographs = [Image.open(path).convert("RGB") for path in find_photographs().values()]
    for i in range(COUNT):
        photograph, shape = photographs[i % len(photographs)], SHAPES[i % len(SHAPES)]
        largest = min(photograph.width / shape[0], photograph.height / shape[1])
        width, height = (side * largest * rng.uniform(0.7, 1) for side in shape)
        left, upper = rng.uniform(0, photograph.width - width), rng.uniform(0, photograph.height - height)
        part = photograph.resize(shape, Image.Resampling.LANCZOS, box=(left, upper, left + width, upper + height))
        file = io.BytesIO()
        part.save(file, "JPEG", quality=96, subsampling=("4:2:0", "4:4:4")[i // 2 % 2])  # about the usual 100 kB
        yield Sample(f"{i:05d}", file.getvalue(), i % len(photographs))


def in_cpu_time(theirs: Work, ours: Work, items: int, rounds: int) -> tuple[float, float, float]:
    """Returns (theirs and ours in CPU milliseconds per item, their ratio)."""
    return paired(theirs, ours, items, rounds, cpu_seconds)


def reading(root: Path, rounds: int) -> Row:
    """Reads the same bytes and labels: webdataset in the order of the tar, vaescale one by one through the index."""
    folder = root / "plain/train"
    samples = stream.Samples(folder)

    def theirs() -> Iterator[tuple[bytes, int]]:
        for sample in webdataset.WebDataset(tars(folder), shardshuffle=False):
            yield sample["jpg"], int(sample["cls"])

    def ours() -> Iterator[tuple[bytes, int]]:
        return map(samples.read, range(COUNT))

    assert list(theirs()) == list(ours())
    times = in_cpu_time(lambda: exhaust(theirs()), lambda: exhaust(ours()), COUNT, rounds)
    return Row("read a sample (webdataset)", *times, "≥ 6", "same bytes")


def decoding(files: list[bytes], rounds: int) -> Iterator[Row]:
    rng = random.Random(0)

    def theirs() -> None:
        for data in files:
            np.asarray(random_resized_crop(opened(data), BICUBIC, rng))

    for decoder in DECODERS:
        ours = partial(crops, files, decoder)
        lowest = min(psnr(crop(data, g, False, decoder), expected_crop(data, g)) for g, data in enumerate(files))
        times = in_cpu_time(theirs, lambda ours=ours: exhaust(ours()), len(files), rounds)
        yield Row(f"decode, random-resized-crop to {SIZE}, {decoder} (Pillow)", *times, "≥ 1.1", f"≥ {lowest:.1f}")
    lowest = min(psnr(decode.validation_image(data, SIZE), centre_square(data)) for data in files)
    times = in_cpu_time(
        lambda: exhaust(map(centre_square, files)),
        lambda: exhaust(decode.validation_image(data, SIZE) for data in files),
        len(files),
        rounds,
    )
    yield Row(f"decode, centre square to {SIZE} (Pillow)", *times, "≥ 1.4", f"≥ {lowest:.1f}")


def loading(root: Path, rounds: int) -> Iterator[Row]:
    """Loads float batches in [0, 1] from shards; theirs is webdataset's pipeline with torchvision's transforms."""
    folder = root / "plain/train"

    def theirs(filter_: Image.Resampling, workers: int = 0) -> None:
        rng = random.Random(0)
        pipeline = (
            webdataset.WebDataset(tars(folder) * epochs(workers), shardshuffle=len(tars(folder)), seed=0)
            .shuffle(1000)
            .decode("pil")
            .to_tuple("jpg", "cls")
            .map_tuple(lambda image: to_tensor(random_resized_crop(image, filter_, rng)), int)
        )
        exhaust(DataLoader(pipeline, batch_size=BATCH, num_workers=workers))

    cases = [(kind, decoder, BICUBIC) for kind in ("plain", "prepared") for decoder in DECODERS]
    for kind, decoder, filter_ in (*cases, ("plain", DECODERS[-1], BILINEAR)):
        times = in_cpu_time(partial(theirs, filter_), partial(load, root / kind, decoder), COUNT, rounds)
        what = f"load batches, {kind} shards, {decoder} (webdataset, Pillow {filter_.name.lower()}, plain shards)"
        yield Row(what, *times, "≥ 2", "")
    for decoder in DECODERS:
        work = partial(theirs, BICUBIC, WORKERS), partial(load, root / "plain", decoder, WORKERS)
        times = in_cpu_time(*work, COUNT * epochs(WORKERS), rounds)
        what = f"the same with {WORKERS} workers, plain shards, {decoder} (webdataset, Pillow bicubic, plain shards)"
        yield Row(what, *times, "≥ 2", "")


def preparation(root: Path, rounds: int) -> Iterator[Row]:
    """Reads and decodes prepared shards; theirs is plain Pillow on the original shards."""
    plain, small = stream.Samples(root / "plain/train"), stream.Samples(root / "prepared/train")
    rng = random.Random(0)

    def theirs() -> None:
        for number in range(COUNT):
            np.asarray(random_resized_crop(opened(plain.read(number)[0]), BICUBIC, rng))

    def ours(decoder: decode.Decoder) -> None:
        exhaust(crops((small.read(number)[0] for number in range(COUNT)), decoder))

    pairs = [(decode.validation_image(small.read(n)[0], SIZE), centre_square(plain.read(n)[0])) for n in range(COUNT)]
    middle = statistics.median(psnr(a, b) for a, b in pairs)
    for decoder in DECODERS:
        times = in_cpu_time(theirs, partial(ours, decoder), COUNT, rounds)
        what = f"read and decode, prepared shards, {decoder} (Pillow, plain shards)"
        yield Row(what, *times, "≥ 3", f"median {middle:.1f}")


def damage(root: Path, rounds: int) -> Row:
    assert load(root / "damaged", "pillow") == COUNT // DAMAGED
    # A few percent are looked for, so this one takes more rounds.
    times = in_cpu_time(
        partial(load, root / "damaged", "pillow"), partial(load, root / "plain", "pillow"), COUNT, 3 * rounds
    )
    return Row("load with 1 % of the samples damaged (sound ones)", *times, "≤ 1.03", "")


def load(root: Path, decoder: decode.Decoder, workers: int = 0) -> int:
    """Reads the training stream as float batches in [0, 1]. Returns the number of damaged samples."""
    config = stream.Config(
        root=str(root), size=SIZE, min_crop_area=MIN_CROP_AREA, columns=64, workers=workers, decoder=decoder
    )
    # As train_loader, but for an end: workers of an endless one decode ahead what would never be delivered.
    ranges = islice(stream.train_ranges(0, BATCH, 1, 0, 1), epochs(workers) * COUNT // BATCH)
    found = 0
    for batch, damage in stream._loader(stream.TrainSlices(config, seed=0), ranges, config, pin=False):
        batch.x.float().div_(255)
        found += len(damage)
    return found


def epochs(workers: int) -> int:
    """Returns the number of epochs to read: more if workers have to be started."""
    return 3 if workers else 1


def cpu_seconds() -> float:
    """Returns the CPU time of this process and of its child processes that have ended."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in usage)


def crops(files: Iterable[bytes], decoder: decode.Decoder) -> Iterator[decode.Pixels]:
    for g, data in enumerate(files):
        yield crop(data, g, True, decoder)


def crop(data: bytes, g: int, flip: bool, decoder: decode.Decoder) -> decode.Pixels:
    return decode.train_image(data, SIZE, MIN_CROP_AREA, flip, 0, g, decoder)


def exhaust(items: Iterable[object]) -> None:
    """Keeps nothing, because fresh memory would cost more than what is measured."""
    for _ in items:
        pass


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def random_resized_crop(image: Image.Image, filter_: Image.Resampling, rng: random.Random) -> Image.Image:
    """Does what torchvision's RandomResizedCrop and RandomHorizontalFlip do to a Pillow image."""
    area = image.width * image.height
    box = (0, 0, *image.size)
    for _ in range(10):
        target, ratio = area * rng.uniform(MIN_CROP_AREA, 1), (4 / 3) ** rng.uniform(-1, 1)
        width, height = round((target * ratio) ** 0.5), round((target / ratio) ** 0.5)
        if width <= image.width and height <= image.height:
            left, upper = rng.randint(0, image.width - width), rng.randint(0, image.height - height)
            box = (left, upper, left + width, upper + height)
            break
    image = image.crop(box).resize((SIZE, SIZE), filter_)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image


def to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)


def centre_square(data: bytes) -> np.ndarray:
    """Decodes the full image, then resamples as `validation_image` promises."""
    image = opened(data)
    (width, height), side = image.size, min(image.size)
    x, y = (width - side) / 2, (height - side) / 2
    return np.asarray(image.resize((SIZE, SIZE), BICUBIC, box=(x, y, x + side, y + side)))


def expected_crop(data: bytes, g: int) -> np.ndarray:
    """Decodes the full image, then takes the crop that `train_image` draws for g, moved to its decoding grid."""
    image = Image.open(io.BytesIO(data))
    box = decode._random_box(image.size, MIN_CROP_AREA, uniforms(0, g, np.arange(decode.DRAWS)))
    scale = decode._reduction(image, min(box[2] - box[0], box[3] - box[1]), SIZE)
    part = image.convert("RGB").crop(tuple(x // scale * scale for x in box))
    return np.asarray(part.resize((SIZE, SIZE), BICUBIC))


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(-10 * np.log10(max((((a.astype(float) - b) / 255) ** 2).mean(), 1e-12)))


def tars(folder: Path) -> list[str]:
    return [str(path) for path in sorted(folder.glob("*.tar"))]


if __name__ == "__main__":
    main()
