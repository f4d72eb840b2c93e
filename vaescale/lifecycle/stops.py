"""Handles requests to stop a run: SIGTERM, SIGUSR1, SIGHUP or SIGINT (^C) to any rank, a file STOP in the run
directory, the end of the SLURM job, or the death of the launcher, which watch.py detects.

About once a second, after a step or a batch of a validation, the ranks exchange their requests over gloo, in the
background, so that no device waits: after each step, an exchange of 1,024 ranks could take longer than the step. The
exchange also tells all ranks how long a step takes on the slowest one. From this number, which is the same on all, each
computes after how many steps the next exchange takes place. All ranks read the result one step after the exchange
began, so all save the same step, about two seconds and a step after the request at the latest. The next process repeats
a validation that was cut short.
"""

import math
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from .. import distributed, process

SIGNALS = tuple(number.name for number in process.SIGNALS)
REASONS = ("", *SIGNALS, "the file STOP", "the end of the SLURM job", "the death of its launcher")
FILE, JOB_ENDS, LAUNCHER = REASONS[-3:]
TWICE_INTERRUPTED = "a second ^C: ended at once, the steps since the last checkpoint are lost"
EVERY = 1.0  # seconds between exchanges, unless a single step takes longer
MOST = 100  # steps between exchanges at most, because steps may become slower at any time
LOOK = 1.0  # seconds between checks of the file and the clock
TWICE = 0.5  # seconds within which two SIGINTs count as one ^C: from the terminal, and passed on by a launcher


class Stop:
    """A context manager in which signals request a stop instead of killing the process. Further signals change nothing,
    except that a second ^C ends the process at once."""

    def __init__(self, run: Path, margin: float) -> None:
        """margin: seconds before the end of the SLURM job at which to stop. Collective. Raises Unjoined."""
        self.file = run / "STOP"
        ends = os.environ.get("SLURM_JOB_END_TIME", "")  # seconds since 1970
        self.until = float(ends) - margin if re.fullmatch(r"[0-9]{1,18}(\.[0-9]*)?", ends) else math.inf
        self.said = ""  # the last result of `agreed`
        self.parting: Callable[[], None] = lambda: None  # called before a second ^C ends the process
        self._asked = ""
        self._looked, self._interrupted = -math.inf, math.inf  # times of the last check and of the first ^C
        self._group = distributed.side_group()
        self._shared = torch.zeros(2, dtype=torch.float64)  # the request, and seconds per call of `agreed`
        self._pending: dist.Work | None = None
        self._after, self._interval = "", 1  # what the calls follow, and calls from one exchange to the next
        self._begun, self._calls = time.monotonic(), 0  # time of the last exchange, and calls since

    def __enter__(self) -> "Stop":
        self._listener = process.Listener(self._hear, self._handle).__enter__()
        process.started()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            process.ended()
        self._listener.__exit__()

    def agreed(self, after: str = "step") -> str:
        """Returns one of REASONS, the same on all ranks; "" to continue. Collective; called after each step or batch.

        after: what the call follows. If that changes, the last interval no longer fits, and an exchange begins at once.
        """
        if self._group is None:
            self.said = self._look()
            return self.said
        self._calls += 1
        if self._pending:
            self._pending.wait()
            self._pending = None
            why, seconds = self._shared.tolist()
            self.said = REASONS[int(why)]
            # At most twice as many steps as before: the first ones are quick where they only fill a device's queue.
            self._interval = max(1, min(MOST, 2 * self._interval, int(EVERY / max(seconds, 1e-9))))
        if after != self._after:
            self._after, self._interval = after, 1
        if self._calls >= self._interval:
            now = time.monotonic()
            request, pace = REASONS.index(self._look()), (now - self._begun) / self._calls
            self._begun, self._calls = now, 0
            self._shared = torch.tensor([request, pace], dtype=torch.float64)
            self._pending = dist.all_reduce(self._shared, dist.ReduceOp.MAX, self._group, async_op=True)
        return self.said

    def ask(self, why: str) -> None:
        """Requests a stop for one of REASONS, from any thread. The first request is kept."""
        self._asked = self._asked or why

    def acknowledge(self) -> None:
        """Removes the file STOP, so that the next start does not stop again. Called after the run has stopped or
        finished."""
        if distributed.rank() == 0:
            try:
                self.file.unlink(missing_ok=True)
            except OSError as error:
                print(
                    f"{self.file} cannot be removed ({error.strerror}): remove it, or the next start will stop again",
                    flush=True,
                )

    def _handle(self, number: int) -> None:
        self.ask(signal.Signals(number).name)

    def _hear(self, number: int) -> None:
        self._handle(number)
        if number != signal.SIGINT:
            return
        now = time.monotonic()
        self._interrupted = min(self._interrupted, now)
        if now - self._interrupted > TWICE:
            process.leave(process.INTERRUPTED_CODE, TWICE_INTERRUPTED, self.parting)

    def _look(self) -> str:
        now = time.monotonic()  # unlike time.time, it cannot be set back
        if not self._asked and now - self._looked > LOOK:
            self._looked = now
            if time.time() > self.until:
                self._asked = JOB_ENDS
            elif distributed.rank() == 0 and self._touched():
                self._asked = FILE
        return self._asked

    def _touched(self) -> bool:
        try:
            return self.file.exists()
        except OSError:  # the file system may recover
            return False
