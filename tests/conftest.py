"""Shared fixtures: marks by folder, a tiny data set of real JPEGs, and processes that end with the test."""

import io
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.warm import Warm
from vaescale import distributed
from vaescale.data.shards import Sample, write

ROOT = Path(__file__).parent.parent
Command = Callable[..., tuple[int, str]]
KINDS = {
    "integration": "launch",
    "browser": "browser",
    "benchmarks": "benchmark",
    "faults": "faults",
    "cluster": "cluster",
}

# A shell starts background jobs with ^C ignored, and nohup ignores SIGHUP. All processes that the tests start would
# inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Returns command(module, words) → (exit code, output), which runs in this process without a process group."""
    monkeypatch.setattr(distributed, "init", lambda: torch.device("cpu"))

    def command(module: object, *words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["command", *map(str, words)])
        code = module.main(module.parse())  # type: ignore[attr-defined]
        return code, "".join(capsys.readouterr())

    return command


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        folder = item.path.parent.name
        item.add_marker(KINDS.get(folder, "unit"))


def jpeg(seed: int, width: int = 40, height: int = 36) -> bytes:
    """Returns a smooth random image, which JPEG compresses well."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=95)
    return file.getvalue()


def samples(count: int, seed: int = 0) -> list[Sample]:
    return [Sample(f"{seed}-{i:05d}", jpeg(1000 * seed + i), i % 7) for i in range(count)]


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data.root with 90 training images in 5 shards, and 11 validation images."""
    root = tmp_path_factory.mktemp("pictures")
    write(root / "train", samples(90), 20, [])
    write(root / "val", samples(11, seed=1), 4, [])
    return root


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


WARM = re.compile(r"-m|(launch|launch/slurm|tests/benchmarks)/\w+\.py")  # commands whose imports take seconds
Process = subprocess.Popen[str] | Warm
Start = Callable[..., Process]


def begin(command: list[str], cold: bool = False, **environment: str) -> Process:
    """Start a process in its own session. Commands that match WARM start without the seconds of their imports, unless
    `cold`, see warm.py."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", **environment}
    if not cold and command[0] == sys.executable and WARM.fullmatch(command[1]):
        return Warm(command, env)
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True, **output)


@pytest.fixture
def start() -> Iterator[Start]:
    """Like `begin`, for processes that are killed when the test ends."""
    begun: list[Process] = []

    def start(command: list[str], cold: bool = False, **environment: str) -> Process:
        begun.append(begin(command, cold, **environment))
        return begun[-1]

    yield start
    for process in begun:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdout:
            process.stdout.close()


def finish(process: Process, timeout: float = 300) -> tuple[int, str]:
    """Returns (exit code, output)."""
    output, _ = process.communicate(timeout=timeout)
    return process.returncode, output


def ranks(start: Start, count: int, arguments: list[str], slurm: bool = False) -> list[Process]:
    """Start `count` ranks of a script with the environment of a launcher (or `srun`): the fastest real launch."""
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS") if slurm else ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    step = {"SLURM_STEP_ID": "0"} if slurm else {}
    return [
        start(
            [sys.executable, *arguments],
            **dict(zip(names, (str(rank), str(rank), str(count)), strict=True)),
            **rendezvous,
            **step,
        )
        for rank in range(count)
    ]
