"""How a run is asked to stop: SIGTERM, SIGUSR1, SIGHUP or SIGINT (^C) to any rank, a file STOP in its directory, the
end of its SLURM job, or the death of its launcher, which watch.py finds.

After each step, and each batch of a validation, the ranks agree on what any of them has been asked, over gloo and
beside the work, so that no device waits: what is asked during one is known to all at the end of the next, and all save
the same step. A validation that was cut short is done again by the next life.
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
TWICE_INTERRUPTED = "a second SIGINT, and left at once"
LOOK = 1.0  # seconds between looks at the file and the clock
TWICE = 0.5  # seconds within which two SIGINTs are one ^C, of the terminal and of a launcher that passes it on


class Stop:
    """While it is entered, the signals ask for a stop instead of killing; a second one changes nothing, but a second ^C
    ends the process at once."""

    def __init__(self, run: Path, margin: float) -> None:
        """margin: seconds before the SLURM job's end. Collective."""
        self.file = run / "STOP"
        ends = os.environ.get("SLURM_JOB_END_TIME", "")  # seconds since 1970
        self.until = float(ends) - margin if re.fullmatch(r"[0-9]{1,18}(\.[0-9]*)?", ends) else math.inf
        self.said = ""  # what was agreed on last
        self.parting: Callable[[], None] = lambda: None  # what is done before a second ^C ends the process
        self._asked = ""
        self._looked, self._interrupted = -math.inf, math.inf  # when last; when first
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
        """After each step or batch, on all ranks: one of REASONS, the same for all; "" to go on."""
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
        """One of REASONS, from any thread; the first one stands."""
        self._asked = self._asked or why

    def heeded(self) -> None:
        """The run has stopped or ended, so the file has had its effect: the next start shall not stop for it."""
        if distributed.rank() == 0:
            try:
                self.file.unlink(missing_ok=True)
            except OSError as error:
                print(f"{self.file} cannot be removed ({error.strerror}): the next start will stop for it", flush=True)

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
        now = time.monotonic()  # the other clock may be set back
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
        except OSError:  # the file system may come back
            return False
