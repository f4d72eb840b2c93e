"""The environment of a process: the reader of its output, its launcher, and its signals.

Nothing slow is imported here. A command calls `start` before the seconds of its other imports, during which the
launcher may die or the user may press ^C.
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
INTERRUPTED_CODE, STOPPED_CODE = 130, 75  # exit codes: 128 + SIGINT; EX_TEMPFAIL
TICK = 0.5  # seconds between checks of the launcher
PARTING = 2.0  # seconds that the last action of an exiting process may take
SET_DEATH_SIGNAL = 1  # linux/prctl.h
LAUNCHERS = ("TORCHELASTIC_RUN_ID", "CROSS_RANK")  # variables that torchrun and DeepSpeed's launch.py set


class Listener:
    """A context manager in which a thread receives the signals and calls `hear`.

    This works even while the main thread waits in a collective, where no Python handler runs. Signals that are ignored
    (nohup, a background job) stay ignored. The main thread must enter it.
    """

    def __init__(
        self,
        hear: Callable[[int], None],
        handle: Callable[[int], None] = lambda number: None,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        """hear: called by the thread for each signal; handle: also called, by the main thread when it next can.

        tick: called by the thread every TICK seconds, and after signals.
        """
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
        os.write(self._signalled, b"\0")  # ends the thread; a close would not if a forked worker holds the pipe, too
        os.close(self._signalled)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _listen(self) -> None:
        ends = select.poll()  # unlike `select`, it takes descriptors above 1023, as of a process with many open shards
        ends.register(self._end, select.POLLIN)
        while True:
            if ends.poll(1000 * TICK):
                for number in os.read(self._end, 64):
                    if number == 0:
                        os.close(self._end)
                        return
                    if number in SIGNALS:  # handlers of other signals write to the pipe, too
                        self._hear(number)
            self._tick()


_masks: list[set[int | signal.Signals]] = []  # signal masks of the forking thread


def _before_fork() -> None:
    _masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS))


def _after_fork() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _masks.pop())


def _forked() -> None:
    """Removes the child's wakeup file descriptor: otherwise it would write its signals into its parent's pipe."""
    signal.set_wakeup_fd(-1)
    _after_fork()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_forked)


class _Start:
    """Ends a command at once on a signal: before training begins, when nothing is lost yet, and after a failure."""

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
            leave(STOPPED_CODE, "the launcher died before training began")


_begun: _Start | None = None


def start() -> None:
    """Makes a signal or the death of the launcher end the process at once, until `started` is called.

    The process prints one sentence and no traceback. A command calls this before anything else.
    """
    global _begun
    forgive_output()
    _begun = _Start()


def started() -> None:
    """Says that training begins, which handles signals and the launcher's death by itself."""
    if _begun:
        _begun.training = True


def ended() -> None:
    """Says that training has ended well and everything is saved: from now on only ^C ends the process."""
    if _begun:
        _begun.ended = True


def hand_over() -> None:
    """Stops listening: from now on the command handles signals by itself."""
    if _begun:
        _begun.listener.__exit__()


_runners: dict[int, int] = {}  # pid of DeepSpeed's launch.py → pid of `deepspeed`, which started it


def launcher() -> int:
    """Returns the pid of the launcher that waits for this rank, or 0 if there is none.

    A single process has none, because it may outlive its shell. Tasks started by srun have none, because SLURM ends
    them itself. Call this before distributed.init, which sets RANK even for one process.
    """
    return _begun.launcher if _begun else _parent()


def lost(launcher: int) -> bool:
    """Returns whether the launcher has died, or `deepspeed` has, without which its launch.py would go on."""
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
    """Returns the parent's pid, or 0 if the process `pid` has died."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _words(pid: int) -> list[bytes]:
    """Returns the command line of the process `pid`, or [] if it has died."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return []


def _adopted(parent: int) -> bool:
    """Returns whether the parent is not a launcher but a process that adopts orphans: init or launch/run.py.

    Then the launcher died before this process executed its first line. Returns False unless the environment names one
    of LAUNCHERS.
    """
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
    """Prints `why` and exits at once, from any thread. parting: called before the exit, for at most PARTING seconds."""
    rank = os.environ.get("RANK")
    say(f"{f'rank {rank}: ' if rank else ''}{why}")
    if parting:
        last = threading.Thread(target=parting, daemon=True)  # in a thread, since the file system may hang
        last.start()
        last.join(PARTING)
    os._exit(code)


def say(line: str) -> None:
    """Writes a line to stderr, without taking its lock and without failing if nobody reads it."""
    with suppress(OSError):
        os.write(2, f"{line}\n".encode())


def die_with_parent(parent: int) -> None:
    """Lets the kernel kill this process (SIGKILL) when the thread that forked it ends, even if it is stopped (SIGSTOP).

    parent: the pid of the parent. Exits at once if it has already died.
    """
    ctypes.CDLL(None).prctl(SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


class _Forgiving(io.FileIO):
    """A file that drops what cannot be written.

    The reader may be gone (EPIPE), the disk full (ENOSPC), the terminal closed (EIO) or not ready (EAGAIN).
    """

    def write(self, data: "memoryview | bytes") -> int:  # type: ignore[override]
        try:
            written = super().write(data)
        except OSError:
            written = None
        return len(data) if written is None else written


def forgive_output() -> None:
    """Replaces stdout and stderr so that neither a failed write, even at exit, nor an unencodable character raises."""
    while (spare := os.open(os.devnull, os.O_RDWR)) <= 2:  # else the next file could get a closed stdout's number
        pass
    os.close(spare)
    for number, name in ((1, "stdout"), (2, "stderr")):
        old = getattr(sys, name)
        if isinstance(getattr(getattr(old, "buffer", None), "raw", None), _Forgiving):
            continue
        if old is not None and not _is_file(old, number):
            continue  # it was replaced, for instance by a test runner
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
