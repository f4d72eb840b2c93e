"""Emoji as a small set of colour images with classes: Noto's, from npm's package emoji-datasource-google.

The images are Google's Noto Emoji (Apache License 2.0), 64 × 64 pixels. Their classes are the categories of Unicode.
Skin tones are left out, and so are pictures that equal an earlier one, such as the flags of islands. Emoji that differ
only by gender or direction are in the same split, because they look nearly the same.
"""

import io
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from ..files import parse_json
from . import DataError
from .decode import Damaged, validation_image
from .order import permutation
from .shards import Sample, write

PACKAGE = "emoji-datasource-google"
LIST, IMAGES = "emoji.json", "img/google/64"  # in the package
MOST_BYTES = 1 << 24  # of one file; the list has 2 MB
SIDE = 64  # pixels
NO_CLASS = "Component"  # skin tones as signs of their own
# Code points without which emoji are alike: man, woman, adult, male, female, to the right, and two that join others.
ALIKE = {"1F468", "1F469", "1F9D1", "2642", "2640", "27A1", "FE0F", "200D"}
HELD_OUT = 0.15  # share of the groups of alike emoji that is for validation
PER_SHARD = 250


def write_emoji(source: Path, root: Path) -> dict[str, int]:
    """Writes root/train and root/val, and returns the number of emoji in each.

    source: the package, unpacked or as a .tgz. Raises DataError if it is another file or lacks something.
    """
    files = _files(source)
    try:
        records = [one for one in parse_json(files[LIST]) if one["category"] != NO_CLASS and one["has_img_google"]]
        records.sort(key=lambda one: one["sort_order"])
        classes = sorted({one["category"] for one in records})
        samples = list(_samples(files, records, classes))
    except KeyError as error:
        raise DataError(f"{source} lacks {error.args[0]}: {_advice()}") from None
    except (ValueError, TypeError) as error:  # Damaged is a ValueError, too
        raise DataError(f"{source} is damaged ({error}): {_advice()}") from None
    groups = sorted({group for group, _ in samples})
    chosen = permutation(len(groups), 0)[: round(HELD_OUT * len(groups))]
    held_out = {groups[i] for i in chosen}
    counts = {}
    for split in ("train", "val"):
        part = [sample for group, sample in samples if (group in held_out) == (split == "val")]
        shuffled = (part[i] for i in permutation(len(part), 0))
        counts[split] = len(write(root / split, shuffled, PER_SHARD, classes))
    return counts


def _samples(
    files: dict[str, bytes], records: list[dict[str, Any]], classes: list[str]
) -> Iterator[tuple[str, Sample]]:
    """Yields (group, sample) of each emoji whose picture equals no earlier one. Raises KeyError, and Damaged."""
    seen = set()
    for record in records:
        name = f"{IMAGES}/{record['image']}"
        try:
            pixels = validation_image(files[name], SIDE)  # on white
        except Damaged as error:
            raise Damaged(f"{name} is {error}") from None
        if pixels.tobytes() not in seen:
            seen.add(pixels.tobytes())
            group = "-".join(point for point in record["unified"].split("-") if point not in ALIKE)
            file = io.BytesIO()
            Image.fromarray(np.ascontiguousarray(pixels)).save(file, "PNG")
            yield group, Sample(record["short_name"], file.getvalue(), classes.index(record["category"]), "png")


def _files(source: Path) -> dict[str, bytes]:
    """Returns the list and the images of the package, by their names in it. Raises DataError."""
    if source.is_dir():
        root = source / "package" if (source / "package").is_dir() else source
        paths = [root / LIST, *(root / IMAGES).glob("*.png")]
        files = {path.relative_to(root).as_posix(): path.read_bytes() for path in paths if path.is_file()}
    elif source.is_file():
        files = _unpacked(source)
    else:
        raise DataError(f"{source} does not exist: {_advice()}")
    if LIST not in files:
        raise DataError(f"{source} lacks {LIST}: {_advice()}")
    return files


def _unpacked(source: Path) -> dict[str, bytes]:
    """Nothing is extracted to disk."""
    files = {}
    try:
        with tarfile.open(source, "r:gz") as tar:
            for member in tar:
                name = member.name.partition("/")[2]  # without the folder "package"
                wanted = name == LIST or str(PurePosixPath(name).parent) == IMAGES
                if wanted and member.isfile() and member.size <= MOST_BYTES and (file := tar.extractfile(member)):
                    files[name] = file.read()
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise DataError(f"{source} is not a complete .tgz ({error}): {_advice()}") from None
    return files


def _advice() -> str:
    return f"run `npm pack {PACKAGE}@16.0.0` and give the .tgz that it writes, or the folder unpacked from it"
