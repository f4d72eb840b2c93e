"""The formulas of the plan against step-by-step simulations."""

import math

import numpy as np
import pytest

from vaescale.advice.plan import Cluster, step_seconds, sums


def ring(ranks: int, size: float, speed: float) -> float:
    """Returns the seconds of a ring all-reduce: each rank forwards one piece at a time until all ranks have all."""
    held = [[{rank} for _ in range(ranks)] for rank in range(ranks)]  # rank, piece → whose parts are in the sum
    seconds = 0.0
    while any(len(piece) < ranks for own in held for piece in own):
        turn = round(seconds * speed / (size / ranks))
        sent = [(rank, (rank - turn) % ranks, set(held[rank][(rank - turn) % ranks])) for rank in range(ranks)]
        for rank, piece, parts in sent:
            held[(rank + 1) % ranks][piece] |= parts
        seconds += size / ranks / speed
    return seconds


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_a_ring_takes_what_the_formula_says(ranks: int) -> None:
    assert sums(1e9, Cluster(1, ranks, inside=2e9, between=1.0)) == pytest.approx(ring(ranks, 1e9, 2e9))
    assert sums(1e9, Cluster(ranks, 1, inside=1.0, between=2e9)) == pytest.approx(ring(ranks, 1e9, 2e9))


def test_two_levels_are_a_ring_within_and_rings_between() -> None:
    """Each of 4 accelerators all-reduces a quarter with its peers on other nodes, over a quarter of the network."""
    within = 2 * 3 / 4 * 1e9 / 2e9
    assert sums(1e9, Cluster(3, 4, 2e9, 5e8)) == pytest.approx(within + ring(3, 1e9 / 4, 5e8 / 4))


@pytest.mark.parametrize("world", [16, 256])
def test_the_slowest_of_many_is_about_as_late_as_said(world: int) -> None:
    """The formula bounds the expected maximum of normal values; at these sizes the bound is within a fifth of it."""
    times = 1 + 0.05 * np.random.default_rng(0).standard_normal((4000, world))
    late = step_seconds(1.0, 0.0, Cluster(1, world, 1.0, 1.0, jitter=0.05)) - 1
    assert late == pytest.approx(0.05 * math.sqrt(2 * math.log(world)))
    assert 0.7 * late < times.max(1).mean() - 1 < late
