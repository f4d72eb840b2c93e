"""The learner with a critic on one process, against a loop of plain torch."""

import pytest

from tests.training import duel


@pytest.mark.parametrize(("zero", "accumulation", "way", "loss"), duel.CASES)
def test_four_updates_are_those_of_plain_torch(group: None, zero: int, accumulation: int, way: str, loss: str) -> None:
    """Bit for bit at ZeRO 0; the adaptive weight, and clipping at ZeRO 1 and 2, have another order of operations."""
    config = duel.load(zero, accumulation, way, loss)
    ours, weights = duel.learned(config, duel.batches(accumulation))
    theirs, expected = duel.plain(config, duel.batches(accumulation))
    assert weights == pytest.approx(expected, rel=1e-6)
    assert (len(set(weights)) > 2) == (way == "adaptive")
    exact = zero == 0 and way != "adaptive"
    assert max(duel.off(ours, theirs).values()) <= (0 if exact else 1e-6)
