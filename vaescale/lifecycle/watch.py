"""A watchdog thread on each rank, which checks that the launcher is alive and that the run makes progress.

If the launcher is gone, the watchdog requests a stop, so that all ranks save and exit and leave no orphans. If nothing
happens for too long, it writes the stacks of all threads to RUN/stacks/rank-R.txt and exits with HUNG_CODE. When one
rank hangs, all others wait for it in their next collective, so each rank detects the hang without communication. The
rank whose stacks differ, or that left none, is the cause. With NCCL, nccl-rank-R next to them has the last collectives
of each rank.
"""

import faulthandler
import os
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .. import distributed, process
from .status import HUNG_CODE, NO_PROGRESS_CODE, Status
from .stops import LAUNCHER, TWICE_INTERRUPTED, Stop

STACKS = "stacks"
PACKAGE = Path(__file__).parents[1]
TICK = 1.0  # seconds between checks
LEAVE = 20.0  # replaces the timeout, in seconds, once the launcher is gone
LINGER = 5.0  # seconds from writing the stacks to the exit, so that other ranks time out before the exit ends them
USUAL = 10  # the limit is at least this multiple of the longest recent gap
GAPS = 100  # gaps between steps that are remembered


class Watch:
    """A context manager that runs the watchdog. Call `beat` after each step. All ranks do anything else within `doing`,
    which waits for the slowest rank, so that the same time limit holds for each."""

    def __init__(
        self,
        run: Path,
        timeout: float,
        launcher: int,
        stop: Stop,
        status: Status,
        step: int,
        release: Callable[[], None],
    ) -> None:
        """timeout: least seconds without a step that count as a hang; 0: never. step: steps taken so far. release:
        releases the run directory before this process exits at once."""
        self.folder = run / STACKS
        self.timeout = timeout
        self.launcher = launcher
        self.stop, self.status, self.release = stop, status, release
        self.rank, self.world = distributed.rank(), distributed.world()
        self.step = step
        self._what = "the first step"
        self._signs = 0  # count of the signs of progress
        self._last = time.monotonic()
        self._gaps: deque[float] = deque(maxlen=GAPS)
        self._longest: dict[str, float] = {}
        self._over = threading.Event()
        self._main = threading.current_thread()
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)

    def __enter__(self) -> "Watch":
        if self.rank == 0:
            shutil.rmtree(self.folder, ignore_errors=True)  # from an earlier process
            if distributed.recorded():  # NCCL may write here, too, and does not create folders
                self.folder.mkdir(parents=True)
        self.stop.parting = self._part
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _part(self) -> None:
        self.status.interrupted(TWICE_INTERRUPTED, self.step)
        self.release()

    def beat(self, step: int) -> None:
        """Reports that `step` steps have been taken."""
        gap = self._sign()
        if not self._what:
            self._gaps.append(gap)
        self.step, self._what = step, ""

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Runs a block that may take longer than a step. Collective."""
        self._sign()
        outer, self._what = self._what, what  # the first step stays the first one if something precedes it
        try:
            yield
            distributed.barrier()  # otherwise a rank that is done would wait for the others in its next step
        finally:
            self._longest[what] = max(self._sign(), self._longest.get(what, 0.0))
            self._what = outer

    def progress(self) -> None:
        """Reports progress within `doing`, whose limit then counts from here."""
        self._sign()

    def limit(self, floor: float) -> float:
        """Returns the seconds without progress that now count as a hang. floor: the least limit for a step."""
        if self._what:
            return max(distributed.LONG * floor, USUAL * self._longest.get(self._what, 0.0))
        return max(floor, USUAL * max(self._gaps, default=0.0))

    def _sign(self) -> float:
        now = time.monotonic()
        gap, self._last = now - self._last, now
        self._signs += 1
        return gap

    def _watch(self) -> None:
        silent, signs, orphan = 0.0, 0, False
        before = time.monotonic()
        while not self._over.wait(TICK):
            now = time.monotonic()
            silent += min(now - before, 2 * TICK)  # the clock runs on while a process is stopped, which is not a hang
            before = now
            if self.launcher and not orphan and process.lost(self.launcher):
                orphan, silent = True, 0.0
                self.stop.ask(LAUNCHER)
            if self._signs != signs:
                silent, signs = 0.0, self._signs
            floor = LEAVE if orphan else self.timeout
            if floor and silent > (limit := self.limit(floor)):
                self._end(silent, limit, orphan)

    def _end(self, silent: float, limit: float, orphan: bool) -> None:
        # The file system, or the reader of our output, may itself hang.
        backstop = threading.Timer(2 * LINGER, os._exit, (HUNG_CODE,))
        backstop.daemon = True
        backstop.start()
        code = HUNG_CODE
        try:
            at = f"{self._what} after step {self.step}" if self._what else f"step {self.step + 1}"
            since = f"no progress for {silent:.0f} s in {at} (limit {limit:.0f} s)"
            head = f"rank {self.rank} of {self.world}: {since}; {self._place()}"
            self._write(head)
            # The text contains no rank and no duration, so that repeated hangs at this step count as the same failure.
            gone = ", and the launcher is gone" if orphan else ""
            why = f"Hang: {at} did not end{gone}; {self.folder} shows where each rank is"
            if self.status.fail(why, self.step, HUNG_CODE):
                code = NO_PROGRESS_CODE
            process.say(f"error: {head}; all stacks are in {self.folder}")
            if record := distributed.recorded():
                (self.folder / f"{distributed.TRACE}{self.rank}").write_bytes(record)
            time.sleep(LINGER)
            self._name_missing()
            self.release()
        finally:
            os._exit(code)

    def _place(self) -> str:
        """Returns the line where the main thread is, and the line of this package that called it."""
        frame = sys._current_frames().get(self._main.ident or 0)
        places: list[str] = []
        while frame:
            file = Path(frame.f_code.co_filename)
            ours = PACKAGE in file.parents
            if ours or not places:
                places.append(f"{file.name}:{frame.f_lineno}, {frame.f_code.co_name}")
            frame = None if ours else frame.f_back
        return f"it is at {', called from '.join(places)}"

    def _write(self, head: str) -> None:
        self.folder.mkdir(exist_ok=True)
        with (self.folder / f"rank-{self.rank}.txt").open("w") as file:
            print(head, file=file, flush=True)
            faulthandler.dump_traceback(file)

    def _name_missing(self) -> None:
        """Prints which ranks left no stacks, on the first rank that left some."""
        there = [rank for rank in range(self.world) if (self.folder / f"rank-{rank}.txt").exists()]
        missing = [str(rank) for rank in range(self.world) if rank not in there]
        if missing and self.rank == there[0]:
            process.say(f"error: rank {', '.join(missing)} left no stacks: its process or its node is stopped or gone")
