"""Python processes that start without the seconds that imports take: they are forked from one that has imported all.

`Server` starts `python -m tests.warm SOCKET`, which imports what the commands of launch/ need. For each `Warm` it forks
a keeper, and the keeper forks the process itself, is its parent, and reports how it ended. The process is like a new
one: with its own session, environment, arguments and output. When the server's socket closes, the server ends.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
LIMIT = 1 << 17  # bytes of a request
# What the commands, forked.py, and torch and DeepSpeed during the first steps import.
IMPORTS = [
    "vaescale.advice.dry_run",
    "vaescale.advice.postmortem",
    "vaescale.advice.preflight",
    "vaescale.evaluation.evaluate",
    "vaescale.evaluation.sample",
    "vaescale.trained",
    "vaescale.training.trainer",
    "deepspeed.module_inject",
    "deepspeed.ops.adam",
    "deepspeed.runtime.engine",
    "einops._torch_specific",
    "psutil",
    "sympy",
    "tensorboard.plugins.hparams.summary_v2",
    "torch._dynamo",
    "torch.profiler",
    "PIL.GifImagePlugin",
    "PIL.PngImagePlugin",
    "PIL.PpmImagePlugin",
]


class Server:
    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.warm", str(theirs.fileno())],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"},
                stdout=subprocess.DEVNULL,  # buffered, as in a pipe
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        atexit.register(self.close)

    def close(self) -> None:
        self._socket.close()
        self._process.wait()

    def begin(self, request: Mapping[str, object], files: Sequence[int]) -> None:
        socket.send_fds(self._socket, [json.dumps(request).encode()], files)


_servers: list[Server] = []


class Warm:
    """What tests use of subprocess.Popen, for `python SCRIPT …` or `python -m MODULE …` with the output in a pipe."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str]) -> None:
        if not _servers:
            _servers.append(Server())
        self.args, self.returncode = list(command), None
        output, theirs = os.pipe()
        self._reports, keepers = os.pipe()
        try:
            _servers[0].begin({"command": command[1:], "env": dict(env), "cwd": str(ROOT)}, [theirs, keepers])
        finally:
            os.close(theirs)
            os.close(keepers)
        self.stdout = os.fdopen(output, encoding="utf-8", errors="replace")
        self.pid = self._report()

    def _report(self) -> int:
        """The next line, and nothing of the one after it."""
        line = b""
        while not line.endswith(b"\n"):
            byte = os.read(self._reports, 1)
            assert byte, "the server of warm processes has ended"
            line += byte
        return int(line)

    def _reported(self, timeout: float | None) -> bool:
        waiting = select.poll()
        waiting.register(self._reports, select.POLLIN)
        return bool(waiting.poll(None if timeout is None else 1000 * timeout))

    def poll(self) -> int | None:
        if self.returncode is None and self._reported(0):
            self.wait()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not self._reported(timeout):
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self.returncode = self._report()
            os.close(self._reports)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """After `timeout` seconds it kills the process, unlike that of Popen."""
        late = threading.Event()

        def kill() -> None:
            late.set()
            os.killpg(self.pid, signal.SIGKILL)

        timer = threading.Timer(timeout or threading.TIMEOUT_MAX, kill)
        timer.start()
        try:
            output = self.stdout.read()
            self.wait()
        finally:
            timer.cancel()
            timer.join()
        self.stdout.close()
        if late.is_set():
            raise subprocess.TimeoutExpired(self.args, timeout or 0, output)
        return output, None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def serve(requests: socket.socket) -> dict[str, object]:
    """Fork a process for each request. Only the forked processes return, with their request."""
    keepers: set[int] = set()
    while True:
        data, files, _, _ = socket.recv_fds(requests, LIMIT, 2)
        keepers = {keeper for keeper in keepers if not os.waitpid(keeper, os.WNOHANG)[0]}
        if not data:
            os._exit(0)
        keeper = os.fork()
        if not keeper:
            requests.close()
            keep(*files)
            return json.loads(data)
        keepers.add(keeper)
        for file in files:
            os.close(file)


def keep(output: int, reports: int) -> None:
    """Fork once more. The child returns, with its output in place. The parent waits for it and exits."""
    child = os.fork()
    if child:
        os.setsid()
        os.close(output)
        ended = os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        os.write(reports, f"{ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status}\n".encode())
        closed = select.poll()
        closed.register(reports, 0)
        closed.poll()  # until the test has waited for it, its number is not used again
        os.waitpid(child, 0)
        os._exit(0)
    os.setsid()
    os.write(reports, f"{os.getpid()}\n".encode())
    os.close(reports)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)


def main() -> None:
    for name in IMPORTS:
        importlib.import_module(name)
    settings = importlib.import_module("vaescale.settings")
    with importlib.import_module("torch").random.fork_rng():
        config = ROOT / "tests" / "integration" / "tiny.yaml"
        settings.check(settings.load(config, ["run=none", "data.root=none"]), 1)  # the first check takes longest
    gc.collect()
    gc.freeze()  # shared objects are then neither traversed nor copied
    request = serve(socket.socket(fileno=int(sys.argv[1])))
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.argv = request["command"]
    os._exit(run())


def run() -> int:
    """Returns the exit code, after all that ends a process but the deletion of thousands of imported modules."""
    code = 0
    try:
        if sys.argv[0] == "-m":
            del sys.argv[0]
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str(Path(sys.argv[0]).parent.resolve()))
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    main()
