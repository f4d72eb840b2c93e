"""A process and what surrounds it: the reader of its output, its launcher, and the signals that it gets.

It imports nothing that takes time: `start` is called before the seconds of imports in which a launcher may die and a
user may press ^C.
"""

import ctypes
import io
import os
import select
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
INTERRUPTED_CODE, STOPPED_CODE = 130, 75  # 128 + SIGINT; EX_TEMPFAIL
TICK = 0.5  # seconds between looks at the launcher
PARTING = 2.0  # seconds that the last word of a process that leaves at once may take
SET_DEATH_SIGNAL = 1  # linux/prctl.h
LAUNCHERS = ("TORCHELASTIC_RUN_ID", "CROSS_RANK")  # variables that torchrun and DeepSpeed's launch.py set


class Listener:
    """While it is entered, a thread hears the signals and calls `hear`: even while the main thread waits in a
    collective, where no Python handler runs. What is ignored (nohup, a job in the background) stays ignored. To be
    entered by the main thread."""

    def __init__(
        self,
        hear: Callable[[int], None],
        handle: Callable[[int], None] = lambda number: None,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        """handle: called, too, by the main thread as soon as it can be; tick: by the other one, every TICK seconds."""
        self._hear, self._handle, self._tick = hear, handle, tick

    def __enter__(self) -> "Listener":
        self._end, self._signalled = os.pipe()
        os.set_blocking(self._signalled, False)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        self._outer = signal.set_wakeup_fd(self._signalled, warn_on_full_buffer=False)
        heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, lambda number, _: self._handle(number)) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._outer)
        os.write(self._signalled, b"\0")  # closing it is no end while a forked worker holds it, too
        os.close(self._signalled)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _listen(self) -> None:
        while True:
            ready, _, _ = select.select([self._end], [], [], TICK)
            if ready:
                for number in os.read(self._end, 64):
                    if number == 0:
                        os.close(self._end)
                        return
                    if number in SIGNALS:  # others may have handlers that wake us, too
                        self._hear(number)
            self._tick()


_masks: list[set[int | signal.Signals]] = []  # of the thread that forks


def _before_fork() -> None:
    _masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS))


def _after_fork() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _masks.pop())


def _forked() -> None:
    """What the child hears, it would otherwise write into its parent's pipe."""
    signal.set_wakeup_fd(-1)
    _after_fork()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_forked)


class _Start:
    """What ends a command at once before training begins, when nothing is lost yet, and after it has failed."""

    def __init__(self) -> None:
        self.launcher = _parent()
        self.training = self.ended = False
        self.listener = Listener(self._hear, tick=self._look).__enter__()
        self._look()

    def _hear(self, number: int) -> None:
        name = signal.Signals(number).name
        if number == signal.SIGINT:
            leave(INTERRUPTED_CODE, "interrupted")
        elif not self.ended:
            leave(STOPPED_CODE, f"ended by {name}" if self.training else f"ended by {name} before training began")

    def _look(self) -> None:
        if not self.training and self.launcher and (lost(self.launcher) or _adopted(self.launcher)):
            leave(STOPPED_CODE, "the launcher has died before training began")


_begun: _Start | None = None


def start() -> None:
    """The first thing that a command does. From then on a signal, or the death of the launcher, ends the
    process at once, in one sentence and without a traceback, until `started` is called."""
    global _begun
    forgive_output()
    _begun = _Start()


def started() -> None:
    """Training begins, and has its own ways to stop."""
    if _begun:
        _begun.training = True


def ended() -> None:
    """Training has ended well and all is saved: only ^C still ends the process."""
    if _begun:
        _begun.ended = True


def hand_over() -> None:
    """The command hears signals by itself from now on."""
    if _begun:
        _begun.listener.__exit__()


_runners: dict[int, int] = {}  # DeepSpeed's launch.py → `deepspeed`, which has begun it and should outlive it


def launcher() -> int:
    """The process that waits for this rank. 0 if there is none: a shell may go while its one process stays, and SLURM
    ends what it began by itself. To be called before distributed.init, which gives one process a rank, too."""
    return _begun.launcher if _begun else _parent()


def lost(launcher: int) -> bool:
    """Whether it has died; or `deepspeed` has, whose launch.py would go on without it."""
    return os.getppid() != launcher or (launcher in _runners and _parent_of(launcher) != _runners[launcher])


def _parent() -> int:
    if "RANK" not in os.environ:
        return 0
    found = os.getppid()
    runner = _parent_of(found) if "CROSS_RANK" in os.environ else 0
    if any(word.endswith(b"/deepspeed") for word in _words(runner)[:2]):
        _runners[found] = runner
    return found


def _parent_of(pid: int) -> int:
    """0 if it has died."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _words(pid: int) -> list[bytes]:
    """Its command line; [] if it has died."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return []


def _adopted(parent: int) -> bool:
    """Whether the parent is nobody's launcher but whoever adopts orphans: init, or launch/run.py. The launcher has
    died then before this process had executed a line. Told only where the environment names a known launcher."""
    if not any(name in os.environ for name in LAUNCHERS):
        return False
    words = _words(parent)
    wrapper = any(word.endswith(b"launch/run.py") for word in words[:3])
    return (
        wrapper
        or (parent == 1 and b"python" not in b" ".join(words))
        or any(word.endswith(b"systemd") for word in words[:1])
    )


def leave(code: int, why: str, parting: Callable[[], None] | None = None) -> None:
    """End this process now, from any thread. parting: what is done before, if it does not take long."""
    rank = os.environ.get("RANK")
    say(f"{f'rank {rank}: ' if rank else ''}{why}")
    if parting:
        last = threading.Thread(target=parting, daemon=True)  # the file system may hang
        last.start()
        last.join(PARTING)
    os._exit(code)


def say(line: str) -> None:
    """To stderr, whoever holds its lock and whether anybody reads it."""
    with suppress(OSError):
        os.write(2, f"{line}\n".encode())


def die_with_parent(parent: int) -> None:
    """This process ends by SIGKILL as soon as the thread that has forked it ends, even if it is stopped (SIGSTOP)."""
    ctypes.CDLL(None).prctl(SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it has died before
        os._exit(1)


class _Forgiving(io.FileIO):
    """What cannot be written is dropped: the reader is gone (EPIPE), the disk is full (ENOSPC), the terminal is closed
    (EIO), or it takes nothing now (EAGAIN)."""

    def write(self, data: "memoryview | bytes") -> int:  # type: ignore[override]
        try:
            written = super().write(data)
        except OSError:
            written = None
        return len(data) if written is None else written


def forgive_output() -> None:
    """No failure of stdout or stderr raises any more, at exit neither, and no character that they cannot encode."""
    while (spare := os.open(os.devnull, os.O_RDWR)) <= 2:  # a closed stdout's number would be given to the next file
        pass
    os.close(spare)
    for number, name in ((1, "stdout"), (2, "stderr")):
        old = getattr(sys, name)
        if isinstance(getattr(getattr(old, "buffer", None), "raw", None), _Forgiving):
            continue
        if old is not None and not _is_file(old, number):
            continue  # somebody has put something else there, as test runners do
        with suppress(OSError):
            if old is not None:
                old.flush()
        raw: Any = _Forgiving(number, "w", closefd=False)
        new = io.TextIOWrapper(
            io.BufferedWriter(raw),
            encoding=getattr(old, "encoding", None) or "utf-8",
            errors="backslashreplace",
            line_buffering=True,
        )
        setattr(sys, name, new)


def _is_file(stream: object, number: int) -> bool:
    try:
        return stream.fileno() == number  # type: ignore[attr-defined]
    except (AttributeError, OSError, ValueError):
        return False
