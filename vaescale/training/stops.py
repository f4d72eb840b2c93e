"""How a run is asked to stop: SIGTERM or SIGUSR1 to any rank, a file STOP in its directory, the end of its SLURM job,
or the death of its launcher, which watch.py finds.

After each step, and each batch of a validation, the ranks agree on what any of them has been asked, over gloo and
beside the work, so that no device waits: what is asked during one is known to all at the end of the next, and all save
the same step. A validation that was cut short is done again by the next life.
"""

import os
import signal
import time
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from .. import distributed

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
REASONS = ("", "SIGTERM", "SIGUSR1", "the file STOP", "the end of the SLURM job", "the death of its launcher")
FILE, JOB_ENDS, LAUNCHER = REASONS[3:]
LOOK = 1.0  # seconds between looks at the file and the clock


class Stop:
    """While it is entered, the signals ask for a stop instead of killing; a second one changes nothing."""

    def __init__(self, run: Path, margin: float) -> None:
        """margin: seconds before the SLURM job's end. Collective."""
        self.file = run / "STOP"
        ends = os.environ.get("SLURM_JOB_END_TIME")  # seconds since 1970
        self.until = float(ends) - margin if ends else float("inf")
        self.said = ""  # what was agreed on last
        self._asked = ""
        self._looked = 0.0
        self._group = dist.new_group(backend="gloo") if distributed.world() > 1 else None
        self._flag = torch.zeros(1, dtype=torch.int32)
        self._pending: dist.Work | None = None

    def __enter__(self) -> "Stop":
        self._before = {number: signal.signal(number, self._hear) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

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
        """The file has had its effect: the next life shall not stop for it."""
        if distributed.rank() == 0:
            self.file.unlink(missing_ok=True)

    def _hear(self, number: int, _: FrameType | None) -> None:
        self.ask(signal.Signals(number).name)

    def _look(self) -> str:
        now = time.time()
        if not self._asked and now - self._looked > LOOK:
            self._looked = now
            if now > self.until:
                self._asked = JOB_ENDS
            elif distributed.rank() == 0 and self.file.exists():
                self._asked = FILE
        return self._asked
