"""Handles requests to stop a run: SIGTERM, SIGUSR1, SIGHUP or SIGINT (^C) to any rank, a file STOP in the run
directory, the end of the SLURM job, or the death of the launcher, which watch.py detects.

After each step, and each batch of a validation, the ranks exchange their requests over gloo, asynchronously, so that no
device waits. All ranks know a request at the end of the step after the one it arrived in, so all save the same step.
The next process repeats a validation that was cut short.
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
LOOK = 1.0  # seconds between checks of the file and the clock
TWICE = 0.5  # seconds within which two SIGINTs count as one ^C: from the terminal, and passed on by a launcher


class Stop:
    """A context manager in which signals request a stop instead of killing the process. Further signals change nothing,
    except that a second ^C ends the process at once."""

    def __init__(self, run: Path, margin: float) -> None:
        """margin: seconds before the end of the SLURM job at which to stop. Collective."""
        self.file = run / "STOP"
        ends = os.environ.get("SLURM_JOB_END_TIME", "")  # seconds since 1970
        self.until = float(ends) - margin if re.fullmatch(r"[0-9]{1,18}(\.[0-9]*)?", ends) else math.inf
        self.said = ""  # the last result of `agreed`
        self.parting: Callable[[], None] = lambda: None  # called before a second ^C ends the process
        self._asked = ""
        self._looked, self._interrupted = -math.inf, math.inf  # times of the last check and of the first ^C
        self._group = dist.new_group(backend="gloo") if distributed.world() > 1 else None
        self._flag = torch.zeros(1, dtype=torch.int32)
        self._pending: dist.Work | None = None

    def __enter__(self) -> "Stop":
        self._listener = process.Listener(self._hear, self._handle).__enter__()
        process.started()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            process.ended()
        self._listener.__exit__()

    def agreed(self) -> str:
        """Returns one of REASONS, the same on all ranks; "" to continue. Collective; called after each step or
        batch."""
        if self._group is None:
            self.said = self._look()
            return self.said
        if self._pending:
            self._pending.wait()
            self.said = REASONS[int(self._flag)]
        self._flag = torch.tensor([REASONS.index(self._look())], dtype=torch.int32)
        self._pending = dist.all_reduce(self._flag, dist.ReduceOp.MAX, self._group, async_op=True)
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
