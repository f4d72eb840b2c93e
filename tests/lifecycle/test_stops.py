"""When ranks exchange requests to stop: two ranks in one process, on a clock that the test moves."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from vaescale.lifecycle import stops
from vaescale.lifecycle.stops import MOST, Stop

Step = Callable[[float, str], list[str]]


class Ring:
    """An all-reduce of two ranks, whose "group" is the number of the rank. It fails unless both begin equally often."""

    def __init__(self) -> None:
        self.begun: list[list[Tensor]] = [[], []]

    def all_reduce(self, tensor: Tensor, op: object, group: int, async_op: bool) -> SimpleNamespace:
        assert op == stops.dist.ReduceOp.MAX
        assert async_op
        number = len(self.begun[group])
        self.begun[group].append(tensor.clone())
        return SimpleNamespace(wait=lambda: tensor.copy_(torch.maximum(*(one[number] for one in self.begun))))


class Pair:
    def __init__(self, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.ring = 100.0, Ring()
        monkeypatch.setattr(stops.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(stops.dist, "all_reduce", self.ring.all_reduce)
        self.ranks = [Stop(run, 0.0), Stop(run, 0.0)]
        for rank, one in enumerate(self.ranks):
            one._group = rank  # type: ignore[assignment]

    def step(self, seconds: float, after: str = "step") -> str:
        """Both ranks take a step; the second is half as fast. Returns what both say, which must be the same."""
        said = []
        for one, share in zip(self.ranks, (1 / 3, 2 / 3), strict=True):
            self.now += share * seconds
            said.append(one.agreed(after))
        assert said[0] == said[1]
        return said[0]

    @property
    def exchanges(self) -> int:
        return len(self.ring.begun[0])


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pair:
    return Pair(tmp_path, monkeypatch)


@pytest.mark.parametrize("seconds", [0.015, 0.3, 0.7, 5.0])
def test_an_exchange_takes_place_about_once_a_second(pair: Pair, seconds: float) -> None:
    for _ in range(20):
        pair.step(seconds)
    before, begun = pair.exchanges, pair.now
    for _ in range(1000):
        assert pair.step(seconds) == ""
    each = (pair.now - begun) / (pair.exchanges - before)
    assert 0.65 < each / max(1.0, seconds) < 1.01  # a whole number of steps in at most a second


@pytest.mark.parametrize("seconds", [0.015, 0.3, 0.7, 5.0])
def test_all_ranks_stop_at_the_same_step_two_seconds_and_a_step_after_a_request(pair: Pair, seconds: float) -> None:
    for asked in range(0, 60, 7):
        pair.ranks[1]._asked, pair.ranks[0].said, pair.ranks[1].said = "", "", ""
        while pair.step(seconds):
            pass
        for _ in range(asked):
            assert pair.step(seconds) == ""
        pair.ranks[1].ask("SIGTERM")
        begun = pair.now
        while not (said := pair.step(seconds)):
            pass
        assert said == "SIGTERM"
        assert pair.now - begun <= 2.0 + seconds * 2


def test_steps_that_become_slower_delay_a_stop_by_no_more_than_the_most(pair: Pair) -> None:
    for _ in range(2000):
        pair.step(1e-4)
    begun = pair.exchanges
    for _ in range(10 * MOST):
        pair.step(1e-4)
    assert pair.exchanges - begun == pytest.approx(10, abs=1)


def test_batches_of_a_validation_have_an_interval_of_their_own(pair: Pair) -> None:
    for _ in range(500):
        pair.step(0.01)
    pair.ranks[0].ask("SIGTERM")
    assert [pair.step(3.0, "batch") for _ in range(2)] == ["", "SIGTERM"]
