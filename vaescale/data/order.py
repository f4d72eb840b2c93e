"""The training order: which sample is number g of the endless sequence.

With N samples, C columns and seed s:

    e, p = divmod(g, N)                          epoch, position in the epoch
    r, c = divmod(p, C)                          row, column
    c    ← c permuted by (s, e, r)               among the columns of the row: C, or fewer in the last row
    i    = c * (N // C) + min(c, N % C) + r      column after column
    j    = (i + shift of (s, e)) % N             position in the epoch's list
    list of epoch e = shards permuted by (s, e), each shard's samples permuted by (s, e, shard), concatenated

g → sample is a bijection on every epoch for all N, C >= 1: each epoch holds each sample exactly once. Each column reads
one shard at a time, so reads stay local, while a batch mixes samples from C positions of the list.
A batch of fewer than C samples has random columns, so two of its samples share a shard no more often than two random
samples do. The shift is uniform, so each sample is equally likely at each position of an epoch, however different the
shard sizes are. Rank, worker and batch size do not occur above: they only determine which process decodes which g.

This is version 2. Version 1 neither permutes the columns nor shifts (j = c * (N // C) + min(c, N % C) + r). A run that
began with version 1 keeps it.

The permutations are implemented here because numpy does not guarantee the same stream in its next release, and a run
must be resumable after an upgrade. Within a shard or a row each position is computed on its own, so neither memory nor
time grows with the size of a shard, with g, or with the number of columns.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Words = NDArray[np.uint64]

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
VERSIONS = (1, 2)  # of the order; new runs use the last one
ROW, SHIFT = 1, 2  # fourth keys, which make these hashes differ from those of the shards
# With 6 rounds or more, positions and neighbours in permutations of 2 … 50 are uniform in a chi-squared test of 20,000.
ROUNDS = 8


def mix(*keys: int | Ints | Words) -> Words:
    """Returns uint64: one hash per element of the broadcast keys.

    Each key is added to the state, which then passes through the finaliser of SplitMix64 (Steele, Lea, Flood 2014,
    "Fast splittable pseudorandom number generators", figure 16).
    """
    state = np.zeros(np.broadcast_shapes(*(np.shape(key) for key in keys)), np.uint64)
    for key in keys:
        state = _absorb(state, np.asarray(key).astype(np.uint64))
    return state


def _absorb(state: Words, key: Words) -> Words:
    with np.errstate(over="ignore"):
        state = (state + key + np.uint64(1)) * _GAMMA
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return state ^ (state >> np.uint64(31))


def uniforms(*keys: int | Ints | Words) -> NDArray[np.float64]:
    """Returns the upper 53 bits of `mix` as float64 in [0, 1)."""
    return (mix(*keys) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(count: int, *keys: int) -> Ints:
    """Returns int64 [count]: the numbers 0 … count-1 sorted by their hashes."""
    return np.argsort(mix(*keys, np.arange(count)), kind="stable")


def permuted(place: Ints, count: Ints, key: Words) -> Ints:
    """Returns int64 [B]: the image of each place in the permutation of [0, count) that its key selects.

    place, count: int64 [B] with 0 <= place < count; key: uint64 [B]. A generalised Feistel network on the smallest
    square s² >= count is iterated until the result is below count (cycle walking; Black and Rogaway 2002, "Ciphers
    with Arbitrary Finite Domains", methods 2 and 3). Since s² - count < 2s + 1, once is mostly enough.
    """
    result = place.astype(np.uint64)
    side, end = np.ceil(np.sqrt(count)).astype(np.uint64), count.astype(np.uint64)
    turns = mix(key, np.arange(ROUNDS)[:, None])  # the round function is mix(key, turn, right)
    walking = np.arange(len(place))
    while len(walking):
        s, states = side[walking], turns[:, walking]
        left, right = np.divmod(result[walking], s)
        for state in states:
            left, right = right, (left + _absorb(state, right) % s) % s
        result[walking] = left * s + right
        walking = walking[result[walking] >= end[walking]]
    return result.astype(np.int64)


class Order:
    """The order of one index: `order(g)` maps int64 [B] to int64 [B], the sample numbers in the index.

    sizes: int64 [S], samples per shard. version: one of VERSIONS.
    """

    def __init__(self, sizes: Ints, columns: int, seed: int, version: int = VERSIONS[-1]) -> None:
        self.total = int(sizes.sum())
        self.columns = columns
        self.seed = seed
        self.version = version
        self._sizes = sizes
        self._first = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        self._epoch = lru_cache(2)(self._permuted_epoch)

    def __call__(self, g: Ints) -> Ints:
        epoch, shard, place = self._locate(g)
        return self._first[shard] + permuted(place, self._sizes[shard], mix(self.seed, epoch, shard))

    def shards(self, g: Ints) -> Ints:
        """Maps g, int64 [B], to int64 [B]: the shard that holds each sample."""
        return self._locate(g)[1]

    def _locate(self, g: Ints) -> tuple[Ints, Ints, Ints]:
        """Returns (epoch, shard, position in the shard's list), each int64 [B]."""
        epoch, p = np.divmod(g, self.total)
        row, column = np.divmod(p, self.columns)
        if self.version > 1:
            width = np.minimum(self.columns, self.total - row * self.columns)
            column = permuted(column, width, mix(self.seed, epoch, row, ROW))
        j = column * (self.total // self.columns) + np.minimum(column, self.total % self.columns) + row
        shard, place = np.empty_like(g), np.empty_like(g)
        for e in np.unique(epoch):
            here = np.flatnonzero(epoch == e)
            shards, starts, shift = self._epoch(int(e))
            in_list = (j[here] + shift) % self.total
            slot = np.searchsorted(starts, in_list, side="right") - 1
            shard[here], place[here] = shards[slot], in_list - starts[slot]
        return epoch, shard, place

    def _permuted_epoch(self, epoch: int) -> tuple[Ints, Ints, int]:
        """Returns (the shards in the epoch's order, the start of each in the epoch's list, the shift)."""
        shards = permutation(len(self._sizes), self.seed, epoch)
        shift = int(mix(self.seed, epoch, 0, SHIFT)) % self.total if self.version > 1 else 0
        return shards, np.concatenate([[0], np.cumsum(self._sizes[shards])[:-1]]), shift
