"""Two sides timed by turns, for benchmarks whose numbers are ratios."""

import statistics
from collections.abc import Callable

Work = Callable[[], object]


def paired(theirs: Work, ours: Work, items: int, rounds: int, clock: Callable[[], float]) -> tuple[float, float, float]:
    """(theirs and ours in milliseconds of `clock` an item, their ratio): medians over rounds, each first in every
    other."""
    theirs(), ours()  # what is done once, such as imports
    spent: dict[Work, list[float]] = {theirs: [], ours: []}
    for i in range(rounds):
        for work in (theirs, ours) if i % 2 else (ours, theirs):
            start = clock()
            work()
            spent[work].append((clock() - start) * 1000 / items)
    ratios = [a / b for a, b in zip(spent[theirs], spent[ours], strict=True)]
    return statistics.median(spent[theirs]), statistics.median(spent[ours]), statistics.median(ratios)
