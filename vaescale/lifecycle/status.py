"""Writes run_status.json, the status of a run for people, schedulers and the run's next process.

    {"status": …, "code": …, "why": …, "rank": …, "step": …, "time": …, "failures": […]}

The exit code of a launcher is unreliable: some launchers lose their ranks' codes, and some exit with 0 after a rank was
killed. So the file holds the exit code as well, and launch/run.py returns it.
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
PREEMPTED_CODE, NO_PROGRESS_CODE = STOPPED_CODE, 93  # the first: run the same command again; the second: do not requeue
CODES = {RUNNING: None, FINISHED: 0, PREEMPTED: PREEMPTED_CODE, NO_PROGRESS: NO_PROGRESS_CODE}
SAME = 3  # identical failures in a row at one step after which another attempt is expected to fail too


class Diverged(RuntimeError):
    """Training cannot continue; the text says why and what to do. Raised on all ranks alike."""

    exit_code = 3


class NoProgress(RuntimeError):
    """The run has repeatedly failed in the same way at the same step; the text says how."""

    exit_code = NO_PROGRESS_CODE


class Status:
    """The status of one process (attempt) of a run. A process that is killed leaves "running" behind."""

    def __init__(self, run: Path, rank: int) -> None:
        self.path = run / FILE
        self.rank = rank
        self._earlier = self.read()  # written by an earlier process

    def begin(self, step: int) -> None:
        """Writes "running". Called on rank 0. Keeps the failures of earlier processes. Raises OSError."""
        self._write(RUNNING, "", step, self.read().get("failures", []))

    def end(self, status: str, why: str, step: int) -> None:
        """Writes that the run has finished or was preempted. Called on rank 0, after everything is saved, so a status
        that cannot be written is only printed."""
        found = self.read()
        try:
            if [found.get(key) for key in ("status", "code", "why", "step")] == [status, CODES[status], why, step]:
                os.utime(self.path)  # tells launch/run.py that the status is this process's
            else:
                self._write(status, why, step, [])
        except OSError as error:
            print(
                f"{self.path} cannot be written ({error.strerror}); it should say {status} at step {step}", flush=True
            )

    def interrupted(self, why: str, step: int) -> None:
        """Writes that the user has ended the run at once. This is not a failure, but loses the progress since the last
        save. Called on the rank that exits."""
        self._write(PREEMPTED, why, step, self.read().get("failures", []), INTERRUPTED_CODE)

    @contextmanager
    def recording(self, step: Callable[[], int]) -> Iterator[None]:
        """Records the exception that ends the block, on any rank. step: returns the steps taken so far. Raises
        NoProgress instead of an exception that has repeatedly ended the run at this step."""
        try:
            yield
        except BaseException as error:
            # The file belongs to another training. Before the process group exists, this one cannot hold the lock yet.
            if isinstance(error, InUse) or (not dist.is_initialized() and held(self.path.parent)):
                raise
            said = f"{type(error).__name__}: {error}"
            at, same = step(), False
            with suppress(OSError):  # for example a full disk must not hide the original error
                same = self.fail(said, at, getattr(error, "exit_code", 1))
            if same:
                raise NoProgress(f"the run has failed {SAME} times in a row at step {at} with {said}") from error
            raise

    def fail(self, why: str, step: int, code: int = 1) -> bool:
        """Writes the failure of this rank, which exits with `code`. If another rank has already written one, that one
        stays. Returns whether the status is now no-progress, after SAME identical failures. Errors that the user must
        fix (code 2) do not count, because nothing retries them."""
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
        """Returns the status, with its time of writing in ns as "written"; {} if the file is missing or invalid."""
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
    """Returns whether all values are present and of the right type."""
    if not isinstance(found, dict):
        return False
    types = {"status": str, "code": int | None, "why": str, "rank": int, "step": int, "failures": list}
    return (
        all(name in found and isinstance(found[name], kind) for name, kind in types.items())
        and found["status"] in (*CODES, FAILED)
        and all(isinstance(failure, dict) for failure in found["failures"])
    )
