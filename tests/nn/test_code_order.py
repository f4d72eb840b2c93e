import math

import numpy as np
import pytest
import torch

from vaescale.nn.code_order import cosine_count, halton, ranks


def test_ranks_invert_an_order() -> None:
    order = torch.stack([torch.randperm(9) for _ in range(4)])
    assert torch.equal(order.gather(1, ranks(order)), torch.arange(9).expand(4, -1))
    assert torch.equal(ranks(order).gather(1, order), torch.arange(9).expand(4, -1))


@pytest.mark.parametrize("places", [1, 4, 64])
def test_the_chances_of_masked_counts_are_those_of_the_cosine(places: int) -> None:
    """At evenly spread u, counted."""
    u = (np.arange(100_000) + 0.5) / 100_000
    counts = np.bincount(np.ceil(places * np.cos(math.pi / 2 * u)).astype(int), minlength=places + 1) / len(u)
    assert counts[0] == 0
    assert np.abs(np.array(cosine_count(places)) - counts[1:]).max() < 2e-5


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 3), (8, 8), (16, 16), (5, 24)])
def test_the_halton_order_visits_each_place_once(height: int, width: int) -> None:
    assert sorted(halton(height, width)) == list(range(height * width))


def test_the_halton_order_is_that_of_scipy() -> None:
    qmc = pytest.importorskip("scipy.stats").qmc
    points = qmc.Halton(2, scramble=False).random(2000)[1:]
    places = (np.floor(points[:, 0] * 8) * 8 + np.floor(points[:, 1] * 8)).astype(int)
    assert halton(8, 8) == list(dict.fromkeys(places.tolist()))


def test_its_first_places_are_spread() -> None:
    """Of the first quarter of the places, each quadrant has about a quarter."""
    first = np.array(halton(16, 16)[:64])
    quadrants = np.bincount(first // 128 * 2 + first % 16 // 8, minlength=4)
    assert quadrants.min() >= 14
