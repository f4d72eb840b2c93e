"""Only one training at a time may use a run directory, tested with real processes."""

import errno
import fcntl
import json
import os
import re
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from vaescale.config import ConfigError
from vaescale.distributed import Unjoined
from vaescale.lifecycle import lock
from vaescale.lifecycle.lock import InUse, Lock, held
from vaescale.lifecycle.status import Status


@contextmanager
def child(act: Callable[[], None]) -> Iterator[int]:
    """Forks a process that does something, reports it, and stays. Returns its id."""
    ready, said = os.pipe()
    pid = os.fork()
    if not pid:
        with suppress(BaseException):
            act()
            os.write(said, b"x")
            signal.pause()
        os._exit(1)
    os.close(said)
    try:
        assert os.read(ready, 1) == b"x"
        yield pid
    finally:
        os.close(ready)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(pid, 0)


def take(run: Path, take_over: bool = False) -> None:
    """Acquires and releases the lock."""
    with Lock(run, take_over) as one:
        one.acquire()
        assert json.loads((run / ".lock").read_text())["pid"] == os.getpid()  # reading it here drops it: the last thing
    assert (run / ".lock").read_text() == ""


def test_a_second_process_is_refused_and_the_first_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    with child(Lock(tmp_path).acquire) as pid:
        words = rf"in use by another training, process {pid} on {socket.gethostname()}, SLURM job 4711, since \d{{4}}-"
        for over in (False, True):
            with pytest.raises(InUse, match=words):
                Lock(tmp_path, over).acquire()
        assert held(tmp_path).startswith(f"process {pid} on ")
    assert held(tmp_path) == ""
    assert "4711" in (tmp_path / ".lock").read_text()  # it was killed
    take(tmp_path)
    take(tmp_path)


def test_a_killed_one_leaves_no_lock_though_its_workers_live_on(tmp_path: Path) -> None:
    """As loader workers do for some seconds; they were forked while it held the lock."""
    workers, said = os.pipe()

    def act() -> None:
        Lock(tmp_path).acquire()
        if not (worker := os.fork()):
            signal.pause()
        os.write(said, f"{worker}\n".encode())

    with child(act) as pid:
        worker = int(os.read(workers, 20))
        try:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os.kill(worker, 0)  # it lives
            take(tmp_path)
        finally:
            os.kill(worker, signal.SIGKILL)


def test_one_of_many_simultaneous_processes_gets_the_lock(tmp_path: Path) -> None:
    """In a run directory that does not exist yet."""
    run = tmp_path / "a" / "run"
    go, begin = os.pipe()
    results, answer = os.pipe()
    pids = []
    for _ in range(8):
        if not (pid := os.fork()):
            os.close(begin)
            os.read(go, 1)  # until all are there
            try:
                Lock(run).acquire()
                os.write(answer, b"1")
            except InUse:
                os.write(answer, b"0")
            except BaseException:
                os.write(answer, b"x")
            signal.pause()
        pids.append(pid)
    os.close(begin)
    try:
        said = b""
        while len(said) < len(pids):
            said += os.read(results, 8)
        assert sorted(said) == sorted(b"00000001")
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def left(run: Path, **values: Any) -> None:
    """Returns what a process on another host wrote into the file."""
    (run / ".lock").touch()
    holder = {"host": "node7", "boot": "another", "pid": 12, "job": "4711", "since": "2026-01-01 00:00:00 UTC"}
    inode = (run / ".lock").stat().st_ino
    (run / ".lock").write_text(json.dumps({**holder, "inode": inode, **values}))


def test_what_another_host_has_left_is_taken_over_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = (
        r"still locked by one that was killed, process 12 on node7, SLURM job 4711, since 2026-01-01 00:00:00 UTC: if "
        r"it no longer runs, start again with --take-over, or remove .*/\.lock$"
    )
    left(tmp_path)
    with pytest.raises(InUse, match=words):
        take(tmp_path)
    take(tmp_path, take_over=True)
    left(tmp_path)
    (tmp_path / ".lock").unlink()
    take(tmp_path)
    left(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "4712")
    with pytest.raises(InUse, match=words):
        take(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "4711")  # SLURM has ended the job before it starts it again
    take(tmp_path)


def test_what_is_left_by_a_process_of_this_host_is_taken_over(tmp_path: Path) -> None:
    """From before a reboot, from another container on the same kernel, and invalid content."""
    for values in ({"host": socket.gethostname()}, {"boot": lock._boot()}, {"inode": 3}, {"pid": "12"}):
        left(tmp_path, **values)
        take(tmp_path)
    for text in (b"", b"\xff\x00", b"[" * 5000, b"[]", b'{"pid": 1}'):
        (tmp_path / ".lock").write_bytes(text)
        take(tmp_path)


def test_a_copy_of_a_run_is_free(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    left(run)
    shutil.copytree(run, tmp_path / "copy")
    assert (tmp_path / "copy" / ".lock").read_text() == (run / ".lock").read_text()
    take(tmp_path / "copy")


def test_a_lock_that_another_host_holds_is_left_behind_on_request(tmp_path: Path) -> None:
    """A server may keep the lock of a client that is gone; a new file has a new lock."""

    def act() -> None:
        Lock(tmp_path).acquire()
        left(tmp_path)  # that opens the file and drops the lock
        os.set_blocking(file := os.open(tmp_path / ".lock", os.O_RDWR), False)
        fcntl.lockf(file, fcntl.LOCK_EX)

    with child(act):
        with pytest.raises(InUse, match="start again with --take-over"):
            take(tmp_path)
        take(tmp_path, take_over=True)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: int
) -> None:
    """Without locks, the content of the file decides."""

    def none(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "lockf", none)
    take(tmp_path)
    assert "is on a file system without locks: do not start a second training in it" in capsys.readouterr().out
    with child(Lock(tmp_path).acquire) as pid:
        with pytest.raises(InUse, match=f"process {pid} on"):
            take(tmp_path)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        take(tmp_path)


def test_a_directory_that_cannot_be_used_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "run" / ".lock").mkdir(parents=True)
    for run in ("file", "file/x", "file/x/y", "run"):
        with pytest.raises(ConfigError, match=r"cannot be used as the run directory \(.*\): make it writable") as told:
            Lock(tmp_path / run).acquire()
        assert not isinstance(told.value, InUse)
        assert held(tmp_path / run) == ""

    def read_only(path: Path, *_: object) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(ConfigError, match=re.escape(f"({tmp_path / '.lock'}: Read-only file system)")):
        Lock(tmp_path).acquire()


def test_one_that_fails_before_it_has_the_lock_leaves_the_others_status_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For example a second start with the port of the first."""
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: False)  # other tests of this process have joined
    Status(tmp_path, 0).begin(7)
    with child(Lock(tmp_path).acquire), pytest.raises(Unjoined), Status(tmp_path, 1).recording(lambda: 0):
        raise Unjoined("no port")
    assert Status(tmp_path, 0).read()["status"] == "running"
    with pytest.raises(Unjoined), Status(tmp_path, 1).recording(lambda: 0):
        raise Unjoined("no port")
    assert Status(tmp_path, 0).read()["status"] == "failed"


def test_a_process_that_exits_at_once_does_not_block_other_hosts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a hang or a second ^C, the file names no process, although the process keeps the lock until it ends."""

    def act() -> None:
        one = Lock(tmp_path)
        one.acquire()
        one.release()

    with child(act), pytest.raises(InUse):
        Lock(tmp_path).acquire()
    monkeypatch.setattr(lock, "_boot", lambda: "another kernel")
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    take(tmp_path)
