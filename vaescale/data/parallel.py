"""Work on many shards in several processes, with a progress bar; and a lock for the folder that is written."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout
from tqdm import tqdm

from ..files import printable
from . import DataError

Result = TypeVar("Result")


def processors() -> int:
    """Returns the number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0))


def in_processes(
    work: Callable[..., Result], jobs: Iterable[tuple[Any, ...]], processes: int, doing: str, unit: str
) -> Iterator[Result]:
    """Yields work(*job) for each job, in order. An interrupt or the first error ends it; finished jobs are kept."""
    jobs = list(jobs)
    if min(processes, len(jobs)) <= 1:
        results: Iterator[Result] = (work(*job) for job in jobs)
    else:
        results = _shared_out(work, jobs, min(processes, len(jobs)), doing)
    return progress(results, doing, unit, len(jobs))


def progress(items: Iterable[Result], doing: str, unit: str, total: int | None = None) -> Iterator[Result]:
    """Yields the items, with a progress bar on a terminal and one line a minute elsewhere."""
    watched = sys.stderr.isatty()
    delay, interval = (0.0, 0.1) if watched else (60.0, 60.0)
    return iter(tqdm(items, printable(doing), total, unit=unit, delay=delay, mininterval=interval))


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Locks `folder`, which is made if needed. Raises DataError if another process is writing into it."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / ".lock"
    try:
        with FileLock(lock, timeout=0):
            yield
            lock.unlink(missing_ok=True)
    except Timeout:
        raise DataError(f"another process is writing to {folder}: wait until it ends, or stop it") from None


def _shared_out(
    work: Callable[..., Result], jobs: list[tuple[Any, ...]], processes: int, doing: str
) -> Iterator[Result]:
    # Spawn, because a fork copies locks that other threads hold at that moment.
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _begin)
    # The processes inherit that SIGINT is ignored: Ctrl-C reaches all of them, and only this one should react.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        futures = [pool.submit(work, *job) for job in jobs]
    finally:
        signal.signal(signal.SIGINT, handler)
    try:
        for future in futures:
            yield future.result()
    except BrokenProcessPool:
        raise DataError(
            f"{doing}: a process was killed, perhaps because memory ran out: run the same command again with fewer "
            f"--processes; it continues where it stopped"
        ) from None
    finally:
        for child in multiprocessing.active_children():  # after an error they may still have hours of work to do
            child.kill()
        pool.shutdown()


def _begin() -> None:
    """Makes the process exit when its parent dies."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
