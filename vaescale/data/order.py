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
must be resumable after an upgrade.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Words = NDArray[np.uint64]

_GAMMA = np.uint64(0x9E3779B97F4A7C15)


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


class Order:
    """sizes: int64 [S], samples per shard. `order(g)`: int64 [B] → int64 [B] sample numbers of the index."""

    def __init__(self, sizes: Ints, columns: int, seed: int) -> None:
        self.total = int(sizes.sum())
        self.columns = columns
        self.seed = seed
        self._sizes = sizes
        self._first = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        # One batch touches at most one shard a column, and two when it crosses into the next.
        self._shard = lru_cache(2 * columns)(self._permuted_shard)
        self._epoch = lru_cache(2)(self._permuted_epoch)

    def __call__(self, g: Ints) -> Ints:
        epoch, place = np.divmod(g, self.total)
        row, column = np.divmod(place, self.columns)
        j = column * (self.total // self.columns) + np.minimum(column, self.total % self.columns) + row
        sample = np.empty_like(g)
        for e in np.unique(epoch):
            here = np.flatnonzero(epoch == e)
            shards, starts = self._epoch(int(e))
            slots = np.searchsorted(starts, j[here], side="right") - 1
            for slot in np.unique(slots):
                rows = here[slots == slot]
                shard = int(shards[slot])
                sample[rows] = self._first[shard] + self._shard(int(e), shard)[j[rows] - starts[slot]]
        return sample

    def _permuted_epoch(self, epoch: int) -> tuple[Ints, Ints]:
        shards = permutation(len(self._sizes), self.seed, epoch)
        return shards, np.concatenate([[0], np.cumsum(self._sizes[shards])[:-1]])

    def _permuted_shard(self, epoch: int, shard: int) -> Ints:
        return permutation(int(self._sizes[shard]), self.seed, epoch, shard)
