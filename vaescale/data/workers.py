"""The decoding processes of a rank: how they send batches, and how they end.

A worker puts a batch into shared memory and sends only a handle through a pipe. If shared memory is full, as in a
container with 64 MB of it, the worker sends the batch itself through the pipe. The result is the same, a little later.
"""

import atexit
import errno
import os
import shutil
import signal
from collections.abc import Iterable
from functools import partial
from multiprocessing import queues
from multiprocessing.connection import wait
from pathlib import Path
from threading import Thread, current_thread, main_thread
from typing import Any, NamedTuple
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from .. import process
from ..interfaces import Batch
from . import DataError

SHARED = Path("/dev/shm")
SPARED = 8 * 2**20  # bytes of it that batches leave free, for instance for the semaphores of the next loader
DYING = 5.0  # seconds to wait for a worker to end
_running: WeakSet[Any] = WeakSet()  # the iterators that have workers


def free_shared_memory(folder: Path = SHARED) -> int:
    """Returns the bytes of shared memory that batches may use; 0 if there is none."""
    try:
        return max(0, shutil.disk_usage(folder).free - SPARED)
    except OSError:
        return 0


class Loader(DataLoader[Any]):
    """Yields slices[range] for each range in `ranges`, an iterable that may be endless.

    The items have a field `batch`, a Batch. Raises DataError if a worker dies.
    """

    def __init__(self, slices: Any, ranges: Iterable[range], workers: int, prefetch: int, pin: bool) -> None:
        super().__init__(
            slices,
            sampler=ranges,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=prefetch if workers else None,
            collate_fn=_hand_over,  # without a batch size it gets one item, not a list
            pin_memory=pin,
            worker_init_fn=partial(_begin, os.getpid()),
        )

    def __iter__(self) -> Any:
        if not self.num_workers:
            yield from super().__iter__()
            return
        # When a worker dies, torch's SIGCHLD handler raises at an arbitrary point of the training. The loop below
        # notices the death, too, so the previous handler is restored.
        handler = signal.getsignal(signal.SIGCHLD)
        try:
            iterator: Any = super().__iter__()
        except OSError as error:  # no space for the semaphores, or the limit of processes is reached
            print(
                f"loader workers cannot be started ({error.strerror}): this process decodes instead, which is slower",
                flush=True,
            )
            yield from DataLoader(self.dataset, sampler=self.sampler, batch_size=None, collate_fn=_hand_over)
            return
        finally:
            # In other threads torch has not set a handler. None: a handler that Python cannot set again.
            if handler is not None and current_thread() is main_thread():
                signal.signal(signal.SIGCHLD, handler)
        _running.add(iterator)
        try:
            for item in iterator:
                yield item._replace(batch=Batch(*(_received(part, self.pin_memory) for part in item.batch)))
        except (RuntimeError, OSError, EOFError) as error:  # a dead worker's batches may be lost with it
            ended = wait([worker.sentinel for worker in iterator._workers], DYING)
            dead = [worker for worker in iterator._workers if worker.sentinel in ended]
            for worker in dead:
                worker.join(DYING)
            if not any(worker.exitcode for worker in dead):
                raise
            pids = ", ".join(str(worker.pid) for worker in dead)
            raise DataError(
                f"DataLoader worker (pid {pids}) was killed: if memory ran out, lower data.workers or data.prefetch"
            ) from error
        finally:
            _end(iterator)


class _Copy(NamedTuple):
    """A tensor that goes through the pipe: its elements in memory order, and shape and stride (for channels_last)."""

    flat: np.ndarray
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _hand_over(item: Any) -> Any:
    return item._replace(batch=Batch(*map(_share, item.batch))) if get_worker_info() else item  # type: ignore[arg-type]


_full = False  # shared memory was full, and this worker has reported it


def _share(tensor: Tensor) -> "Tensor | _Copy":
    """Moves a tensor to shared memory, or copies it if there is no space.

    The thread that writes to the pipe would do this, too, but an error there is lost, and the rank would wait forever.
    """
    global _full
    reason = os.strerror(errno.ENOSPC)
    try:
        if tensor.nbytes <= free_shared_memory():
            return tensor.share_memory_()
    except RuntimeError as error:
        reason = str(error).rpartition(": ")[2]
    if not _full:
        print(f"shared memory is not available ({reason}): batches go through pipes, which is slower", flush=True)
    _full = True
    return _Copy(tensor.as_strided([tensor.numel()], [1]).numpy(), tuple(tensor.shape), tensor.stride())


def _received(part: "Tensor | _Copy", pin: bool) -> Tensor:
    if isinstance(part, Tensor):
        return part
    tensor = torch.from_numpy(part.flat).as_strided(part.shape, part.stride)
    return tensor.pin_memory() if pin else tensor


def _begin(parent: int, _: int) -> None:
    """Sets up a worker."""
    process.die_with_parent(parent)
    torch.set_num_threads(1)
    # A signal to stop may reach the whole process group, but the rank needs its workers until it has finished.
    for number in process.SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    queues.Queue._on_queue_feeder_error = staticmethod(_lost)  # type: ignore[attr-defined]


def _lost(error: Exception, _: object) -> None:
    """Exits, because a batch could not be sent. Without the worker's death the rank would wait for it forever."""
    print(f"a batch cannot be sent ({type(error).__name__}: {error})", flush=True)
    os._exit(1)


def _end(iterator: Any) -> None:
    """Asks the workers to exit, and kills those that do not, such as one that is stopped (SIGSTOP)."""
    if getattr(iterator, "ended", False):  # Python closes remaining generators once more at exit
        return
    iterator.ended = True
    asking = Thread(target=iterator._shutdown_workers, daemon=True)  # may wait forever for a stopped worker
    asking.start()
    asking.join(DYING)
    for worker in iterator._workers:
        if worker.is_alive():
            worker.kill()
    asking.join(DYING)


@atexit.register
def _end_all() -> None:
    """Kills all workers before Python exits.

    An error keeps its loader alive until then. At exit Python would send SIGTERM to the workers, which ignore it (see
    _begin), and wait for them forever. They are not asked first, as in `_end`: from Python 3.12 on, no thread can be
    started at exit.
    """
    for iterator in list(_running):
        iterator.ended = True
        for worker in iterator._workers:
            worker.kill()
