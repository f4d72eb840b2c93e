"""Allows one training at a time in a run directory.

Rank 0 holds a lock on RUN/.lock while the run lasts, and writes its identity into the file. It is a POSIX lock (fcntl):
the kernel drops it when the process ends for any reason, and loader workers do not inherit it. An entry left behind by
a killed training on this host therefore does not block the next one. On a shared file system the lock may be visible on
its own host only. So an entry of a process on another host counts until that process clears it, or until the user
states that the process is gone.
"""

import errno
import fcntl
import json
import os
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .. import distributed
from ..config import ConfigError
from ..files import parse_json, printable

FILE = ".lock"
HELD = (errno.EACCES, errno.EAGAIN)
UNKNOWN = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # the file system has no locks
MOST = 4096  # bytes of the file that are read
FLOCK = "hhqqi"  # struct flock: type, whence, start, length, process
HOLDER = {"host": str, "boot": str, "pid": int, "job": str, "since": str, "inode": int}


class InUse(ConfigError):
    """Another training holds the run directory; the text says which one, and what to do."""


class Lock:
    """`acquire` takes the lock; leaving the `with` block releases it."""

    def __init__(self, run: Path, take_over: bool = False) -> None:
        """take_over: the user states that a holder on another host is gone."""
        self.run, self.path = run, run / FILE
        self.take_over = take_over
        self._descriptor = -1

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def release(self) -> None:
        """Clears the entry in the file; may be called from any thread. The kernel's lock stays until this process
        closes the file or ends."""
        if self._descriptor >= 0:
            try:
                os.ftruncate(self._descriptor, 0)
            except OSError as error:
                print(f"{self.path} still names this process ({error.strerror}): remove the file", flush=True)

    def acquire(self) -> None:
        """Creates the run directory and locks it. Collective. Raises InUse, or ConfigError if the directory cannot be
        created or written, on all ranks."""

        def take() -> None:
            self.run.mkdir(parents=True, exist_ok=True)
            while self._descriptor < 0:
                self._descriptor = self._taken()

        on_rank_0(self.run, take)

    def _taken(self) -> int:
        """Returns the locked file's descriptor; -1 if the file was replaced meanwhile. Raises InUse and OSError."""
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        try:
            kept = self._keep(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        if not kept:
            os.close(descriptor)
            return -1
        return descriptor

    def _keep(self, descriptor: int) -> bool:
        held = locks = True
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = False
        except OSError as error:
            if error.errno not in HELD + UNKNOWN:
                raise
            locks = error.errno in HELD
        holder = read_holder(descriptor)
        here = bool(holder) and (holder["boot"] == _boot() or holder["host"] == socket.gethostname())
        if locks and held:
            if not here and self.take_over:
                self.path.unlink()  # the other process then holds the lock of a deleted file
                return False
            raise InUse(self._refusal(holder, here))
        if not locks:
            held = here and Path(f"/proc/{holder['pid']}").exists()
            print(f"{self.run} is on a file system without locks: do not start a second training in it", flush=True)
        requeued = bool(holder) and holder["job"] != "" and holder["job"] == os.environ.get("SLURM_JOB_ID")
        gone = self.take_over or requeued or (here and not held)
        if holder and not gone:
            raise InUse(self._refusal(holder, here))
        if self.path.stat().st_ino != os.fstat(descriptor).st_ino:
            return False
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(_self(descriptor)).encode() + b"\n", 0)
        return True

    def _refusal(self, holder: dict[str, Any], here: bool) -> str:
        who = described(holder)
        if here or not holder:
            stop = f"wait until it ends, or stop it with `touch {self.run / 'STOP'}`, or give another run=…"
            return f"{self.run} is in use by another training, {who}: {stop}"
        return (
            f"{self.run} is in use by another training, or still locked by one that was killed, {who}: if it no longer "
            f"runs, start again with --take-over, or remove {self.path}"
        )


def held(run: Path) -> str:
    """Returns a description of the lock's holder; "" if there is none. The holder itself must not call this: closing
    the file would drop its lock."""
    try:
        descriptor = os.open(run / FILE, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        answer = fcntl.fcntl(descriptor, fcntl.F_GETLK, struct.pack(FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
        if struct.unpack(FLOCK, answer)[0] == fcntl.F_UNLCK:
            return ""
        return described(read_holder(descriptor))
    except OSError:
        return ""
    finally:
        os.close(descriptor)


def read_holder(descriptor: int) -> dict[str, Any]:
    """Returns the entry in the file; {} if it is missing or invalid, or if the file is a copy (another inode)."""
    try:
        found = parse_json(os.pread(descriptor, MOST, 0))
    except ValueError:
        return {}
    sound = isinstance(found, dict) and all(isinstance(found.get(name), kind) for name, kind in HOLDER.items())
    return found if sound and found["inode"] == os.fstat(descriptor).st_ino else {}


def described(holder: dict[str, Any]) -> str:
    if not holder:
        return "which is just starting"
    job = f", SLURM job {holder['job']}" if holder["job"] else ""
    return printable(f"process {holder['pid']} on {holder['host']}{job}, since {holder['since']}", 300)


def on_rank_0(run: Path, act: Callable[[], object]) -> None:
    """Runs `act` on rank 0. If it raises InUse or ConfigError, all ranks raise the same; if it raises OSError, all
    ranks raise ConfigError with a sentence about the run directory. Collective."""
    error, used = "", False
    if distributed.rank() == 0:
        try:
            act()
        except ConfigError as wrong:
            error, used = str(wrong), isinstance(wrong, InUse)
        except OSError as wrong:
            where = f"{wrong.filename}: " if wrong.filename and str(wrong.filename) != str(run) else ""
            error = (
                f"{run} cannot be used as the run directory ({where}{wrong.strerror or wrong}): make it writable, free "
                f"disk space, or give another run=…"
            )
    error, used = distributed.tell([error, used])
    if error:
        raise InUse(error) if used else ConfigError(error)


def _self(descriptor: int) -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "boot": _boot(),
        "pid": os.getpid(),
        "job": os.environ.get("SLURM_JOB_ID", ""),
        "since": time.strftime("%F %T %Z"),
        "inode": os.fstat(descriptor).st_ino,
    }


def _boot() -> str:
    """Returns the boot ID, which identifies a running kernel: containers on one host share it."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
