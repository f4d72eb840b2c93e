"""One thread a rank that looks on: whether the launcher still lives, and whether the run gets on.

Where the launcher is gone the run is asked to stop, so that all ranks save and leave: no orphans. Where nothing happens
for too long, the stacks of all threads go to RUN/stacks/rank-R.txt and the rank leaves with HUNG_CODE. One rank that
hangs lets all others wait for it in their next collective, so that each finds out for itself, without a word between
them; the one whose stacks differ, or that left none, is to blame.
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

FOLDER = "stacks"
PACKAGE = Path(__file__).parents[1]
TICK = 1.0  # seconds between looks
LEAVE = 20.0  # seconds without a step that a rank has left when its launcher is gone
LINGER = 5.0  # seconds from the stacks to the end, so that the others' clocks run out before this rank's end ends them
USUAL = 10  # times the longest of the last gaps is no gap any more
GAPS = 100  # that are remembered
LONG = 12  # times as long as a step may take what is not one: validation, saving, the first step


class Watch:
    """While it is entered, it watches. `beat` after each step; what is not a step is done within `doing`, by all ranks:
    each has the same time for it, and waits within it for the one that takes longest."""

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
        """timeout: seconds without a step that are a hang at the least; 0: none is. step: so many have been taken.
        release: gives the run directory back before this process ends at once."""
        self.folder = run / FOLDER
        self.timeout = timeout
        self.launcher = launcher
        self.stop, self.status, self.release = stop, status, release
        self.rank, self.world = distributed.rank(), distributed.world()
        self.step = step
        self._what = "the first step"
        self._signs = 0  # of life
        self._last = time.monotonic()
        self._gaps: deque[float] = deque(maxlen=GAPS)
        self._longest: dict[str, float] = {}
        self._over = threading.Event()
        self._main = threading.current_thread()
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)

    def __enter__(self) -> "Watch":
        if self.rank == 0:
            shutil.rmtree(self.folder, ignore_errors=True)  # an earlier life's
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
        """So many steps have been taken."""
        gap = self._sign()
        if not self._what:
            self._gaps.append(gap)
        self.step, self._what = step, ""

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """What may take longer than a step."""
        self._sign()
        self._what = what
        try:
            yield
            distributed.barrier()  # or a rank that is done would wait for the others in its next step
        finally:
            self._longest[what] = max(self._sign(), self._longest.get(what, 0.0))
            self._what = ""

    def limit(self, floor: float) -> float:
        """Seconds of silence that are too many now. floor: for a step that has not yet been seen to take long."""
        if self._what:
            return max(LONG * floor, USUAL * self._longest.get(self._what, 0.0))
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
            silent += min(now - before, 2 * TICK)  # while a process is stopped the clock goes on: that is no hang
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
        # What hangs may be the file system, or whoever reads what is printed.
        backstop = threading.Timer(2 * LINGER, os._exit, (HUNG_CODE,))
        backstop.daemon = True
        backstop.start()
        code = HUNG_CODE
        try:
            at = f"{self._what} after step {self.step}" if self._what else f"step {self.step + 1}"
            since = f"nothing for {silent:.0f} s in {at}, where {limit:.0f} s are allowed"
            head = f"rank {self.rank} of {self.world}: {since}; {self._place()}"
            self._write(head)
            # The same in each life that hangs there, on whichever rank and for however long: so it counts as one.
            gone = ", and the launcher is gone" if orphan else ""
            why = f"Hang: {at} does not end{gone}; where each rank stands is told in {self.folder}"
            if self.status.fail(why, self.step, HUNG_CODE):
                code = NO_PROGRESS_CODE
            process.say(f"error: {head}; all stacks are in {self.folder}")
            time.sleep(LINGER)
            self._name_missing()
            self.release()
        finally:
            os._exit(code)

    def _place(self) -> str:
        """Where the main thread is, and through which line of ours it came there."""
        frame = sys._current_frames().get(self._main.ident or 0)
        places: list[str] = []
        while frame:
            file = Path(frame.f_code.co_filename)
            ours = PACKAGE in file.parents
            if ours or not places:
                places.append(f"{file.name}:{frame.f_lineno}, {frame.f_code.co_name}")
            frame = None if ours else frame.f_back
        return f"it stands at {', called from '.join(places)}"

    def _write(self, head: str) -> None:
        self.folder.mkdir(exist_ok=True)
        with (self.folder / f"rank-{self.rank}.txt").open("w") as file:
            print(head, file=file, flush=True)
            faulthandler.dump_traceback(file)

    def _name_missing(self) -> None:
        """By the first of those that are not."""
        there = [rank for rank in range(self.world) if (self.folder / f"rank-{rank}.txt").exists()]
        missing = [str(rank) for rank in range(self.world) if rank not in there]
        if missing and self.rank == there[0]:
            process.say(f"error: rank {', '.join(missing)} left no stacks: stopped, gone, or on a node that is")
