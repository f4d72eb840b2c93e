"""The demo digits: 1,797 handwritten digits of 8 × 8 pixels and 17 grey levels, which ship with scikit-learn.

They are the test set of Alpaydin and Kaynak 1998, "Optical recognition of handwritten digits" (UCI repository). A
seeded shuffle holds out 297 of them, so the same people wrote the training and the validation digits.
"""

import gzip
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .demo import installed
from .order import permutation
from .shards import Sample, write

FILE = "sklearn/datasets/data/digits.csv.gz"  # one row per digit: 64 grey levels and the class
SIDE = 8
WHITE = 16  # the highest grey level
TRAINING = 1500
PER_SHARD = 250


def write_digits(root: Path) -> dict[str, int]:
    """Writes root/train and root/val, and returns the number of digits in each.

    Raises DataError if scikit-learn is not installed.
    """
    digits = list(read_digits())
    order = permutation(len(digits), 0)
    counts = {}
    for split, chosen in (("train", order[:TRAINING]), ("val", order[TRAINING:])):
        samples = (digits[i] for i in chosen)
        counts[split] = len(write(root / split, samples, PER_SHARD, [str(digit) for digit in range(10)]))
    return counts


def read_digits() -> Iterator[Sample]:
    """Yields all digits in file order, as grey PNGs of 8 × 8 pixels; the label is the digit."""
    with gzip.open(installed(FILE), "rt") as file:
        rows = np.loadtxt(file, dtype=np.int64, delimiter=",")
    for number, row in enumerate(rows):
        yield Sample(f"digit-{number:04d}", _png(row[:-1].reshape(SIDE, SIDE)), int(row[-1]), "png")


def _png(levels: NDArray[np.int64]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.rint(levels * (255 / WHITE)).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()
