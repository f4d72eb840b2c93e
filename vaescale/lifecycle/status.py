"""run_status.json: how a run stands, for people, schedulers and its next life.

    {"status": …, "code": …, "why": …, "rank": …, "step": …, "failures": […]}

A launcher's exit code tells less: some lose their ranks' codes, and some end with 0 where a rank was killed. So the
code stands here too, and launch/run.py returns it.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ..config import ConfigError
from ..files import read_json
from ..process import INTERRUPTED_CODE, STOPPED_CODE
from .lock import InUse, held

FILE = "run_status.json"
RUNNING, FINISHED, PREEMPTED, FAILED, NO_PROGRESS = "running", "finished", "preempted", "failed", "no-progress"
HUNG_CODE = 4
PREEMPTED_CODE, NO_PROGRESS_CODE = STOPPED_CODE, 93  # run the same command again; do not requeue
CODES = {RUNNING: None, FINISHED: 0, PREEMPTED: PREEMPTED_CODE, NO_PROGRESS: NO_PROGRESS_CODE}
SAME = 3  # failures in a row, alike and at one step, after which another life would end likewise


class Diverged(RuntimeError):
    """Training cannot go on; the text says why and what to do. The same on all ranks."""

    exit_code = 3


class NoProgress(RuntimeError):
    """The same failure at the same step, time and again; the text says which."""

    exit_code = NO_PROGRESS_CODE


class Status:
    """Of one life of a run. A life that is killed leaves "running"."""

    def __init__(self, run: Path, rank: int) -> None:
        self.path = run / FILE
        self.rank = rank
        self._earlier = self.read()  # an earlier life's word

    def begin(self, step: int) -> None:
        """On rank 0. Raises OSError. What earlier lives failed of is kept until this one comes further."""
        self._write(RUNNING, "", step, self.read().get("failures", []))

    def end(self, status: str, why: str, step: int) -> None:
        """On rank 0: finished or preempted. All is saved by now, so a status that cannot be written is only said."""
        found = self.read()
        try:
            if [found.get(key) for key in ("status", "code", "why", "step")] == [status, CODES[status], why, step]:
                os.utime(self.path)  # launch/run.py sees from it that this process has had its word
            else:
                self._write(status, why, step, [])
        except OSError as error:
            print(
                f"{self.path} cannot be written ({error.strerror}), and should say {status} at step {step}", flush=True
            )

    def interrupted(self, why: str, step: int) -> None:
        """On the rank that leaves at once, as its user wants: no failure, and no progress since the last save."""
        self._write(PREEMPTED, why, step, self.read().get("failures", []), INTERRUPTED_CODE)

    @contextmanager
    def recording(self, step: Callable[[], int]) -> Iterator[None]:
        """What ends the run here is written down, on whichever rank, with so many steps taken. Raises NoProgress in
        place of what has ended it there the last times, too."""
        try:
            yield
        except BaseException as error:
            # The file is that of another training. Before the ranks have met none of this one's can hold the lock.
            if isinstance(error, InUse) or (not dist.is_initialized() and held(self.path.parent)):
                raise
            said = f"{type(error).__name__}: {error}"
            at, same = step(), False
            with suppress(OSError):  # a full disk, say, shall not hide what it is about
                same = self.fail(said, at, getattr(error, "exit_code", 1))
            if same:
                raise NoProgress(f"{SAME} times in a row the run has ended at step {at} with {said}") from error
            raise

    def fail(self, why: str, step: int, code: int = 1) -> bool:
        """On the rank that failed and leaves with this code; the first one's word stands. True if this run will not
        get further so. What the user has been told to mend (2) is not counted: nothing else will try again."""
        before = self.read()
        if before and before != self._earlier and before["status"] != RUNNING:
            return bool(before["status"] == NO_PROGRESS)
        failure = {"step": step, "why": why}
        failures, counts = before.get("failures", []), code != ConfigError.exit_code
        if counts:
            failures = [*failures, failure] if failures and failures[-1] == failure else [failure]
        status = NO_PROGRESS if counts and len(failures) >= SAME else FAILED
        self._write(status, why, step, failures, code)
        return status == NO_PROGRESS

    def read(self) -> dict[str, Any]:
        """{} if there is none, or none that can be read and makes sense. "written": when it was, in ns."""
        try:
            found = read_json(self.path)
            written = self.path.stat().st_mtime_ns
        except (OSError, ValueError):
            return {}
        return {**found, "written": written} if _sound(found) else {}

    def _write(self, status: str, why: str, step: int, failures: list[dict[str, Any]], code: int = 0) -> None:
        said = {
            "status": status,
            "code": CODES.get(status, code) if code != INTERRUPTED_CODE else code,
            "why": why,
            "rank": self.rank,
            "step": step,
            "time": round(time.time()),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f".{FILE}-{self.rank}")
        partial.write_text(json.dumps({**said, "failures": failures}, indent=1) + "\n")
        partial.replace(self.path)


def _sound(found: Any) -> bool:
    """Whether each value is of the type that is written; one that is missing is not."""
    if not isinstance(found, dict):
        return False
    types = {"status": str, "code": int | None, "why": str, "rank": int, "step": int, "failures": list}
    return (
        all(name in found and isinstance(found[name], kind) for name, kind in types.items())
        and found["status"] in (*CODES, FAILED)
        and all(isinstance(failure, dict) for failure in found["failures"])
    )
