import math
import time

import numpy as np
import pytest

from vaescale.data.order import VERSIONS, Order, mix, permutation, permuted, uniforms
from vaescale.data.stream import train_ranges

SIZES = [[1], [5], [3, 1, 7], [50, 1, 2, 9, 33], [0, 4, 0, 4], list(range(1, 51))]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("columns", [1, 2, 7, 64, 5000])
@pytest.mark.parametrize("version", VERSIONS)
def test_each_epoch_is_a_permutation(sizes: list[int], columns: int, version: int) -> None:
    order, total = Order(np.array(sizes), columns, 3, version), sum(sizes)
    epochs = order(np.arange(3 * total)).reshape(3, total)
    for epoch in epochs:
        assert sorted(epoch) == list(range(total))
    if total > 10:
        assert not np.array_equal(epochs[0], epochs[1])


@pytest.mark.parametrize("version", VERSIONS)
def test_each_epoch_is_a_permutation_at_every_remainder(version: int) -> None:
    """All N up to 40 in three shards and all C up to N + 2: every length of the last row, and rows longer than N."""
    for total in range(1, 41):
        sizes = np.array([total // 3, total - total // 3 - total // 7, total // 7])
        for columns in range(1, total + 3):
            epochs = Order(sizes, columns, total, version)(np.arange(2 * total)).reshape(2, total)
            assert np.array_equal(np.sort(epochs, axis=1), [np.arange(total)] * 2), (total, columns)


def feistel(place: int, count: int, key: int) -> int:
    side = math.isqrt(count - 1) + 1
    while True:
        left, right = divmod(place, side)
        for turn in range(8):
            left, right = right, (left + int(mix(np.uint64(key), turn, right)) % side) % side
        place = left * side + right
        if place < count:
            return place


@pytest.mark.parametrize("columns", [1, 4, 10, 30])
@pytest.mark.parametrize("version", VERSIONS)
def test_the_order_is_that_of_the_docstring(columns: int, version: int) -> None:
    """Compared with a plain transcription that uses lists instead of vectors."""
    sizes, seed = [3, 1, 7, 10], 5
    total, first = sum(sizes), [0, 3, 4, 11]
    expected = []
    for g in range(2 * total):
        e, p = divmod(g, total)
        r, c = divmod(p, columns)
        shift = 0
        if version == 2:
            c = feistel(c, min(columns, total - r * columns), int(mix(seed, e, r, 1)))
            shift = int(mix(seed, e, 0, 2))
        j = (c * (total // columns) + min(c, total % columns) + r + shift) % total
        epoch = []
        for shard in sorted(range(4), key=lambda shard: int(mix(seed, e, shard))):
            epoch += [first[shard] + feistel(i, sizes[shard], int(mix(seed, e, shard))) for i in range(sizes[shard])]
        expected.append(epoch[j])
    assert Order(np.array(sizes), columns, seed, version)(np.arange(2 * total)).tolist() == expected


@pytest.mark.parametrize("version", VERSIONS)
def test_a_column_walks_one_shard_after_the_other(version: int) -> None:
    """Each shard is read once a row, in one stretch of rows; where a column begins in a shard's midst, in two."""
    shards = Order(np.array([50] * 16), 8, 0, version).shards(np.arange(800)).reshape(100, 8)
    assert all(len(set(row)) == 8 for row in shards)
    stretches = [1 + (np.diff(np.flatnonzero((shards == shard).any(1))) > 1).sum() for shard in range(16)]
    assert max(stretches) <= 2
    assert sum(stretches) <= 16 + 8


def sharing(order: Order, shards: int, batch: int, epochs: int) -> float:
    """Returns the probability that two samples of a batch share a shard."""
    rows = order.shards(np.arange(epochs * order.total // batch * batch)).reshape(-1, batch)
    counts = np.stack([(rows == shard).sum(1) for shard in range(shards)])
    return (counts * (counts - 1)).sum() / (len(rows) * batch * (batch - 1))


@pytest.mark.parametrize(
    ("sizes", "batch", "before"), [([250] * 6 + [76], 8, 0.92), ([2000] * 64, 32, 0.097)], ids=["photos", "64 shards"]
)
def test_a_batch_smaller_than_a_row_mixes_shards(sizes: list[int], batch: int, before: float) -> None:
    """As two samples drawn at random share a shard, but for what a row's evenness takes away; version 1 walked
    neighbouring columns."""
    total, epochs = sum(sizes), 8 if len(sizes) < 10 else 1
    random = sum(size * (size - 1) for size in sizes) / (total * (total - 1))
    old, new = (
        sharing(Order(np.array(sizes), 256, 0, version), len(sizes), batch, epochs) for version in (1, VERSIONS[-1])
    )
    assert old == pytest.approx(before, rel=0.02)
    assert new < 1.1 * random


@pytest.mark.parametrize("columns", [1, 8])
def test_places_in_an_epoch_are_even_however_unlike_the_shards(columns: int) -> None:
    """Chi-squared test of the tenth of the epoch in which one sample of a tiny shard is read, over 500 seeds."""
    for version, even in ((1, False), (VERSIONS[-1], True)):
        tenths = np.zeros(10)
        for seed in range(500):
            order = Order(np.array([100, 100, 2]), columns, seed, version)
            place = np.flatnonzero(order(np.arange(order.total)) == 200)[0]
            tenths[place * 10 // order.total] += 1
        chi_squared = ((tenths - 50) ** 2 / 50).sum()
        assert (chi_squared < 9 + 5 * np.sqrt(18) + 5) == even, (version, tenths)


@pytest.mark.parametrize("count", [*range(1, 70), 1000, 65_537])
def test_every_place_is_taken_once(count: int) -> None:
    for key in range(3):
        went = permuted(np.arange(count), np.full(count, count), np.full(count, mix(key)))
        assert np.array_equal(np.sort(went), np.arange(count))


@pytest.mark.parametrize("count", [2, 5, 10, 50])
def test_places_and_neighbours_are_uniform(count: int) -> None:
    """Chi-squared tests over 20,000 keys: the image of a place, and the images of two neighbours together."""
    keys = mix(9, np.arange(20_000))
    first, second = (permuted(np.full(20_000, place), np.full(20_000, count), keys) for place in (0, 1))
    pairs = np.bincount(first * count + second, minlength=count**2).reshape(count, count)
    for counted in (np.bincount(first, minlength=count), pairs[~np.eye(count, dtype=bool)]):
        expected, freedom = 20_000 / len(counted), len(counted) - 1
        chi_squared = ((counted - expected) ** 2 / expected).sum()
        assert chi_squared < freedom + 5 * np.sqrt(2 * freedom) + 5  # five standard deviations


def test_a_late_position_takes_no_more_time() -> None:
    """g = 10⁹ in 100 million samples: only the epoch's list of shards is made anew, whatever g is."""
    order = Order(np.full(10_000, 10_000), columns=256, seed=0)
    begun = time.monotonic()
    late = order(np.arange(10**9, 10**9 + 256))
    assert time.monotonic() - begun < 1
    assert len(set(late.tolist())) == 256
    assert np.array_equal(order.shards(np.arange(10**9, 10**9 + 256)), late // 10_000)


@pytest.mark.parametrize("world", [1, 2, 4, 8])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_global_batches_do_not_depend_on_the_world(world: int, accumulation: int) -> None:
    batch, begin, steps = 48, 1000, 3
    streams = [train_ranges(begin, batch, accumulation, rank, world) for rank in range(world)]
    for step in range(steps):
        joined = [g for stream in streams for _ in range(accumulation) for g in next(stream)]
        assert joined == list(range(begin + step * batch, begin + (step + 1) * batch))


def test_hashes_are_fixed_for_ever() -> None:
    """A run must be resumable after an upgrade: these numbers may never change. The finaliser is checked against the
    published first output of SplitMix64 with seed 0, which is what `mix` of one key computes."""
    assert int(mix(0)) == 0xE220A8397B1DCDAF
    assert int(mix(0, 1, 2)) == 0xAE2C88295A44DB24
    assert permutation(8, 0, 1).tolist() == [7, 0, 1, 6, 5, 2, 3, 4]
    assert permuted(np.arange(8), np.full(8, 8), np.full(8, mix(0, 1))).tolist() == [0, 3, 2, 6, 4, 7, 1, 5]
    orders = [Order(np.array([3, 1, 7, 10]), 4, 5, version)(np.arange(15, 25)).tolist() for version in VERSIONS]
    assert orders == [[7, 19, 14, 4, 9, 17, 13, 14, 2, 8], [2, 15, 10, 20, 0, 3, 10, 1, 12, 11]]
    assert uniforms(0, 5, np.arange(2)).tolist() == [0.46641407955912306, 0.5255371172725884]


def test_uniforms_are_uniform_and_unrelated() -> None:
    draws = uniforms(0, np.arange(100_000)[:, None], np.arange(2))
    assert draws.min() >= 0
    assert draws.max() < 1
    # five standard errors of a mean of 100,000 uniforms, and of a correlation of as many pairs
    assert np.abs(draws.mean(0) - 0.5).max() < 5 / np.sqrt(12 * 100_000)
    assert abs(np.corrcoef(draws.T)[0, 1]) < 5 / np.sqrt(100_000)
