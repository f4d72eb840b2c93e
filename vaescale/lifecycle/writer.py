"""Writes checkpoints in parallel with training: a step waits only for the copy to the host and for the previous save.

    save       all ranks gather copies in rank 0's host memory; there a thread checks that they are finite and writes
    collect    all ranks learn the outcome: at every report, before the next save, and at the end

A full disk costs one checkpoint, not the run: the previous one is untouched, and the next save tries again.
"""

import copy
import os
import shutil
from collections.abc import Callable, Container
from pathlib import Path
from threading import Thread
from typing import Any

import torch

from .. import distributed
from ..files import readable_size
from ..interfaces import Tensors
from ..monitoring.console import Console
from . import checkpoint
from .checkpoint import CheckpointError
from .status import Diverged

PATIENCE = 2  # failed saves in a row that stop the run


class Writer:
    def __init__(self, folder: Path, keep: int, keep_every: int, console: Console) -> None:
        self.folder = folder
        self.keep, self.keep_every = keep, keep_every
        self.console = console
        self._thread: Thread | None = None  # on rank 0, until its outcome is known
        self._failed = ""  # why the last save failed, until it is reported
        self._failures = 0  # failed saves in a row
        self._diverged = False  # whether the last save failed because a tensor was not finite

    def check_room(self, size: int, steps: int) -> None:
        """Raises CheckpointError if the run's checkpoints do not fit on the disk or cannot be written. size: bytes of
        one checkpoint; steps: of the whole run. Collective."""
        error = ""
        if distributed.rank() == 0:
            count = self.keep + 1 + (steps // self.keep_every if self.keep_every else 0)
            held = sum(file.stat().st_size for file in self.folder.glob("step-*/*") if file.is_file())
            parents = [self.folder, *self.folder.absolute().parents]
            there = next(path for path in parents if os.path.lexists(path))
            free = shutil.disk_usage(there).free if there.exists() else 0
            if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
                error = f"checkpoints cannot be saved in {self.folder}: {there} is not a writable folder"
            elif free + held < count * size:
                error = (
                    f"{count} checkpoints of {readable_size(size)} (keep_last={self.keep}, one being written"
                    f"{f', and those of keep_every={self.keep_every}' if self.keep_every else ''}) do not fit into "
                    f"{self.folder}: {readable_size(free)} are free, and existing checkpoints take "
                    f"{readable_size(held)}: free disk space, lower keep_last, raise keep_every, or give another run=…"
                )
        if error := distributed.tell(error):
            raise CheckpointError(error)

    def save(
        self, step: int, tensors: Callable[[], dict[str, Tensors]], state: dict[str, Any], buffers: Container[str]
    ) -> None:
        """Starts to save a checkpoint. Collective.

        tensors: returns the tensors by file on rank 0, copies in host memory; called once the previous save has ended,
        so that there is one copy at a time. buffers: names of the tensors that may hold infinities (but not NaN), as
        bounds do before they have seen data. If others are not finite, nothing is saved, and `collect` raises Diverged.
        """
        self.collect(wait=True)
        held = tensors()
        if distributed.rank() == 0:
            given = (step, held, copy.deepcopy(state), buffers)
            self._thread = Thread(target=self._write, args=given, name="checkpoint")
            self._thread.start()

    def collect(self, wait: bool, last: bool = False) -> None:
        """Reports a failed save. Raises CheckpointError, on all ranks, if it is the second in a row or the last one,
        and Diverged if a tensor was not finite. Collective. wait: until the save has ended; otherwise a save in
        progress is skipped.
        """
        failed = self._join() if wait or not (self._thread and self._thread.is_alive()) else ""
        failed, failures, diverged = distributed.tell([failed, self._failures, self._diverged])
        if not failed:
            return
        if diverged:
            raise Diverged(failed)
        if last or failures >= PATIENCE:
            why = "it was the last one" if last else f"{failures} saves in a row have failed"
            raise CheckpointError(f"{failed}, and {why}: free disk space in {self.folder}, then run the same command")
        self.console.say(f"{failed}; earlier checkpoints are intact, and training continues until the next save")

    def close(self) -> None:
        """Finishes the save in progress, however the run ended. Not collective."""
        if failed := self._join():
            self.console.say(failed)

    def _join(self) -> str:
        """Waits for the save in progress. Returns why the last save failed, only once; "" if it did not."""
        if self._thread:
            self._thread.join()
            self._thread = None
        failed, self._failed = self._failed, ""
        return failed

    def _write(self, step: int, tensors: dict[str, Tensors], state: dict[str, Any], buffers: Container[str]) -> None:
        try:
            if spoilt := unsound(tensors, buffers):
                self._diverged = True
                self._failed = (
                    f"the checkpoint of step {step} is not written, because {spoilt} is not finite: run the same "
                    f"command to continue from the previous one, with a lower optimizer.lr or more "
                    f"optimizer.warmup_steps"
                )
                return
            checkpoint.save(self.folder, step, tensors, state, self.keep, self.keep_every)
            self._failures = 0
        except Exception as error:  # an exception in a thread would be lost
            cause = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            self._failed = f"the checkpoint of step {step} could not be written ({cause})"
            self._failures += 1


def unsound(tensors: dict[str, Tensors], buffers: Container[str]) -> str:
    """Returns a description of the first tensor that is not finite; "" if there is none. `buffers` may be infinite but
    not NaN."""
    for file, values in tensors.items():
        for name, value in values.items():
            if value.is_floating_point() and value.numel():
                ends = torch.stack(value.aminmax())  # NaN if any value is; needs no tensor of the same size
                if (ends.isnan() if name in buffers else ~ends.isfinite()).any():
                    return f"{name} of {file}.safetensors"
    return ""
