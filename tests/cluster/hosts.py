"""Hosts on one machine: each is a process in its own PID, mount and UTS namespaces, with a name and a loopback address.

Ending that process is like a power cut: everything on the host ends with it.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

SOON = 60.0  # seconds


class Hosts:
    """Named after `word`: word1, word2, …, at `network`.1, … They know one another's names, and nobody else does."""

    def __init__(self, folder: Path, word: str, network: str, count: int) -> None:
        self.folder = folder
        self.addresses = {f"{word}{number}": f"{network}.{number}" for number in range(1, count + 1)}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        lines = [f"{address} {name}" for name, address in self.addresses.items()]
        (folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *lines]) + "\n")

    def start(self, name: str, command: Sequence[str]) -> None:
        """Starts the host of that name, with `command` as its foreground process."""
        inside = f'hostname {name} && mount --bind {self.folder}/hosts /etc/hosts && exec "$@"'
        spaces = ["unshare", "--uts", "--pid", "--mount", "--mount-proc", "--fork", "--kill-child"]
        with (self.folder / f"{name}.out").open("ab") as out:
            self._processes[name] = subprocess.Popen(
                [*spaces, "sh", "-c", inside, "sh", *command], stdout=out, stderr=out, start_new_session=True
            )

    def kill(self, name: str) -> None:
        process = self._processes.pop(name)
        process.kill()
        process.wait()

    def kill_all(self) -> None:
        for name in list(self._processes):
            self.kill(name)

    def running(self, words: str) -> list[int]:
        """Returns the ids of the processes on these hosts whose command line contains the words."""
        roots = [process.pid for process in self._processes.values()]
        return [pid for root in roots for pid in _below(root) if words in _command(pid)]


def need(*programs: str) -> None:
    """Skips the test if a program is missing or namespaces cannot be created."""
    path = f"{os.environ['PATH']}:/usr/sbin"
    missing = [program for program in programs if not shutil.which(program, path=path)]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}; `bash tests/run.sh cluster` installs them as root")
    if subprocess.run(["unshare", "--uts", "--pid", "--mount", "--fork", "true"], capture_output=True).returncode:
        pytest.skip("no namespaces may be made here")


def wait(condition: Callable[[], object], what: str, seconds: float = SOON) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.1)


def end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _below(pid: int) -> list[int]:
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return []
    children = [int(child) for child in text.split()]
    return children + [one for child in children for one in _below(child)]


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""
