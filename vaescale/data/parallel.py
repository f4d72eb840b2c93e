"""The same work on many shards, in several processes, with progress; and files that are whole or not there."""

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
    """Those that this process may use."""
    return len(os.sched_getaffinity(0))


def each(
    work: Callable[..., Result], jobs: Iterable[tuple[Any, ...]], processes: int, doing: str, unit: str
) -> Iterator[Result]:
    """work(*job) for each job, in their order. An interrupt or the first error ends it; what is done stays done."""
    jobs = list(jobs)
    if min(processes, len(jobs)) <= 1:
        results: Iterator[Result] = (work(*job) for job in jobs)
    else:
        results = _shared_out(work, jobs, min(processes, len(jobs)), doing)
    return progress(results, doing, unit, len(jobs))


def progress(items: Iterable[Result], doing: str, unit: str, total: int | None = None) -> Iterator[Result]:
    """The items, with a bar where somebody watches and a line a minute in a log file."""
    watched = sys.stderr.isatty()
    delay, interval = (0.0, 0.1) if watched else (60.0, 60.0)
    return iter(tqdm(items, printable(doing), total, unit=unit, delay=delay, mininterval=interval))


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Raises DataError if another process is writing into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / ".lock"
    try:
        with FileLock(lock, timeout=0):
            yield
            lock.unlink(missing_ok=True)
    except Timeout:
        raise DataError(f"another process is writing into {folder}: wait until it ends, or end it") from None


def _shared_out(
    work: Callable[..., Result], jobs: list[tuple[Any, ...]], processes: int, doing: str
) -> Iterator[Result]:
    # Spawned, not forked: a fork inherits whatever thread held a lock at that moment.
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _begin)
    # Ignored by the processes from their first instruction on: Ctrl-C reaches them all, and only one should answer.
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
            f"{doing}: a process was killed, perhaps for want of memory: run the same command again, with fewer "
            f"--processes; it goes on where it stopped"
        ) from None
    finally:
        for child in multiprocessing.active_children():  # after an error they may be in the middle of hours of work
            child.kill()
        pool.shutdown()


def _begin() -> None:
    """A process whose parent is killed must not stay behind."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
