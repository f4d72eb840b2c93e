"""Which rank lets the others wait: the seconds that each spends on work of its own.

In a step's end all ranks take equally long, since each waits for the slowest. What tells them apart is what comes
before they meet: waiting for their data, and the forward pass, which has no collectives. (The backward pass has.)
"""

import time
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import nn

from .. import distributed

SLOW, NO_LONGER = 2.0, 1.5  # times the others' median: where it begins, and below which it is over
MATTERS = 0.1  # of a step's time, at least, that the rank takes longer: less is noise


class Work(NamedTuple):
    """One rank's, in seconds a step."""

    waited: float
    forward: float

    @property
    def total(self) -> float:
        return self.waited + self.forward


class Pace:
    def __init__(self, model: nn.Module, device: torch.device) -> None:
        """Times the forward passes of this model; nothing waits for the device until `report`."""
        self.device = device
        self.slow: int | None = None  # the rank that was named
        self._forward = 0.0
        self._begun: Any = None
        self._events: list[tuple[Any, Any]] = []
        model.register_forward_pre_hook(self._begin)
        model.register_forward_hook(self._end)

    def report(self, waited: float, steps: int, seconds: float) -> tuple[float, str]:
        """(the slowest rank's work, as a multiple of the others' median; the sentence to say, if any). Collective.

        waited: for data, in `steps` steps that took so many seconds. To be called where the device has come to rest.
        """
        forward = self._forward + sum(begun.elapsed_time(ended) for begun, ended in self._events) / 1000
        self._forward, self._events = 0.0, []
        works = [Work(*pair) for pair in distributed.each(torch.tensor([waited, forward]) / steps).tolist()]
        rank, times = slowest(works)
        said = self._judge(rank, times, works, seconds / steps)
        return times, said

    def _judge(self, rank: int, times: float, works: list[Work], step: float) -> str:
        if self.slow is not None:
            own = _times(works, self.slow)
            if own < NO_LONGER:
                said, self.slow = f"rank {self.slow} is as fast as the others again", None
                return said
            return ""
        if times < SLOW or (1 - 1 / times) * works[rank].total < MATTERS * step:
            return ""
        self.slow = rank
        work = works[rank]
        return (
            f"rank {rank} takes {times:.1f} times as long as the others ({work.total:.3g} s a step, of which "
            f"{work.waited:.3g} s waiting for data): all wait for it; look at its node's "
            f"{'disk, network and data.workers' if work.waited > work.forward else 'clock rates and other processes'}"
        )

    def _begin(self, *_: Any) -> None:
        self._begun = self._now()

    def _end(self, *_: Any) -> None:
        if self.device.type == "cuda":
            self._events.append((self._begun, self._now()))
        else:
            self._forward += self._now() - self._begun

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def slowest(works: list[Work]) -> tuple[int, float]:
    """(the rank, how many times as long it takes as the median of the others)"""
    rank = max(range(len(works)), key=lambda one: works[one].total)
    return rank, _times(works, rank)


def _times(works: list[Work], rank: int) -> float:
    others = [work.total for one, work in enumerate(works) if one != rank]
    return works[rank].total / max(median(others), 1e-9) if others else 1.0
