"""The demo photographs: tiles of colour pictures that ship with scikit-image and scikit-learn.

A vertical line splits each photograph: tiles to its left are for training, tiles to its right for validation. A tile
is cut from its own side before it is resized, so neither a pixel nor a resampling filter crosses the line.
"""

import importlib.util
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from . import DataError
from .order import permutation
from .shards import Sample, write

PHOTOGRAPHS = {
    "astronaut": "skimage/data/astronaut.png",
    "chelsea": "skimage/data/chelsea.png",
    "coffee": "skimage/data/coffee.png",
    "hubble": "skimage/data/hubble_deep_field.jpg",
    "ihc": "skimage/data/ihc.png",
    "motorcycle": "skimage/data/motorcycle_left.png",
    "retina": "skimage/data/retina.jpg",
    "rocket": "skimage/data/rocket.jpg",
    "china": "sklearn/datasets/images/china.jpg",
    "flower": "sklearn/datasets/images/flower.jpg",
}
TILE = 160  # pixels a side
WINDOWS = (112, 160, 224, 320)  # pixels a side of the window that is resized to one tile
HELD_OUT = 0.25  # share of each photograph's width that is for validation
MOST_PER_WINDOW = {"train": 80, "val": 8}  # tiles per photograph and window size, so that no photograph dominates
FLAT = 8.0  # standard deviation of the grey values below which a tile is considered empty
PER_SHARD = 250
QUALITY = 95


def write_demo(root: Path) -> dict[str, int]:
    """Writes root/train and root/val, and returns the number of tiles in each.

    Raises DataError if scikit-image or scikit-learn is not installed.
    """
    photographs = {name: Image.open(path).convert("RGB") for name, path in find_photographs().items()}
    counts = {}
    for split in ("train", "val"):
        samples = list(tiles(photographs, split))
        order = permutation(len(samples), 0)
        shards = write(root / split, (samples[i] for i in order), PER_SHARD, list(photographs))
        counts[split] = len(shards)
    return counts


def find_photographs() -> dict[str, Path]:
    return {name: installed(inside) for name, inside in PHOTOGRAPHS.items()}


def installed(inside: str) -> Path:
    """Returns the path of a file inside an installed package; `inside` begins with the package's name.

    Raises DataError if it does not exist.
    """
    package, _, rest = inside.partition("/")
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).parent / rest if spec and spec.origin else None
    if path is None or not path.exists():
        raise DataError(f"{inside} is not installed: run `pip install 'vaescale[demo]'`")
    return path


def tiles(photographs: dict[str, Image.Image], split: str) -> Iterator[Sample]:
    """Yields the JPEG tiles of one split in a fixed order; the label is the photograph's position in the dict."""
    for label, (name, photograph) in enumerate(photographs.items()):
        part = photograph.crop(part_box(photograph.size, split))
        for window in WINDOWS:
            boxes = [box for box in _boxes(part.size, window) if not _flat(part.crop(box))]
            chosen = sorted(permutation(len(boxes), label, window)[: MOST_PER_WINDOW[split]])
            for box in (boxes[i] for i in chosen):
                tile = part.resize((TILE, TILE), Image.Resampling.LANCZOS, box=box)
                file = io.BytesIO()
                tile.save(file, "JPEG", quality=QUALITY)
                yield Sample(f"{name}-{window}-{box[0]:04d}-{box[1]:04d}", file.getvalue(), label)


def part_box(size: tuple[int, int], split: str) -> tuple[int, int, int, int]:
    """Returns the part of a photograph that a split may use: (left, upper, right, lower) in pixels."""
    width, height = size
    border = round(width * (1 - HELD_OUT))
    return (0, 0, border, height) if split == "train" else (border, 0, width, height)


def _boxes(size: tuple[int, int], window: int) -> list[tuple[int, int, int, int]]:
    """Returns windows spaced by a third of their side, so that ten photographs give at least 1,500 training tiles."""
    stride = window // 3
    return [
        (x, y, x + window, y + window)
        for y in range(0, size[1] - window + 1, stride)
        for x in range(0, size[0] - window + 1, stride)
    ]


def _flat(tile: Image.Image) -> bool:
    return float(np.asarray(tile.convert("L"), np.float32).std()) < FLAT
