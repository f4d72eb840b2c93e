"""The processes that decode: how their batches come to the rank, and how they end.

A worker puts a batch into shared memory, and only its place goes through a pipe. Where shared memory is full, as in a
container with 64 MB of it, the batch itself goes through the pipe: the same bits, a little later.
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
SPARED = 8 * 2**20  # bytes of it that batches leave to others: the semaphores of the next loader lie there, too
DYING = 5.0  # seconds from the first sign of a worker's death to its end, at most
_running: WeakSet[Any] = WeakSet()  # the iterators that have workers


def free_shared_memory(folder: Path = SHARED) -> int:
    """In bytes, for batches; 0 where there is none."""
    try:
        return max(0, shutil.disk_usage(folder).free - SPARED)
    except OSError:
        return 0


class Loader(DataLoader[Any]):
    """Items with a Batch as `batch`, one of each range of `ranges`: any iterable serves, an endless one too."""

    def __init__(self, slices: Any, ranges: Iterable[range], workers: int, prefetch: int, pin: bool) -> None:
        super().__init__(
            slices,
            sampler=ranges,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=prefetch if workers else None,
            collate_fn=_hand_over,  # without a batch size it is given one item, not a list
            pin_memory=pin,
            worker_init_fn=partial(_begin, os.getpid()),
        )

    def __iter__(self) -> Any:
        if not self.num_workers:
            yield from super().__iter__()
            return
        # When a worker dies torch raises in the midst of whatever training is at. The loader notices it, too.
        handler = signal.getsignal(signal.SIGCHLD)
        try:
            iterator: Any = super().__iter__()
        except OSError as error:  # no room for their semaphores, or no further process is allowed
            print(f"no loader's workers can be started ({error.strerror}): the rank decodes by itself", flush=True)
            yield from DataLoader(self.dataset, sampler=self.sampler, batch_size=None, collate_fn=_hand_over)
            return
        finally:
            # Elsewhere torch has set none. SIG_DFL counts as false; None is a handler that Python cannot set again.
            if handler is not None and current_thread() is main_thread():
                signal.signal(signal.SIGCHLD, handler)
        _running.add(iterator)
        try:
            for item in iterator:
                yield item._replace(batch=Batch(*(_received(part, self.pin_memory) for part in item.batch)))
        except (RuntimeError, OSError, EOFError) as error:  # what it had sent may be lost with it
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
    """A tensor as numbers in a pipe: its storage, and how it lies there, as channels_last does."""

    flat: np.ndarray
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _hand_over(item: Any) -> Any:
    return item._replace(batch=Batch(*map(_share, item.batch))) if get_worker_info() else item  # type: ignore[arg-type]


_full = False  # shared memory was, and this worker has said so


def _share(tensor: Tensor) -> "Tensor | _Copy":
    """Here and not in the thread that writes to the pipe: an error there would be lost, and the rank wait for ever."""
    global _full
    reason = os.strerror(errno.ENOSPC)
    try:
        if tensor.nbytes <= free_shared_memory():
            return tensor.share_memory_()
    except RuntimeError as error:
        reason = str(error).rpartition(": ")[2]
    if not _full:
        print(f"batches go through pipes, which is slower, for shared memory cannot be had ({reason})", flush=True)
    _full = True
    return _Copy(tensor.as_strided([tensor.numel()], [1]).numpy(), tuple(tensor.shape), tensor.stride())


def _received(part: "Tensor | _Copy", pin: bool) -> Tensor:
    if isinstance(part, Tensor):
        return part
    tensor = torch.from_numpy(part.flat).as_strided(part.shape, part.stride)
    return tensor.pin_memory() if pin else tensor


def _begin(parent: int, _: int) -> None:
    """In each worker."""
    process.die_with_parent(parent)
    torch.set_num_threads(1)
    # What asks the run to stop may reach the whole process group; the rank still needs its workers to end well.
    for number in process.SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    queues.Queue._on_queue_feeder_error = staticmethod(_lost)  # type: ignore[attr-defined]


def _lost(error: Exception, _: object) -> None:
    """A batch could not be sent. Only the worker's death tells the rank, which would wait for that batch for ever."""
    print(f"a batch cannot be sent ({type(error).__name__}: {error})", flush=True)
    os._exit(1)


def _end(iterator: Any) -> None:
    """Ask the workers to leave, and kill what does not, such as one that is stopped (SIGSTOP)."""
    if getattr(iterator, "ended", False):  # a generator that is left over is closed once more as Python exits
        return
    iterator.ended = True
    asking = Thread(target=iterator._shutdown_workers, daemon=True)  # it waits for ever for what such a one has begun
    asking.start()
    asking.join(DYING)
    for worker in iterator._workers:
        if worker.is_alive():
            worker.kill()
    asking.join(DYING)


@atexit.register
def _end_all() -> None:
    """An error keeps its loader alive until Python exits, which then ends the workers by SIGTERM and waits for them for
    ever: they do not heed it, see _begin."""
    for iterator in list(_running):
        _end(iterator)
