"""Times two sides in turns, for benchmarks whose numbers are ratios."""

import statistics
import time
from collections.abc import Callable

import torch

Work = Callable[[], object]


def clock_of(device: str) -> Callable[[], float]:
    """Returns a clock in seconds. device: "cpu" or "cuda"."""
    return synchronised if device == "cuda" else time.perf_counter


def synchronised() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def paired(theirs: Work, ours: Work, items: int, rounds: int, clock: Callable[[], float]) -> tuple[float, float, float]:
    """Returns (theirs and ours in milliseconds of `clock` per item, their ratio): medians over rounds, which the two
    sides begin in turns."""
    theirs(), ours()  # what is done once, such as imports
    spent: dict[Work, list[float]] = {theirs: [], ours: []}
    for i in range(rounds):
        for work in (theirs, ours) if i % 2 else (ours, theirs):
            start = clock()
            work()
            spent[work].append((clock() - start) * 1000 / items)
    ratios = [a / b for a, b in zip(spent[theirs], spent[ours], strict=True)]
    return statistics.median(spent[theirs]), statistics.median(spent[ours]), statistics.median(ratios)
