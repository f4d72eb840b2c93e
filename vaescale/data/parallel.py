"""The same work on many shards, in several processes, with progress."""

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from tqdm import tqdm

from . import DataError

Result = TypeVar("Result")


def processors() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0))


def each(
    work: Callable[..., Result], jobs: Iterable[tuple[Any, ...]], processes: int, doing: str, unit: str
) -> Iterator[Result]:
    """work(*job) for each job, in their order. An interrupt or the first error ends it; what is done stays done."""
    jobs = list(jobs)
    progress = tqdm(total=len(jobs), desc=doing, unit=unit, disable=None)  # None: only where somebody watches
    if min(processes, len(jobs)) <= 1:
        for job in jobs:
            yield work(*job)
            progress.update()
    else:
        # Spawned, not forked: a fork inherits whatever thread held a lock at that moment.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(processes, len(jobs)), context) as pool:
            try:
                for result in pool.map(work, *zip(*jobs, strict=True)):
                    yield result
                    progress.update()
            except BrokenProcessPool:
                raise DataError(
                    f"{doing}: a process was killed, perhaps for want of memory: run the same command again, with "
                    f"fewer --processes; it goes on where it stopped"
                ) from None
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
    progress.close()
