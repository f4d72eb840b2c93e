"""Codes of images, as a tokenizer wrote them into shards: `key.codes.npy`, an array [L, h, w] of L codebooks, or
[V, L, h, w] if each image was encoded in V views, for instance in several crops.

How they were made is in the header of the index, so a model can refuse the codes of another tokenizer.
"""

import io
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.lib import format as npy
from numpy.typing import NDArray
from torch import Tensor

from .decode import Damaged
from .order import mix

EXTENSION = "codes.npy"
MOST_SIZE = 2**31  # codes of a codebook
MOST_CODES = 2**24  # codes of one sample, over all views
MOST_VIEWS = 1024
CROPS = re.compile(r"center|ten|random:([1-9][0-9]{0,3})")
HASH = re.compile("[0-9a-f]{16}")


class Header(NamedTuple):
    """How the codes of an index were made."""

    tokenizer: str  # hash of the tokenizer (nn.frozen.latents_hash)
    sizes: list[int]  # K of each codebook, coarse to fine
    shape: list[int]  # L, h, w
    crops: str  # what `views_of` accepts
    views: int  # V
    source: str  # fingerprint of the index of the images

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype("<u2" if max(self.sizes) <= 2**16 else "<i4")


def views_of(crops: str) -> int:
    """Returns the number of views that a rule for crops gives: 1 for "center", 10 for "ten", V for "random:V". Raises
    ValueError for other rules."""
    found = CROPS.fullmatch(crops)
    views = {"center": 1, "ten": 10}.get(crops) or (int(found[1]) if found else 0)
    if not 1 <= views <= MOST_VIEWS:
        raise ValueError(f"crops must be center, ten, or random:V with V from 1 to {MOST_VIEWS}, not {crops!r:.40}")
    return views


def checked(given: Any) -> Header:
    """Returns the header in an index. Raises ValueError with a phrase, LookupError or TypeError."""
    header = Header(*(given[name] for name in Header._fields))
    for name in ("tokenizer", "source"):
        _require(is_hash(getattr(header, name)), f"codes.{name} is not 16 hexadecimal digits")
    _require(_are_counts(header.sizes, MOST_SIZE), f"codes.sizes are not counts up to {MOST_SIZE}")
    _require(_are_counts(header.shape, MOST_CODES) and len(header.shape) == 3, "codes.shape is not [L, h, w]")
    _require(header.shape[0] == len(header.sizes), "codes.sizes and codes.shape have other numbers of codebooks")
    _require(
        isinstance(header.crops, str) and type(header.views) is int and views_of(header.crops) == header.views,
        "codes.views are not those of codes.crops",
    )
    _require(math.prod(header.shape) * header.views <= MOST_CODES, f"a sample has more than {MOST_CODES} codes")
    return header


def is_hash(text: object) -> bool:
    return isinstance(text, str) and HASH.fullmatch(text) is not None


def _are_counts(values: object, most: int) -> bool:
    return isinstance(values, list) and values != [] and all(type(one) is int and 1 <= one <= most for one in values)


def _require(sound: bool, phrase: str) -> None:
    if not sound:
        raise ValueError(phrase)


class Codes:
    """The reader of codes: arrays → int64 [B, L, h, w]. Of several views (seed, g) decides in training, and validation
    gets the first one."""

    def __init__(self, header: Header) -> None:
        self.header = header
        self.shape = tuple(header.shape) if header.views == 1 else (header.views, *header.shape)
        self.sizes = np.array(header.sizes)[:, None, None]

    def require(self) -> None: ...

    def training(self, data: bytes, seed: int, g: int) -> NDArray[Any]:
        return self.views(data)[int(mix(seed, g)) % self.header.views]

    def validation(self, data: bytes) -> NDArray[Any]:
        return self.views(data)[0]

    def views(self, data: bytes) -> NDArray[Any]:
        """Returns all views of a sample, [V, L, h, w]. Raises Damaged for another shape or type, and for a code that
        its codebook does not have."""
        header, dtype = self.header, self.header.dtype
        file = io.BytesIO(data)
        try:
            npy.read_magic(file)
            found = npy.read_array_header_1_0(file)  # parses a literal, and never unpickles
            codes = np.frombuffer(data, dtype, offset=file.tell()).reshape(self.shape)
        except Exception:  # a hostile header may raise any exception
            raise Damaged("cut or corrupt") from None
        if found != (self.shape, False, dtype) or (codes >= self.sizes).any() or (codes < 0).any():
            raise Damaged("cut or corrupt")
        return codes.reshape(header.views, *header.shape)

    def stack(self, samples: Sequence[NDArray[Any]]) -> Tensor:
        return torch.from_numpy(np.stack(samples).astype(np.int64))

    def blank(self, count: int) -> Tensor:
        return torch.zeros(count, *self.header.shape, dtype=torch.int64)


def array(codes: Tensor, header: Header) -> bytes:
    """Returns the file of a sample's codes, int64 [V, L, h, w]."""
    one = codes.numpy().astype(header.dtype)
    file = io.BytesIO()
    np.save(file, one if header.views > 1 else one[0])
    return file.getvalue()
