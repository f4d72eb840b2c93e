"""Which sample is number g of the endless sequence.

With N samples, C columns and seed s:

    e, p = divmod(g, N)                        epoch, place in the epoch
    r, c = divmod(p, C)                        row, column
    j    = c * (N // C) + min(c, N % C) + r    place in the epoch's list
    list of epoch e = shards permuted by (s, e), each shard's samples permuted by (s, e, shard), concatenated

g → sample is a bijection on every epoch for all N, C >= 1, so each epoch holds each sample exactly once. One column
walks one shard, so reads stay local, while a batch mixes samples of C places. Neither rank, worker nor batch size
occurs above: they only say who decodes which g.

The permutations are ours, not numpy's, because numpy does not promise the same stream in its next release and a run
must be resumable after an upgrade. Inside a shard, any place is computed on its own, so neither memory nor time
grows with the shards, with g, or with the number of columns.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Words = NDArray[np.uint64]

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
ROUNDS = 8  # from 6 on, places and neighbours of permutations of 2 … 50 are uniform in a chi-squared test of 20,000


def mix(*keys: int | Ints | Words) -> Words:
    """One 64-bit hash per element of the broadcast keys.

    Each key is added to the state, which then passes through the finaliser of SplitMix64 (Steele, Lea, Flood 2014,
    "Fast splittable pseudorandom number generators", figure 16).
    """
    state = np.zeros(np.broadcast_shapes(*(np.shape(key) for key in keys)), np.uint64)
    with np.errstate(over="ignore"):
        for key in keys:
            state = (state + np.asarray(key).astype(np.uint64) + np.uint64(1)) * _GAMMA
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


def uniforms(*keys: int | Ints | Words) -> NDArray[np.float64]:
    """`mix` as numbers in [0, 1): its upper 53 bits."""
    return (mix(*keys) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(count: int, *keys: int) -> Ints:
    """int64 [count]: the places 0 … count-1 in the order of their hashes."""
    return np.argsort(mix(*keys, np.arange(count)), kind="stable")


def permuted(place: Ints, count: Ints, key: Words) -> Ints:
    """int64 [B]: where each place of [0, count) goes in the permutation of [0, count) that its key names.

    A generalised Feistel network on the smallest square s² >= count, walked until it falls inside (Black and Rogaway
    2002, "Ciphers with Arbitrary Finite Domains", methods 2 and 3): s² - count < 2s + 1, so mostly at once.
    """
    result = place.copy()
    side = np.ceil(np.sqrt(count)).astype(np.int64)
    walking = np.arange(len(place))
    while len(walking):
        s, k = side[walking], key[walking]
        left, right = np.divmod(result[walking], s)
        for turn in range(ROUNDS):
            left, right = right, (left + (mix(k, turn, right) % s.astype(np.uint64)).astype(np.int64)) % s
        result[walking] = left * s + right
        walking = walking[result[walking] >= count[walking]]
    return result


class Order:
    """sizes: int64 [S], samples per shard. `order(g)`: int64 [B] → int64 [B] sample numbers of the index."""

    def __init__(self, sizes: Ints, columns: int, seed: int) -> None:
        self.total = int(sizes.sum())
        self.columns = columns
        self.seed = seed
        self._sizes = sizes
        self._first = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        self._epoch = lru_cache(2)(self._permuted_epoch)

    def __call__(self, g: Ints) -> Ints:
        epoch, shard, place = self._locate(g)
        return self._first[shard] + permuted(place, self._sizes[shard], mix(self.seed, epoch, shard))

    def shards(self, g: Ints) -> Ints:
        """int64 [B] → int64 [B]: the shard that holds each sample."""
        return self._locate(g)[1]

    def _locate(self, g: Ints) -> tuple[Ints, Ints, Ints]:
        """(epoch, shard, place in the shard's list)."""
        epoch, p = np.divmod(g, self.total)
        row, column = np.divmod(p, self.columns)
        j = column * (self.total // self.columns) + np.minimum(column, self.total % self.columns) + row
        shard, place = np.empty_like(g), np.empty_like(g)
        for e in np.unique(epoch):
            here = np.flatnonzero(epoch == e)
            shards, starts = self._epoch(int(e))
            slot = np.searchsorted(starts, j[here], side="right") - 1
            shard[here], place[here] = shards[slot], j[here] - starts[slot]
        return epoch, shard, place

    def _permuted_epoch(self, epoch: int) -> tuple[Ints, Ints]:
        shards = permutation(len(self._sizes), self.seed, epoch)
        return shards, np.concatenate([[0], np.cumsum(self._sizes[shards])[:-1]])
