"""Finds the rank that slows the others down, by the seconds each spends on its own work.

Whole steps take equally long on all ranks, because each waits for the slowest. The ranks differ in what precedes the
collectives: waiting for data, and the forward pass. (The backward pass contains collectives.)
"""

import time
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import nn

from .. import distributed

SLOW, NO_LONGER = 2.0, 1.5  # multiples of the others' median: slow from the first on, normal again below the second
WINDOW = 40  # least number of steps over which ranks are compared: a slow rank is named in its second window at latest
MATTERS = 0.1  # least extra time of a slow rank, as a share of the step; less is noise


class Work(NamedTuple):
    """One rank's own work, in seconds per step."""

    waited: float
    forward: float

    @property
    def total(self) -> float:
        return self.waited + self.forward


class Pace:
    def __init__(self, model: nn.Module, device: torch.device) -> None:
        """Times the forward passes of this model. Nothing waits for the device before `report`."""
        self.device = device
        self.slow: int | None = None  # the rank reported as slow
        self.times = 1.0  # the slowest rank's work in the last window, as a multiple of the others' median
        self._steps, self._seconds, self._waited, self._forward = 0, 0.0, 0.0, 0.0  # since the last window
        self._begun: Any = None
        self._events: list[tuple[Any, Any]] = []
        model.register_forward_pre_hook(self._begin)
        model.register_forward_hook(self._end)

    def report(self, waited: float, steps: int, seconds: float) -> str:
        """Returns a sentence if a rank has become slow, or no longer is; "" otherwise. Collective.

        waited: seconds spent waiting for data in `steps` steps, which took `seconds`. Call it when the device is idle.
        """
        self._steps, self._seconds, self._waited = self._steps + steps, self._seconds + seconds, self._waited + waited
        self._forward += sum(begun.elapsed_time(ended) for begun, ended in self._events) / 1000
        self._events = []
        if self._steps < WINDOW:
            return ""
        own = torch.tensor([self._waited, self._forward]) / self._steps
        said = self._judge([Work(*pair) for pair in distributed.gather(own).tolist()], self._seconds / self._steps)
        self._steps, self._seconds, self._waited, self._forward = 0, 0.0, 0.0, 0.0
        return said

    def _judge(self, works: list[Work], step: float) -> str:
        rank, self.times = slowest(works)
        if self.slow is not None:
            if _times(works, self.slow) >= NO_LONGER:
                return ""
            said, self.slow = f"rank {self.slow} is as fast as the others again", None
            return said
        if self.times < SLOW or (1 - 1 / self.times) * works[rank].total < MATTERS * step:
            return ""
        self.slow = rank
        work = works[rank]
        return (
            f"rank {rank} takes {self.times:.1f} times as long as the others ({work.total:.3g} s per step, "
            f"{work.waited:.3g} s of it waiting for data): all ranks wait for it; check its node's "
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
    """Returns the slowest rank, and its work as a multiple of the others' median."""
    rank = max(range(len(works)), key=lambda one: works[one].total)
    return rank, _times(works, rank)


def _times(works: list[Work], rank: int) -> float:
    others = [work.total for one, work in enumerate(works) if one != rank]
    return works[rank].total / max(median(others), 1e-9) if others else 1.0
