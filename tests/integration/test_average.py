"""Gradients averaged during the backward pass, at ZeRO 0."""

import json
import math
from itertools import product
from pathlib import Path

import pytest

from tests.integration.averaging import BUCKET_BYTES, STEPS, Net
from tests.integration.conftest import forked

BYTES = sum(p.nbytes for p in Net().parameters() if p.requires_grad)


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("averaged")
    forked(folder, [{"task": "averaged", "world": world, "out": str(folder / str(world))} for world in (2, 4)])
    return folder


@pytest.mark.parametrize("world", [2, 4])
def test_gradients_are_averaged_during_the_last_backward_pass(averaged: Path, world: int) -> None:
    """With accumulation, parameters without gradient on some ranks, and loss scaling: two ranks get the bits of
    DeepSpeed, more ranks up to the order of sums. There is one collective per bucket, and some begin before the last
    gradient is there. That all ranks begin the same ones in the same order is checked by the strict group."""
    most = math.ceil(BYTES / BUCKET_BYTES)
    for rank in range(world):
        rows = json.loads((averaged / str(world) / f"averaged-{rank}.json").read_text())
        assert [tuple(row[:2]) for row in rows] == list(product(("fp32", "bf16", "fp16"), (1, 3)))
        for _, accumulation, taken, backward, early, equal, far in rows:
            assert 1 <= taken <= STEPS
            count = backward[accumulation - 1]
            assert 3 <= count <= most
            assert backward == ([0] * (accumulation - 1) + [count]) * STEPS
            assert max(early) > 0
            assert equal or world > 2
            assert far < 1e-5
