"""Output without a reader, signals before training, a launcher that is gone, and children that must end."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.conftest import ROOT, free_port
from vaescale import process

TALK = """
import logging, os, subprocess, sys, threading, warnings
from vaescale import process
process.forgive_output()
from tqdm import tqdm
logging.basicConfig(stream=sys.stdout)
for number in range(300):
    print(f"{number:0>1000}", flush=number % 2 == 0)
    print("bits × steps \\udc80", file=sys.stderr, end="")
warnings.warn("a warning")
logging.warning("a warning")
with tqdm(total=3, disable=False) as bar, tqdm.external_write_mode(file=sys.stdout):
    bar.update()
    print("beside the bar")
thread = threading.Thread(target=print, args=("from a thread",))
thread.start()
thread.join()
if not os.fork():  # a loader's worker
    print("from a worker", flush=True)
    os._exit(0)
assert os.wait()[1] == 0
open(sys.argv[1], "w").write("all done")
print("not flushed", end="")
"""


def talk(done: Path, redirection: str, **environment: str) -> tuple[int, str]:
    """Returns the exit code of TALK with this shell redirection, and the shell's own stdout."""
    found = subprocess.run(
        ["bash", "-c", f'set -o pipefail; {{ "$0" -c "$1" "$2" {redirection}', sys.executable, TALK, str(done)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    return found.returncode, found.stdout


@pytest.mark.parametrize(
    "redirection",
    [
        "> /dev/full; }",
        "2> /dev/full; }",
        "> /dev/full 2>&1; }",
        "2>&1; } | head -c 1",
        "> /dev/null; } 2>&1 | true",
        ">&-; }",
        ">&- 2>&- < /dev/null; }",
        ">&- 2>&- <&-; }",
    ],
)
def test_output_that_cannot_be_written_is_ignored(tmp_path: Path, redirection: str) -> None:
    code, _ = talk(tmp_path / "done", redirection)
    assert (tmp_path / "done").read_text() == "all done"
    assert code == 0


def test_output_arrives_whatever_its_encoding(tmp_path: Path) -> None:
    code, output = talk(tmp_path / "done", "2>&1; }", PYTHONIOENCODING="ascii", PYTHONWARNINGS="default")
    assert code == 0
    assert f"{299:0>1000}\n" in output
    assert "bits \\xd7 steps \\udc80" in output
    for part in ("UserWarning: a warning", "beside the bar", "from a thread", "from a worker"):
        assert part in output
    assert output.endswith("not flushed")


def test_a_terminal_that_is_gone_is_ignored(tmp_path: Path) -> None:
    ours, theirs = os.openpty()
    started = subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read(); " + TALK, str(tmp_path / "done")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    os.close(ours)  # from here on EIO
    started.communicate(timeout=60)
    assert (tmp_path / "done").read_text() == "all done"
    assert started.returncode == 0


START = """
import sys, time
from vaescale import process
process.start()
STATE
print("ready", flush=True)
WAIT
time.sleep(60)
"""


def begin(state: str = "", before: str = "", wait: str = "") -> "subprocess.Popen[str]":
    """Starts START as a process in this state. before: shell commands to run first; wait: what it waits in."""
    started = subprocess.Popen(
        [
            "bash",
            "-c",
            f'{before} exec "$0" -c "$1"',
            sys.executable,
            START.replace("STATE", state).replace("WAIT", wait),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert started.stdout is not None
    assert started.stdout.readline() == "ready\n"
    return started


@pytest.mark.parametrize(
    ("state", "number", "code", "said"),
    [
        ("", signal.SIGINT, 130, "interrupted\n"),
        ("", signal.SIGTERM, 75, "ended by SIGTERM before training began\n"),
        ("", signal.SIGUSR1, 75, "ended by SIGUSR1 before training began\n"),
        ("", signal.SIGHUP, 75, "ended by SIGHUP before training began\n"),
        ("process.started()", signal.SIGTERM, 75, "ended by SIGTERM\n"),
        ("process.started(); process.ended()", signal.SIGINT, 130, "interrupted\n"),
    ],
)
def test_a_signal_in_start_up_ends_the_process_at_once(state: str, number: int, code: int, said: str) -> None:
    started = begin(state)
    started.send_signal(number)
    _, error = started.communicate(timeout=30)
    assert started.returncode == code
    assert error == said


def test_a_signal_is_heard_while_the_main_thread_waits_in_a_library() -> None:
    """As in a collective; a Python handler would only run after the minute."""
    started = begin(
        wait="import ctypes; lock = ctypes.create_string_buffer(64); c = ctypes.CDLL(None)\n"
        "c.pthread_mutex_lock(lock); c.pthread_mutex_lock(lock)"
    )
    begun = time.monotonic()
    time.sleep(0.2)
    started.send_signal(signal.SIGINT)
    started.communicate(timeout=30)
    assert started.returncode == 130
    assert time.monotonic() - begun < 20


def test_signals_are_heard_in_a_process_with_many_open_files() -> None:
    """`select` refuses descriptors above 1023."""
    opened = [os.open(os.devnull, os.O_RDONLY)]
    while opened[-1] < 1024:
        opened.append(os.dup(opened[0]))
    heard: list[int] = []
    try:
        with process.Listener(heard.append):
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        for one in opened:
            os.close(one)
    assert heard == [signal.SIGHUP]


def test_listening_ends_even_if_a_child_has_the_pipe() -> None:
    """As the workers of a loader do, however their rank fails."""
    before = signal.getsignal(signal.SIGTERM)
    heard: list[int] = []
    with process.Listener(heard.append):
        child = subprocess.Popen(["sleep", "60"], close_fds=False)
        forked = os.fork()
        if not forked:
            time.sleep(60)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(forked, signal.SIGTERM)  # is not heard here
    os.kill(forked, signal.SIGKILL)
    os.waitpid(forked, 0)
    child.kill()
    child.wait()
    assert heard == [signal.SIGHUP]
    assert signal.getsignal(signal.SIGTERM) == before


def test_what_is_ignored_stays_ignored() -> None:
    """As under nohup, or in a background job of a script."""
    started = begin(before="trap '' HUP INT;")
    started.send_signal(signal.SIGHUP)
    started.send_signal(signal.SIGINT)
    started.send_signal(signal.SIGTERM)
    assert started.communicate(timeout=30)[1] == "ended by SIGTERM before training began\n"


def test_signals_are_ignored_once_all_is_saved() -> None:
    started = begin("process.started(); process.ended()")
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT):
        started.send_signal(number)
        time.sleep(0.01)
    started.communicate(timeout=30)
    assert started.returncode == 130


LAUNCH = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], env={**os.environ, "RANK": "0"}, stdout=subprocess.PIPE)
print(child.pid, child.stdout.readline() if sys.argv[2:] else "", flush=True)
child.wait()
print(child.returncode, flush=True)
"""


@pytest.fixture
def launched() -> Iterator[list[psutil.Process]]:
    """Returns the child of LAUNCH, and ends it after the test."""
    children: list[psutil.Process] = []
    yield children
    for child in children:
        if child.is_running():
            child.kill()


def test_a_rank_leaves_with_its_launcher(launched: list[psutil.Process]) -> None:
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCH, START.replace("STATE", "").replace("WAIT", ""), "wait"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert launcher.stdout is not None
    launched.append(psutil.Process(int(launcher.stdout.readline().split()[0])))
    launcher.kill()
    _, error = launcher.communicate(timeout=30)  # stderr ends with the last of both
    assert error == "rank 0: the launcher died before training began\n"


def test_a_rank_leaves_with_deepspeed_whose_launch_py_would_go_on(
    tmp_path: Path, launched: list[psutil.Process]
) -> None:
    runner = tmp_path / "deepspeed"
    runner.write_text(LAUNCH.replace('"-c", sys.argv[1]', '"-c", *sys.argv[1:]'))
    launcher = subprocess.Popen(
        [sys.executable, str(runner), LAUNCH, START.replace("STATE", "").replace("WAIT", ""), "wait"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "CROSS_RANK": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert launcher.stdout is not None
    words = launcher.stdout.readline().split(maxsplit=1)
    launched.append(psutil.Process(int(words[0])))  # what stands for launch.py
    launched += launched[0].children()
    assert len(launched) == 2
    launcher.kill()
    _, error = launcher.communicate(timeout=30)
    assert "rank 0: the launcher died before training began\n" in error  # and launch.py cannot print any more
    assert psutil.wait_procs(launched, timeout=30)[1] == []


@pytest.mark.parametrize(("known", "code"), [({"TORCHELASTIC_RUN_ID": "1"}, 75), ({"CROSS_RANK": "0"}, 75), ({}, 0)])
def test_a_rank_whose_parent_is_only_the_wrapper_has_lost_its_launcher(
    tmp_path: Path, known: dict[str, str], code: int
) -> None:
    """launch/run.py adopts a rank whose launcher dies before the rank runs a line; it may also have started it."""
    wrapper = tmp_path / "launch" / "run.py"
    wrapper.parent.mkdir()
    wrapper.write_text(LAUNCH)
    found = subprocess.run(
        [sys.executable, str(wrapper), "from vaescale import process; process.start()"],
        env={**os.environ, "PYTHONPATH": str(ROOT), **known},
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    assert found.stdout.split()[-1] == str(code)


def test_a_stopped_child_dies_with_its_parent(launched: list[psutil.Process]) -> None:
    script = "import os; from vaescale import process; process.die_with_parent(os.getppid())\n"
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCH, script + "print('ready', flush=True); import time; time.sleep(60)", "wait"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert launcher.stdout is not None
    child = psutil.Process(int(launcher.stdout.readline().split()[0]))
    launched.append(child)
    child.suspend()
    launcher.kill()
    launcher.communicate()
    child.wait(30)


ALONE = """
from vaescale import distributed
distributed.JOIN = 2.0
try:
    distributed.init(1.0)
except distributed.Unjoined as error:
    print(error)
"""


def test_a_rank_does_not_wait_for_ever_for_one_that_has_died() -> None:
    """For rank 0 and for another rank, before the process group exists."""
    ports = [free_port() for _ in range(2)]
    waiting = [
        subprocess.Popen(
            [sys.executable, "-c", ALONE],
            env={
                **os.environ,
                **{"PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
                **{"RANK": str(rank), "WORLD_SIZE": "2"},
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for rank, port in enumerate(ports)
    ]
    for one, port in zip(waiting, ports, strict=True):
        said, _ = one.communicate(timeout=90)
        assert said.startswith(f"not all 2 ranks connected to 127.0.0.1:{port} within 2 s: one of them has ended")
        assert said.count("\n") == 1


UNCONNECTED = """
import os, sys
from vaescale import distributed
try:
    distributed.init(60.0)
    os.environ["GLOO_SOCKET_IFNAME"] = "vs-none"
    distributed.side_group()
except distributed.Unjoined as error:
    print(error)
"""


@pytest.mark.parametrize("first", [True, False])
def test_ranks_that_cannot_connect_name_the_variable_to_set(first: bool) -> None:
    """In the process group of CPUs, and in the side group, which GPUs have, too."""
    port = free_port()
    variables = {"PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    if first:
        variables["GLOO_SOCKET_IFNAME"] = "vs-none"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", UNCONNECTED],
            env={**os.environ, **variables, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    # A rank may see only that the other one has gone, with the store.
    assert any("Unable to find address for: vs-none" in text for text in said), said
    for text in said:
        assert text.startswith("the ranks cannot connect over gloo ("), said
        assert "set GLOO_SOCKET_IFNAME (now 'vs-none') on each node to the network interface by which" in text
        assert text.count("\n") == 1
